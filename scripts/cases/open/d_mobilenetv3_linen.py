"""MobileNetV3-like CNN (depthwise, squeeze-excite, hard swish, BatchNorm) against Linen @nn.compact."""
from typing import Any, Sequence, Tuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch


def _make_divisible(v, divisor=4):
    return max(divisor, int(v + divisor / 2) // divisor * divisor)


class SqueezeExcitation(torch.nn.Module):
    def __init__(self, channels, squeeze):
        super().__init__()
        self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        self.fc1 = torch.nn.Conv2d(channels, squeeze, 1)
        self.fc2 = torch.nn.Conv2d(squeeze, channels, 1)
        self.activation = torch.nn.ReLU()
        self.scale_activation = torch.nn.Hardsigmoid()

    def forward(self, x):
        s = self.fc2(self.activation(self.fc1(self.avgpool(x))))
        return self.scale_activation(s) * x


class ConvBNAct(torch.nn.Sequential):
    def __init__(self, cin, cout, kernel, stride=1, groups=1, act=torch.nn.Hardswish):
        layers = [
            torch.nn.Conv2d(cin, cout, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
            torch.nn.BatchNorm2d(cout, eps=1e-3, momentum=0.01),
        ]
        if act is not None:
            layers.append(act())
        super().__init__(*layers)


class InvertedResidual(torch.nn.Module):
    def __init__(self, cin, expand, cout, kernel, stride, use_se, use_hs):
        super().__init__()
        act = torch.nn.Hardswish if use_hs else torch.nn.ReLU
        self.use_res_connect = stride == 1 and cin == cout
        layers = []
        if expand != cin:
            layers.append(ConvBNAct(cin, expand, 1, act=act))
        layers.append(ConvBNAct(expand, expand, kernel, stride, groups=expand, act=act))
        if use_se:
            layers.append(SqueezeExcitation(expand, _make_divisible(expand // 4)))
        layers.append(ConvBNAct(expand, cout, 1, act=None))
        self.block = torch.nn.Sequential(*layers)

    def forward(self, x):
        y = self.block(x)
        return x + y if self.use_res_connect else y


class MobileNet(torch.nn.Module):
    def __init__(self, settings, stem, last, hidden, classes):
        super().__init__()
        blocks = [ConvBNAct(3, stem, 3, 2)]
        cin = stem
        for expand, cout, kernel, stride, se, hs in settings:
            blocks.append(InvertedResidual(cin, expand, cout, kernel, stride, se, hs))
            cin = cout
        blocks.append(ConvBNAct(cin, last, 1))
        self.features = torch.nn.Sequential(*blocks)
        self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        self.classifier = torch.nn.Sequential(
            torch.nn.Linear(last, hidden), torch.nn.Hardswish(), torch.nn.Dropout(0.2), torch.nn.Linear(hidden, classes)
        )

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


SETTINGS = [
    # expand, out, kernel, stride, squeeze-excite, hard swish
    (8, 8, 3, 1, True, False),
    (20, 12, 5, 2, False, True),
    (28, 12, 3, 1, True, True),
]


class SE(nn.Module):
    reduced: int

    @nn.compact
    def __call__(self, x):
        s = jnp.mean(x, axis=(1, 2), keepdims=True)
        s = nn.relu(nn.Conv(self.reduced, (1, 1), name="reduce")(s))
        s = nn.Conv(x.shape[-1], (1, 1), name="expand")(s)
        gate = jnp.clip(s / 6.0 + 0.5, 0.0, 1.0)
        return x * gate


class ConvBN(nn.Module):
    features: int
    kernel: int
    strides: int = 1
    depthwise: bool = False
    act: Any = nn.hard_swish

    @nn.compact
    def __call__(self, x, train: bool = False):
        p = self.kernel // 2
        x = nn.Conv(
            self.features, (self.kernel, self.kernel), strides=(self.strides, self.strides),
            padding=((p, p), (p, p)), feature_group_count=x.shape[-1] if self.depthwise else 1, use_bias=False,
        )(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.99, epsilon=1e-3)(x)
        return self.act(x) if self.act is not None else x


class MBConv(nn.Module):
    setting: Tuple

    @nn.compact
    def __call__(self, x, train: bool = False):
        expand, out, kernel, stride, use_se, use_hs = self.setting
        act = nn.hard_swish if use_hs else nn.relu
        h = x
        if expand != x.shape[-1]:
            h = ConvBN(expand, 1, act=act, name="pw")(h, train)
        h = ConvBN(expand, kernel, stride, depthwise=True, act=act, name="dw")(h, train)
        if use_se:
            h = SE(_make_divisible(expand // 4), name="se")(h)
        h = ConvBN(out, 1, act=None, name="pw_linear")(h, train)
        if stride == 1 and x.shape[-1] == out:
            h = h + x
        return h


class FlaxMobileNet(nn.Module):
    settings: Sequence[Tuple]
    stem: int
    last: int
    hidden: int
    classes: int

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = ConvBN(self.stem, 3, 2, name="stem")(x, train)
        for i, s in enumerate(self.settings):
            x = MBConv(s, name=f"blocks_{i}")(x, train)
        x = ConvBN(self.last, 1, name="head")(x, train)
        x = x.mean(axis=(1, 2))
        x = nn.hard_swish(nn.Dense(self.hidden)(x))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(self.classes)(x)


def port(net):
    arr = lambda t: jnp.asarray(t.detach().numpy())

    def conv(m):
        out = {"kernel": arr(m.weight).transpose(2, 3, 1, 0)}
        if m.bias is not None:
            out["bias"] = arr(m.bias)
        return out

    def conv_bn(seq):
        bn = seq[1]
        params = {"Conv_0": conv(seq[0]), "BatchNorm_0": {"scale": arr(bn.weight), "bias": arr(bn.bias)}}
        return params, {"BatchNorm_0": {"mean": arr(bn.running_mean), "var": arr(bn.running_var)}}

    params, stats = {}, {}
    feats = list(net.features)
    params["stem"], stats["stem"] = conv_bn(feats[0])
    params["head"], stats["head"] = conv_bn(feats[-1])
    for i, block in enumerate(feats[1:-1]):
        p, s = {}, {}
        names = ["pw", "dw", "pw_linear"] if sum(isinstance(m, ConvBNAct) for m in block.block) == 3 else ["dw", "pw_linear"]
        for m in block.block:
            if isinstance(m, SqueezeExcitation):
                p["se"] = {"reduce": conv(m.fc1), "expand": conv(m.fc2)}
            else:
                n = names.pop(0)
                p[n], s[n] = conv_bn(m)
        params[f"blocks_{i}"], stats[f"blocks_{i}"] = p, s
    for j, m in enumerate((net.classifier[0], net.classifier[3])):
        params[f"Dense_{j}"] = {"kernel": arr(m.weight).T, "bias": arr(m.bias)}
    return {"params": params, "batch_stats": stats}


def build(seed):
    torch.manual_seed(seed)
    net = MobileNet(SETTINGS, stem=8, last=36, hidden=18, classes=7).eval()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.weight.data.uniform_(1.0, 2.5)
            m.bias.data.normal_(0.3, 0.8)
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.05, 0.6)
        elif getattr(m, "bias", None) is not None:
            m.bias.data.normal_(0, 0.4)
    image = np.random.default_rng(seed).normal(size=(2, 3, 16, 20))
    model = FlaxMobileNet(SETTINGS, stem=8, last=36, hidden=18, classes=7)
    return {
        "torch": net,
        "flax": (model, port(net)),
        "inputs": image,
        "flax_inputs": image.transpose(0, 2, 3, 1),
    }


FAULTS = [
    {
        "title": "SAME padding in every convolution (shifts those with stride 2)",
        "edits": [("padding=((p, p), (p, p))", "padding=\"SAME\"")],
        "layers": ["features.0.0"],
        "causes": ["padding"],
        "level": "outputs",
    },
    {
        "title": "hard sigmoid of Keras: clip(0.2 x + 0.5)",
        "edits": [("jnp.clip(s / 6.0 + 0.5, 0.0, 1.0)", "jnp.clip(0.2 * s + 0.5, 0.0, 1.0)")],
        "layers": ["features.1.block.1.scale_activation", "features.1.block.1"],
        "between": ("features.1.block.1.fc2", "features.1.block.2.0"),
        "causes": ["activation", "constant"],
        "level": "outputs",
    },
    {
        "title": "torch's momentum 0.01 turned into the common 0.9",
        "edits": [("momentum=0.99, epsilon=1e-3", "momentum=0.9, epsilon=1e-3")],
        "layers": ["features.0.1"],
        "causes": ["momentum"],
        "level": "training",
    },
    {
        "title": "dropout given the keep probability",
        "edits": [("nn.Dropout(0.2, deterministic=not train)", "nn.Dropout(0.8, deterministic=not train)")],
        "layers": ["classifier.2"],
        "causes": ["training_attribute", "dropout"],
        "level": "attributes",
    },
    {
        "title": "linear bottleneck followed by the block's activation",
        "edits": [("ConvBN(out, 1, act=None, name=\"pw_linear\")", "ConvBN(out, 1, act=act, name=\"pw_linear\")")],
        "layers": ["features.1", "features.1.block.2", "features.1.block"],
        "between": ("features.1.block.2.1", "features.2.block.0.0"),
        "causes": ["activation", "left_out"],
        "level": "outputs",
    },
    {
        "title": "hard swish in the early block that asks for ReLU",
        "edits": [("act = nn.hard_swish if use_hs else nn.relu", "act = nn.hard_swish")],
        "layers": ["features.1.block.0.2", "features.1.block.0"],
        "between": ("features.1.block.0.1", "features.1.block.1.fc1"),
        "causes": ["activation"],
        "level": "outputs",
    },
    {
        "title": "shortcut only where the block does not expand",
        "edits": [("        if stride == 1 and x.shape[-1] == out:", "        if stride == 1 and x.shape[-1] == expand == out:")],
        "layers": ["features.3"],
        "between": ("features.3.block.3.1", "features.4.0"),
        "causes": ["residual"],
        "level": "outputs",
    },
    {
        "title": "running variance of the BatchNorms stored as standard deviation",
        "edits": [("\"var\": arr(bn.running_var)", "\"var\": jnp.sqrt(arr(bn.running_var))")],
        "layers": ["features.0.1"],
        "causes": ["values"],
        "level": "outputs",
    },
]
