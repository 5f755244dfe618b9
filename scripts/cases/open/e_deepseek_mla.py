"""DeepSeek-V3-like decoder: multi-head latent attention with a decoupled rotary part, group-limited MoE."""
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn


@dataclass
class DeepseekConfig:
    vocab_size: int = 29
    pad_token_id: int = 0
    hidden_size: int = 24
    num_layers: int = 2
    num_heads: int = 3
    q_lora_rank: int = 14
    kv_lora_rank: int = 10
    qk_nope_head_dim: int = 6
    qk_rope_head_dim: int = 4
    v_head_dim: int = 7
    intermediate_size: int = 20
    moe_intermediate_size: int = 9
    n_routed_experts: int = 8
    n_group: int = 2
    topk_group: int = 1
    num_experts_per_tok: int = 3
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 1
    rope_theta: float = 10000.0
    rope_factor: float = 40.0
    mscale_all_dim: float = 1.0
    rms_norm_eps: float = 1e-6


def yarn_get_mscale(scale, mscale):
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


class DeepseekRMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.variance_epsilon = eps

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def rotate_half(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def apply_rotary_pos_emb(x, cos, sin):
    b, h, s, d = x.shape
    x = x.view(b, h, s, d // 2, 2).transpose(4, 3).reshape(b, h, s, d)
    return x * cos + rotate_half(x) * sin


class DeepseekAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q_head_dim = c.qk_nope_head_dim + c.qk_rope_head_dim
        self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False)
        self.q_a_layernorm = DeepseekRMSNorm(c.q_lora_rank, c.rms_norm_eps)
        self.q_b_proj = nn.Linear(c.q_lora_rank, c.num_heads * self.q_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = DeepseekRMSNorm(c.kv_lora_rank, c.rms_norm_eps)
        self.kv_b_proj = nn.Linear(c.kv_lora_rank, c.num_heads * (c.qk_nope_head_dim + c.v_head_dim), bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.v_head_dim, c.hidden_size, bias=False)
        m = yarn_get_mscale(c.rope_factor, c.mscale_all_dim)
        self.softmax_scale = self.q_head_dim ** -0.5 * m * m

    def forward(self, x):
        c = self.c
        b, s, _ = x.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(b, s, c.num_heads, self.q_head_dim).transpose(1, 2)
        q_nope, q_pe = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        ckv, k_pe = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        k_pe = k_pe.view(b, s, 1, c.qk_rope_head_dim).transpose(1, 2)
        kv = self.kv_b_proj(self.kv_a_layernorm(ckv))
        kv = kv.view(b, s, c.num_heads, c.qk_nope_head_dim + c.v_head_dim).transpose(1, 2)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        d = c.qk_rope_head_dim
        inv_freq = 1.0 / c.rope_theta ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
        freqs = torch.outer(torch.arange(s, dtype=torch.float64), inv_freq)
        emb = torch.cat((freqs, freqs), dim=-1)
        cos, sin = emb.cos().to(x.dtype), emb.sin().to(x.dtype)
        q_pe, k_pe = apply_rotary_pos_emb(q_pe, cos, sin), apply_rotary_pos_emb(k_pe, cos, sin)
        query = torch.cat([q_nope, q_pe], dim=-1)
        key = torch.cat([k_nope, k_pe.expand(-1, c.num_heads, -1, -1)], dim=-1)
        scores = query @ key.transpose(2, 3) * self.softmax_scale
        scores = scores.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), float("-inf"))
        out = F.softmax(scores, dim=-1) @ v
        return self.o_proj(out.transpose(1, 2).reshape(b, s, -1))


class DeepseekMLP(nn.Module):
    def __init__(self, c, width):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, c.hidden_size, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MoEGate(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.weight = nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size))
        self.e_score_correction_bias = nn.Parameter(torch.empty(c.n_routed_experts))

    def forward(self, x):
        c = self.c
        scores = F.linear(x, self.weight).sigmoid()
        choice = scores + self.e_score_correction_bias
        n = x.shape[0]
        group_scores = choice.view(n, c.n_group, -1).topk(2, dim=-1)[0].sum(dim=-1)
        group_idx = group_scores.topk(c.topk_group, dim=-1)[1]
        group_mask = torch.zeros_like(group_scores).scatter_(1, group_idx, 1)
        mask = group_mask.repeat_interleave(c.n_routed_experts // c.n_group, dim=1)
        idx = choice.masked_fill(mask == 0, float("-inf")).topk(c.num_experts_per_tok, dim=-1)[1]
        weight = scores.gather(1, idx)
        weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20)
        return idx, weight * c.routed_scaling_factor


