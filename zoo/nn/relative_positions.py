"""Buckets of relative positions (Raffel 2020, section 2.1), in NumPy alone.

A table of distances, so that both frameworks have the same buckets: a logarithm taken in float32
in each might fall on different sides of a bucket's edge.
"""

from __future__ import annotations

import functools
import math

import numpy as np


@functools.lru_cache(maxsize=16)
def bucket_table(num_buckets: int, max_distance: int, bidirectional: bool) -> np.ndarray:
    """(max_distance + 1,): the bucket of every distance; what is farther is in the last one too.

    Half of the buckets hold one distance each, the other half grow logarithmically. Where
    attention looks both ways there are `num_buckets` / 2 of these a direction: the table is for
    keys before the query, and keys after it have buckets that begin where these end.
    """
    n = num_buckets // 2 if bidirectional else num_buckets
    exact = n // 2
    distance = np.arange(max_distance + 1)
    ratio = np.log(np.maximum(distance, exact) / exact) / math.log(max_distance / exact)
    far = np.minimum(exact + (ratio * (n - exact)).astype(np.int64), n - 1)
    return np.where(distance < exact, distance, far)
