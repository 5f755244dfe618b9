"""Tensors that hold each other's values in another shape or order, in fewer tensors or in more:
their values, which tell them from all others, say by which ops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from convert.matching.fits import squeeze, tells
from convert.matching.pair import Match
from zoo.layout.ops import Concat, Flip, Op, Ops, Permute, Split, Stack, inverse, run

Arrays = Mapping[str, np.ndarray]
Shape = tuple[int, ...]
_PROBES = 16  # values of a tensor that are looked for in another


def match_values(ours: Arrays, theirs: Arrays) -> Iterator[Match]:
    """Matches between tensors that hold exactly the same values, however these lie."""
    a, b = ({n: x for n, x in side.items() if tells(x)} for side in (ours, theirs))
    single = {n: x for n, x in ours.items() if x.size == 1 and x.dtype.kind == "f"}
    done: set[str] = set()
    # The largest first: what holds several is told by all of them, one of them may be there twice.
    for name, y in sorted(b.items(), key=lambda item: -item[1].size):
        held = [n for n in a if n not in done and _holds(y, a[n])]
        held = held or [n for n in single if n not in done and _holds(y, single[n])]
        if found := gathered([ours[n] for n in held], y):
            order, ops = found
            done |= set(held)
            yield Match(tuple(held[i] for i in order), (name,), ops, "param")
            done.add(f"flax:{name}")
    for name, x in a.items():
        if name in done:
            continue
        held = [n for n in b if f"flax:{n}" not in done and _holds(x, b[n])]
        if len(held) > 1 and (found := gathered([b[n] for n in held], x)):
            order, ops = found
            flax = tuple(held[i] for i in order)
            done |= {f"flax:{n}" for n in flax}
            yield Match((name,), flax, inverse(ops, [b[n].shape for n in flax]), "param")


def with_copies(
    matches: Sequence[Match], tensors: Arrays, ours: Arrays, theirs: Arrays
) -> Iterator[tuple[Match, list[Match]]]:
    """Matches of what is left, `ours` and `theirs`, for which tensors are needed that are matched
    with copies of them; and those matches. `tensors` are all of torch's."""
    for name, y in theirs.items():
        held = [n for n, x in ours.items() if tells(x) and _holds(y, x)]
        if not held or sum(ours[n].size for n in held) >= y.size:
            continue
        copies = {
            m.torch[0]: m
            for m in matches
            if len(m.torch) == len(m.flax) == 1 and m.torch[0] in tensors
            and tells(tensors[m.torch[0]]) and _holds(y, tensors[m.torch[0]])
        }  # fmt: skip
        names = [*held, *copies]
        if copies and (found := gathered([tensors[n] for n in names], y)):
            order, ops = found
            whole = Match(tuple(names[i] for i in order), (name,), ops, "param")
            yield whole, list(copies.values())


def _holds(whole: np.ndarray, part: np.ndarray) -> bool:
    if part.size > whole.size:
        return False
    some = part.ravel()[:: max(1, part.size // _PROBES)]
    return bool(np.isin(some, whole).all() and np.isin(part, whole).all())


def gathered(parts: Sequence[np.ndarray], whole: np.ndarray) -> tuple[list[int], Ops] | None:
    """The order of the parts, and the ops, that make them `whole`; None where none do."""
    if not parts or sum(x.size for x in parts) != whole.size:
        return None
    if len(parts) == 1:
        alone = rearranged(parts[0], whole)
        if alone is None and whole.ndim > 2:  # a transposed convolution's kernel
            axes = tuple(range(whole.ndim - 2))
            turned = rearranged(parts[0], np.flip(whole, axes))
            alone = None if turned is None else (*turned, Flip(axes))
        return None if alone is None else ([0], alone)
    flat = whole.ravel()
    order = sorted(range(len(parts)), key=lambda i: int(np.argmax(flat == parts[i].ravel()[0])))
    held = [parts[i] for i in order]
    if len({x.ndim for x in held}) > 1:
        return None
    joined: list[Op] = [Concat(k, tuple(x.shape[k] for x in held)) for k in range(held[0].ndim)]
    if len({x.shape for x in held}) == 1:
        joined.append(Stack(0))
    for op in joined:
        try:
            (made,) = op.run(held)
        except ValueError:
            continue
        rest = rearranged(made, whole)
        if rest is not None:
            return order, (op, *rest)
    return None


def rearranged(x: np.ndarray, y: np.ndarray) -> Ops | None:
    """The ops that make `x` `y`: axes split, put in another order, or merged, and axes of one."""
    before, after = squeeze(x.shape), squeeze(y.shape)
    (bare,), (wanted,) = run(before, [x]), run(after, [y])
    ops = _split_and_turned(bare, wanted)
    if ops is None:
        back = _split_and_turned(wanted, bare)
        ops = None if back is None else inverse(back, [wanted.shape])
    if ops is None:
        return None
    every = (*before, *ops, *inverse(after, [y.shape]))
    return every if np.array_equal(run(every, [x])[0], y) else None


def _split_and_turned(x: np.ndarray, y: np.ndarray) -> Ops | None:
    """The ops where every axis of `y` is an axis of `x`, or a factor of one."""
    flat = x.ravel()
    order = np.argsort(flat, kind="stable")
    places = np.searchsorted(flat, y.ravel(), sorter=order)
    if (places >= flat.size).any():
        return None
    at = order[places].reshape(y.shape)
    # A value may occur twice: the median of the steps is still the stride.
    strides = [int(np.median(np.diff(at, axis=k))) for k in range(y.ndim)]
    turned = sorted(range(y.ndim), key=lambda k: -strides[k])
    sizes, ops = [y.shape[k] for k in turned], []
    for axis in reversed(range(x.ndim)):
        factors: list[int] = []
        while sizes and int(np.prod(factors)) < x.shape[axis]:
            factors.insert(0, sizes.pop())
        if int(np.prod(factors)) != x.shape[axis]:
            return None
        if len(factors) > 1:
            names = tuple(f"axis{axis}_{i}" for i in range(len(factors)))
            ops.append(Split(axis, names, tuple(factors)))
    if sizes:
        return None
    if turned != sorted(turned):
        ops.append(Permute(tuple(turned.index(k) for k in range(y.ndim))))  # type: ignore[arg-type]
    return tuple(ops)
