"""T5: encoder and decoder with bucketed relative positions held by the first layer, unscaled attention, scaled tied head."""
import math

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn


def relative_bucket(rel, bidirectional, num, max_distance):
    out = torch.zeros_like(rel)
    if bidirectional:
        num //= 2
        out = out + (rel > 0).long() * num
        rel = rel.abs()
    else:
        rel = -torch.min(rel, torch.zeros_like(rel))
    exact = num // 2
    large = exact + (torch.log(rel.float() / exact) / math.log(max_distance / exact) * (num - exact)).long()
    return out + torch.where(rel < exact, rel, large.clamp(max=num - 1))


class T5Norm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class T5Attention(nn.Module):
    def __init__(self, d, heads, d_kv, bias_of=None, buckets=8, far=12):
        super().__init__()
        self.heads, self.bias_of, self.buckets, self.far = heads, bias_of, buckets, far
        self.q, self.k, self.v = (nn.Linear(d, heads * d_kv, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * d_kv, d, bias=False)
        if bias_of:
            self.relative_attention_bias = nn.Embedding(buckets, heads)

    def position_bias(self, nq, nk):
        rel = torch.arange(nk)[None] - torch.arange(nq)[:, None]
        bucket = relative_bucket(rel, self.bias_of == "encoder", self.buckets, self.far)
        return self.relative_attention_bias(bucket).permute(2, 0, 1)[None]

    def forward(self, x, kv, bias):
        split = lambda z: z.view(*z.shape[:2], self.heads, -1).transpose(1, 2)
        q, k, v = split(self.q(x)), split(self.k(kv)), split(self.v(kv))
        w = (q @ k.transpose(-1, -2) + bias).softmax(dim=-1)
        return self.o((w @ v).transpose(1, 2).flatten(2))


class T5Block(nn.Module):
    def __init__(self, d, heads, d_kv, ff, bias_of, cross):
        super().__init__()
        self.norm_self, self.self_attn = T5Norm(d), T5Attention(d, heads, d_kv, bias_of)
        if cross:
            self.norm_cross, self.cross_attn = T5Norm(d), T5Attention(d, heads, d_kv)
        self.norm_ff = T5Norm(d)
        self.wi, self.act, self.wo = nn.Linear(d, ff, bias=False), nn.ReLU(), nn.Linear(ff, d, bias=False)

    def forward(self, x, bias, memory=None, memory_bias=None):
        h = self.norm_self(x)
        x = x + self.self_attn(h, h, bias)
        if memory is not None:
            x = x + self.cross_attn(self.norm_cross(x), memory, memory_bias)
        return x + self.wo(self.act(self.wi(self.norm_ff(x))))


class T5(nn.Module):
    def __init__(self, vocab=20, d=12, heads=3, d_kv=5, ff=16, layers=2):
        super().__init__()
        self.shared = nn.Embedding(vocab, d)
        self.encoder = nn.ModuleList([T5Block(d, heads, d_kv, ff, None if i else "encoder", False) for i in range(layers)])
        self.encoder_norm = T5Norm(d)
        self.decoder = nn.ModuleList([T5Block(d, heads, d_kv, ff, None if i else "decoder", True) for i in range(layers)])
        self.decoder_norm = T5Norm(d)

    def forward(self, input_ids, attention_mask, decoder_input_ids):
        x, y = self.shared(input_ids), self.shared(decoder_input_ids)
        s, t = x.shape[1], y.shape[1]
        pad = (1.0 - attention_mask[:, None, None].to(x.dtype)) * -1e9
        bias = self.encoder[0].self_attn.position_bias(s, s) + pad
        for block in self.encoder:
            x = block(x, bias)
        x = self.encoder_norm(x)
        future = torch.full((t, t), -1e9, dtype=x.dtype).triu(1)
        bias = self.decoder[0].self_attn.position_bias(t, t) + future
        for block in self.decoder:
            y = block(y, bias, x, pad)
        return (self.decoder_norm(y) * y.shape[-1] ** -0.5) @ self.shared.weight.T


# ----- Flax Linen -----


def buckets_of(nq, nk, both_ways, num, far):
    """Static: numpy in double, kept out of the graph."""
    rel = np.arange(nk)[None, :] - np.arange(nq)[:, None]
    base = np.zeros_like(rel)
    if both_ways:
        num //= 2
        base = (rel > 0) * num
        distance = np.abs(rel)
    else:
        distance = np.maximum(-rel, 0)
    exact = num // 2
    log = np.log(np.maximum(distance, 1) / exact) / np.log(far / exact)
    large = np.minimum(exact + (log * (num - exact)).astype(np.int32), num - 1)
    return base + np.where(distance < exact, distance, large)


class Attention(linen.Module):
    heads: int
    d_kv: int

    @linen.compact
    def __call__(self, x, kv, bias):
        proj = lambda name, z: linen.DenseGeneral((self.heads, self.d_kv), use_bias=False, name=name)(z)
        q, k, v = proj("q", x), proj("k", kv), proj("v", kv)
        w = linen.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias)
        out = jnp.einsum("bhqk,bkhd->bqhd", w, v)
        return linen.DenseGeneral(x.shape[-1], axis=(-2, -1), use_bias=False, name="o")(out)


