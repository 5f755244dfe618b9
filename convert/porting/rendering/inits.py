"""What `__init__` makes, as data: calls of constructors whose numbers may become arguments."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from convert.porting.rendering.constructor import Constructor, Name, written
from convert.porting.rendering.variants import ABSENT

NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.])")
BASE = ""  # the name of what is made of the class that one derives from


def value_of(text: str) -> int | float:
    """The number that a text is."""
    return int(text) if text.isdigit() else float(text)


@dataclass
class MadeList:
    """`nnx.List([...])`, or another class that takes a list, or the items one by one."""

    items: list[Any]
    callee: str = "nnx.List"
    starred: bool = False


@dataclass
class MadeRuns:
    """A list in which the same stands several times in a row, of a class whose instances differ in
    how often: every run's first item, and its length."""

    items: list[Any]
    lengths: list[int]
    callee: str
    starred: bool

    def every(self) -> MadeList:
        """The whole list."""
        runs = zip(self.items, self.lengths, strict=True)
        return MadeList([x for x, n in runs for _ in range(n)], self.callee, self.starred)


@dataclass
class MadeDict:
    """`nnx.Dict({...})`, or another class that takes a dict."""

    items: dict[str, Any]
    callee: str = "nnx.Dict"


@dataclass
class MadeText:
    """An expression whose numbers may become arguments. Of an instance that was only tried they are
    not known."""

    text: str
    known: bool = True

    @property
    def numbers(self) -> list[Any]:
        """Those in it, in order."""
        every = NUMBER.findall(self.text)
        return [value_of(found) if self.known else ABSENT for found in every]

    def filled(self, names: Iterator[str | None]) -> str:
        """The expression with these in the numbers' stead; None where one stays."""
        return NUMBER.sub(lambda found: next(names) or found[0], self.text)


@dataclass(frozen=True)
class Stored:
    """An array that is kept beside the source: an argument where instances differ in it."""

    key: str

    def __repr__(self) -> str:
        return f"ARRAYS[{self.key!r}]"


@dataclass
class MadeVariable:
    """`nnx.Param(...)` of what an initializer gives."""

    callee: str
    inner: Constructor | MadeText | Stored


@dataclass
class MadeModule:
    """A part whose class the file has: `written` is its class, `path` which of its instances;
    `given` are the modules of others that it gets, by the constructor's parameters."""

    written: Any
    path: str
    given: Mapping[str, str] = field(default_factory=dict)


def skeleton(x: Any) -> Any:
    """The structure without its numbers: equal for what can be one piece of source."""
    if isinstance(x, Constructor):
        places = x.values().items()
        # What a parameter is drawn of splits no class: those are numbers of one draw.
        callee = "initializer" if x.callee.startswith("nnx.initializers.") else x.callee
        return (callee, *((p, v if isinstance(v, Name) else None) for p, v in places))
    if isinstance(x, MadeList):
        return ("list", x.callee, *map(skeleton, x.items))
    if isinstance(x, MadeRuns):
        return ("runs", x.callee, *map(skeleton, x.items))
    if isinstance(x, MadeDict):
        return ("dict", x.callee, *((k, skeleton(v)) for k, v in x.items.items()))
    if isinstance(x, MadeVariable):
        return ("variable", x.callee, skeleton(x.inner))
    if isinstance(x, MadeText):
        return ("text", NUMBER.sub("#", x.text))
    if isinstance(x, MadeModule):
        return ("module", id(x.written), *x.given.items())
    return x if isinstance(x, Name) else "value"


Numbers = Iterator[tuple[str, Any]]


def given_to(x: MadeModule) -> Numbers:
    """The arguments of a part's constructor."""
    yield from x.written.arguments_of(x.path).items()


def values(x: Any, hint: str = "", of: Callable[[MadeModule], Numbers] = given_to) -> Numbers:
    """The numbers in it, in order, each with a name that it could have; `of` says which a part of
    a class of the file has."""
    if isinstance(x, Constructor):
        for place, value in x.values().items():
            if not isinstance(value, Name):
                yield _place_name(x.callee, place, hint), value
    elif isinstance(x, MadeList):
        for part in x.items:
            yield from values(part, hint, of)
    elif isinstance(x, MadeRuns):
        for part, length in zip(x.items, x.lengths, strict=True):
            yield "depth", length
            yield from values(part, hint, of)
    elif isinstance(x, MadeDict):
        for name, part in x.items.items():
            yield from values(part, name, of)
    elif isinstance(x, MadeVariable):
        yield from values(x.inner, hint, of)
    elif isinstance(x, MadeText):
        yield from ((hint, number) for number in x.numbers)
    elif isinstance(x, MadeModule):
        yield from of(x)
    elif not isinstance(x, Name):
        yield hint, x


def every_number(instance: MadeModule) -> Numbers:
    """Every number of an instance and of its parts."""
    for x in instance.written.made[instance.path].values():
        yield from values(x, of=every_number)


def in_runs(x: MadeList | MadeRuns) -> MadeRuns:
    """A list by what repeats in it."""
    if isinstance(x, MadeRuns):
        return x
    runs = [list(run) for _, run in itertools.groupby(x.items, _identity)]
    return MadeRuns([run[0] for run in runs], [len(run) for run in runs], x.callee, x.starred)


