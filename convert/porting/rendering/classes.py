"""The classes of a port: modules of one torch class that are alike but for numbers are one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from convert.porting.rendering import inits
from convert.porting.rendering.body import Body, body_of
from convert.porting.rendering.constructor import Name
from convert.porting.rendering.context import Context, NotRendered
from convert.porting.rendering.inits import MadeDict, MadeList, MadeModule, MadeVariable
from convert.porting.rendering.scopes import Scope

_SMALL = 8  # a number up to this is no size that other numbers could follow from


@dataclass(eq=False)
class WrittenClass:
    """A class of the file. `made` says what `__init__` makes of each of its instances, by path;
    `expressions` what is written there for each number (None: the number)."""

    name: str
    of: type
    body: Body | None
    items: bool  # whether its parts are numbered: it is a list
    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> by path
    expressions: list[str | None] = field(default_factory=list)

    def arguments_of(self, path: str) -> dict[str, Any]:
        """What the constructor gets for an instance."""
        return {name: values[path] for name, values in self.parameters.items()}

    def init(self) -> Iterator[tuple[str, str]]:
        """The attributes that `__init__` sets, and to what."""
        names = iter(self.expressions)
        for name, made in next(iter(self.made.values())).items():
            yield name, inits.text(made, names)


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
        """Whether a module only calls its parts one after another."""
        return self.context.is_sequence(path)

    def _written_paths(self) -> list[str]:
        paths = [p for p in self.tree.modules if not self._is_plain(p) and self._holds(p)]
        return [p for p in paths if self._is_first(p)]

    def _is_first(self, path: str) -> bool:
        """Whether a module is not another name of one that has been seen."""
        module = self.tree.modules[path]
        return next(p for p, m in self.tree.modules.items() if m is module) == path

    def _height(self, path: str) -> int:
        below = f"{path}." if path else ""
        return max(p.count(".") for p in self.tree.modules if p == path or p.startswith(below)) - (
            path.count(".") if path else -1
        )

    # What they make.

    def _enter(self, path: str) -> None:
        module = self.tree.modules[path]
        bodies = [body_of(s, self.context) for s in self.scopes.get(path, [])]
        texts = {"\n".join(map(str, b.lines)) for b in bodies}
        if len(texts) > 1:
            raise NotRendered(f"{path or 'the model'} does other things at each of its calls")
        body = bodies[0] if bodies else None
        made = dict(self._parts(path, body))
        items = any(name.isdigit() for name in made)
        key = tuple((n, inits.skeleton(x)) for n, x in made.items())
        for written in self.every:
            same = written.of is type(module) and _text(written.body) == _text(body)
            first = next(iter(written.made.values()))
            if same and tuple((n, inits.skeleton(x)) for n, x in first.items()) == key:
                break
        else:
            written = WrittenClass(self._name(type(module)), type(module), body, items)
            self.every.append(written)
        written.made[path] = made
        self.by_path[path] = written

    def _name(self, of: type) -> str:
        name = of.__name__ if of.__name__.isidentifier() else "Module"
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
        columns: list[tuple[str, dict[str, Any]]] = []
        for path in paths:
            slots = [
                (hint or name, value)
                for name, made in written.made[path].items()
                for hint, value in inits.values(made, name)
            ]
            if not columns:
                columns = [(hint, {}) for hint, _ in slots]
            for (_, column), (_, value) in zip(columns, slots, strict=True):
                column[path] = value
        attributes = set(written.body.attributes) if written.body else set()
        given = self._given(paths)
        for name, column in self._wanted(columns, attributes, given):
            if column not in written.parameters.values():
                written.parameters[_free(name, written.parameters)] = column
        named = {n: c for n, c in written.parameters.items() if n in attributes}
        written.expressions = [
            hint
            if hint in named and named[hint] == column
            else _expression(column, written.parameters)
            for hint, column in columns
        ]

    def _given(self, paths: list[str]) -> dict[str, dict[str, Any]]:
        """The plain arguments of torch's constructor that all instances have."""
        every = [self.constructed.get(p, {}) for p in paths]
        names = [n for n in every[0] if all(n in one for one in every)]
        return {n: {p: one[n] for p, one in zip(paths, every, strict=True)} for n in names}

    def _wanted(
        self,
        columns: list[tuple[str, dict[str, Any]]],
        attributes: set[str],
        given: dict[str, dict[str, Any]],
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """The numbers that are to be arguments: those that torch's constructor was given and that
        something follows from, attributes, and what differs between instances."""
        held = [column for _, column in columns]
        used = {n: c for n, c in given.items() if any(_follows(x, c) for x in held)}
        yield from used.items()
        for hint, column in columns:
            differs = len(set(map(repr, column.values()))) > 1
            if hint in attributes and not any(_follows(column, c) for c in used.values()):
                yield hint, column
            elif differs and _expression(column, used) is None:
                yield hint, column


def _follows(column: dict[str, Any], argument: dict[str, Any]) -> bool:
    return _expression(column, {"x": argument}) is not None


def _expression(column: dict[str, Any], parameters: Mapping[str, dict[str, Any]]) -> str | None:
    """How numbers follow from arguments, in every instance; None where they do not."""
    varies = len(set(map(repr, column.values()))) > 1
    for name, argument in parameters.items():
        if all(type(column[p]) is type(argument[p]) and column[p] == argument[p] for p in column):
            if varies or _is_size(next(iter(column.values()))):
                return name
    if not all(type(v) is int and v > _SMALL for v in column.values()):
        return next((n for n, c in parameters.items() if varies and c == column), None)
    for name, argument in parameters.items():
        pairs = [(column[p], argument[p]) for p in column]
        if not all(type(a) is int and a > _SMALL for _, a in pairs):
            continue
        factors = {v // a if v % a == 0 else 0 for v, a in pairs}
        if len(factors) == 1 and 1 < (factor := factors.pop()) <= 8:
            return f"{factor} * {name}"
        factors = {a // v if a % v == 0 else 0 for v, a in pairs}
        if len(factors) == 1 and 1 < (factor := factors.pop()) <= 8:
            return f"{name} // {factor}"
    return None


def _is_size(value: Any) -> bool:
    return type(value) is int and value > _SMALL


def _free(name: str, taken: Mapping[str, Any]) -> str:
    name = name if name.isidentifier() else "size"
    names = (name, *(f"{name}{k}" for k in range(2, 1000)))
    return next(n for n in names if n not in taken and n not in ("rngs", "self"))


def _is_container(module: Any) -> bool:
    return type(module).__name__ in (
        "ModuleList", "ModuleDict", "ParameterList", "ParameterDict",
    ) and type(module).__module__.startswith("torch.")  # fmt: skip


def _text(body: Body | None) -> Any:
    if body is None:
        return None
    return body.parameters, [str(line) for line in body.lines], list(body.attributes)
