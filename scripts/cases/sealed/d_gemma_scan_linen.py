"""Gemma-2-like decoder (soft caps, alternating sliding window, tied head) against Linen with nn.scan."""
from dataclasses import dataclass

import flax.linen as fnn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class Config:
    vocab_size: int = 29
    hidden_size: int = 20
    intermediate_size: int = 36
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 6
    sliding_window: int = 4
    query_pre_attn_scalar: float = 8.0
    attn_softcap: float = 2.0
    final_softcap: float = 3.0
    rms_eps: float = 1e-6
    rope_theta: float = 10000.0


class GemmaRMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return y * (1.0 + self.weight)


def apply_rotary(x, theta):
    d = x.shape[-1]
    inv = theta ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
    ang = torch.outer(torch.arange(x.shape[-2], dtype=x.dtype), inv)
    cos, sin = torch.cat([ang, ang], -1).cos(), torch.cat([ang, ang], -1).sin()
    x1, x2 = x[..., : d // 2], x[..., d // 2:]
    return x * cos + torch.cat([-x2, x1], -1) * sin


class GemmaAttention(nn.Module):
    def __init__(self, c, layer_idx):
        super().__init__()
        self.c = c
        self.is_sliding = layer_idx % 2 == 0
        self.q_proj = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x):
        c = self.c
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, -1, c.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, -1, c.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, -1, c.head_dim).transpose(1, 2)
        q, k = apply_rotary(q, c.rope_theta), apply_rotary(k, c.rope_theta)
        groups = c.num_heads // c.num_kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        w = torch.matmul(q, k.transpose(2, 3)) * c.query_pre_attn_scalar ** -0.5
        w = torch.tanh(w / c.attn_softcap) * c.attn_softcap
        i = torch.arange(t)
        dist = i[:, None] - i[None, :]
        bad = dist < 0
        if self.is_sliding:
            bad = bad | (dist >= c.sliding_window)
        w = F.softmax(w.masked_fill(bad, float("-inf")), dim=-1)
        return self.o_proj(torch.matmul(w, v).transpose(1, 2).reshape(b, t, -1))


class GemmaMLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.act_fn = nn.GELU(approximate="tanh")

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class GemmaLayer(nn.Module):
    def __init__(self, c, layer_idx):
        super().__init__()
        self.self_attn = GemmaAttention(c, layer_idx)
        self.mlp = GemmaMLP(c)
        self.input_layernorm = GemmaRMSNorm(c.hidden_size, c.rms_eps)
        self.post_attention_layernorm = GemmaRMSNorm(c.hidden_size, c.rms_eps)
        self.pre_feedforward_layernorm = GemmaRMSNorm(c.hidden_size, c.rms_eps)
        self.post_feedforward_layernorm = GemmaRMSNorm(c.hidden_size, c.rms_eps)

    def forward(self, x):
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x)))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class GemmaForCausalLM(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList([GemmaLayer(c, i) for i in range(c.num_layers)])
        self.norm = GemmaRMSNorm(c.hidden_size, c.rms_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids):
        x = self.embed_tokens(input_ids) * self.c.hidden_size ** 0.5
        for layer in self.layers:
            x = layer(x)
        logits = self.lm_head(self.norm(x))
        return torch.tanh(logits / self.c.final_softcap) * self.c.final_softcap


# Flax ---------------------------------------------------------------------------------------------

class RMSNorm(fnn.Module):
    eps: float

    @fnn.compact
    def __call__(self, x):
        scale = self.param("scale", fnn.initializers.zeros_init(), (x.shape[-1],))
        rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x * rms * (1 + scale)


def rope(x, positions, theta):
    """x: B T N H"""
    fraction = 2 * jnp.arange(x.shape[-1] // 2) / x.shape[-1]
    angle = positions[:, None, None] / theta ** fraction
    first, second = jnp.split(x, 2, axis=-1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(fnn.Module):
    c: Config

    @fnn.compact
    def __call__(self, x, is_local):
        c = self.c
        b, t, _ = x.shape
        q = fnn.DenseGeneral((c.num_heads, c.head_dim), use_bias=False, name="q")(x)
        kv = fnn.DenseGeneral((2, c.num_kv_heads, c.head_dim), use_bias=False, name="kv")(x)
        k, v = kv[:, :, 0], kv[:, :, 1]
        pos = jnp.arange(t)
        q, k = rope(q, pos, c.rope_theta), rope(k, pos, c.rope_theta)
        q = q * c.query_pre_attn_scalar ** -0.5
        q = q.reshape(b, t, c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim)
        logits = jnp.einsum("btkgh,bskh->bkgts", q, k)
        logits = jnp.tanh(logits / c.attn_softcap) * c.attn_softcap
        delta = pos[:, None] - pos[None, :]
        mask = delta >= 0
        mask = jnp.where(is_local, mask & (delta < c.sliding_window), mask)
        probs = jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1)
        ctx = jnp.einsum("bkgts,bskh->btkgh", probs, v).reshape(b, t, c.num_heads, c.head_dim)
        return fnn.DenseGeneral(c.hidden_size, axis=(-2, -1), use_bias=False, name="o")(ctx)


class FeedForward(fnn.Module):
    c: Config

    @fnn.compact
    def __call__(self, x):
        gate = fnn.Dense(self.c.intermediate_size, use_bias=False, name="gating")(x)
        up = fnn.Dense(self.c.intermediate_size, use_bias=False, name="linear_up")(x)
        return fnn.Dense(self.c.hidden_size, use_bias=False, name="linear_down")(fnn.gelu(gate) * up)


class Block(fnn.Module):
    c: Config

    @fnn.compact
    def __call__(self, x, is_local):
        eps = self.c.rms_eps
        h = Attention(self.c, name="attn")(RMSNorm(eps, name="pre_attn_norm")(x), is_local)
        x = x + RMSNorm(eps, name="post_attn_norm")(h)
        h = FeedForward(self.c, name="mlp")(RMSNorm(eps, name="pre_ffw_norm")(x))
        x = x + RMSNorm(eps, name="post_ffw_norm")(h)
        return x, None


class Transformer(fnn.Module):
    c: Config

    @fnn.compact
    def __call__(self, tokens):
        c = self.c
        embedder = fnn.Embed(c.vocab_size, c.hidden_size, name="embedder")
        x = embedder(tokens) * jnp.sqrt(c.hidden_size)
        local = jnp.arange(c.num_layers) % 2 == 0
        x, _ = fnn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0, length=c.num_layers
        )(c, name="layers")(x, local)
        x = RMSNorm(c.rms_eps, name="final_norm")(x)
        logits = embedder.attend(x)
        return jnp.tanh(logits / c.final_softcap) * c.final_softcap


def port(net, c):
    def one(layer):
        a, m = layer.self_attn, layer.mlp
        w = lambda lin: lin.weight.detach().numpy().T
        kv = np.stack([w(a.k_proj), w(a.v_proj)], 1).reshape(c.hidden_size, 2, c.num_kv_heads, c.head_dim)
        return {
            "attn": {
                "q": {"kernel": w(a.q_proj).reshape(c.hidden_size, c.num_heads, c.head_dim)},
                "kv": {"kernel": kv},
                "o": {"kernel": w(a.o_proj).reshape(c.num_heads, c.head_dim, c.hidden_size)},
            },
            "mlp": {
                "gating": {"kernel": w(m.gate_proj)},
                "linear_up": {"kernel": w(m.up_proj)},
                "linear_down": {"kernel": w(m.down_proj)},
            },
            "pre_attn_norm": {"scale": layer.input_layernorm.weight.detach().numpy()},
            "post_attn_norm": {"scale": layer.post_attention_layernorm.weight.detach().numpy()},
            "pre_ffw_norm": {"scale": layer.pre_feedforward_layernorm.weight.detach().numpy()},
            "post_ffw_norm": {"scale": layer.post_feedforward_layernorm.weight.detach().numpy()},
        }

    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *[one(layer) for layer in net.layers])
    embedding = jnp.asarray(net.embed_tokens.weight.detach().numpy())
    params = {
        "embedder": {"embedding": embedding},
        "layers": stacked,
        "final_norm": {"scale": jnp.asarray(net.norm.weight.detach().numpy())},
    }
    return {"params": params}


