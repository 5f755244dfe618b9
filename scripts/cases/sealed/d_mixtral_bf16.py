"""Mixtral-like sparse MoE decoder with bfloat16 parameters and float32 norms, softmax and router (nnx)."""
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn


class MixtralRMSNorm(nn.Module):
    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


def rotate_half(x):
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2:]
    return torch.cat((-x2, x1), dim=-1)


class MixtralAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        d = cfg.hidden_size
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)

    def forward(self, x, attention_mask):
        b, t, d = x.shape
        h, dh = self.cfg.num_heads, d // self.cfg.num_heads
        q, k, v = (p(x).view(b, t, h, dh).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        inv_freq = 1.0 / (self.cfg.rope_theta ** (torch.arange(0, dh, 2).float() / dh))
        freqs = torch.arange(t).float()[:, None] * inv_freq[None, :]
        emb = torch.cat((freqs, freqs), dim=-1)
        cos, sin = emb.cos().to(x.dtype), emb.sin().to(x.dtype)
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        scores = q @ k.transpose(2, 3) * dh ** -0.5
        allowed = torch.ones(t, t, dtype=torch.bool).tril()[None, None] & attention_mask[:, None, None, :].bool()
        scores = scores.masked_fill(~allowed, torch.finfo(torch.bfloat16).min)
        probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return self.o_proj((probs @ v).transpose(1, 2).reshape(b, t, d))


class MixtralExpert(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.w1 = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.w2 = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)
        self.w3 = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


class MixtralSparseMoe(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.top_k = cfg.top_k
        self.gate = nn.Linear(cfg.hidden_size, cfg.num_experts, bias=False)
        self.experts = nn.ModuleList([MixtralExpert(cfg) for _ in range(cfg.num_experts)])

    def forward(self, x):
        router_logits = self.gate(x)
        routing = torch.softmax(router_logits, dim=-1, dtype=torch.float32)
        weights, chosen = torch.topk(routing, self.top_k, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
        combine = torch.zeros_like(router_logits).scatter(-1, chosen, weights)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * combine[..., e: e + 1]
        return out, router_logits


class MixtralLayer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = MixtralRMSNorm(cfg.hidden_size, cfg.eps)
        self.self_attn = MixtralAttention(cfg)
        self.post_attention_layernorm = MixtralRMSNorm(cfg.hidden_size, cfg.eps)
        self.block_sparse_moe = MixtralSparseMoe(cfg)

    def forward(self, x, attention_mask):
        x = x + self.self_attn(self.input_layernorm(x), attention_mask)
        h, router_logits = self.block_sparse_moe(self.post_attention_layernorm(x))
        return x + h, router_logits


class Mixtral(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab, cfg.hidden_size)
        self.layers = nn.ModuleList([MixtralLayer(cfg) for _ in range(cfg.num_layers)])
        self.norm = MixtralRMSNorm(cfg.hidden_size, cfg.eps)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab, bias=False)

    def forward(self, input_ids, attention_mask):
        x = self.embed_tokens(input_ids)
        router = []
        for layer in self.layers:
            x, logits = layer(x, attention_mask)
            router.append(logits)
        return self.lm_head(self.norm(x)), torch.stack(router)


# ------------------------------------------------------------- Flax

BF16 = jnp.bfloat16


class RMSNorm(nnx.Module):
    def __init__(self, dim, eps):
        self.scale = nnx.Param(jnp.ones((dim,), BF16))
        self.eps = eps

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y / jnp.sqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.scale[...]


def rotary(x, theta):
    *_, t, _, dh = x.shape
    inv_freq = theta ** -(jnp.arange(0, dh, 2, dtype=jnp.float32) / dh)
    phase = jnp.arange(t, dtype=jnp.float32)[:, None, None] * inv_freq
    cos, sin = jnp.cos(phase).astype(x.dtype), jnp.sin(phase).astype(x.dtype)
    lo, hi = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([lo * cos - hi * sin, hi * cos + lo * sin], axis=-1)


class FlaxAttention(nnx.Module):
    def __init__(self, cfg, *, rngs):
        d = cfg.hidden_size
        make = lambda: nnx.Linear(d, d, use_bias=False, param_dtype=BF16, rngs=rngs)
        self.query, self.key, self.value, self.out = make(), make(), make(), make()
        self.cfg = cfg

    def __call__(self, x, attention_mask):
        b, t, d = x.shape
        split = lambda z: z.reshape(b, t, self.cfg.num_heads, -1)
        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        q, k = rotary(q, self.cfg.rope_theta), rotary(k, self.cfg.rope_theta)
        logits = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        mask = nnx.combine_masks(
            nnx.make_causal_mask(attention_mask, dtype=bool), attention_mask[:, None, None, :] > 0, dtype=bool
        )
        logits = jnp.where(mask, logits, jnp.finfo(BF16).min)
        weights = jax.nn.softmax(logits.astype(jnp.float32), axis=-1).astype(x.dtype)
        return self.out(jnp.einsum("bhts,bshd->bthd", weights, v).reshape(b, t, d))


class MoE(nnx.Module):
    """Experts in stacked kernels, every expert run densely."""

    def __init__(self, cfg, *, rngs):
        e, d, f = cfg.num_experts, cfg.hidden_size, cfg.intermediate_size
        self.router = nnx.Linear(d, e, use_bias=False, param_dtype=BF16, rngs=rngs)
        self.w_gate = nnx.Param(jnp.zeros((e, d, f), BF16))
        self.w_up = nnx.Param(jnp.zeros((e, d, f), BF16))
        self.w_down = nnx.Param(jnp.zeros((e, f, d), BF16))
        self.top_k = cfg.top_k

    def __call__(self, x):
        router_logits = self.router(x)
        probs = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)
        top, idx = jax.lax.top_k(probs, self.top_k)
        top = top / top.sum(axis=-1, keepdims=True)
        onehot = jax.nn.one_hot(idx, router_logits.shape[-1], dtype=top.dtype)
        combine = jnp.einsum("btk,btke->bte", top, onehot).astype(x.dtype)
        xe = jnp.broadcast_to(x[:, :, None, :], (*combine.shape, x.shape[-1]))
        gate = jnp.einsum("bted,edf->btef", xe, self.w_gate[...])
        up = jnp.einsum("bted,edf->btef", xe, self.w_up[...])
        down = jnp.einsum("btef,efd->bted", nnx.silu(gate) * up, self.w_down[...])
        return jnp.einsum("bted,bte->btd", down, combine), router_logits


class FlaxLayer(nnx.Module):
    def __init__(self, cfg, *, rngs):
        self.pre_attn = RMSNorm(cfg.hidden_size, cfg.eps)
        self.attn = FlaxAttention(cfg, rngs=rngs)
        self.pre_moe = RMSNorm(cfg.hidden_size, cfg.eps)
        self.moe = MoE(cfg, rngs=rngs)

    def __call__(self, x, attention_mask):
        x = x + self.attn(self.pre_attn(x), attention_mask)
        y, router_logits = self.moe(self.pre_moe(x))
        return x + y, router_logits


class FlaxMixtral(nnx.Module):
    def __init__(self, cfg, *, rngs):
        self.embed = nnx.Embed(cfg.vocab, cfg.hidden_size, param_dtype=BF16, rngs=rngs)
        self.layers = nnx.List([FlaxLayer(cfg, rngs=rngs) for _ in range(cfg.num_layers)])
        self.norm = RMSNorm(cfg.hidden_size, cfg.eps)
        self.unembed = nnx.Linear(cfg.hidden_size, cfg.vocab, use_bias=False, param_dtype=BF16, rngs=rngs)

    def __call__(self, input_ids, attention_mask):
        x = jnp.take(self.embed.embedding[...], input_ids, axis=0)
        all_logits = []
        for layer in self.layers:
            x, logits = layer(x, attention_mask)
            all_logits.append(logits)
        return self.unembed(self.norm(x)), jnp.stack(all_logits)


def port(net, model):
    get = lambda t: jnp.asarray(t.detach().float().numpy(), dtype=BF16)
    model.embed.embedding[...] = get(net.embed_tokens.weight)
    model.unembed.kernel[...] = get(net.lm_head.weight.T)
    model.norm.scale[...] = get(net.norm.weight)
    for src, dst in zip(net.layers, model.layers):
        dst.pre_attn.scale[...] = get(src.input_layernorm.weight)
        dst.pre_moe.scale[...] = get(src.post_attention_layernorm.weight)
        a = src.self_attn
        dst.attn.query.kernel[...] = get(a.q_proj.weight.T)
        dst.attn.key.kernel[...] = get(a.k_proj.weight.T)
        dst.attn.value.kernel[...] = get(a.v_proj.weight.T)
        dst.attn.out.kernel[...] = get(a.o_proj.weight.T)
        moe = src.block_sparse_moe
        dst.moe.router.kernel[...] = get(moe.gate.weight.T)
        dst.moe.w_gate[...] = jnp.stack([get(e.w1.weight.T) for e in moe.experts])
        dst.moe.w_up[...] = jnp.stack([get(e.w3.weight.T) for e in moe.experts])
        dst.moe.w_down[...] = jnp.stack([get(e.w2.weight.T) for e in moe.experts])
    return model


def build(seed):
    torch.manual_seed(seed)
    common = dict(vocab=31, hidden_size=16, intermediate_size=22, num_layers=2, num_heads=2, num_experts=5, top_k=2)
    cfg = SimpleNamespace(**common, eps=1e-5, rope_theta=1e4)
    net = Mixtral(cfg).eval()
    nn.init.normal_(net.embed_tokens.weight, 0, 0.02)
    for name, p in net.named_parameters():
        if "norm" in name:
            nn.init.uniform_(p, 0.5, 1.5)
        elif "gate" in name or "q_proj" in name or "k_proj" in name:
            nn.init.normal_(p, 0, 0.5)
    net = net.to(torch.bfloat16)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 31, (2, 7))
    mask = np.ones((2, 7), np.int32)
    mask[1, :2] = 0
    flax_cfg = SimpleNamespace(**common, eps=cfg.eps, rope_theta=cfg.rope_theta)
    model = port(net, FlaxMixtral(flax_cfg, rngs=nnx.Rngs(0)))
    return {"torch": net, "flax": model, "inputs": {"input_ids": tokens, "attention_mask": mask}}


