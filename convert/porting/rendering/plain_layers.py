"""Layers without axes of images: linear, embedding, norms of features, dropout, recurrent."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from convert.porting.rendering.constructor import LayerText
from convert.porting.rendering.renderers import View, computed, is_of, made, options, renders

_NO_FAST = {"use_fast_variance": False}


@renders("Identity")
def identity(module: Any, view: View) -> LayerText | None:
    return computed(lambda x: x)


@renders("Linear", "NonDynamicallyQuantizableLinear")
def linear(module: Any, view: View) -> LayerText | None:
    sizes = tuple(reversed(module.weight.shape))  # in_features may be stale, where it was replaced
    kwargs = {"use_bias": module.bias is not None, **options(module)}
    return made("nnx.Linear", None, sizes, kwargs, {"use_bias": True})


@renders("Conv1D")
def stored_in_out(module: Any, view: View) -> LayerText | None:
    """transformers' Conv1D, of GPT-2: a linear layer."""
    kwargs = options(module)
    return made("nnx.Linear", None, tuple(module.weight.shape), kwargs, {}, "x")


@renders("Bilinear")
def bilinear(module: Any, view: View) -> LayerText | None:
    sizes = module.in1_features, module.in2_features, module.out_features
    kwargs = {"bias": module.bias is not None, **options(module)}
    inputs = "input1", "input2"
    return made("Bilinear", "layers_flax", sizes, kwargs, {"bias": True}, *inputs)


@renders("Embedding")
def embedding(module: Any, view: View) -> LayerText | None:
    if module.max_norm is not None or (module.scale_grad_by_freq and view.training):
        return None
    sizes = tuple(module.weight.shape)
    if module.padding_idx is None or not view.training:
        return made("nnx.Embed", None, sizes, options(module), {})
    kwargs = {"padding_idx": module.padding_idx, **options(module)}
    return made("Embed", "layers_flax", sizes, kwargs, {})


@renders("LayerNorm")
def layer_norm(module: Any, view: View) -> LayerText | None:
    if len(module.normalized_shape) != 1:  # NNX's scale has one axis
        if view.last or module.weight is None or module.bias is None:
            return None
        kwargs = {"eps": module.eps, **options(module)}
        return made("LayerNorm", "layers_flax", (module.normalized_shape,), kwargs, {})
    kwargs = {
        "epsilon": module.eps,
        "use_scale": module.weight is not None,
        "use_bias": module.bias is not None,
        **_NO_FAST,
        **options(module),
    }
    defaults = {"use_scale": True, "use_bias": True}
    return made("nnx.LayerNorm", None, tuple(module.normalized_shape), kwargs, defaults)


@renders("RMSNorm")
def rms_norm(module: Any, view: View) -> LayerText | None:
    if len(module.normalized_shape) != 1 or (module.eps is None and module.weight is None):
        return None
    sizes = tuple(module.normalized_shape)
    if module.eps is None:
        return made("RMSNorm", "rmsnorm_flax", sizes, {"eps": None, **options(module)}, {})
    kwargs = {
        "epsilon": module.eps,
        "use_scale": module.weight is not None,
        **_NO_FAST,
        **options(module),
    }
    return made("nnx.RMSNorm", None, sizes, kwargs, {"use_scale": True})


@renders("Dropout")
def dropout(module: Any, view: View) -> LayerText | None:
    return _dropout(module, getattr(module, "shared_axes", ()))  # of functional_dropout.py


@renders("Dropout1d", "Dropout2d", "Dropout3d")
def channel_dropout(module: Any, view: View) -> LayerText | None:
    """Whole channels are dropped: one draw for all of a channel's places."""
    name = is_of(module, "Dropout1d", "Dropout2d", "Dropout3d") or ""
    places = range(-int(name[-2]), 0)
    return _dropout(module, tuple(p - 1 if view.last else p for p in places))


@renders("AlphaDropout", "FeatureAlphaDropout")
def alpha_dropout(module: Any, view: View) -> LayerText | None:
    return None if view.training else computed(lambda x: x)


def _dropout(module: Any, shared: tuple[int, ...]) -> LayerText:
    kwargs = {"broadcast_dims": shared, "rngs": options(module)["rngs"]}
    return made("nnx.Dropout", None, (float(module.p),), kwargs, {"broadcast_dims": ()})


@renders("RNN", "GRU", "LSTM")
def recurrent(module: Any, view: View) -> LayerText | None:
    if not module.bias or module.proj_size:
        return None
    kwargs = {
        "nonlinearity": getattr(module, "nonlinearity", "tanh"),
        "batch_first": module.batch_first,
        "dropout": float(module.dropout),
        "bidirectional": module.bidirectional,
        **options(module),
    }
    defaults: dict[str, Any] = {
        "nonlinearity": "tanh",
        "batch_first": False,
        "dropout": 0.0,
        "bidirectional": False,
    }
    name = module.mode.split("_")[0]
    if name != "RNN":
        del kwargs["nonlinearity"]
    sizes = module.input_size, module.hidden_size, module.num_layers
    sizes = sizes[: 2 + (module.num_layers != 1)]
    return made(name, "recurrent_flax", sizes, kwargs, defaults, "input", "hx")


@renders("RNNCell", "GRUCell", "LSTMCell")
def cell(module: Any, view: View) -> LayerText | None:
    if not module.bias:
        return None
    name = is_of(module, "RNNCell", "GRUCell", "LSTMCell") or ""
    kwargs = options(module)
    if name == "RNNCell":
        kwargs = {"nonlinearity": module.nonlinearity, **kwargs}
    sizes = module.input_size, module.hidden_size
    return made(name, "recurrent_flax", sizes, kwargs, {"nonlinearity": "tanh"}, "input", "hx")


_ATTENTION = (
    *("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask"),
    "average_attn_weights",
)


@renders("MultiheadAttention")
def attention(module: Any, view: View) -> LayerText | None:
    if module.bias_k is not None or module.add_zero_attn:
        return None
    kwargs = {
        "dropout": float(module.dropout),
        "bias": module.in_proj_bias is not None,
        "kdim": None if module.kdim == module.embed_dim else module.kdim,
        "vdim": None if module.vdim == module.embed_dim else module.vdim,
        "batch_first": module.batch_first,
        **options(module),
    }
    defaults = {"dropout": 0.0, "bias": True, "kdim": None, "vdim": None, "batch_first": False}
    sizes = module.embed_dim, module.num_heads
    text = made("MultiheadAttention", "multihead_flax", sizes, kwargs, defaults)
    return dataclasses.replace(text, call=_attended)


def _attended(path: str, args: Sequence[str], kwargs: Mapping[str, str]) -> str | None:
    """torch's call, without `is_causal`: a hint that the mask is what it is."""
    given = {n: t for n, t in kwargs.items() if n != "is_causal"}
    if len(args) > len(_ATTENTION) or not set(given) <= set(_ATTENTION[len(args) :]):
        return None
    return f"{path}({', '.join([*args, *(f'{n}={t}' for n, t in given.items())])})"
