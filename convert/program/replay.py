"""A recorded program, run again on other values, and with other operations in some places."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from convert.program.operations import Operation, Program, Ref, find, mapped
from convert.program.recurrent import recurrent

Values = dict[int, Any]  # by the numbers of a program; torch tensors


@dataclass
class At:
    """One operation as it is about to run: its arguments with their values, and all values."""

    operation: Operation
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    values: Mapping[int, Any]

    def run(self) -> Any:
        """What torch computes here."""
        return resolve(self.operation.function)(*self.args, **self.kwargs)


Change = Callable[[At], Any]  # what is computed instead


def replay(program: Program, leaves: Values) -> Values:
    """Every value of the program. Raises what an operation raises."""
    values = dict(leaves)
    for operation in program.operations:
        _store(operation, execute(operation, values), values)
    return values


def changed(
    program: Program, values: Values, changes: Mapping[int, Change], leaves: Values | None = None
) -> Any:
    """The target where the operations with these indices compute something else; `values` are
    those of `replay`, `leaves` other values for some leaves."""
    new: Values = dict(leaves or {})
    if program.target in new:
        return new[program.target]
    both = _Over(values, new)
    for index, operation in enumerate(program.operations):
        change = changes.get(index)
        if change is None and not any(r in new for r in operation.refs):
            continue
        _store(operation, execute(operation, both, change), new)
    return both[program.target]


class _Over(dict[int, Any]):
    """Values, some of them new."""

    def __init__(self, old: Values, new: Values) -> None:
        super().__init__()
        self.old, self.new = old, new

    def __missing__(self, key: int) -> Any:
        return self.new[key] if key in self.new else self.old[key]


def execute(operation: Operation, values: Mapping[int, Any], change: Change | None = None) -> Any:
    """What one operation gives; what it writes into is a copy, and is given."""
    import torch

    written = operation.refs[operation.writes] if operation.writes is not None else None
    copy = values[written].clone() if written is not None else None

    def value(x: Any) -> Any:
        if not isinstance(x, Ref):
            return x
        return copy if x.value == written else values[x.value]

    at = At(operation, mapped(operation.args, value), mapped(operation.kwargs, value), values)
    output = at.run() if change is None else change(at)
    if copy is not None and (change is None or not isinstance(output, torch.Tensor)):
        return copy
    return output


def _store(operation: Operation, output: Any, values: Values) -> None:
    import torch

    made = [output] if isinstance(output, torch.Tensor) else list(find(output, torch.Tensor))
    for number, tensor in zip(operation.made, made, strict=False):
        values[number] = tensor


@functools.cache
def resolve(function: str) -> Callable[..., Any]:
    """The function of a name. AttributeError if this torch has none."""
    import torch

    if function == "recurrent":
        return recurrent
    parts = function.split(".")[1:]
    if parts[-1] == "__get__":
        return lambda x: getattr(x, parts[-2])
    found: Any = torch
    for part in parts:
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]
