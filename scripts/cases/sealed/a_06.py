"""BLOOM-like decoder: ALiBi with a number of heads that is no power of two, fused qkv by heads, embedding norm; nnx."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn


def build_alibi_tensor(attention_mask, num_heads, dtype):
    closest = 2 ** math.floor(math.log2(num_heads))
    base = 2 ** (-(2 ** -(math.log2(closest) - 3)))
    slopes = [base**i for i in range(1, closest + 1)]
    if closest != num_heads:
        extra = 2 ** (-(2 ** -(math.log2(2 * closest) - 3)))
        slopes += [extra**i for i in range(1, 1 + 2 * min(closest, num_heads - closest), 2)]
    slopes = torch.tensor(slopes, dtype=torch.float64).to(dtype)
    positions = ((attention_mask.cumsum(-1) - 1) * attention_mask)[:, None, None, :]
    return slopes[None, :, None, None] * positions.to(dtype)


def bloom_gelu(x):
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


class BloomGelu(nn.Module):
    def forward(self, x):
        return bloom_gelu(x)


class BloomAttention(nn.Module):
    def __init__(self, hidden_size, n_head):
        super().__init__()
        self.num_heads, self.head_dim = n_head, hidden_size // n_head
        self.inv_norm_factor = 1.0 / math.sqrt(self.head_dim)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.attention_dropout = nn.Dropout(0.1)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x, residual, attention_mask):
        b, s, d = x.shape
        fused = self.query_key_value(x).view(b, s, self.num_heads, 3, self.head_dim)
        q, k, v = (fused[..., i, :].transpose(1, 2) for i in range(3))
        alibi = build_alibi_tensor(attention_mask, self.num_heads, x.dtype)
        scores = self.inv_norm_factor * (q @ k.transpose(-1, -2)) + alibi
        mask = torch.ones(s, s, dtype=torch.bool).triu(1)[None, None] | ~attention_mask[:, None, None, :].bool()
        probs = self.softmax(scores.masked_fill(mask, torch.finfo(scores.dtype).min))
        out = (self.attention_dropout(probs) @ v).transpose(1, 2).reshape(b, s, d)
        return residual + self.dense(out)


class BloomMLP(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(hidden_size, 4 * hidden_size)
        self.gelu_impl = BloomGelu()
        self.dense_4h_to_h = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x, residual):
        return residual + self.dense_4h_to_h(self.gelu_impl(self.dense_h_to_4h(x)))


class BloomBlock(nn.Module):
    def __init__(self, hidden_size, n_head, residual_post_norm):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(hidden_size, eps=1e-5)
        self.self_attention = BloomAttention(hidden_size, n_head)
        self.post_attention_layernorm = nn.LayerNorm(hidden_size, eps=1e-5)
        self.mlp = BloomMLP(hidden_size)
        self.residual_post_norm = residual_post_norm

    def forward(self, x, attention_mask):
        h = self.input_layernorm(x)
        x = self.self_attention(h, h if self.residual_post_norm else x, attention_mask)
        h = self.post_attention_layernorm(x)
        return self.mlp(h, h if self.residual_post_norm else x)


class BloomModel(nn.Module):
    def __init__(self, vocab=27, hidden_size=18, n_head=6, n_layer=2, residual_post_norm=True):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab, hidden_size)
        self.word_embeddings_layernorm = nn.LayerNorm(hidden_size, eps=1e-5)
        self.h = nn.ModuleList([BloomBlock(hidden_size, n_head, residual_post_norm) for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(hidden_size, eps=1e-5)

    def forward(self, input_ids, attention_mask):
        x = self.word_embeddings_layernorm(self.word_embeddings(input_ids))
        for block in self.h:
            x = block(x, attention_mask)
        return self.ln_f(x)


def alibi_slopes(heads: int) -> np.ndarray:
    def geometric(n):
        start = 2.0 ** (-8.0 / n)
        return start ** np.arange(1, n + 1)

    floor = 2 ** int(np.log2(heads))
    slopes = geometric(floor)
    if floor < heads:
        slopes = np.concatenate([slopes, geometric(2 * floor)[0::2][: heads - floor]])
    return slopes


def alibi_bias(keep, heads):
    positions = (jnp.cumsum(keep, axis=-1) - 1) * keep
    return jnp.asarray(alibi_slopes(heads))[None, :, None, None] * positions[:, None, None, :]


class Gelu(nnx.Module):
    def __call__(self, x):
        return 0.5 * x * (1.0 + jnp.tanh(0.79788456 * (x + 0.044715 * x**3)))


class Attention(nnx.Module):
    def __init__(self, dim, heads, rngs):
        self.heads, self.head_dim = heads, dim // heads
        self.query_key_value = nnx.Linear(dim, 3 * dim, rngs=rngs)
        self.dense = nnx.Linear(dim, dim, rngs=rngs)
        self.attn_drop = nnx.Dropout(0.1, deterministic=True, rngs=rngs)

    def __call__(self, x, bias, allowed):
        b, s, d = x.shape
        qkv = self.query_key_value(x).reshape(b, s, self.heads, 3, self.head_dim)
        q, k, v = qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        scores = scores / np.sqrt(self.head_dim) + bias
        scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
        probs = self.attn_drop(nnx.softmax(scores))
        return self.dense(jnp.einsum("bhqk,bkhd->bqhd", probs, v).reshape(b, s, d))


class Block(nnx.Module):
    def __init__(self, dim, heads, residual_post_norm, rngs):
        self.residual_post_norm = residual_post_norm
        self.input_layernorm = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.self_attention = Attention(dim, heads, rngs)
        self.post_attention_layernorm = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.fc_in = nnx.Linear(dim, 4 * dim, rngs=rngs)
        self.gelu = Gelu()
        self.fc_out = nnx.Linear(4 * dim, dim, rngs=rngs)

    def __call__(self, x, bias, allowed):
        h = self.input_layernorm(x)
        shortcut = h if self.residual_post_norm else x
        x = shortcut + self.self_attention(h, bias, allowed)
        h = self.post_attention_layernorm(x)
        shortcut_mlp = h if self.residual_post_norm else x
        return shortcut_mlp + self.fc_out(self.gelu(self.fc_in(h)))


class Bloom(nnx.Module):
    def __init__(self, vocab, dim, heads, layers, residual_post_norm, rngs):
        self.heads = heads
        self.word_embeddings = nnx.Param(jnp.zeros((vocab, dim)))
        self.word_embeddings_layernorm = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.h = nnx.List([Block(dim, heads, residual_post_norm, rngs) for _ in range(layers)])
        self.ln_f = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)

    def __call__(self, input_ids, attention_mask):
        x = self.word_embeddings[...][input_ids]
        x = self.word_embeddings_layernorm(x)
        s = input_ids.shape[1]
        bias = alibi_bias(attention_mask, self.heads)
        allowed = jnp.tril(jnp.ones((s, s), bool)) & attention_mask[:, None, None, :].astype(bool)
        for block in self.h:
            x = block(x, bias, allowed)
        return self.ln_f(x)


def set_linear(dst, src):
    dst.kernel[...] = jnp.asarray(src.weight.detach().numpy().T)
    dst.bias[...] = jnp.asarray(src.bias.detach().numpy())


def set_norm(dst, src):
    dst.scale[...] = jnp.asarray(src.weight.detach().numpy())
    dst.bias[...] = jnp.asarray(src.bias.detach().numpy())


def port(net, model):
    model.word_embeddings[...] = jnp.asarray(net.word_embeddings.weight.detach().numpy())
    set_norm(model.word_embeddings_layernorm, net.word_embeddings_layernorm)
    for block, source in zip(model.h, net.h):
        set_norm(block.input_layernorm, source.input_layernorm)
        set_norm(block.post_attention_layernorm, source.post_attention_layernorm)
        set_linear(block.self_attention.query_key_value, source.self_attention.query_key_value)
        set_linear(block.self_attention.dense, source.self_attention.dense)
        set_linear(block.fc_in, source.mlp.dense_h_to_4h)
        set_linear(block.fc_out, source.mlp.dense_4h_to_h)
    set_norm(model.ln_f, net.ln_f)
    return model


def build(seed):
    torch.manual_seed(seed)
    net = BloomModel().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.2)
            elif "layernorm" in name or "ln_f" in name:
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(0, 0.3)
    rng = np.random.default_rng(seed)
    ids, keep = rng.integers(0, 27, (2, 11)), np.ones((2, 11), np.int64)
    keep[1, 8:] = 0
    model = port(net, Bloom(27, 18, 6, 2, True, nnx.Rngs(seed)))
    return {"torch": net, "flax": model, "inputs": (ids, keep)}


FAULTS = [
    {
        "title": "slopes from one geometric series though the heads are six",
        "edits": [("    floor = 2 ** int(np.log2(heads))", "    floor = heads")],
        "layers": ["h.0.self_attention"],
        "between": ("h.0.self_attention.query_key_value", "h.0.self_attention.dense"),
        "causes": ["constant"],
        "level": "outputs",
    },
    {
        "title": "fused projection read as (3, heads, head_dim)",
        "edits": [("        qkv = self.query_key_value(x).reshape(b, s, self.heads, 3, self.head_dim)\n        q, k, v = qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]",
                   "        qkv = self.query_key_value(x).reshape(b, s, 3, self.heads, self.head_dim)\n        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]")],
        "layers": ["h.0.self_attention", "h.0.self_attention.query_key_value"],
        "between": ("h.0.self_attention.query_key_value", "h.0.self_attention.dense"),
        "causes": ["blocks", "heads", "rearranged"],
        "level": "outputs",
    },
    {
        "title": "bias laid along the queries, where the softmax does not see it",
        "edits": [("positions[:, None, None, :]", "positions[:, None, :, None]")],
        "layers": ["h.0.self_attention"],
        "between": ("h.0.self_attention.query_key_value", "h.0.self_attention.dense"),
        "causes": ["axis", "transposed"],
        "level": "outputs",
    },
    {
        "title": "bias added before the scaling",
        "edits": [("scores = scores / np.sqrt(self.head_dim) + bias", "scores = (scores + bias) / np.sqrt(self.head_dim)")],
        "layers": ["h.0.self_attention"],
        "between": ("h.0.self_attention.query_key_value", "h.0.self_attention.dense"),
        "causes": ["order", "scale"],
        "level": "outputs",
    },
    {
        "title": "quick gelu",
        "edits": [("0.5 * x * (1.0 + jnp.tanh(0.79788456 * (x + 0.044715 * x**3)))", "x * nnx.sigmoid(1.702 * x)")],
        "layers": ["h.0.mlp.gelu_impl", "h.0.mlp"],
        "between": ("h.0.mlp.dense_h_to_4h", "h.0.mlp.dense_4h_to_h"),
        "causes": ["gelu"],
        "level": "outputs",
    },
    {
        "title": "the feed-forward's residual is not the normed value",
        "edits": [("        shortcut_mlp = h if self.residual_post_norm else x\n", "        shortcut_mlp = x\n")],
        "layers": ["h.0", "h.0.mlp"],
        "between": ("h.0.mlp.dense_4h_to_h", "h.1.input_layernorm"),
        "causes": ["residual", "wiring"],
        "level": "outputs",
    },
    {
        "title": "norm of the embeddings not called",
        "edits": [("        x = self.word_embeddings_layernorm(x)\n", "")],
        "layers": ["word_embeddings_layernorm"],
        "causes": ["left_out", "wiring"],
        "level": "outputs",
    },
    {
        "title": "no dropout of the attention's weights",
        "edits": [("self.attn_drop = nnx.Dropout(0.1, deterministic=True, rngs=rngs)", "self.attn_drop = nnx.Dropout(0.0, deterministic=True, rngs=rngs)")],
        "layers": ["h.0.self_attention.attention_dropout"],
        "between": ("h.0.self_attention.query_key_value", "h.0.self_attention.dense"),
        "causes": ["training_attribute"],
        "level": "attributes",
    },
]
