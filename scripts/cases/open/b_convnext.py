"""ConvNeXt: 7x7 depthwise convolutions, layer scale and global response normalisation, input normalised inside."""
from typing import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from flax import nnx


class LayerNorm2d(nn.Module):
    """channels_first as in the original code."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x):
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class GRN(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        gx = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        nx = gx / (gx.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * nx) + self.beta + x


class Block(nn.Module):
    def __init__(self, dim, layer_scale=1e-6):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.grn = GRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(layer_scale * torch.ones(dim))

    def forward(self, x):
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = self.pwconv2(self.grn(self.act(self.pwconv1(self.norm(y)))))
        return x + (self.gamma * y).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, dims=(8, 12), depths=(1, 2), num_classes=5):
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.downsample_layers = nn.ModuleList([
            nn.Sequential(nn.Conv2d(3, dims[0], 2, stride=2), LayerNorm2d(dims[0])),
            nn.Sequential(LayerNorm2d(dims[0]), nn.Conv2d(dims[0], dims[1], 2, stride=2)),
        ])
        self.stages = nn.ModuleList([nn.Sequential(*[Block(d) for _ in range(k)]) for d, k in zip(dims, depths)])
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes)

    def forward(self, x):
        x = (x - self.pixel_mean) / self.pixel_std
        for down, stage in zip(self.downsample_layers, self.stages):
            x = stage(down(x))
        return self.head(self.norm(x.mean([-2, -1])))


# ---------------------------------------------------------------- nnx

PIXEL_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
PIXEL_STD = np.array([0.229, 0.224, 0.225], np.float32)


class ChannelNorm(nnx.Module):
    def __init__(self, features: int, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.eps = eps

    def __call__(self, x):
        mean = jnp.mean(x, axis=-1, keepdims=True)
        var = jnp.var(x, axis=-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(var + self.eps) * self.scale[...] + self.bias[...]


def global_response_norm(x, gamma, beta, eps=1e-6):
    energy = jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2), keepdims=True))
    ratio = energy / (jnp.mean(energy, axis=-1, keepdims=True) + eps)
    return gamma * (x * ratio) + beta + x


class ConvNeXtBlock(nnx.Module):
    def __init__(self, dim: int, rngs: nnx.Rngs, layer_scale: float = 1e-6):
        self.depthwise = nnx.Conv(dim, dim, (7, 7), padding="SAME", feature_group_count=dim, rngs=rngs)
        self.norm = ChannelNorm(dim)
        self.expand = nnx.Linear(dim, 4 * dim, rngs=rngs)
        self.grn_gamma = nnx.Param(jnp.zeros(4 * dim))
        self.grn_beta = nnx.Param(jnp.zeros(4 * dim))
        self.reduce = nnx.Linear(4 * dim, dim, rngs=rngs)
        self.layer_scale = nnx.Param(jnp.full(dim, layer_scale))

    def __call__(self, x):
        shortcut = x
        x = self.norm(self.depthwise(x))
        x = nnx.gelu(self.expand(x), approximate=False)
        x = global_response_norm(x, self.grn_gamma[...], self.grn_beta[...])
        x = self.reduce(x)
        return shortcut + self.layer_scale[...] * x


class FlaxConvNeXt(nnx.Module):
    def __init__(self, dims: Sequence[int] = (8, 12), depths: Sequence[int] = (1, 2), num_classes: int = 5, *, rngs):
        self.stem = nnx.Conv(3, dims[0], (2, 2), strides=(2, 2), padding="VALID", rngs=rngs)
        self.stem_norm = ChannelNorm(dims[0])
        self.down_norm = ChannelNorm(dims[0])
        self.down = nnx.Conv(dims[0], dims[1], (2, 2), strides=(2, 2), padding="VALID", rngs=rngs)
        self.stage0 = nnx.List([ConvNeXtBlock(dims[0], rngs) for _ in range(depths[0])])
        self.stage1 = nnx.List([ConvNeXtBlock(dims[1], rngs) for _ in range(depths[1])])
        self.norm = ChannelNorm(dims[1])
        self.head = nnx.Linear(dims[1], num_classes, rngs=rngs)

    def __call__(self, images):
        x = (images - PIXEL_MEAN) / PIXEL_STD
        x = self.stem_norm(self.stem(x))
        for block in self.stage0:
            x = block(x)
        x = self.down(self.down_norm(x))
        for block in self.stage1:
            x = block(x)
        x = self.norm(jnp.mean(x, axis=(1, 2)))
        return self.head(x)


def port(net: ConvNeXt, model: FlaxConvNeXt):
    sd = {k: jnp.asarray(v.numpy()) for k, v in net.state_dict().items()}

    def put(conv, prefix):
        w = sd[prefix + ".weight"]
        conv.kernel[...] = w.transpose(2, 3, 1, 0) if w.ndim == 4 else w.T
        conv.bias[...] = sd[prefix + ".bias"]

    def put_norm(norm, prefix):
        norm.scale[...] = sd[prefix + ".weight"]
        norm.bias[...] = sd[prefix + ".bias"]

    put(model.stem, "downsample_layers.0.0")
    put_norm(model.stem_norm, "downsample_layers.0.1")
    put_norm(model.down_norm, "downsample_layers.1.0")
    put(model.down, "downsample_layers.1.1")
    for s, stage in enumerate((model.stage0, model.stage1)):
        for i, block in enumerate(stage):
            p = f"stages.{s}.{i}."
            put(block.depthwise, p + "dwconv")
            put_norm(block.norm, p + "norm")
            put(block.expand, p + "pwconv1")
            block.grn_gamma[...] = sd[p + "grn.gamma"]
            block.grn_beta[...] = sd[p + "grn.beta"]
            put(block.reduce, p + "pwconv2")
            block.layer_scale[...] = sd[p + "gamma"]
    put_norm(model.norm, "norm")
    put(model.head, "head")
    return model


def build(seed):
    torch.manual_seed(seed)
    net = ConvNeXt().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "gamma" in name or "beta" in name:
                p.copy_(torch.randn_like(p) * 0.5 + 0.4)
            elif p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    model = port(net, FlaxConvNeXt(rngs=nnx.Rngs(0)))
    images = np.random.default_rng(seed).uniform(size=(2, 3, 24, 32))
    return {"torch": net, "flax": model, "inputs": images, "flax_inputs": np.moveaxis(images, 1, -1)}


FAULTS = [
    {
        "title": "mean and std given for BGR",
        "edits": [("x = (images - PIXEL_MEAN) / PIXEL_STD",
                   "x = (images - PIXEL_MEAN[::-1]) / PIXEL_STD[::-1]")],
        "layers": [""],
        "between": (None, "downsample_layers.0.0"),
        "causes": ["constant", "reversed", "flipped"],
        "level": "outputs",
    },
    {
        "title": "channel norm with the unbiased variance",
        "edits": [("var = jnp.var(x, axis=-1, keepdims=True)", "var = jnp.var(x, axis=-1, keepdims=True, ddof=1)")],
        "layers": ["downsample_layers.0.1"],
        "causes": ["unbiased_variance"],
        "level": "outputs",
    },
    {
        "title": "energy of GRN taken over the channels",
        "edits": [("jnp.square(x), axis=(1, 2), keepdims=True", "jnp.square(x), axis=-1, keepdims=True")],
        "layers": ["stages.0.0.grn"],
        "between": ("stages.0.0.pwconv1", "stages.0.0.pwconv2"),
        "causes": ["axis"],
        "level": "outputs",
    },
    {
        "title": "GRN without its own shortcut",
        "edits": [("return gamma * (x * ratio) + beta + x", "return gamma * (x * ratio) + beta")],
        "layers": ["stages.0.0.grn"],
        "between": ("stages.0.0.pwconv1", "stages.0.0.pwconv2"),
        "causes": ["residual", "left_out"],
        "level": "outputs",
    },
    {
        "title": "activation after the response norm",
        "edits": [("x = nnx.gelu(self.expand(x), approximate=False)", "x = self.expand(x)"),
                  ("x = self.reduce(x)\n", "x = self.reduce(nnx.gelu(x, approximate=False))\n")],
        "layers": ["stages.0.0", "stages.0.0.act"],
        "between": ("stages.0.0.pwconv1", "stages.0.0.pwconv2"),
        "causes": ["order"],
        "level": "outputs",
    },
    {
        "title": "shortcut taken behind the depthwise convolution",
        "edits": [("shortcut = x\n        x = self.norm(self.depthwise(x))",
                   "x = shortcut = self.depthwise(x)\n        x = self.norm(x)")],
        "layers": ["stages.0.0"],
        "between": ("stages.0.0.pwconv2", "downsample_layers.1.0"),
        "causes": ["residual", "operand"],
        "level": "outputs",
    },
    {
        "title": "spatial axes of every kernel exchanged",
        "edits": [("w.transpose(2, 3, 1, 0) if", "w.T if")],
        "layers": ["downsample_layers.0.0"],
        "causes": ["transposed"],
        "level": "outputs",
    },
    {
        "title": "norm before the pooling",
        "edits": [("x = self.norm(jnp.mean(x, axis=(1, 2)))", "x = jnp.mean(self.norm(x), axis=(1, 2))")],
        "layers": ["", "norm"],
        "between": ("stages.1.1.pwconv2", "norm"),
        "causes": ["order", "norm_order"],
        "level": "outputs",
    },
]
