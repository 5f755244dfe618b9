"""The statements of somebody's source: which one a line belongs to, and what it assigns."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
from collections.abc import Iterator
from typing import Any

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
        for found in ast.walk(tree):
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
    function = inspect.unwrap(type(module).forward)
    code = getattr(function, "__code__", None)
    if code is None:
        return "", 0, 0
    lines = [line for _, _, line in code.co_lines() if line]
    return code.co_filename, code.co_firstlineno, max(lines, default=code.co_firstlineno)


def own_name(module: Any) -> str:
    """What a module's forward calls the module."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code.co_varnames[0] if code is not None and code.co_argcount else "self"
