"""Sizes that differ between the calls of one module: numbers in each call's own statements, which
are written by the shapes of its arguments."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

from convert.porting.rendering.scopes import Scope, Tree
from convert.porting.rendering.statements import Body
from convert.program.graph import ArrayType, ValueRef

_NUMBER = re.compile(r"(?<![\w.])\d+(?![\w.])")
Call = tuple[Scope, Body]


def sizes_of_arguments(calls: Sequence[Call], tree: Tree) -> None:
    """Rewrite the statements of calls that differ in whole numbers alone, as far as each number is
    a size of an argument in every call."""
    bodies = [body for _, body in calls]
    if len(calls) < 2 or len({len(body.lines) for body in bodies}) > 1:
        return
    shapes = [dict(_shapes(scope, tree)) for scope, _ in calls]
    for index, lines in enumerate(zip(*(body.lines for body in bodies), strict=True)):
        texts = [line.text for line in lines]
        if len(set(texts)) == 1 or len({_NUMBER.sub("#", text) for text in texts}) > 1:
            continue
        assigned = {name for body in bodies for line in body.lines[:index] for name in line.targets}
        able = [{n: s for n, s in one.items() if n not in assigned} for one in shapes]
        columns = list(zip(*(map(int, _NUMBER.findall(text)) for text in texts), strict=True))
        sizes = [_size(column, able) if len(set(column)) > 1 else None for column in columns]
        for body, line in zip(bodies, lines, strict=True):
            body.lines[index] = dataclasses.replace(line, text=_written(line.text, sizes))


def _shapes(scope: Scope, tree: Tree) -> Iterator[tuple[str, tuple[int | str, ...]]]:
    """The shapes of the arrays that a call is given, but for those whose axes lie otherwise."""
    for name, given in scope.call.arguments.items():
        if isinstance(given, ValueRef) and not tree.orders.get(given.value):
            kind = tree.type_of(given.value)
            if isinstance(kind, ArrayType):
                yield name, kind.shape


def _size(column: Sequence[int], shapes: Sequence[Mapping[str, tuple[int | str, ...]]]) -> str:
    """The size of an argument that is this number in each call, or a multiple of it; "" where none
    is."""
    found: list[tuple[int, str]] = []
    for name, shape in shapes[0].items():
        for axis in range(len(shape)):
            held = [s[name][axis] if len(s.get(name, ())) > axis else None for s in shapes]
            sizes = [n for n in held if isinstance(n, int) and n > 0]
            times = {a / b for a, b in zip(column, sizes, strict=False)}
            if len(sizes) == len(column) and len(times) == 1 and (by := times.pop()) == int(by) > 0:
                text = f"{name}.shape[{axis}]"
                found.append((int(by), text if by == 1 else f"({int(by)} * {text})"))
    return min(found, default=(0, ""))[1]


def _written(text: str, sizes: Sequence[str | None]) -> str:
    at = iter(sizes)
    return _NUMBER.sub(lambda m: next(at) or m[0], text)
