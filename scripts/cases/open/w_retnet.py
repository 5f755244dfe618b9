"""RetNet decoder, parallel form: rotated queries and keys, decays per head, normalised retention, swish gate."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import linen as nn
from torch import nn as tnn


class RetNetRelPos(tnn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.dim, self.heads = dim, heads

    def forward(self, length, dtype):
        half = self.dim // self.heads // 2
        angle = 1.0 / (10000 ** torch.linspace(0, 1, half, dtype=dtype))
        angle = angle.unsqueeze(-1).repeat(1, 2).flatten()
        decay = torch.log(1 - 2 ** (-2 - torch.arange(self.heads).to(dtype)))
        index = torch.arange(length).to(dtype)
        theta = index[:, None] * angle[None, :]
        gap = index[:, None] - index[None, :]
        mask = torch.exp(gap * decay[:, None, None]).masked_fill(gap < 0, 0)
        mask = mask / mask.sum(dim=-1, keepdim=True).sqrt()
        return theta.sin(), theta.cos(), mask


def rotate_every_two(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


class GroupRMS(tnn.Module):
    def __init__(self, eps=1e-5):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class MultiScaleRetention(tnn.Module):
    def __init__(self, dim, heads, factor=2):
        super().__init__()
        self.heads, self.key_dim, self.head_dim = heads, dim // heads, factor * dim // heads
        self.q_proj = tnn.Linear(dim, dim, bias=False)
        self.k_proj = tnn.Linear(dim, dim, bias=False)
        self.v_proj = tnn.Linear(dim, factor * dim, bias=False)
        self.g_proj = tnn.Linear(dim, factor * dim, bias=False)
        self.group_norm = GroupRMS()
        self.out_proj = tnn.Linear(factor * dim, dim, bias=False)

    def forward(self, x, pos):
        (sin, cos, mask), (b, t, _) = pos, x.shape
        q, k, v, g = self.q_proj(x), self.k_proj(x) * self.key_dim ** -0.5, self.v_proj(x), self.g_proj(x)
        q = q.view(b, t, self.heads, self.key_dim).transpose(1, 2)
        k = k.view(b, t, self.heads, self.key_dim).transpose(1, 2)
        v = v.view(b, t, self.heads, self.head_dim).transpose(1, 2)
        q = q * cos + rotate_every_two(q) * sin
        k = k * cos + rotate_every_two(k) * sin
        qk = q @ k.transpose(-1, -2) * mask
        qk = qk / qk.detach().abs().sum(dim=-1, keepdim=True).clamp(min=1, max=5e4)
        out = self.group_norm((qk @ v).transpose(1, 2)).reshape(b, t, -1)
        return self.out_proj(F.silu(g) * out)


class GLU(tnn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = tnn.Linear(dim, hidden, bias=False)
        self.gate = tnn.Linear(dim, hidden, bias=False)
        self.fc2 = tnn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)) * self.gate(x))


class RMSNorm(tnn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.eps = tnn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class DecoderLayer(tnn.Module):
    def __init__(self, dim, heads, hidden, alpha):
        super().__init__()
        self.alpha = alpha
        self.retention_layer_norm = RMSNorm(dim)
        self.retention = MultiScaleRetention(dim, heads)
        self.final_layer_norm = RMSNorm(dim)
        self.ffn = GLU(dim, hidden)

    def forward(self, x, pos):
        x = x * self.alpha + self.retention(self.retention_layer_norm(x), pos)
        return x * self.alpha + self.ffn(self.final_layer_norm(x))


class RetNet(tnn.Module):
    def __init__(self, vocab=21, dim=16, heads=2, hidden=20, layers=2):
        super().__init__()
        self.embed_tokens = tnn.Embedding(vocab, dim)
        self.retnet_rel_pos = RetNetRelPos(dim, heads)
        self.layers = tnn.ModuleList([DecoderLayer(dim, heads, hidden, (2 * layers) ** 0.25) for _ in range(layers)])
        self.layer_norm = RMSNorm(dim)
        self.output_projection = tnn.Linear(dim, vocab, bias=False)

    def forward(self, tokens):
        x = self.embed_tokens(tokens) * self.embed_tokens.embedding_dim ** 0.5
        pos = self.retnet_rel_pos(tokens.shape[1], x.dtype)
        for layer in self.layers:
            x = layer(x, pos)
        return self.output_projection(self.layer_norm(x))


# ---- the Linen side


def phases(length, dim, dtype):
    freq = 10000.0 ** -jnp.linspace(0.0, 1.0, dim // 2, dtype=dtype)
    return jnp.arange(length, dtype=dtype)[:, None] * freq


def turn(x, angle):
    """Turns neighbouring features by the angle: x as complex numbers."""
    re, im = x[..., 0::2], x[..., 1::2]
    c, s = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    return jnp.stack([re * c - im * s, im * c + re * s], axis=-1).reshape(x.shape)


def decay_mask(length, heads, dtype):
    gamma = 1 - 2.0 ** (-2 - jnp.arange(heads, dtype=dtype))
    i = jnp.arange(length)
    gap = i[:, None] - i[None, :]
    d = jnp.where(gap >= 0, gamma[:, None, None] ** jnp.maximum(gap, 0), 0)
    return d / jnp.sqrt(d.sum(-1, keepdims=True))


class Retention(nn.Module):
    heads: int
    value_factor: int = 2

    @nn.compact
    def __call__(self, x):
        B, T, D = x.shape
        dk, dv = D // self.heads, self.value_factor * D // self.heads
        proj = lambda d, name: nn.DenseGeneral((self.heads, d), use_bias=False, name=name)(x)
        q, k, v = proj(dk, "query"), proj(dk, "key"), proj(dv, "value")
        gate = nn.Dense(self.heads * dv, use_bias=False, name="gate")(x)
        angle = phases(T, dk, x.dtype)
        q, k = turn(q, angle), turn(k / jnp.sqrt(dk).astype(x.dtype), angle)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * decay_mask(T, self.heads, x.dtype)
        total = jax.lax.stop_gradient(jnp.abs(scores).sum(-1, keepdims=True))
        scores = scores / jnp.clip(total, 1.0, 5e4)
        y = jnp.einsum("bhqk,bkhd->bqhd", scores, v)
        y = nn.RMSNorm(epsilon=1e-5, use_scale=False)(y).reshape(B, T, -1)
        return nn.Dense(D, use_bias=False, name="out")(nn.silu(gate) * y)


class GatedMlp(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(self.width, use_bias=False, name="up")(x)
        g = nn.Dense(self.width, use_bias=False, name="gate")(x)
        return nn.Dense(x.shape[-1], use_bias=False, name="down")(nn.gelu(h, approximate=False) * g)


class FlaxRetNet(nn.Module):
    vocab: int = 21
    dim: int = 16
    heads: int = 2
    hidden: int = 20
    depth: int = 2

    @nn.compact
    def __call__(self, tokens):
        alpha = (2 * self.depth) ** 0.25
        x = nn.Embed(self.vocab, self.dim, name="embed")(tokens) * self.dim ** 0.5
        for i in range(self.depth):
            h = nn.RMSNorm(name=f"norm_ret_{i}")(x)
            x = alpha * x + Retention(self.heads, name=f"ret_{i}")(h)
            h = nn.RMSNorm(name=f"norm_mlp_{i}")(x)
            x = alpha * x + GatedMlp(self.hidden, name=f"mlp_{i}")(h)
        x = nn.RMSNorm(name="norm_out")(x)
        return nn.Dense(self.vocab, use_bias=False, name="logits")(x)


def to_variables(net, heads=2):
    T = lambda lin: jnp.asarray(lin.weight.detach().numpy().T)
    scale = lambda n: {"scale": jnp.asarray(n.weight.detach().numpy())}
    split = lambda lin: {"kernel": T(lin).reshape(lin.in_features, heads, -1)}
    p = {"embed": {"embedding": jnp.asarray(net.embed_tokens.weight.detach().numpy())},
         "norm_out": scale(net.layer_norm), "logits": {"kernel": T(net.output_projection)}}
    for i, layer in enumerate(net.layers):
        r, f = layer.retention, layer.ffn
        p[f"norm_ret_{i}"], p[f"norm_mlp_{i}"] = scale(layer.retention_layer_norm), scale(layer.final_layer_norm)
        p[f"ret_{i}"] = {"query": split(r.q_proj), "key": split(r.k_proj), "value": split(r.v_proj),
                         "gate": {"kernel": T(r.g_proj)}, "out": {"kernel": T(r.out_proj)}}
        p[f"mlp_{i}"] = {"up": {"kernel": T(f.fc1)}, "gate": {"kernel": T(f.gate)}, "down": {"kernel": T(f.fc2)}}
    return {"params": p}


def build(seed):
    torch.manual_seed(seed)
    net = RetNet().eval()
    for n, p in net.named_parameters():
        p.data.uniform_(0.5, 1.5) if "norm" in n else p.data.normal_(0, 0.5)
    tokens = np.random.default_rng(seed).integers(0, 21, (2, 7))
    return {"torch": net, "flax": (FlaxRetNet(), to_variables(net)), "inputs": tokens}


FAULTS = [
    {
        "title": "stop_gradient put round the normalised scores, not round the normaliser",
        "edits": [("        total = jax.lax.stop_gradient(jnp.abs(scores).sum(-1, keepdims=True))\n        scores = scores / jnp.clip(total, 1.0, 5e4)\n",
                   "        total = jnp.abs(scores).sum(-1, keepdims=True)\n        scores = jax.lax.stop_gradient(scores / jnp.clip(total, 1.0, 5e4))\n")],
        "layers": ["layers.0.retention", "layers.1.retention"],
        "between": ("layers.0.retention.g_proj", "layers.0.retention.group_norm"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "decays of the later paper's heads: 2 ** (-5 - i) for 2 ** (-2 - i)",
        "edits": [("gamma = 1 - 2.0 ** (-2 - jnp.arange(heads, dtype=dtype))", "gamma = 1 - 2.0 ** (-5 - jnp.arange(heads, dtype=dtype))")],
        "layers": ["retnet_rel_pos", "layers.0.retention"],
        "between": ("layers.0.retention.g_proj", "layers.0.retention.group_norm"),
        "causes": ["constant"],
        "level": "outputs",
    },
    {
        "title": "one RMS over all heads instead of one per head",
        "edits": [("nn.RMSNorm(epsilon=1e-5, use_scale=False)(y).reshape(B, T, -1)", "nn.RMSNorm(epsilon=1e-5, use_scale=False)(y.reshape(B, T, -1))")],
        "layers": ["layers.0.retention.group_norm"],
        "between": ("layers.0.retention.g_proj", "layers.0.retention.out_proj"),
        "causes": ["groups", "axis", "flatten"],
        "level": "outputs",
    },
    {
        "title": "frequencies spaced as in RoPE, without the endpoint",
        "edits": [("jnp.linspace(0.0, 1.0, dim // 2, dtype=dtype)", "jnp.linspace(0.0, 1.0, dim // 2, endpoint=False, dtype=dtype)")],
        "layers": ["retnet_rel_pos", "layers.0.retention"],
        "between": ("layers.0.retention.g_proj", "layers.0.retention.group_norm"),
        "causes": ["rope", "constant"],
        "level": "outputs",
    },
    {
        "title": "alpha on the branch and not on the stream in the feed-forward",
        "edits": [("x = alpha * x + GatedMlp(self.hidden, name=f\"mlp_{i}\")(h)", "x = x + alpha * GatedMlp(self.hidden, name=f\"mlp_{i}\")(h)")],
        "layers": ["layers.0"],
        "between": ("layers.0.ffn.fc2", "layers.1.retention_layer_norm"),
        "causes": ["scale", "residual", "operand"],
        "level": "outputs",
    },
]
