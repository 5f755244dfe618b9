"""Every tensor of a DQN, under the names that stable-baselines3 gives it."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from zoo.layout import Entry, conv, linear
from zoo.layout.ops import Shape
from zoo.model import dim
from zoo.models.dqn.config import CONVOLUTIONS, Config


def layout(c: Config) -> Iterator[Entry]:
    """All entries, in the order of the state_dict."""
    for net in ("q_net", "q_net_target")[: 1 + c.target]:
        size = math.prod(c.obs_shape)
        if c.images:
            channels = c.obs_shape[0]
            for i, (out, kernel, _) in enumerate(CONVOLUTIONS):
                yield from conv(
                    f"{net}.features_extractor.cnn.{2 * i}", channels, out, kernel, kernel
                )
                channels = out
            yield from linear(
                f"{net}.features_extractor.linear.0", math.prod(c.convolved), c.features_dim
            )
            size = c.features_dim
        sizes = (size, *c.net_arch, c.actions)
        for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
            yield from linear(f"{net}.q_net.{2 * i}", n_in, n_out)


_NAMES = re.compile(
    r"(q_net|q_net_target)\.(features_extractor\.(cnn\.[024]|linear\.0)|q_net\.\d*[02468])\."
    r"(weight|bias)"
)


def infer(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """The Config fields that names and shapes tell; None where there are tensors of other names.

    Of an image's size they tell only what is left of it after the convolutions: the smallest that
    gives this, as near a square as can be.
    """
    if not shapes or not all(_NAMES.fullmatch(name) for name in shapes):
        return None
    nets = {name.partition(".")[0] for name in shapes}
    if "q_net" not in nets:
        return None
    steps = {int(m[1]) for n in shapes if (m := re.search(r"\.q_net\.(\d+)\.", n))}
    sizes = [dim(shapes, rf"\.q_net\.{i}\.(weight|bias)$", 0) for i in sorted(steps)]
    if not sizes:
        return None
    fields: dict[str, Any] = {
        "actions": sizes[-1],
        "net_arch": tuple(sizes[:-1]),
        "target": "q_net_target" in nets,
    }
    if not any(".features_extractor." in name for name in shapes):
        size = dim(shapes, r"\.q_net\.0\.weight$", 1)
        return fields if size is None else {**fields, "obs_shape": (size,)}
    channels = dim(shapes, r"\.cnn\.0\.weight$", 1) or 4
    flat = dim(shapes, r"\.linear\.0\.weight$", 1) or 3136
    fields["obs_shape"] = (channels, *_image(flat // CONVOLUTIONS[-1][0]))
    fields["features_dim"] = dim(shapes, r"\.linear\.0\.(weight|bias)$", 0) or 512
    return fields


def _image(cells: int) -> tuple[int, int]:
    """The smallest height and width of which the convolutions leave `cells`, height <= width."""
    rows = next((n for n in range(math.isqrt(cells), 0, -1) if cells % n == 0), 1)
    height, width = rows, max(cells // rows, 1)
    for _, kernel, stride in reversed(CONVOLUTIONS):
        height, width = (height - 1) * stride + kernel, (width - 1) * stride + kernel
    return height, width
