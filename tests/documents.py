"""The documents' models, held against the zoo: their own classes, written out again in the tests,
save a checkpoint, and everything else must follow from that file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

import convert
import zoo
from convert.judge.noise import EXACT, MARGIN
from convert.judge.rows import FLOOR
from zoo import probe


def filled(module: nn.Module) -> nn.Module:
    """`module` in eval mode with weights that follow from their names."""
    state = {
        n: torch.from_numpy(np.asarray(probe.weight(n, tuple(t.shape))))
        for n, t in module.state_dict().items()
        if t.is_floating_point()
    }
    module.load_state_dict(state, strict=False)
    return module.eval()


def images_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1) if x.ndim == 4 else x


def outputs(module: nn.Module, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the module gives in float32 and, with the same weights, in float64."""
    with torch.no_grad():
        rough = module(torch.from_numpy(x).float()).numpy()
        exact = module.double()(torch.from_numpy(x).double()).numpy()
    module.float()
    return rough, exact


def same(got: Any, rough: np.ndarray, exact: np.ndarray) -> None:
    """float32 outputs are as close as the noise of the document's own class allows."""
    noise = np.abs(rough - exact).max()
    allowed = MARGIN * max(noise, FLOOR * np.abs(exact).max())
    assert got.shape == rough.shape
    assert np.abs(np.asarray(got) - rough).max() <= allowed


def check_document(module: nn.Module, preset: str, x: np.ndarray, folder: Path) -> Path:
    """Save `module`'s state_dict, convert and load it by its file name alone, compare outputs.

    `x` is a float64 input, NCHW for images. Gives the Flax checkpoint that was written.
    """
    filled(module)
    path = folder / "document.pt"
    torch.save(module.state_dict(), path)
    made = convert.convert(path)
    found = zoo.get(preset)
    assert made.model == found.model.name
    assert found.model.configure(**made.config) == found.config
    assert "unknown" not in " ".join(made.notices)
    flax = folder / "document.flax"
    rough, exact = outputs(module, x)
    with torch.no_grad():
        mine = zoo.load(path, framework="torch")(torch.from_numpy(x).float()).numpy()
    assert np.abs(exact).max() > 0.01
    same(mine, rough, exact)
    for source in (path, flax):
        same(zoo.load(source, framework="flax")(jnp.asarray(images_last(x))), rough, exact)
    with jax.enable_x64(True):
        wide = zoo.load(flax, framework="flax", param_dtype="float64")(jnp.asarray(images_last(x)))
        assert wide.dtype == jnp.float64
        assert np.abs(np.asarray(wide) - exact).max() <= EXACT * np.abs(exact).max()
    back = convert.convert(flax, folder / "back.pt")
    assert back.model == made.model
    returned = torch.load(folder / "back.pt", weights_only=True)
    assert list(returned) == list(module.state_dict()), "names and order of the document's class"
    assert all((returned[n] == t).all() for n, t in module.state_dict().items())
    return flax


def check_fresh(preset: str, **overrides: Any) -> None:
    """`zoo.create` gives one model in both frameworks."""
    found = zoo.get(preset)
    a, b = (zoo.create(preset, framework=f, seed=3, **overrides) for f in ("torch", "flax"))
    ((name, x),) = found.model.inputs(found.config).items()
    got = b(jnp.asarray(found.model.to_flax(name, x.astype(np.float32))))
    same(got, *outputs(a, x))
