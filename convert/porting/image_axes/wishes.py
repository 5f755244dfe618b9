"""Which arrays had better lie with channels last from where they are made: asked from the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from convert.porting.image_axes.axis_operations import (
    ALONG,
    GETITEM,
    PADS,
    REDUCE,
    SIZED,
    UNSQUEEZE,
    VIEWS,
    argument,
    elementwise,
    listed,
    permutation,
)
from convert.porting.image_axes.image_operations import image_operation
from convert.porting.image_axes.orders import (
    Order,
    before_permuted,
    before_reshaped,
    last,
    plain,
    trailing,
    without,
)
from convert.porting.image_axes.traversal import GraphStep, layer_kind, shape_of
from convert.porting.rendering.scopes import Tree
from convert.program.graph import GraphNode


class Wishes:
    """`of` are the orders that arrays are wanted in, by value: where several are, that of the
    first who asks. `images`: whether anything asks by itself. `lies` are the orders that arrays
    have where nobody asks."""

    def __init__(
        self, tree: Tree, every: Sequence[GraphStep], lies: Mapping[int, Order] | None = None
    ) -> None:
        self.tree, self.lies = tree, lies or {}
        self.of: dict[int, Order] = {}
        self.images = False
        for step in reversed(every):
            if step.layer is not None:
                self._layer(step)
            elif step.node is not None:
                self._node(step.node)

    def _ask(self, value: int, order: Order | None) -> None:
        n = len(shape_of(self.tree, value))
        if order is not None and len(order) == n and order != plain(n):
            self.of[value] = order

    def _layer(self, step: GraphStep) -> None:
        assert step.layer is not None
        given, made = step.arrays(self.tree), step.made()
        kind = layer_kind(step.layer, self.tree)
        if kind == "image":
            self.images = True
            self._ask(given[0], last(len(shape_of(self.tree, given[0]))))
        elif kind in ("same", "along") and made:
            self._ask(given[0], self.of.get(made[0]))

    def _node(self, node: GraphNode) -> None:
        taken = self.tree.taken(node)
        if not taken:
            return
        n = len(shape_of(self.tree, taken[0]))
        wanted = self.of.get(node.made)
        if n > 2 and image_operation(node, self.tree) is not None:
            self.images = True
            self._ask(taken[0], last(n))
            return
        if node.op in elementwise() or node.op == "aten.cat.default":
            wanted = wanted or self.lies.get(node.made)  # what stands beside an image follows it
        if wanted is None:
            return
        if node.op == GETITEM:
            self.of[taken[0]] = wanted  # of a list: of all its arrays
        elif node.op in elementwise():
            for value in taken:
                self._broadcast(value, wanted)
        elif node.op == "aten.cat.default":
            for value in taken:
                self._ask(value, wanted)
        else:
            self._ask(taken[0], self._before(node, n, wanted))

    def _broadcast(self, value: int, wanted: Order) -> None:
        shape = shape_of(self.tree, value)
        if len(shape) <= len(wanted) and any(s != 1 for s in shape):
            self._ask(value, trailing(wanted, len(shape))[0])

    def _before(self, node: GraphNode, n: int, wanted: Order) -> Order | None:
        """The order of an operation's array in which what it gives lies as wanted."""
        before, after = (shape_of(self.tree, v) for v in (self.tree.taken(node)[0], node.made))
        if node.op in ALONG or node.op in PADS:
            return wanted
        if node.op in SIZED:
            return wanted if n == len(wanted) else None
        if node.op in REDUCE:
            return wanted if argument(node, REDUCE[node.op][1], False) else None
        if node.op == UNSQUEEZE:
            (new,) = listed(argument(node, (1, "dim")), n + 1)
            return without(wanted, [new])
        if node.op in VIEWS:
            return before_reshaped(wanted, before, after)
        if node.op.startswith("aten.squeeze"):
            gone = [d for d in listed(argument(node, (1, "dim")), n) if before[d] == 1]
            return last(n) if n > 2 and without(last(n), gone) == wanted else None
        axes = permutation(node, n)
        if axes is None:
            return None
        if axes[:2] == (0, 1) and wanted == last(n):
            return wanted
        return before_permuted(wanted, axes)
