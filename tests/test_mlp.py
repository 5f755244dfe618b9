"""Multilayer perceptrons: the command, Linen's checkpoints, and sizes that no preset has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from documents import filled, outputs, same
from flax import linen, serialization
from orbax import checkpoint as ocp
from upstream.mlp import CLASSES, Three

import convert
import zoo
from zoo import probe
from zoo.containers.errors import UsageError
from zoo.models.mlp import MODEL
from zoo.models.mlp.layout import infer


def test_the_command_needs_the_file_name_alone(tmp_path: Path) -> None:
    module = filled(CLASSES["binary_mlp"]())
    torch.save(module.state_dict(), tmp_path / "binary.pt")
    command = [sys.executable, "-c", "from convert.cli.main import main; main()"]
    done = subprocess.run(
        [*command, "torch2flax", "binary.pt", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "mlp"
    model = zoo.load(tmp_path / "binary.flax", framework="flax")
    x = probe.normal("x", (3, 10)).astype(np.float32)
    same(model(jnp.asarray(x)), *outputs(module, x))
    assert getattr(model, "4").kernel.shape == (10, 1)


# --- Linen ---


class LinenMLP(linen.Module):
    """The documents' Flax classes: mlp_10_20_10_1 and mlp_2_3_1."""

    widths: tuple[int, ...]

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths[:-1]:
            x = linen.relu(linen.Dense(width)(x))
        return linen.Dense(self.widths[-1])(x)


LINEN = {"mlp_10_20_10_1": (10, (20, 10, 1)), "mlp_2_3_1": (2, (3, 1))}


def random_variables(module: linen.Module, x: jax.Array) -> Any:
    """Variables whose every tensor differs from every other."""
    template = jax.eval_shape(module.init, jax.random.key(0), x)
    named = jax.tree_util.tree_map_with_path(
        lambda p, t: jnp.asarray(probe.normal(str(p), t.shape) * 0.5, jnp.float32), template
    )
    return named


def save(tree: Any, container: str, folder: Path) -> Path:
    if container == "msgpack":
        (folder / "c.msgpack").write_bytes(serialization.to_bytes(tree))
        return folder / "c.msgpack"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "c", tree)
    return folder / "c"


@pytest.mark.parametrize("outer", [True, False], ids=["params", "bare"])
@pytest.mark.parametrize("container", ["msgpack", "orbax"])
@pytest.mark.parametrize("preset", LINEN)
def test_a_linen_checkpoint(preset: str, container: str, outer: bool, tmp_path: Path) -> None:
    n_in, widths = LINEN[preset]
    x = probe.normal("x", (6, n_in)).astype(np.float32)
    net = LinenMLP(widths)
    variables = random_variables(net, jnp.asarray(x))
    path = save(variables if outer else variables["params"], container, tmp_path)
    made = convert.convert(path, tmp_path / "t.pt", framework="torch")
    assert (made.model, made.source_tree) == ("mlp", "linen-compact")
    assert MODEL.configure(**made.config) == MODEL.presets[preset]
    module = CLASSES[preset]()
    module.load_state_dict(torch.load(tmp_path / "t.pt", weights_only=True), strict=True)
    expected = outputs(module, x)
    same(net.apply(variables, jnp.asarray(x)), *expected)
    loaded = zoo.load(path, framework="flax")  # and it is read as it stands
    same(loaded(jnp.asarray(x)), *expected)


@pytest.mark.parametrize("preset", LINEN)
def test_what_the_linen_class_restores(preset: str, tmp_path: Path) -> None:
    n_in, widths = LINEN[preset]
    module = filled(CLASSES[preset]())
    torch.save(module.state_dict(), tmp_path / "a.pt")
    convert.convert(tmp_path / "a.pt", tmp_path / "b.msgpack", tree="linen-compact")
    x = probe.normal("x", (6, n_in)).astype(np.float32)
    net = LinenMLP(widths)
    template = net.init(jax.random.key(0), jnp.asarray(x))
    restored = serialization.from_bytes(template, (tmp_path / "b.msgpack").read_bytes())
    assert jax.tree.structure(restored) == jax.tree.structure(template)
    same(net.apply(restored, jnp.asarray(x)), *outputs(module, x))


def test_compact_names_that_two_presets_have(tmp_path: Path) -> None:
    """binary_mlp and sigmoid_mlp are the same to Linen: nothing is guessed."""
    tree = random_variables(LinenMLP((100, 10, 1)), jnp.ones((1, 10)))
    path = save(tree, "msgpack", tmp_path)
    with pytest.raises(UsageError, match="2 models"):
        convert.convert(path, tmp_path / "t.pt", framework="torch")
    convert.convert(path, tmp_path / "t.pt", framework="torch", model="binary_mlp")
    assert "4.weight" in torch.load(tmp_path / "t.pt", weights_only=True)


# --- Sizes that no preset has ---


def test_unknown_activations_are_asked_for(tmp_path: Path) -> None:
    module = filled(Three(6, 5, 4, 3))
    torch.save(module.state_dict(), tmp_path / "a.pt")
    made = convert.convert(tmp_path / "a.pt")
    assert made.config["activation"] is None
    assert list(made.config["sizes"]) == [6, 5, 4, 3]
    with pytest.raises(UsageError, match="activation"):
        zoo.load(tmp_path / "a.flax", framework="flax")
    told = {"sizes": (6, 5, 4, 3)}
    model = zoo.load(tmp_path / "a.flax", framework="flax", model="mlp", config=told)
    x = probe.normal("x", (4, 6)).astype(np.float32)
    same(model(jnp.asarray(x)), *outputs(module, x))


def test_a_damaged_checkpoint_is_still_told_by_the_rest() -> None:
    shapes = MODEL.layout_of(MODEL.presets["mlp_10_20_10_1"]).shapes("torch")
    for name in shapes:
        for damaged in (
            {n: s for n, s in shapes.items() if n != name},
            shapes | {name: (7, *shapes[name][1:])},
        ):
            found = infer(damaged)
            if "fc3" not in name or len(damaged) < len(shapes):  # two witnesses have no majority
                assert found == vars(MODEL.presets["mlp_10_20_10_1"]), name


@pytest.mark.parametrize(
    "names", [["fc2.weight"], ["fc1.weight", "fc3.weight"], ["0.weight", "3.weight"], ["fc1.scale"]]
)
def test_other_names_are_other_models(names: list[str]) -> None:
    assert infer(dict.fromkeys(names, (3, 3))) is None


@pytest.mark.parametrize(
    "fields", [{"sizes": (3,)}, {"sizes": (3, 0)}, {"activation": "gelu"}, {"naming": "x"}]
)
def test_configs_that_cannot_be(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        MODEL.configure(**fields)
