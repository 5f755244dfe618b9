"""A torch module as Flax source: written, imported afresh, and proved (`convert.port`)."""

from __future__ import annotations

import datetime
import importlib.metadata
import inspect
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.porting.conditions import as_they_lie, tightest
from convert.porting.evaluate import Evaluation
from convert.porting.image_axes.moved import Relaid
from convert.porting.image_axes.writer import Writer
from convert.porting.port_proof import LivePair, flax_state, prove
from convert.porting.program_of import ImageAxes, Ported
from convert.porting.rendering.module_file import ModuleFile
from convert.porting.rendering.not_rendered import NotRendered
from convert.porting.source_program import Imported, SourceProgram, fill
from convert.porting.tensors_by_name import ByName
from convert.porting.to_flax import program_of_call, torch_module
from convert.porting.train_mode import left_out
from convert.program.calls import bound, in_mode, shapes_of
from convert.program.constructed import Constructed
from convert.program.export import check_version, traced_graph
from convert.program.functional_dropout import with_dropout_layers
from convert.program.graph import Graph
from convert.runtime.user_code import module_name
from zoo.containers.errors import UsageError, printable
from zoo.layout import Layout


@dataclass(frozen=True)
class PortedSource:
    """A module written as Flax source.

    `source` is the file and `model` the name of the module's class there; `layout` says what each
    of torch's tensors is in it; `proved` says what was shown of its outputs, at which sizes, and
    what was baked in.
    """

    source: str = field(repr=False)
    model: str
    layout: Layout = field(repr=False)
    proved: Ported = field(repr=False)
    module: Any = field(repr=False)  # torch's, with the weights
    imported: Imported = field(repr=False)
    file: ModuleFile = field(repr=False)
    inputs: Any = field(repr=False)
    moved: Relaid = field(repr=False)  # what lies otherwise than in torch

    def __str__(self) -> str:
        return self.source

    def net(self) -> Any:
        """The module of the source, with torch's weights, in eval mode."""
        from convert.porting.live import placed

        made = self.imported.net()
        state = flax_state(self.module, ByName(self.layout))
        state = self.moved.state(state, self.layout)
        fill(made, {n: placed(n, x.copy()) for n, x in state.items()})
        return made

    def flax_inputs(self) -> Any:
        """The first call, as the module of the source takes it."""
        from convert.runtime.arrays import leaves, replaced

        return replaced(self.inputs, self.moved.given(leaves(self.inputs)))

    def _repr_html_(self) -> str:
        from html import escape

        return f"<pre>{escape(str(self.proved))}</pre><pre>{escape(self.source)}</pre>"


def made_of(module: Any) -> tuple[Any, dict[str, dict[str, Any]]]:
    """The torch module that is meant, and the plain arguments that its parts were made with, by
    path, where it is made here."""
    constructed = Constructed()
    with constructed.recording():
        module = torch_module(module)
    return module, constructed.by_path(module)


def ported(
    module: Any,
    inputs: Any,
    arguments: dict[str, dict[str, Any]],
    *,
    others: Sequence[Any] = (),
    image_axes: ImageAxes = "last",
    verify: bool = True,
    untested: bool = False,
    standalone: bool = False,
) -> PortedSource:
    """What `convert.port` does of a torch module that holds its weights; `arguments` are those of
    `made_of`. Unless `image_axes` is "first" the source takes and gives images channels last."""
    check_version(untested)
    if image_axes not in ("first", "last"):
        raise UsageError(f"there is no image_axes {image_axes!r}", "it is 'last' or 'first'")
    signature = inspect.signature(module.forward)
    calls = [bound(signature, module, one) for one in (inputs, *others)]
    with in_mode(module, training=False), with_dropout_layers(module, calls[0]):
        program, first = program_of_call(module, signature, calls[0], {}, "first")
        graph = traced_graph(module, first, (), calls=True)
        if told := [t for one in calls[1:] for t in _misfits(graph, one)]:
            raise NotRendered(f"its calls are not one graph: {'; '.join(told)}")
        program.evaluations[False] = Evaluation(graph, {})

        writer = Writer(module, program.layout, arguments, image_axes, standalone)
        file, moved = writer.first(graph)
        program.layout = moved.layout(program.layout)
        program.by_name = ByName(program.layout)
        imported = Imported(file)
        if verify:
            fitting = [one for one in calls if not _misfits(graph, one)]
            source = SourceProgram(program, imported, writer.file, moved)
            prove(LivePair(module, source), first, fitting, gradients=False)
        # A live module is traced anew for sizes that a graph is not for: a file is not.
        left = [graph.worded(g.condition) for g in graph.guards if g.condition.endswith(">= 2")]
        program.report.baked += [told for told in left if told not in program.report.baked]
        program.report.baked[:] = tightest(as_they_lie(program.report.baked, moved.inputs))
        program.report.notices += [*writer.notices, *moved.told()]
        program.report.notices += left_out(module, first, graph, file)
    text = file.source.replace("HEADER", _header(module, program.report, standalone), 1)
    return PortedSource(
        text, file.model, program.layout, program.report, module, imported, file,
        dict(calls[0].arguments), moved,
    )  # fmt: skip


