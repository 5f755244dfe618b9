"""Perceiver: Fourier position features, latents with shared cross-attention, class readout, against Linen."""
from typing import Optional

import flax.linen as lnn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn


def fourier_encode(x, max_freq, num_bands):
    x = x.unsqueeze(-1)
    orig = x
    scales = torch.linspace(1.0, max_freq / 2, num_bands, dtype=x.dtype)
    x = x * scales * np.pi
    return torch.cat([x.sin(), x.cos(), orig], dim=-1)


class GEGLU(nn.Module):
    def forward(self, x):
        x, gates = x.chunk(2, dim=-1)
        return x * torch.nn.functional.gelu(gates)


class PreNorm(nn.Module):
    def __init__(self, dim, fn, context_dim=None):
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(context_dim) if context_dim is not None else None

    def forward(self, x, **kwargs):
        x = self.norm(x)
        if self.norm_context is not None:
            kwargs["context"] = self.norm_context(kwargs["context"])
        return self.fn(x, **kwargs)


class FeedForward(nn.Module):
    def __init__(self, dim, mult=2):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, dim * mult * 2), GEGLU(), nn.Linear(dim * mult, dim))

    def forward(self, x):
        return self.net(x)


class Attention(nn.Module):
    def __init__(self, query_dim, context_dim=None, heads=2, dim_head=6, dropout=0.1):
        super().__init__()
        inner = heads * dim_head
        self.heads, self.scale = heads, dim_head ** -0.5
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_kv = nn.Linear(context_dim or query_dim, inner * 2, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.to_out = nn.Linear(inner, query_dim)

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        q = self.to_q(x)
        k, v = self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        sim = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
        if mask is not None:
            sim = sim.masked_fill(~mask[:, None, None, :], -torch.finfo(sim.dtype).max)
        attn = self.dropout(sim.softmax(dim=-1))
        out = torch.einsum("bhij,bhjd->bhid", attn, v).transpose(1, 2).flatten(2)
        return self.to_out(out)


class Perceiver(nn.Module):
    def __init__(self, channels=3, num_latents=5, dim=16, depth=2, max_freq=10.0, bands=4, classes=7):
        super().__init__()
        self.max_freq, self.bands = max_freq, bands
        input_dim = 2 * (2 * bands + 1) + channels
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        cross = PreNorm(dim, Attention(dim, input_dim, heads=1, dim_head=9), context_dim=input_dim)
        cross_ff = PreNorm(dim, FeedForward(dim))
        self.layers = nn.ModuleList()
        for _ in range(depth):
            self.layers.append(nn.ModuleList([
                cross, cross_ff, PreNorm(dim, Attention(dim)), PreNorm(dim, FeedForward(dim)),
            ]))
        self.to_logits = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))

    def forward(self, data, mask):
        b, h, w, _ = data.shape
        axes = [torch.linspace(-1.0, 1.0, size, dtype=data.dtype) for size in (h, w)]
        pos = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        enc = fourier_encode(pos, self.max_freq, self.bands).flatten(-2)
        data = torch.cat((data, enc.expand(b, -1, -1, -1)), dim=-1).flatten(1, 2)
        x = self.latents.expand(b, -1, -1)
        for cross, cross_ff, attn, ff in self.layers:
            x = cross(x, context=data, mask=mask) + x
            x = cross_ff(x) + x
            x = attn(x) + x
            x = ff(x) + x
        return self.to_logits(x.mean(dim=1))


# -------------------------------------------------------------------------------------- Linen

def position_features(height, width, max_freq, bands):
    ys = jnp.linspace(-1.0, 1.0, height)
    xs = jnp.linspace(-1.0, 1.0, width)
    grid = jnp.stack(jnp.meshgrid(ys, xs, indexing="ij"), axis=-1)[..., None]
    freqs = jnp.linspace(1.0, max_freq / 2, bands)
    angles = jnp.pi * grid * freqs
    feats = jnp.concatenate([jnp.sin(angles), jnp.cos(angles), grid], axis=-1)
    return feats.reshape(height, width, -1)


