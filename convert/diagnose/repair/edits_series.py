"""Tables of numbers that stand in code: series, and windows of a signal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from convert.diagnose.repair.edit import Edit, Node, first_users, is_table
from convert.program.operations import Program
from convert.program.replay import Values

Form = Callable[[Any], Any]
_WINDOWS = ("hann", "hamming", "blackman", "bartlett")


def series(program: Program, values: Values) -> Iterator[Edit]:
    """Every table of positive numbers along one axis as another series of as many."""
    users = first_users(program)
    for value, leaf in program.leaves.items():
        if leaf.kind in ("buffer", "constant") and value in users:
            for why, said, form in _forms(values[value]):
                yield Edit(1.3, why, f"{leaf.name} as {said}", leaves={value: form},
                           at=users[value])  # fmt: skip
    for index, operation in enumerate(program.operations):
        node = Node(index, operation, program, values)
        if node.out is not None and is_table(node) and len(operation.made) == 1:
            for why, said, form in _forms(node.out):
                change = partial(_formed, form)
                yield Edit(1.3, why, f"its numbers as {said}", {index: change}, at=index)


def _formed(form: Form, at: Any) -> Any:
    return form(at.run())


def _forms(x: Any) -> Iterator[tuple[str, str, Form]]:
    import torch

    n = x.numel()
    if not x.is_floating_point() or n < 3 or n > 1 << 16 or max(x.shape) != n:
        return
    for name in _WINDOWS:
        make = getattr(torch, f"{name}_window")
        for periodic in (True, False):
            if torch.allclose(make(n, periodic=periodic).to(x.dtype), x.flatten(), atol=1e-5):
                other = "symmetric" if periodic else "periodic"
                yield "constant", f"the {other} window", partial(_window, make, not periodic)
    if not bool((x > 0).all()):
        return
    first, last = float(x.flatten()[0]), float(x.flatten()[-1])
    if first != last:
        yield "constant", "one series of equal factors", partial(_geometric, first, last)
        yield "constant", "one series of equal steps", partial(_linear, first, last)
    yield "constant", f"the powers of 2 ** (-8 / {n})", _slopes


def _window(make: Any, periodic: bool, x: Any) -> Any:
    return make(x.numel(), periodic=periodic, dtype=x.dtype).reshape(x.shape)


def _geometric(first: float, last: float, x: Any) -> Any:
    import torch

    steps = torch.linspace(0, 1, x.numel(), dtype=x.dtype)
    return (first * (last / first) ** steps).reshape(x.shape)


def _linear(first: float, last: float, x: Any) -> Any:
    import torch

    return torch.linspace(first, last, x.numel(), dtype=x.dtype).reshape(x.shape)


def _slopes(x: Any) -> Any:
    import torch

    powers = torch.arange(1, x.numel() + 1, dtype=x.dtype)
    return (2.0 ** (-8.0 * powers / x.numel())).reshape(x.shape)
