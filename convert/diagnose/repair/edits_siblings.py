"""Other operations in place of torch's: activations, reductions, powers, comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from convert.diagnose.repair.edit import Edit, Node, dims_of
from convert.program.operations import is_reflected
from convert.program.replay import At

Unary = Callable[[Any], Any]


def activations() -> dict[str, Unary]:
    """What is put after a layer, by name."""
    import torch
    from torch.nn import functional

    return {
        "gelu (erf)": functional.gelu,
        "gelu (tanh)": lambda x: functional.gelu(x, approximate="tanh"),
        "gelu (quick, x sigmoid(1.702 x))": lambda x: x * torch.sigmoid(1.702 * x),
        "relu": torch.relu, "silu": functional.silu, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
        "hard sigmoid": functional.hardsigmoid,
        "hard sigmoid, clip(0.2 x + 0.5)": lambda x: (0.2 * x + 0.5).clamp(0, 1),
        "hard swish": functional.hardswish, "relu6": functional.relu6, "elu": functional.elu,
        "selu": functional.selu, "softplus": functional.softplus, "mish": functional.mish,
        "leaky relu (0.01)": lambda x: functional.leaky_relu(x, 0.01),
        "leaky relu (0.1)": lambda x: functional.leaky_relu(x, 0.1),
        "leaky relu (0.2)": lambda x: functional.leaky_relu(x, 0.2),
        "squared relu": lambda x: torch.relu(x) ** 2, "log sigmoid": functional.logsigmoid,
        "soft sign": functional.softsign, "hard tanh": functional.hardtanh,
        "exp": torch.exp, "tanh shrink": functional.tanhshrink,
        "softmax over the last axis": lambda x: torch.softmax(x, -1),
    }  # fmt: skip


ACTIVATIONS = {
    "gelu", "relu", "silu", "sigmoid", "tanh", "hardsigmoid", "hardswish", "relu6", "elu", "selu",
    "softplus", "mish", "leaky_relu", "logsigmoid", "softsign", "hardtanh", "celu", "tanhshrink",
    "prelu", "softmax", "log_softmax",
}  # fmt: skip
_FAMILIES: tuple[tuple[str, ...], ...] = (
    ("sin", "cos", "tan", "sinh", "tanh"), ("exp", "expm1", "exp2"),
    ("log", "log1p", "log2", "log10"), ("sqrt", "rsqrt", "square", "reciprocal", "abs"),
    ("floor", "round", "ceil", "trunc"), ("softplus", "exp"), ("tril", "triu"),
    ("maximum", "minimum"), ("argmax", "argmin"), ("abs", "square", "relu"), ("erf", "tanh"),
    ("zeros", "ones"), ("zeros_like", "ones_like"), ("logical_and", "logical_or"),
    ("logical_not", "clone"), ("invert", "clone"), ("neg", "clone"),
    ("cumsum", "cumprod", "logcumsumexp", "sum"),
)  # fmt: skip
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b, "pow": lambda a, b: a**b, "floordiv": lambda a, b: a // b,
}  # fmt: skip
COMPARED: dict[str, Callable[[Any, Any], Any]] = {
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b, "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
}  # fmt: skip


def siblings(node: Node) -> Iterator[Edit]:
    """Operations that are taken for this one."""
    name = node.name
    if name in ACTIVATIONS:
        yield from _activation(node)
    yield from _family(node)
    if name in _REDUCTIONS:
        yield from _reduction(node)
    if name in _BINARY or name in COMPARED:
        yield from _operator(node)
    if name == "softmax":
        yield node.edit(1.5, "operation", "a sigmoid in place of the softmax",
                        lambda at: at.args[0].sigmoid())  # fmt: skip
    if "pool" in name:
        yield from _pools(node)
    if name in ("where", "masked_fill"):
        yield node.edit(1.0, "mask", "the mask inverted", _inverted)
    if name in ("scatter_add", "index_add"):
        yield node.edit(1.2, "operation", "the last value in place of the sum", _last_one)
    if name == "pad":
        yield from _padding(node)
    if name == "glu":
        yield node.edit(1.0, "operand", "the first half taken as the gate, not the second",
                        _other_gate)  # fmt: skip
    if name == "linspace":
        yield node.edit(1.0, "constant", "the same number of values spaced by equal factors",
                        _spaced)  # fmt: skip


def _activation(node: Node) -> Iterator[Edit]:
    gelus = node.name == "gelu"
    for said, function in activations().items():
        why = "gelu" if gelus and said.startswith("gelu") else "activation"
        if said.startswith("softmax") and "softmax" in node.name:
            continue  # over another axis: no other activation

        def change(at: At, function: Unary = function) -> Any:
            return function(at.args[0])

        yield node.edit(1.0, why, f"{said} in place of {node.name}", change)


def _family(node: Node) -> Iterator[Edit]:
    import torch

    for family in _FAMILIES:
        if node.name not in family or not node.operation.args:
            continue
        for other in family:
            function = getattr(torch, other, None)
            if other == node.name or function is None:
                continue

            def change(at: At, function: Any = function) -> Any:
                return function(*at.args, **at.kwargs)

            why = {"tril": "causal", "triu": "causal", "invert": "mask"}.get(node.name, "operation")
            said = f"{other} in place of {node.name}"
            if other == "clone":
                said = f"no {node.name}"
                why = "mask" if node.name != "neg" else "operation"
            yield node.edit(1.0, why, said, change)


def _reduce() -> dict[str, Callable[[Any, Any, bool], Any]]:
    import torch

    return {
        "mean": lambda x, d, k: x.mean(d, keepdim=k), "sum": lambda x, d, k: x.sum(d, keepdim=k),
        "max": lambda x, d, k: x.amax(d, keepdim=k), "min": lambda x, d, k: x.amin(d, keepdim=k),
        "logsumexp": lambda x, d, k: x.logsumexp(d, keepdim=k),
        "median": lambda x, d, k: x.quantile(0.5, d, keepdim=k),
        "std": lambda x, d, k: x.std(d, keepdim=k),
        "std over n": lambda x, d, k: x.std(d, unbiased=False, keepdim=k),
        "var": lambda x, d, k: x.var(d, keepdim=k),
        "var over n": lambda x, d, k: x.var(d, unbiased=False, keepdim=k),
        "sum over n - 1": lambda x, d, k: x.sum(d, keepdim=k) / (_count(x, d) - 1),
        "mean square": lambda x, d, k: (x * x).mean(d, keepdim=k),
        "root of the sum of squares": lambda x, d, k: (x * x).sum(d, keepdim=k).sqrt(),
        "root of the mean square": lambda x, d, k: (x * x).mean(d, keepdim=k).sqrt(),
        "sum of squares": lambda x, d, k: (x * x).sum(d, keepdim=k),
        "mean of absolute values": lambda x, d, k: x.abs().mean(d, keepdim=k),
        "first element": lambda x, d, k: _taken(x, d, 0, k),
        "last element": lambda x, d, k: _taken(x, d, -1, k),
        "product": lambda x, d, k: torch.exp(x.abs().log().sum(d, keepdim=k)),
    }  # fmt: skip


_REDUCTIONS = {
    "mean", "sum", "max", "min", "amax", "amin", "logsumexp", "median", "std", "var", "norm",
    "prod",
}  # fmt: skip
_SAME = {"amax": "max", "amin": "min"}


def _count(x: Any, dims: Any) -> int:
    return math.prod(x.shape[d] for d in ((dims,) if isinstance(dims, int) else dims))


def _taken(x: Any, dims: Any, index: int, keep: bool) -> Any:
    d = dims if isinstance(dims, int) else dims[0]
    made = x.select(d, index)
    return made.unsqueeze(d) if keep else made


def _reduction(node: Node) -> Iterator[Edit]:
    found = dims_of(node.operation)
    dims: Any = found[1] if found else tuple(range(node.tensors[0].ndim))
    keep = bool(node.operation.kwargs.get("keepdim", node.operation.kwargs.get("keepdims", False)))
    if found and found[0][0] != "kwargs" and len(node.operation.args) > found[0][0] + 1:
        last = node.operation.args[-1]
        keep = last if isinstance(last, bool) else keep
    for said, reduce in _reduce().items():
        if said == _SAME.get(node.name, node.name):
            continue

        def change(at: At, reduce: Any = reduce) -> Any:
            return reduce(at.args[0], dims, keep)

        variance = node.name in ("var", "std") and said.startswith(node.name)
        variance = variance or said == "sum over n - 1"
        why = "unbiased_variance" if variance else "operation"
        why = "token" if "element" in said else why
        yield node.edit(1.0, why, f"the {said} in place of the {node.name}", change)


def _operator(node: Node) -> Iterator[Edit]:
    table = _BINARY if node.name in _BINARY else COMPARED
    turned = is_reflected(node.operation.function)
    mask = table is COMPARED
    for other, function in table.items():
        if other == node.name:
            continue

        def change(at: At, function: Any = function) -> Any:
            a, b = at.args[:2]
            return function(b, a) if turned else function(a, b)

        why = "mask" if mask else counting(node) or "operation"
        if {node.name, other} in ({"lt", "le"}, {"gt", "ge"}):
            why = "offset"
        yield node.edit(1.2, why, f"{other} in place of {node.name}", change)
    same = table[node.name]

    def swapped(at: At) -> Any:
        a, b = at.args[:2]
        return same(a, b) if turned else same(b, a)

    if node.name not in ("add", "mul"):
        yield node.edit(1.0, "operand", f"{node.name} with its operands exchanged", swapped)


def _pools(node: Node) -> Iterator[Edit]:
    from torch.nn import functional

    x, out = node.tensors[0], node.out
    whole = x.ndim == out.ndim == 4 and not any(
        a % b for a, b in zip(x.shape, out.shape, strict=True)
    )
    if "avg" in node.name and whole and out.shape[2:] != x.shape[2:]:
        (h, w), (n, m) = out.shape[2:], (x.shape[2] // out.shape[2], x.shape[3] // out.shape[3])
        yield node.edit(1.0, "rearranged", "means over pixels that lie apart, not over blocks",
                        lambda at: at.args[0].unflatten(3, (m, w)).unflatten(2, (n, h))
                        .mean((2, 4)))  # fmt: skip
    for other in ("max", "avg"):
        for n in (1, 2, 3):
            name = f"{other}_pool{n}d"
            if not node.name.endswith(f"pool{n}d") or node.name.startswith(
                (other, "adaptive_" + other)
            ):
                continue
            prefix = "adaptive_" if node.name.startswith("adaptive") else ""
            function = getattr(functional, prefix + name)

            def change(at: At, function: Any = function) -> Any:
                kwargs = {k: v for k, v in at.kwargs.items() if k in ("stride", "padding")}
                return function(*at.args[:4], **kwargs)

            yield node.edit(1.0, "pooling", f"{other} pooling in place of {node.name}", change)


def _other_gate(at: At) -> Any:
    dim = at.kwargs.get("dim", at.args[1] if len(at.args) > 1 else -1)
    a, b = at.args[0].chunk(2, dim)
    return a.sigmoid() * b


def _spaced(at: At) -> Any:
    import torch

    made = at.run()
    first, last = (float(made[i]) for i in (0, -1))
    made = torch.logspace(math.log(first), math.log(last), made.numel(), base=math.e,
                          dtype=torch.float64)  # fmt: skip
    return made.to(at.run().dtype)


def _padding(node: Node) -> Iterator[Edit]:
    """What is put around an input, put elsewhere."""
    from torch.nn import functional

    pads = node.operation.args[1] if len(node.operation.args) > 1 else node.operation.kwargs["pad"]
    if not isinstance(pads, tuple | list) or not all(isinstance(p, int) for p in pads):
        return
    total = [pads[i] + pads[i + 1] for i in range(0, len(pads), 2)]
    forms = {
        "what is after put before": [x for t in total for x in (t, 0)],
        "what is before put after": [x for t in total for x in (0, t)],
        "the same before and after": [x for t in total for x in (t // 2, t - t // 2)],
        "nothing": [0] * len(pads),
    }
    for said, form in forms.items():
        if list(pads) == form:
            continue

        def change(at: At, form: list[int] = form) -> Any:
            rest = {k: v for k, v in at.kwargs.items() if k != "pad"}
            return functional.pad(at.args[0], form, *at.args[2:], **rest)

        yield node.edit(1.0, "padding", f"padding {tuple(form)}: {said}", change)
    for mode in ("reflect", "replicate", "circular", "constant"):

        def other(at: At, mode: str = mode) -> Any:
            return functional.pad(at.args[0], pads, mode=mode)

        yield node.edit(1.0, "padding", f"{mode} padding", other)
    if not any(total):
        shifts = {-1 - i // 2: pads[i] for i in range(0, len(pads), 2) if pads[i]}

        def rolled(at: At) -> Any:
            return at.args[0].roll(tuple(shifts.values()), tuple(shifts))

        yield node.edit(1.0, "padding", "what is cut off put in at the other end", rolled)


def _inverted(at: At) -> Any:
    import torch

    if at.operation.name == "where":
        return torch.where(at.args[0], at.args[2], at.args[1])
    return at.args[0].masked_fill(~at.args[1].bool(), *at.args[2:], **at.kwargs)


def _last_one(at: At) -> Any:
    import torch

    x, dim, index, source = at.args[:4]
    made = x.clone()
    if at.operation.name == "scatter_add":
        return made.scatter_(dim, index, source)
    return torch.Tensor.index_copy_(made, dim, index, source)


ALONG_LAST = ("divided by its length", "normalised", "centred")  # of what may be inserted


def inserted() -> dict[str, tuple[str, Unary]]:
    """What may be done to a value that torch leaves as it is: what is said, cause, function."""
    import torch
    from torch.nn import functional

    more: dict[str, tuple[str, Unary]] = {
        f"{said} added": ("activation", f)
        for said, f in activations().items()
        if said.split(" ")[0] in ("gelu", "relu", "silu", "sigmoid", "tanh", "softplus", "exp")
    }

    def normed(x: Any) -> Any:
        return functional.layer_norm(x, x.shape[-1:], eps=1e-5)

    more |= {
        "rounded to bfloat16": ("dtype", lambda x: x.to(torch.bfloat16).to(x.dtype)),
        "rounded to float16": ("dtype", lambda x: x.to(torch.float16).to(x.dtype)),
        "negated": ("scale", torch.neg),
        "squared": ("operation", torch.square),
        "replaced by its sign": ("operation", torch.sign),
        "divided by its length": ("left_out", lambda x: functional.normalize(x, dim=-1)),
        "normalised": ("left_out", normed),
        "spread over -1 to 1, not 0 to 1": ("scale", lambda x: 2 * x - 1),
        "spread over 0 to 1, not -1 to 1": ("scale", lambda x: (x + 1) / 2),
        "centred": ("left_out", lambda x: x - x.mean(-1, keepdim=True)),
        "with its last two axes exchanged": ("transposed", lambda x: x.transpose(-1, -2)),
        "with its first two axes exchanged": ("transposed", lambda x: x.transpose(0, 1)),
        "with its axes 1 and 2 exchanged": ("transposed", lambda x: x.transpose(1, 2)),
        "divided by sqrt of its last axis": ("scale", lambda x: x / math.sqrt(x.shape[-1])),
        "times sqrt of its last axis": ("scale", lambda x: x * math.sqrt(x.shape[-1])),
    }
    for d in (-1, -2, 1, 2):
        more[f"back to front along axis {d}"] = ("reversed", partial(torch.flip, dims=(d,)))
        for by in (1, -1):
            more[f"rolled by {by} along axis {d}"] = (
                "offset", partial(torch.roll, shifts=by, dims=d))  # fmt: skip
    return more


def counting(node: Node) -> str | None:
    """The word where a plain number is added to whole numbers: positions, places, ids."""
    plain = len(node.operation.refs) == 1 and node.name in ("add", "sub")
    return "offset" if plain and not node.out.is_floating_point() else None
