"""What a comparison could not see: each kind is listed where it is so, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import linen, nnx
from nets import images, linen_net, nnx_net, torch_net
from torch import nn

import convert
from convert.compare.blind_inputs import unexercised_inputs, unexercised_layers
from convert.compare.blind_spots import KINDS, BlindSpot
from convert.compare.blind_training import training_attributes
from convert.compare.blind_values import unseen_values
from convert.compare.html import render
from convert.compare.report import Report
from convert.compare.summary_text import report as show
from convert.compare.torch_side import TorchSide
from convert.matching.pair import Pair
from convert.matching.pairing import pair_traces
from convert.runtime.call import Call
from convert.runtime.flax_calls import record
from convert.runtime.flax_module import as_flax, flax_module
from convert.runtime.torch_calls import trace_torch

RNGS = nnx.Rngs(0)
IDS = np.array([[1, 2, 3], [4, 5, 1]])


def kinds(spots: Any) -> list[str]:
    return [s.kind for s in spots]


# --- Values and gradients ---


class Hiding(nn.Module):
    """A branch that begins at zero, experts of which one is used, tables, and what is detached."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 4, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(12, 4))
        self.stack = nn.Parameter(torch.randn(3, 4, 4))
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.branch = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        nn.init.zeros_(self.branch[1].weight)
        nn.init.zeros_(self.branch[1].bias)
        self.frozen = nn.Linear(4, 4)
        self.dead = nn.Linear(4, 4)  # units that are not active for these inputs

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids) + self.positions[: ids.shape[1]]
        x = self.experts[0](x) @ self.stack[1]
        x = x + self.frozen(x).detach() + torch.relu(self.dead(x) - torch.tensor([1e3, 0, 0, 0]))
        return x + self.branch(x)


def spots_of(module: nn.Module, call: Call, level: str) -> list[BlindSpot]:
    side = TorchSide(module, call)
    run = side.run("float64", backward=level != "outputs")
    return list(unseen_values(side, run, set(run.intermediates), level))


def test_what_no_output_depends_on() -> None:
    call = Call((IDS,))
    first, second = spots_of(Hiding(), call, "gradients")
    assert first.kind == "no dependence"
    assert first.names == ("experts.1", "branch.0"), "layers; what is detached is seen in outputs"
    assert second.kind == "rows not reached"
    assert set(second.names) == {"table.weight", "positions", "stack"}
    for told in ("table.weight (3 of 9)", "positions (9 of 12)", "stack (2 of 3)"):
        assert told in second.sentence
    (zero,) = spots_of(Hiding(), call, "outputs")
    assert zero.kind == "zero values"
    assert zero.names == ("branch.1", "branch")
    assert zero.sentence.count("dependence not examined") == 1


def test_outputs_that_are_zero_are_said_at_every_level() -> None:
    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> Any:
            return self.fc(x), 0 * x

    for level in ("outputs", "gradients"):
        (spot,) = spots_of(Zero(), Call((np.ones((2, 3), np.float32),)), level)
        assert (spot.kind, spot.names) == ("zero values", ("output.1",))


# --- Inputs ---


def test_inputs_that_exercise_nothing() -> None:
    x = np.ones((2, 5), np.int64)
    named = {n: n for n in ("x", "attention_mask", "flags", "lengths")}

    def told(**arrays: Any) -> list[str]:
        found = list(unexercised_inputs(Call(kwargs=arrays), named))
        assert set(kinds(found)) <= {"inputs"}
        return [n for s in found for n in s.names]

    some = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    assert told(x=x, attention_mask=x) == ["attention_mask"]
    assert told(x=x, flags=some == 2, lengths=np.array([5, 5])) == ["flags", "lengths"]
    assert told(x=x, attention_mask=some, flags=some == 1, lengths=np.array([5, 3])) == []
    assert told(x=x[:1], attention_mask=some[:1]) == ["x", "attention_mask"], "a batch of one"


def layers_told(module: nn.Module, *arrays: np.ndarray) -> list[tuple[str, ...]]:
    call = Call(arrays)
    return [s.names for s in unexercised_layers(module, call, trace_torch(module, call))]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4, padding_idx=0)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        return self.attention(x, x, x)[0]


