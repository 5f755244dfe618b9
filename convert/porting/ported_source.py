"""A torch module as Flax source: written, imported afresh, and proved (`convert.port`)."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convert.compare.report import Report
from convert.compare.report_file import write_report, write_text
from convert.porting.port_proof import LivePair, flax_state, prove
from convert.porting.program_of import Ported
from convert.porting.rendering.module_file import module_file
from convert.porting.source_program import Imported, SourceProgram, fill
from convert.porting.tensors_by_name import ByName
from convert.porting.to_flax import program_of_call, torch_module
from convert.program.calls import bound, in_mode, shapes_of
from convert.program.constructed import Constructed
from convert.program.export import check_version, traced_graph
from convert.runtime.user_code import module_name
from zoo.containers.errors import UsageError, printable
from zoo.layout import Layout

_MARK = "# zooconvert port, unedited: "


@dataclass(frozen=True)
class Port:
    """A module written as Flax source.

    `source` is the file and `model` the name of the module's class there; `layout` says what each
    of torch's tensors is in it; `proved` says what was shown of its outputs, at which sizes, and
    what was baked in; `report` is what `convert.verify` says of the two modules, where that was
    asked for.
    """

    source: str
    model: str
    layout: Layout
    proved: Ported
    module: Any = field(repr=False)  # torch's, with the weights
    imported: Imported = field(repr=False)
    arrays: dict[str, np.ndarray] = field(repr=False)
    inputs: Any = field(repr=False)
    report: Report | None = None

    def __str__(self) -> str:
        return self.source

    def net(self) -> Any:
        """The module of the source, with torch's weights, in eval mode."""
        made = self.imported.net()
        fill(made, flax_state(self.module, ByName(self.layout)))
        return made

    def _repr_html_(self) -> str:
        from html import escape

        return f"<pre>{escape(str(self.proved))}</pre><pre>{escape(self.source)}</pre>"

    def save(self, path: str | Path, test: bool = False, weights: bool = True) -> list[Path]:
        """Write the source to `path` (NAME.py), and beside it NAME.layout.json, NAME.safetensors
        (with `weights`), NAME.report.html where there is a report, NAME.npz where the source reads
        arrays, and with `test` test_NAME.py, a parity test for pytest. Gives what was written.

        A file of source that was edited since it was written is left alone: the new one is
        NAME.py.new. UsageError for a name that cannot be imported.
        """
        path = Path(path)
        check_name(path)
        written = [_write_source(path, self.source)]
        if self.arrays:
            np.savez(path.with_suffix(".npz"), **self.arrays)  # type: ignore[arg-type]
            written.append(path.with_suffix(".npz"))
        layout = path.with_suffix(".layout.json")
        write_text(layout, json.dumps(self.layout.to_json(), indent=1) + "\n")
        written.append(layout)
        if weights:
            from convert.live.saving import save

            save(self.module, tensors := path.with_suffix(".safetensors"), self.layout, force=True)
            written.append(tensors)
        if self.report is not None:
            write_report(self.report, page := path.with_suffix(".report.html"))
            written.append(page)
        if test:
            written += self._write_test(path)
        return written

    def _write_test(self, path: Path) -> list[Path]:
        from convert.runtime.arrays import leaves, to_numpy

        of = type(self.module)
        inputs = path.with_name(f"test_{path.stem}.npz")
        np.savez(inputs, **{n: to_numpy(x) for n, x in leaves(self.inputs).items()})  # type: ignore[arg-type]
        made = path.with_name(f"test_{path.stem}.py")
        text = _TEST.format(
            stem=path.stem, model=self.model, module=module_name(of), name=of.__qualname__,
            inputs=inputs.name, weights=path.with_suffix(".safetensors").name,
        )  # fmt: skip
        return [_write_source(made, text), inputs]


def check_name(path: Path) -> None:
    """UsageError for a file that could not be imported, or has no place."""
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise UsageError(f"{path} is no name for a module", "name it like net_flax.py")
    if not path.parent.is_dir():
        raise UsageError(f"the directory {path.parent} does not exist", "make it first")


