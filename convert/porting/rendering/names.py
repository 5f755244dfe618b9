"""The names of variables: as the source has them, given again where their value is used up."""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from convert.porting.rendering.operands import SizeText
from convert.porting.rendering.scopes import Scope
from convert.porting.rendering.sizes import named
from convert.porting.rendering.source_lines import casts, mentioned, own_name, source_file, targets
from convert.program import attention_by_steps
from convert.program.exported_nodes import is_torchs
from convert.program.graph import CodeLine, GraphNode, Placeholder, refs

RESERVED = {"jax", "jnp", "lax", "nnx", "np", "math", "self", "rngs", "partial", *keyword.kwlist}
SMALL = 8  # a number up to this may be like another by chance
Item = GraphNode | Scope
Key = tuple[tuple[str, int], ...]


class Frames:
    """Where in the source the items of a call stand."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.me = own_name(scope.module) if scope.function is None else ""

    def executions(
        self, items: Sequence[Item], tensors: Mapping[int, Placeholder]
    ) -> list[tuple[Key, int]]:
        """For each item its statement, and which time that this is run: within a loop, it is run
        anew where another statement came between, or where its first item comes again. `tensors`
        are those that come from outside."""
        made: list[tuple[Key, int]] = []
        first: dict[Key, str] = {}
        times: dict[Key, int] = {}
        for item in items:
            key = self.key(item)
            looped = any(source_file(f.file).loop_around(f.line) for f in self.place(item))
            sign = _sign(item, tensors)
            if key not in first:
                first[key], times[key] = sign, 0
            elif looped and (made[-1][0] != key or first[key] == sign):
                first[key] = sign
                times[key] += 1
            made.append((key, times[key]))
        return made

    def place(self, item: Item) -> list[CodeLine]:
        """The lines of the module's own code and of what it calls, from forward inwards."""
        found = self.scope.place(item)
        written = attention_by_steps.__file__
        return [
            f for i, f in enumerate(found) if i == 0 or f.file == written or not is_torchs(f.file)
        ]

    def key(self, item: Item) -> Key:
        """The statement that an item is of: equal for items of one statement."""
        made = []
        for frame in self.place(item):
            statement = source_file(frame.file).statement(frame.line)
            made.append((frame.file, statement.lineno if statement else frame.line))
        return tuple(made) or (("", id(item)),)

    def statement(self, item: Item) -> CodeLine | None:
        """The innermost line of an item."""
        return next(reversed(self.place(item)), None)

    def line(self, item: Item) -> int:
        """The line of an item in forward itself; 0 if that is unknown."""
        return next((f.line for f in self.place(item)), 0)

    def mentioned(self, item: Item) -> set[str]:
        """The names that the statement of an item reads, if it is forward's own; the calls of parts
        come by way of their `__call__`."""
        found = self.place(item)
        own = len(found) == 1 or (isinstance(item, Scope) and found)
        return mentioned(_statement(found[0])) if own else set()

    def casts(self, item: Item) -> dict[str, str]:
        """The names that the statement of an item casts, if it is forward's own."""
        found = self.place(item)
        return casts(_statement(found[0])) if len(found) == 1 else {}

    def returns(self, item: Item) -> bool:
        """Whether an item is of what forward returns."""
        found = [_statement(f) for f in self.place(item)]
        return bool(found) and all(isinstance(s, ast.Return) for s in found)

    def continues(self, item: Item, user: Item) -> bool:
        """Whether an item is of the statement of its user, or of what a function returns to it."""
        inner, outer = self.place(item), self.key(user)
        key = self.key(item)
        if key[: len(outer)] != outer:
            return False
        return all(isinstance(_statement(f), ast.Return) for f in inner[len(outer) :])

    def targets(self, item: Item, i: int, siblings: list[int], count: int) -> list[str]:
        """The names that the source gives to the `count` values that an item makes, `siblings`
        being the items of the same statement that have names, in order."""
        for frame in reversed(self.place(item)):
            statement = _statement(frame)
            if found := targets(statement):
                break
            if not isinstance(statement, ast.Return):
                return []
        else:
            return []
        if 1 < len(found) == count:
            return found
        if len(siblings) > 1 and len(found) == len(siblings):
            return [found[siblings.index(i)]]
        if len(siblings) > 1 and i != siblings[-1]:
            return []
        return found

    def sizes(
        self, item: Item, local: dict[str, int | str], shapes: Mapping[str, Sequence[Any]]
    ) -> Iterator[tuple[SizeText, dict[str, Any]]]:
        """The numbers that the statements of an item mention, the innermost statement first. What
        a call around it was given counts where it is no small number, which others may be too."""
        found = self.place(item)
        for depth, frame in reversed(list(enumerate(found))):
            known, arrays = (local, shapes) if depth == 0 else ({}, {})
            source, statement = source_file(frame.file), _statement(frame)
            tuples = [source.tuple_of(name, frame.line) for name in sorted(mentioned(statement))]
            for one in (statement, *tuples):
                found_here = named(one, self.scope.module, self.me, known, arrays)
                for text, attributes in found_here:
                    small = isinstance(text.value, int) and text.value <= SMALL
                    if depth == len(found) - 1 or not small:
                        yield text, attributes


def _sign(item: Item, tensors: Mapping[int, Placeholder]) -> str:
    """What an item is at every turn of a loop, and no other item of its statement is."""
    if isinstance(item, Scope):
        return re.sub(r"\d+", "", item.path) + getattr(item.function, "__name__", "")
    held = [tensors[v].name for v in refs(item.args) if v in tensors]
    return re.sub(r"\d+", "", f"{item.op} {held}") + f" {[f.line for f in item.frames]}"


def _statement(frame: CodeLine) -> Any:
    return source_file(frame.file).statement(frame.line)


class Names:
    """Which names hold which values, and until when. Times are the numbers of statements."""

    def __init__(self, parameters: list[str], reserved: Collection[str]) -> None:
        self.reserved = RESERVED | set(reserved)
        self.bound: dict[str, int] = {}  # name -> the value it holds now
        self.until: dict[str, int] = dict.fromkeys(parameters, -1)

    def bind(self, name: str, value: int, until: int) -> None:
        """The name holds this value from now on."""
        self.bound.pop(name, None)
        self.bound[name] = value
        self.until[name] = until

    def hold(self, name: str, until: int) -> None:
        """The name is taken by what is no value of the graph."""
        self.bound.pop(name, None)
        self.until[name] = until

    def is_free(self, name: str, now: int) -> bool:
        """Whether what the name holds is not used after this statement."""
        if name in self.reserved:
            return False
        value = self.bound.get(name)
        return self.until.get(name, -1) <= now or (
            value is not None and any(n != name for n in self.names(value))
        )

    def names(self, value: int) -> list[str]:
        """Every name that holds a value, the newest last."""
        return [n for n, v in self.bound.items() if v == value]

    def newest(self, value: int, otherwise: str) -> str:
        """A name that holds a value, the one that it had first if that still does."""
        held = self.names(value)
        return otherwise if otherwise in held or not held else held[-1]

    def free(self, wanted: str, now: int) -> str:
        """The name, or one like it."""
        wanted = wanted if wanted.isidentifier() else "x"
        names = (wanted, *(f"{wanted}{k}" for k in range(2, 10_000)))
        return next(n for n in names if self.is_free(n, now))
