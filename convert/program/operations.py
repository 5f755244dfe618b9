"""A recorded computation, as data: operations on numbered values."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

_SHOWN = 90  # characters of an expression
LeafKind = Literal["input", "layer", "parameter", "buffer", "constant"]


@dataclass(frozen=True, slots=True)
class Ref:
    """A value among the arguments of an operation."""

    value: int


@dataclass(frozen=True, slots=True)
class Site:
    """Where in the user's code an operation is."""

    file: str
    line: int
    text: str  # the expression, on one line
    function: str  # around it, "Attention.forward"
    position: tuple[str, int, int]  # the same for every run of one expression
    calls: tuple[int, ...]  # the calls of functions around it, from outside, numbered

    @property
    def shown(self) -> str:
        """The expression, cut where it is long."""
        return self.text if len(self.text) <= _SHOWN else f"{self.text[: _SHOWN - 3]}..."

    @property
    def place(self) -> str:
        """File and line."""
        file = os.path.relpath(self.file)
        return f"{self.file if file.startswith('..') else file}:{self.line}"


@dataclass(frozen=True)
class Operation:
    """One call of a function of torch. `args` and `kwargs` hold Refs in place of tensors; a
    function that writes into an argument is recorded as giving it anew."""

    function: str  # "torch.nn.functional.gelu", "torch.Tensor.view", or one of opened.OPENED
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    made: tuple[int, ...]  # values, in the order of the tensors in what it gives
    module: str  # dotted name of the innermost torch module around it
    site: Site | None
    writes: int | None = None  # which of its tensors it writes into

    @functools.cached_property
    def name(self) -> str:
        """The function without its module, of all spellings the same: "add" of "__radd__"."""
        return short_name(self.function)

    @functools.cached_property
    def refs(self) -> tuple[int, ...]:
        """The values that it takes."""
        return tuple(r.value for r in find((self.args, self.kwargs), Ref))

    @functools.cached_property
    def sources(self) -> tuple[int, ...]:
        """Those whose numbers matter, not their shape or dtype alone."""
        return self.refs[: {**dict.fromkeys(_FRESH, 0), **dict.fromkeys(_FORMED, 1)}.get(self.name)]


_FRESH = {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "zeros_like", "ones_like",
          "full_like", "empty_like"}  # fmt: skip
_FORMED = {"to", "type_as", "expand_as", "view_as", "reshape_as"}


@dataclass(frozen=True, slots=True)
class Leaf:
    """A value that no recorded operation makes."""

    name: str
    kind: LeafKind


@dataclass
class Program:
    """Operations in the order of execution, that lead from leaves to `target`."""

    operations: list[Operation]
    leaves: dict[int, Leaf]
    target: int
    # calls of layers that were not opened: the value each gives -> its name and the values it took
    layers: dict[int, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    # Of each value those of this program that it was made from, through layers too.
    before: dict[int, frozenset[int]] = field(default_factory=dict)

    @functools.cached_property
    def users(self) -> dict[int, list[int]]:
        """Of each value that is taken, the operations that take it."""
        found: dict[int, list[int]] = {}
        for index, operation in enumerate(self.operations):
            for value in dict.fromkeys(operation.refs):
                found.setdefault(value, []).append(index)
        return found

    @functools.cached_property
    def makers(self) -> dict[int, int]:
        """Of each value that is made, the operation that makes it."""
        return {v: i for i, o in enumerate(self.operations) for v in o.made}

    @functools.cached_property
    def tables(self) -> frozenset[int]:
        """Values that follow from numbers in the code alone, as frequencies and positions do."""
        found: set[int] = set()
        for operation in self.operations:
            if found.issuperset(operation.sources):
                found |= set(operation.made)
        return frozenset(found)

    def until(self, index: int) -> Program:
        """The operations up to this one, which gives the target."""
        made = self.operations[index].made[0]
        return Program(self.operations[: index + 1], self.leaves, made, self.layers, self.before)

    def slice(self) -> Program:
        """What `target` depends on."""
        needed = {self.target}
        kept = []
        for operation in reversed(self.operations):
            if needed & set(operation.made):
                kept.append(operation)
                needed.update(operation.refs)
        leaves = {v: leaf for v, leaf in self.leaves.items() if v in needed}
        layers = {v: layer for v, layer in self.layers.items() if v in needed}
        return Program(kept[::-1], leaves, self.target, layers, self._before(needed))

    def _before(self, wanted: set[int]) -> dict[int, frozenset[int]]:
        """What each of these was made from. Values are numbered in the order of their making."""
        makers = self.makers
        found: dict[int, frozenset[int]] = {}
        for value in sorted({*self.leaves, *makers}):
            taken = self.layers[value][1] if value in self.layers else ()
            taken = self.operations[makers[value]].refs if value in makers else taken
            known = [found[t] | {t} for t in taken if t in found]
            found[value] = frozenset().union(*known)
        return {v: found[v] & wanted for v in wanted if found.get(v)}


def short_name(function: str) -> str:
    """ "add" of "torch.Tensor.__radd__", "T" of "torch.Tensor.T.__get__"."""
    parts = function.split(".")
    name = parts[-2] if parts[-1] == "__get__" else parts[-1]
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        name = name[1:] if name in _REFLECTED else name
    return {"truediv": "div", "true_divide": "div", "multiply": "mul"}.get(name, name.rstrip("_"))


_REFLECTED = {
    "radd", "rsub", "rmul", "rdiv", "rtruediv", "rpow", "rmatmul", "rfloordiv", "rmod",
    "iadd", "isub", "imul", "itruediv", "ipow",
}  # fmt: skip


def is_reflected(function: str) -> bool:
    """Whether an operator's second argument stands first: `2 - x` is __rsub__(x, 2)."""
    name = function.rpartition(".")[2].strip("_")
    return name in _REFLECTED and name[0] == "r"


def find(tree: Any, kind: type) -> Iterator[Any]:
    """The leaves of one type in a tree of arguments."""
    if isinstance(tree, kind):
        yield tree
    elif isinstance(tree, Mapping):
        for part in tree.values():
            yield from find(part, kind)
    elif isinstance(tree, tuple | list):
        for part in tree:
            yield from find(part, kind)
    elif isinstance(tree, slice):
        yield from find((tree.start, tree.stop, tree.step), kind)


def mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The tree of arguments with every leaf changed."""
    if isinstance(tree, Mapping):
        return {k: mapped(part, change) for k, part in tree.items()}
    if hasattr(tree, "_fields"):
        return type(tree)(*(mapped(part, change) for part in tree))
    if isinstance(tree, tuple | list):
        made = [mapped(part, change) for part in tree]
        return tuple(made) if isinstance(tree, tuple) else made
    if isinstance(tree, slice):
        return slice(*(mapped(part, change) for part in (tree.start, tree.stop, tree.step)))
    return change(tree)