_TEST = '''"""Whether {stem}.py is still the same model as {module}.{name}."""

from pathlib import Path

import numpy as np
from {module} import {name}
from {stem} import {model}

import convert
from convert.testing import assert_same

HERE = Path(__file__).parent


def test_it_is_the_same_model() -> None:
    torch_net = convert.load(HERE / "{weights}", "torch", {name})
    flax_net = convert.load(HERE / "{weights}", "flax", {model})
    with np.load(HERE / "{inputs}") as inputs:
        assert_same(torch_net, flax_net, dict(inputs))
'''


def ported(
    module: Any,
    inputs: Any,
    weights: Any = None,
    *,
    others: Sequence[Any] = (),
    verify: bool = True,
    untested: bool = False,
) -> Port:
    """See `convert.port`."""
    check_version(untested)
    constructed = Constructed()
    with constructed.recording():
        module = torch_module(module)
    arguments = constructed.by_path(module)
    if weights is not None:
        from convert.live.into_definition import with_weights

        module = with_weights(module, weights)
    signature = inspect.signature(module.forward)
    calls = [bound(signature, module, one) for one in (inputs, *others)]
    with in_mode(module, training=False):
        program, first = program_of_call(module, signature, calls[0], {}, "first")
        graph = traced_graph(module, first, (), calls=True)
        file = module_file(graph, module, program.layout, "HEADER", arguments)
        imported = Imported(file)
        if verify:
            own = program.evaluation(False).graph
            fitting = [one for one in calls if not own.misfits(shapes_of(one))]
            source = SourceProgram(program, imported)
            prove(LivePair(module, source), first, fitting, gradients=False)
    text = file.source.replace("HEADER", _header(module, program.report), 1)
    return Port(
        text, file.model, program.layout, program.report, module, imported, file.arrays,
        dict(calls[0].arguments),
    )  # fmt: skip


def _header(module: Any, proved: Ported) -> str:
    """What the file says of itself."""
    of = type(module)
    lines = [f"{of.__name__} of {module_name(of)}, in Flax NNX.", ""]
    lines += [f"Written by zooconvert {_version('zooconvert')} from {_origin(of)}."]
    lines += [
        f"Verified on {datetime.date.today()}, with torch {_version('torch')}, jax "
        f"{_version('jax')} and flax {_version('flax')}: {proved.verdict}"
        + (", outputs beside torch's at" if proved.rows else ".")
    ]
    lines += [f"  {sizes}" for sizes in proved.rows]
    if proved.baked:
        lines += ["", "Another call cannot change:"]
        lines += [f"  {printable(b)}" for b in proved.baked]
    if proved.notices:
        lines += ["", *(f"{printable(n)}." for n in proved.notices)]
    return "\n".join(lines).replace("\\", "\\\\").replace('"""', "'''") + "\n"


_FACTS = ("License-Expression", "License", "Author", "Author-email")


def _origin(of: type) -> str:
    """Package, version and licence of a class, as far as they are known."""
    top = of.__module__.partition(".")[0]
    names = importlib.metadata.packages_distributions().get(top)
    if not names:
        file = getattr(sys.modules.get(of.__module__), "__file__", None)
        return f"{Path(file).name if file else of.__module__}, whose licence holds for this too"
    data = importlib.metadata.metadata(names[0])
    told = {name: str(data[name] or "") for name in _FACTS if name in data}
    licence = told.get("License-Expression") or told.get("License") or ""
    licence = licence.splitlines()[0][:60] if licence.strip() else "see the package"
    author = told.get("Author") or told.get("Author-email") or ""
    by = f", {author.splitlines()[0][:60]}" if author else ""
    return f"{names[0]} {data['Version']}{by} (licence: {licence})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "?"


def _write_source(path: Path, text: str) -> Path:
    """Write a file with its own hash at the end; beside one that was edited, as FILE.new."""
    signed = text.rstrip("\n") + f"\n\n{_MARK}{_hash(text)}\n"
    if path.exists() and _is_edited(path.read_text()):
        path = path.with_name(f"{path.name}.new")
    write_text(path, signed)
    return path


def _is_edited(text: str) -> bool:
    body, mark, digest = text.rpartition(_MARK)
    return not mark or digest.strip() != _hash(body)


def _hash(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]
