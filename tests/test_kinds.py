"""The table of kinds: held against both frameworks, and what a plugin may add."""

from __future__ import annotations

import dataclasses
import sys
from importlib.metadata import EntryPoint
from typing import Any

import flax.linen as nn
import pytest
import torch
from flax import nnx

from zoo import plugins, registry
from zoo.containers.errors import UsageError
from zoo.layout import kinds as table
from zoo.layout.kinds import BUILT_IN, Kind, Leaf, compatible, flax_kind, kinds, torch_kind

T = torch.nn
R = nnx.Rngs(0)
# torch layer, NNX layer of the same settings, Linen layer of the same settings
SAME = {
    "linear": (T.Linear(3, 5, bias=False), nnx.Linear(3, 5, use_bias=False, rngs=R), nn.Dense(5)),
    "conv2d": (
        T.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 2), dilation=2, groups=2),
        nnx.Conv(
            *(4, 6, (3, 2)),
            strides=(2, 2),
            padding=((1, 1), (2, 2)),
            kernel_dilation=(2, 2),
            feature_group_count=2,
            rngs=R,
        ),
        nn.Conv(6, (3, 2), strides=(2, 2), feature_group_count=2),
    ),
    "conv1d": (
        T.Conv1d(4, 6, 3, padding="same"),
        nnx.Conv(4, 6, (3,), strides=(1,), padding="SAME", kernel_dilation=(1,), rngs=R),
        nn.Conv(6, (3,)),
    ),
    "embedding": (T.Embedding(7, 4), nnx.Embed(7, 4, rngs=R), nn.Embed(7, 4)),
    "norm": (
        T.LayerNorm(6, eps=1e-3, bias=False),
        nnx.LayerNorm(6, epsilon=1e-3, use_bias=False, rngs=R),
        nn.LayerNorm(epsilon=1e-3),
    ),
    "batchnorm": (
        T.BatchNorm2d(6, eps=1e-3, momentum=0.1),
        nnx.BatchNorm(6, epsilon=1e-3, momentum=0.9, rngs=R),
        nn.BatchNorm(),
    ),
    "attention": (
        T.MultiheadAttention(8, 2, dropout=0.1),
        nnx.MultiHeadAttention(2, 8, dropout_rate=0.1, rngs=R),
        nn.MultiHeadDotProductAttention(2),
    ),
    "recurrent": (T.LSTM(3, 4), nnx.LSTMCell(3, 4, rngs=R), nn.LSTMCell(4)),
    "dropout": (T.Dropout(0.3), nnx.Dropout(0.3), nn.Dropout(0.3)),
}


@pytest.mark.parametrize("kind", SAME)
def test_settings_translate_both_ways(kind: str) -> None:
    ours, theirs, linen = SAME[kind]
    row = kinds()[kind]
    seen = 0
    assert torch_kind(ours) == kind
    assert compatible(kind, flax_kind(theirs))
    assert compatible(kind, flax_kind(linen))
    for a in row.attributes:
        name = next((n for n in a.torch_names if hasattr(ours, n)), None)
        if name is None or not hasattr(theirs, a.nnx):
            continue
        seen += 1
        value = getattr(ours, name)
        assert a.to_flax(value) == getattr(theirs, a.nnx), a
        if a.how != "present":
            assert a.to_torch(getattr(theirs, a.nnx)) == value, a
        if a.linen != "":
            assert hasattr(linen, a.linen or a.nnx), a
    assert seen


def test_every_row_names_what_the_frameworks_have() -> None:
    """A leaf is a tensor of torch's layer, its counterpart a variable of NNX's."""
    for kind, (ours, theirs, _) in SAME.items():
        if kind == "linear":
            ours, theirs = T.Linear(3, 5), nnx.Linear(3, 5, rngs=R)
        if kind == "norm":
            ours, theirs = T.LayerNorm(6), nnx.LayerNorm(6, rngs=R)
        for leaf, there in kinds()[kind].leaves.items():
            shape = tuple(getattr(ours, leaf).shape)
            axes = there.axes or range(len(shape))
            assert tuple(shape[a] for a in axes) == getattr(theirs, there.nnx).shape


