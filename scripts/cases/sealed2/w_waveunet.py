"""Wave-U-Net for source separation: 1-d convs with batch norm, decimation, linear interpolation with aligned corners, cropped skips."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn


class Down(nn.Module):
    def __init__(self, cin, cout, k=7):
        super().__init__()
        self.conv = nn.Conv1d(cin, cout, k, padding=k // 2)
        self.bn = nn.BatchNorm1d(cout, momentum=0.05)
        self.act = nn.LeakyReLU(0.1)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Up(nn.Module):
    def __init__(self, cin, cout, k=5):
        super().__init__()
        self.conv = nn.Conv1d(cin, cout, k)
        self.bn = nn.BatchNorm1d(cout, momentum=0.05)
        self.act = nn.LeakyReLU(0.1)

    def forward(self, x, skip):
        x = F.interpolate(x, size=2 * x.shape[2] - 1, mode="linear", align_corners=True)
        extra = skip.shape[2] - x.shape[2]
        skip = skip[:, :, extra // 2: extra // 2 + x.shape[2]]
        return self.act(self.bn(self.conv(torch.cat([x, skip], dim=1))))


class WaveUNet(nn.Module):
    def __init__(self, channels=(4, 6), sources=3):
        super().__init__()
        a, b = channels
        self.down = nn.ModuleList([Down(1, a), Down(a, b)])
        self.bottleneck = nn.Sequential(nn.Conv1d(b, b, 3, padding=1, padding_mode="reflect"), nn.Tanh())
        self.up = nn.ModuleList([Up(2 * b, b), Up(b + a, a)])
        self.output = nn.Conv1d(a + 1, sources - 1, 1)

    def forward(self, mix):
        x, skips = mix, []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
            x = x[:, :, ::2]
        x = self.bottleneck(x)
        for layer in self.up:
            x = layer(x, skips.pop())
        extra = mix.shape[2] - x.shape[2]
        middle = mix[:, :, extra // 2: extra // 2 + x.shape[2]]
        out = torch.tanh(self.output(torch.cat([x, middle], dim=1)))
        return torch.cat([out, middle - out.sum(1, keepdim=True)], dim=1)


# Flax NNX side: [batch, time, channels]


class Norm(nnx.Module):
    def __init__(self, c, momentum):
        self.gamma, self.beta = nnx.Param(jnp.ones((c,))), nnx.Param(jnp.zeros((c,)))
        self.mean, self.var = nnx.BatchStat(jnp.zeros((c,))), nnx.BatchStat(jnp.ones((c,)))
        self.momentum = momentum
        self.use_running_average = False

    def __call__(self, x):
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            n = x.shape[0] * x.shape[1]
            mean, var = x.mean((0, 1)), x.var((0, 1))
            m = self.momentum
            self.mean[...] = (1 - m) * self.mean[...] + m * jax.lax.stop_gradient(mean)
            self.var[...] = (1 - m) * self.var[...] + m * jax.lax.stop_gradient(var) * n / (n - 1)
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * self.gamma[...] + self.beta[...]


class ConvNorm(nnx.Module):
    def __init__(self, cin, cout, k, padding, rngs):
        self.conv = nnx.Conv(cin, cout, (k,), padding=padding, rngs=rngs)
        self.norm = Norm(cout, 0.05)

    def __call__(self, x):
        return nnx.leaky_relu(self.norm(self.conv(x)), 0.1)


def stretch(x):
    """One new sample between every two; first and last stay where they are."""
    n = x.shape[1]
    place = jnp.linspace(0, n - 1, 2 * n - 1, dtype=x.dtype)
    left = jnp.clip(jnp.floor(place).astype(int), 0, n - 2)
    part = (place - left)[None, :, None]
    return x[:, left] * (1 - part) + x[:, left + 1] * part


def crop(x, n):
    start = (x.shape[1] - n) // 2
    return x[:, start:start + n]


class Separator(nnx.Module):
    def __init__(self, channels=(4, 6), sources=3, *, rngs):
        a, b = channels
        self.down = nnx.List([ConvNorm(1, a, 7, "SAME", rngs), ConvNorm(a, b, 7, "SAME", rngs)])
        self.middle = nnx.Conv(b, b, (3,), padding="VALID", rngs=rngs)
        self.up = nnx.List([ConvNorm(2 * b, b, 5, "VALID", rngs), ConvNorm(b + a, a, 5, "VALID", rngs)])
        self.out = nnx.Conv(a + 1, sources - 1, (1,), rngs=rngs)

    def __call__(self, mix):
        x, skips = mix, []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
            x = x[:, ::2]
        x = jnp.pad(x, ((0, 0), (1, 1), (0, 0)), mode="reflect")
        x = jnp.tanh(self.middle(x))
        for layer, skip in zip(self.up, skips[::-1]):
            x = stretch(x)
            x = layer(jnp.concatenate([x, crop(skip, x.shape[1])], axis=-1))
        mix = crop(mix, x.shape[1])
        parts = jnp.tanh(self.out(jnp.concatenate([x, mix], axis=-1)))
        rest = mix - parts.sum(-1, keepdims=True)
        return jnp.concatenate([parts, rest], axis=-1)


def fill(net, model):
    f = lambda t: jnp.asarray(t.detach().numpy())

    def conv(dst, src):
        dst.kernel[...], dst.bias[...] = f(src.weight).transpose(2, 1, 0), f(src.bias)

    for dst, src in zip((*model.down, *model.up), (*net.down, *net.up)):
        conv(dst.conv, src.conv)
        dst.norm.gamma[...], dst.norm.beta[...] = f(src.bn.weight), f(src.bn.bias)
        dst.norm.mean[...], dst.norm.var[...] = f(src.bn.running_mean), f(src.bn.running_var)
    conv(model.middle, net.bottleneck[0])
    conv(model.out, net.output)


def build(seed):
    torch.manual_seed(seed)
    net = WaveUNet().eval()
    for n, p in net.named_parameters():
        p.data.uniform_(0.5, 1.5) if "bn" in n and n.endswith("weight") else p.data.normal_(0, 0.3)
    for n, b in net.named_buffers():
        if b.is_floating_point():
            b.uniform_(0.5, 1.5) if n.endswith("var") else b.normal_(0, 0.3)
    model = Separator(rngs=nnx.Rngs(seed))
    fill(net, model)
    model.eval()
    mix = np.random.default_rng(seed).normal(size=(2, 1, 33)).astype(np.float32)
    return {"torch": net, "flax": model, "inputs": (mix,), "flax_inputs": (mix.transpose(0, 2, 1),)}


FAULTS = [
    {
        "title": "upsampling with half-pixel centres, as jax.image.resize does it",
        "edits": [("            x = stretch(x)\n", "            x = jax.image.resize(x, (x.shape[0], 2 * x.shape[1] - 1, x.shape[2]), \"linear\")\n")],
        "layers": ["up.0"],
        "between": ("bottleneck.1", "up.0.conv"),
        "causes": ["operation", "offset", "default"],
        "level": "outputs",
    },
    {
        "title": "skips cropped at their start only, not at both sides",
        "edits": [("    start = (x.shape[1] - n) // 2\n", "    start = x.shape[1] - n\n")],
        "layers": ["up.1"],
        "between": ("up.0.act", "up.1.conv"),
        "causes": ["offset"],
        "level": "outputs",
    },
    {
        "title": "bottleneck padded with its edge, not by reflection",
        "edits": [("(0, 0)), mode=\"reflect\")", "(0, 0)), mode=\"edge\")")],
        "layers": ["bottleneck.0"],
        "between": ("down.1.act", "bottleneck.1"),
        "causes": ["padding"],
        "level": "outputs",
    },
    {
        "title": "decimation keeps the odd samples",
        "edits": [("            x = x[:, ::2]\n", "            x = x[:, 1::2] if x.shape[1] % 2 == 0 else jnp.concatenate([x[:, 1::2], x[:, -1:]], axis=1)\n")],
        "layers": [""],
        "between": ("down.0.act", "down.1.conv"),
        "causes": ["offset"],
        "level": "outputs",
    },
    {
        "title": "norms keep torch's default momentum and not this model's 0.05",
        "edits": [("self.norm = Norm(cout, 0.05)", "self.norm = Norm(cout, 0.1)")],
        "layers": ["down.0.bn"],
        "causes": ["momentum", "default"],
        "level": "training",
    },
]
