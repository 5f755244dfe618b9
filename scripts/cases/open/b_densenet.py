"""DenseNet: dense blocks that concatenate, the last one dilated, transitions with average pooling; Linen compact."""
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from flax import linen


class _DenseLayer(nn.Module):
    def __init__(self, num_input_features, growth_rate, bn_size, drop_rate, dilation):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.relu1 = nn.ReLU(inplace=False)
        self.conv1 = nn.Conv2d(num_input_features, bn_size * growth_rate, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bn_size * growth_rate)
        self.relu2 = nn.ReLU(inplace=False)
        self.conv2 = nn.Conv2d(bn_size * growth_rate, growth_rate, 3, padding=dilation, dilation=dilation, bias=False)
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, features):
        x = torch.cat(features, 1)
        x = self.conv1(self.relu1(self.norm1(x)))
        return self.dropout(self.conv2(self.relu2(self.norm2(x))))


class _DenseBlock(nn.ModuleDict):
    def __init__(self, num_layers, cin, growth, bn_size, drop_rate, dilation=1):
        super().__init__()
        for i in range(num_layers):
            self[f"denselayer{i + 1}"] = _DenseLayer(cin + i * growth, growth, bn_size, drop_rate, dilation)

    def forward(self, init):
        features = [init]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class _Transition(nn.Sequential):
    def __init__(self, cin, cout):
        super().__init__(OrderedDict(
            norm=nn.BatchNorm2d(cin),
            relu=nn.ReLU(inplace=False),
            conv=nn.Conv2d(cin, cout, 1, bias=False),
            pool=nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
        ))


class DenseNet(nn.Module):
    def __init__(self, growth=4, layers=(2, 2), stem=8, bn_size=3, drop_rate=0.2, classes=5):
        super().__init__()
        c1 = stem + growth * layers[0]
        c2 = c1 // 2 + growth * layers[1]
        self.features = nn.Sequential(OrderedDict(
            conv0=nn.Conv2d(3, stem, 5, stride=2, padding=2, bias=False),
            norm0=nn.BatchNorm2d(stem),
            relu0=nn.ReLU(inplace=False),
            pool0=nn.MaxPool2d(3, stride=2, padding=1),
            denseblock1=_DenseBlock(layers[0], stem, growth, bn_size, drop_rate),
            transition1=_Transition(c1, c1 // 2),
            denseblock2=_DenseBlock(layers[1], c1 // 2, growth, bn_size, drop_rate, dilation=2),
            norm5=nn.BatchNorm2d(c2),
        ))
        self.classifier = nn.Linear(c2, classes)

    def forward(self, x):
        out = F.relu(self.features(x))
        out = F.adaptive_avg_pool2d(out, (1, 1)).flatten(1)
        return self.classifier(out)


# ------------------------------------------------------------------ Linen


class DenseLayer(linen.Module):
    growth_rate: int
    bn_size: int = 3
    dilation: int = 1
    dropout_rate: float = 0.2

    @linen.compact
    def __call__(self, x, train: bool):
        d = self.dilation
        y = linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        y = linen.Conv(self.bn_size * self.growth_rate, (1, 1), use_bias=False)(linen.relu(y))
        y = linen.BatchNorm(use_running_average=not train, momentum=0.9)(y)
        y = linen.Conv(self.growth_rate, (3, 3), padding=[(d, d), (d, d)], kernel_dilation=(d, d), use_bias=False)(linen.relu(y))
        y = linen.Dropout(self.dropout_rate, deterministic=not train)(y)
        return jnp.concatenate([x, y], axis=-1)


class Transition(linen.Module):
    features: int

    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.BatchNorm(not train, momentum=0.9, epsilon=1e-5)(x)
        x = linen.Conv(self.features, (1, 1), use_bias=False)(linen.relu(x))
        return linen.avg_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)), count_include_pad=False)


