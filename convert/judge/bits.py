"""How the bits of two tensors differ, if they do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zoo.containers import dtypes


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor that is not the same on both sides."""

    name: str  # canonical
    why: str
    count: int = 0  # elements that differ
    max_error: float | None = None
    mean_error: float | None = None
    first: tuple[int, ...] | None = None  # index of the first element that differs
    diagnosis: str | None = None  # what would make it fit: "transposed", "holds the values of ..."
    cause: str | None = None  # a word of convert.diagnose.causes for that


def compare(name: str, a: np.ndarray, b: np.ndarray) -> TensorDifference | None:
    """How the bits of two tensors differ, if they do. NaN equals itself, and -0 is not 0."""
    if a.shape != b.shape:
        return TensorDifference(name, f"shapes {a.shape} and {b.shape}")
    if a.dtype != b.dtype:
        return TensorDifference(name, f"dtypes {_code(a.dtype)} and {_code(b.dtype)}")
    x, y = (np.ascontiguousarray(t).reshape(-1).view(np.uint8) for t in (a, b))
    differ = np.flatnonzero((x != y).reshape(-1, a.itemsize).any(1)) if a.size else x
    if not differ.size:
        return None
    left, right = (t.reshape(-1)[differ] for t in (a, b))
    with np.errstate(invalid="ignore", over="ignore"):
        wide = np.complex128 if a.dtype.kind == "c" else np.float64
        errors = np.abs(left.astype(wide) - right.astype(wide))
    return TensorDifference(
        name,
        f"{differ.size} of {a.size} elements",
        int(differ.size),
        float(errors.max()),
        float(errors.sum() / a.size),
        tuple(int(i) for i in np.unravel_index(int(differ[0]), a.shape)),
    )


def _code(dtype: np.dtype) -> str:
    try:
        return dtypes.code_of(dtype)
    except KeyError:  # a user's array of a dtype that no container has
        return dtype.name
