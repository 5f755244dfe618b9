"""ESRGAN generator: residual-in-residual dense blocks run by nn.scan, nearest upsampling and pixel shuffle, trunk skip."""
import flax.linen as fnn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class ResidualDenseBlock(nn.Module):
    def __init__(self, nf, gc):
        super().__init__()
        self.conv1 = nn.Conv2d(nf, gc, 3, 1, 1)
        self.conv2 = nn.Conv2d(nf + gc, gc, 3, 1, 1)
        self.conv3 = nn.Conv2d(nf + 2 * gc, nf, 3, 1, 1)
        self.lrelu = nn.LeakyReLU(0.2)

    def forward(self, x):
        x1 = self.lrelu(self.conv1(x))
        x2 = self.lrelu(self.conv2(torch.cat((x, x1), 1)))
        x3 = self.conv3(torch.cat((x, x1, x2), 1))
        return x3 * 0.2 + x


class RRDB(nn.Module):
    def __init__(self, nf, gc):
        super().__init__()
        self.rdb1 = ResidualDenseBlock(nf, gc)
        self.rdb2 = ResidualDenseBlock(nf, gc)

    def forward(self, x):
        return self.rdb2(self.rdb1(x)) * 0.2 + x


class RRDBNet(nn.Module):
    def __init__(self, nf=6, gc=4, nb=3):
        super().__init__()
        self.conv_first = nn.Conv2d(3, nf, 3, 1, 1)
        self.body = nn.Sequential(*[RRDB(nf, gc) for _ in range(nb)])
        self.conv_body = nn.Conv2d(nf, nf, 3, 1, 1)
        self.conv_up1 = nn.Conv2d(nf, nf, 3, 1, 1)
        self.conv_up2 = nn.Conv2d(nf, 4 * nf, 3, 1, 1)
        self.shuffle = nn.PixelShuffle(2)
        self.conv_last = nn.Conv2d(nf, 3, 3, 1, 1)
        self.lrelu = nn.LeakyReLU(0.2)

    def forward(self, x):
        feat = self.conv_first(x)
        feat = feat + self.conv_body(self.body(feat))
        feat = self.lrelu(self.conv_up1(F.interpolate(feat, scale_factor=2, mode="nearest")))
        feat = self.lrelu(self.shuffle(self.conv_up2(feat)))
        return self.conv_last(feat)


# ==== Linen ====


def lrelu(x):
    return fnn.leaky_relu(x, negative_slope=0.2)


def conv3(features, name):
    return fnn.Conv(features, (3, 3), padding=1, name=name)


class DenseBlock(fnn.Module):
    growth: int

    @fnn.compact
    def __call__(self, x):
        a = lrelu(conv3(self.growth, "c1")(x))
        b = lrelu(conv3(self.growth, "c2")(jnp.concatenate([x, a], -1)))
        c = conv3(x.shape[-1], "c3")(jnp.concatenate([x, a, b], -1))
        return x + 0.2 * c


class Trunk(fnn.Module):
    """One RRDB as the body of a scan: carry in, carry out."""
    growth: int

    @fnn.compact
    def __call__(self, x, _):
        h = DenseBlock(self.growth, name="dense_a")(x)
        h = DenseBlock(self.growth, name="dense_b")(h)
        return x + 0.2 * h, None


def depth_to_space(x, r):
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, c // (r * r), r, r)
    x = x.transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, h * r, w * r, c // (r * r))


class SuperResolver(fnn.Module):
    features: int = 6
    growth: int = 4
    blocks: int = 3

    @fnn.compact
    def __call__(self, image):
        h = conv3(self.features, "stem")(image)
        scan = fnn.scan(Trunk, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.blocks)
        body, _ = scan(self.growth, name="trunk")(h, None)
        h = h + conv3(self.features, "trunk_out")(body)
        h = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)
        h = lrelu(conv3(self.features, "up_a")(h))
        h = lrelu(depth_to_space(conv3(4 * self.features, "up_b")(h), 2))
        return conv3(3, "image")(h)


def convert(net):
    def conv(m):
        return {"kernel": jnp.asarray(m.weight.detach().numpy().transpose(2, 3, 1, 0)), "bias": jnp.asarray(m.bias.detach().numpy())}

    def dense(m):
        return {"c1": conv(m.conv1), "c2": conv(m.conv2), "c3": conv(m.conv3)}

    blocks = [{"dense_a": dense(m.rdb1), "dense_b": dense(m.rdb2)} for m in net.body]
    return {"params": {
        "stem": conv(net.conv_first),
        "trunk": jax.tree.map(lambda *xs: jnp.stack(xs), *blocks),
        "trunk_out": conv(net.conv_body),
        "up_a": conv(net.conv_up1),
        "up_b": conv(net.conv_up2),
        "image": conv(net.conv_last),
    }}


def build(seed):
    torch.manual_seed(seed)
    net = RRDBNet().eval()
    for p in net.parameters():
        p.data.normal_(0, 0.25)
    x = np.random.default_rng(seed).random((2, 3, 5, 6), dtype=np.float32)
    return {"torch": net, "flax": (SuperResolver(), convert(net)), "inputs": (x,), "flax_inputs": (x.transpose(0, 2, 3, 1),)}


FAULTS = [
    {
        "title": "pixel shuffle with the channel fastest, as tf.nn.depth_to_space has it",
        "edits": [("    x = x.reshape(b, h, w, c // (r * r), r, r)\n    x = x.transpose(0, 1, 4, 2, 5, 3)\n",
                   "    x = x.reshape(b, h, w, r, r, c // (r * r))\n    x = x.transpose(0, 1, 3, 2, 4, 5)\n")],
        "layers": ["shuffle"],
        "between": ("conv_up2", "conv_last"),
        "causes": ["rearranged", "permuted"],
        "level": "outputs",
    },
    {
        "title": "the outer residual is not scaled by 0.2",
        "edits": [("        return x + 0.2 * h, None", "        return x + h, None")],
        "layers": ["body.0"],
        "between": ("body.0.rdb2", "body.1"),
        "causes": ["scale", "residual", "left_out"],
        "level": "outputs",
    },
    {
        "title": "trunk stacked in reverse order",
        "edits": [("for m in net.body]", "for m in reversed(net.body)]")],
        "layers": ["body.0", "body.0.rdb1.conv1"],
        "causes": ["reversed", "permuted", "order"],
        "level": "outputs",
    },
    {
        "title": "second dense layer concatenates the new features before the old",
        "edits": [("jnp.concatenate([x, a], -1)", "jnp.concatenate([a, x], -1)")],
        "layers": ["body.0.rdb1"],
        "between": ("body.0.rdb1.conv1", "body.0.rdb1.conv2"),
        "causes": ["concat", "swapped"],
        "level": "outputs",
    },
    {
        "title": "leaky slope of jax.nn's default, 0.01",
        "edits": [("fnn.leaky_relu(x, negative_slope=0.2)", "fnn.leaky_relu(x)")],
        "layers": ["body.0.rdb1.lrelu", "body.0.rdb1"],
        "between": ("body.0.rdb1.conv1", "body.0.rdb1.conv2"),
        "causes": ["activation", "default", "constant"],
        "level": "outputs",
    },
]
