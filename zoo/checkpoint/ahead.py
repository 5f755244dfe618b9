"""Work that runs ahead of whoever uses its results."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")


def prefetch(
    jobs: Sequence[Callable[[], _T]], workers: int, waiting: int | None = None
) -> Iterator[_T]:
    """The results of the jobs in order, worked out by so many threads. `waiting` results may wait
    for the caller (None: several for each thread, for results that are small).

    Reading, copying and hashing all release Python's lock, so the workers do run at once.
    """
    waiting = 4 * workers if waiting is None else waiting
    with ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool:
        rest = iter(jobs)
        ahead = deque(pool.submit(job) for job in itertools.islice(rest, waiting))
        try:
            while ahead:
                result = ahead.popleft().result()
                ahead.extend(pool.submit(job) for job in itertools.islice(rest, 1))
                yield result
                del result
        finally:
            for future in ahead:
                future.cancel()
