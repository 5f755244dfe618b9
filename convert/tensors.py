"""Tensors and trees of them between the frameworks: the same memory where both allow it, never
another dtype."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from zoo.containers import dtypes
from zoo.containers.base import TensorInfo
from zoo.containers.errors import MissingExtra, UsageError

_WIDE = "float64", "int64", "uint64", "complex128"
_CARRIED = set(dtypes.FROM_NAME)


def to_jax(tree: Any) -> Any:
    """Every torch tensor in `tree` (a tensor, or dicts, lists, tuples of them) as a jax.Array.

    On one device and contiguous, the array is the tensor's own memory (dlpack); JAX takes arrays as
    immutable, so do not write to the tensor while the array lives. Otherwise it is a copy. Raises
    UsageError, naming the tensor, where JAX would change a dtype: 64-bit ones without x64.
    """
    torch, jax, jnp = _frameworks()

    def one(x: Any, path: str) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        name = str(x.dtype).removeprefix("torch.")
        if name in _WIDE and not jax.config.jax_enable_x64:
            raise UsageError(
                f"{path} is {name}, which JAX would cut to 32 bits",
                "set jax_enable_x64, or cast it",
            )
        if name not in _CARRIED or x.layout != torch.strided or x.is_meta:
            raise UsageError(
                f"{path} is {name}, {x.layout} on {x.device}, which is not carried",
                "convert it first",
            )
        x = x.detach().resolve_conj().resolve_neg().contiguous()
        if x.dtype == torch.bool or x.numel() == 0 or name.startswith("float8"):
            return _by_bits(torch, jnp, x, name)
        return jax.dlpack.from_dlpack(x)

    return _map(one, tree, "the tensor")


def to_torch(tree: Any) -> Any:
    """Every jax.Array or NumPy array in `tree` as a torch tensor on the same device.

    A jax.Array shares its memory where dlpack carries its dtype, and must then not be written to
    through the tensor (torch cannot mark it read-only); clone it first. NumPy arrays are copied.
    Raises UsageError for a dtype that torch lacks.
    """
    torch, jax, _ = _frameworks()

    def one(x: Any, path: str) -> Any:
        if not isinstance(x, jax.Array | np.ndarray | np.generic):
            return x
        name = x.dtype.name
        if name not in _CARRIED:
            raise UsageError(f"{path} is {name}, which torch does not have", "cast it first")
        if isinstance(x, jax.Array) and x.size and name != "bool" and not name.startswith("float8"):
            return torch.utils.dlpack.from_dlpack(x)
        # A copy: torch takes no read-only memory, and its own byte order only.
        array = np.array(x, dtype=x.dtype.newbyteorder("="), order="C")
        bits = torch.from_numpy(array.reshape(-1).view(np.uint8))
        return bits.view(getattr(torch, name)).reshape(array.shape)

    return _map(one, tree, "the array")


def info_of(name: str, x: Any) -> TensorInfo:
    """Dtype code and shape of an array of torch, JAX or NumPy. UsageError for a dtype that no
    checkpoint holds; `name` is what the error calls it."""
    kind = str(x.dtype).removeprefix("torch.")
    if kind not in dtypes.FROM_NAME:
        raise UsageError(f"{name} is {kind}, which no checkpoint holds", "cast it first")
    return TensorInfo(dtypes.FROM_NAME[kind], tuple(x.shape))


def bits_of(tensor: Any) -> np.ndarray:
    """A copy of a torch tensor in NumPy's memory, row-major and bit for bit, of any dtype that
    checkpoints hold: BF16 and FP8 as ml_dtypes' types."""
    import torch

    x = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    kind = dtypes.NUMPY[dtypes.FROM_NAME[str(x.dtype).removeprefix("torch.")]]
    flat: np.ndarray = x.reshape(-1).view(torch.uint8).numpy()
    return flat.copy().view(kind).reshape(tuple(x.shape))


def _by_bits(torch: Any, jnp: Any, x: Any, name: str) -> Any:
    """A copy through a view of the bytes, for what dlpack does not carry on every version."""
    flat = x.cpu().reshape(-1).view(torch.uint8).numpy()
    return jnp.asarray(flat.view(jnp.dtype(name)).reshape(tuple(x.shape)))


def _map(one: Callable[[Any, str], Any], tree: Any, path: str) -> Any:
    """`one` at every leaf. Dicts, lists and tuples keep their type; others are refused."""
    if isinstance(tree, dict):
        made = copy.copy(tree)  # a defaultdict keeps its factory
        made.update((k, _map(one, v, f"{path}[{k!r}]")) for k, v in tree.items())
        return made
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        parts = zip(tree._fields, tree, strict=True)
        return type(tree)(*(_map(one, v, f"{path}.{k}") for k, v in parts))
    if isinstance(tree, list | tuple):
        return type(tree)(_map(one, v, f"{path}[{i}]") for i, v in enumerate(tree))
    if isinstance(tree, Mapping) or dataclasses.is_dataclass(tree):
        raise UsageError(
            f"{path} is a {type(tree).__name__}, which is not looked into",
            "give a dict, such as nnx.to_pure_dict(state) or vars(tree)",
        )
    return one(tree, path)


def _frameworks() -> tuple[Any, Any, Any]:
    try:
        import torch
    except ImportError:
        raise MissingExtra("moving tensors", "torch") from None
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        raise MissingExtra("moving tensors", "flax") from None
    return torch, jax, jnp
