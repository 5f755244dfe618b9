"""Traces, pairs and walks: what is right is left in peace, and modules stay as they were."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fault_modules import (
    RIGHT,
    arrays,
    block_pair,
    encoder_pair,
    reader_pair,
    seeded,
    sequential_pair,
)
from fault_plants import behaviour, setting, twins
from faults import FAULTS
from flax import nnx
from support import every_family
from torch import nn

from convert.diagnose.find import first_divergence
from convert.matching.pair import Pair
from convert.matching.pairing import pair_modules
from convert.runtime.arrays import named_outputs
from convert.runtime.call import Call
from convert.runtime.flax_calls import _eager, record, trace_flax
from convert.runtime.flax_module import flax_module
from convert.runtime.torch_calls import trace_torch
from zoo import probe
from zoo.checkpoint.apply import apply
from zoo.containers.errors import UsageError
from zoo.layout import Layout
from zoo.model import Config, Model


@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_a_right_pair_of_users_modules_has_no_divergence(
    make: Callable[[], Pair], mode: Any
) -> None:
    found = first_divergence(make(), mode)
    if mode == "backward" and make is block_pair:  # whose tied output Flax holds as a copy
        assert (found.cause, found.layer) == ("tied", "embed")
    else:
        assert found is None


@every_family()
def test_the_zoos_twins_have_no_divergence(model: Model, config: Config) -> None:
    """Forward in float32, then backward."""
    tiny = next(name for name, c in model.tiny.items() if c == config)
    assert first_divergence(twins(model.name, tiny), "backward") is None


@pytest.mark.parametrize(("family", "tiny"), [("bert", "masked_lm"), ("recurrent", "gru")])
def test_twins_have_none_in_float64(family: str, tiny: str) -> None:
    """Which "forward" adds where float32 shows nothing."""
    assert first_divergence(twins(family, tiny), "forward") is None


def test_twins_in_training_have_none_either() -> None:
    assert first_divergence(twins("resnet", "basic", train=True), "training") is None
    dropping = twins("bert", "encoder", train=True, hidden_dropout_prob=0.3)
    assert first_divergence(dropping, "training") is None


def test_torch_is_traced_in_order_and_left_alone() -> None:
    module = seeded(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))).train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state = torch.get_rng_state()
    trace = trace_torch(module, Call((probe.normal("x", (5, 3)),)))
    assert [(c.name, c.kind) for c in trace.calls] == [
        ("", "Sequential"), ("0", "Linear"), ("1", "BatchNorm1d"), ("2", "Dropout"),
    ]  # fmt: skip
    assert trace.calls[1].inputs["input"].shape == (5, 3)
    assert (trace.calls[2].inputs["input"] == trace.calls[1].outputs[""]).all()
    assert trace.calls[0].end > trace.calls[3].end
    assert all((before[k] == v).all() for k, v in module.state_dict().items())
    assert module.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert (state == torch.get_rng_state()).all()


def test_nnx_is_traced_and_left_alone() -> None:
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.dense = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

        def __call__(self, x: Any) -> Any:
            return self.dropout(self.norm(self.dense(x)))

    module = Net()
    call, own = nnx.Linear.__call__, nnx.Linear.__dict__["__call__"]
    before = jax.tree.leaves(nnx.to_pure_dict(nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat))))
    count = int(module.dropout.rngs.count[...])
    trace = trace_flax(module, Call((probe.normal("x", (5, 3)),)))
    assert [c.name for c in trace.calls] == ["", "dense", "norm", "dropout"]
    assert nnx.Linear.__call__ is call
    assert nnx.Linear.__dict__["__call__"] is own
    after = jax.tree.leaves(nnx.to_pure_dict(nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat))))
    assert all((a == b).all() for a, b in zip(before, after, strict=True))
    assert int(module.dropout.rngs.count[...]) == count


class Twice(nnx.Module):
    """A layer that is called twice; `asks`: code that needs numbers, which tracers have not."""

    def __init__(self, asks: bool) -> None:
        self.dense, self.asks = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), asks

    def __call__(self, x: Any, scale: Any) -> Any:
        first = self.dense(x)
        more = float(first.sum()) * 0 if self.asks else 0
        return {"z": self.dense(first) * scale + more, "a": (first, 2)}


@pytest.mark.parametrize("asks", [False, True])
def test_a_compiled_recording_is_the_eager_one(asks: bool) -> None:
    side = flax_module(Twice(asks), "float32")
    call = Call((probe.normal("x", (5, 3)), np.float32(3)))
    traces = record(side, call), _eager(side, call)
    assert traces[0].as_called is not asks
    assert not traces[1].as_called
    kept = [
        [
            (c.key, c.kind, c.order, c.end, c.parent, list(c.inputs), list(c.outputs))
            for c in t.calls
        ]
        for t in traces
    ]
    assert kept[0] == kept[1]
    assert [k[0] for k in kept[0]] == [("", 0), ("dense", 0), ("dense", 1)]
    for one, other in zip(*(t.calls for t in traces), strict=True):
        for name, x in (one.inputs | one.outputs).items():
            np.testing.assert_allclose(x, (other.inputs | other.outputs)[name], rtol=1e-5)
    outputs = [named_outputs(t.output) for t in traces]
    assert list(outputs[0]) == list(outputs[1]) == ["output.z", "output.a.0", "output.a.1"]
    side.values = {name: np.asarray(x) * 0 for name, x in side.values.items()}
    assert not record(side, call).by_key()["dense", 1].outputs[""].any(), "of other values"


def test_what_runs_inside_jit_is_noted() -> None:
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.jit(linen.Dense)(4)(x)

    x = jnp.ones((2, 3, 4))
    trace = trace_flax(Net().bind(Net().init(jax.random.key(0), x)), Call((np.asarray(x),)))
    assert any("inside jit, scan or vmap" in n for n in trace.notes)
    assert trace.calls[0].name == ""


def test_layers_are_paired_by_order_where_names_say_nothing() -> None:
    pair = sequential_pair()
    found = {p.torch: (p.flax, p.why) for p in pair_modules(pair).layers}
    assert found == {
        "": ("", "name"), "0": ("Conv_0", "order"), "4": ("Dense_0", "order"),
        "6": ("Dense_1", "order"),
    }  # fmt: skip


def test_the_users_pairs_win() -> None:
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.Dense(4, name="b")(linen.Dense(4, name="a")(x))

    torch_net = seeded(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    w = arrays(torch_net)
    params = {n: {"kernel": w[f"{i}.weight"].T, "bias": w[f"{i}.bias"]} for i, n in enumerate("ab")}
    x = probe.normal("x", (2, 4)).astype(np.float32)
    call = Call((x,))
    pair = Pair(torch_net, Net().bind({"params": params}), call, call)
    assert [(p.torch, p.flax) for p in pair_modules(pair).layers] == [
        ("", ""),
        ("0", "a"),
        ("1", "b"),
    ]
    crossed = Pair(torch_net, pair.flax, call, call, {"0": "b", "1": "a"})
    assert [(p.flax, p.why) for p in pair_modules(crossed).layers][1:] == [
        ("b", "given"),
        ("a", "given"),
    ]
    assert first_divergence(pair) is None
    assert first_divergence(crossed) is not None
    unknown = Pair(torch_net, pair.flax, call, call, {"0": "c"})
    with pytest.raises(UsageError, match="no 'c'"):
        pair_modules(unknown)


@pytest.mark.parametrize("make", [encoder_pair, sequential_pair])
def test_matched_parameters_hold_equal_values(make: Callable[[], Pair]) -> None:
    pair = make()
    found = pair_modules(pair)
    matches, (torch_left, flax_left) = found.matches, found.tensors_left
    assert not torch_left
    assert not flax_left
    state = arrays(pair.torch)
    params = pair.flax.variables["params"]
    for m in matches:
        made = apply(m.ops, [state[n] for n in m.torch])
        for name, array in zip(m.flax, made, strict=True):
            held = params
            for part in name.split("."):
                held = held[part]
            assert (np.asarray(held) == array).all(), name
    layout = found.layout()
    assert found.complete
    assert layout.shapes("torch") == {n: x.shape for n, x in state.items()}
    assert Layout.from_json(layout.to_json()) == layout, "a layout like any other"


def test_two_biases_for_one_have_no_match_and_are_listed() -> None:
    found = pair_modules(reader_pair())
    matches, (torch_left, flax_left) = found.matches, found.tensors_left
    assert torch_left == ["lstm.bias_ih_l0", "lstm.bias_hh_l0"]
    assert flax_left == ["lstm.cell.dense_h.bias"]
    assert [m.kind for m in matches] == ["recurrent", "recurrent", "linear", "linear"]


def test_given_matches_are_used_as_they_are() -> None:
    pair = sequential_pair()
    matches = pair_modules(pair).matches
    given = Pair(pair.torch, pair.flax, pair.call, pair.flax_call, matches=tuple(matches[:1]))
    assert pair_modules(given).matches == matches[:1]


def test_a_flax_module_that_cannot_run_is_walked_as_far_as_it_goes() -> None:
    pair = sequential_pair()
    broken = pair.flax.clone(pool=lambda x, *_: x).bind(pair.flax.variables)
    with pytest.raises(Exception, match="shape"):
        broken(*pair.flax_call.args)
    found = first_divergence(Pair(pair.torch, broken, pair.call, pair.flax_call))
    assert found is not None
    assert (found.layer, found.cause) == ("2", "missing_layer")


def test_a_layer_that_raises_is_where_they_part() -> None:
    pair = twins("bert", "encoder", behaviour("encoder.layer.1.intermediate", refuse))
    found = first_divergence(pair)
    assert found is not None
    assert (found.layer, found.cause) == ("encoder.layer.1.intermediate", "raises")
    assert "ValueError: not today" in found.diagnosis


def refuse(self: Any, x: Any) -> Any:
    raise ValueError("not today")


RAISING = {
    "BatchNorm by the batch in eval": ["hypotheses_norm._epsilon", "hypotheses_norm._affine"],
    "square kernel not transposed": ["hypotheses_tensors._constant", "hypotheses_tensors._rounded"],
    "GELU by tanh": ["explain.replay", "explain.pooling", "explain.attention"],
    "gradient stopped": ["hypotheses_gradient._rows"],
}


def fail(*_: Any) -> Any:
    raise ZeroDivisionError("planted")


@pytest.mark.parametrize("title", RAISING)
def test_a_hypothesis_that_raises_does_not_take_the_others_with_it(
    title: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "convert.diagnose")
    for name in RAISING[title]:
        monkeypatch.setattr(f"convert.diagnose.{name}", fail)
    fault = next(f for f in FAULTS if f.title == title)
    found = first_divergence(fault.plant(), fault.mode)  # type: ignore[arg-type]
    assert found is not None
    assert found.layer in fault.layers
    assert found.cause in fault.causes
    assert "planted" in caplog.text


def test_where_every_hypothesis_raises_the_layer_is_still_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("convert.diagnose.explain._RULES", {"batchnorm": fail})
    for name in ("low_precision", "attention", "pooling", "values"):
        monkeypatch.setattr(f"convert.diagnose.explain.{name}", fail)
    fault = next(f for f in FAULTS if f.title == "BatchNorm by the batch in eval")
    found = first_divergence(fault.plant())
    assert found is not None
    assert (found.layer, found.cause) == (fault.layers[0], "unknown")


def test_what_is_wrong_twice_is_reported_first_where_it_is_first() -> None:
    pair = twins("bert", "encoder")
    for layer in (1, 0):
        setting(f"encoder.layer.{layer}.intermediate", "activation", jax.nn.gelu)(pair.flax)
    found = first_divergence(pair)
    assert found is not None
    assert found.layer == "encoder.layer.0.intermediate"


def test_an_unbound_linen_module_is_refused() -> None:
    call = Call((np.ones((1, 2), np.float32),))
    with pytest.raises(UsageError, match="bound"):
        first_divergence(Pair(nn.Linear(2, 2), linen.Dense(2), call, call))
