"""How a user's two modules are to be called: the inputs of one, made to fit the other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from convert.runtime.call import Call
from zoo.containers.errors import UsageError

# What a module without dropout and with running statistics is called with, where it must be told:
# nothing is drawn then, so there are no keys either.
EVALUATION = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
    "rngs": None,
    "rng": None,
}
Shapes = Callable[[Call], Any]  # tries a call without computing; raises what the module raises


def fit_call(call: Call, forward: Callable[..., Any], whose: str) -> tuple[Call, list[str]]:
    """The call as `forward` takes it: by position where it has other names, evaluation switches
    filled in; and what to tell about that. UsageError where it does not fit."""
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):
        return call, []
    told = []
    names = list(signature.parameters)
    if not _open(signature) and any(k not in names for k in call.kwargs):
        strange = [k for k in call.kwargs if k not in names]
        call = Call((*call.args, *call.kwargs.values()))
        told.append(f"{whose} has no argument {', '.join(strange)}: inputs are given by position")
    missing = {
        name: EVALUATION[name]
        for i, (name, p) in enumerate(signature.parameters.items())
        if name in EVALUATION
        and p.default is p.empty
        and i >= len(call.args)
        and name not in call.kwargs
    }
    if missing:
        call = Call(call.args, {**call.kwargs, **missing})
        told.append(f"{whose} is called with " + ", ".join(f"{k}={v}" for k, v in missing.items()))
    try:
        signature.bind(*call.args, **call.kwargs)
    except TypeError as e:
        takes = ", ".join(n for n in names if n != "self")
        raise UsageError(f"the inputs do not fit {whose}: {e}", f"it takes ({takes})") from None
    return call, told


def _open(signature: inspect.Signature) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def fit_axes(call: Call, attempt: Shapes) -> tuple[Call, list[str]]:
    """The call, or the same with channels last if Flax's module takes only that.

    UsageError, with what the module said, if it takes neither.
    """
    try:
        attempt(call)
        return call, []
    except Exception as e:
        refused = e
    moved = channels_last(call)
    try:
        if moved is None:
            raise refused
        attempt(moved)
    except Exception:
        raise failed(
            "the Flax module", refused, "if it takes other inputs, give flax_inputs"
        ) from refused
    names = ", ".join(n for n, x in call.arrays().items() if _is_image(x))
    return moved, [f"the Flax module takes its images channels last: axis 1 was moved ({names})"]


def channels_last(call: Call) -> Call | None:
    """Axis 1 of all floating-point arrays of three axes or more moved to the end; None without."""
    arrays = call.arrays()
    if not any(_is_image(x) for x in arrays.values()):
        return None
    moved = {k: np.moveaxis(x, 1, -1) if _is_image(x) else x for k, x in arrays.items()}
    return Call(*call.replaced(moved))


def _is_image(x: np.ndarray) -> bool:
    return x.ndim >= 3 and x.dtype.kind == "f"


def failed(whose: str, error: Exception, advice: str) -> UsageError:
    """A module's own exception as an error of ours, in one line; --debug shows all of it."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 200 else text[:199] + "…"
    return UsageError(
        f"{whose} fails: {type(error).__name__}: {text}", f"{advice}; --debug shows where it fails"
    )


def input_names(torch: Mapping[str, str], flax: Call) -> dict[str, str]:
    """Which leaf of Flax's call is which input of torch's: by name if all have theirs, else in
    order; those that cannot be told are left out."""
    paths = list(flax.arrays())
    named = {n: n for n in torch.values()}
    if all(p in named for p in paths):
        return {p: p for p in paths}
    if len(paths) == len(torch):
        return dict(zip(paths, torch.values(), strict=True))
    return {}
