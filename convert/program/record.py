"""A torch module's run, recorded operation by operation.

Calls of paired layers are not opened: what they give is a leaf of the program. torch's functions
are seen by a TorchFunctionMode, as the user called them, before they are taken apart for dispatch.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import os
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import numpy as np

from convert.program.opened import OPENED
from convert.program.operations import Leaf, Operation, Program, Ref, Site, find, mapped, short_name
from convert.program.recurrent import CELLS, as_recurrent, recurrent
from convert.runtime.arrays import is_inexact, leaves, replaced
from convert.runtime.call import Call
from convert.runtime.torch_calls import run
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


def _others(every: Program, wanted: Program, mode: _Tape, module: str) -> dict[int, Leaf]:
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
        self.mode = _mode()
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
        values = {}
        for path, t in given.items():
            if not isinstance(t, _torch().Tensor) or (name and not is_inexact(t)):
                continue
            recorded = entry.inputs.get(path) if entry is not None and name else None
            values[path] = t.clone() if recorded is None else _like(recorded, t)
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
                entry = self.known[key].outputs
                values = {k: _like(entry[k], t) for k, t in made.items() if k in entry}
                output = replaced(output, values)
                for path, t in leaves(output).items():
                    of = f"{name} {path}".strip()
                    self.layers[self.mode.leaf(t, of, "layer")] = name, taken
            opened = [n for (n, _), shut, _ in self.stack if not shut]
            self.mode.module = opened[-1] if opened else ""
        return output


def _like(array: np.ndarray, tensor: Any) -> Any:
    torch = _torch()
    if tuple(tensor.shape) != array.shape:
        return tensor.clone()
    return torch.from_numpy(np.array(array)).to(tensor.device, tensor.dtype)


def _torch() -> Any:
    import torch

    return torch


def _variable_function(func: Any) -> str:
    """The name of a function that torch does not list: of packed sequences."""
    name = getattr(func, "__name__", "")
    held = getattr(_torch()._C._VariableFunctions, name, None) if name else None
    return f"torch._C._VariableFunctions.{name}" if held is not None else ""


def _mode() -> Any:
    """A TorchFunctionMode that records."""
    from torch.overrides import TorchFunctionMode, resolve_name

    class Mode(TorchFunctionMode, _Tape):
        def __init__(self) -> None:
            TorchFunctionMode.__init__(self)
            _Tape.__init__(self)

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if self.muted:
                return func(*args, **kwargs)
            name = resolve_name(func) or _variable_function(func)
            if not name or name.startswith(("torch.nn.init.", "torch.Tensor.requires_grad")):
                return func(*args, **kwargs)
            opened = self.written_out(name, args, kwargs)
            if opened is not None:
                with self, self.at_one_site():
                    return opened()
            return self.call(name, func, args, kwargs)

    return Mode()


class _Tape:
    """What has been recorded so far."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.leaves: dict[int, Leaf] = {}
        self.values: dict[int, Any] = {}  # of leaves
        self.made: set[int] = set()  # values that an operation makes
        self.ids: dict[int, int] = {}  # id of a tensor -> its value
        self.held: list[Any] = []  # so that no id is used again
        self.frames: dict[int, int] = {}  # id of a frame -> its number
        self.held_frames: list[Any] = []
        self.module = ""
        self.muted = 1
        self.site: Site | None = None

    def quiet(self) -> Any:
        """Nothing is recorded meanwhile."""
        return _Quiet(self)

    def at_one_site(self) -> Any:
        """What is recorded meanwhile stands where this call stands."""
        return _AtSite(self)

    def leaf(self, tensor: Any, name: str, kind: Any) -> int:
        """A value that nothing recorded makes."""
        value = self.number(tensor)
        self.leaves[value] = Leaf(name, kind)
        self.values[value] = tensor.detach().clone()
        return value

    def number(self, tensor: Any) -> int:
        """A new value for what the tensor holds now."""
        value = len(self.held)
        self.held.append(tensor)
        self.ids[id(tensor)] = value
        return value

    def passed_on(self, value: int) -> None:
        """A value that is handed on as it is, as an operation of its own."""
        number = self.number(self.values[value])
        place = self.site
        self.operations.append(
            Operation("torch.clone", (Ref(value),), {}, (number,), self.module, place)
        )

    def written_out(self, name: str, args: Any, kwargs: Any) -> Callable[[], Any] | None:
        """A fused call by its steps, if it can be."""
        if name.startswith("torch.") and name.removeprefix("torch.") in CELLS:
            try:
                given, named = as_recurrent(name.removeprefix("torch."), args)
            except NotImplementedError:
                return None
            return lambda: self.call("recurrent", recurrent, given, named)
        if (opened := OPENED.get(name)) is None:
            return None
        try:
            with self.quiet():
                opened(*args, **kwargs)
        except (NotImplementedError, TypeError):
            return None
        return lambda: opened(*args, **kwargs)

    def call(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation, and record it if it makes or changes a tensor."""
        torch = _torch()
        given = _tensors((args, kwargs))
        before = [t._version for t in given]
        output = func(*args, **kwargs)
        written = [i for i, t in enumerate(given) if t._version != before[i]]
        made = [given[written[0]]] if written else _tensors(output)
        if not made or short_name(name) in ("data", "grad", "detach_", "requires_grad_"):
            return output
        known = [t for t in given if id(t) in self.ids]
        for t in given:
            if id(t) not in self.ids:
                self.leaf(t, "a tensor", "constant")

        def ref(x: Any) -> Any:
            return Ref(self.ids[id(x)]) if isinstance(x, torch.Tensor) else x

        plain = (mapped(tuple(args), ref), mapped(dict(kwargs), ref))
        if not _is_plain(plain) or (written and not known and not given):
            for t in made:
                self.leaf(t, f"what {short_name(name)} gives", "constant")
            return output
        numbers = tuple(self.number(t) for t in made)
        self.made |= set(numbers)
        site = self.site or self.place()
        writes = written[0] if written else None
        self.operations.append(Operation(name, *plain, numbers, self.module, site, writes))
        return output

    def place(self) -> Site | None:
        """The innermost frame of the user's own code, and the calls around it."""
        frame: FrameType | None = sys._getframe(1)
        users = []
        while frame is not None and frame.f_code is not record.__code__:
            if not frame.f_code.co_filename.startswith(_not_users()):
                users.append(frame)
            frame = frame.f_back
        if not users:
            return None
        for user in reversed(users):
            if id(user) not in self.frames:
                self.frames[id(user)] = len(self.frames)
                self.held_frames.append(user)
        code, at = users[0].f_code, users[0].f_lasti
        line, text = _expression(users[0])
        position = (code.co_filename, code.co_firstlineno, at)
        calls = tuple(self.frames[id(user)] for user in reversed(users))
        return Site(code.co_filename, line, text, _title(code), position, calls)


class _Quiet:
    def __init__(self, tape: _Tape) -> None:
        self.tape = tape

    def __enter__(self) -> None:
        self.tape.muted += 1

    def __exit__(self, *exception: object) -> None:
        self.tape.muted -= 1


class _AtSite:
    def __init__(self, tape: _Tape) -> None:
        self.tape, self.before = tape, tape.site

    def __enter__(self) -> None:
        self.tape.site = self.tape.site or self.tape.place()

    def __exit__(self, *exception: object) -> None:
        self.tape.site = self.before


@functools.cache
def _not_users() -> tuple[str, ...]:
    """Where code lies that is neither the user's nor a library's of models."""
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return os.path.dirname(_torch().__file__), ours, contextlib.__file__


def _title(code: Any) -> str:
    return str(getattr(code, "co_qualname", code.co_name)).replace("<locals>.", "")


def _expression(frame: FrameType) -> tuple[int, str]:
    """The line and the expression that a frame is at."""
    positions = list(frame.f_code.co_positions())
    line, last, start, end = positions[frame.f_lasti // 2]
    if line is None:
        return frame.f_lineno, linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    file = frame.f_code.co_filename
    lines = [linecache.getline(file, n) for n in range(line, (last or line) + 1)]
    if lines and start is not None and end is not None:
        lines[-1] = lines[-1].encode()[:end].decode(errors="ignore")
        lines[0] = lines[0].encode()[start:].decode(errors="ignore")
    return line, " ".join(" ".join(lines).split())


def _tensors(tree: Any) -> list[Any]:
    return list(find(tree, _torch().Tensor))


def _is_plain(tree: Any) -> bool:
    """Whether arguments are data."""
    torch = _torch()
    plain = (
        Ref, int, float, complex, str, bool, type(None), type(Ellipsis),
        torch.dtype, torch.device, torch.layout, torch.memory_format,
    )  # fmt: skip
    good = True

    def look(x: Any) -> Any:
        nonlocal good
        good = good and isinstance(x, plain)
        return x

    mapped(tree, look)
    return good
