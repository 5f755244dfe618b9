"""Layers with axes of space: convolutions, norms of channels, pools, padding, resizing."""

from __future__ import annotations

import math
from typing import Any

from convert.porting.rendering.constructor import LayerText
from convert.porting.rendering.renderers import (
    JNP,
    NNX,
    View,
    computed,
    is_of,
    made,
    options,
    partial,
    renders,
)

_FIRST = "channels_first_flax"
_CONVS = ("Conv1d", "Conv2d", "Conv3d")
_TRANSPOSED = ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")


def single(values: Any) -> Any:
    """One number where all are the same, and each otherwise."""
    if isinstance(values, str | int):
        return values
    return values[0] if len(set(values)) == 1 else tuple(values)


@renders(*_CONVS)
def convolution(module: Any, view: View) -> LayerText | None:
    sizes = module.in_channels, module.out_channels
    own = module.padding_mode != "zeros"
    if view.last and not own:
        padding = single(module.padding)
        kwargs = {
            "strides": single(module.stride),
            "padding": padding.upper() if isinstance(padding, str) else padding or "VALID",
            "kernel_dilation": single(module.dilation),
            "feature_group_count": module.groups,
            "use_bias": module.bias is not None,
            **options(module),
        }
        if isinstance(kwargs["padding"], tuple):  # a bare number is both ends, a pair is two
            kwargs["padding"] = tuple((p, p) for p in kwargs["padding"])
        usual = {"strides": 1, "kernel_dilation": 1, "feature_group_count": 1, "use_bias": True}
        return made("nnx.Conv", None, (*sizes, module.kernel_size), kwargs, usual)
    kwargs = {
        "stride": single(module.stride),
        "padding": single(module.padding),
        "dilation": single(module.dilation),
        "groups": module.groups,
        "bias": module.bias is not None,
        "padding_mode": module.padding_mode,
        **options(module),
    }
    defaults = {
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "groups": 1,
        "bias": True,
        "padding_mode": "zeros",
    }
    name = is_of(module, *_CONVS) or ""
    args = (*sizes, single(module.kernel_size))
    return made(name, "conv_flax" if view.last else _FIRST, args, kwargs, defaults)


@renders(*_TRANSPOSED)
def transposed(module: Any, view: View) -> LayerText | None:
    if module.groups != 1:  # Flax's has none
        return None
    sizes = module.in_channels, module.out_channels
    if view.last:
        reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        ends = zip(reach, module.padding, module.output_padding, strict=True)
        kwargs = {
            "strides": single(module.stride),
            "padding": tuple((r - p, r - p + more) for r, p, more in ends),
            "kernel_dilation": single(module.dilation),
            "use_bias": module.bias is not None,
            **options(module),
        }
        defaults = {"strides": 1, "kernel_dilation": 1, "use_bias": True}
        return made("nnx.ConvTranspose", None, (*sizes, module.kernel_size), kwargs, defaults)
    kwargs = {
        "stride": single(module.stride),
        "padding": single(module.padding),
        "output_padding": single(module.output_padding),
        "bias": module.bias is not None,
        "dilation": single(module.dilation),
        **options(module),
    }
    defaults = {"stride": 1, "padding": 0, "output_padding": 0, "bias": True, "dilation": 1}
    name = is_of(module, *_TRANSPOSED) or ""
    return made(name, _FIRST, (*sizes, single(module.kernel_size)), kwargs, defaults)


