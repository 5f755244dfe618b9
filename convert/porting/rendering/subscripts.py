"""Slices of slices, as one: `x[..., :2, :][..., :3]` is `x[..., :2, :3]`; and `x.T.T` is `x`."""

from __future__ import annotations

import ast


class Subscripts(ast.NodeTransformer):
    """Joins them, where no axis is cut twice."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """One attribute, those inside it first."""
        inner = node.value = self.visit(node.value)
        turned = isinstance(inner, ast.Attribute) and inner.attr == node.attr == "T"
        return inner.value if turned else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        """One subscript, those inside it first."""
        node.value = self.visit(node.value)
        inner = node.value
        if not isinstance(inner, ast.Subscript):
            return node
        if isinstance(inner.slice, ast.Constant) and inner.slice.value is Ellipsis:
            return ast.Subscript(inner.value, node.slice, ast.Load())
        joined = _joined(_parts(inner.slice), _parts(node.slice))
        if joined is None:
            return node
        slices = joined[0] if len(joined) == 1 else ast.Tuple(joined, ast.Load())
        return ast.Subscript(inner.value, slices, ast.Load())


def _parts(index: ast.expr) -> list[ast.expr]:
    return list(index.elts) if isinstance(index, ast.Tuple) else [index]


def _joined(first: list[ast.expr], second: list[ast.expr]) -> list[ast.expr] | None:
    from_end = _is_ellipsis(first[0]), _is_ellipsis(second[0])
    if from_end == (False, True) and all(map(_is_new, second[1:])):
        has_rest = any(map(_is_ellipsis, first))
        if _are_plain([x for x in first if not _is_ellipsis(x)]):
            return [*first, *(second[1:] if has_rest else second)]
    if from_end[0] != from_end[1]:
        return None
    head = [first[0]] if from_end[0] else []
    a, b = first[len(head) :], second[len(head) :]
    if not _are_plain([*a, *b]):
        return None
    if from_end[0]:
        a, b = a[::-1], b[::-1]
    made: list[ast.expr] = []
    axes = iter(a)  # of what the first gives
    for y in b:
        x = y if _is_new(y) else next(axes, ast.Slice())
        if not (x is y or _is_whole(x) or _is_whole(y)):
            return None
        made.append(y if _is_whole(x) else x)
    made += axes
    return [*head, *(made[::-1] if from_end[0] else made)]


def _are_plain(index: list[ast.expr]) -> bool:
    return all(isinstance(x, ast.Slice) or _is_new(x) for x in index)


def _is_new(x: ast.expr) -> bool:
    return isinstance(x, ast.Constant) and x.value is None


def _is_ellipsis(x: ast.expr) -> bool:
    return isinstance(x, ast.Constant) and x.value is Ellipsis


def _is_whole(x: ast.expr) -> bool:
    return isinstance(x, ast.Slice) and not (x.lower or x.upper or x.step)
