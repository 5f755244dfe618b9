"""NeRF: coordinate encoding, MLP with a skip, sigma/rgb heads, volume rendering, coarse to fine (functional JAX)."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

NEAR, FAR = 2.0, 6.0
N_COARSE, N_FINE = 7, 9
SKIPS = (1,)


# ---------------------------------------------------------------- torch
class Embedder(nn.Module):
    def __init__(self, num_freqs):
        super().__init__()
        self.num_freqs = num_freqs
        self.out_dim = 3 + 6 * num_freqs

    def forward(self, x):
        freq_bands = 2.0 ** torch.linspace(0.0, self.num_freqs - 1, steps=self.num_freqs, dtype=x.dtype)
        outs = [x]
        for freq in freq_bands:
            for fn in (torch.sin, torch.cos):
                outs.append(fn(x * freq))
        return torch.cat(outs, -1)


class NeRF(nn.Module):
    def __init__(self, input_ch, input_ch_views, D=4, W=16):
        super().__init__()
        self.pts_linears = nn.ModuleList(
            [nn.Linear(input_ch, W)] + [nn.Linear(W + (input_ch if i in SKIPS else 0), W) for i in range(D - 1)])
        self.alpha_linear = nn.Linear(W, 1)
        self.feature_linear = nn.Linear(W, W)
        self.views_linears = nn.ModuleList([nn.Linear(input_ch_views + W, W // 2)])
        self.rgb_linear = nn.Linear(W // 2, 3)

    def forward(self, input_pts, input_views):
        h = input_pts
        for i, layer in enumerate(self.pts_linears):
            h = F.relu(layer(h))
            if i in SKIPS:
                h = torch.cat([input_pts, h], -1)
        alpha = self.alpha_linear(h)
        feature = self.feature_linear(h)
        h = torch.cat([feature, input_views], -1)
        for layer in self.views_linears:
            h = F.relu(layer(h))
        return torch.cat([self.rgb_linear(h), alpha], -1)


def raw2outputs(raw, z_vals, rays_d):
    dists = z_vals[..., 1:] - z_vals[..., :-1]
    dists = torch.cat([dists, torch.full_like(dists[..., :1], 1e10)], -1)
    dists = dists * torch.norm(rays_d[..., None, :], dim=-1)
    rgb = torch.sigmoid(raw[..., :3])
    alpha = 1.0 - torch.exp(-F.relu(raw[..., 3]) * dists)
    ones = torch.ones_like(alpha[..., :1])
    weights = alpha * torch.cumprod(torch.cat([ones, 1.0 - alpha + 1e-10], -1), -1)[..., :-1]
    rgb_map = torch.sum(weights[..., None] * rgb, -2)
    depth_map = torch.sum(weights * z_vals, -1)
    acc_map = torch.sum(weights, -1)
    rgb_map = rgb_map + (1.0 - acc_map[..., None])
    return rgb_map, depth_map, acc_map, weights


def sample_pdf(bins, weights, n):
    weights = weights + 1e-5
    pdf = weights / torch.sum(weights, -1, keepdim=True)
    cdf = torch.cumsum(pdf, -1)
    cdf = torch.cat([torch.zeros_like(cdf[..., :1]), cdf], -1)
    u = torch.linspace(0.0, 1.0, steps=n, dtype=cdf.dtype).expand(list(cdf.shape[:-1]) + [n]).contiguous()
    inds = torch.searchsorted(cdf, u, right=True)
    below = torch.clamp(inds - 1, min=0)
    above = torch.clamp(inds, max=cdf.shape[-1] - 1)
    cdf0, cdf1 = torch.gather(cdf, -1, below), torch.gather(cdf, -1, above)
    bin0, bin1 = torch.gather(bins, -1, below), torch.gather(bins, -1, above)
    denom = cdf1 - cdf0
    denom = torch.where(denom < 1e-5, torch.ones_like(denom), denom)
    return bin0 + (u - cdf0) / denom * (bin1 - bin0)


class Renderer(nn.Module):
    def __init__(self, multires=4, multires_views=2):
        super().__init__()
        self.embed_pts = Embedder(multires)
        self.embed_dirs = Embedder(multires_views)
        self.coarse = NeRF(self.embed_pts.out_dim, self.embed_dirs.out_dim)
        self.fine = NeRF(self.embed_pts.out_dim, self.embed_dirs.out_dim)

    def query(self, model, rays_o, rays_d, z_vals):
        pts = rays_o[..., None, :] + rays_d[..., None, :] * z_vals[..., :, None]
        viewdirs = rays_d / torch.norm(rays_d, dim=-1, keepdim=True)
        dirs = self.embed_dirs(viewdirs)[..., None, :].expand(*pts.shape[:-1], -1)
        return model(self.embed_pts(pts), dirs)

    def forward(self, rays_o, rays_d):
        t_vals = torch.linspace(0.0, 1.0, steps=N_COARSE, dtype=rays_o.dtype)
        z_vals = (NEAR * (1.0 - t_vals) + FAR * t_vals).expand(rays_o.shape[0], N_COARSE)
        raw = self.query(self.coarse, rays_o, rays_d, z_vals)
        rgb0, _, acc0, weights = raw2outputs(raw, z_vals, rays_d)
        mids = 0.5 * (z_vals[..., 1:] + z_vals[..., :-1])
        z_samples = sample_pdf(mids, weights[..., 1:-1], N_FINE).detach()
        z_vals, _ = torch.sort(torch.cat([z_vals, z_samples], -1), -1)
        raw = self.query(self.fine, rays_o, rays_d, z_vals)
        rgb, depth, acc, _ = raw2outputs(raw, z_vals, rays_d)
        return {"rgb_map": rgb, "depth_map": depth, "acc_map": acc, "rgb0": rgb0, "acc0": acc0}


# ---------------------------------------------------------------- jax
def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def posenc(x, num_freqs):
    freqs = 2.0 ** jnp.arange(num_freqs, dtype=x.dtype)
    angles = x[..., None, :] * freqs[:, None]
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.concatenate([x, waves.reshape(*x.shape[:-1], -1)], axis=-1)


def mlp(p, pts, dirs):
    h = pts
    for i in range(len(p["trunk"])):
        h = jax.nn.relu(linear(p["trunk"][f"layer_{i}"], h))
        if i in SKIPS:
            h = jnp.concatenate([pts, h], axis=-1)
    feature = linear(p["feature"], h)
    sigma = linear(p["sigma"], h)[..., 0]
    h = jnp.concatenate([feature, dirs], axis=-1)
    h = jax.nn.relu(linear(p["view"], h))
    return linear(p["rgb"], h), sigma


def volume_render(rgb_logits, sigma, z_vals, rays_d):
    deltas = jnp.diff(z_vals, axis=-1)
    deltas = jnp.pad(deltas, ((0, 0), (0, 1)), constant_values=1e10)
    deltas = deltas * jnp.linalg.norm(rays_d, axis=-1, keepdims=True)
    alpha = 1.0 - jnp.exp(-jax.nn.relu(sigma) * deltas)
    trans = jnp.cumprod(1.0 - alpha + 1e-10, axis=-1)
    trans = jnp.concatenate([jnp.ones_like(trans[:, :1]), trans[:, :-1]], axis=-1)
    weights = alpha * trans
    acc = weights.sum(axis=-1)
    rgb = jnp.einsum("rs,rsc->rc", weights, jax.nn.sigmoid(rgb_logits))
    rgb = rgb + (1.0 - acc)[:, None]
    depth = (weights * z_vals).sum(axis=-1)
    return rgb, depth, acc, weights


def importance_sample(bins, weights, n):
    weights = weights + 1e-5
    pdf = weights / weights.sum(axis=-1, keepdims=True)
    cdf = jnp.pad(jnp.cumsum(pdf, axis=-1), ((0, 0), (1, 0)))
    u = jnp.linspace(0.0, 1.0, n, dtype=cdf.dtype)

    def one_ray(bins, cdf):
        upper = jnp.searchsorted(cdf, u, side="right")
        lo, hi = jnp.maximum(upper - 1, 0), jnp.minimum(upper, cdf.shape[0] - 1)
        width = cdf[hi] - cdf[lo]
        frac = (u - cdf[lo]) / jnp.where(width < 1e-5, 1.0, width)
        return bins[lo] + frac * (bins[hi] - bins[lo])

    return jax.vmap(one_ray)(bins, cdf)


def render_rays(params, rays_o, rays_d, multires=4, multires_views=2):
    viewdirs = rays_d / jnp.linalg.norm(rays_d, axis=-1, keepdims=True)

    def query(p, z):
        pts = rays_o[:, None, :] + rays_d[:, None, :] * z[..., None]
        dirs = posenc(viewdirs, multires_views)[:, None, :]
        dirs = jnp.broadcast_to(dirs, pts.shape[:2] + dirs.shape[-1:])
        return mlp(p, posenc(pts, multires), dirs)

    t = jnp.linspace(0.0, 1.0, N_COARSE, dtype=rays_o.dtype)
    z = jnp.broadcast_to(NEAR * (1.0 - t) + FAR * t, (rays_o.shape[0], N_COARSE))
    rgb0, _, acc0, weights = volume_render(*query(params["coarse"], z), z, rays_d)
    mids = 0.5 * (z[:, 1:] + z[:, :-1])
    z_new = jax.lax.stop_gradient(importance_sample(mids, weights[:, 1:-1], N_FINE))
    z = jnp.sort(jnp.concatenate([z, z_new], axis=-1), axis=-1)
    rgb, depth, acc, _ = volume_render(*query(params["fine"], z), z, rays_d)
    return {"rgb_map": rgb, "depth_map": depth, "acc_map": acc, "rgb0": rgb0, "acc0": acc0}


def port(net):
    def lin(m):
        return {"kernel": jnp.asarray(m.weight.detach().numpy().T), "bias": jnp.asarray(m.bias.detach().numpy())}

    def nerf(m):
        return {"trunk": {f"layer_{i}": lin(layer) for i, layer in enumerate(m.pts_linears)},
                "sigma": lin(m.alpha_linear), "feature": lin(m.feature_linear),
                "view": lin(m.views_linears[0]), "rgb": lin(m.rgb_linear)}

    return {"coarse": nerf(net.coarse), "fine": nerf(net.fine)}


def build(seed):
    """The right pair with random weights and inputs that follow from the seed."""
    torch.manual_seed(seed)
    net = Renderer().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.mul_(1.7)
            if p.ndim == 1:
                p.copy_(0.3 * torch.randn_like(p) + (0.4 if "alpha" in name else 0.0))
    rng = np.random.default_rng(seed)
    rays_o = 0.3 * rng.normal(size=(5, 3)).astype(np.float32)
    rays_d = (rng.normal(size=(5, 3)) * 0.6).astype(np.float32)
    return {"torch": net, "flax": (render_rays, port(net)), "inputs": (rays_o, rays_d)}


FAULTS = [
    {
        "title": "frequencies spaced linearly from 1 to 2^(L-1)",
        "edits": [("freqs = 2.0 ** jnp.arange(num_freqs, dtype=x.dtype)",
                   "freqs = jnp.linspace(1.0, 2.0 ** (num_freqs - 1), num_freqs, dtype=x.dtype)")],
        "layers": ["embed_pts"],
        "between": (None, "coarse.pts_linears.0"),
        "causes": ["operation", "constant"],
        "level": "outputs",
    },
    {
        "title": "encoding holds all sines, then all cosines",
        "edits": [("jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)",
                   "jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-2)")],
        "layers": ["embed_dirs", "embed_pts"],
        "between": (None, "coarse.pts_linears.0"),
        "causes": ["rearranged", "concat", "permuted"],
        "level": "outputs",
    },
    {
        "title": "inclusive product: a sample is dimmed by its own alpha",
        "edits": [("    trans = jnp.concatenate([jnp.ones_like(trans[:, :1]), trans[:, :-1]], axis=-1)\n", "")],
        "layers": [""],
        "between": ("coarse.rgb_linear", "fine.pts_linears.0"),
        "causes": ["left_out", "offset"],
        "level": "outputs",
    },
    {
        "title": "distances along the ray are not multiplied by the length of its direction",
        "edits": [("    deltas = deltas * jnp.linalg.norm(rays_d, axis=-1, keepdims=True)\n", "")],
        "layers": [""],
        "between": ("coarse.rgb_linear", "fine.pts_linears.0"),
        "causes": ["scale", "left_out"],
        "level": "outputs",
    },
    {
        "title": "softplus of the density for relu (as in mip-NeRF)",
        "edits": [("jnp.exp(-jax.nn.relu(sigma) * deltas)", "jnp.exp(-jax.nn.softplus(sigma) * deltas)")],
        "layers": [""],
        "between": ("coarse.rgb_linear", "fine.pts_linears.0"),
        "causes": ["activation"],
        "level": "outputs",
    },
    {
        "title": "the fine samples carry a gradient into the coarse network",
        "edits": [("z_new = jax.lax.stop_gradient(importance_sample(mids, weights[:, 1:-1], N_FINE))",
                   "z_new = importance_sample(mids, weights[:, 1:-1], N_FINE)")],
        "layers": [""],
        "between": ("coarse.rgb_linear", "fine.pts_linears.0"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "the fine network sees the new samples only, not those of the coarse pass",
        "edits": [("z = jnp.sort(jnp.concatenate([z, z_new], axis=-1), axis=-1)", "z = jnp.sort(z_new, axis=-1)")],
        "layers": [""],
        "between": ("coarse.rgb_linear", "fine.pts_linears.0"),
        "causes": ["left_out", "operand", "shape"],
        "level": "outputs",
    },
    {
        "title": "the density reads the feature vector, not the trunk's output",
        "edits": [('sigma = linear(p["sigma"], h)[..., 0]', 'sigma = linear(p["sigma"], feature)[..., 0]')],
        "layers": ["coarse"],
        "between": ("coarse.pts_linears.3", "coarse.alpha_linear"),
        "causes": ["operand", "wiring"],
        "level": "outputs",
    },
    {
        "title": "the fine pass runs with the coarse network's parameters",
        "edits": [('query(params["fine"], z)', 'query(params["coarse"], z)')],
        "layers": ["fine.pts_linears.0", ""],
        "causes": ["swapped", "operand"],
        "level": "outputs",
    },
]
