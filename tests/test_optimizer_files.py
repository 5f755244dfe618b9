"""Optimizer states in checkpoints: the names that trees give them, and whole files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from flax import nnx, serialization
from optimizer_bench import (
    CASES,
    CHAINS,
    MLP,
    RATE,
    Bench,
    N,
    T,
    close,
    flat_names,
    params_of,
    state_bits,
    state_of,
    trained,
)
from support import Arrays

import convert
import zoo
from convert.training_state.besides import read_training
from convert.training_state.canonical_names import part
from convert.training_state.optax_state import from_flat, from_optax
from convert.training_state.state import Group
from convert.training_state.torch_state import from_torch
from zoo.containers.errors import UsageError
from zoo.registry import families

pytestmark = pytest.mark.filterwarnings("ignore::zoo.loading.LoadNotice")


# --- Checkpoints ---


def test_flat_names_of_checkpoints() -> None:
    state = state_of(lambda p: T.Adam(p, RATE))
    with jax.enable_x64(True):
        twin = MLP.flax()
        other = {f"params.{n}": a for n, a in flat_names(params_of(twin)).items()}
        for chain in CHAINS.values():
            filled = convert.load_optimizer(state, chain(), twin, check=False)
            for prefix in ("", "opt_state.", "optimizer.opt_state."):
                flat = flat_names(filled, prefix)
                for names in (flat, {n.removesuffix(".value"): a for n, a in flat.items()}):
                    (found,) = from_flat(names | other | {"step": np.asarray(99)}, MLP.layout)
                    assert state_bits(found) == state_bits(state)
                    assert found.steps == state.steps


def test_linen_names_of_checkpoints() -> None:
    state = state_of(lambda p: T.Adam(p, RATE))
    for tree in ("linen", "linen-compact"):
        flat: Arrays = {"opt_state.0.count": np.asarray(3)}
        for slot, field in (("exp_avg", "mu"), ("exp_avg_sq", "nu")):
            for view in MLP.layout.view(tree):
                (t,), (c,) = view.tensors, view.entry.torch
                a = state.slots[slot][c.name]
                flat[f"opt_state.0.{field}.{t.name}"] = a.T if a.ndim == 2 else a
        (found,) = from_flat(flat, MLP.layout)
        assert state_bits(found) == state_bits(state)
        bare = {n.replace("params.", ""): a for n, a in flat.items()}
        assert state_bits(from_flat(bare, MLP.layout)[0]) == state_bits(state)


def test_a_step_that_only_stands_elsewhere() -> None:
    state = state_of(lambda p: T.RMSprop(p, RATE))
    with jax.enable_x64(True):
        tx = optax.rmsprop(optax.constant_schedule(RATE), 0.99, eps_in_sqrt=False)
        filled = convert.load_optimizer(state, tx, MLP.flax())
        assert from_optax(filled, MLP.flax()).steps == state.steps  # the schedule's count
        tx = optax.rmsprop(RATE, 0.99, eps_in_sqrt=False)
        filled = convert.load_optimizer(state, tx, MLP.flax())
        found = from_optax(filled, MLP.flax())
        assert found.steps == {}
        assert "does not count" in found.notices[0]
        assert from_optax(filled, MLP.flax(), step=3).steps == state.steps


def test_a_scaled_momentum_needs_the_rate() -> None:
    state = state_of(lambda p: T.RMSprop(p, RATE, momentum=0.9))
    kept = {"decay": 0.99, "eps_in_sqrt": False, "momentum": 0.9}
    with jax.enable_x64(True):
        twin = MLP.flax()
        filled = convert.load_optimizer(state, optax.rmsprop(RATE, **kept), twin)
        want = -RATE * state.slots["momentum_buffer"]["fc1.weight"].T
        trace = filled[2].trace["fc1"]["kernel"].get_value()
        assert np.abs(np.asarray(trace) / want - 1).max() < 1e-15
        with pytest.raises(UsageError, match=r"learning rate, as optax\.rmsprop keeps it"):
            from_optax(filled, twin)
        # The rate of the target counts: with another the same state is another trace.
        other = convert.load_optimizer(state, optax.rmsprop(2 * RATE, **kept), twin)
        there = other[2].trace["fc1"]["kernel"].get_value()
        assert np.allclose(np.asarray(there), 2 * want, rtol=1e-12, atol=0)
        injected = optax.inject_hyperparams(optax.rmsprop, static_args="eps_in_sqrt")
        filled = convert.load_optimizer(state, injected(0.5, **kept), twin)
        again = from_optax(filled, twin)
        assert again.groups[0].options["lr"] == RATE
        a, b = (s.slots["momentum_buffer"]["fc1.weight"] for s in (state, again))
        assert np.abs(a - b).max() <= 4e-16 * np.abs(a).max()
        unknown = replace(state, groups=[Group(state.params)])
        with pytest.raises(UsageError, match="which nothing tells"):
            convert.load_optimizer(unknown, optax.rmsprop(RATE, **kept), twin)
        told = convert.load_optimizer(
            unknown, optax.rmsprop(RATE, **kept), twin, learning_rate=RATE
        )
        there = told[2].trace["fc1"]["kernel"].get_value()
        assert np.allclose(np.asarray(there), want, rtol=1e-14, atol=0)


# --- Whole files ---


def torch_file(path: Path, make: Callable[[Any], Any], **more: Any) -> tuple[Path, list[float]]:
    """A checkpoint as people write it, and the losses of the steps after it."""
    module, optimizer = trained(MLP, make, N)
    saved = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), **more}
    torch.save(saved, path)
    return path, MLP.train_torch(module, optimizer, 3)


def flax_file(path: Path, tx: Any) -> tuple[Path, list[float]]:
    """The same in Flax's msgpack, the optimizer as a tree of plain dicts."""
    module = MLP.flax()
    step = MLP.step(module, tx)
    _, state = MLP.train_flax(module, step, tx.init(params_of(module)), N)
    opt_state = serialization.to_state_dict(nnx.to_pure_dict(nnx.state(Holder(state))))
    tree = {"model": nnx.to_pure_dict(params_of(module)), "opt_state": opt_state["state"]}
    path.write_bytes(serialization.to_bytes(jax.tree.map(np.asarray, tree)))
    return path, MLP.train_flax(module, step, state, 3)[0]


