"""A body in the making: what those who write its parts share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from convert.porting.rendering.call_items import CallItems
from convert.porting.rendering.context import Context
from convert.porting.rendering.names import Frames, Names
from convert.porting.rendering.scopes import Scope
from convert.porting.rendering.statements import Body


class Draft:
    """`texts` are of values that have a name, or are written as they stand; `read` are the names
    that the statement of the source mentions which is being written."""

    def __init__(self, scope: Scope, context: Context) -> None:
        self.scope, self.context, self.tree = scope, context, context.tree
        self.frames = Frames(scope)
        self.items = CallItems(scope, context, self.frames)
        self.body = Body(context.signatures.parameters_of(scope))
        self.names = Names(self.body.parameters, context.rules.names | context.taken)
        self.texts: dict[int, str] = {}
        self.read: set[str] = set()
        self.file, self.first_line, self.last_line = scope.lines()

    @property
    def end(self) -> int:
        """The time after the last statement."""
        return len(self.items) + 1

    def bind(self, name: str, value: int) -> None:
        """The name holds a value from now on, as long as that is used."""
        self.names.bind(name, value, self.items.last.get(value, -1))

    def numbers(self) -> Iterator[tuple[str, Any]]:
        """The arguments of a function that are numbers."""
        for name, x in self.scope.call.arguments.items() if self.scope.function else ():
            if type(x) in (int, float):
                yield name, x
