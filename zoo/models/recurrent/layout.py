"""Every tensor of the recurrent nets, under the names of the published checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from zoo.layout import Entry, embedding, linear, recurrent
from zoo.layout.ops import Shape
from zoo.model import count, dim
from zoo.models.recurrent.config import GATES, PRESETS, Config

UNKNOWN = frozenset({"nonlinearity", "batch_first"})  # names and shapes do not tell these

_LEAF = r"(weight|bias)_(ih|hh)_l\d+(_reverse)?"


def layout(c: Config) -> Iterator[Entry]:
    """All entries, in the order of the state_dict."""
    if c.vocab_size is not None:
        yield from embedding("embedding", c.vocab_size, c.input_size)
    gates = GATES[c.cell]
    yield from recurrent(c.cell, gates, c.input_size, c.hidden_size, c.num_layers, c.bidirectional)
    if c.head == "last":
        yield from linear("fc", c.features, c.output_size)
    else:
        yield from linear("fc1", c.features, c.fc_size)
        yield from linear("fc2", c.fc_size, c.output_size)


def infer(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """The Config fields that names and shapes tell; None where there are tensors of other names.

    If exactly one preset has these sizes, nonlinearity and batch_first are taken from it.
    """
    cells = [cell for cell in GATES if any(re.fullmatch(rf"{cell}\.{_LEAF}", n) for n in shapes)]
    modules = {n.partition(".")[0] for n in shapes} - {"embedding"}
    if len(cells) != 1 or modules not in ({cells[0], "fc"}, {cells[0], "fc1", "fc2"}):
        return None
    (cell,) = cells
    fields = {
        "cell": cell,
        "input_size": dim(shapes, rf"^{cell}\.weight_ih_l0(_reverse)?$", 1),
        "hidden_size": dim(shapes, rf"^{cell}\.weight_hh_l\d+(_reverse)?$", 1),
        "num_layers": count(shapes, rf"^{cell}\.\w+_l(\d+)"),
        "bidirectional": any(n.endswith("_reverse") for n in shapes),
        "vocab_size": dim(shapes, r"^embedding\.weight$", 0),
        "head": "last" if "fc" in modules else "every",
        "fc_size": dim(shapes, r"^fc1\.(weight|bias)$", 0),
        "output_size": dim(shapes, r"^fc2?\.(weight|bias)$", 0),
    }
    # What is None is not told, but for vocab_size, where it says that there is no embedding.
    told = {name: value for name, value in fields.items() if value is not None}
    if cell != "rnn":
        told["nonlinearity"] = "tanh"  # only an RNN has a choice; do not ask for it
    alike = [
        preset
        for preset in PRESETS.values()
        if fields["vocab_size"] == preset.vocab_size
        and all(getattr(preset, name) == value for name, value in told.items())
    ]
    if len(alike) == 1:
        told |= {name: getattr(alike[0], name) for name in UNKNOWN}
    return told
