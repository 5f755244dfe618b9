"""The closed set of operations between the two sides of a layout entry.

Each only moves elements: nothing is computed, so each has an exact inverse, dtypes do not matter,
and the first and second moments of an optimizer follow their weight through the same op. An op
takes a list of arrays and gives a list, one for one except where it joins or divides.

`run` works on anything with NumPy's `transpose`, `reshape` and indexing and gives views where it
can; `zoo.checkpoint.apply` makes the result contiguous.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

Shape = tuple[int, ...]
_STACKED = 4096  # arrays that one op may make of one: a layout may come from anywhere


class Op(ABC):
    """One step from the canonical tensors of an entry towards its Flax tensors."""

    @abstractmethod
    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        """The shapes that `run` gives for arrays of these shapes; ValueError if it cannot."""

    @abstractmethod
    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The op on arrays."""

    @abstractmethod
    def inverse(self, shapes: Sequence[Shape]) -> Op:
        """The op that undoes this one, for inputs of these shapes."""


Ops = tuple[Op, ...]


class _Single(Op):
    """An op from one array to one, applied to each of a list."""

    @abstractmethod
    def _shape(self, shape: Shape) -> Shape: ...

    @abstractmethod
    def _run(self, array: np.ndarray) -> np.ndarray: ...

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        return [self._shape(s) for s in shapes]

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self._run(a) for a in arrays]


@dataclass(frozen=True, slots=True)
class Permute(_Single):
    """Axes in another order: axis i of the result is axis `axes[i]` of the input."""

    axes: tuple[int, ...]

    def _shape(self, shape: Shape) -> Shape:
        if sorted(self.axes) != list(range(len(shape))):
            raise ValueError(f"axes {self.axes} do not permute those of {shape}")
        return tuple(shape[a] for a in self.axes)

    def _run(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(self.axes)

    def inverse(self, shapes: Sequence[Shape]) -> Permute:
        return Permute(_argsort(self.axes))


@dataclass(frozen=True, slots=True)
class Flip(_Single):
    """The named axes back to front, as a transposed convolution wants its kernel."""

    axes: tuple[int, ...]

    def _shape(self, shape: Shape) -> Shape:
        if any(not 0 <= a < len(shape) for a in self.axes) or len(set(self.axes)) < len(self.axes):
            raise ValueError(f"{shape} has no axes {self.axes}")
        return shape

    def _run(self, array: np.ndarray) -> np.ndarray:
        return np.flip(array, self.axes)

    def inverse(self, shapes: Sequence[Shape]) -> Flip:
        return self


@dataclass(frozen=True, slots=True)
class Reorder(_Single):
    """A flattened axis read in another order: (C, H, W) flattened becomes (H, W, C) flattened.

    `sizes` are the factors of axis `axis` as it stands; `order` is their order in the result.
    """

    axis: int
    sizes: tuple[int, ...]
    order: tuple[int, ...]

    def _shape(self, shape: Shape) -> Shape:
        if self.axis >= len(shape) or shape[self.axis] != math.prod(self.sizes):
            raise ValueError(f"axis {self.axis} of {shape} is not a flattened {self.sizes}")
        if sorted(self.order) != list(range(len(self.sizes))):
            raise ValueError(f"{self.order} is not an order of {self.sizes}")
        return shape

    def _run(self, array: np.ndarray) -> np.ndarray:
        k, shape = self.axis, array.shape
        factored = array.reshape(shape[:k] + self.sizes + shape[k + 1 :])
        axes = (
            *range(k),
            *(k + a for a in self.order),
            *range(k + len(self.sizes), factored.ndim),
        )
        return factored.transpose(axes).reshape(shape)

    def inverse(self, shapes: Sequence[Shape]) -> Reorder:
        return Reorder(self.axis, tuple(self.sizes[a] for a in self.order), _argsort(self.order))


@dataclass(frozen=True, slots=True)
class Split(_Single):
    """One axis into several named ones: hidden into (heads, head_dim)."""

    axis: int
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def _shape(self, shape: Shape) -> Shape:
        if self.axis >= len(shape) or shape[self.axis] != math.prod(self.sizes):
            raise ValueError(f"axis {self.axis} of {shape} is not {_named(self.names, self.sizes)}")
        return shape[: self.axis] + self.sizes + shape[self.axis + 1 :]

    def _run(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self._shape(array.shape))

    def inverse(self, shapes: Sequence[Shape]) -> Merge:
        return Merge(self.axis, self.names, self.sizes)


@dataclass(frozen=True, slots=True)
class Merge(_Single):
    """Several named neighbouring axes, the first of them `axis`, into one."""

    axis: int
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def _shape(self, shape: Shape) -> Shape:
        stop = self.axis + len(self.sizes)
        if shape[self.axis : stop] != self.sizes:
            named = _named(self.names, self.sizes)
            raise ValueError(f"axes {self.axis} to {stop - 1} of {shape} are not {named}")
        return (*shape[: self.axis], math.prod(self.sizes), *shape[stop:])

    def _run(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self._shape(array.shape))

    def inverse(self, shapes: Sequence[Shape]) -> Split:
        return Split(self.axis, self.names, self.sizes)


@dataclass(frozen=True, slots=True)
class Concat(Op):
    """Several arrays into one along an axis on which they have these sizes."""

    axis: int
    sizes: tuple[int, ...]

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        k = self.axis
        rests = {s[:k] + s[k + 1 :] for s in shapes}
        if len(rests) != 1 or tuple(s[k] for s in shapes) != self.sizes:
            raise ValueError(f"{list(shapes)} do not join along axis {k} with sizes {self.sizes}")
        return [(*shapes[0][:k], sum(self.sizes), *shapes[0][k + 1 :])]

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.concatenate(arrays, self.axis)]

    def inverse(self, shapes: Sequence[Shape]) -> Divide:
        return Divide(self.axis, self.sizes)


