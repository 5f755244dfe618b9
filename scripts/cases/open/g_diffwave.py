"""DiffWave-like vocoder: dilated gated residual stack with skips, step embedding, mel upsampler."""
from math import sqrt

import flax.linen as fnn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


def Conv1d(*args, **kwargs):
    layer = nn.Conv1d(*args, **kwargs)
    nn.init.kaiming_normal_(layer.weight)
    return layer


class DiffusionEmbedding(nn.Module):
    def __init__(self, max_steps, half=5, width=14):
        super().__init__()
        self.register_buffer("embedding", self._build_embedding(max_steps, half), persistent=False)
        self.projection1 = nn.Linear(2 * half, width)
        self.projection2 = nn.Linear(width, width)

    def forward(self, diffusion_step):
        x = self._lerp_embedding(diffusion_step)
        x = F.silu(self.projection1(x))
        return F.silu(self.projection2(x))

    def _lerp_embedding(self, t):
        low_idx = torch.floor(t).long()
        high_idx = torch.ceil(t).long()
        table = self.embedding.to(t.dtype)
        low, high = table[low_idx], table[high_idx]
        return low + (high - low) * (t - low_idx).unsqueeze(-1)

    def _build_embedding(self, max_steps, half):
        steps = torch.arange(max_steps, dtype=torch.float64).unsqueeze(1)
        dims = torch.arange(half, dtype=torch.float64).unsqueeze(0)
        table = steps * 10.0 ** (dims * 2.0 / (half - 1))
        return torch.cat([torch.sin(table), torch.cos(table)], dim=1)


