"""The classes of a port: modules of one torch class that are alike but for numbers are one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from convert.porting.rendering import inits
from convert.porting.rendering.argument_text import is_mixed, part_name, reached
from convert.porting.rendering.body import body_of
from convert.porting.rendering.call_sizes import sizes_of_arguments
from convert.porting.rendering.class_arguments import WrittenClass, find_arguments
from convert.porting.rendering.constructor import Name
from convert.porting.rendering.context import Context
from convert.porting.rendering.experiments import Experiments
from convert.porting.rendering.inits import BASE, MadeDict, MadeList, MadeModule, MadeVariable
from convert.porting.rendering.instance_numbers import numbers_as_attributes
from convert.porting.rendering.layer_calls import is_named
from convert.porting.rendering.loops import lengths_of, rolled
from convert.porting.rendering.not_rendered import NotRendered
from convert.porting.rendering.plain_attributes import plain_attribute
from convert.porting.rendering.scopes import Scope, children
from convert.porting.rendering.statements import Body, tidied
from convert.porting.rendering.templates.drawing import KEYS
from convert.porting.rendering.variants import ABSENT, Condition, Instance, Union, negation

_NORM = ("scale", "bias", "mean", "var")


class Classes:
    """All classes of a port, parts before what holds them."""

    def __init__(self, context: Context, constructed: Mapping[str, Mapping[str, Any]]) -> None:
        self.context = context
        self.tree = context.tree
        self.every: list[WrittenClass] = []
        self.by_path: dict[str, WrittenClass] = {}
        self.imports: dict[str, None] = {}
        self.scopes: dict[str, list[Scope]] = {}
        for scope in context.tree.root.scopes():
            self.scopes.setdefault(self.tree.first(scope.path), []).append(scope)
        self.homes = self._homes()
        # Of an instance, the parameters by which it is given modules that others hold.
        self.given: dict[str, dict[str, str]] = {}
        self._number_of: dict[str, int] = {}
        paths = sorted(self._written_paths(), key=self._height)
        for _, level in itertools.groupby(paths, key=self._height):
            called = sorted(level, key=lambda p: p not in self.scopes)  # they say what a class does
            calls = {path: self._calls(path) for path in called}
            bodies = {path: [body for _, body in own] for path, own in calls.items()}
            if numbers_as_attributes(bodies, self.tree.modules):
                context.held.kinds["Constant"] = None
            for path, own in calls.items():
                self._enter(path, own)
        self.every = list(_parts_first(self.every))
        for written in self.every:
            self._keep_tested(written)
        experiments = Experiments(context, self.homes, constructed)
        for written in self.every:
            experiments.add(written)
        for written in self.every:
            find_arguments(written, experiments.arguments)
        experiments.done()

    # Which modules there are.

    def _homes(self) -> dict[str, Any]:
        """Flax's names of all tensors that the port holds -> the entry of the layout, None for
        tensors that it has not."""
        found: dict[str, Any] = {}
        for entry in self.context.by_name.layout.entries:
            found |= {t.name: entry for t in entry.flax}
        taken = {v for node in self.tree.nodes for v in self.tree.taken(node)}
        for p in self.tree.graph.placeholders:
            held = p.kind in ("buffer", "parameter") and p.value in taken
            if held and self.context.by_name.flax_of(p.name) is None:
                found.setdefault(p.name, None)
        return found

    def _holds(self, path: str) -> bool:
        """Whether anything of a module is in the port."""
        below = f"{path}." if path else ""
        if any(n.startswith(below) for n in self.homes):
            return True
        if path in self.context.layers.texts and self.context.layers.is_elsewhere(path):
            return False
        first = self.tree.first(path)
        every = (s for scopes in self.scopes.values() for s in scopes)
        calls = [
            s for s in every
            if s.path == path or s.path.startswith(below) or self.tree.first(s.path) == first
        ]  # fmt: skip
        return any(
            s.path not in self.context.layers.texts or self.context.layers.is_layer(s)
            for s in calls
        )

    def _is_plain(self, path: str) -> bool:
        """Whether a module is written where it is made: a layer, a container, a sequence."""
        module = self.tree.modules[path]
        return path in self.context.layers.texts or _is_container(module) or self.is_sequence(path)

    def is_sequence(self, path: str) -> bool:
        """Whether a module only calls its parts one after another; the model is a class always."""
        return bool(path) and self.context.layers.is_sequence(path)

    def _written_paths(self) -> list[str]:
        paths = [p for p in self.tree.modules if not self._is_plain(p) and self._holds(p)]
        return [p for p in paths if self._is_first(p)]

    def _is_first(self, path: str) -> bool:
        """Whether a module is not another name of one that has been seen."""
        return self.tree.first(path) == path

    def _height(self, path: str) -> int:
        below = f"{path}." if path else ""
        parts = [p for p in self.tree.modules if p == path or p.startswith(below)]
        return max(map(_depth, parts)) - _depth(path)

    # What they make.

    def _calls(self, path: str) -> list[tuple[Scope, Body]]:
        """The calls of a module, and their statements."""
        calls = [(s, body_of(s, self.context)) for s in self.scopes.get(path, [])]
        sizes_of_arguments(calls, self.tree)
        return calls

    def _enter(self, path: str, calls: list[tuple[Scope, Body]]) -> None:
        module = self.tree.modules[path]
        body = calls[0][1] if calls else None
        for _, other in calls[1:]:  # a call may mention what the first does not
            calls[0][1].attributes |= other.attributes
        self.context.returns |= {id(s): b.returned() for s, b in calls}
        self.owner = path
        made = dict(self._parts(path, body))
        for written in self.every:
            if written.of is type(module) and self._joins(written, path, calls, made):
                break
        else:
            items = any(name.isdigit() for name in made)
            if items and not all(name.isdigit() for name in made):
                raise NotRendered(f"{path or 'the model'} has numbered parts and others")
            union = self._united(None, module, made, calls)
            if body is not None and union is None:
                raise NotRendered(f"{path or 'the model'} does other things at each of its calls")
            if body is not None and union is not None:
                body.lines = union.lines
            given = list(self.given.get(path, ()))
            name = self._name(type(module))
            written = WrittenClass(name, type(module), body, union, items, given)
            self.every.append(written)
        written.made[path] = made
        self.by_path[path] = written

    def _joins(
        self,
        written: WrittenClass,
        path: str,
        calls: list[tuple[Scope, Body]],
        made: dict[str, Any],
    ) -> bool:
        """Whether an instance is of a class that is there, which then has its statements too."""
        whole = written.whole()
        common = whole.keys() & made.keys()
        if written.given != list(self.given.get(path, ())):
            return False
        unlike = [n for n in common if inits.skeleton(whole[n]) != inits.skeleton(made[n])]
        if not all(_repeats(written, n, made[n]) for n in unlike):
            return False
        if not calls:
            return not unlike and self._joins_idle(written, path, made)
        if written.body is None or written.union is None:
            return False
        if any(body.parameters != written.body.parameters for _, body in calls):
            return False
        if unlike and not (calls := self._rolled_alike(written, path, calls)):
            return False
        joined = self._united(written.union, self.tree.modules[path], made, calls)
        if joined is None or (whole.keys() != made.keys() and written.items):
            return False
        if _makes(list(made.values()), written):  # an instance of it is a part of this one
            return False
        for own in (made, *written.made.values()) if unlike else ():
            own |= {n: inits.in_runs(own[n]) for n in unlike if n in own}
        written.union = joined
        written.body.lines = joined.lines
        return True

    def _rolled_alike(
        self, written: WrittenClass, path: str, calls: list[tuple[Scope, Body]]
    ) -> list[tuple[Scope, Body]]:
        """The calls of an instance whose lists have other lengths, with the statements of its
        class; none where these are not the same loops."""
        modules = self.tree.modules
        assert written.body is not None
        held = written.body.lines
        loops = [
            str(x) for x in rolled(tidied(held), lengths_of(modules, next(iter(written.made))))
        ]
        lengths = lengths_of(modules, path)
        same = [loops == [str(x) for x in rolled(tidied(b.lines), lengths)] for _, b in calls]
        if not all(same) or any(line.guard for line in held):
            return []
        return [(scope, replace(body, lines=held)) for scope, body in calls]

    def _joins_idle(self, written: WrittenClass, path: str, made: dict[str, Any]) -> bool:
        """Whether an instance that is not called is of a class that is there; what only calls tell
        of it is then as in torch's module, or as in the class."""
        whole = written.whole()
        lacking = [name for name in whole if name not in made]
        if not made.keys() <= whole.keys() or (written.body is None and lacking):
            return False
        if BASE in lacking or _makes([whole[name] for name in lacking], written):
            return False
        for name in lacking:
            held = plain_attribute(self.tree.modules[path], name)
            made[name] = whole[name] if held is ABSENT else held
        return True

    def _united(
        self,
        union: Union | None,
        module: Any,
        made: Mapping[str, Any],
        calls: list[tuple[Scope, Body]],
    ) -> Union | None:
        """The statements with those of these calls of an instance; None where no condition tells
        apart what differs."""
        signatures = self.context.signatures
        for scope, body in calls:
            given = frozenset(signatures.given_to(scope))
            texts = tuple(map(str, body.lines))
            stated = [(n, scope.call.arguments[n]) for n in signatures.stated[type(module)]]
            one = Instance(module, frozenset(made), texts, given, tuple(stated))
            union = Union(body.lines, one) if union is None else union.joined(body.lines, one)
            if union is None:
                return None
        return union

    def _keep_tested(self, written: WrittenClass) -> None:
        """The attributes that conditions mention, where they are no parts; what is no number is
        said to be there, or not."""
        union = written.union
        parts = set(written.whole())
        for condition in list(union.conditions.values()) if union is not None else ():
            for name in sorted(parts.intersection(condition.values)):  # a statement has it too
                some = [own[name] for own in written.made.values() if name in own]
                if not all(isinstance(x, bool | int | float | str) for x in some):
                    continue  # a part
                for path, own in written.made.items():
                    value = plain_attribute(self.tree.modules[path], name)
                    if name not in own and value is not ABSENT:
                        own[name] = value
            for name in dict.fromkeys(n for n in condition.values if n not in parts):
                held = {p: plain_attribute(self.tree.modules[p], name) for p in written.made}
                if any(value is ABSENT for value in held.values()):
                    self._keep_flag(written, condition, name)
                    break
                for path, own in written.made.items():
                    own[name] = held[path]

    def _keep_flag(self, written: WrittenClass, condition: Condition, name: str) -> None:
        """Whether a condition holds, as an attribute."""
        assert written.union is not None
        text = f"self.with_{name}"
        said = condition.text
        negative = " not " in f" {said} " and not said.endswith("is not None")
        positive = not negative and not said.endswith("is None")
        for path, own in written.made.items():
            module = self.tree.modules[path]
            one = next((i for i in written.union.instances if i.module is module), None)
            if one is None and self.tree.first(path) in self.scopes:  # others are not called
                raise NotRendered(f"{path} has no plain attribute {name}, on which it depends")
            own[f"with_{name}"] = one is not None and condition.holds(one) == positive
        written.union.renamed(condition, text if positive else negation(text))

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
        if body is not None and any(KEYS in line.text for line in body.lines):
            yield "rngs", Name("rngs.noise.fork()")  # its keys, as nnx.Dropout keeps them
        names = {n for n, _ in children(module)}
        prefix = f"{path}." if path else ""
        norm = self.context.layers.norms.get(path)
        if norm is not None:
            self.imports |= dict.fromkeys(norm.imports)
            yield BASE, norm.constructor
        below: dict[str, dict[str, Any]] = {}
        for home, entry in self.homes.items():
            rest = home.removeprefix(prefix)
            if norm is not None and rest in _NORM:  # the class that it derives from has them
                continue
            if home.startswith(prefix) and rest.partition(".")[0] not in names:
                first, _, leaf = rest.partition(".")
                below.setdefault(first, {})[leaf] = (home, entry)
        for first, leaves in below.items():
            yield first, self._tensors(leaves)
        for name in names & set(below):
            raise NotRendered(f"{prefix}{name} is a part and a tensor")
        for name, part in children(module):
            if self._holds(f"{prefix}{name}") and (made := self._made(f"{prefix}{name}", part)):
                yield part_name(module, name), made
            elif name.isdigit() and not is_mixed(module):
                yield name, Name("None")  # a list counts what has nothing to make too

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
        layer = self.context.layers.texts.get(path)
        if not self._is_first(path) and (layer is None or layer.has_state):
            return self._reference(path)
        if layer is not None:
            if path in self.context.layers.gone:
                return None
            if layer.constructor is None and layer.function == "lambda x: x":
                return Name("nnx.identity")
            self.imports |= dict.fromkeys(layer.imports)
            return layer.constructor
        if _is_container(module) or self.is_sequence(path):
            return self._container(path, module)
        given = self.given.get(path, {})
        texts = {name: self._reached(name, first) for name, first in given.items()}
        return MadeModule(self.by_path[path], path, texts)

    def _reference(self, path: str) -> Name:
        """A part that the model has under an earlier name too."""
        first = self.tree.first(path)
        if first.split(".") > path.split("."):  # its state goes by the first in the alphabet
            raise NotRendered(f"{path} is {first} too")
        return Name(self._reached(path.rpartition(".")[2], first))

    def _reached(self, name: str, first: str) -> str:
        """How the instance at hand has a module: below itself, or given by the constructor's
        parameter of this name."""
        if not self.owner or first.startswith(f"{self.owner}."):
            return reached(self.owner, first, self.tree.modules)
        name = name if name.isidentifier() else "part"
        if self.given.setdefault(self.owner, {}).setdefault(name, first) != first:
            raise NotRendered(f"{self.owner} is given two modules as {name}")
        return name

    def _container(self, path: str, module: Any) -> Any:
        parts: dict[str, Any] = {}
        for name, part in children(module):
            held = f"{path}.{name}"
            made = self._made(held, part) if self._holds(held) else None
            parts[name] = made if made is not None else self._function(held)
        for name, tensor in module.named_parameters(recurse=False):
            if (home := f"{path}.{name}") in self.homes:
                parts[name] = self._tensor(home, self.homes[home])
            del tensor
        if self.is_sequence(path) and is_named(module):
            self.imports["from zoo.nn.layers_flax import NamedSequential"] = None
            return MadeDict(parts, "NamedSequential")
        if self.is_sequence(path):
            self.imports["from zoo.nn.layers_flax import Sequential"] = None
            return MadeList(list(parts.values()), "Sequential", starred=True)
        if type(module).__name__ in ("ModuleDict", "ParameterDict"):
            return MadeDict({k: x for k, x in parts.items() if x != Name("None")})
        return MadeList(list(parts.values()))

    def _function(self, path: str) -> Name:
        """What stands in a list for a part that has nothing to make."""
        layer = self.context.layers.texts.get(path)
        if layer is not None and layer.function is not None:
            self.imports |= dict.fromkeys(layer.imports)
            return Name(layer.function)
        called = self.tree.first(path) in self.scopes
        return Name("lambda x: x") if called else Name("None")

    def _tensor(self, home: str, entry: Any) -> MadeVariable:
        """A parameter or buffer of a module's own."""
        name = entry.torch[0].name if entry is not None else home
        tensor = self.context.held.tensors[name]
        shape = tuple(entry.flax[0].shape) if entry is not None else tuple(tensor.shape)
        if entry is not None and entry.collection == "batch_stats":
            return self.context.held.filled("nnx.BatchStat", home, tensor, shape)
        trained = name in self.context.held.trained
        kind = "nnx.Param" if trained else "Buffer" if entry is not None else "Constant"
        return self.context.held.filled(kind, home, tensor, shape)


