"""The vocabulary of ops: each has an inverse, agrees with its own shapes, and survives JSON."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import bits

from zoo.checkpoint.apply import apply, cast
from zoo.containers.regions import Region, size
from zoo.containers.strided import contiguous
from zoo.layout.cuts import Need, assemble, needed
from zoo.layout.ops import (
    OPS,
    Concat,
    Divide,
    Each,
    Flip,
    Merge,
    Op,
    Ops,
    Permute,
    Reorder,
    Split,
    Stack,
    Unstack,
    describe,
    inverse,
    op_from_json,
    op_to_json,
    run,
    run_shapes,
)

# Machines are slow at times, and what is drawn is not at fault.
PATIENT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def arrays(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Every element of every array differs from every other."""
    made, start = [], 0
    for shape in shapes:
        size = int(np.prod(shape))
        made.append(np.arange(start, start + size, dtype=np.int64).reshape(shape))
        start += size
    return made


# op, inputs, and what element (i, j, ...) of the first result is, by indexing the inputs
CASES: list[tuple[Op, list[np.ndarray], np.ndarray]] = []


def case(op: Op, inputs: list[np.ndarray], first: np.ndarray) -> None:
    CASES.append((op, inputs, first))


a23, b23 = arrays((2, 3), (2, 3))
(a234,) = arrays((2, 3, 4))
(a2c,) = arrays((2, 24))
case(Permute((1, 0)), [a23], np.array([[a23[i, j] for i in range(2)] for j in range(3)]))
case(Permute((2, 0, 1)), [a234], np.moveaxis(a234, 2, 0))
case(Flip((1,)), [a23], a23[:, ::-1])
case(Flip((0, 2)), [a234], a234[::-1, :, ::-1])
case(Split(1, ("heads", "dim"), (4, 6)), [a2c], a2c.reshape(2, 4, 6))
case(Merge(1, ("h", "d"), (3, 4)), [a234], a234.reshape(2, 12))
case(Concat(0, (2, 2)), [a23, b23], np.vstack([a23, b23]))
case(Concat(1, (3, 3)), [a23, b23], np.hstack([a23, b23]))
case(Divide(1, (1, 2)), [a23], a23[:, :1])
case(Stack(1), [a23, b23], np.stack([a23, b23], 1))
case(Unstack(1), [a234], a234[:, 0])
case(Stack(1, 2), [a23, a2c, b23, a2c], np.stack([a23, b23], 1))
case(Unstack(1, 2), [a234, np.stack([a23, a23, b23], 1)], a234[:, 0])
# Columns of a (2, C*H*W) matrix with C, H, W = 2, 3, 4 in the order (H, W, C):
case(
    Reorder(1, (2, 3, 4), (1, 2, 0)),
    [a2c],
    np.array(
        [
            [row[c * 12 + h * 4 + w] for h in range(3) for w in range(4) for c in range(2)]
            for row in a2c
        ]
    ),
)


def test_every_op_has_a_case() -> None:
    assert {type(op).__name__.lower() for op, _, _ in CASES} == set(OPS)


@pytest.mark.parametrize(("op", "inputs", "first"), CASES, ids=lambda x: str(x)[:40])
def test_op(op: Op, inputs: list[np.ndarray], first: np.ndarray) -> None:
    made = apply((op,), inputs)
    assert (made[0] == first).all()
    assert [m.shape for m in made] == op.shapes([a.shape for a in inputs])
    assert all(m.flags.c_contiguous for m in made)
    undo = inverse((op,), [a.shape for a in inputs])
    back = apply(undo, made)
    assert [bits(b) for b in back] == [bits(a) for a in inputs]
    assert op_from_json(op_to_json(op)) == op
    assert describe((op,)).startswith(type(op).__name__.lower())


def drawn_region(data: st.DataObject, shape: tuple[int, ...]) -> Region:
    bounds = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in shape]
    return tuple(slice(*b) for b in bounds)


def check_regions(data: st.DataObject, ops: Ops, inputs: list[np.ndarray]) -> None:
    """Any region, made of the regions that it needs and nothing else, is that of the whole."""
    shapes = [a.shape for a in inputs]
    made = run(ops, inputs)
    which = data.draw(st.integers(0, len(made) - 1))
    region = drawn_region(data, made[which].shape)
    needs = needed(ops, shapes, which, region)
    asked: list[Need] = []

    def read(i: int, part: Region) -> np.ndarray:
        asked.append((i, part))
        assert all(0 <= s.start <= s.stop <= n for s, n in zip(part, shapes[i], strict=True))
        return inputs[i][part]

    assert bits(assemble(ops, shapes, which, region, read)) == bits(made[which][region])
    assert asked == needs
    assert sum(size(part) for _, part in needs) >= size(region)


@pytest.mark.parametrize(("op", "inputs", "first"), CASES, ids=lambda x: str(x)[:40])
@PATIENT
@given(data=st.data())
def test_regions(op: Op, inputs: list[np.ndarray], first: np.ndarray, data: st.DataObject) -> None:
    check_regions(data, (op,), inputs)
    shapes = [a.shape for a in inputs]
    check_regions(data, inverse((op,), shapes), run((op,), inputs))


