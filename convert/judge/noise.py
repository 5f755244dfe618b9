"""What "the same" means for arrays that two frameworks computed.

Float32 against float32 is judged by the rounding noise: the gap between float32 and float64 of the
PyTorch side. Where float64 agrees and float32 alone goes beyond that gap, the gap may have been
small by luck (a tensor of few elements): the noise is then measured again, see `Noise`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from convert.judge.rows import FLOOR, Row, Statistics

MARGIN = 8.0  # times the noise
EXACT = 1e-10  # of the scale, in float64
PRECISIONS = ("float32", "float64")
RERUNS = 8  # to measure the noise again
FEW = 64  # elements: the largest of more is no matter of luck
NARROW = "in float32 only"
AGAIN = f"noise of {RERUNS + 1} runs"
AGAIN64 = "float64 within its own noise"
_BINS = 20
_LUCK = 100  # times: the most that luck makes a noise too small by

Arrays = dict[str, np.ndarray]


def judge(
    name: str,
    a: tuple[np.ndarray, np.ndarray | None],
    b: tuple[np.ndarray, np.ndarray | None],
    reference: tuple[np.ndarray, np.ndarray | None] | None = None,
) -> Row:
    """The row for one tensor, each side in (float32, float64). `reference` is PyTorch's, where it
    is not side `a`. A side without float64 is judged in float32 only."""
    rough, exact = a if reference is None else reference
    if exact is None:
        exact = rough
    noise, scale = _finite_gap(rough, exact), largest(exact)
    error = gap(a[0], b[0])
    both64 = a[1] is not None and b[1] is not None
    error64 = gap(a[1], b[1]) if a[1] is not None and b[1] is not None else 0.0
    same = within(error, noise, scale) and error64 <= EXACT * scale
    if exact.size and np.isnan(rough).all():
        same = False  # nothing was compared
    if not same and not np.isfinite(rough).all() and _not_finite(rough, exact, a[0], b[0]):
        noise = float("inf")
    return Row(
        name,
        tuple(exact.shape),
        error,
        noise,
        scale,
        error64,
        same,
        note="; ".join(_notes(a[0], b[0], both64)),
        statistics=statistics(a[0], b[0], scale),
    )


def _not_finite(rough: np.ndarray, exact: np.ndarray, a: np.ndarray, b: np.ndarray) -> bool:
    """Whether PyTorch's own values in float32 are what nothing can equal: NaN where another has a
    number, or everywhere, or beyond what float32 holds."""
    if not rough.shape == exact.shape == a.shape == b.shape:
        return False
    nan = np.isnan(rough)
    missing = nan & ~(np.isnan(exact) & np.isnan(a) & np.isnan(b))
    return bool(missing.any() or nan.all() or (~np.isfinite(rough) & np.isfinite(exact)).any())


def _notes(a: np.ndarray, b: np.ndarray, both64: bool) -> Iterator[str]:
    if not both64:
        yield NARROW
    if a.shape == b.shape and np.isnan(a).any():
        count = int((np.isnan(a) & np.isnan(b)).sum())
        if count:
            yield f"NaN on both sides in {count} of {a.size} elements"


def within(error: float, noise: float, scale: float) -> bool:
    """Whether rounding explains an error in float32."""
    return error <= MARGIN * max(noise, FLOOR * scale)


def gap(a: np.ndarray, b: np.ndarray) -> float:
    """max|a - b|. A wrong shape is infinitely far, and so is NaN or an infinity on one side only;
    those that both have at the same places (masks hold them on purpose) are no difference."""
    if a.shape != b.shape:
        return float("inf")
    found = float(_apart(a, b).max(initial=0.0))
    return found if np.isfinite(found) else float("inf")


def _finite_gap(a: np.ndarray, b: np.ndarray) -> float:
    """max|a - b| where both are finite: what float32 cannot hold says nothing of its rounding."""
    if a.shape != b.shape:
        return float("inf")
    both = np.isfinite(a) & np.isfinite(b)
    return gap(a[both], b[both])


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b|, 0 where both are the same infinity or NaN."""
    wide = np.complex128 if np.iscomplexobj(a) or np.iscomplexobj(b) else np.float64
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(np.subtract(a, b, dtype=wide))
    if not np.isfinite(apart).all():
        apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, apart)
    return apart  # type: ignore[no-any-return]


