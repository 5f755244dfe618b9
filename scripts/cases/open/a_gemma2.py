"""Gemma-2-like decoder: scaled embeddings, RMSNorm with 1 + w, local and global layers in turn, soft-capped scores and logits."""
import dataclasses
import enum

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn


@dataclasses.dataclass
class GemmaConfig:
    vocab_size: int = 37
    hidden_size: int = 20
    intermediate_size: int = 44
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 1
    head_dim: int = 8
    rms_norm_eps: float = 1e-6
    query_pre_attn_scalar: int = 5
    sliding_window: int = 3
    attn_logit_softcapping: float = 4.0
    final_logit_softcapping: float = 6.0


class Gemma2RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self._norm(x) * (1.0 + self.weight)


class Gemma2MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = nn.GELU(approximate="tanh")

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Gemma2Attention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.is_sliding = config, layer_idx % 2 == 0
        self.scaling = config.query_pre_attn_scalar**-0.5
        n, kv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, n * d, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv * d, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv * d, bias=False)
        self.o_proj = nn.Linear(n * d, config.hidden_size, bias=False)

    def rotate(self, x):
        d = self.config.head_dim
        inv = 10000.0 ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
        freqs = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * inv
        emb = torch.cat([freqs, freqs], dim=-1)
        rotated = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], dim=-1)
        return x * emb.cos() + rotated * emb.sin()

    def forward(self, x):
        c, (b, s, _) = self.config, x.shape
        q = self.rotate(self.q_proj(x).view(b, s, -1, c.head_dim).transpose(1, 2))
        k = self.rotate(self.k_proj(x).view(b, s, -1, c.head_dim).transpose(1, 2))
        v = self.v_proj(x).view(b, s, -1, c.head_dim).transpose(1, 2)
        scores = torch.matmul(q, k.transpose(2, 3)) * self.scaling
        scores = torch.tanh(scores / c.attn_logit_softcapping) * c.attn_logit_softcapping
        visible = torch.ones(s, s, dtype=torch.bool).tril()
        if self.is_sliding:
            visible = visible & torch.ones(s, s, dtype=torch.bool).triu(1 - c.sliding_window)
        probs = F.softmax(scores.masked_fill(~visible, -2.3819763e38), dim=-1)
        return self.o_proj(torch.matmul(probs, v).transpose(1, 2).reshape(b, s, -1))


class Gemma2DecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = Gemma2Attention(config, layer_idx)
        self.mlp = Gemma2MLP(config)
        self.input_layernorm = Gemma2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Gemma2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = Gemma2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = Gemma2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x):
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x)))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma2ForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Gemma2DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = Gemma2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids):
        x = self.embed_tokens(input_ids)
        x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)
        for layer in self.layers:
            x = layer(x)
        logits = self.lm_head(self.norm(x))
        cap = self.config.final_logit_softcapping
        return torch.tanh(logits / cap) * cap


K_MASK = -2.3819763e38


class AttentionType(enum.Enum):
    GLOBAL = 1
    LOCAL_SLIDING = 2


class RMSNorm(nnx.Module):
    def __init__(self, dim):
        self.scale = nnx.Param(jnp.zeros((dim,)))

    def __call__(self, x):
        var = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        normed = x * jax.lax.rsqrt(var + 1e-06)
        return normed * (1 + self.scale[...])


class Einsum(nnx.Module):
    def __init__(self, shape, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape))

    def __call__(self, eqn, x):
        return jnp.einsum(eqn, x, self.w[...])


class Embedder(nnx.Module):
    def __init__(self, vocab, dim, rngs):
        self.dim = dim
        self.input_embedding = nnx.Param(jax.random.normal(rngs.params(), (vocab, dim)))

    def encode(self, tokens):
        x = self.input_embedding[...][tokens]
        return x * jnp.sqrt(self.dim).astype(x.dtype)

    def decode(self, x):
        return jnp.dot(x, self.input_embedding[...].T)


