"""Why a tensor is not the one that it should be: what would make it fit."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from convert.diagnose.case import first
from convert.diagnose.causes import Reason, found
from convert.judge.bits import TensorDifference

_GATES = {4: "i,f,g,o", 3: "r,z,n"}


@dataclass(frozen=True)
class _Tensor:
    """A tensor whose values are not `right`, but `held`."""

    name: str
    right: np.ndarray
    held: np.ndarray
    others: Mapping[str, np.ndarray]  # the reference's other tensors, laid out as this one
    kind: str | None
    copied: Container[str] = ()  # others whose values the compared side has where they belong

    @property
    def comparable(self) -> bool:
        """Whether both are floating-point and of one shape."""
        return self.right.shape == self.held.shape and self.right.dtype.kind == "f"


def explained(difference: TensorDifference, *given: Any) -> TensorDifference:
    """The difference with what explains it, if anything does; `given` as to `explain_tensor`."""
    reason = explain_tensor(*given)
    if reason is None:
        return difference
    return dataclasses.replace(difference, diagnosis=reason.diagnosis, cause=reason.cause)


def explain_tensor(
    name: str,
    a: np.ndarray,
    b: np.ndarray,
    others: Mapping[str, np.ndarray],
    kind: str | None = None,
    copied: Container[str] = (),
) -> Reason | None:
    """What turns `a`, the values that the tensor should have, into `b`, those it has; None if
    nothing known does.

    `others` are the other tensors of the reference, laid out as `a` is; `kind` is that of the layer
    (as in zoo.layout); `copied` are those of `others` that are right themselves, so that nothing is
    exchanged with them. Nothing is said that does not fit in every element.
    """
    if _equal(a, b):
        return None
    tensor = _Tensor(name, a, b, others, kind, copied)

    def said(rule: Callable[[_Tensor], Iterator[Reason]]) -> Reason | None:
        return next(rule(tensor), None)

    rules = (_no_bias, _constant, _rounded, _moved, _another, _sum, _scaled, _shuffled)
    return first(*(partial(said, rule) for rule in rules))


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=a.dtype.kind in "fc"))


def _no_bias(t: _Tensor) -> Iterator[Reason]:
    if "bias" in t.name and t.right.shape == t.held.shape and not t.held.any():
        yield found("bias_missing", "tensor", name=t.name)


def _constant(t: _Tensor) -> Iterator[Reason]:
    held = t.held
    if t.right.shape != held.shape or not held.size:
        return
    for value, word in ((0, "zeros"), (1, "ones")):
        if (held == value).all():
            yield found("default", name=t.name, value=word)
    if held.size > 1 and (held == held.flat[0]).all():
        yield found("default", "constant", name=t.name, value=float(held.flat[0]))


def _rounded(t: _Tensor) -> Iterator[Reason]:
    if not t.comparable:
        return
    for dtype, word in ((ml_dtypes.bfloat16, "bfloat16"), (np.float16, "float16")):
        with np.errstate(over="ignore"):
            if _equal(t.right.astype(dtype).astype(np.float64), t.held.astype(np.float64)):
                yield found("dtype", "tensor", name=t.name, dtype=word)


def _moved(t: _Tensor) -> Iterator[Reason]:
    """The same elements, moved by one of the ops that layouts know."""
    for made, reason in _wrong_layouts(t):
        if _equal(made, t.held):
            yield reason


Layouts = Iterator[tuple[np.ndarray, Reason]]


def _wrong_layouts(t: _Tensor) -> Layouts:
    """Every wrong way in which a tensor's elements are known to be laid out."""
    a = t.right
    for axes in itertools.permutations(range(a.ndim)):
        if axes != tuple(range(a.ndim)) and a.ndim <= 5:
            yield a.transpose(axes), _transposed(t, axes)
    for n in range(1, a.ndim + 1):
        for axes in itertools.combinations(range(a.ndim), n):
            words = f"{'axis' if n == 1 else 'axes'} {', '.join(map(str, axes))}"
            yield np.flip(a, axes), found("flipped", "tensor", name=t.name, axes=words)
    for axes in itertools.permutations(range(a.ndim)) if a.ndim <= 4 else ():
        # reshaped where it had to be transposed
        if axes != tuple(range(a.ndim)):
            yield a.transpose(axes).reshape(a.shape), _transposed(t, axes)
    for axis in range(a.ndim):
        yield from _blocks(t, axis)
    for axis in range(a.ndim):
        yield from _factors(t, axis)
        yield from _rope_rows(t, axis)
    for axis in range(a.ndim - 1 if a.ndim > 2 else 0):
        yield from _joined_factors(t, axis)


