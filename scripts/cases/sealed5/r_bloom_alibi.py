"""BLOOM (BigScience): a decoder with ALiBi biases, fused interleaved QKV and a normalised embedding."""
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import flax.linen as nn
import numpy as np
import torch
from torch.nn import functional as F

VOCAB, HIDDEN, HEADS, LAYERS, EPS = 37, 24, 6, 2, 1e-5
HIDDEN_DROPOUT, ATTENTION_DROPOUT = 0.1, 0.25


# ---- torch, after transformers' modeling_bloom.py
def build_alibi_tensor(attention_mask, num_heads, dtype):
    closest_power_of_2 = 2 ** math.floor(math.log2(num_heads))
    base = torch.tensor(2 ** (-(2 ** -(math.log2(closest_power_of_2) - 3))), dtype=dtype)
    powers = torch.arange(1, 1 + closest_power_of_2, dtype=torch.int32)
    slopes = torch.pow(base, powers)
    if closest_power_of_2 != num_heads:
        extra_base = torch.tensor(2 ** (-(2 ** -(math.log2(2 * closest_power_of_2) - 3))), dtype=dtype)
        num_remaining_heads = min(closest_power_of_2, num_heads - closest_power_of_2)
        extra_powers = torch.arange(1, 1 + 2 * num_remaining_heads, 2, dtype=torch.int32)
        slopes = torch.cat([slopes, torch.pow(extra_base, extra_powers)], dim=0)
    arange_tensor = ((attention_mask.cumsum(dim=-1) - 1) * attention_mask)[:, None, :]
    alibi = slopes[..., None] * arange_tensor
    return alibi.reshape(attention_mask.shape[0] * num_heads, 1, -1).to(dtype)


def dropout_add(x, residual, prob, training):
    return residual + F.dropout(x, p=prob, training=training)


class BloomGelu(torch.nn.Module):
    def forward(self, x):
        return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


class BloomAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = HEADS, HIDDEN // HEADS
        self.inv_norm_factor = 1.0 / math.sqrt(self.head_dim)
        self.hidden_dropout = HIDDEN_DROPOUT
        self.query_key_value = torch.nn.Linear(HIDDEN, 3 * HIDDEN)
        self.dense = torch.nn.Linear(HIDDEN, HIDDEN)
        self.attention_dropout = torch.nn.Dropout(ATTENTION_DROPOUT)

    def forward(self, hidden_states, residual, alibi, mask):
        b, q, _ = hidden_states.shape
        fused = self.query_key_value(hidden_states).view(b, q, self.num_heads, 3, self.head_dim)
        query, key, value = (fused[..., i, :].transpose(1, 2).reshape(-1, q, self.head_dim) for i in range(3))
        scores = alibi.baddbmm(query, key.transpose(1, 2), beta=1.0, alpha=self.inv_norm_factor)
        scores = scores.view(b, self.num_heads, q, q)
        scores = torch.masked_fill(scores, mask, torch.finfo(scores.dtype).min)
        probs = self.attention_dropout(F.softmax(scores, dim=-1))
        context = torch.bmm(probs.view(-1, q, q), value).view(b, self.num_heads, q, self.head_dim)
        context = context.permute(0, 2, 1, 3).reshape(b, q, -1)
        return dropout_add(self.dense(context), residual, self.hidden_dropout, self.training)


class BloomMLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden_dropout = HIDDEN_DROPOUT
        self.dense_h_to_4h = torch.nn.Linear(HIDDEN, 4 * HIDDEN)
        self.gelu_impl = BloomGelu()
        self.dense_4h_to_h = torch.nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, hidden_states, residual):
        out = self.dense_4h_to_h(self.gelu_impl(self.dense_h_to_4h(hidden_states)))
        return dropout_add(out, residual, self.hidden_dropout, self.training)


class BloomBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm = torch.nn.LayerNorm(HIDDEN, eps=EPS)
        self.self_attention = BloomAttention()
        self.post_attention_layernorm = torch.nn.LayerNorm(HIDDEN, eps=EPS)
        self.mlp = BloomMLP()

    def forward(self, hidden_states, alibi, mask):
        layernorm_output = self.input_layernorm(hidden_states)
        attention_output = self.self_attention(layernorm_output, hidden_states, alibi, mask)
        layernorm_output = self.post_attention_layernorm(attention_output)
        return self.mlp(layernorm_output, attention_output)