@dataclass(frozen=True, slots=True)
class Divide(Op):
    """One array into several along an axis: a fused projection into query, key and value."""

    axis: int
    sizes: tuple[int, ...]

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        (shape,) = shapes
        if shape[self.axis] != sum(self.sizes):
            raise ValueError(f"axis {self.axis} of {shape} does not divide into {self.sizes}")
        return [(*shape[: self.axis], n, *shape[self.axis + 1 :]) for n in self.sizes]

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        (array,) = arrays
        ends = np.cumsum(self.sizes)
        before = (slice(None),) * self.axis
        return [
            array[(*before, slice(end - n, end))] for n, end in zip(self.sizes, ends, strict=True)
        ]

    def inverse(self, shapes: Sequence[Shape]) -> Concat:
        return Concat(self.axis, self.sizes)


@dataclass(frozen=True, slots=True)
class Stack(Op):
    """Equal-shaped arrays into one with a new axis: single experts into a batch.

    With `groups`, into as many as that, dealt out in turn: of w0, b0, w1, b1 and groups=2 come
    the w stacked and the b stacked.
    """

    axis: int
    groups: int = 1

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        made = []
        for i in range(self.groups):
            group = list(shapes[i :: self.groups])
            if len(shapes) % self.groups or len(set(group)) != 1:
                raise ValueError(f"cannot stack {list(shapes)} into {self.groups}")
            made.append((*group[0][: self.axis], len(group), *group[0][self.axis :]))
        return made

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.stack(arrays[i :: self.groups], self.axis) for i in range(self.groups)]

    def inverse(self, shapes: Sequence[Shape]) -> Unstack:
        return Unstack(self.axis, self.groups)


@dataclass(frozen=True, slots=True)
class Unstack(Op):
    """One array into as many as an axis is long, without that axis; of several, in turn."""

    axis: int
    groups: int = 1

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        lengths = {s[self.axis] if self.axis < len(s) else -1 for s in shapes}
        if len(shapes) != self.groups or len(lengths) != 1 or -1 in lengths:
            raise ValueError(f"{list(shapes)} are not {self.groups} stacked along {self.axis}")
        if max(lengths) > _STACKED:
            raise ValueError(f"axis {self.axis} of {list(shapes)} is not a stack: over {_STACKED}")
        return [s[: self.axis] + s[self.axis + 1 :] for s in shapes] * lengths.pop()

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        moved = [np.moveaxis(a, self.axis, 0) for a in arrays]
        return [a for turn in zip(*moved, strict=True) for a in turn]

    def inverse(self, shapes: Sequence[Shape]) -> Stack:
        return Stack(self.axis, self.groups)