class Holder(nnx.Module):
    def __init__(self, state: Any) -> None:
        self.state = nnx.data(state)


@pytest.mark.parametrize("case", ["AdamW", "NAdam", "RMSprop ours"])
def test_any_checkpoint_into_either_framework(case: str, tmp_path: Path) -> None:
    make, tx = CASES[case]
    path, want = torch_file(tmp_path / "a.pt", make)
    with jax.enable_x64(True):
        twin = zoo.load(path, "flax", model="mlp", config=vars(MLP.config))
        state = convert.load_optimizer(path, tx(), twin)
        losses, _ = MLP.train_flax(twin, MLP.step(twin, tx()), state, 3)
        assert close(losses, want)
        other, want = flax_file(tmp_path / "b.msgpack", tx())
        again = convert.load_optimizer(other, tx(), twin)
        assert from_optax(again, twin).steps == from_optax(state, twin).steps
    for source in (path, other):
        module = zoo.load(source, "torch", model="mlp", config=vars(MLP.config))
        optimizer = convert.load_optimizer(source, make(list(module.named_parameters())), module)
        assert close(MLP.train_torch(module, optimizer, 3), want)


def test_a_scaled_momentum_in_a_file_needs_the_rate(tmp_path: Path) -> None:
    make, tx = CASES["RMSprop stock"]
    with jax.enable_x64(True):
        path, want = flax_file(tmp_path / "a.msgpack", tx())
    module = zoo.load(path, "torch", model="mlp", config=vars(MLP.config))
    optimizer = make(list(module.named_parameters()))
    with pytest.raises(UsageError, match="the rate is not in the tree") as e:
        convert.load_optimizer(path, optimizer, module)
    assert "learning_rate=" in e.value.advice
    convert.load_optimizer(path, optimizer, module, learning_rate=RATE)
    assert close(MLP.train_torch(module, optimizer, 3), want)


def test_the_step_of_a_checkpoint_counts_where_sgd_does_not(tmp_path: Path) -> None:
    path, _ = torch_file(tmp_path / "a.pt", lambda p: T.SGD(p, RATE, 0.9), global_step=N)
    with jax.enable_x64(True):
        twin = MLP.flax()
        tx = optax.sgd(optax.constant_schedule(RATE), 0.9)
        assert int(convert.load_optimizer(path, tx, twin)[1].count) == N
        target = nnx.Optimizer(twin, tx, wrt=nnx.Param)
        convert.load_optimizer(path, target, twin)
        assert int(target.step.get_value()) == N


