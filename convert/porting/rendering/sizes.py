"""Sizes as the source has them: `B, T, C = x.shape`, `self.heads`, `C // self.heads`."""

from __future__ import annotations

import ast
import functools
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from convert.porting.rendering.operands import SizeText, inside
from convert.porting.rendering.source_lines import source_file
from convert.program.graph import FUNCTIONS, evaluate

_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
Values = Mapping[str, "int | str"]


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A statement of the source that names sizes: `B, _, C = x.shape`, `T = x.size(1)`."""

    line: int
    names: tuple[str | None, ...]
    array: str
    axis: int | None  # of one that names a single size


@dataclass(frozen=True, slots=True)
class Reckoned:
    """A statement of the source that may reckon with sizes: `d = x.shape[2] - y.size(2)`."""

    line: int
    name: str
    value: ast.expr

    def text(
        self, local: Values, shapes: Mapping[str, tuple[Sequence[Any], Sequence[int]]]
    ) -> SizeText | None:
        """What it gives, of the sizes that have names and of arrays; None where it is no size.
        `shapes` are those of arrays as they lie, each with torch's axes in the order in which they
        lie there."""
        tree: ast.AST = ast.parse(ast.unparse(self.value), mode="eval").body
        tree = _AsItLies({name: axes for name, (_, axes) in shapes.items()}).visit(tree)
        reading = _Reading(None, "", local, {name: shape for name, (shape, _) in shapes.items()})
        size = reading.evaluated(tree, {}) if isinstance(tree, ast.BinOp) else None
        return None if size is None else SizeText(ast.unparse(tree), size)


def unpackings(file: str, first: int, last: int) -> list[Unpacked | Reckoned]:
    """Those of the lines of a function, in order."""
    found: list[Unpacked | Reckoned] = []
    seen = set()
    for line in range(first, last + 1):
        statement = source_file(file).statement(line)
        if isinstance(statement, ast.Assign) and id(statement) not in seen:
            seen.add(id(statement))
            names = list(_unpacking(statement))
            target = statement.targets[0]
            if (
                not names
                and isinstance(target, ast.Name)
                and isinstance(statement.value, ast.BinOp)
            ):
                found.append(Reckoned(statement.lineno, target.id, statement.value))
            found += names
    return found


def _unpacking(statement: ast.Assign) -> Iterator[Unpacked]:
    target, value = statement.targets[0], statement.value
    array, axis = _shape_of(value)
    if array is None:
        return
    if isinstance(target, ast.Name) and axis is not None:
        yield Unpacked(statement.lineno, (target.id,), array, axis)
    elif isinstance(target, ast.Tuple) and axis is None:
        found = [x.id for x in target.elts if isinstance(x, ast.Name)]
        if len(found) == len(target.elts):
            names = tuple(n if n != "_" else None for n in found)
            yield Unpacked(statement.lineno, names, array, None)


def _shape_of(value: ast.expr) -> tuple[str | None, int | None]:
    """The array whose shape an expression is, and the axis: `x.shape`, `x.size(1)`."""
    axis = None
    if isinstance(value, ast.Subscript):
        axis = _number(value.slice)
        if axis is None:
            return None, None
        value = value.value
    if isinstance(value, ast.Call) and not value.keywords and isinstance(value.func, ast.Attribute):
        if value.func.attr != "size" or len(value.args) > 1:
            return None, None
        if value.args and (axis := _number(value.args[0])) is None:
            return None, None
        value = value.func.value
    elif isinstance(value, ast.Attribute) and value.attr == "shape":
        value = value.value
    else:
        return None, None
    return (value.id, axis) if isinstance(value, ast.Name) else (None, None)


def _number(x: ast.expr) -> int | None:
    try:
        found = ast.literal_eval(x)
    except ValueError:
        return None
    return found if isinstance(found, int) else None


def named(
    statement: ast.stmt | None,
    module: Any,
    me: str,
    local: Values,
    shapes: Mapping[str, Sequence[Any]],
) -> Iterator[tuple[SizeText, dict[str, Any]]]:
    """The numbers that a statement of the source mentions, each with the attributes of the module
    that it mentions. `me` is what the source calls the module, `local` are the names of sizes that
    are known, `shapes` those of arrays."""
    reading = _Reading(module, me, local, shapes)
    known = local.keys() | shapes.keys()
    if statement is None:
        return
    for call in ast.walk(statement):
        if isinstance(call, ast.Call):
            yield from _beside(call, reading)
    for part in ast.walk(statement):
        if not isinstance(part, ast.Attribute | ast.Name | ast.BinOp | ast.Call):
            continue
        attributes: dict[str, Any] = {}
        value = reading.evaluated(part, attributes)
        if value is not None and (attributes or _names(part) & known):
            yield (
                SizeText(ast.unparse(_Flat(me).visit(ast.parse(ast.unparse(part)))), value),
                attributes,
            )


def _beside(call: ast.Call, reading: _Reading) -> Iterator[tuple[SizeText, dict[str, Any]]]:
    """The arguments of a call that are one number, in order, where some are it by name and some
    are the plain number: `x.view(n, 3, self.heads)` of three heads."""
    values: list[tuple[ast.expr, Any, dict[str, Any]]] = []
    for arg in call.args:
        attributes: dict[str, Any] = {}
        values.append((arg, reading.evaluated(arg, attributes), attributes))
    plain = {v for arg, v, _ in values if isinstance(arg, ast.Constant) and type(v) is int}
    named = {v for arg, v, held in values if held and type(v) is int}
    for arg, value, attributes in values:
        if value in plain & named:
            text = ast.unparse(_Flat(reading.me).visit(ast.parse(ast.unparse(arg))))
            yield SizeText(text, value), attributes


def _names(part: ast.AST) -> set[str]:
    return {x.id for x in ast.walk(part) if isinstance(x, ast.Name)}


@dataclass(frozen=True)
class _Reading:
    """Numbers in a source, evaluated."""

    module: Any
    me: str
    local: Values
    shapes: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def evaluated(self, part: ast.expr, attributes: dict[str, Any]) -> Any:
        """The number that an expression is, or the size; None where it is neither. `attributes`
        gets those of the module that it mentions."""
        if isinstance(part, ast.Constant) and type(part.value) in (int, float):
            return part.value
        if isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.USub):
            inner = self.evaluated(part.operand, attributes)
            return -inner if isinstance(inner, int | float) else None
        if isinstance(part, ast.Name):
            return self.local.get(part.id)
        if isinstance(part, ast.Call | ast.Subscript) and (size := self.size(part)) is not None:
            return size
        if isinstance(part, ast.Attribute):
            found = self.attribute(part)
            if type(found) not in (int, float):
                return None
            attributes[part.attr] = found
            return found
        if isinstance(part, ast.Call) and ast.unparse(part.func) == "math.sqrt":
            inner = self.evaluated(part.args[0], attributes) if len(part.args) == 1 else None
            return math.sqrt(inner) if isinstance(inner, int | float) and inner >= 0 else None
        if isinstance(part, ast.BinOp) and (apply := _OPERATORS.get(type(part.op))) is not None:
            left = self.evaluated(part.left, attributes)
            right = self.evaluated(part.right, attributes)
            if isinstance(left, int | float) and isinstance(right, int | float):
                try:
                    return apply(left, right)
                except (ArithmeticError, ValueError):
                    return None
            if isinstance(left, int | str) and isinstance(right, int | str):
                return _unknown(part.op, left, right)
        return None

    def size(self, part: ast.expr) -> Any:
        """The size that `x.shape[1]` or `x.size(-1)` is of an array that is known."""
        array, axis = _shape_of(part)
        shape = self.shapes.get(array) if array is not None else None
        if shape is None or axis is None or not -len(shape) <= axis < len(shape):
            return None
        return shape[axis]

    def attribute(self, part: ast.Attribute) -> Any:
        """The value of `self.heads`, `self.config.heads`."""
        path = []
        x: ast.expr = part
        while isinstance(x, ast.Attribute):
            path.append(x.attr)
            x = x.value
        if not isinstance(x, ast.Name) or x.id != self.me:
            return None
        found = self.module
        for name in reversed(path):
            try:
                found = getattr(found, name)
            except Exception:  # whatever a stranger's property raises
                return None
        return found


def _unknown(of: ast.operator, left: int | str, right: int | str) -> str | None:
    """An expression of sizes that are no numbers."""
    sign = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//"}.get(type(of))
    return None if sign is None else f"({left}) {sign} ({right})"


_SYMBOL = re.compile(r"\b[a-z]+\d+\b")
_PRIMES = (3, 5, 7, 11, 13, 17, 19)


def sampled(size: int | str) -> int:
    """A size where each symbol in it is some number of its own, the same at every call."""
    if isinstance(size, int):
        return size
    names = set(_SYMBOL.findall(size))
    known = {n: 64 * _PRIMES[sum(map(ord, n)) % 7] * (1 + int(re.sub(r"\D", "", n))) for n in names}
    return int(evaluate(size, known))


def same_size(a: Any, b: Any, samples: Sequence[Mapping[str, int]]) -> bool:
    """Whether two sizes, numbers or expressions, are the same: at sizes that the graph is for."""
    if type(a) is not type(b) or not isinstance(a, str) or a == b:
        return type(a) is type(b) and bool(a == b)
    if set(_SYMBOL.findall(a)) != set(_SYMBOL.findall(b)):
        return False
    return all(evaluate(a, sizes) == evaluate(b, sizes) for sizes in samples)


class _AsItLies(ast.NodeTransformer):
    """`x.size(2)` as `x.shape[1]`, where that is the axis as the array lies."""

    def __init__(self, axes: Mapping[str, Sequence[int]]) -> None:
        self.axes = axes

    def visit(self, node: ast.AST) -> ast.AST:
        array, axis = _shape_of(node) if isinstance(node, ast.expr) else (None, None)
        axes = self.axes.get(array or "", ())
        if axis is None or not -len(axes) <= axis < len(axes):
            return self.generic_visit(node)
        place = list(axes).index(axis % len(axes))
        return ast.parse(f"{array}.shape[{place}]", mode="eval").body


class _Flat(ast.NodeTransformer):
    """`self.config.heads` as `self.heads`, `x.size(1)` as `x.shape[1]`."""

    def __init__(self, me: str) -> None:
        self.me = me

    def visit_Call(self, node: ast.Call) -> ast.AST:
        array, axis = _shape_of(node)
        if array is None or axis is None:
            return self.generic_visit(node)
        shape = ast.Attribute(ast.Name(array), "shape", ast.Load())
        return ast.Subscript(shape, ast.Constant(axis), ast.Load())

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        x: ast.expr = node
        while isinstance(x, ast.Attribute):
            x = x.value
        known = isinstance(x, ast.Name) and x.id == self.me
        return ast.Attribute(ast.Name("self") if known else x, node.attr, ast.Load())


@functools.cache
def plainly_written(expression: str) -> str:
    """An expression of sizes without brackets that it does not need."""
    return ast.unparse(ast.parse(expression, mode="eval"))


def composed(
    expression: str, of_symbol: Callable[[str], str], of_part: Callable[[str], str | None]
) -> str:
    """An expression of the inputs' sizes with the text of each symbol in it, and of what it is made
    of where `of_part` knows one: `h * w` of an image that has these sizes."""
    tree = ast.parse(expression, mode="eval").body

    class Named(ast.NodeTransformer):
        def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
            text = of_part(ast.unparse(node))
            return self.generic_visit(node) if text is None else _expression(text)

        def visit_Name(self, node: ast.Name) -> ast.AST:
            if node.id in FUNCTIONS:
                return node
            return _expression(inside(of_symbol(node.id)))

    return ast.unparse(Named().visit(tree))


def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body
