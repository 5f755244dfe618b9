"""Recurrent layers against torch.nn, lengths, and what the names of a net do not tell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file
from support import Arrays, canonical
from test_models import faults, flax_runner, right
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import convert
import zoo
from convert.judge.noise import EXACT, MARGIN
from convert.judge.rows import FLOOR
from zoo import probe
from zoo.containers.errors import UsageError
from zoo.layout import Layout, recurrent_cell
from zoo.loading import build
from zoo.loading.fresh import torch_default
from zoo.models.recurrent import MODEL
from zoo.models.recurrent.config import Config
from zoo.nn import recurrent_flax, recurrent_torch

F_IN, HIDDEN = 4, 3
LENGTHS = [3, 5, 1]


def flax_module(cls: str, weights: Arrays, *sizes: int, **kw: Any) -> Any:
    """Our NNX module holding `weights`; nothing is drawn, which would cost most of the time."""
    make = getattr(recurrent_flax, cls)
    module = nnx.eval_shape(lambda: make(*sizes, **kw, rngs=nnx.Rngs(0)))
    graph, abstract = nnx.split(module)
    held = {".".join(map(str, p)): v.shape for p, v in nnx.to_flat_state(abstract)}
    assert held == {n: a.shape for n, a in weights.items()}
    state = nnx.map_state(
        lambda path, v: v.replace(jax.numpy.asarray(weights[".".join(map(str, path))])), abstract
    )
    return nnx.merge(graph, state)


def pair(cls: str, dtype: str, *sizes: int, **kw: Any) -> tuple[nn.Module, nn.Module, Any]:
    """torch.nn's module, ours in torch, ours in Flax, of equal name-seeded weights in `dtype`."""
    kind = getattr(torch, dtype)
    theirs = getattr(nn, cls)(*sizes, **kw, dtype=kind)
    ours = getattr(recurrent_torch, cls)(*sizes, **kw, param_dtype=kind)
    weights = {n: probe.weight(n, tuple(p.shape)) for n, p in theirs.named_parameters()}
    assert list(weights) == list(ours.state_dict())
    for module in (theirs, ours):
        module.load_state_dict({n: torch.from_numpy(a).to(kind) for n, a in weights.items()})
    cast = {n: a.astype(dtype) for n, a in weights.items()}
    return theirs, ours, flax_module(cls, cast, *sizes, **kw, param_dtype=dtype)


def flat(result: Any) -> list[np.ndarray]:
    """The arrays of nested tuples, in order."""
    if isinstance(result, tuple):
        return [a for part in result for a in flat(part)]
    return [result.detach().numpy() if isinstance(result, torch.Tensor) else np.asarray(result)]


@pytest.mark.parametrize("cls", ["RNN", "LSTM", "GRU"])
def test_golden(cls: str, fixtures: Path) -> None:
    golden = load_file(fixtures / "golden" / f"{cls.lower()}.safetensors")
    names = ["out", "h", "c"] if cls == "LSTM" else ["out", "h"]
    got: dict[str, list[list[np.ndarray]]] = {}
    with jax.enable_x64(True):
        for dtype in ("float64", "float32"):
            x = golden["in.x"].astype(dtype)
            _, ours, flax = pair(cls, dtype, 10, 16, 2, bidirectional=True, batch_first=True)
            got[dtype] = [flat(ours(torch.from_numpy(x))), flat(jax.jit(flax)(x))]
    for side in (0, 1):
        for i, name in enumerate(names):
            exact = golden[f"{name}.f64"]
            scale = np.abs(exact).max()
            assert got["float64"][side][i].dtype == np.float64
            assert np.abs(got["float64"][side][i] - exact).max() <= EXACT * scale
            noise = np.abs(golden[f"{name}.f32"] - exact).max()
            error = np.abs(got["float32"][side][i] - golden[f"{name}.f32"]).max()
            assert error <= MARGIN * max(noise, FLOOR * scale)


