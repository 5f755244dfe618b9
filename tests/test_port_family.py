"""A port as a family of the zoo: what holds for every family holds for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import test_models
from port_models import Decoder, Drawn, Pooled, Residual
from torch import nn

import convert
import zoo
import zoo.models
from convert.live.layout_source import layout_source
from convert.live.port_family import check_family, save_family
from zoo.containers.errors import UsageError
from zoo.model import Model
from zoo.registry import families

CALLS = {
    "toy_pooled": (Pooled, np.random.default_rng(0).normal(size=(2, 3, 6, 6)).astype("float32")),
    "toy_decoder": (Decoder, np.arange(24).reshape(2, 12) % 50),
}


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Model]]:
    """Two ports among the families of the registry."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("families")
        patch.syspath_prepend(str(folder))
        for name, (factory, x) in CALLS.items():
            port = convert.port(factory, x, image_axes="first", verify=False)
            written = save_family(port, factory, folder / name)
            assert [p.name for p in written] == [
                "__init__.py", "config.py", "layout.py", "model_torch.py", "model_flax.py",
                "README.md", "NOTICE",
            ]  # fmt: skip
        patch.setattr(zoo.models, "__path__", [*zoo.models.__path__, str(folder)])
        families.cache_clear()
        try:
            yield {name: families()[name] for name in CALLS}
        finally:
            families.cache_clear()


@pytest.mark.parametrize("name", CALLS)
def test_it_has_the_layout_of_both_modules(toys: dict[str, Model], name: str) -> None:
    model = toys[name]
    config = model.presets[name]
    test_models.test_layout_is_the_torch_state_dict(model, config)
    test_models.test_layout_is_the_nnx_state(model, config)
    test_models.test_parameters_are_counted_as_torch_counts_them(model, config)
    test_models.test_layout_survives_json(model, config)
    for tree in ("torch", "nnx", "linen"):
        test_models.test_names_and_shapes_identify_it(model, config, tree)
    test_models.test_fresh_weights_follow_from_seed_and_name_alone(model, config)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_its_twins_agree_and_train_alike(toys: dict[str, Model], name: str) -> None:
    model = toys[name]
    test_models.test_twins_agree_layer_by_layer(model, model.presets[name])
    test_models.test_twins_have_the_same_gradients_and_train_alike(model, model.presets[name])


def test_alike_parts_are_loops(toys: dict[str, Model]) -> None:
    config = toys["toy_decoder"].presets["toy_decoder"]
    source = layout_source(toys["toy_decoder"].layout_of(config), "toy_decoder")
    assert "    for i in range(2):\n" in source
    assert 'from linear(f"h.{i}.c_proj", 32, 32)' in source
    assert 'tie("head.weight", (50, 32), "emb.weight")' in source


def test_what_no_word_says_is_written_whole() -> None:
    layout = convert.layout_of(nn.ModuleDict({"up": nn.ConvTranspose1d(2, 3, 4)}))
    source = layout_source(layout, "toy")
    assert "from zoo.layout.ops import" in source
    names: dict[str, object] = {}
    exec(source.replace("from toy.config import Config", "Config = tuple"), names)
    assert tuple(names["layout"](())) == tuple(layout.entries)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "factory", "told"),
    [
        ("No-name", Residual, "no name for a family"),
        ("bert", Residual, "there is a family bert already"),
        ("here", Residual, "exists already"),
        ("toy", nn.Linear(1, 1), "one that is made"),
    ],
)
def test_what_cannot_be_a_family_is_refused(
    name: str, factory: object, told: str, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(UsageError, match=told):
        check_family(tmp_path / name, factory)


def test_a_family_has_torchs_axes(tmp_path: Path) -> None:
    port = convert.port(Pooled, CALLS["toy_pooled"][1], verify=False)
    with pytest.raises(UsageError, match="cannot be a family") as e:
        save_family(port, Pooled, tmp_path / "toy")
    assert any("image_axes='first'" in told for told in e.value.details)


def test_a_table_beside_the_source_is_no_family(tmp_path: Path) -> None:
    port = convert.port(Drawn, np.ones((2, 4), np.float32), verify=False)
    with pytest.raises(UsageError, match="tables that no expression gives"):
        save_family(port, Drawn, tmp_path / "toy")
    assert not list(tmp_path.iterdir())
