"""Shapes as people write them: `x.reshape(*y.shape[:2], -1)` for each of y's axes by itself."""

from __future__ import annotations

import ast


class Shapes(ast.NodeTransformer):
    """Writes them so."""

    def visit_Call(self, node: ast.Call) -> ast.Call:
        """The arguments of a reshape."""
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "reshape":
            node.args = _starred(node.args)
        return node

    def visit_Tuple(self, node: ast.Tuple) -> ast.Tuple:
        """A shape by itself."""
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Load):
            node.elts = _starred(node.elts)
        return node


def _starred(sizes: list[ast.expr]) -> list[ast.expr]:
    """Sizes whose first are those of one array in their order."""
    array = _axis_of(sizes[0], 0) if sizes else None
    count = 0
    while array is not None and count < len(sizes) and _axis_of(sizes[count], count) == array:
        count += 1
    if count < 2:
        return sizes
    return [ast.parse(f"f(*{array}.shape[:{count}])", mode="eval").body.args[0], *sizes[count:]]  # type: ignore[attr-defined]


def _axis_of(size: ast.expr, axis: int) -> str | None:
    """The array whose axis of this number a size is: "x" of `x.shape[0]`."""
    if not isinstance(size, ast.Subscript) or not isinstance(size.slice, ast.Constant):
        return None
    shape = size.value
    plain = isinstance(shape, ast.Attribute) and isinstance(shape.value, ast.Name)
    if not plain or shape.attr != "shape" or size.slice.value != axis:  # type: ignore[attr-defined]
        return None
    return shape.value.id  # type: ignore[attr-defined, no-any-return]
