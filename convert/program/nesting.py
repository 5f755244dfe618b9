"""How arrays nest in arguments and results, as data: taken apart, and put together again."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from convert.runtime.arrays import cached, is_array

LEAF = "leaf"
Plain = (bool, int, float, complex, str, type(None))


@dataclass(frozen=True, slots=True)
class Nesting:
    """One node of the tree. `kind`: "leaf", "tuple", "list", "dict" or "named" (a NamedTuple, a
    dataclass, a cache: what has fields). `path` is where it stands: "mask", "past.0.keys"."""

    kind: str
    path: str
    keys: tuple[Any, ...] = ()
    parts: tuple[Nesting, ...] = ()
    cls: Any = None

    def leaves(self) -> Iterator[str]:
        """The path of every leaf, in order."""
        if self.kind == LEAF:
            yield self.path
        for part in self.parts:
            yield from part.leaves()

    def built(self, leaf: Iterator[Any]) -> Any:
        """The tree with the next of `leaf` at each leaf. What has fields becomes a NamedTuple of
        the fields that are there, but for what is one already."""
        if self.kind == LEAF:
            return next(leaf)
        parts = [part.built(leaf) for part in self.parts]
        if self.kind == "dict":
            return dict(zip(self.keys, parts, strict=True))
        if self.kind == "named":
            return self.cls(*parts)
        return parts if self.kind == "list" else tuple(parts)


def taken_apart(tree: Any, path: str, unknown: Callable[[str, Any], Any]) -> tuple[Nesting, list]:
    """The nesting of a tree and its leaves: arrays, plain values, and what `unknown` makes of
    anything else (or raises)."""
    leaves: list[Any] = []
    return _apart(tree, path, leaves, unknown), leaves


def _apart(tree: Any, path: str, leaves: list, unknown: Callable[[str, Any], Any]) -> Nesting:
    kind, keys, values, cls = _parts(tree)
    if kind == LEAF:
        leaves.append(tree if is_array(tree) or _is_plain(tree) else unknown(path, tree))
        return Nesting(LEAF, path)
    parts = tuple(
        _apart(v, f"{path}.{k}" if path else str(k), leaves, unknown)
        for k, v in zip(keys, values, strict=True)
    )
    return Nesting(kind, path, tuple(keys), parts, cls)


def _parts(tree: Any) -> tuple[str, list, list, Any]:
    if is_array(tree) or _is_plain(tree):
        return LEAF, [], [], None
    if hasattr(tree, "_asdict"):
        return "named", list(tree._fields), list(tree), type(tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        found = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree)}
        held = {n: x for n, x in found.items() if x is not None}
        return "named", list(held), list(held.values()), named(type(tree).__name__, tuple(held))
    if isinstance(tree, Mapping):
        return "dict", list(tree), list(tree.values()), None
    if isinstance(tree, tuple | list):
        return ("list" if isinstance(tree, list) else "tuple"), [*range(len(tree))], [*tree], None
    inside = cached(tree)
    if inside is not None and inside and isinstance(inside[0][0], str):
        names = [k for k, _ in inside]
        return "named", names, [v for _, v in inside], named(type(tree).__name__, tuple(names))
    if inside is not None:
        return "tuple", [k for k, _ in inside], [v for _, v in inside], None
    return LEAF, [], [], None


def _is_plain(x: Any) -> bool:
    return isinstance(x, Plain) or type(x).__name__ in ("SymInt", "SymFloat", "SymBool")


@functools.cache  # one class for one set of fields: JAX compares pytrees by it
def named(name: str, fields: tuple[str, ...]) -> Any:
    """A NamedTuple of these fields."""
    return collections.namedtuple(name, fields)
