"""The pass: a graph of a module in torch's axes, as one whose images have channels last.

It runs through the graph once. Convolutions, pools, norms of channels and resizing take and give
channels last; what is known to leave axes, or to name them, follows with its axes counted anew;
reshapes and permutations of torch's are those of the array as it lies, or nothing at all. Whatever
is not known gets torch's order, by a transpose with the reason beside it. Arrays that are asked for
with channels last (`Wishes`) are turned where they are made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from convert.porting.image_axes.emitting import Emitting
from convert.porting.image_axes.image_layer_axes import NoSuchAxes
from convert.porting.image_axes.moved import Relaid
from convert.porting.image_axes.moves import Relaying
from convert.porting.image_axes.orders import Order, channels_moved, in_order, plain
from convert.porting.image_axes.traversal import GraphStep, steps, with_plain_norms
from convert.porting.image_axes.wishes import Wishes
from convert.porting.rendering.layer_calls import LayerCalls
from convert.porting.rendering.scopes import Tree
from convert.porting.tensors_by_name import ByName
from convert.program.graph import Graph, ValueRef
from zoo.layout import Layout


def channels_last(graph: Graph, module: Any, layout: Layout) -> Relaid | None:
    """The graph with channels last, whose calls were noted; None where nothing in it has images.
    NoSuchAxes where a layer has them without a batch, or is called with other arrays too."""
    by_name = ByName(layout)

    def home(name: str) -> str:
        entry = by_name.flax_of(name)
        return entry.flax[0].name if entry is not None else name

    tree = Tree(graph, module, home)
    layers = LayerCalls(tree)
    every = with_plain_norms(tree, list(steps(tree.root, layers)))
    if not Wishes(tree, every).images:
        return None
    alone = _run(tree, every, {}, {})
    wishes = Wishes(tree, every, alone.lies())
    inputs = {
        p.value: order
        for p in graph.of_kind("input")
        if (order := wishes.of.get(p.value)) is not None and channels_moved(order)
    }
    first = _run(tree, every, wishes.of, inputs)
    held = _turned(tree, first, by_name)
    done = _run(tree, every, wishes.of, inputs | held) if held else first
    if both := sorted(done.layers & done.others):
        raise NoSuchAxes(f"{both[0]} is called with images and with other arrays")
    return _moved(tree, done, inputs | held)


def _run(
    tree: Tree, every: Sequence[GraphStep], wanted: Mapping[int, Order], placed: Mapping[int, Order]
) -> Emitting:
    out = Emitting(tree, wanted, placed)
    moves = Relaying(out)
    for step in every:
        moves.step(step)
    return out


def _turned(tree: Tree, done: Emitting, by_name: ByName) -> dict[int, Order]:
    """The parameters, buffers and constants that are wanted in one order only, not torch's."""
    tied = {e.tied_to for e in by_name.layout.entries}
    found = {}
    for p in tree.graph.placeholders:
        orders = done.asked.get(p.value, set())
        if p.kind == "input" or len(orders) != 1 or p.name in tied:
            continue
        entry = by_name.entries.get(p.name)
        plainly = entry is None or (
            entry.tied_to is None and not entry.ops and len(entry.torch) == len(entry.flax) == 1
        )
        (order,) = orders
        same = [q for q in tree.graph.placeholders if q.name == p.name and q.kind == p.kind]
        if order != plain(len(order)) and plainly and len(same) == 1 and p.kind != "constant":
            found[p.value] = order
    return found


def _moved(tree: Tree, out: Emitting, placed: Mapping[int, Order]) -> Relaid:
    """The new graph, and what lies otherwise in it."""
    graph = tree.graph
    results = [out.result(r) for r in graph.results]
    outputs = {
        path or "": order
        for path, r in zip(graph.outputs.leaves(), results, strict=True)
        if isinstance(r, ValueRef) and (order := out.orders.get(r.value)) is not None
    }
    placeholders = [
        dataclasses.replace(
            p,
            value=out.number(p.value),
            shape=tuple(in_order(p.shape, placed[p.value])) if p.value in placed else p.shape,
        )
        for p in graph.placeholders
    ]
    mutations = {n: out.plainly(r) for n, r in graph.mutations.items()}
    new = dataclasses.replace(
        graph,
        nodes=out.nodes,
        placeholders=placeholders,
        results=results,
        mutations=mutations,
        types=out.types,
        calls=[out.call(c) for c in graph.calls],
    )
    names = {p.value: (p.kind, p.name) for p in graph.placeholders}
    told = [(names[v], order) for v, order in placed.items()]
    return Relaid(
        new,
        out.orders,
        frozenset(out.layers),
        {name: order for (kind, name), order in told if kind == "input"},
        outputs,
        {name: order for (kind, name), order in told if kind != "input"},
        out.reasons,
    )