class MultiHead(lnn.Module):
    heads: int
    head_dim: int
    dropout: float = 0.1

    @lnn.compact
    def __call__(self, x, context=None, mask: Optional[jax.Array] = None, train: bool = False):
        context = x if context is None else context
        shape = (self.heads, self.head_dim)
        q = lnn.DenseGeneral(shape, use_bias=False, name="query")(x)
        k = lnn.DenseGeneral(shape, use_bias=False, name="key")(context)
        v = lnn.DenseGeneral(shape, use_bias=False, name="value")(context)
        logits = jnp.einsum("...qhd,...khd->...hqk", q / np.sqrt(self.head_dim), k)
        if mask is not None:
            logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(logits.dtype).min)
        weights = lnn.softmax(logits)
        weights = lnn.Dropout(self.dropout)(weights, deterministic=not train)
        y = jnp.einsum("...hqk,...khd->...qhd", weights, v)
        return lnn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="out")(y)


class GatedMlp(lnn.Module):
    expansion: int = 2

    @lnn.compact
    def __call__(self, x):
        h = lnn.Dense(2 * self.expansion * x.shape[-1], name="wi")(x)
        h, g = jnp.split(h, 2, axis=-1)
        return lnn.Dense(x.shape[-1], name="wo")(h * lnn.gelu(g, approximate=False))


class CrossBlock(lnn.Module):
    @lnn.compact
    def __call__(self, latents, data, mask, train=False):
        q = lnn.LayerNorm(epsilon=1e-5, name="norm_latents")(latents)
        kv = lnn.LayerNorm(epsilon=1e-5, name="norm_data")(data)
        x = latents + MultiHead(1, 9, name="attention")(q, kv, mask, train)
        return x + GatedMlp(name="mlp")(lnn.LayerNorm(epsilon=1e-5, name="norm_mlp")(x))


class SelfBlock(lnn.Module):
    @lnn.compact
    def __call__(self, x, train=False):
        y = lnn.LayerNorm(epsilon=1e-5, name="norm_attn")(x)
        x = x + MultiHead(2, 6, name="attention")(y, train=train)
        return x + GatedMlp(name="mlp")(lnn.LayerNorm(epsilon=1e-5, name="norm_mlp")(x))


class FlaxPerceiver(lnn.Module):
    num_latents: int = 5
    dim: int = 16
    depth: int = 2
    classes: int = 7
    max_freq: float = 10.0
    bands: int = 4

    @lnn.compact
    def __call__(self, image, mask, train: bool = False):
        b, h, w, c = image.shape
        pos = position_features(h, w, self.max_freq, self.bands)
        tokens = jnp.concatenate([image, jnp.broadcast_to(pos, (b, *pos.shape))], axis=-1)
        tokens = tokens.reshape(b, h * w, -1)
        latents = self.param("latents", lnn.initializers.normal(0.02), (self.num_latents, self.dim))
        x = jnp.broadcast_to(latents, (b, *latents.shape))
        cross = CrossBlock(name="cross")
        for i in range(self.depth):
            x = cross(x, tokens, mask, train)
            x = SelfBlock(name=f"self_{i}")(x, train)
        x = lnn.LayerNorm(epsilon=1e-5, name="head_norm")(x.mean(axis=1))
        return lnn.Dense(self.classes, name="head")(x)


def port(net):
    g = lambda p: jnp.asarray(p.detach().numpy())
    norm = lambda m: {"scale": g(m.weight), "bias": g(m.bias)}
    dense = lambda m: {"kernel": g(m.weight).T, "bias": g(m.bias)}

    def attention(m):
        h = m.heads
        k, v = jnp.split(g(m.to_kv.weight).T, 2, axis=1)
        heads = lambda w: {"kernel": w.reshape(w.shape[0], h, -1)}
        out = g(m.to_out.weight).T
        return {
            "query": heads(g(m.to_q.weight).T), "key": heads(k), "value": heads(v),
            "out": {"kernel": out.reshape(h, -1, out.shape[-1]), "bias": g(m.to_out.bias)},
        }

    def mlp(m):
        return {"wi": dense(m.net[0]), "wo": dense(m.net[2])}

    cross, cross_ff = net.layers[0][0], net.layers[0][1]
    params = {
        "latents": g(net.latents),
        "cross": {
            "norm_latents": norm(cross.norm), "norm_data": norm(cross.norm_context),
            "attention": attention(cross.fn), "norm_mlp": norm(cross_ff.norm), "mlp": mlp(cross_ff.fn),
        },
        "head_norm": norm(net.to_logits[0]),
        "head": dense(net.to_logits[1]),
    }
    for i, (_, _, attn, ff) in enumerate(net.layers):
        params[f"self_{i}"] = {
            "norm_attn": norm(attn.norm), "attention": attention(attn.fn), "norm_mlp": norm(ff.norm), "mlp": mlp(ff.fn),
        }
    return {"params": params}


