"""OLMo-2-like decoder (post-norms, QK-norm over all heads, grouped queries, sliding window) and a scanned Linen port."""
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FF, LAYERS, WINDOW, PAD = 19, 20, 6, 2, 4, 14, 3, 3, 5


# ------------------------------------------------------------------ PyTorch


class Olmo2RMSNorm(torch.nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


class Olmo2RotaryEmbedding(torch.nn.Module):
    def __init__(self, dim, base=500.0):
        super().__init__()
        self.dim, self.base = dim, base

    def forward(self, x, position_ids):
        inv_freq = 1.0 / (self.base ** (torch.arange(0, self.dim, 2, dtype=x.dtype) / self.dim))
        freqs = position_ids.to(x.dtype)[:, None] * inv_freq[None, :]
        emb = torch.cat((freqs, freqs), dim=-1)
        return emb.cos(), emb.sin()


def rotate_half(x):
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2:]
    return torch.cat((-x2, x1), dim=-1)


def repeat_kv(hidden_states, n_rep):
    b, kv, t, d = hidden_states.shape
    return hidden_states[:, :, None].expand(b, kv, n_rep, t, d).reshape(b, kv * n_rep, t, d)


class Olmo2Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.k_proj = torch.nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = torch.nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = torch.nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.q_norm = Olmo2RMSNorm(HEADS * HEAD_DIM)
        self.k_norm = Olmo2RMSNorm(KV_HEADS * HEAD_DIM)

    def forward(self, hidden_states, position_embeddings, attention_mask):
        b, t, _ = hidden_states.shape
        query_states = self.q_norm(self.q_proj(hidden_states)).view(b, t, -1, HEAD_DIM).transpose(1, 2)
        key_states = self.k_norm(self.k_proj(hidden_states)).view(b, t, -1, HEAD_DIM).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(b, t, -1, HEAD_DIM).transpose(1, 2)
        cos, sin = position_embeddings
        query_states = query_states * cos + rotate_half(query_states) * sin
        key_states = key_states * cos + rotate_half(key_states) * sin
        key_states = repeat_kv(key_states, HEADS // KV_HEADS)
        value_states = repeat_kv(value_states, HEADS // KV_HEADS)
        weights = query_states @ key_states.transpose(2, 3) * HEAD_DIM ** -0.5 + attention_mask
        weights = torch.softmax(weights, dim=-1)
        out = (weights @ value_states).transpose(1, 2).reshape(b, t, -1)
        return self.o_proj(out)


class Olmo2MLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = torch.nn.Linear(HIDDEN, FF, bias=False)
        self.up_proj = torch.nn.Linear(HIDDEN, FF, bias=False)
        self.down_proj = torch.nn.Linear(FF, HIDDEN, bias=False)
        self.act_fn = torch.nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Olmo2DecoderLayer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = Olmo2Attention()
        self.mlp = Olmo2MLP()
        self.post_attention_layernorm = Olmo2RMSNorm(HIDDEN)
        self.post_feedforward_layernorm = Olmo2RMSNorm(HIDDEN)

    def forward(self, hidden_states, position_embeddings, attention_mask):
        attn = self.self_attn(hidden_states, position_embeddings, attention_mask)
        hidden_states = hidden_states + self.post_attention_layernorm(attn)
        return hidden_states + self.post_feedforward_layernorm(self.mlp(hidden_states))


class Olmo2ForCausalLM(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(VOCAB, HIDDEN, padding_idx=PAD)
        self.layers = torch.nn.ModuleList([Olmo2DecoderLayer() for _ in range(LAYERS)])
        self.norm = Olmo2RMSNorm(HIDDEN)
        self.rotary_emb = Olmo2RotaryEmbedding(HEAD_DIM)
        self.lm_head = torch.nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids):
        hidden_states = self.embed_tokens(input_ids)
        pos = torch.arange(input_ids.shape[1])
        distance = pos[:, None] - pos[None, :]
        allowed = (distance >= 0) & (distance < WINDOW)
        mask = torch.zeros(allowed.shape, dtype=hidden_states.dtype).masked_fill(~allowed, float("-inf"))
        position_embeddings = self.rotary_emb(hidden_states, pos)
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings, mask)
        return self.lm_head(self.norm(hidden_states))


# ------------------------------------------------------------------ Flax


class RMS(nn.Module):
    """Root mean square norm over the last `ndim` axes, with a scale of their shape."""
    ndim: int = 1

    @nn.compact
    def __call__(self, x):
        axes = tuple(range(-self.ndim, 0))
        scale = self.param("scale", nn.initializers.ones, x.shape[-self.ndim:])
        ms = jnp.mean(jnp.square(x), axis=axes, keepdims=True)
        return x * jax.lax.rsqrt(ms + 1e-6) * scale


def rotary_table(length, dtype, theta=500.0):
    half = HEAD_DIM // 2
    rate = theta ** (-jnp.arange(half, dtype=dtype) / half)
    angle = jnp.outer(jnp.arange(length, dtype=dtype), rate)[:, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x, table):
    c, s = table
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * c - b * s, b * c + a * s], axis=-1)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, table, visible):
        groups = HEADS // KV_HEADS
        query = nn.DenseGeneral((HEADS, HEAD_DIM), use_bias=False, name="query")(x)
        key_value = nn.DenseGeneral((2, KV_HEADS, HEAD_DIM), use_bias=False, name="key_value")(x)
        key, value = key_value[:, :, 0], key_value[:, :, 1]
        query = rotate(RMS(ndim=2, name="query_norm")(query), table)
        key = rotate(RMS(ndim=2, name="key_norm")(key), table)
        key = jnp.repeat(key, groups, axis=2)
        value = jnp.repeat(value, groups, axis=2)
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(HEAD_DIM)
        probs = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", probs, value)
        mixed = nn.DenseGeneral(HIDDEN, axis=(-2, -1), use_bias=False, name="merge")(mixed)
        x = x + RMS(name="attention_out_norm")(mixed)
        wide = nn.DenseGeneral((2, FF), use_bias=False, name="wide")(x)
        narrow = nn.Dense(HIDDEN, use_bias=False, name="narrow")(nn.silu(wide[..., 0, :]) * wide[..., 1, :])
        return x + RMS(name="mlp_out_norm")(narrow), None


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        table = self.param("tokens", nn.initializers.normal(1.0), (VOCAB, HIDDEN))
        x = jnp.take(table, tokens, axis=0)
        # the row of padding is not trained
        x = jnp.where((tokens == PAD)[..., None], jax.lax.stop_gradient(x), x)
        steps = jnp.arange(tokens.shape[1])
        back = steps[:, None] - steps
        visible = (back >= 0) & (back < WINDOW)
        stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True},
                        in_axes=nn.broadcast, length=LAYERS)
        x, _ = stack(name="stack")(x, rotary_table(tokens.shape[1], x.dtype), visible)
        return nn.Dense(VOCAB, use_bias=False, name="logits")(RMS(name="final_norm")(x))


