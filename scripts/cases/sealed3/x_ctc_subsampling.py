"""CTC speech model: Conv2d subsampling by four, positions, Conformer-like blocks without attention, log-probabilities."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn


class Subsampling(nn.Module):
    def __init__(self, mels, channels, dim):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, channels, 3, 2), nn.ReLU(), nn.Conv2d(channels, channels, 3, 2), nn.ReLU())
        self.out = nn.Linear(channels * (((mels - 1) // 2 - 1) // 2), dim)

    def forward(self, x, mask):
        x = self.conv(x.unsqueeze(1))
        b, c, t, f = x.shape
        x = self.out(x.transpose(1, 2).contiguous().view(b, t, c * f))
        return x, mask[:, :-2:2][:, :-2:2]


class FeedForward(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.w_1 = nn.Linear(dim, hidden)
        self.w_2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.w_2(F.silu(self.w_1(self.norm(x))))


class ConvModule(nn.Module):
    def __init__(self, dim, kernel=5):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.pointwise1 = nn.Conv1d(dim, 2 * dim, 1)
        self.depthwise = nn.Conv1d(dim, dim, kernel, padding=(kernel - 1) // 2, groups=dim)
        self.bn = nn.BatchNorm1d(dim)
        self.pointwise2 = nn.Conv1d(dim, dim, 1)

    def forward(self, x, mask):
        x = self.norm(x).transpose(1, 2)
        x = F.glu(self.pointwise1(x), dim=1)
        x = x.masked_fill(~mask[:, None], 0.0)
        x = F.silu(self.bn(self.depthwise(x)))
        return self.pointwise2(x).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.ff1 = FeedForward(dim, hidden)
        self.conv = ConvModule(dim)
        self.ff2 = FeedForward(dim, hidden)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x, mask):
        x = x + 0.5 * self.ff1(x)
        x = x + self.conv(x, mask)
        x = x + 0.5 * self.ff2(x)
        return self.norm(x)


def sinusoids(t, d):
    pos = torch.arange(t).float()[:, None]
    freq = torch.exp(torch.arange(0, d, 2).float() * -(math.log(10000.0) / d))
    pe = torch.zeros(t, d)
    pe[:, 0::2], pe[:, 1::2] = torch.sin(pos * freq), torch.cos(pos * freq)
    return pe


class CTCModel(nn.Module):
    def __init__(self, mels=17, channels=4, dim=10, hidden=14, layers=2, vocab=9):
        super().__init__()
        self.subsample = Subsampling(mels, channels, dim)
        self.blocks = nn.ModuleList([Block(dim, hidden) for _ in range(layers)])
        self.ctc_lo = nn.Linear(dim, vocab)

    def forward(self, feats, lengths):
        mask = torch.arange(feats.shape[1])[None] < lengths[:, None]
        x, mask = self.subsample(feats, mask)
        x = x * math.sqrt(x.shape[-1]) + sinusoids(x.shape[1], x.shape[2])
        for block in self.blocks:
            x = block(x, mask)
        return self.ctc_lo(x).log_softmax(dim=-1).transpose(0, 1)


# ######## NNX, channels last ########


class MovingNorm(nnx.Module):
    """Batch norm over all but the last axis, torch's way of remembering."""

    def __init__(self, dim):
        self.gain, self.shift = nnx.Param(jnp.ones((dim,))), nnx.Param(jnp.zeros((dim,)))
        self.mu, self.sigma2 = nnx.BatchStat(jnp.zeros((dim,))), nnx.BatchStat(jnp.ones((dim,)))
        self.use_running_average = False

    def __call__(self, x):
        if self.use_running_average:
            mean, var = self.mu[...], self.sigma2[...]
        else:
            mean, var = jnp.mean(x, (0, 1)), jnp.var(x, (0, 1))
            n = x.shape[0] * x.shape[1]
            self.mu[...] = 0.9 * self.mu[...] + 0.1 * jax.lax.stop_gradient(mean)
            self.sigma2[...] = 0.9 * self.sigma2[...] + 0.1 * jax.lax.stop_gradient(var * n / (n - 1))
        return (x - mean) / jnp.sqrt(var + 1e-5) * self.gain[...] + self.shift[...]