def largest(x: np.ndarray) -> float:
    """The largest finite absolute value; 0 where there is none."""
    found = np.abs(x).astype(np.float64)
    return float(found.max(initial=0.0, where=np.isfinite(found)))


def statistics(a: np.ndarray, b: np.ndarray, scale: float) -> Statistics | None:
    """Of the reference `a`, and of how far `b` is; None where they cannot be compared. Of complex
    numbers the absolute values are described."""
    if a.shape != b.shape or not a.size:
        return None
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        apart = _apart(a, b).ravel()
        if scale and np.isfinite(scale):
            decade = np.floor(np.log10(apart / scale)) + _BINS
        else:
            decade = np.where(apart > 0, np.inf, -np.inf)
    decade = np.where(np.isnan(decade), _BINS - 1, np.clip(decade, 0, _BINS - 1)).astype(int)
    finite = a[np.isfinite(a)]
    finite = (np.abs(finite) if np.iscomplexobj(finite) else finite).astype(np.float64)
    if not finite.size:
        return None
    close = apart[np.isfinite(apart)]
    return Statistics(
        float(finite.min()),
        float(finite.max()),
        float(finite.mean()),
        float(finite.std()),
        float(close.mean()) if close.size else float("inf"),
        tuple(int(n) for n in np.bincount(decade, minlength=_BINS)),
    )


class Noise:
    """The rounding noise measured again, for rows that one run's noise makes different.

    One run of float32 is one sample of its rounding, and its largest gap from float64 is small by
    luck now and then: in tensors of few elements, and, where a little rounding spreads or grows
    (`chaotic`: gradients, training), in any. Where a side has no float64, what both round alike (a
    table made in float32) is no part of that gap at all. `rerun(precision, i)` gives the same
    tensors from another run of the PyTorch side whose weights and inputs moved by at most one unit
    in their last place: results that far apart are what the precision cannot tell from each other.
    The noise is the largest gap of all runs. Where float64 is beyond 1e-10 of the scale (sums that
    cancel, what Adam makes of them, constants of float32), float64's own noise is measured in the
    same way, if `exact64`; within it float64 agrees. Over steps of training rounding grows further
    in one run than in nine others now and then: `grown` times as much is allowed where float64 is
    exact.
    Nothing is run before a row asks for it.
    """

    def __init__(
        self,
        exact: Mapping[str, np.ndarray],
        rerun: Callable[[str, int], Arrays],
        exact64: bool = False,
        chaotic: bool = False,
        grown: float = 1.0,
    ) -> None:
        self.exact = exact
        self.rerun = rerun
        self.exact64 = exact64
        self.chaotic = chaotic
        self.grown = grown
        self._runs: dict[str, list[Arrays]] = {}

    def of(self, name: str, precision: str = "float32") -> float:
        """The largest gap of all further runs."""
        if precision not in self._runs:
            self._runs[precision] = [self.rerun(precision, i) for i in range(RERUNS)]
        return max(_finite_gap(run[name], self.exact[name]) for run in self._runs[precision])

    def again(self, row: Row) -> Row:
        """The row, judged by the noise of all runs where those of one run make it different."""
        rough = within(row.error, row.noise, row.scale)
        exact = row.error64 <= EXACT * row.scale
        if (rough and exact) or not np.isfinite(row.error):
            return row
        if not rough and not self._lucky(row, exact):
            return row
        if not exact:
            if not self.exact64 or row.error64 > MARGIN * self.of(row.name, "float64"):
                return row
            row = dataclasses.replace(row, note=_with(row.note, AGAIN64))
        if not rough:
            noise = max(row.noise, self.of(row.name))
            row = dataclasses.replace(row, noise=noise, note=_with(row.note, AGAIN))
        allowed = self.grown if exact else 1.0
        return dataclasses.replace(row, same=within(row.error / allowed, row.noise, row.scale))

    def _lucky(self, row: Row, exact: bool) -> bool:
        """Whether the one run's noise may be too small by luck."""
        if not exact and not within(row.error, row.noise * _LUCK, row.scale * _LUCK):
            return False  # nor does float64 agree: it is not run again for what is plainly wrong
        return bool(self.chaotic or np.prod(row.shape) < FEW or NARROW in row.note)


def _with(note: str, more: str) -> str:
    return f"{note}; {more}" if note else more
