"""Parameters that no pair of layers has: of somebody's own layer here that is a bare parameter
there, or that has another name. Shapes, names and the values themselves tell which is which."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from convert.matching.fits import squeeze, tells, without_ones
from convert.matching.pair import LayerPair, Match
from zoo.layout.ops import Ops, Permute, inverse, run, run_shapes

Arrays = Mapping[str, np.ndarray]
Shape = tuple[int, ...]


def match_left(ours: Arrays, theirs: Arrays, layers: list[LayerPair]) -> Iterator[Match]:
    """Matches of what is left on both sides, within one paired container and of one size.

    Two tensors match only where the one holds the other's values, in whatever order, or, several
    taken together, where all of them do: what is computed from a tensor is not the tensor.
    """
    by_torch = {p.torch: p.flax for p in layers} | {"": ""}
    by_flax = {p.flax for p in layers} | {""}
    groups: dict[tuple[str, int], tuple[list[str], list[str]]] = {}
    for name, x in ours.items():
        groups.setdefault((by_torch[_within(name, by_torch)], x.size), ([], []))[0].append(name)
    for name, x in theirs.items():
        groups.setdefault((_within(name, by_flax), x.size), ([], []))[1].append(name)
    for a, b in groups.values():
        yield from _group(ours, theirs, a, b)


def match_copies(
    ours: Arrays, theirs: Arrays, ties: Mapping[str, str], matches: Iterable[Match]
) -> Iterator[Match]:
    """Of what is left in Flax, what holds the very values of a tensor that torch has under several
    names, for a name of it that has no match yet. `ties` are torch's further names."""
    matched = {n for m in matches for n in m.torch}
    groups: dict[str, list[str]] = {}
    for name, first in ties.items():
        groups.setdefault(first, [first]).append(name)
    held = [names for names in groups.values() if matched & set(names)]
    free = [n for names in held for n in names if n not in matched]
    for path, y in theirs.items():
        for name in free:
            ops = operations(ours[name], y)
            if ops is not None and np.array_equal(run(ops, [ours[name]])[0], y):
                free.remove(name)
                yield Match((name,), (path,), ops, "param")
                break


def match_eliminated(
    ours: Arrays, theirs: Arrays, tensors: Arrays, matches: Iterable[Match]
) -> Iterator[Match]:
    """Of what is left in Flax, what holds the values of a tensor that is matched already, for the
    tensors that are left of its shape and name, in order, where there are as many: these were
    loaded from the wrong one. `tensors` are all of torch's."""
    matched = [n for m in matches for n in m.torch if n in tensors and tells(tensors[n])]
    groups: dict[tuple[Shape, str], list[tuple[str, Ops]]] = {}
    for path, y in theirs.items():
        for name in (n for n in matched if tensors[n].size == y.size and tells(y)):
            ops = operations(tensors[name], y)
            if ops is not None and np.array_equal(run(ops, [tensors[name]])[0], y):
                key = tensors[name].shape, name.rpartition(".")[2]
                groups.setdefault(key, []).append((path, ops))
                break
    for (shape, leaf), held in groups.items():
        left = [n for n, x in ours.items() if x.shape == shape and n.rpartition(".")[2] == leaf]
        if len(left) == len(held):
            for name, (path, ops) in zip(left, held, strict=True):
                yield Match((name,), (path,), ops, "param")


Copies = tuple[list[str], list[str]]  # torch's other names, Flax's tensors


def copies(matches: Iterable[Match], ties: Mapping[str, str]) -> dict[str, Copies]:
    """What torch has once and Flax several times, by torch's first name. `ties` are torch's further
    names. A tensor that Flax has in parts (query, key and value) is there once."""
    held: dict[str, dict[tuple[str, ...], None]] = {}
    for match in matches:
        for first in {ties.get(n, n) for n in match.torch}:
            held.setdefault(first, {})[match.flax] = None
    return {
        first: ([n for n, tied in ties.items() if tied == first], [n for f in flax for n in f])
        for first, flax in held.items()
        if len(flax) > 1
    }


def _within(name: str, paired: object) -> str:
    """The innermost paired module around a tensor."""
    parts = name.split(".")[:-1]
    held = (".".join(parts[:k]) for k in range(len(parts), -1, -1))
    return next(n for n in held if n in paired)  # type: ignore[operator]


def _group(ours: Arrays, theirs: Arrays, a: list[str], b: list[str]) -> Iterator[Match]:
    together = len(a) == len(b) and _alike([ours[n] for n in a], [theirs[n] for n in b])
    single = Counter(float(np.ravel(side[n])[0]) for side, names in ((ours, a), (theirs, b))
                     for n in names if side[n].size == 1)  # fmt: skip

    def one(x: np.ndarray, y: np.ndarray) -> bool:
        """Whether the two are one number that no other is."""
        return (
            x.size == 1 and np.ravel(x)[0] == np.ravel(y)[0] and single[float(np.ravel(x)[0])] == 2
        )

    able = sorted(
        itertools.product(range(len(a)), range(len(b))),
        key=lambda ij: (
            not np.array_equal(np.ravel(ours[a[ij[0]]]), np.ravel(theirs[b[ij[1]]])),
            -_likeness(a[ij[0]], b[ij[1]]),
            abs(ij[0] - ij[1]),
            ij,
        ),
    )
    done: set[tuple[str, int]] = set()
    for i, j in able:
        x, y = ours[a[i]], theirs[b[j]]
        if {("a", i), ("b", j)} & done or not (together or _alike([x], [y]) or one(x, y)):
            continue
        ops = operations(x, y)
        if ops is not None:
            done |= {("a", i), ("b", j)}
            yield Match((a[i],), (b[j],), ops, "param")


def _alike(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    """Whether two sets of arrays hold the same numbers, which are not all one number."""
    x, y = (np.sort(np.concatenate([np.ravel(v) for v in side])) for side in (a, b))
    return x.size == y.size and x.size > 1 and x[0] != x[-1] and np.array_equal(x, y)


def _likeness(torch: str, flax: str) -> float:
    """How many words the two names share."""
    a, b = (re.findall(r"[a-z]+|\d+", n.lower()) for n in (torch, flax))
    return float(len(set(a) & set(b)) + (a[-1] == b[-1]))


def operations(x: np.ndarray, y: np.ndarray) -> Ops | None:
    """The ops that make torch's `x` Flax's `y`, the first whose shapes fit where none gives its
    values; None where no shape fits."""
    n = x.ndim
    able: list[Ops] = [()]
    if n == 2:
        able.append((Permute((1, 0)),))
    if n > 2:
        able.append((Permute((*range(2, n), 1, 0)),))
    ones = _ones(x.shape, y.shape)
    if ones is not None:
        able.append(ones)
    fitting = [ops for ops in able if run_shapes(ops, [x.shape]) == [y.shape]]
    return next(
        (ops for ops in fitting if np.array_equal(run(ops, [x])[0], y, equal_nan=True)),
        next(iter(fitting), None),
    )


def _ones(shape: Shape, target: Shape) -> Ops | None:
    """Axes of length one left out, and put in."""
    squeezed = without_ones(shape)
    if squeezed != without_ones(target):
        return None
    return (*squeeze(shape), *inverse(squeeze(target), [target]))
