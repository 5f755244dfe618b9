"""Mistral-like decoder: sliding window, grouped heads, q/k norms; Linen nn.scan over stacked layers, DenseGeneral heads."""
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch


class Args(NamedTuple):
    dim: int = 16
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 6
    hidden_dim: int = 28
    vocab_size: int = 35
    norm_eps: float = 1e-6
    rope_theta: float = 1000000.0
    sliding_window: int = 4


class MistralRMSNorm(torch.nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def rotary(x, theta):
    """x: (batch, heads, seq, head_dim)"""
    half = x.shape[-1] // 2
    freq = theta ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * freq
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * angle.cos() - x2 * angle.sin(), x2 * angle.cos() + x1 * angle.sin()], dim=-1)


class MistralAttention(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.q_proj = torch.nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.k_proj = torch.nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.v_proj = torch.nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.o_proj = torch.nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)
        self.q_norm = MistralRMSNorm(args.head_dim, args.norm_eps)
        self.k_norm = MistralRMSNorm(args.head_dim, args.norm_eps)

    def forward(self, x):
        a, (b, s, _) = self.args, x.shape
        q = self.q_proj(x).view(b, s, a.n_heads, a.head_dim)
        k = self.k_proj(x).view(b, s, a.n_kv_heads, a.head_dim)
        v = self.v_proj(x).view(b, s, a.n_kv_heads, a.head_dim).transpose(1, 2)
        q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2)
        q, k = rotary(q, a.rope_theta), rotary(k, a.rope_theta)
        k = k.repeat_interleave(a.n_heads // a.n_kv_heads, dim=1)
        v = v.repeat_interleave(a.n_heads // a.n_kv_heads, dim=1)
        scores = q @ k.mT / math.sqrt(a.head_dim)
        i, j = torch.arange(s)[:, None], torch.arange(s)[None, :]
        blocked = (j > i) | (i - j >= a.sliding_window)
        probs = scores.masked_fill(blocked, float("-inf")).softmax(dim=-1)
        return self.o_proj((probs @ v).transpose(1, 2).flatten(2))


class MistralMLP(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.gate_up_proj = torch.nn.Linear(args.dim, 2 * args.hidden_dim, bias=False)
        self.down_proj = torch.nn.Linear(args.hidden_dim, args.dim, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(torch.nn.functional.silu(gate) * up)


class MistralLayer(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.input_layernorm = MistralRMSNorm(args.dim, args.norm_eps)
        self.self_attn = MistralAttention(args)
        self.post_attention_layernorm = MistralRMSNorm(args.dim, args.norm_eps)
        self.mlp = MistralMLP(args)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Mistral(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(args.vocab_size, args.dim)
        self.layers = torch.nn.Sequential(*[MistralLayer(args) for _ in range(args.n_layers)])
        self.norm = MistralRMSNorm(args.dim, args.norm_eps)
        self.lm_head = torch.nn.Linear(args.dim, args.vocab_size, bias=False)

    def forward(self, input_ids):
        return self.lm_head(self.norm(self.layers(self.embed_tokens(input_ids))))


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        moment = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(moment + self.eps) * scale


def rope(x, base):
    # x: [batch, seq, heads, head_dim]
    half = x.shape[-1] // 2
    timescale = base ** (jnp.arange(half) / half)
    radians = jnp.arange(x.shape[1])[:, None, None] / timescale
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * jnp.cos(radians) - second * jnp.sin(radians),
                            second * jnp.cos(radians) + first * jnp.sin(radians)], axis=-1)


def sliding_window_mask(length, window):
    rows = jnp.arange(length)[:, None]
    cols = jnp.arange(length)[None, :]
    return (cols <= rows) & (rows - cols < window)


class SelfAttention(nn.Module):
    args: Args

    @nn.compact
    def __call__(self, x):
        a = self.args
        proj = lambda heads, name: nn.DenseGeneral((heads, a.head_dim), use_bias=False, name=name)
        query = proj(a.n_heads, "query")(x)
        key = proj(a.n_kv_heads, "key")(x)
        value = proj(a.n_kv_heads, "value")(x)
        query = RMSNorm(a.norm_eps, name="query_norm")(query)
        key = RMSNorm(a.norm_eps, name="key_norm")(key)
        query, key = rope(query, a.rope_theta), rope(key, a.rope_theta)
        b, s = x.shape[:2]
        query = query.reshape(b, s, a.n_kv_heads, a.n_heads // a.n_kv_heads, a.head_dim)
        logits = jnp.einsum("bsngd,btnd->bngst", query, key) / math.sqrt(a.head_dim)
        logits = jnp.where(sliding_window_mask(s, a.sliding_window), logits, -1e30)
        probs = jax.nn.softmax(logits, axis=-1)
        out = jnp.einsum("bngst,btnd->bsngd", probs, value).reshape(b, s, a.n_heads, a.head_dim)
        return nn.DenseGeneral(a.dim, axis=(-2, -1), use_bias=False, name="out")(out)


class DecoderLayer(nn.Module):
    args: Args

    @nn.compact
    def __call__(self, x, _):
        a = self.args
        y = RMSNorm(a.norm_eps, name="pre_attention_norm")(x)
        x = x + SelfAttention(a, name="attention")(y)
        y = RMSNorm(a.norm_eps, name="pre_mlp_norm")(x)
        gate, up = jnp.split(nn.Dense(2 * a.hidden_dim, use_bias=False, name="wi")(y), 2, axis=-1)
        x = x + nn.Dense(a.dim, use_bias=False, name="wo")(nn.silu(gate) * up)
        return x, None


class FlaxMistral(nn.Module):
    args: Args

    @nn.compact
    def __call__(self, tokens):
        a = self.args
        x = nn.Embed(a.vocab_size, a.dim, name="embedder")(tokens)
        layers = nn.scan(DecoderLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=a.n_layers)
        x, _ = layers(a, name="layers")(x, None)
        x = RMSNorm(a.norm_eps, name="final_norm")(x)
        return nn.Dense(a.vocab_size, use_bias=False, name="logits")(x)


def port(net, a):
    sd = {k: v.numpy() for k, v in net.state_dict().items()}

    def stack(name, convert=lambda w: w):
        return jnp.stack([convert(sd[f"layers.{i}.{name}.weight"]) for i in range(a.n_layers)])

    def to_heads(n):
        return lambda w: w.T.reshape(a.dim, n, a.head_dim)

    return {
        "embedder": {"embedding": jnp.asarray(sd["embed_tokens.weight"])},
        "layers": {
            "pre_attention_norm": {"scale": stack("input_layernorm")},
            "pre_mlp_norm": {"scale": stack("post_attention_layernorm")},
            "attention": {
                "query": {"kernel": stack("self_attn.q_proj", to_heads(a.n_heads))},
                "key": {"kernel": stack("self_attn.k_proj", to_heads(a.n_kv_heads))},
                "value": {"kernel": stack("self_attn.v_proj", to_heads(a.n_kv_heads))},
                "out": {"kernel": stack("self_attn.o_proj", lambda w: w.T.reshape(a.n_heads, a.head_dim, a.dim))},
                "query_norm": {"scale": stack("self_attn.q_norm")},
                "key_norm": {"scale": stack("self_attn.k_norm")},
            },
            "wi": {"kernel": stack("mlp.gate_up_proj", np.transpose)},
            "wo": {"kernel": stack("mlp.down_proj", np.transpose)},
        },
        "final_norm": {"scale": jnp.asarray(sd["norm.weight"])},
        "logits": {"kernel": jnp.asarray(sd["lm_head.weight"].T)},
    }


def build(seed):
    torch.manual_seed(seed)
    args = Args()
    net = Mistral(args).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.uniform_(0.5, 1.8) if "norm" in name else p.normal_(0, 0.35)
    tokens = np.random.default_rng(seed).integers(0, args.vocab_size, (3, 10))
    return {"torch": net, "flax": (FlaxMistral(args), {"params": port(net, args)}), "inputs": tokens}


FAULTS = [
    {
        "title": "window holds one key too many",
        "edits": [("(rows - cols < window)", "(rows - cols <= window)")],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.k_norm", "layers.0.self_attn.o_proj"),
        "causes": ["mask", "size"],
        "level": "outputs",
    },
    {
        "title": "query and key normed after the rotation",
        "edits": [('        query = RMSNorm(a.norm_eps, name="query_norm")(query)\n        key = RMSNorm(a.norm_eps, name="key_norm")(key)\n        query, key = rope(query, a.rope_theta), rope(key, a.rope_theta)\n',
                   '        query, key = rope(query, a.rope_theta), rope(key, a.rope_theta)\n        query = RMSNorm(a.norm_eps, name="query_norm")(query)\n        key = RMSNorm(a.norm_eps, name="key_norm")(key)\n')],
        "layers": ["layers.0.self_attn", "layers.0.self_attn.q_norm"],
        "between": ("layers.0.self_attn.v_proj", "layers.0.self_attn.q_norm"),
        "causes": ["order", "norm_order"],
        "level": "outputs",
    },
    {
        "title": "query norm over heads and channels together",
        "edits": [('query = RMSNorm(a.norm_eps, name="query_norm")(query)',
                   'query = RMSNorm(a.norm_eps, axes=(-2, -1), name="query_norm")(query)'),
                  ("    eps: float\n\n    @nn.compact\n    def __call__(self, x):\n        scale = self", "    eps: float\n    axes: tuple = (-1,)\n\n    @nn.compact\n    def __call__(self, x):\n        scale = self"),
                  ("moment = jnp.mean(jnp.square(x), axis=-1, keepdims=True)", "moment = jnp.mean(jnp.square(x), axis=self.axes, keepdims=True)")],
        "layers": ["layers.0.self_attn.q_norm"],
        "causes": ["axis"],
        "level": "outputs",
    },
    {
        "title": "query kernel cut as (head_dim, heads)",
        "edits": [('stack("self_attn.q_proj", to_heads(a.n_heads))', 'stack("self_attn.q_proj", lambda w: w.T.reshape(a.dim, a.head_dim, a.n_heads).swapaxes(1, 2))')],
        "layers": ["layers.0.self_attn.q_proj"],
        "causes": ["heads", "permuted"],
        "level": "outputs",
    },
    {
        "title": "rotary base of 10000 for a million",
        "edits": [("query, key = rope(query, a.rope_theta), rope(key, a.rope_theta)", "query, key = rope(query, 10000.0), rope(key, 10000.0)")],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.k_norm", "layers.0.self_attn.o_proj"),
        "causes": ["constant", "rope"],
        "level": "outputs",
    },
    {
        "title": "softmax over the queries",
        "edits": [("jax.nn.softmax(logits, axis=-1)", "jax.nn.softmax(logits, axis=-2)")],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.k_norm", "layers.0.self_attn.o_proj"),
        "causes": ["softmax_axis", "axis"],
        "level": "outputs",
    },
    {
        "title": "fused gate and up projection cut in the other order",
        "edits": [("gate, up = jnp.split(nn.Dense(", "up, gate = jnp.split(nn.Dense(")],
        "layers": ["layers.0.mlp", "layers.0.mlp.gate_up_proj"],
        "between": ("layers.0.mlp.gate_up_proj", "layers.0.mlp.down_proj"),
        "causes": ["blocks", "swapped", "concat"],
        "level": "outputs",
    },
    {
        "title": "keys and values are cut off from the gradient, as a cache's are",
        "edits": [("        b, s = x.shape[:2]\n        query = query.reshape", "        key, value = jax.lax.stop_gradient((key, value))\n        b, s = x.shape[:2]\n        query = query.reshape")],
        "layers": ["layers.0.self_attn", "layers.1.self_attn"],
        "between": ("layers.0.self_attn.k_norm", "layers.0.self_attn.o_proj"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
]
