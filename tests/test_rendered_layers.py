"""Layers as NNX source text: written, run, and held against torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from convert.porting.rendering.constructor import LayerText
from convert.porting.rendering.layer_text import layer_text
from convert.porting.tensors_by_name import ByName
from convert.runtime.torch_layout import derive_layout
from zoo import probe

Make = Callable[[], nn.Module]


def plain(*shape: int) -> dict[str, Any]:
    return {"x": probe.normal("x", shape)}


# What is built, and the shape of its input in torch's axes.
IMAGES: dict[str, tuple[Make, tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv1d_same_even": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2), (2, 4, 11)),
    "conv1d_circular": (
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, padding_mode="circular"),
        (2, 4, 9),
    ),
    "conv2d": (lambda: nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), (2, 3, 15, 14)),
    "conv2d_groups": (
        lambda: nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
        (2, 4, 9, 10),
    ),
    "conv2d_valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 6, 7)),
    "conv2d_reflect": (lambda: nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"), (2, 3, 6, 7)),
    "conv2d_replicate": (
        lambda: nn.Conv2d(3, 4, (2, 3), padding="same", padding_mode="replicate"),
        (2, 3, 6, 7),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=2, padding=1), (2, 2, 4, 5, 6)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 3, 4, stride=2, padding=1), (2, 4, 5)),
    "transposed2d": (
        lambda: nn.ConvTranspose2d(
            4, 3, 3, stride=(2, 3), padding=1, output_padding=(1, 2), dilation=2, bias=False
        ),
        (2, 4, 5, 4),
    ),
    "transposed2d_cut": (lambda: nn.ConvTranspose2d(4, 3, 2, padding=2), (2, 4, 6, 7)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 3, 2, 2)),
    "batchnorm1d": (lambda: nn.BatchNorm1d(5), (4, 5, 3)),
    "batchnorm2d": (lambda: nn.BatchNorm2d(5, eps=1e-3, momentum=0.03), (4, 5, 3, 2)),
    "batchnorm2d_bare": (lambda: nn.BatchNorm2d(5, affine=False), (4, 5, 3, 2)),
    "batchnorm2d_batch": (lambda: nn.BatchNorm2d(5, track_running_stats=False), (4, 5, 3, 2)),
    "batchnorm3d": (lambda: nn.BatchNorm3d(3), (4, 3, 2, 2, 2)),
    "groupnorm": (lambda: nn.GroupNorm(2, 6, eps=1e-3), (2, 6, 4, 3)),
    "groupnorm_bare": (lambda: nn.GroupNorm(3, 6, affine=False), (2, 6, 4)),
    "instancenorm": (lambda: nn.InstanceNorm2d(4), (2, 4, 3, 5)),
    "instancenorm_affine": (lambda: nn.InstanceNorm1d(4, affine=True), (2, 4, 5)),
    "dropout2d": (lambda: nn.Dropout2d(0.3), (2, 3, 4, 5)),
    "prelu": (lambda: nn.PReLU(4), (2, 4, 3, 3)),
    "max_pool": (lambda: nn.MaxPool2d(3, 2, 1), (2, 3, 8, 9)),
    "max_pool_ceil": (lambda: nn.MaxPool2d((3, 2), (2, 3), ceil_mode=True), (2, 3, 8, 9)),
    "max_pool1d": (lambda: nn.MaxPool1d(2, stride=1), (2, 3, 7)),
    "max_pool3d": (lambda: nn.MaxPool3d(2, ceil_mode=True), (2, 2, 5, 4, 3)),
    "avg_pool": (lambda: nn.AvgPool2d(3, 2, 1), (2, 3, 8, 9)),
    "avg_pool_outside": (
        lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        (2, 3, 8, 9),
    ),
    "avg_pool_ceil": (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True), (2, 3, 8, 9)),
    "avg_pool1d": (lambda: nn.AvgPool1d(2), (2, 3, 7)),
    "adaptive_one": (lambda: nn.AdaptiveAvgPool2d(1), (2, 3, 5, 4)),
    "adaptive_one1d": (lambda: nn.AdaptiveAvgPool1d(1), (2, 3, 5)),
    "adaptive": (lambda: nn.AdaptiveAvgPool2d((3, None)), (2, 3, 5, 4)),
    "adaptive_max": (lambda: nn.AdaptiveMaxPool2d((1, 1)), (2, 3, 5, 4)),
    "zero_pad": (lambda: nn.ZeroPad2d((1, 2, 3, 0)), (2, 3, 5, 4)),
    "constant_pad": (lambda: nn.ConstantPad1d(2, 1.5), (2, 3, 5)),
    "reflection_pad": (lambda: nn.ReflectionPad2d(2), (2, 3, 5, 4)),
    "replication_pad": (lambda: nn.ReplicationPad3d((1, 0, 2, 1, 0, 3)), (2, 2, 3, 2, 2)),
    "circular_pad": (lambda: nn.CircularPad1d((1, 3)), (2, 3, 5)),
    "upsample": (lambda: nn.Upsample(scale_factor=2), (2, 3, 5, 4)),
    "upsample_size": (lambda: nn.Upsample(size=(7, 3)), (2, 3, 5, 4)),
    "upsample_bilinear": (lambda: nn.Upsample(size=(9, 3), mode="bilinear"), (2, 3, 5, 4)),
    "upsample_corners": (
        lambda: nn.Upsample(scale_factor=(2, 3), mode="bilinear", align_corners=True),
        (2, 3, 5, 4),
    ),
    "upsample_one": (
        lambda: nn.Upsample(size=(1, 3), mode="bilinear", align_corners=True),
        (2, 3, 5, 1),
    ),
    "upsample_nearest": (lambda: nn.UpsamplingNearest2d(scale_factor=3), (2, 3, 2, 4)),
    "nearest_exact": (lambda: nn.Upsample(size=(7,), mode="nearest-exact"), (2, 3, 5)),
    "pixel_shuffle": (lambda: nn.PixelShuffle(2), (2, 8, 3, 4)),
    "pixel_unshuffle": (lambda: nn.PixelUnshuffle(2), (2, 3, 4, 6)),
    "softmax2d": (nn.Softmax2d, (2, 3, 4, 5)),
    "softmax_channels": (lambda: nn.Softmax(dim=1), (2, 3, 4, 5)),
    "softmax_rows": (lambda: nn.Softmax(dim=2), (2, 3, 4, 5)),
    "glu_channels": (lambda: nn.GLU(1), (2, 4, 3, 3)),
}
FLAT_ENDS = {"flatten": (nn.Flatten, (2, 3, 4, 5))}  # the output has no channels

FEATURES: dict[str, tuple[Make, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (2, 3, 6)),
    "linear_bare": (lambda: nn.Linear(6, 4, bias=False), (2, 6)),
    "layernorm": (lambda: nn.LayerNorm(6, eps=1e-12), (2, 3, 6)),
    "layernorm_bias": (lambda: nn.LayerNorm(6, bias=False), (2, 3, 6)),
    "layernorm_bare": (lambda: nn.LayerNorm(6, elementwise_affine=False), (2, 3, 6)),
    "rmsnorm": (lambda: nn.RMSNorm(6, eps=1e-6), (2, 3, 6)),
    "dropout": (lambda: nn.Dropout(0.1), (2, 3)),
    "identity": (nn.Identity, (2, 3)),
    "batchnorm_rows": (lambda: nn.BatchNorm1d(5), (4, 5)),
    "prelu_one": (nn.PReLU, (2, 3)),
    "gelu": (nn.GELU, (50,)),
    "gelu_tanh": (lambda: nn.GELU(approximate="tanh"), (50,)),
    "relu": (nn.ReLU, (50,)),
    "relu6": (nn.ReLU6, (50,)),
    "silu": (nn.SiLU, (50,)),
    "mish": (nn.Mish, (50,)),
    "tanh": (nn.Tanh, (50,)),
    "sigmoid": (nn.Sigmoid, (50,)),
    "log_sigmoid": (nn.LogSigmoid, (50,)),
    "softsign": (nn.Softsign, (50,)),
    "selu": (nn.SELU, (50,)),
    "elu": (lambda: nn.ELU(0.7), (50,)),
    "celu": (lambda: nn.CELU(0.7), (50,)),
    "leaky_relu": (lambda: nn.LeakyReLU(0.2), (50,)),
    "hardtanh": (lambda: nn.Hardtanh(-2, 1.5), (50,)),
    "hardswish": (nn.Hardswish, (50,)),
    "hardsigmoid": (nn.Hardsigmoid, (50,)),
    "hardshrink": (nn.Hardshrink, (50,)),
    "softshrink": (lambda: nn.Softshrink(0.3), (50,)),
    "tanhshrink": (nn.Tanhshrink, (50,)),
    "threshold": (lambda: nn.Threshold(0.5, -1), (50,)),
    "softplus": (lambda: nn.Softplus(beta=2, threshold=3), (50,)),
    "softmax": (lambda: nn.Softmax(dim=-1), (3, 4)),
    "softmin": (lambda: nn.Softmin(dim=0), (3, 4)),
    "log_softmax": (lambda: nn.LogSoftmax(dim=1), (3, 4)),
    "glu": (nn.GLU, (3, 4)),
    "flatten_middle": (lambda: nn.Flatten(1, 2), (2, 3, 4, 5)),
    "flatten_all": (lambda: nn.Flatten(0), (2, 3, 4)),
    "unflatten": (lambda: nn.Unflatten(1, (2, 3)), (2, 6, 4)),
    "unflatten_last": (lambda: nn.Unflatten(-1, (2, 3)), (2, 4, 6)),
}


def filled(make: Make, dtype: str) -> nn.Module:
    """The torch layer with weights that follow from its names; a variance is positive."""
    module = make().to(getattr(torch, dtype))
    for name, t in module.state_dict(keep_vars=True).items():
        value = probe.normal(name, tuple(t.shape))
        if t.is_floating_point():
            value = np.abs(value) + 0.1 if name.endswith("var") else value
            t.data.copy_(torch.from_numpy(np.asarray(value)))
    return module.eval()


def port(text: LayerText, *args: str, **kwargs: str) -> nnx.Module:
    """A module of a file that holds the layer: exactly the text."""
    made = text.constructor.text() if text.constructor else "None"
    call = text.call("self.layer", args, kwargs)
    source = "\n".join(
        [
            *dict.fromkeys(["from flax import nnx", *text.imports]),
            "class Port(nnx.Module):",
            "    def __init__(self, rngs):",
            f"        self.layer = {made}",
            f"    def __call__(self, {', '.join([*args, *kwargs.values()])}):",
            f"        return {call}",
        ]
    )
    names: dict[str, Any] = {}
    exec(source, names)
    made_port: nnx.Module = nnx.eval_shape(lambda: names["Port"](nnx.Rngs(0)))
    return made_port


def fill(net: Any, module: nn.Module) -> None:
    """torch's weights through the layout; every variable of the port is the layout's, and no more."""
    layout, _ = derive_layout(module)
    state = {n: t.detach().numpy() for n, t in module.state_dict().items()}
    wanted = ByName(layout).flax(state)
    held = nnx.to_flat_state(nnx.state(net, (nnx.Param, nnx.BatchStat)))
    variables = {".".join(map(str, path[1:])): v for path, v in held}
    found = {n: (v.shape, v.dtype) for n, v in variables.items()}
    assert found == {n: (x.shape, x.dtype) for n, x in wanted.items()}
    for entry in layout.entries:
        for t in entry.flax:
            kind = nnx.BatchStat if entry.collection == "batch_stats" else nnx.Param
            assert isinstance(variables[t.name], kind)
    flat = [
        (path, v.replace(jnp.asarray(wanted[".".join(map(str, path[1:]))]))) for path, v in held
    ]
    for path, v in nnx.to_flat_state(nnx.state(net, nnx.RngState)):
        drawn = jax.random.key(7) if isinstance(v, nnx.RngKey) else jnp.zeros((), v.dtype)
        flat.append((path, v.replace(drawn)))
    nnx.update(net, nnx.from_flat_state(flat))


def close(got: Any, expected: torch.Tensor, dtype: str) -> None:
    wanted = expected.detach().numpy()
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    scale = max(np.abs(wanted).max(), 1)
    assert (
        np.abs(np.asarray(got) - wanted).max() <= {"float64": 1e-12, "float32": 2e-6}[dtype] * scale
    )


def last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


@pytest.fixture(autouse=True)
def precise() -> Iterator[None]:
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


def held_alike(
    make: Make, shape: tuple[int, ...], axes: Any = "first", flat: bool = False, train: bool = True
) -> None:
    for dtype in ("float64", "float32"):
        module = filled(make, dtype)
        text = layer_text(module, axes)
        assert text is not None
        net: Any = port(text, "x")
        fill(net, module)
        x = 3 * probe.normal("x", shape).astype(dtype)
        given = last(x) if axes == "last" else x
        turned = last if axes == "last" and not flat else np.asarray
        net.eval()
        got = np.asarray(nnx.jit(lambda net, x: net(x))(net, given))
        expected = module(torch.from_numpy(x))
        close(got, torch.from_numpy(turned(expected.detach().numpy())), dtype)


@pytest.mark.parametrize("axes", ["first", "last"])
@pytest.mark.parametrize("name", list(IMAGES))
def test_layers_of_images_are_torchs(name: str, axes: str) -> None:
    held_alike(*IMAGES[name], axes)


@pytest.mark.parametrize("axes", ["first", "last"])
@pytest.mark.parametrize("name", list(FLAT_ENDS))
def test_flattened_images_are_in_torchs_order(name: str, axes: str) -> None:
    held_alike(*FLAT_ENDS[name], axes, flat=True)


@pytest.mark.parametrize("name", list(FEATURES))
def test_layers_of_features_are_torchs(name: str) -> None:
    held_alike(*FEATURES[name])


# -- layers of their own inputs -----------------------------------------------------------------


def test_embeddings_look_up_what_torchs_do() -> None:
    for make in (lambda: nn.Embedding(7, 4), lambda: nn.Embedding(7, 4, padding_idx=2)):
        module = filled(make, "float64")
        text = layer_text(module)
        assert text is not None
        net: Any = port(text, "input")
        fill(net, module)
        tokens = np.array([[1, 2, 6], [2, 0, 3]])
        close(net(tokens), module(torch.from_numpy(tokens)), "float64")
        given = nnx.grad(lambda net: (net(tokens) ** 3).sum())(net)["layer"]["embedding"]
        (module(torch.from_numpy(tokens)) ** 3).sum().backward()
        close(given[...], module.weight.grad, "float64")


RECURRENT: dict[str, tuple[Make, tuple[int, ...]]] = {
    "lstm": (lambda: nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True), (2, 5, 3)),
    "gru": (lambda: nn.GRU(3, 4), (5, 2, 3)),
    "rnn": (lambda: nn.RNN(3, 4, nonlinearity="relu", dropout=0.0), (5, 2, 3)),
    "lstm_cell": (lambda: nn.LSTMCell(3, 4), (2, 3)),
    "gru_cell": (lambda: nn.GRUCell(3, 4), (2, 3)),
    "rnn_cell": (lambda: nn.RNNCell(3, 4), (2, 3)),
}


@pytest.mark.parametrize("name", list(RECURRENT))
def test_recurrent_layers_are_torchs(name: str) -> None:
    make, shape = RECURRENT[name]
    module = filled(make, "float64")
    text = layer_text(module)
    assert text is not None
    net: Any = port(text, "x")
    fill(net, module)
    x = probe.normal("x", shape)
    got, expected = jax.tree.leaves(net(x)), module(torch.from_numpy(x))
    wanted = jax.tree.leaves(expected, is_leaf=torch.is_tensor)
    for a, b in zip(got, wanted, strict=True):
        close(a, b, "float64")


def test_a_bilinear_layer_is_torchs() -> None:
    module = filled(lambda: nn.Bilinear(3, 4, 5), "float64")
    text = layer_text(module)
    assert text is not None
    net: Any = port(text, "a", "b")
    fill(net, module)
    a, b = probe.normal("a", (2, 3)), probe.normal("b", (2, 4))
    close(net(a, b), module(torch.from_numpy(a), torch.from_numpy(b)), "float64")


@pytest.mark.parametrize("axes", ["first", "last"])
@pytest.mark.parametrize("name", [n for n in IMAGES if "batchnorm" in n])
def test_statistics_move_as_torchs_do(name: str, axes: Any) -> None:
    make, shape = IMAGES[name]
    module = filled(make, "float64").train()
    text = layer_text(module, axes)
    assert text is not None
    net: Any = port(text, "x")
    fill(net, module)
    net.train()
    for batch in ("one", "two"):
        x = probe.normal(batch, shape) + 2
        expected = module(torch.from_numpy(x)).detach().numpy()
        got = net(last(x) if axes == "last" else x)
        turned = last(expected) if axes == "last" else expected
        close(got, torch.from_numpy(turned), "float64")
    kept = nnx.state(net, nnx.BatchStat)
    if module.running_mean is None:
        assert not nnx.to_flat_state(kept)
        return
    close(kept["layer"]["mean"][...], module.running_mean, "float64")
    close(kept["layer"]["var"][...], module.running_var, "float64")


@pytest.mark.parametrize("axes", ["first", "last"])
def test_whole_channels_are_dropped(axes: Any) -> None:
    text = layer_text(nn.Dropout2d(0.5), axes)
    assert text is not None
    net: Any = port(text, "x")
    fill(net, nn.Dropout2d(0.5))
    net.train()
    y = np.asarray(net(np.ones((4, 6, 5, 5) if axes == "first" else (4, 5, 5, 6))))
    channels = y if axes == "first" else np.moveaxis(y, -1, 1)
    assert (channels == channels[..., :1, :1]).all()
    assert set(np.unique(channels)) == {0.0, 2.0}
