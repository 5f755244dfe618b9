"""Other values: another one of the computation, one that is left out, one in another form."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from convert.diagnose.repair.edit import (
    Changes,
    Edit,
    Node,
    first_users,
    named,
    scalars,
    with_scalar,
    with_values,
)
from convert.diagnose.repair.edits_siblings import ALONG_LAST, inserted
from convert.diagnose.repair.words import bypasses, bypasses_layers, of_layer, of_negated
from convert.program.operations import Program
from convert.program.replay import At, Change, Values

LATELY = 80  # values made last before an operation, that it may take by mistake


def _made_before(node: Node) -> list[int]:
    earlier = node.program.operations[max(0, node.index - LATELY) : node.index]
    return [v for o in earlier for v in o.made]


def operands(node: Node) -> Iterator[Edit]:
    """Another value of the same shape in place of one that the operation takes."""
    refs = list(dict.fromkeys(node.operation.refs))
    before = [v for v in (*node.program.leaves, *_made_before(node)) if v in node.values]
    taken = [i for layer in node.program.layers.values() for i in layer[1]]
    for ref in refs:
        held = node.values[ref]
        for other in dict.fromkeys((*before, *taken)):
            x = node.values.get(other)
            if other == ref or x is None or x.dtype != held.dtype:
                continue
            handed_on = node.operation.site is None and x.ndim == held.ndim
            if x.shape != held.shape and not handed_on:
                continue
            why = "operand"
            if node.name == "add" and any(bypasses_layers(node.program, ref, r) for r in refs):
                why = "residual"
            if taken_for(node.program, ref, other) == "swapped":
                why = "swapped"
            said = f"{named(node.program, other)} in place of {named(node.program, ref)}"
            yield node.edit(1.7, why, said, replacing(ref, other))
    tensors = [node.values[r] for r in refs]
    if len(refs) >= 2 and tensors[0].shape == tensors[1].shape and node.name not in ("add", "mul"):
        one, two = (node.operation.refs.index(r) for r in refs[:2])

        def exchanged(at: At) -> Any:
            a, b = at.operation.refs[one], at.operation.refs[two]
            return with_values(at, {a: at.values[b], b: at.values[a]})

        yield node.edit(1.2, "operand", "its first two operands exchanged", exchanged)


def taken_for(program: Program, one: int, other: int) -> str:
    """The word for one value in place of another."""
    kinds = {program.leaves[v].kind if v in program.leaves else "" for v in (one, other)}
    return "swapped" if kinds == {"parameter"} else "operand"


def replacing(ref: int, other: int) -> Change:
    return lambda at: with_values(at, {ref: at.values[other]})


def insertions(node: Node) -> Iterator[Edit]:
    """Something done to what the operation gives that torch does not do."""
    out = node.out
    if out is None or len(node.operation.made) != 1:
        return
    if not out.is_floating_point():
        return
    for said, (why, function) in inserted().items():
        if said in ALONG_LAST and out.shape[-1:] == (1,):
            continue  # of one element nothing remains but its sign
        why = of_negated(node) if said == "negated" else why

        def change(at: At, function: Any = function) -> Any:
            return function(at.run())

        yield node.edit(2.0, why, f"what it gives {said}", change)
    for other in (*node.program.leaves, *_made_before(node)):
        x = node.values.get(other)
        if x is None or x.dtype != out.dtype or out.ndim < 2 or not x.numel():
            continue
        leaf = node.program.leaves.get(other)
        bias = leaf is not None and leaf.kind == "parameter" and x.ndim == 1
        if bias and leaf is not None and leaf.name.endswith("bias") and _broadcasts(x, out):
            again = other in node.program.users or other in node.program.before.get(
                node.operation.made[0], ())  # fmt: skip
            yield node.edit(1.6, "bias_twice" if again else "operand",
                            f"{leaf.name} added to it", _adding(other))  # fmt: skip
        if _broadcasts(x, out) and leaf is not None:

            def scaled(at: At, other: int = other) -> Any:
                return at.run() * at.values[other]

            said = f"what it gives times {named(node.program, other)}"
            yield node.edit(2.3, "order", said, scaled)
        if x.shape != out.shape:
            continue

        def added(at: At, other: int = other) -> Any:
            return at.run() + at.values[other]

        yield node.edit(2.2, "residual", f"{named(node.program, other)} added to it", added)


def _adding(other: int) -> Change:
    return lambda at: at.run() + at.values[other]


def _broadcasts(x: Any, out: Any) -> bool:
    sizes = zip(reversed(x.shape), reversed(out.shape), strict=False)
    return x.ndim <= out.ndim and all(a in (1, b) for a, b in sizes)


def exchanges(
    program: Program, values: Values, near: frozenset[int] = frozenset()
) -> Iterator[Edit]:
    """Two values in each other's place, in all that takes them. With `near` where these operations
    do."""
    made = program.makers
    users = {v: [i for i in at if not near or i in near] for v, at in program.users.items()}
    users = {v: at for v, at in users.items() if at}
    if len(users) > _MOST:
        return
    for a, b in itertools.combinations(users, 2):
        x, y = values[a], values[b]
        last = max(made.get(a, -1), made.get(b, -1))
        places = [i for i in (*users[a], *users[b]) if i > last]
        both = all(any(i > last for i in users[v]) for v in (a, b))  # else one replaces the other
        if x.shape != y.shape or x.dtype != y.dtype or len(set(places)) < 2 or not both:
            continue

        def change(at: At, a: int = a, b: int = b) -> Any:
            return with_values(at, {a: at.values[b], b: at.values[a]})

        said = f"{named(program, a)} and {named(program, b)} exchanged"
        yield Edit(1.25, taken_for(program, a, b), said, dict.fromkeys(places, change))


_MOST = 120  # values of which all pairs are tried


def leaf_edits(program: Program, values: Values) -> Iterator[Edit]:
    """A leaf in another form: a table or weight of the user's own, an input of a layer."""
    import torch

    users = first_users(program)
    for value, leaf in program.leaves.items():
        x = values[value]
        if value not in users:
            continue
        at = users[value]

        def edit(cost: float, cause: str, said: str, f: Any, v: int = value, i: int = at) -> Edit:
            return Edit(cost, cause, said, leaves={v: f}, at=i)

        name = leaf.name
        layer = program.layers.get(value)
        for given in layer[1] if layer else ():
            if given in values and values[given].shape == x.shape:
                changes = dict.fromkeys(program.users[value], replacing(value, given))
                # What other layers are given all the same is not left out: another value is taken.
                met = _is_met(program, value)
                why = "operand" if met else of_layer(program, program.layers[value][0])
                yield Edit(1.0, why, f"{name} left out", changes, at=at, omits=True)
        if layer and (other := _outputs_of(program, values, value)) is not None:

            def last(at: At, value: int = value, other: int = other) -> Any:
                made = _last_step(at.values[value], at.values[other])
                return with_values(at, {value: made})

            said = f"the last step of its outputs in place of {name}"
            yield Edit(1.1, "token", said, dict.fromkeys(program.users[value], last), at=at)
        if x.dtype in (torch.int64, torch.int32):
            yield edit(1.2, "offset", f"1 added to {name}", lambda t: t + 1)
            yield edit(1.2, "offset", f"1 taken from {name}", lambda t: t - 1)
            if leaf.kind in ("buffer", "constant"):
                for said, why, f in _indices(x):
                    yield edit(1.25, why, f"{name} {said}", f)
            continue
        if x.dtype == torch.bool:
            yield edit(1.2, "mask", f"{name} inverted", torch.logical_not)
            yield edit(1.2, "mask", f"{name} not applied", torch.ones_like)
            yield edit(1.2, "mask", f"{name} not applied", torch.zeros_like)
            continue
        if leaf.kind in ("parameter", "buffer", "constant"):
            for said, (why, f) in inserted().items():
                why = "flipped" if why == "reversed" and leaf.kind == "parameter" else why
                yield edit(1.6, why, f"{name} {said}", f)
            for d in range(x.ndim):
                if x.shape[d] > 2:
                    said = f"{name} shifted by one along axis {d}, its first kept"
                    yield edit(1.6, "offset", said, lambda t, d=d: _shifted(t, d))
            yield edit(1.5, "left_out", f"no {name}: zeros", torch.zeros_like)
            yield edit(1.5, "left_out", f"no {name}: ones", torch.ones_like)
            yield edit(1.4, "scale_plus_one", f"1 + {name}", lambda t: 1 + t)
            if leaf.kind == "buffer" and bool((x > 0).all()):
                yield edit(2.5, "constant", f"{name} to a power", lambda t: t**0.5)
        if leaf.kind in ("buffer", "constant") and x.numel() > 1 and bool((x > 0).all()):
            yield Edit(2.7, "constant", f"{name} to the power {{number}}",
                       free=_solved_for(program, value, pow), start=0.9, at=at)  # fmt: skip
        if x.numel() == 1 and x.is_floating_point() and leaf.kind != "layer":
            why = "scale" if leaf.kind == "parameter" else "constant"
            number = _solved_for(program, value, lambda t, c: t * 0 + c)
            yield Edit(2.5, why, f"{{number}} in place of {name}", free=number,
                       start=float(x), at=at)  # fmt: skip
        for a, b in itertools.combinations(range(x.ndim), 2):
            if x.shape[a] == x.shape[b] and leaf.kind != "layer":
                yield edit(1.2, "transposed", f"{name} with axes {a} and {b} exchanged",
                           lambda t, a=a, b=b: t.transpose(a, b))  # fmt: skip
        if x.is_complex():
            yield edit(1.0, "operation", f"the conjugate of {name}", torch.conj_physical)


