"""NeoX/GPT-J-like decoder: parallel residual, partial rotary in interleaved pairs, head with a bias; nnx."""
import torch
import torch.nn as tnn
import torch.nn.functional as F
import numpy as np

from flax import nnx
import jax
import jax.numpy as jnp

HIDDEN, HEADS, HEAD_DIM, ROTARY_DIM, INTER, VOCAB, N_LAYERS = 24, 3, 8, 4, 56, 34, 2


def fixed_pos_embedding(seq_len, dim, dtype):
    inv_freq = 1.0 / (10000 ** (torch.arange(0, dim, 2, dtype=dtype) / dim))
    sinusoid = torch.einsum("i,j->ij", torch.arange(seq_len, dtype=dtype), inv_freq)
    return torch.sin(sinusoid), torch.cos(sinusoid)


def rotate_every_two(x):
    x1, x2 = x[..., ::2], x[..., 1::2]
    return torch.stack((-x2, x1), dim=-1).flatten(-2)


def apply_rotary(x, sin, cos):
    sin, cos = (t.repeat_interleave(2, dim=-1)[None, :, None, :] for t in (sin, cos))
    return x * cos + rotate_every_two(x) * sin


class NeoXAttention(tnn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = tnn.Linear(HIDDEN, HIDDEN)
        self.k_proj = tnn.Linear(HIDDEN, HIDDEN)
        self.v_proj = tnn.Linear(HIDDEN, HIDDEN)
        self.dense = tnn.Linear(HIDDEN, HIDDEN)
        self.softmax = tnn.Softmax(dim=-1)

    def forward(self, x):
        b, s, _ = x.shape
        q = self.q_proj(x).view(b, s, HEADS, HEAD_DIM)
        k = self.k_proj(x).view(b, s, HEADS, HEAD_DIM)
        v = self.v_proj(x).view(b, s, HEADS, HEAD_DIM).transpose(1, 2)
        sin, cos = fixed_pos_embedding(s, ROTARY_DIM, x.dtype)
        q = torch.cat([apply_rotary(q[..., :ROTARY_DIM], sin, cos), q[..., ROTARY_DIM:]], dim=-1).transpose(1, 2)
        k = torch.cat([apply_rotary(k[..., :ROTARY_DIM], sin, cos), k[..., ROTARY_DIM:]], dim=-1).transpose(1, 2)
        scores = torch.matmul(q, k.transpose(-1, -2)) / HEAD_DIM**0.5
        scores = scores.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), torch.finfo(x.dtype).min)
        return self.dense(torch.matmul(self.softmax(scores), v).transpose(1, 2).reshape(b, s, HIDDEN))


class NeoXMLP(tnn.Module):
    def __init__(self):
        super().__init__()
        self.dense_h_to_4h = tnn.Linear(HIDDEN, INTER)
        self.dense_4h_to_h = tnn.Linear(INTER, HIDDEN)

    def forward(self, x):
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))


class NeoXLayer(tnn.Module):
    def __init__(self, hidden_dropout=0.1):
        super().__init__()
        self.input_layernorm = tnn.LayerNorm(HIDDEN)
        self.post_attention_layernorm = tnn.LayerNorm(HIDDEN)
        self.post_attention_dropout = tnn.Dropout(hidden_dropout)
        self.attention = NeoXAttention()
        self.mlp = NeoXMLP()

    def forward(self, x):
        attn = self.post_attention_dropout(self.attention(self.input_layernorm(x)))
        # x = x + attn(ln1(x)) + mlp(ln2(x))
        return self.mlp(self.post_attention_layernorm(x)) + attn + x


class NeoX(tnn.Module):
    def __init__(self):
        super().__init__()
        self.embed_in = tnn.Embedding(VOCAB, HIDDEN)
        self.layers = tnn.ModuleList(NeoXLayer() for _ in range(N_LAYERS))
        self.final_layer_norm = tnn.LayerNorm(HIDDEN)
        self.embed_out = tnn.Linear(HIDDEN, VOCAB)

    def forward(self, input_ids):
        x = self.embed_in(input_ids)
        hidden = []
        for layer in self.layers:
            x = layer(x)
            hidden.append(x)
        return self.embed_out(self.final_layer_norm(x)), tuple(hidden)


