"""Gemma-2-like decoder on packed sequences; Flax side is functional JAX, stacked layers and lax.scan."""
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class DecoderConfig:
    vocab_size: int = 37
    hidden_size: int = 24
    intermediate_size: int = 40
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    sliding_window: int = 3
    query_pre_attn_scalar: int = 6
    attn_softcap: float = 2.0
    final_softcap: float = 5.0
    rope_theta: float = 10000.0
    rms_eps: float = 1e-6


class GemmaRMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        out = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return out * (1.0 + self.weight)


def rotate_half(x):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def repeat_kv(x, n):
    b, h, s, d = x.shape
    return x[:, :, None].expand(b, h, n, s, d).reshape(b, h * n, s, d)


class GemmaAttention(nn.Module):
    def __init__(self, cfg, layer_idx):
        super().__init__()
        self.cfg = cfg
        self.is_sliding = layer_idx % 2 == 0
        self.q_proj = nn.Linear(cfg.hidden_size, cfg.num_heads * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, cfg.num_kv_heads * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, cfg.num_kv_heads * cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.num_heads * cfg.head_dim, cfg.hidden_size, bias=False)

    def forward(self, x, position_ids, segment_ids):
        cfg = self.cfg
        b, s, _ = x.shape
        q = self.q_proj(x).view(b, s, cfg.num_heads, cfg.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, s, cfg.num_kv_heads, cfg.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, s, cfg.num_kv_heads, cfg.head_dim).transpose(1, 2)
        inv_freq = 1.0 / cfg.rope_theta ** (torch.arange(0, cfg.head_dim, 2, dtype=x.dtype) / cfg.head_dim)
        freqs = position_ids[..., None].to(x.dtype) * inv_freq
        emb = torch.cat((freqs, freqs), dim=-1)[:, None]
        q = q * emb.cos() + rotate_half(q) * emb.sin()
        k = k * emb.cos() + rotate_half(k) * emb.sin()
        k = repeat_kv(k, cfg.num_heads // cfg.num_kv_heads)
        v = repeat_kv(v, cfg.num_heads // cfg.num_kv_heads)
        scores = q @ k.transpose(2, 3) * cfg.query_pre_attn_scalar**-0.5
        scores = torch.tanh(scores / cfg.attn_softcap) * cfg.attn_softcap
        i = torch.arange(s)[:, None]
        j = torch.arange(s)[None, :]
        allowed = j <= i
        if self.is_sliding:
            allowed = allowed & (i - j < cfg.sliding_window)
        allowed = allowed & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
        scores = scores.masked_fill(~allowed, -1e30)
        out = scores.softmax(-1) @ v
        return self.o_proj(out.transpose(1, 2).reshape(b, s, -1))


class GemmaMLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)
        self.act_fn = nn.GELU(approximate="tanh")

    def forward(self, x):
        gate = self.gate_proj(x)
        up = self.up_proj(x)
        return self.down_proj(self.act_fn(gate) * up)


class GemmaLayer(nn.Module):
    def __init__(self, cfg, layer_idx):
        super().__init__()
        self.self_attn = GemmaAttention(cfg, layer_idx)
        self.mlp = GemmaMLP(cfg)
        self.input_layernorm = GemmaRMSNorm(cfg.hidden_size, cfg.rms_eps)
        self.post_attention_layernorm = GemmaRMSNorm(cfg.hidden_size, cfg.rms_eps)
        self.pre_feedforward_layernorm = GemmaRMSNorm(cfg.hidden_size, cfg.rms_eps)
        self.post_feedforward_layernorm = GemmaRMSNorm(cfg.hidden_size, cfg.rms_eps)

    def forward(self, x, position_ids, segment_ids):
        h = self.self_attn(self.input_layernorm(x), position_ids, segment_ids)
        x = x + self.post_attention_layernorm(h)
        h = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(h)


class GemmaForCausalLM(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList([GemmaLayer(cfg, i) for i in range(cfg.num_layers)])
        self.norm = GemmaRMSNorm(cfg.hidden_size, cfg.rms_eps)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids, position_ids, segment_ids):
        x = self.embed_tokens(input_ids) * math.sqrt(self.cfg.hidden_size)
        for layer in self.layers:
            x = layer(x, position_ids, segment_ids)
        logits = self.lm_head(self.norm(x))
        return torch.tanh(logits / self.cfg.final_softcap) * self.cfg.final_softcap


# ---------------------------------------------------------------- JAX


def rms_norm(x, scale, eps, plus_one=True):
    var = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    y = x * jax.lax.rsqrt(var + eps)
    return y * (1.0 + scale if plus_one else scale)


def apply_rope(x, positions, theta):
    """x: [B, S, H, K]"""
    half = x.shape[-1] // 2
    fraction = 2 * jnp.arange(0, half) / x.shape[-1]
    timescale = theta**fraction
    angle = positions[:, :, None, None] / timescale
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def make_mask(segment_ids, is_sliding, window):
    s = segment_ids.shape[1]
    row = jnp.arange(s)[:, None]
    col = jnp.arange(s)[None, :]
    causal = col <= row
    local = causal & (row - col < window)
    mask = jnp.where(is_sliding, local, causal)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return (mask[None] & same)[:, None]


def attention(p, x, positions, mask, cfg):
    q = jnp.einsum("bsd,dhk->bshk", x, p["query"]["kernel"])
    k = jnp.einsum("bsd,dhk->bshk", x, p["key"]["kernel"])
    v = jnp.einsum("bsd,dhk->bshk", x, p["value"]["kernel"])
    q = apply_rope(q, positions, cfg.rope_theta)
    k = apply_rope(k, positions, cfg.rope_theta)
    groups = cfg.num_heads // cfg.num_kv_heads
    k = jnp.repeat(k, groups, axis=2)
    v = jnp.repeat(v, groups, axis=2)
    logits = jnp.einsum("bqhk,bshk->bhqs", q * cfg.query_pre_attn_scalar**-0.5, k)
    logits = jnp.tanh(logits / cfg.attn_softcap) * cfg.attn_softcap
    logits = jnp.where(mask, logits, -1e30)
    probs = jax.nn.softmax(logits, axis=-1)
    out = jnp.einsum("bhqs,bshk->bqhk", probs, v)
    return jnp.einsum("bqhk,hkd->bqd", out, p["out"]["kernel"])


def decoder_layer(p, x, positions, mask, cfg):
    h = rms_norm(x, p["pre_self_attention_norm"]["scale"], cfg.rms_eps)
    h = attention(p["self_attention"], h, positions, mask, cfg)
    x = x + rms_norm(h, p["post_self_attention_norm"]["scale"], cfg.rms_eps)
    h = rms_norm(x, p["pre_ffw_norm"]["scale"], cfg.rms_eps)
    wi_0 = h @ p["mlp"]["wi_0"]["kernel"]
    wi_1 = h @ p["mlp"]["wi_1"]["kernel"]
    h = (jax.nn.gelu(wi_0, approximate=True) * wi_1) @ p["mlp"]["wo"]["kernel"]
    return x + rms_norm(h, p["post_ffw_norm"]["scale"], cfg.rms_eps)


def decode(params, tokens, positions, segment_ids, cfg=DecoderConfig()):
    table = params["token_embedder"]["embedding"]
    x = table[tokens] * jnp.sqrt(jnp.asarray(cfg.hidden_size, table.dtype))
    local_flags = jnp.arange(cfg.num_layers) % 2 == 0

    def body(carry, xs):
        layer, is_sliding = xs
        mask = make_mask(segment_ids, is_sliding, cfg.sliding_window)
        return decoder_layer(layer, carry, positions, mask, cfg), None

    x, _ = jax.lax.scan(body, x, (params["decoder"]["layers"], local_flags))
    x = rms_norm(x, params["decoder"]["decoder_norm"]["scale"], cfg.rms_eps)
    logits = jnp.einsum("bsd,vd->bsv", x, table)
    return jnp.tanh(logits / cfg.final_softcap) * cfg.final_softcap


def port(net, cfg):
    t = lambda w: jnp.asarray(w.detach().numpy())

    def one(layer):
        a, m = layer.self_attn, layer.mlp
        return {
            "pre_self_attention_norm": {"scale": t(layer.input_layernorm.weight)},
            "post_self_attention_norm": {"scale": t(layer.post_attention_layernorm.weight)},
            "pre_ffw_norm": {"scale": t(layer.pre_feedforward_layernorm.weight)},
            "post_ffw_norm": {"scale": t(layer.post_feedforward_layernorm.weight)},
            "self_attention": {
                "query": {"kernel": t(a.q_proj.weight).T.reshape(cfg.hidden_size, cfg.num_heads, cfg.head_dim)},
                "key": {"kernel": t(a.k_proj.weight).T.reshape(cfg.hidden_size, cfg.num_kv_heads, cfg.head_dim)},
                "value": {"kernel": t(a.v_proj.weight).T.reshape(cfg.hidden_size, cfg.num_kv_heads, cfg.head_dim)},
                "out": {"kernel": t(a.o_proj.weight).T.reshape(cfg.num_heads, cfg.head_dim, cfg.hidden_size)},
            },
            "mlp": {
                "wi_0": {"kernel": t(m.gate_proj.weight).T},
                "wi_1": {"kernel": t(m.up_proj.weight).T},
                "wo": {"kernel": t(m.down_proj.weight).T},
            },
        }

    layers = jax.tree.map(lambda *xs: jnp.stack(xs), *[one(layer) for layer in net.layers])
    return {
        "token_embedder": {"embedding": t(net.embed_tokens.weight)},
        "decoder": {"layers": layers, "decoder_norm": {"scale": t(net.norm.weight)}},
    }


def build(seed):
    torch.manual_seed(seed)
    cfg = DecoderConfig()
    net = GemmaForCausalLM(cfg).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "norm" in name:
                p.normal_(0, 0.3)
            elif "embed" in name:
                p.normal_(0, 0.4)
            else:
                p.normal_(0, 0.35)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, cfg.vocab_size, (3, 11))
    cuts = np.array([5, 7, 4])
    index = np.arange(11)[None]
    segments = (index >= cuts[:, None]).astype(np.int64) + 1
    positions = np.where(segments == 1, index, index - cuts[:, None])
    params = port(net, cfg)
    return {"torch": net, "flax": (decode, params), "inputs": (tokens, positions, segments)}


