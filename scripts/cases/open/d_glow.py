"""Glow: actnorm, invertible 1x1 convolutions, affine couplings, squeeze and split, with log-determinants (nnx)."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
from flax import nnx


class Squeeze2d(nn.Module):
    def forward(self, x):
        B, C, H, W = x.shape
        x = x.view(B, C, H // 2, 2, W // 2, 2)
        return x.permute(0, 1, 3, 5, 2, 4).reshape(B, C * 4, H // 2, W // 2)


class ActNorm2d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.logs = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x, logdet):
        x = (x + self.bias) * torch.exp(self.logs)
        return x, logdet + self.logs.sum() * x.shape[2] * x.shape[3]


class InvertibleConv1x1(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0])

    def forward(self, x, logdet):
        dlogdet = torch.slogdet(self.weight)[1] * x.shape[2] * x.shape[3]
        return torch.nn.functional.conv2d(x, self.weight[:, :, None, None]), logdet + dlogdet


class Conv2dZeros(nn.Module):
    def __init__(self, cin, cout, logscale_factor=3.0):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 3, padding=1)
        self.logs = nn.Parameter(torch.zeros(cout, 1, 1))
        self.logscale_factor = logscale_factor

    def forward(self, x):
        return self.conv(x) * torch.exp(self.logs * self.logscale_factor)


class FlowStep(nn.Module):
    def __init__(self, channels, hidden):
        super().__init__()
        self.actnorm = ActNorm2d(channels)
        self.invconv = InvertibleConv1x1(channels)
        self.block = nn.Sequential(
            nn.Conv2d(channels // 2, hidden, 3, padding=1), nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1), nn.ReLU(),
            Conv2dZeros(hidden, channels),
        )

    def forward(self, x, logdet):
        x, logdet = self.actnorm(x, logdet)
        x, logdet = self.invconv(x, logdet)
        z1, z2 = x.chunk(2, dim=1)
        h = self.block(z1)
        shift, scale = h[:, 0::2], h[:, 1::2]
        scale = torch.sigmoid(scale + 2.0)
        z2 = (z2 + shift) * scale
        logdet = logdet + torch.log(scale).sum(dim=(1, 2, 3))
        return torch.cat([z1, z2], dim=1), logdet


def gaussian_logp(mean, logs, x):
    return (-0.5 * (math.log(2 * math.pi) + 2 * logs + (x - mean) ** 2 / torch.exp(2 * logs))).sum(dim=(1, 2, 3))


class Split2d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = Conv2dZeros(channels // 2, channels)

    def forward(self, x, logdet):
        z1, z2 = x.chunk(2, dim=1)
        h = self.conv(z1)
        mean, logs = h[:, 0::2], h[:, 1::2]
        return z1, logdet + gaussian_logp(mean, logs, z2)


class Glow(nn.Module):
    def __init__(self, channels=2, hidden=12, K=2, L=2, n_bits=8):
        super().__init__()
        self.n_bits = n_bits
        self.squeeze = Squeeze2d()
        self.flows, self.splits = nn.ModuleList(), nn.ModuleList()
        for level in range(L):
            channels *= 4
            self.flows.append(nn.ModuleList([FlowStep(channels, hidden) for _ in range(K)]))
            if level < L - 1:
                self.splits.append(Split2d(channels))
                channels //= 2
        self.prior = nn.Parameter(torch.zeros(1, 2 * channels, 1, 1))

    def forward(self, x):
        pixels = x.shape[1] * x.shape[2] * x.shape[3]
        logdet = -math.log(2 ** self.n_bits) * pixels * torch.ones(x.shape[0], dtype=x.dtype)
        for level, steps in enumerate(self.flows):
            x = self.squeeze(x)
            for step in steps:
                x, logdet = step(x, logdet)
            if level < len(self.splits):
                x, logdet = self.splits[level](x, logdet)
        mean, logs = self.prior.expand(x.shape[0], -1, x.shape[2], x.shape[3]).chunk(2, dim=1)
        logp = logdet + gaussian_logp(mean, logs, x)
        return x, -logp / (math.log(2.0) * pixels)


# ---------------------------------------------------------------- Flax (NHWC)

def space_to_depth(x):
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(b, h // 2, w // 2, c * 4)


class ActNorm(nnx.Module):
    def __init__(self, channels):
        self.bias = nnx.Param(jnp.zeros(channels))
        self.log_scale = nnx.Param(jnp.zeros(channels))

    def __call__(self, x):
        y = jnp.exp(self.log_scale[...]) * (x + self.bias[...])
        return y, x.shape[1] * x.shape[2] * self.log_scale[...].sum()


class InvConv(nnx.Module):
    def __init__(self, channels):
        self.w = nnx.Param(jnp.eye(channels))

    def __call__(self, x):
        y = x @ self.w[...]
        _, ld = jnp.linalg.slogdet(self.w[...])
        return y, ld * x.shape[1] * x.shape[2]


class ZeroConv(nnx.Module):
    def __init__(self, cin, cout, rngs):
        self.conv = nnx.Conv(cin, cout, (3, 3), rngs=rngs)
        self.logs = nnx.Param(jnp.zeros(cout))

    def __call__(self, x):
        return self.conv(x) * jnp.exp(3.0 * self.logs[...])


class Coupling(nnx.Module):
    def __init__(self, channels, hidden, rngs):
        self.conv1 = nnx.Conv(channels // 2, hidden, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(hidden, hidden, (1, 1), rngs=rngs)
        self.conv3 = ZeroConv(hidden, channels, rngs)

    def __call__(self, x):
        a, b = jnp.split(x, 2, axis=-1)
        h = self.conv3(nnx.relu(self.conv2(nnx.relu(self.conv1(a)))))
        t, s = h[..., ::2], h[..., 1::2]
        s = nnx.sigmoid(s + 2.0)
        return jnp.concatenate([a, (b + t) * s], axis=-1), jnp.log(s).sum(axis=(1, 2, 3))


def log_normal(x, mu, log_sigma):
    ll = -0.5 * jnp.log(2 * jnp.pi) - log_sigma - 0.5 * jnp.square((x - mu) * jnp.exp(-log_sigma))
    return ll.sum(axis=(1, 2, 3))


class Step(nnx.Module):
    def __init__(self, channels, hidden, rngs):
        self.parts = nnx.List([ActNorm(channels), InvConv(channels), Coupling(channels, hidden, rngs)])

    def __call__(self, x):
        total = 0.0
        for part in self.parts:
            x, ld = part(x)
            total = total + ld
        return x, total


class FlaxGlow(nnx.Module):
    def __init__(self, channels=2, hidden=12, K=2, L=2, *, rngs):
        self.levels, self.split_priors = nnx.List([]), nnx.List([])
        for i in range(L):
            channels *= 4
            self.levels.append(nnx.List([Step(channels, hidden, rngs) for _ in range(K)]))
            if i < L - 1:
                self.split_priors.append(ZeroConv(channels // 2, channels, rngs))
                channels //= 2
        self.top = nnx.Param(jnp.zeros((2, channels)))

    def __call__(self, x):
        dims = np.prod(x.shape[1:])
        log_px = jnp.full((x.shape[0],), -dims * 8 * np.log(2.0))
        for i, steps in enumerate(self.levels):
            x = space_to_depth(x)
            for step in steps:
                x, ld = step(x)
                log_px = log_px + ld
            if i < len(self.split_priors):
                x, z = jnp.split(x, 2, axis=-1)
                stats = self.split_priors[i](x)
                log_px = log_px + log_normal(z, stats[..., 0::2], stats[..., 1::2])
        mu, log_sigma = self.top[...]
        log_px = log_px + log_normal(x, mu, log_sigma)
        return x, -log_px / (dims * np.log(2.0))


def port(net, model):
    def arr(p):
        return jnp.asarray(p.detach().numpy())

    def conv(dst, src):
        dst.kernel[...] = arr(src.weight).transpose(2, 3, 1, 0)
        dst.bias[...] = arr(src.bias)

    def zero_conv(dst, src):
        conv(dst.conv, src.conv)
        dst.logs[...] = arr(src.logs).ravel()

    for steps, flow in zip(model.levels, net.flows):
        for dst, src in zip(steps, flow):
            act, inv, coupling = dst.parts
            act.bias[...] = arr(src.actnorm.bias).ravel()
            act.log_scale[...] = arr(src.actnorm.logs).ravel()
            inv.w[...] = arr(src.invconv.weight).T
            conv(coupling.conv1, src.block[0])
            conv(coupling.conv2, src.block[2])
            zero_conv(coupling.conv3, src.block[4])
    for dst, src in zip(model.split_priors, net.splits):
        zero_conv(dst, src.conv)
    model.top[...] = arr(net.prior).reshape(2, -1)
    return model


def build(seed):
    torch.manual_seed(seed)
    net = Glow().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "invconv" in name:
                p.add_(0.1 * torch.randn_like(p))
            elif "logs" in name or "prior" in name or p.dim() == 1:
                p.normal_(0, 0.15)
            elif "actnorm.bias" in name:
                p.normal_(0, 0.5)
    x = np.random.default_rng(seed).uniform(-0.5, 0.5, (3, 2, 8, 12))
    model = port(net, FlaxGlow(rngs=nnx.Rngs(0)))
    return {"torch": net, "flax": model, "inputs": x, "flax_inputs": x.transpose(0, 2, 3, 1)}


FAULTS = [
    {
        "title": "squeeze puts the channels last within a cell of four pixels",
        "edits": [("w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)", "w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)")],
        "layers": ["squeeze"],
        "between": (None, "flows.0.0.actnorm"),
        "causes": ["rearranged", "transposed"],
        "level": "outputs",
    },
    {
        "title": "log-determinant of the 1x1 convolution counted once, not per pixel",
        "edits": [("return y, ld * x.shape[1] * x.shape[2]", "return y, ld")],
        "layers": ["flows.0.0.invconv"],
        "causes": ["scale", "left_out"],
        "level": "outputs",
    },
    {
        "title": "actnorm scales first and then adds its bias",
        "edits": [("y = jnp.exp(self.log_scale[...]) * (x + self.bias[...])", "y = jnp.exp(self.log_scale[...]) * x + self.bias[...]")],
        "layers": ["flows.0.0.actnorm"],
        "causes": ["order"],
        "level": "outputs",
    },
    {
        "title": "weight of the 1x1 convolution not transposed for NHWC",
        "edits": [("inv.w[...] = arr(src.invconv.weight).T", "inv.w[...] = arr(src.invconv.weight)")],
        "layers": ["flows.0.0.invconv"],
        "causes": ["transposed"],
        "level": "outputs",
    },
    {
        "title": "coupling's scale as exp(tanh(s))",
        "edits": [("s = nnx.sigmoid(s + 2.0)", "s = jnp.exp(jnp.tanh(s))")],
        "layers": ["flows.0.0"],
        "between": ("flows.0.0.block.4.conv", "flows.0.1.actnorm"),
        "causes": ["activation", "operation"],
        "level": "outputs",
    },
    {
        "title": "shift and scale taken as halves of the channels",
        "edits": [("t, s = h[..., ::2], h[..., 1::2]", "t, s = jnp.split(h, 2, axis=-1)")],
        "layers": ["flows.0.0"],
        "between": ("flows.0.0.block.4.conv", "flows.0.1.actnorm"),
        "causes": ["rearranged", "blocks"],
        "level": "outputs",
    },
    {
        "title": "log-normal density with sigma taken for the variance",
        "edits": [("jnp.square((x - mu) * jnp.exp(-log_sigma))", "jnp.square(x - mu) * jnp.exp(-log_sigma)")],
        "layers": ["splits.0"],
        "between": ("splits.0.conv.conv", "flows.1.0.actnorm"),
        "causes": ["constant", "operand", "operation"],
        "level": "outputs",
    },
    {
        "title": "conditional prior of the split reads the half that is dropped",
        "edits": [("                stats = self.split_priors[i](x)\n", "                stats = self.split_priors[i](z)\n")],
        "layers": ["splits.0"],
        "between": ("flows.0.1.block.4.conv", "splits.0.conv.conv"),
        "causes": ["operand", "swapped"],
        "level": "outputs",
    },
    {
        "title": "bits per dimension reported in nats",
        "edits": [("return x, -log_px / (dims * np.log(2.0))", "return x, -log_px / dims")],
        "layers": [""],
        "between": ("flows.1.1.block.4.conv", None),
        "causes": ["scale", "left_out"],
        "level": "outputs",
    },
]