def test_padding_and_sequences_of_one() -> None:
    padded = np.where(IDS == 1, 0, IDS)
    assert layers_told(Attending(), IDS) == [("table",)]
    assert layers_told(Attending(), padded) == []
    assert layers_told(Attending(), padded[:, :1]) == [("table", "attention")]
    cells = nn.Sequential(nn.GRU(3, 4))
    assert layers_told(cells, np.ones((1, 5, 3), np.float32)) == [("0",)]
    assert layers_told(cells, np.ones((5, 1, 3), np.float32)) == []


def test_sizes_that_divide() -> None:
    pooling = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2))
    fixed = nn.Sequential(*pooling, nn.Flatten(), nn.Linear(2 * 4 * 3, 5))
    even, odd = (np.ones((2, 1, 8, w), np.float32) for w in (6, 7))
    assert layers_told(pooling, even) == [("1",)]
    assert layers_told(pooling, odd) == [], "what is left over tells"
    assert layers_told(fixed, even) == [], "it takes no other size"
    assert layers_told(nn.Sequential(nn.MaxPool2d(3, 2, 1)), odd[:, :, :7]) == [("0",)]


# --- What acts in training only ---


class Drops(nn.Module):
    def __init__(self, p: float = 0.1, functional: bool = False) -> None:
        super().__init__()
        self.functional = functional
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 3)
        self.norm, self.bn = nn.LayerNorm(4), nn.BatchNorm1d(4)
        self.p = p
        if not functional:
            self.drop1, self.drop2 = nn.Dropout(p), nn.Dropout(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.norm(self.fc1(x)))
        if self.functional:
            x = nn.functional.dropout(x, self.p, self.training)
            return nn.functional.dropout(self.fc2(x), self.p, self.training)
        return self.drop2(self.fc2(self.drop1(x)))


class DropsNnx(nnx.Module):
    def __init__(
        self, p: float = 0.1, q: float = 0.1, early: bool = False, momentum: float = 0.9
    ) -> None:
        self.fc1, self.fc2 = nnx.Linear(3, 4, rngs=RNGS), nnx.Linear(4, 3, rngs=RNGS)
        self.norm = nnx.LayerNorm(4, rngs=RNGS)
        self.bn = nnx.BatchNorm(4, momentum=momentum, rngs=RNGS)
        self.drop1, self.drop2 = nnx.Dropout(p, rngs=RNGS), nnx.Dropout(q, rngs=RNGS)
        self.early = early

    def __call__(self, x: Any) -> Any:
        x = self.fc1(x)
        x = self.bn(self.norm(self.drop1(x) if self.early else x))
        return self.drop2(self.fc2(x if self.early else self.drop1(x)))


class DropsLinen(linen.Module):
    p: float = 0.1

    @linen.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = linen.LayerNorm(name="norm")(linen.Dense(4, name="fc1")(x))
        x = linen.BatchNorm(not train, momentum=0.9, name="bn")(x)
        x = linen.Dropout(self.p, deterministic=not train)(x)
        return linen.Dropout(0.1, deterministic=not train)(linen.Dense(3, name="fc2")(x))


def attributes(ours: nn.Module, theirs: Any, level: str = "outputs") -> list[str]:
    call = Call((np.ones((2, 3), np.float32),))
    flax = as_flax(theirs, None)
    pair = Pair(ours.eval(), flax, call, call)
    side = flax_module(flax, "float32")
    traces = trace_torch(pair.torch, call), record(side, call)
    found = pair_traces(pair, traces[0], side, traces[1])
    spots = list(training_attributes(pair, found.layers, side.modules, traces, level))
    assert set(kinds(spots)) <= {"training attribute"}
    return [s.sentence for s in spots]


def test_dropout_that_differs() -> None:
    assert attributes(Drops(), DropsNnx()) == []
    assert attributes(Drops(0.0), DropsNnx(0.0, 0.0)) == []
    (told,) = attributes(Drops(), DropsNnx(p=0.5), "training")
    assert told == "dropout rates differ: drop1 0.1 in torch and 0.5 in Flax"
    (told,) = attributes(Drops(), DropsNnx(q=0.0))
    assert told == (
        "dropout differs: torch drops at 2 places (0.1: drop1, drop2), Flax at 1 place (0.1: drop1)"
    )
    (told,) = attributes(Drops(), DropsNnx(early=True))
    assert told == "dropout at another place in Flax: drop1"
    channels = Drops()
    channels.drop1 = nn.Dropout1d(0.1)
    (told,) = attributes(channels, DropsNnx())
    assert told == "dropout of whole channels in torch (drop1), of single values in Flax"


