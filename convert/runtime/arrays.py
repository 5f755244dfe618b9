"""Arrays inside arguments and outputs of any shape: tuples, dicts, NamedTuples, dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


def is_array(x: Any) -> bool:
    """Whether x holds numbers: a tensor of torch, JAX (tracers too) or NumPy; keys do not count."""
    if type(x).__module__.startswith("flax.") or not hasattr(x, "ndim"):
        return False
    dtype = getattr(x, "dtype", None)
    return dtype is not None and hasattr(x, "shape") and not str(dtype).startswith("key")


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Every array of a tree by its dotted path; leaves that are not arrays are left out."""
    if is_array(tree):
        return {path: tree}
    found: dict[str, Any] = {}
    for key, part in _parts(tree):
        found |= leaves(part, f"{path}.{key}" if path else str(key))
    return found


def replaced(tree: Any, values: Mapping[str, Any], path: str = "") -> Any:
    """The tree with other arrays at these paths; everything else in it stays the same object."""
    if is_array(tree):
        return values.get(path, tree)
    parts = _parts(tree)
    if not any(p == path or p.startswith(f"{path}." if path else "") for p in values):
        return tree
    new = {k: replaced(part, values, f"{path}.{k}" if path else str(k)) for k, part in parts}
    if not new or all(new[k] is part for k, part in parts):
        return tree
    if isinstance(tree, Mapping):
        made: Any = copy.copy(tree)
        for key, part in parts:
            if new[key] is not part:
                made[key] = new[key]
        return made
    if hasattr(tree, "_replace"):
        return tree._replace(**new)
    if isinstance(tree, tuple | list):
        return type(tree)(new.values())
    return dataclasses.replace(tree, **new)


def _parts(tree: Any) -> list[tuple[Any, Any]]:
    if isinstance(tree, Mapping):
        return list(tree.items())
    if hasattr(tree, "_asdict"):
        return list(tree._asdict().items())
    if isinstance(tree, tuple | list):
        return list(enumerate(tree))
    plain = dataclasses.is_dataclass(tree) and not isinstance(tree, type) and not callable(tree)
    if plain:
        return [(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree) if f.init]
    return []


def to_numpy(x: Any) -> np.ndarray:
    """A copy of a torch, JAX or NumPy array; 16-bit floats become float32, which holds them all."""
    if type(x).__module__.startswith("torch"):
        x = x.detach().cpu()
        if x.is_floating_point() and x.element_size() < 4:
            x = x.float()
        return np.array(x.resolve_conj().resolve_neg().numpy())
    array = np.array(x)
    if array.dtype.kind not in "biufc" or array.dtype == np.float16:
        array = array.astype(np.float32)
    return array


def dtype_name(x: Any) -> str:
    """ "float32", "bfloat16", ... of an array of any framework."""
    return str(x.dtype).removeprefix("torch.")


def is_float(x: Any) -> bool:
    """Whether an array of any framework holds real floating-point numbers."""
    return "float" in dtype_name(x)


def is_inexact(x: Any) -> bool:
    """Whether an array of any framework holds floating-point numbers, real or complex."""
    return is_float(x) or "complex" in dtype_name(x)


def dtype_in(x: Any, precision: str) -> str:
    """The dtype in which an inexact array has `precision`: complex numbers stay complex."""
    return COMPLEX[precision] if "complex" in dtype_name(x) else precision


COMPLEX = {"float32": "complex64", "float64": "complex128"}  # what holds two numbers of each


def named_outputs(output: Any, name: str = "output") -> dict[str, Any]:
    """Every array of an output under a dotted name: NamedTuples and dataclasses by field, mappings
    by key, tuples by index."""
    if output is None or isinstance(output, str):
        return {}
    if hasattr(output, "_asdict"):
        parts: Any = output._asdict().items()
    elif isinstance(output, Mapping):
        parts = output.items()
    elif dataclasses.is_dataclass(output) and not hasattr(output, "shape"):
        parts = ((f.name, getattr(output, f.name)) for f in dataclasses.fields(output))
    elif isinstance(output, tuple | list):
        parts = enumerate(output)
    else:
        return {name: output}
    return {k: v for key, part in parts for k, v in named_outputs(part, f"{name}.{key}").items()}
