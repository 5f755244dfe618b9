"""A torch module's run, recorded operation by operation.

Calls of paired layers are not opened: what they give is a leaf of the program. torch's functions
are seen by a TorchFunctionMode, as the user called them, before they are taken apart for dispatch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from convert.program.operations import Leaf, Program
from convert.program.tape import Tape, tape
from convert.runtime.arrays import is_inexact, leaves, replaced
from convert.runtime.call import Call
from convert.runtime.torch_calls import like, run
from convert.runtime.trace import Recorded, array_arguments, with_arguments

Key = tuple[str, int]  # a submodule's name, and which of its calls


@dataclass(frozen=True)
class Goal:
    """The value whose computation is wanted: an input or output of one call of a submodule."""

    call: Key
    where: Literal["input", "output"]
    name: str  # as in Recorded.inputs or outputs


@dataclass
class Recording:
    """A program, and what its leaves were in this run: torch tensors."""

    program: Program
    leaves: dict[int, Any]


class NotSeen(Exception):
    """The run did not come to the target, or no recorded operation made it."""


def record(
    module: Any,
    call: Call,
    precision: str,
    known: Mapping[Key, Recorded],
    fixed: Collection[str],
    target: Goal,
) -> Recording:
    """The computation of `target` in one run of the module, which is changed by it.

    Every call of a layer of `fixed` gives the outputs that `known` recorded; the calls around the
    target are opened, and get their floating-point inputs from there. NotSeen where the target is
    not reached.
    """
    watch = _Run(module, known, fixed, target)
    try:
        with watch.mode:
            run(module, call, precision, watch.enter, watch.leave)
    except _Reached:
        pass
    mode = watch.mode
    if watch.target is None:
        raise NotSeen(f"{target.where} {target.name} of {target.call} is not reached")
    if watch.target in mode.leaves:
        mode.passed_on(watch.target)
        watch.target = len(mode.held) - 1
    every = Program(mode.operations, mode.leaves, watch.target, watch.layers)
    wanted = every.slice()
    others = _others(every, wanted, mode, mode.module)
    wanted.leaves |= others
    return Recording(wanted, {v: mode.values[v] for v in wanted.leaves})


_OTHERS = 40  # values beside the computation that are offered


def _others(every: Program, wanted: Program, mode: Tape, module: str) -> dict[int, Leaf]:
    """Values near the target that it does not depend on: somebody may have taken one of them by
    mistake. The parameters of the module around it, then what was computed last."""
    held = {v for o in wanted.operations for v in o.made} | set(wanted.leaves)
    prefix = f"{module}." if module else ""
    near: dict[int, Leaf] = {
        v: leaf
        for v, leaf in every.leaves.items()
        if v not in held and leaf.kind in ("parameter", "buffer") and leaf.name.startswith(prefix)
    }
    near = dict(sorted(near.items(), key=lambda item: item[1].name.count("."))[:_OTHERS])
    for operation in reversed(every.operations):
        for value in operation.made:
            if value not in held and value not in near and len(near) < 2 * _OTHERS:
                text = f"`{operation.site.text}`" if operation.site else operation.name
                near[value] = Leaf(text, "constant")
                mode.values[value] = mode.held[value].detach().clone()
    for value, leaf in every.leaves.items():
        if value not in held and leaf.kind in ("layer", "input"):
            near[value] = leaf
    return near


class _Reached(Exception):
    """Ends the run at the target."""


class _Run:
    """The hooks of a run: which module is being called, and what is put in."""

    def __init__(
        self, module: Any, known: Mapping[Key, Recorded], fixed: Collection[str], target: Goal
    ) -> None:
        self.known, self.fixed, self.wanted = known, fixed, target
        self.mode = tape(record.__code__)
        self.target: int | None = None
        self.layers: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.counts: dict[str, int] = {}
        self.stack: list[tuple[Key, bool, tuple[int, ...]]] = []
        at, self.around = known.get(target.call), {target.call}
        for key, entry in known.items():
            if at is not None and entry.order <= at.order and entry.end >= at.end:
                self.around.add(key)
        if target.where == "input":
            self.around.discard(target.call)
        for name, t in [*module.named_parameters(), *module.named_buffers()]:
            kind: Any = "parameter" if isinstance(t, _torch().nn.Parameter) else "buffer"
            self.mode.leaf(t, name, kind)

    def enter(self, name: str, part: Any, args: Any, kwargs: Any) -> Any:
        key = name, self.counts.get(name, 0)
        self.counts[name] = key[1] + 1
        if not name:
            self.mode.muted = 0
        elif self.mode.muted:
            self.stack.append((key, False, ()))
            return args, kwargs
        with self.mode.quiet():
            given = array_arguments(part.forward, args, kwargs)
            if key == self.wanted.call and self.wanted.where == "input":
                tensor = given.get(self.wanted.name)
                self.target = None if tensor is None else self.mode.ids.get(id(tensor))
                raise _Reached
            closed = name in self.fixed and key not in self.around and key in self.known
            taken = tuple(self.mode.ids[id(t)] for t in given.values() if id(t) in self.mode.ids)
            if not closed and (not name or name in self.fixed):
                args, kwargs = self._forced(name, part, args, kwargs, given)
        self.stack.append((key, closed, taken))
        self.mode.module = self.mode.module if closed else name
        self.mode.muted += closed
        return args, kwargs

    def _forced(self, name: str, part: Any, args: Any, kwargs: Any, given: Any) -> Any:
        """The inputs of an opened call: torch's own, as leaves."""
        entry = self.known.get((name, self.counts[name] - 1))
        tensors = {k: t for k, t in given.items() if isinstance(t, _torch().Tensor)}
        given = {k: t for k, t in tensors.items() if not name or is_inexact(t)}
        recorded = like(given, entry.inputs) if entry is not None and name else {}
        values = {k: recorded[k] if k in recorded else t.clone() for k, t in given.items()}
        for path in values:
            self.mode.leaf(values[path], f"the input {path} of {name or 'the model'}", "input")
        return with_arguments(part.forward, args, kwargs, values)

    def leave(self, name: str, part: Any, output: Any) -> Any:
        key, closed, taken = self.stack.pop()
        if closed:
            self.mode.muted -= 1
        if self.mode.muted:
            return output
        with self.mode.quiet():
            made = leaves(output)
            if key == self.wanted.call and self.wanted.where == "output":
                tensor = made.get(self.wanted.name)
                self.target = None if tensor is None else self.mode.ids.get(id(tensor))
                raise _Reached
            if closed:
                values = {k: t.clone() for k, t in made.items()}
                output = replaced(output, values | like(made, self.known[key].outputs))
                for path, t in leaves(output).items():
                    of = f"{name} {path}".strip()
                    self.layers[self.mode.leaf(t, of, "layer")] = name, taken
            opened = [n for (n, _), shut, _ in self.stack if not shut]
            self.mode.module = opened[-1] if opened else ""
        return output


def _torch() -> Any:
    import torch

    return torch
