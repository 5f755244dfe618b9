"""ONNX's recurrent operations hold the layers of torch's, gates in another order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from zoo.containers.onnx_graph import OnnxReader, Source
from zoo.containers.onnx_graph.messages import Node

# Where torch's gates stand among ONNX's: i, f, g, o of i, o, f, c; r, z, n of z, r, h.
_ORDER = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}


def recurrent(reader: OnnxReader) -> Iterator[tuple[str, Source]]:
    """torch's name -> what it is made of, for every recurrent operation that says which module it
    is of: the layers of one in the order in which they run."""
    layers: Counter[str] = Counter()
    seen: set[int] = set()
    every = [u for uses in reader.uses.values() for u in uses if u.role == "gates"]
    for use in sorted(every, key=lambda u: u.order):
        if use.order in seen:
            continue
        seen.add(use.order)
        for scope in use.scopes[:1]:
            yield from _layer(reader, use.node, scope, layers[scope])
            layers[scope] += 1


def _layer(reader: OnnxReader, node: Node, scope: str, layer: int) -> Iterator[tuple[str, Source]]:
    order = _ORDER[node.op]
    gates = len(order)
    if node.op == "GRU" and node.ints.get("linear_before_reset", (0,))[0] != 1:
        return  # another formula than torch's
    held = [reader.stored.get(n) for n in node.inputs[1:4]]
    ranks = [len(i.shape) if i else 0 for i in held]
    if ranks[:2] != [3, 3]:
        return
    prefix = f"{scope}." if scope else ""
    for way in range(held[0].shape[0] if held[0] else 0):
        end = f"_l{layer}" + ("_reverse" if way else "")
        for name, stored in zip(("weight_ih", "weight_hh"), node.inputs[1:3], strict=False):
            yield prefix + name + end, Source(stored, None, (way,), gates, order)
        if ranks[2:] == [2]:
            for half, name in enumerate(("bias_ih", "bias_hh")):
                blocks = tuple(half * gates + g for g in order)
                yield prefix + name + end, Source(node.inputs[3], None, (way,), 2 * gates, blocks)
