"""NeRF: Fourier features, MLP with a skip, volume rendering, importance sampling of a fine pass (deterministic)."""
import math
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from flax import linen


class Embedder(nn.Module):
    def __init__(self, num_freqs):
        super().__init__()
        self.register_buffer("freqs", 2.0 ** torch.linspace(0.0, num_freqs - 1, num_freqs))
        self.out_dim = 3 * (2 * num_freqs + 1)

    def forward(self, x):
        out = [x]
        for f in self.freqs:
            out += [torch.sin(x * f), torch.cos(x * f)]
        return torch.cat(out, dim=-1)


class NeRFMLP(nn.Module):
    def __init__(self, width, depth, skip, pos_freqs, dir_freqs):
        super().__init__()
        self.skip = skip
        self.embed_pos, self.embed_dir = Embedder(pos_freqs), Embedder(dir_freqs)
        cp, cd = self.embed_pos.out_dim, self.embed_dir.out_dim
        self.pts_linears = nn.ModuleList(
            [nn.Linear(cp, width)] + [nn.Linear(width + (cp if i == skip else 0), width) for i in range(depth - 1)])
        self.alpha_linear = nn.Linear(width, 1)
        self.feature_linear = nn.Linear(width, width)
        self.views_linear = nn.Linear(width + cd, width // 2)
        self.rgb_linear = nn.Linear(width // 2, 3)

    def forward(self, pts, dirs):
        pos = self.embed_pos(pts)
        views = self.embed_dir(dirs)[:, None].expand(-1, pts.shape[1], -1)
        h = pos
        for i, layer in enumerate(self.pts_linears):
            h = F.relu(layer(h))
            if i == self.skip:
                h = torch.cat([pos, h], -1)
        sigma = F.softplus(self.alpha_linear(h) - 1.0)[..., 0]
        h = torch.cat([self.feature_linear(h), views], -1)
        rgb = torch.sigmoid(self.rgb_linear(F.relu(self.views_linear(h))))
        return rgb * (1 + 2 * 0.001) - 0.001, sigma


def render_pt(rgb, sigma, z, rays_d):
    dists = z[..., 1:] - z[..., :-1]
    dists = torch.cat([dists, torch.full_like(dists[..., :1], 1e10)], -1)
    dists = dists * torch.norm(rays_d[..., None, :], dim=-1)
    alpha = 1.0 - torch.exp(-sigma * dists)
    trans = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1.0 - alpha + 1e-10], -1), -1)[:, :-1]
    weights = alpha * trans
    rgb_map = torch.sum(weights[..., None] * rgb, -2)
    acc = weights[:, :-1].sum(-1)
    depth = torch.sum(weights * z, -1)
    disp = 1.0 / torch.clamp(depth / weights.sum(-1), min=1e-10)
    return rgb_map + (1.0 - acc[..., None]), disp, weights


def sample_pdf_pt(bins, weights, n):
    weights = weights + 1e-5
    pdf = weights / weights.sum(-1, keepdim=True)
    cdf = torch.cumsum(pdf, -1)
    cdf = torch.cat([torch.zeros_like(cdf[..., :1]), cdf], -1)
    u = torch.linspace(0.02, 0.97, n, dtype=torch.float64).to(cdf.dtype).expand(cdf.shape[0], n).contiguous()
    inds = torch.searchsorted(cdf, u, right=True)
    below, above = (inds - 1).clamp(min=0), inds.clamp(max=cdf.shape[-1] - 1)
    c0, c1 = torch.gather(cdf, 1, below), torch.gather(cdf, 1, above)
    b0, b1 = torch.gather(bins, 1, below), torch.gather(bins, 1, above)
    denom = c1 - c0
    denom = torch.where(denom < 1e-5, torch.ones_like(denom), denom)
    return b0 + (u - c0) / denom * (b1 - b0)


class NeRF(nn.Module):
    def __init__(self, width=16, depth=4, skip=1, pos_freqs=3, dir_freqs=2, coarse=7, fine=5, near=1.0, far=4.0):
        super().__init__()
        self.coarse_samples, self.fine_samples, self.near, self.far = coarse, fine, near, far
        self.coarse = NeRFMLP(width, depth, skip, pos_freqs, dir_freqs)
        self.fine = NeRFMLP(width, depth, skip, pos_freqs, dir_freqs)

    def forward(self, rays_o, rays_d):
        viewdirs = rays_d / rays_d.norm(dim=-1, keepdim=True)
        t = torch.linspace(0.0, 1.0, self.coarse_samples, dtype=torch.float64).to(rays_o.dtype)
        z = 1.0 / (1.0 / self.near * (1.0 - t) + 1.0 / self.far * t)
        z = z.expand(rays_o.shape[0], -1)
        pts = rays_o[:, None] + rays_d[:, None] * z[..., None]
        rgb0, disp0, weights = render_pt(*self.coarse(pts, viewdirs), z, rays_d)
        z_mid = 0.5 * (z[..., 1:] + z[..., :-1])
        extra = sample_pdf_pt(z_mid, weights[..., 1:-1], self.fine_samples).detach()
        z, _ = torch.sort(torch.cat([z, extra], -1), -1)
        pts = rays_o[:, None] + rays_d[:, None] * z[..., None]
        rgb, disp, _ = render_pt(*self.fine(pts, viewdirs), z, rays_d)
        return rgb, disp, rgb0, disp0


