"""Training goes on across the border, exactly, wherever in a chain the states stand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optimizer_bench import (
    BERT,
    CASES,
    CHAINS,
    CONV,
    MLP,
    RATE,
    SCALED,
    Bench,
    N,
    T,
    by_kind,
    close,
    decay_groups,
    flat_names,
    notices_of,
    params_of,
    state_bits,
    state_of,
    trained,
)
from support import Arrays, bits, every_family
from test_models import scalar, to_canonical

import convert
from convert.training_state.optax_state import from_flat, from_optax
from convert.training_state.state import Group, OptimizerState
from convert.training_state.torch_state import from_torch
from zoo.containers.errors import UsageError
from zoo.model import Config, Model

pytestmark = pytest.mark.filterwarnings("ignore::zoo.loading.LoadNotice")


def switched(bench: Bench, make: Callable[[Any], Any], tx: Any, exact: bool) -> None:
    """20 + 20 steps across the border both ways against 40 in torch; and round trips."""
    module = bench.torch()
    optimizer = make(list(module.named_parameters()))
    first = bench.train_torch(module, optimizer, N)
    middle, state = bench.of(module), from_torch(optimizer, model=module)
    last = bench.train_torch(module, optimizer, N)
    with jax.enable_x64(True):
        twin = bench.flax(middle)
        opt_state = convert.load_optimizer(state, tx, twin)
        again = from_optax(opt_state, twin, learning_rate=RATE, step=N)
        if exact:
            assert state_bits(again) == state_bits(state)
        else:
            for slot, values in state.slots.items():
                for name, a in values.items():
                    b = again.slots[slot][name]
                    assert np.abs(a - b).max() <= 4 * np.finfo("float64").eps * np.abs(a).max()
        assert again.steps == state.steps
        step = bench.step(twin, tx)
        here, _ = bench.train_flax(twin, step, opt_state, N)
        assert close(here, last), "torch, then Flax"

        start = bench.flax()
        before, opt_state = bench.train_flax(start, step, tx.init(params_of(start)), N)
        assert close(before, first)
        found = from_optax(opt_state, start, learning_rate=RATE, step=N)
        weights = bench.of(start)
    back = bench.torch(bench.weights() | weights)
    optimizer = make(list(back.named_parameters()))
    assert convert.load_optimizer(found, optimizer, back) is optimizer
    assert state_bits(from_torch(optimizer, model=back)) == state_bits(found)
    assert close(bench.train_torch(back, optimizer, N), last), "Flax, then torch"


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_across_the_border(case: str) -> None:
    make, tx = CASES[case]
    switched(MLP, make, tx(), case not in SCALED)


def test_a_tied_bert_with_decay_groups() -> None:
    def mask(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    switched(
        BERT,
        lambda named: T.AdamW(decay_groups(named), RATE),
        optax.adamw(RATE, weight_decay=0.1, mask=mask),
        True,
    )


def test_a_convolutional_net() -> None:
    switched(CONV, lambda p: T.Adam(p, RATE), optax.adam(RATE), True)


@every_family()
def test_moments_go_through_the_ops_of_their_weights(model: Model, config: Config) -> None:
    """Fused projections that are three kernels in Flax, experts that are one stack, ties."""
    bench = Bench(model, config)
    rng = np.random.default_rng(0)
    entries = [e for e in bench.layout.entries if e.flax and e.collection == "params"]
    names = [(t.name, t.shape) for e in entries for t in e.torch]
    slots = {
        s: {n: rng.normal(size=shape) for n, shape in names} for s in ("exp_avg", "exp_avg_sq")
    }
    params = tuple(n for n, _ in names)
    state = OptimizerState("Adam", [Group(params)], slots, dict.fromkeys(params, 7))
    with jax.enable_x64(True):
        twin = bench.flax()
        filled = convert.load_optimizer(state, optax.adam(RATE), twin)
        mu = to_canonical(bench.model, bench.config, filled[0].mu)
        assert {n: bits(a) for n, a in mu.items()} == {
            n: bits(a) for n, a in slots["exp_avg"].items()
        }
        assert filled[0].count == 7
        again = from_optax(filled, twin)
    assert state_bits(again) == state_bits(state)
    assert again.steps == state.steps


# --- Planted faults: these tests can fail ---


def losses_after(opt_state: Any, weights: Arrays, tx: Any) -> list[float]:
    twin = MLP.flax(weights)
    return MLP.train_flax(twin, MLP.step(twin, tx), opt_state, N)[0]


def test_an_untransposed_moment_and_a_lost_count_are_seen() -> None:
    module, optimizer = trained(MLP, CASES["AdamW"][0], N)
    state, weights = from_torch(optimizer, model=module), MLP.of(module)
    want = MLP.train_torch(module, optimizer, N)
    tx = CASES["AdamW"][1]()
    with jax.enable_x64(True):
        right = convert.load_optimizer(state, tx, MLP.flax(weights))
        assert close(losses_after(right, weights, tx), want)
        lost = (right[0]._replace(count=jnp.int32(0)), *right[1:])
        assert not close(losses_after(lost, weights, tx), want)
        turned = copy.deepcopy(state)
        moment = turned.slots["exp_avg"]["fc2.weight"]  # square
        turned.slots["exp_avg"]["fc2.weight"] = moment.T.copy()
        wrong = convert.load_optimizer(turned, tx, MLP.flax(weights))
        assert not close(losses_after(wrong, weights, tx), want)
        assert not close(losses_after(tx.init(params_of(MLP.flax())), weights, tx), want)


# --- Chains ---


@pytest.mark.parametrize("chain", CHAINS)
def test_states_are_found_anywhere(chain: str) -> None:
    module, optimizer = trained(MLP, lambda p: T.Adam(p, RATE), N)
    state, weights = from_torch(optimizer, model=module), MLP.of(module)
    want = MLP.train_torch(module, optimizer, 3)
    with jax.enable_x64(True):
        tx, twin = CHAINS[chain](), MLP.flax(weights)
        filled = convert.load_optimizer(state, tx, twin)
        again = from_optax(filled, twin)
        assert state_bits(again) == state_bits(state)
        assert again.steps == state.steps
        counts = [
            int(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(filled)
            if str(path[-1]) in (".count", ".gradient_step")
        ]
        assert counts
        assert set(counts) == {N}
        losses, _ = MLP.train_flax(twin, MLP.step(twin, tx), filled, 3)
    assert close(losses, want)


def test_an_nnx_optimizer_is_filled_in_place() -> None:
    module, optimizer = trained(MLP, lambda p: T.Adam(p, RATE), N)
    state, weights = from_torch(optimizer, model=module), MLP.of(module)
    want = MLP.train_torch(module, optimizer, 3)
    with jax.enable_x64(True):
        twin = MLP.flax(weights)
        target = nnx.Optimizer(twin, optax.inject_hyperparams(optax.adam)(0.5), wrt=nnx.Param)
        assert convert.load_optimizer(state, target, twin) is target
        assert int(target.step.get_value()) == N
        again = from_optax(target, twin)
        assert state_bits(again) == state_bits(state)
        assert again.groups[0].options["lr"] == RATE
        given = {k: MLP.model.to_flax(k, v) for k, v in MLP.model.inputs(MLP.config).items()}
        losses = []
        for _ in range(3):
            loss, grads = nnx.value_and_grad(lambda m: scalar(MLP.model, m(**given), "flax"))(twin)
            target.update(twin, grads)
            losses.append(float(loss))
    assert close(losses, want)


def test_accumulated_gradients_are_summed_or_averaged() -> None:
    state = state_of(lambda p: T.Adam(p, RATE))
    with jax.enable_x64(True):
        for mean in (True, False):
            tx = optax.MultiSteps(optax.adam(RATE), 4, use_grad_mean=mean)
            filled = convert.load_optimizer(state, tx, MLP.flax())
            assert int(filled.gradient_step) == 3
        with pytest.raises(UsageError, match="does not follow"):
            convert.load_optimizer(state, optax.MultiSteps(optax.adam(RATE, b1=0.8), 4), MLP.flax())
        filled = filled._replace(mini_step=jnp.int32(2))
        assert "left out" in from_optax(filled, MLP.flax()).notices[0]


def test_parts_of_different_kinds_become_a_state_each() -> None:
    parts = {"kernels": optax.adam(RATE), "rest": optax.sgd(RATE, 0.9)}
    tx = optax.multi_transform(parts, by_kind)
    with jax.enable_x64(True):
        twin = MLP.flax()
        opt_state = tx.init(params_of(twin))
        with pytest.raises(UsageError, match="several kinds of optimizers: Adam of"):
            from_optax(opt_state, twin)
        found = from_flat(flat_names(opt_state), MLP.layout)
    assert {s.name: s.rule for s in found} == {"kernels": "Adam", "rest": "SGD"}
    assert {n for s in found for n in s.params} == set(MLP.weights())


def test_an_nnx_optimizer_is_tried_too() -> None:
    state = state_of(lambda p: T.Adam(p, RATE))
    with jax.enable_x64(True):
        twin = MLP.flax()
        target = nnx.Optimizer(twin, optax.adam(RATE), wrt=nnx.Param)
        assert notices_of(lambda: convert.load_optimizer(state, target, twin)) == []
        wrong = nnx.Optimizer(twin, optax.adam(RATE, 0.5), wrt=nnx.Param)
        before = jax.tree.leaves(wrong.opt_state)
        with pytest.raises(UsageError, match=r"b1 is 0\.5, not 0\.9"):
            convert.load_optimizer(state, wrong, twin)
        assert all(
            (a == b).all() for a, b in zip(before, jax.tree.leaves(wrong.opt_state), strict=True)
        )