@dataclass(frozen=True, slots=True)
class Each(Op):
    """Other ops for each stretch of a list of arrays: of several entries that one tensor joins.

    `parts` says of how many arrays each stretch is, and which ops it takes. A layout states none:
    it comes about where two spellings of a layout join other entries.
    """

    parts: tuple[tuple[int, Ops], ...]

    def _stretches(self, items: Sequence[Any]) -> Iterator[tuple[Ops, list[Any]]]:
        if len(items) != sum(n for n, _ in self.parts):
            raise ValueError(f"{len(items)} arrays for {[n for n, _ in self.parts]}")
        rest = iter(items)
        for n, ops in self.parts:
            yield ops, list(itertools.islice(rest, n))

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        return [s for ops, some in self._stretches(shapes) for s in run_shapes(ops, some)]

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [a for ops, some in self._stretches(arrays) for a in run(ops, some)]

    def inverse(self, shapes: Sequence[Shape]) -> Each:
        stretches = list(self._stretches(shapes))
        return Each(tuple((len(run_shapes(o, some)), inverse(o, some)) for o, some in stretches))


def each(parts: Sequence[tuple[int, Ops]]) -> Ops:
    """Ops for each stretch of a list; what every array takes alike is said once."""
    (n, first), *_ = parts
    alike = all(part == (n, first) for part in parts)
    if alike and all(isinstance(op, _Single) for op in first):
        return first
    return (Each(tuple(parts)),)


OPS: dict[str, type[Op]] = {
    c.__name__.lower(): c
    for c in (Permute, Flip, Reorder, Split, Merge, Concat, Divide, Stack, Unstack)
}


def run_shapes(ops: Iterable[Op], shapes: Sequence[Shape]) -> list[Shape]:
    """The shapes after all ops, in order."""
    result = list(shapes)
    for op in ops:
        result = op.shapes(result)
    return result


def run(ops: Iterable[Op], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The arrays after all ops, in order; views where possible."""
    result = list(arrays)
    for op in ops:
        result = op.run(result)
    return result


def inverse(ops: Sequence[Op], shapes: Sequence[Shape]) -> Ops:
    """The ops that undo `ops`, whose inputs have these shapes."""
    undo: list[Op] = []
    current = list(shapes)
    for op in ops:
        undo.append(op.inverse(current))
        current = op.shapes(current)
    return tuple(reversed(undo))


def op_to_json(op: Op) -> dict[str, Any]:
    """{"op": name, field: value, ...}."""
    return {"op": type(op).__name__.lower(), **asdict(op)}  # type: ignore[call-overload]


def op_from_json(data: dict[str, Any]) -> Op:
    """The op that `op_to_json` gave; ValueError for an unknown one."""
    cls = OPS.get(data["op"])
    if cls is None or {f.name for f in fields(cls)} != data.keys() - {"op"}:  # type: ignore[arg-type]
        raise ValueError(f"unknown op {data}")
    values = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in data.items()}
    del values["op"]
    return cls(**values)


def describe(ops: Ops) -> str:
    """The ops in a few words, for plans and certificates: "permute(1,0)" or "copy"."""
    parts = []
    for op in ops:
        if isinstance(op, Each):
            told = dict.fromkeys(describe(inner) for _, inner in op.parts)
            parts.append(f"each({' | '.join(told)})")
            continue
        values = [v for k, v in asdict(op).items() if k != "names"]  # type: ignore[call-overload]
        text = ",".join(
            "x".join(map(str, v))
            if len(values) > 1 and isinstance(v, tuple)
            else ",".join(map(str, v))
            if isinstance(v, tuple)
            else str(v)
            for v in values
        )
        parts.append(f"{type(op).__name__.lower()}({text})")
    return " ".join(parts) or "copy"


def _argsort(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _named(names: Sequence[str], sizes: Sequence[int]) -> str:
    return " x ".join(f"{n}={s}" for n, s in zip(names, sizes, strict=True))
