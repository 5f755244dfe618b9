"""What the calls of a class take and give: one signature for all its instances."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from convert.porting.rendering.argument_text import leaves_of
from convert.porting.rendering.layer_calls import LayerCalls
from convert.porting.rendering.not_rendered import Again
from convert.porting.rendering.scopes import Scope, Tree
from convert.program.graph import ValueRef, refs
from convert.program.nesting import LEAF


class Signatures:
    """See the module's first lines."""

    def __init__(self, tree: Tree, layers: LayerCalls) -> None:
        self.tree, self.layers = tree, layers
        self.sizes: dict[int, list[str]] = {}  # of a call, those that it is given as arguments
        self.classes: dict[Any, list[Scope]] = {}
        self.numbers: dict[Any, list[str]] = {}  # of a function, the arguments that are numbers
        for scope in tree.root.every():
            self.classes.setdefault(self.kind(scope), []).append(scope)
        self.stated = {
            of: list(_stated(scopes)) if scopes[0].function is None else []
            for of, scopes in self.classes.items()
        }

    def kind(self, scope: Scope) -> Any:
        """What calls have in common that are of one signature: the class, or the function and the
        arguments by which it gets arrays."""
        if scope.function is None:
            return type(scope.module)
        return scope.function, *sorted(self.given_to(scope))

    def plain(self, scope: Scope) -> list[str]:
        """The parameters that are words or numbers."""
        kind = self.kind(scope)
        return [*self.stated[kind], *self.numbers.get(kind, ())]

    def number(self, scope: Scope, name: str) -> None:
        """Make an argument of a function, a number, a parameter of the port's."""
        held = self.numbers.setdefault(self.kind(scope), [])
        if name not in held:
            held.append(name)
            raise Again

    def parameters_of(self, scope: Scope) -> list[str]:
        """The arguments of forward by which any call of this class takes arrays, in order."""
        found: dict[str, None] = {}
        extra = 0
        for one in self.classes[self.kind(scope)]:
            found |= dict.fromkeys(n for n in one.call.arguments if n in self.given_to(one))
            extra = max(extra, len(self.extra(one)))
        found |= dict.fromkeys(self.numbers.get(self.kind(scope), ()))
        order = list(scope.call.signature)
        names = sorted(found, key=lambda n: order.index(n) if n in order else len(order))
        names += map(_extra_name, range(extra))
        names += self.size_names(scope)
        names += self.stated[self.kind(scope)]
        return sorted(names, key=lambda n: self.is_optional(n, scope))

    def forget(self, function: Any) -> None:
        """Leave out the calls of a function, which are opened."""
        for kind, scopes in list(self.classes.items()):
            if scopes[0].function is function:
                del self.classes[kind]

    def size_names(self, scope: Scope) -> list[str]:
        """The parameters of a class that are sizes."""
        count = max(len(self.sizes.get(id(s), ())) for s in self.classes[self.kind(scope)])
        return [size_name(k) for k in range(count)]

    def size(self, scope: Scope, symbol: str) -> str:
        """The argument by which a call gets a size that is of no array in it."""
        held = self.sizes.setdefault(id(scope), [])
        if symbol not in held:
            held.append(symbol)
            raise Again
        return size_name(held.index(symbol))

    def is_optional(self, name: str, scope: Scope) -> bool:
        """Whether some calls of a class do not give this argument."""
        if name in self.plain(scope):
            return False
        if name in (sizes := self.size_names(scope)):
            held = (len(self.sizes.get(id(s), ())) for s in self.classes[self.kind(scope)])
            return min(held) <= sizes.index(name)
        return any(name not in self.given_to(one) for one in self.classes[self.kind(scope)])

    def given_to(self, scope: Scope) -> set[str]:
        """The parameters by which a call takes arrays."""
        taken = set(scope.takes)
        found = {n for n, tree in scope.call.arguments.items() if taken.intersection(refs(tree))}
        return found | {_extra_name(k) for k in range(len(self.extra(scope)))}

    def extra(self, scope: Scope) -> list[int]:
        """The arrays that a call takes by other ways than its arguments."""
        given = set(refs(list(scope.call.arguments.values())))
        return [v for v in scope.takes if v not in given]

    def results_of(self, scope: Scope) -> list[int | None]:
        """The values that any call of this class gives, in order; None for one that this call has
        not."""
        if scope.is_model:
            return [r.value for r in self.tree.graph.results if isinstance(r, ValueRef)]
        places: dict[Any, None] = {}
        for one in self.classes[self.kind(scope)]:
            places |= dict.fromkeys(self._places(one))
        held = {place: v for v, place in zip(scope.gives, self._places(scope), strict=True)}
        return [held.get(place) for place in sorted(places)]

    def given_by(self, scope: Scope) -> list[Any]:
        """What the expression that calls a part gives, in nested lists; -1 for what this call has
        not, or nobody takes."""
        if self.layers.is_layer(scope):
            leaves = iter(scope.call.results)
            made = _nested(scope.call.nesting, leaves, set(scope.gives))
            return made if isinstance(made, list) else [made]
        if self.layers.is_sequence(scope.path):
            return list(scope.gives)
        return [-1 if v is None else v for v in self.results_of(scope)]

    def _places(self, scope: Scope) -> list[tuple[int, int]]:
        """Where in what it returns each of the values that a call gives stands."""
        passed = [r.value if isinstance(r, ValueRef) else -1 for r in scope.call.results]
        return [
            (passed.index(v), 0) if v in passed else (len(passed), k)
            for k, v in enumerate(scope.gives)
        ]

    def argument_texts(self, scope: Scope) -> dict[int, str]:
        """The arrays that a call takes, as its own code names them."""
        found: dict[int, str] = {}
        for name, tree in scope.call.arguments.items():
            for value, text in leaves_of(tree, name):
                if value in scope.takes:
                    found.setdefault(value, text)
        for k, value in enumerate(self.extra(scope)):
            found[value] = _extra_name(k)
        return found

    def passed(self, scope: Scope) -> list[int]:
        """The arrays that are written in the call of a part."""
        if self.layers.is_layer(scope):
            return [v for v in refs(list(scope.call.arguments.values())) if self.tree.is_array(v)]
        if self.layers.is_sequence(scope.path):
            return scope.takes
        trees = [scope.call.arguments.get(n) for n in self.parameters_of(scope)]
        return [v for v in refs(trees) if v in scope.takes] + self.extra(scope)


def _nested(nesting: Any, leaves: Iterator[Any], wanted: set[int]) -> Any:
    """The values of a result in nested lists, -1 for those that are not wanted."""
    if nesting.kind == LEAF:
        found = next(leaves)
        return found.value if isinstance(found, ValueRef) and found.value in wanted else -1
    return [_nested(part, leaves, wanted) for part in nesting.parts]


def _stated(scopes: list[Scope]) -> Iterator[str]:
    """The arguments that are words or numbers, and not the same at all calls of one module."""
    for name in scopes[0].call.signature:
        values: dict[str, set[str]] = {}
        for one in scopes:
            value = one.call.arguments.get(name)
            if not isinstance(value, str | bool | int | float):
                break
            values.setdefault(one.path, set()).add(repr(value))
        else:
            if any(len(own) > 1 for own in values.values()):
                yield name


def _extra_name(k: int) -> str:
    return f"extra{k or ''}"


def size_name(k: int) -> str:
    """The name of the argument that is the k-th size."""
    return f"size{k or ''}"
