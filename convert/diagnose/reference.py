"""The torch side of a walk: what it records, how much of that is rounding, what is random."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property, partial
from typing import Any

import numpy as np

from convert.diagnose.divergence import Judged
from convert.matching.alignment import MASKED, gap, is_mask_bias
from convert.runtime.call import Call
from convert.runtime.torch_calls import record, record_forced
from convert.runtime.torch_module import replica
from convert.runtime.trace import Recorded
from zoo import probe


class Reference:
    """A run in `precision`, and, once it is known which layers are paired, one in float64 that
    takes each of their steps from the first one's inputs."""

    def __init__(
        self, module: Any, call: Call, precision: str, disturbed: Collection[str] = ()
    ) -> None:
        """`disturbed` layers give other values than torch's, so that what follows is seen at more
        than one point."""
        self.precision = precision
        self._module, self._call = module, call
        self.module = replica(module, "float64")  # for trying what a layer would give
        self.modules = dict(self.module.named_modules())
        ran = replica(module, precision)
        self.before = _buffers(ran)
        change = partial(_disturbed, disturbed) if disturbed else None
        self.trace = record(ran, call, precision, change=change)
        self.after = _buffers(ran)
        self.calls = self.trace.by_key()
        self._exact_calls = self.calls
        self.after_exact = self.after
        self.random: dict[tuple[str, int], set[str]] = {}

    def step(self, names: Collection[str]) -> None:
        """Measure the noise of these layers' steps, and find where chance plays a part in them."""
        if self.precision != "float64":
            exact = replica(self._module, "float64")
            trace = record_forced(exact, self._call, "float64", self.trace, names)
            self._exact_calls, self.after_exact = trace.by_key(), _buffers(exact)
        if any(m.training for m in self._module.modules()):
            self.random = self._random(names)

    def _random(self, names: Collection[str]) -> dict[tuple[str, int], set[str]]:
        """Where another seed gives other values for the same inputs: nothing is to be judged."""
        again = replica(self._module, self.precision)
        forced = record_forced(again, self._call, self.precision, self.trace, names, seed=1)
        other = forced.by_key()
        found: dict[tuple[str, int], set[str]] = {}
        for key, call_ in self.calls.items():
            for where, mine, its in (
                ("in", call_.inputs, other[key].inputs),
                ("out", call_.outputs, other[key].outputs),
            ):
                moved = {f"{where}:{k}" for k, v in mine.items() if gap(v, its[k]) > 0}
                found[key] = found.get(key, set()) | moved
        return found

    def exact_call(self, call: Recorded) -> Recorded:
        """The same call in float64, from the same inputs."""
        return self._exact_calls[call.key]

    def judge(self, rough: np.ndarray, exact: np.ndarray, given: np.ndarray) -> Judged:
        """How far `given` is from the recorded value `rough`, beside that one's own noise."""
        size = np.maximum(exact, MASKED) if is_mask_bias(exact) else exact[np.isfinite(exact)]
        scale = float(np.abs(size).max(initial=0.0))
        error, noise = gap(rough, given), gap(rough, exact)
        return Judged(error, noise, scale, self.precision)

    @cached_property
    def order(self) -> list[str]:
        """Submodules in the order of their first call."""
        return self.trace.names()


def _disturbed(
    names: Collection[str], name: str, values: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Other values of the same size and sign, where the layer is to give such."""
    if name not in names:
        return values
    made = {}
    for key, x in values.items():
        factor = np.exp(0.3 * probe.normal(f"disturbed.{name}.{key}", x.shape))
        made[key] = (x * factor).astype(x.dtype) if x.dtype.kind in "fc" else x
    return made


def _buffers(module: Any) -> dict[str, np.ndarray]:
    return {n: np.array(b.detach().cpu().numpy()) for n, b in module.named_buffers()}
