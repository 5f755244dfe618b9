"""Layers that both frameworks have, as NNX text: from an instance of torch's own classes.

What a text makes has the state that `derive_layout` says of the layer, and computes what torch
does, in train mode too. A layer is what its class in torch.nn says, or a class of somebody's that
adds nothing to that; a hook, a parametrization or a lazy parameter makes it something else.

Where data keeps torch's axes, a convolution is a class of `zoo.nn.channels_first_flax`: the call
stays `self.conv1(x)`, and no line of the port is about axes. Where channels are last, it is Flax's
own.
"""

from __future__ import annotations

from typing import Any, Literal

# The first three enter what they render.
from convert.porting.rendering import activation_layers, image_layers, plain_layers  # noqa: F401
from convert.porting.rendering.constructor import LayerText
from convert.porting.rendering.renderers import RENDERERS, View

ImageAxes = Literal["first", "last"]


def layer_text(
    module: Any,
    image_axes: ImageAxes = "first",
    training: bool = True,
    checked: bool = False,
) -> LayerText | None:
    """The text of a torch layer; None: not a layer that both frameworks have.

    `image_axes` says where the data that this layer gets has its channels: (B, C, *D) is "first",
    of one axis (B, C, T) too. With `training` False a text will do that is right in eval mode only.
    `checked`: somebody has seen that it computes what its class of torch's does.
    """
    base = torch_class(module)
    if base is None or not (checked or _as_its_class(module, base)):
        return None
    return RENDERERS[base.__name__](module, View(image_axes == "last", training))


def torch_class(module: Any) -> type | None:
    """The class of torch's, or transformers' Conv1D, that the module is of."""
    for cls in type(module).__mro__:
        torchs = cls.__module__.startswith("torch.nn.modules.")
        published = cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")
        if torchs or published:
            return cls if cls.__name__ in RENDERERS else None
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
