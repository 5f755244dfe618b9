"""Diffusion U-Net: sinusoidal time embedding, GroupNorm + SiLU residual blocks, attention at the low resolution."""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import jax
import jax.numpy as jnp
from flax import linen


def timestep_embedding(t, dim, max_period=10000):
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float64, device=t.device) / half)
    args = t[:, None].to(torch.float64) * freqs[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


class ResBlock(nn.Module):
    def __init__(self, cin, cout, temb):
        super().__init__()
        self.norm1 = nn.GroupNorm(4, cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb, 2 * cout)
        self.norm2 = nn.GroupNorm(4, cout)
        self.dropout = nn.Dropout(0.1)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time_emb_proj(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(self.dropout(F.silu(h)))
        return self.shortcut(x) + h


class AttnBlock(nn.Module):
    def __init__(self, ch, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(4, ch)
        self.qkv = nn.Conv1d(ch, 3 * ch, 1)
        self.proj_out = nn.Conv1d(ch, ch, 1)

    def forward(self, x):
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        qkv = self.qkv(self.norm(x))
        bs, width, length = qkv.shape
        ch = width // (3 * self.heads)
        q, k, v = qkv.reshape(bs * self.heads, ch * 3, length).split(ch, dim=1)
        scale = 1 / math.sqrt(math.sqrt(ch))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight, dim=-1)
        a = torch.einsum("bts,bcs->bct", weight, v).reshape(bs, -1, length)
        return (x + self.proj_out(a)).reshape(b, c, *spatial)


class Downsample(nn.Module):
    def __init__(self, ch):
        super().__init__()
        self.conv = nn.Conv2d(ch, ch, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, ch):
        super().__init__()
        self.conv = nn.Conv2d(ch, ch, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class UNet(nn.Module):
    def __init__(self, base=8, mult=2, heads=2):
        super().__init__()
        self.base = base
        top, temb = base * mult, base * 3
        self.time_mlp = nn.Sequential(nn.Linear(base, temb), nn.SiLU(), nn.Linear(temb, temb))
        self.conv_in = nn.Conv2d(3, base, 3, padding=1)
        self.down0 = ResBlock(base, base, temb)
        self.down = Downsample(base)
        self.down1 = ResBlock(base, top, temb)
        self.mid_attn = AttnBlock(top, heads)
        self.mid = ResBlock(top, top, temb)
        self.up1 = ResBlock(top + top, top, temb)
        self.up = Upsample(top)
        self.up0 = ResBlock(top + base, base, temb)
        self.norm_out = nn.GroupNorm(4, base)
        self.conv_out = nn.Conv2d(base, 3, 3, padding=1)

    def forward(self, x, t):
        emb = self.time_mlp(timestep_embedding(t, self.base).to(x.dtype))
        h0 = self.down0(self.conv_in(x), emb)
        h1 = self.down1(self.down(h0), emb)
        h = self.mid(self.mid_attn(h1), emb)
        h = self.up1(torch.cat([h, h1], dim=1), emb)
        h = self.up(h)
        h = self.up0(torch.cat([h, h0], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(h)))


# ------------------------------------------------------------------ Linen, names as they come


def get_timestep_embedding(timesteps, embedding_dim: int, max_period: float = 10000.0):
    half = embedding_dim // 2
    freqs = jnp.exp(-math.log(max_period) * jnp.arange(half) / half)
    args = timesteps[:, None] * freqs[None, :]
    return jnp.concatenate([jnp.cos(args), jnp.sin(args)], axis=-1)


class FlaxResBlock(linen.Module):
    features: int
    groups: int = 4
    dropout: float = 0.1

    @linen.compact
    def __call__(self, x, temb, deterministic=True):
        h = linen.GroupNorm(num_groups=self.groups, epsilon=1e-5)(x)
        h = linen.Conv(self.features, (3, 3), padding=((1, 1), (1, 1)))(linen.silu(h))
        mod = linen.Dense(2 * self.features)(linen.silu(temb))[:, None, None, :]
        scale, shift = jnp.split(mod, 2, axis=-1)
        h = linen.GroupNorm(num_groups=self.groups, epsilon=1e-5)(h)
        h = linen.silu(h * (1.0 + scale) + shift)
        h = linen.Dropout(self.dropout)(h, deterministic=deterministic)
        h = linen.Conv(self.features, (3, 3), padding=((1, 1), (1, 1)))(h)
        if x.shape[-1] != self.features:
            x = linen.Conv(self.features, (1, 1))(x)
        return x + h


class FlaxAttnBlock(linen.Module):
    num_heads: int

    @linen.compact
    def __call__(self, x):
        b, height, width, c = x.shape
        tokens = x.reshape(b, height * width, c)
        h = linen.GroupNorm(num_groups=4, epsilon=1e-5)(tokens)
        h = linen.Dense(3 * c)(h)
        head_dim = c // self.num_heads
        h = h.reshape(b, height * width, self.num_heads, 3, head_dim)
        q, k, v = h[..., 0, :], h[..., 1, :], h[..., 2, :]
        scale = head_dim ** -0.25
        logits = jnp.einsum("bqhd,bkhd->bhqk", q * scale, k * scale)
        attn = linen.softmax(logits, axis=-1)
        h = jnp.einsum("bhqk,bkhd->bqhd", attn, v).reshape(b, height * width, c)
        return (tokens + linen.Dense(c)(h)).reshape(b, height, width, c)


class FlaxDownsample(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        return linen.Conv(x.shape[-1], (3, 3), strides=(2, 2), padding="VALID")(x)


class FlaxUpsample(linen.Module):
    @linen.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        x = jax.image.resize(x, (b, h * 2, w * 2, c), method="nearest")
        return linen.Conv(c, (3, 3), padding="SAME")(x)


class FlaxUNet(linen.Module):
    base: int = 8
    mult: int = 2
    heads: int = 2

    @linen.compact
    def __call__(self, x, t, train: bool = False):
        top = self.base * self.mult
        temb = get_timestep_embedding(t, self.base)
        temb = linen.Dense(self.base * 3)(temb)
        temb = linen.Dense(self.base * 3)(linen.silu(temb))

        h = linen.Conv(self.base, (3, 3), padding="SAME")(x)
        skip0 = h = FlaxResBlock(self.base)(h, temb, not train)
        h = FlaxDownsample()(h)
        skip1 = h = FlaxResBlock(top)(h, temb, not train)
        h = FlaxAttnBlock(self.heads)(h)
        h = FlaxResBlock(top)(h, temb, not train)
        h = FlaxResBlock(top)(jnp.concatenate([h, skip1], axis=-1), temb, not train)
        h = FlaxUpsample()(h)
        h = FlaxResBlock(self.base)(jnp.concatenate([h, skip0], axis=-1), temb, not train)
        h = linen.GroupNorm(num_groups=4, epsilon=1e-5)(h)
        return linen.Conv(3, (3, 3), padding="SAME")(linen.silu(h))


def as_jnp(p):
    return jnp.asarray(p.detach().numpy())


def conv(m):
    w = as_jnp(m.weight)
    if w.ndim == 3:                       # Conv1d with kernel 1
        return {"kernel": w[:, :, 0].T, "bias": as_jnp(m.bias)}
    return {"kernel": w.transpose(2, 3, 1, 0), "bias": as_jnp(m.bias)}


def linear(m):
    return {"kernel": as_jnp(m.weight).T, "bias": as_jnp(m.bias)}


def gn(m):
    return {"scale": as_jnp(m.weight), "bias": as_jnp(m.bias)}


def resblock(m):
    out = {
        "GroupNorm_0": gn(m.norm1),
        "Conv_0": conv(m.conv1),
        "Dense_0": linear(m.time_emb_proj),
        "GroupNorm_1": gn(m.norm2),
        "Conv_1": conv(m.conv2),
    }
    if isinstance(m.shortcut, nn.Conv2d):
        out["Conv_2"] = conv(m.shortcut)
    return out


def port(net):
    return {"params": {
        "Dense_0": linear(net.time_mlp[0]),
        "Dense_1": linear(net.time_mlp[2]),
        "Conv_0": conv(net.conv_in),
        "FlaxResBlock_0": resblock(net.down0),
        "FlaxDownsample_0": {"Conv_0": conv(net.down.conv)},
        "FlaxResBlock_1": resblock(net.down1),
        "FlaxAttnBlock_0": {"GroupNorm_0": gn(net.mid_attn.norm), "Dense_0": conv(net.mid_attn.qkv),
                            "Dense_1": conv(net.mid_attn.proj_out)},
        "FlaxResBlock_2": resblock(net.mid),
        "FlaxResBlock_3": resblock(net.up1),
        "FlaxUpsample_0": {"Conv_0": conv(net.up.conv)},
        "FlaxResBlock_4": resblock(net.up0),
        "GroupNorm_0": gn(net.norm_out),
        "Conv_1": conv(net.conv_out),
    }}


def build(seed):
    torch.manual_seed(seed)
    net = UNet().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 1:
                p.add_(0.25 * torch.randn_like(p))
    rng = np.random.default_rng(seed)
    x, t = rng.normal(size=(2, 3, 8, 12)), rng.integers(0, 1000, size=2)
    return {"torch": net, "flax": (FlaxUNet(), port(net)), "inputs": {"x": x, "t": t},
            "flax_inputs": {"x": x.transpose(0, 2, 3, 1), "t": t}}


FAULTS = [
    {
        "title": "frequencies divided by half - 1",
        "edits": [("jnp.arange(half) / half)", "jnp.arange(half) / (half - 1))")],
        "layers": [""],
        "between": (None, "time_mlp.0"),
        "causes": ["constant", "offset"],
        "level": "outputs",
    },
    {
        "title": "sine before cosine in the time embedding",
        "edits": [("jnp.concatenate([jnp.cos(args), jnp.sin(args)], axis=-1)",
                   "jnp.concatenate([jnp.sin(args), jnp.cos(args)], axis=-1)")],
        "layers": [""],
        "between": (None, "time_mlp.0"),
        "causes": ["concat"],
        "level": "outputs",
    },
    {
        "title": "down-sampling padded evenly",
        "edits": [("((0, 0), (0, 1), (0, 1), (0, 0))", "((0, 0), (1, 0), (1, 0), (0, 0))")],
        "layers": ["down", "down.conv"],
        "between": ("down0.conv2", "down.conv"),
        "causes": ["padding"],
        "level": "outputs",
    },
    {
        "title": "shift and scale of the time modulation exchanged",
        "edits": [("scale, shift = jnp.split(mod, 2, axis=-1)", "shift, scale = jnp.split(mod, 2, axis=-1)")],
        "layers": ["down0"],
        "between": ("down0.time_emb_proj", "down0.conv2"),
        "causes": ["swapped", "concat"],
        "level": "outputs",
    },
    {
        "title": "qkv split before the heads",
        "edits": [("h = h.reshape(b, height * width, self.num_heads, 3, head_dim)\n        q, k, v = h[..., 0, :], h[..., 1, :], h[..., 2, :]",
                   "h = h.reshape(b, height * width, 3, self.num_heads, head_dim)\n        q, k, v = h[:, :, 0], h[:, :, 1], h[:, :, 2]")],
        "layers": ["mid_attn"],
        "between": ("mid_attn.qkv", "mid_attn.proj_out"),
        "causes": ["blocks", "rearranged"],
        "level": "outputs",
    },
    {
        "title": "time embedding goes into the blocks without its SiLU",
        "edits": [("linen.Dense(2 * self.features)(linen.silu(temb))", "linen.Dense(2 * self.features)(temb)")],
        "layers": ["down0"],
        "between": ("down0.conv1", "down0.time_emb_proj"),
        "causes": ["missing_layer", "left_out", "activation"],
        "level": "outputs",
    },
    {
        "title": "outermost decoder block gets the skip of the level below's input",
        "edits": [("skip0 = h = FlaxResBlock(self.base)(h, temb, not train)\n",
                   "skip0 = h\n        h = FlaxResBlock(self.base)(h, temb, not train)\n")],
        "layers": [""],
        "between": ("up.conv", "up0.norm1"),
        "causes": ["operand", "wiring"],
        "level": "outputs",
    },
    {
        "title": "dropout in the residual blocks left at rate zero",
        "edits": [("    dropout: float = 0.1", "    dropout: float = 0.0")],
        "layers": ["down0.dropout"],
        "between": ("down0.norm2", "down0.conv2"),
        "causes": ["training_attribute", "dropout"],
        "level": "attributes",
    },
]
