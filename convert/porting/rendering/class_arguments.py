"""The arguments of constructors: the numbers in which instances of a class differ."""

from __future__ import annotations

import inspect
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from convert.porting.rendering import inits
from convert.porting.rendering.names import SMALL
from convert.porting.rendering.statements import Body
from convert.porting.rendering.variants import ABSENT, Union
from convert.program.constructed import Plain

VIRTUAL = "#"  # how the paths of instances begin that were only tried


@dataclass(eq=False)
class WrittenClass:
    """A class of the file. `made` says what `__init__` makes of each of its instances, by path;
    `expressions` what is written there for each number (None: the number)."""

    name: str
    of: type
    body: Body | None
    union: Union | None
    items: bool  # whether its parts are numbered: it is a list
    given: list[str] = field(default_factory=list)  # parameters that are modules of others
    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    based: dict[str, str] = field(default_factory=dict)  # tried instance -> the model's it is like
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> by path
    expressions: list[str | None] = field(default_factory=list)

    def arguments_of(self, path: str) -> dict[str, Any]:
        """What the constructor gets for an instance."""
        return {name: values[path] for name, values in self.parameters.items()}

    def defaults(self) -> dict[str, Any]:
        """The values of arguments that are left out: what most instances have, but for sizes and
        tables, and for what torch's constructor has no default for; of the model itself all."""
        if "" in self.made:
            return self.arguments_of("")
        found = {}
        torchs = inspect.signature(self.of).parameters
        for name, every in self.parameters.items():
            if name in torchs and torchs[name].default is inspect.Parameter.empty:
                continue
            column = {p: v for p, v in every.items() if not p.startswith(VIRTUAL)}
            often, count = Counter(map(repr, column.values())).most_common(1)[0]
            value = next(v for v in column.values() if repr(v) == often)
            if count > 1 and not any(map(_is_own, column.values())):
                found[name] = value
        return found

    def whole(self) -> dict[str, Any]:
        """Every attribute that an instance may have, in order."""
        found: dict[str, Any] = {}
        for made in self.made.values():
            order = list(made)
            for k, name in enumerate(order):
                if name in found:
                    continue
                after = next((n for n in reversed(order[:k]) if n in found), None)
                names = list(found)
                at = names.index(after) + 1 if after is not None else (0 if k == 0 else len(names))
                names.insert(at, name)
                found = {n: found.get(n, made.get(n)) for n in names}
        return found

    def is_optional(self, name: str) -> bool:
        """Whether some instances have no such attribute."""
        return any(name not in made for made in self.made.values())

    def numbers(self, path: str) -> Iterator[tuple[str, Any]]:
        """The numbers of an instance in the order in which they are written; ABSENT in parts that
        it has not, before which stands whether it has them."""
        for name, made in self.whole().items():
            if self.is_optional(name):
                yield name, name in self.made[path]
            held = self.made[path].get(name, ABSENT)
            for hint, value in inits.values(made if held is ABSENT else held, name):
                yield hint or name, ABSENT if held is ABSENT else value

    def init(self) -> Iterator[tuple[str, str]]:
        """The attributes that `__init__` sets, and to what."""
        names = iter(self.expressions)
        for name, made in self.whole().items():
            there = next(names) if self.is_optional(name) else None
            text = inits.text(made, names)
            yield name, text if there is None else f"({text}) if {there} else None"


def find_arguments(written: WrittenClass, constructed: Mapping[str, Mapping[str, Any]]) -> None:
    """Which numbers of a class are arguments, and what follows from them."""
    paths = list(written.made)
    rows = {path: list(written.numbers(path)) for path in paths}
    columns = [
        (hint, {path: rows[path][k][1] for path in paths})
        for k, (hint, _) in enumerate(rows[paths[0]])
    ]
    attributes = set(written.body.attributes) if written.body else set()
    given = _given(paths, constructed)
    wanted = list(_wanted(columns, attributes, given))
    # Numbers of parts that some instances have not may follow from those that all have.
    for name, column in sorted(wanted, key=lambda w: any(v is ABSENT for v in w[1].values())):
        if written.parameters.get(name) == column:
            continue
        named = name in attributes or name in given
        if named or _expression(column, written.parameters) is None:
            whole = _filled(column, written.based)
            written.parameters[_free(name, written.parameters)] = whole
    defaults = written.defaults()
    written.parameters = dict(
        sorted(written.parameters.items(), key=lambda p: (p[0] in defaults, not _are_whole(p[1])))
    )
    taken: set[str] = set()
    for hint, column in columns:  # attributes of an argument's own name come first
        if hint in attributes and repr(written.parameters.get(hint)) == repr(column):
            taken.add(hint)
    written.expressions = [
        _named(hint, column, written.parameters, taken if hint in attributes else None)
        or _expression(column, written.parameters)
        for hint, column in columns
    ]
    mentioned = set(re.findall(r"\w+", " ".join(filter(None, written.expressions))))
    written.parameters = {n: c for n, c in written.parameters.items() if n in mentioned}


