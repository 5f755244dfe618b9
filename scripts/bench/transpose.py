"""The blocked copy of zoo.containers.strided against NumPy's, transposed arrays: GB/s and ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from zoo.containers.strided import contiguous

CASES = [
    ((8192, 8192), (1, 0), np.float32),
    ((8192, 8192), (1, 0), np.uint16),
    ((30522, 384), (1, 0), np.float32),
    ((384, 384), (1, 0), np.float32),
    ((512, 512, 3, 3), (2, 3, 1, 0), np.float32),
]


def seconds(copy: Callable[[np.ndarray], np.ndarray], view: np.ndarray) -> float:
    started = time.perf_counter()
    copy(view)
    return time.perf_counter() - started


def main() -> None:
    for shape, axes, dtype in CASES:
        array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
        view = array.transpose(axes)
        pairs = [(seconds(np.ascontiguousarray, view), seconds(contiguous, view)) for _ in range(7)]
        theirs, ours = (array.nbytes / statistics.median(c) / 1e9 for c in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(
            f"{'x'.join(map(str, shape)):>16} {np.dtype(dtype).name:8} "
            f"NumPy {theirs:5.2f} GB/s  zoo {ours:5.2f} GB/s  {ratio:4.1f} times"
        )


if __name__ == "__main__":
    main()
