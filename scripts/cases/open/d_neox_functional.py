"""GPT-NeoX style decoder (parallel residual, partial rotary, fused qkv) against a functional JAX port."""
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn


class NeoXRotary(nn.Module):
    def __init__(self, dim, base=10000):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2).double() / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, seq_len, dtype):
        t = torch.arange(seq_len, dtype=self.inv_freq.dtype)
        freqs = torch.outer(t, self.inv_freq)
        emb = torch.cat((freqs, freqs), dim=-1)
        return emb.cos().to(dtype), emb.sin().to(dtype)


def rotate_half(x):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


class NeoXAttention(nn.Module):
    def __init__(self, hidden, heads, rotary_pct):
        super().__init__()
        self.heads, self.head_dim = heads, hidden // heads
        self.rotary_ndims = int(self.head_dim * rotary_pct)
        self.rotary_emb = NeoXRotary(self.rotary_ndims)
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.dense = nn.Linear(hidden, hidden)

    def forward(self, x):
        b, t, _ = x.shape
        qkv = self.query_key_value(x).view(b, t, self.heads, 3 * self.head_dim).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=-1)
        cos, sin = self.rotary_emb(t, x.dtype)
        n = self.rotary_ndims
        q_rot, q_pass = q[..., :n], q[..., n:]
        k_rot, k_pass = k[..., :n], k[..., n:]
        q = torch.cat((q_rot * cos + rotate_half(q_rot) * sin, q_pass), dim=-1)
        k = torch.cat((k_rot * cos + rotate_half(k_rot) * sin, k_pass), dim=-1)
        w = q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)
        future = torch.triu(torch.ones(t, t, dtype=torch.bool), diagonal=1)
        w = w.masked_fill(future, torch.finfo(w.dtype).min).softmax(dim=-1)
        return self.dense((w @ v).transpose(1, 2).reshape(b, t, -1))


class NeoXMLP(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(hidden, inner)
        self.dense_4h_to_h = nn.Linear(inner, hidden)
        self.act = nn.GELU()

    def forward(self, x):
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(x)))


class NeoXLayer(nn.Module):
    def __init__(self, hidden, heads, inner, rotary_pct):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(hidden, eps=1e-5)
        self.post_attention_layernorm = nn.LayerNorm(hidden, eps=1e-5)
        self.attention = NeoXAttention(hidden, heads, rotary_pct)
        self.mlp = NeoXMLP(hidden, inner)

    def forward(self, x):
        attn = self.attention(self.input_layernorm(x))
        mlp = self.mlp(self.post_attention_layernorm(x))
        return mlp + attn + x


