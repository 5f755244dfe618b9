"""ResNet in Flax NNX: the twin of model_torch.py, class by class.

B images, H x W pixels in each, C channels, which come last: (B, H, W, C).
"""

from __future__ import annotations

from typing import Unpack

from flax import nnx
from jax import Array
from jax.nn import relu

from zoo.models.resnet.config import EXPANSION, Config
from zoo.nn.batchnorm_flax import BatchNorm2d
from zoo.nn.conv_flax import Conv2d
from zoo.nn.layers_flax import Sequential
from zoo.nn.options_flax import Options
from zoo.nn.pool_flax import AdaptiveAvgPool2d, MaxPool2d, flatten


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut around them (He 2015, figure 5, left)."""

    def __init__(self, n_in: int, inner: int, stride: int, **kw: Unpack[Options]) -> None:
        self.conv1 = Conv2d(n_in, inner, 3, stride, padding=1, bias=False, **kw)
        self.bn1 = BatchNorm2d(inner, **kw)
        self.conv2 = Conv2d(inner, inner, 3, padding=1, bias=False, **kw)
        self.bn2 = BatchNorm2d(inner, **kw)
        self.downsample = make_downsample(n_in, inner, stride, **kw)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, n_in) -> (B, H / stride, W / stride, inner)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return relu(x + shortcut)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut around them (figure 5, right).

    The stride is on the 3x3 convolution, as in "v1.5"; the paper has it on the first 1x1.
    """

    def __init__(self, n_in: int, inner: int, stride: int, **kw: Unpack[Options]) -> None:
        n_out = inner * EXPANSION["bottleneck"]
        self.conv1 = Conv2d(n_in, inner, 1, bias=False, **kw)
        self.bn1 = BatchNorm2d(inner, **kw)
        self.conv2 = Conv2d(inner, inner, 3, stride, padding=1, bias=False, **kw)
        self.bn2 = BatchNorm2d(inner, **kw)
        self.conv3 = Conv2d(inner, n_out, 1, bias=False, **kw)
        self.bn3 = BatchNorm2d(n_out, **kw)
        self.downsample = make_downsample(n_in, n_out, stride, **kw)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, n_in) -> (B, H / stride, W / stride, n_out)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = relu(self.bn1(self.conv1(x)))
        x = relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return relu(x + shortcut)


def make_downsample(n_in: int, n_out: int, stride: int, **kw: Unpack[Options]) -> Sequential | None:
    """A 1x1 convolution that gives the shortcut the shape of the block's output; None where it has
    that shape already."""
    if stride == 1 and n_in == n_out:
        return None
    return Sequential(Conv2d(n_in, n_out, 1, stride, bias=False, **kw), BatchNorm2d(n_out, **kw))


def make_layer(c: Config, stage: int, **kw: Unpack[Options]) -> Sequential:
    """The blocks of stage 0, 1, 2 or 3. The first block of a stage halves the image, except in
    stage 0, where the max pool has just halved it."""
    block = BasicBlock if c.block == "basic" else Bottleneck
    inner = c.width * 2**stage
    n_in = c.width if stage == 0 else inner // 2 * c.expansion
    blocks = [block(n_in, inner, stride=1 if stage == 0 else 2, **kw)]
    for _ in range(c.layers[stage] - 1):
        blocks.append(block(inner * c.expansion, inner, stride=1, **kw))
    return Sequential(*blocks)


class ResNet(nnx.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.conv1 = Conv2d(3, c.width, 7, stride=2, padding=3, bias=False, **kw)
        self.bn1 = BatchNorm2d(c.width, **kw)
        self.maxpool = MaxPool2d(3, stride=2, padding=1)
        self.layer1 = make_layer(c, 0, **kw)
        self.layer2 = make_layer(c, 1, **kw)
        self.layer3 = make_layer(c, 2, **kw)
        self.layer4 = make_layer(c, 3, **kw)
        self.avgpool = AdaptiveAvgPool2d(1)
        self.fc = nnx.Linear(c.width * 8 * c.expansion, c.num_classes, **kw)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, num_classes)."""
        x = relu(self.bn1(self.conv1(x)))
        x = self.maxpool(x)  # (B, H / 4, W / 4, width)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)  # (B, H / 32, W / 32, C)
        x = self.avgpool(x)  # (B, 1, 1, C)
        return self.fc(flatten(x))
