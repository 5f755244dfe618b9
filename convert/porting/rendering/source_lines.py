"""The statements of somebody's source: which one a line belongs to, and what it assigns."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
from collections.abc import Collection, Iterator
from typing import Any

Copy = tuple[int, str, str, str]
_Simple = ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Return | ast.Expr


class SourceFile:
    """One file, or one cell of a notebook."""

    def __init__(self, file: str) -> None:
        self.lines = linecache.getlines(file)
        try:
            tree: ast.AST = ast.parse("".join(self.lines))
        except SyntaxError:
            tree = ast.Module([], [])
        self.by_line: dict[int, ast.stmt] = {}
        self.loops: list[ast.For] = []
        self.functions: list[ast.FunctionDef] = []
        self.choices: list[ast.If] = []
        self.tuples: dict[str, list[ast.Assign]] = {}  # by the name that becomes one
        for found in ast.walk(tree):
            if isinstance(found, ast.Assign) and isinstance(found.value, ast.Tuple):
                target = found.targets[0]
                if isinstance(target, ast.Name):
                    self.tuples.setdefault(target.id, []).append(found)
            if isinstance(found, ast.If):
                self.choices.append(found)
            if isinstance(found, ast.FunctionDef):
                self.functions.append(found)
            if isinstance(found, ast.For):
                self.loops.append(found)
            if isinstance(found, _Simple):
                for line in range(found.lineno, (found.end_lineno or found.lineno) + 1):
                    self.by_line[line] = found

    def statement(self, line: int) -> ast.stmt | None:
        """The simple statement that a line is of; None where it is of a header or unknown."""
        return self.by_line.get(line)

    def loop_around(self, line: int) -> ast.For | None:
        """The innermost for-loop that a line is in."""
        around = [x for x in self.loops if x.lineno <= line <= (x.end_lineno or x.lineno)]
        return max(around, key=lambda x: x.lineno, default=None)

    def last_return(self, first: int, last: int) -> ast.stmt | None:
        """The last statement of these lines that returns something."""
        found = (self.by_line.get(line) for line in range(last, first - 1, -1))
        return next((s for s in found if isinstance(s, ast.Return) and s.value), None)

    def tuple_of(self, name: str, line: int) -> ast.stmt | None:
        """The statement that makes a name a tuple, before a line of the same function."""
        made = [s for s in self.tuples.get(name, ()) if s.lineno < line]
        around = [f for f in self.functions if f.lineno <= line <= (f.end_lineno or f.lineno)]
        if not made or not around:
            return None
        first = max(f.lineno for f in around)
        return max((s for s in made if s.lineno >= first), key=lambda s: s.lineno, default=None)

    def choices_around(self, line: int) -> list[tuple[ast.expr, bool]]:
        """The conditions that a line is under, innermost first, and whether they hold there."""
        found = []
        for choice in self.choices:
            for block, holds in ((choice.body, True), (choice.orelse, False)):
                last = block[-1].end_lineno if block else None
                if block and block[0].lineno <= line <= (last or block[-1].lineno):
                    found.append((choice.lineno, choice.test, holds))
        return [(test, holds) for _, test, holds in sorted(found, key=lambda c: -c[0])]


@functools.lru_cache(maxsize=256)
def source_file(file: str) -> SourceFile:
    """The file as it is known to Python's tracebacks, read once."""
    return SourceFile(file)


def targets(statement: ast.stmt | None) -> list[str]:
    """The names that a statement assigns, in order: `x` of `x[:, 0] = y` and of `self.x = y`."""
    if isinstance(statement, ast.Assign):
        return list(_names(statement.targets[0]))
    if isinstance(statement, ast.AugAssign | ast.AnnAssign):
        return list(_names(statement.target))
    return []


def _names(target: ast.expr) -> Iterator[str]:
    if isinstance(target, ast.Tuple | ast.List):
        for part in target.elts:
            yield from _names(part)
    elif isinstance(target, ast.Name):
        yield target.id
    elif isinstance(target, ast.Attribute):
        yield target.attr
    elif isinstance(target, ast.Subscript | ast.Starred):
        yield from _names(target.value)


def forward_lines(module: Any) -> tuple[str, int, int]:
    """The file of a module's forward, and its first and last line; ("", 0, 0) if unknown."""
    return code_lines(type(module).forward)


