"""nn.LSTM, nn.GRU and nn.RNN as a loop, with what differs between implementations as arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@dataclass(frozen=True)
class Style:
    """How a cell computes; the defaults are torch's."""

    order: str = ""  # of the gates: "ifgo", "rzn"
    reset: str = "after"  # a GRU's: "after" the product, "before" it, "bias outside" of it
    update: str = "keep"  # a GRU's update gate keeps the old state, or takes the "new" one
    forget: float = 0.0  # added to the forget gate
    biases: str = "ih"  # which are added
    activations: str = ""  # "gate,candidate,output"


def recurrent(
    cell: str, x: Any, states: Sequence[Any], weights: Sequence[Any], *, has_biases: bool,
    num_layers: int, bidirectional: bool, batch_first: bool, ways: str = "fb", joined: str = "fb",
    stack: str = "01", left: str = "", sizes: Any = None, masked: bool = True,
    only: Sequence[int] | None = None, **style: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """What torch.lstm, torch.gru and torch.rnn_* give: (outputs, last states).

    x is (B, T, I) or (T, B, I), `weights` are torch's flat weights. `ways`: in which direction the
    first and the second go, forward or backward; `joined`: how both are put together; `stack`: the
    order of the layers; `left`: which first state ("h", "c") is zero, or "swapped". Of packed
    sequences x is (N, I), `sizes` says how many have each step, and `masked` whether shorter ones
    wait meanwhile. The rest are of Style, for `only` some layers and
    directions (layer * directions + direction) if that is given.
    """
    import torch

    x = x.transpose(0, 1) if batch_first else x
    held = None if sizes is None else [torch.arange(int(sizes[0])) < n for n in sizes]
    x = x if held is None else _padded(x, held)
    waits = held if masked and held is not None else [None] * len(x)
    step, many = (4 if has_biases else 2), (2 if bidirectional else 1)
    ends: list[list[Any]] = [[], []]
    for layer in range(num_layers):
        at = int(stack[layer]) if layer < min(len(stack), num_layers) else layer
        outs = []
        for way in range(many):
            i = at * many + way
            given = states[::-1] if left == "swapped" else states
            first = [s[i] * (n != left) for s, n in zip(given, "hc", strict=False)]
            turn = -1 if ways[way] == "b" else 1
            steps = list(zip(x.unbind(0), waits, strict=True))[::turn]
            made, last = _run(cell, steps, first, weights[i * step : (i + 1) * step],
                              Style(**style) if only is None or i in only else Style())  # fmt: skip
            outs.append(torch.stack(made[::-1] if ways[way] == "b" and many == 2 else made))
            for end, state in zip(ends, last, strict=False):
                end.append(state)
        x = outs[0] if many == 1 else _joined(joined, *outs)
    x = x if held is None else torch.cat([a[m] for a, m in zip(x, held, strict=True)])
    x = x.transpose(0, 1) if batch_first else x
    return (x, *(torch.stack(e) for e in ends if e))


def _padded(x: Any, held: Sequence[Any]) -> Any:
    """Packed sequences (N, I) as (T, B, I)."""
    made = x.new_zeros(len(held), len(held[0]), x.shape[-1])
    start = 0
    for step, mask in zip(made, held, strict=True):
        count = int(mask.sum())
        step[:count] = x[start : start + count]
        start += count
    return made


def _joined(how: str, a: Any, b: Any) -> Any:
    """The outputs of the two directions as one."""
    import torch

    if how in ("sum", "mean"):
        return (a + b) / (1 if how == "sum" else 2)
    if how == "unflipped":
        b = b.flip(0)
    return torch.cat((b, a) if how == "bf" else (a, b), -1)


def _run(
    cell: str, steps: Sequence[Any], state: list[Any], parts: Sequence[Any], style: Style
) -> tuple[list[Any], list[Any]]:
    """The output of every step, and the last states. `steps`: inputs, each with who takes part."""
    import torch

    w_i, w_h, *b = parts
    b_i = b[0] if b and "i" in style.biases else torch.zeros_like(w_i[:, 0])
    b_h = b[1] if b and "h" in style.biases else torch.zeros_like(w_i[:, 0])
    names = style.activations.split(",") if style.activations else ["sigmoid", "tanh", "tanh"]
    functions = [_ACTIVATIONS.get(name) or getattr(torch, name) for name in names]
    advance = {"lstm": _lstm, "gru": _gru}.get(cell)
    made = []
    for x, mask in steps:
        before = state
        ours, its = x @ w_i.T + b_i, state[0] @ w_h.T
        if advance is not None:
            state = advance(ours, its, b_h, state, w_h, style, functions)
        else:
            inner = torch.relu if cell == "rnn_relu" else functions[1]
            state = [inner(ours + its + b_h)]
        if mask is not None:
            pairs = zip(state, before, strict=True)
            state = [torch.where(mask[:, None], new, old) for new, old in pairs]
        made.append(state[0])
    return made, state


_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "hard_sigmoid": lambda x: (x / 6 + 0.5).clamp(0, 1),
    "keras_hard_sigmoid": lambda x: (0.2 * x + 0.5).clamp(0, 1),
    "identity": lambda x: x,
}


def _lstm(
    ours: Any, its: Any, bias: Any, state: list[Any], w_h: Any, style: Style,
    functions: list[Callable[[Any], Any]],
) -> list[Any]:  # fmt: skip
    squash, inner, outer = functions
    gates = dict(zip(style.order or "ifgo", (ours + its + bias).chunk(4, -1), strict=True))
    kept = squash(gates["f"] + style.forget) * state[1]
    c = kept + squash(gates["i"]) * inner(gates["g"])
    return [squash(gates["o"]) * outer(c), c]


def _gru(
    ours: Any, its: Any, bias: Any, state: list[Any], w_h: Any, style: Style,
    functions: list[Callable[[Any], Any]],
) -> list[Any]:  # fmt: skip
    squash, inner, _ = functions
    order, h = style.order or "rzn", state[0]
    a = dict(zip(order, ours.chunk(3, -1), strict=True))
    b = dict(zip(order, (its + bias).chunk(3, -1), strict=True))
    r, z = squash(a["r"] + b["r"]), squash(a["z"] + b["z"])
    w_n = dict(zip(order, w_h.chunk(3, 0), strict=True))["n"].T
    b_n = dict(zip(order, bias.chunk(3, -1), strict=True))["n"]
    if style.reset == "before":
        held = (r * h) @ w_n + b_n
    elif style.reset == "after":
        held = r * (h @ w_n + b_n)
    else:
        held = r * (h @ w_n) + b_n
    n = inner(a["n"] + held)
    return [(1 - z) * n + z * h if style.update == "keep" else z * n + (1 - z) * h]


def as_recurrent(cell: str, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `recurrent` for those of torch.lstm and its like. NotImplementedError for
    what it does not take."""
    import torch

    sizes, batch_first = None, False
    if len(args) != 9:
        raise NotImplementedError
    if torch.is_tensor(args[1]) and not args[1].is_floating_point():  # packed
        x, sizes, states, weights, biases, layers, _, _, both = args
    else:
        x, states, weights, biases, layers, _, _, both, batch_first = args
    states = tuple(states) if cell == "lstm" else (states,)
    if len(weights) != layers * (2 if both else 1) * (4 if biases else 2) or x.ndim != (
        3 if sizes is None else 2
    ):
        raise NotImplementedError  # a projection, or a sequence without a batch
    return (cell, x, states, tuple(weights)), {
        "has_biases": biases, "num_layers": layers, "bidirectional": both,
        "batch_first": batch_first, "sizes": sizes,
    }  # fmt: skip