class Block(linen.Module):
    heads: int
    d_kv: int
    ff: int

    @linen.compact
    def __call__(self, x, bias, memory=None, memory_bias=None):
        h = linen.RMSNorm(epsilon=1e-6, name="ln_self")(x)
        x = x + Attention(self.heads, self.d_kv, name="att")(h, h, bias)
        if memory is not None:
            h = linen.RMSNorm(epsilon=1e-6, name="ln_cross")(x)
            x = x + Attention(self.heads, self.d_kv, name="cross")(h, memory, memory_bias)
        h = linen.RMSNorm(epsilon=1e-6, name="ln_ff")(x)
        h = linen.relu(linen.Dense(self.ff, use_bias=False, name="wi")(h))
        return x + linen.Dense(x.shape[-1], use_bias=False, name="wo")(h)


class Seq2Seq(linen.Module):
    vocab: int = 20
    d: int = 12
    heads: int = 3
    d_kv: int = 5
    ff: int = 16
    depth: int = 2
    buckets: int = 8
    far: int = 12

    @linen.compact
    def __call__(self, source, source_mask, target):
        embed = linen.Embed(self.vocab, self.d, name="tokens")
        x, y = embed(source), embed(target)
        table = lambda name: linen.Embed(self.buckets, self.heads, name=name)
        n, m = x.shape[1], y.shape[1]
        padding = jnp.where(source_mask[:, None, None, :] > 0, 0.0, -1e9)
        bias = table("enc_bias")(buckets_of(n, n, True, self.buckets, self.far)).transpose(2, 0, 1)[None] + padding
        for i in range(self.depth):
            x = Block(self.heads, self.d_kv, self.ff, name=f"enc_{i}")(x, bias)
        x = linen.RMSNorm(epsilon=1e-6, name="enc_norm")(x)
        bias = table("dec_bias")(buckets_of(m, m, False, self.buckets, self.far)).transpose(2, 0, 1)[None]
        bias = jnp.where(np.tri(m, dtype=bool), bias, -1e9)
        for i in range(self.depth):
            y = Block(self.heads, self.d_kv, self.ff, name=f"dec_{i}")(y, bias, x, padding)
        y = linen.RMSNorm(epsilon=1e-6, name="dec_norm")(y)
        return embed.attend(y / jnp.sqrt(self.d).astype(y.dtype))


