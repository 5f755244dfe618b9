"""Recorded computations: they give torch's values again, and say where each step stands."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from convert.program.record import Goal, Recording, record
from convert.program.replay import changed, replay
from convert.runtime.call import Call
from convert.runtime.torch_calls import trace_torch
from convert.runtime.torch_module import replica


class Attention(nn.Module):
    """Grouped attention with a mask written in place, and a table of complex rotations."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        angles = torch.outer(torch.arange(5.0), torch.tensor([1.0]))
        self.register_buffer("freqs", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        B, T, _ = x.shape
        q = turned(self.q(x).view(B, T, 4, 2), self.freqs)
        k, v = self.kv(x).view(B, T, 2, 2, 2).unbind(2)
        k = turned(k, self.freqs).repeat_interleave(2, 2)
        v = v.repeat_interleave(2, 2)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(2)
        scores.masked_fill_(~seen[:, None, None], -1e9)
        scores += torch.full((T, T), -torch.inf).triu(1)
        mixed = functional.softmax(scores, dim=-1) @ v.transpose(1, 2)
        return self.out(mixed.transpose(1, 2).reshape(B, T, 8))


def turned(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs[:, None]).flatten(-2)


class Fused(nn.Module):
    """Everything that is written out: fused attention, norms, recurrent layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.group = nn.LayerNorm(6), nn.GroupNorm(3, 6)
        self.rms, self.batch = nn.RMSNorm(6), nn.BatchNorm1d(6)
        self.attention = nn.MultiheadAttention(6, 3, batch_first=True)
        self.lstm = nn.LSTM(6, 3, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(6, 6, batch_first=True)
        self.rnn = nn.RNN(6, 6, nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.batch(self.group(self.layer(x).mT).sigmoid()).mT + self.rms(x)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = x + self.attention(x, x, x, attn_mask=mask)[0]
        q = x.view(2, 5, 3, 2).transpose(1, 2)
        x = x + functional.scaled_dot_product_attention(q, q, q, is_causal=True).flatten(1).view(
            2, 5, 6
        )
        x = self.gru(self.lstm(x)[0])[0]
        return functional.normalize(self.rnn(x)[0], dim=-1)


def recorded(module: nn.Module, call: Call, target: Goal, fixed: list[str]) -> Recording:
    known = trace_torch(module, call, "float64").by_key()
    return record(replica(module, "float64"), call, "float64", known, fixed, target)


WHOLE = Goal(("", 0), "output", "")


@pytest.mark.parametrize(("module", "inputs"), [
    (Attention, {"x": (2, 5, 8), "seen": None}), (Fused, {"x": (2, 5, 6)}),
])  # fmt: skip
def test_a_replay_gives_torchs_values_again(
    module: type[nn.Module], inputs: dict[str, tuple[int, ...] | None]
) -> None:
    net = module().eval()
    rng = np.random.default_rng(0)
    seen = np.array([[True] * 5, [True, True, True, False, False]])
    given = {k: seen if s is None else rng.normal(size=s) for k, s in inputs.items()}
    found = recorded(net, Call(kwargs=given), WHOLE, [])
    values = replay(found.program, found.leaves)
    with torch.no_grad():
        right = replica(net, "float64")(**{k: torch.from_numpy(v) for k, v in given.items()})
    torch.testing.assert_close(values[found.program.target], right, rtol=1e-12, atol=1e-12)
    opened = {o.name for o in found.program.operations}
    assert not opened & {"scaled_dot_product_attention", "layer_norm", "group_norm", "lstm", "gru"}


def test_layers_stay_closed_and_steps_have_a_place() -> None:
    net = Attention().eval()
    call = Call(args=(np.random.default_rng(0).normal(size=(2, 5, 8)), np.ones((2, 5), bool)))
    target = Goal(("out", 0), "input", "input")
    found = recorded(net, call, target, ["q", "kv", "out"])
    assert {"q", "kv"} <= {leaf.name for leaf in found.program.leaves.values()}
    softmax = next(o for o in found.program.operations if o.name == "softmax")
    assert softmax.site is not None
    assert softmax.site.text == "functional.softmax(scores, dim=-1)"
    assert softmax.site.function == "Attention.forward"
    # The function is called twice: one place, two calls.
    twice = [o for o in found.program.operations if o.name == "view_as_complex"]
    assert twice[0].site is not None
    assert twice[1].site is not None
    assert twice[0].site.position == twice[1].site.position
    assert twice[0].site.calls != twice[1].site.calls


def test_what_an_operation_writes_into_stays_as_it_was() -> None:
    net = Attention().eval()
    call = Call(args=(np.random.default_rng(0).normal(size=(2, 5, 8)), np.zeros((2, 5), bool)))
    found = recorded(net, call, WHOLE, [])
    values = replay(found.program, found.leaves)
    held = {k: v.clone() for k, v in values.items()}
    index = next(i for i, o in enumerate(found.program.operations) if o.name == "masked_fill")
    made = changed(found.program, values, {index: lambda at: at.args[0]})
    assert not torch.equal(made, values[found.program.target])
    assert all(torch.equal(values[k], v) for k, v in held.items())
