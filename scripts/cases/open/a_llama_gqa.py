"""Llama-like decoder: grouped-query attention, RoPE in halves with linear scaling, SwiGLU, own RMSNorm."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn


@dataclasses.dataclass
class Config:
    vocab_size: int = 31
    hidden_size: int = 24
    intermediate_size: int = 40
    num_hidden_layers: int = 2
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_factor: float = 2.0


class LlamaRMSNorm(nn.Module):
    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


class LlamaRotaryEmbedding(nn.Module):
    def __init__(self, dim, base, factor):
        super().__init__()
        self.dim, self.base, self.factor = dim, base, factor

    def forward(self, x, position_ids):
        inv_freq = 1.0 / (self.base ** (torch.arange(0, self.dim, 2).to(x.dtype) / self.dim))
        t = position_ids.to(x.dtype) / self.factor
        freqs = t[..., None] * inv_freq
        emb = torch.cat((freqs, freqs), dim=-1)
        return emb.cos(), emb.sin()


def rotate_half(x):
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def repeat_kv(hidden_states, n_rep):
    b, n, s, d = hidden_states.shape
    return hidden_states[:, :, None].expand(b, n, n_rep, s, d).reshape(b, n * n_rep, s, d)


class LlamaAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv = config.num_key_value_heads
        self.head_dim = config.hidden_size // self.num_heads
        h = config.hidden_size
        self.q_proj = nn.Linear(h, h, bias=False)
        self.k_proj = nn.Linear(h, self.num_kv * self.head_dim, bias=False)
        self.v_proj = nn.Linear(h, self.num_kv * self.head_dim, bias=False)
        self.o_proj = nn.Linear(h, h, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(self.head_dim, config.rope_theta, config.rope_factor)

    def forward(self, x, mask):
        b, s, _ = x.shape
        q = self.q_proj(x).view(b, s, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, s, self.num_kv, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, s, self.num_kv, self.head_dim).transpose(1, 2)
        cos, sin = self.rotary_emb(v, torch.arange(s)[None])
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        k = repeat_kv(k, self.num_heads // self.num_kv)
        v = repeat_kv(v, self.num_heads // self.num_kv)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).reshape(b, s, -1))


class LlamaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(self.act_fn(gate) * up)


class LlamaDecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, mask):
        residual = x
        x = self.input_layernorm(x)
        x = residual + self.self_attn(x, mask)
        residual = x
        x = self.post_attention_layernorm(x)
        return residual + self.mlp(x)


class LlamaForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([LlamaDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids, attention_mask):
        x = self.embed_tokens(input_ids)
        s = input_ids.shape[1]
        allowed = torch.ones(s, s, dtype=torch.bool).tril()[None, None] & attention_mask[:, None, None, :].bool()
        mask = torch.zeros(allowed.shape, dtype=x.dtype).masked_fill(~allowed, -1e9)
        for layer in self.layers:
            x = layer(x, mask)
        return self.lm_head(self.norm(x))


class RMSNorm(nnx.Module):
    def __init__(self, dim: int, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones((dim,)))
        self.eps = eps

    def __call__(self, x):
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps) * self.scale[...]


def rope_tables(positions, dim, theta, factor):
    inv_freq = theta ** (-jnp.arange(0, dim, 2) / dim)
    angles = jnp.einsum("s,d->sd", positions / factor, inv_freq)
    return jnp.cos(angles), jnp.sin(angles)


def rope(x, cos, sin):
    """x: (batch, seq, heads, head_dim)."""
    cos, sin = cos[:, None, :], sin[:, None, :]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Attention(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.n_heads, self.n_kv = cfg.num_attention_heads, cfg.num_key_value_heads
        self.head_dim = cfg.hidden_size // self.n_heads
        dense = lambda i, o: nnx.Linear(i, o, use_bias=False, rngs=rngs)
        self.wq = dense(cfg.hidden_size, self.n_heads * self.head_dim)
        self.wk = dense(cfg.hidden_size, self.n_kv * self.head_dim)
        self.wv = dense(cfg.hidden_size, self.n_kv * self.head_dim)
        self.wo = dense(self.n_heads * self.head_dim, cfg.hidden_size)

    def __call__(self, x, mask, cos, sin):
        b, s, _ = x.shape
        q = rope(self.wq(x).reshape(b, s, self.n_heads, self.head_dim), cos, sin)
        k = rope(self.wk(x).reshape(b, s, self.n_kv, self.head_dim), cos, sin)
        v = self.wv(x).reshape(b, s, self.n_kv, self.head_dim)
        n_rep = self.n_heads // self.n_kv
        k = jnp.repeat(k, n_rep, axis=2)
        v = jnp.repeat(v, n_rep, axis=2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(self.head_dim)
        scores = jnp.where(mask, scores, -1e9)
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)
        return self.wo(out.reshape(b, s, -1))


class FeedForward(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.w1 = nnx.Linear(cfg.hidden_size, cfg.intermediate_size, use_bias=False, rngs=rngs)
        self.w3 = nnx.Linear(cfg.hidden_size, cfg.intermediate_size, use_bias=False, rngs=rngs)
        self.w2 = nnx.Linear(cfg.intermediate_size, cfg.hidden_size, use_bias=False, rngs=rngs)

    def __call__(self, x):
        gate = self.w1(x)
        up = self.w3(x)
        return self.w2(nnx.silu(gate) * up)


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.attention = Attention(cfg, rngs)
        self.ffn_norm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.feed_forward = FeedForward(cfg, rngs)

    def __call__(self, x, mask, cos, sin):
        h = self.attention_norm(x)
        x = x + self.attention(h, mask, cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (cfg.vocab_size, cfg.hidden_size)))
        self.blocks = nnx.List([Block(cfg, rngs) for _ in range(cfg.num_hidden_layers)])
        self.final_norm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.head = nnx.Linear(cfg.hidden_size, cfg.vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, tokens, attention_mask):
        cfg = self.cfg
        x = jnp.take(self.embedding[...], tokens, axis=0)
        s = tokens.shape[1]
        cos, sin = rope_tables(jnp.arange(s), cfg.hidden_size // cfg.num_attention_heads, cfg.rope_theta, cfg.rope_factor)
        causal = jnp.tril(jnp.ones((s, s), bool))
        mask = causal[None, None] & (attention_mask[:, None, None, :] > 0)
        for block in self.blocks:
            x = block(x, mask, cos, sin)
        return self.head(self.final_norm(x))


def port(net, model):
    sd = {k: v.detach().numpy() for k, v in net.state_dict().items()}
    model.embedding[...] = jnp.asarray(sd["embed_tokens.weight"])
    model.final_norm.scale[...] = jnp.asarray(sd["norm.weight"])
    model.head.kernel[...] = jnp.asarray(sd["lm_head.weight"].T)
    for i, block in enumerate(model.blocks):
        pre = f"layers.{i}."
        block.attention_norm.scale[...] = jnp.asarray(sd[pre + "input_layernorm.weight"])
        block.ffn_norm.scale[...] = jnp.asarray(sd[pre + "post_attention_layernorm.weight"])
        for ours, theirs in (("wq", "q_proj"), ("wk", "k_proj"), ("wv", "v_proj"), ("wo", "o_proj")):
            getattr(block.attention, ours).kernel[...] = jnp.asarray(sd[f"{pre}self_attn.{theirs}.weight"].T)
        for ours, theirs in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            getattr(block.feed_forward, ours).kernel[...] = jnp.asarray(sd[f"{pre}mlp.{theirs}.weight"].T)
    return model


def build(seed):
    torch.manual_seed(seed)
    cfg = Config()
    net = LlamaForCausalLM(cfg).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(0, 0.35)
    ids = torch.randint(0, cfg.vocab_size, (3, 9)).numpy()
    keep = np.ones((3, 9), np.int64)
    keep[1, 7:] = 0
    keep[2, 5:] = 0
    model = port(net, Llama(cfg, nnx.Rngs(seed)))
    return {"torch": net, "flax": model, "inputs": {"input_ids": ids, "attention_mask": keep},
            "flax_inputs": {"tokens": ids, "attention_mask": keep}}


FAULTS = [
    {
        "title": "rotary pairs neighbours instead of halves",
        "edits": [("    a, b = jnp.split(x, 2, axis=-1)\n    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)",
                   "    a, b = x[..., ::2], x[..., 1::2]\n    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)")],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj"),
        "causes": ["rope"],
        "level": "outputs",
    },
    {
        "title": "kv heads tiled where torch repeats each one",
        "edits": [("        k = jnp.repeat(k, n_rep, axis=2)\n        v = jnp.repeat(v, n_rep, axis=2)",
                   "        k = jnp.tile(k, (1, 1, n_rep, 1))\n        v = jnp.tile(v, (1, 1, n_rep, 1))")],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj"),
        "causes": ["rearranged", "heads"],
        "level": "outputs",
    },
    {
        "title": "silu on the up branch instead of the gate branch",
        "edits": [("self.w2(nnx.silu(gate) * up)", "self.w2(gate * nnx.silu(up))")],
        "layers": ["layers.0.mlp", "layers.0.mlp.act_fn"],
        "between": ("layers.0.mlp.up_proj", "layers.0.mlp.down_proj"),
        "causes": ["operand", "swapped", "activation"],
        "level": "outputs",
    },
    {
        "title": "eps of the config not passed to the second norm (1e-6 for 1e-5)",
        "edits": [("self.ffn_norm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)", "self.ffn_norm = RMSNorm(cfg.hidden_size)")],
        "layers": ["layers.0.post_attention_layernorm"],
        "causes": ["epsilon"],
        "level": "outputs",
    },
    {
        "title": "residual of the attention is the normed input",
        "edits": [("        h = self.attention_norm(x)\n        x = x + self.attention(h, mask, cos, sin)",
                   "        x = self.attention_norm(x)\n        x = x + self.attention(x, mask, cos, sin)")],
        "layers": ["layers.0"],
        "between": ("layers.0.self_attn.o_proj", "layers.0.post_attention_layernorm"),
        "causes": ["residual", "norm_order"],
        "level": "outputs",
    },
    {
        "title": "positions multiplied by the rope factor instead of divided",
        "edits": [("positions / factor", "positions * factor")],
        "layers": ["layers.0.self_attn.rotary_emb", "layers.0.self_attn"],
        "between": ("layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj"),
        "causes": ["scale", "rope", "operation"],
        "level": "outputs",
    },
    {
        "title": "the two norms of a layer loaded into one another's place",
        "edits": [('block.attention_norm.scale[...] = jnp.asarray(sd[pre + "input_layernorm.weight"])',
                   'block.attention_norm.scale[...] = jnp.asarray(sd[pre + "post_attention_layernorm.weight"])'),
                  ('block.ffn_norm.scale[...] = jnp.asarray(sd[pre + "post_attention_layernorm.weight"])',
                   'block.ffn_norm.scale[...] = jnp.asarray(sd[pre + "input_layernorm.weight"])')],
        "layers": ["layers.0.input_layernorm"],
        "causes": ["swapped"],
        "level": "outputs",
    },
]