def _joined_factors(t: _Tensor, axis: int) -> Layouts:
    """Two axes that torch has as one, (heads, head_dim), filled in the other order."""
    a = t.right
    heads, width = a.shape[axis : axis + 2]
    if heads > 1 and width > 1:
        turned = np.swapaxes(a, axis, axis + 1).reshape(a.shape)
        joined = (*a.shape[:axis], width, heads, *a.shape[axis + 2 :])
        reason = found("heads", "tensor", name=t.name, axis=axis, heads=heads, width=width)
        yield turned, reason
        yield np.swapaxes(a.reshape(joined), axis, axis + 1), reason


def _transposed(t: _Tensor, axes: Sequence[int]) -> Reason:
    a = t.right
    if t.kind == "linear" and a.ndim == 3:
        return found("heads", "axes", name=t.name, axes=axes)
    if a.ndim != 2:
        return found("transposed", "tensor", name=t.name, axes=axes)
    square = a.shape[0] == a.shape[1]
    return found("transposed", "square matrix" if square else "matrix", name=t.name)


def _blocks(t: _Tensor, axis: int) -> Layouts:
    """Gates, or query, key and value, in another order."""
    a, recurrent = t.right, t.kind == "recurrent"
    for count in (4, 3) if recurrent else (3, 2):
        if a.shape[axis] % count or a.shape[axis] < 2 * count:
            continue
        blocks = np.split(a, count, axis)
        usual = _GATES[count] if recurrent else "q,k,v"
        for order in itertools.permutations(range(count)):
            if order == tuple(range(count)):
                continue
            made = np.concatenate([blocks[i] for i in order], axis)
            if count == 2:
                yield made, found("blocks", "halves", name=t.name, axis=axis)
                continue
            named = ",".join(usual.split(",")[i] for i in order)
            if recurrent:
                gates = found("gates", "tensor", name=t.name, axis=axis, flax=named, torch=usual)
                yield made, gates
            else:
                yield made, found("blocks", name=t.name, axis=axis, flax=named, torch=usual)


