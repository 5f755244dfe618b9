"""A temporal convolutional network: weight-normalised dilated causal convolutions with residual connections."""
from typing import Optional

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
from flax import nnx
from torch.nn.utils.parametrizations import weight_norm


class Chomp1d(nn.Module):
    def __init__(self, chomp_size):
        super().__init__()
        self.chomp_size = chomp_size

    def forward(self, x):
        return x[:, :, : -self.chomp_size].contiguous()


class TemporalBlock(nn.Module):
    def __init__(self, n_inputs, n_outputs, kernel_size, stride, dilation, padding, dropout=0.2):
        super().__init__()
        self.conv1 = weight_norm(nn.Conv1d(n_inputs, n_outputs, kernel_size, stride=stride, padding=padding, dilation=dilation))
        self.chomp1 = Chomp1d(padding)
        self.relu1 = nn.ReLU()
        self.dropout1 = nn.Dropout(dropout)
        self.conv2 = weight_norm(nn.Conv1d(n_outputs, n_outputs, kernel_size, stride=stride, padding=padding, dilation=dilation))
        self.chomp2 = Chomp1d(padding)
        self.relu2 = nn.ReLU()
        self.dropout2 = nn.Dropout(dropout)
        self.downsample = nn.Conv1d(n_inputs, n_outputs, 1) if n_inputs != n_outputs else None
        self.relu = nn.ReLU()

    def forward(self, x):
        out = self.dropout1(self.relu1(self.chomp1(self.conv1(x))))
        out = self.dropout2(self.relu2(self.chomp2(self.conv2(out))))
        res = x if self.downsample is None else self.downsample(x)
        return self.relu(out + res)


class TemporalConvNet(nn.Module):
    def __init__(self, num_inputs, num_channels, kernel_size=3, dropout=0.2):
        super().__init__()
        layers = []
        for i, channels in enumerate(num_channels):
            dilation = 2**i
            previous = num_inputs if i == 0 else num_channels[i - 1]
            layers.append(TemporalBlock(previous, channels, kernel_size, 1, dilation, (kernel_size - 1) * dilation, dropout))
        self.network = nn.Sequential(*layers)

    def forward(self, x):
        return self.network(x)


class TCN(nn.Module):
    def __init__(self, input_size=6, output_size=7, num_channels=(10, 10, 14), kernel_size=3, dropout=0.2):
        super().__init__()
        self.tcn = TemporalConvNet(input_size, list(num_channels), kernel_size, dropout)
        self.linear = nn.Linear(num_channels[-1], output_size)
        self.summary = nn.Linear(num_channels[-1], 3)

    def forward(self, x):
        y = self.tcn(x.transpose(1, 2)).transpose(1, 2)
        return torch.sigmoid(self.linear(y)), self.summary(y[:, -1])


class WNConv1D(nnx.Module):
    """Causal convolution whose kernel is g * v / |v|, one g per output channel."""

    def __init__(self, din, dout, kernel_size, dilation, *, rngs):
        self.v = nnx.Param(nnx.initializers.normal(0.1)(rngs.params(), (kernel_size, din, dout)))
        self.g = nnx.Param(jnp.ones((dout,)))
        self.bias = nnx.Param(jnp.zeros((dout,)))
        self.dilation, self.left = dilation, (kernel_size - 1) * dilation

    def __call__(self, x):
        v = self.v[...]
        norm = jnp.sqrt(jnp.sum(jnp.square(v), axis=(0, 1)))
        kernel = v * (self.g[...] / norm)
        y = jax.lax.conv_general_dilated(x, kernel, (1,), ((self.left, 0),), rhs_dilation=(self.dilation,),
                                         dimension_numbers=("NWC", "WIO", "NWC"))
        return y + self.bias[...]


class ResidualBlock(nnx.Module):
    def __init__(self, din, dout, kernel_size, dilation, rate, *, rngs):
        self.conv_a = WNConv1D(din, dout, kernel_size, dilation, rngs=rngs)
        self.conv_b = WNConv1D(dout, dout, kernel_size, dilation, rngs=rngs)
        self.proj: Optional[nnx.Linear] = nnx.Linear(din, dout, rngs=rngs) if din != dout else None
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        y = self.dropout(nnx.relu(self.conv_a(x)))
        y = self.dropout(nnx.relu(self.conv_b(y)))
        skip = self.proj(x) if self.proj is not None else x
        return nnx.relu(y + skip)


