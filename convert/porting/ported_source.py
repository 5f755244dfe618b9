"""A torch module as Flax source: written, imported afresh, and proved (`convert.port`)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from convert.porting.port_proof import LivePair, prove
from convert.porting.program_of import Ported
from convert.porting.rendering.module_file import ModuleFile, module_file
from convert.porting.source_program import Imported, SourceProgram
from convert.porting.to_flax import program_of_call, torch_module
from convert.program.calls import bound, in_mode, shapes_of
from convert.program.export import check_version, traced_graph
from zoo.layout import Layout


@dataclass(frozen=True)
class Port:
    """A module written as Flax source. `source` is the file, `model` the name of its class there;
    `layout` says what each of torch's tensors is in it; `report` is what was proved."""

    source: str
    model: str
    layout: Layout
    report: Ported
    file: ModuleFile
    imported: Imported

    def __str__(self) -> str:
        return self.source


def ported(
    module: Any, inputs: Any, *, others: Sequence[Any] = (), verify: bool = True,
    untested: bool = False,
) -> Port:  # fmt: skip
    """What `convert.port` does of a module that holds its weights."""
    check_version(untested)
    module = torch_module(module)
    signature = inspect.signature(module.forward)
    calls = [bound(signature, module, one) for one in (inputs, *others)]
    with in_mode(module, training=False):
        program, first = program_of_call(module, signature, calls[0], {}, "first")
        graph = traced_graph(module, first, (), calls=True)
        program.evaluation(False).graph.calls = graph.calls
        written = module_file(graph, module, program.layout, "HEADER")
        imported = Imported(written)
        source = SourceProgram(program, imported)
        if verify:
            own = program.evaluation(False).graph
            fitting = [one for one in calls if not own.misfits(shapes_of(one))]
            prove(LivePair(module, source), first, fitting, gradients=False)
    return Port(written.source, written.model, program.layout, program.report, written, imported)
