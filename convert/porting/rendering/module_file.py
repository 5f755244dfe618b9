"""The file of a port: its header, imports, functions and classes."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.porting.image_axes.moved import Relaid
from convert.porting.rendering.class_text import ClassText
from convert.porting.rendering.classes import Classes
from convert.porting.rendering.context import Context
from convert.porting.rendering.declared_types import Types
from convert.porting.rendering.helper_functions import HelperFunctions, WrittenFunction
from convert.porting.rendering.not_rendered import Again, NotRendered
from convert.porting.rendering.scopes import Tree
from convert.porting.rendering.statements import tidied
from convert.porting.rendering.syntax import without_ours
from convert.porting.rendering.written_lines import INDENT, WIDTH, origin, written_line
from convert.porting.tensors_by_name import ByName
from convert.program.graph import Graph
from zoo.layout import Layout

_ROUNDS = 200
_POOLS = ("adaptive_avg_pool", "avg_pool", "interpolate", "max_pool", "pixel_shuffle")
_KINDS = {
    "Buffer": "A tensor that is saved and not trained.",
    "Constant": "A tensor that is neither saved nor trained.",
}


@dataclass(frozen=True)
class ModuleFile:
    """The source, the name of the model's class in it, and the arrays that it reads from the file
    beside it (none: there is no such file). `statements` are those of the port, and of the source
    that it was written of: those that an operation comes from."""

    source: str
    model: str
    arrays: dict[str, np.ndarray]
    statements: tuple[int, int]
    draws: frozenset[str]  # the operations that draw random numbers
    layers: frozenset[str]  # the modules that are torch's own layers there and are layers in it
    norms: frozenset[str]  # those whose classes derive from torch's BatchNorm, and here from Flax's


def module_file(
    graph: Graph,
    module: Any,
    layout: Layout,
    header: str,
    constructed: Mapping[str, Mapping[str, Any]] | None = None,
    standalone: bool = False,
    moved: Relaid | None = None,
) -> ModuleFile:
    """The port of a module whose graph has its calls noted. `constructed` are the plain arguments
    that the constructors of its parts were given, by path. `standalone`: what it uses of zoo.nn is
    written into it. `moved` says what of the graph and the layout has other axes than torch's."""
    by_name = ByName(layout)

    def home(name: str) -> str:
        entry = by_name.flax_of(name)
        return entry.flax[0].name if entry is not None else name

    moved = moved or Relaid(graph)
    context = Context(Tree(graph, module, home, moved.orders), by_name, module, moved)
    for _ in range(_ROUNDS):
        context.begin()
        with contextlib.suppress(Again):
            functions = HelperFunctions(context)
            classes = Classes(context, constructed or {})
            return _File(context, functions, classes, header, standalone).file()
    raise NotRendered("its parts need too many sizes of each other's arrays")


