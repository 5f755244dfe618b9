"""Every tensor of WaveNet. No names are in wide use, so these are plain ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from zoo.layout import Entry, conv, linear
from zoo.layout.ops import Shape
from zoo.model import count, dim
from zoo.models.wavenet.config import PRESETS, Config

MODULES = {"input", "layers", "output1", "output2"}


def layout(c: Config) -> Iterator[Entry]:
    """All entries, in the order of the state_dict."""
    R, D, S = c.residual_channels, c.gate_channels, c.skip_channels
    yield from conv("input", c.classes, R, c.kernel_size)
    for i in range(c.layers):
        layer = f"layers.{i}"
        yield from conv(f"{layer}.filter", R, D, c.kernel_size)
        yield from conv(f"{layer}.gate", R, D, c.kernel_size)
        if c.global_channels:
            yield from linear(f"{layer}.filter_global", c.global_channels, D, bias=False)
            yield from linear(f"{layer}.gate_global", c.global_channels, D, bias=False)
        if c.local_channels:
            yield from conv(f"{layer}.filter_local", c.local_channels, D, 1, bias=False)
            yield from conv(f"{layer}.gate_local", c.local_channels, D, 1, bias=False)
        yield from conv(f"{layer}.skip", D, S, 1)
        if i < c.layers - 1:
            yield from conv(f"{layer}.residual", D, R, 1)
    yield from conv("output1", S, S, 1)
    yield from conv("output2", S, c.classes, 1)


def infer(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """The Config fields that names and shapes tell; None where this is no WaveNet.

    How often the dilations start again they do not tell; where the sizes are those of a preset,
    it is taken to be as there.
    """
    layers = count(shapes, r"^layers\.(\d+)\.(?:filter|gate)\.weight$")
    if not layers or not {n.partition(".")[0] for n in shapes} >= MODULES:
        return None
    fields = {
        "classes": dim(shapes, r"^output2\.(weight|bias)$", 0),
        "layers": layers,
        "kernel_size": dim(shapes, r"\.(filter|gate)\.weight$", 2),
        "residual_channels": dim(shapes, r"\.(filter|gate)\.weight$", 1),
        "gate_channels": dim(shapes, r"\.(filter|gate)\.(weight|bias)$", 0),
        "skip_channels": dim(shapes, r"\.skip\.(weight|bias)$", 0),
        "global_channels": dim(shapes, r"\.(filter|gate)_global\.weight$", 1) or 0,
        "local_channels": dim(shapes, r"\.(filter|gate)_local\.weight$", 1) or 0,
    }
    found = {name: value for name, value in fields.items() if value is not None}
    same = [p for p in PRESETS.values() if all(getattr(p, k) == v for k, v in found.items())]
    return found | {"dilation_cycle": same[0].dilation_cycle} if len(same) == 1 else found
