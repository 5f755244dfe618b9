"""What the inputs never exercised: padding, masks, batches, lengths, sizes that do not divide."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from convert.compare.blind_spots import BlindSpot, listed
from convert.judge.rows import Row
from convert.runtime.call import Call
from convert.runtime.torch_calls import arguments
from convert.runtime.trace import Recorded, Trace
from zoo.layout.kinds import torch_kind

MASK = re.compile(r"mask", re.I)
LENGTHS = re.compile(r"(^|_)len(gth)?s?$", re.I)
_OF_A_MASK = "of a mask: zeros and ones only"
_ATTENTION = re.compile(r"attention|attn", re.I)


def unexercised_inputs(call: Call, names: Mapping[str, str]) -> Iterator[BlindSpot]:
    """What the arrays alone tell. `names`: path in the call -> name."""
    arrays = {names.get(path, path): np.asarray(x) for path, x in call.arrays().items()}
    for name, x in arrays.items():
        if x.size < 2 or (x != x.flat[0]).any():
            continue
        if x.dtype.kind == "b" or MASK.search(name):
            told = f"{name} is {x.flat[0]} throughout: nothing tells what it masks or chooses"
            yield BlindSpot("inputs", (name,), told)
        elif LENGTHS.search(name):
            told = f"{name} is {x.flat[0]} throughout: nothing is padded"
            yield BlindSpot("inputs", (name,), told)
    batched = {name: x for name, x in arrays.items() if x.ndim >= 2}
    if batched and all(len(x) == 1 for x in batched.values()):
        told = f"a batch of one ({listed(batched)}): what mixes samples is not seen"
        yield BlindSpot("inputs", tuple(batched), told)


def by_masks(
    gradients: list[Row], call: Call, names: Mapping[str, str]
) -> tuple[list[Row], list[BlindSpot]]:
    """The rows, without a verdict where the gradient of a floating-point input that is a mask (of
    zeros and ones) differs: `where(m, x, 0)` has none, `m * x` has one, and both are right."""
    masks = {
        f"in.{names.get(path, path)}"
        for path, x in call.arrays().items()
        if x.dtype.kind == "f" and x.size > 1 and np.isin(x, (0, 1)).all() and np.ptp(x) > 0
    }
    wrong = [r.name for r in gradients if r.name in masks and r.judged and not r.same]
    rows = [dataclasses.replace(r, judged=False, note=_OF_A_MASK) if r.name in wrong else r
            for r in gradients]  # fmt: skip
    inputs = tuple(name.removeprefix("in.") for name in wrong)
    told = f"the gradient of {listed(inputs)} differs: zeros and ones only, taken for a mask"
    return rows, [BlindSpot("mask gradient", inputs, told)] if inputs else []


def unexercised_layers(module: Any, call: Call, trace: Trace) -> Iterator[BlindSpot]:
    """What the layers of a torch module were given in a recorded run."""
    calls: dict[str, list[Recorded]] = {}
    for recorded in trace.calls:
        calls.setdefault(recorded.name, []).append(recorded)
    layers = [(n, m, calls[n]) for n, m in module.named_modules() if n in calls]
    if names := tuple(n for n, m, c in layers if _never_padded(m, c)):
        told = f"no input of {listed(names)} holds its padding_idx: padding is not exercised"
        yield BlindSpot("inputs", names, told)
    attends = any(_ATTENTION.search(type(m).__name__) for _, m, _ in layers)
    if names := tuple(n for n, m, c in layers if all(_single(m, x, attends) for x in c)):
        told = (
            f"sequences of length one ({listed(names)}): "
            "order, positions and masks of steps are not seen"
        )
        yield BlindSpot("inputs", names, told)
    pools = {n: [_divides(m, x) for x in c] for n, m, c in layers if hasattr(m, "ceil_mode")}
    every = [told for each in pools.values() for told in each]
    if every and all(every) and _takes_larger(module, call):
        told = (
            f"every size that {listed(pools)} pools divides: whether sizes are rounded up or down, "
            "and what is padded at the end, is not seen"
        )
        yield BlindSpot("inputs", tuple(pools), told)


def _never_padded(module: Any, calls: list[Recorded]) -> bool:
    padding = getattr(module, "padding_idx", None)
    if torch_kind(module) != "embedding" or padding is None:
        return False
    return not any((x == padding).any() for c in calls for x in c.inputs.values())


def _single(module: Any, call: Recorded, attends: bool) -> bool:
    """Whether a layer that tells steps apart was given a single one."""
    kind = torch_kind(module)
    if kind == "embedding":
        x = call.inputs.get("input")
        return attends and x is not None and x.ndim >= 2 and x.shape[-1] == 1
    x = call.inputs.get("key" if kind == "attention" else "input")
    batch_first = getattr(module, "batch_first", None)
    if kind not in ("attention", "recurrent") or x is None or batch_first is None:
        return False
    return bool(x.shape[1 if batch_first and x.ndim == 3 else 0] == 1)


def _divides(module: Any, call: Recorded) -> bool:
    """Whether a pool's output has the same sizes rounded up and down."""
    x = call.inputs.get("input")
    if x is None:
        return False
    axes = int(type(module).__name__[-2]) if type(module).__name__[-2:-1].isdigit() else 1

    def each(name: str, default: int) -> tuple[int, ...]:
        value = getattr(module, name, default)
        return (value,) * axes if isinstance(value, int) else tuple(value)

    sizes = x.shape[-axes:]
    window, stride = each("kernel_size", 1), each("stride", 1)
    padding, dilation = each("padding", 0), each("dilation", 1)
    spans = zip(sizes, window, stride, padding, dilation, strict=True)
    return all((n + 2 * p - d * (k - 1) - 1) % s == 0 for n, k, s, p, d in spans)


def _takes_larger(module: Any, call: Call) -> bool:
    """Whether the module takes images of twice the size; shapes only, nothing is computed."""
    import torch

    def larger(x: Any) -> Any:
        if x.is_floating_point() and x.ndim >= 3:
            return x.new_empty((*x.shape[:2], *(2 * n for n in x.shape[2:])), device="meta")
        return x.to("meta")

    args, kwargs = arguments(call, "float32")
    made = Call(args, kwargs)
    args, kwargs = made.replaced({k: larger(x) for k, x in made.arrays().items()})
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    try:
        with torch.no_grad():
            on_meta = {n: t.to("meta") for n, t in state.items()}
            torch.func.functional_call(module, on_meta, args, kwargs)
    except Exception:  # whatever it raises: it does not take them
        return False
    return True
