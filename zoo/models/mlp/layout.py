"""Every tensor of a multilayer perceptron."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from zoo.layout import Entry, linear
from zoo.layout.ops import Shape
from zoo.model import count
from zoo.models.mlp.config import PRESETS, Config

_NAMES: dict[Literal["fc", "sequential"], str] = {
    "fc": r"^fc([1-9]\d*)\.(?:weight|bias)$",
    "sequential": r"^(\d*[02468])\.(?:weight|bias)$",
}


def layout(c: Config) -> Iterator[Entry]:
    """All entries, in the order of the state_dict."""
    for name, (n_in, n_out) in zip(c.names, itertools.pairwise(c.sizes), strict=True):
        yield from linear(name, n_in, n_out)


def infer(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """The Config fields that names and shapes tell; None where there are tensors of other names.

    What the activations are, only a preset of these very sizes tells.
    """
    for naming, pattern in _NAMES.items():
        if not shapes or not all(re.search(pattern, n) for n in shapes):
            continue
        layers = count(shapes, pattern)
        names = Config((1,) * (layers + 1), naming=naming).names
        if {n.partition(".")[0] for n in shapes} != set(names):
            return None
        n_in, *rest = _sizes(shapes, names)
        for preset in PRESETS.values():
            same = preset.naming == naming and preset.sizes[1:] == tuple(rest)
            if same and n_in in (preset.sizes[0], None):
                return dict(vars(preset))
        return {"sizes": (n_in, *rest), "naming": naming} if n_in else None
    return None


def _sizes(shapes: Mapping[str, Shape], names: Sequence[str]) -> list[int | None]:
    """What most of the tensors on either side of each width say; None where nothing says it."""
    sizes = []
    for before, after in itertools.pairwise((None, *names, None)):
        told = [shapes.get(f"{before}.weight", ())[:1], shapes.get(f"{before}.bias", ())[:1]]
        told.append(shapes.get(f"{after}.weight", ())[1:2])
        votes = Counter(size for part in told for size in part)
        sizes.append(votes.most_common(1)[0][0] if votes else None)
    return sizes
