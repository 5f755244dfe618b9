"""Which array of one side is which of the other, and how its axes lie there.

torch images are (B, C, H, W), Flax's (B, H, W, C); sequences may be (T, B, E) here and (B, T, E)
there; attention may keep its heads before its steps; axes of length one come and go; rows and
columns may be one axis of tokens, windows a part of the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from convert.matching.fits import without_ones

Shape = tuple[int, ...]

# From torch's axes to Flax's, and back.
_MOVES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
    "same": (lambda x: x, lambda x: x),
    "channels": (lambda x: np.moveaxis(x, 1, -1), lambda x: np.moveaxis(x, -1, 1)),
    "time": (lambda x: np.swapaxes(x, 0, 1), lambda x: np.swapaxes(x, 0, 1)),
    "heads": (lambda x: np.swapaxes(x, 1, 2), lambda x: np.swapaxes(x, 1, 2)),
}
_LEAST = {"same": 0, "channels": 3, "time": 2, "heads": 4}
MASKED = -1e4  # what is added to a logit that shall not count is at most this


@dataclass(frozen=True)
class Aligned:
    """The array `torch` of one side is the array `flax` of the other, after `move`."""

    torch: str
    flax: str
    move: str


def moves(torch: Shape, flax: Shape) -> list[str]:
    """The ways in which an array of shape `torch` may lie in one of shape `flax`."""
    able = {
        name: forth(np.broadcast_to(0, torch)).shape
        for name, (forth, _) in _MOVES.items()
        if len(torch) >= _LEAST[name]
    }
    if fitting := [name for name, shape in able.items() if shape == flax]:
        return fitting
    ours, theirs = without_ones(torch), without_ones(flax)
    if ours == theirs:
        return ["ones"]
    if sorted(ours) == sorted(theirs) and len(ours) <= _MOST:
        orders = itertools.permutations(range(len(ours)))
        turned = [o for o in orders if tuple(ours[i] for i in o) == theirs]
        return [_AXES + " ".join(map(str, o)) for o in turned]
    joined = [name + _RESHAPED for name, shape in able.items() if _joined(shape, flax)]
    return joined + [name + _FRAMES for name in able if _frames(name, torch, flax)]


_AXES = "axes "  # before the order of those axes that are longer than one
_MOST = 5  # axes whose orders are tried
_RESHAPED = " reshaped"  # after the name of a move: neighbouring axes are then one, or one several
_FRAMES = " frames"  # likewise: the first axis of one is two of the other's, the second one first


def _joined(a: Shape, b: Shape) -> bool:
    """Whether the one has some of the other's neighbouring axes as one: features as (heads,
    head_dim), rows and columns as tokens. All in one axis is none of it."""
    short, long = sorted((without_ones(a), without_ones(b)), key=len)
    if min(len(a), len(b)) < 2 or len(short) == len(long):
        return False
    rest = iter(long)
    for n in short:
        size = next(rest, 0)
        while size and size < n:
            size *= next(rest, 0)
        if size != n:
            return False
    return next(rest, None) is None


def _frames(name: str, torch: Shape, flax: Shape) -> bool:
    """Whether all steps before the next sequence are one axis on one side, and two axes (sequence,
    step) or (step, sequence) on the other."""
    forth, back = _MOVES[name]
    if min(len(torch), len(flax)) < max(_LEAST[name], 2):
        return False
    if len(flax) == len(torch) + 1:
        return forth(np.broadcast_to(0, torch)).shape == (flax[0] * flax[1], *flax[2:])
    if len(torch) == len(flax) + 1:
        return back(np.broadcast_to(0, flax)).shape == (torch[0] * torch[1], *torch[2:])
    return False


def to_flax(x: np.ndarray, move: str, shape: Shape) -> np.ndarray:
    """torch's array as Flax has it."""
    if move.endswith(_FRAMES):
        forth, _ = _MOVES[move.removesuffix(_FRAMES)]
        if x.ndim > len(shape):
            return forth(x.swapaxes(0, 1).reshape(-1, *x.shape[2:]))
        made = forth(x)
        return made.reshape(shape[1], shape[0], *made.shape[1:]).swapaxes(0, 1)
    if move.startswith(_AXES):
        return x.reshape(without_ones(x.shape)).transpose(_order(move)).reshape(shape)
    move, reshaped, _ = move.partition(_RESHAPED)
    made = x if move == "ones" else _MOVES[move][0](x)
    return made.reshape(shape) if reshaped or move == "ones" else made


def _order(move: str) -> list[int]:
    return [int(n) for n in move.removeprefix(_AXES).split()]


