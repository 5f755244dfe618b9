"""A recurrent layer as other implementations compute it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from convert.diagnose.repair.edit import Edit, Node
from convert.program.recurrent import recurrent as cells
from convert.program.replay import At, Change


def recurrent(node: Node) -> Iterator[Edit]:
    """Options of the reference cell."""
    if node.name != "recurrent":
        return
    cell = node.operation.args[0]
    two = node.operation.kwargs["bidirectional"]
    biases = node.operation.kwargs["has_biases"]
    layers = node.operation.kwargs["num_layers"]
    options: list[tuple[str, str, Any, str]] = []
    if two:
        options += [
            ("ways", "reversed", "ff", "both directions going forward"),
            ("ways", "reversed", "bf", "the two directions exchanged"),
            ("joined", "concat", "bf", "the two directions joined in the other order"),
            ("joined", "operation", "sum", "the two directions added up"),
            ("joined", "operation", "mean", "the mean of the two directions"),
            ("joined", "reversed", "unflipped", "the backward direction not turned round again"),
        ]
    else:
        options += [("ways", "reversed", "bb", "the sequence gone through back to front")]
    if biases:
        options += [("biases", "bias_missing", b, f"bias_{n} left out")
                    for b, n in (("i", "hh"), ("h", "ih"), ("", "ih and bias_hh"))]  # fmt: skip
    if cell == "lstm":
        options += [("order", "gates", "".join(p), f"gates in the order {','.join(p)}")
                    for p in itertools.permutations("ifgo") if p != tuple("ifgo")]  # fmt: skip
        options += [("left", "swapped", "swapped", "the first states h and c exchanged"),
                    ("forget", "forget_bias", 1.0, "1 added to the forget gate"),
                    ("left", "left_out", "c", "the first cell state zero")]  # fmt: skip
    if cell == "gru":
        options += [("order", "gates", "".join(p), f"gates in the order {','.join(p)}")
                    for p in itertools.permutations("rzn") if p != tuple("rzn")]  # fmt: skip
        options += [("reset", "gru_reset", "before", "the reset gate before the product"),
                    ("reset", "gru_bias", "bias outside", "the hidden bias outside the reset"),
                    ("update", "gru_update", "new", "the update gate's complement")]  # fmt: skip
    if node.operation.kwargs.get("sizes") is not None:
        options.append(("masked", "mask", False, "shorter sequences going on in their padding"))
    options += [("left", "left_out", "h", "the first hidden state zero")]
    for names in (("sigmoid", "tanh", "sigmoid"), ("sigmoid", "relu", "tanh"),
                  ("sigmoid", "sigmoid", "tanh"), ("sigmoid", "tanh", "relu"),
                  ("sigmoid", "relu", "relu"), ("sigmoid", "tanh", "identity"),
                  ("hard_sigmoid", "tanh", "tanh"),
                  ("keras_hard_sigmoid", "tanh", "tanh")):  # fmt: skip
        options.append(("activations", "activation", ",".join(names), f"activations {names}"))
    if layers > 1:
        options += [("stack", "swapped", "10", "the two layers exchanged"),
                    ("stack", "swapped", "00", "the first layer's weights in the second too"),
                    ("stack", "swapped", "11", "the second one in the first too")]  # fmt: skip
    for key, why, value, said in options:
        yield node.edit(1.0, why, said, _option({key: value}))
    for where, pieces in _parts(layers, 2 if two else 1):
        for key, why, value, said in options:
            if key in _STYLE:
                change = _option({key: value, "only": pieces})
                yield node.edit(1.05, why, f"{said}, in {where}", change)


def _parts(layers: int, ways: int) -> Iterator[tuple[str, list[int]]]:
    """One direction of all layers, one layer, one direction of one layer: which they are."""
    names = ("forward", "backward")
    if ways == 2:
        for way in range(2):
            yield f"the {names[way]} direction", [i * 2 + way for i in range(layers)]
    if layers > 1:
        for layer in range(layers):
            yield f"layer {layer}", [layer * ways + way for way in range(ways)]
        for i in range(layers * ways if ways == 2 else 0):
            yield f"the {names[i % 2]} direction of layer {i // 2}", [i]


_STYLE = ("order", "reset", "update", "forget", "biases", "activations")


def _option(options: dict[str, Any]) -> Change:
    def change(at: At) -> Any:
        return cells(*at.args, **{**at.kwargs, **options})

    return change
