"""Operations on images as functions of an array with channels last: convolutions, pools, resizing.

Each is entered as what would be its name in ATen, "last." in the place of "aten.": as a template
(see rendering/templates) where one line says it, else as a rule.
"""

from __future__ import annotations

from typing import Any

from convert.porting.rendering.operands import Operand, SizeText
from convert.porting.rendering.scopes import Tree
from convert.porting.rendering.templates import expression, templates
from convert.porting.rules import find
from convert.program.graph import ArrayType, GraphNode, ValueRef


def image_operation(node: GraphNode, tree: Tree) -> str | None:
    """The name of an operation for channels last, where it is one of images and can be written so
    for these arguments."""
    name = f"last.{node.op.removeprefix('aten.')}"
    x = tree.type_of(node.args[0].value) if node.args and _is_ref(node.args[0]) else None
    if not node.op.startswith("aten.") or not isinstance(x, ArrayType) or len(x.shape) < 3:
        return None
    if find(name) is not None:
        return name
    if name not in templates():
        return None

    def operand(x: Any) -> Any:
        if isinstance(x, ValueRef):
            kind = tree.type_of(x.value)
            return Operand("x", kind) if isinstance(kind, ArrayType) else SizeText("n", kind)
        return [operand(part) for part in x] if isinstance(x, list) else x

    shape = (x.shape[0], *x.shape[2:], x.shape[1])
    args = [Operand("x", ArrayType(shape, x.dtype)), *map(operand, node.args[1:])]
    kwargs = {k: operand(v) for k, v in node.kwargs.items()}
    try:
        found = expression(name, tree.type_of(node.made), args, kwargs)
    except (TypeError, ValueError):
        return None
    return None if found is None else name


def _is_ref(x: Any) -> bool:
    return isinstance(x, ValueRef)
