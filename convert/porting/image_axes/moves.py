"""How each step is of arrays as they lie: see `channels_last`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convert.porting.image_axes.axis_operations import (
    ALONG,
    DROP,
    GETITEM,
    PADS,
    PERMUTE,
    REDUCE,
    SIZED,
    UNSQUEEZE,
    VIEW,
    VIEWS,
    Place,
    along,
    argument,
    elementwise,
    listed,
    permutation,
    with_argument,
)
from convert.porting.image_axes.emitting import Emitting
from convert.porting.image_axes.image_operations import image_operation
from convert.porting.image_axes.orders import (
    Order,
    before_permuted,
    in_order,
    last,
    permuted,
    plain,
    reshaped,
    without,
)
from convert.porting.image_axes.traversal import GraphStep, layer_kind, shape_of
from convert.porting.rendering.layer_text import layer_text
from convert.program.graph import GraphNode, ValueRef, mapped

_COPY = "aten.alias.default"


class Relaying:
    """One step after the other into a new graph."""

    def __init__(self, out: Emitting) -> None:
        self.out, self.tree = out, out.tree

    def step(self, step: GraphStep) -> None:
        """Enter a step."""
        if step.layer is not None:
            self._layer(step)
        elif step.node is not None:
            self._node(step, step.node)

    # -- layers ---------------------------------------------------------------------------------

    def _layer(self, step: GraphStep) -> None:
        out, layer = self.out, step.layer
        assert layer is not None
        given, made = step.arrays(self.tree), step.made()
        kind = layer_kind(layer, self.tree)
        order = out.order(given[0]) if given else ()
        view = layer_text(layer.module, "last", checked=True)
        if kind == "flatten" and self._flattens(layer.module, given[0], order, view):
            kind = "same"
        elif kind == "along" and view is not None and order == last(len(order)):
            kind = "image"
        elif kind not in ("same", "image", "bare") or (kind != "same" and view is None):
            kind = "plain"
        if kind in ("image", "bare"):
            out.layers.add(self.tree.first(layer.path))
        elif kind == "plain":
            out.others.add(self.tree.first(layer.path))
        if kind == "image":
            order = last(len(order))
        elif kind != "same":
            order = plain(len(order))
        why = f"{type(layer.module).__name__} takes torch's axes" if kind == "plain" else ""
        placed = {
            v: out.fitted(v, plain(len(shape_of(self.tree, v))) if v != given[0] else order,
                          step, why)
            for v in given
        }  # fmt: skip
        out.called(step, placed)
        for value in made:
            n = len(shape_of(self.tree, value))
            if kind == "image":
                out.laid(step, value, last(n))
            elif kind == "same" and n == len(order):
                out.laid(step, value, order)
            else:
                out.laid(step, value, plain(n))

    def _flattens(self, module: Any, value: int, order: Order, view: Any) -> bool:
        """Whether a Flatten may be of the array as it lies: where there is nothing to flatten, or
        its text for channels last minds torch's order."""
        shape = shape_of(self.tree, value)
        if order != last(len(order)) or (module.start_dim, module.end_dim) != (1, -1):
            return False
        if all(s == 1 for s in shape[2:]):
            return True
        if view is None:
            return False
        assert self.out is not None
        self.out.layers.add(self._path_of(module))
        return True

    def _path_of(self, module: Any) -> str:
        return next(p for p, m in self.tree.modules.items() if m is module)

    # -- operations -----------------------------------------------------------------------------

    def _node(self, step: GraphStep, node: GraphNode) -> None:
        out = self.out
        taken = self.tree.taken(node)
        image = image_operation(node, self.tree) if taken else None
        if image is not None:
            self._image(step, node, image)
        elif node.op == GETITEM and taken[0] in out.lists:
            order = out.lists[taken[0]][node.args[1]]
            out.give(step, node.op, self._given(step, node)[0], {}, order)
        elif not taken or not self._follows(step, node, taken):
            args, kwargs = self._given(step, node)
            out.give(step, node.op, args, kwargs)

    def _follows(self, step: GraphStep, node: GraphNode, taken: Sequence[int]) -> bool:
        """Enter an operation that is of arrays as they lie; False if it cannot be."""
        out = self.out
        lies = out.order(taken[0]) if not isinstance(self.tree.type_of(taken[0]), list) else ()
        n = len(lies)
        if node.op in elementwise():
            return self._pointwise(step, node, taken)
        if node.op == "aten.cat.default":
            return self._joined(step, node, taken)
        if (axes := permutation(node, n)) is not None:
            return self._permuted(step, node, taken[0], axes)
        if node.op in VIEWS:
            return self._viewed(step, node, taken[0])
        if node.op == UNSQUEEZE:
            return self._unsqueezed(step, node, taken[0])
        if lies == plain(n) or any(out.order(v) != plain(len(out.order(v))) for v in taken[1:]):
            return False
        if node.op in ALONG:
            place, dim = along(node)
            args, kwargs = self._with(step, node, place, self._counted(dim, lies))
            out.give(step, node.op, args, kwargs, self._orders(node, lies))
        elif node.op in REDUCE:
            return self._reduced(step, node, lies)
        elif node.op in DROP:
            return self._dropped(step, node, lies)
        elif node.op in SIZED:
            return self._sized(step, node, lies)
        elif node.op in PADS:
            return self._padded(step, node, lies)
        else:
            return False
        return True

    def _given(
        self, step: GraphStep, node: GraphNode, keep: bool = False
    ) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of an operation in torch's order, or as they lie."""
        why = f"{node.op.split('.')[1].strip('_')} takes torch's axes"

        def one(ref: ValueRef) -> ValueRef:
            n = len(shape_of(self.tree, ref.value))
            if keep or n < 2:
                return ValueRef(self.out.now[ref.value])
            return ValueRef(self.out.fitted(ref.value, plain(n), step, why))

        args, values = mapped([list(node.args), list(node.kwargs.values())], one, lambda d: d)
        return args, dict(zip(node.kwargs, values, strict=True))

    def _with(
        self, step: GraphStep, node: GraphNode, place: Place, value: Any
    ) -> tuple[list[Any], dict[str, Any]]:
        args, kwargs = self._given(step, node, keep=True)
        return with_argument(args, kwargs, place, value)

    def _counted(self, dim: Any, order: Order) -> Any:
        """torch's axes where they are in the array; the last one as -1."""
        if isinstance(dim, list | tuple):
            return [self._counted(d, order) for d in dim]
        at = order.index(int(dim) % len(order))
        return -1 if at == len(order) - 1 and len(order) > 2 else at

    def _orders(self, node: GraphNode, order: Order) -> Order | list[Order]:
        kind = self.tree.type_of(node.made)
        return [order] * len(kind) if isinstance(kind, list) else order

    def _image(self, step: GraphStep, node: GraphNode, op: str) -> None:
        value = node.args[0].value
        n = len(shape_of(self.tree, value))
        x = ValueRef(self.out.fitted(value, last(n), step, f"{op.split('.')[1]}: channels last"))
        args, kwargs = self._rest(step, node)
        kind = self.tree.type_of(node.made)
        orders: Any = last(n)
        if isinstance(kind, list):
            orders = [last(n), *(plain(len(t.shape)) for t in kind[1:])]
        self.out.give(step, op, [x, *args], kwargs, orders)

    def _rest(self, step: GraphStep, node: GraphNode) -> tuple[list[Any], dict[str, Any]]:
        """The arguments behind the first, in torch's order."""
        whole = GraphNode(node.op, node.args[1:], node.kwargs, node.made)
        return self._given(step, whole)

    def _pointwise(self, step: GraphStep, node: GraphNode, taken: Sequence[int]) -> bool:
        n = len(shape_of(self.tree, node.made))
        orders = [o for v in taken if len(o := self.out.order(v)) == n and o != plain(n)]
        wanted = self.out.wanted.get(node.made)
        if isinstance(self.tree.type_of(node.made), list) or n < 2:
            return False
        target = last(n) if n > 2 and last(n) in orders else orders[0] if orders else wanted
        if target is None or len(target) != n:
            return False

        def one(ref: ValueRef) -> ValueRef:
            if not self.tree.is_array(ref.value):
                return ValueRef(self.out.now[ref.value])
            return ValueRef(self.out.beside(ref.value, target, step))

        args, values = mapped([list(node.args), list(node.kwargs.values())], one, lambda d: d)
        kwargs = dict(zip(node.kwargs, values, strict=True))
        self.out.give(step, node.op, args, kwargs, target)
        return True

    def _joined(self, step: GraphStep, node: GraphNode, taken: Sequence[int]) -> bool:
        n = len(shape_of(self.tree, node.made))
        orders = [o for v in taken if len(o := self.out.order(v)) == n and o != plain(n)]
        target = orders[0] if orders else self.out.wanted.get(node.made)
        alike = all(len(shape_of(self.tree, v)) == n for v in taken)
        if target is None or len(target) != n or not alike:
            return False
        place, dim = along(node)
        parts = [ValueRef(self.out.fitted(v, target, step, "")) for v in taken]
        args, kwargs = with_argument([parts], {}, place, self._counted(dim, target))
        if len(args) == 1 and not kwargs:
            kwargs = {"dim": self._counted(dim, target)}
        self.out.give(step, node.op, args, kwargs, target)
        return True

    def _permuted(self, step: GraphStep, node: GraphNode, value: int, axes: Order) -> bool:
        """torch's permute: nothing, where what it gives may lie as its array does."""
        lies = self.out.order(value)
        n = len(lies)
        free, wanted = permuted(lies, axes), self.out.wanted.get(node.made)
        if free in (wanted, plain(n)) or (free == last(n) and n > 3):
            target = free
        elif lies == plain(n) and wanted is None:
            return False
        elif wanted is not None:
            target = wanted
        elif lies == last(n) and axes[:2] == (0, 1):
            target = lies
        else:
            target = plain(n) if lies == last(n) else lies
        now = ValueRef(self.out.now[value])
        if free == target:
            self.out.give(step, _COPY, [now], {}, target)
            return True
        moves = [lies.index(a) for a in before_permuted(target, axes)]
        self.out.give(step, PERMUTE, [now, moves], {}, target)
        return True

    def _viewed(self, step: GraphStep, node: GraphNode, value: int) -> bool:
        """torch's reshape, of the array as it lies where that gives the same elements."""
        out, lies = self.out, self.out.order(value)
        before, after = shape_of(self.tree, value), shape_of(self.tree, node.made)
        wanted = out.wanted.get(node.made)
        if lies == plain(len(lies)) and wanted is None:
            return False
        order = reshaped(lies, before, after, wanted)
        if order is None:
            turned = ValueRef(out.fitted(value, plain(len(lies)), step, _why(before)))
            args, kwargs = self._given(step, node, keep=True)
            out.give(step, node.op, [turned, *args[1:]], kwargs)
            return True
        sizes = argument(node, (1, "size")) if node.op.endswith((".view.default",
            "view.default", "reshape.default", "view_copy.default")) else None  # fmt: skip
        if sizes is None or isinstance(sizes, ValueRef):
            sizes = [out.size(s) for s in after]
        else:
            sizes = mapped(sizes, lambda r: ValueRef(out.now[r.value]), lambda d: d)
        args = [ValueRef(out.now[value]), in_order(sizes, order)]
        out.give(step, VIEW, args, {}, order)
        return True

    def _unsqueezed(self, step: GraphStep, node: GraphNode, value: int) -> bool:
        lies = self.out.order(value)
        n = len(lies) + 1
        (new,) = listed(argument(node, (1, "dim")), n)
        wanted = self.out.wanted.get(node.made)
        order = wanted if wanted is not None and without(wanted, [new]) == lies else None
        if order is None and lies == plain(n - 1):
            return False
        if order is None:  # behind the axis that it stands behind in torch
            grown = [a + (a >= new) for a in lies]
            at = grown.index(new - 1) + 1 if new else 0
            order = (*grown[:at], new, *grown[at:])
        args = [ValueRef(self.out.now[value]), order.index(new)]
        self.out.give(step, node.op, args, {}, order)
        return True

    def _reduced(self, step: GraphStep, node: GraphNode, lies: Order) -> bool:
        place, stays = REDUCE[node.op]
        dims = argument(node, place)
        args, kwargs = self._given(step, node, keep=True)
        if dims is None or dims == []:
            self.out.give(step, node.op, args, kwargs)
            return True
        args, kwargs = with_argument(args, kwargs, place, self._counted(dims, lies))
        keep = argument(node, stays, False)
        order = lies if keep else without(lies, listed(dims, len(lies)))
        self.out.give(step, node.op, args, kwargs, self._orders(node, order))
        return True

    def _dropped(self, step: GraphStep, node: GraphNode, lies: Order) -> bool:
        dims = argument(node, (1, "dim"), 0)
        gone = listed(dims, len(lies))
        if "squeeze" in node.op:
            shape = shape_of(self.tree, node.args[0].value)
            if len(shape_of(self.tree, node.made)) != len(shape) - len(gone):
                gone = [d for d in gone if shape[d] == 1]
        args, kwargs = self._with(step, node, (1, "dim"), self._counted(dims, lies))
        order = without(lies, gone)
        self.out.give(step, node.op, args, kwargs, self._orders(node, order))
        return True

    def _sized(self, step: GraphStep, node: GraphNode, lies: Order) -> bool:
        sizes = argument(node, (1, "size"))
        if not isinstance(sizes, list | tuple) or len(sizes) != len(lies):
            return False
        given = mapped(list(sizes), lambda r: ValueRef(self.out.now[r.value]), lambda d: d)
        args, kwargs = self._with(step, node, (1, "size"), in_order(given, lies))
        self.out.give(step, node.op, args, kwargs, lies)
        return True

    def _padded(self, step: GraphStep, node: GraphNode, lies: Order) -> bool:
        """torch counts pads from the last axis on."""
        n, pads = len(lies), argument(node, (1, "pad"), argument(node, (1, "padding")))
        pads = mapped(list(pads), lambda r: ValueRef(self.out.now[r.value]), lambda d: d)
        around = [(0, 0)] * (n - len(pads) // 2)
        around += list(zip(pads[::2], pads[1::2], strict=True))[::-1]
        kept = in_order(around, lies)
        while kept and kept[0] == (0, 0):
            kept.pop(0)
        flat = [p for pair in reversed(kept) for p in pair]
        args, kwargs = self._given(step, node, keep=True)
        args = [args[0], flat, *args[2:]]
        kwargs = {k: v for k, v in kwargs.items() if k not in ("pad", "padding")}
        self.out.give(step, node.op, args, kwargs, lies)
        return True


def _why(shape: Sequence[Any]) -> str:
    axes = {3: "(C, T)", 4: "(C, H, W)", 5: "(C, D, H, W)"}.get(len(shape), "other axes")
    return f"torch reshapes {axes}, in this order"
