"""Numbers, and tables kept beside the source, in which the statements of a class's instances
differ: attributes of `self`, numbers by the names that torch's modules have for them."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from convert.porting.rendering.inits import NUMBER, MadeVariable, Stored, value_of
from convert.porting.rendering.statements import Body

_TABLE = re.compile(r"jnp\.asarray\(ARRAYS\['([^']+)'\]\)")
_TOKEN = re.compile(f"{_TABLE.pattern}|{NUMBER.pattern}")


def numbers_as_attributes(bodies: Mapping[str, Sequence[Body]], modules: Mapping[str, Any]) -> bool:
    """Rewrite the bodies (of each module, of its calls) of modules of one class that differ in
    numbers and tables alone; whether any table is an attribute now."""
    alike: dict[Any, list[str]] = defaultdict(list)
    for path, own in bodies.items():
        if own:
            alike[type(modules[path]), *map(_masked, own)].append(path)
    for paths in alike.values():
        if len(paths) > 1:
            _Instances([modules[p] for p in paths]).unite([bodies[p] for p in paths])
    held = (x for own in bodies.values() for body in own for x in body.attributes.values())
    return any(isinstance(x, MadeVariable) for x in held)


def _masked(body: Body) -> tuple[Any, ...]:
    """What is equal for bodies that differ in numbers and tables alone."""
    lines = ((*line.targets, _TOKEN.sub(_mask, line.text), line.guard) for line in body.lines)
    return (*body.parameters, *lines)


class _Instances:
    """Modules of one class, and the names of the numbers in which they differ."""

    def __init__(self, modules: Sequence[Any]) -> None:
        self.modules = modules
        self._names: dict[tuple[str, ...], str] = {}

    def unite(self, bodies: Sequence[Sequence[Body]]) -> None:
        """`bodies` are those of each module."""
        for calls in zip(*bodies, strict=True):
            for index, lines in enumerate(zip(*(b.lines for b in calls), strict=True)):
                if len({line.text for line in lines}) == 1:
                    continue
                columns = list(zip(*(_tokens(line.text) for line in lines), strict=True))
                names = [self._name(c, calls) if len(set(c)) > 1 else None for c in columns]
                for k, (body, line) in enumerate(zip(calls, lines, strict=True)):
                    body.lines[index] = dataclasses.replace(line, text=_written(line.text, names))
                    for name, column in zip(names, columns, strict=True):
                        if name is not None:
                            body.attributes[name] = _held(column[k])

    def _name(self, column: tuple[str, ...], calls: Sequence[Body]) -> str:
        """The attribute that has these numbers."""
        if column not in self._names:
            known = () if _TABLE.match(column[0]) else self._known(column, calls)
            self._names[column] = next(iter(known), "") or self._free(column, calls)
        return self._names[column]

    def _known(self, column: tuple[str, ...], calls: Sequence[Body]) -> Iterator[str]:
        wanted = [value_of(text) for text in column]
        for name in calls[0].attributes:
            if [b.attributes.get(name) for b in calls] == wanted:
                yield name
        for name in vars(self.modules[0]):
            held = [vars(m).get(name) for m in self.modules]
            plain = all(type(a) is type(b) for a, b in zip(held, wanted, strict=True))
            if plain and held == wanted and not name.startswith("_"):
                yield name

    def _free(self, column: tuple[str, ...], calls: Sequence[Body]) -> str:
        taken = {*self._names.values(), *(n for b in calls for n in b.attributes)}
        name = "table" if _TABLE.match(column[0]) else "size"
        names = (name, *(f"{name}{k}" for k in range(2, 1000)))
        return next(n for n in names if n not in taken and not hasattr(self.modules[0], n))


def _tokens(text: str) -> list[str]:
    return [found[0] for found in _TOKEN.finditer(text)]


def _mask(token: re.Match[str]) -> str:
    return "@" if _TABLE.match(token[0]) else "#"


def _held(token: str) -> Any:
    """What a token is as an attribute."""
    table = _TABLE.match(token)
    return MadeVariable("Constant", Stored(table[1])) if table else value_of(token)


def _written(text: str, names: Sequence[str | None]) -> str:
    at = iter(names)

    def written(found: re.Match[str]) -> str:
        name = next(at)
        if name is None:
            return found[0]
        return f"self.{name}[...]" if _TABLE.match(found[0]) else f"self.{name}"

    return _TOKEN.sub(written, text)
