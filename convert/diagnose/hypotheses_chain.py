"""torch's own layers without a counterpart, run again one after the other, one of them changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from convert.diagnose.case import Case
from convert.diagnose.causes import Reason, found
from convert.diagnose.hypotheses_pool import Pool, pools
from convert.diagnose.hypotheses_values import Function, activation_differs, functions
from convert.diagnose.reference import Reference
from convert.matching.alignment import gap
from convert.runtime.trace import Recorded
from zoo.layout.kinds import torch_kind


def replay(
    reference: Reference, calls: Sequence[Recorded], case: Case
) -> tuple[str, Reason] | None:
    """The layer and the cause, if with another activation, pool or flattening in the place of
    one of `calls` the chain gives what Flax has; the chain must give torch's own value."""
    chain = [c for c in calls if c.inputs and c.outputs]
    if not chain or not _connected(chain):
        return None
    start = next(iter(chain[0].inputs.values())).astype(np.float64)
    modules = [reference.modules[c.name] for c in chain]
    if not case.is_right(_run(modules, start, {})):
        return None
    for i, (call, module) in enumerate(zip(chain, modules, strict=True)):
        for other, reason in _others(call.name, module):
            if case.fits(_run(modules, start, {i: other})):
                return call.name, reason
    return None


def _connected(chain: Sequence[Recorded]) -> bool:
    ends = itertools.pairwise(chain)
    return all(
        gap(next(iter(a.outputs.values())), next(iter(b.inputs.values()))) == 0 for a, b in ends
    )


def _run(modules: Sequence[Any], x: np.ndarray, changes: dict[int, Function]) -> np.ndarray | None:
    import torch

    for i, module in enumerate(modules):
        try:
            if i in changes:
                x = changes[i](x)
            else:
                with torch.no_grad():
                    x = module(torch.from_numpy(np.array(x))).numpy()
        except (RuntimeError, ValueError, TypeError, AttributeError):  # such as a layer's tuple
            return None
    return x


def _others(name: str, module: Any) -> Iterator[tuple[Function, Reason]]:
    kind, class_name = torch_kind(module), type(module).__name__
    yield lambda x: x, found("missing_layer", name=name, type=class_name)
    if kind == "activation":
        ours = _activation_name(module)
        for other, f in functions().items():
            yield f, activation_differs(f"at layer {name} ({class_name})", ours, other)
    if kind == "flatten":
        yield lambda x: np.moveaxis(x, 1, -1).reshape(len(x), -1), found(
            "flatten", "layer", name=name)  # fmt: skip
    if kind == "pool":
        ours = f"{class_name}({module.extra_repr()})"
        for pool in pools():
            yield _of(pool), found("pooling", "layer", torch=ours, name=name, flax=pool)


def _of(pool: Pool) -> Function:
    def run(x: np.ndarray) -> np.ndarray:
        made = pool.run(x)
        if made is None:
            raise ValueError("no such pool over this image")
        return made

    return run


def _activation_name(module: Any) -> str:
    """The name in `functions` of what a torch module computes, else its class's."""
    x = np.linspace(-3, 3, 25)
    made = _run([module], x, {})
    for name, f in functions().items():
        if made is not None and gap(made, f(x)) < 1e-9:
            return name
    return type(module).__name__
