"""Rules (convert/porting/rules) and blocks (zoo/nn) as the text of a file that stands alone.

Where an operation has no plain expression, a port holds its rule: the function itself with all that
it uses of ours, without the decorators that entered it into the table. A rule that a function made
is written as what it was made of: its body, with the values that it closed over in their places.
A file without `zoo` holds the blocks that it uses in the same way.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import inspect
import keyword
import sys
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from convert.porting.rendering.operands import ArrayType, Operand, SizeText
from convert.porting.rendering.syntax import (
    decorated_by,
    definitions,
    enters,
    fresh,
    import_line,
    is_ours,
    node_of,
    tree_of,
)
from convert.porting.rendering.templates.drawing import KEYS
from convert.porting.rules import Rule, find
from convert.program.graph import Dtype
from zoo.containers.errors import ZooError

_FUTURE = "from __future__ import annotations"
# Where functions of libraries are found again, and what a port calls these modules.
_LIBRARIES = {
    "jnp": ("jax.numpy", "import jax.numpy as jnp"),
    "lax": ("jax.lax", "from jax import lax"),
    "jax.nn": ("jax.nn", "import jax"),
    "jnp.fft": ("jax.numpy.fft", "import jax.numpy as jnp"),
    "jnp.linalg": ("jax.numpy.linalg", "import jax.numpy as jnp"),
    "jax.scipy.special": ("jax.scipy.special", "import jax"),
    "np": ("numpy", "import numpy as np"),
    "math": ("math", "import math"),
    "operator": ("operator", "import operator"),
}
_RESERVED = {"jax", "jnp", "lax", "np", "math", "nnx", "functools", "operator", "self", "rngs"}
# Arguments that say of a rule with `rng` that it draws nothing.
_DROPS = ("dropout_p", "dropout", "train", "p")


@dataclass(frozen=True)
class WrittenRules:
    """The text of some rules: `imports` are its lines at the top, `source` what follows; `names`
    what it defines, and `functions` how each operation's rule is called."""

    imports: list[str]
    source: str
    names: frozenset[str]
    functions: Mapping[str, str]

    def call(
        self,
        op: str,
        out: ArrayType | list[ArrayType] | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> str:
        """The expression that calls an operation's rule; one that draws takes `self.rngs`."""
        given = [value_text(a) for a in args] + [f"{k}={value_text(v)}" for k, v in kwargs.items()]
        rule = _rule(op)
        if rule.random:
            given.append(f"rng={KEYS if _draws(rule, args, kwargs) else None}")
        return f"{self.functions[op]}({', '.join(given)})"


def value_text(value: Any) -> str:
    """An argument of a rule, as it is written."""
    if isinstance(value, Operand | SizeText):
        return value.text
    if isinstance(value, Dtype):
        return f"jnp.{'bool_' if value.name == 'bool' else value.name}"
    if isinstance(value, list | tuple):
        inner = ", ".join(map(value_text, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if inner else "()"
    if isinstance(value, float) and value - value != 0:
        return "jnp.nan" if value != value else "jnp.inf" if value > 0 else "-jnp.inf"
    return repr(value)


def _draws(rule: Rule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    given = inspect.signature(rule.function).bind_partial(*args, **kwargs)
    given.apply_defaults()
    return all(given.arguments.get(name, 1) not in (0, None) for name in _DROPS)


def _rule(op: str) -> Rule:
    rule = find(op)
    if rule is None:
        raise ZooError(
            f"{op} has no rule that could be written into a file",
            f"register one with convert.porting.rules.rule({op!r})",
        )
    return rule


def written(
    ops: Iterable[str], taken: Iterable[str] = (), blocks: Iterable[tuple[str, str]] = ()
) -> WrittenRules:
    """The rules of these operations as text. `taken` are names that it may not define; but for
    those of `blocks`, (module, name) of ours each, which it defines by these very names.

    Raises ZooError where an operation has no rule, or one whose source is not at hand.
    """
    blocks = list(blocks)
    writer = _Writer({*taken, *_RESERVED, *(name for _, name in blocks)}, set(blocks))
    functions = {}
    for op in dict.fromkeys(ops):
        _, name, overload = op.rsplit(".", 2)
        hints = (name.lstrip("_"), f"{name.lstrip('_')}_{overload}")
        functions[op] = ast.unparse(writer.value(_rule(op).function, hints))
    for module, name in blocks:
        importlib.import_module(module)
        writer.of_module(module, name)
    imports = sorted(writer.imports, key=lambda line: (line != _FUTURE, line))
    source = "\n\n\n".join(map(ast.unparse, writer.statements))
    return WrittenRules(imports, source + "\n", frozenset(writer.names), functions)


class _Writer:
    """Statements in an order in which they run, each thing once. `taken`: names not to define;
    `given`: what has its own name although that is taken."""

    def __init__(self, taken: set[str], given: Collection[tuple[str, str]] = ()) -> None:
        self.given = given
        self.taken = taken | set(dir(builtins)) | set(keyword.kwlist)
        self.names: set[str] = set()
        self.imports: set[str] = {_FUTURE}
        self.statements: list[ast.stmt] = []
        self._done: dict[Any, str] = {}
        self._held: list[Any] = []  # what `_done` names by its id must live as long

    def _free(self, *hints: str) -> str:
        """The first of the hints that is not taken, else the last with a number."""
        numbered = (f"{hints[-1]}_{i}" for i in range(2, 1000))
        every = [*hints, *numbered]
        name = next(h for h in every if h not in self.taken)
        self.taken.add(name)
        self.names.add(name)
        return name

    # -- values ---------------------------------------------------------------------------------

    def value(self, value: Any, hints: tuple[str, ...] = ()) -> ast.expr:
        """The expression of a value that a function closes over."""
        if isinstance(value, list | tuple):
            parts = [self.value(v) for v in value]
            made = ast.List if isinstance(value, list) else ast.Tuple
            return made(parts, ast.Load())
        if value is None or isinstance(value, bool | int | float | complex | str):
            return ast.parse(value_text(value), mode="eval").body
        dotted = _library().get(id(value), "")
        if dotted:
            self.imports.add(_LIBRARIES[dotted.rpartition(".")[0]][1])
            return ast.parse(dotted, mode="eval").body
        module, name = getattr(value, "__module__", ""), getattr(value, "__name__", "")
        named = is_ours(module) and getattr(sys.modules.get(module), name, None) is value
        if named and name in definitions(module):
            return self.of_module(module, name)
        if isinstance(value, types.FunctionType):
            return ast.Name(self._flattened(value, hints), ast.Load())
        raise ZooError(f"a rule holds {value!r}, which cannot be written into a file", "define it")

    def of_module(self, module: str, name: str) -> ast.expr:
        """The expression of what a name means at the top of a module."""
        node = definitions(module).get(name)
        if node is None:
            value = getattr(sys.modules[module], name, None)
            plain = value is None and hasattr(builtins, name)
            return ast.Name(name, ast.Load()) if plain else self.value(value)
        if isinstance(node, ast.Import | ast.ImportFrom):
            if isinstance(node, ast.ImportFrom) and is_ours(node.module):
                original = next(a.name for a in node.names if (a.asname or a.name) == name)
                return self.of_module(str(node.module), original)
            self.imports.add(import_line(node, name))
            self.taken.add(name)
            return ast.Name(name, ast.Load())
        key = (module, name)
        if key not in self._done:
            private = () if name.startswith("_") else (f"_{name}",)
            self._done[key] = name if key in self.given else self._free(name, *private)
            self._define(module, node, name, self._done[key])
        return ast.Name(self._done[key], ast.Load())

    # -- definitions ----------------------------------------------------------------------------

    def _define(self, module: str, node: ast.stmt, name: str, new: str) -> None:
        made = fresh(node)
        if isinstance(made, ast.FunctionDef | ast.ClassDef):
            kept = [d for d in made.decorator_list if not enters(d)]
            made.decorator_list = kept
            made.name = new
            self._write(made, module)
            if kept:  # @f.defjvp and the like
                functions = [f for f in tree_of(module).body if isinstance(f, ast.FunctionDef)]
                for other in functions:
                    if decorated_by(other.decorator_list) == name:
                        self.of_module(module, other.name)
            return
        assert isinstance(made, ast.Assign | ast.AnnAssign)
        target = made.targets[0] if isinstance(made, ast.Assign) else made.target
        assert isinstance(target, ast.Name)
        target.id = new
        self._write(made, module, {new})

    def _write(
        self,
        node: ast.stmt,
        module: str,
        bound: set[str] | None = None,
        closure: Mapping[str, Any] | None = None,
    ) -> None:
        names = _Names(self, module, bound or set(), closure or {})
        visited = names.visit(node)
        self.statements.append(visited)

    def _flattened(self, function: types.FunctionType, hints: tuple[str, ...]) -> str:
        """A function that another one made, or a lambda: as one of its own."""
        if id(function) in self._done:
            return self._done[id(function)]
        node = fresh(node_of(function))
        own = "function" if isinstance(node, ast.Lambda) else function.__name__
        name = self._free(*(hints or (own,)))
        self._done[id(function)] = name
        self._held.append(function)
        cells = [c.cell_contents for c in function.__closure__ or ()]
        closure = dict(zip(function.__code__.co_freevars, cells, strict=True))
        if isinstance(node, ast.Lambda):
            made = _as_def(node, function, closure)
            self.imports.add("from typing import Any")
        else:
            made, node.decorator_list = node, []
        made.name = name
        self._write(made, function.__module__, closure=closure)
        return name


@cache
def _library() -> dict[int, str]:
    """The dotted names of what the libraries have, by the id of each."""
    found: dict[int, str] = {}
    for short, (module, _) in _LIBRARIES.items():
        for name, value in vars(importlib.import_module(module)).items():
            if callable(value) and not name.startswith("_"):
                found.setdefault(id(value), f"{short}.{name}")
    return found


def _as_def(
    node: ast.Lambda, function: types.FunctionType, closure: dict[str, Any]
) -> ast.FunctionDef:
    """A lambda as a def. A default that is a name is a value that it was given: it goes into
    `closure`."""
    n = len(node.args.defaults)
    pairs = zip(node.args.args[-n:] if n else [], node.args.defaults, strict=True)
    values = function.__defaults__ or ()
    given = {a.arg: v for (a, d), v in zip(pairs, values, strict=True) if isinstance(d, ast.Name)}
    closure |= given
    arguments = node.args
    arguments.args = [a for a in arguments.args if a.arg not in given]
    arguments.defaults = [d for d in arguments.defaults if not isinstance(d, ast.Name)]
    for a in arguments.args:
        a.annotation = ast.Name("Any", ast.Load())
    body: list[ast.stmt] = [ast.Return(node.body)]
    return ast.FunctionDef("_", arguments, body, [], ast.Name("Any", ast.Load()), lineno=0)


class _Names(ast.NodeTransformer):
    """Names of a definition as the file has them: `closure` are values, the rest is `module`'s."""

    def __init__(
        self, writer: _Writer, module: str, bound: set[str], closure: Mapping[str, Any]
    ) -> None:
        self.writer, self.module, self.closure = writer, module, closure
        self.bound = set(bound)
        self.local: dict[str, ast.expr] = {}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self.local:
            return self.local[node.id]
        if not isinstance(node.ctx, ast.Load) or node.id in self.bound:
            return node
        if node.id in self.closure:
            return self.writer.value(self.closure[node.id])
        if node.id in definitions(self.module):
            return self.writer.of_module(self.module, node.id)
        if hasattr(builtins, node.id) or node.id in self.writer.names:
            return node
        return self.writer.of_module(self.module, node.id)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        """What another module of ours has, by that module's name."""
        held = node.value.id if isinstance(node.value, ast.Name) else ""
        found = definitions(self.module).get(held) if held not in self.bound else None
        if isinstance(found, ast.ImportFrom) and is_ours(found.module):
            module = f"{found.module}.{held}"
            if importlib.util.find_spec(module) is not None:
                importlib.import_module(module)
                return self.writer.of_module(module, node.attr)
        return cast("ast.expr", self.generic_visit(node))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt | None:
        """What a function imports of ours is in the file."""
        if not is_ours(node.module):
            return node
        importlib.import_module(str(node.module))
        for alias in node.names:
            found = self.writer.of_module(str(node.module), alias.name)
            self.local[alias.asname or alias.name] = found
        return None

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self._scoped(node)
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.Lambda:
        self._scoped(node)
        return node

    def _scoped(self, node: ast.FunctionDef | ast.Lambda) -> None:
        """Defaults, annotations and decorators belong outside; the body has its own names."""
        node.args = self.visit(node.args)
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = [self.visit(d) for d in node.decorator_list]
            node.returns = node.returns and self.visit(node.returns)
        before, self.bound = self.bound, self.bound | _bound(node)
        if isinstance(node, ast.Lambda):
            node.body = self.visit(node.body)
        else:
            node.body = [s for s in map(self.visit, node.body) if s is not None]
        self.bound = before


def _bound(node: ast.FunctionDef | ast.Lambda) -> set[str]:
    """The names that are a function's own."""
    a = node.args
    names = {x.arg for x in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg] if x}
    body: list[Any] = [node.body] if isinstance(node, ast.Lambda) else list(node.body)
    while body:
        part = body.pop()
        if isinstance(part, ast.FunctionDef):
            names.add(part.name)
        elif isinstance(part, ast.Import):
            names |= {x.asname or x.name.partition(".")[0] for x in part.names}
        elif isinstance(part, ast.ImportFrom) and not is_ours(part.module):
            names |= {x.asname or x.name for x in part.names}
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            names.add(part.id)
        if not isinstance(part, ast.FunctionDef | ast.Lambda):
            body += ast.iter_child_nodes(part)
    return names
