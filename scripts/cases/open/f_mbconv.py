"""EfficientNet: MBConv blocks with squeeze-excite, SAME padding (lukemelas-like torch, compact Linen)."""
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F


class BlockArgs(NamedTuple):
    kernel: int
    stride: int
    expand: int
    cin: int
    cout: int


BLOCKS = (BlockArgs(3, 1, 1, 8, 8), BlockArgs(3, 2, 4, 8, 12), BlockArgs(5, 1, 3, 12, 12), BlockArgs(5, 2, 2, 12, 20))
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# ---------------------------------------------------------------- torch
class Conv2dSamePadding(torch.nn.Conv2d):
    """TensorFlow's SAME: an odd pixel of padding goes right and below."""

    def forward(self, x):
        pads = []
        for size, k, s in zip(x.shape[-2:], self.kernel_size, self.stride):
            total = max((math.ceil(size / s) - 1) * s + k - size, 0)
            pads = [total // 2, total - total // 2] + pads
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def batch_norm(c):
    return torch.nn.BatchNorm2d(c, eps=1e-3, momentum=0.01)


class MBConvBlock(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        mid = args.cin * args.expand
        if args.expand != 1:
            self._expand_conv = Conv2dSamePadding(args.cin, mid, 1, bias=False)
            self._bn0 = batch_norm(mid)
        self._depthwise_conv = Conv2dSamePadding(mid, mid, args.kernel, args.stride, groups=mid, bias=False)
        self._bn1 = batch_norm(mid)
        squeezed = max(1, args.cin // 4)
        self._se_reduce = Conv2dSamePadding(mid, squeezed, 1)
        self._se_expand = Conv2dSamePadding(squeezed, mid, 1)
        self._project_conv = Conv2dSamePadding(mid, args.cout, 1, bias=False)
        self._bn2 = batch_norm(args.cout)

    def forward(self, inputs):
        x = inputs
        if self.args.expand != 1:
            x = F.silu(self._bn0(self._expand_conv(x)))
        x = F.silu(self._bn1(self._depthwise_conv(x)))
        se = F.adaptive_avg_pool2d(x, 1)
        se = self._se_expand(F.silu(self._se_reduce(se)))
        x = torch.sigmoid(se) * x
        x = self._bn2(self._project_conv(x))
        if self.args.stride == 1 and self.args.cin == self.args.cout:
            x = x + inputs
        return x


class EfficientNet(torch.nn.Module):
    def __init__(self, blocks=BLOCKS, stem=8, head=28, classes=6):
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD, dtype=torch.float32).view(3, 1, 1))
        self._conv_stem = Conv2dSamePadding(3, stem, 3, 2, bias=False)
        self._bn0 = batch_norm(stem)
        self._blocks = torch.nn.ModuleList([MBConvBlock(a) for a in blocks])
        self._conv_head = Conv2dSamePadding(blocks[-1].cout, head, 1, bias=False)
        self._bn1 = batch_norm(head)
        self._avg_pooling = torch.nn.AdaptiveAvgPool2d(1)
        self._dropout = torch.nn.Dropout(0.2)
        self._fc = torch.nn.Linear(head, classes)

    def forward(self, images):
        x = (images - self.mean) / self.std
        x = F.silu(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.silu(self._bn1(self._conv_head(x)))
        x = self._avg_pooling(x).flatten(start_dim=1)
        return self._fc(self._dropout(x))


# ---------------------------------------------------------------- flax
class ConvNorm(nn.Module):
    features: int
    kernel: int = 1
    stride: int = 1
    depthwise: bool = False
    act: bool = True

    @nn.compact
    def __call__(self, x, train):
        groups = x.shape[-1] if self.depthwise else 1
        x = nn.Conv(self.features, (self.kernel, self.kernel), self.stride, padding="SAME",
                    feature_group_count=groups, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.99, epsilon=1e-3)(x)
        return nn.swish(x) if self.act else x


class SqueezeExcite(nn.Module):
    squeezed: int

    @nn.compact
    def __call__(self, x):
        s = jnp.mean(x, axis=(1, 2), keepdims=True)
        s = nn.swish(nn.Conv(self.squeezed, (1, 1), name="reduce")(s))
        s = nn.Conv(x.shape[-1], (1, 1), name="expand")(s)
        return x * nn.sigmoid(s)


class FlaxMBConv(nn.Module):
    args: BlockArgs

    @nn.compact
    def __call__(self, inputs, train):
        a = self.args
        mid, x = a.cin * a.expand, inputs
        if a.expand != 1:
            x = ConvNorm(mid, name="expand")(x, train)
        x = ConvNorm(mid, a.kernel, a.stride, depthwise=True, name="depthwise")(x, train)
        x = SqueezeExcite(max(1, a.cin // 4), name="se")(x)
        x = ConvNorm(a.cout, act=False, name="project")(x, train)
        if a.stride == 1 and inputs.shape[-1] == a.cout:
            x = inputs + x
        return x


class FlaxEfficientNet(nn.Module):
    blocks: tuple = BLOCKS
    stem: int = 8
    head: int = 28
    classes: int = 6
    dropout: float = 0.2

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = (images - jnp.asarray(IMAGENET_MEAN)) / jnp.asarray(IMAGENET_STD)
        x = ConvNorm(self.stem, 3, 2, name="stem")(x, train)
        for i, args in enumerate(self.blocks):
            x = FlaxMBConv(args, name=f"block_{i}")(x, train)
        x = ConvNorm(self.head, name="head")(x, train)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes)(x)


def to_kernel(weight):
    return jnp.asarray(weight.detach().numpy().transpose(2, 3, 1, 0))


def conv_norm(conv, bn):
    params = {"Conv_0": {"kernel": to_kernel(conv.weight)},
              "BatchNorm_0": {"scale": jnp.asarray(bn.weight.detach().numpy()),
                              "bias": jnp.asarray(bn.bias.detach().numpy())}}
    stats = {"BatchNorm_0": {"mean": jnp.asarray(bn.running_mean.numpy()), "var": jnp.asarray(bn.running_var.numpy())}}
    return params, stats


def port(net):
    params, stats = {}, {}
    params["stem"], stats["stem"] = conv_norm(net._conv_stem, net._bn0)
    for i, b in enumerate(net._blocks):
        p, s = {}, {}
        if b.args.expand != 1:
            p["expand"], s["expand"] = conv_norm(b._expand_conv, b._bn0)
        p["depthwise"], s["depthwise"] = conv_norm(b._depthwise_conv, b._bn1)
        p["se"] = {name: {"kernel": to_kernel(c.weight), "bias": jnp.asarray(c.bias.detach().numpy())}
                   for name, c in (("reduce", b._se_reduce), ("expand", b._se_expand))}
        p["project"], s["project"] = conv_norm(b._project_conv, b._bn2)
        params[f"block_{i}"], stats[f"block_{i}"] = p, s
    params["head"], stats["head"] = conv_norm(net._conv_head, net._bn1)
    params["Dense_0"] = {"kernel": jnp.asarray(net._fc.weight.detach().numpy().T),
                         "bias": jnp.asarray(net._fc.bias.detach().numpy())}
    return {"params": params, "batch_stats": stats}


def build(seed):
    """The right pair with random weights and inputs that follow from the seed."""
    torch.manual_seed(seed)
    net = EfficientNet().eval()
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.weight.uniform_(0.6, 1.5)
                m.bias.normal_(0, 0.3)
                m.running_mean.normal_(0, 0.2)
                m.running_var.uniform_(0.1, 0.6)
            elif isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) and m.bias is not None:
                m.bias.normal_(0, 0.5)
    images = np.random.default_rng(seed).uniform(size=(2, 3, 24, 32)).astype(np.float32)
    return {"torch": net, "flax": (FlaxEfficientNet(), port(net)), "inputs": images,
            "flax_inputs": images.transpose(0, 2, 3, 1)}


FAULTS = [
    {
        "title": "the block's stride sits on the projection, not on the depthwise convolution",
        "edits": [("x = ConvNorm(mid, a.kernel, a.stride, depthwise=True", "x = ConvNorm(mid, a.kernel, depthwise=True"),
                  ("x = ConvNorm(a.cout, act=False", "x = ConvNorm(a.cout, stride=a.stride, act=False")],
        "layers": ["_blocks.1._depthwise_conv"],
        "causes": ["stride", "shape"],
        "level": "outputs",
    },
    {
        "title": "hard sigmoid in the squeeze-excite gate (as in MobileNetV3)",
        "edits": [("return x * nn.sigmoid(s)", "return x * nn.hard_sigmoid(s)")],
        "layers": ["_blocks.0"],
        "between": ("_blocks.0._se_expand", "_blocks.0._project_conv"),
        "causes": ["activation"],
        "level": "outputs",
    },
    {
        "title": "squeeze over the width only: every row has a gate of its own",
        "edits": [("s = jnp.mean(x, axis=(1, 2), keepdims=True)", "s = jnp.mean(x, axis=2, keepdims=True)")],
        "layers": ["_blocks.0"],
        "between": ("_blocks.0._bn1", "_blocks.0._se_reduce"),
        "causes": ["axis", "pooling"],
        "level": "outputs",
    },
    {
        "title": "BatchNorm with Flax's default epsilon",
        "edits": [("momentum=0.99, epsilon=1e-3)", "momentum=0.99)")],
        "layers": ["_bn0"],
        "causes": ["epsilon"],
        "level": "outputs",
    },
    {
        "title": "torch's momentum of 0.01 taken over as it is",
        "edits": [("momentum=0.99", "momentum=0.01")],
        "layers": ["_bn0"],
        "causes": ["momentum"],
        "level": "training",
    },
    {
        "title": "residual only where the block has an expansion",
        "edits": [("if a.stride == 1 and inputs.shape[-1] == a.cout:",
                   "if a.stride == 1 and a.expand != 1 and inputs.shape[-1] == a.cout:")],
        "layers": ["_blocks.0"],
        "between": ("_blocks.0._bn2", "_blocks.1._expand_conv"),
        "causes": ["residual"],
        "level": "outputs",
    },
    {
        "title": "images scaled to [-1, 1] (TensorFlow's checkpoints) for ImageNet's mean and deviation",
        "edits": [("x = (images - jnp.asarray(IMAGENET_MEAN)) / jnp.asarray(IMAGENET_STD)", "x = images * 2.0 - 1.0")],
        "layers": [""],
        "between": (None, "_conv_stem"),
        "causes": ["constant", "operation"],
        "level": "outputs",
    },
    {
        "title": "kernels get width before height",
        "edits": [("transpose(2, 3, 1, 0)", "transpose(3, 2, 1, 0)")],
        "layers": ["_conv_stem"],
        "causes": ["transposed"],
        "level": "outputs",
    },
    {
        "title": "dropout of the feature map before the pooling, for dropout of the pooled vector",
        "edits": [("""        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
""", """        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = jnp.mean(x, axis=(1, 2))
""")],
        "layers": ["_dropout", "_avg_pooling", ""],
        "between": ("_bn1", "_fc"),
        "causes": ["training_attribute"],
        "level": "attributes",
    },
]