def to_torch(x: np.ndarray, move: str, shape: Shape) -> np.ndarray:
    """Flax's array as torch has it."""
    if move.endswith(_FRAMES):
        _, back = _MOVES[move.removesuffix(_FRAMES)]
        if x.ndim > len(shape):
            return back(x.swapaxes(0, 1).reshape(-1, *x.shape[2:]))
        made = back(x)
        return made.reshape(shape[1], shape[0], *made.shape[1:]).swapaxes(0, 1)
    if move.startswith(_AXES):
        undo = np.argsort(_order(move))
        return x.reshape(without_ones(x.shape)).transpose(undo).reshape(shape)
    move, reshaped, _ = move.partition(_RESHAPED)
    if move == "ones":
        return x.reshape(shape)
    forth, back = _MOVES[move]
    return back(x.reshape(forth(np.broadcast_to(0, shape)).shape) if reshaped else x)


def gap(a: np.ndarray, b: np.ndarray) -> float:
    """max|a - b|; NaN on one side only, or another shape, is infinitely far.

    What is added to masked logits counts the same whatever its size.
    """
    if a.shape != b.shape:
        return float("inf")
    if not a.size:
        return 0.0
    wide = np.complex128 if np.iscomplexobj(a) or np.iscomplexobj(b) else np.float64
    a, b = (np.asarray(x, wide) for x in (a, b))
    if is_mask_bias(a) or is_mask_bias(b):
        a, b = np.maximum(a, MASKED), np.maximum(b, MASKED)
    both = (np.isnan(a) & np.isnan(b)) | (a == b)
    with np.errstate(invalid="ignore"):
        found = float(np.where(both, 0.0, np.abs(a - b)).max())
    return found if np.isfinite(found) else float("inf")


def is_mask_bias(x: np.ndarray) -> bool:
    """Zeros, and numbers that are far below them."""
    return bool(x.dtype.kind == "f" and ((x == 0) | (x <= MASKED)).all() and (x <= MASKED).any())


def best_move(torch: np.ndarray, flax: np.ndarray, allowed: Collection[str] | None = None) -> str:
    """The move under which the two are closest; shapes allow one at least.

    Arrays of equal shapes fit however two of their axes lie, and then a value that is wrongly
    transposed would fit too: `allowed` are the moves that they may have besides "same", None all.
    """
    able = moves(torch.shape, flax.shape)
    if torch.shape == flax.shape and allowed is not None:
        able = [m for m in able if m == "same" or m in allowed]
    if len(able) == 1:
        return able[0]
    return min(able, key=lambda m: gap(to_flax(torch, m, flax.shape), flax))


def likely_moves(torch: np.ndarray, flax: np.ndarray) -> set[str]:
    """Every move under which the two are closest: several where axes cannot be told apart."""
    gaps = {m: gap(to_flax(torch, m, flax.shape), flax) for m in moves(torch.shape, flax.shape)}
    return {m for m, apart in gaps.items() if apart == min(gaps.values())}


def align(
    torch: Mapping[str, np.ndarray],
    flax: Mapping[str, np.ndarray],
    allowed: Collection[str] | None = None,
) -> list[Aligned]:
    """Pairs of arrays, each used once: of one name (a place in a tuple is none: cells give (c, h)
    here, (h, c) there), else those that are equal, else of one place, else in order.

    `allowed` is `best_move`'s."""
    free = [n for n in torch if torch[n].size]
    pairs: dict[str, str] = {}

    def able(t: str, f: str) -> bool:
        a, b = torch[t], flax[f]
        kinds = {a.dtype.kind.replace("u", "i"), b.dtype.kind.replace("u", "i")}
        return len(kinds) == 1 and bool(moves(a.shape, b.shape))

    def equal(t: str, f: str) -> bool:
        a, b = torch[t], flax[f]
        scale = float(np.abs(b).max(initial=0.0)) if b.dtype.kind == "f" else 0.0
        move = best_move(a, b, allowed)
        return gap(to_flax(a, move, b.shape), b) <= 1e-5 * scale

    def positioned(t: str, f: str) -> bool:
        return t == f

    def named(t: str, f: str) -> bool:
        return t == f and not t.rpartition(".")[2].isdigit()

    for rule in (named, equal, positioned, lambda t, f: True):
        for f in flax:
            if f in pairs or not flax[f].size:
                continue
            found = next((t for t in free if able(t, f) and rule(t, f)), None)
            if found is not None:
                pairs[f] = found
                free.remove(found)
    return [Aligned(t, f, best_move(torch[t], flax[f], allowed)) for f, t in pairs.items()]
