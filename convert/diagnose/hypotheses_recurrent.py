"""Why a recurrent net or cell gives something else."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from convert.diagnose.case import Candidates, Case, Finding, first_fit, tensors_of

GATES = {4: "ifgo", 3: "rzn", 1: "h"}


def recurrent(case: Case) -> Finding | None:
    """nn.RNN, nn.GRU, nn.LSTM and their cells."""
    own = tensors_of(case.module)
    hidden = case.module.hidden_size
    count = next(v.shape[0] for k, v in own.items() if k.startswith("weight_hh")) // hidden
    return (
        first_fit(case, _biases(case, own, count, hidden))
        or first_fit(case, _gates(case, own, count, hidden))
        or first_fit(case, _formulas(case, own, count, hidden))
    )


def _biases(case: Case, own: dict[str, np.ndarray], count: int, hidden: int) -> Candidates:
    ih = [n for n in own if n.startswith("bias_ih")]
    hh = [n for n in own if n.startswith("bias_hh")]
    advice = "keep both of torch's biases, or add them up where the cell has one"
    for names, what in ((ih, "bias_ih"), (hh, "bias_hh"), (ih + hh, "both biases")):
        made = case.variant(tensors={n: np.zeros_like(own[n]) for n in names})
        yield made, Finding("bias_missing", f"Flax leaves out {what}", advice, what)
    for names, what in ((ih, "bias_ih"), (hh, "bias_hh")):
        made = case.variant(tensors={n: 2 * own[n] for n in names})
        yield made, Finding("bias_twice", f"Flax adds {what} twice", advice, what)
    swapped = {a: own[b] for a, b in (*zip(ih, hh, strict=True), *zip(hh, ih, strict=True))}
    yield (
        case.variant(tensors=swapped),
        Finding("bias_order", "bias_ih and bias_hh are swapped in Flax", advice, "bias_ih"),
    )
    if count == 3:
        n = slice(2 * hidden, None)
        for one, other, what in ((ih, hh, "input"), (hh, ih, "hidden")):
            moved = {k: own[k].copy() for k in (*ih, *hh)}
            for a, b in zip(one, other, strict=True):
                moved[a][n] += moved[b][n]
                moved[b][n] = 0
            word = (
                f"the two biases of gate n are added up on its {what} side; "
                "torch's GRU scales one of them by r"
            )
            made = case.variant(tensors=moved)
            yield made, Finding("gru_bias", word, "keep bias_hh of gate n apart, inside r * (...)")


def _gates(case: Case, own: dict[str, np.ndarray], count: int, hidden: int) -> Candidates:
    if count == 1:
        return
    letters = GATES[count]
    for order in itertools.permutations(range(count)):
        if order == tuple(range(count)):
            continue
        rows = np.concatenate([np.arange(g * hidden, (g + 1) * hidden) for g in order])
        for prefixes in (("weight", "bias"), ("weight_ih", "bias_ih"), ("weight_hh", "bias_hh")):
            tensors = {n: v[rows] for n, v in own.items() if n.startswith(prefixes)}
            word = f"torch's gates are {_list(letters)}; Flax takes them for {_list(_named(order, letters))}"  # noqa: E501
            advice = f"reorder the gates' blocks to {_list(letters)}"
            yield case.variant(tensors=tensors), Finding("gates", word, advice)


def _named(order: Iterable[int], letters: str) -> str:
    """Which gate Flax takes each of torch's blocks for, block by block."""
    used = list(order)
    return "".join(letters[used.index(i)] for i in range(len(used)))


def _list(letters: str) -> str:
    return ",".join(letters)


def _formulas(case: Case, own: dict[str, np.ndarray], count: int, hidden: int) -> Candidates:
    m = case.module
    if count == 1:
        other = "relu" if getattr(m, "nonlinearity", "tanh") == "tanh" else "tanh"
        changes = {"nonlinearity": other, "mode": f"RNN_{other.upper()}"}
        yield (
            case.variant(changes if hasattr(m, "mode") else {"nonlinearity": other}),
            Finding("activation", f"Flax's recurrence is by {other}, torch's is not",
                    "the same nonlinearity on both sides"),
        )  # fmt: skip
    if getattr(m, "num_layers", 1) > 1 or getattr(m, "bidirectional", False):
        return
    steps = _steps(case)
    if steps is None:
        return
    x, batch_first = steps
    for cause, what, made in _unrolled(own, count, x):
        if made.ndim == 3 and batch_first:
            made = made.swapaxes(0, 1)
        yield made, Finding(cause, what, "compute the recurrence as torch documents it")


def _steps(case: Case) -> tuple[np.ndarray, bool] | None:
    """A net's input as (T, B, F), started at zero."""
    x = case.input()
    if x is None or x.ndim != 3 or case.input(1) is not None or not hasattr(case.module, "mode"):
        return None
    return (x.swapaxes(0, 1), True) if case.module.batch_first else (x, False)


def _unrolled(
    own: dict[str, np.ndarray], count: int, x: np.ndarray
) -> Iterable[tuple[str, str, np.ndarray]]:
    """Outputs of all steps by formulas that are not torch's."""
    w_ih, w_hh = (
        next(v for k, v in own.items() if k.startswith(p)) for p in ("weight_ih", "weight_hh")
    )
    b_ih, b_hh = (
        next((v for k, v in own.items() if k.startswith(p)), np.zeros(len(w_ih)))
        for p in ("bias_ih", "bias_hh")
    )
    if count == 3:
        for cause, what, step in (
            ("gru_reset", "Flax's reset gate acts on h before the product, torch's after it", 0),
            ("gru_update", "Flax's update gate weighs the new state, torch's the old one", 1),
            ("gru_bias", "Flax leaves the hidden bias of gate n out of r * (...)", 2),
        ):
            yield cause, what, _gru(x, w_ih, w_hh, b_ih, b_hh, step)
    if count == 4:
        made = _lstm(x, w_ih, w_hh, b_ih + b_hh, 1.0)
        yield "forget_bias", "Flax adds 1 to the forget gate", made


def _gru(x: np.ndarray, w_ih: np.ndarray, w_hh: np.ndarray, b_ih: np.ndarray, b_hh: np.ndarray,
         variant: int) -> np.ndarray:  # fmt: skip
    H = w_hh.shape[1]
    h, outputs = np.zeros((x.shape[1], H)), []
    for step in x:
        xr, xz, xn = np.split(step @ w_ih.T + b_ih, 3, -1)
        hr, hz, hn = np.split(h @ w_hh.T + b_hh, 3, -1)
        r, z = _sigmoid(xr + hr), _sigmoid(xz + hz)
        if variant == 0:
            hn = (r * h) @ w_hh[2 * H :].T + b_hh[2 * H :]
            n = np.tanh(xn + hn)
        elif variant == 2:
            n = np.tanh(xn + r * (hn - b_hh[2 * H :]) + b_hh[2 * H :])
        else:
            n = np.tanh(xn + r * hn)
        h = (1 - z) * h + z * n if variant == 1 else (1 - z) * n + z * h
        outputs.append(h)
    return np.stack(outputs)


def _lstm(x: np.ndarray, w_ih: np.ndarray, w_hh: np.ndarray, b: np.ndarray, forget: float
          ) -> np.ndarray:  # fmt: skip
    h = c = np.zeros((x.shape[1], w_hh.shape[1]))
    outputs = []
    for step in x:
        i, f, g, o = np.split(step @ w_ih.T + h @ w_hh.T + b, 4, -1)
        c = _sigmoid(f + forget) * c + _sigmoid(i) * np.tanh(g)
        h = _sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))
