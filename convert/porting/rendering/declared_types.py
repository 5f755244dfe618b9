"""The types that a port declares: of parameters, of what calls give."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from convert.porting.rendering.context import Context
from convert.porting.rendering.operands import ArrayType
from convert.porting.rendering.scopes import Scope
from convert.program.graph import ValueRef

_NAMES = {"tuple": "tuple[Any, ...]", "Stored": "np.ndarray"}


def type_of(values: Iterable[Any]) -> str:
    """The type of plain values."""
    names = dict.fromkeys("None" if v is None else type(v).__name__ for v in values)
    return " | ".join(_NAMES.get(name, name) for name in names)


class Types:
    """Of the calls of one class, or of one function."""

    def __init__(self, context: Context) -> None:
        self.tree, self.signatures = context.tree, context.signatures

    def parameter(self, name: str, scopes: Sequence[Scope]) -> str:
        """Of a parameter, where it is given."""
        scope, given = scopes[0], [s.call.arguments.get(name) for s in scopes]
        if name in self.signatures.plain(scope):
            return type_of(given)
        if any(isinstance(x, list | dict) for x in given):
            used = [name in self.signatures.given_to(s) for s in scopes]
            if any(x is not None and not u for x, u in zip(given, used, strict=True)):
                return "Any"  # None stands for what nobody needs of it
            return self._nested([x for x in given if x is not None])
        return "int" if name in self.signatures.size_names(scope) else "Array"

    def _nested(self, given: list[Any]) -> str:
        """Of an argument of several arrays."""
        if not all(isinstance(x, list) and x and all(map(self._is_plain, x)) for x in given):
            return "Any"
        counts = {len(x) for x in given}
        items = ", ".join(["Array"] * max(counts)) if len(counts) == 1 else "Array, ..."
        return f"tuple[{items}]"

    def _is_plain(self, x: Any) -> bool:
        return isinstance(x, ValueRef) and self._is_array(x.value)

    def _is_array(self, value: int) -> bool:
        return isinstance(self.tree.type_of(value), ArrayType)

    def result(self, scopes: Sequence[Scope]) -> str:
        """Of what the calls give; what only some of them do is Any."""
        if scopes[0].is_model:
            nesting = self.tree.graph.outputs
            if nesting.kind == "leaf":
                return "Array"
            return str(nesting.cls.__name__) if nesting.kind == "named" else "Any"
        every = zip(*map(self.signatures.results_of, scopes), strict=True)
        kinds = [self._of_values(values) for values in every]
        return kinds[0] if len(kinds) == 1 else f"tuple[{', '.join(kinds)}]" if kinds else "None"

    def _of_values(self, values: Sequence[int | None]) -> str:
        if all(v is None for v in values):
            return "None"
        return "Array" if all(v is not None and self._is_array(v) for v in values) else "Any"
