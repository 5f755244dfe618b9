"""A graph in the order in which it runs: operations, and calls of layers as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
