"""The file of a port: its header, imports, functions and classes."""

from __future__ import annotations

import ast
import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.porting.image_axes.moved import Relaid
from convert.porting.rendering.class_arguments import WrittenClass
from convert.porting.rendering.classes import Classes
from convert.porting.rendering.constructor import written as plainly
from convert.porting.rendering.context import Context
from convert.porting.rendering.helper_functions import HelperFunctions, WrittenFunction
from convert.porting.rendering.inits import BASE
from convert.porting.rendering.loops import Loop, rolled
from convert.porting.rendering.not_rendered import Again, NotRendered
from convert.porting.rendering.number_text import Numbers
from convert.porting.rendering.operands import ArrayType
from convert.porting.rendering.scopes import Scope, Tree, children
from convert.porting.rendering.shape_text import Shapes
from convert.porting.rendering.statements import Body, Line, tidied
from convert.porting.rendering.subscripts import Subscripts
from convert.porting.rendering.syntax import without_ours
from convert.porting.rendering.variants import negation
from convert.porting.tensors_by_name import ByName
from convert.program.graph import Graph
from convert.runtime.user_code import module_name
from zoo.layout import Layout

INDENT = "    "
_ROUNDS = 200
_POOLS = ("adaptive_avg_pool", "avg_pool", "interpolate", "max_pool", "pixel_shuffle")
_KINDS = {
    "Buffer": "A tensor that is saved and not trained.",
    "Constant": "A tensor that is neither saved nor trained.",
}


@dataclass(frozen=True)
class ModuleFile:
    """The source, the name of the model's class in it, and the arrays that it reads from the file
    beside it (none: there is no such file). `statements` are those of the port, and of the source
    that it was written of: those that an operation comes from."""

    source: str
    model: str
    arrays: dict[str, np.ndarray]
    statements: tuple[int, int]
    draws: frozenset[str]  # the operations that draw random numbers
    layers: frozenset[str]  # the modules that are torch's own layers there and are layers in it
    norms: frozenset[str]  # those whose classes derive from torch's BatchNorm, and here from Flax's


def module_file(
    graph: Graph,
    module: Any,
    layout: Layout,
    header: str,
    constructed: Mapping[str, Mapping[str, Any]] | None = None,
    standalone: bool = False,
    moved: Relaid | None = None,
) -> ModuleFile:
    """The port of a module whose graph has its calls noted. `constructed` are the plain arguments
    that the constructors of its parts were given, by path. `standalone`: what it uses of zoo.nn is
    written into it. `moved` says what of the graph and the layout has other axes than torch's."""
    by_name = ByName(layout)

    def home(name: str) -> str:
        entry = by_name.flax_of(name)
        return entry.flax[0].name if entry is not None else name

    moved = moved or Relaid(graph)
    context = Context(Tree(graph, module, home, moved.orders), by_name, module, moved)
    for _ in range(_ROUNDS):
        context.begin()
        with contextlib.suppress(Again):
            functions = HelperFunctions(context)
            classes = Classes(context, constructed or {})
            return _File(context, functions, classes, header, standalone).file()
    raise NotRendered("its parts need too many sizes of each other's arrays")