class _File:
    def __init__(
        self,
        context: Context,
        functions: HelperFunctions,
        classes: Classes,
        header: str,
        standalone: bool = False,
    ) -> None:
        self.context, self.classes, self.header = context, classes, header
        self.functions = functions.every
        self.standalone = standalone

    def file(self) -> ModuleFile:
        """The whole file."""
        writing = ClassText(self.context, self.classes)
        classes = ["\n".join(self._function(f, writing.types)) for f in self.functions]
        classes += ["\n".join(writing.lines(c)) for c in self.classes.every]
        rules = self.context.called()
        more = [*self.classes.imports, *self._pools("\n".join(classes))]
        if self.standalone:
            more, blocks = without_ours(more, "\n".join(classes))
            rules = self.context.called(blocks)
        ours = rules.source.strip()  # blocks come last: the model is what is read
        parts = [*classes, ours] if self.standalone else [ours, *classes]
        parts = [self._kinds(), self._tuples(), *parts]
        body = "\n\n\n".join(p for p in parts if p)
        arrays = ["with np.load(Path(__file__).with_suffix('.npz')) as _file:"]
        arrays += [f"{INDENT}ARRAYS = dict(_file)"]
        text = "\n\n".join(
            p
            for p in (
                f'"""{self.header}"""',
                _OWN_NAMES if not all(_is_capped(c.name) for c in self.classes.every) else "",
                "\n".join(self._imports(body, [*more, *rules.imports])),
                "\n".join(arrays) if self.context.held.arrays else "",
                body,
            )
            if p
        )
        model = self.classes.by_path[""].name
        bodies = [f.body for f in self.functions]
        bodies += [c.body for c in self.classes.every if c.body is not None]
        own = sum(not line.is_bare for b in bodies for line in tidied(b.lines))
        statements = own, sum(b.source for b in bodies)
        source = formatted(text + "\n")
        layers = self.context.layers.exact()
        draws = frozenset(self.context.draws)
        norms = frozenset(self.context.layers.norms)
        return ModuleFile(source, model, self.context.held.arrays, statements, draws, layers, norms)

    def _pools(self, body: str) -> Iterator[str]:
        """The imports of functions on images with channels last."""
        if self.context.moved.orders:
            for name in _POOLS:
                called = re.search(rf"(?<![.\w]){name}\(", body)
                if called and name not in self.context.rules.names:
                    yield f"from zoo.nn.pool_flax import {name}"

    def _imports(self, body: str, more: list[str]) -> list[str]:
        words = set(re.findall(r"\w+", body))
        known = {
            "Any": "from typing import Any",
            "NamedTuple": "from typing import NamedTuple",
            "Path": "from pathlib import Path",
            "jax": "import jax",
            "jnp": "import jax.numpy as jnp",
            "lax": "from jax import lax",
            "math": "import math",
            "np": "import numpy as np",
            "Array": "from jax import Array",
        }
        lines = {"from __future__ import annotations", "from flax import nnx"}
        lines |= {line for name, line in known.items() if name in words}
        lines |= set(more)
        if self.context.held.arrays:
            lines |= {known["np"], known["Path"]}
        order = sorted(lines, key=lambda x: (not x.startswith("from __future__"), x))
        return [order[0], "", *order[1:]]

    def _kinds(self) -> str:
        made = [
            f'class {kind}(nnx.Variable):\n{INDENT}"""{_KINDS[kind]}"""'
            for kind in self.context.held.kinds
        ]
        return "\n\n\n".join(made)

    def _tuples(self) -> str:
        made = []
        for name, fields in self.context.tuples.items():
            lines = "\n".join(f"{INDENT}{f}: {kind}" for f, kind in fields.items())
            made.append(f"class {name}(NamedTuple):\n{lines}")
        return "\n\n\n".join(made)

    def _function(self, written: WrittenFunction, types: Types) -> Iterator[str]:
        called, body = [written.scope], written.body
        given = ", ".join(f"{p}: {types.parameter(p, called)}" for p in body.parameters)
        yield f"def {written.name}({given}) -> {types.result(called)}:"
        yield from origin(written.scope.function)
        for line in tidied(body.lines):
            yield from written_line(line, INDENT)


_OWN_NAMES = "# Classes have the names that they have in torch.\n# ruff: noqa: N801"


def _is_capped(name: str) -> bool:
    """Whether a class has a name as PEP 8 wants it."""
    name = name.lstrip("_")
    return name[:1].isupper() and "_" not in name


# Imports in order; needless parentheses; a choice between two values on one line.
_FIXED = "I,F401,UP034,SIM108,SIM201"


def formatted(source: str) -> str:
    """The source as ruff formats it, where that is installed."""
    ruff = shutil.which("ruff") or shutil.which("ruff", path=str(sys.prefix) + "/bin")
    if ruff is None:
        return source
    width = ["--isolated", "--line-length", str(WIDTH), "--quiet"]
    for command in (
        ["check", *width, "--select", _FIXED, "--fix-only", "--unsafe-fixes", "-"],
        ["format", *width, "-"],
    ):
        done = subprocess.run(
            [ruff, *command], input=source, capture_output=True, text=True, check=False
        )
        source = done.stdout if done.returncode == 0 else source
    return source
