"""What the renderers of layers share: where they are entered, and the forms that texts have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convert.porting.rendering.constructor import Call, Constructor, LayerText, Name

NNX = "from flax import nnx"
JAX = "import jax"
JNP = "import jax.numpy as jnp"


@dataclass(frozen=True, slots=True)
class View:
    """Where a layer stands: whether its data has channels last, and whether it must train."""

    last: bool
    training: bool


Renderer = Callable[[Any, View], LayerText | None]
RENDERERS: dict[str, Renderer] = {}


def renders(*classes: str) -> Callable[[Renderer], Renderer]:
    """Enters what renders these classes of torch.nn."""

    def enter(renderer: Renderer) -> Renderer:
        RENDERERS.update(dict.fromkeys(classes, renderer))
        return renderer

    return enter


def is_of(module: Any, *names: str) -> str | None:
    """Which of these names its class, or the nearest of its bases, has."""
    return next((c.__name__ for c in type(module).__mro__ if c.__name__ in names), None)


def options(module: Any) -> dict[str, Any]:
    """The keyword arguments that every layer with parameters ends with."""
    tensors = [*module.parameters(), *module.buffers()]
    found = [t.dtype for t in tensors if t.is_floating_point()]
    dtype = str(found[0]).removeprefix("torch.") if found else "float32"
    return {"param_dtype": Name(f"jnp.{dtype}"), "rngs": Name("rngs")}


FLOAT32 = {"param_dtype": Name("jnp.float32")}


def imports_of(constructor: Constructor, *others: str) -> tuple[str, ...]:
    """The lines that a constructor needs: of nnx, or of the module in zoo.nn named in `others`."""
    wide = constructor.kwargs.get("param_dtype", FLOAT32["param_dtype"]) != FLOAT32["param_dtype"]
    own = [NNX] if constructor.callee.startswith("nnx.") else []
    return tuple(dict.fromkeys([*own, *([JNP] if wide else []), *others]))


def bound(names: Sequence[str], args: Sequence[str], kwargs: Mapping[str, str]) -> list[str] | None:
    """The arguments in torch's order, up to the last that is given; None for others, and for a gap
    between them."""
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    if len(args) > len(names) or set(given) - set(names):
        return None
    found = [n for n in names if n in given]
    return [given[n] for n in found] if found == list(names[: len(found)]) else None


def called(*names: str) -> Call:
    """The call of a layer that takes what torch's does, by position."""

    def call(path: str, args: Sequence[str], kwargs: Mapping[str, str]) -> str | None:
        given = bound(names, args, kwargs)
        return None if given is None else f"{path}({', '.join(given)})"

    return call


def made(
    callee: str,
    module: str | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    defaults: dict[str, Any],
    *inputs: str,
) -> LayerText:
    """A layer of NNX, or of a module of zoo.nn, that is called as torch's."""
    constructor = Constructor(callee, args, kwargs, {**defaults, **FLOAT32})
    lines = [f"from zoo.nn.{module} import {callee}"] if module else []
    return LayerText(constructor, called(*(inputs or ("input",))), imports_of(constructor, *lines))


def partial(
    callee: str, kwargs: dict[str, Any], defaults: dict[str, Any], *imports: str
) -> LayerText:
    """A function of one input, with its other arguments: its numbers may be the module's."""
    constructor = Constructor("partial", (Name(callee),), kwargs, defaults)
    lines = ("from functools import partial", *imports)
    return LayerText(constructor, called("input"), lines)


def computed(text: Callable[[str], str | None], *imports: str) -> LayerText:
    """A function of one input: nothing is made."""

    def call(path: str, args: Sequence[str], kwargs: Mapping[str, str]) -> str | None:
        given = bound(("input",), args, kwargs)
        return text(given[0]) if given else None

    return LayerText(None, call, imports)