class _File:
    def __init__(
        self,
        context: Context,
        functions: HelperFunctions,
        classes: Classes,
        header: str,
        standalone: bool = False,
    ) -> None:
        self.context, self.classes, self.header = context, classes, header
        self.functions = functions.every
        self.standalone = standalone
        modules = context.tree.modules
        self.lengths = {p: len(children(m)) for p, m in modules.items()}

    def file(self) -> ModuleFile:
        """The whole file."""
        classes = ["\n".join(self._function(f)) for f in self.functions]
        classes += ["\n".join(self._class(c)) for c in self.classes.every]
        rules = self.context.called()
        more = [*self.classes.imports, *self._pools("\n".join(classes))]
        if self.standalone:
            more, blocks = without_ours(more, "\n".join(classes))
            rules = self.context.called(blocks)
        ours = rules.source.strip()  # blocks come last: the model is what is read
        parts = [*classes, ours] if self.standalone else [ours, *classes]
        parts = [self._kinds(), self._tuples(), *parts]
        body = "\n\n\n".join(p for p in parts if p)
        arrays = ["with np.load(Path(__file__).with_suffix('.npz')) as _file:"]
        arrays += [f"{INDENT}ARRAYS = dict(_file)"]
        text = "\n\n".join(
            p
            for p in (
                f'"""{self.header}"""',
                _OWN_NAMES if not all(_is_capped(c.name) for c in self.classes.every) else "",
                "\n".join(self._imports(body, [*more, *rules.imports])),
                "\n".join(arrays) if self.context.held.arrays else "",
                body,
            )
            if p
        )
        model = self.classes.by_path[""].name
        bodies = [f.body for f in self.functions]
        bodies += [c.body for c in self.classes.every if c.body is not None]
        own = sum(not line.is_bare for b in bodies for line in tidied(b.lines))
        statements = own, sum(b.source for b in bodies)
        source = formatted(text + "\n")
        layers = self.context.layers.exact()
        draws = frozenset(self.context.draws)
        norms = frozenset(self.context.layers.norms)
        return ModuleFile(source, model, self.context.held.arrays, statements, draws, layers, norms)

    def _pools(self, body: str) -> Iterator[str]:
        """The imports of functions on images with channels last."""
        if self.context.moved.orders:
            for name in _POOLS:
                called = re.search(rf"(?<![.\w]){name}\(", body)
                if called and name not in self.context.rules.names:
                    yield f"from zoo.nn.pool_flax import {name}"

    def _imports(self, body: str, more: list[str]) -> list[str]:
        words = set(re.findall(r"\w+", body))
        known = {
            "Any": "from typing import Any",
            "NamedTuple": "from typing import NamedTuple",
            "Path": "from pathlib import Path",
            "jax": "import jax",
            "jnp": "import jax.numpy as jnp",
            "lax": "from jax import lax",
            "math": "import math",
            "np": "import numpy as np",
            "Array": "from jax import Array",
        }
        lines = {"from __future__ import annotations", "from flax import nnx"}
        lines |= {line for name, line in known.items() if name in words}
        lines |= set(more)
        if self.context.held.arrays:
            lines |= {known["np"], known["Path"]}
        order = sorted(lines, key=lambda x: (not x.startswith("from __future__"), x))
        return [order[0], "", *order[1:]]

    def _kinds(self) -> str:
        made = [
            f'class {kind}(nnx.Variable):\n{INDENT}"""{_KINDS[kind]}"""'
            for kind in self.context.held.kinds
        ]
        return "\n\n\n".join(made)

    def _tuples(self) -> str:
        made = []
        for name, fields in self.context.tuples.items():
            lines = "\n".join(f"{INDENT}{f}: {kind}" for f, kind in fields.items())
            made.append(f"class {name}(NamedTuple):\n{lines}")
        return "\n\n\n".join(made)

    # Functions and classes.

    def _function(self, written: WrittenFunction) -> Iterator[str]:
        scope, body = written.scope, written.body
        given = scope.call.arguments
        types = ", ".join(f"{p}: {self._kind(p, scope, [given.get(p)])}" for p in body.parameters)
        yield f"def {written.name}({types}) -> {self._result(scope)}:"
        yield from _origin(scope.function)
        for line in tidied(body.lines):
            yield from _written(line, INDENT)

    def _class(self, written: WrittenClass) -> Iterator[str]:
        base = "nnx.List[Any]" if written.items else "nnx.Module"
        derived = written.whole().get(BASE)
        base = derived.callee if derived is not None else base
        yield f"class {written.name}({base}):"
        yield from _origin(written.of)
        yield ""
        if written.body is None:
            yield f"{INDENT}# It only holds its parts: the traced call does not call it."
            yield ""
        if written.whole():
            yield from self._init(written)
            yield ""
        elif "" in written.made:  # the model itself, which whoever makes it gives keys
            yield f"{INDENT}def __init__(self, *, rngs: nnx.Rngs) -> None:"
            yield f"{INDENT * 2}del rngs  # nothing is drawn"
            yield ""
        if written.body is not None:
            yield from self._call(written, written.body)

    def _init(self, written: WrittenClass) -> Iterator[str]:
        first = next(iter(written.made))
        given = written.arguments_of(first)
        defaults = written.defaults()
        types = [
            f"{n}: {_type(written.parameters[n].values())}"
            + (f" = {plainly(defaults[n])}" if n in defaults else "")
            for n in given
        ]
        types += ["*", *(f"{n}: Any" for n in written.given), "rngs: nnx.Rngs"]
        yield f"{INDENT}def __init__({', '.join(['self', *types])}) -> None:"
        made = list(written.init())
        if written.items:
            numbered = [text for name, text in made if name.isdigit()]
            yield f"{INDENT * 2}super().__init__([{', '.join(numbered)}])"
        for name, text in made:
            if name == BASE:
                arguments = text.partition("(")[2]
                yield f"{INDENT * 2}super().__init__({arguments}"
            elif name.isidentifier():
                yield f"{INDENT * 2}self.{name} = {_plain(text)}"
            elif not name.isdigit():
                yield f"{INDENT * 2}setattr(self, {name!r}, {_plain(text)})"

    def _call(self, written: WrittenClass, body: Body) -> Iterator[str]:
        path = next(iter(written.made))
        scopes = self.classes.scopes[path]
        parameters = [f"{p}: {self._parameter(p, written)}" for p in body.parameters]
        result = self._result(scopes[0])
        derived = "  # type: ignore[override]" if BASE in written.whole() else ""
        yield f"{INDENT}def __call__({', '.join(['self', *parameters])}) -> {result}:{derived}"
        prefix = f"{path}." if path else ""
        lengths = {
            f"self.{p.removeprefix(prefix)}": n
            for p, n in self.lengths.items()
            if p.startswith(prefix) and p != path
        }
        guard = ""
        for line in rolled(tidied(body.lines), lengths):
            own = line.guard if isinstance(line, Line) else ""
            if own != guard and own:
                after = guard and own == negation(guard)
                yield f"{INDENT * 2}{'else' if after else f'if {own}'}:"
            guard = own
            margin = INDENT * (3 if own else 2)
            if isinstance(line, Loop):
                yield f"{margin}{line.header()}"
                for one in line.lines:
                    yield from _written(one, margin + INDENT)
            else:
                yield from _written(line, margin)

    def _parameter(self, name: str, written: WrittenClass) -> str:
        every = [s for p in written.made for s in self.classes.scopes.get(p, ())]
        scope = every[0]
        kind = self._kind(name, scope, [s.call.arguments.get(name) for s in every])
        return f"{kind} | None = None" if self.context.signatures.is_optional(name, scope) else kind

    def _kind(self, name: str, scope: Scope, given: list[Any]) -> str:
        """The type of a parameter that gets these arguments."""
        signatures = self.context.signatures
        if name in signatures.plain(scope):
            return _type(given)
        if any(isinstance(x, list | dict) for x in given):
            return "Any"
        return "int" if name in signatures.size_names(scope) else "Array"

    def _result(self, scope: Scope) -> str:
        if scope.is_model:
            nesting = self.context.tree.graph.outputs
            if nesting.kind == "leaf":
                return "Array"
            return str(nesting.cls.__name__) if nesting.kind == "named" else "Any"
        values = self.context.signatures.results_of(scope)
        if len(values) == 1 and values[0] is not None:
            return self._kind_of(values[0])
        return f"tuple[{', '.join(map(self._kind_of, values))}]" if values else "None"

    def _kind_of(self, value: int | None) -> str:
        """The type of one result; None is one that only other calls give."""
        if value is None:
            return "Array | None"
        return "Array" if isinstance(self.context.tree.type_of(value), ArrayType) else "Any"