# ------------------------------------------------------------------ weights


def layer_weights(layer):
    a, m = layer.self_attn, layer.mlp

    def w(linear, *shape):
        return linear.weight.detach().numpy().T.reshape(*shape)

    return {
        "query": {"kernel": w(a.q_proj, HIDDEN, HEADS, HEAD_DIM)},
        "key_value": {"kernel": np.stack([w(a.k_proj, HIDDEN, KV_HEADS, HEAD_DIM),
                                          w(a.v_proj, HIDDEN, KV_HEADS, HEAD_DIM)], axis=1)},
        "query_norm": {"scale": a.q_norm.weight.detach().numpy().reshape(HEADS, HEAD_DIM)},
        "key_norm": {"scale": a.k_norm.weight.detach().numpy().reshape(KV_HEADS, HEAD_DIM)},
        "merge": {"kernel": w(a.o_proj, HEADS, HEAD_DIM, HIDDEN)},
        "attention_out_norm": {"scale": layer.post_attention_layernorm.weight.detach().numpy()},
        "wide": {"kernel": np.stack([w(m.gate_proj, HIDDEN, FF), w(m.up_proj, HIDDEN, FF)], axis=1)},
        "narrow": {"kernel": w(m.down_proj, FF, HIDDEN)},
        "mlp_out_norm": {"scale": layer.post_feedforward_layernorm.weight.detach().numpy()},
    }


