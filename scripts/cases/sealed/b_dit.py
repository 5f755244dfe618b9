"""DiT with adaLN-zero, qk-norm, fixed 2-D sine positions and classifier-free guidance; functional JAX with a scan over blocks."""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import jax
import jax.numpy as jnp


def modulate_pt(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def sincos_1d(dim, pos):
    omega = 1.0 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
    out = np.einsum("m,d->md", pos.reshape(-1), omega)
    return np.concatenate([np.sin(out), np.cos(out)], axis=1)


def sincos_2d(dim, gh, gw):
    rows, cols = np.meshgrid(np.arange(gh, dtype=np.float64), np.arange(gw, dtype=np.float64), indexing="ij")
    return np.concatenate([sincos_1d(dim // 2, cols), sincos_1d(dim // 2, rows)], axis=1)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden, freq=10):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(freq, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.freq = freq

    def forward(self, t):
        half = self.freq // 2
        freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
        args = 1000.0 * t[:, None].double() * freqs[None]
        return self.mlp(torch.cat([torch.cos(args), torch.sin(args)], dim=-1).to(t.dtype))


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.q_norm = nn.LayerNorm(self.head_dim)
        self.k_norm = nn.LayerNorm(self.head_dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class DiTBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 3 * dim), nn.GELU(approximate="tanh"), nn.Linear(3 * dim, dim))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate_pt(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate_pt(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, dim, patch, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch * patch * out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate_pt(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    def __init__(self, dim=24, depth=2, heads=3, patch=2, in_ch=3, classes=5, grid=(3, 5), guidance=2.5):
        super().__init__()
        self.patch, self.in_ch, self.classes, self.grid, self.guidance = patch, in_ch, classes, grid, guidance
        self.x_embedder = nn.Conv2d(in_ch, dim, patch, patch)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = nn.Embedding(classes + 1, dim)
        self.register_buffer("pos_embed", torch.from_numpy(sincos_2d(dim, *grid)).unsqueeze(0))
        self.blocks = nn.ModuleList([DiTBlock(dim, heads) for _ in range(depth)])
        self.final_layer = FinalLayer(dim, patch, 2 * in_ch)

    def unpatchify(self, x):
        (h, w), p, c = self.grid, self.patch, 2 * self.in_ch
        x = x.reshape(x.shape[0], h, w, p, p, c)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], c, h * p, w * p)

    def forward(self, x, t, y):
        x, t = torch.cat([x, x]), torch.cat([t, t])
        y = torch.cat([y, torch.full_like(y, self.classes)])
        h = self.x_embedder(x).flatten(2).transpose(1, 2)
        h = h + self.pos_embed.to(h.dtype)
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            h = block(h, c)
        out = self.unpatchify(self.final_layer(h, c))
        eps, rest = out[:, :self.in_ch], out[:, self.in_ch:]
        cond, uncond = eps.chunk(2)
        eps = uncond + self.guidance * (cond - uncond)
        return eps, rest.chunk(2)[0]


# ------------------------------------------------------------------ JAX

HEADS, PATCH, GRID, CHANNELS, CLASSES, GUIDANCE = 3, 2, (3, 5), 3, 5, 2.5


def dense(p, x):
    return x @ p["w"] + p["b"]


def layer_norm(x, p=None, eps=1e-5):
    mu = x.mean(-1, keepdims=True)
    x = x - mu
    x = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x if p is None else x * p["g"] + p["b"]


def modulate(x, shift, scale):
    return x * (1.0 + scale[:, None]) + shift[:, None]


def positions(dim):
    rows, cols = np.divmod(np.arange(GRID[0] * GRID[1]), GRID[1])
    omega = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))
    parts = []
    for axis in (cols, rows):
        angle = axis[:, None] * omega[None]
        parts += [np.sin(angle), np.cos(angle)]
    return jnp.asarray(np.concatenate(parts, axis=-1))


def embed_time(p, t, freq=10):
    omega = jnp.exp(-math.log(10000) * jnp.arange(freq // 2) / (freq // 2))
    angle = (t * 1000.0)[:, None] * omega
    h = dense(p["in"], jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1))
    return dense(p["out"], jax.nn.silu(h))


def attention(p, x):
    b, length, dim = x.shape
    q, k, v = jnp.split(dense(p["qkv"], x), 3, axis=-1)
    q, k, v = (z.reshape(b, length, HEADS, dim // HEADS) for z in (q, k, v))
    q = layer_norm(q, p["q_norm"])
    k = layer_norm(k, p["k_norm"])
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(dim // HEADS)
    out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, -1), v)
    return dense(p["proj"], out.reshape(b, length, dim))


def block(p, x, c):
    mod = jnp.split(dense(p["ada"], jax.nn.silu(c)), 6, axis=-1)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = mod
    h = attention(p["attn"], modulate(layer_norm(x, eps=1e-6), shift_a, scale_a))
    x = x + gate_a[:, None] * h
    h = modulate(layer_norm(x, eps=1e-6), shift_m, scale_m)
    h = dense(p["fc2"], jax.nn.gelu(dense(p["fc1"], h), approximate=True))
    return x + gate_m[:, None] * h


def apply(params, x, t, y):
    n, height, width, _ = x.shape
    x = jnp.concatenate([x, x])
    t = jnp.concatenate([t, t])
    y = jnp.concatenate([y, jnp.full_like(y, CLASSES)])
    (gh, gw), p = GRID, PATCH
    patches = x.reshape(2 * n, gh, p, gw, p, CHANNELS).transpose(0, 1, 3, 2, 4, 5).reshape(2 * n, gh * gw, -1)
    h = dense(params["patch"], patches)
    h = h + positions(h.shape[-1])
    c = embed_time(params["time"], t) + params["label"][y]
    h, _ = jax.lax.scan(lambda carry, layer: (block(layer, carry, c), None), h, params["blocks"])
    shift, scale = jnp.split(dense(params["final"]["ada"], jax.nn.silu(c)), 2, axis=-1)
    h = dense(params["final"]["linear"], modulate(layer_norm(h, eps=1e-6), shift, scale))
    h = h.reshape(2 * n, gh, gw, p, p, 2 * CHANNELS)
    out = h.transpose(0, 1, 3, 2, 4, 5).reshape(2 * n, height, width, 2 * CHANNELS)
    eps, rest = out[..., :CHANNELS], out[..., CHANNELS:]
    cond, uncond = eps[:n], eps[n:]
    eps = uncond + GUIDANCE * (cond - uncond)
    return jnp.moveaxis(eps, -1, 1), jnp.moveaxis(rest[:n], -1, 1)


def port(net):
    def arr(t):
        return jnp.asarray(t.detach().numpy())

    def lin(m):
        return {"w": arr(m.weight).T, "b": arr(m.bias)}

    def ln(m):
        return {"g": arr(m.weight), "b": arr(m.bias)}

    layers = [{
        "attn": {"qkv": lin(b.attn.qkv), "q_norm": ln(b.attn.q_norm), "k_norm": ln(b.attn.k_norm),
                 "proj": lin(b.attn.proj)},
        "fc1": lin(b.mlp[0]),
        "fc2": lin(b.mlp[2]),
        "ada": lin(b.adaLN_modulation[1]),
    } for b in net.blocks]
    kernel = arr(net.x_embedder.weight)
    return {
        "patch": {"w": kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0]), "b": arr(net.x_embedder.bias)},
        "time": {"in": lin(net.t_embedder.mlp[0]), "out": lin(net.t_embedder.mlp[2])},
        "label": arr(net.y_embedder.weight),
        "blocks": jax.tree.map(lambda *xs: jnp.stack(xs), *layers),
        "final": {"linear": lin(net.final_layer.linear), "ada": lin(net.final_layer.adaLN_modulation[1])},
    }


def build(seed):
    torch.manual_seed(seed)
    net = DiT().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    rng = np.random.default_rng(seed)
    x, t, y = rng.normal(size=(2, 3, 6, 10)), rng.uniform(size=2), rng.integers(0, 5, size=2)
    return {"torch": net, "flax": (apply, port(net)), "inputs": (x, t, y),
            "flax_inputs": (x.transpose(0, 2, 3, 1), t, y)}


FAULTS = [
    {
        "title": "modulation by scale, not by 1 + scale",
        "edits": [("return x * (1.0 + scale[:, None]) + shift[:, None]", "return x * scale[:, None] + shift[:, None]")],
        "layers": ["blocks.0", "blocks.0.norm1"],
        "between": ("blocks.0.adaLN_modulation.1", "blocks.0.attn.qkv"),
        "causes": ["scale_plus_one"],
        "level": "outputs",
    },
    {
        "title": "gates of attention and MLP exchanged",
        "edits": [("shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = mod",
                   "shift_a, scale_a, gate_m, shift_m, scale_m, gate_a = mod")],
        "layers": ["blocks.0"],
        "between": ("blocks.0.attn.proj", "blocks.0.mlp.0"),
        "causes": ["swapped", "operand"],
        "level": "outputs",
    },
    {
        "title": "first half of the sine positions encodes the rows",
        "edits": [("for axis in (cols, rows):", "for axis in (rows, cols):")],
        "layers": [""],
        "between": ("x_embedder", "t_embedder.mlp.0"),
        "causes": ["concat", "swapped", "transposed"],
        "level": "outputs",
    },
    {
        "title": "unpatchify with the channels ahead of the pixels",
        "edits": [("h = h.reshape(2 * n, gh, gw, p, p, 2 * CHANNELS)",
                   "h = h.reshape(2 * n, gh, gw, 2 * CHANNELS, p, p).transpose(0, 1, 2, 4, 5, 3)")],
        "layers": [""],
        "between": ("final_layer.linear", None),
        "causes": ["rearranged", "transposed"],
        "level": "outputs",
    },
    {
        "title": "label of no class taken to be the first row",
        "edits": [("y = jnp.concatenate([y, jnp.full_like(y, CLASSES)])",
                   "y = jnp.concatenate([y + 1, jnp.zeros_like(y)])")],
        "layers": ["", "y_embedder"],
        "between": ("t_embedder.mlp.2", "y_embedder"),
        "causes": ["offset"],
        "level": "outputs",
    },
    {
        "title": "guidance counted from the conditional prediction",
        "edits": [("eps = uncond + GUIDANCE * (cond - uncond)", "eps = cond + GUIDANCE * (cond - uncond)")],
        "layers": [""],
        "between": ("final_layer.linear", None),
        "causes": ["operand"],
        "level": "outputs",
    },
    {
        "title": "no gradient through the unconditional half",
        "edits": [("cond, uncond = eps[:n], eps[n:]", "cond, uncond = eps[:n], jax.lax.stop_gradient(eps[n:])")],
        "layers": [""],
        "between": ("final_layer.linear", None),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "keys normalised by their root mean square",
        "edits": [('k = layer_norm(k, p["k_norm"])',
                   'k = k / jnp.sqrt(jnp.mean(k * k, -1, keepdims=True) + 1e-5) * p["k_norm"]["g"] + p["k_norm"]["b"]')],
        "layers": ["blocks.0.attn.k_norm"],
        "causes": ["norm_kind"],
        "level": "outputs",
    },
]
