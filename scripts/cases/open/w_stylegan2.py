"""A StyleGAN2 generator in small: equalised mapping with truncation, modulated convs, FIR upsampling, skip RGB."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn


class FullyConnected(nn.Module):
    def __init__(self, fin, fout, act, lr_mul=1.0, bias_init=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(fout, fin) / lr_mul)
        self.bias = nn.Parameter(torch.full((fout,), bias_init / lr_mul))
        self.act, self.weight_gain, self.bias_gain = act, lr_mul / fin ** 0.5, lr_mul

    def forward(self, x):
        x = F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)
        return F.leaky_relu(x, 0.2) * 2 ** 0.5 if self.act else x


class Mapping(nn.Module):
    def __init__(self, z_dim, w_dim, n, beta=0.8, psi=0.7):
        super().__init__()
        self.fcs = nn.ModuleList([FullyConnected(z_dim if i == 0 else w_dim, w_dim, True, 0.01) for i in range(n)])
        self.register_buffer("w_avg", torch.zeros(w_dim))
        self.beta, self.psi = beta, psi

    def forward(self, z):
        x = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for fc in self.fcs:
            x = fc(x)
        if self.training:
            self.w_avg.copy_(x.detach().mean(0).lerp(self.w_avg, self.beta))
            return x
        return self.w_avg.lerp(x, self.psi)


def modulated_conv(x, w, s, demodulate):
    b, (o, i, k, _) = x.shape[0], w.shape
    w = w[None] * s[:, None, :, None, None]
    if demodulate:
        w = w * (w.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    x = x.reshape(1, b * i, *x.shape[2:])
    return F.conv2d(x, w.reshape(b * o, i, k, k), padding=k // 2, groups=b).reshape(b, o, *x.shape[2:])


class Upsample(nn.Module):
    """Zeros between the samples, then the filter [1, 3, 3, 1]."""

    def forward(self, x):
        b, c, h, w = x.shape
        f = torch.tensor([1, 3, 3, 1]).to(x.dtype)
        f = torch.outer(f, f) / 64 * 4
        x = F.pad(x.reshape(b, c, h, 1, w, 1), (0, 1, 0, 0, 0, 1)).reshape(b, c, 2 * h, 2 * w)
        return F.conv2d(F.pad(x, (2, 1, 2, 1)), f[None, None].repeat(c, 1, 1, 1), groups=c)


class StyleConv(nn.Module):
    def __init__(self, cin, cout, w_dim, size):
        super().__init__()
        self.affine = FullyConnected(w_dim, cin, False, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(cout, cin, 3, 3))
        self.register_buffer("noise_const", torch.randn(size, size))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(cout))

    def forward(self, x, w):
        x = modulated_conv(x, self.weight, self.affine(w), True)
        x = x + self.noise_const * self.noise_strength + self.bias[:, None, None]
        return F.leaky_relu(x, 0.2) * 2 ** 0.5


class ToRGB(nn.Module):
    def __init__(self, cin, w_dim):
        super().__init__()
        self.affine = FullyConnected(w_dim, cin, False, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(3, cin, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3))
        self.weight_gain = 1 / cin ** 0.5

    def forward(self, x, w):
        return modulated_conv(x, self.weight, self.affine(w) * self.weight_gain, False) + self.bias[:, None, None]


class Generator(nn.Module):
    def __init__(self, z_dim=7, w_dim=9, ch=(8, 6)):
        super().__init__()
        self.mapping = Mapping(z_dim, w_dim, 3)
        self.const = nn.Parameter(torch.randn(ch[0], 4, 4))
        self.conv4 = StyleConv(ch[0], ch[0], w_dim, 4)
        self.rgb4 = ToRGB(ch[0], w_dim)
        self.up = Upsample()
        self.conv8 = StyleConv(ch[0], ch[1], w_dim, 8)
        self.rgb8 = ToRGB(ch[1], w_dim)

    def forward(self, z):
        w = self.mapping(z)
        x = self.conv4(self.const.expand(len(z), -1, -1, -1), w)
        img = self.rgb4(x, w)
        x = self.conv8(self.up(x), w)
        return self.up(img) + self.rgb8(x, w)


# ======== Flax (nnx, NHWC) ========


class EqDense(nnx.Module):
    def __init__(self, fin, fout, lr_mul=1.0, activate=False):
        self.kernel, self.bias = nnx.Param(jnp.zeros((fin, fout))), nnx.Param(jnp.zeros((fout,)))
        self.lr_mul, self.activate = lr_mul, activate

    def __call__(self, x):
        gain = self.lr_mul / self.kernel.shape[0] ** 0.5
        x = x @ (self.kernel[...] * gain) + self.bias[...] * self.lr_mul
        return nnx.leaky_relu(x, 0.2) * 2 ** 0.5 if self.activate else x


class MappingNet(nnx.Module):
    def __init__(self, z_dim, w_dim, depth):
        self.dense = nnx.List([EqDense(z_dim if i == 0 else w_dim, w_dim, 0.01, True) for i in range(depth)])
        self.w_mean = nnx.BatchStat(jnp.zeros((w_dim,)))
        self.decay, self.psi = 0.8, 0.7
        self.deterministic = False

    def __call__(self, z):
        w = z * jax.lax.rsqrt(jnp.mean(z ** 2, axis=-1, keepdims=True) + 1e-8)
        for layer in self.dense:
            w = layer(w)
        if self.deterministic:
            return self.w_mean[...] + self.psi * (w - self.w_mean[...])
        batch = jax.lax.stop_gradient(w).mean(0)
        self.w_mean[...] = self.decay * self.w_mean[...] + (1 - self.decay) * batch
        return w


def conv_per_sample(x, kernel):
    pad = kernel.shape[1] // 2
    one = lambda xi, ki: jax.lax.conv_general_dilated(
        xi[None], ki, (1, 1), [(pad, pad), (pad, pad)], dimension_numbers=("NHWC", "HWIO", "NHWC"))[0]
    return jax.vmap(one)(x, kernel)


def fir_up(x):
    b, h, w, c = x.shape
    taps = jnp.asarray([1.0, 3.0, 3.0, 1.0], x.dtype) / 4
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (2, 2, 1), (2, 2, 1), (0, 0, 0)])
    kernel = jnp.tile(jnp.outer(taps, taps)[:, :, None, None], (1, 1, 1, c))
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=c)


class ModulatedLayer(nnx.Module):
    def __init__(self, cin, cout, w_dim, size):
        self.style = EqDense(w_dim, cin)
        self.kernel = nnx.Param(jnp.zeros((3, 3, cin, cout)))
        self.noise = nnx.Variable(jnp.zeros((size, size)))
        self.strength = nnx.Param(jnp.zeros(()))
        self.bias = nnx.Param(jnp.zeros((cout,)))

    def __call__(self, x, w):
        k = self.kernel[...] * self.style(w)[:, None, None, :, None]
        k = k * jax.lax.rsqrt(jnp.sum(k ** 2, axis=(1, 2, 3), keepdims=True) + 1e-8)
        x = conv_per_sample(x, k) + self.noise[...][:, :, None] * self.strength[...]
        return nnx.leaky_relu(x + self.bias[...], 0.2) * 2 ** 0.5


class RGB(nnx.Module):
    def __init__(self, cin, w_dim):
        self.style = EqDense(w_dim, cin)
        self.kernel, self.bias = nnx.Param(jnp.zeros((1, 1, cin, 3))), nnx.Param(jnp.zeros((3,)))

    def __call__(self, x, w):
        s = self.style(w) / x.shape[-1] ** 0.5
        return conv_per_sample(x, self.kernel[...] * s[:, None, None, :, None]) + self.bias[...]


class StyleGenerator(nnx.Module):
    def __init__(self, z_dim=7, w_dim=9, ch=(8, 6)):
        self.mapping = MappingNet(z_dim, w_dim, 3)
        self.start = nnx.Param(jnp.zeros((4, 4, ch[0])))
        self.layers = nnx.List([ModulatedLayer(ch[0], ch[0], w_dim, 4), ModulatedLayer(ch[0], ch[1], w_dim, 8)])
        self.rgbs = nnx.List([RGB(c, w_dim) for c in ch])

    def __call__(self, z):
        w = self.mapping(z)
        x = self.layers[0](jnp.broadcast_to(self.start[...], (z.shape[0], *self.start.shape)), w)
        image = self.rgbs[0](x, w)
        x = self.layers[1](fir_up(x), w)
        return fir_up(image) + self.rgbs[1](x, w)


def convert(net, model):
    j = lambda t: jnp.asarray(t.detach().numpy())

    def dense(dst, src):
        dst.kernel[...], dst.bias[...] = j(src.weight).T, j(src.bias)

    for dst, src in zip(model.mapping.dense, net.mapping.fcs):
        dense(dst, src)
    model.mapping.w_mean[...] = j(net.mapping.w_avg)
    model.start[...] = j(net.const).transpose(1, 2, 0)
    for dst, src in zip(model.layers, (net.conv4, net.conv8)):
        dense(dst.style, src.affine)
        dst.kernel[...] = j(src.weight).transpose(2, 3, 1, 0)
        dst.noise[...], dst.strength[...], dst.bias[...] = j(src.noise_const), j(src.noise_strength), j(src.bias)
    for dst, src in zip(model.rgbs, (net.rgb4, net.rgb8)):
        dense(dst.style, src.affine)
        dst.kernel[...], dst.bias[...] = j(src.weight).transpose(2, 3, 1, 0), j(src.bias)


def build(seed):
    torch.manual_seed(seed)
    net = Generator().eval()
    with torch.no_grad():
        net.mapping.w_avg.normal_(0, 0.5)
        for n, p in net.named_parameters():
            if n.endswith("bias"):
                p.add_(torch.randn_like(p) * (20.0 if "fcs" in n else 0.3))
            elif n.endswith("strength"):
                p.fill_(0.4)
    model = StyleGenerator()
    convert(net, model)
    model.eval()
    z = np.random.default_rng(seed).normal(size=(3, 7)).astype(np.float32)
    return {"torch": net, "flax": model, "inputs": (z,)}


FAULTS = [
    {
        "title": "average of w kept with the weights the other way round",
        "edits": [("self.decay * self.w_mean[...] + (1 - self.decay) * batch", "(1 - self.decay) * self.w_mean[...] + self.decay * batch")],
        "layers": ["mapping"],
        "causes": ["momentum"],
        "level": "training",
    },
    {
        "title": "toRGB demodulates as the other convs do",
        "edits": [("        return conv_per_sample(x, self.kernel[...] * s[:, None, None, :, None]) + self.bias[...]\n",
                   "        k = self.kernel[...] * s[:, None, None, :, None]\n        k = k * jax.lax.rsqrt(jnp.sum(k ** 2, axis=(1, 2, 3), keepdims=True) + 1e-8)\n        return conv_per_sample(x, k) + self.bias[...]\n")],
        "layers": ["rgb4"],
        "between": ("rgb4.affine", "conv8.affine"),
        "causes": ["operation", "scale"],
        "level": "outputs",
    },
    {
        "title": "styles get one added although the bias starts at one",
        "edits": [("self.kernel[...] * self.style(w)[:, None, None, :, None]", "self.kernel[...] * (1 + self.style(w))[:, None, None, :, None]")],
        "layers": ["conv4", "conv4.affine"],
        "between": ("conv4.affine", "rgb4.affine"),
        "causes": ["scale_plus_one"],
        "level": "outputs",
    },
    {
        "title": "noise added after the activation",
        "edits": [("        x = conv_per_sample(x, k) + self.noise[...][:, :, None] * self.strength[...]\n        return nnx.leaky_relu(x + self.bias[...], 0.2) * 2 ** 0.5",
                   "        x = nnx.leaky_relu(conv_per_sample(x, k) + self.bias[...], 0.2) * 2 ** 0.5\n        return x + self.noise[...][:, :, None] * self.strength[...]")],
        "layers": ["conv4"],
        "between": ("conv4.affine", "rgb4.affine"),
        "causes": ["order"],
        "level": "outputs",
    },
    {
        "title": "learning rate multiplier on the weights only",
        "edits": [(" + self.bias[...] * self.lr_mul", " + self.bias[...]")],
        "layers": ["mapping.fcs.0"],
        "causes": ["scale", "left_out"],
        "level": "outputs",
    },
]