class BloomForCausalLM(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.word_embeddings = torch.nn.Embedding(VOCAB, HIDDEN)
        self.word_embeddings_layernorm = torch.nn.LayerNorm(HIDDEN, eps=EPS)
        self.h = torch.nn.ModuleList([BloomBlock() for _ in range(LAYERS)])
        self.ln_f = torch.nn.LayerNorm(HIDDEN, eps=EPS)
        self.lm_head = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
        self.lm_head.weight = self.word_embeddings.weight

    def forward(self, input_ids, attention_mask):
        hidden_states = self.word_embeddings_layernorm(self.word_embeddings(input_ids))
        alibi = build_alibi_tensor(attention_mask, HEADS, hidden_states.dtype)
        n = input_ids.shape[1]
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        mask = future[None, None] | (attention_mask == 0)[:, None, None, :]
        for block in self.h:
            hidden_states = block(hidden_states, alibi, mask)
        return self.lm_head(self.ln_f(hidden_states))


# ---- Flax Linen: one scanned block, QKV split at port time, causal ALiBi inside the attention
@dataclass(frozen=True)
class Config:
    vocab: int = VOCAB
    dim: int = HIDDEN
    heads: int = HEADS
    depth: int = LAYERS
    resid_drop: float = HIDDEN_DROPOUT
    attn_drop: float = ATTENTION_DROPOUT


def alibi_slopes(n):
    pow2 = lambda k: [2.0 ** (-8.0 * i / k) for i in range(1, k + 1)]
    k = 1 << (n.bit_length() - 1)
    return np.array(pow2(k) + pow2(2 * k)[0::2][:n - k])


class SelfAttention(nn.Module):
    cfg: Config
    deterministic: bool

    @nn.compact
    def __call__(self, x, keep):
        c = self.cfg
        hd = c.dim // c.heads
        qkv = nn.DenseGeneral((3, c.heads, hd), name="qkv")(x)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        pos = (jnp.cumsum(keep, axis=1) - 1) * keep
        bias = jnp.asarray(alibi_slopes(c.heads), x.dtype)[None, :, None, None] * pos[:, None, None, :]
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / hd ** 0.5 + bias
        t = jnp.arange(x.shape[1])
        allowed = (t[:, None] >= t[None, :]) & (keep[:, None, None, :] > 0)
        logits = jnp.where(allowed, logits, jnp.finfo(x.dtype).min)
        w = jax.nn.softmax(logits, axis=-1)
        w = nn.Dropout(c.attn_drop, deterministic=self.deterministic)(w)
        y = jnp.einsum("bhqk,bkhd->bqhd", w, v)
        return nn.DenseGeneral(c.dim, axis=(-2, -1), name="proj")(y)


class Block(nn.Module):
    cfg: Config
    deterministic: bool

    @nn.compact
    def __call__(self, x, keep):
        c = self.cfg
        drop = lambda y: nn.Dropout(c.resid_drop, deterministic=self.deterministic)(y)
        u = nn.LayerNorm(epsilon=EPS, use_fast_variance=False, name="norm1")(x)
        a = SelfAttention(c, self.deterministic, name="attn")(u, keep)
        x = x + drop(a)
        u = nn.LayerNorm(epsilon=EPS, use_fast_variance=False, name="norm2")(x)
        u = nn.Dense(4 * c.dim, name="up")(u)
        u = nn.Dense(c.dim, name="down")(0.5 * u * (1 + jnp.tanh(0.79788456 * (u + 0.044715 * u ** 3))))
        x = x + drop(u)
        return x, None


class Bloom(nn.Module):
    cfg: Config = Config()

    @nn.compact
    def __call__(self, tokens, keep, deterministic=True):
        c = self.cfg
        embed = nn.Embed(c.vocab, c.dim, name="embed")
        x = nn.LayerNorm(epsilon=EPS, use_fast_variance=False, name="embed_norm")(embed(tokens))
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True},
                        in_axes=nn.broadcast, length=c.depth)
        x, _ = stack(c, deterministic, name="blocks")(x, keep)
        x = nn.LayerNorm(epsilon=EPS, use_fast_variance=False, name="final_norm")(x)
        return embed.attend(x)


