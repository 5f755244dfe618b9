"""What torch.export says of a module, as data that knows no framework.

Values are numbered. A node is one operation of torch's (`aten.addmm.default`), or one of Python's
on sizes (`operator.mul`); its arguments are plain values, `ValueRef`s to values and `Dtype`s.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from convert.program.nesting import Nesting


@dataclass(frozen=True, slots=True)
class ValueRef:
    """A value of the graph."""

    value: int


@dataclass(frozen=True, slots=True)
class Dtype:
    """torch's dtype by its name: "float32", "bfloat16"."""

    name: str


@dataclass(frozen=True, slots=True)
class CodeLine:
    """A line of the user's code, or of the library that it uses, and the function that it is in."""

    file: str
    line: int
    text: str = ""
    function: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f": {self.text}" if self.text else "")


@dataclass(frozen=True, slots=True)
class ArrayType:
    """Shape and dtype of an array. A size is a number, or an expression of the inputs' sizes where
    it is dynamic; dtypes have torch's names: "float32", "int64", "bool"."""

    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class GraphNode:
    """One operation. `module` is the path of the module whose call made it. `frames` are the lines
    that led to it from that call on and before it, outermost first, torch's own among them."""

    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    made: int
    module: str = ""
    module_class: str = ""
    site: CodeLine | None = None
    frames: tuple[CodeLine, ...] = ()


@dataclass(frozen=True, slots=True)
class Placeholder:
    """A value that comes from outside. `name` is torch's name of a parameter, buffer or constant,
    the path of an input. A size is a number where it was baked in, else an expression."""

    value: int
    kind: Literal["input", "parameter", "buffer", "constant"]
    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Guard:
    """A condition on sizes under which the graph holds, and the line that asked for it."""

    condition: str
    site: CodeLine | None = None


