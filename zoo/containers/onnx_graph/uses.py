"""What the graph does with each stored tensor: by which operation it is taken, as what, and how its
axes then lie. Read off the operations in their order; nothing is inferred from a shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from zoo.containers.onnx_graph.messages import Graph, Node

Axes = tuple[int, ...]
# What a tensor is to the operation that takes it. A matrix is one of a linear map: "in_out" is
# x @ W, "out_in" is x @ W.T.
Role = Literal[
    "in_out", "out_in", "conv", "table", "scale", "bias", "mean", "var", "gates", "other"
]

_PLAIN_DOMAINS = ("", "ai.onnx", "pkg.onnxscript.torch_lib", "com.microsoft")
_SLOTS: dict[str, dict[int, Role]] = {
    "Conv": {1: "conv", 2: "bias"},
    "FusedConv": {1: "conv", 2: "bias"},
    "ConvTranspose": {1: "conv", 2: "bias"},
    "BatchNormalization": {1: "scale", 2: "bias", 3: "mean", 4: "var"},
    "InstanceNormalization": {1: "scale", 2: "bias"},
    "LayerNormalization": {1: "scale", 2: "bias"},
    "SkipLayerNormalization": {2: "scale", 3: "bias"},
    "GroupNormalization": {1: "scale", 2: "bias"},
    "RMSNormalization": {1: "scale"},
    "SimplifiedLayerNormalization": {1: "scale"},
    "PRelu": {1: "scale"},
    "Gather": {0: "table"},
    "LSTM": {1: "gates", 2: "gates", 3: "gates"},
    "GRU": {1: "gates", 2: "gates", 3: "gates"},
    "RNN": {1: "gates", 2: "gates", 3: "gates"},
}
_THROUGH = {"Identity", "Cast", "CastLike"}


@dataclass(frozen=True, slots=True)
class Use:
    """One operation that takes a stored tensor. `turned` are the axes in which it is taken, of
    those stored (None: as they are); `order` is its place among all."""

    role: Role
    node: Node
    slot: int
    order: int
    turned: Axes | None = None
    beside: str | None = None  # the module whose bias is added to what a matrix makes, by its name

    @property
    def scopes(self) -> list[str]:
        """The paths that the torch module may have that this was exported from."""
        if self.node.scope is not None:
            return [self.node.scope]
        beside = [] if self.beside is None else [self.beside]
        return list(dict.fromkeys(beside + _paths(self.node.name)))


def uses_of(graph: Graph, ranks: Mapping[str, int]) -> dict[str, list[Use]]:
    """Stored tensor -> what takes it, in the graph's order. `ranks` has every stored tensor."""
    seen: dict[str, tuple[str, Axes | None]] = {name: (name, None) for name in ranks}
    found: dict[str, list[Use]] = {name: [] for name in ranks}
    biases = _biases(graph, ranks)
    for order, node in enumerate(_every(graph)):
        if node.op in _THROUGH and node.inputs and node.inputs[0] in seen:
            seen[node.outputs[0]] = seen[node.inputs[0]]
            continue
        if node.op == "Transpose" and node.inputs and node.inputs[0] in seen:
            name, axes = seen[node.inputs[0]]
            rank = ranks[name]
            turn = node.ints.get("perm", tuple(reversed(range(rank))))
            if sorted(turn) == list(range(rank)):
                before = axes or tuple(range(rank))
                seen[node.outputs[0]] = name, tuple(before[a] for a in turn)
                continue
        for slot, given in enumerate(node.inputs):
            if given in seen:
                name, axes = seen[given]
                role = _role(node, slot, ranks[name])
                beside = biases.get(node.outputs[0]) if node.outputs and slot == 1 else None
                found[name].append(Use(role, node, slot, order, axes, beside))
    return found


def _biases(graph: Graph, ranks: Mapping[str, int]) -> dict[str, str]:
    """The result of a matrix or a convolution -> the module whose `bias` is added to it, by the
    name that the bias has kept."""
    found: dict[str, str] = {}
    for node in _every(graph):
        of: str | None = None
        if node.op in ("Gemm", "Conv", "ConvTranspose") and len(node.inputs) > 2:
            of, bias = (node.outputs or [""])[0], node.inputs[2]
        elif node.op == "Add" and len(node.inputs) == 2:
            bias = next((n for n in node.inputs if ranks.get(n) == 1), "")
            of = next((n for n in node.inputs if n != bias), None)
        if of and bias in ranks and bias.endswith(".bias"):
            found.setdefault(of, bias.removesuffix(".bias"))
    return found


def _every(graph: Graph) -> Iterator[Node]:
    for node in graph.nodes:
        yield node
        for inner in node.graphs:
            yield from _every(inner)


def _role(node: Node, slot: int, rank: int) -> Role:
    if node.domain not in _PLAIN_DOMAINS:
        return "other"
    factor = node.floats.get("beta" if slot == 2 else "alpha", 1.0)
    if node.op == "Gemm" and factor != 1.0:
        return "other"  # what the model has is a multiple of what is stored
    if node.op in ("MatMul", "FusedMatMul", "Gemm") and slot < 2 and rank == 2:
        flag = ("transB" if slot else "transA", "transpose_b" if slot else "transpose_a")
        turned = any(node.ints.get(f, (0,))[0] for f in flag)
        # On the right it is (in, out); on the left W @ x has it (out, in).
        return "in_out" if (slot == 1) != turned else "out_in"
    if node.op == "Gemm" and slot == 2:
        return "bias"
    if node.op == "Add" and rank == 1:
        return "bias"
    if node.op == "Mul" and rank == 1:
        return "scale"
    if node.op == "Gather" and rank < 2:
        return "other"  # numbers that the code looks up
    return _SLOTS.get(node.op, {}).get(slot, "other")


def _paths(name: str) -> list[str]:
    """The module paths that a node's name may mean, as torch's older exporter writes them:
    /layer1/layer1.0/conv1/Conv is layer1.0.conv1, where a Sequential's child is called by its
    whole path below the parent; or a module of that name in one of it."""
    if not name.startswith("/"):
        return []
    parts = name.split("/")[1:-1]
    if name.endswith("Fusion"):  # what onnxruntime makes of two operations, after the first's name
        parts = parts[:-1]
    short: list[str] = []
    for part in parts:
        if short and part.startswith(short[-1] + "."):
            short[-1] = part
        else:
            short.append(part)
    return list(dict.fromkeys([".".join(short), ".".join(parts)]))