def test_an_optimizer_without_weights_beside_it(tmp_path: Path) -> None:
    module, optimizer = trained(MLP, lambda p: T.Adam(p, RATE))
    path = tmp_path / "optimizer.pt"
    torch.save(optimizer.state_dict(), path)
    other = T.Adam(module.named_parameters(), RATE)
    convert.load_optimizer(path, other, module)
    want = from_torch(optimizer, model=module)
    assert state_bits(from_torch(other, model=module)) == state_bits(want)
    with jax.enable_x64(True):
        twin = MLP.flax()
        filled = convert.load_optimizer(path, optax.adam(RATE), twin)
        assert state_bits(from_optax(filled, twin)) == state_bits(want)


def test_one_of_several_optimizers(tmp_path: Path) -> None:
    bench = Bench(families()["sac"], next(iter(families()["sac"].tiny.values())))
    module = bench.torch()
    made = {
        "actor": T.Adam(module.actor.named_parameters(), RATE),
        "critic": T.Adam(module.critic.named_parameters(), RATE),
    }
    rng = np.random.default_rng(0)
    for optimizer in made.values():
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.tensor(rng.normal(size=p.shape))
        optimizer.step()
    path = tmp_path / "sac.pt"
    kept = {f"{name}_optimizer": o.state_dict() for name, o in made.items()}
    torch.save({"model": module.state_dict(), **kept}, path)
    whole = bench.torch()
    for name, optimizer in made.items():
        for chosen in (None, name):
            other = T.Adam(getattr(whole, name).named_parameters(), RATE)
            convert.load_optimizer(path, other, whole, name=chosen)
            a, b = from_torch(other, model=whole), from_torch(optimizer, model=module)
            assert state_bits(a) == state_bits(b)
        with jax.enable_x64(True):
            twin = bench.flax()
            layout = part(bench.layout, name)
            inner = getattr(twin, name)
            filled = convert.load_optimizer(path, optax.adam(RATE), inner, layout=layout)
            want = from_torch(optimizer, model=module)
            assert state_bits(from_optax(filled, layout)) == state_bits(want)
            masked = nnx.All(nnx.Param, nnx.PathContains(name))
            target = nnx.Optimizer(twin, optax.adam(RATE), wrt=masked)
            convert.load_optimizer(path, target, twin)
            assert state_bits(from_optax(target, twin)) == state_bits(want)
    with pytest.raises(UsageError, match=r"2 optimizers \(actor, critic\), 0 of them"):
        convert.load_optimizer(path, T.Adam(whole.named_parameters(), RATE), whole)
    with pytest.raises(UsageError, match="none called 'entropy'"):
        convert.load_optimizer(path, other, whole, name="entropy")


def test_a_checkpoint_without_an_optimizer(tmp_path: Path) -> None:
    module = MLP.torch()
    path = tmp_path / "weights.pt"
    torch.save(module.state_dict(), path)
    with pytest.raises(UsageError, match="holds no optimizer"):
        convert.load_optimizer(path, T.Adam(module.named_parameters(), RATE), module)


def test_the_step_of_a_checkpoint_counts_in_torch_too(tmp_path: Path) -> None:
    """Stock optax.rmsprop counts nothing."""
    with jax.enable_x64(True):
        path, _ = flax_file(tmp_path / "a.msgpack", optax.rmsprop(RATE, eps_in_sqrt=False))
    module = MLP.torch()
    optimizer = T.RMSprop(module.named_parameters(), RATE)
    convert.load_optimizer(path, optimizer, module, step=7)
    assert {int(s["step"]) for s in optimizer.state.values()} == {7}


def test_what_no_torch_optimizer_keeps_is_told(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        path, _ = flax_file(tmp_path / "a.msgpack", optax.chain(optax.adam(RATE), optax.ema(0.9)))
        plain, _ = flax_file(tmp_path / "b.msgpack", optax.adam(RATE))
    told = "optimizer: left out, no torch optimizer keeps it: 1.ema"
    config = vars(MLP.config)
    assert told in read_training(path, model="mlp", config=config).notices
    notices = read_training(plain, model="mlp", config=config).notices
    assert not any("left out" in n for n in notices)
