"""MPNet/RoBERTa-like sentence encoder with shared relative buckets; Flax side is Linen with nn.scan."""
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional as F


class MPNetEmbeddings(torch.nn.Module):
    def __init__(self, vocab, hidden, max_pos, pad, eps, dropout):
        super().__init__()
        self.padding_idx = pad
        self.word_embeddings = torch.nn.Embedding(vocab, hidden)
        self.position_embeddings = torch.nn.Embedding(max_pos, hidden)
        self.LayerNorm = torch.nn.LayerNorm(hidden, eps=eps)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, input_ids):
        mask = input_ids.ne(self.padding_idx).long()
        position_ids = torch.cumsum(mask, dim=1) * mask + self.padding_idx
        x = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(x))


class MPNetSelfAttention(torch.nn.Module):
    def __init__(self, hidden, heads, eps, dropout):
        super().__init__()
        self.heads, self.head_dim = heads, hidden // heads
        self.q = torch.nn.Linear(hidden, hidden)
        self.k = torch.nn.Linear(hidden, hidden)
        self.v = torch.nn.Linear(hidden, hidden)
        self.o = torch.nn.Linear(hidden, hidden)
        self.LayerNorm = torch.nn.LayerNorm(hidden, eps=eps)
        self.dropout = torch.nn.Dropout(dropout)

    def split(self, x):
        return x.view(x.shape[0], x.shape[1], self.heads, self.head_dim).transpose(1, 2)

    def forward(self, hidden_states, attention_mask, position_bias):
        q, k, v = self.split(self.q(hidden_states)), self.split(self.k(hidden_states)), self.split(self.v(hidden_states))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.head_dim)
        scores = scores + position_bias + attention_mask
        c = torch.matmul(F.softmax(scores, dim=-1), v)
        c = c.transpose(1, 2).flatten(2)
        return self.LayerNorm(self.dropout(self.o(c)) + hidden_states)


class MPNetLayer(torch.nn.Module):
    def __init__(self, hidden, heads, inner, eps, dropout):
        super().__init__()
        self.attention = MPNetSelfAttention(hidden, heads, eps, dropout)
        self.intermediate = torch.nn.Linear(hidden, inner)
        self.act = torch.nn.GELU()
        self.output = torch.nn.Linear(inner, hidden)
        self.LayerNorm = torch.nn.LayerNorm(hidden, eps=eps)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x, attention_mask, position_bias):
        x = self.attention(x, attention_mask, position_bias)
        y = self.output(self.act(self.intermediate(x)))
        return self.LayerNorm(self.dropout(y) + x)


class MPNetEncoder(torch.nn.Module):
    def __init__(self, hidden, heads, inner, layers, buckets, max_distance, eps, dropout):
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.layer = torch.nn.ModuleList([MPNetLayer(hidden, heads, inner, eps, dropout) for _ in range(layers)])
        self.relative_attention_bias = torch.nn.Embedding(buckets, heads)

    def bucket(self, relative_position):
        n = -relative_position
        half = self.buckets // 2
        ret = (n < 0).long() * half
        n = n.abs()
        max_exact = half // 2
        large = max_exact + (
            torch.log(n.double().clamp(min=1) / max_exact) / math.log(self.max_distance / max_exact) * (half - max_exact)
        ).long()
        large = torch.clamp(large, max=half - 1)
        return ret + torch.where(n < max_exact, n, large)

    def forward(self, x, attention_mask):
        s = x.shape[1]
        context = torch.arange(s)[:, None]
        memory = torch.arange(s)[None, :]
        bias = self.relative_attention_bias(self.bucket(memory - context)).permute(2, 0, 1)[None]
        for layer in self.layer:
            x = layer(x, attention_mask, bias)
        return x


