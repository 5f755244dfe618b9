"""AlexNet against torchvision's outputs, and its tensors against torchvision's."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from support import canonical

import zoo
from convert.compare.outputs import run
from convert.judge.noise import EXACT, MARGIN
from convert.judge.rows import FLOOR
from zoo import probe
from zoo.loading import build
from zoo.models.alexnet import MODEL
from zoo.models.alexnet.layout import infer

CONFIG = MODEL.presets["alexnet"]


def test_parameters_as_published() -> None:
    assert MODEL.layout_of(CONFIG).parameters == 61_100_840


def test_names_and_shapes_are_torchvisions(fixtures: Path) -> None:
    with safe_open(fixtures / "golden" / "alexnet.safetensors", "np") as f:
        published = json.loads(f.metadata()["state_dict"])
    mine = MODEL.layout_of(CONFIG).shapes("torch")
    assert mine == {n: tuple(s) for n, s in published.items()}
    assert infer(mine) == {n: v for n, v in vars(CONFIG).items() if n != "dropout"}


@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_golden(fixtures: Path, framework: str) -> None:
    """Images of 96 x 96: what reaches the adaptive pool is 2 x 2, and it makes 6 x 6 of that."""
    golden = load_file(fixtures / "golden" / "alexnet.safetensors")
    weights = probe.weights(MODEL.layout_of(CONFIG).shapes("torch"))
    (name,) = (k.removeprefix("in.") for k in golden if k.startswith("in."))
    inputs = {"x": golden[f"in.{name}"]}
    (out,) = (k.removesuffix(".f64") for k in golden if k.endswith(".f64"))
    expected = golden[f"{out}.f64"]
    scale = np.abs(expected).max()
    with jax.enable_x64(True):
        exact = run(MODEL, CONFIG, framework, weights, inputs, "float64")
        rough = run(MODEL, CONFIG, framework, weights, inputs, "float32")
    assert exact["features.12"].shape[2:] == (2, 2)
    assert np.abs(exact["output"] - expected).max() <= EXACT * scale
    noise = np.abs(golden[f"{out}.f32"] - expected).max()
    error = np.abs(rough["output"] - golden[f"{out}.f32"]).max()
    assert error <= MARGIN * max(noise, FLOOR * scale)


@pytest.mark.parametrize("size", [63, 70, 224])
def test_any_image_size(size: int) -> None:
    config = MODEL.tiny["tiny"]
    x = probe.normal("x", (1, 3, size, size + 9))
    with jax.enable_x64(True):
        a, b = (
            run(MODEL, config, f, canonical(MODEL, config), {"x": x}, "float64")["output"]
            for f in ("torch", "flax")
        )
    assert np.abs(a - b).max() <= EXACT * np.abs(a).max()


@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_dropout_acts_in_training_only(framework: str) -> None:
    config = MODEL.tiny["tiny"]
    model = build(MODEL, config, framework, canonical(MODEL, config))
    x = MODEL.inputs(config)["x"].astype(np.float32)
    given = torch.from_numpy(x) if framework == "torch" else jnp.asarray(np.moveaxis(x, 1, -1))
    still = [np.asarray(model(given).tolist()) for _ in range(2)]
    model.train()
    moving = [np.asarray(model(given).tolist()) for _ in range(2)]
    assert (still[0] == still[1]).all()
    assert (moving[0] != moving[1]).any()


@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_a_new_head_keeps_everything_else_and_says_so(framework: str, tmp_path: Path) -> None:
    config = MODEL.tiny["tiny"]
    weights = canonical(MODEL, config)
    torch.save({n: torch.from_numpy(a) for n, a in weights.items()}, tmp_path / "a.pt")
    with pytest.warns(zoo.LoadNotice, match=r"classifier\.6\.weight, classifier\.6\.bias"):
        model = zoo.load(tmp_path / "a.pt", framework=framework, num_classes=7)
    head, kept = model.classifier[6], model.classifier[4]
    if framework == "torch":
        assert head.weight.shape == (7, 16)
        assert (kept.weight.detach().numpy() == weights["classifier.4.weight"]).all()
    else:
        assert head.kernel.shape == (16, 7)
        assert (np.asarray(kept.kernel[...]) == weights["classifier.4.weight"].T).all()


def test_another_network_of_features_and_a_classifier_is_not_alexnet() -> None:
    """VGG has the same two parts, with convolutions in other places."""
    shapes = MODEL.layout_of(CONFIG).shapes("torch")
    assert infer(shapes | {"features.2.weight": (64, 64, 3, 3)}) is None
    assert infer({n: s for n, s in shapes.items() if "features.3." not in n}) is None
    damaged = {n: s for n, s in shapes.items() if n != "features.3.weight"}
    assert infer(damaged) == infer(shapes)
