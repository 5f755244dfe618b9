"""The dtypes that pass through, under the names safetensors gives them.

FP8 and BF16 arrays are NumPy arrays of ml_dtypes' types: the bits are kept, no value is ever
taken through another dtype on the way.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from zoo.containers.errors import UsageError

NUMPY: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "C64": np.dtype(np.complex64),
    "C128": np.dtype(np.complex128),  # safetensors has no such dtype, and refuses it
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODE: dict[np.dtype, str] = {dtype: code for code, dtype in NUMPY.items()}

# NumPy's and JAX's names ("bfloat16", "float8_e4m3fn"); torch's are the same but for "bool".
NAME: dict[str, str] = {code: dtype.name for code, dtype in NUMPY.items()}
FROM_NAME: dict[str, str] = {name: code for code, name in NAME.items()}


def itemsize(code: str) -> int:
    """Bytes of one element of dtype `code`."""
    return NUMPY[code].itemsize


def is_float(code: str) -> bool:
    """Whether `code` is a real floating-point dtype."""
    return code.startswith(("F", "BF"))


def code_of(dtype: np.dtype) -> str:
    """The code of a NumPy dtype in native byte order; KeyError for one that we do not carry."""
    return CODE[dtype]


def dtype_code(dtype: Any) -> str:
    """The code of a floating-point dtype that is named ("bfloat16", "BF16") or given as NumPy's,
    JAX's or torch's own. UsageError for any other, and for F8_E8M0, which has no sign."""
    inner = getattr(dtype, "dtype", dtype)  # jnp.bfloat16 is not a dtype but has one
    name = inner if isinstance(inner, str) else getattr(inner, "name", None) or str(inner)
    code = FROM_NAME.get(name.removeprefix("torch."), name.upper())
    if code not in NUMPY or not is_float(code) or code == "F8_E8M0":
        floats = [NAME[c] for c in NUMPY if is_float(c) and c != "F8_E8M0"]
        raise UsageError(
            f"{name!r} is not a floating-point dtype", f"known are {', '.join(floats)}"
        )
    return code
