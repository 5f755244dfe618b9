"""The text of a layer: the call that makes it and the call that uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Place = tuple[int | str, ...]  # (0,): the first argument; ("kernel_size", 1): of a tuple


@dataclass(frozen=True, slots=True)
class Name:
    """A value that is written as it is called: `jnp.bfloat16`."""

    text: str

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Constructor:
    """A call that makes a layer, its arguments as values: numbers, strings, None, Names, tuples.

    Every keyword that two layers of one kind may differ in is there; one whose value is what
    `defaults` says is not written.
    """

    callee: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def values(self) -> dict[Place, Any]:
        """Every value by its place, those of a tuple one by one, those at their default too."""
        every: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        return {p: v for name, value in every for p, v in _leaves((name,), value)}

    def text(self, texts: Mapping[Place, str] | None = None) -> str:
        """Python; `texts` are the expressions that stand at a place in the value's stead."""
        texts = texts or {}
        named = {p[0] for p in texts}
        parts = [_written((i,), v, texts) for i, v in enumerate(self.args)]
        for name, value in self.kwargs.items():
            if name in named or name not in self.defaults or not _same(value, self.defaults[name]):
                parts.append(f"{name}={_written((name,), value, texts)}")
        return f"{self.callee}({', '.join(parts)})"


Call = Callable[[str, Sequence[str], Mapping[str, str]], str | None]


@dataclass(frozen=True, slots=True)
class LayerText:
    """A layer as NNX has it.

    `constructor` is None where it is a function of its input only: nothing to make. `call`, given
    the layer's path ("self.fc") and the texts of torch's arguments, is the expression of the
    output; None for arguments that it cannot be called with, and where the text would hold an
    argument several times that is not a name: give it one first. `imports` are the lines that
    both need.
    """

    constructor: Constructor | None
    call: Call
    imports: tuple[str, ...]

    @property
    def has_state(self) -> bool:
        """Whether two of it are not the same as one that is there twice."""
        return self.constructor is not None and self.constructor.callee != "partial"

    @property
    def function(self) -> str | None:
        """What a list of layers would hold in the place of one that has nothing to make."""
        text = None if self.constructor else self.call("", ["x"], {})
        if text is None:
            return None
        plain = text.removesuffix("(x)")
        return plain if plain != text and "x" not in _words(plain) else f"lambda x: {text}"


def _words(text: str) -> set[str]:
    return set("".join(c if c.isalnum() or c == "_" else " " for c in text).split())


def _leaves(place: Place, value: Any) -> Iterator[tuple[Place, Any]]:
    if not isinstance(value, tuple):
        yield place, value
        return
    for i, part in enumerate(value):
        yield from _leaves((*place, i), part)


def _written(place: Place, value: Any, texts: Mapping[Place, str]) -> str:
    if place in texts:
        return texts[place]
    if not isinstance(value, tuple):
        return written(value)
    parts = [_written((*place, i), v, texts) for i, v in enumerate(value)]
    return f"({', '.join(parts)}{',' * (len(parts) == 1)})"


def written(value: Any) -> str:
    """A value as a person writes it."""
    if isinstance(value, float):
        return repr(value).replace("e-0", "e-")  # 1e-5
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)
