"""ResNet in Flax NNX: the twin of model_torch.py, class by class.

B images, H x W pixels in each, C channels, which come last.
"""

from __future__ import annotations

from typing import Any

from flax import nnx
from jax import Array
from jax.nn import relu

from zoo.models.resnet.config import EXPANSION, Config
from zoo.nn.batchnorm_flax import BatchNorm2d
from zoo.nn.conv_flax import Conv2d
from zoo.nn.pool_flax import adaptive_avg_pool2d, flatten, max_pool2d
from zoo.nn.taps import Taps


def make_downsample(n_in: int, n_out: int, stride: int, **kw: Any) -> nnx.List | None:
    """A 1x1 convolution to bring a block's input into its output's shape, if they differ."""
    if stride == 1 and n_in == n_out:
        return None
    return nnx.List([Conv2d(n_in, n_out, 1, stride, bias=False, **kw), BatchNorm2d(n_out, **kw)])


def shortcut(downsample: nnx.List | None, x: Array, tap: Taps) -> Array:
    """The block's input, brought to its output's shape; step by step so that taps see both
    layers."""
    if downsample is None:
        return x
    conv, norm = downsample
    return tap("downsample.1", norm(tap("downsample.0", conv(x))))


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions."""

    def __init__(self, n_in: int, inner: int, stride: int, **kw: Any) -> None:
        self.conv1 = Conv2d(n_in, inner, 3, stride, padding=1, bias=False, **kw)
        self.bn1 = BatchNorm2d(inner, **kw)
        self.conv2 = Conv2d(inner, inner, 3, padding=1, bias=False, **kw)
        self.bn2 = BatchNorm2d(inner, **kw)
        self.downsample = make_downsample(n_in, inner, stride, **kw)

    def __call__(self, x: Array, tap: Taps) -> Array:
        y = relu(tap("bn1", self.bn1(tap("conv1", self.conv1(x)))))
        y = tap("bn2", self.bn2(tap("conv2", self.conv2(y))))
        return relu(y + shortcut(self.downsample, x, tap))


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions; v1.5: the stride is that of the 3x3, not of the first 1x1."""

    def __init__(self, n_in: int, inner: int, stride: int, **kw: Any) -> None:
        self.conv1 = Conv2d(n_in, inner, 1, bias=False, **kw)
        self.bn1 = BatchNorm2d(inner, **kw)
        self.conv2 = Conv2d(inner, inner, 3, stride, padding=1, bias=False, **kw)
        self.bn2 = BatchNorm2d(inner, **kw)
        n_out = inner * EXPANSION["bottleneck"]
        self.conv3 = Conv2d(inner, n_out, 1, bias=False, **kw)
        self.bn3 = BatchNorm2d(n_out, **kw)
        self.downsample = make_downsample(n_in, n_out, stride, **kw)

    def __call__(self, x: Array, tap: Taps) -> Array:
        y = relu(tap("bn1", self.bn1(tap("conv1", self.conv1(x)))))
        y = relu(tap("bn2", self.bn2(tap("conv2", self.conv2(y)))))
        y = tap("bn3", self.bn3(tap("conv3", self.conv3(y))))
        return relu(y + shortcut(self.downsample, x, tap))


def make_layer(c: Config, stage: int, **kw: Any) -> nnx.List:
    """The blocks of stage 0 to 3. The first block halves the image, except in stage 0, whose input
    the max-pool has halved."""
    cls = BasicBlock if c.block == "basic" else Bottleneck
    inner = c.width * 2**stage
    n_in = c.width if stage == 0 else inner // 2 * c.expansion
    blocks = [cls(n_in, inner, 1 if stage == 0 else 2, **kw)]
    blocks += [cls(inner * c.expansion, inner, 1, **kw) for _ in range(c.layers[stage] - 1)]
    return nnx.List(blocks)


class ResNet(nnx.Module):
    """`dtype` is that of the computation, `param_dtype` of the weights; `rngs` is required, as
    everywhere in NNX."""

    def __init__(self, c: Config, **kw: Any) -> None:
        self.conv1 = Conv2d(3, c.width, 7, stride=2, padding=3, bias=False, **kw)
        self.bn1 = BatchNorm2d(c.width, **kw)
        self.layer1 = make_layer(c, 0, **kw)
        self.layer2 = make_layer(c, 1, **kw)
        self.layer3 = make_layer(c, 2, **kw)
        self.layer4 = make_layer(c, 3, **kw)
        self.fc = nnx.Linear(c.width * 8 * c.expansion, c.num_classes, **kw)

    def __call__(self, x: Array, taps: bool = False) -> Any:
        """(B, H, W, 3) -> logits (B, num_classes).

        `taps=True` returns (output, {name: intermediate}); names are module paths, or torchvision's
        for the pools.
        """
        tap = Taps(taps)
        x = relu(tap("bn1", self.bn1(tap("conv1", self.conv1(x)))))
        x = tap("maxpool", max_pool2d(x, 3, stride=2, padding=1))
        for name in ("layer1", "layer2", "layer3", "layer4"):
            for i, block in enumerate(getattr(self, name)):
                x = tap(f"{name}.{i}", block(x, tap.at(f"{name}.{i}")))
        x = tap("avgpool", flatten(adaptive_avg_pool2d(x, 1)))
        return tap.result(self.fc(x))
