"""Which logits count: causal masks aligned otherwise, masks that come too late."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from convert.diagnose.repair.edit import Edit, Node
from convert.program.operations import Program
from convert.program.replay import At, Values

_LOW = -20.0  # what is added to a logit that hardly counts is at most this
_STEPS = 6  # operations between a mask and its softmax


def masks(program: Program, values: Values, masking: frozenset[int]) -> Iterator[Edit]:
    """`masking` are the operations whose results only say what is masked."""
    for index, operation in enumerate(program.operations):
        if operation.made[0] not in values:
            continue
        node = Node(index, operation, program, values)
        if index in masking:
            yield from _causal(node)
        if operation.name in ("masked_fill", "where", "add"):
            yield from _too_late(node)
        if operation.name in ("sum", "mean", "count_nonzero"):
            yield from _counted(node)


def _causal(node: Node) -> Iterator[Edit]:
    """A mask of (queries, keys) as a causal one, its diagonal at the first key, or at the last."""
    import torch

    out = node.out
    if out.ndim < 2 or min(out.shape[-2:]) < 2:
        return
    T, S = out.shape[-2:]
    floating = out.is_floating_point()
    if floating and not bool((out <= _LOW).any()):
        return
    for offset, said in ((0, "its diagonal at the first key"), (S - T, "its end at the last key")):
        later = torch.ones(T, S, dtype=torch.bool).triu(1 + offset)
        if floating:
            low = float(out.min())
            forms = [torch.zeros(T, S, dtype=out.dtype).masked_fill(later, low)]
        elif out.dtype == torch.bool:
            forms = [later, ~later]
        else:
            continue
        for form in forms:

            def change(at: At, form: Any = form) -> Any:
                return form.expand(out.shape)

            yield node.edit(1.05, "causal", f"a causal mask, {said}", change)
            if T == S:
                break


def _counted(node: Node) -> Iterator[Edit]:
    """How many count, where all do: the length for the number of steps that are not padding."""
    import torch

    x = node.tensors[0]
    if bool(((x == 0) | (x == 1)).all()) and bool((x == 0).any()):

        def every(at: At) -> Any:
            return type(at)(at.operation, (torch.ones_like(at.args[0]), *at.args[1:]),
                            at.kwargs, at.values).run()  # fmt: skip

        yield node.edit(1.05, "mask", "all counted, the masked ones too", every)


def _too_late(node: Node) -> Iterator[Edit]:
    """What is masked before the softmax in torch, masked after it: the rest no longer sums to 1."""
    import torch

    out, tensors = node.out, node.tensors
    if not out.is_floating_point() or len(tensors) < 2:
        return
    softmax = _softmax(node.program, node.operation.made[0])
    same = [k for k, t in enumerate(tensors) if t.is_floating_point() and t.shape == out.shape]
    if softmax is None or not same:
        return
    x = node.operation.refs[same[0]]
    gone = (out <= min(_LOW, -1e3)) | (out - node.values[x] <= -1e3)
    if gone.dtype != torch.bool or not bool(gone.any()) or bool(gone.all()):
        return

    def handed_on(at: At) -> Any:
        return at.values[x]

    def after(at: At) -> Any:
        return at.run() * ~gone

    said = "the mask put on after the softmax, not before"
    yield Edit(1.0, "mask", said, {node.index: handed_on, softmax: after}, at=node.index)
    yield Edit(
        1.05, "mask", f"{said}, and what is left summed to one again",
        {node.index: handed_on, softmax: lambda at: _summed(after(at), at)}, at=node.index,
    )  # fmt: skip


def _summed(made: Any, at: At) -> Any:
    return made / made.sum(-1, keepdim=True).clamp(min=1e-9)


def _softmax(program: Program, value: int) -> int | None:
    """The softmax that a value goes into, in a few steps."""
    for _ in range(_STEPS):
        users = program.users.get(value, ())
        for i in users:
            if program.operations[i].name == "softmax":
                return i
        if len(users) != 1:
            return None
        value = program.operations[users[0]].made[0]
    return None