def _identity(x: Any) -> Any:
    """Equal for parts that are alike, numbers and all."""
    return skeleton(x), [repr(v) for _, v in values(x, of=every_number)]


def classes_in(x: Any) -> Iterator[Any]:
    """The classes of the file that it makes instances of."""
    if isinstance(x, MadeModule):
        yield x.written
    parts = x if isinstance(x, list) else getattr(x, "items", ())
    for part in parts.values() if isinstance(parts, dict) else parts:
        yield from classes_in(part)


_POSITIONS = {
    "Linear": ("in_features", "out_features"),
    "Conv": ("in_features", "out_features", "kernel_size"),
    "LayerNorm": ("num_features", "epsilon"),
    "BatchNorm": ("num_features",),
    "GroupNorm": ("num_features", "num_groups"),
    "Embed": ("num_embeddings", "features"),
    "Dropout": ("rate",),
}


def _place_name(callee: str, place: tuple[int | str, ...], hint: str) -> str:
    first = place[0]
    if isinstance(first, str):
        return first
    kind = callee.rpartition(".")[2].rstrip("123d")
    names = _POSITIONS.get(kind, ())
    return names[first] if first < len(names) else hint


def text(x: Any, names: Iterator[str | None]) -> str:
    """The expression; `names` gives what is written for each number, in the order of `values`,
    None where it stays a number."""
    if isinstance(x, Constructor):
        places = [p for p, v in x.values().items() if not isinstance(v, Name)]
        texts = {p: next(names) for p in places}
        return x.text({p: t for p, t in texts.items() if t is not None})
    if isinstance(x, MadeList):
        parts = [text(part, names) for part in x.items]
        return f"{x.callee}({', '.join(_runs(parts)) if x.starred else _list(parts)})"
    if isinstance(x, MadeRuns):
        return _repeated(x, names)
    if isinstance(x, MadeDict):
        pairs = [(k, text(part, names)) for k, part in x.items.items()]
        return f"{x.callee}({{{', '.join(_pairs(pairs))}}})"
    if isinstance(x, MadeVariable):
        return f"{x.callee}({text(x.inner, names)})"
    if isinstance(x, MadeText):
        return x.filled(names)
    if isinstance(x, MadeModule):
        defaults = x.written.defaults()
        args: list[str] = []
        named = False  # after one that is given by its name all are
        for name, value in x.written.arguments_of(x.path).items():
            given = next(names)
            if name in defaults and not given and repr(defaults[name]) == repr(value):
                continue
            said = given or written(value)
            named = named or name in defaults or not (given or type(value) is int)
            args.append(f"{name}={said}" if named else said)
        args += [f"{name}={given}" for name, given in x.given.items()]
        if x.written.whole():
            args.append("rngs=rngs")
        return f"{x.written.name}({', '.join(args)})"
    if isinstance(x, Name):
        return x.text
    return next(names) or written(x)


def _repeated(x: MadeRuns, names: Iterator[str | None]) -> str:
    parts, counts = [], []
    for part, length in zip(x.items, x.lengths, strict=True):
        counts.append(next(names))
        made = text(part, names)
        alike = f"{made} for _ in range({counts[-1]})"
        parts += [f"*({alike})"] if counts[-1] else _runs([made] * length)
    if x.starred:
        return f"{x.callee}({', '.join(parts)})"
    whole = alike if len(counts) == 1 and counts[0] else ", ".join(parts)
    return f"{x.callee}([{whole}])"


def _list(items: list[str]) -> str:
    """Items of a list, those that are alike in a row by a comprehension."""
    if len(items) > 1 and len(set(items)) == 1:
        return f"[{items[0]} for _ in range({len(items)})]"
    return f"[{', '.join(_runs(items))}]"


def _pairs(items: list[tuple[str, str]]) -> Iterator[str]:
    """The items of a dict, those that are alike in a row and have numbered names by one loop."""
    for value, run in itertools.groupby(items, key=lambda item: item[1]):
        names = [name for name, _ in run]
        prefix, start = _numbered(names[0])
        wanted = [f"{prefix}{start + k}" for k in range(len(names))]
        if len(names) > 2 and wanted == names and not set("{}") & set(prefix):
            span = f"{start}, {start + len(names)}" if start else str(len(names))
            yield f"**{{f{prefix + '{i}'!r}: {value} for i in range({span})}}"
        else:
            yield from (f"{name!r}: {value}" for name in names)


def _numbered(name: str) -> tuple[str, int]:
    """A name without the number that it ends with, and the number."""
    prefix = name.rstrip("0123456789")
    return prefix, int(name.removeprefix(prefix) or 0)


def _runs(items: list[str]) -> list[str]:
    """The items with those that are alike in a row as one, where they are more than two."""
    groups = [(x, len(list(run))) for x, run in itertools.groupby(items)]
    return [
        f"*({x} for _ in range({count}))" if count > 2 else ", ".join([x] * count)
        for x, count in groups
    ]
