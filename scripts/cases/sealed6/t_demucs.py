"""Demucs (second version, reduced): waveform separation with a convolutional U-Net around a BLSTM."""
import math
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
import jax
import jax.numpy as jnp
from jax import lax
from flax import nnx


class BLSTM(nn.Module):
    def __init__(self, dim, hidden, layers=1):
        super().__init__()
        self.lstm = nn.LSTM(bidirectional=True, num_layers=layers, hidden_size=hidden, input_size=dim)
        self.linear = nn.Linear(2 * hidden, dim)

    def forward(self, x):
        x = x.permute(2, 0, 1)
        x = self.lstm(x)[0]
        x = self.linear(x)
        x = x.permute(1, 2, 0)
        return x


def center_trim(tensor, reference):
    """Center trim `tensor` with respect to `reference`, along the last dimension."""
    delta = tensor.size(-1) - reference
    if delta < 0:
        raise ValueError("tensor must be larger than reference. " f"Delta is {delta}.")
    if delta:
        tensor = tensor[..., delta // 2:-(delta - delta // 2)]
    return tensor


class Demucs(nn.Module):
    def __init__(self, sources=3, audio_channels=2, channels=(6, 10), kernel_size=5, stride=2, context=3,
                 hidden=7, lstm_layers=2):
        super().__init__()
        self.audio_channels = audio_channels
        self.sources = sources
        self.kernel_size = kernel_size
        self.context = context
        self.stride = stride
        self.depth = len(channels)
        self.encoder = nn.ModuleList()
        self.decoder = nn.ModuleList()
        in_channels = audio_channels
        for index, width in enumerate(channels):
            encode = [nn.Conv1d(in_channels, width, kernel_size, stride), nn.ReLU()]
            encode += [nn.Conv1d(width, 2 * width, 1), nn.GLU(dim=1)]
            self.encoder.append(nn.Sequential(*encode))
            out_channels = in_channels if index > 0 else sources * audio_channels
            decode = [nn.Conv1d(width, 2 * width, context), nn.GLU(dim=1)]
            decode += [nn.ConvTranspose1d(width, out_channels, kernel_size, stride)]
            if index > 0:
                decode.append(nn.ReLU())
            self.decoder.insert(0, nn.Sequential(*decode))
            in_channels = width
        self.lstm = BLSTM(in_channels, hidden, lstm_layers)

    def valid_length(self, length):
        for _ in range(self.depth):
            length = math.ceil((length - self.kernel_size) / self.stride) + 1
            length = max(1, length)
            length += self.context - 1
        for _ in range(self.depth):
            length = (length - 1) * self.stride + self.kernel_size
        return int(length)

    def forward(self, mix):
        x = mix
        length = x.shape[-1]
        mono = mix.mean(dim=1, keepdim=True)
        mean = mono.mean(dim=-1, keepdim=True)
        std = mono.std(dim=-1, keepdim=True)
        x = (x - mean) / (1e-5 + std)
        delta = self.valid_length(length) - length
        x = F.pad(x, (delta // 2, delta - delta // 2))
        saved = []
        for encode in self.encoder:
            x = encode(x)
            saved.append(x)
        x = self.lstm(x)
        for decode in self.decoder:
            skip = center_trim(saved.pop(-1), x.shape[-1])
            x = x + skip
            x = decode(x)
        x = center_trim(x, length)
        x = x * std + mean
        return x.view(x.size(0), self.sources, self.audio_channels, x.size(-1))


# ---- Flax half: NNX, audio as [batch, time, channel] ----

KERNEL, HOP, CONTEXT = 5, 2, 3
WIDTHS = (6, 10)
STEMS, CHANNELS = 3, 2


def gated(x):
    value, gate = jnp.split(x, 2, axis=-1)
    return value * jax.nn.sigmoid(gate)


def padded_size(n):
    for _ in WIDTHS:
        n = max(1, -(-(n - KERNEL) // HOP) + 1) + CONTEXT - 1
    for _ in WIDTHS:
        n = (n - 1) * HOP + KERNEL
    return n


class Down(nnx.Module):
    def __init__(self, inner, width, rngs):
        self.strided = nnx.Conv(inner, width, (KERNEL,), strides=(HOP,), padding="VALID", rngs=rngs)
        self.expand = nnx.Linear(width, 2 * width, rngs=rngs)

    def __call__(self, x):
        return gated(self.expand(nnx.relu(self.strided(x))))


class Up(nnx.Module):
    def __init__(self, width, outer, last, rngs):
        self.look = nnx.Conv(width, 2 * width, (CONTEXT,), padding="VALID", rngs=rngs)
        self.spread = nnx.ConvTranspose(width, outer, (KERNEL,), strides=(HOP,), padding="VALID", rngs=rngs)
        self.last = last

    def __call__(self, x):
        x = self.spread(gated(self.look(x)))
        return x if self.last else nnx.relu(x)


class Direction(nnx.Module):
    """One LSTM direction over [time, batch, feature]; gates in the order i, f, g, o."""

    def __init__(self, inner, hidden):
        self.wx = nnx.Param(jnp.zeros((inner, 4 * hidden)))
        self.wh = nnx.Param(jnp.zeros((hidden, 4 * hidden)))
        self.bx = nnx.Param(jnp.zeros((4 * hidden,)))
        self.bh = nnx.Param(jnp.zeros((4 * hidden,)))
        self.hidden = hidden

    def __call__(self, x):
        wh = self.wh[...]
        drive = x @ self.wx[...] + self.bx[...] + self.bh[...]
        start = jnp.zeros((x.shape[1], self.hidden), drive.dtype)

        def step(carry, u):
            h, c = carry
            i, f, g, o = jnp.split(u + h @ wh, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        return lax.scan(step, (start, start), drive)[1]


class TwoWay(nnx.Module):
    def __init__(self, width, hidden, layers, rngs):
        sizes = [width] + [2 * hidden] * (layers - 1)
        self.onward = nnx.List([Direction(n, hidden) for n in sizes])
        self.back = nnx.List([Direction(n, hidden) for n in sizes])
        self.project = nnx.Linear(2 * hidden, width, rngs=rngs)

    def __call__(self, x):
        x = jnp.swapaxes(x, 0, 1)
        for a, b in zip(self.onward, self.back):
            later = b(x[::-1])[::-1]
            x = jnp.concatenate([a(x), later], axis=-1)
        return jnp.swapaxes(self.project(x), 0, 1)


class Separator(nnx.Module):
    def __init__(self, rngs):
        ins = (CHANNELS,) + WIDTHS[:-1]
        outs = (STEMS * CHANNELS,) + WIDTHS[:-1]
        self.down = nnx.List([Down(i, w, rngs) for i, w in zip(ins, WIDTHS)])
        self.neck = TwoWay(WIDTHS[-1], 7, 2, rngs)
        self.up = nnx.List([Up(w, o, k == 0, rngs) for k, (w, o) in enumerate(zip(WIDTHS, outs))])

    def __call__(self, audio):
        b, n, _ = audio.shape
        mono = jnp.mean(audio, axis=2, keepdims=True)
        centre = jnp.mean(mono, axis=1, keepdims=True)
        level = jnp.std(mono, axis=1, keepdims=True, ddof=1)
        x = (audio - centre) / (level + 1e-5)
        extra = padded_size(n) - n
        x = jnp.pad(x, ((0, 0), (extra // 2, extra - extra // 2), (0, 0)))
        memory = []
        for down in self.down:
            x = down(x)
            memory.append(x)
        x = self.neck(x)
        for up, kept in zip(reversed(list(self.up)), reversed(memory)):
            first = (kept.shape[1] - x.shape[1]) // 2
            x = up(x + lax.dynamic_slice_in_dim(kept, first, x.shape[1], axis=1))
        head = (x.shape[1] - n) // 2
        x = x[:, head:head + n] * level + centre
        return jnp.transpose(x.reshape(b, n, STEMS, CHANNELS), (0, 2, 3, 1))


def port_weights(net):
    model = Separator(nnx.Rngs(0))
    arr = lambda w: jnp.asarray(w.detach().numpy())

    def affine(layer, kernel, bias):
        layer.kernel = nnx.Param(kernel)
        layer.bias = nnx.Param(arr(bias))

    for mine, his in zip(model.down, net.encoder):
        affine(mine.strided, arr(his[0].weight).transpose(2, 1, 0), his[0].bias)
        affine(mine.expand, arr(his[2].weight)[:, :, 0].T, his[2].bias)
    for mine, his in zip(model.up, reversed(list(net.decoder))):
        affine(mine.look, arr(his[0].weight).transpose(2, 1, 0), his[0].bias)
        affine(mine.spread, arr(his[2].weight).transpose(2, 0, 1)[::-1], his[2].bias)
    rnn = net.lstm.lstm
    for k in range(rnn.num_layers):
        for cell, tail in ((model.neck.onward[k], f"l{k}"), (model.neck.back[k], f"l{k}_reverse")):
            cell.wx = nnx.Param(arr(getattr(rnn, f"weight_ih_{tail}")).T)
            cell.wh = nnx.Param(arr(getattr(rnn, f"weight_hh_{tail}")).T)
            cell.bx = nnx.Param(arr(getattr(rnn, f"bias_ih_{tail}")))
            cell.bh = nnx.Param(arr(getattr(rnn, f"bias_hh_{tail}")))
    affine(model.neck.project, arr(net.lstm.linear.weight).T, net.lstm.linear.bias)
    return model


def build(seed):
    torch.manual_seed(seed)
    net = Demucs()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_((0.45 if p.dim() > 1 else 0.2) * torch.randn_like(p))
    net.eval()
    rs = np.random.RandomState(seed + 1)
    mix = (0.7 * rs.randn(3, 2, 26) + 0.2).astype(np.float32)
    return {"torch": net, "flax": port_weights(net), "inputs": mix,
            "flax_inputs": np.ascontiguousarray(mix.transpose(0, 2, 1))}


FAULTS = [
    {"title": "the gated linear units take the sigmoid of the first half and not of the second",
     "edits": [("    value, gate = jnp.split(x, 2, axis=-1)", "    gate, value = jnp.split(x, 2, axis=-1)")],
     "layers": ["encoder.0", "encoder.0.3"],
     "between": ("encoder.0.2", "encoder.1"),
     "causes": ["blocks", "swapped", "operand"], "level": "outputs"},
    {"title": "the backward direction's outputs stay in reversed time",
     "edits": [("            later = b(x[::-1])[::-1]", "            later = b(x[::-1])")],
     "layers": ["lstm", "lstm.lstm"],
     "between": ("encoder.1", "lstm.linear"),
     "causes": ["reversed", "left_out", "flipped"], "level": "outputs"},
    {"title": "the longer skip is cut at its end only, not on both sides",
     "edits": [("            first = (kept.shape[1] - x.shape[1]) // 2\n", "            first = 0\n")],
     "layers": ["", "decoder.1"],
     "between": ("decoder.0", "decoder.1.0"),
     "causes": ["offset", "padding", "residual"], "level": "outputs"},
    {"title": "no gradient flows through the standard deviation of the mix",
     "edits": [("        x = (audio - centre) / (level + 1e-5)\n",
                "        level = lax.stop_gradient(level)\n        x = (audio - centre) / (level + 1e-5)\n")],
     "layers": [""],
     "between": ("the input", "encoder.0"),
     "causes": ["stop_gradient"], "level": "gradients"},
    {"title": "the port adds both biases of the LSTM into the first and keeps the second too",
     "edits": [("            cell.bx = nnx.Param(arr(getattr(rnn, f\"bias_ih_{tail}\")))",
                "            cell.bx = nnx.Param(arr(getattr(rnn, f\"bias_ih_{tail}\") + getattr(rnn, f\"bias_hh_{tail}\")))")],
     "layers": ["lstm.lstm", "lstm"],
     "between": None,
     "causes": ["bias_sum", "bias_twice"], "level": "bits"},
]
