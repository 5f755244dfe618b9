"""DDPM U-Net: sinusoidal time embedding, GroupNorm ResNet blocks, attention, down and up sampling (nnx)."""
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
from flax import nnx


@dataclass(frozen=True)
class UNetConfig:
    in_channels: int = 3
    ch: int = 8
    ch_mult: tuple = (1, 2)
    groups: int = 4
    dropout: float = 0.1


# ---------------------------------------------------------------- torch
def get_timestep_embedding(timesteps, dim, dtype):
    half = dim // 2
    emb = math.log(10000) / (half - 1)
    emb = torch.exp(torch.arange(half, dtype=dtype, device=timesteps.device) * -emb)
    emb = timesteps.to(dtype)[:, None] * emb[None, :]
    return torch.cat([torch.sin(emb), torch.cos(emb)], dim=1)


def nonlinearity(x):
    return x * torch.sigmoid(x)


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=0)

    def forward(self, x):
        return self.conv(nn.functional.pad(x, (0, 1, 0, 1), mode="constant", value=0))


class ResnetBlock(nn.Module):
    def __init__(self, cin, cout, temb, cfg):
        super().__init__()
        self.norm1 = nn.GroupNorm(cfg.groups, cin, eps=1e-6)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.temb_proj = nn.Linear(temb, cout)
        self.norm2 = nn.GroupNorm(cfg.groups, cout, eps=1e-6)
        self.dropout = nn.Dropout(cfg.dropout)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x, temb):
        h = self.conv1(nonlinearity(self.norm1(x)))
        h = h + self.temb_proj(nonlinearity(temb))[:, :, None, None]
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    def __init__(self, c, cfg):
        super().__init__()
        self.norm = nn.GroupNorm(cfg.groups, c, eps=1e-6)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):
        h_ = self.norm(x)
        q, k, v = self.q(h_), self.k(h_), self.v(h_)
        b, c, h, w = q.shape
        w_ = torch.bmm(q.reshape(b, c, h * w).permute(0, 2, 1), k.reshape(b, c, h * w)) * (int(c) ** (-0.5))
        w_ = torch.softmax(w_, dim=2).permute(0, 2, 1)
        h_ = torch.bmm(v.reshape(b, c, h * w), w_).reshape(b, c, h, w)
        return x + self.proj_out(h_)


class Model(nn.Module):
    def __init__(self, cfg=UNetConfig()):
        super().__init__()
        self.cfg = cfg
        ch, temb = cfg.ch, cfg.ch * 4
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, temb), nn.Linear(temb, temb)])
        self.conv_in = nn.Conv2d(cfg.in_channels, ch, 3, padding=1)
        skips, c = [ch], ch
        self.down = nn.ModuleList()
        for i, mult in enumerate(cfg.ch_mult):
            level = nn.Module()
            level.block = ResnetBlock(c, ch * mult, temb, cfg)
            c = ch * mult
            skips.append(c)
            last = i == len(cfg.ch_mult) - 1
            level.attn = AttnBlock(c, cfg) if last else None
            level.downsample = None if last else Downsample(c)
            if not last:
                skips.append(c)
            self.down.append(level)
        self.mid = nn.Module()
        self.mid.block_1 = ResnetBlock(c, c, temb, cfg)
        self.mid.attn_1 = AttnBlock(c, cfg)
        self.mid.block_2 = ResnetBlock(c, c, temb, cfg)
        self.up = nn.ModuleList()
        for i, mult in reversed(list(enumerate(cfg.ch_mult))):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(2):
                level.block.append(ResnetBlock(c + skips.pop(), ch * mult, temb, cfg))
                c = ch * mult
            level.upsample = Upsample(c) if i > 0 else None
            self.up.append(level)
        self.norm_out = nn.GroupNorm(cfg.groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, cfg.in_channels, 3, padding=1)

    def forward(self, x, t):
        temb = get_timestep_embedding(t, self.cfg.ch, x.dtype)
        temb = self.temb.dense[1](nonlinearity(self.temb.dense[0](temb)))
        hs = [self.conv_in(x)]
        for level in self.down:
            h = level.block(hs[-1], temb)
            if level.attn is not None:
                h = level.attn(h)
            hs.append(h)
            if level.downsample is not None:
                hs.append(level.downsample(h))
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(hs[-1], temb)), temb)
        for level in self.up:
            for block in level.block:
                h = block(torch.cat([h, hs.pop()], dim=1), temb)
            if level.upsample is not None:
                h = level.upsample(h)
        return self.conv_out(nonlinearity(self.norm_out(h)))


# ---------------------------------------------------------------- flax
def sinusoidal_embedding(t, dim, dtype):
    half = dim // 2
    freqs = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=dtype) / (half - 1))
    args = t.astype(dtype)[:, None] * freqs
    return jnp.concatenate([jnp.sin(args), jnp.cos(args)], axis=-1)


def conv3x3(cin, cout, rngs, **kw):
    return nnx.Conv(cin, cout, (3, 3), rngs=rngs, **{"padding": 1, **kw})


def upsample_2x(x):
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


