"""A buffer for each thread, so that the kernel does not make new pages for every piece."""

from __future__ import annotations

import threading

import numpy as np


class Scratch(threading.local):
    """Bytes that a thread writes over again and again."""

    def __init__(self) -> None:
        self._held = np.empty(0, np.uint8)

    def least(self, nbytes: int) -> np.ndarray:
        """So many bytes, which this thread's next call gives out again."""
        if self._held.size < nbytes:
            self._held = np.empty(nbytes, np.uint8)
        return self._held[:nbytes]
