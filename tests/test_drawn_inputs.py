"""`--inputs auto`: what is drawn for whom, and what is said where nothing can be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from nets import nnx_net, torch_net
from torch import nn

import convert
from convert.cli.main import cli
from convert.compare.blind_inputs import unexercised_inputs, unexercised_layers
from convert.compare.drawn_inputs import draw_inputs
from convert.runtime.call import Call
from convert.runtime.torch_calls import trace_torch
from zoo.containers.errors import UsageError


class Anything:
    """Takes everything, by these names."""

    def __call__(self, x: Any, attention_mask: Any = None, lengths: Any = None, **kw: Any) -> Any:
        return x


def takes_all(call: Call) -> None:
    """A Flax module that refuses nothing."""


def drawn(module: nn.Module, flax: Any = None, accepts: Any = takes_all, seed: int = 0) -> Any:
    """The arrays by name, what is told, and the call."""
    call, told = draw_inputs(module.eval(), flax or Anything(), seed, accepts)
    names = call.names(module.forward)
    return {names[path]: x for path, x in call.arrays().items()}, told, call


class Encoder(nn.Module):
    def __init__(self, positions: int = 13) -> None:
        super().__init__()
        self.positions = nn.Embedding(positions, 8)
        self.table = nn.Embedding(40, 8, padding_idx=3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        x = self.table(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        mask = None if attention_mask is None else attention_mask == 0
        return self.attention(x, x, x, key_padding_mask=mask)[0]


def test_tokens_cover_the_vocabulary_and_masks_mask() -> None:
    module = Encoder()
    arrays, (told,), call = drawn(module)
    ids, mask = arrays["input_ids"], arrays["attention_mask"]
    assert set(ids.flat) == set(range(40)), "more of them in a batch, so that all ids have room"
    assert ((ids == 3) == (mask == 0)).all()
    lengths = mask.sum(1)
    assert len(set(lengths)) > 2
    assert 0 < lengths.min() < lengths.max() < ids.shape[1]
    assert told.startswith("inputs were drawn (seed 0): input_ids int64 (5, 13), 0 to 39; ")
    assert "attention_mask int64 (5, 13), 0 to 1" in told
    trace = trace_torch(module, call)
    assert not list(unexercised_inputs(call, call.names(module.forward)))
    assert not list(unexercised_layers(module, call, trace))


def test_the_seed_decides() -> None:
    first, again, other = (drawn(Encoder(), seed=s)[0]["input_ids"] for s in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("positions", [6, 20])
def test_as_many_steps_as_there_are_positions(positions: int) -> None:
    assert drawn(Encoder(positions))[0]["input_ids"].shape[1] == positions


def test_graphs_and_states() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nodes, self.edges = nn.Linear(5, 4), nn.Linear(6, 4)

        def forward(self, x: Any, edge_index: Any, edge_attr: Any) -> Any:
            return self.nodes(x)[edge_index[0]] + self.edges(edge_attr)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)
            self.cells = nn.LSTM(4, 3, 2)

        def forward(self, data: Any, h0: Any, c0: Any) -> Any:
            return self.cells(self.table(data), (h0, c0))[0]

    arrays, _, _ = drawn(Graph())
    assert arrays["edge_index"].shape == (2, 12)
    assert arrays["edge_attr"].shape == (12, 6)
    arrays, _, _ = drawn(Model())
    assert arrays["data"].shape == (13, 3), "steps first, as its cells have them"
    assert arrays["h0"].shape == (2, 3, 3)


def test_lengths_are_of_what_is_padded() -> None:
    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 2, 5)

        def forward(self, wave: Any, lengths: Any) -> Any:
            return self.conv(wave[:, None]) * (lengths > 0)[:, None, None]

    assert drawn(Wave())[0]["lengths"].tolist() == [32, 30, 28]


def test_images_are_odd_where_both_take_that() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1))
    assert drawn(net)[0]["input"].shape == (3, 3, 33, 37)

    def even(call: Call) -> None:
        if call.args[0].shape[-1] % 2:
            raise UsageError("odd sizes", "give even ones")

    arrays, told, _ = drawn(net, accepts=even)
    assert arrays["input"].shape == (3, 3, 32, 48)
    assert "the Flax module refused what torch takes: input float32 (3, 3, 33, 37)" in told[1]
    fixed = nn.Sequential(nn.Conv2d(1, 2, 5), nn.Flatten(), nn.Linear(2 * 24 * 24, 3))
    assert drawn(fixed)[0]["input"].shape == (3, 1, 28, 28)


def test_sizes_that_the_module_states() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image_size = (12, 20)
            self.patches = nn.Conv2d(3, 4, 4, stride=4)
            self.places = nn.Parameter(torch.randn(4, 3, 5))

        def forward(self, pixel_values: Any) -> Any:
            return self.patches(pixel_values) + self.places

    assert drawn(Patches())[0]["pixel_values"].shape == (3, 3, 12, 20)


class Reader(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.cells = nn.LSTM(5, 4, batch_first=batch_first)

    def forward(self, x: Any, lengths: Any) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, self.cells.batch_first)
        return self.cells(packed)[1][0]


@pytest.mark.parametrize("batch_first", [True, False])
def test_sequences_of_different_lengths(batch_first: bool) -> None:
    arrays, _, _ = drawn(Reader(batch_first))
    assert arrays["x"].shape == ((3, 13, 5) if batch_first else (13, 3, 5))
    assert arrays["lengths"].tolist() == [12, 10, 8]


def test_several_inputs_and_what_the_first_layer_takes() -> None:
    class Diffusion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classes = nn.Embedding(5, 4)
            self.conv = nn.Conv2d(2, 4, 3, padding=1)

        def forward(self, x: Any, t: Any, labels: Any) -> Any:
            bias = self.classes(labels) + t[:, None]
            return self.conv(x) + bias[:, :, None, None]

    arrays, _, _ = drawn(Diffusion())
    assert arrays["x"].shape[1] == 2
    assert arrays["t"].shape == arrays["labels"].shape == (5,)
    assert set(arrays["labels"]) == set(range(5))
    assert drawn(nn.Sequential(nn.Linear(7, 2)))[0]["input"].shape == (3, 7)


def test_where_nothing_can_be_drawn() -> None:
    class Odd(nn.Module):
        def forward(self, x: Any) -> Any:
            raise RuntimeError("only today's weather")

    with pytest.raises(UsageError, match="no inputs could be drawn for Odd \\(x\\)") as caught:
        drawn(Odd())
    assert "--inputs inputs.npz" in caught.value.advice
    assert any("only today's weather" in d for d in caught.value.details)
    with pytest.raises(UsageError, match="samples of their own"):
        convert.verify("a.safetensors", "b.safetensors", inputs="auto")


def test_a_pair_is_verified_on_drawn_inputs() -> None:
    report = convert.verify(torch_net(), nnx_net(), "auto")
    assert report.verdict == "same"
    assert report.blind_spots == []
    assert "inputs were drawn (seed 0): x float32 (3, 3, 33, 37)" in report.notices[0]


def test_on_the_command_line(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    (tmp_path / "drawn_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(
        cli, ["verify", "drawn_nets.py:ours", "drawn_nets.py:theirs", "--inputs", "auto"]
    )
    assert ran.exit_code == 0, ran.output
    assert "note: inputs were drawn (seed 0): input float32 (3, 3)" in ran.stderr


NETS = """
import torch
from flax import nnx

ours = torch.nn.Sequential()
ours.add_module("fc", torch.nn.Linear(3, 2))


class Theirs(nnx.Module):
    def __init__(self):
        self.fc = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        self.fc.kernel[...] = ours.fc.weight.detach().numpy().T
        self.fc.bias[...] = ours.fc.bias.detach().numpy()

    def __call__(self, x):
        return self.fc(x)


theirs = Theirs()
"""
