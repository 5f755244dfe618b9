"""Arrays inside arguments and outputs of any shape: tuples, dicts, NamedTuples, dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
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


_LONGEST = 10_000


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What `leaves` took apart: dicts by the parts of dotted paths, tuples where these are numbers.
    ValueError for a path that leads into another, and for a number that no tuple goes up to."""
    made: dict[str, Any] = {}
    for path, x in flat.items():
        *outer, last = path.split(".")
        inside = made
        for part in outer:
            inside = inside.setdefault(part, {})
            if not isinstance(inside, dict):
                raise ValueError(f"{path} leads into an array")
        if last in inside:
            raise ValueError(f"{path} is there, and something in it")
        inside[last] = x
    return {name: _with_tuples(x) for name, x in made.items()}


def _with_tuples(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    parts = {k: _with_tuples(x) for k, x in tree.items()}
    if not all(k.isdigit() for k in parts):
        return parts
    count = 1 + max(map(int, parts))
    if count > _LONGEST:  # a file may say anything
        raise ValueError(f"{count - 1} is no index of a tuple")
    return tuple(parts.get(str(i)) for i in range(count))


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
    """Every array and number of an output under a dotted name: NamedTuples, dataclasses and
    transformers' ModelOutput by field, mappings by key, tuples by index. Caches of attention are
    opened; other objects are left out, see `unread_outputs`."""
    return {n: x for n, x in _walked(output, name) if _counts(x)}


def unread_outputs(output: Any, name: str = "output") -> dict[str, str]:
    """What of an output is no array and holds none that can be seen: name -> class."""
    found = {n: x for n, x in _walked(output, name) if not _counts(x)}
    return {n: type(x).__name__ for n, x in found.items()}


def caches(output: Any, name: str = "output") -> list[str]:
    """The names below which an output holds caches: what transformers' use_cache=True adds."""
    if cached(output) is not None:
        return [name]
    found: list[str] = []
    for key, part in _inside(output) or []:
        below = f"{name}.{key}"
        found += [below] if key in _CACHES else caches(part, below)
    return found


_CACHES = ("past_key_values", "cache_params", "cache")


def _walked(output: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Everything in an output that has no parts, None and texts left out."""
    if output is None or isinstance(output, str):
        return
    parts = _inside(output)
    if parts is None:
        yield name, output
        return
    for key, part in parts:
        yield from _walked(part, f"{name}.{key}")


def _counts(x: Any) -> bool:
    if isinstance(x, bool | int | float | complex):
        return True
    return hasattr(x, "dtype") and not str(x.dtype).startswith("key")


def _inside(output: Any) -> list[tuple[Any, Any]] | None:
    """What an output consists of, if it is no leaf."""
    if hasattr(output, "_asdict"):
        return list(output._asdict().items())
    if isinstance(output, Mapping):
        return list(output.items())
    if dataclasses.is_dataclass(output) and not hasattr(output, "shape"):
        return [(f.name, getattr(output, f.name)) for f in dataclasses.fields(output)]
    if isinstance(output, tuple | list):
        return list(enumerate(output))
    return cached(output)


def cached(output: Any) -> list[tuple[Any, Any]] | None:
    """The parts of a cache as transformers has them: of a layer, keys and values, or states."""
    both = {n: getattr(output, f"{n}_attention_cache", None) for n in ("self", "cross")}
    if any(x is not None for x in both.values()):
        return [(n, x) for n, x in both.items() if x is not None]
    layers = getattr(output, "layers", None)
    if not type(output).__name__.endswith("Cache") or not isinstance(layers, list):
        return None
    kept = ("keys", "values", "conv_states", "recurrent_states")
    return [
        (i, {n: x for n in kept if (x := getattr(layer, n, None)) is not None})
        for i, layer in enumerate(layers)
    ]
