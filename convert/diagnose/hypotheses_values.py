"""Why a value is another: what was done to what came before. For the code between layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from convert.diagnose.case import Candidates, Case, Finding, first_fit
from convert.diagnose.weights import factor_name
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


def dtype_cast(case: Case) -> Finding | None:
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
            return Finding(
                "dtype",
                f"Flax computes in {name}: every value is a number of {name}, torch's are not",
                f"take dtype={name} (or a cast) out of the Flax layer",
            )
    return None


def dropout(case: Case) -> Finding | None:
    """Zeros here and there, and the rest larger by 1 / (1 - p)."""
    if not case.comparable:
        return None
    t, r = case.target, case.right
    gone = (t == 0) & (np.abs(r) > case.tolerance)
    kept = ~gone & (np.abs(r) > 1e3 * case.tolerance)
    if not gone.any() or not kept.any():
        return None
    factor = float(np.median(t[kept] / r[kept]))
    if factor <= 1 or not case.fits(np.where(gone, 0.0, r * factor)):
        return None
    return Finding(
        "dropout",
        f"dropout is on in Flax: {gone.mean():.0%} are zero and the rest {factor:.4g} times "
        f"larger, as p = {1 - 1 / factor:.3g} makes them",
        "deterministic=True, or model.eval(), in Flax",
    )


def activation(case: Case) -> Finding | None:
    """Another activation of something that came before, whatever was added to it."""
    table = functions()
    for name, x in case.past:
        if x.dtype.kind != "f" or x.shape != case.right.shape or not case.comparable:
            continue
        values = {k: f(x) for k, f in table.items()}
        ours = [k for k, v in values.items() if case.is_right(v)]
        for a, b in itertools.product(ours, table):
            if a != b and case.fits(values[b]):
                return activation_finding(a, b, name)
    for name, x in case.past:
        if x.dtype.kind != "f" or x.shape != case.right.shape or not case.comparable:
            continue
        values = {k: f(x) for k, f in table.items()}
        for a, b in itertools.permutations(table, 2):
            if "no activation" not in (a, b) and case.fits(case.right + values[b] - values[a]):
                return activation_finding(a, b, name)
    return None


def activation_finding(ours: str, theirs: str, name: str) -> Finding:
    gelu = ours.startswith("gelu") and theirs.startswith("gelu")
    which = {"gelu (erf)": "False", "gelu (tanh)": "True"}.get(ours)
    advice = f"jax.nn.gelu(x, approximate={which})" if gelu and which else f"use {ours} in Flax"
    what = f"after {name} torch has {ours}, Flax's values fit {theirs}"
    return Finding("gelu" if gelu else "activation", what, advice)


def gated(case: Case) -> Finding | None:
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
                return Finding(
                    "activation",
                    f"torch multiplies {a} of {n} by {b} of {m}, Flax {c} of {n} by {d} of {m}",
                    "swap the two, or their activations",
                )
    return None


def softmax_axis(case: Case) -> Finding | None:
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
                return Finding(
                    "softmax_axis",
                    f"the softmax of {name} goes over axis {ours[0]} in torch, "
                    f"over axis {theirs[0]} in Flax",
                    f"axis={ours[0] - x.ndim} in Flax",
                )
    return None


def order(case: Case) -> Finding | None:
    """The right numbers in another order: flattened otherwise, heads, halves, steps."""
    r = case.right
    images = [(n, x) for n, x in case.past if x.ndim in (3, 4, 5)]

    def candidates() -> Candidates:
        size = r.shape[-1] if r.ndim else 1
        for n in range(2, size):
            if size % n:
                continue
            made = r.reshape(*r.shape[:-1], n, -1).swapaxes(-1, -2).reshape(r.shape)
            image = next((i for i in images if i[1].shape[1] == n and r.ndim == 2), None)
            if image is not None:
                yield (
                    made,
                    Finding(
                        "flatten",
                        f"torch flattens {image[0]} channel first ({n} x {size // n}), "
                        f"Flax channel last ({size // n} x {n})",
                        "transpose to channel first before flattening, or reorder kernel rows",
                    ),
                )
            else:
                yield made, _heads(n, size // n)
            yield np.roll(r, size // 2, -1), Finding(
                "concat", "the two halves of the last axis are swapped",
                "concatenate in the same order")  # fmt: skip
        if r.ndim >= 3:
            flat = r.reshape(*r.shape[:-2], -1)
            N, D = r.shape[-2:]
            other = flat.reshape(*r.shape[:-2], D, N).swapaxes(-1, -2)
            yield other, _heads(N, D)
        for axis in range(r.ndim):
            what = f"axis {axis} is back to front"
            yield np.flip(r, axis), Finding("reversed", what, "go through it in one direction")
        for a, b in itertools.combinations(range(r.ndim), 2):
            if r.shape[a] == r.shape[b]:
                yield r.swapaxes(a, b), Finding(
                    "transposed", f"axes {a} and {b} are swapped", "permute the axes")  # fmt: skip

    return first_fit(case, candidates())


def _heads(heads: int, width: int) -> Finding:
    return Finding(
        "heads",
        f"torch orders the last axis as ({heads}, {width}), Flax as ({width}, {heads})",
        "split features into (heads, head_dim), heads first",
    )


def scaled(case: Case) -> Finding | None:
    """A factor too many or too few, of the whole or of one summand."""
    r = case.right
    if not case.comparable or r.size < 2 or not r.any() or not np.isfinite(case.target).all():
        return None
    factor = float((r * case.target).sum() / (r * r).sum())
    if factor and case.fits(r * factor):
        what = f"Flax's values are {factor_name(factor)} times torch's"
        return Finding("scale", what, f"multiply by {factor_name(1 / factor)} in Flax")
    difference = case.target - r
    for name, x in case.past:
        if x.shape != r.shape or x.dtype.kind != "f" or not x.any():
            continue
        c = float((x * difference).sum() / (x * x).sum())
        if not c or not case.fits(r + c * x):
            continue
        if abs(c + 1) < 1e-4:
            return Finding("residual", f"Flax leaves {name} out of the sum", f"add {name}")
        if abs(c - 1) < 1e-4:
            return Finding("residual", f"Flax adds {name}, torch does not", f"do not add {name}")
        for ours, theirs in ((1 - c, 1.0), (1.0, 1 + c)):
            if "sqrt" in factor_name(ours if theirs == 1.0 else theirs):
                return Finding(
                    "scale",
                    f"torch multiplies {name} by {factor_name(ours)}, "
                    f"Flax by {factor_name(theirs)}",
                    f"multiply {name} by {factor_name(ours)} in Flax",
                )
        what = f"Flax adds {c:+.6g} times {name} to what torch has"
        return Finding("scale", what, f"look for a factor of {name}")
    return None


def wiring(case: Case) -> Finding | None:
    """Another value in the place of the right one, alone or as a summand."""
    past = [(n, x) for n, x in case.past if x.dtype.kind == "f"]
    for name, x in past:
        if case.fits(x):
            for other, y in past:
                if y.shape == case.right.shape and case.is_right(x + y):
                    return Finding(
                        "residual", f"Flax leaves {other} out of the sum", f"add {other}"
                    )
            return Finding(
                "wiring",
                f"Flax takes {name} as it is here, torch does not",
                "see what torch's code makes of it, or takes instead: a sum, an activation",
            )
    same = [(n, x) for n, x in past[:16] if x.shape == case.right.shape]
    for (n, x), (m, y) in itertools.permutations(same, 2):
        if case.comparable and gap(x, y) > case.tolerance and case.fits(case.right - x + y):
            return Finding("residual", f"Flax adds {m} where torch adds {n}", f"add {n}")
    return None


def picked(case: Case) -> Finding | None:
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
            what = f"torch takes {ours[0]} of {name}, Flax {theirs[0]}"
            return Finding("token", what, f"take {ours[0]}")
    return None


def mask_values(case: Case) -> Finding | None:
    """What is added to logits: inverted, too small to mask, absent, or of other positions."""
    r, t = case.right, case.target
    if not case.comparable or not is_mask_bias(r):
        return None
    out = r <= MASKED
    if is_mask_bias(t) and ((t <= MASKED) == ~out).all():
        return Finding("mask", "the mask is inverted: Flax masks what torch keeps",
                       "negate the mask in Flax")  # fmt: skip
    if not t.any():
        return Finding("mask", "the mask is not applied in Flax", "pass the mask on")
    if (t[~out] == 0).all() and np.ptp(t[out]) == 0:
        what = f"Flax adds {t[out][0]:g} to masked logits, which does not mask them"
        return Finding("mask", what, "add the most negative number of the dtype")
    if is_mask_bias(t) and t.ndim >= 2 and t.shape[-1] == t.shape[-2]:
        T = t.shape[-1]
        causal = np.triu(np.ones((T, T), bool), 1)
        if ((out | causal) == (t <= MASKED)).all():
            return Finding("causal", "Flax masks later steps too, torch does not", "drop the mask")
        if (((t <= MASKED) | causal) == out).all():
            what = "Flax lets steps attend to later ones, torch does not"
            return Finding("causal", what, "apply the causal mask in Flax")
    return None


def offset(case: Case) -> Finding | None:
    """Integers (ids, positions) that count from another number."""
    r, t = case.right, case.target
    if not case.comparable or not r.size or (r != np.rint(r)).any() or (t != np.rint(t)).any():
        return None
    k = int((t - r).flat[0])
    if k == 0 or not (t - r == k).all():
        return None
    what = f"Flax's indices are torch's {k:+d}"
    return Finding("offset", what, "count from the same number")


RULES: tuple[Callable[[Case], Finding | None], ...] = (
    dtype_cast, dropout, mask_values, offset,
    activation, softmax_axis, order, scaled, picked, wiring, gated,
)  # fmt: skip


def values(case: Case, rules: Sequence[Callable[[Case], Finding | None]] = RULES) -> Finding | None:
    """What the first of these rules that fits says."""
    return next((f for rule in rules if (f := rule(case)) is not None), None)