class NeoXForCausalLM(nn.Module):
    def __init__(self, vocab, hidden, heads, inner, layers, rotary_pct=0.5):
        super().__init__()
        self.embed_in = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList([NeoXLayer(hidden, heads, inner, rotary_pct) for _ in range(layers)])
        self.final_layer_norm = nn.LayerNorm(hidden, eps=1e-5)
        self.embed_out = nn.Linear(hidden, vocab, bias=False)

    def forward(self, input_ids):
        x = self.embed_in(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.embed_out(self.final_layer_norm(x))


# ---- functional JAX ----

def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def layer_norm(p, x, eps=1e-5):
    mu = x.mean(-1, keepdims=True)
    var = jnp.square(x - mu).mean(-1, keepdims=True)
    return (x - mu) * jax.lax.rsqrt(var + eps) * p["scale"] + p["bias"]


def rope_tables(length, ndims, dtype):
    freq = 10000.0 ** (-jnp.arange(0, ndims, 2, dtype=dtype) / ndims)
    angle = jnp.arange(length, dtype=dtype)[:, None] * freq[None, :]
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x, cos, sin):
    """x: [batch, time, heads, dim]; only the first 2 * cos.shape[-1] features turn."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def attention(p, x, n_heads, rotary_pct):
    B, T, D = x.shape
    dh = D // n_heads
    fused = linear(p["qkv"], x).reshape(B, T, n_heads, 3 * dh)
    q, k, v = jnp.split(fused, 3, axis=-1)
    cos, sin = rope_tables(T, int(dh * rotary_pct), x.dtype)
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(dh)
    keep = jnp.tril(jnp.ones((T, T), bool))
    logits = jnp.where(keep, logits, -jnp.inf)
    probs = jax.nn.softmax(logits, axis=-1)
    out = jnp.einsum("bhqk,bkhd->bqhd", probs, v).reshape(B, T, D)
    return linear(p["out"], out)


def mlp_block(p, x):
    h = linear(p["up"], x)
    return linear(p["down"], jax.nn.gelu(h, approximate=False))


def forward(params, tokens, *, n_heads, rotary_pct):
    h = params["wte"][tokens]
    for i in range(len(params["blocks"])):
        p = params["blocks"][f"block_{i}"]
        a = attention(p["attn"], layer_norm(p["ln_1"], h), n_heads, rotary_pct)
        m = mlp_block(p["mlp"], layer_norm(p["ln_2"], h))
        h = h + a + m
    h = layer_norm(params["ln_f"], h)
    return h @ params["lm_head"]["kernel"]


def port(net):
    def arr(t):
        return jnp.asarray(t.detach().numpy())

    def dense(m):
        return {"kernel": arr(m.weight).T, "bias": arr(m.bias)}

    def norm(m):
        return {"scale": arr(m.weight), "bias": arr(m.bias)}

    blocks = {}
    for i, layer in enumerate(net.layers):
        blocks[f"block_{i}"] = {
            "ln_1": norm(layer.input_layernorm),
            "ln_2": norm(layer.post_attention_layernorm),
            "attn": {"qkv": dense(layer.attention.query_key_value), "out": dense(layer.attention.dense)},
            "mlp": {"up": dense(layer.mlp.dense_h_to_4h), "down": dense(layer.mlp.dense_4h_to_h)},
        }
    return {
        "wte": arr(net.embed_in.weight),
        "blocks": blocks,
        "ln_f": norm(net.final_layer_norm),
        "lm_head": {"kernel": arr(net.embed_out.weight).T},
    }


def build(seed):
    torch.manual_seed(seed)
    net = NeoXForCausalLM(vocab=23, hidden=24, heads=3, inner=40, layers=2).eval()
    for name, p in net.named_parameters():
        if "norm" in name and name.endswith("weight"):
            p.data.uniform_(0.5, 1.5)
        elif p.dim() == 1:
            p.data.normal_(0, 0.3)
        elif "query_key_value" in name:
            p.data.mul_(3.0)
    tokens = np.random.default_rng(seed).integers(0, 23, size=(2, 7))
    return {
        "torch": net,
        "flax": (partial(forward, n_heads=3, rotary_pct=0.5), port(net)),
        "inputs": tokens,
    }


FAULTS = [
    {
        "title": "fused qkv split into thirds of the width, not per head",
        "edits": [(
            "    fused = linear(p[\"qkv\"], x).reshape(B, T, n_heads, 3 * dh)\n    q, k, v = jnp.split(fused, 3, axis=-1)",
            "    q, k, v = (z.reshape(B, T, n_heads, dh) for z in jnp.split(linear(p[\"qkv\"], x), 3, axis=-1))",
        )],
        "layers": ["layers.0.attention"],
        "between": ("layers.0.attention.query_key_value", "layers.0.attention.dense"),
        "causes": ["blocks", "rearranged", "heads"],
        "level": "outputs",
    },
    {
        "title": "the whole head is rotated instead of the first half of it",
        "edits": [("rope_tables(T, int(dh * rotary_pct), x.dtype)", "rope_tables(T, dh, x.dtype)")],
        "layers": ["layers.0.attention", "layers.0.attention.rotary_emb"],
        "between": ("layers.0.attention.query_key_value", "layers.0.attention.dense"),
        "causes": ["rope", "size"],
        "level": "outputs",
    },
    {
        "title": "sequential residual in place of the parallel one",
        "edits": [(
            "        m = mlp_block(p[\"mlp\"], layer_norm(p[\"ln_2\"], h))\n        h = h + a + m",
            "        h = h + a\n        h = h + mlp_block(p[\"mlp\"], layer_norm(p[\"ln_2\"], h))",
        )],
        "layers": ["layers.0"],
        "between": ("layers.0.attention.dense", "layers.0.post_attention_layernorm"),
        "causes": ["residual", "operand", "wiring"],
        "level": "outputs",
    },
    {
        "title": "masked scores multiplied by zero before the softmax",
        "edits": [("jnp.where(keep, logits, -jnp.inf)", "logits * keep")],
        "layers": ["layers.0.attention"],
        "between": ("layers.0.attention.query_key_value", "layers.0.attention.dense"),
        "causes": ["mask", "causal"],
        "level": "outputs",
    },
    {
        "title": "jax.nn.gelu left at its tanh default",
        "edits": [("jax.nn.gelu(h, approximate=False)", "jax.nn.gelu(h)")],
        "layers": ["layers.0.mlp.act", "layers.0.mlp"],
        "between": ("layers.0.mlp.dense_h_to_4h", "layers.0.mlp.dense_4h_to_h"),
        "causes": ["gelu"],
        "level": "outputs",
    },
    {
        "title": "the two layer norms of a block exchanged in the port",
        "edits": [
            ("\"ln_1\": norm(layer.input_layernorm)", "\"ln_1\": norm(layer.post_attention_layernorm)"),
            ("\"ln_2\": norm(layer.post_attention_layernorm)", "\"ln_2\": norm(layer.input_layernorm)"),
        ],
        "layers": ["layers.0.input_layernorm"],
        "causes": ["swapped"],
        "level": "outputs",
    },
    {
        "title": "rotary frequencies divided by the head dimension, not by the rotated dimensions",
        "edits": [
            ("def rope_tables(length, ndims, dtype):", "def rope_tables(length, ndims, dtype, pct=0.5):"),
            ("-jnp.arange(0, ndims, 2, dtype=dtype) / ndims)", "-jnp.arange(0, ndims, 2, dtype=dtype) / (ndims / pct))"),
        ],
        "layers": ["layers.0.attention.rotary_emb", "layers.0.attention"],
        "between": ("layers.0.attention.query_key_value", "layers.0.attention.dense"),
        "causes": ["rope", "constant"],
        "level": "outputs",
    },
    {
        "title": "the residual stream enters the final norm without its last block's mlp",
        "edits": [("        h = h + a + m\n", "        out = h + a + m\n        h = out if i + 1 < len(params[\"blocks\"]) else h + a\n")],
        "layers": ["layers.1"],
        "between": ("layers.1.mlp.dense_4h_to_h", "final_layer_norm"),
        "causes": ["residual", "left_out"],
        "level": "outputs",
    },
]