# ------------------------------------------------------------------ Linen


def posenc(x, num_freqs):
    parts = [x]
    for i in range(num_freqs):
        parts.extend((jnp.sin(x * 2.0 ** i), jnp.cos(x * 2.0 ** i)))
    return jnp.concatenate(parts, axis=-1)


class RadianceField(linen.Module):
    width: int = 16
    depth: int = 4
    skip: int = 1
    pos_freqs: int = 3
    dir_freqs: int = 2
    rgb_padding: float = 0.001
    density_bias: float = -1.0
    density_activation: Callable = jax.nn.softplus

    @linen.compact
    def __call__(self, points, viewdirs):
        inputs = posenc(points, self.pos_freqs)
        x = inputs
        for i in range(self.depth):
            x = linen.relu(linen.Dense(self.width, name=f"trunk_{i}")(x))
            if i == self.skip:
                x = jnp.concatenate([inputs, x], axis=-1)
        raw_density = linen.Dense(1, name="density")(x)[..., 0]
        density = self.density_activation(raw_density + self.density_bias)
        bottleneck = linen.Dense(self.width, name="bottleneck")(x)
        cond = jnp.broadcast_to(posenc(viewdirs, self.dir_freqs)[:, None], (*points.shape[:2], 3 * (2 * self.dir_freqs + 1)))
        x = jnp.concatenate([bottleneck, cond], axis=-1)
        x = linen.relu(linen.Dense(self.width // 2, name="views")(x))
        rgb = jax.nn.sigmoid(linen.Dense(3, name="rgb")(x))
        rgb = rgb * (1.0 + 2.0 * self.rgb_padding) - self.rgb_padding
        return rgb, density


def volumetric_rendering(rgb, density, t, directions, white_background=True):
    delta = jnp.diff(t, axis=-1)
    delta = jnp.concatenate([delta, jnp.broadcast_to(1e10, delta[:, :1].shape)], axis=-1)
    delta = delta * jnp.linalg.norm(directions, axis=-1, keepdims=True)
    alpha = 1.0 - jnp.exp(-density * delta)
    clear = jnp.cumprod(1.0 - alpha[:, :-1] + 1e-10, axis=-1)
    trans = jnp.concatenate([jnp.ones_like(alpha[:, :1]), clear], axis=-1)
    weights = alpha * trans
    color = jnp.einsum("rs,rsc->rc", weights, rgb)
    depth = jnp.sum(weights * t, axis=-1)
    disparity = 1.0 / jnp.maximum(depth / jnp.sum(weights, axis=-1), 1e-10)
    acc = jnp.sum(weights[:, :-1], axis=-1)
    if white_background:
        color = color + (1.0 - acc[:, None])
    return color, disparity, weights


def importance_samples(bins, weights, n):
    weights = weights + 1e-5
    pdf = weights / jnp.sum(weights, axis=-1, keepdims=True)
    cdf = jnp.concatenate([jnp.zeros_like(pdf[:, :1]), jnp.cumsum(pdf, axis=-1)], axis=-1)
    u = jnp.broadcast_to(jnp.linspace(0.02, 0.97, n), (cdf.shape[0], n))
    index = jax.vmap(lambda c, v: jnp.searchsorted(c, v, side="right"))(cdf, u)
    lo = jnp.maximum(index - 1, 0)
    hi = jnp.minimum(index, cdf.shape[-1] - 1)
    take = lambda a, i: jnp.take_along_axis(a, i, axis=-1)
    span = take(cdf, hi) - take(cdf, lo)
    frac = (u - take(cdf, lo)) / jnp.where(span < 1e-5, 1.0, span)
    return take(bins, lo) + frac * (take(bins, hi) - take(bins, lo))


class FlaxNeRF(linen.Module):
    coarse_samples: int = 7
    fine_samples: int = 5
    near: float = 1.0
    far: float = 4.0
    lindisp: bool = True

    def setup(self):
        self.coarse_mlp = RadianceField()
        self.fine_mlp = RadianceField()

    def __call__(self, origins, directions):
        viewdirs = directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)
        s = jnp.linspace(0.0, 1.0, self.coarse_samples)
        if self.lindisp:
            t = 1.0 / ((1.0 - s) / self.near + s / self.far)
        else:
            t = self.near * (1.0 - s) + self.far * s
        t = jnp.broadcast_to(t, (origins.shape[0], self.coarse_samples))
        points = origins[:, None, :] + t[..., None] * directions[:, None, :]
        rgb, density = self.coarse_mlp(points, viewdirs)
        color0, disp0, weights = volumetric_rendering(rgb, density, t, directions)

        middle = 0.5 * (t[:, 1:] + t[:, :-1])
        samples = jax.lax.stop_gradient(importance_samples(middle, weights[:, 1:-1], self.fine_samples))
        t = jnp.sort(jnp.concatenate([t, samples], axis=-1), axis=-1)
        points = origins[:, None, :] + t[..., None] * directions[:, None, :]
        rgb, density = self.fine_mlp(points, viewdirs)
        color, disp, _ = volumetric_rendering(rgb, density, t, directions)
        return color, disp, color0, disp0


def port(net):
    def dense(m):
        return {"kernel": jnp.asarray(m.weight.detach().numpy().T), "bias": jnp.asarray(m.bias.detach().numpy())}

    def field(m):
        out = {f"trunk_{i}": dense(layer) for i, layer in enumerate(m.pts_linears)}
        out["density"] = dense(m.alpha_linear)
        out["bottleneck"] = dense(m.feature_linear)
        out["views"] = dense(m.views_linear)
        out["rgb"] = dense(m.rgb_linear)
        return out

    return {"params": {"coarse_mlp": field(net.coarse), "fine_mlp": field(net.fine)}}


def build(seed):
    torch.manual_seed(seed)
    net = NeRF().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.mul_(1.6) if p.ndim == 2 else p.normal_(0, 0.4)
    rng = np.random.default_rng(seed)
    origins = rng.normal(size=(6, 3))
    directions = rng.normal(size=(6, 3)) * 0.6
    return {"torch": net, "flax": (FlaxNeRF(), port(net)), "inputs": (origins, directions)}


FAULTS = [
    {
        "title": "frequencies times pi",
        "edits": [("parts.extend((jnp.sin(x * 2.0 ** i), jnp.cos(x * 2.0 ** i)))",
                   "parts.extend((jnp.sin(x * 2.0 ** i * math.pi), jnp.cos(x * 2.0 ** i * math.pi)))")],
        "layers": ["coarse.embed_pos"],
        "between": (None, "coarse.pts_linears.0"),
        "causes": ["scale", "constant"],
        "level": "outputs",
    },
    {
        "title": "skip appended behind the hidden features",
        "edits": [("x = jnp.concatenate([inputs, x], axis=-1)", "x = jnp.concatenate([x, inputs], axis=-1)")],
        "layers": ["coarse"],
        "between": ("coarse.pts_linears.1", "coarse.pts_linears.2"),
        "causes": ["concat"],
        "level": "outputs",
    },
    {
        "title": "density by ReLU",
        "edits": [("density_activation: Callable = jax.nn.softplus", "density_activation: Callable = jax.nn.relu")],
        "layers": ["coarse"],
        "between": ("coarse.alpha_linear", "coarse.feature_linear"),
        "causes": ["activation", "operation"],
        "level": "outputs",
    },
    {
        "title": "transmittance includes the sample itself",
        "edits": [("clear = jnp.cumprod(1.0 - alpha[:, :-1] + 1e-10, axis=-1)\n    trans = jnp.concatenate([jnp.ones_like(alpha[:, :1]), clear], axis=-1)",
                   "trans = jnp.cumprod(1.0 - alpha + 1e-10, axis=-1)")],
        "layers": [""],
        "between": ("coarse.rgb_linear", "fine.pts_linears.0"),
        "causes": ["offset"],
        "level": "outputs",
    },
    {
        "title": "distances not multiplied by the length of the ray's direction",
        "edits": [("    delta = delta * jnp.linalg.norm(directions, axis=-1, keepdims=True)\n", "")],
        "layers": [""],
        "between": ("coarse.rgb_linear", "fine.pts_linears.0"),
        "causes": ["left_out", "scale"],
        "level": "outputs",
    },
    {
        "title": "coarse samples linear in depth, not in disparity",
        "edits": [("lindisp: bool = True", "lindisp: bool = False")],
        "layers": [""],
        "between": (None, "coarse.pts_linears.0"),
        "causes": ["operation"],
        "level": "outputs",
    },
    {
        "title": "fine samples appended without sorting",
        "edits": [("t = jnp.sort(jnp.concatenate([t, samples], axis=-1), axis=-1)", "t = jnp.concatenate([t, samples], axis=-1)")],
        "layers": [""],
        "between": ("coarse.rgb_linear", "fine.pts_linears.0"),
        "causes": ["left_out", "permuted"],
        "level": "outputs",
    },
    {
        "title": "importance samples carry gradients",
        "edits": [("samples = jax.lax.stop_gradient(importance_samples(middle, weights[:, 1:-1], self.fine_samples))",
                   "samples = importance_samples(middle, weights[:, 1:-1], self.fine_samples)")],
        "layers": [""],
        "between": ("coarse.rgb_linear", "fine.pts_linears.0"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "coarse and fine network share the coarse weights",
        "edits": [('"fine_mlp": field(net.fine)', '"fine_mlp": field(net.coarse)')],
        "layers": ["fine.pts_linears.0"],
        "causes": ["values", "swapped"],
        "level": "outputs",
    },
]
