"""Our optax transformations against torch.optim, and stock optax beside them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from convert import optim

T = torch.optim
RATE = 1e-2
_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(32, 8))
Y = np.tanh(X @ _RNG.normal(size=(8, 8)))
W = 0.3 * _RNG.normal(size=(8, 8))
STEPS = 100


def torch_losses(make: Callable[[Any], Any], rates: Any = None) -> np.ndarray:
    w, b = torch.nn.Parameter(torch.tensor(W)), torch.nn.Parameter(torch.zeros(8).double())
    optimizer, losses = make([w, b]), []
    for i in range(STEPS):
        if rates is not None:
            optimizer.param_groups[0]["lr"] = rates[i]
        loss = ((torch.tanh(torch.tensor(X) @ w + b) - torch.tensor(Y)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def optax_losses(tx: Any, dtype: Any = "float64") -> np.ndarray:
    x, y = jnp.asarray(X, dtype), jnp.asarray(Y, dtype)
    params = {"w": jnp.asarray(W, dtype), "b": jnp.zeros(8, dtype)}

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        loss, g = jax.value_and_grad(lambda p: ((jnp.tanh(x @ p["w"] + p["b"]) - y) ** 2).mean())(
            params
        )
        updates, state = tx.update(g, state, params)
        assert all(u.dtype == dtype for u in jax.tree.leaves(updates))
        return loss, optax.apply_updates(params, updates), state

    state, losses = tx.init(params), []
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), state)
    for _ in range(STEPS):
        loss, params, state = step(params, state)
        losses.append(float(loss))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == shapes
    return np.array(losses)


def gap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a / b - 1).max())


OURS = {
    "SGD": (lambda p: T.SGD(p, RATE), lambda: optim.sgd(RATE)),
    "SGD dampening": (
        lambda p: T.SGD(p, RATE, 0.9, 0.1, weight_decay=0.1),
        lambda: optim.sgd(RATE, 0.9, 0.1, 0.1),
    ),
    "SGD nesterov": (
        lambda p: T.SGD(p, RATE, 0.9, nesterov=True),
        lambda: optim.sgd(RATE, 0.9, nesterov=True),
    ),
    "SGD maximize": (
        lambda p: T.SGD(p, RATE, 0.5, weight_decay=0.1, maximize=True),
        lambda: optim.sgd(RATE, 0.5, weight_decay=0.1, maximize=True),
    ),
    "Adam": (
        lambda p: T.Adam(p, RATE, weight_decay=0.1),
        lambda: optim.adam(RATE, weight_decay=0.1),
    ),
    "AMSGrad": (lambda p: T.Adam(p, RATE, amsgrad=True), lambda: optim.adam(RATE, amsgrad=True)),
    "AdamW": (lambda p: T.AdamW(p, RATE), lambda: optim.adamw(RATE)),
    "AdamW amsgrad": (
        lambda p: T.AdamW(p, RATE, (0.8, 0.99), 1e-3, 0.1, amsgrad=True),
        lambda: optim.adamw(RATE, 0.8, 0.99, 1e-3, 0.1, amsgrad=True),
    ),
    "Adagrad": (lambda p: T.Adagrad(p, RATE), lambda: optim.adagrad(RATE)),
    "Adagrad decay": (
        lambda p: T.Adagrad(p, RATE, 0.1, 0.1, 0.1, 1e-2),
        lambda: optim.adagrad(RATE, 0.1, 0.1, 0.1, 1e-2),
    ),
    "RMSprop": (lambda p: T.RMSprop(p, 1e-3), lambda: optim.rmsprop(1e-3)),
    "RMSprop all": (
        lambda p: T.RMSprop(p, 1e-3, 0.9, 1e-3, 0.1, 0.9, True),
        lambda: optim.rmsprop(1e-3, 0.9, 1e-3, 0.1, 0.9, True),
    ),
    "NAdam": (lambda p: T.NAdam(p, 2e-3), lambda: optim.nadam(2e-3)),
    "NAdam decay": (
        lambda p: T.NAdam(p, RATE, (0.8, 0.99), 1e-4, 0.1, 0.01, True),
        lambda: optim.nadam(RATE, 0.8, 0.99, 1e-4, 0.1, 0.01, True),
    ),
    "RAdam": (lambda p: T.RAdam(p, RATE), lambda: optim.radam(RATE)),
    "RAdam decay": (
        lambda p: T.RAdam(p, RATE, (0.8, 0.99), 1e-3, 0.1, True),
        lambda: optim.radam(RATE, 0.8, 0.99, 1e-3, 0.1, True),
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_ours_is_torch(name: str) -> None:
    make, tx = OURS[name]
    with jax.enable_x64(True):
        assert gap(optax_losses(tx()), torch_losses(make)) < 1e-12


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "RAdam", "AMSGrad", "RMSprop"])
def test_float32_stays_within_the_rounding_of_torch(name: str) -> None:
    make, tx = OURS[name]

    def single(p: Any) -> Any:
        for q in p:
            q.data = q.data.float()
        return make(p)

    def losses() -> np.ndarray:
        w, b = torch.nn.Parameter(torch.tensor(W)), torch.nn.Parameter(torch.zeros(8).double())
        optimizer, found = single([w, b]), []
        x, y = torch.tensor(X).float(), torch.tensor(Y).float()
        for _ in range(STEPS):
            loss = ((torch.tanh(x @ w + b) - y) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return np.array(found)

    exact, rough = torch_losses(make), losses()
    noise = max(np.abs(rough / exact - 1).max(), 2.0**-23)
    assert gap(optax_losses(tx(), "float32"), rough) <= 8 * noise


STOCK = {
    "SGD": (lambda p: T.SGD(p, RATE, 0.9), lambda: optax.sgd(RATE, 0.9), True),
    "SGD nesterov": (OURS["SGD nesterov"][0], lambda: optax.sgd(RATE, 0.9, True), True),
    "SGD dampening": (
        lambda p: T.SGD(p, RATE, 0.9, 0.1),
        lambda: optax.sgd(RATE, 0.9),
        False,
    ),
    "Adam": (lambda p: T.Adam(p, RATE), lambda: optax.adam(RATE), True),
    "AdamW": (OURS["AdamW"][0], lambda: optax.adamw(RATE, weight_decay=1e-2), True),
    "AMSGrad": (OURS["AMSGrad"][0], lambda: optax.amsgrad(RATE), False),
    "Adagrad": (OURS["Adagrad"][0], lambda: optax.adagrad(RATE, 0.0, 1e-10), False),
    "Adagrad eps 0": (
        lambda p: T.Adagrad(p, RATE, eps=0),
        lambda: optax.adagrad(RATE, 0.0, 0.0),
        True,
    ),
    "RMSprop": (
        lambda p: T.RMSprop(p, 1e-3),
        lambda: optax.rmsprop(1e-3, 0.99, eps_in_sqrt=False),
        True,
    ),
    "RMSprop defaults": (lambda p: T.RMSprop(p, 1e-3), lambda: optax.rmsprop(1e-3, 0.99), False),
    "Adadelta": (
        lambda p: T.Adadelta(p, 1.0, weight_decay=0.1),
        lambda: optax.adadelta(1.0, weight_decay=0.1),
        True,
    ),
    "NAdam": (OURS["NAdam"][0], lambda: optax.nadam(2e-3), False),
    "RAdam": (OURS["RAdam"][0], lambda: optax.radam(RATE), False),
    "RAdam eps 0": (
        lambda p: T.RAdam(p, RATE, eps=0),
        lambda: optax.radam(RATE, eps=0.0),
        True,
    ),
}


@pytest.mark.parametrize("name", STOCK)
def test_where_stock_optax_is_torch(name: str) -> None:
    make, tx, same = STOCK[name]
    with jax.enable_x64(True):
        found = gap(optax_losses(tx()), torch_losses(make))
    print(f"{name}: {found:.1e}")
    assert (found < 1e-11) if same else (found > 1e-9)


def test_a_schedule_is_torchs_and_stock_momentum_after_the_rate_is_not() -> None:
    rates = [1e-3 if i < 50 else 1e-4 for i in range(STEPS)]
    schedule = optax.piecewise_constant_schedule(1e-3, {50: 0.1})
    with jax.enable_x64(True):
        want = torch_losses(lambda p: T.RMSprop(p, 1e-3, momentum=0.9), rates)
        ours = optax_losses(optim.rmsprop(schedule, momentum=0.9))
        stock = optax_losses(optax.rmsprop(schedule, 0.99, eps_in_sqrt=False, momentum=0.9))
    print(f"stock: {gap(stock, want):.1e}, ours: {gap(ours, want):.1e}")
    assert gap(ours, want) < 1e-12
    assert gap(stock, want) > 1e-3


def test_ours_go_where_transformations_go() -> None:
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3), "none": None}
    grads = {"w": jnp.full((2, 3), 0.5), "b": jnp.ones(3), "none": None}
    parts = {"a": optim.nadam(1e-2), "z": optim.sgd(1e-2, 0.9, 0.1)}
    tx = optax.chain(
        optax.clip(1.0), optax.multi_transform(parts, {"w": "a", "b": "z", "none": "z"})
    )
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(grads, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    injected = optax.inject_hyperparams(optim.rmsprop)(1e-2, momentum=0.9)
    state = injected.init(params)
    _, after = jax.jit(injected.update)(grads, state, params)
    assert float(after.hyperparams["momentum"]) == pytest.approx(0.9)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="Nesterov"):
        optim.sgd(0.1, nesterov=True)
    tx = optim.adamw(0.1)
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))


def test_it_is_at_hand_after_import_convert() -> None:
    code = "import convert; convert.optim.nadam(1e-3)"
    subprocess.run([sys.executable, "-c", code], check=True)
