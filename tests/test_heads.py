"""A checkpoint loaded with another head: what is new is said, and everything else is kept. Every
family whose configuration counts classes is here by itself; HEADS adds other ways to a new head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import save_file
from support import Arrays, canonical
from test_models import to_canonical

import convert
import zoo
from zoo.model import Config, Model
from zoo.registry import families

CLASSES = 7
# family, tiny configuration, overrides that ask for a head
HEADS: list[tuple[str, str, dict[str, Any]]] = [
    ("bert", "encoder", {"head": "token_classification", "num_labels": 7, "pooler": False}),
    ("bert", "encoder", {"head": "sequence_classification", "num_labels": 3}),
    *(
        (model.name, name, {"num_classes": CLASSES})
        for model in families().values()
        for name, config in model.tiny.items()
        if hasattr(config, "num_classes")
    ),
]
HEAD = pytest.mark.parametrize(
    ("model", "config", "overrides"),
    [
        pytest.param(
            families()[family],
            families()[family].tiny[name],
            overrides,
            id=f"{family}-{name}-{next(iter(overrides.values()))}",
        )
        for family, name, overrides in HEADS
    ],
)


def published(model: Model, config: Config, folder: Path) -> tuple[Path, Arrays]:
    """A checkpoint as trainings leave it, with a config.json where the family has one. Counts of
    batches are 1000."""
    state = canonical(model, config)
    for entry in model.layout_of(config).entries:
        if entry.constant is not None:
            state |= {t.name: np.full(t.shape, 1000, np.int64) for t in entry.torch}
    if model.to_hf is None or not model.to_hf(config):
        torch.save({n: torch.from_numpy(a) for n, a in state.items()}, folder / "a.pth")
        return folder / "a.pth", state
    (folder / "hf").mkdir()
    save_file(state, folder / "hf" / "model.safetensors", {"format": "pt"})
    (folder / "hf" / "config.json").write_text(json.dumps(model.to_hf(config)))
    return folder / "hf", state


def held(module: Any, model: Model, config: Config, framework: str) -> Arrays:
    """The module's tensors under canonical names."""
    if framework == "torch":
        return {n: t.detach().numpy() for n, t in module.state_dict().items()}
    return to_canonical(model, config, nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat)))


def changed(model: Model, old: Config, new: Config) -> tuple[list[str], list[str], dict[str, str]]:
    """Tensors that are new, those that are not used, and new name -> old name of all others."""
    before, after = (model.layout_of(c).shapes("torch") for c in (old, new))
    source = {n: n if n in before else n.removeprefix(model.base_prefix) for n in after}
    kept = {n: s for n, s in source.items() if before.get(s) == after[n]}
    return (
        [n for n in after if n not in kept],
        [n for n in before if n not in kept.values()],
        kept,
    )


def asked(model: Model, config: Config, path: Path) -> dict[str, Any]:
    """What names and shapes do not tell, where no config.json does either."""
    return {} if path.is_dir() else {name: getattr(config, name) for name in model.unknown}


@HEAD
@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_a_new_head_keeps_everything_else_and_says_so(
    model: Model, config: Config, overrides: dict[str, Any], framework: str, tmp_path: Path
) -> None:
    path, state = published(model, config, tmp_path)
    wanted = zoo.model.override(config, overrides)
    new, unused, kept = changed(model, config, wanted)
    assert new
    assert len(kept) >= len(new)
    with pytest.warns(zoo.LoadNotice) as told:
        module = zoo.load(path, framework=framework, **overrides, **asked(model, config, path))
    text = "\n".join(str(w.message) for w in told)
    assert f"new, not from the checkpoint: {', '.join(new)}" in text
    if unused:
        assert f"not used: {', '.join(unused)}" in text
    got = held(module, model, wanted, framework)
    shapes = model.layout_of(wanted).shapes("torch")
    assert all(got[n].shape == shapes[n] for n in new)
    for name, old in kept.items():
        if framework == "torch" or name in got:  # Flax has no counts of batches
            assert (got[name] == state[old]).all(), name
    assert kept.keys() & canonical(model, wanted).keys() <= got.keys()


@HEAD
def test_a_new_head_starts_alike_in_both_frameworks(
    model: Model, config: Config, overrides: dict[str, Any], tmp_path: Path
) -> None:
    path, _ = published(model, config, tmp_path)
    wanted = zoo.model.override(config, overrides)
    new, _, _ = changed(model, config, wanted)
    made = []
    for framework in ("torch", "flax"):
        with pytest.warns(zoo.LoadNotice):
            module = zoo.load(path, framework=framework, **overrides, **asked(model, config, path))
        made.append(held(module, model, wanted, framework))
    a, b = made
    assert all((a[n] == b[n]).all() for n in new)


@HEAD
def test_a_new_head_on_flax_weights(
    model: Model, config: Config, overrides: dict[str, Any], tmp_path: Path
) -> None:
    """The counts of batches, which Flax does not have, come back too."""
    path, state = published(model, config, tmp_path)
    convert.convert(path, tmp_path / "b.msgpack")
    wanted = zoo.model.override(config, overrides)
    _, _, kept = changed(model, config, wanted)
    told = asked(model, config, tmp_path / "b.msgpack") | overrides
    with pytest.warns(zoo.LoadNotice):
        module = zoo.load(tmp_path / "b.msgpack", framework="torch", **told)
    got = held(module, model, wanted, "torch")
    assert all((got[n] == state[old]).all() for n, old in kept.items())
