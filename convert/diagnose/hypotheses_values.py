"""Why a value is another: what was done to what came before. For the code between layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from convert.diagnose.case import Candidates, Case, Rule, after, first, first_fit
from convert.diagnose.causes import Reason, found
from convert.diagnose.hypotheses_tensors import factor_name
from convert.matching.alignment import MASKED, gap, is_mask_bias

Function = Callable[[np.ndarray], np.ndarray]


def functions() -> dict[str, Function]:
    """Activations by name, on float64."""
    import torch
    import torch.nn.functional as F

    def of(f: Callable[..., torch.Tensor]) -> Function:
        return lambda x: f(torch.from_numpy(np.ascontiguousarray(x))).numpy()

    return {
        "no activation": lambda x: x,
        "gelu (erf)": of(F.gelu),
        "gelu (tanh)": of(lambda x: F.gelu(x, approximate="tanh")),
        "gelu (quick, x sigmoid(1.702 x))": of(lambda x: x * torch.sigmoid(1.702 * x)),
        "relu": of(F.relu),
        "silu": of(F.silu),
        "tanh": np.tanh,
        "sigmoid": of(torch.sigmoid),
        "leaky relu (0.01)": of(F.leaky_relu),
        "leaky relu (0.2)": of(lambda x: F.leaky_relu(x, 0.2)),
        "elu": of(F.elu),
        "selu": of(F.selu),
        "relu6": of(F.relu6),
        "squared relu": of(lambda x: F.relu(x) ** 2),
        "softplus": of(F.softplus),
        "mish": of(F.mish),
        "hard swish": of(F.hardswish),
        "hard sigmoid": of(F.hardsigmoid),
        "softsign": of(F.softsign),
    }


def dtype_cast(case: Case) -> Reason | None:
    """Every number is one of bfloat16 or float16, which torch's are not."""
    import torch

    t = case.target
    if not case.comparable or not np.isfinite(t).all() or len(np.unique(t)) < 4:
        return None
    if (t == np.rint(t)).all():
        return None
    scale = float(np.abs(case.right).max())
    for dtype, digits in ((torch.bfloat16, 8), (torch.float16, 11)):
        x, r = torch.from_numpy(np.ascontiguousarray(t)), torch.from_numpy(case.right.copy())
        ours = bool((r.to(dtype).double() == r).all())
        near = gap(t, case.right) <= 16 * scale * 2.0**-digits
        if near and not ours and bool((x.to(dtype).double() == x).all()):
            name = str(dtype).removeprefix("torch.")
            return found("dtype", dtype=name)
    return None


def low_precision(case: Case) -> Reason | None:
    """A layer's parameters rounded to 16 bits, and computed with in more."""
    import torch

    if case.module is None or case.call is None:
        return None
    own = {n: p.detach() for n, p in case.module.named_parameters(recurse=False)}
    for dtype in (torch.bfloat16, torch.float16):
        made = case.variant(tensors={n: p.to(dtype).double() for n, p in own.items()})
        if own and case.fits(made):
            return found("dtype", "parameters", dtype=str(dtype).removeprefix("torch."))
    return None


_DROPPED = 1 + 1e-4  # the least factor: a ReLU has 1


def dropout(case: Case) -> Reason | None:
    """Zeros here and there, and the rest larger by 1 / (1 - p)."""
    if not case.comparable:
        return None
    t, r = case.target, case.right
    gone = (t == 0) & (np.abs(r) > case.tolerance)
    kept = ~gone & (np.abs(r) > 1e3 * case.tolerance)
    if not gone.any() or not kept.any():
        return None
    factor = float(np.median(t[kept] / r[kept]))
    if factor < _DROPPED or not case.fits(np.where(gone, 0.0, r * factor)):
        return None
    return found("dropout", zeros=gone.mean(), factor=factor, p=1 - 1 / factor)


def activation(case: Case) -> Reason | None:
    """Another activation of something that came before, whatever was added to it."""
    table = functions()
    for name, x in case.past:
        if x.dtype.kind != "f" or x.shape != case.right.shape or not case.comparable:
            continue
        values = {k: f(x) for k, f in table.items()}
        ours = [k for k, v in values.items() if case.is_right(v)]
        for a, b in itertools.product(ours, table):
            if a != b and case.fits(values[b]):
                return activation_differs(after(name), a, b)
    for name, x in case.past:
        if x.dtype.kind != "f" or x.shape != case.right.shape or not case.comparable:
            continue
        values = {k: f(x) for k, f in table.items()}
        for a, b in itertools.permutations(table, 2):
            if "no activation" not in (a, b) and case.fits(case.right + values[b] - values[a]):
                return activation_differs(after(name), a, b)
    return None


