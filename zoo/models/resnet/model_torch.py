"""ResNet in PyTorch. He 2015, https://arxiv.org/abs/1512.03385; names and strides are those of
torchvision's models/resnet.py.

    model = ResNet(Config())
    model.eval()  # it starts in training mode
    logits = model(images)  # (B, 3, H, W) -> (B, 1000)

B images, H x W pixels in each, C channels: (B, C, H, W). `**kw` is `dtype` and `param_dtype`,
which every layer takes.
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn, relu

from zoo.models.resnet.config import EXPANSION, Config
from zoo.nn.batchnorm_torch import BatchNorm2d
from zoo.nn.conv_torch import Conv2d
from zoo.nn.layers_torch import Linear
from zoo.nn.options_torch import Options


def make_downsample(
    n_in: int, n_out: int, stride: int, **kw: Unpack[Options]
) -> nn.Sequential | None:
    """The shortcut's 1x1 convolution, where a block changes the shape; None where it does not."""
    if stride == 1 and n_in == n_out:
        return None
    return nn.Sequential(Conv2d(n_in, n_out, 1, stride, bias=False, **kw), BatchNorm2d(n_out, **kw))


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

    The stride is on the 3x3 convolution ("v1.5"); in the paper it is on the first 1x1.
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


def make_layer(
    c: Config, n_in: int, inner: int, blocks: int, stride: int, **kw: Unpack[Options]
) -> nn.Sequential:
    """Residual blocks in a row, of which only the first has the stride."""
    block = BasicBlock if c.block == "basic" else Bottleneck
    layer = [block(n_in, inner, stride, **kw)]
    for _ in range(blocks - 1):
        layer.append(block(inner * c.expansion, inner, stride=1, **kw))
    return nn.Sequential(*layer)


class ResNet(nn.Module):
    """ResNet-18 to 152, as the config says; `Config()` is ResNet-50."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        w, e = c.width, c.expansion
        k, s = c.stem_kernel, c.stem_stride
        self.conv1 = Conv2d(c.in_channels, w, k, s, padding=k // 2, bias=False, **kw)
        self.bn1 = BatchNorm2d(w, **kw)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if c.stem_pool else None
        self.layer1 = make_layer(c, w, w, c.layers[0], stride=1, **kw)
        self.layer2 = make_layer(c, w * e, w * 2, c.layers[1], stride=2, **kw)
        self.layer3 = make_layer(c, w * 2 * e, w * 4, c.layers[2], stride=2, **kw)
        self.layer4 = make_layer(c, w * 4 * e, w * 8, c.layers[3], stride=2, **kw)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = Linear(w * 8 * e, c.num_classes, **kw) if c.num_classes else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> logits (B, num_classes), or features (B, C) without a head."""
        x = relu(self.bn1(self.conv1(x)))
        if self.maxpool is not None:
            x = self.maxpool(x)  # (B, width, H / 4, W / 4)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)  # (B, C, H / 32, W / 32)
        x = self.avgpool(x).flatten(1)
        return x if self.fc is None else self.fc(x)