class DeepseekMoE(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate = MoEGate(c)
        self.experts = nn.ModuleList(DeepseekMLP(c, c.moe_intermediate_size) for _ in range(c.n_routed_experts))
        self.shared_experts = DeepseekMLP(c, c.moe_intermediate_size)

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        idx, weight = self.gate(flat)
        y = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            rows, slot = torch.where(idx == e)
            if rows.numel():
                y.index_add_(0, rows, expert(flat[rows]) * weight[rows, slot, None])
        return y.view_as(x) + self.shared_experts(x)


class DeepseekLayer(nn.Module):
    def __init__(self, c, i):
        super().__init__()
        self.self_attn = DeepseekAttention(c)
        self.mlp = DeepseekMLP(c, c.intermediate_size) if i < c.first_k_dense_replace else DeepseekMoE(c)
        self.input_layernorm = DeepseekRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = DeepseekRMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class DeepseekForCausalLM(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size, padding_idx=c.pad_token_id)
        self.layers = nn.ModuleList(DeepseekLayer(c, i) for i in range(c.num_layers))
        self.norm = DeepseekRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(self, input_ids):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def dense(n_in, n_out, rngs):
    return nnx.Linear(n_in, n_out, use_bias=False, rngs=rngs)


def rope_interleaved(x, theta):
    """x: (batch, length, heads, dim); neighbouring channels form the pairs."""
    dim = x.shape[-1]
    freq = theta ** (-jnp.arange(0, dim, 2) / dim)
    angle = (jnp.arange(x.shape[1])[:, None] * freq)[None, :, None, :]
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


class MLA(nnx.Module):
    def __init__(self, c, rngs):
        self.c = c
        self.qk_head_dim = c.qk_nope_head_dim + c.qk_rope_head_dim
        self.wq_a = dense(c.hidden_size, c.q_lora_rank, rngs)
        self.q_norm = nnx.RMSNorm(c.q_lora_rank, epsilon=c.rms_norm_eps, rngs=rngs)
        self.wq_b = dense(c.q_lora_rank, c.num_heads * self.qk_head_dim, rngs)
        self.wkv_a = dense(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, rngs)
        self.kv_norm = nnx.RMSNorm(c.kv_lora_rank, epsilon=c.rms_norm_eps, rngs=rngs)
        self.wkv_b = dense(c.kv_lora_rank, c.num_heads * (c.qk_nope_head_dim + c.v_head_dim), rngs)
        self.wo = dense(c.num_heads * c.v_head_dim, c.hidden_size, rngs)
        mscale = 0.1 * c.mscale_all_dim * math.log(c.rope_factor) + 1.0
        self.softmax_scale = self.qk_head_dim ** -0.5 * mscale * mscale

    def __call__(self, x):
        c = self.c
        b, s, _ = x.shape
        q = self.wq_b(self.q_norm(self.wq_a(x))).reshape(b, s, c.num_heads, self.qk_head_dim)
        q_nope, q_pe = jnp.split(q, [c.qk_nope_head_dim], axis=-1)
        c_kv, k_pe = jnp.split(self.wkv_a(x), [c.kv_lora_rank], axis=-1)
        q_pe = rope_interleaved(q_pe, c.rope_theta)
        k_pe = rope_interleaved(k_pe[:, :, None, :], c.rope_theta)[:, :, 0]
        kv = self.wkv_b(self.kv_norm(c_kv))
        kv = kv.reshape(b, s, c.num_heads, c.qk_nope_head_dim + c.v_head_dim)
        k_nope, v = jnp.split(kv, [c.qk_nope_head_dim], axis=-1)
        logits = jnp.einsum("bshd,bthd->bhst", q_nope, k_nope) + jnp.einsum("bshd,btd->bhst", q_pe, k_pe)
        logits = logits * self.softmax_scale
        logits = jnp.where(jnp.tril(jnp.ones((s, s), bool)), logits, -jnp.inf)
        out = jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(logits, axis=-1), v)
        return self.wo(out.reshape(b, s, -1))


class GatedMLP(nnx.Module):
    def __init__(self, c, width, rngs):
        self.w1, self.w3 = dense(c.hidden_size, width, rngs), dense(c.hidden_size, width, rngs)
        self.w2 = dense(width, c.hidden_size, rngs)

    def __call__(self, x):
        return self.w2(nnx.silu(self.w1(x)) * self.w3(x))