@pytest.mark.parametrize("start", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize(
    ("cls", "kw"), [("RNN", {}), ("RNN", {"nonlinearity": "relu"}), ("LSTM", {}), ("GRU", {})]
)
def test_nets_are_those_of_torch(
    cls: str, kw: dict[str, str], bidirectional: bool, lengths: list[int] | None, start: bool
) -> None:
    batch_first = start  # so that either order meets either kind of sequences
    kw = kw | {"bidirectional": bidirectional, "batch_first": batch_first}
    B, T = len(LENGTHS), 6  # one longer than the longest
    x = probe.normal("x", (B, T, F_IN) if batch_first else (T, B, F_IN))
    states = [probe.normal(n, (2 * (1 + bidirectional), B, HIDDEN)) for n in ("h", "c")]
    with jax.enable_x64(True):
        theirs, ours, flax = pair(cls, "float64", F_IN, HIDDEN, 2, **kw)
        given = [states, [torch.from_numpy(s) for s in states]] if start else [None, None]
        hx, tx = (None if s is None else tuple(s) if cls == "LSTM" else s[0] for s in given)
        xt = torch.from_numpy(x)
        if lengths is None:
            expected = flat(theirs(xt, tx))
            same, other = ours(xt, tx), jax.jit(flax)(x, hx)
        else:
            n = torch.tensor(lengths)
            out, final = theirs(pack_padded_sequence(xt, n, batch_first, False), tx)
            padded = pad_packed_sequence(out, batch_first, total_length=T)[0]
            expected = flat((padded, final))
            same, other = ours(xt, tx, n), jax.jit(flax)(x, hx, np.array(lengths))
    for want, torch_got, flax_got in zip(expected, flat(same), flat(other), strict=True):
        assert (torch_got == want).all()
        assert flax_got.dtype == np.float64
        assert np.abs(flax_got - want).max() <= EXACT * np.abs(want).max()


@pytest.mark.parametrize("cls", ["RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("start", [False, True], ids=["zeros", "state"])
def test_cells_are_those_of_torch(cls: str, start: bool) -> None:
    x = probe.normal("x", (2, F_IN))
    states = [probe.normal(n, (2, HIDDEN)) for n in ("h", "c")]
    with jax.enable_x64(True):
        theirs, ours, flax = pair(cls, "float64", F_IN, HIDDEN)
        given = [states, [torch.from_numpy(s) for s in states]] if start else [None, None]
        hx, tx = (None if s is None else tuple(s) if cls == "LSTMCell" else s[0] for s in given)
        expected = flat(theirs(torch.from_numpy(x), tx))
        got = [flat(ours(torch.from_numpy(x), tx)), flat(jax.jit(flax)(x, hx))]
    for side in got:
        for want, have in zip(expected, side, strict=True):
            assert np.abs(have - want).max() <= EXACT * np.abs(want).max()


@pytest.mark.parametrize(("cls", "gates"), [("RNNCell", 1), ("GRUCell", 3), ("LSTMCell", 4)])
@pytest.mark.parametrize("module", ["", "decoder.cell"])
def test_the_layout_of_a_cell(cls: str, gates: int, module: str) -> None:
    layout = Layout(recurrent_cell(module, gates, F_IN, 9))
    prefix = f"{module}." if module else ""
    theirs = {prefix + n: tuple(t.shape) for n, t in getattr(nn, cls)(F_IN, 9).state_dict().items()}
    assert layout.shapes("torch") == layout.shapes("nnx") == theirs
    for name, shape in theirs.items():
        drawn = torch_default(layout, "recurrent", name, shape, np.random.default_rng(0))
        assert 0.5 / 3 < np.abs(drawn).max() <= 1 / 3


def test_stepping_a_cell_is_running_the_net() -> None:
    x = probe.normal("x", (2, 5, F_IN)).astype(np.float32)
    theirs, _, net = pair("LSTM", "float32", F_IN, HIDDEN, batch_first=True)
    weights = {n.removesuffix("_l0"): t.numpy() for n, t in theirs.state_dict().items()}
    cell = jax.jit(flax_module("LSTMCell", weights, F_IN, HIDDEN))
    outputs, (h, c) = jax.jit(net)(x)
    state = None
    for t in range(5):
        state = cell(x[:, t], state)
        assert np.allclose(outputs[:, t], state[0], rtol=0, atol=MARGIN * FLOOR)
    assert np.allclose(h[0], state[0], rtol=0, atol=MARGIN * FLOOR)
    assert np.allclose(c[0], state[1], rtol=0, atol=MARGIN * FLOOR)


@pytest.mark.parametrize("cls", ["RNN", "LSTM", "GRU"])
def test_computation_in_bfloat16_over_float32_parameters(cls: str) -> None:
    x = probe.normal("x", (5, 2, F_IN)).astype(np.float32)
    theirs, _, _ = pair(cls, "float32", F_IN, HIDDEN)
    ours = getattr(recurrent_torch, cls)(F_IN, HIDDEN, dtype=torch.bfloat16)
    ours.load_state_dict(theirs.state_dict())
    weights = {n: t.numpy() for n, t in theirs.state_dict().items()}
    flax = flax_module(cls, weights, F_IN, HIDDEN, dtype="bfloat16")
    with torch.no_grad():
        exact = theirs(torch.from_numpy(x))[0].numpy()
        out = ours(torch.from_numpy(x))[0]
    other = jax.jit(flax)(x)[0]
    assert (out.dtype, other.dtype) == (torch.bfloat16, jax.numpy.bfloat16)
    for got in (out.float().numpy(), np.asarray(other, np.float32)):
        assert 2.0**-12 < np.abs(got - exact).max() < 2.0**-4


def test_fresh_nets_start_as_those_of_torch() -> None:
    net = recurrent_flax.GRU(F_IN, 9, rngs=nnx.Rngs(0))
    for _, value in nnx.to_flat_state(nnx.state(net, nnx.Param)):
        assert 0.5 / 3 < np.abs(value[...]).max() <= 1 / 3


def test_dropout_between_layers_in_training_only() -> None:
    x = np.ones((4, 2, F_IN), np.float32)
    nets = [
        recurrent_torch.LSTM(F_IN, HIDDEN, 2, dropout=0.5),
        recurrent_flax.LSTM(F_IN, HIDDEN, 2, dropout=0.5, rngs=nnx.Rngs(0)),
    ]
    for net, given in zip(nets, (torch.from_numpy(x), x), strict=True):
        net.eval()
        a, b = flat(net(given))[0], flat(net(given))[0]
        assert (a == b).all()
        net.train()
        c, d = flat(net(given))[0], flat(net(given))[0]
        assert (c != d).any()


def test_a_nonlinearity_that_torch_does_not_have() -> None:
    for make in (
        lambda: recurrent_torch.RNN(2, 3, nonlinearity="gelu"),
        lambda: recurrent_flax.RNN(2, 3, nonlinearity="gelu", rngs=nnx.Rngs(0)),
        lambda: recurrent_torch.RNNCell(2, 3, nonlinearity="gelu"),
        lambda: recurrent_flax.RNNCell(2, 3, nonlinearity="gelu", rngs=nnx.Rngs(0)),
        lambda: Config(nonlinearity="gelu"),
    ):
        with pytest.raises(ValueError, match="gelu"):
            make()


# --- What names and shapes do not tell ---


def test_other_sizes_convert_and_want_a_config_to_load(tmp_path: Path) -> None:
    config = MODEL.tiny["rnn"]
    state = {n: torch.from_numpy(a) for n, a in canonical(MODEL, config).items()}
    torch.save(state, tmp_path / "a.pt")
    made = convert.convert(tmp_path / "a.pt")
    assert any("batch_first, nonlinearity" in n for n in made.notices)
    with pytest.raises(UsageError, match="batch_first, nonlinearity"):
        zoo.load(tmp_path / "a.flax", framework="flax")
    told = {"model": "recurrent", "config": vars(config)}
    a = zoo.load(tmp_path / "a.flax", framework="flax", **told)
    b = build(MODEL, config, "flax", canonical(MODEL, config))
    x = MODEL.inputs(config)["x"].astype(np.float32)
    assert (a(x) == b(x)).all()


def test_the_nonlinearity_of_an_lstm_is_no_question(tmp_path: Path) -> None:
    config = MODEL.tiny["gru"]
    torch.save(
        {n: torch.from_numpy(a) for n, a in canonical(MODEL, config).items()}, tmp_path / "a.pt"
    )
    (identity,) = zoo.identify(tmp_path / "a.pt")
    assert identity.unknown == {"batch_first"}
    assert replace(identity.config, batch_first=True) == config


@pytest.mark.parametrize(
    "change",
    [
        {"rnn.extra": (3,)},
        {"head.weight": (3, 3)},
        {"lstm.weight_hh_l0": (16, 4)},
    ],
)
def test_tensors_of_other_names_are_another_model(change: dict[str, tuple[int, ...]]) -> None:
    shapes = MODEL.layout_of(MODEL.tiny["rnn"]).shapes("torch")
    assert MODEL.infer(shapes) is not None
    inferred = MODEL.infer({**shapes, **change})
    assert (
        inferred is None or "rnn.extra" in change
    )  # a stray leaf is a surplus tensor, not a model


def test_only_the_two_biases_of_one_layer_cannot_be_told_apart() -> None:
    """`Model.invisible` excuses any fault in a bias; this allows no other than that exchange."""
    config = MODEL.tiny["lstm"]
    weights = canonical(MODEL, config)
    call = flax_runner(MODEL, config)
    reference = call(right(MODEL.layout_of(config), weights))
    for fault in faults(MODEL, config):
        gap = max(np.abs(a - b).max() for a, b in zip(call(fault.values), reference, strict=True))
        same = len({n.replace("_hh", "_ih") for n in fault.touched}) < len(fault.touched)
        exchanged = fault.title.startswith("swapped") and same and "bias" in fault.title
        assert exchanged or gap > 1e-5, fault.title
        assert not exchanged or gap < 1e-6, fault.title


# --- Lengths ---


@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_what_lies_behind_the_end_does_not_matter(framework: str) -> None:
    config = MODEL.tiny["ids"]
    model = build(MODEL, config, framework, canonical(MODEL, config))
    inputs = MODEL.inputs(config)
    behind = np.arange(inputs["x"].shape[1]) >= inputs["lengths"][:, None]
    other = inputs | {"x": np.where(behind, 1, inputs["x"])}
    cut = {"x": inputs["x"][:1, :3]}
    runs = []
    for given in (inputs, other, cut, {"x": inputs["x"]}):
        if framework == "torch":
            given = {k: torch.from_numpy(v) for k, v in given.items()}
        call = model if framework == "torch" else nnx.jit(model)
        runs.append(flat(call(**given))[0])
    whole, changed, short, unbounded = runs
    assert (whole == changed).all()
    assert np.allclose(whole[0], short[0], rtol=0, atol=MARGIN * FLOOR)
    assert np.abs(whole[1] - unbounded[1]).max() <= MARGIN * FLOOR, "all of it is inside"
    assert np.abs(whole[0] - unbounded[0]).max() > 1e-3