class LMHead(torch.nn.Module):
    def __init__(self, hidden, vocab, eps):
        super().__init__()
        self.dense = torch.nn.Linear(hidden, hidden)
        self.act = torch.nn.GELU()
        self.layer_norm = torch.nn.LayerNorm(hidden, eps=eps)
        self.decoder = torch.nn.Linear(hidden, vocab)

    def forward(self, x):
        return self.decoder(self.layer_norm(self.act(self.dense(x))))


class SentencePooler(torch.nn.Module):
    def __init__(self, hidden, out):
        super().__init__()
        self.dense = torch.nn.Linear(hidden, out)

    def forward(self, x, mask):
        m = mask[..., None].to(x.dtype)
        mean = (x * m).sum(1) / m.sum(1).clamp(min=1e-9)
        return torch.tanh(self.dense(mean))


class MPNetModel(torch.nn.Module):
    def __init__(self, vocab=29, hidden=12, heads=3, inner=20, layers=3, max_pos=17, pad=1, buckets=8, max_distance=7, eps=1e-5, dropout=0.1, out=10):
        super().__init__()
        self.pad = pad
        self.embeddings = MPNetEmbeddings(vocab, hidden, max_pos, pad, eps, dropout)
        self.encoder = MPNetEncoder(hidden, heads, inner, layers, buckets, max_distance, eps, dropout)
        self.lm_head = LMHead(hidden, vocab, eps)
        self.pooler = SentencePooler(hidden, out)

    def forward(self, input_ids):
        keep = input_ids.ne(self.pad)
        extended = (1.0 - keep[:, None, None, :].to(self.pooler.dense.weight.dtype)) * -1e9
        x = self.encoder(self.embeddings(input_ids), extended)
        return self.lm_head(x), self.pooler(x, keep)


# ---------------------------------------------------------------- Flax


def relative_position_bucket(relative_position, num_buckets, max_distance):
    num_buckets //= 2
    n = -relative_position
    ret = (n < 0).astype(jnp.int32) * num_buckets
    n = jnp.abs(n)
    max_exact = num_buckets // 2
    log_ratio = jnp.log(jnp.maximum(n, 1) / max_exact) / jnp.log(max_distance / max_exact)
    large = max_exact + (log_ratio * (num_buckets - max_exact)).astype(jnp.int32)
    large = jnp.minimum(large, num_buckets - 1)
    return ret + jnp.where(n < max_exact, n, large)


class FlaxMPNetEmbeddings(nn.Module):
    vocab: int
    hidden: int
    max_pos: int
    pad: int
    eps: float
    dropout: float

    @nn.compact
    def __call__(self, input_ids, deterministic=True):
        not_pad = (input_ids != self.pad).astype(jnp.int32)
        position_ids = jnp.cumsum(not_pad, axis=1) * not_pad + self.pad
        x = nn.Embed(self.vocab, self.hidden, name="word_embeddings")(input_ids)
        x = x + nn.Embed(self.max_pos, self.hidden, name="position_embeddings")(position_ids)
        x = nn.LayerNorm(epsilon=self.eps, use_fast_variance=False, name="LayerNorm")(x)
        return nn.Dropout(self.dropout)(x, deterministic=deterministic)


class EncoderBlock(nn.Module):
    hidden: int
    heads: int
    inner: int
    eps: float
    dropout: float
    deterministic: bool = True

    @nn.compact
    def __call__(self, x, attention_mask, position_bias):
        head_dim = self.hidden // self.heads
        proj = lambda name: nn.DenseGeneral((self.heads, head_dim), name=name)(x)
        q, k, v = proj("query"), proj("key"), proj("value")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(head_dim)
        scores = scores + position_bias + attention_mask
        probs = nn.softmax(scores, axis=-1)
        ctx = jnp.einsum("bhqk,bkhd->bqhd", probs, v)
        out = nn.DenseGeneral(self.hidden, axis=(-2, -1), name="out")(ctx)
        out = nn.Dropout(self.dropout)(out, deterministic=self.deterministic)
        attn = nn.LayerNorm(epsilon=self.eps, use_fast_variance=False, name="attention_norm")(out + x)
        y = nn.Dense(self.inner, name="wi")(attn)
        y = nn.gelu(y, approximate=False)
        y = nn.Dense(self.hidden, name="wo")(y)
        y = nn.Dropout(self.dropout)(y, deterministic=self.deterministic)
        y = nn.LayerNorm(epsilon=self.eps, use_fast_variance=False, name="output_norm")(y + attn)
        return y, None


