"""A pair of units as entries of a layout."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from convert.matching.fits import ops_of, squeeze, without_ones
from convert.matching.groups import Index, Shape
from convert.matching.units import Unit, Way
from zoo.layout import Entry, Tensor
from zoo.layout.ops import (
    Concat,
    Divide,
    Op,
    Ops,
    Permute,
    Split,
    Stack,
    Unstack,
    inverse,
    run_shapes,
)


def entries(ours: Unit, theirs: Unit, way: Way) -> Iterator[Entry]:
    """The entries of a pair, one for each Flax tensor (or for each of torch's that is divided)."""
    for mine, yours in _matched(ours, theirs, way):
        torch = tuple(Tensor(g.members[i], g.shapes[i]) for i in mine for g in ours.groups)
        flax = tuple(Tensor(g.members[yours], g.shapes[yours]) for g in theirs.groups)
        ops = _ops(ours, theirs, way, [t.shape for t in torch], [t.shape for t in flax], len(mine))
        yield Entry("param", torch, flax, ops)


def _matched(ours: Unit, theirs: Unit, way: Way) -> Iterator[tuple[list[Index], Index]]:
    """Of each of Flax's numbers, torch's that belong to it, in the order in which they stack."""
    mine, yours = ours.groups[0].indices, theirs.groups[0].indices
    if way.each:
        yield from (([i], j) for i, j in zip(mine, yours, strict=True))
        return
    assert ours.sizes is not None
    assert theirs.sizes is not None
    if way.fit.merged:
        yield mine, yours[0]
        return
    numbers = np.arange(len(mine)).reshape(ours.sizes)
    parts = _stack_sizes(ours, theirs, way)
    axes = [a for a in way.fit.axes if a < len(ours.sizes)]
    sizes = (*theirs.sizes, *parts)
    for op in _numbers_ops(axes, ours.sizes, sizes, len(theirs.sizes)):
        (numbers,) = op.run([numbers])
    table = numbers.reshape(len(yours), -1)
    yield from (([mine[k] for k in row], j) for row, j in zip(table, yours, strict=True))


def _stack_sizes(ours: Unit, theirs: Unit, way: Way) -> Shape:
    """Lengths of the axes of a Flax tensor that count torch's layers."""
    assert ours.sizes is not None
    assert theirs.sizes is not None
    assert theirs.shape is not None
    if way.fit.merged:
        return ours.sizes
    skipped = len(theirs.sizes)
    inner = without_ones(theirs.shape)
    return tuple(
        n for n, a in zip(inner, way.fit.axes[skipped:], strict=True) if a < len(ours.sizes)
    )


def _numbers_ops(axes: list[int], source: Shape, target: Shape, names: int) -> Ops:
    """torch's numbers as Flax's, and the stacks. A number of Flax's that is a factor of one of
    torch's counts the fast way: blocks of a scan hold the first, second, ... layer each."""
    order = sorted(range(len(axes)), key=lambda k: (axes[k], k < names, k))
    placed = [target[k] for k in order]
    made = ops_of([axes[k] for k in order], source, tuple(placed))
    turn = tuple(order.index(k) for k in range(len(target)))
    return (*made, Permute(turn))


def _ops(
    ours: Unit, theirs: Unit, way: Way, torch: list[Shape], flax: list[Shape], layers: int
) -> Ops:
    """From torch's tensors, layer by layer and in each the parts, to Flax's."""
    first: list[Op] = []
    parts = len(ours.groups)
    stack = () if way.each else _stack_sizes(ours, theirs, way)
    if ours.axis is not None:
        k = ours.axis
        first.append(Concat(k, tuple(s[k] for s in torch)))
        if layers > 1:
            total = sum(s[k] for s in torch) // layers
            names = (*(f"n{i}" for i in range(len(stack))), "features")
            first.append(Split(k, names, (*stack, total)))
            if k:
                (made,) = run_shapes(first, torch)
                order = (*range(k, k + len(stack)), *range(k), *range(k + len(stack), len(made)))
                first.append(Permute(order))
    elif len(torch) > 1:
        first.append(Stack(0))
        lead = (*stack, *((parts,) if parts > 1 else ()))
        if len(lead) > 1:
            first.append(Split(0, tuple(f"n{i}" for i in range(len(lead))), lead))
    (source,) = run_shapes(first, torch)
    target = flax[0]
    if theirs.axis is not None:
        k = theirs.axis
        target = (*target[:k], sum(s[k] for s in flax), *target[k + 1 :])
    elif len(flax) > 1:
        target = (len(flax), *target)
    ops = (*first, *_moved(way, ours, theirs, source, target, len(stack)))
    if theirs.axis is not None:
        return (*ops, Divide(theirs.axis, tuple(s[theirs.axis] for s in flax)))
    return (*ops, Unstack(0)) if len(flax) > 1 else ops


def _moved(way: Way, ours: Unit, theirs: Unit, source: Shape, target: Shape, stacks: int) -> Ops:
    """The ops of the fit on one entry's arrays: stacks first, then the axes of a tensor."""
    axes = way.fit.axes
    skipped = 0
    if not way.each and not way.fit.merged:
        assert ours.sizes is not None
        assert theirs.sizes is not None
        numbers, skipped = len(ours.sizes), len(theirs.sizes)
        seen = 0
        made = []
        for a in axes[skipped:]:
            if a < numbers:
                made.append(seen)
                seen += 1
            else:
                made.append(a - numbers + stacks)
        axes = tuple(made)
    whole, wanted = without_ones(source), without_ones(target)
    before = _squeezed(source)
    after = inverse(_squeezed(target), [target])
    inner = way.fit.inner
    if way.fit.merged:
        middle = inverse(ops_of(axes, wanted, whole, inner), [wanted])
    else:
        middle = ops_of(axes, whole, wanted, None if inner is None else inner - skipped)
    return (*before, *middle, *after)


def _squeezed(shape: Shape) -> Ops:
    """As `squeeze`; (1,) becomes a scalar."""
    made = squeeze(shape)
    (left,) = run_shapes(made, [shape])
    return (*made, Split(0, (), ())) if left == (1,) else made
