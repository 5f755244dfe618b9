"""Every tensor of a small convolutional classifier."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from zoo.layout import Entry, conv, flat_linear, linear
from zoo.layout.ops import Shape
from zoo.model import count, dim
from zoo.models.convnet.config import PRESETS, Config


def layout(c: Config) -> Iterator[Entry]:
    """All entries, in the order of the state_dict."""
    for i, (n_in, n_out) in enumerate(itertools.pairwise((c.in_channels, *c.channels)), 1):
        yield from conv(f"conv{i}", n_in, n_out, c.kernel_size, c.kernel_size)
    first, *widths = *c.hidden, c.num_classes
    yield from flat_linear("fc1", c.channels[-1], (c.side, c.side), first)
    for i, (n_in, n_out) in enumerate(itertools.pairwise((first, *widths)), 2):
        yield from linear(f"fc{i}", n_in, n_out)


def infer(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """The Config fields that names and shapes tell; None where there are tensors of other names.

    Stride, padding and pools they do not tell. A preset with the same convolutions and as many
    columns in `fc1` tells them; elsewhere `image_size` is that of a network with the defaults.
    """
    convs, fcs = count(shapes, r"^conv(\d+)\."), count(shapes, r"^fc(\d+)\.")
    if not convs or not fcs or not all(_is_ours(n, s) for n, s in shapes.items()):
        return None
    names = {f"conv{i + 1}" for i in range(convs)} | {f"fc{i + 1}" for i in range(fcs)}
    if {n.partition(".")[0] for n in shapes} != names:
        return None
    *hidden, num_classes = (_outputs(shapes, f"fc{i + 1}") for i in range(fcs))
    channels = tuple(_outputs(shapes, f"conv{i + 1}") for i in range(convs))
    n_in = dim(shapes, r"^conv1\.weight$", 1)
    kernel = dim(shapes, r"^conv\d+\.weight$", 2)
    side = _side(dim(shapes, r"^fc1\.weight$", 1), channels[-1])
    told = {"channels": channels, "hidden": tuple(hidden), "num_classes": num_classes}
    for p in PRESETS.values():
        maybe = ((n_in, p.in_channels), (kernel, p.kernel_size), (side, p.side))
        if channels == p.channels and all(found in (own, None) for found, own in maybe):
            return vars(p) | told
    if n_in is None or kernel is None or side is None:
        return None
    image = _image_size(side, convs, kernel)
    return told | {"in_channels": n_in, "kernel_size": kernel, "image_size": image}


def _is_ours(name: str, shape: Shape) -> bool:
    axes = {"conv": 4, "fc": 2}
    found = re.fullmatch(r"(conv|fc)\d+\.(weight|bias)", name)
    return found is not None and len(shape) == (1 if found[2] == "bias" else axes[found[1]])


def _outputs(shapes: Mapping[str, Shape], module: str) -> int:
    return dim(shapes, rf"^{module}\.(weight|bias)$", 0) or 1


def _side(columns: int | None, channels: int) -> int | None:
    """Of the square that each channel is before `fc1`; None where it is none."""
    side = math.isqrt((columns or 0) // channels)
    return side if side and side * side * channels == columns else None


def _image_size(side: int, convs: int, kernel_size: int) -> int:
    """The image that comes down to `side` without padding or strides, but with pools."""
    for _ in range(convs):
        side = side * 2 + kernel_size - 1
    return side
