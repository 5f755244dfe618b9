"""An operation left out or done twice; a factor or a summand too many."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from convert.diagnose.repair.edit import Edit, Node, is_table
from convert.diagnose.repair.edits_siblings import ACTIVATIONS, counting
from convert.diagnose.repair.words import is_one_step, of_one_added, of_sum
from convert.program.replay import At, Change, resolve


def leave_out(node: Node) -> Iterator[Edit]:
    """The operation left out, or done twice."""
    shape = node.out.shape if node.out is not None else None
    tensors = node.operation.refs
    seen: set[int] = set()
    for order, value in enumerate(tensors):
        held = node.values[value]
        if held.shape != shape or held.dtype != node.out.dtype or value in seen:
            continue
        seen.add(value)

        def change(at: At, k: int = order) -> Any:
            return at.values[at.operation.refs[k]]

        factor = node.name in ("mul", "div") and len(tensors) > 1
        cost = 1.3 if factor or not node.out.is_floating_point() else 0.9
        edit = node.edit(cost, _left_out_word(node), _left_out_said(node, order), change)
        edit.omits = True
        yield edit
    if len(node.operation.made) == 1 and len(tensors) == 1 and node.tensors[0].shape == shape:
        yield node.edit(1.8, "left_out", f"{node.name} done twice", _twice)


def _twice(at: At) -> Any:
    function = resolve(at.operation.function)
    return function(function(*at.args, **at.kwargs), *at.args[1:], **at.kwargs)


def _left_out_said(node: Node, order: int) -> str:
    two = len(node.operation.refs) > 1
    if node.name in ("add", "sub", "mul", "div") and two:
        return f"only the {('first', 'second')[min(order, 1)]} operand of this {node.name}"
    return f"no {node.name}"


def _left_out_word(node: Node) -> str:
    name, two = node.name, len(node.operation.refs) > 1
    if name in ACTIVATIONS and name != "softmax":
        return "activation"
    if name in ("masked_fill", "where"):
        return "causal" if any(map(_is_causal, node.tensors)) else "mask"
    if name == "flip":
        return "reversed"
    if name == "tril":
        return "causal"
    if name in ("mul", "div") and not two:
        return "scale"
    if name in ("add", "sub") and not two:
        return counting(node) or of_one_added(node) or "left_out"
    if name in ("add", "sub") and not node.out.is_floating_point():
        return "offset"
    if name == "add" and two:
        return _sum_word(node)
    if name in ("transpose", "permute", "T", "mT"):
        return "transposed"
    return "size" if is_one_step(node) else "left_out"


MASKED = -20.0  # what is added to a logit that hardly counts is at most this


def _is_causal(mask: Any) -> bool:
    """Whether a mask is that of later steps, true where they are or where they are not."""
    import torch

    if mask.dtype != torch.bool or mask.ndim < 2 or mask.shape[-1] != mask.shape[-2]:
        return False
    later = torch.ones_like(mask).triu(1)
    return bool(torch.equal(mask, later) or torch.equal(mask, ~later))


def _sum_word(node: Node) -> str:
    """A sum of a mask, of a bias, or of two values that were computed."""
    import torch

    leaves = [node.program.leaves.get(r) for r in node.operation.refs]
    if any(x is not None and x.kind in ("parameter", "buffer") for x in leaves):
        biases = [x for x in leaves if x is not None and x.name.endswith(("bias", ".b", "_b"))]
        return "bias_missing" if biases else "left_out"
    for r in node.operation.refs:
        t = node.values[r]
        low = MASKED if r in node.program.tables else -1e4
        if torch.is_floating_point(t) and bool((t <= low).any()):
            return "mask"
    return of_sum(node)


TIMES = "what it gives times {number}"
_LAYERS = ("linear", "conv1d", "conv2d", "conv3d", "embedding", "layer_norm", "group_norm")


def solved_after(node: Node) -> Iterator[Edit]:
    """A factor or a summand, to be solved for, on what the operation gives."""
    out = node.out
    if out is None or not out.is_floating_point() or len(node.operation.made) != 1:
        return
    index = node.index
    why = "constant" if is_table(node) else "scale"

    def times(c: float) -> dict[int, Change]:
        return {index: lambda at: at.run() * c}

    def plus(c: float) -> dict[int, Change]:
        return {index: lambda at: at.run() + c}

    layer = 0.2 if node.name in _LAYERS else 0.0  # a factor is seldom where a layer is called
    yield Edit(2.6 + layer, why, TIMES, free=times, start=1.0, at=index)
    yield Edit(3.2, "constant", "what it gives plus {number}", free=plus, start=0.0, at=index)
