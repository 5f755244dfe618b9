"""torch's side of an optimizer's state, names, and the rules in NumPy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from optimizer_bench import (
    CASES,
    MLP,
    RATE,
    Lion,
    T,
    decay_groups,
    notices_of,
    state_bits,
    state_of,
    trained,
)
from support import every_family

import convert
from convert.training_state import explanation, rules
from convert.training_state.canonical_names import layout_of, part
from convert.training_state.optax_state import from_optax, module_shapes
from convert.training_state.state import Group, OptimizerState
from convert.training_state.torch_state import fill_torch, from_torch
from zoo.containers.errors import UsageError
from zoo.layout import Layout
from zoo.model import Config, Model

pytestmark = pytest.mark.filterwarnings("ignore::zoo.loading.LoadNotice")


# --- Names ---


def test_names_come_from_the_optimizer_the_objects_or_the_order() -> None:
    module, optimizer = trained(MLP, lambda p: T.Adam(p, RATE))
    want = from_torch(optimizer)  # made from named parameters
    bare = {**optimizer.state_dict()}
    bare["param_groups"] = [
        {k: v for k, v in g.items() if k != "param_names"} for g in bare["param_groups"]
    ]
    with pytest.raises(UsageError, match="6 parameters in 1 groups have no names"):
        from_torch(bare)
    names = [n for n, _ in module.named_parameters()]
    for state in (
        from_torch(optimizer, model=module),
        from_torch(bare, names),
        from_torch(bare, model=module),
    ):
        assert state_bits(state) == state_bits(want)
    with pytest.raises(UsageError, match=r"5 names \(5 different\) for 6"):
        from_torch(bare, names[1:])
    with pytest.raises(UsageError, match="6 of the optimizer's parameters are not the model's"):
        from_torch(optimizer, model=MLP.torch())


def test_an_optimizer_of_parameters_in_another_order() -> None:
    module = MLP.torch()
    optimizer = T.Adam(list(module.parameters())[::-1], RATE)
    MLP.train_torch(module, optimizer, 3)
    want = state_of(lambda p: T.Adam(p, RATE))
    assert state_bits(from_torch(optimizer, model=module)) == state_bits(
        replace(want, slots={s: dict(reversed(v.items())) for s, v in want.slots.items()})
    )
    compiled = torch.nn.Module()
    compiled._orig_mod = module
    assert set(from_torch(optimizer, model=compiled).params) == set(want.params)
    named = T.Adam(compiled.named_parameters(), RATE)  # "_orig_mod.fc1.weight", ...
    assert set(from_torch(named).params) == set(want.params)


def test_a_module_of_ones_own_comes_with_its_layout() -> None:
    class Own(nnx.Module):
        def __init__(self) -> None:
            self.inner = MLP.flax()

    state = state_of(lambda p: T.Adam(p, RATE))
    with jax.enable_x64(True):
        own = Own()
        with pytest.raises(UsageError, match="Own is not a model of the zoo") as e:
            convert.load_optimizer(state, optax.adam(RATE), own)
        assert "layout=" in e.value.advice
        data = MLP.layout.to_json()
        for entry in data:
            entry["flax"] = {f"inner.{n}": s for n, s in entry["flax"].items()}
        layout = Layout.from_json(data)
        filled = convert.load_optimizer(state, optax.adam(RATE), own, layout=layout)
        assert state_bits(from_optax(filled, layout)) == state_bits(state)
        inside = convert.load_optimizer(
            state, optax.adam(RATE), own.inner, layout=part(layout, "inner")
        )
        assert state_bits(from_optax(inside, part(layout, "inner"))) == state_bits(state)
        with pytest.raises(UsageError, match="nothing in the layout lies below 'outer'"):
            part(layout, "outer")


@every_family()
def test_a_twin_is_told_by_its_module(model: Model, config: Config) -> None:
    module = nnx.eval_shape(lambda: model.definition("flax")(config, rngs=nnx.Rngs(0)))
    found = layout_of(module, module_shapes(module))
    want = [e for e in model.layout_of(config).entries if e.collection == "params"]
    assert [e for e in found.entries if e.collection == "params"] == want


# --- torch's side ---


def test_hyper_parameters_are_taken_where_they_are_known() -> None:
    state = state_of(lambda p: T.Adam(p, RATE, (0.8, 0.99), 1e-6))
    module = MLP.torch()
    other = T.Adam(module.named_parameters(), 0.5, amsgrad=False)
    (told,) = notices_of(lambda: fill_torch(state, other, module))
    assert "betas (0.9, 0.999) to (0.8, 0.99), eps 1e-08 to 1e-06, lr 0.5 to 0.001" in told
    group = other.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (RATE, (0.8, 0.99), 1e-6)
    unknown = replace(state, groups=[Group(state.params, {"lr": 0.25})])
    other = T.Adam(module.named_parameters(), 0.5)
    told = notices_of(lambda: fill_torch(unknown, other, module))
    assert other.param_groups[0]["lr"] == 0.25
    assert len(told) == 2
    assert "which are the optimizer's own: amsgrad, betas, eps, weight_decay" in told[1]


def test_groups_that_are_divided_otherwise_keep_their_options() -> None:
    state = state_of(lambda named: T.AdamW(decay_groups(named), RATE))
    module = MLP.torch()
    other = T.AdamW(module.named_parameters(), 0.5)
    told = notices_of(lambda: fill_torch(state, other, module))
    assert "1 groups, the state 2 others" in told[0]
    assert other.param_groups[0]["lr"] == 0.5
    same = T.AdamW(decay_groups(list(module.named_parameters())), RATE)
    assert notices_of(lambda: fill_torch(state, same, module)) == []
    assert [g["weight_decay"] for g in same.param_groups] == [0.1, 0.0]
    assert state_bits(from_torch(same, model=module)) == state_bits(state)


REFUSED: dict[str, tuple[Callable[[], OptimizerState], Callable[[Any], Any], str]] = {
    "rule": (
        lambda: state_of(lambda p: T.Adam(p, RATE)),
        lambda p: T.RMSprop(p, RATE),
        "state is of Adam, the optimizer is RMSprop",
    ),
    "weight decay": (
        lambda: state_of(lambda p: T.Adam(p, RATE, weight_decay=0.1)),
        lambda p: T.AdamW(p, RATE),
        "updates are not those of AdamW",
    ),
    "radam": (
        lambda: state_of(lambda p: T.Adam(p, RATE)),
        lambda p: T.RAdam(p, RATE),
        "updates are not those of RAdam",
    ),
    "amsgrad": (
        lambda: replace(state_of(lambda p: T.Adam(p, RATE)), groups=[Group(tuple(MLP.weights()))]),
        lambda p: T.Adam(p, RATE, amsgrad=True),
        "lacks max_exp_avg_sq",
    ),
    "momentum": (
        lambda: replace(
            state_of(lambda p: T.SGD(p, RATE, 0.9)), groups=[Group(tuple(MLP.weights()))]
        ),
        lambda p: T.SGD(p, RATE),
        "has momentum_buffer, unlike a SGD",
    ),
    "names": (
        lambda: state_of(lambda p: T.Adam([x for x in p if "fc1" not in x[0]], RATE)),
        lambda p: T.Adam(p, RATE),
        "only in the optimizer: fc1.weight, fc1.bias",
    ),
    "surplus": (
        lambda: state_of(lambda p: T.Adam(p, RATE)),
        lambda p: T.Adam([x for x in p if "fc1" not in x[0]], RATE),
        "only in the state: fc1.weight, fc1.bias",
    ),
    "shape": (
        lambda: reshaped(state_of(lambda p: T.Adam(p, RATE))),
        lambda p: T.Adam(p, RATE),
        "exp_avg of fc3.bias is 4, the parameter is 2",
    ),
    "unknown": (
        lambda: state_of(lambda p: T.Adam(p, RATE)),
        lambda p: T.Rprop(p, RATE),
        "Rprop is not an optimizer that is known",
    ),
}


def reshaped(state: OptimizerState) -> OptimizerState:
    state.slots["exp_avg"]["fc3.bias"] = np.zeros(4)  # the last of all
    return state


@pytest.mark.parametrize("what", REFUSED)
def test_a_torch_optimizer_is_filled_whole_or_not_at_all(what: str) -> None:
    state, make, problem = REFUSED[what]
    given = state()
    module, optimizer = trained(MLP, make)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(UsageError, match=problem):
        fill_torch(given, optimizer, module)
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for key, kept in before["state"].items():
        assert kept.keys() == after["state"][key].keys()
        for slot, value in kept.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][key][slot]))


def test_what_is_filled_is_what_load_state_dict_would_leave() -> None:
    for make, _ in CASES.values():
        module, optimizer = trained(MLP, make)
        state = from_torch(optimizer, model=module)
        ours, theirs = (make(list(module.named_parameters())) for _ in range(2))
        fill_torch(state, ours, module)
        theirs.load_state_dict(optimizer.state_dict())
        a, b = ours.state_dict(), theirs.state_dict()
        assert a["param_groups"] == b["param_groups"]
        assert a["state"].keys() == b["state"].keys()
        for key, kept in b["state"].items():
            assert a["state"][key].keys() == {k for k, v in kept.items() if v is not None}
            for slot, value in a["state"][key].items():
                # load_state_dict gives NAdam's product, made in float32, its parameter's dtype.
                assert value.dtype == kept[slot].dtype or slot == "mu_product"
                assert torch.equal(value.to(kept[slot].dtype), kept[slot])


def test_an_unknown_torch_optimizer_is_refused() -> None:
    _, optimizer = trained(MLP, lambda p: T.Rprop(p, RATE))
    with pytest.raises(UsageError, match="not known: options"):
        from_torch(optimizer.state_dict())


# --- Rules ---

REFERENCES = {
    "SGD": lambda p: T.SGD(p, RATE, 0.9, 0.3, 0.1),
    "SGD nesterov": lambda p: T.SGD(p, RATE, 0.9, nesterov=True, maximize=True),
    "Adam": lambda p: T.Adam(p, RATE, weight_decay=0.1),
    "AMSGrad": lambda p: T.Adam(p, RATE, amsgrad=True),
    "AdamW": lambda p: T.AdamW(p, RATE),
    "Adagrad": lambda p: T.Adagrad(p, RATE, 0.1, 0.1),
    "RMSprop": lambda p: T.RMSprop(p, RATE, 0.9, 1e-3, 0.1, 0.9, True),
    "Adadelta": lambda p: T.Adadelta(p, RATE, weight_decay=0.1),
    "NAdam": lambda p: T.NAdam(p, RATE, weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam": lambda p: T.RAdam(p, RATE, eps=1e-3, weight_decay=0.1),
    "Lion": lambda p: Lion(p, RATE, weight_decay=0.1),
    "SGD plain": lambda p: T.SGD(p, RATE, weight_decay=0.1, maximize=True),
    "Adam ascending": lambda p: T.Adam(p, RATE, amsgrad=True, weight_decay=0.1, maximize=True),
    "AdamW ascending": lambda p: T.AdamW(p, RATE, (0.8, 0.99), 1e-3, amsgrad=True, maximize=True),
    "Adagrad ascending": lambda p: T.Adagrad(p, RATE, weight_decay=0.1, maximize=True),
    "RMSprop ascending": lambda p: T.RMSprop(p, RATE, weight_decay=0.1, maximize=True),
    "Adadelta ascending": lambda p: T.Adadelta(p, RATE, 0.8, 1e-3, maximize=True),
    "NAdam ascending": lambda p: T.NAdam(p, RATE, (0.8, 0.99), 1e-3, 0.1, 0.01, maximize=True),
    "RAdam ascending": lambda p: T.RAdam(
        p, RATE, weight_decay=0.1, decoupled_weight_decay=True, maximize=True
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_the_rules_that_others_are_held_against_are_torchs(name: str) -> None:
    rng = np.random.default_rng(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # NAdam keeps a product in the default dtype
    try:
        p = torch.nn.Parameter(torch.tensor(rng.normal(size=50)))
        optimizer = REFERENCES[name]([p])
        for t in range(1, 13):
            state = {k: v.numpy().copy() for k, v in optimizer.state[p].items() if k != "step"}
            options, start = optimizer.param_groups[0], p.detach().numpy().copy()
            if t == 1 and not name.startswith(("SGD", "Adagrad")):
                state = {s: np.zeros(50) for s in rules.rules()[type(optimizer).__name__].slots}
                state["mu_product"] = np.ones(())
            g = rng.normal(size=50)
            p.grad = torch.tensor(g)
            optimizer.step()
            rule = rules.rules()[type(optimizer).__name__]
            direction, kept = rule.update(options, state, t, g, start)
            assert np.abs(start - RATE * direction - p.detach().numpy()).max() < 1e-14
            for slot, value in kept.items():
                assert np.abs(value - optimizer.state[p][slot].numpy()).max() < 1e-14, slot
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", [n for n in REFERENCES if not n.startswith("SGD")])
def test_a_rule_takes_elements_with_numbers_of_updates_of_their_own(name: str) -> None:
    rng = np.random.default_rng(0)
    optimizer = REFERENCES[name]([torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))])
    rule, options = rules.rules()[type(optimizer).__name__], optimizer.param_groups[0]
    slots = {s: rng.uniform(0.1, 0.2, 6) for s in rule.kept(options)}
    t, (g, p) = np.array([1.0, 2, 3, 9, 300, 5000]), rng.normal(size=(2, 6))
    together, _ = rule.update(options, slots, t, g, p)
    for i in range(6):
        one = {s: a[i : i + 1] for s, a in slots.items()}
        alone, _ = rule.update(options, one, t[i], g[i : i + 1], p[i : i + 1])
        assert alone == pytest.approx(together[i], rel=1e-14)


def test_stock_variants_of_the_rules() -> None:
    """What the refusals name is what optax does."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        for name, tx, options in (
            ("Adam", optax.nadam(1.0), {"nesterov": True}),
            ("Adam", optax.adam(1.0, eps_root=1e-3), {"eps_root": 1e-3}),
            ("RAdam", optax.radam(1.0, eps=1e-3), {"eps": 1e-3}),
        ):
            rule = explanation.STOCK[name]
            base = {"betas": (0.9, 0.999), "eps": 1e-8, **options}
            p = rng.normal(size=9)
            state = tx.init(jnp.asarray(p))
            kept: Any = {"exp_avg": np.zeros(9), "exp_avg_sq": np.zeros(9)}
            for t in range(1, 10):
                g = rng.normal(size=9)
                u, state = tx.update(jnp.asarray(g), state, jnp.asarray(p))
                direction, kept = rule(base, kept, t, g, p)
                assert np.abs(np.asarray(u) + direction).max() < 1e-12
            assert kept.keys() == {"exp_avg", "exp_avg_sq"}


def test_a_plugin_gives_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name, value = "sign", "sign:RULE"

        def load(self) -> Any:
            return rules.Rule("Sign", ("last",), frozenset({"sign"}), needs=("last",))

    class Broken(Point):
        def load(self) -> Any:
            raise ImportError("gone")

    def points(group: str) -> list[Any]:
        assert group == "zooconvert.optimizers"
        return [Broken(), Point()]

    monkeypatch.setattr(rules, "entry_points", points)
    rules.rules.cache_clear()
    try:
        with pytest.warns(UserWarning, match="the plugin sign .* is broken: gone"):
            assert rules.rules()["Sign"].slots == ("last",)
        assert rules.rule_of({"lr": 1, "sign": True}, {"last"}) == "Sign"
        assert "Lion" in rules.rules()
    finally:
        rules.rules.cache_clear()
