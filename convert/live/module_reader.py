"""A live module as a checkpoint that is open for reading: what planning and writing take."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convert.runtime.nnx_names import flax_names, variables_of
from convert.runtime.torch_layout import saved_tensors, ties_of
from convert.runtime.torch_module import unwrapped
from convert.tensors import bits_of, info_of
from zoo.containers.base import Reader
from zoo.containers.errors import UsageError
from zoo.containers.regions import Region, whole
from zoo.containers.strided import copy
from zoo.layout import Layout

Framework = Literal["torch", "flax"]


def framework_of(module: Any) -> Framework:
    """Which framework a live module is of; UsageError for what is neither's."""
    origin = {base.__module__.partition(".")[0] for base in type(module).__mro__}
    if "torch" in origin and hasattr(module, "named_parameters"):
        return "torch"
    if "flax" in origin:
        from flax import nnx

        if isinstance(module, nnx.Module):
            return "flax"
    what = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
    raise UsageError(
        f"{what} is not a module that holds weights",
        "give a torch.nn.Module or an nnx.Module; what Linen's modules are applied to is saved by "
        "flax.serialization, or orbax, and converted with convert.convert",
    )


class ModuleReader(Reader):
    """The tensors that a torch module saves (its `state_dict`), or an NNX module's parameters and
    running statistics, and of its other variables those that `layout` has.

    `carried` are variables that the label keeps. `path` is the name of its class. Tensors are
    copied when they are read.
    """

    container = "module"

    def __init__(
        self, module: Any, layout: Layout | None = None, carried: Container[str] = ()
    ) -> None:
        super().__init__(Path(type(unwrapped(module)).__name__))
        known = set() if layout is None else flax_names(layout)
        self.framework = framework_of(module)
        if self.framework == "torch":
            self._values = saved_tensors(unwrapped(module))
            self.ties = ties_of(self._values)
        else:
            weights, others = variables_of(module, known)
            kept = weights | {n: v for n, v in others.items() if n in known}
            self._values = {n: v.get_value() for n, v in kept.items()}
            if gone := sorted(n for n in others if n not in kept and n not in carried):
                self.notices.append(f"no weights, not saved: {', '.join(gone)}")
        if not self._values:
            raise UsageError(f"{self.path} has no parameters and no buffers", "give one that has")
        if empty := [n for n, x in self._values.items() if not _has_values(x)]:
            raise UsageError(
                f"{self.path} holds no values: {empty[0]} is only a shape",
                "give a module whose parameters are there: not on torch's device 'meta', and not "
                "of nnx.eval_shape",
            )
        self.tensors = {n: info_of(n, x) for n, x in self._values.items()}

    def read(
        self, name: str, region: Region | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """A copy of the tensor, or of a region of it."""
        region = whole(self.tensors[name].shape) if region is None else region
        value = self._values[name]
        torch = self.framework == "torch"
        array = bits_of(value.detach()[region]) if torch else np.asarray(value)[region]
        out = np.empty(array.shape, array.dtype) if out is None else out
        copy(array, out)
        return out


def _has_values(x: Any) -> bool:
    return not getattr(x, "is_meta", False) and type(x).__name__ != "ShapeDtypeStruct"
