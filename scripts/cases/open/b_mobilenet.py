"""MobileNetV3-like: inverted residuals, squeeze-excite, hard-swish, BatchNorm with its own momentum; Linen with train flag."""
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn as tnn


class BlockArgs(NamedTuple):
    kernel: int
    cin: int
    expand: int
    cout: int
    se: bool
    act: str
    stride: int


SETTINGS = (
    BlockArgs(3, 8, 8, 8, True, "RE", 1),
    BlockArgs(3, 8, 20, 12, False, "RE", 2),
    BlockArgs(5, 12, 28, 12, True, "HS", 1),
)


def _make_divisible(v, divisor=4):
    return max(divisor, int(v + divisor / 2) // divisor * divisor)


class ConvBNAct(tnn.Sequential):
    def __init__(self, cin, cout, kernel=3, stride=1, groups=1, act=None):
        layers = [
            tnn.Conv2d(cin, cout, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
            tnn.BatchNorm2d(cout, eps=0.001, momentum=0.01),
        ]
        if act is not None:
            layers.append(act())
        super().__init__(*layers)


class SqueezeExcitation(tnn.Module):
    def __init__(self, channels, squeeze):
        super().__init__()
        self.avgpool = tnn.AdaptiveAvgPool2d(1)
        self.fc1 = tnn.Conv2d(channels, squeeze, 1)
        self.fc2 = tnn.Conv2d(squeeze, channels, 1)
        self.activation = tnn.ReLU()
        self.scale_activation = tnn.Hardsigmoid()

    def forward(self, x):
        s = self.fc2(self.activation(self.fc1(self.avgpool(x))))
        return self.scale_activation(s) * x


class InvertedResidual(tnn.Module):
    def __init__(self, a: BlockArgs):
        super().__init__()
        self.use_res_connect = a.stride == 1 and a.cin == a.cout
        act = tnn.Hardswish if a.act == "HS" else tnn.ReLU
        layers = []
        if a.expand != a.cin:
            layers.append(ConvBNAct(a.cin, a.expand, 1, act=act))
        layers.append(ConvBNAct(a.expand, a.expand, a.kernel, a.stride, groups=a.expand, act=act))
        if a.se:
            layers.append(SqueezeExcitation(a.expand, _make_divisible(a.expand // 4)))
        layers.append(ConvBNAct(a.expand, a.cout, 1))
        self.block = tnn.Sequential(*layers)

    def forward(self, x):
        y = self.block(x)
        return x + y if self.use_res_connect else y


class MobileNetV3(tnn.Module):
    def __init__(self, settings=SETTINGS, last=36, classes=6):
        super().__init__()
        self.features = tnn.Sequential(
            ConvBNAct(3, settings[0].cin, 3, 2, act=tnn.Hardswish),
            *[InvertedResidual(a) for a in settings],
            ConvBNAct(settings[-1].cout, last, 1, act=tnn.Hardswish),
        )
        self.avgpool = tnn.AdaptiveAvgPool2d(1)
        self.classifier = tnn.Sequential(
            tnn.Linear(last, 24), tnn.Hardswish(), tnn.Dropout(0.2), tnn.Linear(24, classes))

    def forward(self, x):
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


# ------------------------------------------------------------------ Linen


def hard_sigmoid(x):
    return nn.relu6(x + 3.0) / 6.0


def hard_swish(x):
    return x * nn.relu6(x + 3.0) * (1.0 / 6.0)


ACTIVATIONS = {"RE": nn.relu, "HS": hard_swish}


class ConvNormAct(nn.Module):
    features: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    act: Any = None
    train: bool = False

    @nn.compact
    def __call__(self, x):
        pad = (self.kernel - 1) // 2
        x = nn.Conv(self.features, (self.kernel, self.kernel), strides=self.stride,
                    padding=[(pad, pad), (pad, pad)], feature_group_count=self.groups,
                    use_bias=False, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not self.train, momentum=0.99, epsilon=1e-3, name="bn")(x)
        return x if self.act is None else self.act(x)


class SqueezeExcite(nn.Module):
    squeeze: int

    @nn.compact
    def __call__(self, x):
        s = x.mean(axis=(1, 2), keepdims=True)
        s = nn.relu(nn.Conv(self.squeeze, (1, 1), name="reduce")(s))
        s = nn.Conv(x.shape[-1], (1, 1), name="expand")(s)
        return x * hard_sigmoid(s)


class MBConv(nn.Module):
    args: BlockArgs
    train: bool = False

    @nn.compact
    def __call__(self, inputs):
        a = self.args
        act = ACTIVATIONS[a.act]
        block = partial(ConvNormAct, train=self.train)
        x = inputs
        if a.expand != a.cin:
            x = block(a.expand, 1, act=act, name="expand")(x)
        x = block(a.expand, a.kernel, a.stride, groups=a.expand, act=act, name="depthwise")(x)
        if a.se:
            x = SqueezeExcite(_make_divisible(a.expand // 4), name="se")(x)
        x = block(a.cout, 1, name="project")(x)
        if a.stride == 1 and a.cin == a.cout:
            x = x + inputs
        return x


class FlaxMobileNetV3(nn.Module):
    last: int = 36
    classes: int = 6

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = ConvNormAct(SETTINGS[0].cin, 3, 2, act=hard_swish, train=train, name="stem")(x)
        for i, a in enumerate(SETTINGS):
            x = MBConv(a, train, name=f"block_{i}")(x)
        x = ConvNormAct(self.last, 1, act=hard_swish, train=train, name="last_conv")(x)
        x = x.mean(axis=(1, 2))
        x = hard_swish(nn.Dense(24, name="pre_head")(x))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(self.classes, name="head")(x)


def _np(t):
    return t.detach().numpy()


def _conv(m):
    w = _np(m.weight)
    out = {"kernel": np.transpose(w, (2, 3, 1, 0)) if w.ndim == 4 else w.T}
    if m.bias is not None:
        out["bias"] = _np(m.bias)
    return out


def _cna(seq):
    conv, bn = seq[0], seq[1]
    params = {"conv": _conv(conv), "bn": {"scale": _np(bn.weight), "bias": _np(bn.bias)}}
    stats = {"bn": {"mean": _np(bn.running_mean), "var": _np(bn.running_var)}}
    return params, stats


def port(net):
    params, stats = {}, {}

    def put(scope, name, seq):
        p, s = _cna(seq)
        params.setdefault(scope, {}) if scope else None
        stats.setdefault(scope, {}) if scope else None
        (params[scope] if scope else params)[name] = p
        (stats[scope] if scope else stats)[name] = s

    put(None, "stem", net.features[0])
    put(None, "last_conv", net.features[len(SETTINGS) + 1])
    for i, a in enumerate(SETTINGS):
        layers = list(net.features[i + 1].block)
        if a.expand != a.cin:
            put(f"block_{i}", "expand", layers.pop(0))
        put(f"block_{i}", "depthwise", layers.pop(0))
        if a.se:
            se = layers.pop(0)
            params[f"block_{i}"]["se"] = {"reduce": _conv(se.fc1), "expand": _conv(se.fc2)}
        put(f"block_{i}", "project", layers.pop(0))
    params["pre_head"] = _conv(net.classifier[0])
    params["head"] = _conv(net.classifier[3])
    return jax.tree.map(jnp.asarray, {"params": params, "batch_stats": stats})


def build(seed):
    torch.manual_seed(seed)
    net = MobileNetV3().eval()
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, tnn.BatchNorm2d):
                m.weight.uniform_(0.6, 1.6)
                m.bias.normal_(0, 0.4)
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.3, 1.2)
    x = np.random.default_rng(seed).normal(size=(3, 3, 20, 16))
    return {"torch": net, "flax": (FlaxMobileNetV3(), port(net)), "inputs": x, "flax_inputs": x.transpose(0, 2, 3, 1)}


FAULTS = [
    {
        "title": "logistic sigmoid in the squeeze-excite gate",
        "edits": [("return x * hard_sigmoid(s)", "return x * nn.sigmoid(s)")],
        "layers": ["features.1.block.1.scale_activation", "features.1.block.1"],
        "between": ("features.1.block.1.fc2", "features.1.block.2.0"),
        "causes": ["activation"],
        "level": "outputs",
    },
    {
        "title": "stride-2 convolutions padded as TensorFlow pads",
        "edits": [("padding=[(pad, pad), (pad, pad)]", 'padding="SAME"')],
        "layers": ["features.0.0"],
        "causes": ["padding"],
        "level": "outputs",
    },
    {
        "title": "shortcut only for blocks that expand",
        "edits": [("if a.stride == 1 and a.cin == a.cout:", "if a.stride == 1 and a.cin == a.cout and a.expand > a.cin:")],
        "layers": ["features.1"],
        "between": ("features.1.block.2.1", "features.2.block.0.0"),
        "causes": ["residual"],
        "level": "outputs",
    },
    {
        "title": "torch's momentum given to Linen as it is",
        "edits": [("momentum=0.99, epsilon=1e-3", "momentum=0.01, epsilon=1e-3")],
        "layers": ["features.0.1"],
        "causes": ["momentum"],
        "level": "training",
    },
    {
        "title": "statistics of the last convolution frozen",
        "edits": [('act=hard_swish, train=train, name="last_conv"', 'act=hard_swish, name="last_conv"')],
        "layers": ["features.4.1"],
        "causes": ["statistics", "batch_statistics"],
        "level": "training",
    },
    {
        "title": "squeeze-excite ahead of the depthwise activation",
        "edits": [('x = block(a.expand, a.kernel, a.stride, groups=a.expand, act=act, name="depthwise")(x)',
                   'x = block(a.expand, a.kernel, a.stride, groups=a.expand, name="depthwise")(x)'),
                  ("        x = block(a.cout, 1, name=", "        x = act(x)\n        x = block(a.cout, 1, name=")],
        "layers": ["features.1.block", "features.1.block.0.2", "features.1"],
        "between": ("features.1.block.0.1", "features.1.block.1.fc1"),
        "causes": ["order"],
        "level": "outputs",
    },
    {
        "title": "depthwise kernels reshaped where they should be transposed",
        "edits": [('out = {"kernel": np.transpose(w, (2, 3, 1, 0)) if w.ndim == 4 else w.T}',
                   'if w.ndim == 4 and w.shape[1] == 1:\n        return {"kernel": w.reshape(w.shape[2], w.shape[3], 1, w.shape[0])}\n'
                   '    out = {"kernel": np.transpose(w, (2, 3, 1, 0)) if w.ndim == 4 else w.T}')],
        "layers": ["features.1.block.0.0"],
        "causes": ["permuted", "rearranged", "transposed"],
        "level": "outputs",
    },
    {
        "title": "hard-swish without the sixth",
        "edits": [("return x * nn.relu6(x + 3.0) * (1.0 / 6.0)", "return x * nn.relu6(x + 3.0)")],
        "layers": ["features.0.2"],
        "between": ("features.0.1", "features.1.block.0.0"),
        "causes": ["scale", "activation"],
        "level": "outputs",
    },
]
