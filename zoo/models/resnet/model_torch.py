"""ResNet in PyTorch. He 2015, https://arxiv.org/abs/1512.03385; names and strides are those of
torchvision's models/resnet.py.

B images, H x W pixels in each, C channels: (B, C, H, W).
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn, relu

from zoo.models.resnet.config import EXPANSION, Config
from zoo.nn.batchnorm_torch import BatchNorm2d
from zoo.nn.conv_torch import Conv2d
from zoo.nn.layers_torch import Linear
from zoo.nn.options_torch import Options


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them (He 2015, figure 5, left)."""

    def __init__(self, n_in: int, inner: int, stride: int, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.conv1 = Conv2d(n_in, inner, 3, stride, padding=1, bias=False, **kw)
        self.bn1 = BatchNorm2d(inner, **kw)
        self.conv2 = Conv2d(inner, inner, 3, padding=1, bias=False, **kw)
        self.bn2 = BatchNorm2d(inner, **kw)
        self.downsample = make_downsample(n_in, inner, stride, **kw)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n_in, H, W) -> (B, inner, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return relu(x + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut around them (figure 5, right).

    The stride is on the 3x3 convolution, as in "v1.5"; the paper has it on the first 1x1.
    """

    def __init__(self, n_in: int, inner: int, stride: int, **kw: Unpack[Options]) -> None:
        super().__init__()
        n_out = inner * EXPANSION["bottleneck"]
        self.conv1 = Conv2d(n_in, inner, 1, bias=False, **kw)
        self.bn1 = BatchNorm2d(inner, **kw)
        self.conv2 = Conv2d(inner, inner, 3, stride, padding=1, bias=False, **kw)
        self.bn2 = BatchNorm2d(inner, **kw)
        self.conv3 = Conv2d(inner, n_out, 1, bias=False, **kw)
        self.bn3 = BatchNorm2d(n_out, **kw)
        self.downsample = make_downsample(n_in, n_out, stride, **kw)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n_in, H, W) -> (B, n_out, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = relu(self.bn1(self.conv1(x)))
        x = relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return relu(x + shortcut)


def make_downsample(
    n_in: int, n_out: int, stride: int, **kw: Unpack[Options]
) -> nn.Sequential | None:
    """A 1x1 convolution that gives the shortcut the shape of the block's output; None where it has
    that shape already."""
    if stride == 1 and n_in == n_out:
        return None
    return nn.Sequential(Conv2d(n_in, n_out, 1, stride, bias=False, **kw), BatchNorm2d(n_out, **kw))


def make_layer(c: Config, stage: int, **kw: Unpack[Options]) -> nn.Sequential:
    """The blocks of stage 0, 1, 2 or 3. The first block of a stage halves the image, except in
    stage 0, where the max pool has just halved it."""
    block = BasicBlock if c.block == "basic" else Bottleneck
    inner = c.width * 2**stage
    n_in = c.width if stage == 0 else inner // 2 * c.expansion
    blocks = [block(n_in, inner, stride=1 if stage == 0 else 2, **kw)]
    for _ in range(c.layers[stage] - 1):
        blocks.append(block(inner * c.expansion, inner, stride=1, **kw))
    return nn.Sequential(*blocks)


class ResNet(nn.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.conv1 = Conv2d(3, c.width, 7, stride=2, padding=3, bias=False, **kw)
        self.bn1 = BatchNorm2d(c.width, **kw)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = make_layer(c, 0, **kw)
        self.layer2 = make_layer(c, 1, **kw)
        self.layer3 = make_layer(c, 2, **kw)
        self.layer4 = make_layer(c, 3, **kw)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = Linear(c.width * 8 * c.expansion, c.num_classes, **kw)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, num_classes)."""
        x = relu(self.bn1(self.conv1(x)))
        x = self.maxpool(x)  # (B, width, H / 4, W / 4)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)  # (B, C, H / 32, W / 32)
        x = self.avgpool(x)  # (B, C, 1, 1)
        return self.fc(x.flatten(1))
