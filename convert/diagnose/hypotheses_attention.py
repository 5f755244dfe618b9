"""Why attention gives something else: heads, scale, mask, softmax, rotation.

First the formula is found that gives torch's own values, then one thing at a time is changed in it.
B sequences, T queries, S keys, E features, N heads of D.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from convert.diagnose.case import Case, tensors_of
from convert.diagnose.causes import Reason, found
from convert.diagnose.hypotheses_tensors import factor_name
from convert.matching.alignment import MASKED


@dataclass(frozen=True)
class Formula:
    """One way to attend."""

    heads: int
    scale: float
    mask: str | None = None
    softmax: str = "keys"  # the axis that it sums to one over
    split: str = "heads first"  # how E becomes (N, D); "heads last": (D, N)
    rope: str | None = None  # "in halves", "in interleaved pairs"
    constant: float = -np.inf  # what is added where nothing shall be attended to
    swap: str | None = None  # "query and key", ...


@dataclass
class Core:
    """Queries (B, T, E), keys and values (B, S, E), masks that broadcast to (B, N, T, S), true
    where nothing may be attended to or numbers to be added, and what comes after."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    masks: dict[str, np.ndarray]
    weight: np.ndarray | None = None  # of the projection that follows
    bias: np.ndarray | None = None

    def run(self, f: Formula) -> np.ndarray | None:
        """What the formula gives."""
        q, k, v = self._swapped(f.swap)
        E = q.shape[-1]
        if E % f.heads:
            return None
        q, k, v = (_split(x, f.heads, f.split) for x in (q, k, v))
        if f.rope is not None:
            if q.shape[-1] % 2:
                return None
            q, k = _rotate(q, f.rope), _rotate(k, f.rope)
        logits = np.einsum("btnd,bsnd->bnts", q, k) * f.scale
        if f.mask is not None:
            mask = self.masks[f.mask]
            added = np.where(mask, f.constant, 0.0) if mask.dtype == bool else mask
            try:
                logits = logits + added
            except ValueError:
                return None
        axis = {"keys": -1, "queries": -2, "heads": 1}[f.softmax]
        with np.errstate(invalid="ignore", over="ignore"):
            e = np.exp(logits - logits.max(axis, keepdims=True))
            weights = e / e.sum(axis, keepdims=True)
        out = np.einsum("bnts,bsnd->btnd", weights, v)
        out = (out if f.split == "heads first" else out.swapaxes(-1, -2)).reshape(*out.shape[:2], E)
        if self.weight is not None:
            out = out @ self.weight.T + (0.0 if self.bias is None else self.bias)
        return np.asarray(out)

    def _swapped(self, swap: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        q, k, v = self.query, self.key, self.value
        if swap is None or (q.shape != k.shape and "query" in swap):
            return q, k, v
        if swap == "query and key":
            return k, q, v
        return (q, v, k) if swap == "key and value" else (v, k, q)


def attention(case: Case) -> Reason | None:
    """Any attention whose queries, keys and values are known."""
    for core in _cores(case):
        base = _base(case, core)
        if base is not None and (reason := _changed(case, core, base)) is not None:
            return reason
    return None


def _changed(case: Case, core: Core, base: Formula) -> Reason | None:
    for formula, reason in _variants(core, base):
        if any(case.fits(way) for way in _ways(case, core.run(formula))):
            return reason
    return None


def _ways(case: Case, made: np.ndarray | None) -> Iterator[np.ndarray]:
    """(B, T, E) as the value at hand has it: with heads apart, or time first."""
    if made is None:
        return
    yield made
    for shape in {case.right.shape, *(t.shape for t in case.targets)}:
        if made.shape != shape and made.size == int(np.prod(shape)):
            if made.swapaxes(0, 1).shape == shape:
                yield made.swapaxes(0, 1)
            yield made.reshape(shape)


def _base(case: Case, core: Core) -> Formula | None:
    """The formula by which torch's values come about."""
    E = core.query.shape[-1]
    names = ("num_heads", "heads", "num_attention_heads", "n_head", "nhead", "n_heads")
    said = [getattr(case.module, n, None) for n in names]
    divisors = [n for n in range(1, min(E, 64) + 1) if E % n == 0]
    heads = list(dict.fromkeys([n for n in said if isinstance(n, int) and n] + divisors))
    for n, mask, rope in itertools.product(
        heads, (None, *core.masks), (None, "in halves", "in interleaved pairs")
    ):
        for scale in ((E // n) ** -0.5, 1.0, E**-0.5, n / E):
            formula = Formula(n, scale, mask, rope=rope)
            made = core.run(formula)
            if made is not None and any(case.is_right(w) for w in _ways(case, made)):
                return formula
    return None


def _variants(core: Core, base: Formula) -> Iterator[tuple[Formula, Reason]]:
    """Every way to attend that is one change away from torch's."""
    yield from _scales(core, base)
    yield from _masks(core, base)
    for axis in ("queries", "heads"):
        yield replace(base, softmax=axis), found("softmax_axis", "attention", axis=axis)
    yield from _heads(core, base)
    for rope in (None, "in halves", "in interleaved pairs"):
        if rope != base.rope:
            said = found("rope", "code", torch=base.rope or "nothing", flax=rope or "nothing")
            yield replace(base, rope=rope), said
    for swap in ("query and key", "key and value", "query and value"):
        yield replace(base, swap=swap), found("swapped", "arguments", names=swap)


def _scales(core: Core, base: Formula) -> Iterator[tuple[Formula, Reason]]:
    E = core.query.shape[-1]
    D = E // base.heads
    scales = {"1 (it does not scale them)": 1.0, "1 / sqrt(head_dim)": D**-0.5,
              "1 / sqrt(features)": E**-0.5, "sqrt(head_dim)": D**0.5,
              "1 / head_dim (1 / sqrt(head_dim) twice)": 1 / D}  # fmt: skip
    for word, scale in scales.items():
        if scale != base.scale:
            said = found("scale", "logits", torch=factor_name(base.scale), flax=word)
            yield replace(base, scale=scale), said


def _heads(core: Core, base: Formula) -> Iterator[tuple[Formula, Reason]]:
    E, N = core.query.shape[-1], base.heads
    yield replace(base, split="heads last"), found(
        "heads", "split", size=E, heads=N, width=E // N)  # fmt: skip
    for other in (m for m in range(1, E + 1) if E % m == 0 and m != N):
        for scale in (base.scale, (E // other) ** -0.5):
            said = found("heads", "number", torch=N, flax=other)
            yield replace(base, heads=other, scale=scale), said


def _masks(core: Core, base: Formula) -> Iterator[tuple[Formula, Reason]]:
    used = core.masks.get(base.mask or "")
    if base.mask is not None:
        causal = "causal" in base.mask
        missing = found("causal", "missing") if causal else found("mask", "missing")
        yield replace(base, mask=None), missing
        without = base.mask.replace(" and causal", "").replace("causal and ", "")
        if causal and without != base.mask and without in core.masks:
            yield replace(base, mask=without), found("causal")
    if used is not None:
        out = used if used.dtype == bool else used <= MASKED
        masks = dict(core.masks)
        core.masks["inverted"] = ~out
        yield replace(base, mask="inverted"), found("mask", "inverted")
        core.masks["boolean"] = out
        for c in (-1.0, -10.0, -100.0, -1000.0, 1.0, -5.0, -50.0, -20.0):
            yield replace(base, mask="boolean", constant=c), found("mask", "weak", value=c)
        core.masks = masks
    for name in core.masks:
        if name != base.mask and name.endswith("causal"):
            yield replace(base, mask=name), found("causal", "added")
    for name in core.masks:
        if name != base.mask:
            said = found("mask", torch=base.mask or "no mask", flax=name)
            yield replace(base, mask=name), said


def _cores(case: Case) -> Iterator[Core]:
    """Queries, keys and values: of nn.MultiheadAttention, or outputs of layers named so."""
    own = tensors_of(case.module) if case.module is not None else {}
    out = getattr(case.module, "out_proj", None)
    if "in_proj_weight" in own and out is not None:
        yield from _fused(case, own, tensors_of(out))
    past = dict(reversed(case.past))
    named: dict[str, np.ndarray] = {}
    for word, pattern in (
        ("query", r"(^|\.)(q|query|q_proj|to_q|q_lin|wq|q_linear|query_proj)( |$)"),
        ("key", r"(^|\.)(k|key|k_proj|to_k|k_lin|wk|k_linear|key_proj)( |$)"),
        ("value", r"(^|\.)(v|value|v_proj|to_v|v_lin|wv|v_linear|value_proj)( |$)"),
    ):
        fitting = [x for n, x in past.items() if re.search(pattern, n.lower()) and x.ndim == 3]
        if fitting:
            named[word] = fitting[-1]
    if len(named) == 3:
        yield _core(case, named["query"], named["key"], named["value"])
    for _, x in case.past:  # one projection for all three
        if x.ndim == 3 and x.shape[-1] % 3 == 0 and x.shape[-1] == 3 * case.right.shape[-1]:
            yield _core(case, *np.split(x, 3, -1))


def _core(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, **rest: Any) -> Core:
    return Core(q, k, v, _broadcast(dict(case.masks), q.shape[0], q.shape[1], k.shape[1]), **rest)


def _fused(case: Case, own: Mapping[str, np.ndarray], out: Mapping[str, np.ndarray]) -> Any:
    assert case.call is not None
    given = [v.astype(np.float64) for v in case.call.inputs.values() if v.dtype.kind == "f"]
    sequences = [x for x in given if x.ndim == 3]
    if not sequences:
        return
    first = [x.swapaxes(0, 1) for x in sequences]
    time_first = not getattr(case.module, "batch_first", True)
    q, k, v = ((first if time_first else sequences) * 3)[:3] if len(sequences) != 2 else (
        sequences[0], sequences[1], sequences[1])  # fmt: skip
    weights = np.split(own["in_proj_weight"], 3)
    biases = np.split(own.get("in_proj_bias", np.zeros(len(weights[0]) * 3)), 3)
    projected = [x @ w.T + b for x, w, b in zip((q, k, v), weights, biases, strict=True)]
    heads = [x.reshape(*x.shape[:2], -1) for x in given if x.ndim == 4 and _is_heads(x, q)]
    if len(heads) == 2:  # keys and values that were projected beforehand
        projected[1:] = heads
    yield _core(case, *projected, weight=out["weight"], bias=out.get("bias"))
    yield _core(case, *projected)


def _is_heads(x: np.ndarray, q: np.ndarray) -> bool:
    return bool(x.shape[0] == q.shape[0] and x.shape[2] * x.shape[3] == q.shape[2])


def _broadcast(
    given: Mapping[str, np.ndarray], batch: int, queries: int, keys: int
) -> dict[str, np.ndarray]:
    """Masks that may be meant, each in the shape of logits, boolean ones in both senses."""
    B, T, S = batch, queries, keys
    masks: dict[str, np.ndarray] = {}
    for name, m in given.items():
        for shape in ((B, 1, 1, S), (1, 1, T, S), (B, 1, T, S)):
            if m.size != int(np.prod(shape)) or m.shape[-1] != S:
                continue
            x = m.reshape(shape)
            if x.dtype.kind in "biu" and set(np.unique(x)) <= {0, 1}:
                masks[name] = x.astype(bool)
                masks[f"not {name}"] = ~x.astype(bool)
            elif x.dtype.kind == "f":
                masks = {name: x.astype(np.float64), **masks}  # what is added is what is used
    causal = np.triu(np.ones((T, S), bool), 1)[None, None]
    for name, m in list(masks.items()):
        both = (m if m.dtype == bool else m <= MASKED) | causal
        masks[f"{name} and causal"] = both
    return masks | {"causal": causal}


def _split(x: np.ndarray, heads: int, how: str) -> np.ndarray:
    B, T, E = x.shape
    if how == "heads first":
        return x.reshape(B, T, heads, E // heads)
    return x.reshape(B, T, E // heads, heads).swapaxes(-1, -2)


def _rotate(x: np.ndarray, style: str) -> np.ndarray:
    """RoPE with base 10000 from position 0; x (B, T, N, D)."""
    T, D = x.shape[1], x.shape[-1]
    angle = np.arange(T)[:, None] * 10000.0 ** (-np.arange(0, D, 2) / D)
    cos, sin = np.cos(angle)[None, :, None], np.sin(angle)[None, :, None]
    if style == "in halves":
        a, b = x[..., : D // 2], x[..., D // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    a, b = x[..., ::2], x[..., 1::2]
    return np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)