@renders("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
def batch_norm(module: Any, view: View) -> LayerText | None:
    if module.momentum is None and view.training:
        return None  # the average of all batches so far
    tracks = module.track_running_stats
    if tracks != (module.running_mean is not None):
        return None
    kwargs = {
        "eps": module.eps,
        "momentum": 0.1 if module.momentum is None else float(module.momentum),
        "affine": module.affine,
        "track_running_stats": tracks,
        **options(module),
    }
    defaults = {"affine": True, "track_running_stats": True}
    where = "batchnorm_flax" if view.last else _FIRST
    return made("BatchNorm", where, (module.num_features,), kwargs, defaults)


@renders("GroupNorm")
def group_norm(module: Any, view: View) -> LayerText | None:
    if view.last:
        kwargs = {
            "num_groups": module.num_groups,
            "epsilon": module.eps,
            "use_scale": module.affine,
            "use_bias": module.affine,
            "use_fast_variance": False,
            **options(module),
        }
        defaults = {"use_scale": True, "use_bias": True}
        return made("nnx.GroupNorm", None, (module.num_channels,), kwargs, defaults)
    kwargs = {"eps": module.eps, "affine": module.affine, **options(module)}
    sizes = module.num_groups, module.num_channels
    return made("GroupNorm", _FIRST, sizes, kwargs, {"affine": True})


@renders("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d")
def instance_norm(module: Any, view: View) -> LayerText | None:
    if module.track_running_stats:
        return None
    if view.last:
        kwargs = {
            "epsilon": module.eps,
            "use_scale": module.affine,
            "use_bias": module.affine,
            "use_fast_variance": False,
            **options(module),
        }
        defaults = {"use_scale": True, "use_bias": True}
        return made("nnx.InstanceNorm", None, (module.num_features,), kwargs, defaults)
    kwargs = {"eps": module.eps, "affine": module.affine, **options(module)}
    return made("InstanceNorm", _FIRST, (module.num_features,), kwargs, {"affine": False})


# -- pools --------------------------------------------------------------------------------------


def _axes(module: Any) -> int:
    """How many axes of space a class is for: "AvgPool2d" has 2."""
    torchs = next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn.modules."))
    return int(torchs.__name__[-2])


def each(values: Any, n: int) -> tuple[int, ...]:
    """torch's one number for all axes, or one for each."""
    return (values,) * n if isinstance(values, int) else tuple(values)


def _pool(callee: str, module: Any, view: View, **more: Any) -> LayerText:
    """`callee` of pool_flax or channels_first_pool_flax."""
    kernel, stride = single(module.kernel_size), single(module.stride)
    kwargs = {
        "kernel_size": kernel,
        "stride": None if stride == kernel else stride,
        "padding": single(module.padding),
        "ceil_mode": module.ceil_mode,
        **more,
    }
    defaults = {"stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True}
    return partial(callee, kwargs, defaults, _in_axes(view, callee))


def _in_axes(view: View, callee: str) -> str:
    module = "pool_flax" if view.last else "channels_first_pool_flax"
    return f"from zoo.nn.{module} import {callee}"


def _flax_pool(callee: str, module: Any) -> LayerText:
    """Flax's own pool, which has channels last."""
    n = _axes(module)
    window, strides = each(module.kernel_size, n), each(module.stride, n)
    ends = tuple((p, p) for p in each(module.padding, n))
    kwargs = {"window_shape": window, "strides": strides, "padding": ends}
    defaults = {"strides": (1,) * n, "padding": ((0, 0),) * n}
    return partial(callee, kwargs, defaults, NNX)


@renders("MaxPool1d", "MaxPool2d", "MaxPool3d")
def max_pool(module: Any, view: View) -> LayerText | None:
    n = _axes(module)
    if module.return_indices or any(d != 1 for d in each(module.dilation, n)):
        return None
    if view.last and not module.ceil_mode:
        return _flax_pool("nnx.max_pool", module)
    return _pool("max_pool", module, view)


@renders("AvgPool1d", "AvgPool2d", "AvgPool3d")
def avg_pool(module: Any, view: View) -> LayerText | None:
    if getattr(module, "divisor_override", None) is not None:
        return None
    if view.last and not module.ceil_mode and module.count_include_pad:
        return _flax_pool("nnx.avg_pool", module)
    return _pool("avg_pool", module, view, count_include_pad=module.count_include_pad)


@renders("AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d")
def adaptive_avg_pool(module: Any, view: View) -> LayerText | None:
    n, size = _axes(module), module.output_size
    if all(s == 1 for s in (size if isinstance(size, tuple) else (size,))):
        return _over_all("mean", n, view)
    sizes = size if isinstance(size, int) else single(size)
    sizes = (None,) * n if sizes is None else sizes
    kwargs = {"output_size": sizes}
    return partial("adaptive_avg_pool", kwargs, {}, _in_axes(view, "adaptive_avg_pool"))


@renders("AdaptiveMaxPool1d", "AdaptiveMaxPool2d", "AdaptiveMaxPool3d")
def adaptive_max_pool(module: Any, view: View) -> LayerText | None:
    n, size = _axes(module), module.output_size
    whole = all(s == 1 for s in (size if isinstance(size, tuple) else (size,)))
    return _over_all("max", n, view) if whole and not module.return_indices else None


def _over_all(reduction: str, n: int, view: View) -> LayerText:
    end = -1 if view.last else 0
    axes = tuple(range(end - n, end))
    where = repr(axes[0] if n == 1 else axes)
    return computed(lambda x: f"jnp.{reduction}({x}, {where}, keepdims=True)", JNP)


# -- edges and sizes ----------------------------------------------------------------------------

_MODES = {"Zero": "", "Constant": "", "Reflection": "reflect", "Replication": "edge"}
_PADS = [f"{kind}Pad{n}d" for kind in (*_MODES, "Circular") for n in (1, 2, 3)]


@renders(*_PADS)
def pad(module: Any, view: View) -> LayerText | None:
    n = _axes(module)
    around = each(module.padding, 2 * n)
    if any(p < 0 for p in around):
        return None
    space = [(around[i], around[i + 1]) for i in range(2 * n - 2, -1, -2)]  # torch: last one first
    ends = ((0, 0), *space, (0, 0)) if view.last else ((0, 0), (0, 0), *space)
    name = is_of(module, *_PADS) or ""
    mode = {**_MODES, "Circular": "wrap"}[name[: name.index("Pad")]]
    more = f', mode="{mode}"' if mode else ""
    if getattr(module, "value", 0):
        more = f", constant_values={module.value!r}"
    return computed(lambda x: f"jnp.pad({x}, {ends!r}{more})", JNP)


@renders("Upsample", "UpsamplingNearest2d", "UpsamplingBilinear2d")
def upsample(module: Any, view: View) -> LayerText | None:
    mode = {"bilinear": "linear", "trilinear": "linear"}.get(module.mode, module.mode)
    factor = module.scale_factor
    if mode == "bicubic" or (factor is None) == (module.size is None):
        return None
    if factor is not None:
        factors = factor if isinstance(factor, tuple) else (factor,)
        if any(f != math.floor(f) for f in factors):
            return None
        sizes = {"scale_factor": single(tuple(int(f) for f in factors))}
    else:
        sizes = {"size": single(module.size)}
    kwargs = {**sizes, "mode": mode, "align_corners": bool(module.align_corners)}
    defaults = {"mode": "nearest", "align_corners": False}
    return partial("interpolate", kwargs, defaults, _in_axes(view, "interpolate"))


@renders("PixelShuffle")
def pixel_shuffle(module: Any, view: View) -> LayerText | None:
    kwargs = {"upscale_factor": module.upscale_factor}
    return partial("pixel_shuffle", kwargs, {}, _in_axes(view, "pixel_shuffle"))


@renders("PixelUnshuffle")
def pixel_unshuffle(module: Any, view: View) -> LayerText | None:
    kwargs = {"downscale_factor": module.downscale_factor}
    return partial("pixel_unshuffle", kwargs, {}, _in_axes(view, "pixel_unshuffle"))