def _written(line: Line, margin: str) -> Iterator[str]:
    if line.comment:
        yield f"{margin}# {line.comment}"
    yield f"{margin}{_plain(str(line))}"


def _type(values: Any) -> str:
    names = dict.fromkeys("None" if v is None else type(v).__name__ for v in values)
    return " | ".join(_TYPES.get(name, name) for name in names)


_WIDTH = 100
_OWN_NAMES = "# Classes have the names that they have in torch.\n# ruff: noqa: N801"
_TYPES = {"tuple": "tuple[Any, ...]", "Stored": "np.ndarray"}


def _is_capped(name: str) -> bool:
    """Whether a class has a name as PEP 8 wants it."""
    name = name.lstrip("_")
    return name[:1].isupper() and "_" not in name


def _origin(of: Any) -> Iterator[str]:
    """The docstring: what it was written from."""
    module, name = module_name(of), of.__qualname__
    if len(line := f'{INDENT}"""From {module}.{name}."""') <= _WIDTH:
        yield line
    else:
        yield from (f'{INDENT}"""From {module}:', f'{INDENT}{name}."""')


def _plain(text: str) -> str:
    """A statement or expression without parentheses that are not needed."""
    try:
        tree = ast.parse(text)
        for plainer in (Subscripts(), Shapes(), Numbers()):
            tree = plainer.visit(tree)
        return ast.unparse(tree)
    except SyntaxError as e:
        raise AssertionError(f"{text}: {e}") from e


# Imports in order; needless parentheses; a choice between two values on one line.
_FIXED = "I,F401,UP034,SIM108,SIM201"


def formatted(source: str) -> str:
    """The source as ruff formats it, where that is installed."""
    ruff = shutil.which("ruff") or shutil.which("ruff", path=str(sys.prefix) + "/bin")
    if ruff is None:
        return source
    width = ["--isolated", "--line-length", str(_WIDTH), "--quiet"]
    for command in (
        ["check", *width, "--select", _FIXED, "--fix-only", "--unsafe-fixes", "-"],
        ["format", *width, "-"],
    ):
        done = subprocess.run(
            [ruff, *command], input=source, capture_output=True, text=True, check=False
        )
        source = done.stdout if done.returncode == 0 else source
    return source
