"""The operations and calls of one call, and which of them are statements."""

from __future__ import annotations

from typing import Any, TypeGuard

from convert.porting.rendering.context import Context
from convert.porting.rendering.names import Frames
from convert.porting.rendering.scopes import Scope
from convert.porting.rules.elementwise import COPIES
from convert.program.graph import GraphNode

GETITEM = "operator.getitem"
_CASTS = {"aten._to_copy.default", "aten.to.dtype", "aten.to.dtype_layout", "aten.to.device"}
_SHAPES = {f"aten.{name}.default" for name in ("view", "reshape", "_unsafe_view", "expand")}
Item = GraphNode | Scope


class CallItems:
    """What a call does, but for what only hands an array on.

    `maker` says which item makes a value, `users` which take it: numbers of items, their count for
    what is returned. `inlined` are written where they are used, `root` says in whose statement
    each item is written, `last` in which one a value is used last. `keys` are the executions of
    the source's statements (`Frames.executions`), `results` the values that are returned.
    """

    def __init__(self, scope: Scope, context: Context, frames: Frames) -> None:
        self.context, self.tree, self.frames = context, context.tree, frames
        every = list(context.layers.spliced(scope))
        self._copies = {made(i)[0]: _first_taken(i) for i in every if self._is_copy(i)}
        self.items = [i for i in every if made(i) and not self._is_copy(i)]
        self.maker = {v: i for i, item in enumerate(self.items) for v in made(item)}
        results = context.signatures.results_of(scope)
        self.results = [self.source(v) for v in results if v is not None]
        self.keys = frames.executions(self.items, self.tree.placeholders)
        self.users: dict[int, list[int]] = {}
        for i, item in enumerate(self.items):
            for v in self._taken(item):
                self.users.setdefault(v, []).append(i)
        for v in self.results:
            self.users.setdefault(v, []).append(len(self.items))
        self.inlined = {i for i, item in enumerate(self.items) if self._is_inlined(i, item)}
        self.root: dict[int, int] = {}
        for i in reversed(range(len(self.items))):
            self.root[i] = i
            if i in self.inlined:
                (user,) = {u for v in made(self.items[i]) for u in self.users.get(v, ())}
                self.root[i] = self.root.get(user, user)
        self.last = {
            v: max(self.root.get(u, u) for u in found) for v, found in self.users.items() if found
        }

    def __len__(self) -> int:
        return len(self.items)

    def source(self, value: int) -> int:
        """The value that one is a copy of."""
        while value in self._copies:
            value = self._copies[value]
        return value

    def given(self, item: Item) -> list[Any]:
        """What the expression of an item gives: -1 for what only other calls of its class do."""
        if isinstance(item, GraphNode):
            return [item.made]
        return self.context.signatures.given_by(item)

    def targets(self, item: Item) -> list[Any]:
        """The values that the statement of an item names; -1 for one that nobody takes."""
        found = self.given(item)
        if len(found) > 1 or not isinstance(self.tree.type_of(found[0]), list):
            return found
        parts: dict[int, int] = {}
        for u in self.users.get(found[0], ()):
            user = self.items[u] if u < len(self.items) else None
            if not isinstance(user, GraphNode) or user.op != GETITEM or user.args[1] in parts:
                return found
            parts[user.args[1]] = user.made
        count = len(self.tree.type_of(found[0]))
        return [parts.get(k, -1) for k in range(count)]

    def siblings(self, i: int) -> list[int]:
        """The items of the same statement of the source that are statements too."""
        return [
            j for j, other in enumerate(self.items)
            if self.keys[j] == self.keys[i] and j not in self.inlined and not is_getitem(other)
        ]  # fmt: skip

    def is_argument(self, i: int) -> bool:
        """Whether an item is taken by a function that its own statement calls."""
        own = self.keys[i][0]
        users = {u for v in made(self.items[i]) for u in self.users.get(v, ())}
        keys = [self.keys[u][0] for u in users if u < len(self.items)]
        return any(len(key) > len(own) and key[: len(own)] == own for key in keys)

    def _is_copy(self, item: Item) -> bool:
        """Whether an item gives its argument."""
        if isinstance(item, Scope):
            return item.path in self.context.layers.gone and len(item.gives) == 1
        if item.op in COPIES:
            return True
        if item.op not in _CASTS and item.op not in _SHAPES:
            return False
        before, after = self.tree.type_of(item.args[0].value), self.tree.type_of(item.made)
        return bool(before == after if item.op in _SHAPES else before.dtype == after.dtype)

    def _taken(self, item: Item) -> list[int]:
        found = (
            self.context.signatures.passed(item)
            if isinstance(item, Scope)
            else self.tree.taken(item)
        )
        return [self.source(v) for v in found]

    def _is_inlined(self, i: int, item: Item) -> bool:
        """Whether an item is written where it is used: once, in the same statement."""
        values = made(item)
        used = [u for v in values for u in self.users.get(v, ())]
        if len(used) != 1 or len(self.given(item)) > 1:
            return False
        if isinstance(self.tree.type_of(values[0]), list):
            return isinstance(item, GraphNode)  # its one element that is taken
        if used[0] == len(self.items):
            return len(self.results) == 1 and self.frames.returns(item)
        user = self.items[used[0]]
        if isinstance(user, Scope) and self.context.layers.repeats(user):
            return False
        if self.keys[i][0] == self.keys[used[0]][0]:
            return self.keys[i] == self.keys[used[0]]
        return not is_getitem(item) and self.frames.continues(item, user)


def is_getitem(item: Item) -> TypeGuard[GraphNode]:
    """Whether an item takes one of a list of arrays."""
    return isinstance(item, GraphNode) and item.op == GETITEM


def made(item: Item) -> list[int]:
    """The values that an item makes."""
    return item.gives if isinstance(item, Scope) else [item.made]


def _first_taken(item: Item) -> int:
    return int(item.takes[0] if isinstance(item, Scope) else item.args[0].value)