def _outputs_of(program: Program, values: Values, value: int) -> int | None:
    """What a recurrent layer gives at all steps, if `value` are its last states."""
    x = values[value]
    for other, layer in program.layers.items():
        out = values.get(other)
        if layer != program.layers[value] or other == value or out is None:
            continue
        if x.ndim != 3 or out.ndim != 3 or x.shape[1] not in out.shape[:2]:
            continue
        if (
            out.shape[-1] in (x.shape[-1], 2 * x.shape[-1])
            and len(x) % (out.shape[-1] // x.shape[-1]) == 0
        ):
            return other
    return None


def _last_step(states: Any, out: Any) -> Any:
    import torch

    ways = out.shape[-1] // states.shape[-1]
    last = out[:, -1] if out.shape[0] == states.shape[1] else out[-1]
    made = last.unflatten(-1, (ways, states.shape[-1])).transpose(0, 1)
    return torch.cat((states[: len(states) - ways], made))


def _indices(x: Any) -> Iterator[tuple[str, str, Callable[[Any], Any]]]:
    """A table of indices otherwise: its axes exchanged, back to front, rows counted as columns."""
    for a, b in itertools.combinations(range(x.ndim), 2):
        if x.shape[a] == x.shape[b] > 1:
            said = f"with axes {a} and {b} exchanged"
            yield said, "transposed", partial(_swapped, a=a, b=b)
    for d in range(x.ndim):
        if x.shape[d] > 1:
            yield f"back to front along axis {d}", "reversed", partial(_back, d=d)
    if x.numel() > 3:
        count = int(x.max()) + 1
        for rows in (n for n in range(2, count) if count % n == 0):
            if rows * rows == count or count // rows < 64:
                said = f"with rows and columns of {rows} x {count // rows} exchanged"
                yield said, "rearranged", partial(_regrid, rows=rows, count=count)


def _swapped(t: Any, a: int, b: int) -> Any:
    return t.transpose(a, b)


def _back(t: Any, d: int) -> Any:
    return t.flip(d)


def _regrid(t: Any, rows: int, count: int) -> Any:
    return (t % (count // rows)) * rows + t // (count // rows)


def _is_met(program: Program, value: int) -> bool:
    """Whether another layer takes the value, or what is made of it."""
    return any(v != value and bypasses(program, value, v) for v in program.layers)


def _solved_for(
    program: Program, value: int, form: Callable[[Any, float], Any]
) -> Callable[[float], Changes]:
    """A value in a form that a number says, wherever it is taken."""

    def changes(c: float) -> Changes:
        def change(at: At) -> Any:
            return with_values(at, {value: form(at.values[value], c)})

        return dict.fromkeys(program.users[value], change)

    return changes


def _shifted(t: Any, d: int) -> Any:
    import torch

    return torch.cat((t.narrow(d, 0, 1), t.narrow(d, 0, t.shape[d] - 1)), d)


def neutral(node: Node) -> Iterator[Edit]:
    """What changes nothing by itself, but shows beside another fault: -inf as a large number."""
    for path, value in scalars(node.operation):
        if isinstance(value, float) and value < -1e3:
            for other in (-1e9, -1e10, -1e30, float("-inf")):
                if other != value:
                    yield node.edit(0.1, "mask", f"{other:g} in place of {value:g}",
                                    with_scalar(path, other))  # fmt: skip
