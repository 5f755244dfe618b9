"""What "the same" means, and the state of both frameworks in which it is measured.

Float32 against float32 is judged by the rounding noise: the gap between float32 and float64 of the
PyTorch side. Where float64 agrees and float32 alone goes beyond that gap, the gap may have been
small by luck (a tensor of few elements): the noise is then measured again, see `Noise`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from convert.judge.rows import FLOOR, Row, Statistics
from zoo import probe
from zoo.containers.errors import MissingExtra

MARGIN = 8.0  # times the noise
EXACT = 1e-10  # of the scale, in float64
PRECISIONS = ("float32", "float64")
RERUNS = 8  # to measure the noise again
FEW = 64  # elements: the largest of more is no matter of luck
AGAIN = f"noise of {RERUNS + 1} runs"
AGAIN64 = "float64 within its own noise"
_BINS = 20

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
    noise, scale = gap(rough, exact), largest(exact)
    error = gap(a[0], b[0])
    both64 = a[1] is not None and b[1] is not None
    error64 = gap(a[1], b[1]) if a[1] is not None and b[1] is not None else 0.0
    same = within(error, noise, scale) and error64 <= EXACT * scale
    return Row(
        name,
        tuple(exact.shape),
        error,
        noise,
        scale,
        error64,
        same,
        note="" if both64 else "in float32 only",
        statistics=statistics(a[0], b[0], scale),
    )


def within(error: float, noise: float, scale: float) -> bool:
    """Whether rounding explains an error in float32."""
    return error <= MARGIN * max(noise, FLOOR * scale)


def gap(a: np.ndarray, b: np.ndarray) -> float:
    """max|a - b|. A wrong shape is infinitely far, and so is NaN anywhere; infinities that both
    have (masks hold them on purpose) are not."""
    if a.shape != b.shape:
        return float("inf")
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(np.subtract(a, b, dtype=np.float64))
    if not np.isfinite(apart).all():
        apart = np.where(a == b, 0.0, apart)
    found = float(apart.max(initial=0.0))
    return found if np.isfinite(found) else float("inf")


def largest(x: np.ndarray) -> float:
    """The largest finite absolute value; 0 where there is none."""
    found = np.abs(x, dtype=np.float64)
    return float(found.max(initial=0.0, where=np.isfinite(found)))


def statistics(a: np.ndarray, b: np.ndarray, scale: float) -> Statistics | None:
    """Of the reference `a`, and of how far `b` is; None where they cannot be compared."""
    if a.shape != b.shape or not a.size:
        return None
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        apart = np.abs(np.subtract(a, b, dtype=np.float64)).ravel()
        if scale and np.isfinite(scale):
            decade = np.floor(np.log10(apart / scale)) + _BINS
        else:
            decade = np.where(apart > 0, np.inf, -np.inf)
    decade = np.where(np.isnan(decade), _BINS - 1, np.clip(decade, 0, _BINS - 1)).astype(int)
    finite = a[np.isfinite(a)].astype(np.float64)
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
    luck now and then: in tensors of few elements, and, where a little rounding grows (`chaotic`:
    training), in any. `rerun(precision, i)` gives the same tensors from another run of the PyTorch
    side whose weights and inputs moved by at most one unit in their last place: results that far
    apart are what the precision cannot tell from each other. The noise is the largest gap of all
    runs. Where float32 agrees and float64 is beyond 1e-10 of the scale (sums that cancel, and what
    Adam makes of them), float64's own noise is measured in the same way, if `exact64`. Nothing is
    run before a row asks for it.
    """

    def __init__(
        self,
        exact: Mapping[str, np.ndarray],
        rerun: Callable[[str, int], Arrays],
        exact64: bool = False,
        chaotic: bool = False,
    ) -> None:
        self.exact = exact
        self.rerun = rerun
        self.exact64 = exact64
        self.chaotic = chaotic
        self._runs: dict[str, list[Arrays]] = {}

    def of(self, name: str, precision: str = "float32") -> float:
        """The largest gap of all further runs."""
        if precision not in self._runs:
            self._runs[precision] = [self.rerun(precision, i) for i in range(RERUNS)]
        return max(gap(run[name], self.exact[name]) for run in self._runs[precision])

    def again(self, row: Row) -> Row:
        """The row, judged by the noise of all runs, if one precision alone made it different."""
        rough = within(row.error, row.noise, row.scale)
        exact = row.error64 <= EXACT * row.scale
        if rough == exact or not np.isfinite(row.error):
            return row
        if exact:
            if not self.chaotic and np.prod(row.shape) >= FEW:
                return row
            noise = max(row.noise, self.of(row.name))
            same = within(row.error, noise, row.scale)
            return dataclasses.replace(row, noise=noise, same=same, note=AGAIN)
        same = self.exact64 and row.error64 <= MARGIN * self.of(row.name, "float64")
        return dataclasses.replace(row, same=same, note=AGAIN64 if same else row.note)


def named_outputs(output: Any, name: str = "output") -> dict[str, Any]:
    """Every array of an output under a dotted name: NamedTuples and dataclasses by field, mappings
    by key, tuples by index."""
    if output is None or isinstance(output, str):
        return {}
    if hasattr(output, "_asdict"):
        parts: Any = output._asdict().items()
    elif isinstance(output, Mapping):
        parts = output.items()
    elif dataclasses.is_dataclass(output) and not hasattr(output, "shape"):
        parts = ((f.name, getattr(output, f.name)) for f in dataclasses.fields(output))
    elif isinstance(output, tuple | list):
        parts = enumerate(output)
    else:
        return {name: output}
    return {k: v for key, part in parts for k, v in named_outputs(part, f"{name}.{key}").items()}


def loss_weights(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """What an output is multiplied with in the loss: another number for every element."""
    return probe.normal(f"{seed}:{name}" if seed else name, shape)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Both frameworks without TF32, bfloat16 or autocast, and everything as it was afterwards:
    precision, random state, default dtype."""
    try:
        import torch
    except ImportError:
        raise MissingExtra("running the models", "torch") from None
    try:
        import jax
    except ImportError:
        raise MissingExtra("running the models", "flax") from None
    before = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.allow_tf32
    dtype = torch.get_default_dtype()
    fused = torch.backends.mha.get_fastpath_enabled()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.mha.set_fastpath_enabled(
            False
        )  # it passes by the layers, and zeroes padding
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for kind in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
                stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(jax.default_matmul_precision("highest"))
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = cudnn
        torch.backends.mha.set_fastpath_enabled(fused)
        torch.set_default_dtype(dtype)


@contextlib.contextmanager
def precision_of(name: str) -> Iterator[None]:
    """float32 as people run it; float64 with what makes it really float64: the default dtype of
    torch, and JAX's 64 bits."""
    import jax
    import torch

    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(getattr(torch, name))
        with jax.enable_x64(name == "float64"):
            yield
    finally:
        torch.set_default_dtype(before)
