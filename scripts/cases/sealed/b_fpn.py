"""Feature pyramid with pyramid pooling and a panoptic-FPN segmentation head; nearest and bilinear up-sampling."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn
from torch.nn import functional as F

BINS = (1, 2)


class Stage(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(cout)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class PyramidPooling(nn.Module):
    def __init__(self, ch):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(ch, ch // 2, 1) for _ in BINS])
        self.bottleneck = nn.Conv2d(ch + len(BINS) * (ch // 2), ch, 3, padding=1)

    def forward(self, x):
        outs = [x]
        for bins, conv in zip(BINS, self.convs):
            y = F.relu(conv(F.adaptive_avg_pool2d(x, bins)))
            outs.append(F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False))
        return self.bottleneck(torch.cat(outs, 1))


class FPN(nn.Module):
    def __init__(self, in_channels, out):
        super().__init__()
        self.inner_blocks = nn.ModuleList([nn.Conv2d(c, out, 1) for c in in_channels])
        self.layer_blocks = nn.ModuleList([nn.Conv2d(out, out, 3, padding=1) for _ in in_channels])

    def forward(self, feats):
        last = self.inner_blocks[-1](feats[-1])
        results = [self.layer_blocks[-1](last)]
        for i in range(len(feats) - 2, -1, -1):
            lateral = self.inner_blocks[i](feats[i])
            last = lateral + F.interpolate(last, size=lateral.shape[-2:], mode="nearest")
            results.insert(0, self.layer_blocks[i](last))
        results.append(F.max_pool2d(results[-1], kernel_size=1, stride=2, padding=0))
        return results


class SegHead(nn.Module):
    def __init__(self, ch, mid, levels, classes):
        super().__init__()
        self.scale_heads = nn.ModuleList([
            nn.Sequential(nn.Conv2d(ch, mid, 3, padding=1, bias=False), nn.GroupNorm(3, mid), nn.ReLU())
            for _ in range(levels)])
        self.fuse = nn.Conv2d(2 * mid, mid, 1)
        self.predictor = nn.Conv2d(mid, classes, 1)

    def forward(self, feats, context, size):
        x = self.scale_heads[0](feats[0])
        for head, f in zip(list(self.scale_heads)[1:], feats[1:]):
            x = x + F.interpolate(head(f), size=x.shape[-2:], mode="bilinear", align_corners=False)
        x = F.relu(self.fuse(torch.cat([x, context], dim=1)))
        return F.interpolate(self.predictor(x), size=size, mode="bilinear", align_corners=True)


class SegNet(nn.Module):
    def __init__(self, widths=(8, 12, 16), out=10, mid=6, classes=5):
        super().__init__()
        self.stages = nn.ModuleList([Stage(i, o) for i, o in zip((3, *widths), widths)])
        self.context = nn.Conv2d(3, mid, 3, padding=1)
        self.ppm = PyramidPooling(widths[-1])
        self.fpn = FPN(widths, out)
        self.head = SegHead(out, mid, len(widths) + 1, classes)
        self.softmax = nn.Softmax(dim=1)

    def train(self, mode=True):
        super().train(mode)
        self.stages[0].norm.eval()
        return self

    def forward(self, img):
        x, feats = img, []
        for stage in self.stages:
            x = stage(x)
            feats.append(x)
        feats[-1] = self.ppm(feats[-1])
        small = F.interpolate(img, scale_factor=0.5, mode="bilinear", align_corners=False)
        context = self.context(small[:, :, :feats[0].shape[2], :feats[0].shape[3]])
        logits = self.head(self.fpn(feats), context, img.shape[-2:])
        return self.softmax(logits), logits


# ---------------------------------------------------------------- nnx, NHWC


def resize(x, size, method="bilinear"):
    return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), method=method, antialias=False)


def resize_corners(x, size):
    """Bilinear with align_corners=True."""
    def weights(n_in, n_out):
        at = jnp.linspace(0.0, n_in - 1.0, n_out)
        return jnp.maximum(0.0, 1.0 - jnp.abs(at[:, None] - jnp.arange(n_in)[None, :]))
    return jnp.einsum("oh,pw,bhwc->bopc", weights(x.shape[1], size[0]), weights(x.shape[2], size[1]), x)


def adaptive_pool(x, bins):
    b, h, w, c = x.shape
    return x.reshape(b, bins, h // bins, bins, w // bins, c).mean(axis=(2, 4))


class FlaxStage(nnx.Module):
    def __init__(self, cin, cout, frozen, rngs):
        self.frozen = frozen
        self.conv = nnx.Conv(cin, cout, (3, 3), strides=2, padding=1, rngs=rngs)
        self.norm = nnx.BatchNorm(cout, use_running_average=True, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.conv(x), use_running_average=True if self.frozen else None)
        return nnx.relu(x)


class FlaxPyramidPooling(nnx.Module):
    def __init__(self, ch, rngs):
        self.convs = nnx.List([nnx.Conv(ch, ch // 2, (1, 1), rngs=rngs) for _ in BINS])
        self.bottleneck = nnx.Conv(ch + len(BINS) * (ch // 2), ch, (3, 3), padding=1, rngs=rngs)

    def __call__(self, x):
        outs = [x]
        for n, conv in zip(BINS, self.convs):
            outs.append(resize(nnx.relu(conv(adaptive_pool(x, n))), x.shape[1:3]))
        return self.bottleneck(jnp.concatenate(outs, axis=-1))


class FlaxFPN(nnx.Module):
    def __init__(self, in_channels, out, rngs):
        self.lateral = nnx.List([nnx.Conv(c, out, (1, 1), rngs=rngs) for c in in_channels])
        self.smooth = nnx.List([nnx.Conv(out, out, (3, 3), padding=1, rngs=rngs) for _ in in_channels])

    def __call__(self, feats):
        laterals = [conv(f) for conv, f in zip(self.lateral, feats)]
        merged = [laterals[-1]]
        for lat in reversed(laterals[:-1]):
            up = resize(merged[0], lat.shape[1:3], "nearest")
            merged.insert(0, lat + up)
        outs = [conv(m) for conv, m in zip(self.smooth, merged)]
        outs.append(outs[-1][:, ::2, ::2])
        return outs


class ScaleHead(nnx.Module):
    def __init__(self, ch, mid, rngs):
        self.conv = nnx.Conv(ch, mid, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.norm = nnx.GroupNorm(mid, num_groups=3, epsilon=1e-5, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)))


class FlaxSegNet(nnx.Module):
    def __init__(self, widths=(8, 12, 16), out=10, mid=6, classes=5, frozen_stages=1, *, rngs):
        self.stages = nnx.List([FlaxStage(cin, cout, i < frozen_stages, rngs)
                                for i, (cin, cout) in enumerate(zip((3, *widths), widths))])
        self.context = nnx.Conv(3, mid, (3, 3), padding=1, rngs=rngs)
        self.ppm = FlaxPyramidPooling(widths[-1], rngs)
        self.fpn = FlaxFPN(widths, out, rngs)
        self.heads = nnx.List([ScaleHead(out, mid, rngs) for _ in range(len(widths) + 1)])
        self.fuse = nnx.Conv(2 * mid, mid, (1, 1), rngs=rngs)
        self.predictor = nnx.Conv(mid, classes, (1, 1), rngs=rngs)

    def __call__(self, img):
        x, feats = img, []
        for stage in self.stages:
            x = stage(x)
            feats.append(x)
        feats[-1] = self.ppm(feats[-1])
        height, width = img.shape[1] // 2, img.shape[2] // 2
        context = self.context(resize(img, (height, width))[:, :feats[0].shape[1], :feats[0].shape[2]])
        levels = self.fpn(feats)
        total = self.heads[0](levels[0])
        for head, level in zip(list(self.heads)[1:], levels[1:]):
            total = total + resize(head(level), total.shape[1:3])
        x = nnx.relu(self.fuse(jnp.concatenate([total, context], axis=-1)))
        logits = resize_corners(self.predictor(x), img.shape[1:3])
        probs = nnx.softmax(logits, axis=-1)
        return jnp.moveaxis(probs, -1, 1), jnp.moveaxis(logits, -1, 1)


def port(net, model):
    def conv(dst, src):
        dst.kernel[...] = jnp.asarray(src.weight.detach().numpy().transpose(2, 3, 1, 0))
        if src.bias is not None:
            dst.bias[...] = jnp.asarray(src.bias.detach().numpy())

    def norm(dst, src):
        dst.scale[...] = jnp.asarray(src.weight.detach().numpy())
        dst.bias[...] = jnp.asarray(src.bias.detach().numpy())

    for dst, src in zip(model.stages, net.stages):
        conv(dst.conv, src.conv)
        norm(dst.norm, src.norm)
        dst.norm.mean[...] = jnp.asarray(src.norm.running_mean.numpy())
        dst.norm.var[...] = jnp.asarray(src.norm.running_var.numpy())
    conv(model.context, net.context)
    for dst, src in zip(model.ppm.convs, net.ppm.convs):
        conv(dst, src)
    conv(model.ppm.bottleneck, net.ppm.bottleneck)
    for dst, src in zip(model.fpn.lateral, net.fpn.inner_blocks):
        conv(dst, src)
    for dst, src in zip(model.fpn.smooth, net.fpn.layer_blocks):
        conv(dst, src)
    for dst, src in zip(model.heads, net.head.scale_heads):
        conv(dst.conv, src[0])
        norm(dst.norm, src[1])
    conv(model.fuse, net.head.fuse)
    conv(model.predictor, net.head.predictor)
    return model


def build(seed):
    torch.manual_seed(seed)
    net = SegNet().eval()
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.GroupNorm):
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_(0.2, 0.3)
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.6, 1.4)
                m.bias.normal_(0.1, 0.3)
                m.running_mean.normal_(0, 0.2)
                m.running_var.uniform_(0.2, 0.8)
    model = port(net, FlaxSegNet(rngs=nnx.Rngs(0)))
    img = np.random.default_rng(seed).normal(size=(2, 3, 16, 32))
    return {"torch": net, "flax": model, "inputs": img, "flax_inputs": img.transpose(0, 2, 3, 1)}


FAULTS = [
    {
        "title": "logits enlarged without aligned corners",
        "edits": [("logits = resize_corners(self.predictor(x), img.shape[1:3])",
                   "logits = resize(self.predictor(x), img.shape[1:3])")],
        "layers": ["head"],
        "between": ("head.predictor", None),
        "causes": ["operation"],
        "level": "outputs",
    },
    {
        "title": "image shrunk with jax's default antialiasing",
        "edits": [("method=method, antialias=False)", "method=method)")],
        "layers": [""],
        "between": ("ppm.bottleneck", "context"),
        "causes": ["operation"],
        "level": "outputs",
    },
    {
        "title": "top-down path does not accumulate",
        "edits": [("        for lat in reversed(laterals[:-1]):\n            up = resize(merged[0], lat.shape[1:3], \"nearest\")",
                   "        for lat, above in zip(laterals[-2::-1], laterals[::-1]):\n            up = resize(above, lat.shape[1:3], \"nearest\")")],
        "layers": ["fpn"],
        "between": ("fpn.inner_blocks.0", "fpn.layer_blocks.0"),
        "causes": ["operand"],
        "level": "outputs",
    },
    {
        "title": "pyramid pooling strides over the map where it should take blocks",
        "edits": [("x.reshape(b, bins, h // bins, bins, w // bins, c).mean(axis=(2, 4))",
                   "x.reshape(b, h // bins, bins, w // bins, bins, c).mean(axis=(1, 3))")],
        "layers": ["ppm"],
        "between": ("ppm.convs.0", "ppm.convs.1"),
        "causes": ["rearranged", "pooling", "axis"],
        "level": "outputs",
    },
    {
        "title": "coarsest level pooled two by two",
        "edits": [("outs.append(outs[-1][:, ::2, ::2])",
                   'outs.append(nnx.max_pool(outs[-1], (2, 2), strides=(2, 2), padding="SAME"))')],
        "layers": ["fpn"],
        "between": ("fpn.layer_blocks.0", "head.scale_heads.0.0"),
        "causes": ["pooling", "size"],
        "level": "outputs",
    },
    {
        "title": "two groups in the head's norms",
        "edits": [("nnx.GroupNorm(mid, num_groups=3, ", "nnx.GroupNorm(mid, num_groups=2, ")],
        "layers": ["head.scale_heads.0.1"],
        "causes": ["groups"],
        "level": "outputs",
    },
    {
        "title": "softmax over the axis that held the classes in NCHW",
        "edits": [("probs = nnx.softmax(logits, axis=-1)", "probs = nnx.softmax(logits, axis=1)")],
        "layers": ["softmax", ""],
        "between": ("head.predictor", None),
        "causes": ["softmax_axis"],
        "level": "outputs",
    },
    {
        "title": "smoothing convolutions loaded from the coarsest to the finest",
        "edits": [("zip(model.fpn.smooth, net.fpn.layer_blocks)", "zip(model.fpn.smooth, reversed(net.fpn.layer_blocks))")],
        "layers": ["fpn.layer_blocks.2", "fpn.layer_blocks.0"],
        "causes": ["swapped", "reversed"],
        "level": "outputs",
    },
    {
        "title": "frozen first stage follows the batch in training",
        "edits": [("x = self.norm(self.conv(x), use_running_average=True if self.frozen else None)",
                   "x = self.norm(self.conv(x))")],
        "layers": ["stages.0.norm"],
        "causes": ["batch_statistics"],
        "level": "training",
    },
    {
        "title": "one stage too many frozen",
        "edits": [("i < frozen_stages, rngs)", "i <= frozen_stages, rngs)")],
        "layers": ["stages.1.norm"],
        "causes": ["batch_statistics", "statistics"],
        "level": "training",
    },
]