def rotary_sin_cos(seq_len: int, dim: int):
    inv_freq = 1.0 / (10000 ** (jnp.arange(0, dim, 2) / dim))
    angles = jnp.einsum("i,j->ij", jnp.arange(seq_len), inv_freq)
    table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.split(jnp.repeat(table, 2, axis=-1), 2, axis=-1)


def rotate_pairs(x):
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([-odd, even], axis=-1).reshape(x.shape)


def partial_rotary(x, sin, cos):
    sin, cos = sin[:, None, :], cos[:, None, :]
    rot, keep = x[..., :ROTARY_DIM], x[..., ROTARY_DIM:]
    rot = rot * cos + rotate_pairs(rot) * sin
    return jnp.concatenate([rot, keep], axis=-1)


class Attention(nnx.Module):
    def __init__(self, rngs):
        heads = lambda: nnx.LinearGeneral(HIDDEN, (HEADS, HEAD_DIM), rngs=rngs)
        self.query, self.key, self.value = heads(), heads(), heads()
        self.out = nnx.LinearGeneral((HEADS, HEAD_DIM), HIDDEN, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        n = x.shape[1]
        sin, cos = rotary_sin_cos(n, ROTARY_DIM)
        q = partial_rotary(self.query(x), sin, cos)
        k = partial_rotary(self.key(x), sin, cos)
        v = self.value(x)
        attn_weights = jnp.einsum("...qhd,...khd->...hqk", q, k) / jnp.sqrt(HEAD_DIM)
        causal = jnp.arange(n)[:, None] >= jnp.arange(n)[None, :]
        attn_weights = jnp.where(causal, attn_weights, jnp.finfo(attn_weights.dtype).min)
        attn_weights = jax.nn.softmax(attn_weights, axis=-1)
        return self.out(jnp.einsum("...hqk,...khd->...qhd", attn_weights, v))


class ParallelBlock(nnx.Module):
    def __init__(self, rngs, hidden_dropout=0.1):
        self.ln1 = nnx.LayerNorm(HIDDEN, epsilon=1e-5, rngs=rngs)
        self.ln2 = nnx.LayerNorm(HIDDEN, epsilon=1e-5, rngs=rngs)
        self.attn = Attention(rngs)
        self.drop = nnx.Dropout(rate=hidden_dropout, deterministic=True, rngs=rngs)
        self.fc_in = nnx.Linear(HIDDEN, INTER, rngs=rngs)
        self.fc_out = nnx.Linear(INTER, HIDDEN, rngs=rngs)

    def mlp(self, x):
        return self.fc_out(nnx.gelu(self.fc_in(x), approximate=False))

    def __call__(self, x):
        h = self.ln1(x)
        attn = self.drop(self.attn(h))
        h = self.ln2(x)
        ffn = self.mlp(h)
        return x + attn + ffn


class FlaxNeoX(nnx.Module):
    def __init__(self, rngs):
        self.embed_in = nnx.Param(jax.random.normal(rngs.params(), (VOCAB, HIDDEN)))
        self.layers = nnx.List([ParallelBlock(rngs) for _ in range(N_LAYERS)])
        self.ln_f = nnx.LayerNorm(HIDDEN, epsilon=1e-5, rngs=rngs)
        self.embed_out = nnx.Linear(HIDDEN, VOCAB, use_bias=True, rngs=rngs)

    def __call__(self, input_ids):
        x = jnp.take(self.embed_in[...], input_ids, axis=0)
        states = []
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        return self.embed_out(self.ln_f(x)), tuple(states)


def port(net, model):
    sd = {k: jnp.asarray(v.numpy()) for k, v in net.state_dict().items()}

    def set_norm(norm, name):
        norm.scale[...], norm.bias[...] = sd[name + ".weight"], sd[name + ".bias"]

    def set_linear(lin, name):
        lin.kernel[...] = sd[name + ".weight"].T.reshape(lin.kernel.shape)
        if lin.bias is not None:
            lin.bias[...] = sd[name + ".bias"].reshape(lin.bias.shape)

    model.embed_in[...] = sd["embed_in.weight"]
    for i, layer in enumerate(model.layers):
        set_norm(layer.ln1, f"layers.{i}.input_layernorm")
        set_norm(layer.ln2, f"layers.{i}.post_attention_layernorm")
        for ours, theirs in dict(query="q_proj", key="k_proj", value="v_proj", out="dense").items():
            set_linear(getattr(layer.attn, ours), f"layers.{i}.attention.{theirs}")
        set_linear(layer.fc_in, f"layers.{i}.mlp.dense_h_to_4h")
        set_linear(layer.fc_out, f"layers.{i}.mlp.dense_4h_to_h")
    set_norm(model.ln_f, "final_layer_norm")
    set_linear(model.embed_out, "embed_out")
    return model


def build(seed):
    torch.manual_seed(seed)
    net = NeoX().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.2)
            elif "norm" in name:
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(0, 0.3)
    ids = np.random.default_rng(seed).integers(0, VOCAB, (2, 11))
    return {"torch": net, "flax": port(net, FlaxNeoX(nnx.Rngs(seed))), "inputs": ids}


