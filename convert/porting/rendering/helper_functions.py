"""The functions of a port: those that the source's own code calls, once for all calls alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from convert.porting.rendering.body import body_of
from convert.porting.rendering.context import Context
from convert.porting.rendering.not_rendered import Again, NotRendered
from convert.porting.rendering.scopes import Scope
from convert.porting.rendering.statements import Body, words

_VARIANTS = 2  # of a function, by the arguments that it is given


@dataclass(eq=False)
class WrittenFunction:
    """A function of the file, and the first of its calls."""

    name: str
    scope: Scope
    body: Body


class HelperFunctions:
    """All functions of a port, those first that others call. One that needs more than its arguments
    or does other things for arguments alike, is opened where it is called: then everything is to be
    written again."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.every: list[WrittenFunction] = []
        for scope in _innermost_first(context.tree.root):
            if scope.path not in context.layers.texts:  # a layer's own code is not written
                self._enter(scope)

    def _enter(self, scope: Scope) -> None:
        try:
            body = body_of(scope, self.context)
        except NotRendered:
            self._open(scope.function)
        if any("self" in words(line.text) for line in body.lines):
            self._open(scope.function)
        kind = self.context.signatures.kind(scope)
        own = [w for w in self.every if w.scope.function is scope.function]
        written = next((w for w in own if self.context.signatures.kind(w.scope) == kind), None)
        if written is None and len(own) < _VARIANTS:
            written = WrittenFunction(self._name(scope.function), scope, body)
            self.every.append(written)
        if written is None or list(map(str, written.body.lines)) != list(map(str, body.lines)):
            self._open(scope.function)
        self.context.functions[id(scope)] = written.name
        self.context.returns[id(scope)] = body.returned()

    def _open(self, function: Any) -> NoReturn:
        self.context.tree.root.open(function)
        self.context.signatures.forget(function)
        raise Again

    def _name(self, function: Any) -> str:
        others = sum(w.scope.function.__name__ == function.__name__ for w in self.every)
        return f"{function.__name__}{others + 1 if others else ''}"


def _innermost_first(scope: Scope) -> Iterator[Scope]:
    for item in scope.items:
        if isinstance(item, Scope):
            yield from _innermost_first(item)
    if scope.function is not None:
        yield scope