class MoE(nnx.Module):
    def __init__(self, c, rngs):
        self.c = c
        e, d, f = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        self.router = nnx.Param(jnp.zeros((d, e)))
        self.router_bias = nnx.Param(jnp.zeros((e,)))
        self.w1, self.w3 = nnx.Param(jnp.zeros((e, d, f))), nnx.Param(jnp.zeros((e, d, f)))
        self.w2 = nnx.Param(jnp.zeros((e, f, d)))
        self.shared = GatedMLP(c, f, rngs)

    def route(self, x):
        c = self.c
        scores = jax.nn.sigmoid(x @ self.router[...])
        biased = scores + self.router_bias[...]
        grouped = biased.reshape(-1, c.n_group, c.n_routed_experts // c.n_group)
        group_scores = jax.lax.top_k(grouped, 2)[0].sum(-1)
        _, chosen = jax.lax.top_k(group_scores, c.topk_group)
        allowed = jax.nn.one_hot(chosen, c.n_group).sum(1) > 0
        candidates = jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(biased.shape)
        _, idx = jax.lax.top_k(candidates, c.num_experts_per_tok)
        weight = jnp.take_along_axis(scores, idx, axis=-1)
        weight = weight / (weight.sum(-1, keepdims=True) + 1e-20) * c.routed_scaling_factor
        return jnp.zeros_like(scores).at[jnp.arange(len(x))[:, None], idx].set(weight)

    def __call__(self, x):
        flat = x.reshape(-1, x.shape[-1])
        combine = self.route(flat)
        hidden = nnx.silu(jnp.einsum("nd,edf->nef", flat, self.w1[...])) * jnp.einsum("nd,edf->nef", flat, self.w3[...])
        routed = jnp.einsum("nef,efd,ne->nd", hidden, self.w2[...], combine)
        return routed.reshape(x.shape) + self.shared(x)


class Block(nnx.Module):
    def __init__(self, c, i, rngs):
        self.attn_norm = nnx.RMSNorm(c.hidden_size, epsilon=c.rms_norm_eps, rngs=rngs)
        self.ffn_norm = nnx.RMSNorm(c.hidden_size, epsilon=c.rms_norm_eps, rngs=rngs)
        self.attn = MLA(c, rngs)
        self.ffn = GatedMLP(c, c.intermediate_size, rngs) if i < c.first_k_dense_replace else MoE(c, rngs)

    def __call__(self, x):
        x = x + self.attn(self.attn_norm(x))
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nnx.Module):
    def __init__(self, c, rngs):
        self.pad = c.pad_token_id
        self.embed = nnx.Embed(c.vocab_size, c.hidden_size, rngs=rngs)
        self.layers = nnx.List([Block(c, i, rngs) for i in range(c.num_layers)])
        self.norm = nnx.RMSNorm(c.hidden_size, epsilon=c.rms_norm_eps, rngs=rngs)
        self.head = dense(c.hidden_size, c.vocab_size, rngs)

    def __call__(self, input_ids):
        x = self.embed(input_ids)
        x = jnp.where((input_ids == self.pad)[..., None], jax.lax.stop_gradient(x), x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def port(net, model):
    a = lambda t: jnp.asarray(t.detach().numpy())

    def linear(dst, src):
        dst.kernel[...] = a(src.weight.T)

    def mlp(dst, src):
        linear(dst.w1, src.gate_proj)
        linear(dst.w3, src.up_proj)
        linear(dst.w2, src.down_proj)

    model.embed.embedding[...] = a(net.embed_tokens.weight)
    model.norm.scale[...] = a(net.norm.weight)
    linear(model.head, net.lm_head)
    for dst, src in zip(model.layers, net.layers):
        dst.attn_norm.scale[...] = a(src.input_layernorm.weight)
        dst.ffn_norm.scale[...] = a(src.post_attention_layernorm.weight)
        for ours, theirs in [("wq_a", "q_a_proj"), ("wq_b", "q_b_proj"), ("wkv_a", "kv_a_proj_with_mqa"),
                             ("wkv_b", "kv_b_proj"), ("wo", "o_proj")]:
            linear(getattr(dst.attn, ours), getattr(src.self_attn, theirs))
        dst.attn.q_norm.scale[...] = a(src.self_attn.q_a_layernorm.weight)
        dst.attn.kv_norm.scale[...] = a(src.self_attn.kv_a_layernorm.weight)
        if isinstance(src.mlp, DeepseekMoE):
            experts = src.mlp.experts
            dst.ffn.router[...] = a(src.mlp.gate.weight.T)
            dst.ffn.router_bias[...] = a(src.mlp.gate.e_score_correction_bias)
            dst.ffn.w1[...] = jnp.stack([a(e.gate_proj.weight.T) for e in experts])
            dst.ffn.w3[...] = jnp.stack([a(e.up_proj.weight.T) for e in experts])
            dst.ffn.w2[...] = jnp.stack([a(e.down_proj.weight.T) for e in experts])
            mlp(dst.ffn.shared, src.mlp.shared_experts)
        else:
            mlp(dst.ffn, src.mlp)
    return model


def build(seed):
    torch.manual_seed(seed)
    c = DeepseekConfig()
    net = DeepseekForCausalLM(c).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(1 + 0.2 * torch.randn_like(p) if "norm" in name else 0.35 * torch.randn_like(p))
    ids = np.random.default_rng(seed).integers(1, c.vocab_size, size=(2, 7))
    ids[0, 5:] = c.pad_token_id
    return {"torch": net, "flax": port(net, Transformer(c, nnx.Rngs(0))), "inputs": {"input_ids": ids}}


FAULTS = [
    {
        "title": "YaRN's mscale enters the softmax scale once, not squared",
        "edits": [("self.qk_head_dim ** -0.5 * mscale * mscale", "self.qk_head_dim ** -0.5 * mscale")],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.kv_b_proj", "layers.0.self_attn.o_proj"),
        "causes": ["scale"],
        "level": "outputs",
    },
    {
        "title": "expert weights gathered from the bias-corrected scores",
        "edits": [("jnp.take_along_axis(scores, idx, axis=-1)", "jnp.take_along_axis(biased, idx, axis=-1)")],
        "layers": ["layers.1.mlp.gate"],
        "causes": ["operand"],
        "level": "outputs",
    },
    {
        "title": "group score is the group's best expert (V2), not the sum of the best two (V3)",
        "edits": [("jax.lax.top_k(grouped, 2)[0].sum(-1)", "grouped.max(-1)")],
        "layers": ["layers.1.mlp.gate"],
        "causes": ["operation"],
        "level": "outputs",
    },
    {
        "title": "rotary part of the compressed kv taken from the front",
        "edits": [("c_kv, k_pe = jnp.split(self.wkv_a(x), [c.kv_lora_rank], axis=-1)",
                   "k_pe, c_kv = jnp.split(self.wkv_a(x), [c.qk_rope_head_dim], axis=-1)")],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.kv_a_proj_with_mqa", "layers.0.self_attn.kv_a_layernorm"),
        "causes": ["rearranged", "blocks"],
        "level": "outputs",
    },
    {
        "title": "all k_nope, then all v, instead of k_nope and v within every head",
        "edits": [("        kv = kv.reshape(b, s, c.num_heads, c.qk_nope_head_dim + c.v_head_dim)\n"
                   "        k_nope, v = jnp.split(kv, [c.qk_nope_head_dim], axis=-1)\n",
                   "        k_nope, v = jnp.split(kv, [c.num_heads * c.qk_nope_head_dim], axis=-1)\n"
                   "        k_nope, v = k_nope.reshape(b, s, c.num_heads, -1), v.reshape(b, s, c.num_heads, -1)\n")],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.kv_b_proj", "layers.0.self_attn.o_proj"),
        "causes": ["rearranged", "blocks", "heads"],
        "level": "outputs",
    },
    {
        "title": "rotate-half pairs where DeepSeek's channels are interleaved",
        "edits": [("even, odd = x[..., 0::2], x[..., 1::2]", "even, odd = jnp.split(x, 2, axis=-1)"),
                  ("jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)",
                   "jnp.concatenate([even * cos - odd * sin, even * sin + odd * cos], axis=-1)")],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.kv_b_proj", "layers.0.self_attn.o_proj"),
        "causes": ["rope"],
        "level": "outputs",
    },
    {
        "title": "gate and up of the stacked experts exchanged",
        "edits": [("dst.ffn.w1[...] = jnp.stack([a(e.gate_proj", "dst.ffn.w1[...] = jnp.stack([a(e.up_proj"),
                  ("dst.ffn.w3[...] = jnp.stack([a(e.up_proj", "dst.ffn.w3[...] = jnp.stack([a(e.gate_proj")],
        "layers": ["layers.1.mlp.experts.0.gate_proj", "layers.1.mlp.experts.0.up_proj", "layers.1.mlp.experts.0"],
        "causes": ["swapped"],
        "level": "outputs",
    },
    {
        "title": "the padding token's embedding is trained",
        "edits": [("        x = jnp.where((input_ids == self.pad)[..., None], jax.lax.stop_gradient(x), x)\n", "")],
        "layers": ["embed_tokens"],
        "causes": ["padding_idx"],
        "level": "gradients",
    },
]