class SpectrogramUpsampler(nn.Module):
    def __init__(self, factor=2):
        super().__init__()
        args = dict(stride=[1, factor], padding=[1, factor // 2])
        self.conv1 = nn.ConvTranspose2d(1, 1, [3, factor * 2], **args)
        self.conv2 = nn.ConvTranspose2d(1, 1, [3, factor * 2], **args)

    def forward(self, x):
        x = torch.unsqueeze(x, 1)
        x = F.leaky_relu(self.conv1(x), 0.4)
        x = F.leaky_relu(self.conv2(x), 0.4)
        return torch.squeeze(x, 1)


class ResidualBlock(nn.Module):
    def __init__(self, n_mels, residual_channels, dilation, width=14):
        super().__init__()
        self.dilated_conv = Conv1d(residual_channels, 2 * residual_channels, 3, padding=dilation, dilation=dilation)
        self.diffusion_projection = nn.Linear(width, residual_channels)
        self.conditioner_projection = Conv1d(n_mels, 2 * residual_channels, 1)
        self.output_projection = Conv1d(residual_channels, 2 * residual_channels, 1)

    def forward(self, x, diffusion_step, conditioner):
        diffusion_step = self.diffusion_projection(diffusion_step).unsqueeze(-1)
        conditioner = self.conditioner_projection(conditioner)
        y = x + diffusion_step
        y = self.dilated_conv(y) + conditioner
        gate, filter = torch.chunk(y, 2, dim=1)
        y = torch.sigmoid(gate) * torch.tanh(filter)
        y = self.output_projection(y)
        residual, skip = torch.chunk(y, 2, dim=1)
        return (x + residual) / sqrt(2.0), skip


class DiffWave(nn.Module):
    def __init__(self, n_mels=6, channels=8, layers=3, cycle=2, max_steps=12):
        super().__init__()
        self.input_projection = Conv1d(1, channels, 1)
        self.diffusion_embedding = DiffusionEmbedding(max_steps)
        self.spectrogram_upsampler = SpectrogramUpsampler()
        self.residual_layers = nn.ModuleList(
            [ResidualBlock(n_mels, channels, 2 ** (i % cycle)) for i in range(layers)])
        self.skip_projection = Conv1d(channels, channels, 1)
        self.output_projection = Conv1d(channels, 1, 1)

    def forward(self, audio, diffusion_step, spectrogram):
        x = F.relu(self.input_projection(audio.unsqueeze(1)))
        diffusion_step = self.diffusion_embedding(diffusion_step)
        spectrogram = self.spectrogram_upsampler(spectrogram)
        skip = None
        for layer in self.residual_layers:
            x, skip_connection = layer(x, diffusion_step, spectrogram)
            skip = skip_connection if skip is None else skip_connection + skip
        x = skip / sqrt(len(self.residual_layers))
        x = F.relu(self.skip_projection(x))
        return self.output_projection(x).squeeze(1)


def step_table(max_steps, half):
    steps = np.arange(max_steps)[:, None]
    freqs = 10.0 ** (np.arange(half)[None] * 2.0 / (half - 1))
    return np.concatenate([np.sin(steps * freqs), np.cos(steps * freqs)], axis=1)


class StepEmbedding(fnn.Module):
    max_steps: int
    half: int = 5
    width: int = 14

    @fnn.compact
    def __call__(self, t):
        table = jnp.asarray(step_table(self.max_steps, self.half), t.dtype)
        lo = jnp.floor(t).astype(jnp.int32)
        hi = jnp.ceil(t).astype(jnp.int32)
        frac = (t - lo)[:, None]
        emb = table[lo] + frac * (table[hi] - table[lo])
        emb = fnn.silu(fnn.Dense(self.width)(emb))
        return fnn.silu(fnn.Dense(self.width)(emb))


class MelUpsampler(fnn.Module):
    factor: int = 2
    slope: float = 0.4

    @fnn.compact
    def __call__(self, mel):
        s = self.factor
        pad = 2 * s - 1 - s // 2
        x = mel[..., None]
        for _ in range(2):
            x = fnn.ConvTranspose(1, (2 * s, 3), strides=(s, 1), padding=((pad, pad), (1, 1)))(x)
            x = fnn.leaky_relu(x, self.slope)
        return x[..., 0]


class GatedResidual(fnn.Module):
    channels: int
    dilation: int

    @fnn.compact
    def __call__(self, x, step, cond):
        d = self.dilation
        shift = fnn.Dense(self.channels, name="step")(step)[:, None, :]
        y = x + shift
        y = fnn.Conv(2 * self.channels, (3,), kernel_dilation=(d,), padding=[(d, d)], name="dilated")(y)
        y = y + fnn.Conv(2 * self.channels, (1,), name="cond")(cond)
        a, b = jnp.split(y, 2, axis=-1)
        y = jax.nn.sigmoid(a) * jnp.tanh(b)
        y = fnn.Conv(2 * self.channels, (1,), name="out")(y)
        res, skip = jnp.split(y, 2, axis=-1)
        return (x + res) / np.sqrt(2.0), skip


class FlaxDiffWave(fnn.Module):
    channels: int = 8
    num_layers: int = 3
    cycle: int = 2
    max_steps: int = 12

    @fnn.compact
    def __call__(self, audio, step, mel):
        x = fnn.relu(fnn.Conv(self.channels, (1,), name="conv_in")(audio[..., None]))
        step = StepEmbedding(self.max_steps, name="step_embedding")(step)
        cond = MelUpsampler(name="upsampler")(mel)
        total = 0.0
        for i in range(self.num_layers):
            x, skip = GatedResidual(self.channels, 2 ** (i % self.cycle), name=f"layers_{i}")(x, step, cond)
            total = total + skip
        x = total / np.sqrt(self.num_layers)
        x = fnn.relu(fnn.Conv(self.channels, (1,), name="conv_skip")(x))
        return fnn.Conv(1, (1,), name="conv_out")(x)[..., 0]


def to_np(t):
    return t.detach().numpy()


def dense(m):
    return {"kernel": to_np(m.weight).T, "bias": to_np(m.bias)}


def conv(m):
    return {"kernel": to_np(m.weight).transpose(2, 1, 0), "bias": to_np(m.bias)}


def conv_transpose(m):
    w = to_np(m.weight).transpose(3, 2, 0, 1)
    return {"kernel": w[::-1, ::-1].copy(), "bias": to_np(m.bias)}


def port(net):
    p = {
        "conv_in": conv(net.input_projection),
        "step_embedding": {"Dense_0": dense(net.diffusion_embedding.projection1),
                           "Dense_1": dense(net.diffusion_embedding.projection2)},
        "upsampler": {"ConvTranspose_0": conv_transpose(net.spectrogram_upsampler.conv1),
                      "ConvTranspose_1": conv_transpose(net.spectrogram_upsampler.conv2)},
        "conv_skip": conv(net.skip_projection),
        "conv_out": conv(net.output_projection),
    }
    for i, block in enumerate(net.residual_layers):
        p[f"layers_{i}"] = {"dilated": conv(block.dilated_conv), "step": dense(block.diffusion_projection),
                            "cond": conv(block.conditioner_projection), "out": conv(block.output_projection)}
    return {"params": p}


def build(seed):
    """The right pair with random weights and inputs that follow from the seed."""
    torch.manual_seed(seed)
    net = DiffWave().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.2)
    rng = np.random.default_rng(seed)
    audio = rng.normal(size=(3, 20)).astype(np.float32)
    step = np.array([2.25, 7.0, 9.625], np.float32)
    mel = rng.normal(size=(3, 6, 5)).astype(np.float32)
    return {"torch": net, "flax": (FlaxDiffWave(), port(net)), "inputs": (audio, step, mel),
            "flax_inputs": (audio, step, mel.transpose(0, 2, 1))}


FAULTS = [
    {
        "title": "halves of the gated unit exchanged: tanh of the gate, sigmoid of the filter",
        "edits": [("jax.nn.sigmoid(a) * jnp.tanh(b)", "jnp.tanh(a) * jax.nn.sigmoid(b)")],
        "layers": ["residual_layers.0"],
        "between": ("residual_layers.0.dilated_conv", "residual_layers.0.output_projection"),
        "causes": ["swapped", "operand", "blocks"],
        "level": "outputs",
    },
    {
        "title": "dilation doubles on and on: no dilation cycle",
        "edits": [("GatedResidual(self.channels, 2 ** (i % self.cycle), name", "GatedResidual(self.channels, 2**i, name")],
        "layers": ["residual_layers.2.dilated_conv"],
        "causes": ["dilation"],
        "level": "outputs",
    },
    {
        "title": "only the residual branch is divided by sqrt(2), not the sum",
        "edits": [("return (x + res) / np.sqrt(2.0), skip", "return x + res / np.sqrt(2.0), skip")],
        "layers": ["residual_layers.0"],
        "between": ("residual_layers.0.output_projection", "residual_layers.1.diffusion_projection"),
        "causes": ["scale", "order"],
        "level": "outputs",
    },
    {
        "title": "frequencies of the step embedding spread over half, not half - 1",
        "edits": [("freqs = 10.0 ** (np.arange(half)[None] * 2.0 / (half - 1))",
                   "freqs = 10.0 ** (np.arange(half)[None] * 2.0 / half)")],
        "layers": ["diffusion_embedding"],
        "between": ("input_projection", "diffusion_embedding.projection1"),
        "causes": ["constant"],
        "level": "outputs",
    },
    {
        "title": "fractional steps truncated to whole ones, no interpolation between table rows",
        "edits": [("emb = table[lo] + frac * (table[hi] - table[lo])", "emb = table[lo]")],
        "layers": ["diffusion_embedding"],
        "between": ("input_projection", "diffusion_embedding.projection1"),
        "causes": ["left_out", "operation"],
        "level": "outputs",
    },
    {
        "title": "transposed convolution's kernel not flipped along the time axis",
        "edits": [("w[::-1, ::-1].copy()", "w[:, ::-1].copy()")],
        "layers": ["spectrogram_upsampler.conv1"],
        "causes": ["flipped"],
        "level": "outputs",
    },
    {
        "title": "leaky ReLU of the upsampler with the default slope 0.01 for 0.4",
        "edits": [("x = fnn.leaky_relu(x, self.slope)", "x = fnn.leaky_relu(x)")],
        "layers": ["spectrogram_upsampler"],
        "between": ("spectrogram_upsampler.conv1", "spectrogram_upsampler.conv2"),
        "causes": ["activation", "constant"],
        "level": "outputs",
    },
    {
        "title": "the step embedding stays in the residual stream",
        "edits": [("        y = x + shift\n", "        x = x + shift\n        y = x\n")],
        "layers": ["residual_layers.0"],
        "between": ("residual_layers.0.output_projection", "residual_layers.1.diffusion_projection"),
        "causes": ["residual", "operand"],
        "level": "outputs",
    },
]
