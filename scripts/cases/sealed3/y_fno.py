"""Conditioned Fourier neural operator (2D): spectral convs on padded grids, FiLM by an embedded viscosity."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class SpectralConv2d(nn.Module):
    def __init__(self, cin, cout, modes1, modes2):
        super().__init__()
        self.cout, self.modes1, self.modes2 = cout, modes1, modes2
        self.weights1 = nn.Parameter(torch.empty(cin, cout, modes1, modes2, 2))
        self.weights2 = nn.Parameter(torch.empty(cin, cout, modes1, modes2, 2))

    def forward(self, x):
        m1, m2 = self.modes1, self.modes2
        b, _, h, w = x.shape
        ft = torch.fft.rfft2(x)
        out = torch.zeros(b, self.cout, h, w // 2 + 1, dtype=ft.dtype, device=x.device)
        out[:, :, :m1, :m2] = torch.einsum("bixy,ioxy->boxy", ft[:, :, :m1, :m2], torch.view_as_complex(self.weights1))
        out[:, :, -m1:, :m2] = torch.einsum("bixy,ioxy->boxy", ft[:, :, -m1:, :m2], torch.view_as_complex(self.weights2))
        return torch.fft.irfft2(out, s=(h, w))


class FNOBlock(nn.Module):
    def __init__(self, width, hidden, emb, modes):
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.spectral = SpectralConv2d(width, width, *modes)
        self.film = nn.Linear(emb, 2 * width)
        self.mlp = nn.Sequential(nn.Conv2d(width, hidden, 1), nn.GELU(), nn.Conv2d(hidden, width, 1))
        self.skip = nn.Conv2d(width, width, 1)

    def forward(self, x, emb):
        h = self.spectral(self.norm(x))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, dim=1)
        h = h * (1 + scale) + shift
        return self.mlp(h) + self.skip(x)


class FNO2d(nn.Module):
    def __init__(self, cin=2, cout=3, width=8, hidden=11, emb=7, depth=3, modes=(4, 3), padding=3):
        super().__init__()
        self.padding = padding
        self.embed = nn.Sequential(nn.Linear(6, emb), nn.GELU(), nn.Linear(emb, emb))
        self.lift = nn.Linear(cin + 2, width)
        self.blocks = nn.ModuleList([FNOBlock(width, hidden, emb, modes) for _ in range(depth)])
        self.proj1 = nn.Linear(width, 13)
        self.proj2 = nn.Linear(13, cout)

    def frequencies(self, nu, dim=6, max_period=100):
        f = torch.exp(-math.log(max_period) * torch.arange(dim // 2).to(nu) / (dim // 2))
        args = nu[:, None] * f
        return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)

    def grid(self, x):
        b, h, w, _ = x.shape
        gy = torch.linspace(0, 1, h).to(x).reshape(1, h, 1, 1).repeat(b, 1, w, 1)
        gx = torch.linspace(0, 1, w).to(x).reshape(1, 1, w, 1).repeat(b, h, 1, 1)
        return torch.cat([gy, gx], dim=-1)

    def forward(self, x, nu):
        emb = self.embed(self.frequencies(nu))
        x = self.lift(torch.cat([x, self.grid(x)], dim=-1))
        x = x.permute(0, 3, 1, 2)
        x = F.pad(x, [0, self.padding, 0, self.padding])
        for i, block in enumerate(self.blocks):
            x = block(x, emb)
            if i < len(self.blocks) - 1:
                x = F.gelu(x)
        x = x[..., :-self.padding, :-self.padding].permute(0, 2, 3, 1)
        return self.proj2(F.gelu(self.proj1(x)))


# ------------------- JAX: pure functions over a tree of parameters -------------------


def gelu(x):
    return jax.nn.gelu(x, approximate=False)


def affine(p, x):
    return x @ p["kernel"] + p["bias"]


def spectral_conv(p, x):
    _, cout, m1, m2, _ = p["low"].shape
    b, h, w, _ = x.shape
    modes = jnp.fft.rfft2(x, axes=(1, 2))
    out = jnp.zeros((b, h, w // 2 + 1, cout), modes.dtype)
    for rows, k in ((slice(0, m1), p["low"]), (slice(h - m1, h), p["high"])):
        mixed = jnp.einsum("bxyi,ioxy->bxyo", modes[:, rows, :m2], jax.lax.complex(k[..., 0], k[..., 1]))
        out = out.at[:, rows, :m2].set(mixed)
    return jnp.fft.irfft2(out, s=(h, w), axes=(1, 2))


def group_norm(p, x):
    mean = x.mean((1, 2, 3), keepdims=True)
    var = x.var((1, 2, 3), keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * p["scale"] + p["bias"]


def fourier_block(p, x, cond):
    h = spectral_conv(p["spectral"], group_norm(p["norm"], x))
    gain, shift = jnp.split(affine(p["film"], cond)[:, None, None, :], 2, axis=-1)
    h = h * (1 + gain) + shift
    return affine(p["mix_out"], gelu(affine(p["mix_in"], h))) + affine(p["bypass"], x)


def embed_viscosity(p, nu, dim=6, max_period=100.0):
    half = dim // 2
    angle = nu[:, None] * max_period ** (-jnp.arange(half, dtype=nu.dtype) / half)
    features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return affine(p["second"], gelu(affine(p["first"], features)))


def axis_points(n, dtype):
    return jnp.linspace(0, 1, n, dtype=dtype)


def fno(params, u, nu, margin=3):
    b, h, w, _ = u.shape
    cond = embed_viscosity(params["viscosity"], nu)
    yy, xx = jnp.meshgrid(axis_points(h, u.dtype), axis_points(w, u.dtype), indexing="ij")
    where = jnp.broadcast_to(jnp.stack([yy, xx], axis=-1), (b, h, w, 2))
    x = affine(params["lift"], jnp.concatenate([u, where], axis=-1))
    x = jnp.pad(x, ((0, 0), (0, margin), (0, margin), (0, 0)))
    last = len(params["blocks"]) - 1
    for i, p in enumerate(params["blocks"]):
        x = fourier_block(p, x, cond)
        x = gelu(x) if i < last else x
    x = x[:, :h, :w]
    return affine(params["out"], gelu(affine(params["head"], x)))


def port(net):
    arr = lambda t: jnp.asarray(t.detach().numpy())
    linear = lambda m: {"kernel": arr(m.weight).T, "bias": arr(m.bias)}
    pointwise = lambda m: {"kernel": arr(m.weight)[:, :, 0, 0].T, "bias": arr(m.bias)}
    blocks = []
    for m in net.blocks:
        corners = (("low", m.spectral.weights1), ("high", m.spectral.weights2))
        blocks.append({
            "norm": {"scale": arr(m.norm.weight), "bias": arr(m.norm.bias)},
            "spectral": {key: arr(t) for key, t in corners},
            "film": linear(m.film),
            "mix_in": pointwise(m.mlp[0]),
            "mix_out": pointwise(m.mlp[2]),
            "bypass": pointwise(m.skip),
        })
    return {"viscosity": {"first": linear(net.embed[0]), "second": linear(net.embed[2])}, "lift": linear(net.lift),
            "blocks": blocks, "head": linear(net.proj1), "out": linear(net.proj2)}


def build(seed):
    torch.manual_seed(seed)
    net = FNO2d().eval()
    for name, p in net.named_parameters():
        if "weights" in name:
            p.data.normal_(0, 0.25)
        elif p.dim() > 1:
            p.data.normal_(0, 0.9 / p.shape[1] ** 0.5)
        elif "norm" in name and name.endswith("weight"):
            p.data.uniform_(0.6, 1.5)
        else:
            p.data.normal_(0, 0.3)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 10, 9, 2)).astype(np.float32)
    nu = rng.uniform(0.3, 4.0, size=2).astype(np.float32)
    return {"torch": net, "flax": (lambda params, u, nu: fno(params, u, nu), port(net)), "inputs": (x, nu)}


FAULTS = [
    {
        "title": "negative frequencies taken from the rows that follow the low ones, not from the end",
        "edits": [("slice(h - m1, h)", "slice(m1, 2 * m1)")],
        "layers": ["blocks.0.spectral", "blocks.1.spectral", "blocks.2.spectral"],
        "causes": ["offset", "operand", "rearranged", "wiring"],
        "level": "outputs",
    },
    {
        "title": "grid without its end point: arange(n) / n for linspace(0, 1, n)",
        "edits": [("jnp.linspace(0, 1, n, dtype=dtype)", "jnp.arange(n, dtype=dtype) / n")],
        "layers": [""],
        "causes": ["constant", "scale", "size"],
        "level": "outputs",
    },
    {
        "title": "GELU after the last block too",
        "edits": [("x = gelu(x) if i < last else x", "x = gelu(x)")],
        "layers": [""],
        "between": ("blocks.2.skip", "proj1"),
        "causes": ["activation", "left_out"],
        "level": "outputs",
    },
    {
        "title": "FiLM multiplies by the scale, not by 1 + scale",
        "edits": [("h = h * (1 + gain) + shift", "h = h * gain + shift")],
        "layers": ["blocks.0", "blocks.1", "blocks.2"],
        "between": ("blocks.0.film", "blocks.0.mlp.0"),
        "causes": ["scale_plus_one", "residual"],
        "level": "outputs",
    },
    {
        "title": "spectral weights transposed as if they were (out, in)",
        "edits": [("{key: arr(t) for key", "{key: arr(t).swapaxes(0, 1) for key")],
        "layers": ["blocks.0.spectral", "blocks.1.spectral", "blocks.2.spectral"],
        "causes": ["transposed"],
        "level": "bits",
    },
]
