"""Glow: squeeze, actnorm, invertible 1x1 conv by LU, affine coupling, multi-scale split with learned priors."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn


class ActNorm(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, c, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, c, 1, 1))

    def forward(self, x):
        _, _, h, w = x.shape
        logdet = h * w * torch.sum(torch.log(torch.abs(self.scale)))
        return self.scale * (x + self.loc), logdet


class InvConv2dLU(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.register_buffer("w_p", torch.eye(c)[torch.randperm(c)])
        self.register_buffer("s_sign", torch.sign(torch.randn(c)))
        self.register_buffer("u_mask", torch.triu(torch.ones(c, c), 1), persistent=False)
        self.register_buffer("l_mask", self.u_mask.T.clone(), persistent=False)
        self.w_l = nn.Parameter(torch.randn(c, c) * 0.12 * self.l_mask)
        self.w_u = nn.Parameter(torch.randn(c, c) * 0.12 * self.u_mask)
        self.w_s = nn.Parameter(torch.randn(c) * 0.2)

    def calc_weight(self):
        eye = torch.eye(self.w_l.shape[0]).to(self.w_l)
        lower = self.w_l * self.l_mask + eye
        upper = self.w_u * self.u_mask + torch.diag(self.s_sign * torch.exp(self.w_s))
        return (self.w_p @ lower @ upper)[:, :, None, None]

    def forward(self, x):
        _, _, h, w = x.shape
        return F.conv2d(x, self.calc_weight()), h * w * torch.sum(self.w_s)


class ZeroConv2d(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 3, padding=0)
        self.scale = nn.Parameter(torch.zeros(1, cout, 1, 1))

    def forward(self, x):
        out = F.pad(x, [1, 1, 1, 1], value=1)
        out = self.conv(out)
        return out * torch.exp(self.scale * 3)


class AffineCoupling(nn.Module):
    def __init__(self, c, filters):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(c // 2, filters, 3, padding=1), nn.ReLU(),
                                 nn.Conv2d(filters, filters, 1), nn.ReLU(), ZeroConv2d(filters, c))

    def forward(self, x):
        a, b = x.chunk(2, 1)
        log_s, t = self.net(a).chunk(2, 1)
        s = torch.sigmoid(log_s + 2)
        out = (b + t) * s
        return torch.cat([a, out], 1), torch.sum(torch.log(s).flatten(1), 1)


class Flow(nn.Module):
    def __init__(self, c, filters):
        super().__init__()
        self.actnorm, self.invconv, self.coupling = ActNorm(c), InvConv2dLU(c), AffineCoupling(c, filters)

    def forward(self, x):
        x, d1 = self.actnorm(x)
        x, d2 = self.invconv(x)
        x, d3 = self.coupling(x)
        return x, d1 + d2 + d3


def gaussian_log_p(x, mean, log_sd):
    return -0.5 * math.log(2 * math.pi) - log_sd - 0.5 * (x - mean) ** 2 / torch.exp(2 * log_sd)


class Block(nn.Module):
    def __init__(self, cin, n_flow, filters, split):
        super().__init__()
        self.split = split
        self.flows = nn.ModuleList([Flow(cin * 4, filters) for _ in range(n_flow)])
        self.prior = ZeroConv2d(cin * 2, cin * 4) if split else ZeroConv2d(cin * 4, cin * 8)

    def forward(self, x):
        b, c, h, w = x.shape
        x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
        x = x.contiguous().view(b, c * 4, h // 2, w // 2)
        logdet = 0
        for flow in self.flows:
            x, det = flow(x)
            logdet = logdet + det
        x, z = x.chunk(2, 1) if self.split else (torch.zeros_like(x), x)
        mean, log_sd = self.prior(x).chunk(2, 1)
        log_p = gaussian_log_p(z, mean, log_sd).flatten(1).sum(1)
        return x, logdet, log_p, z


class Glow(nn.Module):
    def __init__(self, cin=3, n_flow=2, filters=7):
        super().__init__()
        self.blocks = nn.ModuleList([Block(cin, n_flow, filters, True), Block(cin * 2, n_flow, filters, False)])

    def forward(self, x):
        total_p, total_det, zs = 0, 0, []
        for block in self.blocks:
            x, det, log_p, z = block(x)
            total_p, total_det = total_p + log_p, total_det + det
            zs.append(z)
        return (total_p, total_det, *zs)


# ======================= NNX, channels last =======================


class Fixed(nnx.Variable):
    """What is drawn once and never learned."""


class ScaledConv(nnx.Module):
    def __init__(self, din, dout, rngs):
        self.conv = nnx.Conv(din, dout, (3, 3), padding="VALID", rngs=rngs)
        self.log_gain = nnx.Param(jnp.zeros(dout))

    def __call__(self, x):
        framed = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.0)
        return self.conv(framed) * jnp.exp(3.0 * self.log_gain[...])


class Step(nnx.Module):
    """Actnorm, 1x1 mixing and coupling."""

    def __init__(self, dim, width, rngs):
        self.shift, self.gain = nnx.Param(jnp.zeros(dim)), nnx.Param(jnp.ones(dim))
        self.lower, self.upper = nnx.Param(jnp.zeros((dim, dim))), nnx.Param(jnp.zeros((dim, dim)))
        self.log_diag = nnx.Param(jnp.zeros(dim))
        self.perm, self.sign = Fixed(jnp.eye(dim)), Fixed(jnp.ones(dim))
        self.hidden = nnx.Conv(dim // 2, width, (3, 3), rngs=rngs)
        self.inner = nnx.Conv(width, width, (1, 1), rngs=rngs)
        self.final = ScaledConv(width, dim, rngs)

    def mixing(self):
        low = jnp.tril(self.lower[...], -1) + jnp.eye(self.lower.shape[0], dtype=self.lower.dtype)
        high = jnp.triu(self.upper[...], 1) + jnp.diag(self.sign[...] * jnp.exp(self.log_diag[...]))
        return self.perm[...] @ (low @ high)

    def __call__(self, x):
        pixels = x.shape[1] * x.shape[2]
        x = (x + self.shift[...]) * self.gain[...]
        logdet = pixels * jnp.log(jnp.abs(self.gain[...])).sum()
        x = jnp.einsum("bhwi,oi->bhwo", x, self.mixing())
        logdet += self.log_diag[...].sum() * pixels
        kept, moved = jnp.split(x, 2, axis=-1)
        h = nnx.relu(self.inner(nnx.relu(self.hidden(kept))))
        raw, t = jnp.split(self.final(h), 2, axis=-1)
        moved = (moved + t) * nnx.sigmoid(raw + 2.0)
        logdet += nnx.log_sigmoid(raw + 2.0).sum((1, 2, 3))
        return jnp.concatenate([kept, moved], axis=-1), logdet


def space_to_depth(x):
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(b, h // 2, w // 2, 4 * c)


def normal_logpdf(x, mean, log_std):
    return -0.5 * (jnp.log(2 * jnp.pi) + ((x - mean) * jnp.exp(-log_std)) ** 2) - log_std


class Scale(nnx.Module):
    def __init__(self, dim, depth, width, last, rngs):
        self.last = last
        self.steps = nnx.List([Step(4 * dim, width, rngs) for _ in range(depth)])
        self.prior = ScaledConv(4 * dim if last else 2 * dim, 8 * dim if last else 4 * dim, rngs)

    def __call__(self, x):
        x, logdet = space_to_depth(x), 0.0
        for step in self.steps:
            x, d = step(x)
            logdet += d
        rest, z = (jnp.zeros_like(x), x) if self.last else jnp.split(x, 2, axis=-1)
        mean, log_std = jnp.split(self.prior(rest), 2, axis=-1)
        return rest, z, logdet, normal_logpdf(z, mean, log_std).sum((1, 2, 3))


class FlaxGlow(nnx.Module):
    def __init__(self, dim=3, depth=2, width=7, *, rngs):
        self.scales = nnx.List([Scale(dim, depth, width, False, rngs), Scale(2 * dim, depth, width, True, rngs)])

    def __call__(self, x):
        latents, logp, logdet = [], 0.0, 0.0
        for scale in self.scales:
            x, z, d, p = scale(x)
            latents.append(z)
            logp, logdet = logp + p, logdet + d
        return (logp, logdet, *latents)


def port(net, model):
    f = lambda t: jnp.asarray(t.detach().numpy())

    def conv(dst, src):
        dst.kernel[...], dst.bias[...] = f(src.weight).transpose(2, 3, 1, 0), f(src.bias)

    def scaled(dst, src):
        conv(dst.conv, src.conv)
        dst.log_gain[...] = f(src.scale).reshape(-1)

    for scale, block in zip(model.scales, net.blocks):
        scaled(scale.prior, block.prior)
        for step, flow in zip(scale.steps, block.flows):
            step.shift[...], step.gain[...] = f(flow.actnorm.loc).reshape(-1), f(flow.actnorm.scale).reshape(-1)
            lu = flow.invconv
            step.lower[...], step.upper[...], step.log_diag[...] = f(lu.w_l), f(lu.w_u), f(lu.w_s)
            step.perm[...], step.sign[...] = f(lu.w_p), f(lu.s_sign)
            conv(step.hidden, flow.coupling.net[0])
            conv(step.inner, flow.coupling.net[2])
            scaled(step.final, flow.coupling.net[4])


def build(seed):
    torch.manual_seed(seed)
    net = Glow().eval()
    for name, p in net.named_parameters():
        if name.endswith(("w_l", "w_u", "w_s")):
            continue  # drawn already, triangular
        if name.endswith("actnorm.scale"):
            p.data.uniform_(0.6, 1.4)
        elif name.endswith(("loc", "scale")):
            p.data.normal_(0, 0.12)
        else:
            p.data.normal_(0, (0.3 if "prior" in name else 0.8) / p[0].numel() ** 0.5 if p.dim() > 1 else 0.2)
    model = FlaxGlow(rngs=nnx.Rngs(seed))
    port(net, model)
    model.eval()
    x = np.random.default_rng(seed).normal(size=(2, 3, 8, 12)).astype(np.float32)
    return {"torch": net, "flax": model, "inputs": (x,), "flax_inputs": (x.transpose(0, 2, 3, 1),)}


FAULTS = [
    {
        "title": "triangular matrices not masked: what is zero at first learns",
        "edits": [("jnp.tril(self.lower[...], -1) +", "self.lower[...] +"),
                  ("jnp.triu(self.upper[...], 1) +", "self.upper[...] +")],
        "layers": ["blocks.0.flows.0.invconv", "blocks.0.flows.1.invconv",
                   "blocks.1.flows.0.invconv", "blocks.1.flows.1.invconv"],
        "causes": ["mask", "left_out", "stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "the zero-initialised convs pad with 0, not with 1",
        "edits": [(", constant_values=1.0)", ")")],
        "layers": ["blocks.0.flows.0.coupling.net.4", "blocks.0.flows.1.coupling.net.4", "blocks.0.prior",
                   "blocks.1.flows.0.coupling.net.4", "blocks.1.flows.1.coupling.net.4", "blocks.1.prior"],
        "causes": ["padding", "constant"],
        "level": "outputs",
    },
    {
        "title": "squeeze puts the channel last within the new channels, not first",
        "edits": [(".transpose(0, 1, 3, 5, 2, 4)", ".transpose(0, 1, 3, 2, 4, 5)")],
        "layers": ["blocks.0", "blocks.1"],
        "causes": ["rearranged", "flatten", "transposed", "order"],
        "level": "outputs",
    },
    {
        "title": "coupling scales first and then shifts",
        "edits": [("moved = (moved + t) * nnx.sigmoid(raw + 2.0)", "moved = moved * nnx.sigmoid(raw + 2.0) + t")],
        "layers": ["blocks.0.flows.0.coupling", "blocks.0.flows.1.coupling",
                   "blocks.1.flows.0.coupling", "blocks.1.flows.1.coupling"],
        "between": ("blocks.0.flows.0.coupling.net.4", "blocks.0.flows.1.actnorm"),
        "causes": ["order", "operation"],
        "level": "outputs",
    },
    {
        "title": "log-determinant of the actnorm counted once, not for every pixel",
        "edits": [("logdet = pixels * jnp.log(", "logdet = jnp.log(")],
        "layers": ["blocks.0.flows.0.actnorm", "blocks.0.flows.1.actnorm",
                   "blocks.1.flows.0.actnorm", "blocks.1.flows.1.actnorm"],
        "causes": ["scale", "left_out"],
        "level": "outputs",
    },
]
