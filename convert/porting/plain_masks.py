"""Masks that index arithmetic makes, as what they are: every position, none, or no later one.

A library that builds masks for all its models compares ranges with ranges, through functions of
functions. What such an array is follows from sizes alone. It is computed at several sizes; where it
is one of the known masks at all of them, it is written as that, and attention takes it so: without
a mask, or causal. The proof of a port, at sizes of its own, then holds it against torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from convert.porting.evaluate import function_of
from convert.program.graph import (
    ArrayType,
    Graph,
    GraphNode,
    ValueRef,
    evaluate,
    live,
    mapped,
    refs,
)

TRI = "zooconvert.tri.default"  # True up to the diagonal of the last two axes
ATTENTION = "aten.scaled_dot_product_attention.default"
_SHORT = 3  # operations: a causal mask of so few reads well as it is
_TRIED = ((5, 7, 6, 9, 8, 11), (8, 6, 11, 5, 7, 9), (12, 16, 24, 8, 20, 4), (4, 8, 16, 12, 6, 2))
_WIDE = 512  # added to sizes: a window of up to that many positions is seen to be one
_TO_THE_END = 2**63 - 1  # where a slice ends that has no end
_ENOUGH = 2  # trials that must agree
_MASKED = -1e4  # a number from here on is added to what is not to be seen
_SEEN, _UNSEEN, _CAUSAL = "seen", "unseen", "causal"
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_BOTH = ("aten.bitwise_and.Tensor", "aten.logical_and.default", "aten.__and__.Tensor")
_SCALES = re.compile(r"aten\.(mul|div|floor_divide|true_divide|pow|\w*shift)")
_ADD = "aten.add.Tensor"
_WHERE = ("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf")


def plain_masks(graph: Graph) -> Graph:
    """The graph with masks of sizes alone as what they are."""
    masks = _Masks(graph)
    nodes = [masks.rewritten(node) for node in graph.nodes]
    if nodes == graph.nodes:
        return graph
    wanted = set(refs((graph.results, graph.mutations)))
    return dataclasses.replace(graph, nodes=live(nodes, wanted))


class _Masks:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.types = graph.types
        self.steps: dict[int, int] = {}  # arrays of sizes alone -> the operations behind each
        # and the largest number that is compared with positions there: what differs only at sizes
        # beyond it, as a window of 4096 does, is not seen at others
        self.numbers: dict[int, int] = {}
        scales: dict[int, int] = {}  # by how much positions were multiplied or divided
        for node in graph.nodes:
            taken = [v for v in refs((node.args, node.kwargs)) if self._is_array(v)]
            drawn = getattr(function_of(node.op), "random", False)
            if self._is_array(node.made) and all(v in self.steps for v in taken) and not drawn:
                self.steps[node.made] = 1 + sum(self.steps[v] for v in taken)
                whole = [] if self._is_float(node.made) else _whole((node.args, node.kwargs), graph)
                own, scale = max(whole, default=0), max((scales[v] for v in taken), default=1)
                self.numbers[node.made] = max([own * scale, *(self.numbers[v] for v in taken)])
                by = 2 ** min(own, 64) if "shift" in node.op else max(own, 1)
                scales[node.made] = scale * by if _SCALES.match(node.op) else scale
        self.found = self._known() if self._asked() else {}

    def _is_array(self, value: int) -> bool:
        return isinstance(self.types.get(value), ArrayType | list)

    def _is_float(self, value: int) -> bool:
        kind = self.types[value]
        return isinstance(kind, ArrayType) and "float" in kind.dtype

    def _asked(self) -> bool:
        """Whether anything takes an array of sizes alone that may be a mask."""
        return any(
            v in self.steps and self._may_be(v)
            for node in self.graph.nodes
            if node.made not in self.steps
            for v in refs((node.args, node.kwargs))
        )

    def _may_be(self, value: int) -> bool:
        kind = self.types[value]
        plain = isinstance(kind, ArrayType) and len(kind.shape) >= 2
        return plain and (kind.dtype == "bool" or "float" in kind.dtype)

    # What the masks are.

    def _known(self) -> dict[int, str]:
        """What those of the arrays of sizes alone are that are masks."""
        found: dict[int, str] | None = None
        small, wide = list(itertools.islice(self._sizes(), _ENOUGH)), self._wide()
        if len(small) < _ENOUGH:
            return {}
        try:
            for sizes in small + wide:
                kinds = {v: _kind(x) for v, x in self._values(sizes).items()}
                now = {v: kind for v, kind in kinds.items() if kind and self._may_be(v)}
                found = now if found is None else dict(found.items() & now.items())
        except Exception:  # whatever an operation says of sizes that nobody asked for
            return {}
        seen = _WIDE if wide else min(_TRIED[0]) - 1
        return {v: k for v, k in (found or {}).items() if self.numbers[v] <= seen}

    def _sizes(self, wide: str = "") -> Iterator[dict[str, int]]:
        """Sizes that the graph is for, one of them `wide`."""
        for tried in _TRIED:
            every = zip(self.graph.symbols, itertools.cycle(tried), strict=False)
            sizes = {symbol: n + (_WIDE if symbol == wide else 0) for symbol, n in every}
            if self.graph.is_for(sizes):
                yield sizes

    def _wide(self) -> list[dict[str, int]]:
        """Sizes of which each is wide once; none where one of them cannot be, or none has to."""
        asked = [n for v, n in self.numbers.items() if self._may_be(v)]
        if not any(min(_TRIED[0]) <= n <= _WIDE for n in asked):
            return []
        found = [next(self._sizes(symbol), None) for symbol in self.graph.symbols]
        return [sizes for sizes in found if sizes] if all(found) else []

    def _values(self, sizes: Mapping[str, int]) -> dict[int, np.ndarray]:
        import jax

        held: dict[int, Any] = {}

        def value(ref: ValueRef) -> Any:
            kind = self.types[ref.value]
            known = ref.value in held or isinstance(kind, ArrayType | list)
            return held[ref.value] if known else evaluate(kind, sizes)

        def dtype(d: Any) -> Any:
            return jax.dtypes.canonicalize_dtype(d.name)

        for node in self.graph.nodes:
            if node.made in self.steps:
                args = mapped(list(node.args), value, dtype)
                kwargs = {k: mapped(v, value, dtype) for k, v in node.kwargs.items()}
                held[node.made] = function_of(node.op)(*args, **kwargs)
        return {v: np.asarray(x) for v, x in held.items() if isinstance(self.types[v], ArrayType)}

    # What becomes of them.

    def rewritten(self, node: GraphNode) -> GraphNode:
        """A node with what is known of the masks that it makes or takes."""
        if node.made in self.found:
            return self._mask(node)
        if node.module_class.startswith("torch.nn."):  # a layer, which is written whole
            return node
        if node.op == ATTENTION:
            return self._attention(node)
        same = self._same(node)
        if same is None:
            return node
        return dataclasses.replace(node, op="aten.alias.default", args=(same,), kwargs={})

    def _mask(self, node: GraphNode) -> GraphNode:
        """The node that makes a causal mask."""
        kind = self.types[node.made]
        sizes = [self._size(n, node) for n in kind.shape]
        causal = self.found[node.made] == _CAUSAL and kind.dtype == "bool"
        square = kind.shape[-1] == kind.shape[-2]
        if not causal or not square or None in sizes or self.steps[node.made] <= _SHORT:
            return node
        return dataclasses.replace(node, op=TRI, args=(sizes,), kwargs={})

    def _size(self, size: int | str, node: GraphNode) -> ValueRef | int | None:
        """A size as an argument: a value that is there before a node."""
        if isinstance(size, int):
            return size
        known = (v for v, kind in self.types.items() if v < node.made and kind == size)
        return next(map(ValueRef, known), None)

    def _attention(self, node: GraphNode) -> GraphNode:
        """Attention that takes a mask, without one."""
        given = dict(zip(_ARGUMENTS, node.args, strict=False))
        mask = node.kwargs.get("attn_mask", given.get("attn_mask"))
        if not isinstance(mask, ValueRef) or mask.value not in self.found:
            return node
        if node.kwargs.get("is_causal", given.get("is_causal", False)):
            return node
        kind = self.found[mask.value]
        square = self._length(node.args[0]) == self._length(node.args[1])
        if kind == _UNSEEN or (kind == _CAUSAL and not square):
            return node
        if kind == _CAUSAL and self.steps[mask.value] <= _SHORT:
            return node
        more = {k: x for k, x in node.kwargs.items() if k not in ("attn_mask", "is_causal")}
        if dropout := given.get("dropout_p"):
            more["dropout_p"] = dropout
        if kind == _CAUSAL:
            more["is_causal"] = True
        return dataclasses.replace(node, args=node.args[:3], kwargs=more)

    def _length(self, ref: ValueRef) -> int | str:
        size: int | str = self.types[ref.value].shape[-2]
        return size

    def _same(self, node: GraphNode) -> ValueRef | None:
        """The argument that a node gives again, its mask being what it is."""
        kinds = [self.found.get(x.value) if isinstance(x, ValueRef) else None for x in node.args]
        kept: Any = None
        if node.op in _BOTH and _SEEN in kinds:
            kept = node.args[1 - kinds.index(_SEEN)]
        elif node.op == _ADD and not node.kwargs and _SEEN in kinds:
            at = kinds.index(_SEEN)
            kept = node.args[1 - at] if "float" in self.types[node.args[at].value].dtype else None
        elif node.op in _WHERE and kinds[0] in (_SEEN, _UNSEEN):
            kept = node.args[1 if kinds[0] == _SEEN else 2]
        elif node.op.startswith("aten.masked_fill.") and kinds[1] == _UNSEEN:
            kept = node.args[0]
        if not isinstance(kept, ValueRef):
            return None
        return kept if self.types.get(kept.value) == self.types[node.made] else None


def _whole(x: Any, graph: Graph) -> Iterator[int]:
    """How large the numbers in an argument are, at any depth, in expressions of sizes too."""
    if isinstance(x, ValueRef):
        size = graph.types.get(x.value)
        yield from map(int, re.findall(r"(?<![\w.])\d+", size if isinstance(size, str) else ""))
    elif isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x):
        if x != _TO_THE_END:
            yield abs(int(x))
    elif isinstance(x, list | tuple):
        for part in x:
            yield from _whole(part, graph)
    elif isinstance(x, Mapping):
        yield from _whole(list(x.values()), graph)


def _kind(x: np.ndarray) -> str | None:
    """Which mask an array is: of True and False, or of what is added to scores."""
    if x.ndim < 2 or not x.size:
        return None
    if x.dtype != bool:
        seen = x == 0
        if not (seen | (x <= _MASKED)).all():
            return None
        x = seen
    if x.all():
        return _SEEN
    if not x.any():
        return _UNSEEN
    causal = np.tri(*x.shape[-2:], dtype=np.bool_)
    return _CAUSAL if (x == causal).all() else None
