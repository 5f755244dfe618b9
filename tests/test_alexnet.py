"""AlexNet: image sizes, and what is not taken for it."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support import canonical

from convert.compare.outputs import run
from convert.judge.noise import EXACT
from zoo import probe
from zoo.models.alexnet import MODEL
from zoo.models.alexnet.layout import infer

CONFIG = MODEL.presets["alexnet"]


def test_the_golden_images_are_small_for_the_adaptive_pool(fixtures: Path) -> None:
    """Of 96 x 96: what reaches the pool is 2 x 2, and it makes 6 x 6 of that."""
    images = load_file(fixtures / "golden" / "alexnet.safetensors")["in.x"]
    with torch.device("meta"):
        model = MODEL.definition("torch")(CONFIG)
    assert model.features(torch.from_numpy(images).to("meta")).shape[2:] == (2, 2)


def test_names_tell_all_but_the_dropout() -> None:
    fields = {n: v for n, v in vars(CONFIG).items() if n != "dropout"}
    assert infer(MODEL.layout_of(CONFIG).shapes("torch")) == fields


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


def test_another_network_of_features_and_a_classifier_is_not_alexnet() -> None:
    """VGG has the same two parts, with convolutions in other places."""
    shapes = MODEL.layout_of(CONFIG).shapes("torch")
    assert infer(shapes | {"features.2.weight": (64, 64, 3, 3)}) is None
    assert infer({n: s for n, s in shapes.items() if "features.3." not in n}) is None
    damaged = {n: s for n, s in shapes.items() if n != "features.3.weight"}
    assert infer(damaged) == infer(shapes)
