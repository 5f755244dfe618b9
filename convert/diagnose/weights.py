"""Why a tensor is not the one that it should be: what would make it fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np

from convert.diagnose.case import Finding

_GATES = {"recurrent": {4: "i,f,g,o", 3: "r,z,n"}}


def diagnose_tensor(
    name: str,
    a: np.ndarray,
    b: np.ndarray,
    others: Mapping[str, np.ndarray],
    kind: str | None = None,
) -> str | None:
    """What turns `a`, the values that the tensor should have, into `b`, those it has; None if
    nothing known does.

    `others` are the other tensors of the reference, laid out as `a` is; `kind` is that of the layer
    (as in zoo.layout). Nothing is said that does not fit in every element.
    """
    finding = explain_tensor(name, a, b, others, kind)
    return None if finding is None else finding.diagnosis


def explain_tensor(
    name: str,
    a: np.ndarray,
    b: np.ndarray,
    others: Mapping[str, np.ndarray],
    kind: str | None = None,
) -> Finding | None:
    """As `diagnose_tensor`, with the cause and what to try."""
    if _equal(a, b):
        return None
    if "bias" in name and a.shape == b.shape and not b.any():
        return Finding("bias_missing", f"{name} holds only zeros in Flax", "load it", name)
    rules = (_constant, _rounded, _moved, _another, _sum, _scaled, _shuffled)
    for rule in rules:
        for cause, what, advice in rule(a, b, others, kind):
            return Finding(cause, f"{name} {what}", advice, name)
    return None


Hints = Iterator[tuple[str, str, str]]


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=a.dtype.kind in "fc"))


def _constant(a: np.ndarray, b: np.ndarray, others: object, kind: str | None) -> Hints:
    if a.shape != b.shape or not b.size:
        return
    for value, word in ((0, "zeros"), (1, "ones")):
        if (b == value).all():
            yield (
                "default",
                f"holds only {word}, as a fresh layer may: it was not loaded",
                "load it",
            )
    if b.size > 1 and (b == b.flat[0]).all():
        yield "default", f"holds only {float(b.flat[0]):g}: it was not loaded", "load it"


def _rounded(a: np.ndarray, b: np.ndarray, others: object, kind: str | None) -> Hints:
    if a.shape != b.shape or a.dtype.kind != "f":
        return
    for dtype, word in ((ml_dtypes.bfloat16, "bfloat16"), (np.float16, "float16")):
        with np.errstate(over="ignore"):
            if _equal(a.astype(dtype).astype(np.float64), b.astype(np.float64)):
                yield "dtype", f"was rounded to {word} on the way", "convert without a cast"


def _moved(a: np.ndarray, b: np.ndarray, others: object, kind: str | None) -> Hints:
    """The same elements, moved by one of the ops that layouts know."""
    for cause, what, advice, made in moves(a, kind):
        if _equal(made, b):
            yield cause, what, advice


def moves(a: np.ndarray, kind: str | None = None) -> Iterator[tuple[str, str, str, np.ndarray]]:
    """Every wrong way in which a tensor's elements are known to be laid out."""
    for axes in itertools.permutations(range(a.ndim)):
        if axes != tuple(range(a.ndim)) and a.ndim <= 5:
            square = a.ndim == 2 and a.shape[0] == a.shape[1]
            word = "is transposed" + (", which its square shape hides" if square else "")
            if kind == "linear" and a.ndim == 3:
                word = f"has its heads and head_dim swapped: axes in the order {axes}"
                yield "heads", word, "split into (heads, head_dim)", a.transpose(axes)
                continue
            word = word if a.ndim == 2 else f"has its axes in the order {axes}"
            yield "transposed", word, "permute its axes as the layout says", a.transpose(axes)
    for n in range(1, a.ndim + 1):
        for axes in itertools.combinations(range(a.ndim), n):
            word = f"is flipped along {'axis' if n == 1 else 'axes'} {', '.join(map(str, axes))}"
            yield "flipped", word, "flip it back, or not at all", np.flip(a, axes)
    for axis in range(a.ndim):
        yield from _blocks(a, axis, kind)
    for axis in range(a.ndim):
        yield from _factors(a, axis, kind)


def _blocks(
    a: np.ndarray, axis: int, kind: str | None
) -> Iterator[tuple[str, str, str, np.ndarray]]:
    """Gates, or query, key and value, in another order."""
    recurrent = kind == "recurrent"
    for count in (4, 3) if recurrent else (3, 2):
        if a.shape[axis] % count or a.shape[axis] < 2 * count:
            continue
        blocks = np.split(a, count, axis)
        letters = _GATES["recurrent"].get(count, "") if recurrent else "q,k,v" if count == 3 else ""
        for order in itertools.permutations(range(count)):
            if order == tuple(range(count)):
                continue
            named = ",".join(letters.split(",")[i] for i in order) if letters else str(order)
            usual = letters or str(tuple(range(count)))
            word = f"has its {'gates' if recurrent else 'blocks'} along axis {axis} in the order "
            cause = "gates" if recurrent else "blocks"
            advice = f"reorder the blocks to {usual}"
            made = np.concatenate([blocks[i] for i in order], axis)
            yield cause, f"{word}{named}, not {usual}", advice, made