def port_weights(net):
    sd = {k: v.detach().numpy() for k, v in net.state_dict().items()}
    hd = HIDDEN // HEADS
    norm = lambda n: {"scale": sd[n + ".weight"], "bias": sd[n + ".bias"]}
    dense = lambda n: {"kernel": sd[n + ".weight"].T, "bias": sd[n + ".bias"]}

    def block(i):
        p = f"h.{i}."
        w, b = (sd[p + "self_attention.query_key_value." + s] for s in ("weight", "bias"))
        o = dense(p + "self_attention.dense")
        return {
            "norm1": norm(p + "input_layernorm"),
            "attn": {
                "qkv": {"kernel": w.reshape(HEADS, 3, hd, HIDDEN).transpose(3, 1, 0, 2),
                        "bias": b.reshape(HEADS, 3, hd).transpose(1, 0, 2)},
                "proj": {"kernel": o["kernel"].reshape(HEADS, hd, HIDDEN), "bias": o["bias"]},
            },
            "norm2": norm(p + "post_attention_layernorm"),
            "up": dense(p + "mlp.dense_h_to_4h"),
            "down": dense(p + "mlp.dense_4h_to_h"),
        }

    params = {
        "embed": {"embedding": sd["word_embeddings.weight"]},
        "embed_norm": norm("word_embeddings_layernorm"),
        "blocks": jax.tree.map(lambda *a: np.stack(a), *[block(i) for i in range(LAYERS)]),
        "final_norm": norm("ln_f"),
    }
    return Bloom(), {"params": jax.tree.map(jnp.asarray, params)}


def build(seed):
    torch.manual_seed(seed)
    net = BloomForCausalLM()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 1:
                p.copy_(0.3 * torch.randn_like(p) + ("norm" in name or "ln_f" in name) * name.endswith("weight"))
            else:
                p.copy_(torch.randn_like(p) * (0.7 if "embed" in name else p.shape[1] ** -0.5 * 1.3))
    net.eval()
    rng = np.random.RandomState(seed + 1)
    ids = rng.randint(0, VOCAB, (3, 7))
    mask = np.ones((3, 7), np.int64)
    mask[1, 5:] = 0
    mask[2, 4] = 0
    return {"torch": net, "flax": port_weights(net), "inputs": {"input_ids": ids, "attention_mask": mask}}


FAULTS = [
    {
        "title": "slopes of the heads beyond the power of two are the first ones, not every second one",
        "edits": [("pow2(2 * k)[0::2][:n - k]", "pow2(2 * k)[:n - k]")],
        "layers": ["h.0.self_attention", "h.0", "h.1.self_attention", ""],
        "between": ("h.0.self_attention.query_key_value", "h.0.self_attention.dense"),
        "causes": ["constant", "rearranged", "operand"],
        "level": "outputs",
    },
    {
        "title": "the attention's residual is the normalised input (apply_residual_connection_post_layernorm)",
        "edits": [("x = x + drop(a)", "x = u + drop(a)")],
        "layers": ["h.0", "h.0.self_attention"],
        "between": ("h.0.self_attention.dense", "h.0.post_attention_layernorm"),
        "causes": ["residual", "operand", "norm_order"],
        "level": "outputs",
    },
    {
        "title": "scores are divided by the root of head_dim after the ALiBi bias is added",
        "edits": [('jnp.einsum("bqhd,bkhd->bhqk", q, k) / hd ** 0.5 + bias',
                   '(jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias) / hd ** 0.5')],
        "layers": ["h.0.self_attention", "h.0"],
        "between": ("h.0.self_attention.query_key_value", "h.0.self_attention.dense"),
        "causes": ["order", "scale"],
        "level": "outputs",
    },
    {
        "title": "the two norms of each block are ported into one another's place",
        "edits": [('norm(p + "input_layernorm")', 'norm(p + "post_attention_layernorm" )'),
                  ('"norm2": norm(p + "post_attention_layernorm"),', '"norm2": norm(p + "input_layernorm"),')],
        "layers": ["h.0.input_layernorm", "h.0.post_attention_layernorm", "h.1.input_layernorm",
                   "h.1.post_attention_layernorm"],
        "between": None,
        "causes": ["swapped"],
        "level": "bits",
    },
    {
        "title": "the residual dropout takes the attention's rate",
        "edits": [("nn.Dropout(c.resid_drop,", "nn.Dropout(c.attn_drop,")],
        "layers": ["h.0", "h.0.self_attention", "h.0.mlp", "h.1.self_attention", "h.1.mlp"],
        "between": None,
        "causes": ["training_attribute", "dropout"],
        "level": "attributes",
    },
]
