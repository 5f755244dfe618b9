"""A HiFi-GAN-like vocoder with speaker conditioning: transposed convolutions, parallel dilated residual blocks, leaky ReLU."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from flax import nnx
from torch.nn import Conv1d, ConvTranspose1d

LRELU_SLOPE = 0.1


def get_padding(kernel_size, dilation=1):
    return int((kernel_size * dilation - dilation) / 2)


class ResBlock(nn.Module):
    def __init__(self, channels, kernel_size, dilation):
        super().__init__()
        self.convs1 = nn.ModuleList([
            Conv1d(channels, channels, kernel_size, 1, dilation=d, padding=get_padding(kernel_size, d)) for d in dilation
        ])
        self.convs2 = nn.ModuleList([
            Conv1d(channels, channels, kernel_size, 1, dilation=1, padding=get_padding(kernel_size, 1)) for _ in dilation
        ])

    def forward(self, x):
        for c1, c2 in zip(self.convs1, self.convs2):
            xt = F.leaky_relu(x, LRELU_SLOPE)
            xt = c1(xt)
            xt = F.leaky_relu(xt, LRELU_SLOPE)
            xt = c2(xt)
            x = xt + x
        return x


class Generator(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.num_kernels = len(h["resblock_kernel_sizes"])
        self.num_upsamples = len(h["upsample_rates"])
        channels = h["upsample_initial_channel"]
        self.conv_pre = Conv1d(h["num_mels"], channels, 7, 1, padding=3)
        self.speaker = nn.Embedding(h["n_speakers"], h["speaker_dim"])
        self.cond = nn.Linear(h["speaker_dim"], channels)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        for i, (u, k) in enumerate(zip(h["upsample_rates"], h["upsample_kernel_sizes"])):
            self.ups.append(ConvTranspose1d(channels // 2**i, channels // 2 ** (i + 1), k, u, padding=(k - u) // 2))
            for ks, d in zip(h["resblock_kernel_sizes"], h["resblock_dilation_sizes"]):
                self.resblocks.append(ResBlock(channels // 2 ** (i + 1), ks, d))
        self.conv_post = Conv1d(channels // 2**self.num_upsamples, 1, 7, 1, padding=3)

    def forward(self, mel, speaker):
        x = self.conv_pre(mel)
        x = x + self.cond(F.normalize(self.speaker(speaker), dim=1)).unsqueeze(-1)
        for i in range(self.num_upsamples):
            x = F.leaky_relu(x, LRELU_SLOPE)
            x = self.ups[i](x)
            xs = None
            for j in range(self.num_kernels):
                y = self.resblocks[i * self.num_kernels + j](x)
                xs = y if xs is None else xs + y
            x = xs / self.num_kernels
        x = F.leaky_relu(x)
        x = F.pad(x, (1, 0), mode="reflect")
        x = self.conv_post(x)
        return torch.tanh(x).squeeze(1)


HPARAMS = {
    "num_mels": 10, "upsample_initial_channel": 16, "upsample_rates": (3, 2), "upsample_kernel_sizes": (7, 4),
    "resblock_kernel_sizes": (3, 5, 7), "resblock_dilation_sizes": ((1, 3), (1, 2), (1, 3)), "n_speakers": 5, "speaker_dim": 6,
}


class FlaxResBlock(nnx.Module):
    def __init__(self, channels, kernel_size, dilation, *, rngs):
        conv = lambda d: nnx.Conv(channels, channels, (kernel_size,), kernel_dilation=(d,), padding="SAME", rngs=rngs)
        self.convs1 = nnx.List([conv(d) for d in dilation])
        self.convs2 = nnx.List([conv(1) for _ in dilation])

    def __call__(self, x):
        for c1, c2 in zip(self.convs1, self.convs2):
            y = c1(jax.nn.leaky_relu(x, LRELU_SLOPE))
            y = c2(jax.nn.leaky_relu(y, LRELU_SLOPE))
            x = x + y
        return x


class FlaxGenerator(nnx.Module):
    def __init__(self, h, *, rngs):
        self.num_kernels = len(h["resblock_kernel_sizes"])
        self.num_upsamples = len(h["upsample_rates"])
        width = h["upsample_initial_channel"]
        self.conv_pre = nnx.Conv(h["num_mels"], width, (7,), padding=((3, 3),), rngs=rngs)
        self.speaker = nnx.Embed(h["n_speakers"], h["speaker_dim"], rngs=rngs)
        self.cond = nnx.Linear(h["speaker_dim"], width, rngs=rngs)
        ups, blocks = [], []
        for u, k in zip(h["upsample_rates"], h["upsample_kernel_sizes"]):
            pad = k - 1 - (k - u) // 2
            ups.append(nnx.ConvTranspose(width, width // 2, (k,), strides=(u,), padding=((pad, pad),), rngs=rngs))
            width //= 2
            for ks, d in zip(h["resblock_kernel_sizes"], h["resblock_dilation_sizes"]):
                blocks.append(FlaxResBlock(width, ks, d, rngs=rngs))
        self.ups, self.resblocks = nnx.List(ups), nnx.List(blocks)
        self.conv_post = nnx.Conv(width, 1, (7,), padding=((3, 3),), rngs=rngs)

    def __call__(self, mel, speaker):
        x = self.conv_pre(mel)
        spk = self.speaker.embedding[...][speaker]
        spk = spk / jnp.maximum(jnp.linalg.norm(spk, axis=-1, keepdims=True), 1e-12)
        x = x + self.cond(spk)[:, None]
        for i in range(self.num_upsamples):
            x = self.ups[i](jax.nn.leaky_relu(x, LRELU_SLOPE))
            xs = 0.0
            for block in self.resblocks[i * self.num_kernels : (i + 1) * self.num_kernels]:
                xs = xs + block(x)
            x = xs / self.num_kernels
        x = jax.nn.leaky_relu(x)
        x = jnp.pad(x, ((0, 0), (1, 0), (0, 0)), mode="reflect")
        return jnp.tanh(self.conv_post(x))[..., 0]


def port(net, model):
    def arr(t):
        return jnp.asarray(t.detach().numpy())

    def conv(dst, src):
        dst.kernel[...] = arr(src.weight).transpose(2, 1, 0)
        dst.bias[...] = arr(src.bias)

    conv(model.conv_pre, net.conv_pre)
    conv(model.conv_post, net.conv_post)
    model.speaker.embedding[...] = arr(net.speaker.weight)
    model.cond.kernel[...] = arr(net.cond.weight).T
    model.cond.bias[...] = arr(net.cond.bias)
    for dst, src in zip(model.ups, net.ups):
        dst.kernel[...] = jnp.flip(arr(src.weight).transpose(2, 0, 1), 0)
        dst.bias[...] = arr(src.bias)
    for dst, src in zip(model.resblocks, net.resblocks):
        for a, b in zip([*dst.convs1, *dst.convs2], [*src.convs1, *src.convs2]):
            conv(a, b)


def build(seed):
    """The right pair with random weights and inputs that follow from the seed."""
    torch.manual_seed(seed)
    net = Generator(HPARAMS).eval()
    for p in net.parameters():
        p.data.normal_(0.0, 0.25)
    model = FlaxGenerator(HPARAMS, rngs=nnx.Rngs(seed))
    port(net, model)
    rng = np.random.default_rng(seed)
    mel = rng.normal(size=(3, 10, 5)).astype(np.float32)
    speaker = np.array([4, 0, 2])
    return {"torch": net, "flax": model, "inputs": (mel, speaker), "flax_inputs": (mel.transpose(0, 2, 1), speaker)}


FAULTS = [
    {
        "title": "taps of the transposed convolutions not turned round",
        "edits": [("jnp.flip(arr(src.weight).transpose(2, 0, 1), 0)", "arr(src.weight).transpose(2, 0, 1)")],
        "layers": ["ups.0"],
        "causes": ["flipped"],
        "level": "outputs",
    },
    {
        "title": "last leaky ReLU with the slope of the others",
        "edits": [("        x = jax.nn.leaky_relu(x)\n", "        x = jax.nn.leaky_relu(x, LRELU_SLOPE)\n")],
        "layers": [""],
        "between": ("resblocks.5.convs2.1", "conv_post"),
        "causes": ["constant", "activation"],
        "level": "outputs",
    },
    {
        "title": "sum of the residual blocks divided by the number of upsamplings",
        "edits": [("x = xs / self.num_kernels\n        x = jax", "x = xs / self.num_upsamples\n        x = jax")],
        "layers": [""],
        "between": ("resblocks.2.convs2.1", "ups.1"),
        "causes": ["scale", "constant"],
        "level": "outputs",
    },
    {
        "title": "residual blocks one after another and not side by side",
        "edits": [("                xs = xs + block(x)\n", "                x = block(x)\n                xs = xs + x\n")],
        "layers": [""],
        "between": ("resblocks.0.convs2.1", "resblocks.1.convs1.0"),
        "causes": ["operand", "wiring"],
        "level": "outputs",
    },
    {
        "title": "every pair of convolutions is added to the block's input",
        "edits": [("        for c1, c2 in zip(self.convs1, self.convs2):\n            y = c1(", "        skip = x\n        for c1, c2 in zip(self.convs1, self.convs2):\n            y = c1("),
                  ("            x = x + y\n        return x\n", "            x = skip + y\n        return x\n")],
        "layers": ["resblocks.0"],
        "between": ("resblocks.0.convs2.1", "resblocks.1.convs1.0"),
        "causes": ["residual", "operand"],
        "level": "outputs",
    },
    {
        "title": "second convolutions of a block dilated as well",
        "edits": [("self.convs2 = nnx.List([conv(1) for _ in dilation])", "self.convs2 = nnx.List([conv(d) for d in dilation])")],
        "layers": ["resblocks.0.convs2.1"],
        "causes": ["dilation"],
        "level": "outputs",
    },
    {
        "title": "speaker vectors normalised over the batch",
        "edits": [("jnp.linalg.norm(spk, axis=-1, keepdims=True)", "jnp.linalg.norm(spk, axis=0, keepdims=True)")],
        "layers": [""],
        "between": ("speaker", "cond"),
        "causes": ["axis"],
        "level": "outputs",
    },
    {
        "title": "one step of edge padding for one of reflection",
        "edits": [("((0, 0), (1, 0), (0, 0)), mode=\"reflect\")", "((0, 0), (1, 0), (0, 0)), mode=\"edge\")")],
        "layers": [""],
        "between": ("resblocks.5.convs2.1", "conv_post"),
        "causes": ["padding"],
        "level": "outputs",
    },
]