def port(net):
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *[layer_weights(l) for l in net.layers])
    return {"params": {
        "tokens": jnp.asarray(net.embed_tokens.weight.detach().numpy()),
        "stack": stacked,
        "final_norm": {"scale": jnp.asarray(net.norm.weight.detach().numpy())},
        "logits": {"kernel": jnp.asarray(net.lm_head.weight.detach().numpy().T)},
    }}


def build(seed):
    torch.manual_seed(seed)
    net = Olmo2ForCausalLM().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(1 + 0.3 * torch.randn(p.shape) if "norm" in name else torch.randn(p.shape) / math.sqrt(p.shape[-1]) * 1.3)
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, (2, 7))
    ids[0, 3] = ids[1, 0] = ids[1, 1] = PAD
    return {"torch": net, "flax": (Decoder(), port(net)), "inputs": (ids,)}


FAULTS = [
    {"title": "the norm of queries and keys is taken over each head alone, not over all heads together",
     "edits": [("ms = jnp.mean(jnp.square(x), axis=axes, keepdims=True)", "ms = jnp.mean(jnp.square(x), axis=-1, keepdims=True)")],
     "layers": [f"layers.{i}.self_attn.{n}" for i in range(3) for n in ("q_norm", "k_norm")],
     "between": ("layers.0.self_attn.q_proj", "layers.0.self_attn.o_proj"),
     "causes": ["axis", "size"], "level": "outputs"},
    {"title": "the heads of keys and values are tiled where torch repeats each of them",
     "edits": [("key = jnp.repeat(key, groups, axis=2)", "key = jnp.tile(key, (1, 1, groups, 1))"),
               ("value = jnp.repeat(value, groups, axis=2)", "value = jnp.tile(value, (1, 1, groups, 1))")],
     "layers": [f"layers.{i}.self_attn" for i in range(3)],
     "between": ("layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj"),
     "causes": ["rearranged", "heads", "blocks"], "level": "outputs"},
    {"title": "the sliding window lets a step see one earlier step too many",
     "edits": [("visible = (back >= 0) & (back < WINDOW)", "visible = (back >= 0) & (back <= WINDOW)")],
     "layers": [f"layers.{i}.self_attn" for i in range(3)] + [""],
     "between": ("embed_tokens", "layers.0.self_attn.o_proj"),
     "causes": ["mask", "size", "constant"], "level": "outputs"},
    {"title": "the embedding of the padding token gets a gradient, which torch's padding_idx keeps at zero",
     "edits": [("        x = jnp.where((tokens == PAD)[..., None], jax.lax.stop_gradient(x), x)\n", "")],
     "layers": ["embed_tokens"],
     "between": ("the input", "layers.0"),
     "causes": ["padding_idx", "stop_gradient"], "level": "gradients"},
    {"title": "the norm after the MLP is given the weights of the norm after the attention",
     "edits": [('"mlp_out_norm": {"scale": layer.post_feedforward_layernorm.weight.', '"mlp_out_norm": {"scale": layer.post_attention_layernorm.weight.')],
     "layers": [f"layers.{i}.post_feedforward_layernorm" for i in range(3)],
     "between": ("layers.0.mlp", "layers.1"),
     "causes": ["values", "weights", "operand"], "level": "bits"},
]