def _repeats(written: WrittenClass, name: str, made: Any) -> bool:
    """Whether a list is those of a class but for how often the same stands in it in a row."""
    every = [made, *(own[name] for own in written.made.values() if name in own)]
    if not all(isinstance(x, inits.MadeList | inits.MadeRuns) for x in every):
        return False
    first, *others = (inits.skeleton(inits.in_runs(x)) for x in every)
    return all(other == first for other in others)


def _parts_first(every: list[WrittenClass]) -> Iterator[WrittenClass]:
    """The classes, each after those of its parts."""
    seen: set[int] = set()

    def visit(written: WrittenClass) -> Iterator[WrittenClass]:
        if id(written) in seen:
            return
        seen.add(id(written))
        for made in written.made.values():
            for part in inits.classes_in(list(made.values())):
                yield from visit(part)
        yield written

    for written in every:
        yield from visit(written)


def _depth(path: str) -> int:
    return path.count(".") + 1 if path else 0


def _is_container(module: Any) -> bool:
    return type(module).__name__ in (
        "ModuleList", "ModuleDict", "ParameterList", "ParameterDict",
    ) and type(module).__module__.startswith("torch.")  # fmt: skip


def _makes(parts: list[Any], written: WrittenClass) -> bool:
    """Whether instances of a class are made in these parts, however deep."""
    open_, met = list(inits.classes_in(parts)), set[int]()
    while open_:
        made = open_.pop()
        if made is written:
            return True
        if id(made) not in met:
            met.add(id(made))
            open_ += inits.classes_in(list(made.whole().values()))
    return False
