"""Buckets of relative positions (Raffel 2020, section 2.1), in NumPy alone.

A table of distances, so that both frameworks have the same buckets: logarithms in float32 could
fall on different sides of a bucket's edge.
"""

from __future__ import annotations

import functools
import math

import numpy as np


@functools.lru_cache(maxsize=16)
def bucket_table(num_buckets: int, max_distance: int, bidirectional: bool) -> np.ndarray:
    """(max_distance + 1,): the bucket of every distance; greater distances share the last one.

    Half of the buckets hold one distance each, the other half grow logarithmically. If
    `bidirectional`, each direction has `num_buckets` / 2 of them: the table is for keys before the
    query, and the buckets of keys after it follow.
    """
    n = num_buckets // 2 if bidirectional else num_buckets
    exact = n // 2
    distance = np.arange(max_distance + 1)
    ratio = np.log(np.maximum(distance, exact) / exact) / math.log(max_distance / exact)
    far = np.minimum(exact + (ratio * (n - exact)).astype(np.int64), n - 1)
    return np.where(distance < exact, distance, far)
