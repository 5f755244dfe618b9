"""Falcon (7B layout): multi-query attention, attention and MLP in parallel, fused query_key_value."""
import math
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
import jax
import jax.numpy as jnp
from jax import lax


class FalconConfig:
    vocab_size = 23
    hidden_size = 20
    num_hidden_layers = 3
    num_attention_heads = 5
    ffn_hidden_size = 34
    layer_norm_epsilon = 1e-5
    rope_theta = 10000.0

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads


def rotate_half(x):
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2:]
    return torch.cat((-x2, x1), dim=-1)


class FalconRotaryEmbedding(nn.Module):
    def __init__(self, head_dim, base):
        super().__init__()
        self.head_dim, self.base = head_dim, base

    def cos_sin(self, seq_len, device, dtype):
        exponent = torch.arange(0, self.head_dim, 2, device=device, dtype=dtype) / self.head_dim
        inv_freq = 1.0 / (self.base ** exponent)
        t = torch.arange(seq_len, device=device, dtype=dtype)
        freqs = torch.einsum("i,j->ij", t, inv_freq)
        emb = torch.cat((freqs, freqs), dim=-1)
        return emb.cos()[None], emb.sin()[None]

    def forward(self, query, key):
        cos, sin = self.cos_sin(query.shape[1], query.device, query.dtype)
        return (query * cos) + (rotate_half(query) * sin), (key * cos) + (rotate_half(key) * sin)


class FalconAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.inv_norm_factor = 1.0 / math.sqrt(self.head_dim)
        self.maybe_rotary = FalconRotaryEmbedding(self.head_dim, config.rope_theta)
        self.query_key_value = nn.Linear(self.hidden_size, self.hidden_size + 2 * self.head_dim, bias=False)
        self.dense = nn.Linear(self.hidden_size, self.hidden_size, bias=False)

    def _split_heads(self, fused_qkv):
        batch_size, seq_length, _ = fused_qkv.shape
        fused_qkv = fused_qkv.view(batch_size, seq_length, self.num_heads + 2, self.head_dim)
        return fused_qkv[..., :-2, :], fused_qkv[..., [-2], :], fused_qkv[..., [-1], :]

    def forward(self, hidden_states, attention_mask):
        fused_qkv = self.query_key_value(hidden_states)
        query_layer, key_layer, value_layer = self._split_heads(fused_qkv)
        batch_size, query_length, _, _ = query_layer.shape
        query_layer = query_layer.transpose(1, 2).reshape(batch_size * self.num_heads, query_length, self.head_dim)
        key_layer = key_layer.transpose(1, 2).reshape(batch_size, query_length, self.head_dim)
        value_layer = value_layer.transpose(1, 2).reshape(batch_size, 1, query_length, self.head_dim)
        query_layer, key_layer = self.maybe_rotary(query_layer, key_layer)
        query_layer = query_layer.view(batch_size, self.num_heads, query_length, self.head_dim)
        key_layer = key_layer.view(batch_size, 1, query_length, self.head_dim)
        attention_scores = query_layer @ key_layer.transpose(-1, -2)
        attention_scores = attention_scores * self.inv_norm_factor
        attention_scores = F.softmax(attention_scores + attention_mask, dim=-1)
        attn_output = attention_scores @ value_layer
        attn_output = attn_output.permute(0, 2, 1, 3).reshape(batch_size, query_length, self.hidden_size)
        return self.dense(attn_output)


class FalconMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.act = nn.GELU()
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(x)))


class FalconDecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attention = FalconAttention(config)
        self.mlp = FalconMLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(self, hidden_states, attention_mask):
        residual = hidden_states
        attention_layernorm_out = self.input_layernorm(hidden_states)
        attention_output = self.self_attention(attention_layernorm_out, attention_mask)
        mlp_output = self.mlp(attention_layernorm_out)
        mlp_output += attention_output
        return residual + mlp_output


class FalconModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList([FalconDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(self, input_ids, attention_mask):
        hidden_states = self.word_embeddings(input_ids)
        n = input_ids.shape[1]
        allowed = torch.ones(n, n, dtype=torch.bool).tril()[None, None] & attention_mask[:, None, None, :].bool()
        bias = torch.zeros(allowed.shape, dtype=hidden_states.dtype)
        bias = bias.masked_fill(~allowed, torch.finfo(hidden_states.dtype).min)
        for block in self.h:
            hidden_states = block(hidden_states, bias)
        return self.ln_f(hidden_states)


class FalconForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = FalconModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.word_embeddings.weight

    def forward(self, input_ids, attention_mask):
        return self.lm_head(self.transformer(input_ids, attention_mask))


# ---- Flax half: pure functions over a dictionary of stacked arrays ----

HEADS, HEAD_DIM = 5, 4


def standardise(x, scale, bias, eps=1e-5):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    var = jnp.mean(centred * centred, axis=-1, keepdims=True)
    return centred * lax.rsqrt(var + eps) * scale + bias


def angles(length, dtype):
    half = HEAD_DIM // 2
    inverse = 10000.0 ** (-jnp.arange(half, dtype=dtype) / half)
    theta = jnp.arange(length, dtype=dtype)[:, None] * inverse
    return jnp.cos(theta), jnp.sin(theta)


def rotate(x, cos, sin):
    """x: [..., time, head_dim]; the first half is the real part, the second the imaginary one."""
    re, im = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([re * cos - im * sin, im * cos + re * sin], axis=-1)


def multi_query(p, x, allowed, cos, sin):
    b, t, _ = x.shape
    fused = x @ p["qkv"]
    q, k, v = jnp.split(fused, [HEADS * HEAD_DIM, (HEADS + 1) * HEAD_DIM], axis=-1)
    q = jnp.moveaxis(q.reshape(b, t, HEADS, HEAD_DIM), 2, 1)
    q = rotate(q, cos, sin) * HEAD_DIM ** -0.5
    k = rotate(k, cos, sin)
    logits = jnp.einsum("bhqd,bkd->bhqk", q, k)
    logits = jnp.where(allowed, logits, jnp.finfo(x.dtype).min)
    mixed = jnp.einsum("bhqk,bkd->bqhd", jax.nn.softmax(logits, axis=-1), v)
    return jnp.einsum("bqhd,hdm->bqm", mixed, p["out"])


def feed_forward(p, x):
    return jax.nn.gelu(x @ p["up"], approximate=False) @ p["down"]


def falcon(params, tokens, keep):
    x = jnp.take(params["table"], tokens, axis=0)
    t = tokens.shape[1]
    cos, sin = angles(t, x.dtype)
    steps = jnp.arange(t)
    allowed = (steps[:, None] >= steps[None, :])[None, None] & (keep[:, None, None, :] != 0)

    def layer(x, p):
        y = standardise(x, p["ln_scale"], p["ln_bias"])
        attended = multi_query(p, y, allowed, cos, sin)
        fed = feed_forward(p, y)
        return x + attended + fed, None

    x, _ = lax.scan(layer, x, params["layers"])
    x = standardise(x, *params["last"])
    return jnp.einsum("btm,vm->btv", x, params["table"])


def port_weights(net):
    arr = lambda w: jnp.asarray(w.detach().numpy())
    body = net.transformer

    def stack(get):
        return jnp.stack([arr(get(block)) for block in body.h])

    layers = {
        "ln_scale": stack(lambda l: l.input_layernorm.weight),
        "ln_bias": stack(lambda l: l.input_layernorm.bias),
        "qkv": stack(lambda l: l.self_attention.query_key_value.weight.T),
        "out": stack(lambda l: l.self_attention.dense.weight.T.reshape(HEADS, HEAD_DIM, -1)),
        "up": stack(lambda l: l.mlp.dense_h_to_4h.weight.T),
        "down": stack(lambda l: l.mlp.dense_4h_to_h.weight.T),
    }
    last = (arr(body.ln_f.weight), arr(body.ln_f.bias))
    return falcon, {"table": arr(body.word_embeddings.weight), "layers": layers, "last": last}


def build(seed):
    torch.manual_seed(seed)
    net = FalconForCausalLM(FalconConfig())
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() == 1:
                p.copy_(0.3 * torch.randn_like(p) + (1.1 if name.endswith("weight") else 0.05))
            elif "query_key_value" in name:
                p.copy_(0.45 * torch.randn_like(p))
            elif "embeddings" in name:
                p.copy_(0.7 * torch.randn_like(p))
            else:
                p.copy_(0.3 * torch.randn_like(p))
    net.eval()
    rs = np.random.RandomState(seed + 1)
    tokens = rs.randint(0, FalconConfig.vocab_size, (3, 7))
    keep = np.ones((3, 7), np.int64)
    keep[1, 5:] = 0
    keep[2, 4:] = 0
    return {"torch": net, "flax": port_weights(net), "inputs": {"input_ids": tokens, "attention_mask": keep}}


FAULTS = [
    {"title": "the keys are not rotated, only the queries",
     "edits": [("    k = rotate(k, cos, sin)\n", "")],
     "layers": ["transformer.h.0.self_attention", "transformer.h.0.self_attention.maybe_rotary"],
     "between": ("transformer.h.0.self_attention.query_key_value", "transformer.h.0.self_attention.dense"),
     "causes": ["rope", "left_out"], "level": "outputs"},
    {"title": "key and value are taken from the fused projection in exchanged places",
     "edits": [("    q, k, v = jnp.split(fused", "    q, v, k = jnp.split(fused")],
     "layers": ["transformer.h.0.self_attention", "transformer.h.0.self_attention.query_key_value"],
     "between": ("transformer.h.0.self_attention.query_key_value", "transformer.h.0.self_attention.maybe_rotary"),
     "causes": ["blocks", "swapped", "operand"], "level": "outputs"},
    {"title": "the MLP reads the residual stream itself, not the normalised one",
     "edits": [("        fed = feed_forward(p, y)", "        fed = feed_forward(p, x)")],
     "layers": ["transformer.h.0", "transformer.h.0.mlp", "transformer.h.0.mlp.dense_h_to_4h"],
     "between": ("transformer.h.0.self_attention", "transformer.h.0.mlp.dense_h_to_4h"),
     "causes": ["operand", "left_out", "norm_order"], "level": "outputs"},
    {"title": "the MLP's GELU is the tanh approximation (jax's default)",
     "edits": [("approximate=False", "approximate=True")],
     "layers": ["transformer.h.0.mlp", "transformer.h.0.mlp.act"],
     "between": ("transformer.h.0.mlp.dense_h_to_4h", "transformer.h.0.mlp.dense_4h_to_h"),
     "causes": ["gelu", "activation"], "level": "outputs"},
    {"title": "the final norm's weights are copied from the last block's input_layernorm",
     "edits": [("    last = (arr(body.ln_f.weight), arr(body.ln_f.bias))",
                "    final = body.h[-1].input_layernorm\n    last = (arr(final.weight), arr(final.bias))")],
     "layers": ["transformer.ln_f"],
     "between": None,
     "causes": ["values", "swapped", "operand"], "level": "bits"},
]
