"""A graph in the order in which it runs: operations, and calls of layers as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from convert.porting.image_axes.axis_operations import GETITEM
from convert.porting.image_axes.image_layer_axes import Kind, kind_of
from convert.porting.rendering.layer_calls import LayerCalls
from convert.porting.rendering.scopes import Scope, Tree
from convert.program.graph import ArrayType, CodeLine, GraphNode, ValueRef, refs


@dataclass(frozen=True, eq=False)
class GraphStep:
    """One operation (`node`) or call of a layer (`layer`), in the call `scope`."""

    scope: Scope
    node: GraphNode | None = None
    layer: Scope | None = None

    def frames(self) -> tuple[CodeLine, ...]:
        """Where it stands, in the code of its call."""
        if self.node is not None:
            return self.node.frames
        assert self.layer is not None
        first = next(self.layer.nodes(), None)
        own = () if first is None else first.frames
        return own[: self.layer.depth] if self.layer.depth > self.scope.depth else own

    def arrays(self, tree: Tree) -> list[int]:
        """The arrays that it takes, as its arguments."""
        if self.node is not None:
            return tree.taken(self.node)
        assert self.layer is not None
        given = refs(list(self.layer.call.arguments.values()))
        return [v for v in given if tree.is_array(v)]

    def made(self) -> list[int]:
        """What it gives."""
        if self.node is not None:
            return [self.node.made]
        assert self.layer is not None
        results = [r.value for r in self.layer.call.results if isinstance(r, ValueRef)]
        return list(dict.fromkeys(results))


def steps(scope: Scope, layers: LayerCalls) -> Iterator[GraphStep]:
    """Every step of a call, calls inside it opened but for layers."""
    for item in scope.items:
        if isinstance(item, GraphNode):
            yield GraphStep(scope, node=item)
        elif layers.is_layer(item):
            yield GraphStep(scope, layer=item)
        else:
            yield from steps(item, layers)


_NORM = "aten._native_batch_norm_legit_no_training.default"


def with_plain_norms(tree: Tree, every: Sequence[GraphStep]) -> list[GraphStep]:
    """The steps with F.batch_norm of evaluation as one operation, where only what it normalises is
    taken of all that it gives."""
    norms = {s.node.made: s.node for s in every if s.node is not None and s.node.op == _NORM}
    for step in every:
        node = step.node
        picks = node is not None and node.op == GETITEM and node.args[1] == 0
        for value in () if picks else step.arrays(tree):
            norms.pop(value, None)
    made = []
    for step in every:
        node = step.node
        if node is not None and node.made in norms:
            continue
        if node is not None and node.op == GETITEM and node.args[0].value in norms:
            norm = norms[node.args[0].value]
            args = (*norm.args[:5], False, *norm.args[5:])
            node = replace(norm, op="aten.batch_norm.default", args=args, made=node.made)
            step = replace(step, node=node)
        made.append(step)
    return made


def layer_kind(layer: Scope, tree: Tree) -> Kind:
    """What a layer does with its array's axes; "plain" for one that takes several."""
    given = [v for v in refs(list(layer.call.arguments.values())) if tree.is_array(v)]
    kind = tree.type_of(given[0]) if given else None
    if len(given) != 1 or not isinstance(kind, ArrayType):
        return "plain"
    return kind_of(layer.module, len(kind.shape))


def shape_of(tree: Tree, value: int) -> tuple[Any, ...]:
    """The shape of an array in torch's axes; () of a list of arrays."""
    kind = tree.type_of(value)
    return tuple(kind.shape) if isinstance(kind, ArrayType) else ()
