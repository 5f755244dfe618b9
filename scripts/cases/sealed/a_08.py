"""Mixtral-like mixture of experts, top-2 of 11, with a load-balancing loss as a second output; Linen, stacked expert kernels."""
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class MoEConfig:
    vocab: int = 29
    hidden: int = 16
    ffn: int = 20
    heads: int = 4
    kv_heads: int = 2
    layers: int = 2
    experts: int = 11
    top_k: int = 2
    eps: float = 1e-5
    theta: float = 1e6


class MixtralRMSNorm(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(c.hidden)), c.eps

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class MixtralAttention(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, self.d = c, c.hidden // c.heads
        self.q_proj = torch.nn.Linear(c.hidden, c.hidden, bias=False)
        self.k_proj = torch.nn.Linear(c.hidden, c.kv_heads * self.d, bias=False)
        self.v_proj = torch.nn.Linear(c.hidden, c.kv_heads * self.d, bias=False)
        self.o_proj = torch.nn.Linear(c.hidden, c.hidden, bias=False)

    def rope(self, x):
        inv = 1.0 / self.c.theta ** (torch.arange(0, self.d, 2, dtype=x.dtype) / self.d)
        ang = torch.outer(torch.arange(x.shape[2], dtype=x.dtype), inv).repeat(1, 2)
        a, b = x.chunk(2, dim=-1)
        return x * ang.cos() + torch.cat([-b, a], dim=-1) * ang.sin()

    def forward(self, x):
        b, s, h = x.shape
        q, k, v = (p(x).view(b, s, -1, self.d).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(self.rope(q), self.rope(k), v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, s, h))


class MixtralBlockSparseTop2MLP(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.w1 = torch.nn.Linear(c.hidden, c.ffn, bias=False)
        self.w2 = torch.nn.Linear(c.ffn, c.hidden, bias=False)
        self.w3 = torch.nn.Linear(c.hidden, c.ffn, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MixtralSparseMoeBlock(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.gate = torch.nn.Linear(c.hidden, c.experts, bias=False)
        self.experts = torch.nn.ModuleList([MixtralBlockSparseTop2MLP(c) for _ in range(c.experts)])

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        router_logits = self.gate(flat)
        weights, selected = torch.topk(F.softmax(router_logits, dim=1), self.c.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        final = torch.zeros_like(flat)
        chosen = F.one_hot(selected, self.c.experts).permute(2, 1, 0)
        for e, expert in enumerate(self.experts):
            idx, top_x = torch.where(chosen[e])
            final.index_add_(0, top_x, expert(flat[top_x]) * weights[top_x, idx, None])
        return final.view(x.shape), router_logits


class MixtralDecoderLayer(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm, self.self_attn = MixtralRMSNorm(c), MixtralAttention(c)
        self.post_attention_layernorm, self.block_sparse_moe = MixtralRMSNorm(c), MixtralSparseMoeBlock(c)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        out, router_logits = self.block_sparse_moe(self.post_attention_layernorm(x))
        return x + out, router_logits


def load_balancing_loss(all_logits, c):
    probs = F.softmax(torch.cat(all_logits), dim=-1)
    _, selected = torch.topk(probs, c.top_k, dim=-1)
    tokens_per_expert = F.one_hot(selected, c.experts).to(probs.dtype).mean(dim=0)
    return torch.sum(tokens_per_expert * probs.mean(dim=0).unsqueeze(0)) * c.experts


class Mixtral(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed_tokens = torch.nn.Embedding(c.vocab, c.hidden)
        self.layers = torch.nn.ModuleList([MixtralDecoderLayer(c) for _ in range(c.layers)])
        self.norm = MixtralRMSNorm(c)
        self.lm_head = torch.nn.Linear(c.hidden, c.vocab, bias=False)

    def forward(self, input_ids):
        x, all_logits = self.embed_tokens(input_ids), []
        for layer in self.layers:
            x, router_logits = layer(x)
            all_logits.append(router_logits)
        return self.lm_head(self.norm(x)), load_balancing_loss(all_logits, self.c)


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        w = self.param("weight", nn.initializers.ones_init(), (x.shape[-1],))
        return w * x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + self.eps)


def rotate(x, theta):
    d = x.shape[-1]
    ang = jnp.outer(jnp.arange(x.shape[1]), theta ** (-jnp.arange(0, d, 2) / d))[:, None, :]
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return jnp.concatenate([a * jnp.cos(ang) - b * jnp.sin(ang), b * jnp.cos(ang) + a * jnp.sin(ang)], -1)


class Attention(nn.Module):
    c: MoEConfig

    @nn.compact
    def __call__(self, x):
        c, (b, s, h) = self.c, x.shape
        d = c.hidden // c.heads
        q = nn.Dense(h, use_bias=False, name="q_proj")(x).reshape(b, s, c.heads, d)
        k = nn.Dense(c.kv_heads * d, use_bias=False, name="k_proj")(x).reshape(b, s, c.kv_heads, d)
        v = nn.Dense(c.kv_heads * d, use_bias=False, name="v_proj")(x).reshape(b, s, c.kv_heads, d)
        q, k = rotate(q, c.theta), rotate(k, c.theta)
        k, v = (jnp.repeat(y, c.heads // c.kv_heads, axis=2) for y in (k, v))
        mask = jnp.tril(jnp.ones((1, 1, s, s), bool))
        y = nn.dot_product_attention(q, k, v, mask=mask)
        return nn.Dense(h, use_bias=False, name="o_proj")(y.reshape(b, s, h))


class SparseMoe(nn.Module):
    c: MoEConfig

    @nn.compact
    def __call__(self, x):
        c = self.c
        init = nn.initializers.lecun_normal()
        w1 = self.param("w1", init, (c.experts, c.hidden, c.ffn))
        w2 = self.param("w2", init, (c.experts, c.ffn, c.hidden))
        w3 = self.param("w3", init, (c.experts, c.hidden, c.ffn))
        flat = x.reshape(-1, c.hidden)
        router_logits = nn.Dense(c.experts, use_bias=False, name="gate")(flat)
        probs = jax.nn.softmax(router_logits, axis=-1)
        weights, selected = jax.lax.top_k(probs, c.top_k)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        dispatch = jax.nn.one_hot(selected, c.experts, dtype=weights.dtype)
        combine = jnp.einsum("nk,nke->ne", weights, dispatch)
        hidden = nn.silu(jnp.einsum("nd,edf->nef", flat, w1)) * jnp.einsum("nd,edf->nef", flat, w3)
        out = jnp.einsum("nef,efd,ne->nd", hidden, w2, combine)
        return out.reshape(x.shape), router_logits


class DecoderLayer(nn.Module):
    c: MoEConfig

    @nn.compact
    def __call__(self, x):
        x = x + Attention(self.c, name="self_attn")(RMSNorm(self.c.eps, name="input_layernorm")(x))
        y = RMSNorm(self.c.eps, name="post_attention_layernorm")(x)
        out, router_logits = SparseMoe(self.c, name="moe")(y)
        return x + out, router_logits


def balance_loss(router_logits, c):
    probs = jax.nn.softmax(jnp.concatenate(router_logits, axis=0), axis=-1)
    _, selected = jax.lax.top_k(probs, c.top_k)
    fraction = jnp.mean(jax.nn.one_hot(selected, c.experts), axis=0)
    return c.experts * jnp.sum(fraction * jnp.mean(probs, axis=0)[None])


class FlaxMixtral(nn.Module):
    c: MoEConfig

    @nn.compact
    def __call__(self, tokens):
        x, collected = nn.Embed(self.c.vocab, self.c.hidden, name="embed_tokens")(tokens), []
        for i in range(self.c.layers):
            x, router_logits = DecoderLayer(self.c, name=f"layers_{i}")(x)
            collected.append(router_logits)
        x = RMSNorm(self.c.eps, name="norm")(x)
        return nn.Dense(self.c.vocab, use_bias=False, name="lm_head")(x), balance_loss(collected, self.c)


def port(net, c):
    sd = {k: jnp.asarray(v.numpy()) for k, v in net.state_dict().items()}
    dense = lambda name: {"kernel": sd[name + ".weight"].T}
    params = {"embed_tokens": {"embedding": sd["embed_tokens.weight"]}, "norm": {"weight": sd["norm.weight"]},
              "lm_head": dense("lm_head")}
    for i in range(c.layers):
        pre = f"layers.{i}."
        order = range(c.experts)
        moe = {w: jnp.stack([sd[f"{pre}block_sparse_moe.experts.{e}.{w}.weight"].T for e in order]) for w in ("w1", "w2", "w3")}
        params[f"layers_{i}"] = {
            "input_layernorm": {"weight": sd[pre + "input_layernorm.weight"]},
            "post_attention_layernorm": {"weight": sd[pre + "post_attention_layernorm.weight"]},
            "self_attn": {n: dense(f"{pre}self_attn.{n}") for n in ("q_proj", "k_proj", "v_proj", "o_proj")},
            "moe": {"gate": dense(pre + "block_sparse_moe.gate"), **moe},
        }
    return params


def build(seed):
    torch.manual_seed(seed)
    c = MoEConfig()
    net = Mixtral(c).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(0, 0.4)
    tokens = np.random.default_rng(seed).integers(0, c.vocab, (3, 9))
    return {"torch": net, "flax": (FlaxMixtral(c), {"params": port(net, c)}), "inputs": tokens}


FAULTS = [
    {
        "title": "weights of the two experts not made to sum to one",
        "edits": [("        weights = weights / weights.sum(axis=-1, keepdims=True)\n", "")],
        "layers": ["layers.0.block_sparse_moe"],
        "between": ("layers.0.block_sparse_moe.gate", "layers.0.block_sparse_moe.experts.0.w1"),
        "causes": ["left_out", "scale"],
        "level": "outputs",
    },
    {
        "title": "router's softmax over the tokens",
        "edits": [("jax.nn.softmax(router_logits, axis=-1)", "jax.nn.softmax(router_logits, axis=0)")],
        "layers": ["layers.0.block_sparse_moe"],
        "between": ("layers.0.block_sparse_moe.gate", "layers.0.block_sparse_moe.experts.0.w1"),
        "causes": ["softmax_axis", "axis"],
        "level": "outputs",
    },
    {
        "title": "experts stacked in the order of their names as strings (0, 1, 10, 2, ...)",
        "edits": [("order = range(c.experts)", "order = sorted(range(c.experts), key=str)")],
        "layers": ["layers.0.block_sparse_moe.experts.2.w1"],
        "causes": ["permuted", "swapped"],
        "level": "outputs",
    },
    {
        "title": "no gradient through the routing weights",
        "edits": [('combine = jnp.einsum("nk,nke->ne", weights, dispatch)', 'combine = jax.lax.stop_gradient(jnp.einsum("nk,nke->ne", weights, dispatch))')],
        "layers": ["layers.0.block_sparse_moe", "layers.1.block_sparse_moe"],
        "between": ("layers.0.block_sparse_moe.gate", "layers.0.block_sparse_moe.experts.0.w1"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "experts fed with the value before the norm",
        "edits": [("    def __call__(self, x):\n        c = self.c\n        init =", "    def __call__(self, x, raw):\n        c = self.c\n        init ="),
                  ("        flat = x.reshape(-1, c.hidden)\n", "        flat = raw.reshape(-1, c.hidden)\n"),
                  ('name="gate")(flat)', 'name="gate")(x.reshape(-1, c.hidden))'),
                  ('SparseMoe(self.c, name="moe")(y)', 'SparseMoe(self.c, name="moe")(y, x)')],
        "layers": ["layers.0.block_sparse_moe", "layers.0"],
        "between": ("layers.0.block_sparse_moe.gate", "layers.0.block_sparse_moe.experts.0.w1"),
        "causes": ["wiring", "operand"],
        "level": "outputs",
    },
    {
        "title": "the least probable experts are taken",
        "edits": [("        weights, selected = jax.lax.top_k(probs, c.top_k)\n",
                   "        selected = jnp.argsort(probs, axis=-1)[:, : c.top_k]\n        weights = jnp.take_along_axis(probs, selected, axis=-1)\n")],
        "layers": ["layers.0.block_sparse_moe"],
        "between": ("layers.0.block_sparse_moe.gate", "layers.0.block_sparse_moe.experts.0.w1"),
        "causes": ["operation", "reversed", "order"],
        "level": "outputs",
    },
    {
        "title": "both experts weighted by the first one's weight",
        "edits": [('jnp.einsum("nk,nke->ne", weights, dispatch)', 'jnp.einsum("nk,nke->ne", weights[:, :1], dispatch)')],
        "layers": ["layers.0.block_sparse_moe"],
        "between": ("layers.0.block_sparse_moe.gate", "layers.0.block_sparse_moe.experts.0.w1"),
        "causes": ["operand"],
        "level": "outputs",
    },
    {
        "title": "balancing loss counts the first choice only",
        "edits": [("    _, selected = jax.lax.top_k(probs, c.top_k)\n", "    selected = jnp.argmax(probs, axis=-1)[:, None]\n")],
        "layers": [""],
        "between": ("lm_head", None),
        "causes": ["size", "left_out"],
        "level": "outputs",
    },
]
