"""torch's recurrent nets and cells in NNX: its parameters, its gates, both of its biases.

Flax's own cells have one bias, other gates and no float64. Here every parameter has torch's name
and shape, so that a checkpoint comes back bit for bit and the twins train alike.

T steps of B sequences, F features in, H hidden units, L layers, D directions (1 or 2), G gates. In
time-major order sequences are (T, B, F); with `batch_first` they are (B, T, F), and states stay
(L*D, B, H).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from zoo.nn.options_flax import Options

State = tuple[Array, ...]
# (W_ih x + b_ih, (B, G*H); state, (B, H) each; W_hh; b_hh) -> next state, whose first part is the
# output. Sums are grouped as in torch: (W_ih x + b_ih) + (W_hh h + b_hh).
Step = Callable[[Array, State, Array, Array], State]


def _rnn_tanh_step(projected: Array, state: State, w: Array, b: Array) -> State:
    return (jnp.tanh(projected + (state[0] @ w.T + b)),)


def _rnn_relu_step(projected: Array, state: State, w: Array, b: Array) -> State:
    return (jax.nn.relu(projected + (state[0] @ w.T + b)),)


def _gru_step(projected: Array, state: State, w: Array, b: Array) -> State:
    (h,) = state
    xr, xz, xn = jnp.split(projected, 3, axis=-1)
    hr, hz, hn = jnp.split(h @ w.T + b, 3, axis=-1)
    r, z = jax.nn.sigmoid(xr + hr), jax.nn.sigmoid(xz + hz)
    n = jnp.tanh(xn + r * hn)  # r scales b_hn, so the two biases of n are not one
    return (n + z * (h - n),)


def _lstm_step(projected: Array, state: State, w: Array, b: Array) -> State:
    h, c = state
    i, f, g, o = jnp.split(projected + (h @ w.T + b), 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


_RNN_STEPS: dict[str, Step] = {"tanh": _rnn_tanh_step, "relu": _rnn_relu_step}


def _rnn(nonlinearity: str) -> Step:
    if nonlinearity not in _RNN_STEPS:
        raise ValueError(f"nonlinearity {nonlinearity!r} is neither tanh nor relu")
    return _RNN_STEPS[nonlinearity]


_LEAVES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _parameters(
    module: nnx.Module,
    suffix: str,
    gates: int,
    width: int,
    hidden: int,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> None:
    """Sets the four parameters of one direction of one layer, named and initialised as in torch."""
    bound = hidden**-0.5
    rows = gates * hidden
    for leaf, shape in zip(_LEAVES, ((rows, width), (rows, hidden), (rows,), (rows,)), strict=True):
        value = jax.random.uniform(rngs.params(), shape, dtype, -bound, bound)
        setattr(module, leaf + suffix, nnx.Param(value))


def _weights(module: nnx.Module, suffix: str) -> list[Array]:
    """W_ih, W_hh, b_ih and b_hh of one direction of one layer."""
    return [getattr(module, leaf + suffix)[...] for leaf in _LEAVES]


def _common(dtype: DTypeLike | None, *arrays: Array) -> DTypeLike:
    """`dtype`; None: the dtype that all arrays promote to together."""
    return jnp.result_type(*(a.dtype for a in arrays)) if dtype is None else dtype


def _scan(
    step: Step,
    x: Array,
    state: State,
    weights: list[Array],
    inside: Array | None,
    reverse: bool,
) -> tuple[Array, State]:
    """One direction of one layer: x (T, B, F), state of (B, H) each -> outputs (T, B, H), state.

    `inside` (T, B) is false after a sequence's end. There the state does not change and the output
    is zero, so that the reverse direction starts with its first state at the sequence's last step.
    """
    w_ih, w_hh, b_ih, b_hh = weights
    projected = x @ w_ih.T + b_ih  # all steps at once

    def body(state: State, at: tuple[Array, Array | None]) -> tuple[State, Array]:
        projected, inside = at
        new = step(projected, state, w_hh, b_hh)
        if inside is None:
            return new, new[0]
        valid = inside[:, None]
        kept = tuple(jnp.where(valid, n, s) for n, s in zip(new, state, strict=True))
        return kept, jnp.where(valid, new[0], 0)

    # `inside` may be None: a pytree without leaves, which the scan passes on as it is.
    final, outputs = jax.lax.scan(body, state, (projected, inside), reverse=reverse)
    return outputs, final


class RecurrentOptions(Options, total=False):
    """What RNN, GRU and LSTM take besides their sizes."""

    batch_first: bool
    dropout: float  # on the outputs of every layer but the last, in training
    bidirectional: bool


class _Recurrent(nnx.Module):
    """What the three nets share: their parameters, and the order of layers and directions."""

    gates: ClassVar[int]
    parts: ClassVar[int] = 1  # of a state; the LSTM has two

    def __init__(
        self,
        step: Step,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.step = step
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
        self.suffixes = ("", "_reverse") if bidirectional else ("",)
        self.dtype = dtype
        width = input_size
        for layer in range(num_layers):
            for suffix in self.suffixes:
                name = f"_l{layer}{suffix}"
                _parameters(self, name, self.gates, width, hidden_size, param_dtype, rngs)
            width = hidden_size * len(self.suffixes)

    def _run(
        self, input: Array, states: State | None, lengths: Array | None
    ) -> tuple[Array, State]:
        """Sequences, first states (one array, for the LSTM two) or None -> as RNN.__call__.

        Computed in `dtype`, or in what the input, states and parameters promote to together.
        """
        given = states or ()
        suffixes = [f"_l{layer}{s}" for layer in range(self.num_layers) for s in self.suffixes]
        weights = [_weights(self, suffix) for suffix in suffixes]
        dtype = _common(self.dtype, input, *given, *(w for four in weights for w in four))
        x = jnp.asarray(input, dtype)
        x = x.swapaxes(0, 1) if self.batch_first else x
        T, B, _ = x.shape
        if not given:
            given = (jnp.zeros((len(suffixes), B, self.hidden_size), dtype),) * self.parts
        inside = None if lengths is None else jnp.arange(T)[:, None] < jnp.asarray(lengths)
        finals: list[State] = []
        for layer in range(self.num_layers):
            if layer and self.dropout is not None:
                x = self.dropout(x)
            outputs = []
            for suffix in self.suffixes:
                i = len(finals)
                first = tuple(jnp.asarray(s[i], dtype) for s in given)
                cast = [w.astype(dtype) for w in weights[i]]
                output, final = _scan(self.step, x, first, cast, inside, suffix != "")
                outputs.append(output)
                finals.append(final)
            x = jnp.concatenate(outputs, axis=-1)
        output = x.swapaxes(0, 1) if self.batch_first else x
        return output, tuple(jnp.stack(part) for part in zip(*finals, strict=True))


class RNN(_Recurrent):
    """nn.RNN: h = tanh(W_ih x + b_ih + W_hh h + b_hh), or ReLU."""

    gates = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        nonlinearity: str = "tanh",
        **kw: Unpack[RecurrentOptions],
    ) -> None:
        super().__init__(_rnn(nonlinearity), input_size, hidden_size, num_layers, **kw)

    def __call__(
        self, input: Array, hx: Array | None = None, lengths: Array | None = None
    ) -> tuple[Array, Array]:
        """Sequences, first state (L*D, B, H) -> outputs with D*H features, final state.

        `hx` None is zeros. `lengths` (B,), integers from 1 to T, end each sequence early: outputs
        after its last step are zero, the final state is that of its last step, and the reverse
        direction starts there.
        """
        output, (h,) = self._run(input, None if hx is None else (hx,), lengths)
        return output, h


class GRU(_Recurrent):
    """nn.GRU. Gates r, z, n; the hidden part of n, its bias included, is scaled by r."""

    gates = 3

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        **kw: Unpack[RecurrentOptions],
    ) -> None:
        super().__init__(_gru_step, input_size, hidden_size, num_layers, **kw)

    def __call__(
        self, input: Array, hx: Array | None = None, lengths: Array | None = None
    ) -> tuple[Array, Array]:
        """As RNN.__call__."""
        output, (h,) = self._run(input, None if hx is None else (hx,), lengths)
        return output, h


class LSTM(_Recurrent):
    """nn.LSTM. Gates i, f, g, o."""

    gates = 4
    parts = 2

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        **kw: Unpack[RecurrentOptions],
    ) -> None:
        super().__init__(_lstm_step, input_size, hidden_size, num_layers, **kw)

    def __call__(
        self,
        input: Array,
        hx: tuple[Array, Array] | None = None,
        lengths: Array | None = None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """As RNN.__call__; states are pairs (h, c)."""
        output, (h, c) = self._run(input, hx, lengths)
        return output, (h, c)


class _Cell(nnx.Module):
    """One step. Parameters weight_ih, weight_hh, bias_ih, bias_hh."""

    gates: ClassVar[int]
    parts: ClassVar[int] = 1

    def __init__(
        self,
        step: Step,
        input_size: int,
        hidden_size: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.step = step
        self.hidden_size = hidden_size
        self.dtype = dtype
        _parameters(self, "", self.gates, input_size, hidden_size, param_dtype, rngs)

    def _run(self, input: Array, state: State | None) -> State:
        """input (B, F), state of (B, H) each, zeros if None -> next state."""
        given, weights = state or (), _weights(self, "")
        dtype = _common(self.dtype, input, *given, *weights)
        w_ih, w_hh, b_ih, b_hh = (w.astype(dtype) for w in weights)
        x, *parts = (jnp.asarray(a, dtype) for a in (input, *given))
        if not parts:
            parts = [jnp.zeros((x.shape[0], self.hidden_size), dtype)] * self.parts
        return self.step(x @ w_ih.T + b_ih, tuple(parts), w_hh, b_hh)


class RNNCell(_Cell):
    """nn.RNNCell: one step of RNN."""

    gates = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        nonlinearity: str = "tanh",
        **kw: Unpack[Options],
    ) -> None:
        super().__init__(_rnn(nonlinearity), input_size, hidden_size, **kw)

    def __call__(self, input: Array, hx: Array | None = None) -> Array:
        """input (B, F), state (B, H), zeros if None -> next state (B, H)."""
        return self._run(input, None if hx is None else (hx,))[0]


class GRUCell(_Cell):
    """nn.GRUCell: one step of GRU."""

    gates = 3

    def __init__(self, input_size: int, hidden_size: int, **kw: Unpack[Options]) -> None:
        super().__init__(_gru_step, input_size, hidden_size, **kw)

    def __call__(self, input: Array, hx: Array | None = None) -> Array:
        """input (B, F), state (B, H), zeros if None -> next state (B, H)."""
        return self._run(input, None if hx is None else (hx,))[0]


class LSTMCell(_Cell):
    """nn.LSTMCell: one step of LSTM."""

    gates = 4
    parts = 2

    def __init__(self, input_size: int, hidden_size: int, **kw: Unpack[Options]) -> None:
        super().__init__(_lstm_step, input_size, hidden_size, **kw)

    def __call__(self, input: Array, hx: tuple[Array, Array] | None = None) -> tuple[Array, Array]:
        """input (B, F), (h, c) both (B, H), zeros if None -> next (h, c)."""
        h, c = self._run(input, hx)
        return h, c