def build(seed):
    torch.manual_seed(seed)
    net = Perceiver().eval()
    for m in net.modules():
        if isinstance(m, nn.LayerNorm):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.3)
        elif isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, 0, 1.5 * m.in_features ** -0.5)
            if m.bias is not None:
                nn.init.normal_(m.bias, 0, 0.3)
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(2, 6, 4, 3))
    mask = rng.random((2, 24)) > 0.25
    return {"torch": net, "flax": (FlaxPerceiver(), port(net)), "inputs": (image, mask)}


FAULTS = [
    {
        "title": "bands spaced geometrically, powers of two",
        "edits": [("freqs = jnp.linspace(1.0, max_freq / 2, bands)", "freqs = 2.0 ** jnp.arange(bands)")],
        "layers": [""],
        "between": (None, "layers.0.0.norm"),
        "causes": ["constant", "operation"],
        "level": "outputs",
    },
    {
        "title": "grid of positions with x before y",
        "edits": [("jnp.stack(jnp.meshgrid(ys, xs, indexing=\"ij\"), axis=-1)[..., None]", "jnp.stack(jnp.meshgrid(ys, xs, indexing=\"ij\")[::-1], axis=-1)[..., None]")],
        "layers": [""],
        "between": (None, "layers.0.0.norm"),
        "causes": ["concat", "swapped", "operand"],
        "level": "outputs",
    },
    {
        "title": "attention dropout without the 0.1",
        "edits": [("    dropout: float = 0.1\n", "    dropout: float = 0.0\n")],
        "layers": ["layers.0.0.fn.dropout", "layers.0.2.fn.dropout"],
        "causes": ["training_attribute", "dropout"],
        "level": "attributes",
    },
    {
        "title": "gelu on the first half of the gated unit",
        "edits": [("(h * lnn.gelu(g, approximate=False))", "(lnn.gelu(h, approximate=False) * g)")],
        "layers": ["layers.0.1.fn.net.1", "layers.0.1.fn"],
        "between": ("layers.0.1.fn.net.0", "layers.0.1.fn.net.2"),
        "causes": ["blocks", "operand", "swapped"],
        "level": "outputs",
    },
    {
        "title": "values of the cross-attention read the data before its norm",
        "edits": [
            ("    def __call__(self, x, context=None, mask: Optional[jax.Array] = None, train: bool = False):", "    def __call__(self, x, context=None, mask: Optional[jax.Array] = None, train: bool = False, source=None):"),
            ("name=\"value\")(context)", "name=\"value\")(context if source is None else source)"),
            ("name=\"attention\")(q, kv, mask, train)", "name=\"attention\")(q, kv, mask, train, data)"),
        ],
        "layers": ["layers.0.0.fn.to_kv", "layers.0.0.fn", "layers.0.0"],
        "causes": ["operand", "wiring", "left_out"],
        "level": "outputs",
    },
    {
        "title": "heads of the output kernel split with head_dim first",
        "edits": [("\"out\": {\"kernel\": out.reshape(h, -1, out.shape[-1])", "\"out\": {\"kernel\": out.reshape(-1, h, out.shape[-1]).swapaxes(0, 1)")],
        "layers": ["layers.0.2.fn.to_out"],
        "causes": ["heads"],
        "level": "outputs",
    },
    {
        "title": "mean over the latents after the head's norm",
        "edits": [("name=\"head_norm\")(x.mean(axis=1))", "name=\"head_norm\")(x).mean(axis=1)")],
        "layers": ["", "to_logits.0"],
        "between": ("layers.1.3.fn.net.2", "to_logits.0"),
        "causes": ["order", "norm_order"],
        "level": "outputs",
    },
    {
        "title": "latents' residual around the cross-attention left out",
        "edits": [("        x = latents + MultiHead(1, 9, name=\"attention\")", "        x = MultiHead(1, 9, name=\"attention\")")],
        "layers": [""],
        "between": ("layers.0.0.fn.to_out", "layers.0.1.norm"),
        "causes": ["residual"],
        "level": "outputs",
    },
]
