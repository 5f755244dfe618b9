"""Users' modules as sides: intermediates are the outputs of the layers that are paired."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.compare.flax_side import FlaxSide
from convert.compare.sides import Run
from convert.compare.torch_side import TorchSide, to_numpy
from convert.judge.noise import Arrays, named_outputs, precision_of
from convert.matching import alignment
from convert.matching.pair import LayerPair
from convert.runtime.call import Call, cast, leaves, with_leaves
from convert.runtime.flax_function import FlaxFunction
from convert.runtime.flax_modules import function, widened
from convert.runtime.trace import Trace


@dataclass(frozen=True)
class Aligned:
    """An array of both sides: where each has it, and how its axes lie."""

    name: str  # of the row
    torch: tuple[str, int, str]  # layer, which call of it, path in its output
    flax: tuple[str, int, str]
    move: str
    shape: tuple[int, ...]  # torch's


class Moves:
    """Axes, as `alignment` tells them."""

    def __init__(self, moves: Mapping[str, tuple[str, tuple[int, ...], tuple[int, ...]]]) -> None:
        self.moves = moves  # name -> move, torch's shape, Flax's shape

    def to_flax(self, name: str, array: np.ndarray) -> np.ndarray:
        move, _, shape = self.moves[name]
        return alignment.to_flax(array, move, shape)

    def from_flax(self, name: str, array: np.ndarray) -> np.ndarray:
        move, shape, _ = self.moves[name]
        return alignment.to_torch(array, move, shape)


class ModuleTorchSide(TorchSide):
    """A user's torch module. `aligned` says which intermediates are wanted."""

    aligned: tuple[Aligned, ...] = ()

    def shaken(self, i: int) -> ModuleTorchSide:
        made = ModuleTorchSide(self.module, self.call, seed=self.seed, moved=i)
        made.aligned, made.precisions = self.aligned, self.precisions
        made.combined = self.combined
        return made

    def trace(self, precision: str) -> Trace:
        """A run with every layer recorded."""
        from convert.runtime.capture_torch import record

        with precision_of(precision):
            module = self.prepare(precision)
            given, _ = self._inputs(module, precision, False)
            arrays = {k: to_numpy(v) for k, v in given.items()}
            return record(module, Call(*with_leaves(self.call, arrays)), precision)

    def narrow_operation(self) -> str | None:
        """An operation that computes in fewer than 64 bits when all is cast to 64, if there is."""
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        found: list[str] = []

        class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                made = func(*args, **(kwargs or {}))
                for x in made if isinstance(made, tuple | list) else (made,):
                    floating = isinstance(x, torch.Tensor) and x.is_floating_point()
                    if floating and x.dtype != torch.float64:
                        name = str(func).removeprefix("aten.").partition(".")[0]
                        found.append(f"{name} in {str(x.dtype).removeprefix('torch.')}")
                return made

        with precision_of("float64"), torch.no_grad():
            module = self.prepare("float64")
            given, _ = self._inputs(module, "float64", False)
            args, kwargs = with_leaves(self.call, given)
            with Watch():  # type: ignore[no-untyped-call]
                module(*args, **kwargs)
        return found[0] if found else None

    def run(self, precision: str, *, backward: bool) -> Run:
        trace = self.trace(precision)
        found = recorded(trace)
        outputs = {a.name: found[a.torch] for a in self.aligned if a.torch in found}
        outputs |= {k: to_numpy(v) for k, v in named_outputs(trace.output).items()}
        if not backward:
            return Run(outputs)
        made = super().run(precision, backward=True)
        return Run(outputs, made.loss, made.gradients)


class ModuleFlaxSide(FlaxSide):
    """A user's Flax module. `outputs` are torch's names of its outputs, in order."""

    def __init__(
        self,
        module: Any,
        call: Call,
        axes: Moves,
        aligned: tuple[Aligned, ...],
        outputs: tuple[str, ...],
        **options: Any,
    ) -> None:
        def make(precision: str, training: bool) -> FlaxFunction:
            return function(module, precision, training)

        super().__init__(make, call, axes, **options)
        self.module = module
        self.aligned = aligned
        self.outputs = outputs

    def run(self, precision: str, *, backward: bool) -> Run:
        found_outputs = self._traced(precision)
        if not backward:
            return Run(found_outputs)
        with widened(precision):
            made = super().run(precision, backward=True)
        return Run(found_outputs, made.loss, made.gradients)

    def narrow_operation(self) -> str | None:
        """As `ModuleTorchSide`'s; nothing is run."""
        from convert.runtime.flax_modules import narrow_operation

        with precision_of("float64"), widened("float64"):
            given = cast(leaves(self.call), "float64")
            return narrow_operation(self.module, with_leaves(self.call, given))

    def train(self, precision: str, optimizer: Any, steps: int) -> Any:
        with widened(precision):
            return super().train(precision, optimizer, steps)

    def _traced(self, precision: str) -> Arrays:
        from convert.runtime.capture_flax import Side, record

        with precision_of(precision), widened(precision):
            trace = record(Side(self.module, precision), self.call)
        found = recorded(trace)
        outputs = {
            a.name: alignment.to_torch(found[a.flax], a.move, a.shape)
            for a in self.aligned
            if a.flax in found
        }
        return outputs | {k: self._back(k, v) for k, v in self._named(trace.output).items()}

    def _named(self, output: Any) -> dict[str, Any]:
        """Outputs under torch's names."""
        return dict(zip(self.outputs, named_outputs(output).values(), strict=True))


def recorded(trace: Trace) -> dict[tuple[str, int, str], np.ndarray]:
    """Every array that a layer gave."""
    return {(c.name, c.index, path): x for c in trace.calls for path, x in c.outputs.items()}


def align_layers(layers: list[LayerPair], torch: Trace, flax: Trace) -> tuple[Aligned, ...]:
    """The outputs of paired layers that can be compared, in torch's order of execution."""
    theirs = recorded(flax)
    partner = {pair.torch: pair.flax for pair in layers if pair.torch}
    found = []
    for call in sorted(torch.calls, key=lambda c: c.end):
        for path, x in call.outputs.items():
            other = (partner.get(call.name, ""), call.index, path)
            if call.name not in partner or other not in theirs or x.dtype.kind != "f":
                continue
            if alignment.moves(x.shape, theirs[other].shape):
                move = alignment.best_move(x, theirs[other])
                name = call.name + (f"#{call.index + 1}" if call.index else "")
                name += f":{path}" if path else ""
                here = (call.name, call.index, path)
                found.append(Aligned(name, here, other, move, tuple(x.shape)))
    return tuple(found)
