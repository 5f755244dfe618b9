"""The statements of somebody's source: which one a line belongs to, and what it assigns."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
from collections.abc import Collection, Iterator
from typing import Any

Copy = tuple[int, str, str]
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
        for found in ast.walk(tree):
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
        around = [f for f in self.functions if f.lineno <= line <= (f.end_lineno or f.lineno)]
        if not around:
            return None
        inner = max(around, key=lambda f: f.lineno)
        made = [
            s for s in ast.walk(inner)
            if isinstance(s, ast.Assign) and isinstance(s.value, ast.Tuple) and s.lineno < line
            and isinstance(s.targets[0], ast.Name) and s.targets[0].id == name
        ]  # fmt: skip
        return max(made, key=lambda s: s.lineno, default=None)

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
    """The statements `name = other` of these lines, and `name = other[0]` where a tuple of one is
    opened: no line of `computed`. In order: line, name, other."""
    found = []
    for line in range(first, last + 1):
        s = source_file(file).statement(line)
        if not isinstance(s, ast.Assign) or s.lineno != line or len(s.targets) > 1:
            continue
        value = s.value
        if isinstance(value, ast.Subscript) and line not in computed and _is_zero(value.slice):
            value = value.value
        target = s.targets[0]
        if isinstance(value, ast.Name) and isinstance(target, ast.Name) and value.id != target.id:
            found.append((line, target.id, value.id))
    return found


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