@dataclass(eq=False)
class Graph:
    """A module's computation, functional: what it writes into buffers is `mutations`.

    `baked` are the arguments that are no arrays, by path; `results` are the leaves of the result,
    `ValueRef`s or plain values, and `outputs` says how they nest. `symbols`: the name of a size ->
    the input and axis that have it. `schemas`: an operation -> its arguments. `types`: what each
    value is, an array, a list of arrays, or a size (a number or an expression).
    """

    nodes: list[GraphNode]
    placeholders: list[Placeholder]
    baked: dict[str, Any]
    outputs: Nesting
    results: list[Any]
    mutations: dict[str, ValueRef]
    constants: dict[str, np.ndarray]
    symbols: dict[str, tuple[str, int]]
    guards: list[Guard]
    schemas: dict[str, str] = field(default_factory=dict)
    types: dict[int, Any] = field(default_factory=dict)
    # of an operation the arguments that are numbers, not axes: by place and by name
    numbers: dict[str, frozenset[int | str]] = field(default_factory=dict)
    calls: list[Any] = field(default_factory=list)  # ModuleCalls in order, where they were noted
    notices: list[str] = field(default_factory=list)
    opened: int = 0  # which sizes are open, and if not every one, why: see `export.traced_graph`
    closed: str = ""

    def of_kind(self, *kinds: str) -> list[Placeholder]:
        """The placeholders of these kinds, in order."""
        return [p for p in self.placeholders if p.kind in kinds]

    def sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """The size that each symbol has for inputs of these shapes."""
        return {s: shapes[name][axis] for s, (name, axis) in self.symbols.items()}

    def misfits(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """What of inputs of these shapes, of as many axes, does not fit the graph, in words."""
        told = []
        sizes = self.sizes(shapes)
        for p in self.of_kind("input"):
            for axis, (wanted, size) in enumerate(zip(p.shape, shapes[p.name], strict=True)):
                if evaluate(wanted, sizes) != size:
                    meant = wanted if isinstance(wanted, int) else self.worded(wanted)
                    told.append(f"axis {axis} of {p.name} is {size}, and was traced as {meant}")
        for guard in self.guards:
            if not told and not _holds(guard.condition, sizes):
                where = f" ({guard.site})" if guard.site else ""
                told.append(f"{self.worded(guard.condition)} does not hold{where}")
        return told

    def samples(self) -> list[dict[str, int]]:
        """Sizes that the graph is for, twice, as odd as its guards allow: expressions that are
        equal there are equal."""
        return [self._sample(primes) for primes in _PRIMES]

    def _sample(self, primes: tuple[int, ...]) -> dict[str, int]:
        every = list(zip(self.symbols, itertools.cycle(primes), strict=False))
        tried = ({s: times * p for s, p in every} for times in _TIMES)
        return next(filter(self.is_for, tried), {s: _TIMES[-1] * p for s, p in every})

    def is_for(self, sizes: Mapping[str, int]) -> bool:
        """Whether its guards hold at these sizes."""
        return all(_holds(g.condition, sizes) for g in self.guards)

    def worded(self, expression: str) -> str:
        """An expression of sizes with the inputs' names for the symbols."""
        for symbol, (name, axis) in sorted(self.symbols.items(), key=lambda s: -len(s[0])):
            expression = expression.replace(symbol, f"{name}.shape[{axis}]")
        return expression


_PRIMES = ((61, 67, 71, 73, 79, 83, 89, 97), (113, 101, 131, 107, 109, 137, 127, 103))
_TIMES = (1, 2, 4, 8, 16, 32, 64, 3, 6, 12, 24, 48, 5, 7, 14, 28, 448)


def _holds(condition: str, sizes: Mapping[str, int]) -> bool:
    try:
        return bool(evaluate(condition, sizes))
    except ZeroDivisionError:  # of a size that became 0
        return False


# What expressions of sizes call.
FUNCTIONS = {"math": math, "max": max, "min": min, "abs": abs, "round": round, "float": float}


def evaluate(expression: int | str, sizes: Mapping[str, int]) -> Any:
    """An expression that sympy printed for Python, of sizes: our own text, nobody's input."""
    if isinstance(expression, int):
        return expression
    return eval(expression, {"__builtins__": {}, **FUNCTIONS}, dict(sizes))


def refs(x: Any) -> Iterator[int]:
    """The values that an argument mentions, at any depth."""
    if isinstance(x, ValueRef):
        yield x.value
    elif isinstance(x, list | tuple):
        for part in x:
            yield from refs(part)
    elif isinstance(x, Mapping):
        for part in x.values():
            yield from refs(part)
    elif isinstance(x, slice):
        yield from refs((x.start, x.stop, x.step))


def mapped(x: Any, of_ref: Callable[[ValueRef], Any], of_dtype: Callable[[Dtype], Any]) -> Any:
    """An argument with its references and dtypes replaced."""
    if isinstance(x, ValueRef):
        return of_ref(x)
    if isinstance(x, Dtype):
        return of_dtype(x)
    if isinstance(x, list | tuple):
        return type(x)(mapped(part, of_ref, of_dtype) for part in x)
    if isinstance(x, slice):
        return slice(*(mapped(p, of_ref, of_dtype) for p in (x.start, x.stop, x.step)))
    return x


def live(nodes: list[GraphNode], wanted: set[int]) -> list[GraphNode]:
    """The nodes that the wanted values depend on."""
    kept = []
    for node in reversed(nodes):
        if node.made in wanted:
            kept.append(node)
            wanted |= set(refs((node.args, node.kwargs)))
    return kept[::-1]


_MADE = re.compile(r"aten\.(zeros|ones|full|empty|eye|arange|linspace|rand|normal|scalar_tensor)")


def states_precision(graph: Graph) -> bool:
    """Whether a graph says itself that something is of so many bits: it is another for a module of
    another precision."""
    if any("float" in p.dtype for p in graph.of_kind("constant")):
        return True
    found: list[str] = []

    def seen(d: Dtype) -> Dtype:
        found.append(d.name)
        return d

    for node in graph.nodes:
        if _MADE.match(node.op) or node.op.startswith("zooconvert."):
            return True
        mapped([*node.args, *node.kwargs.values()], lambda ref: ref, seen)
    return any("float" in name or "complex" in name for name in found)