def build(seed):
    torch.manual_seed(seed)
    c = Config()
    net = GemmaForCausalLM(c).eval()
    for name, p in net.named_parameters():
        if "norm" in name:
            nn.init.normal_(p, 0.0, 0.4)
        elif "q_proj" in name or "k_proj" in name:
            nn.init.normal_(p, 0.0, 0.5)
    tokens = np.random.default_rng(seed).integers(0, c.vocab_size, (2, 9))
    return {"torch": net, "flax": (Transformer(c), port(net, c)), "inputs": tokens}


FAULTS = [
    {
        "title": "norm scales used as they are, without the 1",
        "edits": [("return x * rms * (1 + scale)", "return x * rms * scale")],
        "layers": ["layers.0.input_layernorm"],
        "causes": ["scale_plus_one"],
        "level": "outputs",
    },
    {
        "title": "soft cap after the mask, which so loses its strength",
        "edits": [
            ("        logits = jnp.tanh(logits / c.attn_softcap) * c.attn_softcap\n", ""),
            ("        probs = jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1)",
             "        logits = jnp.where(mask, logits, -1e30)\n"
             "        probs = jax.nn.softmax(jnp.tanh(logits / c.attn_softcap) * c.attn_softcap, axis=-1)"),
        ],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj"),
        "causes": ["order", "mask", "causal"],
        "level": "outputs",
    },
    {
        "title": "sliding window one step too wide",
        "edits": [("mask & (delta < c.sliding_window)", "mask & (delta <= c.sliding_window)")],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj"),
        "causes": ["mask", "size", "offset"],
        "level": "outputs",
    },
    {
        "title": "query heads grouped with their key heads the other way round",
        "edits": [
            ("q = q.reshape(b, t, c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim)",
             "q = q.reshape(b, t, c.num_heads // c.num_kv_heads, c.num_kv_heads, c.head_dim)"),
            ("\"btkgh,bskh->bkgts\"", "\"btgkh,bskh->bgkts\""),
            ("\"bkgts,bskh->btkgh\"", "\"bgkts,bskh->btgkh\""),
        ],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj"),
        "causes": ["rearranged", "heads"],
        "level": "outputs",
    },
    {
        "title": "token embeddings not multiplied by sqrt(hidden)",
        "edits": [("x = embedder(tokens) * jnp.sqrt(c.hidden_size)", "x = embedder(tokens)")],
        "layers": [""],
        "between": ("embed_tokens", "layers.0.input_layernorm"),
        "causes": ["scale", "left_out"],
        "level": "outputs",
    },
    {
        "title": "logits capped by a clip, not by a tanh",
        "edits": [("        return jnp.tanh(logits / c.final_softcap) * c.final_softcap", "        return jnp.clip(logits, -c.final_softcap, c.final_softcap)")],
        "layers": [""],
        "between": ("lm_head", None),
        "causes": ["operation", "activation"],
        "level": "outputs",
    },
    {
        "title": "stacked gate and up kernels exchanged",
        "edits": [("\"gating\": {\"kernel\": w(m.gate_proj)}", "\"gating\": {\"kernel\": w(m.up_proj)}"),
                  ("\"linear_up\": {\"kernel\": w(m.up_proj)}", "\"linear_up\": {\"kernel\": w(m.gate_proj)}")],
        "layers": ["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"],
        "causes": ["swapped"],
        "level": "outputs",
    },
    {
        "title": "the head is a kernel of its own, a copy of the embedding",
        "edits": [
            ("        logits = embedder.attend(x)", "        logits = fnn.Dense(c.vocab_size, use_bias=False, name=\"lm_head\")(x)"),
            ("        \"layers\": stacked,\n", "        \"layers\": stacked,\n        \"lm_head\": {\"kernel\": embedding.T},\n"),
        ],
        "layers": ["lm_head", "embed_tokens"],
        "causes": ["tied"],
        "level": "gradients",
    },
]
