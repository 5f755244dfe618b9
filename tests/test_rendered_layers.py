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

from convert.porting.rendering.constructor import LayerText, Place
from convert.porting.rendering.layer_text import layer_text
from convert.porting.tensors_by_name import ByName
from convert.runtime.torch_layout import derive_layout
from zoo import probe

Make = Callable[[], nn.Module]


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
    "layernorm_of_two": (lambda: nn.LayerNorm((3, 6), eps=1e-4), (2, 3, 6)),
    "layernorm_bias": (lambda: nn.LayerNorm(6, bias=False), (2, 3, 6)),
    "layernorm_bare": (lambda: nn.LayerNorm(6, elementwise_affine=False), (2, 3, 6)),
    "rmsnorm": (lambda: nn.RMSNorm(6, eps=1e-6), (2, 3, 6)),
    "rmsnorm_machine": (lambda: nn.RMSNorm(6), (2, 3, 6)),
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
    """torch's weights through the layout: the port has its variables, and no others."""
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


def close(got: Any, expected: Any, dtype: str) -> None:
    wanted = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
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


def held_alike(make: Make, shape: tuple[int, ...], axes: Any = "first", flat: bool = False) -> None:
    """In both precisions, by one program: most of the time is compiling."""
    x = 3 * probe.normal("x", shape)
    turned = last if axes == "last" and not flat else np.asarray
    nets: list[Any] = []
    expected = []
    for dtype in ("float64", "float32"):
        module = filled(make, dtype)
        text = layer_text(module, axes)
        assert text is not None
        nets.append(port(text, "x"))
        fill(nets[-1], module)
        nets[-1].eval()
        expected.append(turned(module(torch.from_numpy(x.astype(dtype))).detach().numpy()))
    given = last(x) if axes == "last" else x
    both: Any = nnx.jit(lambda a, b, x: (a(x), b(x.astype(np.float32))))
    wide, narrow = both(*nets, given)
    close(wide, expected[0], "float64")
    close(narrow, expected[1], "float32")


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


@pytest.mark.parametrize("padding", [None, 2])
def test_embeddings_look_up_what_torchs_do(padding: int | None) -> None:
    module = filled(lambda: nn.Embedding(7, 4, padding_idx=padding), "float64")
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
        close(got, turned, "float64")
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


def attention_masks() -> dict[str, dict[str, Any]]:
    causal = np.triu(np.ones((4, 4), bool), 1)
    padded = np.array([[False] * 4, [False, False, False, True]])
    added = probe.normal("mask", (4, 4, 4))
    return {
        "none": {},
        "causal": {"attn_mask": causal, "need_weights": False},
        "padded": {"key_padding_mask": padded, "average_attn_weights": False},
        "added": {"attn_mask": added, "key_padding_mask": np.where(padded, -5.0, 0.0)},
    }


