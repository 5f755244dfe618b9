"""RealNVP: couplings with checkerboard and channel masks, squeezing, two scales, log-likelihood."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

CHANNELS, MID, BLOCKS, SCALES, BOUND = 3, 5, 1, 2, 0.9

# ---- PyTorch ---------------------------------------------------------------------------------
def WNConv2d(in_channels, out_channels, kernel_size, padding, bias=True):
    return weight_norm(nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=bias))

class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.in_norm = nn.BatchNorm2d(channels)
        self.in_conv = WNConv2d(channels, channels, 3, 1, bias=False)
        self.out_norm = nn.BatchNorm2d(channels)
        self.out_conv = WNConv2d(channels, channels, 3, 1, bias=True)
    def forward(self, x):
        y = self.in_conv(F.relu(self.in_norm(x)))
        return x + self.out_conv(F.relu(self.out_norm(y)))

class ResNet(nn.Module):
    def __init__(self, in_channels, mid_channels, out_channels, num_blocks, kernel_size, padding):
        super().__init__()
        self.in_norm = nn.BatchNorm2d(in_channels)
        self.in_conv = WNConv2d(2 * in_channels, mid_channels, kernel_size, padding)
        self.blocks = nn.ModuleList(ResidualBlock(mid_channels) for _ in range(num_blocks))
        self.out_norm = nn.BatchNorm2d(mid_channels)
        self.out_conv = WNConv2d(mid_channels, out_channels, 1, 0)
    def forward(self, x):
        x = self.in_norm(x) * 2.0
        x = F.relu(torch.cat((x, -x), dim=1))
        x = self.in_conv(x)
        for block in self.blocks:
            x = block(x)
        return self.out_conv(F.relu(self.out_norm(x)))

class Rescale(nn.Module):
    def __init__(self, num_channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels, 1, 1))
    def forward(self, x):
        return self.weight * x

def checkerboard_mask(height, width, reverse, like):
    return ((torch.arange(height)[:, None] + torch.arange(width) + int(reverse)) % 2).to(like.dtype)

class CouplingLayer(nn.Module):
    def __init__(self, in_channels, mid_channels, num_blocks, checkerboard, reverse_mask):
        super().__init__()
        self.checkerboard, self.reverse_mask = checkerboard, reverse_mask
        if not checkerboard:
            in_channels //= 2
        self.st_net = ResNet(in_channels, mid_channels, 2 * in_channels, num_blocks, 3, 1)
        self.rescale = Rescale(in_channels)
    def forward(self, x, sldj):
        if self.checkerboard:
            b = checkerboard_mask(x.size(2), x.size(3), self.reverse_mask, x)
            s, t = self.st_net(x * b).chunk(2, dim=1)
            s, t = self.rescale(torch.tanh(s)) * (1 - b), t * (1 - b)
            x = (x + t) * s.exp()
        else:
            x_id, x_change = x.chunk(2, dim=1) if self.reverse_mask else x.chunk(2, dim=1)[::-1]
            s, t = self.st_net(x_id).chunk(2, dim=1)
            s = self.rescale(torch.tanh(s))
            x_change = (x_change + t) * s.exp()
            x = torch.cat((x_id, x_change) if self.reverse_mask else (x_change, x_id), dim=1)
        return x, sldj + s.flatten(1).sum(-1)

def squeeze_2x2(x, reverse=False, alt_order=False):
    b, c, h, w = x.shape
    if alt_order:
        at = ((0, 0), (1, 1), (0, 1), (1, 0))
        if not reverse:
            return torch.cat([x[:, :, i::2, j::2] for i, j in at], dim=1)
        y = x.new_zeros(b, c // 4, 2 * h, 2 * w)
        for (i, j), part in zip(at, x.chunk(4, dim=1)):
            y[:, :, i::2, j::2] = part
        return y
    if reverse:
        return x.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)

class _RealNVP(nn.Module):
    def __init__(self, scale_idx, num_scales, in_channels, mid_channels, num_blocks):
        super().__init__()
        self.is_last_block = scale_idx == num_scales - 1
        self.in_couplings = nn.ModuleList(
            CouplingLayer(in_channels, mid_channels, num_blocks, True, r) for r in (False, True))
        if not self.is_last_block:
            self.out_couplings = nn.ModuleList(
                CouplingLayer(4 * in_channels, 2 * mid_channels, num_blocks, False, r) for r in (False, True))
            self.next_block = _RealNVP(scale_idx + 1, num_scales, 2 * in_channels, 2 * mid_channels, num_blocks)
    def forward(self, x, sldj):
        for coupling in self.in_couplings:
            x, sldj = coupling(x, sldj)
        if not self.is_last_block:
            x = squeeze_2x2(x)
            for coupling in self.out_couplings:
                x, sldj = coupling(x, sldj)
            x = squeeze_2x2(x, reverse=True)
            x = squeeze_2x2(x, alt_order=True)
            x, x_split = x.chunk(2, dim=1)
            x, sldj = self.next_block(x, sldj)
            x = squeeze_2x2(torch.cat((x, x_split), dim=1), reverse=True, alt_order=True)
        return x, sldj

class RealNVP(nn.Module):
    def __init__(self):
        super().__init__()
        self.flows = _RealNVP(0, SCALES, CHANNELS, MID, BLOCKS)
    def forward(self, x):
        y = ((2 * x - 1) * BOUND + 1) / 2
        y = y.log() - (1.0 - y).log()
        ldj = F.softplus(y) + F.softplus(-y) - math.log1p((1 - BOUND) / BOUND)
        z, sldj = self.flows(y, ldj.flatten(1).sum(-1))
        prior_ll = -0.5 * (z ** 2 + math.log(2 * math.pi))
        prior_ll = prior_ll.flatten(1).sum(-1) - math.log(256) * z[0].numel()
        return z, prior_ll + sldj

# ---- Flax ------------------------------------------------------------------------------------
class ChannelNorm(nnx.Module):
    def __init__(self, features):
        self.gamma, self.beta = nnx.Param(jnp.ones(features)), nnx.Param(jnp.zeros(features))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(features)), nnx.BatchStat(jnp.ones(features))
        self.use_running_average = True
    def __call__(self, x):
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            n, keep = x.size // x.shape[-1], 0.9
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            self.mean[...] = keep * self.mean[...] + (1 - keep) * mean
            self.var[...] = keep * self.var[...] + (1 - keep) * var * n / (n - 1)
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * self.gamma + self.beta

class NormedConv(nnx.Module):
    def __init__(self, size, n_in, n_out, bias=True):
        self.direction = nnx.Param(jnp.ones((size, size, n_in, n_out)))
        self.gain = nnx.Param(jnp.ones(n_out))
        self.bias = nnx.Param(jnp.zeros(n_out)) if bias else None
    def __call__(self, x):
        v = self.direction[...]
        length = jnp.sqrt(jnp.sum(v * v, axis=(0, 1, 2)))
        y = jax.lax.conv_general_dilated(x, v * (self.gain / length), (1, 1), "SAME",
                                         dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y if self.bias is None else y + self.bias

class Unit(nnx.Module):
    def __init__(self, c):
        self.n1, self.c1 = ChannelNorm(c), NormedConv(3, c, c, bias=False)
        self.n2, self.c2 = ChannelNorm(c), NormedConv(3, c, c)
    def __call__(self, x):
        y = self.c1(jax.nn.relu(self.n1(x)))
        return x + self.c2(jax.nn.relu(self.n2(y)))

class ShiftScaleNet(nnx.Module):
    def __init__(self, c, mid, depth):
        self.norm = ChannelNorm(c)
        self.stem = NormedConv(3, 2 * c, mid)
        self.units = nnx.List([Unit(mid) for _ in range(depth)])
        self.last_norm = ChannelNorm(mid)
        self.head = NormedConv(1, mid, 2 * c)
    def __call__(self, x):
        x = 2 * self.norm(x)
        x = self.stem(jax.nn.relu(jnp.concatenate([x, -x], axis=-1)))
        for unit in self.units:
            x = unit(x)
        return self.head(jax.nn.relu(self.last_norm(x)))

class Coupling(nnx.Module):
    def __init__(self, c, mid, depth, parity):
        self.net = ShiftScaleNet(c, mid, depth)
        self.amount = nnx.Param(jnp.ones(c))
        self.parity = parity

    def log_scale_and_shift(self, x):
        log_s, shift = jnp.split(self.net(x), 2, axis=-1)
        return jnp.tanh(log_s) * self.amount, shift

class BoardCoupling(Coupling):
    def __call__(self, x):
        rows, cols = jnp.indices(x.shape[1:3])
        moved = ((rows + cols + self.parity) % 2 == 0)[..., None]
        log_s, shift = self.log_scale_and_shift(jnp.where(moved, 0, x))
        logdet = jnp.where(moved, log_s, 0).sum((1, 2, 3))
        return jnp.where(moved, (x + shift) * jnp.exp(log_s), x), logdet

class HalfCoupling(Coupling):
    def __call__(self, x):
        halves = jnp.split(x, 2, axis=-1)
        log_s, shift = self.log_scale_and_shift(halves[1 - self.parity])
        halves[self.parity] = (halves[self.parity] + shift) * jnp.exp(log_s)
        return jnp.concatenate(halves, axis=-1), log_s.sum((1, 2, 3))

def fold(x):
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(b, h // 2, w // 2, 4 * c)

def unfold(x):
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, 2 * h, 2 * w, c // 4)

class Flow(nnx.Module):
    def __init__(self):
        self.board, self.halves = nnx.List([]), nnx.List([])
        for i in range(SCALES):
            c, mid = CHANNELS * 2 ** i, MID * 2 ** i
            self.board.append(nnx.List([BoardCoupling(c, mid, BLOCKS, p) for p in (0, 1)]))
            if i < SCALES - 1:
                self.halves.append(nnx.List([HalfCoupling(2 * c, 2 * mid, BLOCKS, p) for p in (0, 1)]))
    def __call__(self, x):
        p = 0.5 + (x - 0.5) * BOUND
        x = jnp.log(p) - jnp.log1p(-p)
        logdet = (-jnp.log(p) - jnp.log1p(-p) + math.log(BOUND)).sum((1, 2, 3))
        kept = []
        for i, pair in enumerate(self.board):
            for layer in pair:
                x, more = layer(x)
                logdet = logdet + more
            if i == SCALES - 1:
                break
            x = fold(x)
            for layer in self.halves[i]:
                x, more = layer(x)
                logdet = logdet + more
            x = unfold(x)
            kept.append((x[:, 0::2, 1::2], x[:, 1::2, 0::2]))
            x = jnp.concatenate([x[:, 0::2, 0::2], x[:, 1::2, 1::2]], axis=-1)
        while kept:
            (b, c), (a, d) = kept.pop(), jnp.split(x, 2, axis=-1)
            x = jnp.stack([jnp.stack([a, b], axis=3), jnp.stack([c, d], axis=3)], axis=2)
            x = x.reshape(x.shape[0], 2 * x.shape[1], -1, x.shape[-1])
        numbers = x[0].size
        loglik = -0.5 * (x * x).sum((1, 2, 3)) - numbers * (0.5 * math.log(2 * math.pi) + math.log(256))
        return x.transpose(0, 3, 1, 2), loglik + logdet

def port_weights(net):
    model = Flow()

    def put(var, t):
        var.set_value(jnp.asarray(t.detach().numpy()))

    def norm(dst, src):
        for var, t in zip((dst.gamma, dst.beta, dst.mean, dst.var),
                          (src.weight, src.bias, src.running_mean, src.running_var)):
            put(var, t)

    def conv(dst, src):
        weight = src.parametrizations.weight
        put(dst.gain, weight.original0.flatten())
        put(dst.direction, weight.original1.permute(2, 3, 1, 0))
        if src.bias is not None:
            put(dst.bias, src.bias)

    def coupling(dst, src):
        put(dst.amount, src.rescale.weight.flatten())
        d, s = dst.net, src.st_net
        norm(d.norm, s.in_norm), conv(d.stem, s.in_conv)
        for u, block in zip(d.units, s.blocks):
            norm(u.n1, block.in_norm), conv(u.c1, block.in_conv)
            norm(u.n2, block.out_norm), conv(u.c2, block.out_conv)
        norm(d.last_norm, s.out_norm), conv(d.head, s.out_conv)

    level, i = net.flows, 0
    while level is not None:
        for dst, src in zip(model.board[i], level.in_couplings):
            coupling(dst, src)
        if not level.is_last_block:
            for dst, src in zip(model.halves[i], level.out_couplings):
                coupling(dst, src)
        level, i = getattr(level, "next_block", None), i + 1
    return model

def build(seed):
    torch.manual_seed(seed)
    net = RealNVP()
    with torch.no_grad():
        for name, p in net.named_parameters():
            positive = name.endswith(("norm.weight", "rescale.weight", "original0"))
            p.copy_(0.6 + 0.6 * torch.rand_like(p) if positive else 0.3 * torch.randn_like(p))
        for name, s in net.named_buffers():
            if s.is_floating_point():
                s.copy_(0.5 + torch.rand_like(s) if name.endswith("var") else 0.3 * torch.randn_like(s))
    x = np.random.RandomState(seed).rand(2, CHANNELS, 4, 6).astype(np.float32)
    return {"torch": net.eval(), "flax": port_weights(net), "inputs": x, "flax_inputs": x.transpose(0, 2, 3, 1)}

NETS = [f"flows.{x}.st_net" for x in ("in_couplings.0", "in_couplings.1", "out_couplings.0", "out_couplings.1",
                                      "next_block.in_couplings.0", "next_block.in_couplings.1")]
CONVS = [f"{n}.{x}" for n in NETS for x in ("in_conv", "blocks.0.in_conv", "blocks.0.out_conv", "out_conv")]
NORMS = [f"{n}.{x}" for n in NETS for x in ("in_norm", "blocks.0.in_norm", "blocks.0.out_norm", "out_norm")]
FAULTS = [
    {"title": "squeezing stores its channels block position first, channel last (and so back)",
     "edits": [("w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)", "w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)"),
               ("reshape(b, h, w, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)",
                "reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)")],
     "layers": ["flows", "flows.out_couplings.0"],
     "between": ("flows.in_couplings.1", "flows.out_couplings.0"),
     "causes": ["rearranged", "transposed", "permuted"], "level": "outputs"},
    {"title": "the couplings by channels scale first and shift afterwards",
     "edits": [("(halves[self.parity] + shift) * jnp.exp(log_s)", "halves[self.parity] * jnp.exp(log_s) + shift")],
     "layers": ["flows.out_couplings.0", "flows.out_couplings.1"],
     "between": ("flows.out_couplings.0.rescale", "flows.out_couplings.1"),
     "causes": ["order"], "level": "outputs"},
    {"title": "the log-determinant of the checkerboard couplings sums over the kept pixels too",
     "edits": [("jnp.where(moved, log_s, 0).sum((1, 2, 3))", "log_s.sum((1, 2, 3))")],
     "layers": ["flows.in_couplings.0", "flows.in_couplings.1",
                "flows.next_block.in_couplings.0", "flows.next_block.in_couplings.1"],
     "between": ("flows.in_couplings.0.rescale", "flows.in_couplings.1"),
     "causes": ["mask", "left_out"], "level": "outputs"},
    {"title": "no gradient runs through the length by which a weight-normed kernel is divided",
     "edits": [("length = jnp.sqrt(jnp.sum(v * v, axis=(0, 1, 2)))",
                "length = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(v * v, axis=(0, 1, 2))))")],
     "layers": CONVS, "between": None,
     "causes": ["stop_gradient"], "level": "gradients"},
    {"title": "the running statistics keep a tenth and take nine tenths of the batch",
     "edits": [("x.size // x.shape[-1], 0.9\n", "x.size // x.shape[-1], 0.1\n")],
     "layers": NORMS, "between": None,
     "causes": ["momentum", "constant"], "level": "training"},
]