def variables(net, heads=3):
    a = lambda t: jnp.asarray(t.detach().numpy())
    norm = lambda m: {"scale": a(m.weight)}

    def attention(m):
        p = {n: {"kernel": a(getattr(m, n).weight).T.reshape(-1, heads, 5)} for n in "qkv"}
        return p | {"o": {"kernel": a(m.o.weight).T.reshape(heads, 5, -1)}}

    def block(b):
        p = {"ln_self": norm(b.norm_self), "att": attention(b.self_attn), "ln_ff": norm(b.norm_ff),
             "wi": {"kernel": a(b.wi.weight).T}, "wo": {"kernel": a(b.wo.weight).T}}
        return p | ({"ln_cross": norm(b.norm_cross), "cross": attention(b.cross_attn)} if hasattr(b, "cross_attn") else {})

    p = {"tokens": {"embedding": a(net.shared.weight)}, "enc_norm": norm(net.encoder_norm), "dec_norm": norm(net.decoder_norm)}
    for side, stack in (("enc", net.encoder), ("dec", net.decoder)):
        p[f"{side}_bias"] = {"embedding": a(stack[0].self_attn.relative_attention_bias.weight)}
        p |= {f"{side}_{i}": block(b) for i, b in enumerate(stack)}
    return {"params": p}


def build(seed):
    torch.manual_seed(seed)
    net = T5().eval()
    for n, p in net.named_parameters():
        p.data.uniform_(0.5, 1.5) if "norm" in n else p.data.normal_(0, 1.0 if "bias" in n or "shared" in n else 0.3)
    rng = np.random.default_rng(seed)
    source, target = rng.integers(1, 20, (2, 11)), rng.integers(1, 20, (2, 9))
    keep = np.ones((2, 11), np.int64)
    keep[1, 8:] = 0
    return {"torch": net, "flax": (Seq2Seq(), variables(net)), "inputs": (source, keep, target)}


FAULTS = [
    {
        "title": "decoder's buckets made for both directions",
        "edits": [("buckets_of(m, m, False, self.buckets, self.far)", "buckets_of(m, m, True, self.buckets, self.far)")],
        "layers": ["decoder.0.self_attn", "decoder.0.self_attn.relative_attention_bias"],
        "between": ("encoder_norm", "decoder.0.self_attn.o"),
        "causes": ["offset", "rearranged", "constant"],
        "level": "outputs",
    },
    {
        "title": "relative position counted from key to query",
        "edits": [("rel = np.arange(nk)[None, :] - np.arange(nq)[:, None]", "rel = np.arange(nq)[:, None] - np.arange(nk)[None, :]")],
        "layers": ["encoder.0.self_attn", "encoder.0.self_attn.relative_attention_bias"],
        "between": (None, "encoder.0.self_attn.o"),
        "causes": ["transposed", "reversed", "offset"],
        "level": "outputs",
    },
    {
        "title": "attention divided by the root of the head's width",
        "edits": [("jnp.einsum(\"bqhd,bkhd->bhqk\", q, k) + bias", "jnp.einsum(\"bqhd,bkhd->bhqk\", q, k) / self.d_kv ** 0.5 + bias")],
        "layers": ["encoder.0.self_attn"],
        "between": ("encoder.0.self_attn.v", "encoder.0.self_attn.o"),
        "causes": ["scale"],
        "level": "outputs",
    },
    {
        "title": "the position bias goes to the first decoder layer only; the second has the mask alone",
        "edits": [("        for i in range(self.depth):\n            y = Block(", "        for i in range(self.depth):\n            bias = jnp.where(np.tri(m, dtype=bool), 0.0, -1e9) if i else bias\n            y = Block(")],
        "layers": ["decoder.1.self_attn"],
        "between": ("decoder.1.self_attn.v", "decoder.1.self_attn.o"),
        "causes": ["left_out"],
        "level": "outputs",
    },
    {
        "title": "cross attention is not told of the source's padding",
        "edits": [("(y, bias, x, padding)", "(y, bias, x, jnp.zeros_like(padding))")],
        "layers": ["decoder.0.cross_attn"],
        "between": ("decoder.0.cross_attn.v", "decoder.0.cross_attn.o"),
        "causes": ["mask"],
        "level": "outputs",
    },
]