@PATIENT
@given(data=st.data())
def test_regions_of_chains(data: st.DataObject) -> None:
    """Ops one after the other, and other ones for each stretch of a list."""
    chains: list[tuple[Ops, list[np.ndarray]]] = [
        ((Split(1, ("h", "d"), (4, 6)), Permute((1, 2, 0)), Flip((1,))), [a2c]),
        ((Reorder(1, (3, 2, 4), (0, 2, 1)), Permute((1, 0))), [a2c]),
        ((Concat(1, (3, 3)), Permute((1, 0)), Divide(0, (2, 4))), [a23, b23]),
        ((Permute((1, 0)), Stack(0), Merge(0, ("l", "i"), (2, 3))), [a23, b23]),
        ((Each(((1, (Permute((1, 0)),)), (2, (Stack(1), Flip((0,)))))),), [a2c, a23, b23]),
        ((Unstack(0), Each(((1, ()), (1, (Flip((0,)),))))), [a234]),
    ]
    ops, inputs = data.draw(st.sampled_from(chains))
    check_regions(data, ops, inputs)
    check_regions(data, inverse(ops, [a.shape for a in inputs]), run(ops, inputs))


def test_what_stays_in_order_needs_no_more_than_itself() -> None:
    rotary = Reorder(0, (8, 2, 4), (0, 2, 1))  # heads, and halves of their features
    half = (slice(0, 32), slice(0, 5))
    assert needed((rotary,), [(64, 5)], 0, half) == [(0, half)]
    transposed = needed((Permute((1, 0)),), [(64, 5)], 0, (slice(1, 2), slice(8, 16)))
    assert transposed == [(0, (slice(8, 16), slice(1, 2)))]


def test_a_chain_is_undone_in_reverse() -> None:
    ops = (Permute((1, 0)), Split(1, ("a", "b"), (2, 2)), Permute((2, 0, 1)))
    x = arrays((2, 3))
    with pytest.raises(ValueError, match="is not a=2 x b=2"):
        run_shapes(ops, [x[0].shape])
    ops = (Permute((1, 0)), Split(0, ("a", "b"), (1, 3)), Permute((2, 0, 1)))
    made = apply(ops, x)
    assert made[0].shape == (2, 1, 3)
    assert (apply(inverse(ops, [(2, 3)]), made)[0] == x[0]).all()
    assert describe(()) == "copy"


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (Permute((1, 0)), [(2, 3, 4)]),
        (Permute((0, 0)), [(2, 3)]),
        (Flip((2,)), [(2, 3)]),
        (Reorder(1, (2, 3), (1, 0)), [(2, 7)]),
        (Split(0, ("a", "b"), (2, 2)), [(5,)]),
        (Merge(0, ("a", "b"), (2, 2)), [(2, 3)]),
        (Concat(0, (2, 2)), [(2, 3), (3, 3)]),
        (Concat(0, (2, 2)), [(2, 3), (2, 4)]),
        (Divide(0, (1, 2)), [(4,)]),
        (Stack(0), [(2,), (3,)]),
        (Unstack(2), [(2, 3)]),
        (Stack(0, 2), [(2,), (2,), (2,)]),
        (Unstack(0, 2), [(2, 3), (3, 3)]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(op: Op, shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        op.shapes(shapes)


def test_unknown_json_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown op"):
        op_from_json({"op": "exec", "code": "1"})
    with pytest.raises(ValueError, match="unknown op"):
        op_from_json({"op": "permute", "axes": [0], "more": 1})


@PATIENT
@given(st.data())
def test_contiguous_copies_any_permutation(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 14), min_size=1, max_size=4).map(tuple))
    axes = data.draw(st.permutations(range(len(shape))))
    dtype = data.draw(st.sampled_from([np.uint8, np.float16, np.float32, np.float64, np.complex64]))
    array = arrays(shape)[0].astype(dtype).transpose(axes)
    if data.draw(st.booleans()):
        array = array[::-1]
    assert bits(contiguous(array)) == bits(np.ascontiguousarray(array))


@pytest.mark.parametrize("shape", [(300, 700), (513, 65), (1, 4000), (20, 30, 40), (64, 32, 3, 3)])
def test_contiguous_copies_blocks_with_ragged_edges(shape: tuple[int, ...]) -> None:
    array = arrays(shape)[0].astype(np.float32).transpose()
    assert bits(contiguous(array)) == bits(np.ascontiguousarray(array))


def test_casts_round_to_nearest_and_leave_integers() -> None:
    x = np.array([1.0, 1.00390625, 3.4e38, np.nan, -0.0], np.float32)  # 1 + 2^-8: a tie
    y = cast(x, "BF16").astype(np.float32)
    assert y[0] == y[1] == 1.0
    assert np.isinf(y[2])
    assert np.isnan(y[3])
    assert np.signbit(y[4])
    i = np.arange(3)
    assert cast(i, "BF16") is i
    assert cast(x, "F32") is x
