"""A layout as the `layout.py` of a family: every tensor once, in the words of `zoo.layout`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from zoo import layout as words
from zoo.layout import Entry, Layout, ops

Call = tuple[str, tuple[Any, ...], dict[str, Any]]  # a word, and what it is given

_HEAD = '''"""Every tensor once: canonical name, shape, kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from zoo.layout import {words}
from {package}.config import Config


def layout(c: Config) -> Iterator[Entry]:
    """All entries, in the order of the state_dict."""
{lines}


def infer(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """The Config fields that names and shapes tell; None where this is another model."""
    own = {{t.name: t.shape for e in layout(Config()) for t in e.torch}}
    found = sum(shapes.get(name) == shape for name, shape in own.items())
    return {{}} if 2 * found > len(own) else None
'''


def layout_source(layout: Layout, package: str) -> str:
    """The file, of a family in this package."""
    lines = list(_folded(_lines(layout.entries)))
    text = "\n".join(f"    {line}" for line in lines) or "    yield from ()"
    used = set(re.findall(r"\w+", text))
    names = {"Entry", "Shape", *(used & set(words.__all__))}
    head = _HEAD.format(words=", ".join(sorted(names)), package=package, lines=text)
    others = sorted(n for n in used if hasattr(ops, n) and n not in names)
    line = f"from zoo.layout.ops import {', '.join(others)}\n" if others else ""
    return head.replace(f"from {package}.config", f"{line}from {package}.config", 1)


def _lines(entries: Sequence[Entry]) -> Iterator[str]:
    """One line for each run of entries that a word gives."""
    rest = list(entries)
    while rest:
        text, count = next(_spelled(rest))
        yield text
        rest = rest[count:]


def _spelled(rest: Sequence[Entry]) -> Iterator[tuple[str, int]]:
    """How the first of these entries may be written, and how many of them that is."""
    for word, args, named in _calls(rest[0]):
        try:
            made = getattr(words, word)(*args, **named)
            found = [made] if isinstance(made, Entry) else list(made)
        except (ValueError, KeyError, IndexError):
            continue
        if found == list(rest[: len(found)]):
            given = [*map(_written, args), *(f"{n}={_written(x)}" for n, x in named.items())]
            start = "yield" if isinstance(made, Entry) else "yield from"
            yield f"{start} {word}({', '.join(given)})", len(found)
    yield f"yield {rest[0]!r}", 1


def _written(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _calls(entry: Entry) -> Iterator[Call]:
    """The words that an entry may begin with, the longest first."""
    name, shape = entry.torch[0].name, entry.torch[0].shape
    module, _, leaf = name.rpartition(".")
    if entry.constant is not None:
        yield "constant", (name, shape, entry.constant), {}
    elif entry.tied_to is not None:
        yield "tie", (name, shape, entry.tied_to), {}
    elif leaf == "in_proj_weight":
        yield from _with_bias("attention", (module, shape[-1]))
    elif entry.kind == "recurrent":
        yield from _recurrent(module, leaf, shape)
    elif entry.kind == "batchnorm":
        yield "batchnorm", (module, *shape), {}
    elif entry.kind in ("embedding", "norm"):
        yield from _with_bias(entry.kind, (module, *shape))
        yield entry.kind, (module, *shape), {}
    elif entry.kind == "linear" or re.fullmatch(r"conv\dd", entry.kind):
        sizes = (*reversed(shape[:2]), *shape[2:])
        yield from _with_bias(entry.kind.rstrip("123d"), (module, *sizes))
    yield "param", (name, *shape), {}


def _with_bias(word: str, args: tuple[Any, ...]) -> Iterator[Call]:
    if word != "embedding":
        yield word, args, {}
        yield word, args, {"bias": False}


def _recurrent(module: str, leaf: str, shape: Sequence[int]) -> Iterator[Call]:
    for gates in (4, 3, 1):
        sizes = (module, gates, shape[-1], shape[0] // gates)
        if leaf == "weight_ih":
            yield "recurrent_cell", sizes, {}
            continue
        for layers in range(8, 0, -1):
            yield "recurrent", (*sizes, layers), {"bidirectional": True}
            yield "recurrent", (*sizes, layers) if layers > 1 else sizes, {}


_NUMBERED = re.compile(r'"((?:[^".]+\.)*?)(\d+)\.')


def _folded(lines: Iterator[str]) -> Iterator[str]:
    """Runs of lines that are alike but for the first number in the names, as loops."""
    rest = list(lines)
    while rest:
        found = _NUMBERED.search(rest[0])
        parts = _parts(rest, found[1], int(found[2])) if found else []
        if not found or len(parts) < 2:
            yield rest.pop(0)
            continue
        first = int(found[2])
        bounds = f"{first}, {first + len(parts)}" if first else f"{len(parts)}"
        yield f"for i in range({bounds}):"
        yield from (f"    {line}" for line in parts[0])
        rest = rest[len(parts) * len(parts[0]) :]


def _parts(lines: Sequence[str], prefix: str, first: int) -> list[list[str]]:
    """The lines of `prefix`0, `prefix`1, ..., as many as are alike, with `{i}` for the number."""
    found: list[list[str]] = []
    at = 0
    while at < len(lines):
        own = f'"{prefix}{first + len(found)}.'
        count = next((k for k, x in enumerate(lines[at:]) if own not in x), len(lines) - at)
        part = [x.replace(own, f'f"{prefix}{{i}}.') for x in lines[at : at + count]]
        if not count or (found and part != found[0]) or any("tie(" in x for x in part):
            break
        found.append(part)
        at += count
    return found