def _misfits(graph: Graph, call: inspect.BoundArguments) -> list[str]:
    """What of a call the graph is not for, in words."""
    shapes = shapes_of(call)
    wanted = {p.name: len(p.shape) for p in graph.of_kind("input")}
    given = {name: len(shape) for name, shape in shapes.items()}
    if wanted != given:
        axes = [", ".join(f"{n} of {k} axes" for n, k in one.items()) for one in (given, wanted)]
        return [f"it is called with {axes[0]}, and was traced with {axes[1]}"]
    return graph.misfits(shapes)


def _header(module: Any, proved: Ported, standalone: bool) -> str:
    """What the file says of itself."""
    of = type(module)
    lines = [f"{of.__name__} of {module_name(of)}, in Flax NNX.", ""]
    lines += [f"Written by zooconvert {_version('zooconvert')} from {_origin(of)}."]
    if standalone:
        lines += ["What it uses of zooconvert is written into it, under zooconvert's own licence:"]
        lines += ["  Apache-2.0, https://www.apache.org/licenses/LICENSE-2.0"]
    lines += [
        f"Verified on {datetime.date.today()}, with torch {_version('torch')}, jax "
        f"{_version('jax')} and flax {_version('flax')}: {proved.verdict}"
        + (", outputs beside torch's at" if proved.rows else ".")
    ]
    lines += [f"  {sizes}" for sizes in proved.rows]
    if proved.baked:
        lines += ["", "Right for calls in which:"]
        lines += [f"  {printable(b)}" for b in proved.baked]
    if proved.notices:
        lines += ["", *(f"{printable(n)}." for n in proved.notices)]
    text = re.sub(r"[^\s(]*/([^/\s]+:\d+)", r"\1", "\n".join(lines))  # no paths of this machine
    wrapped = [
        part
        for line in text.splitlines()
        for part in textwrap.wrap(line, 97, subsequent_indent=" " * 4) or [""]
    ]
    return "\n".join(wrapped).replace("\\", "\\\\").replace('"""', "'''") + "\n"


_FACTS = ("License-Expression", "License", "Author", "Author-email")


def _origin(of: type) -> str:
    """Package, version and licence of a class, as far as they are known."""
    found = distribution_of(of)
    if found is None:
        file = getattr(sys.modules.get(of.__module__), "__file__", None)
        other = "a notebook" if of.__module__ == "__main__" else of.__module__
        return f"{Path(file).name if file else other}, whose licence holds for this too"
    data = importlib.metadata.metadata(found)
    told = {name: str(data[name] or "") for name in _FACTS if name in data}
    licence = told.get("License-Expression") or told.get("License") or ""
    licence = licence.splitlines()[0][:60] if licence.strip() else "see the package"
    author = told.get("Author") or told.get("Author-email") or ""
    by = f", {author.splitlines()[0][:60]}" if author else ""
    return f"{found} {data['Version']}{by} (licence: {licence})"


def distribution_of(of: Any) -> str | None:
    """The package that a class or function is installed with; None for somebody's own."""
    top = of.__module__.partition(".")[0]
    names = importlib.metadata.packages_distributions().get(top)
    return names[0] if names else None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "?"
