"""Statements of a port as lines of its file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from convert.porting.rendering.number_text import Numbers
from convert.porting.rendering.shape_text import Shapes
from convert.porting.rendering.statements import Line
from convert.porting.rendering.subscripts import Subscripts
from convert.runtime.user_code import module_name

_POWER = re.compile(r"\*\* \((-[\d.]+)\)(?! \*\*)")  # of two in a row the second comes first
INDENT = "    "
WIDTH = 100


def written_line(line: Line, margin: str) -> Iterator[str]:
    """A statement, and its comment above it."""
    if line.comment:
        yield f"{margin}# {line.comment}"
    yield f"{margin}{plain(str(line))}"


def origin(of: Any) -> Iterator[str]:
    """The docstring: what it was written from."""
    module, name = module_name(of), of.__qualname__
    if len(line := f'{INDENT}"""From {module}.{name}."""') <= WIDTH:
        yield line
    elif len(line := f'{INDENT}"""From {module}:') <= WIDTH:
        yield from (line, f'{INDENT}{name}."""')
    else:
        yield from (f'{INDENT}"""From', f"{INDENT}{module}:", f'{INDENT}{name}."""')


def plain(text: str) -> str:
    """A statement or expression without parentheses that are not needed."""
    try:
        tree = ast.parse(text)
        for plainer in (Subscripts(), Shapes(), Numbers()):
            tree = plainer.visit(tree)
        text = _POWER.sub(r"** \1", ast.unparse(tree))
        returned = tree.body[0].value if isinstance(tree.body[0], ast.Return) else None
        several = isinstance(returned, ast.Tuple) and len(returned.elts) > 1
        return f"return {text.removeprefix('return (')[:-1]}" if several else text
    except SyntaxError as e:
        raise AssertionError(f"{text}: {e}") from e
