"""Work that runs ahead of whoever uses its results."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

WORKERS = 2  # jobs under way besides the one whose result is being used
_T = TypeVar("_T")


def prefetch(jobs: Sequence[Callable[[], _T]]) -> Iterator[_T]:
    """The results of the jobs in order; the next ones run while the caller works on this one.

    Reading, copying and hashing all release Python's lock, so the workers do run at once.
    """
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="convert") as pool:
        rest = iter(jobs)
        ahead = deque(pool.submit(job) for job in itertools.islice(rest, WORKERS))
        try:
            while ahead:
                result = ahead.popleft().result()
                ahead.extend(pool.submit(job) for job in itertools.islice(rest, 1))
                yield result
                del result
        finally:
            for future in ahead:
                future.cancel()
