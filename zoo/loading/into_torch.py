"""NumPy arrays into a torch module, one after the other and without a change of bits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from zoo.checkpoint.plan import constant_value
from zoo.containers import dtypes
from zoo.containers.base import TensorInfo
from zoo.layout import Layout, Shape
from zoo.model import Config, Model, with_config


def build(
    model: Model, config: Config, values: Iterable[tuple[str, np.ndarray]], dtype: str | None
) -> torch.nn.Module:
    """The torch twin holding `values` (names of its state_dict, ties left out), in eval mode.

    In torch's own memory, not NumPy's: it is aligned, so that JAX can share it, and may outlive the
    interpreter's last breath.
    """
    compute = None if dtype is None else getattr(torch, dtype)
    with torch.device("meta"), _Uninitialised():
        made: torch.nn.Module = model.definition("torch")(config, dtype=compute)
    return fill(with_config(made, config), model.layout_of(config), values).eval()


class _Uninitialised(TorchFunctionMode):
    """Leaves out drawing initial values: on "meta" there are none, and torch would import its
    compiler for them, which takes a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DRAWN or getattr(func, "__module__", "") == torch.nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


_DRAWN = frozenset({torch.Tensor.normal_, torch.Tensor.uniform_})


def fill(
    module: torch.nn.Module, layout: Layout, values: Iterable[tuple[str, np.ndarray]]
) -> torch.nn.Module:
    """The module, which is on "meta" and holds no values, with these, each as it is stored."""
    names = layout.shapes("torch")
    state = {name: owned(array) for name, array in values if name in names}
    for entry in layout.entries:
        name = entry.torch[0].name
        if entry.tied_to is not None:
            state[name] = state[entry.tied_to]
        elif entry.constant is not None and entry.constant.in_state_dict and name not in state:
            info = TensorInfo(entry.constant.dtype, entry.torch[0].shape)
            state[name] = tensor(constant_value(entry.constant, info))
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in state and not isinstance(state[name], torch.nn.Parameter):
            state[name] = torch.nn.Parameter(state[name], parameter.requires_grad)
    for entry in layout.entries:  # one Parameter object under both names, as the definition has it
        if entry.tied_to is not None:
            state[entry.torch[0].name] = state[entry.tied_to]
    module.load_state_dict(state, strict=True, assign=True)
    return module


def empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An array in torch's memory, to be filled and given to `owned`."""
    flat = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    array: np.ndarray = flat.numpy()
    return array.view(dtype).reshape(shape)


def owned(array: np.ndarray) -> torch.Tensor:
    """The array as a torch tensor in torch's memory: as it is, if `empty` gave it, or copied."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, torch.Tensor) or not array.flags.c_contiguous:
        return tensor(array).clone()
    name = dtypes.NAME[dtypes.code_of(array.dtype)]
    return base.view(getattr(torch, name)).reshape(array.shape)


def tensor(array: np.ndarray) -> torch.Tensor:
    """The array as a torch tensor on the same memory; BF16 and FP8 by a view of their bits."""
    name = dtypes.NAME[dtypes.code_of(array.dtype)]
    if not array.flags.writeable:
        array = array.copy()
    try:
        return torch.from_numpy(array)
    except TypeError:
        bits = torch.from_numpy(array.view(f"u{array.itemsize}"))
        return bits.view(getattr(torch, name))