def activation_differs(where: str, ours: str, theirs: str) -> Reason:
    """Which of `functions` torch has in a place, and which Flax."""
    if not (ours.startswith("gelu") and theirs.startswith("gelu")):
        return found("activation", where=where, torch=ours, flax=theirs)
    approximate = {"gelu (erf)": False, "gelu (tanh)": True}.get(ours)
    if approximate is None:
        return found("gelu", where=where, torch=ours, flax=theirs)
    return found("gelu", "jax", where=where, torch=ours, flax=theirs, approximate=approximate)


def gated(case: Case) -> Reason | None:
    """A product of two activations, each of the wrong one."""
    table = {k: f for k, f in functions().items() if k.split(" ")[0] in
             ("no", "gelu", "relu", "silu", "tanh", "sigmoid")}  # fmt: skip
    past = [(n, x) for n, x in case.past[:8] if x.shape == case.right.shape and x.dtype.kind == "f"]
    if not case.comparable or case.right.size > 200_000:
        return None
    for (n, x), (m, y) in itertools.combinations(past, 2):
        made = {k: (f(x), f(y)) for k, f in table.items()}
        ours = [(a, b) for a, b in itertools.product(table, repeat=2)
                if case.is_right(made[a][0] * made[b][1])]  # fmt: skip
        for (a, b), (c, d) in itertools.product(ours, itertools.product(table, repeat=2)):
            if (a, b) != (c, d) and case.fits(made[c][0] * made[d][1]):
                return found("activation", "gated", a=a, b=b, c=c, d=d, x=n, y=m)
    return None


def softmax_axis(case: Case) -> Reason | None:
    """A softmax over another axis."""

    def softmax(x: np.ndarray, axis: int) -> np.ndarray:
        e = np.exp(x - x.max(axis, keepdims=True))
        return np.asarray(e / e.sum(axis, keepdims=True))

    for name, x in case.past:
        if x.shape != case.right.shape or x.dtype.kind != "f" or x.size < 2:
            continue
        for log in (False, True):
            made = [softmax(x, a) for a in range(x.ndim)]
            made = [np.log(m) for m in made] if log else made
            ours = [a for a, m in enumerate(made) if case.is_right(m)]
            theirs = [a for a, m in enumerate(made) if case.fits(m)]
            if ours and theirs and ours[0] != theirs[0]:
                axis = ours[0] - x.ndim
                return found("softmax_axis", name=name, torch=ours[0], flax=theirs[0], axis=axis)
    return None


def order(case: Case) -> Reason | None:
    """The right numbers in another order: flattened otherwise, heads, halves, steps."""
    return first_fit(case, _axes, _last_axis, _heads_apart, _reversed)


