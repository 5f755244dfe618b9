"""What a port is outside of its classes: files that stand alone, calls from files, notebooks."""

from __future__ import annotations

import ast
import linecache
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import convert
from convert.porting import rules
from convert.runtime.inputs import read_inputs
from zoo.containers.errors import UsageError

_RUN = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("zoo", "convert", "torch"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import flax.serialization
import numpy as np
from flax import nnx

from clash_flax import Net

net = Net(rngs=nnx.Rngs(0))
net.eval()
with open("clash_flax.msgpack", "rb") as file:
    tree = flax.serialization.msgpack_restore(file.read())
state = nnx.state(net)
nnx.replace_by_pure_dict(state, nnx.restore_int_paths(tree))
nnx.update(net, state)
call = np.load("call.npz")
np.testing.assert_allclose(net(call["x"]), call["y"], rtol=0, atol=1e-5)
"""


class Options(nn.Module):
    """Has the name of something that blocks of zoo.nn use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Any) -> Any:
        return self.norm(self.conv(x))


class Conv2d(nn.Module):
    """Has the name of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")

    def forward(self, x: Any) -> Any:
        return self.conv(x) + torch.nn.functional.interpolate(x[:, :, ::2, ::2], scale_factor=2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Options()
        self.second = Conv2d()

    def forward(self, x: Any) -> Any:
        return self.second(self.first(x))


def imported(source: str) -> set[str]:
    """The packages that a file imports."""
    nodes = list(ast.walk(ast.parse(source)))
    found = {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
    found |= {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    return {name.partition(".")[0] for name in found}


def test_a_file_that_stands_alone_runs_where_zoo_is_not(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 6, 8)).astype(np.float32)
    port = convert.port(Net(), x, image_axes="first", standalone=True, verify=False)
    assert imported(port.source) <= set(sys.stdlib_module_names) | {"jax", "flax", "numpy"}
    assert "Apache-2.0" in port.source
    port.save(tmp_path / "clash_flax.py", weights=False)
    convert.save(port.net(), tmp_path / "clash_flax.msgpack", layout=port.layout)
    with torch.no_grad():
        y = port.module.eval()(torch.from_numpy(x)).numpy()
    np.savez(tmp_path / "call.npz", x=x, y=y)
    done = subprocess.run(
        [sys.executable, "-c", _RUN], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": "", "JAX_PLATFORMS": "cpu"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


class Pools(nn.Module):
    """What zoo.nn has functions for, where channels are last."""

    def forward(self, x: Any) -> Any:
        x = nn.functional.adaptive_avg_pool2d(x, (3, 4))
        return nn.functional.max_pool2d(x, 3, 2, 1, ceil_mode=True)


def test_functions_on_images_are_written_in_too() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 6, 8)).astype(np.float32)
    port = convert.port(Pools(), x, standalone=True)
    assert imported(port.source) <= set(sys.stdlib_module_names) | {"jax", "flax", "numpy"}
    assert "def adaptive_avg_pool(" in port.source


def test_every_block_can_be_written_alone() -> None:
    from convert.porting.rendering.written_rules import written

    for file in sorted((Path(__file__).parents[1] / "zoo" / "nn").glob("*_flax.py")):
        tree = ast.parse(file.read_text())
        public = [n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
        public = [n for n in public if not n.startswith("_")]
        made = written([], {"Sequential"}, [(f"zoo.nn.{file.stem}", n) for n in public])
        source = "\n".join([*made.imports, made.source])
        assert set(public) <= made.names | set(public)
        assert "zoo" not in imported(source)
        names: dict[str, Any] = {"__name__": "alone"}
        exec(compile(source, file.name, "exec"), names)
        assert set(public) <= set(names)


_CELL = """
class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, batch):
        hidden = self.fc(batch["tokens"])
        hidden = hidden * batch["mask"][..., None]
        return hidden
"""
BATCH = {"tokens": np.ones((2, 3, 4), np.float32), "mask": np.ones((2, 3), np.float32)}


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class that a cell of a notebook defines, as IPython runs it."""
    file = "<ipython-input-3-0123456789ab>"
    lines = _CELL.splitlines(keepends=True)
    monkeypatch.setitem(linecache.cache, file, (len(_CELL), None, lines, file))
    notebook = types.ModuleType("__main__")
    vars(notebook)["nn"] = nn
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    exec(compile(_CELL, file, "exec"), vars(notebook))
    found: type = notebook.Scaled
    return found


def test_a_cell_of_a_notebook_keeps_its_names(scaled: type, tmp_path: Path) -> None:
    port = convert.port(scaled, {"batch": BATCH}, verify=False)
    assert 'hidden = self.fc(batch["tokens"])' in port.source
    assert 'hidden = hidden * batch["mask"][..., None]' in port.source
    assert "from a notebook" in port.source
    assert "hidden = self.fc(batch[&quot;tokens" in port._repr_html_()
    with pytest.raises(UsageError, match="from a notebook"):
        port.save(tmp_path / "net.py", test=True)
    assert not list(tmp_path.iterdir())


def test_arguments_in_dicts_come_from_files_and_go_there(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **{f"batch.{n}": x for n, x in BATCH.items()})  # type: ignore[arg-type]
    (read,) = read_inputs(tmp_path / "x.npz").values()
    assert read.keys() == BATCH.keys()
    np.savez(tmp_path / "y.npz", **{"xs.1": BATCH["mask"], "xs.0": BATCH["tokens"]})  # type: ignore[arg-type]
    assert [x.ndim for x in read_inputs(tmp_path / "y.npz")["xs"]] == [3, 2]
    np.savez(tmp_path / "z.npz", **{"x.y": BATCH["mask"], "x": BATCH["mask"]})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="x is there, and something in it"):
        read_inputs(tmp_path / "z.npz")
    np.savez(tmp_path / "z.npz", **{f"x.{10**12}": BATCH["mask"]})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="is no index of a tuple"):
        read_inputs(tmp_path / "z.npz")


class Three(nn.Module):
    """Does something else for rows of more than three."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Any, more: Any = None) -> Any:
        y = self.fc(x)
        y = y * 2 if x.shape[0] > 3 else y
        return y if more is None else y + more


def test_every_call_that_is_given_is_shown_or_refused() -> None:
    x = np.ones((2, 4), np.float32)
    with pytest.raises(UsageError, match=r"x.shape\[0\] <= 3 does not hold"):
        convert.port(Three, x, others=[np.ones((5, 4), np.float32)])
    with pytest.raises(UsageError, match="was traced with x of 2 axes"):
        convert.port(Three, x, others=[(x, x)])
    port = convert.port(Three, x, others=[x[:1].repeat(3, 0)])
    assert any("(3, 4)" in sizes for sizes in port.proved.rows)


def airy(x: Any) -> Any:
    return x * 3


class Airy(nn.Module):
    def forward(self, x: Any) -> Any:
        return torch.special.airy_ai(x)


def test_a_rule_of_ones_own_is_written_into_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.ones((2, 4), np.float32)
    name = "aten.special_airy_ai.default"
    with pytest.raises(Exception, match=r"register it with convert.porting.rules.rule"):
        convert.port(Airy, x)
    monkeypatch.setitem(rules.table(), name, rules.Rule(name, airy))
    port = convert.port(Airy, x, verify=False)
    assert "return special_airy_ai(x)" in port.source
    assert "return x * 3" in port.source