def code_lines(function: Any) -> tuple[str, int, int]:
    """The file of a function, and its first and last line; ("", 0, 0) if unknown."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return "", 0, 0
    lines = [line for _, _, line in code.co_lines() if line]
    return code.co_filename, code.co_firstlineno, max(lines, default=code.co_firstlineno)


def copies(file: str, first: int, last: int, computed: Collection[int]) -> list[Copy]:
    """The statements `name = other` and `a, b = other` of these lines; those that open a tuple of
    one, `name = other[0]`, ask for a dtype, `name = other.dtype`, or cast to one that `other` has
    here already: no line of `computed`. In order: line, name, other, what stands behind it."""
    found = []
    for line in range(first, last + 1):
        s = source_file(file).statement(line)
        if not isinstance(s, ast.Assign) or s.lineno != line or len(s.targets) > 1:
            continue
        value, behind = s.value, ""
        if line not in computed:
            if isinstance(value, ast.Subscript) and _is_zero(value.slice):
                value = value.value
            elif isinstance(value, ast.Attribute) and value.attr == "dtype":
                value, behind = value.value, ".dtype"
            elif isinstance(value, ast.Call) and (cast := cast_of(value)):
                value, behind = ast.Name(cast[0]), cast[1]
        target = s.targets[0]
        if isinstance(value, ast.Name) and isinstance(target, ast.Tuple):
            names = [x.id for x in target.elts if isinstance(x, ast.Name)]
            if len(names) == len(target.elts) and line not in computed:
                found.append((line, ", ".join(names), value.id, ""))
        if not isinstance(value, ast.Name) or not isinstance(target, ast.Name):
            continue
        if value.id != target.id or behind:
            found.append((line, target.id, value.id, behind))
    return found


def casts(statement: ast.stmt | None) -> dict[str, str]:
    """The names that a statement reads only to cast them, each with the cast."""
    if statement is None:
        return {}
    parts = list(ast.walk(statement))
    found = dict(filter(None, (cast_of(x) for x in parts if isinstance(x, ast.Call))))
    read = [x.id for x in parts if isinstance(x, ast.Name)]
    return {name: cast for name, cast in found.items() if read.count(name) == 1}


_OF_METHOD = {"float": "float32", "half": "float16", "bfloat16": "bfloat16"}


def cast_of(call: ast.Call) -> tuple[str, str] | None:
    """The name that `x.to(torch.float32)`, `x.float()`, `x.to(dtype)` or `x.type_as(y)` casts, and
    the cast in JAX."""
    method = call.func
    if not isinstance(method, ast.Attribute) or not isinstance(method.value, ast.Name):
        return None
    name, given = method.value.id, [*call.args, *(k.value for k in call.keywords)]
    if method.attr in _OF_METHOD and not given:
        return name, f".astype(jnp.{_OF_METHOD[method.attr]})"
    to = given[0] if len(given) == 1 else None
    if method.attr == "type_as" and isinstance(to, ast.Name):
        return name, f".astype({to.id}.dtype)"
    if method.attr != "to" or any(k.arg != "dtype" for k in call.keywords):
        return None
    if isinstance(to, ast.Name):
        return name, f".astype({to.id})"
    if isinstance(to, ast.Attribute) and isinstance(to.value, ast.Name):
        if to.value.id == "torch" and to.attr in _OF_METHOD.values():
            return name, f".astype(jnp.{to.attr})"
        if to.attr == "dtype":
            return name, f".astype({to.value.id}.dtype)"
    return None


def _is_zero(index: ast.expr) -> bool:
    return isinstance(index, ast.Constant) and index.value == 0


def mentioned(statement: ast.stmt | None) -> set[str]:
    """The names that a statement reads."""
    if statement is None:
        return set()
    found = {x.id for x in ast.walk(statement) if isinstance(x, ast.Name)}
    plain = isinstance(statement, ast.Assign)
    written = {x.id for x in ast.walk(statement)
               if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}  # fmt: skip
    read = {x.id for x in ast.walk(statement)
            if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load)}  # fmt: skip
    return read if plain else found | written


def own_name(module: Any) -> str:
    """What a module's forward calls the module."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code.co_varnames[0] if code is not None and code.co_argcount else "self"