@pytest.mark.parametrize("case", list(attention_masks()))
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_is_torchs(case: str, batch_first: bool) -> None:
    kdim, vdim = (5, 3) if case == "none" else (6, 6)
    module = filled(
        lambda: nn.MultiheadAttention(6, 2, batch_first=batch_first, kdim=kdim, vdim=vdim),
        "float64",
    )
    text, given = layer_text(module), attention_masks()[case]
    assert text is not None
    net: Any = port(text, "q", "k", "v", **{n: n for n in given})
    fill(net, module)
    sizes = {"q": 6, "k": kdim, "v": vdim}
    parts = [probe.normal(n, (2, 4, width)) for n, width in sizes.items()]
    parts = parts if batch_first else [x.swapaxes(0, 1) for x in parts]
    tensors = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in given.items()}
    net.eval()
    got = net(*parts, **given)
    expected = module(*map(torch.from_numpy, parts), **tensors)
    close(got[0], expected[0], "float64")
    assert (got[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        close(got[1], expected[1], "float64")


def test_gpt2s_linear_layer_is_stored_in_out() -> None:
    layers = pytest.importorskip("transformers.pytorch_utils")
    held_alike(lambda: layers.Conv1D(6, 4), (2, 3, 4))


# -- what is not such a layer -------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Renamed(nn.Linear):
    """An exact subclass: only its arguments are others."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class Gated(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.gate = nn.Parameter(torch.ones(3))


class Frozen(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)


def hooked() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


def patched() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.forward = lambda input: input  # type: ignore[method-assign]
    return layer


NOT: dict[str, Make] = {
    "own_forward": lambda: Doubled(3, 3),
    "own_parameter": Gated,
    "own_train": lambda: Frozen(3),
    "hook": hooked,
    "patched": patched,
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
    "lazy": lambda: nn.LazyLinear(3),
    "container": lambda: nn.Sequential(nn.Linear(3, 3)),
    "encoder": lambda: nn.TransformerEncoderLayer(4, 2),
    "transposed_groups": lambda: nn.ConvTranspose2d(4, 4, 3, groups=2),
    "max_norm": lambda: nn.Embedding(3, 4, max_norm=1.0),
    "scaled_gradient": lambda: nn.Embedding(3, 4, scale_grad_by_freq=True),
    "bag": lambda: nn.EmbeddingBag(3, 4),
    "layernorm_of_two": lambda: nn.LayerNorm((3, 4), bias=False),
    "rmsnorm_of_dtype": lambda: nn.RMSNorm(4, elementwise_affine=False),
    "cumulative": lambda: nn.BatchNorm1d(3, momentum=None),
    "instance_statistics": lambda: nn.InstanceNorm2d(3, track_running_stats=True),
    "alpha_dropout": nn.AlphaDropout,
    "random_slope": nn.RReLU,
    "softmax_of_what": nn.Softmax,
    "indices": lambda: nn.MaxPool2d(2, return_indices=True),
    "dilated_pool": lambda: nn.MaxPool2d(2, dilation=2),
    "divisor": lambda: nn.AvgPool2d(2, divisor_override=3),
    "cut": lambda: nn.ZeroPad2d(-1),
    "bicubic": lambda: nn.Upsample(scale_factor=2, mode="bicubic"),
    "half_size": lambda: nn.Upsample(scale_factor=0.5),
    "one_bias": lambda: nn.GRU(3, 4, bias=False),
    "projected": lambda: nn.LSTM(3, 4, proj_size=2),
    "zero_attention": lambda: nn.MultiheadAttention(4, 2, add_zero_attn=True),
}


@pytest.mark.parametrize("name", list(NOT))
def test_what_is_something_else_has_no_text(name: str) -> None:
    assert layer_text(NOT[name]()) is None


@pytest.mark.parametrize("name", ["cumulative", "alpha_dropout", "random_slope"])
def test_what_only_trains_otherwise_will_do_where_it_need_not(name: str) -> None:
    assert layer_text(NOT[name](), training=False) is not None


def test_sizes_are_those_of_a_weight_that_was_replaced() -> None:
    layer = nn.Linear(3, 4)
    layer.weight = nn.Embedding(5, 3).weight
    text = layer_text(layer)
    assert text is not None
    assert text.constructor is not None
    assert text.constructor.args == (3, 5)


def test_a_subclass_that_adds_nothing_is_its_base() -> None:
    text = layer_text(Renamed(3))
    assert text is not None
    assert text.constructor is not None
    assert text.constructor.text() == "nnx.Linear(3, 3, rngs=rngs)"


# -- how it reads -------------------------------------------------------------------------------

READS: dict[str, tuple[Make, str, str]] = {
    "conv": (
        lambda: nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
        "Conv2d(3, 64, 7, stride=2, padding=3, bias=False, rngs=rngs)",
        "nnx.Conv(3, 64, (7, 7), strides=2, padding=3, use_bias=False, rngs=rngs)",
    ),
    "conv1d": (
        lambda: nn.Conv1d(3, 8, 3),
        "Conv1d(3, 8, 3, rngs=rngs)",
        'nnx.Conv(3, 8, (3,), padding="VALID", rngs=rngs)',
    ),
    "batchnorm": (
        lambda: nn.BatchNorm2d(64),
        "BatchNorm(64, eps=1e-5, momentum=0.1, rngs=rngs)",
        "BatchNorm(64, eps=1e-5, momentum=0.1, rngs=rngs)",
    ),
    "bfloat16": (
        lambda: nn.Linear(4, 8, dtype=torch.bfloat16),
        "nnx.Linear(4, 8, param_dtype=jnp.bfloat16, rngs=rngs)",
        "nnx.Linear(4, 8, param_dtype=jnp.bfloat16, rngs=rngs)",
    ),
    "layernorm": (
        lambda: nn.LayerNorm(8, eps=1e-12),
        "nnx.LayerNorm(8, epsilon=1e-12, use_fast_variance=False, rngs=rngs)",
        "nnx.LayerNorm(8, epsilon=1e-12, use_fast_variance=False, rngs=rngs)",
    ),
}


@pytest.mark.parametrize("name", list(READS))
def test_a_layer_reads_as_a_person_writes_it(name: str) -> None:
    make, first, last = READS[name]
    for axes, expected in (("first", first), ("last", last)):
        text = layer_text(make(), axes)  # type: ignore[arg-type]
        assert text is not None
        assert text.constructor is not None
        assert text.constructor.text() == expected


def test_expressions_may_stand_for_values_also_for_what_is_not_written() -> None:
    text = layer_text(nn.Conv2d(16, 64, 3, padding=1), "last")
    assert text is not None
    assert text.constructor is not None
    values = text.constructor.values()
    assert values[(0,)] == 16
    assert values[(2, 1)] == 3
    assert values["strides",] == 1
    names: dict[Place, str] = {(0,): "dim", (1,): "4 * dim", ("strides",): "stride"}
    assert text.constructor.text(names) == (
        "nnx.Conv(dim, 4 * dim, (3, 3), strides=stride, padding=1, rngs=rngs)"
    )


def test_calls_are_bound_to_torchs_arguments() -> None:
    def call(module: nn.Module, *args: str, **kwargs: str) -> str | None:
        text = layer_text(module)
        assert text is not None
        return text.call("self.layer", args, kwargs)

    assert call(nn.Linear(2, 2), input="x + 1") == "self.layer(x + 1)"
    assert call(nn.GRU(2, 2), "x", hx="h") == "self.layer(x, h)"
    assert call(nn.Linear(2, 2), "x", other="y") is None
    assert call(nn.ConvTranspose1d(2, 2, 2), "x", output_size="n") is None
    assert call(nn.GELU(), "self.fc(x)") == "jax.nn.gelu(self.fc(x), approximate=False)"
    assert call(nn.Flatten(), "x") == "x.reshape(x.shape[0], -1)"
    assert call(nn.Flatten(), "self.pool(x)") == "jax.lax.collapse(self.pool(x), 1)"
    assert call(nn.Identity(), "x") == "x"
    attention = nn.MultiheadAttention(4, 2)
    given = {"need_weights": "False", "is_causal": "True", "attn_mask": "m"}
    assert call(attention, "q", "k", "v", **given) == (
        "self.layer(q, k, v, need_weights=False, attn_mask=m)"
    )


def test_what_has_nothing_to_make_is_a_function() -> None:
    texts = [layer_text(m) for m in (nn.ReLU(), nn.GELU(), nn.Linear(2, 2))]
    assert [t and t.function for t in texts] == [
        "jax.nn.relu",
        "lambda x: jax.nn.gelu(x, approximate=False)",
        None,
    ]
