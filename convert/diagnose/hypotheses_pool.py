"""Why a pooled image is another: which pool, over what, rounded how."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from convert.diagnose.case import Case, after
from convert.diagnose.causes import Reason, found


@dataclass(frozen=True)
class Pool:
    """A pool over square windows."""

    kind: str  # "max", "avg"
    window: int
    stride: int
    edge: str  # "0", "1": pads on either side; "SAME": as Flax says it; "before": all in front
    ceil: bool = False
    count_pad: bool = True  # whether zeros outside of the image count for an average

    def __str__(self) -> str:
        words = [f"{self.kind} pool {self.window}, stride {self.stride}, padding {self.edge}"]
        words += ["last windows cut (ceil)"] if self.ceil else []
        words += ["padding not counted"] if not self.count_pad else []
        return ", ".join(words)

    def run(self, x: np.ndarray) -> np.ndarray | None:
        """x (B, C, *image)."""
        import torch
        import torch.nn.functional as F

        n = x.ndim - 2
        image = torch.from_numpy(np.ascontiguousarray(x))
        pads = self._pads(x.shape[2:])
        flat = [p for pair in reversed(pads) for p in pair]
        try:
            if self.kind == "max":
                padded = F.pad(image, flat, value=-np.inf)
                pool = (F.max_pool1d, F.max_pool2d)[n - 1]
                return pool(padded, self.window, self.stride, ceil_mode=self.ceil).numpy()
            mean = (F.avg_pool1d, F.avg_pool2d)[n - 1]
            made = mean(F.pad(image, flat), self.window, self.stride, ceil_mode=self.ceil)
            if not self.count_pad:
                ones = F.pad(torch.ones_like(image), flat)
                made = made / mean(ones, self.window, self.stride, ceil_mode=self.ceil)
            return made.numpy()
        except RuntimeError:
            return None

    def _pads(self, image: tuple[int, ...]) -> list[tuple[int, int]]:
        if self.edge.isdigit():
            return [(int(self.edge),) * 2] * len(image)
        totals = [max((-(-n // self.stride) - 1) * self.stride + self.window - n, 0) for n in image]
        return [(t, 0) if self.edge == "before" else (t // 2, t - t // 2) for t in totals]


def pools() -> Iterator[Pool]:
    for ceil, kind, window in itertools.product((False, True), ("max", "avg"), (2, 3, 4, 5)):
        for stride in (2, 1, 3, 4):
            for edge in ("0", "1", "SAME", "before"):
                if stride <= window and not (ceil and not edge.isdigit()):
                    yield Pool(kind, window, stride, edge, ceil)
                    if kind == "avg" and edge != "0":
                        yield Pool(kind, window, stride, edge, ceil, False)


def pooling(case: Case) -> Reason | None:
    """One pool in torch, another in Flax, of something that came before (or of its ReLU)."""
    for name, x in case.past:
        if x.ndim not in (3, 4) or x.dtype.kind != "f" or x.size > 10**6:
            continue
        for rectify, flat in itertools.product((False, True), repeat=2):
            image = np.maximum(x, 0) if rectify else x
            ours: list[object] = []
            theirs: list[object] = []
            for pool in (*pools(), "global mean", "global maximum"):
                made = _pooled(pool, image)
                if made is None:
                    continue
                made = made.reshape(len(made), -1) if flat else made
                ours += [pool] if case.is_right(made) else []
                theirs += [pool] if case.fits(made) else []
            if ours and theirs and not set(map(str, ours)) & set(map(str, theirs)):
                return found("pooling", where=after(name), torch=ours[0], flax=theirs[0])
    return None


def _pooled(pool: object, x: np.ndarray) -> np.ndarray | None:
    axes = tuple(range(2, x.ndim))
    if pool == "global mean":
        return np.asarray(x.mean(axes))
    if pool == "global maximum":
        return np.asarray(x.max(axes))
    assert isinstance(pool, Pool)
    return pool.run(x)
