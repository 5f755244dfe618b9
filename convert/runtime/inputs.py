"""What users give as inputs: one array, a tuple or list, or a dict; of any framework; files.

In a file a dot leads into an argument: `batch.mask` is an array of the dict `batch`, `xs.0` the
first of a tuple.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.runtime.arrays import nested
from convert.runtime.call import Call
from zoo.containers.errors import UsageError


def as_call(inputs: Any) -> Call:
    """Positional for an array, a tuple or a list; by name for a dict; of a file's Path what it
    holds. Arrays become NumPy's."""
    if isinstance(inputs, Call):
        return inputs
    if isinstance(inputs, Path):
        inputs = read_inputs(inputs)
    if isinstance(inputs, Mapping):
        return Call(kwargs={str(k): _plain(v, str(k)) for k, v in inputs.items()})
    if isinstance(inputs, tuple | list):
        return Call(tuple(_plain(v, str(i)) for i, v in enumerate(inputs)))
    return Call((_plain(inputs, "inputs"),))


def read_inputs(path: Path) -> Any:
    """The arrays of an .npz, by name, or positional where they have none (arr_0, ...); or of an
    .npy. Never unpickles. UsageError for anything else."""
    try:
        with path.open("rb") as file:  # which numpy leaves open where it is not a whole zip
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                return found
            with found:
                arrays = {name: found[name] for name in found.files}
    except FileNotFoundError:
        raise UsageError(
            f"there is no file {path}", "save it with numpy.savez(FILE, x=...)"
        ) from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise UsageError(
            f"{path} holds no plain arrays: {str(e).partition(chr(10))[0]}",
            "save the inputs with numpy.savez(FILE, x=...), without objects",
        ) from None
    if not arrays:
        raise UsageError(f"{path} is empty", "save the inputs with numpy.savez(FILE, x=...)")
    values = {k: v.item() if v.ndim == 0 and v.dtype.kind == "b" else v for k, v in arrays.items()}
    if all(name.startswith("arr_") and name[4:].isdigit() for name in values):
        return tuple(values[name] for name in sorted(values, key=lambda n: int(n[4:])))
    try:
        return nested(values)
    except ValueError as e:
        raise UsageError(
            f"{path}: {e}", "name each array once: batch.mask, not batch too"
        ) from None


def _plain(value: Any, path: str) -> Any:
    """NumPy arrays in the same nesting; numbers, texts and None as they are."""
    if isinstance(value, Mapping):
        return {k: _plain(v, f"{path}.{k}") for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_plain(v, f"{path}.{i}") for i, v in enumerate(value)))
    if isinstance(value, tuple | list):
        return type(value)(_plain(v, f"{path}.{i}") for i, v in enumerate(value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "detach"):  # torch
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as e:
        raise UsageError(
            f"input {path} is a {type(value).__name__}: {e}", "give NumPy, torch or JAX arrays"
        ) from None
    if array.dtype.name in ("bfloat16", "float16"):
        return array.astype(np.float32)
    if array.dtype.kind not in "biufc":
        raise UsageError(
            f"input {path} is a {type(value).__name__} of {array.dtype}",
            "give NumPy, torch or JAX arrays of numbers",
        )
    return array
