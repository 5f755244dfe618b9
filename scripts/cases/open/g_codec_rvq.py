"""Encodec/DAC-like codec: causal weight-normed convs, Snake, LSTM, residual vector quantisation."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from jax import lax


def extra_padding(length, kernel_size, stride, padding_total):
    n_frames = (length - kernel_size + padding_total) / stride + 1
    ideal_length = (math.ceil(n_frames) - 1) * stride + (kernel_size - padding_total)
    return ideal_length - length


class CausalConv1d(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, stride=1, dilation=1):
        super().__init__()
        self.stride, self.dilation, self.kernel_size = stride, dilation, kernel_size
        v = torch.randn(out_channels, in_channels, kernel_size) / math.sqrt(in_channels * kernel_size)
        self.weight_v = nn.Parameter(v)
        self.weight_g = nn.Parameter(v.norm(dim=(1, 2), keepdim=True) * (0.7 + torch.rand(out_channels, 1, 1)))
        self.bias = nn.Parameter(torch.randn(out_channels) * 0.1)

    def forward(self, x):
        weight = self.weight_g * self.weight_v / self.weight_v.norm(dim=(1, 2), keepdim=True)
        span = (self.kernel_size - 1) * self.dilation + 1
        total = span - self.stride
        extra = extra_padding(x.shape[-1], span, self.stride, total)
        x = F.pad(x, (total, extra), mode="reflect")
        return F.conv1d(x, weight, self.bias, self.stride, dilation=self.dilation)


class CausalConvTranspose1d(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, stride):
        super().__init__()
        self.stride, self.kernel_size = stride, kernel_size
        v = torch.randn(in_channels, out_channels, kernel_size) / math.sqrt(in_channels * 2)
        self.weight_v = nn.Parameter(v)
        self.weight_g = nn.Parameter(v.norm(dim=(1, 2), keepdim=True) * (0.7 + torch.rand(in_channels, 1, 1)))
        self.bias = nn.Parameter(torch.randn(out_channels) * 0.1)

    def forward(self, x):
        weight = self.weight_g * self.weight_v / self.weight_v.norm(dim=(1, 2), keepdim=True)
        y = F.conv_transpose1d(x, weight, self.bias, self.stride)
        return y[..., : y.shape[-1] - (self.kernel_size - self.stride)]


class Snake1d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.alpha = nn.Parameter(0.5 + torch.rand(1, channels, 1))

    def forward(self, x):
        return x + (self.alpha + 1e-9).reciprocal() * torch.sin(self.alpha * x).pow(2)


class ResidualUnit(nn.Module):
    def __init__(self, dim, dilation=2):
        super().__init__()
        self.snake1 = Snake1d(dim)
        self.conv1 = CausalConv1d(dim, dim, 3, dilation=dilation)
        self.snake2 = Snake1d(dim)
        self.conv2 = CausalConv1d(dim, dim, 1)

    def forward(self, x):
        return x + self.conv2(self.snake2(self.conv1(self.snake1(x))))


class EncoderBlock(nn.Module):
    def __init__(self, dim_in, dim, stride):
        super().__init__()
        self.unit = ResidualUnit(dim_in)
        self.act = nn.ELU()
        self.down = CausalConv1d(dim_in, dim, 2 * stride, stride=stride)

    def forward(self, x):
        return self.down(self.act(self.unit(x)))


class DecoderBlock(nn.Module):
    def __init__(self, dim_in, dim, stride):
        super().__init__()
        self.act = nn.ELU()
        self.up = CausalConvTranspose1d(dim_in, dim, 2 * stride, stride)
        self.unit = ResidualUnit(dim)

    def forward(self, x):
        return self.unit(self.up(self.act(x)))


class SLSTM(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.lstm = nn.LSTM(dim, dim, 2)

    def forward(self, x):
        x = x.permute(2, 0, 1)
        y, _ = self.lstm(x)
        return (y + x).permute(1, 2, 0)


class Encoder(nn.Module):
    def __init__(self, latent=10):
        super().__init__()
        self.conv_in = CausalConv1d(1, 6, 5)
        self.blocks = nn.ModuleList([EncoderBlock(6, 8, 2), EncoderBlock(8, 12, 3)])
        self.slstm = SLSTM(12)
        self.conv_out = CausalConv1d(12, latent, 3)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.blocks:
            x = block(x)
        return self.conv_out(self.slstm(x))


class Decoder(nn.Module):
    def __init__(self, latent=10):
        super().__init__()
        self.conv_in = CausalConv1d(latent, 12, 3)
        self.blocks = nn.ModuleList([DecoderBlock(12, 8, 3), DecoderBlock(8, 6, 2)])
        self.conv_out = CausalConv1d(6, 1, 5)

    def forward(self, z):
        z = self.conv_in(z)
        for block in self.blocks:
            z = block(z)
        return torch.tanh(self.conv_out(z))


class VectorQuantize(nn.Module):
    def __init__(self, dim, codebook_size=11, codebook_dim=4):
        super().__init__()
        self.in_proj = nn.Linear(dim, codebook_dim)
        self.codebook = nn.Embedding(codebook_size, codebook_dim)
        self.out_proj = nn.Linear(codebook_dim, dim)

    def forward(self, z):
        z_e = self.in_proj(z)
        flat, table = F.normalize(z_e, dim=-1), F.normalize(self.codebook.weight, dim=-1)
        dist = flat.pow(2).sum(-1, keepdim=True) - 2 * flat @ table.t() + table.pow(2).sum(-1)
        codes = (-dist).max(-1)[1]
        z_q = self.codebook(codes)
        loss = F.mse_loss(z_e, z_q.detach(), reduction="none").mean([1, 2])
        z_q = z_e + (z_q - z_e).detach()
        return self.out_proj(z_q), codes, loss


class ResidualVQ(nn.Module):
    def __init__(self, dim, n=3):
        super().__init__()
        self.quantizers = nn.ModuleList([VectorQuantize(dim) for _ in range(n)])

    def forward(self, z):
        out, residual, loss, codes = 0, z, 0, []
        for quantizer in self.quantizers:
            z_q, index, commit = quantizer(residual)
            out, residual, loss = out + z_q, residual - z_q, loss + commit
            codes.append(index)
        return out, torch.stack(codes, 1), loss


class Codec(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.quantizer, self.decoder = Encoder(), ResidualVQ(10), Decoder()

    def forward(self, audio):
        z = self.encoder(audio.unsqueeze(1))
        z, codes, loss = self.quantizer(z.transpose(1, 2))
        y = self.decoder(z.transpose(1, 2)).squeeze(1)
        return y[:, : audio.shape[-1]], codes, loss


DIMS = ("NWC", "WIO", "NWC")


def causal_conv(p, x, stride=1, dilation=1):
    v = p["v"]
    w = v / jnp.sqrt(jnp.sum(v**2, axis=(0, 1), keepdims=True)) * p["g"]
    span = (v.shape[0] - 1) * dilation + 1
    left = span - stride
    right = -(x.shape[1] - span + left) % stride
    x = jnp.pad(x, ((0, 0), (left, right), (0, 0)), mode="reflect")
    return lax.conv_general_dilated(x, w, (stride,), "VALID", rhs_dilation=(dilation,),
                                    dimension_numbers=DIMS) + p["b"]


def causal_conv_transpose(p, x, stride):
    v = p["v"]
    w = v / jnp.sqrt(jnp.sum(v**2, axis=(0, 2), keepdims=True)) * p["g"][:, None]
    y = lax.conv_transpose(x, w[::-1], (stride,), "VALID", dimension_numbers=DIMS) + p["b"]
    trim = v.shape[0] - stride
    return y[:, : y.shape[1] - trim]


def snake(alpha, x):
    return x + jnp.sin(alpha * x) ** 2 / (alpha + 1e-9)


def residual_unit(p, x):
    y = causal_conv(p["conv1"], snake(p["alpha1"], x), dilation=2)
    return x + causal_conv(p["conv2"], snake(p["alpha2"], y))


def lstm_layer(p, xs):
    width = p["w_h"].shape[0]

    def step(state, x):
        h, c = state
        z = x @ p["w_i"] + p["b_i"] + h @ p["w_h"] + p["b_h"]
        i, f, g, o = jnp.split(z, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros((xs.shape[0], width), xs.dtype)
    _, ys = lax.scan(step, (zero, zero), xs.swapaxes(0, 1))
    return ys.swapaxes(0, 1)


def encode(p, audio):
    x = causal_conv(p["conv_in"], audio[..., None])
    for block, stride in zip(p["blocks"], (2, 3)):
        x = causal_conv(block["down"], jax.nn.elu(residual_unit(block["unit"], x)), stride)
    x = x + lstm_layer(p["lstm"][1], lstm_layer(p["lstm"][0], x))
    return causal_conv(p["conv_out"], x)


def decode(p, z):
    x = causal_conv(p["conv_in"], z)
    for block, stride in zip(p["blocks"], (3, 2)):
        x = residual_unit(block["unit"], causal_conv_transpose(block["up"], jax.nn.elu(x), stride))
    return jnp.tanh(causal_conv(p["conv_out"], x))[..., 0]


def l2norm(x):
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def nearest(z, codebook):
    query, keys = l2norm(z), l2norm(codebook)
    dist = jnp.sum(query**2, -1, keepdims=True) - 2 * query @ keys.T + jnp.sum(keys**2, -1)
    return jnp.argmin(dist, axis=-1)


def quantize(p, z):
    z_e = z @ p["in_proj"]["kernel"] + p["in_proj"]["bias"]
    codes = nearest(z_e, p["codebook"])
    z_q = p["codebook"][codes]
    loss = jnp.mean((z_e - lax.stop_gradient(z_q)) ** 2, axis=(1, 2))
    z_q = z_e + lax.stop_gradient(z_q - z_e)
    return z_q @ p["out_proj"]["kernel"] + p["out_proj"]["bias"], codes, loss


def residual_vq(params, z):
    total, rest, loss, codes = jnp.zeros_like(z), z, 0.0, []
    for p in params:
        z_q, idx, commit = quantize(p, rest)
        total = total + z_q
        rest = rest - z_q
        loss = loss + commit
        codes.append(idx)
    return total, jnp.stack(codes, axis=1), loss


def codec(params, audio):
    z, codes, loss = residual_vq(params["quantizer"], encode(params["encoder"], audio))
    return decode(params["decoder"], z)[:, : audio.shape[1]], codes, loss


def a(t):
    return t.detach().numpy()


def port(net):
    def conv(m):
        return {"v": a(m.weight_v).transpose(2, 1, 0), "g": a(m.weight_g)[:, 0, 0], "b": a(m.bias)}

    def up(m):
        return {"v": a(m.weight_v).transpose(2, 0, 1), "g": a(m.weight_g)[:, 0, 0], "b": a(m.bias)}

    def unit(m):
        return {"conv1": conv(m.conv1), "conv2": conv(m.conv2),
                "alpha1": a(m.snake1.alpha)[0, :, 0], "alpha2": a(m.snake2.alpha)[0, :, 0]}

    def lin(m):
        return {"kernel": a(m.weight).T, "bias": a(m.bias)}

    enc, dec, rnn = net.encoder, net.decoder, net.encoder.slstm.lstm
    lstm = [{"w_i": a(getattr(rnn, f"weight_ih_l{i}")).T, "w_h": a(getattr(rnn, f"weight_hh_l{i}")).T,
             "b_i": a(getattr(rnn, f"bias_ih_l{i}")), "b_h": a(getattr(rnn, f"bias_hh_l{i}"))} for i in range(2)]
    return {
        "encoder": {"conv_in": conv(enc.conv_in), "lstm": lstm, "conv_out": conv(enc.conv_out),
                    "blocks": [{"unit": unit(b.unit), "down": conv(b.down)} for b in enc.blocks]},
        "quantizer": [{"in_proj": lin(q.in_proj), "codebook": a(q.codebook.weight), "out_proj": lin(q.out_proj)}
                      for q in net.quantizer.quantizers],
        "decoder": {"conv_in": conv(dec.conv_in), "conv_out": conv(dec.conv_out),
                    "blocks": [{"unit": unit(b.unit), "up": up(b.up)} for b in dec.blocks]},
    }


def build(seed):
    """The right pair with random weights and inputs that follow from the seed."""
    torch.manual_seed(seed)
    net = Codec().eval()
    audio = np.random.default_rng(seed).normal(size=(2, 29)).astype(np.float32)
    return {"torch": net, "flax": (codec, port(net)), "inputs": audio}


FAULTS = [
    {
        "title": "causal convolutions padded with zeros for reflection",
        "edits": [('(left, right), (0, 0)), mode="reflect")', "(left, right), (0, 0)))")],
        "layers": ["encoder.conv_in"],
        "causes": ["padding"],
        "level": "outputs",
    },
    {
        "title": "transposed convolution trimmed at the start, not at the end",
        "edits": [("return y[:, : y.shape[1] - trim]", "return y[:, trim:]")],
        "layers": ["decoder.blocks.0.up"],
        "causes": ["padding"],
        "level": "outputs",
    },
    {
        "title": "Snake's alpha read as a logarithm, as in BigVGAN's alpha_logscale",
        "edits": [("def snake(alpha, x):\n", "def snake(alpha, x):\n    alpha = jnp.exp(alpha)\n")],
        "layers": ["encoder.blocks.0.unit.snake1"],
        "causes": ["activation", "left_out"],
        "level": "outputs",
    },
    {
        "title": "codebook not normalised before the nearest code is looked up",
        "edits": [("query, keys = l2norm(z), l2norm(codebook)", "query, keys = l2norm(z), codebook")],
        "layers": ["quantizer.quantizers.0"],
        "between": ("quantizer.quantizers.0.in_proj", "quantizer.quantizers.0.codebook"),
        "causes": ["left_out"],
        "level": "outputs",
    },
    {
        "title": "every quantiser sees the encoder's output, not what the ones before left over",
        "edits": [("        rest = rest - z_q\n", "")],
        "layers": ["quantizer"],
        "between": ("quantizer.quantizers.0.out_proj", "quantizer.quantizers.1.in_proj"),
        "causes": ["wiring", "left_out", "residual"],
        "level": "outputs",
    },
    {
        "title": "weight norm of the transposed convolution taken per output channel",
        "edits": [("jnp.sum(v**2, axis=(0, 2), keepdims=True)", "jnp.sum(v**2, axis=(0, 1), keepdims=True)")],
        "layers": ["decoder.blocks.0.up"],
        "causes": ["axis"],
        "level": "outputs",
    },
    {
        "title": "LSTM gates split in the order i, f, o, g",
        "edits": [("i, f, g, o = jnp.split", "i, f, o, g = jnp.split")],
        "layers": ["encoder.slstm.lstm"],
        "causes": ["gates"],
        "level": "outputs",
    },
    {
        "title": "no straight-through gradient past the quantiser",
        "edits": [("z_q = z_e + lax.stop_gradient(z_q - z_e)", "z_q = z_e + (z_q - z_e)")],
        "layers": ["quantizer.quantizers.0"],
        "between": ("quantizer.quantizers.0.codebook", "quantizer.quantizers.0.out_proj"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
]
