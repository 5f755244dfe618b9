"""What does something else, or is of something else, is refused with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import optax
import pytest
import torch
from optimizer_bench import (
    MLP,
    RATE,
    Lion,
    T,
    by_kind,
    notices_of,
    params_of,
    state_bits,
    state_of,
)

import convert
from convert import optim
from convert.training_state.optax_state import from_optax
from convert.training_state.torch_state import fill_torch, from_torch
from zoo.containers.errors import UsageError
from zoo.loading import build

pytestmark = pytest.mark.filterwarnings("ignore::zoo.loading.LoadNotice")


# --- Refusals ---

WRONG: dict[str, tuple[Callable[[Any], Any], Callable[[], Any], str, str]] = {
    "nadam": (
        lambda p: T.NAdam(p, RATE),
        lambda: optax.nadam(RATE),
        "schedule, which optax.nadam does not know",
        "convert.optim.nadam",
    ),
    "amsgrad": (
        lambda p: T.Adam(p, RATE, amsgrad=True),
        lambda: optax.amsgrad(RATE),
        "maximum of bias-corrected",
        "convert.optim",
    ),
    "amsgrad in adam": (
        lambda p: T.Adam(p, RATE, amsgrad=True),
        lambda: optax.adam(RATE),
        "AMSGrad keeps the maximum",
        r"convert.optim.adam\(amsgrad=True\)",
    ),
    "adagrad eps": (
        lambda p: T.Adagrad(p, RATE),
        lambda: optax.adagrad(RATE, 0.0, 1e-10),
        "eps stands inside the root",
        "convert.optim.adagrad",
    ),
    "dampening": (
        lambda p: T.SGD(p, RATE, 0.9, 0.3),
        lambda: optax.sgd(RATE, 0.9),
        "no dampening, the checkpoint 0.3",
        "convert.optim.sgd with dampening",
    ),
    "narrow moments": (
        lambda p: T.Adam(p, RATE),
        lambda: optax.adam(RATE, mu_dtype="bfloat16"),
        r"rounds what it keeps to bfloat16 \(mu_dtype\)",
        "check=False",
    ),
    "average of updates": (
        lambda p: T.Adam(p, RATE),
        lambda: optax.chain(optax.adam(RATE), optax.ema(0.9)),
        "at 1: EmaState, which no torch optimizer has",
        "optax.adam",
    ),
    "nesterov": (
        lambda p: T.SGD(p, RATE, 0.9),
        lambda: optax.sgd(RATE, 0.9, nesterov=True),
        "nesterov is True, not False",
        "optax.sgd",
    ),
    "momentum": (
        lambda p: T.SGD(p, RATE, 0.9),
        lambda: optax.sgd(RATE, 0.8),
        "momentum is 0.8, not 0.9",
        "optax.sgd",
    ),
    "no momentum": (
        lambda p: T.SGD(p, RATE),
        lambda: optax.sgd(RATE, 0.9),
        "momentum",
        "optax.sgd",
    ),
    "momentum gone": (
        lambda p: T.SGD(p, RATE, 0.9),
        lambda: optax.sgd(RATE),
        "keeps no moments",
        "optax.sgd",
    ),
    "rmsprop defaults": (
        lambda p: T.RMSprop(p, RATE),
        lambda: optax.rmsprop(RATE, 0.99),
        "eps stands inside the root",
        "eps_in_sqrt=False",
    ),
    "rmsprop decay too": (
        lambda p: T.RMSprop(p, RATE),
        lambda: optax.rmsprop(RATE),
        r"decay \(alpha\) is 0.9, not 0.99 and its eps stands inside",
        "eps_in_sqrt=False",
    ),
    "rmsprop corrected": (
        lambda p: T.RMSprop(p, RATE),
        lambda: optax.rmsprop(RATE, 0.99, bias_correction=True),
        "corrects what torch does not",
        "convert.optim",
    ),
    "rmsprop not centered": (
        lambda p: T.RMSprop(p, RATE, centered=True),
        lambda: optax.rmsprop(RATE, 0.99, eps_in_sqrt=False),
        "is centered",
        "rmsprop",
    ),
    "b1": (lambda p: T.Adam(p, RATE), lambda: optax.adam(RATE, 0.8), "b1 is 0.8, not 0.9", "adam"),
    "b2": (
        lambda p: T.Adam(p, RATE),
        lambda: optax.adam(RATE, b2=0.99),
        "b2 is 0.99, not 0.999",
        "adam",
    ),
    "eps": (
        lambda p: T.Adam(p, RATE),
        lambda: optax.adam(RATE, eps=1e-6),
        "eps is 1e-06, not 1e-08",
        "adam",
    ),
    "eps_root": (
        lambda p: T.Adam(p, RATE),
        lambda: optax.adam(RATE, eps_root=1e-6),
        "eps_root is 1e-06, not 0",
        "adam",
    ),
    "adam nesterov": (
        lambda p: T.Adam(p, RATE),
        lambda: optax.nadam(RATE),
        "nesterov is True, not False",
        "adam",
    ),
    "weight decay": (
        lambda p: T.AdamW(p, RATE),
        lambda: optax.adamw(RATE),
        "weight_decay is 0.0001, not 0.01",
        "adamw",
    ),
    "coupled": (
        lambda p: T.AdamW(p, RATE),
        lambda: optax.chain(optax.add_decayed_weights(0.01), optax.adam(RATE)),
        "added to the gradient, not decoupled",
        "adamw",
    ),
    "decoupled": (
        lambda p: T.Adam(p, RATE, weight_decay=0.01),
        lambda: optax.adamw(RATE, weight_decay=0.01),
        "decoupled, not added to the gradient",
        "adam",
    ),
    "masked decay": (
        lambda p: T.AdamW(p, RATE),
        lambda: optax.adamw(
            RATE, weight_decay=0.01, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
        ),
        "fc1.bias, fc2.bias, fc3.bias: its weight_decay is 0, not 0.01",
        "adamw",
    ),
    "radam": (
        lambda p: T.RAdam(p, RATE, eps=1e-6),
        lambda: optax.radam(RATE, eps=1e-6),
        "adds eps after the bias correction",
        "convert.optim.radam",
    ),
    "radam in adam": (
        lambda p: T.RAdam(p, RATE),
        lambda: optax.adam(RATE),
        "follows Adam's rule",
        "convert.optim.radam",
    ),
    "maximize": (
        lambda p: T.Adam(p, RATE),
        lambda: optim.adam(RATE, maximize=True),
        "it ascends",
        "adam",
    ),
    "another optimizer": (
        lambda p: T.Adam(p, RATE),
        lambda: optax.adabelief(RATE),
        "keeps ScaleByBeliefState",
        "optax.adam",
    ),
    "two": (
        lambda p: T.Adam(p, RATE),
        lambda: optax.chain(optax.adam(RATE), optax.adam(RATE)),
        "2 states in the chain keep moments of fc1.bias",
        "multi_transform",
    ),
    "some only": (
        lambda p: T.Adam(p, RATE),
        lambda: optax.multi_transform(
            {"kernels": optax.adam(RATE), "rest": optax.set_to_zero()}, by_kind
        ),
        "only in the state: fc1.bias",
        "multi_transform",
    ),
    "too many": (
        lambda p: T.Adam([x for x in p if "weight" in x[0]], RATE),
        lambda: optax.adam(RATE),
        "only in the transformation: fc1.bias",
        "set_to_zero",
    ),
    "not an optimizer": (lambda p: T.Adam(p, RATE), lambda: 3, "int is not an optimizer", "nnx"),
    "lion": (
        lambda p: Lion(p, RATE),
        lambda: optax.lion(RATE, weight_decay=0.1),
        "weight_decay is 0.1, not 0",
        "optax.lion",
    ),
    "clipped away": (
        lambda p: T.Adam(p, RATE),
        lambda: optax.chain(optax.adam(RATE), optax.clip(1e-9)),
        "no one hyper-parameter explains it",
        "check=False",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_something_else_is_refused_with_the_reason(what: str) -> None:
    make, tx, problem, advice = WRONG[what]
    state = state_of(make)
    with jax.enable_x64(True), pytest.raises(UsageError, match=problem) as e:
        convert.load_optimizer(state, tx(), MLP.flax())
    assert re.search(advice, e.value.advice), e.value.advice


def test_without_the_check_it_is_filled() -> None:
    state = state_of(lambda p: T.AdamW(p, RATE))
    with jax.enable_x64(True):
        filled = convert.load_optimizer(state, optax.adam(RATE), MLP.flax(), check=False)
        assert state_bits(from_optax(filled, MLP.flax())) == state_bits(state)


def test_another_learning_rate_is_told() -> None:
    state = state_of(lambda p: T.Adam(p, RATE))
    with jax.enable_x64(True):
        twin = MLP.flax()

        def told(tx: Any, **kw: Any) -> list[str]:
            return notices_of(lambda: convert.load_optimizer(state, tx, twin, **kw))

        assert told(optax.adam(RATE)) == []
        assert told(optax.adam(0.5)) == [
            "the learning rate is 0.5 at this step, the checkpoint's was 0.001"
        ]
        falling = optax.piecewise_constant_schedule(1.0, {3: 0.5})
        assert "is 0.5 at this step" in told(optax.adam(falling))[0]
        assert "0 at this step" in told(optax.adam(0.0))[0]
        assert told(optax.adam(optax.linear_schedule(RATE, 0.0, 50))) != []
        assert told(optax.inject_hyperparams(optax.adam)(0.5)) == [
            "learning_rate is 0.001 as in the checkpoint, not 0.5"
        ]


def test_stock_radam_at_a_small_eps_goes_ahead_with_a_notice() -> None:
    state = state_of(lambda p: T.RAdam(p, RATE))
    with jax.enable_x64(True):
        told = notices_of(lambda: convert.load_optimizer(state, optax.radam(RATE), MLP.flax()))
    assert len(told) == 1
    assert "convert.optim.radam is exact" in told[0]


def test_differing_steps() -> None:
    state = state_of(lambda p: T.Adam(p, RATE))
    for name in state.steps:
        if "bias" in name:
            state.steps[name] = 9
    with jax.enable_x64(True):
        twin = MLP.flax()
        with pytest.raises(UsageError, match=r"numbers of updates differ \(3, 9\)"):
            convert.load_optimizer(state, optax.adam(RATE), twin)
        parts = optax.multi_transform(
            {"kernels": optax.adam(RATE), "rest": optax.adam(RATE)}, by_kind
        )
        filled = convert.load_optimizer(state, parts, twin)
        assert from_optax(filled, twin).steps == state.steps


def test_sgd_needs_the_step_for_its_schedule() -> None:
    state = state_of(lambda p: T.SGD(p, RATE, 0.9))
    tx = optax.sgd(optax.constant_schedule(RATE), 0.9)
    with jax.enable_x64(True):
        twin = MLP.flax()
        told = notices_of(lambda: convert.load_optimizer(state, tx, twin))
        assert "does not count" in told[0]
        filled = convert.load_optimizer(state, tx, twin, step=3)
        assert int(filled[1].count) == 3
        assert notices_of(lambda: convert.load_optimizer(state, tx, twin, step=3)) == []


def test_parameters_that_were_never_updated() -> None:
    module = MLP.torch()
    for name, p in module.named_parameters():
        p.requires_grad_(not name.startswith("fc1"))
    optimizer = T.Adam(module.named_parameters(), RATE)
    MLP.train_torch(module, optimizer, 3)
    state = from_torch(optimizer, model=module)
    assert "fc1.weight" in state.params
    assert "fc1.weight" not in state.slots["exp_avg"]
    with jax.enable_x64(True):
        twin = MLP.flax()
        told = notices_of(lambda: convert.load_optimizer(state, optax.adam(RATE), twin))
        assert told == ["never updated so far, their moments are zero: fc1.bias, fc1.kernel"]
    other = T.Adam(MLP.torch().named_parameters(), RATE)
    fresh = from_torch(other)
    with jax.enable_x64(True):
        told = notices_of(lambda: convert.load_optimizer(fresh, optax.adam(RATE), twin))
        assert "has made no update" in told[0]


def test_sizes_that_divide_the_parameters_are_not_tried() -> None:
    state = state_of(lambda p: T.Adam(p, RATE))
    tx = optax.masked(optax.adam(RATE, 0.5), lambda p: jax.tree.map(lambda x: x.size > 1, p))
    big = optax.multi_transform(
        {"big": optax.adam(RATE, 0.5), "small": optax.adam(RATE)},
        lambda p: jax.tree.map(lambda x: "big" if x.size > 20 else "small", p),
    )
    with jax.enable_x64(True):
        with pytest.raises(UsageError, match=r"b1 is 0\.5"):
            convert.load_optimizer(state, tx, MLP.flax())
        told = notices_of(lambda: convert.load_optimizer(state, big, MLP.flax()))
    assert "by their sizes" in told[0]


def test_float32_is_told_where_it_rounds() -> None:
    state = state_of(lambda p: T.Adam(p, RATE))
    single = build(MLP.model, MLP.config, "flax", MLP.weights(), param_dtype="float32")
    told = notices_of(lambda: convert.load_optimizer(state, optax.adam(RATE), single))
    assert told == ["moments are rounded from float64 to float32"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_moments_return_bit_for_bit(dtype: str) -> None:
    module = build(MLP.model, MLP.config, "torch", MLP.weights(), param_dtype=dtype)
    optimizer = T.AdamW(module.named_parameters(), RATE)
    given = torch.from_numpy(MLP.model.inputs(MLP.config)["x"]).to(getattr(torch, dtype))
    for _ in range(3):
        module(given).sum().backward()
        optimizer.step()
    state = from_torch(optimizer, model=module)
    twin = build(MLP.model, MLP.config, "flax", MLP.weights(), param_dtype=dtype)
    filled = convert.load_optimizer(state, optax.adamw(RATE, weight_decay=0.01), twin)
    again = from_optax(filled, twin)
    assert state_bits(again) == state_bits(state)
    other = T.AdamW(module.named_parameters(), RATE)
    fill_torch(again, other, module)
    assert state_bits(from_torch(other, model=module)) == state_bits(state)


def test_adam_of_before_torch_2_8_may_be_adamw() -> None:
    state = state_of(lambda p: T.AdamW(p, RATE))
    del state.groups[0].options["decoupled_weight_decay"]
    state = replace(state, rule="Adam")
    with jax.enable_x64(True):
        coupled = optax.chain(optax.add_decayed_weights(0.01), optax.adam(RATE))
        for tx in (coupled, optax.adamw(RATE, weight_decay=0.01)):
            assert notices_of(lambda tx=tx: convert.load_optimizer(state, tx, MLP.flax())) == []
        with pytest.raises(UsageError, match=r"weight_decay is 0\.1, not 0\.01"):
            convert.load_optimizer(state, optax.adamw(RATE, weight_decay=0.1), MLP.flax())


@pytest.mark.parametrize("what", ["two", "amsgrad", "another optimizer"])
def test_such_a_tree_is_not_read_either(what: str) -> None:
    _, tx, problem, _ = WRONG[what]
    with jax.enable_x64(True):
        twin = MLP.flax()
        with pytest.raises(UsageError, match=problem):
            from_optax(tx().init(params_of(twin)), twin)


def test_the_module_is_of_the_optimizer_s_framework() -> None:
    state = state_of(lambda p: T.Adam(p, RATE))
    module = MLP.torch()
    with pytest.raises(UsageError, match="not an NNX module"):
        convert.load_optimizer(state, optax.adam(RATE), module)
    with jax.enable_x64(True):
        twin = MLP.flax()
    for wrong in (None, twin):
        with pytest.raises(UsageError, match="not a torch module"):
            convert.load_optimizer(state, T.Adam(module.parameters(), RATE), wrong)
