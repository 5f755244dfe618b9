"""Parts, tensors and nested arguments as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from convert.porting.rendering.operands import SizeText, inside
from convert.program.graph import ValueRef


def reached(origin: str, path: str, modules: Mapping[str, Any]) -> str:
    """How the module at `origin` writes a part or tensor of it."""
    below = path.removeprefix(f"{origin}.") if origin else path
    text = "self"
    at = modules[origin]
    for part in below.split("."):
        keyed = type(at).__name__ in ("ModuleDict", "ParameterDict")
        if part.isdigit():
            text += f".{part_name(at, part)}" if is_mixed(at) else f"[{part}]"
        elif keyed:
            text += f"[{part!r}]"
        elif not part.isidentifier():
            text = f"getattr({text}, {part!r})"
        else:
            text += f".{part}"
        at = getattr(at, part, None)
    return text


def is_mixed(module: Any) -> bool:
    """Whether a torch module has numbered parts and others, as a list of parametrizations has, and
    none of the numbered ones holds a tensor: these can have another name."""
    numbered = [part for name, part in module.named_children() if name.isdigit()]
    others = len(list(module.named_children())) > len(numbered) or module._parameters
    return bool(numbered and others) and not any(part.state_dict() for part in numbered)


def part_name(module: Any, name: str) -> str:
    """A part's name as an attribute of the port's class."""
    return f"part_{name}" if name.isdigit() and is_mixed(module) else name


def leaves_of(tree: Any, text: str) -> Iterator[tuple[int, str]]:
    """The arrays of an argument, each with the text that reaches it."""
    if isinstance(tree, ValueRef):
        yield tree.value, text
    elif isinstance(tree, dict):
        for k, part in tree.items():
            yield from leaves_of(part, f"{text}[{k!r}]")
    elif isinstance(tree, list):
        for k, part in enumerate(tree):
            yield from leaves_of(part, f"{text}[{k}]")


def tree_text(tree: Any, text: Callable[[int], str]) -> str:
    """An argument, `text` writing the arrays in it; what is no plain value is None."""
    if isinstance(tree, ValueRef):
        return text(tree.value)
    if isinstance(tree, dict):
        return f"{{{', '.join(f'{k!r}: {tree_text(x, text)}' for k, x in tree.items())}}}"
    if isinstance(tree, list):
        parts = [tree_text(x, text) for x in tree]
        return f"({parts[0]},)" if len(parts) == 1 else f"({', '.join(parts)})"
    return repr(tree) if isinstance(tree, bool | int | float | str) else "None"


def numbers(tree: Any) -> Any:
    """Arguments with numbers in place of their names, where they are numbers."""
    if isinstance(tree, SizeText) and not isinstance(tree.value, str):
        return tree.value
    if isinstance(tree, dict):
        return {k: numbers(x) for k, x in tree.items()}
    return [numbers(x) for x in tree] if isinstance(tree, list) else tree


def permuted(text: str, axes: tuple[int, ...]) -> str:
    """An array with its axes in another order."""
    if axes == (1, 0):
        return f"{inside(text)}.T"
    return f"{inside(text)}.transpose({', '.join(map(str, axes))})"