class FlaxMPNet(nn.Module):
    vocab: int = 29
    hidden: int = 12
    heads: int = 3
    inner: int = 20
    layers: int = 3
    max_pos: int = 17
    pad: int = 1
    buckets: int = 8
    max_distance: int = 7
    eps: float = 1e-5
    dropout: float = 0.1
    out: int = 10

    @nn.compact
    def __call__(self, input_ids):
        keep = input_ids != self.pad
        x = FlaxMPNetEmbeddings(
            self.vocab, self.hidden, self.max_pos, self.pad, self.eps, self.dropout, name="embeddings"
        )(input_ids)
        s = input_ids.shape[1]
        context = jnp.arange(s)[:, None]
        memory = jnp.arange(s)[None, :]
        buckets = relative_position_bucket(memory - context, self.buckets, self.max_distance)
        bias = nn.Embed(self.buckets, self.heads, name="relative_attention_bias")(buckets)
        bias = bias.transpose(2, 0, 1)[None]
        additive = jnp.where(keep[:, None, None, :], 0.0, -1e9)
        blocks = nn.scan(
            EncoderBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.layers,
        )
        x, _ = blocks(self.hidden, self.heads, self.inner, self.eps, self.dropout, name="layers")(x, additive, bias)

        h = nn.Dense(self.hidden, name="lm_dense")(x)
        h = nn.gelu(h, approximate=False)
        h = nn.LayerNorm(epsilon=self.eps, use_fast_variance=False, name="lm_norm")(h)
        logits = nn.Dense(self.vocab, name="lm_decoder")(h)

        m = keep[..., None].astype(x.dtype)
        mean = (x * m).sum(axis=1) / jnp.maximum(m.sum(axis=1), 1e-9)
        pooled = jnp.tanh(nn.Dense(self.out, name="pooler_dense")(mean))
        return logits, pooled


def port(net):
    t = lambda w: jnp.asarray(w.detach().numpy())
    dense = lambda m: {"kernel": t(m.weight).T, "bias": t(m.bias)}
    norm = lambda m: {"scale": t(m.weight), "bias": t(m.bias)}
    emb = lambda m: {"embedding": t(m.weight)}

    def block(layer):
        a = layer.attention
        d, h, k = a.q.in_features, a.heads, a.head_dim
        heads = lambda m: {"kernel": t(m.weight).T.reshape(d, h, k), "bias": t(m.bias).reshape(h, k)}
        return {
            "query": heads(a.q),
            "key": heads(a.k),
            "value": heads(a.v),
            "out": {"kernel": t(a.o.weight).T.reshape(h, k, d), "bias": t(a.o.bias)},
            "attention_norm": norm(a.LayerNorm),
            "wi": dense(layer.intermediate),
            "wo": dense(layer.output),
            "output_norm": norm(layer.LayerNorm),
        }

    blocks = [block(layer) for layer in net.encoder.layer]
    return {
        "embeddings": {
            "word_embeddings": emb(net.embeddings.word_embeddings),
            "position_embeddings": emb(net.embeddings.position_embeddings),
            "LayerNorm": norm(net.embeddings.LayerNorm),
        },
        "relative_attention_bias": emb(net.encoder.relative_attention_bias),
        "layers": jax.tree.map(lambda *x: jnp.stack(x), *blocks),
        "lm_dense": dense(net.lm_head.dense),
        "lm_norm": norm(net.lm_head.layer_norm),
        "lm_decoder": dense(net.lm_head.decoder),
        "pooler_dense": dense(net.pooler.dense),
    }


