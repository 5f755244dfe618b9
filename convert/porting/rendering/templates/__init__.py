"""How an operation is written: for each overload of ATen the expression that a person would write.

A template is a plain function on what the expression is made of: an array is an `Operand`, a whole
number an int or a `SizeText`, a dtype a `Dtype`; its parameters are those of the overload. It gives
the text of one Python expression (of a tuple where the overload gives several), or None where there
is no plain way to write it for these arguments. The expression's values and dtypes are the rule's
(convert/porting/rules), with and without `jax_enable_x64`; at a kink its gradient may be JAX's.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from convert.porting.rendering.operands import ArrayType

Template = Callable[..., "str | None"]
F = TypeVar("F", bound=Template)

TEMPLATES: dict[str, Template] = {}
_LOADED: list[bool] = []
_TAKES_OUT: set[str] = set()


def template(*names: str) -> Callable[[F], F]:
    """Enter a function into the table as the template of these overloads ("aten.view.default"). One
    with a parameter `out` is told the type of what the overload gives."""

    def enter(function: F) -> F:
        for name in names:
            TEMPLATES[name] = function
            if "out" in inspect.signature(function).parameters:
                _TAKES_OUT.add(name)
        return function

    return enter


def templates() -> dict[str, Template]:
    """The whole table."""
    if not _LOADED:
        for module in pkgutil.iter_modules(__path__):
            importlib.import_module(f"{__name__}.{module.name}")
        _LOADED.append(True)
    return TEMPLATES


def expression(
    op: str,
    out: ArrayType | list[ArrayType] | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> str | None:
    """The Python expression of an overload of these arguments; None where it has no plain one.

    It may name `jax`, `jnp`, `nnx`, `lax` (jax.lax), `np` and `math`, besides what the arguments
    name. Arguments are Operands, Sizes, lists of them, Dtypes and plain values; `out` is the type
    of what the overload gives.
    """
    found = templates().get(op)
    if found is None:
        return None
    more = {"out": out} if op in _TAKES_OUT else {}
    return found(*args, **kwargs, **more)
