"""The classes of a port: modules of one torch class that are alike but for numbers are one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from convert.porting.rendering import inits
from convert.porting.rendering.body import Body, body_of
from convert.porting.rendering.constructor import Name
from convert.porting.rendering.context import Context, NotRendered
from convert.porting.rendering.inits import MadeDict, MadeList, MadeModule, MadeVariable
from convert.porting.rendering.scopes import Scope
from convert.porting.rendering.variants import Instance, Union

_SMALL = 8  # a number up to this is no size that other numbers could follow from


ABSENT = object()  # the number of a part that an instance has not


@dataclass(eq=False)
class WrittenClass:
    """A class of the file. `made` says what `__init__` makes of each of its instances, by path;
    `expressions` what is written there for each number (None: the number)."""

    name: str
    of: type
    body: Body | None
    union: Union | None
    items: bool  # whether its parts are numbered: it is a list
    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> by path
    expressions: list[str | None] = field(default_factory=list)

    def arguments_of(self, path: str) -> dict[str, Any]:
        """What the constructor gets for an instance."""
        return {name: values[path] for name, values in self.parameters.items()}

    def defaults(self) -> dict[str, Any]:
        """The values of arguments that are left out: what most instances have, but for sizes; of
        the model itself all."""
        if "" in self.made:
            return self.arguments_of("")
        found = {}
        for name, column in self.parameters.items():
            often = Counter(map(repr, column.values())).most_common(1)[0][0]
            value = next(v for v in column.values() if repr(v) == often)
            if len(column) > 1 and not any(map(_is_size, column.values())):
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
            held = self.made[path].get(name)
            for hint, value in inits.values(made if held is None else held, name):
                yield hint or name, ABSENT if held is None else value

    def init(self) -> Iterator[tuple[str, str]]:
        """The attributes that `__init__` sets, and to what."""
        names = iter(self.expressions)
        for name, made in self.whole().items():
            there = next(names) if self.is_optional(name) else None
            text = inits.text(made, names)
            yield name, text if there is None else f"({text}) if {there} else None"


class Classes:
    """All classes of a port, parts before what holds them."""

    def __init__(self, context: Context, constructed: Mapping[str, Mapping[str, Any]]) -> None:
        self.context, self.constructed = context, constructed
        self.tree = context.tree
        self.every: list[WrittenClass] = []
        self.by_path: dict[str, WrittenClass] = {}
        self.imports: dict[str, None] = {}
        self.scopes: dict[str, list[Scope]] = {}
        for scope in context.tree.root.scopes():
            self.scopes.setdefault(scope.path, []).append(scope)
        self.homes = self._homes()
        self._number_of: dict[str, int] = {}
        for path in sorted(self._written_paths(), key=self._height):
            self._enter(path)
        for written in self.every:
            self._keep_tested(written)
            self._find_parameters(written)

    # Which modules there are.

    def _homes(self) -> dict[str, Any]:
        """Flax's names of all tensors that the port holds -> the torch name."""
        found: dict[str, Any] = {}
        for entry in self.context.by_name.layout.entries:
            found |= {t.name: entry for t in entry.flax}
        used = self.tree.graph.placeholders
        for p in used:
            if p.kind in ("buffer", "parameter") and self.context.by_name.flax_of(p.name) is None:
                found.setdefault(p.name, None)
        return found

    def _holds(self, path: str) -> bool:
        """Whether anything of a module is in the port."""
        below = f"{path}." if path else ""
        if any(n.startswith(below) for n in self.homes):
            return True
        calls = [s for p in self.scopes if p == path or p.startswith(below) for s in self.scopes[p]]
        return any(s.path not in self.context.layers or self.context.is_layer(s) for s in calls)

    def _is_plain(self, path: str) -> bool:
        """Whether a module is written where it is made: a layer, a container, a sequence."""
        module = self.tree.modules[path]
        return path in self.context.layers or _is_container(module) or self.is_sequence(path)

    def is_sequence(self, path: str) -> bool:
        """Whether a module only calls its parts one after another; the model is a class always."""
        return bool(path) and self.context.is_sequence(path)

    def _written_paths(self) -> list[str]:
        paths = [p for p in self.tree.modules if not self._is_plain(p) and self._holds(p)]
        return [p for p in paths if self._is_first(p)]

    def _is_first(self, path: str) -> bool:
        """Whether a module is not another name of one that has been seen."""
        modules = self.tree.modules
        first: str = next(p for p, m in modules.items() if m is modules[path])
        return first == path

    def _height(self, path: str) -> int:
        below = f"{path}." if path else ""
        parts = [p for p in self.tree.modules if p == path or p.startswith(below)]
        return max(map(_depth, parts)) - _depth(path)

    # What they make.

    def _enter(self, path: str) -> None:
        module = self.tree.modules[path]
        bodies = [body_of(s, self.context) for s in self.scopes.get(path, [])]
        if len({tuple(map(str, b.lines)) for b in bodies}) > 1:
            raise NotRendered(f"{path or 'the model'} does other things at each of its calls")
        body = bodies[0] if bodies else None
        made = dict(self._parts(path, body))
        for written in self.every:
            if written.of is type(module) and self._joins(written, path, body, made):
                break
        else:
            items = any(name.isdigit() for name in made)
            if items and not all(name.isdigit() for name in made):
                raise NotRendered(f"{path or 'the model'} has numbered parts and others")
            union = None if body is None else Union(body.lines, _instance(module, made, body))
            written = WrittenClass(self._name(type(module)), type(module), body, union, items)
            self.every.append(written)
        written.made[path] = made
        self.by_path[path] = written

    def _joins(
        self, written: WrittenClass, path: str, body: Body | None, made: dict[str, Any]
    ) -> bool:
        """Whether an instance is of a class that is there, which then has its statements too."""
        whole = written.whole()
        common = whole.keys() & made.keys()
        if any(inits.skeleton(whole[n]) != inits.skeleton(made[n]) for n in common):
            return False
        if body is None or written.body is None or written.union is None:
            return body is None and written.body is None and whole.keys() == made.keys()
        if body.parameters != written.body.parameters:
            return False
        module = self.tree.modules[path]
        one = _instance(module, made, body)
        joined = written.union.joined(body.lines, one)
        if joined is None or (whole.keys() != made.keys() and written.items):
            return False
        written.union = joined
        written.body.lines = joined.lines
        return True

    def _keep_tested(self, written: WrittenClass) -> None:
        """The attributes that conditions mention, where they are no parts."""
        conditions = written.union.conditions.values() if written.union is not None else ()
        parts = set(written.whole())
        for name in dict.fromkeys(n for c in conditions for n in c.values if n not in parts):
            for path, own in written.made.items():
                value = plain_attribute(self.tree.modules[path], name)
                if value is ABSENT:
                    raise NotRendered(f"{path} has no plain attribute {name}, on which it depends")
                own[name] = value

    def _name(self, of: type) -> str:
        name = of.__name__ if of.__name__.isidentifier() else "Module"
        if name in self.context.taken:
            self._number_of.setdefault(name, 1)
        count = self._number_of[name] = self._number_of.get(name, 0) + 1
        return name if count == 1 else f"{name}{count}"

    def _parts(self, path: str, body: Body | None) -> Iterator[tuple[str, Any]]:
        module = self.tree.modules[path]
        for name, value in (body.attributes if body else {}).items():
            yield name, value
        names = {n for n, _ in module.named_children()}
        prefix = f"{path}." if path else ""
        below: dict[str, dict[str, Any]] = {}
        for home, entry in self.homes.items():
            rest = home.removeprefix(prefix)
            if home.startswith(prefix) and rest.partition(".")[0] not in names:
                first, _, leaf = rest.partition(".")
                below.setdefault(first, {})[leaf] = (home, entry)
        for first, leaves in below.items():
            yield first, self._tensors(leaves)
        for name in names & set(below):
            raise NotRendered(f"{prefix}{name} is a part and a tensor")
        for name, part in module.named_children():
            if self._holds(f"{prefix}{name}") and (made := self._made(f"{prefix}{name}", part)):
                yield name, made

    def _tensors(self, leaves: dict[str, Any]) -> Any:
        if "" in leaves:
            home, entry = leaves[""]
            return self._tensor(home, entry)
        nested: dict[str, dict[str, Any]] = {}
        for leaf, found in leaves.items():
            first, _, rest = leaf.partition(".")
            nested.setdefault(first, {})[rest] = found
        return MadeDict({name: self._tensors(below) for name, below in nested.items()})

    def _made(self, path: str, module: Any) -> Any:
        """What makes a part; None for one that is a function only."""
        if not self._is_first(path):
            return None
        if path in self.context.layers:
            layer = self.context.layers[path]
            if path in self.context.gone:
                return None
            if layer.constructor is None and layer.function == "lambda x: x":
                return Name("nnx.identity")
            self.imports |= dict.fromkeys(layer.imports)
            return layer.constructor
        if _is_container(module) or self.is_sequence(path):
            return self._container(path, module)
        return MadeModule(self.by_path[path], path)

    def _container(self, path: str, module: Any) -> Any:
        parts: dict[str, Any] = {}
        for name, part in module.named_children():
            held = f"{path}.{name}"
            made = self._made(held, part) if self._holds(held) else None
            parts[name] = made if made is not None else self._function(held)
        for name, tensor in module.named_parameters(recurse=False):
            if (home := f"{path}.{name}") in self.homes:
                parts[name] = self._tensor(home, self.homes[home])
            del tensor
        if self.is_sequence(path):
            self.imports["from zoo.nn.layers_flax import Sequential"] = None
            return MadeList(list(parts.values()), "Sequential", starred=True)
        if type(module).__name__ in ("ModuleDict", "ParameterDict"):
            return MadeDict({k: x for k, x in parts.items() if x != Name("None")})
        return MadeList(list(parts.values()))

    def _function(self, path: str) -> Name:
        """What stands in a list for a part that has nothing to make."""
        layer = self.context.layers.get(path)
        if layer is not None and layer.function is not None:
            self.imports |= dict.fromkeys(layer.imports)
            return Name(layer.function)
        return Name("lambda x: x") if path in self.scopes else Name("None")

    def _tensor(self, home: str, entry: Any) -> MadeVariable:
        """A parameter or buffer of a module's own."""
        name = entry.torch[0].name if entry is not None else home
        tensor = self.context.tensors[name]
        shape = tuple(entry.flax[0].shape) if entry is not None else tuple(tensor.shape)
        if entry is not None and entry.collection == "batch_stats":
            return self.context.filled("nnx.BatchStat", home, tensor, shape)
        trained = name in self.context.trained
        kind = "nnx.Param" if trained else "Buffer" if entry is not None else "Constant"
        return self.context.filled(kind, home, tensor, shape)

    # Arguments of constructors.

    def _find_parameters(self, written: WrittenClass) -> None:
        """Which numbers of a class are arguments, and what follows from them."""
        paths = list(written.made)
        rows = {path: list(written.numbers(path)) for path in paths}
        columns = [
            (hint, {path: rows[path][k][1] for path in paths})
            for k, (hint, _) in enumerate(rows[paths[0]])
        ]
        attributes = set(written.body.attributes) if written.body else set()
        given = self._given(paths)
        for name, column in self._wanted(columns, attributes, given):
            if written.parameters.get(name) == column:
                continue
            named = name in attributes or name in given
            if named or _expression(column, written.parameters) is None:
                some = next(v for v in column.values() if v is not ABSENT)
                whole = {p: some if v is ABSENT else v for p, v in column.items()}
                written.parameters[_free(name, written.parameters)] = whole
        defaults = written.defaults()
        order = sorted(written.parameters, key=lambda n: n in defaults)
        written.parameters = {n: written.parameters[n] for n in order}
        taken: set[str] = set()
        for hint, column in columns:  # attributes of an argument's own name come first
            if hint in attributes and repr(written.parameters.get(hint)) == repr(column):
                taken.add(hint)
        written.expressions = [
            self._named(hint, column, written.parameters, taken if hint in attributes else None)
            or _expression(column, written.parameters)
            for hint, column in columns
        ]
        mentioned = set(re.findall(r"\w+", " ".join(filter(None, written.expressions))))
        written.parameters = {n: c for n, c in written.parameters.items() if n in mentioned}

    def _named(
        self,
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

    def _given(self, paths: list[str]) -> dict[str, dict[str, Any]]:
        """The plain arguments of torch's constructor that all instances have, and that differ
        between them: of others nobody has seen what follows from them."""
        every = [self.constructed.get(p, {}) for p in paths]
        names = [n for n in every[0] if all(n in one for one in every)]
        found = {n: {p: one[n] for p, one in zip(paths, every, strict=True)} for n in names}
        return {n: column for n, column in found.items() if _varies(column)}

    def _wanted(
        self,
        columns: list[tuple[str, dict[str, Any]]],
        attributes: set[str],
        given: dict[str, dict[str, Any]],
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """The numbers that are to be arguments: those that torch's constructor was given and that
        something follows from, attributes, and what differs between instances."""
        used = {
            n: c
            for n, c in given.items()
            if any(_follows(x, c) or (h == n and repr(x) == repr(c)) for h, x in columns)
        }
        yield from used.items()
        for hint, column in columns:
            same = [n for n, c in given.items() if repr(c) == repr(column)]
            same = [hint] if hint in same else [n for n in same if n not in attributes]
            if hint in attributes and _varies(column):
                yield next(iter(same), hint), column
                continue
            follows = any(_follows(column, c) for c in used.values())
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
    if not all(type(v) is int and v > _SMALL for v in column.values()):
        return None
    found: list[tuple[int, str]] = []
    for name, argument in parameters.items():
        pairs = [(column[p], argument[p]) for p in column]
        if not all(type(a) is int and a > _SMALL for _, a in pairs):
            continue
        for factors, form in (
            ({v // a if v % a == 0 else 0 for v, a in pairs}, f"{{}} * {name}"),
            ({a // v if a % v == 0 else 0 for v, a in pairs}, f"{name} // {{}}"),
        ):
            factor = factors.pop()
            if not factors and 1 < factor <= 8:
                found.append((factor, form.format(factor)))
    return min(found, default=(0, None))[1]


def _varies(column: Mapping[str, Any]) -> bool:
    return len({repr(v) for v in column.values() if v is not ABSENT}) > 1


def plain_attribute(module: Any, name: str) -> Any:
    """A number, text or None that a module or its config has; ABSENT if neither has."""
    for held in (module, *vars(module).values()):
        found = getattr(held, name, ABSENT)
        if found is None or isinstance(found, bool | int | float | str):
            return found
    return ABSENT


def _instance(module: Any, made: Mapping[str, Any], body: Body) -> Instance:
    return Instance(module, frozenset(made), tuple(map(str, body.lines)))


def _is_size(value: Any) -> bool:
    return type(value) is int and value > _SMALL


def _depth(path: str) -> int:
    return path.count(".") + 1 if path else 0


def _free(name: str, taken: Mapping[str, Any]) -> str:
    name = name if name.isidentifier() else "size"
    names = (name, *(f"{name}{k}" for k in range(2, 1000)))
    return next(n for n in names if n not in taken and n not in ("rngs", "self"))


def _is_container(module: Any) -> bool:
    return type(module).__name__ in (
        "ModuleList", "ModuleDict", "ParameterList", "ParameterDict",
    ) and type(module).__module__.startswith("torch.")  # fmt: skip