FAULTS = [
    {
        "title": "sequential residual, as in GPT-2",
        "edits": [("        h = self.ln2(x)\n        ffn = self.mlp(h)\n        return x + attn + ffn\n",
                   "        x = x + attn\n        h = self.ln2(x)\n        ffn = self.mlp(h)\n        return x + ffn\n")],
        "layers": ["layers.0", "layers.0.post_attention_layernorm"],
        "between": ("layers.0.attention.dense", "layers.0.post_attention_layernorm"),
        "causes": ["residual", "wiring", "operand"],
        "level": "outputs",
    },
    {
        "title": "feed-forward normed by the attention's norm, as in GPT-J",
        "edits": [("        h = self.ln2(x)\n", "")],
        "layers": ["layers.0", "layers.0.post_attention_layernorm"],
        "between": ("layers.0.attention.dense", "layers.0.mlp.dense_h_to_4h"),
        "causes": ["operand", "wiring"],
        "level": "outputs",
    },
    {
        "title": "sines and cosines tiled where each must stand twice in a row",
        "edits": [("    table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)\n    return jnp.split(jnp.repeat(table, 2, axis=-1), 2, axis=-1)",
                   "    return jnp.tile(jnp.sin(angles), (1, 2)), jnp.tile(jnp.cos(angles), (1, 2))")],
        "layers": ["layers.0.attention"],
        "between": ("layers.0.attention.v_proj", "layers.0.attention.dense"),
        "causes": ["rearranged", "rope"],
        "level": "outputs",
    },
    {
        "title": "frequencies computed for the whole head's width",
        "edits": [("inv_freq = 1.0 / (10000 ** (jnp.arange(0, dim, 2) / dim))", "inv_freq = 1.0 / (10000 ** (jnp.arange(0, dim, 2) / HEAD_DIM))")],
        "layers": ["layers.0.attention"],
        "between": ("layers.0.attention.v_proj", "layers.0.attention.dense"),
        "causes": ["constant", "rope"],
        "level": "outputs",
    },
    {
        "title": "rotated channels are the key's last ones, the query's first ones",
        "edits": [("k = partial_rotary(self.key(x), sin, cos)", "k = jnp.roll(partial_rotary(jnp.roll(self.key(x), ROTARY_DIM, -1), sin, cos), -ROTARY_DIM, -1)")],
        "layers": ["layers.0.attention"],
        "between": ("layers.0.attention.v_proj", "layers.0.attention.dense"),
        "causes": ["rope", "offset"],
        "level": "outputs",
    },
    {
        "title": "softmax in bfloat16",
        "edits": [("attn_weights = jax.nn.softmax(attn_weights, axis=-1)", "attn_weights = jax.nn.softmax(attn_weights.astype(jnp.bfloat16), axis=-1).astype(x.dtype)")],
        "layers": ["layers.0.attention.softmax", "layers.0.attention"],
        "between": ("layers.0.attention.v_proj", "layers.0.attention.dense"),
        "causes": ["dtype"],
        "level": "outputs",
    },
    {
        "title": "head without its bias",
        "edits": [("nnx.Linear(HIDDEN, VOCAB, use_bias=True, rngs=rngs)", "nnx.Linear(HIDDEN, VOCAB, use_bias=False, rngs=rngs)")],
        "layers": ["embed_out"],
        "causes": ["bias_missing"],
        "level": "outputs",
    },
    {
        "title": "dropout given the share to keep",
        "edits": [("nnx.Dropout(rate=hidden_dropout,", "nnx.Dropout(rate=1.0 - hidden_dropout,")],
        "layers": ["layers.0.post_attention_dropout"],
        "between": ("layers.0.attention.dense", "layers.0.post_attention_layernorm"),
        "causes": ["training_attribute"],
        "level": "attributes",
    },
]