FAULTS = [
    {
        "title": "weights of the chosen experts not normalised again",
        "edits": [("        top = top / top.sum(axis=-1, keepdims=True)\n", "")],
        "layers": ["layers.0.block_sparse_moe"],
        "between": ("layers.0.block_sparse_moe.gate", "layers.0.block_sparse_moe.experts.0.w1"),
        "causes": ["left_out", "scale"],
        "level": "outputs",
    },
    {
        "title": "router's softmax in bfloat16",
        "edits": [("probs = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)", "probs = jax.nn.softmax(router_logits.astype(BF16), axis=-1)")],
        "layers": ["layers.0.block_sparse_moe"],
        "between": ("layers.0.block_sparse_moe.gate", "layers.0.block_sparse_moe.experts.0.w1"),
        "causes": ["dtype"],
        "level": "outputs",
    },
    {
        "title": "epsilon of the Flax half is 1e-6",
        "edits": [("eps=cfg.eps, rope_theta=cfg.rope_theta", "eps=1e-6, rope_theta=cfg.rope_theta")],
        "layers": ["layers.0.input_layernorm"],
        "causes": ["epsilon"],
        "level": "outputs",
    },
    {
        "title": "rotary over even and odd features",
        "edits": [(
            "    lo, hi = jnp.split(x, 2, axis=-1)\n    return jnp.concatenate([lo * cos - hi * sin, hi * cos + lo * sin], axis=-1)",
            "    lo, hi = x[..., ::2], x[..., 1::2]\n    return jnp.stack([lo * cos - hi * sin, hi * cos + lo * sin], axis=-1).reshape(x.shape)",
        )],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj"),
        "causes": ["rope", "rearranged"],
        "level": "outputs",
    },
    {
        "title": "the experts' inputs are weighted, not their outputs",
        "edits": [
            ("        gate = jnp.einsum(\"bted,edf->btef\", xe,", "        xe = xe * combine[..., None]\n        gate = jnp.einsum(\"bted,edf->btef\", xe,"),
            ("jnp.einsum(\"bted,bte->btd\", down, combine)", "down.sum(axis=2)"),
        ],
        "layers": ["layers.0.block_sparse_moe"],
        "between": ("layers.0.block_sparse_moe.gate", "layers.0.block_sparse_moe.experts.0.w1"),
        "causes": ["order", "scale"],
        "level": "outputs",
    },
    {
        "title": "square output kernel copied without its transposition",
        "edits": [("get(a.o_proj.weight.T)", "get(a.o_proj.weight)")],
        "layers": ["layers.0.self_attn.o_proj"],
        "causes": ["transposed"],
        "level": "outputs",
    },
    {
        "title": "no gradient through the combination weights",
        "edits": [("jnp.einsum(\"btk,btke->bte\", top, onehot)", "jnp.einsum(\"btk,btke->bte\", jax.lax.stop_gradient(top), onehot)")],
        "layers": ["layers.0.block_sparse_moe", "layers.0.block_sparse_moe.gate"],
        "between": ("layers.0.block_sparse_moe.gate", "layers.0.block_sparse_moe.experts.0.w1"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "padding mask applied to the queries' rows",
        "edits": [("attention_mask[:, None, None, :] > 0", "attention_mask[:, None, :, None] > 0")],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj"),
        "causes": ["mask", "axis"],
        "level": "outputs",
    },
]