def _factors(t: _Tensor, axis: int) -> Layouts:
    """A flattened axis read in another order: pixels before channels, head_dim before heads."""
    size = t.right.shape[axis]
    x = np.moveaxis(t.right, axis, -1)
    for n in _divisors(size)[1:-1]:
        made = np.moveaxis(_swap(x, n), -1, axis)
        if t.kind == "linear" and t.right.ndim == 2 and axis == 0:
            yield made, found("flatten", "tensor", name=t.name, size=size, channels=n,
                              pixels=size // n)  # fmt: skip
        else:
            yield made, found("heads", "tensor", name=t.name, axis=axis, heads=n, width=size // n)


def _rope_rows(t: _Tensor, axis: int) -> Layouts:
    """The rows of each head in pairs for in halves, or the other way round."""
    size = t.right.shape[axis]
    x = np.moveaxis(t.right, axis, -1)
    for n in _divisors(size)[1:]:
        width = size // n
        if width % 2 or width < 4:
            continue
        heads = x.reshape(*x.shape[:-1], n, width)
        for half, reason in (
            (2, found("rope", "interleaved", name=t.name, heads=n)),
            (width // 2, found("rope", "in halves", name=t.name, heads=n)),
        ):
            yield np.moveaxis(_swap(heads, half).reshape(x.shape), -1, axis), reason


def _swap(x: np.ndarray, n: int) -> np.ndarray:
    """The last axis, flattened (n, rest), flattened (rest, n) instead."""
    return x.reshape(*x.shape[:-1], n, -1).swapaxes(-1, -2).reshape(x.shape)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0] if n <= 65536 else []


def _another(t: _Tensor) -> Iterator[Reason]:
    for other, values in t.others.items():
        if _equal(values, t.held):
            if other in t.copied:
                yield found("values", "copied", name=t.name, other=other)
            else:
                yield found("swapped", name=t.name, other=other)
    for other, values in t.others.items():
        if values.ndim == 2 and _equal(values.T, t.held):
            yield found("swapped", "transposed", name=t.name, other=other)


def _sum(t: _Tensor) -> Iterator[Reason]:
    """Another bias added to the whole of this one, or to some of its gates."""
    a, b = t.right, t.held
    if not t.comparable or a.ndim != 1:
        return
    for other, values in t.others.items():
        if values.shape != a.shape or not values.any():
            continue
        if _close(a + values, b):
            yield found("bias_sum", name=t.name, other=other)
            continue
        for count in (3, 4):
            parts = _gate_sums(a, values, b, count)
            if None not in parts and "sum" in parts:
                words = ", ".join(map(str, parts))
                yield found("bias_sum", "gates", name=t.name, other=other, count=count, parts=words)


def _gate_sums(a: np.ndarray, other: np.ndarray, b: np.ndarray, count: int) -> list[str | None]:
    """What each of `count` gates of b is: "own" (a's), "sum" of both, "zero", or neither."""
    if a.size % count:
        return [None]
    known = {"own": a, "sum": a + other, "zero": np.zeros_like(a)}
    parts = {word: np.split(values, count) for word, values in known.items()}
    return [
        next((word for word, values in parts.items() if _close(values[i], gate)), None)
        for i, gate in enumerate(np.split(b, count))
    ]


def _scaled(t: _Tensor) -> Iterator[Reason]:
    if not t.comparable or t.right.size < 2:
        return
    x, y = t.right.astype(np.float64), t.held.astype(np.float64)
    if not np.isfinite(y).all() or not x.any():
        return
    factor = float((x * y).sum() / (x * x).sum())
    if _close(x, y) or (factor_name(factor or 2) == "1" and _close(x * factor, y)):
        yield found("scale", "rounding", name=t.name)
    elif factor and _close(x * factor, y):
        yield found("scale", "tensor", name=t.name, factor=factor_name(factor))
    elif _close(x - 1, y):
        yield found("scale_plus_one", "smaller", name=t.name)
    elif _close(x + 1, y):
        yield found("scale_plus_one", "larger", name=t.name)


def _shuffled(t: _Tensor) -> Iterator[Reason]:
    a, b = t.right, t.held
    if a.size == b.size > 1 and _equal(np.sort(a, None), np.sort(b, None)):
        for axis in range(a.ndim if a.shape == b.shape else 0):
            rows = [np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1) for x in (a, b)]
            if len(rows[0]) > 1 and _equal(*(r[np.lexsort(r.T[::-1])] for r in rows)):
                yield found("permuted", "slices", name=t.name, axis=axis)
        yield found("permuted", name=t.name)


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for a few roundings of float32."""
    scale = float(np.abs(a).max(initial=0.0))
    return bool(
        np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0) <= 4e-7 * scale
    )


def factor_name(factor: float) -> str:
    """A factor, with the root that it is where it is one: "0.25 (1 / sqrt(16))"."""
    square = factor * factor
    for value, form in ((square, "sqrt({})"), (1 / square, "1 / sqrt({})")):
        n = round(value)
        if 2 <= n <= 10**6 and abs(value - n) <= 2e-5 * n:
            root = round(n**0.5)
            if root * root == n and form == "sqrt({})":
                return f"{factor:.6g} (sqrt({n}))"
            return f"{factor:.6g} ({'-' if factor < 0 else ''}{form.format(n)})"
    return f"{factor:.6g}"