@pytest.mark.parametrize(
    ("torch_name", "value", "back"),
    [("padding", "SOMEHOW", True), ("padding", ((0, 1),), True), ("momentum", None, False)],
)
def test_what_cannot_be_said_is_an_error(torch_name: str, value: Any, back: bool) -> None:
    row = kinds()["conv2d" if torch_name == "padding" else "batchnorm"]
    a = row.attribute(torch_name)
    with pytest.raises(ValueError, match="torch"):
        (a.to_torch if back else a.to_flax)(value)


class Rotary(T.Module):
    pass


class RotaryFlax(nnx.Module):
    pass


ROTARY = Kind("rotary", torch="Rotary", nnx="RotaryFlax", leaves={"theta": Leaf("theta_nnx")})
LINEAR = Kind("linear", torch=".*")
MINE = [ROTARY]


def fake(monkeypatch: pytest.MonkeyPatch, group: str, *points: tuple[str, str]) -> None:
    made = [EntryPoint(name, value, group) for name, value in points]
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: [p for p in made if p.group == group]
    )
    for cached in (table.kinds, table._rows, registry.families):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def fresh() -> Any:
    yield
    for cached in (table.kinds, table._rows, registry.families):
        cached.cache_clear()


def test_a_plugin_adds_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    points = ("one", f"{__name__}:ROTARY"), ("again", f"{__name__}:LINEAR")
    fake(monkeypatch, "zooconvert.kinds", *points, ("gone", "no_such_module:KIND"))
    with pytest.warns(UserWarning, match="the plugin") as told:
        assert list(kinds()) == [*(k.name for k in BUILT_IN), "rotary"]
    assert torch_kind(Rotary()) == "rotary"
    assert flax_kind(RotaryFlax()) == "rotary"
    assert compatible("rotary", "rotary")
    assert torch_kind(T.Linear(2, 2)) == "linear"
    assert [str(w.message).partition(" (")[0] for w in told] == [
        "the plugin again",
        "the plugin gone",
    ]


def test_a_plugin_may_give_several_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "zooconvert.kinds", ("many", f"{__name__}:MINE"))
    assert kinds()["rotary"] is ROTARY


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import zoo.ops\n", "imports zoo.ops, which is gone: import zoo.layout.ops"),
        ("from zoo.layout import KINDS\n", "imports KINDS from zoo.layout, which is gone"),
        (
            "import zoo\nMODEL = zoo.Model(name='old', taps=())\n",
            "gives Model a field taps, which is gone: delete it; see docs/adding-a-model.md",
        ),
        ("import zoo\nMODEL = zoo.Model(name='old')\n", "lacks fields that a Model has today"),
        ("1 / 0\n", "is broken: division by zero"),
        ("MODEL = 3\n", "gives 3, which is not a zoo.Model"),
    ],
)
def test_an_old_plugin_is_told_what_to_edit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, source: str, told: str
) -> None:
    (tmp_path / "old_plugin.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "old_plugin", raising=False)
    fake(monkeypatch, "zooconvert.models", ("old", "old_plugin:MODEL"))
    with pytest.warns(UserWarning, match=told) as warned:
        assert "linear" in registry.families()
    assert len(warned) == 1


def test_a_twin_that_takes_taps_is_told_to_delete_it() -> None:
    class Old:
        def __call__(self, x: Any, taps: bool = False) -> Any: ...

    with pytest.warns(UserWarning, match="still takes `taps`"):
        plugins.warn_of_taps(Old, "old:Old")
    gone = ModuleNotFoundError("No module named 'zoo.nn.taps'", name="zoo.nn.taps")
    assert plugins.edit(gone) == (
        "imports zoo.nn.taps, which is gone: delete `taps` from its models; "
        "see docs/adding-a-model.md"
    )


def test_a_twin_of_an_earlier_zoo_names_the_edit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "old_twin.py").write_text("from zoo.layout import KINDS\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "old_twin", raising=False)
    old = dataclasses.replace(registry.get("bert").model, torch="old_twin:Net")
    with pytest.raises(UsageError, match="old_twin imports KINDS from zoo"):
        old.definition("torch")
