"""Why a recurrent net or cell gives something else."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from convert.diagnose.case import Candidates, Case, first_fit, tensors_of
from convert.diagnose.causes import Reason, found

GATES = {4: "ifgo", 3: "rzn", 1: "h"}


def recurrent(case: Case) -> Reason | None:
    """nn.RNN, nn.GRU, nn.LSTM and their cells."""
    return first_fit(case, _biases, _gru_biases, _gates, _nonlinearity, _formulas)


def _biases(case: Case) -> Candidates:
    own, ih, hh = _own(case)
    zero = {n: np.zeros_like(own[n]) for n in (*ih, *hh)}
    twice = {n: 2 * own[n] for n in (*ih, *hh)}
    for names, what in ((ih, "bias_ih"), (hh, "bias_hh"), (ih + hh, "both biases")):
        made = case.variant(tensors={n: zero[n] for n in names})
        yield made, found("bias_missing", "recurrent", name=what, tensor=what)
    for names, what in ((ih, "bias_ih"), (hh, "bias_hh")):
        made = case.variant(tensors={n: twice[n] for n in names})
        yield made, found("bias_twice", "recurrent", name=what, tensor=what)
    swapped = {a: own[b] for a, b in (*zip(ih, hh, strict=True), *zip(hh, ih, strict=True))}
    yield case.variant(tensors=swapped), found("bias_order", tensor="bias_ih")


def _gru_biases(case: Case) -> Candidates:
    """Both biases of gate n on one side."""
    if _count(case) != 3:
        return
    own, ih, hh = _own(case)
    n = slice(2 * case.module.hidden_size, None)
    for one, other, side in ((ih, hh, "input"), (hh, ih, "hidden")):
        moved = {k: own[k].copy() for k in (*ih, *hh)}
        for a, b in zip(one, other, strict=True):
            moved[a][n] += moved[b][n]
            moved[b][n] = 0
        yield case.variant(tensors=moved), found("gru_bias", "summed", side=side)


def _own(case: Case) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """The layer's tensors, and the names of its input and hidden biases."""
    own = tensors_of(case.module)
    names = [[n for n in own if n.startswith(side)] for side in ("bias_ih", "bias_hh")]
    return own, names[0], names[1]


def _count(case: Case) -> int:
    """The number of gates."""
    own = tensors_of(case.module)
    rows = next(v.shape[0] for k, v in own.items() if k.startswith("weight_hh"))
    return int(rows // case.module.hidden_size)


def _gates(case: Case) -> Candidates:
    own, count, hidden = tensors_of(case.module), _count(case), case.module.hidden_size
    if count == 1:
        return
    letters = GATES[count]
    for order in itertools.permutations(range(count)):
        if order == tuple(range(count)):
            continue
        rows = np.concatenate([np.arange(g * hidden, (g + 1) * hidden) for g in order])
        named = _list(_named(order, letters))
        for prefixes in (("weight", "bias"), ("weight_ih", "bias_ih"), ("weight_hh", "bias_hh")):
            tensors = {n: v[rows] for n, v in own.items() if n.startswith(prefixes)}
            made = case.variant(tensors=tensors)
            yield made, found("gates", "code", torch=_list(letters), flax=named)


def _named(order: Iterable[int], letters: str) -> str:
    """Which gate Flax takes each of torch's blocks for, block by block."""
    used = list(order)
    return "".join(letters[used.index(i)] for i in range(len(used)))


def _list(letters: str) -> str:
    return ",".join(letters)


def _nonlinearity(case: Case) -> Candidates:
    m = case.module
    if _count(case) == 1:
        ours = getattr(m, "nonlinearity", "tanh")
        other = "relu" if ours == "tanh" else "tanh"
        changes = {"nonlinearity": other}
        changes |= {"mode": f"RNN_{other.upper()}"} if hasattr(m, "mode") else {}
        yield case.variant(changes), found("activation", "recurrence", torch=ours, flax=other)


def _formulas(case: Case) -> Candidates:
    """Formulas that are not torch's, of one layer in one direction."""
    m = case.module
    if getattr(m, "num_layers", 1) > 1 or getattr(m, "bidirectional", False):
        return
    steps = _steps(case)
    if steps is None:
        return
    x, batch_first = steps
    for made, reason in _unrolled(tensors_of(m), _count(case), x):
        yield made.swapaxes(0, 1) if made.ndim == 3 and batch_first else made, reason


def _steps(case: Case) -> tuple[np.ndarray, bool] | None:
    """A net's input as (T, B, F), started at zero."""
    x = case.input()
    if x is None or x.ndim != 3 or case.input(1) is not None or not hasattr(case.module, "mode"):
        return None
    return (x.swapaxes(0, 1), True) if case.module.batch_first else (x, False)


def _unrolled(
    own: dict[str, np.ndarray], count: int, x: np.ndarray
) -> Iterator[tuple[np.ndarray, Reason]]:
    """Outputs of all steps by each formula."""
    w_ih, w_hh = (
        next(v for k, v in own.items() if k.startswith(p)) for p in ("weight_ih", "weight_hh")
    )
    b_ih, b_hh = (
        next((v for k, v in own.items() if k.startswith(p)), np.zeros(len(w_ih)))
        for p in ("bias_ih", "bias_hh")
    )
    if count == 3:
        for variant, reason in (
            ("reset", found("gru_reset")),
            ("update", found("gru_update")),
            ("bias", found("gru_bias")),
        ):
            yield _gru(x, (w_ih, w_hh), (b_ih, b_hh), variant), reason
    if count == 4:
        yield _lstm(x, (w_ih, w_hh), b_ih + b_hh, 1.0), found("forget_bias")


Two = tuple[np.ndarray, np.ndarray]  # for the input, and for the hidden state


def _gru(x: np.ndarray, weights: Two, biases: Two, variant: str) -> np.ndarray:
    (w_ih, w_hh), (b_ih, b_hh) = weights, biases
    H = w_hh.shape[1]
    h, outputs = np.zeros((x.shape[1], H)), []
    for step in x:
        xr, xz, xn = np.split(step @ w_ih.T + b_ih, 3, -1)
        hr, hz, hn = np.split(h @ w_hh.T + b_hh, 3, -1)
        r, z = _sigmoid(xr + hr), _sigmoid(xz + hz)
        if variant == "reset":
            hn = (r * h) @ w_hh[2 * H :].T + b_hh[2 * H :]
            n = np.tanh(xn + hn)
        elif variant == "bias":
            n = np.tanh(xn + r * (hn - b_hh[2 * H :]) + b_hh[2 * H :])
        else:
            n = np.tanh(xn + r * hn)
        h = (1 - z) * h + z * n if variant == "update" else (1 - z) * n + z * h
        outputs.append(h)
    return np.stack(outputs)


def _lstm(x: np.ndarray, weights: Two, bias: np.ndarray, forget: float) -> np.ndarray:
    w_ih, w_hh = weights
    h = c = np.zeros((x.shape[1], w_hh.shape[1]))
    outputs = []
    for step in x:
        i, f, g, o = np.split(step @ w_ih.T + h @ w_hh.T + bias, 4, -1)
        c = _sigmoid(f + forget) * c + _sigmoid(i) * np.tanh(g)
        h = _sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))
