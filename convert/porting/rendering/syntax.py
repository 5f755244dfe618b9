"""The syntax of functions: where it stands, what it is, and what a module defines."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import re
import types
from collections.abc import Iterable
from functools import cache
from typing import TypeVar, cast

from zoo.containers.errors import ZooError

N = TypeVar("N", bound=ast.AST)
_OURS = ("convert", "zoo")


@cache
def tree_of(module: str) -> ast.Module:
    try:
        return ast.parse(inspect.getsource(importlib.import_module(module)))
    except (ImportError, OSError, TypeError) as e:
        raise ZooError(
            f"the rule in {module} cannot be written into a file: its source is not at hand",
            "define it in a Python file",
        ) from e


@cache
def definitions(module: str) -> dict[str, ast.stmt]:
    """What a module defines or imports at its top, by name."""
    found: dict[str, ast.stmt] = {}
    for node in tree_of(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id: node for t in targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {a.asname or a.name.partition(".")[0]: node for a in node.names}
    return found


def import_line(node: ast.Import | ast.ImportFrom, name: str) -> str:
    """The line that imports one name as this statement does."""
    one = copy.copy(node)
    one.names = [a for a in node.names if (a.asname or a.name.partition(".")[0]) == name]
    return ast.unparse(one)


def is_ours(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _OURS


def without_ours(lines: Iterable[str], text: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Lines that import: those of others, and what a text uses of ours: (module, name) each."""
    words = set(re.findall(r"\w+", text))
    others, blocks = [], []
    for line in lines:
        (node,) = ast.parse(line).body
        if isinstance(node, ast.ImportFrom) and is_ours(node.module):
            blocks += [(str(node.module), a.name) for a in node.names if a.name in words]
        else:
            others.append(line)
    return others, blocks


def decorated_by(decorators: list[ast.expr]) -> str:
    """`f` of a decorator `@f.defjvp`."""
    for d in decorators:
        if isinstance(d, ast.Attribute) and isinstance(d.value, ast.Name):
            return d.value.id
    return ""


def enters(decorator: ast.expr) -> bool:
    """Whether a decorator enters a function into the table of rules."""
    call = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(call, ast.Name) and call.id == "rule"


@cache
def _functions(module: str) -> dict[int, list[ast.FunctionDef | ast.Lambda]]:
    """The functions of a module at any depth, by the lines that may be called their first."""
    found: dict[int, list[ast.FunctionDef | ast.Lambda]] = {}
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            above = node.decorator_list if isinstance(node, ast.FunctionDef) else []
            for line in {node.lineno, *(d.lineno for d in above)}:
                found.setdefault(line, []).append(node)
    return found


def node_of(function: types.FunctionType) -> ast.FunctionDef | ast.Lambda:
    """The syntax of a function that stands within another, or is a lambda."""
    for node in _functions(function.__module__)[function.__code__.co_firstlineno]:
        if isinstance(node, ast.Lambda):
            if function.__name__ == "<lambda>" and _same_code(node, function):
                return node
        elif node.name == function.__name__:
            return node
    raise LookupError(function.__qualname__)


_TEXTS: dict[int, str] = {}  # of nodes of trees, which stay


def fresh(node: N) -> N:
    """A copy, which costs a tenth of what `copy.deepcopy` does."""
    if id(node) not in _TEXTS:
        _TEXTS[id(node)] = ast.unparse(node)
    parsed = ast.parse(_TEXTS[id(node)]).body[0]
    return cast("N", parsed.value if isinstance(parsed, ast.Expr) else parsed)


def _same_code(node: ast.Lambda, function: types.FunctionType) -> bool:
    """Whether a lambda is this one, among several on a line: by the names that it uses."""
    code = function.__code__
    names = {n.id for n in ast.walk(node.body) if isinstance(n, ast.Name)}
    names |= {n.attr for n in ast.walk(node.body) if isinstance(n, ast.Attribute)}
    used = {*code.co_names, *code.co_freevars}
    arguments = [a.arg for a in node.args.args]
    return used <= names and tuple(arguments) == code.co_varnames[: len(arguments)]