def apply_rope(x, positions, max_wavelength=10_000):
    head_dim = x.shape[-1]
    timescale = max_wavelength ** (2 * jnp.arange(head_dim // 2) / head_dim)
    sinusoid = (positions[:, None] / timescale)[:, None, :]
    sin, cos = jnp.sin(sinusoid), jnp.cos(sinusoid)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Attention(nnx.Module):
    def __init__(self, cfg, attn_type, rngs):
        self.cfg, self.attn_type = cfg, attn_type
        n, k, h, d = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.hidden_size
        self.q_einsum = Einsum((n, d, h), rngs)
        self.kv_einsum = Einsum((2, k, d, h), rngs)
        self.attn_vec_einsum = Einsum((n, h, d), rngs)

    def __call__(self, x):
        cfg = self.cfg
        length = x.shape[1]
        positions = jnp.arange(length)
        q = self.q_einsum("BTD,NDH->BTNH", x)
        k, v = self.kv_einsum("BSD,CKDH->CBSKH", x)
        q = apply_rope(q, positions) * cfg.query_pre_attn_scalar**-0.5
        k = apply_rope(k, positions)
        logits = jnp.einsum("BTNH,BSKH->BTNS", q, k)
        logits = jnp.tanh(logits / cfg.attn_logit_softcapping) * cfg.attn_logit_softcapping
        mask = positions[None, :] <= positions[:, None]
        if self.attn_type == AttentionType.LOCAL_SLIDING:
            mask = mask & (positions[None, :] > positions[:, None] - cfg.sliding_window)
        logits = jnp.where(mask[None, :, None, :], logits, K_MASK)
        probs = jax.nn.softmax(logits, axis=-1)
        encoded = jnp.einsum("BTNS,BSKH->BTNH", probs, v)
        return self.attn_vec_einsum("BTNH,NHD->BTD", encoded)


class FeedForward(nnx.Module):
    def __init__(self, dim, hidden, rngs):
        self.gating_einsum = Einsum((2, dim, hidden), rngs)
        self.linear = Einsum((hidden, dim), rngs)

    def __call__(self, x):
        gate, up = self.gating_einsum("BTD,CDF->CBTF", x)
        return self.linear("BTF,FD->BTD", nnx.gelu(gate) * up)


class Block(nnx.Module):
    def __init__(self, cfg, attn_type, rngs):
        self.pre_attention_norm, self.post_attention_norm = RMSNorm(cfg.hidden_size), RMSNorm(cfg.hidden_size)
        self.pre_ffw_norm, self.post_ffw_norm = RMSNorm(cfg.hidden_size), RMSNorm(cfg.hidden_size)
        self.attn = Attention(cfg, attn_type, rngs)
        self.mlp = FeedForward(cfg.hidden_size, cfg.intermediate_size, rngs)

    def __call__(self, x):
        x = x + self.post_attention_norm(self.attn(self.pre_attention_norm(x)))
        out = self.mlp(self.pre_ffw_norm(x))
        return x + self.post_ffw_norm(out)


class Transformer(nnx.Module):
    def __init__(self, cfg, rngs):
        self.cfg = cfg
        self.embedder = Embedder(cfg.vocab_size, cfg.hidden_size, rngs)
        pattern = (AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL)
        self.layers = nnx.List([Block(cfg, pattern[i % 2], rngs) for i in range(cfg.num_hidden_layers)])
        self.final_norm = RMSNorm(cfg.hidden_size)

    def __call__(self, tokens):
        x = self.embedder.encode(tokens)
        for layer in self.layers:
            x = layer(x)
        logits = self.embedder.decode(self.final_norm(x))
        return jnp.tanh(logits / self.cfg.final_logit_softcapping) * self.cfg.final_logit_softcapping


def port(net, model):
    cfg, sd = model.cfg, {k: v.numpy() for k, v in net.state_dict().items()}
    n, k, h = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    model.embedder.input_embedding[...] = jnp.asarray(sd["embed_tokens.weight"])
    model.final_norm.scale[...] = jnp.asarray(sd["norm.weight"])
    for i, layer in enumerate(model.layers):
        get = lambda name: jnp.asarray(sd[f"layers.{i}.{name}.weight"])
        layer.pre_attention_norm.scale[...] = get("input_layernorm")
        layer.post_attention_norm.scale[...] = get("post_attention_layernorm")
        layer.pre_ffw_norm.scale[...] = get("pre_feedforward_layernorm")
        layer.post_ffw_norm.scale[...] = get("post_feedforward_layernorm")
        layer.attn.q_einsum.w[...] = get("self_attn.q_proj").reshape(n, h, -1).transpose(0, 2, 1)
        kv = jnp.stack([get("self_attn.k_proj"), get("self_attn.v_proj")])
        layer.attn.kv_einsum.w[...] = kv.reshape(2, k, h, -1).swapaxes(2, 3)
        layer.attn.attn_vec_einsum.w[...] = get("self_attn.o_proj").T.reshape(n, h, -1)
        layer.mlp.gating_einsum.w[...] = jnp.stack([get("mlp.gate_proj").T, get("mlp.up_proj").T])
        layer.mlp.linear.w[...] = get("mlp.down_proj").T
    return model


def build(seed):
    torch.manual_seed(seed)
    cfg = GemmaConfig()
    net = Gemma2ForCausalLM(cfg).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.uniform_(-0.5, 0.6) if "norm" in name else p.normal_(0, 0.3)
    tokens = np.random.default_rng(seed).integers(1, cfg.vocab_size, (3, 10))
    return {"torch": net, "flax": port(net, Transformer(cfg, nnx.Rngs(seed))), "inputs": tokens}


FAULTS = [
    {
        "title": "embedding's factor rounded to bfloat16",
        "edits": [("jnp.sqrt(self.dim).astype(x.dtype)", "jnp.sqrt(self.dim).astype(jnp.bfloat16).astype(x.dtype)")],
        "layers": ["", "embed_tokens"],
        "between": ("embed_tokens", "layers.0.input_layernorm"),
        "causes": ["dtype", "scale", "constant"],
        "level": "outputs",
    },
    {
        "title": "norm multiplies by the weight itself",
        "edits": [("return normed * (1 + self.scale[...])", "return normed * self.scale[...]")],
        "layers": ["layers.0.input_layernorm"],
        "causes": ["scale_plus_one"],
        "level": "outputs",
    },
    {
        "title": "global layers first",
        "edits": [("pattern = (AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL)", "pattern = (AttentionType.GLOBAL, AttentionType.LOCAL_SLIDING)")],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj"),
        "causes": ["mask", "order"],
        "level": "outputs",
    },
    {
        "title": "scores capped after the mask, which so becomes weak",
        "edits": [("        logits = jnp.tanh(logits / cfg.attn_logit_softcapping) * cfg.attn_logit_softcapping\n", ""),
                  ("        probs = jax.nn.softmax(logits, axis=-1)\n",
                   "        logits = jnp.tanh(logits / cfg.attn_logit_softcapping) * cfg.attn_logit_softcapping\n        probs = jax.nn.softmax(logits, axis=-1)\n")],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj"),
        "causes": ["order", "mask"],
        "level": "outputs",
    },
    {
        "title": "norm after the feed-forward applied to the sum",
        "edits": [("return x + self.post_ffw_norm(out)", "return self.post_ffw_norm(x + out)")],
        "layers": ["layers.0", "layers.0.post_feedforward_layernorm"],
        "between": ("layers.0.mlp.down_proj", "layers.0.post_feedforward_layernorm"),
        "causes": ["norm_order", "order", "residual"],
        "level": "outputs",
    },
    {
        "title": "silu in the gate",
        "edits": [("nnx.gelu(gate) * up", "nnx.silu(gate) * up")],
        "layers": ["layers.0.mlp.act_fn", "layers.0.mlp"],
        "between": ("layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"),
        "causes": ["activation"],
        "level": "outputs",
    },
    {
        "title": "logits clipped instead of soft-capped",
        "edits": [("jnp.tanh(logits / self.cfg.final_logit_softcapping) * self.cfg.final_logit_softcapping",
                   "jnp.clip(logits, -self.cfg.final_logit_softcapping, self.cfg.final_logit_softcapping)")],
        "layers": [""],
        "between": ("lm_head", None),
        "causes": ["operation", "activation"],
        "level": "outputs",
    },
]
