"""Which numbers of a class follow from its constructor's arguments, by trying others.

torch's own constructor is run again with one argument changed, without memory for tensors, and the
numbers of what it makes are read off as they were of the model's. These instances, whose paths
begin with "#", stand beside the model's own while arguments are looked for, and are gone then. An
argument is left alone where something changes with it otherwise than in proportion, or that the
statements have as a plain number.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from convert.porting.rendering.class_arguments import VIRTUAL, WrittenClass
from convert.porting.rendering.constructor import Constructor, Name
from convert.porting.rendering.context import Context
from convert.porting.rendering.inits import (
    MadeDict,
    MadeList,
    MadeModule,
    MadeRuns,
    MadeText,
    MadeVariable,
    Stored,
    every_number,
    in_runs,
    skeleton,
)
from convert.porting.rendering.layer_text import layer_text
from convert.porting.rendering.plain_attributes import plain_attribute
from convert.porting.rendering.scopes import children
from convert.porting.rendering.statements import Body
from convert.porting.rendering.variants import ABSENT
from convert.program.constructed import Constructed, Plain
from zoo.layout.ops import run_shapes

_FACTORS = (2, 3, 4)  # times the number that an argument is


class _NotAlike(Exception):
    """A constructor makes something else for other arguments."""


class Experiments:
    """The tried instances of the classes of a port. `arguments` are what the constructors of the
    model's parts were given, by path, those of the tried ones among them."""

    def __init__(
        self,
        context: Context,
        homes: Mapping[str, Any],
        constructed: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.context, self.homes = context, homes
        self.arguments = {path: dict(given) for path, given in constructed.items()}
        self._number = itertools.count()
        self._rows: list[tuple[WrittenClass, str]] = []
        self._ours: set[float] = set()  # attributes that torch's modules have not: from statements

    def add(self, written: WrittenClass) -> None:
        """Try what the constructor of a class takes."""
        modules = self.context.tree.modules
        every = {p: self._given(p, modules[p]) for p in written.made if not p.startswith(VIRTUAL)}
        if any(given is None for given in every.values()):
            return
        path, given = next((p, g) for p, g in every.items() if g is not None)
        if not self._try(written, path, given, "", 1):
            return
        self.arguments |= {p: _plain(g) for p, g in every.items() if g is not None}
        for name, value in given.items():
            if type(value) is int and value > 1:
                any(self._try(written, path, given, name, f) for f in _FACTORS)

    def done(self) -> None:
        """Leave the tried instances out."""
        for written, path in self._rows:
            written.made.pop(path, None)
            written.based.pop(path, None)
            for column in written.parameters.values():
                column.pop(path, None)

    def _given(self, path: str, module: Any) -> dict[str, Any] | None:
        """What a constructor was given: as it was recorded, else by attributes of these names."""
        known = self.arguments.get(path, {})
        parameters = list(inspect.signature(type(module).__init__).parameters.values())[1:]
        if any(p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in parameters):
            return None
        found = {}
        for p in parameters:
            if p.kind is p.VAR_KEYWORD:
                continue
            if p.name in known:
                found[p.name] = known[p.name]
            elif type(held := getattr(module, p.name, None)) in Plain and hasattr(module, p.name):
                found[p.name] = held
            elif p.default is p.empty:
                return None
        return found

    def _try(
        self, written: WrittenClass, path: str, given: dict[str, Any], name: str, factor: int
    ) -> bool:
        """Make an instance with one argument times a factor, and keep its numbers; False where that
        cannot be, or what follows from it cannot be written. Without a name it has to be as the
        model's, and is not kept."""
        changed = given | ({name: given[name] * factor} if name else {})
        made = _made(type(self.context.tree.modules[path]), changed)
        if made is None:
            return False
        root, arguments = made
        own = f"{VIRTUAL}{next(self._number)}"
        rows = len(self._rows)
        self._ours.clear()
        try:
            self._enter(written, path, root, own)
        except _NotAlike:
            self._drop(rows)
            return False
        model, tried = (MadeModule(written, p) for p in (path, own))
        pairs = list(zip(every_number(model), every_number(tried), strict=False))
        numbers = [(a, b) for (_, a), (_, b) in pairs if b is not ABSENT]
        numbers += _attributes(self.context.tree.modules[path], root)
        changes = [(a, b) for a, b in numbers if repr(a) != repr(b)]
        bodies = [w.body for w, _ in self._rows[rows:] if w.body is not None]
        if not name or self._ours & {a for a, _ in changes} or not _follow(bodies, changes, factor):
            self._drop(rows)
            return not name and not changes
        below = {f"{own}.{p}" if p else own: _plain(x) for p, x in arguments.items()}
        self.arguments |= below | {own: _plain(changed)}
        return True

    def _drop(self, rows: int) -> None:
        for written, path in self._rows[rows:]:
            written.made.pop(path, None)
        del self._rows[rows:]

    # What the constructors of a tried instance make.

    def _enter(self, written: WrittenClass, path: str, module: Any, own: str) -> None:
        made = written.made[path]
        parts = dict(children(module))
        below = f"{path}." if path else ""
        found = {
            name: self._part(x, f"{below}{name}" if name else path, parts.get(name), module, own)
            for name, x in made.items()
        }
        if any(skeleton(found[n]) != skeleton(made[n]) for n in made):
            raise _NotAlike
        written.made[own], written.based[own] = found, path
        self._rows.append((written, own))

    def _part(self, made: Any, path: str, part: Any, owner: Any, own: str) -> Any:
        name = path.rpartition(".")[2]
        if isinstance(made, Name):
            return made
        if isinstance(made, Constructor):
            return self._layer(path, owner if path not in self.context.layers.texts else part)
        if isinstance(made, MadeVariable):
            return self._variable(made, path, owner)
        if isinstance(made, MadeModule):
            if part is None:
                raise _NotAlike
            self._enter(made.written, made.path, part, f"{own}.{name}")
            return MadeModule(made.written, f"{own}.{name}", made.given)
        if isinstance(made, MadeList | MadeDict | MadeRuns):
            return self._container(made, path, part, f"{own}.{name}")
        if isinstance(made, bool):
            return made
        if (held := plain_attribute(owner, name)) is ABSENT and isinstance(made, int | float):
            self._ours.add(made)
            return made
        return held

    def _container(
        self, made: MadeList | MadeDict | MadeRuns, path: str, part: Any, own: str
    ) -> Any:
        if part is None:
            raise _NotAlike
        if isinstance(made, MadeRuns):
            tried = in_runs(self._container(made.every(), path, part, own))
            if tried.lengths != made.lengths:  # what was alike by chance is not
                raise _NotAlike
            return tried
        inside = children(part)
        items: Mapping[Any, Any] = (
            made.items if isinstance(made, MadeDict) else dict(enumerate(made.items))
        )
        if len(inside) != len(items):
            raise _NotAlike
        found = [
            self._part(x, f"{path}.{name}", module, part, own)
            for x, (name, module) in zip(items.values(), inside, strict=True)
        ]
        if isinstance(made, MadeList):
            return MadeList(found, made.callee, made.starred)
        return MadeDict(dict(zip(items, found, strict=True)), made.callee)

    def _layer(self, path: str, part: Any) -> Constructor:
        layers = self.context.layers
        checked = path in layers.derived or path in layers.norms
        layer = layer_text(part, layers.axes(path), checked=checked) if part is not None else None
        if layer is None or layer.constructor is None:
            raise _NotAlike
        return layer.constructor

    def _variable(self, made: MadeVariable, path: str, owner: Any) -> MadeVariable:
        entry = self.homes.get(path)
        if isinstance(made.inner, MadeText):
            return MadeVariable(made.callee, MadeText(made.inner.text, known=False))
        if isinstance(made.inner, Stored):
            return made
        if entry is None or not isinstance(made.inner, Constructor) or len(entry.torch) > 1:
            return made
        tensor = getattr(owner, entry.torch[0].name.rpartition(".")[2], None)
        if tensor is None:
            raise _NotAlike
        (shape,) = run_shapes(entry.ops, [tuple(tensor.shape)])
        args = tuple(shape if isinstance(a, tuple) else a for a in made.inner.args)
        return MadeVariable(made.callee, Constructor(made.inner.callee, args))


def _made(cls: type, given: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """An instance without memory, and what the constructors of its parts were given."""
    import torch

    constructed = Constructed()
    try:
        with torch.device("meta"), torch.random.fork_rng(), constructed.recording():
            root = cls(**given)
    except Exception:  # whatever a stranger's constructor raises
        return None
    return root, constructed.by_path(root)


def _follow(bodies: Sequence[Body], changes: list[tuple[Any, Any]], factor: int) -> bool:
    """Whether all that changed did so in proportion, and no statement has any of it as a number, or
    one that the source has not and that may come from it."""
    if not changes:
        return False
    if any(type(a) is not int or b not in (a * factor, a / factor) for a, b in changes):
        return False
    numbers: set[int] = set()
    for line in (line for body in bodies for line in body.lines):
        text, source = _AXES.sub("", line.text), line.site.text if line.site else ""
        numbers |= (Counter(_INT.findall(text)) - Counter(_INT.findall(source))).keys()
        floats = {float(n) for n in _FLOAT.findall(text)}
        if floats - {float(n) for n in _FLOAT.findall(source)} - {0.0, 0.5, 1.0, 2.0}:
            return False
    return not {int(n) for n in numbers} & {a for a, _ in changes}


_INT = re.compile(r"(?<![\w.])\d+(?![\w.])")
_AXES = re.compile(r"\.(?:transpose|swapaxes)\([^()]*\)|axis=(?:\([^()]*\)|-?\d+)")
_FLOAT = re.compile(r"(?<![\w.])\d+\.\d*(?:e[-+]?\d+)?|(?<![\w.])\d+e[-+]?\d+")


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    return {n: x for n, x in given.items() if type(x) in Plain}


def _attributes(a: Any, b: Any) -> Iterator[tuple[Any, Any]]:
    """The numbers that two modules have as attributes, in pairs."""
    for name, value in vars(a).items():
        if type(value) is int:
            yield value, vars(b).get(name)