def test_functional_dropout_is_dropout() -> None:
    assert attributes(Drops(functional=True), DropsNnx()) == []
    (told,) = attributes(Drops(functional=True), DropsNnx(p=0.5))
    assert "0.1 in torch and 0.5 in Flax" in told


def test_dropout_in_linen() -> None:
    def made(p: float) -> Any:
        module = DropsLinen(p)
        return module, module.init(jax.random.key(0), np.ones((2, 3), np.float32))

    assert attributes(Drops(), made(0.1)) == []
    (told,) = attributes(Drops(), made(0.2))
    assert told == "dropout rates differ: drop1 0.1 in torch and 0.2 in Flax"


def test_momenta_below_training() -> None:
    (told,) = attributes(Drops(), DropsNnx(momentum=0.99), "gradients")
    assert told == (
        "momenta of running statistics differ: bn 0.1 in torch, which is 0.9 in Flax's terms, "
        "and there it is 0.99"
    )
    assert attributes(Drops(), DropsNnx(momentum=0.99), "training") == []


# --- Where they are said ---


@pytest.mark.parametrize("make", [nnx_net, linen_net], ids=["nnx", "linen"])
def test_a_right_pair_has_none(make: Callable[[], Any]) -> None:
    report = convert.verify(torch_net(), make(), images(), "outputs")
    assert report.verdict == "same"
    assert report.blind_spots == []
    assert report.to_dict()["blind_spots"] == []


class Swapped(nnx.Module):
    def __init__(self, ours: Any) -> None:
        self.kernel = nnx.Param(np.asarray(ours.fc.weight.detach().numpy().T))
        self.bias = nnx.Param(np.asarray(ours.fc.bias.detach().numpy()))
        self.left = nnx.Param(np.ones(3, np.float32))

    def __call__(self, x: Any) -> Any:
        y = x.astype(np.float32) @ self.kernel[...].astype(np.float32)
        return (y + self.bias[...]).swapaxes(0, 1)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def test_they_are_said_in_the_first_lines(capsys: pytest.CaptureFixture[str]) -> None:
    ours: Any = Whole()
    report = convert.verify(ours, Swapped(ours), np.ones((2, 3, 4), np.float32), "outputs")
    assert report.verdict == "same"
    assert sorted(kinds(report.blind_spots)) == ["fitted axes", "float32 only", "no counterpart"]
    assert not report.notices, "each is said once"
    show(report)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "same, with 3 blind spots: Whole and Swapped"
    assert sum(line.startswith("  not seen: ") for line in lines[1:8]) == 3
    data = json.loads(report.to_json())["blind_spots"]
    assert data[0].keys() == {"kind", "names", "sentence"}
    assert [d["names"] for d in data if d["kind"] == "no counterpart"] == [["left"]]
    page = render(report)
    assert "Same, with 3 blind spots</h1>" in page
    assert all(s.kind in page for s in report.blind_spots)


def test_many_are_cut_short(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("a", "b", "outputs")
    report.blind_spots = [BlindSpot("random", (str(i),), f"spot {i}") for i in range(9)]
    show(report)
    out = capsys.readouterr().out
    assert "spot 5" in out
    assert "spot 6" not in out
    assert "  ... and 3 more" in out
    with pytest.raises(ValueError, match="no kind"):
        BlindSpot("else", (), "")


def test_the_document_lists_every_kind() -> None:
    text = (Path(__file__).parents[1] / "docs/report.md").read_text()
    assert [k for k in KINDS if f"| {k} |" not in text] == []


def test_images_lie_as_frameworks_have_them() -> None:
    """What follows the inputs, or is an image, is a notice; no blind spot."""
    ours: Any = nn.Sequential()
    ours.add_module("conv", nn.Conv2d(3, 4, 1))

    class Flax(nnx.Module):
        def __init__(self) -> None:
            self.conv = nnx.Conv(3, 4, (1, 1), rngs=RNGS)
            self.conv.kernel[...] = ours.conv.weight.detach().numpy().transpose(2, 3, 1, 0)
            self.conv.bias[...] = ours.conv.bias.detach().numpy()

        def __call__(self, x: Any) -> Any:
            return self.conv(x)

    report = convert.verify(ours, Flax(), images(), "outputs")
    assert report.verdict == "same"
    assert report.blind_spots == []
    assert any("is compared with Flax's" in n for n in report.notices)
