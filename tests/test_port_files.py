"""What a port is outside of its classes: files that stand alone, calls from files, notebooks."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from port_models import Lstm
from torch import nn

import convert

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

for module, model in (("clash_flax", "Net"), ("lstm_flax", "Lstm")):
    net = getattr(__import__(module), model)(rngs=nnx.Rngs(0))
    net.eval()
    tree = flax.serialization.msgpack_restore(open(f"{module}.msgpack", "rb").read())
    state = nnx.state(net)
    nnx.replace_by_pure_dict(state, nnx.restore_int_paths(tree))
    nnx.update(net, state)
    call = np.load(f"{module}.npz")
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
    images = np.random.default_rng(0).normal(size=(2, 3, 6, 8)).astype(np.float32)
    for stem, model, x in (("clash_flax", Net, images), ("lstm_flax", Lstm, images[0, :, :, :4])):
        port = convert.port(model(), x, standalone=True, verify=False)
        assert imported(port.source) <= set(sys.stdlib_module_names) | {"jax", "flax", "numpy"}
        assert "Apache-2.0" in port.source
        port.save(tmp_path / f"{stem}.py", weights=False)
        convert.save(port.net(), tmp_path / f"{stem}.msgpack", layout=port.layout)
        with torch.no_grad():
            y = port.module.eval()(torch.from_numpy(x)).numpy()
        np.savez(tmp_path / f"{stem}.npz", x=x, y=y)
    done = subprocess.run(
        [sys.executable, "-c", _RUN], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": "", "JAX_PLATFORMS": "cpu"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


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
