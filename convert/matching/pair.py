"""Two modules that should be one model, and inputs for both: what all levels above `bits` take.

The zoo's twins are such a pair, and so are a user's own two modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from convert.runtime.call import Call
from zoo.layout import Layout
from zoo.layout.ops import Ops


@dataclass(frozen=True)
class Match:
    """Parameters or running statistics of equal values: `ops` lead from torch's to Flax's."""

    torch: tuple[str, ...]  # names in the torch state_dict
    flax: tuple[str, ...]  # dotted paths, "conv1.kernel"; for Linen without the collection
    ops: Ops = ()
    kind: str = "param"  # as in zoo.layout: linear, conv2d, norm, batchnorm, ...


@dataclass(frozen=True)
class LayerPair:
    """Two layers that should compute the same."""

    torch: str  # dotted name, "" for the whole
    flax: str  # dotted path
    kind: str  # as in zoo.layout where it is one of those, else the torch class's name
    why: str = "name"  # "name", "order", "values", "given": by what it was found
    alternatives: int = 0  # other layers of Flax's that would fit by kind and sizes


@dataclass(frozen=True)
class Pair:
    """`torch` is a torch.nn.Module, `flax` an nnx.Module or a bound flax.linen.Module; both in the
    mode (train or eval) in which they shall be compared.

    `layers` are the user's own pairs, torch name -> Flax path. `matches` None: to be found from
    the layers; the zoo's twins have theirs from the layout.
    """

    torch: Any
    flax: Any
    call: Call
    flax_call: Call
    layers: Mapping[str, str] = field(default_factory=dict)
    matches: tuple[Match, ...] | None = None


def layout_matches(layout: Layout) -> tuple[Match, ...]:
    """The matches that a layout states."""
    return tuple(
        Match(
            tuple(t.name for t in view.entry.torch),
            tuple(t.name for t in view.tensors),
            view.ops,
            view.entry.kind,
        )
        for view in layout.view("nnx")
        if view.tensors
    )