class FlaxDenseNet(linen.Module):
    growth: int = 4
    layers: tuple = (2, 2)
    stem: int = 8
    classes: int = 5

    @linen.compact
    def __call__(self, images, train: bool = False):
        x = linen.Conv(self.stem, (5, 5), strides=(2, 2), padding=[(2, 2), (2, 2)], use_bias=False)(images)
        x = linen.relu(linen.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = linen.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for _ in range(self.layers[0]):
            x = DenseLayer(self.growth)(x, train)
        x = Transition(x.shape[-1] // 2)(x, train)
        for _ in range(self.layers[1]):
            x = DenseLayer(self.growth, dilation=2)(x, train)
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = linen.relu(x)
        x = jnp.mean(x, axis=(1, 2))
        return linen.Dense(self.classes)(x)


def J(t):
    return jnp.asarray(t.detach().numpy())


class Importer:
    """Collects parameters and statistics under Linen's automatic names."""

    def __init__(self):
        self.params, self.stats = {}, {}

    def conv(self, path, m):
        self._put(self.params, path, {"kernel": J(m.weight).transpose(2, 3, 1, 0)})

    def bn(self, path, m):
        self._put(self.params, path, {"scale": J(m.weight), "bias": J(m.bias)})
        self._put(self.stats, path, {"mean": J(m.running_mean), "var": J(m.running_var)})

    @staticmethod
    def _put(tree, path, leaf):
        *parents, last = path.split("/")
        for p in parents:
            tree = tree.setdefault(p, {})
        tree[last] = leaf


def port(net):
    imp, f = Importer(), net.features
    imp.conv("Conv_0", f.conv0)
    imp.bn("BatchNorm_0", f.norm0)
    layers = [*f.denseblock1.values(), *f.denseblock2.values()]
    for i, layer in enumerate(layers):
        for j in (1, 2):
            imp.bn(f"DenseLayer_{i}/BatchNorm_{j - 1}", getattr(layer, f"norm{j}"))
            imp.conv(f"DenseLayer_{i}/Conv_{j - 1}", getattr(layer, f"conv{j}"))
    imp.bn("Transition_0/BatchNorm_0", f.transition1.norm)
    imp.conv("Transition_0/Conv_0", f.transition1.conv)
    imp.bn("BatchNorm_1", f.norm5)
    imp.params["Dense_0"] = {"kernel": J(net.classifier.weight).T, "bias": J(net.classifier.bias)}
    return {"params": imp.params, "batch_stats": imp.stats}


def build(seed):
    torch.manual_seed(seed)
    net = DenseNet().eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0.2, 0.4)
            nn.init.normal_(m.running_mean, 0, 0.3)
            nn.init.uniform_(m.running_var, 0.3, 1.3)
    x = np.random.default_rng(seed).normal(size=(2, 3, 24, 32))
    return {"torch": net, "flax": (FlaxDenseNet(), port(net)), "inputs": x, "flax_inputs": x.transpose(0, 2, 3, 1)}


FAULTS = [
    {
        "title": "new features put in front of the old",
        "edits": [("return jnp.concatenate([x, y], axis=-1)", "return jnp.concatenate([y, x], axis=-1)")],
        "layers": ["features.denseblock1.denselayer2", "features.denseblock1"],
        "between": ("features.denseblock1.denselayer1.conv2", "features.denseblock1.denselayer2.norm1"),
        "causes": ["concat"],
        "level": "outputs",
    },
    {
        "title": "stem's max pool with SAME padding",
        "edits": [("linen.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))",
                   'linen.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")')],
        "layers": ["features.pool0"],
        "between": ("features.norm0", "features.denseblock1.denselayer1.norm1"),
        "causes": ["pooling", "padding"],
        "level": "outputs",
    },
    {
        "title": "average pool counts the padding",
        "edits": [("padding=((1, 1), (1, 1)), count_include_pad=False)", "padding=((1, 1), (1, 1)))")],
        "layers": ["features.transition1.pool"],
        "between": ("features.transition1.conv", "features.denseblock2.denselayer1.norm1"),
        "causes": ["pooling"],
        "level": "outputs",
    },
    {
        "title": "second block not dilated",
        "edits": [("DenseLayer(self.growth, dilation=2)", "DenseLayer(self.growth)")],
        "layers": ["features.denseblock2.denselayer1.conv2"],
        "causes": ["dilation"],
        "level": "outputs",
    },
    {
        "title": "no ReLU behind the last norm",
        "edits": [("        x = linen.relu(x)\n        x = jnp.mean", "        x = jnp.mean")],
        "layers": [""],
        "between": ("features.norm5", "classifier"),
        "causes": ["missing_layer", "left_out", "activation"],
        "level": "outputs",
    },
    {
        "title": "transition's norm with Linen's default momentum",
        "edits": [("linen.BatchNorm(not train, momentum=0.9, epsilon=1e-5)", "linen.BatchNorm(not train, epsilon=1e-5)")],
        "layers": ["features.transition1.norm"],
        "causes": ["momentum"],
        "level": "training",
    },
    {
        "title": "dropout ahead of the second convolution",
        "edits": [("        y = linen.Dropout(self.dropout_rate, deterministic=not train)(y)\n", ""),
                  ("        y = linen.Conv(self.growth_rate, (3, 3)",
                   "        y = linen.Dropout(self.dropout_rate, deterministic=not train)(y)\n        y = linen.Conv(self.growth_rate, (3, 3)")],
        "layers": ["features.denseblock1.denselayer1.dropout", "features.denseblock1.denselayer1"],
        "between": ("features.denseblock1.denselayer1.norm2", "features.denseblock1.denselayer1.conv2"),
        "causes": ["training_attribute", "dropout"],
        "level": "attributes",
    },
    {
        "title": "weight and bias of every BatchNorm exchanged",
        "edits": [('{"scale": J(m.weight), "bias": J(m.bias)}', '{"bias": J(m.weight), "scale": J(m.bias)}')],
        "layers": ["features.norm0"],
        "causes": ["swapped"],
        "level": "outputs",
    },
]