def _last_axis(case: Case) -> Candidates:
    r = case.right
    images = [(n, x) for n, x in case.past if x.ndim in (3, 4, 5)]
    size = r.shape[-1] if r.ndim else 1
    for n in range(2, size):
        if size % n:
            continue
        made = r.reshape(*r.shape[:-1], n, -1).swapaxes(-1, -2).reshape(r.shape)
        image = next((name for name, x in images if x.shape[1] == n and r.ndim == 2), None)
        if image is not None:
            yield made, found("flatten", "value", name=image, channels=n, pixels=size // n)
        elif 2 in (n, size // n) and case.kind != "attention":  # halves, or neighbouring pairs
            yield made, found("rearranged", torch=f"{n} x {size // n}", flax=f"{size // n} x {n}")
        else:
            yield made, found("heads", "value", heads=n, width=size // n)
        yield np.roll(r, size // 2, -1), found("concat")


def _heads_apart(case: Case) -> Candidates:
    r = case.right
    if r.ndim >= 3:
        N, D = r.shape[-2:]
        flat = r.reshape(*r.shape[:-2], -1)
        other = flat.reshape(*r.shape[:-2], D, N).swapaxes(-1, -2)
        yield other, found("heads", "value", heads=N, width=D)


def _reversed(case: Case) -> Candidates:
    for axis in range(case.right.ndim):
        yield np.flip(case.right, axis), found("reversed", axis=axis)


def _axes(case: Case) -> Candidates:
    r = case.right
    for a, b in itertools.combinations(range(r.ndim), 2):
        if r.shape[a] == r.shape[b]:
            yield r.swapaxes(a, b), found("transposed", "value", a=a, b=b)


def scaled(case: Case) -> Reason | None:
    """A factor too many or too few, of the whole or of one summand."""
    r = case.right
    if not case.comparable or r.size < 2 or not r.any() or not np.isfinite(case.target).all():
        return None
    factor = float((r * case.target).sum() / (r * r).sum())
    if factor and case.fits(r * factor):
        if factor_name(factor) == "1":
            return found("scale", "tiny", difference=factor - 1)
        return found("scale", factor=factor_name(factor), inverse=factor_name(1 / factor))
    difference = case.target - r
    for name, x in case.past:
        if x.shape != r.shape or x.dtype.kind != "f" or not x.any():
            continue
        c = float((x * difference).sum() / (x * x).sum())
        if c and case.fits(r + c * x):
            return _summand(name, c)
    return None


def _summand(name: str, c: float) -> Reason:
    """What it means that Flax has `c` times a summand more than torch."""
    if abs(c + 1) < 1e-4:
        return found("residual", "missing", name=name)
    if abs(c - 1) < 1e-4:
        return found("residual", "added", name=name)
    for ours, theirs, telling in ((1 - c, 1.0, 1 - c), (1.0, 1 + c, 1 + c)):
        if "sqrt" in factor_name(telling):
            return found(
                "scale", "summand", name=name, torch=factor_name(ours), flax=factor_name(theirs)
            )
    return found("scale", "added", factor=c, name=name)


def wiring(case: Case) -> Reason | None:
    """Another value in the place of the right one, alone or as a summand."""
    past = [(n, x) for n, x in case.past if x.dtype.kind == "f"]
    for name, x in past:
        if case.fits(x):
            for other, y in past:
                if y.shape == case.right.shape and case.is_right(x + y):
                    return found("residual", "missing", name=other)
            return found("operand", name=name)
    same = [(n, x) for n, x in past[:16] if x.shape == case.right.shape]
    for (n, x), (m, y) in itertools.permutations(same, 2):
        if case.comparable and gap(x, y) > case.tolerance and case.fits(case.right - x + y):
            return found("residual", torch=n, flax=m)
    return None


def picked(case: Case) -> Reason | None:
    """One step of a sequence, or a mean over it."""
    ways: dict[str, Function] = {
        "the first step": lambda x: x[:, 0],
        "the last step": lambda x: x[:, -1],
        "the mean of the steps": lambda x: x.mean(1),
        "the largest of the steps": lambda x: x.max(1),
        "the sum of the steps": lambda x: x.sum(1),
        "the first": lambda x: x[0],
        "the last": lambda x: x[-1],
        "the mean": lambda x: x.mean(0),
    }
    for name, x in case.past:
        if x.ndim < 3 or x.dtype.kind != "f":
            continue
        made = {k: f(x) for k, f in ways.items()}
        ours = [k for k, v in made.items() if case.is_right(v)]
        theirs = [k for k, v in made.items() if case.fits(v)]
        if ours and theirs and ours[0] != theirs[0]:
            return found("token", name=name, torch=ours[0], flax=theirs[0])
    return None


def mask_values(case: Case) -> Reason | None:
    """What is added to logits: inverted, too small to mask, absent, or of other positions."""
    r, t = case.right, case.target
    if not case.comparable or not is_mask_bias(r):
        return None
    out = r <= MASKED
    if is_mask_bias(t) and ((t <= MASKED) == ~out).all():
        return found("mask", "inverted")
    if not t.any():
        return found("mask", "missing")
    if (t[~out] == 0).all() and np.ptp(t[out]) == 0:
        return found("mask", "weak", value=t[out][0])
    if is_mask_bias(t) and t.ndim >= 2 and t.shape[-1] == t.shape[-2]:
        T = t.shape[-1]
        causal = np.triu(np.ones((T, T), bool), 1)
        if ((out | causal) == (t <= MASKED)).all():
            return found("causal", "added")
        if (((t <= MASKED) | causal) == out).all():
            return found("causal")
    return None


def offset(case: Case) -> Reason | None:
    """Integers (ids, positions) that count from another number."""
    r, t = case.right, case.target
    if not case.comparable or not r.size or (r != np.rint(r)).any() or (t != np.rint(t)).any():
        return None
    k = int((t - r).flat[0])
    if k == 0 or not (t - r == k).all():
        return None
    return found("offset", offset=k)


# Rules that nothing but their own mistake fits, and rules that may fit by chance.
CERTAIN: tuple[Rule, ...] = (dtype_cast, dropout, mask_values, offset)
LIKELY: tuple[Rule, ...] = (activation, softmax_axis, order, scaled, picked, wiring, gated)


def values(case: Case, rules: Sequence[Rule] = (*CERTAIN, *LIKELY)) -> Reason | None:
    """What the first of these rules that fits says."""
    return first(*(partial(rule, case) for rule in rules))