def _factors(
    a: np.ndarray, axis: int, kind: str | None
) -> Iterator[tuple[str, str, str, np.ndarray]]:
    """A flattened axis read in another order: image before channels, halves before pairs."""
    size = a.shape[axis]
    x = np.moveaxis(a, axis, -1)
    for n in _divisors(size):
        if n in (1, size):
            continue
        made = np.moveaxis(_swap(x, n), -1, axis)
        inputs = kind == "linear" and a.ndim == 2 and axis == 0
        word = (
            f"has its {size} inputs flattened as ({size // n}, {n}), not as ({n}, {size // n})"
            if inputs
            else f"has its heads along axis {axis} in the order ({size // n}, {n}), "
            f"not ({n}, {size // n})"
        )
        cause = "flatten" if inputs else "heads"
        advice = (
            "torch flattens images channel first, Flax channel last: reorder the rows"
            if inputs
            else "split the axis into (heads, head_dim), heads first"
        )
        yield cause, word, advice, made
    for n in _divisors(size):
        width = size // n
        if n == 1 or width % 2 or width < 4:
            continue
        heads = x.reshape(*x.shape[:-1], n, width)
        for half, word in (
            (2, "interleaved, not in halves"),
            (width // 2, "in halves, not interleaved"),
        ):
            made = np.moveaxis(_swap(heads, half).reshape(x.shape), -1, axis)
            advice = "permute the rows of query and key, or rotate in the other style"
            yield (
                "rope",
                f"has the rows of its {n} heads {word}, as another RoPE wants",
                advice,
                made,
            )


def _swap(x: np.ndarray, n: int) -> np.ndarray:
    """The last axis, flattened (n, rest), flattened (rest, n) instead."""
    return x.reshape(*x.shape[:-1], n, -1).swapaxes(-1, -2).reshape(x.shape)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0] if n <= 65536 else []


def _another(
    a: np.ndarray, b: np.ndarray, others: Mapping[str, np.ndarray], kind: str | None
) -> Hints:
    for other, values in others.items():
        if _equal(values, b):
            yield "swapped", f"holds the values of {other}", f"swap it with {other}"
    for other, values in others.items():
        if values.ndim == 2 and _equal(values.T, b):
            word = f"holds the values of {other}, transposed"
            yield "swapped", word, f"swap it with {other}, and transpose"


def _sum(a: np.ndarray, b: np.ndarray, others: Mapping[str, np.ndarray], kind: str | None) -> Hints:
    if a.shape != b.shape or a.dtype.kind != "f" or a.ndim != 1:
        return
    for other, values in others.items():
        if values.shape != a.shape or not values.any():
            continue
        if _close(a + values, b):
            word = f"holds the sum of itself and {other}"
            yield "bias_sum", word, f"keep {other} apart from it"
            continue
        for count in (3, 4):
            if a.size % count:
                continue
            parts = [np.split(v, count) for v in (a, a + values, np.zeros_like(a), b)]
            which = [
                next((w for w, p in zip(("own", "sum", "zero"), parts, strict=False)
                      if _close(p[i], parts[3][i])), None)
                for i in range(count)
            ]  # fmt: skip
            if None not in which and "sum" in which:
                word = f"has {other} added up into some of its {count} gates ({', '.join(map(str, which))})"  # noqa: E501
                yield "bias_sum", word, "in a GRU the two biases of gate n must stay apart"


def _scaled(a: np.ndarray, b: np.ndarray, others: object, kind: str | None) -> Hints:
    if a.shape != b.shape or a.dtype.kind != "f" or a.size < 2:
        return
    x, y = a.astype(np.float64), b.astype(np.float64)
    if not np.isfinite(y).all() or not x.any():
        return
    factor = float((x * y).sum() / (x * x).sum())
    if factor and _close(x * factor, y):
        yield (
            "scale",
            f"is {factor_name(factor)} times what it should be",
            "load it without a factor",
        )
    elif _close(x - 1, y) or _close(x + 1, y):
        word = "is smaller" if _close(x - 1, y) else "is larger"
        yield "scale_plus_one", f"{word} by one", "one side multiplies by 1 + scale"


def _shuffled(a: np.ndarray, b: np.ndarray, others: object, kind: str | None) -> Hints:
    if a.size == b.size > 1 and _equal(np.sort(a, None), np.sort(b, None)):
        for axis in range(a.ndim if a.shape == b.shape else 0):
            rows = [np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1) for x in (a, b)]
            if len(rows[0]) > 1 and _equal(*(r[np.lexsort(r.T[::-1])] for r in rows)):
                word = f"has the right slices along axis {axis}, in another order"
                yield "permuted", word, "look at what that axis is made of"
        yield "permuted", "has the right elements in other places", "reorder it as the layout says"


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
