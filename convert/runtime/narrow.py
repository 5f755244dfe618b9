"""Modules of 16-bit floats, widened so that float32 and float64 can judge them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from convert.runtime.arrays import dtype_name
from convert.runtime.precision import dtype_attributes

NARROW = ("bfloat16", "float16")
_HELD = "_zooconvert_widened"  # on a bound Linen module: the dtypes of layers that are widened


def narrow_dtypes(tensors: Collection[Any]) -> list[str]:
    """The 16-bit dtypes among arrays of any framework."""
    found = {dtype_name(x) for x in tensors}
    return [name for name in NARROW if name in found]


def widen_layers(module: Any, dtypes: Collection[str]) -> None:
    """Let layers of a Flax module that are told to compute in one of `dtypes` do so in float32.

    `module` is a copy: an nnx.Module, a bound linen.Module; anything else stays as it is.
    """
    from flax import linen, nnx

    if isinstance(module, linen.Module):
        object.__setattr__(module, _HELD, frozenset(dtypes))
    elif isinstance(module, nnx.Module):
        for _, part in nnx.iter_modules(module):
            for name, dtype in dtype_attributes(part).items():
                if dtype.name in dtypes:
                    setattr(part, name, np.dtype("float32"))


def widened_dtypes(module: Any) -> frozenset[str]:
    """What `widen_layers` said of a bound linen.Module."""
    return frozenset(vars(module).get(_HELD, ()))


class Rounding:
    """A torch module's forward in which casts to `dtypes` round, and keep the module's precision.

    Code such as `layer(x.to(torch.bfloat16))` could not run with parameters of float32. To be put
    in the place of `module.forward`; copies of the module copy it too.
    """

    def __init__(self, module: Any, dtypes: Collection[str]) -> None:
        import inspect

        self.forward = module.forward
        self.module = module
        self.dtypes = tuple(dtypes)
        self.__signature__ = inspect.signature(module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""
        import torch
        from torch.overrides import TorchFunctionMode

        narrow = tuple(getattr(torch, name) for name in self.dtypes)
        methods = {torch.Tensor.bfloat16: torch.bfloat16, torch.Tensor.half: torch.float16}
        floating = (p.dtype for p in self.module.parameters() if p.is_floating_point())
        wide = next(floating, torch.get_default_dtype())

        class Rounds(TorchFunctionMode):
            def __torch_function__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                kwargs = kwargs or {}
                asked = next((x for x in (*args, *kwargs.values()) if _is_in(x, narrow)), None)
                asked = methods.get(func, asked)
                made = func(*args, **kwargs)
                if isinstance(made, torch.Tensor) and made.dtype in narrow and asked in narrow:
                    return made.to(wide)
                return made

        with Rounds():
            return self.forward(*args, **kwargs)


def _is_in(x: Any, dtypes: tuple[Any, ...]) -> bool:
    return any(x is dtype for dtype in dtypes)