def layer_norm(dim, rngs):
    return nnx.LayerNorm(dim, epsilon=1e-5, use_fast_variance=False, rngs=rngs)


class Frontend(nnx.Module):
    def __init__(self, mels, channels, dim, rngs):
        self.conv_a = nnx.Conv(1, channels, (3, 3), strides=(2, 2), padding="VALID", rngs=rngs)
        self.conv_b = nnx.Conv(channels, channels, (3, 3), strides=(2, 2), padding="VALID", rngs=rngs)
        self.proj = nnx.Linear(channels * (((mels - 1) // 2 - 1) // 2), dim, rngs=rngs)

    def __call__(self, x, valid):
        x = nnx.relu(self.conv_b(nnx.relu(self.conv_a(x[..., None]))))
        x = jnp.swapaxes(x, 2, 3)
        x = self.proj(x.reshape(*x.shape[:2], -1))
        return x, valid[:, :-2:2][:, :-2:2]


class HalfStep(nnx.Module):
    def __init__(self, dim, hidden, rngs):
        self.norm = layer_norm(dim, rngs)
        self.up, self.down = nnx.Linear(dim, hidden, rngs=rngs), nnx.Linear(hidden, dim, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.swish(self.up(self.norm(x))))


class LocalMixing(nnx.Module):
    def __init__(self, dim, rngs, kernel=5):
        self.norm = layer_norm(dim, rngs)
        self.expand = nnx.Linear(dim, 2 * dim, rngs=rngs)
        self.mix = nnx.Conv(dim, dim, (kernel,), feature_group_count=dim, padding="SAME", rngs=rngs)
        self.bn = MovingNorm(dim)
        self.contract = nnx.Linear(dim, dim, rngs=rngs)

    def __call__(self, x, valid):
        value, gate = jnp.split(self.expand(self.norm(x)), 2, axis=-1)
        x = value * nnx.sigmoid(gate)
        x = jnp.where(valid[..., None], x, 0.0)
        return self.contract(nnx.swish(self.bn(self.mix(x))))


class ConvBlock(nnx.Module):
    def __init__(self, dim, hidden, rngs):
        self.before, self.after = HalfStep(dim, hidden, rngs), HalfStep(dim, hidden, rngs)
        self.mixing = LocalMixing(dim, rngs)
        self.final = layer_norm(dim, rngs)

    def __call__(self, x, valid):
        x = x + 0.5 * self.before(x)
        x = x + self.mixing(x, valid)
        x = x + 0.5 * self.after(x)
        return self.final(x)


class Recogniser(nnx.Module):
    def __init__(self, mels=17, channels=4, dim=10, hidden=14, layers=2, vocab=9, *, rngs):
        self.frontend = Frontend(mels, channels, dim, rngs)
        self.layers = nnx.List([ConvBlock(dim, hidden, rngs) for _ in range(layers)])
        self.head = nnx.Linear(dim, vocab, rngs=rngs)

    def __call__(self, feats, lengths):
        valid = jnp.arange(feats.shape[1]) < lengths[:, None]
        x, valid = self.frontend(feats, valid)
        t, d = x.shape[1:]
        angle = jnp.arange(t)[:, None] / 10000.0 ** (jnp.arange(0, d, 2) / d)
        table = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(t, d)
        x = x * d ** 0.5 + table
        for layer in self.layers:
            x = layer(x, valid)
        return jnp.swapaxes(jax.nn.log_softmax(self.head(x)), 0, 1)


def port(net, model):
    f = lambda t: jnp.asarray(t.detach().numpy())

    def lin(dst, src):
        w = f(src.weight)
        dst.kernel[...], dst.bias[...] = w.reshape(w.shape[:2]).T, f(src.bias)

    def norm(dst, src):
        dst.scale[...], dst.bias[...] = f(src.weight), f(src.bias)

    for dst, src in ((model.frontend.conv_a, net.subsample.conv[0]), (model.frontend.conv_b, net.subsample.conv[2])):
        dst.kernel[...], dst.bias[...] = f(src.weight).transpose(2, 3, 1, 0), f(src.bias)
    lin(model.frontend.proj, net.subsample.out)
    lin(model.head, net.ctc_lo)
    for dst, src in zip(model.layers, net.blocks):
        for half, ff in ((dst.before, src.ff1), (dst.after, src.ff2)):
            norm(half.norm, ff.norm), lin(half.up, ff.w_1), lin(half.down, ff.w_2)
        mixing, conv = dst.mixing, src.conv
        norm(dst.final, src.norm), norm(mixing.norm, conv.norm)
        lin(mixing.expand, conv.pointwise1), lin(mixing.contract, conv.pointwise2)
        mixing.mix.kernel[...], mixing.mix.bias[...] = f(conv.depthwise.weight).transpose(2, 1, 0), f(conv.depthwise.bias)
        mixing.bn.gain[...], mixing.bn.shift[...] = f(conv.bn.weight), f(conv.bn.bias)
        mixing.bn.mu[...], mixing.bn.sigma2[...] = f(conv.bn.running_mean), f(conv.bn.running_var)


def build(seed):
    torch.manual_seed(seed)
    net = CTCModel()
    for name, p in net.named_parameters():
        p.data.uniform_(0.6, 1.5) if p.dim() == 1 and name.endswith("weight") else p.data.normal_(0, 0.35)
    for name, b in net.named_buffers():
        if b.is_floating_point():
            b.uniform_(0.5, 1.5) if name.endswith("var") else b.normal_(0, 0.3)
    net.eval()
    model = Recogniser(rngs=nnx.Rngs(seed))
    port(net, model)
    model.eval()
    feats = np.random.default_rng(seed).normal(size=(3, 31, 17)).astype(np.float32)
    return {"torch": net, "flax": model, "inputs": (feats, np.array([31, 22, 17]))}


FAULTS = [
    {
        "title": "frequencies and channels flattened as they lie in channels last",
        "edits": [("        x = jnp.swapaxes(x, 2, 3)\n", "")],
        "layers": ["subsample.out", "subsample"],
        "between": ("subsample.conv", "subsample.out"),
        "causes": ["flatten", "rearranged", "transposed"],
        "level": "outputs",
    },
    {
        "title": "running variance remembers the biased variance of the batch",
        "edits": [("jax.lax.stop_gradient(var * n / (n - 1))", "jax.lax.stop_gradient(var)")],
        "layers": ["blocks.0.conv.bn", "blocks.1.conv.bn"],
        "causes": ["unbiased_variance"],
        "level": "training",
    },
    {
        "title": "first feed-forward module added in full, not by half",
        "edits": [("x = x + 0.5 * self.before(x)", "x = x + self.before(x)")],
        "layers": ["blocks.0", "blocks.0.ff1"],
        "between": ("blocks.0.ff1", "blocks.0.conv"),
        "causes": ["scale", "constant", "left_out"],
        "level": "outputs",
    },
    {
        "title": "GLU: the first half is the gate",
        "edits": [("value, gate = jnp.split(self.expand(self.norm(x)), 2, axis=-1)", "gate, value = jnp.split(self.expand(self.norm(x)), 2, axis=-1)")],
        "layers": ["blocks.0.conv"],
        "between": ("blocks.0.conv.pointwise1", "blocks.0.conv.depthwise"),
        "causes": ["blocks", "swapped", "operand", "gates"],
        "level": "outputs",
    },
    {
        "title": "mask subsampled from the last frame that each convolution sees, not from the first",
        "edits": [("return x, valid[:, :-2:2][:, :-2:2]", "return x, valid[:, 2::2][:, 2::2]")],
        "layers": ["subsample", "blocks.0.conv"],
        "causes": ["mask", "offset"],
        "level": "outputs",
    },
]