def build(seed):
    torch.manual_seed(seed)
    net = MPNetModel().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(0, 0.5)
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, 29, (2, 11))
    ids[0, 9:] = 1
    ids[1, :3] = 1
    return {"torch": net, "flax": (FlaxMPNet(), {"params": port(net)}), "inputs": ids}


FAULTS = [
    {
        "title": "position ids from arange + pad + 1, as if nothing were padded",
        "edits": [(
            "position_ids = jnp.cumsum(not_pad, axis=1) * not_pad + self.pad",
            "position_ids = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape) + self.pad + 1",
        )],
        "layers": ["embeddings", "embeddings.position_embeddings"],
        "between": ("embeddings.word_embeddings", "embeddings.position_embeddings"),
        "causes": ["offset", "operand", "operation"],
        "level": "outputs",
    },
    {
        "title": "relative position is context minus memory",
        "edits": [("relative_position_bucket(memory - context, ", "relative_position_bucket(context - memory, ")],
        "layers": ["encoder", "encoder.relative_attention_bias"],
        "between": ("embeddings.LayerNorm", "encoder.relative_attention_bias"),
        "causes": ["operand", "swapped", "offset"],
        "level": "outputs",
    },
    {
        "title": "far buckets are not clamped to the last of their half",
        "edits": [("    large = jnp.minimum(large, num_buckets - 1)\n", "")],
        "layers": ["encoder", "encoder.relative_attention_bias"],
        "between": ("embeddings.LayerNorm", "encoder.relative_attention_bias"),
        "causes": ["left_out", "offset"],
        "level": "outputs",
    },
    {
        "title": "MLP's residual is the layer's input instead of the attention's output",
        "edits": [("(y + attn)", "(y + x)")],
        "layers": ["encoder.layer.0"],
        "between": ("encoder.layer.0.output", "encoder.layer.0.LayerNorm"),
        "causes": ["residual", "operand"],
        "level": "outputs",
    },
    {
        "title": "tanh GELU in the LM head only",
        "edits": [("        h = nn.gelu(h, approximate=False)\n", "        h = nn.gelu(h)\n")],
        "layers": ["lm_head.act", "lm_head"],
        "between": ("lm_head.dense", "lm_head.layer_norm"),
        "causes": ["gelu"],
        "level": "outputs",
    },
    {
        "title": "mean pooling counts the padded steps",
        "edits": [("mean = (x * m).sum(axis=1) / jnp.maximum(m.sum(axis=1), 1e-9)", "mean = x.mean(axis=1)")],
        "layers": ["pooler"],
        "between": ("lm_head.decoder", "pooler.dense"),
        "causes": ["mask", "token", "operation"],
        "level": "outputs",
    },
    {
        "title": "attention's output kernel not transposed before the reshape",
        "edits": [("t(a.o.weight).T.reshape(h, k, d)", "t(a.o.weight).reshape(h, k, d)")],
        "layers": ["encoder.layer.0.attention.o"],
        "causes": ["transposed"],
        "level": "outputs",
    },
    {
        "title": "LayerNorm at Linen's default epsilon in the scanned attention",
        "edits": [("nn.LayerNorm(epsilon=self.eps, use_fast_variance=False, name=\"attention_norm\")", "nn.LayerNorm(use_fast_variance=False, name=\"attention_norm\")")],
        "layers": ["encoder.layer.0.attention.LayerNorm"],
        "causes": ["epsilon"],
        "level": "outputs",
    },
    {
        "title": "dropout after the embeddings has no rate handed down",
        "edits": [("self.pad, self.eps, self.dropout, name=\"embeddings\"", "self.pad, self.eps, 0.0, name=\"embeddings\"")],
        "layers": ["embeddings.dropout"],
        "causes": ["training_attribute", "dropout"],
        "level": "attributes",
    },
]
