"""A port as files: source, layout, weights, report, test."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convert.compare.report import Report
from convert.compare.report_file import write_report, write_text
from convert.live.saving import save
from convert.porting.ported_source import PortedSource
from convert.runtime.arrays import leaves, to_numpy
from convert.runtime.user_code import module_name
from zoo.containers.errors import UsageError

_MARK = "# zooconvert port, unedited: "


@dataclass(frozen=True)
class Port(PortedSource):
    """What `convert.port` gives: see PortedSource. `report` is what `convert.verify` says of the
    two modules, where that was asked for."""

    report: Report | None = field(default=None, repr=False)

    def save(self, path: str | Path, test: bool = False, weights: bool = True) -> list[Path]:
        """Write the source to `path` (NAME.py), and beside it NAME.layout.json, NAME.safetensors
        (with `weights`), NAME.report.html where there is a report, NAME.npz where the source reads
        arrays, and with `test` test_NAME.py, a parity test for pytest, with the inputs of one call,
        those of a port with channels last once more. Gives what was written.

        A file of source that was edited since it was written is left alone: the new one is
        NAME.py.new. UsageError for a name that cannot be imported, and for a `test` of a module
        that a notebook defines.
        """
        path = Path(path)
        check_name(path)
        if test and module_name(type(self.module)) == "__main__":
            raise UsageError(
                f"a test cannot import {self.model} from a notebook", "move it into a file"
            )
        written = [_write_source(path, self.source)]
        if self.file.arrays:
            np.savez(path.with_suffix(".npz"), **self.file.arrays)  # type: ignore[arg-type]
            written.append(path.with_suffix(".npz"))
        layout = path.with_suffix(".layout.json")
        write_text(layout, json.dumps(self.layout.to_json(), indent=1) + "\n")
        written.append(layout)
        if weights:
            save(self.module, tensors := path.with_suffix(".safetensors"), self.layout, force=True)
            written.append(tensors)
        if self.report is not None:
            write_report(self.report, page := path.with_suffix(".report.html"))
            written.append(page)
        if test:
            written += self._write_test(path)
        return written

    def _write_test(self, path: Path) -> list[Path]:
        of = type(self.module)
        inputs = [_write_inputs(path.with_name(f"test_{path.stem}.npz"), self.inputs)]
        if self.moved.inputs:
            there = path.with_name(f"test_{path.stem}_channels_last.npz")
            inputs.append(_write_inputs(there, self.flax_inputs()))
        made = path.with_name(f"test_{path.stem}.py")
        text = _TEST.format(
            stem=path.stem, model=self.model, module=module_name(of), name=of.__qualname__,
            weights=path.with_suffix(".safetensors").name,
            given=", flax_inputs=".join(f'HERE / "{file.name}"' for file in inputs),
        )  # fmt: skip
        return [_write_source(made, text), *inputs]


def check_name(path: Path) -> None:
    """UsageError for a file that could not be imported, or has no place."""
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise UsageError(f"{path} is no name for a module", "name it like net_flax.py")
    if not path.parent.is_dir():
        raise UsageError(f"the directory {path.parent} does not exist", "make it first")


_TEST = '''"""Whether {stem}.py is still the same model as {module}.{name}."""

from pathlib import Path

import {module}
import {stem}

import convert
from convert.testing import assert_same

HERE = Path(__file__).parent


def test_it_is_the_same_model() -> None:
    torch_net = convert.load(HERE / "{weights}", "torch", {module}.{name})
    flax_net = convert.load(HERE / "{weights}", "flax", {stem}.{model})
    assert_same(torch_net, flax_net, {given})
'''


def _write_inputs(path: Path, inputs: Any) -> Path:
    """Write the arrays of a call, by dotted names."""
    np.savez(path, **{n: to_numpy(x) for n, x in leaves(inputs).items()})  # type: ignore[arg-type]
    return path


def _write_source(path: Path, text: str) -> Path:
    """Write a file with its own hash at the end; beside one that was edited, as FILE.new."""
    signed = text.rstrip("\n") + f"\n\n\n{_MARK}{_hash(text)}\n"
    if path.exists() and _is_edited(path.read_text()):
        path = path.with_name(f"{path.name}.new")
    write_text(path, signed)
    return path


def _is_edited(text: str) -> bool:
    body, mark, digest = text.rpartition(_MARK)
    return not mark or digest.strip() != _hash(body)


def _hash(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]
