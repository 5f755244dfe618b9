"""Layers that both frameworks have, as NNX text: from an instance of torch's own classes.

What a text makes has the state that `derive_layout` says of the layer, and computes what torch
does, in train mode too. A layer is what its class in torch.nn says, or a class of somebody's that
adds nothing to that; a hook, a parametrization or a lazy parameter makes it something else.

Where data keeps torch's axes, a convolution is a class of `zoo.nn.channels_first_flax`: the call
stays `self.conv1(x)`, and no line of the port is about axes. Where channels are last, it is Flax's
own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from convert.porting.rendering.constructor import Call, Constructor, LayerText, Name

NNX = "from flax import nnx"
JAX = "import jax"
JNP = "import jax.numpy as jnp"


@dataclass(frozen=True, slots=True)
class View:
    """Where a layer stands: whether its data has channels last, and whether it must train."""

    last: bool
    training: bool


Renderer = Callable[[Any, View], LayerText | None]
_RENDERERS: dict[str, Renderer] = {}


def renders(*classes: str) -> Callable[[Renderer], Renderer]:
    """Enters what renders these classes of torch.nn."""

    def enter(renderer: Renderer) -> Renderer:
        _RENDERERS.update(dict.fromkeys(classes, renderer))
        return renderer

    return enter


def layer_text(
    module: Any, image_axes: Literal["first", "last"] = "first", training: bool = True
) -> LayerText | None:
    """The text of a torch layer; None: not a layer that both frameworks have.

    `image_axes` says where the data that this layer gets has its channels: (B, C, *D) is "first",
    of one axis (B, C, T) too. With `training` False a text will do that is right in eval mode only.
    """
    _load()
    base = _base(module)
    if base is None or not _as_its_class(module, base):
        return None
    return _RENDERERS[base.__name__](module, View(image_axes == "last", training))


@functools.cache
def _load() -> None:
    """Enters every renderer."""
    from convert.porting.rendering import image_layers, plain_layers, pointwise

    assert image_layers
    assert plain_layers
    assert pointwise


def _base(module: Any) -> type | None:
    """The class of torch's, or transformers' Conv1D, that the module is of."""
    for cls in type(module).__mro__:
        torchs = cls.__module__.startswith("torch.nn.modules.")
        published = cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")
        if torchs or published:
            return cls if cls.__name__ in _RENDERERS else None
    return None


# What a class may say of itself and still be its base.
_HARMLESS = {"__init__", "__doc__", "extra_repr", "reset_parameters", "__repr__"}
_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    "_state_dict_hooks",
)
_TENSORS = {
    *("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
    *("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    *("bias_k", "bias_v"),
}


def _as_its_class(module: Any, base: type) -> bool:
    """Whether the module computes what its torch class does, from that class's own tensors."""
    for cls in type(module).__mro__[: type(module).__mro__.index(base)]:
        if {n for n, v in vars(cls).items() if hasattr(base, n) and _computes(v)} - _HARMLESS:
            return False
    own = vars(module)
    if any(own.get(hooks) for hooks in _HOOKS) or "forward" in own:
        return False
    held = {
        n for kind in ("_parameters", "_buffers") for n, t in own[kind].items() if t is not None
    }
    if any(_is_lazy(t) for t in own["_parameters"].values()):
        return False
    recurrent = {n for n in held if n.startswith(("weight_ih", "weight_hh", "bias_ih", "bias_hh"))}
    parts = set(own["_modules"]) - {"out_proj"}
    return not parts and not held - _TENSORS - recurrent


def _computes(value: Any) -> bool:
    return callable(value) or isinstance(value, property | staticmethod | classmethod)


def _is_lazy(tensor: Any) -> bool:
    import torch

    return tensor is not None and bool(torch.nn.parameter.is_lazy(tensor))


def is_of(module: Any, *names: str) -> str | None:
    """Which of these names its class, or the nearest of its bases, has."""
    return next((c.__name__ for c in type(module).__mro__ if c.__name__ in names), None)


def options(module: Any) -> dict[str, Any]:
    """The keyword arguments that every layer with parameters ends with."""
    tensors = [*module.parameters(), *module.buffers()]
    found = [t.dtype for t in tensors if t.is_floating_point()]
    dtype = str(found[0]).removeprefix("torch.") if found else "float32"
    return {"param_dtype": Name(f"jnp.{dtype}"), "rngs": Name("rngs")}


FLOAT32 = {"param_dtype": Name("jnp.float32")}


def imports_of(constructor: Constructor, *others: str) -> tuple[str, ...]:
    """The lines that a constructor needs: of nnx, or of the module in zoo.nn named in `others`."""
    wide = constructor.kwargs.get("param_dtype", FLOAT32["param_dtype"]) != FLOAT32["param_dtype"]
    own = [NNX] if constructor.callee.startswith("nnx.") else []
    return tuple(dict.fromkeys([*own, *([JNP] if wide else []), *others]))


def bound(names: Sequence[str], args: Sequence[str], kwargs: Mapping[str, str]) -> list[str] | None:
    """The arguments in torch's order, up to the last that is given; None for others, and for a gap
    between them."""
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    if len(args) > len(names) or set(given) - set(names):
        return None
    found = [n for n in names if n in given]
    return [given[n] for n in found] if found == list(names[: len(found)]) else None


def called(*names: str) -> Call:
    """The call of a layer that takes what torch's does, by position."""

    def call(path: str, args: Sequence[str], kwargs: Mapping[str, str]) -> str | None:
        given = bound(names, args, kwargs)
        return None if given is None else f"{path}({', '.join(given)})"

    return call


def made(
    callee: str,
    module: str | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    defaults: dict[str, Any],
    *inputs: str,
) -> LayerText:
    """A layer of NNX, or of a module of zoo.nn, that is called as torch's."""
    constructor = Constructor(callee, args, kwargs, {**defaults, **FLOAT32})
    lines = [f"from zoo.nn.{module} import {callee}"] if module else []
    return LayerText(constructor, called(*(inputs or ("input",))), imports_of(constructor, *lines))


def computed(text: Callable[[str], str | None], *imports: str) -> LayerText:
    """A function of one input: nothing is made."""

    def call(path: str, args: Sequence[str], kwargs: Mapping[str, str]) -> str | None:
        given = bound(("input",), args, kwargs)
        return text(given[0]) if given else None

    return LayerText(None, call, imports)
