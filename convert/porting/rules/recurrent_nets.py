"""LSTM, GRU and plain recurrent nets. x (T, B, F), or (B, T, F) where batch_first; (T, F) too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from convert.porting.rules import rule
from convert.porting.rules.promote import refuse
from convert.porting.rules.random_draws import dropped

Rng = Callable[[], Any]
Step = Callable[[tuple[Any, ...], Any, Any], tuple[Any, ...]]


def _lstm_step(state: tuple[Any, ...], gates: Any, turn: Any) -> tuple[Any, ...]:
    h, c = state
    i, f, g, o = jnp.split(gates + turn(h), 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _gru_step(state: tuple[Any, ...], gates: Any, turn: Any) -> tuple[Any, ...]:
    (h,) = state
    r, z, n = jnp.split(gates, 3, axis=-1)
    hr, hz, hn = jnp.split(turn(h), 3, axis=-1)
    r, z = jax.nn.sigmoid(r + hr), jax.nn.sigmoid(z + hz)
    n = jnp.tanh(n + r * hn)
    return ((1 - z) * n + z * h,)


def _plain_step(activation: Callable[[Any], Any]) -> Step:
    def step(state: tuple[Any, ...], gates: Any, turn: Any) -> tuple[Any, ...]:
        return (activation(gates + turn(state[0])),)

    return step


def _linear(x: Any, weight: Any, bias: Any) -> Any:
    y = x @ weight.T
    return y if bias is None else y + bias


def _one_way(
    step: Step, x: Any, state: tuple[Any, ...], weights: Sequence[Any], reverse: bool
) -> tuple[Any, tuple[Any, ...]]:
    """One layer in one direction: outputs (T, B, H) and the last state."""
    w_ih, w_hh, b_ih, b_hh = weights

    def body(carry: tuple[Any, ...], gates: Any) -> tuple[tuple[Any, ...], Any]:
        new = step(carry, gates, lambda h: _linear(h, w_hh, b_hh))
        return new, new[0]

    last, outputs = lax.scan(body, state, _linear(x, w_ih, b_ih), reverse=reverse)
    return outputs, last


def _layers(
    step: Step,
    x: Any,
    states: Sequence[Any],
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    rng: Rng,
) -> tuple[Any, ...]:
    """(output, *last states), a state (layers * directions, B, H)."""
    single = x.ndim == 2
    if single:
        x, states = x[:, None], [s[:, None] for s in states]
    elif batch_first:
        x = jnp.swapaxes(x, 0, 1)
    each, ways = (4 if has_biases else 2), (2 if bidirectional else 1)
    if len(params) != each * ways * num_layers:
        raise refuse("a recurrent net with projections (proj_size)")
    lasts: list[tuple[Any, ...]] = []
    for layer in range(num_layers):
        outputs = []
        for way in range(ways):
            at = layer * ways + way
            weights = [*params[at * each : (at + 1) * each], None, None][:4]
            state = tuple(s[at] for s in states)
            y, last = _one_way(step, x, state, weights, bool(way))
            outputs.append(y)
            lasts.append(last)
        x = jnp.concatenate(outputs, axis=-1) if ways > 1 else outputs[0]
        if train and dropout and layer + 1 < num_layers:
            x, _ = dropped(x, dropout, rng)
    found = [jnp.stack(parts) for parts in zip(*lasts, strict=True)]
    if single:
        return x[:, 0], *(f[:, 0] for f in found)
    return (jnp.swapaxes(x, 0, 1) if batch_first else x), *found


@rule("aten.lstm.input", random=True)
def lstm(
    x: Any,
    hx: Sequence[Any],
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    rng: Rng,
) -> tuple[Any, ...]:
    options = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
    return _layers(_lstm_step, x, hx, params, *options, rng)


_STEPS: dict[str, Step] = {
    "gru": _gru_step,
    "rnn_tanh": _plain_step(jnp.tanh),
    "rnn_relu": _plain_step(jax.nn.relu),
}


def _enter(name: str, step: Step) -> None:
    def net(
        x: Any,
        hx: Any,
        params: Sequence[Any],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
        *,
        rng: Rng,
    ) -> tuple[Any, ...]:
        options = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
        return _layers(step, x, [hx], params, *options, rng)

    def cell(x: Any, h: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
        gates = _linear(x, w_ih, b_ih)
        return step((h,), gates, lambda h: _linear(h, w_hh, b_hh))[0]

    rule(f"aten.{name}.input", random=True)(net)
    rule(f"aten.{name}_cell.default")(cell)


for _name, _function in _STEPS.items():
    _enter(_name, _function)


@rule("aten.lstm_cell.default")
def lstm_cell(
    x: Any, hx: Sequence[Any], w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None
) -> tuple[Any, ...]:
    gates = _linear(x, w_ih, b_ih)
    return _lstm_step(tuple(hx), gates, lambda h: _linear(h, w_hh, b_hh))


@rule(
    "aten.lstm.data",
    "aten.gru.data",
    "aten.rnn_tanh.data",
    "aten.rnn_relu.data",
)
def packed(*_: Any, **__: Any) -> Any:
    raise refuse("a recurrent net over a PackedSequence: its batch sizes depend on values")