class FlaxTCN(nnx.Module):
    def __init__(self, din=6, dout=7, channels=(10, 10, 14), kernel_size=3, rate=0.2, *, rngs):
        sizes = (din, *channels)
        self.blocks = nnx.List([
            ResidualBlock(sizes[i], sizes[i + 1], kernel_size, 2**i, rate, rngs=rngs) for i in range(len(channels))
        ])
        self.head = nnx.Linear(channels[-1], dout, rngs=rngs)
        self.summary = nnx.Linear(channels[-1], 3, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return jax.nn.sigmoid(self.head(x)), self.summary(x[:, -1])


def port(net, model):
    to = lambda t: jnp.asarray(t.detach().numpy())

    def conv(dst, src):
        weight = src.parametrizations.weight
        dst.v[...] = to(weight.original1).transpose(2, 1, 0)
        dst.g[...] = to(weight.original0).reshape(-1)
        dst.bias[...] = to(src.bias)

    for dst, src in zip(model.blocks, net.tcn.network):
        conv(dst.conv_a, src.conv1)
        conv(dst.conv_b, src.conv2)
        if dst.proj is not None:
            dst.proj.kernel[...] = to(src.downsample.weight)[..., 0].T
            dst.proj.bias[...] = to(src.downsample.bias)
    for dst, src in ((model.head, net.linear), (model.summary, net.summary)):
        dst.kernel[...] = to(src.weight).T
        dst.bias[...] = to(src.bias)


def build(seed):
    """The right pair with random weights and inputs that follow from the seed."""
    torch.manual_seed(seed)
    net = TCN().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.randn_like(p) * 0.5)
            if name.endswith("original0"):
                p.copy_(p.abs() + 0.7)
    model = FlaxTCN(rngs=nnx.Rngs(0))
    port(net, model)
    model.eval()
    x = np.random.default_rng(seed).normal(size=(2, 13, 6)).astype(np.float32)
    return {"torch": net, "flax": model, "inputs": x}


FAULTS = [
    {
        "title": "the padding is split evenly over both sides",
        "edits": [("(1,), ((self.left, 0),), rhs_dilation", "(1,), ((self.left // 2, self.left // 2),), rhs_dilation")],
        "layers": ["tcn.network.0.conv1", "tcn.network.0.chomp1"],
        "causes": ["padding", "causal"],
        "level": "outputs",
    },
    {
        "title": "dilation grows by one a block, not by a factor of two",
        "edits": [("kernel_size, 2**i, rate, rngs=rngs)", "kernel_size, i + 1, rate, rngs=rngs)")],
        "layers": ["tcn.network.2.conv1"],
        "causes": ["dilation"],
        "level": "outputs",
    },
    {
        "title": "no ReLU after the residual sum",
        "edits": [("        return nnx.relu(y + skip)\n", "        return y + skip\n")],
        "layers": ["tcn.network.0.relu", "tcn.network.0"],
        "between": ("tcn.network.0.downsample", "tcn.network.1.conv1"),
        "causes": ["missing_layer", "activation"],
        "level": "outputs",
    },
    {
        "title": "skip connection only where there is a projection",
        "edits": [("skip = self.proj(x) if self.proj is not None else x\n", "skip = self.proj(x) if self.proj is not None else 0.0\n")],
        "layers": ["tcn.network.1"],
        "between": ("tcn.network.1.conv2", "tcn.network.2.conv1"),
        "causes": ["residual"],
        "level": "outputs",
    },
    {
        "title": "weight norm divides by the root of the mean square",
        "edits": [("norm = jnp.sqrt(jnp.sum(jnp.square(v), axis=(0, 1)))", "norm = jnp.sqrt(jnp.mean(jnp.square(v), axis=(0, 1)))")],
        "layers": ["tcn.network.0.conv1", "tcn.network.0.conv1.parametrizations.weight.0"],
        "causes": ["operation", "scale"],
        "level": "outputs",
    },
    {
        "title": "magnitudes g not loaded",
        "edits": [("        dst.g[...] = to(weight.original0).reshape(-1)\n", "")],
        "layers": ["tcn.network.0.conv1"],
        "causes": ["default"],
        "level": "outputs",
    },
    {
        "title": "taps turned round on loading, as for a true convolution",
        "edits": [("to(weight.original1).transpose(2, 1, 0)\n", "to(weight.original1).transpose(2, 1, 0)[::-1]\n")],
        "layers": ["tcn.network.0.conv1"],
        "causes": ["flipped"],
        "level": "outputs",
    },
    {
        "title": "the norm of v held constant in the backward pass",
        "edits": [("kernel = v * (self.g[...] / norm)", "kernel = v * (self.g[...] / jax.lax.stop_gradient(norm))")],
        "layers": ["tcn.network.0.conv1", "tcn.network.0.conv2", "tcn.network.0.conv1.parametrizations.weight.0"],
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
]
