"""Every tensor of a ResNet, under the names that torchvision publishes it with."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from zoo.layout import Entry, batchnorm, conv, linear
from zoo.layout.ops import Shape
from zoo.model import count, dim
from zoo.models.resnet.config import Config

_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_NAMES = re.compile(
    rf"conv1\.weight|bn1\.{_NORM}|fc\.(weight|bias)"
    rf"|layer[1-4]\.\d+\.(conv[123]\.weight|bn[123]\.{_NORM}"
    rf"|downsample\.(0\.weight|1\.{_NORM}))"
)


def layout(c: Config) -> Iterator[Entry]:
    """All entries, in the order of the state_dict."""
    k = c.stem_kernel
    yield from conv("conv1", c.in_channels, c.width, k, k, bias=False)
    yield from batchnorm("bn1", c.width)
    n_in = c.width
    for stage, blocks in enumerate(c.layers):
        inner = c.width * 2**stage
        for i in range(blocks):
            yield from _block(c, f"layer{stage + 1}.{i}", n_in, inner, first=i == 0, stage=stage)
            n_in = inner * c.expansion
    if c.num_classes:
        yield from linear("fc", n_in, c.num_classes)


def _block(c: Config, name: str, n_in: int, inner: int, first: bool, stage: int) -> Iterator[Entry]:
    n_out = inner * c.expansion
    if c.block == "basic":
        convs = [(n_in, inner, 3), (inner, n_out, 3)]
    else:
        convs = [(n_in, inner, 1), (inner, inner, 3), (inner, n_out, 1)]
    for i, (a, b, kernel) in enumerate(convs, 1):
        yield from conv(f"{name}.conv{i}", a, b, kernel, kernel, bias=False)
        yield from batchnorm(f"{name}.bn{i}", b)
    if first and (stage > 0 or n_in != n_out):
        yield from conv(f"{name}.downsample.0", n_in, n_out, 1, 1, bias=False)
        yield from batchnorm(f"{name}.downsample.1", n_out)


def infer(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """The Config fields that names and shapes tell; None where there are tensors of other names.

    A stem of 7 x 7 is taken to be torchvision's; of another the stride and the pool are not told.
    """
    layers = tuple(count(shapes, rf"^layer{stage}\.(\d+)\.") for stage in range(1, 5))
    if 0 in layers or not all(_NAMES.fullmatch(n) for n in shapes):
        return None
    head = any(n.startswith("fc.") for n in shapes)
    kernel = dim(shapes, r"^conv1\.weight$", 2)
    fields = {
        "block": "bottleneck" if any(".conv3." in n for n in shapes) else "basic",
        "layers": layers,
        "width": dim(shapes, r"^(conv1|bn1)\.", 0),
        "num_classes": dim(shapes, r"^fc\.(weight|bias)$", 0) if head else 0,
        "in_channels": dim(shapes, r"^conv1\.weight$", 1),
        "stem_kernel": kernel,
        "stem_stride": 2 if kernel in (7, None) else None,
        "stem_pool": True if kernel in (7, None) else None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def init(c: Config, name: str, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """As torchvision does it: convolutions normal by He 2015 with the fan out, norms one, biases
    and means zero; the head as nn.Linear starts."""
    if len(shape) == 4:
        return rng.normal(0.0, (2 / (shape[0] * shape[2] * shape[3])) ** 0.5, shape)
    if name.startswith("fc."):
        bound = (c.width * 8 * c.expansion) ** -0.5
        return rng.uniform(-bound, bound, shape)
    return np.ones(shape) if name.endswith((".weight", ".running_var")) else np.zeros(shape)