FAULTS = [
    {
        "title": "attention soft cap after the mask, which it squashes to -softcap",
        "edits": [(
            "    logits = jnp.tanh(logits / cfg.attn_softcap) * cfg.attn_softcap\n    logits = jnp.where(mask, logits, -1e30)\n",
            "    logits = jnp.where(mask, logits, -1e30)\n    logits = jnp.tanh(logits / cfg.attn_softcap) * cfg.attn_softcap\n",
        )],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj"),
        "causes": ["order", "mask"],
        "level": "outputs",
    },
    {
        "title": "sliding window one key too wide",
        "edits": [("(row - col < window)", "(row - col <= window)")],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj"),
        "causes": ["mask", "size", "offset"],
        "level": "outputs",
    },
    {
        "title": "kv heads tiled in place of repeated",
        "edits": [
            ("k = jnp.repeat(k, groups, axis=2)", "k = jnp.tile(k, (1, 1, groups, 1))"),
            ("v = jnp.repeat(v, groups, axis=2)", "v = jnp.tile(v, (1, 1, groups, 1))"),
        ],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj"),
        "causes": ["rearranged", "heads"],
        "level": "outputs",
    },
    {
        "title": "scan goes through the stacked layers from the last to the first",
        "edits": [("(params[\"decoder\"][\"layers\"], local_flags))", "(params[\"decoder\"][\"layers\"], local_flags), reverse=True)")],
        "layers": ["layers.0.input_layernorm", "layers.0"],
        "causes": ["reversed", "order", "swapped"],
        "level": "outputs",
    },
    {
        "title": "query scaled by head_dim, not by query_pre_attn_scalar",
        "edits": [("q * cfg.query_pre_attn_scalar**-0.5", "q * cfg.head_dim**-0.5")],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj"),
        "causes": ["scale", "constant"],
        "level": "outputs",
    },
    {
        "title": "rotary exponent i / head_dim for 2 i / head_dim",
        "edits": [("fraction = 2 * jnp.arange(0, half) / x.shape[-1]", "fraction = jnp.arange(0, half) / x.shape[-1]")],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj"),
        "causes": ["rope", "constant", "scale"],
        "level": "outputs",
    },
    {
        "title": "GeGLU activates the up projection instead of the gate",
        "edits": [("(jax.nn.gelu(wi_0, approximate=True) * wi_1)", "(wi_0 * jax.nn.gelu(wi_1, approximate=True))")],
        "layers": ["layers.0.mlp", "layers.0.mlp.act_fn"],
        "between": ("layers.0.mlp.up_proj", "layers.0.mlp.down_proj"),
        "causes": ["operand", "swapped"],
        "level": "outputs",
    },
    {
        "title": "final norm multiplies by the scale without the 1 +",
        "edits": [("params[\"decoder\"][\"decoder_norm\"][\"scale\"], cfg.rms_eps)", "params[\"decoder\"][\"decoder_norm\"][\"scale\"], cfg.rms_eps, plus_one=False)")],
        "layers": ["norm"],
        "causes": ["scale_plus_one"],
        "level": "outputs",
    },
    {
        "title": "tied output embedding gets no gradient from the logits",
        "edits": [("jnp.einsum(\"bsd,vd->bsv\", x, table)", "jnp.einsum(\"bsd,vd->bsv\", x, jax.lax.stop_gradient(table))")],
        "layers": ["lm_head"],
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
]
