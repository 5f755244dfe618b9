"""The new graph while it is made: where each array lies, in which orders, and what turns it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from convert.porting.image_axes.axis_operations import PERMUTE, UNSQUEEZE
from convert.porting.image_axes.orders import (
    Order,
    channels_moved,
    in_order,
    plain,
    trailing,
    turn,
)
from convert.porting.image_axes.traversal import GraphStep, shape_of
from convert.porting.rendering.scopes import Scope, Tree
from convert.program.called_modules import ModuleCall
from convert.program.graph import ArrayType, CodeLine, GraphNode, ValueRef, mapped

_APART = 4096  # between the numbers of two values: room for what is put in


class Emitting:
    """`placed` are the orders of what comes from outside, by value; `wanted` those in which arrays
    are asked for. Values of the old graph are named by their old numbers."""

    def __init__(
        self, tree: Tree, wanted: Mapping[int, Order], placed: Mapping[int, Order]
    ) -> None:
        self.tree, self.wanted = tree, wanted
        self.nodes: list[GraphNode] = []
        self.types: dict[int, Any] = {self.number(v): t for v, t in tree.graph.types.items()}
        self.orders: dict[int, Order] = {}  # of new values that lie in another order than torch's
        self.reasons: dict[int, str] = {}
        self.lists: dict[int, list[Order]] = {}  # of the arrays in a list, by its old value
        self.layers: set[str] = set()  # whose data has channels last
        self.others: set[str] = set()  # whose data has torch's order
        self.asked: dict[int, set[Order]] = {}  # of what comes from outside
        self.now = {v: self.number(v) for v in tree.graph.types}  # old value -> the new one
        self._arguments: dict[int, dict[int, int]] = {}  # of a layer's call
        self._versions: dict[tuple[int, Order], list[tuple[int, Scope]]] = {}
        self._next: dict[int, int] = {}
        self._outer = {p.value for p in tree.graph.placeholders}
        self._giver = _givers(tree.root)
        for value, order in placed.items():
            self._lies(self.now[value], shape_of(tree, value), order)

    def number(self, value: int) -> int:
        """The number that a value has in the new graph, if it stays the one that it is."""
        return value * _APART

    def order(self, value: int) -> Order:
        """The order in which an array lies."""
        return self.orders.get(self.now[value], plain(len(shape_of(self.tree, value))))

    def lies(self) -> dict[int, Order]:
        """The orders of the arrays that do not lie as in torch, by their old values."""
        return {v: self.orders[new] for v, new in self.now.items() if new in self.orders}

    def _lies(self, new: int, shape: Sequence[Any], order: Order) -> None:
        kind = self.types[new]
        self.types[new] = ArrayType(tuple(in_order(shape, order)), kind.dtype)
        if order != plain(len(order)):
            self.orders[new] = order

    # -- arguments ------------------------------------------------------------------------------

    def plainly(self, x: Any) -> Any:
        """An argument of the whole graph, in torch's order."""
        assert not isinstance(x, ValueRef) or self.now[x.value] not in self.orders
        return mapped(x, lambda ref: ValueRef(self.now[ref.value]), lambda d: d)

    def fitted(self, value: int, order: Order, step: GraphStep, why: str) -> int:
        """The new value that is an array in this order, turned before the step if it lies in
        another."""
        if value in self._outer:
            self.asked.setdefault(value, set()).add(order)
        lies = self.order(value)
        if lies == order:
            return self.now[value]
        for new, scope in self._versions.get((value, order), ()):
            if scope is step.scope:
                return new
        shape = shape_of(self.tree, value)
        new = self.put_in(
            step, PERMUTE, [ValueRef(self.now[value]), list(turn(lies, order))], self._dtype(value)
        )
        self._lies(new, shape, order)
        self.reasons[new] = why
        self._versions.setdefault((value, order), []).append((new, step.scope))
        return new

    def beside(self, value: int, order: Order, step: GraphStep) -> int:
        """The new value that broadcasts as an array does in torch, beside one in this order."""
        shape = shape_of(self.tree, value)
        if all(s == 1 for s in shape):
            return self.now[value]
        own, ones = trailing(order, len(shape))
        new = self.fitted(value, own, step, "")
        lies = in_order(shape, own)
        for at in ones:
            lies.insert(at, 1)
            made = self.put_in(step, UNSQUEEZE, [ValueRef(new), at], self._dtype(value))
            self.types[made] = ArrayType(tuple(lies), self._dtype(value))
            new = made
        return new

    def _dtype(self, value: int) -> str:
        return str(self.tree.type_of(value).dtype)

    # -- operations -----------------------------------------------------------------------------

    def put_in(
        self, step: GraphStep, op: str, args: list[Any], dtype: str, after: bool = False
    ) -> int:
        """An operation of ours just before a step, or behind it; its type is to be said."""
        if step.node is not None:
            base = self.number(step.node.made)
        else:
            assert step.layer is not None
            base = self.number(step.layer.call.end if after else step.layer.call.begin)
        base += 1 if after else -(_APART // 2)
        new = self._number_in(base)
        self.types[new] = ArrayType((), dtype)
        frames = step.frames()
        site = step.node.site if step.node is not None else None
        self.nodes.append(GraphNode(op, tuple(args), {}, new, step.scope.path, "", site, frames))
        return new

    def size(self, size: int | str) -> int | ValueRef:
        """A size as an argument."""
        if isinstance(size, int):
            return size
        made = -1 - len(self.types)  # of nothing that runs
        self.types[made] = size
        return ValueRef(made)

    def _number_in(self, base: int) -> int:
        self._next[base] = self._next.get(base, -1) + 1
        return base + self._next[base]

    def give(
        self,
        step: GraphStep,
        op: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        order: Order | list[Order] | None = None,
    ) -> None:
        """What stands for a step's operation; its result lies in `order`, torch's if none is
        said."""
        node = step.node
        assert node is not None
        new = self.number(node.made)
        self.nodes.append(
            dataclasses.replace(node, op=op, args=tuple(args), kwargs=dict(kwargs), made=new)
        )
        kind = self.tree.type_of(node.made)
        if isinstance(order, list):
            self.types[new] = [
                ArrayType(tuple(in_order(t.shape, o)), t.dtype)
                for t, o in zip(kind, order, strict=True)
            ]
            self.lists[node.made] = order
        elif order is not None:
            self._lies(new, kind.shape, order)
        self.settle(step, node.made)

    def settle(self, step: GraphStep, value: int) -> None:
        """Turn what a step gave into the order in which it is asked for, if it lies as in torch."""
        wanted = self.wanted.get(value)
        kind = self.tree.type_of(value)
        if wanted is None or not isinstance(kind, ArrayType) or len(wanted) != len(kind.shape):
            return
        lies = self.order(value)
        if lies != plain(len(lies)):
            return
        before = self.now[value]
        new = self.put_in(
            step, PERMUTE, [ValueRef(before), list(turn(lies, wanted))], kind.dtype, after=True
        )
        self._lies(new, kind.shape, wanted)
        self.reasons[new] = "channels last from here on"
        self._versions.setdefault((value, lies), []).append((before, step.scope))
        self.now[value] = new

    # -- calls and results ----------------------------------------------------------------------

    def called(self, step: GraphStep, given: Mapping[int, int]) -> None:
        """A layer's call, with new values for the arrays that it is given."""
        assert step.layer is not None
        self._arguments[id(step.layer.call)] = dict(given)
        own = {n.made for n in step.layer.nodes()}
        for node in step.layer.nodes():
            args, kwargs = mapped(
                [list(node.args), list(node.kwargs.values())],
                lambda ref: ValueRef(
                    self.number(ref.value)
                    if ref.value in own
                    else given.get(ref.value, self.now.get(ref.value, self.number(ref.value)))
                ),
                lambda d: d,
            )
            kwargs = dict(zip(node.kwargs, kwargs, strict=True))
            new = self.number(node.made)
            self.nodes.append(dataclasses.replace(node, args=tuple(args), kwargs=kwargs, made=new))

    def call(self, call: ModuleCall) -> ModuleCall:
        """A call in the new graph."""
        given = self._arguments.get(id(call), {})

        def placed(tree: Any) -> Any:
            if isinstance(tree, dict):
                return {k: placed(x) for k, x in tree.items()}
            if isinstance(tree, list):
                return [placed(x) for x in tree]
            if not isinstance(tree, ValueRef):
                return tree
            known = self.now.get(tree.value, self.number(tree.value))
            return ValueRef(given.get(tree.value, known))

        return dataclasses.replace(
            call,
            begin=self.number(call.begin),
            end=self.number(call.end),
            arguments=placed(call.arguments),
            results=placed(call.results),
        )

    def laid(self, step: GraphStep, value: int, order: Order) -> None:
        """Say in which order a layer's result lies."""
        self._lies(self.now[value], shape_of(self.tree, value), order)
        self.settle(step, value)

    def result(self, x: Any) -> Any:
        """A result of the whole graph: images stay as they lie, others get torch's order."""
        if not isinstance(x, ValueRef):
            return x
        order = self.order(x.value)
        is_image = len(order) > 3 and channels_moved(order)
        if order == plain(len(order)) or is_image:
            return ValueRef(self.now[x.value])
        new = self._number_in(self.number(self.tree.root.call.end) - _APART // 2)
        args = (ValueRef(self.now[x.value]), list(turn(order, plain(len(order)))))
        self.types[new] = ArrayType((), self._dtype(x.value))
        frames = self._giver[x.value]
        self.nodes.append(GraphNode(PERMUTE, args, {}, new, frames=frames))
        self._lies(new, shape_of(self.tree, x.value), plain(len(order)))
        self.reasons[new] = "torch's axes"
        return ValueRef(new)


def _givers(root: Scope) -> dict[int, tuple[CodeLine, ...]]:
    """Where in the root's own code each value comes from."""
    found: dict[int, tuple[CodeLine, ...]] = {}
    for item in root.items:
        nodes = list(item.nodes()) if isinstance(item, Scope) else [item]
        for node in nodes:
            deep = isinstance(item, Scope) and item.depth > root.depth
            found[node.made] = node.frames[: item.depth] if deep else node.frames  # type: ignore[union-attr]
    return found
