"""Every tensor of AlexNet, under the names that torchvision publishes it with."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from zoo.layout import Entry, conv, flat_linear, linear
from zoo.layout.ops import Shape
from zoo.model import dim
from zoo.models.alexnet.config import Config

CONVS = {0: 11, 3: 5, 6: 3, 8: 3, 10: 3}  # place in `features` -> kernel
POOLED = (6, 6)  # what the adaptive pool gives, whatever the image

_NAMES = re.compile(r"(features\.(0|3|6|8|10)|classifier\.[146])\.(weight|bias)")


def layout(c: Config) -> Iterator[Entry]:
    """All entries, in the order of the state_dict."""
    n_in = 3
    for (i, kernel), n_out in zip(CONVS.items(), c.channels, strict=True):
        yield from conv(f"features.{i}", n_in, n_out, kernel, kernel)
        n_in = n_out
    yield from flat_linear("classifier.1", n_in, POOLED, c.hidden_size)
    yield from linear("classifier.4", c.hidden_size, c.hidden_size)
    yield from linear("classifier.6", c.hidden_size, c.num_classes)


def infer(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """The Config fields that names and shapes tell; None where there are tensors of other names."""
    if not shapes or not all(_NAMES.fullmatch(n) for n in shapes):
        return None
    channels = [dim(shapes, rf"^features\.{i}\.(weight|bias)$", 0) for i in CONVS]
    if None in channels:
        return None
    fields = {
        "channels": tuple(channels),
        "hidden_size": dim(shapes, r"^classifier\.[14]\.(weight|bias)$", 0),
        "num_classes": dim(shapes, r"^classifier\.6\.(weight|bias)$", 0),
    }
    return {name: value for name, value in fields.items() if value is not None}
