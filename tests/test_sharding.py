"""`zoo.load(..., sharding=...)`: on eight devices, in two processes, and what does not fit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from support import canonical, write

import convert
import zoo
from zoo import registry
from zoo.checkpoint.label import Label
from zoo.containers.errors import UsageError
from zoo.containers.safetensors_file import SafetensorsWriter

ROOT = Path(__file__).parents[1]
P = PartitionSpec
MLP, SWITCH = (registry.families()[n] for n in ("mlp", "switch_transformer"))


def source(path: Path, model: Any, config: Any) -> Path:
    label = Label(model, config).to_metadata()
    return write(SafetensorsWriter, path, canonical(model, config), **label)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    wide = replace(next(iter(MLP.tiny.values())), sizes=(256, 512, 512, 64))
    path = source(folder / "wide.safetensors", MLP, wide)
    for name in ("wide.msgpack", "wide.flax"):  # Orbax
        convert.convert(path, folder / name, framework="flax")
    source(folder / "experts.safetensors", SWITCH, next(iter(SWITCH.tiny.values())))
    return folder


def start(folder: Path, devices: int, *more: str) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    told = {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests/sharding_process.py"), str(folder), *more],
        env={**os.environ, **told},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_eight_devices(folder: Path) -> None:
    told, _ = start(folder, 8).communicate(timeout=300)
    assert told.endswith("done\n"), told


def test_two_processes_read_what_is_theirs(folder: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    both = [start(folder, 4, str(i), port) for i in range(2)]
    for process in both:
        told, _ = process.communicate(timeout=300)
        assert told.endswith("done\n"), told


def refused(asked: Any, folder: Path, **told: Any) -> UsageError:
    with pytest.raises(UsageError) as e:
        zoo.load(folder / "wide.safetensors", "flax", sharding=asked, **told)
    return e.value


def test_what_does_not_fit_is_told_at_once(folder: Path) -> None:
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    rules = [
        ("attention", P("model")),
        (r"fc1\.kernel", P(None, "tensor")),
        (r"fc1\.bias", P(None, "model")),
        (r"fc2\.kernel", P("model", "model")),
        ("fc2.(bias", P()),
        (r"fc2\.bias", P()),
        ("", P("model")),
    ]
    e = refused((mesh, rules[:-1]), folder)
    assert e.problem == "the sharding does not fit: 7 problems"
    assert [d.split(": ")[0] for d in e.details] == [
        "rule 'fc2.(bias' is not a regular expression",
        "rule 'attention' matches no tensor (one is fc1.kernel)",
        "fc1.kernel 256x512",
        "fc1.bias 512",
        "fc2.kernel 512x512",
        "fc3.kernel 512x64",
        "fc3.bias 64",
    ]
    assert "the mesh has no axis 'tensor'; it has data, model" in e.details[2]
    assert "has 2 axes, the tensor 1" in e.details[3]
    assert "has the mesh's axis 'model' twice" in e.details[4]
    assert "no rule matches it" in e.details[-1]
    tree = {"fc1": {"kernel": P(), "scale": P()}}
    told = refused((mesh, tree), folder).details
    assert told[0] == "fc1.scale is in the tree, and not a tensor of the model"
    assert len(told) == 6
    assert "needs a mesh" in refused(lambda name, shape: P(), folder).details[0]
    assert "is neither" in refused(lambda name, shape: 3, folder).details[0]
    unsure = refused((mesh, P(P.UNCONSTRAINED)), folder).details
    assert "is neither" in unsure[0]
    abstract = AbstractMesh((2,), ("model",))
    for odd, what in (
        (3, "sharding=int is not understood"),
        (mesh, "a mesh alone says not what lies where"),
        ((abstract, []), "an AbstractMesh has no devices"),
        ((mesh, 3), "int beside a mesh is not understood"),
        ((mesh, [("a", "model")]), "('a', 'model') is not a rule"),
    ):
        assert refused(odd, folder).problem == what


def test_an_axis_that_does_not_divide() -> None:
    from zoo.loading.into_shards import shardings

    mesh = AbstractMesh((2, 3), ("data", "model"))
    named = NamedSharding(mesh, P(("data", "model"), None))
    with pytest.raises(UsageError) as e:
        shardings(named, {"a": (12, 5), "b": (9, 5), "c": (6,)})
    assert e.value.details == [
        "b 9x5: axis 0 of 9 does not divide by 6 (data, model)",
        "c 6: P(('data', 'model'), None) has 2 axes, the tensor 1",
    ]


def test_sharding_is_for_flax(folder: Path) -> None:
    path = folder / "wide.safetensors"
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(UsageError, match="sharding is JAX's"):
        zoo.load(path, "torch", sharding=sharding)
    with pytest.raises(UsageError, match="for a definition in Flax"):
        convert.load(path, "torch", zoo.load(path, "torch"), sharding=sharding)