def _filled(column: dict[str, Any], based: Mapping[str, str]) -> dict[str, Any]:
    """The numbers of all instances: a tried one whose number is not known has that of the instance
    it is like, one without the part any."""
    some = next(v for v in column.values() if v is not ABSENT)
    like = {p: column.get(based.get(p, p), v) for p, v in column.items() if v is ABSENT}
    return column | {p: some if v is ABSENT else v for p, v in like.items()}


def _named(
    hint: str,
    column: dict[str, Any],
    parameters: dict[str, dict[str, Any]],
    taken: set[str] | None,
) -> str | None:
    """The argument of the same name; for an attribute also one of another name that no
    attribute has (not in `taken`), be the number ever so small."""
    names = [n for n, c in parameters.items() if repr(c) == repr(column)]
    if hint in names:
        return hint
    return None if taken is None else next((n for n in names if n not in taken), None)


def _given(
    paths: list[str], constructed: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The plain arguments of torch's constructor that all instances have, and that differ
    between them: of others nobody has seen what follows from them."""
    every = [{n: x for n, x in constructed.get(p, {}).items() if type(x) in Plain} for p in paths]
    names = [n for n in every[0] if all(n in one for one in every)]
    found = {n: {p: one[n] for p, one in zip(paths, every, strict=True)} for n in names}
    return {n: column for n, column in found.items() if _varies(column)}


def _wanted(
    columns: list[tuple[str, dict[str, Any]]],
    attributes: set[str],
    given: dict[str, dict[str, Any]],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The numbers that are to be arguments: those that torch's constructor was given and that
    something follows from, attributes, and what differs between instances."""
    tried = any(p.startswith(VIRTUAL) for c in given.values() for p in c)
    used = {
        n: c
        for n, c in given.items()
        if tried or any(_follows(x, c) or (h == n and repr(x) == repr(c)) for h, x in columns)
    }
    yield from used.items()
    for hint, column in columns:
        same = [n for n, c in given.items() if repr(c) == repr(column)]
        same = [hint] if hint in same else [n for n in same if n not in attributes]
        follows = _expression(column, used) is not None
        if hint in attributes and _varies(column) and not (tried and follows and not same):
            yield next(iter(same), hint), column
            continue
        if _varies(column) and not follows:
            yield hint, column


def _follows(column: dict[str, Any], argument: dict[str, Any]) -> bool:
    return _expression(column, {"x": argument}) is not None


def _expression(column: dict[str, Any], parameters: Mapping[str, dict[str, Any]]) -> str | None:
    """How numbers follow from arguments, in every instance; None where they do not, and where they
    are one number, which may be like an argument by chance."""
    if not _varies(column):
        return None
    column = {p: v for p, v in column.items() if v is not ABSENT}
    for name, argument in parameters.items():
        if all(type(v) is type(argument[p]) and v == argument[p] for p, v in column.items()):
            return name
    tried = any(p.startswith(VIRTUAL) for p in column)  # then nothing is equal by chance
    if not all(type(v) is int and (tried or v > SMALL) for v in column.values()):
        return None
    found: list[tuple[int, str]] = []
    for name, argument in parameters.items():
        pairs = [(column[p], argument[p]) for p in column]
        if not all(type(a) is int and (tried or a > SMALL) for _, a in pairs):
            continue
        for factors, form in (
            ({_quotient(v, a) for v, a in pairs}, f"{{}} * {name}"),
            ({_quotient(a, v) for v, a in pairs}, f"{name} // {{}}"),
        ):
            factor = factors.pop()
            if not factors and 1 < factor <= 8:
                found.append((factor, form.format(factor)))
    if found or not tried:
        return min(found, default=(0, None))[1]
    whole = {n: c for n, c in parameters.items() if all(type(c[p]) is int and c[p] for p in column)}
    for (n, a), (m, b) in itertools.permutations(whole.items(), 2):
        if all(a[p] % b[p] == 0 and a[p] // b[p] == v for p, v in column.items()):
            return f"{n} // {m}"
        if all(a[p] * b[p] == v for p, v in column.items()):
            return f"{n} * {m}"
    return None


def _quotient(a: int, b: int) -> int:
    """How often b is in a; 0 where it is not, by a whole number."""
    return a // b if b and a % b == 0 else 0


def _varies(column: Mapping[str, Any]) -> bool:
    return len({repr(v) for v in column.values() if v is not ABSENT}) > 1


def _are_whole(column: Mapping[str, Any]) -> bool:
    """Whether all are whole numbers, which are given by position."""
    return all(type(v) is int for v in column.values())


def _is_own(value: Any) -> bool:
    """Whether a value is an instance's own: a size, a table."""
    return isinstance(value, inits.Stored) or (type(value) is int and value > SMALL)


def _free(name: str, taken: Mapping[str, Any]) -> str:
    name = name if name.isidentifier() else "size"
    names = (name, *(f"{name}{k}" for k in range(2, 1000)))
    return next(n for n in names if n not in taken and n not in ("rngs", "self"))