class FlaxResnetBlock(nnx.Module):
    def __init__(self, cin, cout, temb, cfg, *, rngs):
        self.norm1 = nnx.GroupNorm(cin, num_groups=cfg.groups, epsilon=1e-6, rngs=rngs)
        self.conv1 = conv3x3(cin, cout, rngs)
        self.time_emb_proj = nnx.Linear(temb, cout, rngs=rngs)
        self.norm2 = nnx.GroupNorm(cout, num_groups=cfg.groups, epsilon=1e-6, rngs=rngs)
        self.dropout = nnx.Dropout(cfg.dropout, rngs=rngs)
        self.conv2 = conv3x3(cout, cout, rngs)
        self.conv_shortcut = nnx.Conv(cin, cout, (1, 1), rngs=rngs) if cin != cout else None

    def __call__(self, x, temb):
        h = self.conv1(nnx.silu(self.norm1(x)))
        t = self.time_emb_proj(nnx.silu(temb))[:, None, None, :]
        h = self.norm2(h + t)
        h = self.conv2(self.dropout(nnx.silu(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return x + h


class FlaxAttnBlock(nnx.Module):
    def __init__(self, c, cfg, *, rngs):
        self.group_norm = nnx.GroupNorm(c, num_groups=cfg.groups, epsilon=1e-6, rngs=rngs)
        self.query = nnx.Linear(c, c, rngs=rngs)
        self.key = nnx.Linear(c, c, rngs=rngs)
        self.value = nnx.Linear(c, c, rngs=rngs)
        self.proj_attn = nnx.Linear(c, c, rngs=rngs)

    def __call__(self, x):
        b, h, w, c = x.shape
        y = self.group_norm(x).reshape(b, h * w, c)
        q, k, v = self.query(y), self.key(y), self.value(y)
        weights = jax.nn.softmax(jnp.einsum("bic,bjc->bij", q, k) / math.sqrt(c), axis=-1)
        y = jnp.einsum("bij,bjc->bic", weights, v)
        return x + self.proj_attn(y).reshape(b, h, w, c)


class FlaxUNet(nnx.Module):
    def __init__(self, cfg=UNetConfig(), *, rngs):
        self.cfg = cfg
        ch, temb = cfg.ch, 4 * cfg.ch
        widths = [ch * m for m in cfg.ch_mult]
        self.time_0 = nnx.Linear(ch, temb, rngs=rngs)
        self.time_1 = nnx.Linear(temb, temb, rngs=rngs)
        self.conv_in = conv3x3(cfg.in_channels, ch, rngs)
        skips, c, blocks, downs = [ch], ch, [], []
        for i, width in enumerate(widths):
            blocks.append(FlaxResnetBlock(c, width, temb, cfg, rngs=rngs))
            c = width
            skips.append(c)
            if i + 1 < len(widths):
                downs.append(conv3x3(c, c, rngs, strides=2, padding=((0, 1), (0, 1))))
                skips.append(c)
        self.down_blocks, self.downsamplers = nnx.List(blocks), nnx.List(downs)
        self.down_attn = FlaxAttnBlock(c, cfg, rngs=rngs)
        self.mid_1 = FlaxResnetBlock(c, c, temb, cfg, rngs=rngs)
        self.mid_attn = FlaxAttnBlock(c, cfg, rngs=rngs)
        self.mid_2 = FlaxResnetBlock(c, c, temb, cfg, rngs=rngs)
        blocks, ups = [], []
        for i, width in enumerate(widths[::-1]):
            for _ in range(2):
                blocks.append(FlaxResnetBlock(c + skips.pop(), width, temb, cfg, rngs=rngs))
                c = width
            if i + 1 < len(widths):
                ups.append(conv3x3(c, c, rngs))
        self.up_blocks, self.upsamplers = nnx.List(blocks), nnx.List(ups)
        self.norm_out = nnx.GroupNorm(c, num_groups=cfg.groups, epsilon=1e-6, rngs=rngs)
        self.conv_out = conv3x3(c, cfg.in_channels, rngs)

    def __call__(self, x, t):
        temb = sinusoidal_embedding(t, self.cfg.ch, x.dtype)
        temb = self.time_1(nnx.silu(self.time_0(temb)))
        hs = [self.conv_in(x)]
        for i, block in enumerate(self.down_blocks):
            h = block(hs[-1], temb)
            if i < len(self.downsamplers):
                hs += [h, self.downsamplers[i](h)]
            else:
                hs.append(self.down_attn(h))
        h = self.mid_1(hs[-1], temb)
        h = self.mid_2(self.mid_attn(h), temb)
        for i, block in enumerate(self.up_blocks):
            h = block(jnp.concatenate([h, hs.pop()], axis=-1), temb)
            if i % 2 == 1 and i // 2 < len(self.upsamplers):
                h = self.upsamplers[i // 2](upsample_2x(h))
        return self.conv_out(nnx.silu(self.norm_out(h)))


def copy(dst, src):
    w = src.weight.detach().numpy()
    if isinstance(dst, nnx.GroupNorm):
        dst.scale[...] = w
    elif isinstance(dst, nnx.Conv):
        dst.kernel[...] = w.transpose(2, 3, 1, 0)
    else:
        dst.kernel[...] = w.reshape(w.shape[:2]).T
    dst.bias[...] = src.bias.detach().numpy()


def copy_block(dst, src):
    for a, b in (("norm1", "norm1"), ("conv1", "conv1"), ("time_emb_proj", "temb_proj"), ("norm2", "norm2"), ("conv2", "conv2")):
        copy(getattr(dst, a), getattr(src, b))
    if dst.conv_shortcut is not None:
        copy(dst.conv_shortcut, src.nin_shortcut)


def copy_attn(dst, src):
    names = {"group_norm": "norm", "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
    for a, b in names.items():
        copy(getattr(dst, a), getattr(src, b))


def port(net, model):
    for dst, src in ((model.time_0, net.temb.dense[0]), (model.time_1, net.temb.dense[1]), (model.conv_in, net.conv_in),
                     (model.norm_out, net.norm_out), (model.conv_out, net.conv_out)):
        copy(dst, src)
    for i, level in enumerate(net.down):
        copy_block(model.down_blocks[i], level.block)
        if level.downsample is not None:
            copy(model.downsamplers[i], level.downsample.conv)
        else:
            copy_attn(model.down_attn, level.attn)
    copy_block(model.mid_1, net.mid.block_1)
    copy_attn(model.mid_attn, net.mid.attn_1)
    copy_block(model.mid_2, net.mid.block_2)
    for i, level in enumerate(net.up):
        for j in range(2):
            copy_block(model.up_blocks[2 * i + j], level.block[j])
        if level.upsample is not None:
            copy(model.upsamplers[i], level.upsample.conv)
    return model


def build(seed):
    """The right pair with random weights and inputs that follow from the seed."""
    torch.manual_seed(seed)
    net = Model().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 1:
                p.copy_(0.4 * torch.randn_like(p) + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    for block in (net.down[1].attn, net.mid.attn_1):
        block.q.weight.data *= 3.0
    model = port(net, FlaxUNet(rngs=nnx.Rngs(seed)))
    model.eval()
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 3, 8, 12)).astype(np.float32)
    t = rng.integers(3, 60, size=2)
    return {"torch": net, "flax": model, "inputs": (x, t), "flax_inputs": (x.transpose(0, 2, 3, 1), t)}


FAULTS = [
    {
        "title": "frequencies divided by half, not by half - 1",
        "edits": [("/ (half - 1))", "/ half)")],
        "layers": [""],
        "between": (None, "temb.dense.0"),
        "causes": ["constant"],
        "level": "outputs",
    },
    {
        "title": "the downsampling pads above and left, not below and right",
        "edits": [("padding=((0, 1), (0, 1))", "padding=((1, 0), (1, 0))")],
        "layers": ["down.0.downsample.conv", "down.0.downsample"],
        "causes": ["padding"],
        "level": "outputs",
    },
    {
        "title": "upsampling tiles the image for repeating its pixels",
        "edits": [("return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)", "return jnp.tile(x, (1, 2, 2, 1))")],
        "layers": ["up.0.upsample"],
        "between": ("up.0.block.1.nin_shortcut", "up.0.upsample.conv"),
        "causes": ["rearranged", "operation"],
        "level": "outputs",
    },
    {
        "title": "the time embedding is added after the second norm",
        "edits": [("h = self.norm2(h + t)", "h = self.norm2(h) + t")],
        "layers": ["down.0.block"],
        "between": ("down.0.block.temb_proj", "down.0.block.norm2"),
        "causes": ["order", "norm_order"],
        "level": "outputs",
    },
    {
        "title": "values are summed over the queries' axis of the weights",
        "edits": [('jnp.einsum("bij,bjc->bic", weights, v)', 'jnp.einsum("bji,bjc->bic", weights, v)')],
        "layers": ["down.1.attn"],
        "between": ("down.1.attn.v", "down.1.attn.proj_out"),
        "causes": ["transposed", "axis"],
        "level": "outputs",
    },
    {
        "title": "stop_gradient round the whole time embedding, its two layers included",
        "edits": [("temb = self.time_1(nnx.silu(self.time_0(temb)))",
                   "temb = jax.lax.stop_gradient(self.time_1(nnx.silu(self.time_0(temb))))")],
        "layers": ["", "temb.dense.1"],
        "between": ("temb.dense.1", "conv_in"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "the attention's q and k are loaded into each other",
        "edits": [('"query": "q", "key": "k"', '"query": "k", "key": "q"')],
        "layers": ["down.1.attn.q", "down.1.attn.k"],
        "causes": ["swapped"],
        "level": "outputs",
    },
    {
        "title": "half as many groups in the block's first norm",
        "edits": [("self.norm1 = nnx.GroupNorm(cin, num_groups=cfg.groups,", "self.norm1 = nnx.GroupNorm(cin, num_groups=cfg.groups // 2,")],
        "layers": ["down.0.block.norm1"],
        "causes": ["groups"],
        "level": "outputs",
    },
]
