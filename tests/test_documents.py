"""The documents' classes, held against the zoo: the file of a class, saved by its user, converts
and loads by what is in it alone, in both frameworks. The classes are in upstream/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from documents import all_same, every_output
from flax import nnx
from support import Arrays
from upstream import Upstream, load, tensors, upstreams

import convert
import zoo
from convert.judge.noise import EXACT
from convert.runtime.arrays import named_outputs
from zoo.model import Model
from zoo.registry import families

# Families whose presets are all documents' models.
WHOLE = ("custom_layer", "convnet", "linear", "mlp")


def to_flax(model: Model, given: Arrays, dtype: str) -> dict[str, Any]:
    return {
        n: jnp.asarray(model.to_flax(n, a.astype(dtype) if a.dtype.kind == "f" else a))
        for n, a in given.items()
    }


@pytest.mark.parametrize(
    ("model", "upstream", "name"),
    [
        pytest.param(
            families()[family],
            upstream,
            name,
            id=f"{family}-{name}",
            marks=[pytest.mark.slow] if upstream.make else [],  # these are large
        )
        for family, upstream in upstreams().items()
        for name in upstream.documents
    ],
)
def test_a_documents_checkpoint(
    model: Model, upstream: Upstream, name: str, tmp_path: Path
) -> None:
    document = upstream.documents[name]
    module = load(document.make(), model, document.config)
    given = model.inputs(document.config) if document.inputs is None else document.inputs
    rough, exact = every_output(module, given, upstream.call)
    assert all(np.abs(x).max() > 0.01 for x in exact.values())

    path, flax = tmp_path / "document.pt", tmp_path / "document.flax"
    torch.save(module.state_dict(), path)
    made = convert.convert(path)
    assert Path(made.target).name == flax.name
    assert made.model == model.name
    assert model.configure(**made.config) == document.config
    assert "unknown" not in " ".join(made.notices)
    (identity,) = (i for i in zoo.identify(path) if i.tree == "torch")
    assert identity.config == document.config
    assert identity.presets == [n for n, c in model.presets.items() if c == document.config]
    assert not identity.unknown

    mine = zoo.load(path, framework="torch")
    with torch.no_grad():
        all_same(named_outputs(mine(**tensors(given))), rough, exact)
    narrow = to_flax(model, given, "float32")
    for source in (path, flax):
        loaded = zoo.load(source, framework="flax")
        assert getattr(loaded, "config", document.config) == document.config
        got = nnx.jit(lambda m, x: m(**x))(loaded, narrow)
        all_same(named_outputs(got), rough, exact)
    with jax.enable_x64(True):
        wide = zoo.load(flax, framework="flax", param_dtype="float64")
        got = named_outputs(nnx.jit(lambda m, x: m(**x))(wide, to_flax(model, given, "float64")))
    for output, x in got.items():
        assert x.dtype == jnp.float64
        assert np.abs(np.asarray(x) - exact[output]).max() <= EXACT * np.abs(exact[output]).max()

    back = convert.convert(flax, tmp_path / "back.pt")
    assert back.model == made.model
    returned = torch.load(tmp_path / "back.pt", weights_only=True)
    if upstream.make is None:  # what is written after a paper has an order of its own
        assert list(returned) == list(module.state_dict()), "order of the document's class"
    assert all((returned[n] == t).all() for n, t in module.state_dict().items())
    module.load_state_dict(returned, strict=True)


@pytest.mark.parametrize("family", WHOLE)
def test_every_preset_has_its_document(family: str) -> None:
    assert upstreams()[family].documents.keys() == families()[family].presets.keys()
