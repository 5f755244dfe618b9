"""Two modules of anybody's made ready: told apart, copied, each with a call that it takes."""

from __future__ import annotations

import copy
from typing import Any

from convert.compare.report import Report
from convert.runtime.applied import forward_of
from convert.runtime.call import Call
from convert.runtime.fitting import failed, fit_axes, fit_call
from convert.runtime.flax_module import as_flax
from convert.runtime.flax_module import flax_module as taken_apart
from convert.runtime.inputs import as_call
from convert.runtime.jaxpr import draws, jaxpr_of
from convert.runtime.narrow import Rounding, narrow_dtypes, widen_layers
from convert.runtime.torch_calls import trace_torch
from convert.runtime.torch_module import state
from convert.runtime.trace import Trace
from zoo.containers.errors import MissingExtra, UsageError


def split_sides(a: Any, b: Any, variables: Any) -> tuple[Any, Any, bool]:
    """The torch module and the Flax one, both apart from the user's and in eval mode; and whether
    the Flax one was given first."""
    try:
        import torch
    except ImportError:
        raise MissingExtra("running the models", "torch") from None
    ours, theirs = [], []
    for given in (a, b):
        if isinstance(given, torch.nn.Module):
            ours.append(given)
        elif (flax := as_flax(given, variables)) is not None:
            theirs.append(flax)
        else:
            kind = given.__name__ if isinstance(given, type) else type(given).__name__
            what = "the class" if isinstance(given, type) else "a"
            raise UsageError(
                f"{what} {kind} is neither a module nor, beside one, a checkpoint",
                "give a torch.nn.Module and an nnx.Module, a bound linen.Module, "
                "(linen.Module, variables) or (function, params); load checkpoints first",
            )
    if len(ours) != 1:
        raise UsageError(
            f"both are {'torch' if ours else 'Flax'} modules", "give one of PyTorch and one of Flax"
        )
    try:
        module = copy.deepcopy(ours[0]).eval()
    except Exception as e:
        raise failed("copying the torch module", e, "verify never changes a module itself") from e
    return module, theirs[0], ours[0] is not a


def fit_calls(
    torch_module: Any, flax_module: Any, inputs: Any, flax_inputs: Any, report: Report
) -> tuple[Call, Call, bool]:
    """Both calls, and whether Flax draws random numbers; in `report` what had to be fitted."""
    if inputs is None:
        raise UsageError(
            "two modules need inputs to be run on", "give inputs=... (--inputs FILE.npz)"
        )
    given = as_call(inputs)
    call, told = fit_call(given, torch_module.forward, "the torch module")
    report.notices += told
    widen(torch_module, flax_module, call, report)
    theirs = given if flax_inputs is None else as_call(flax_inputs)
    theirs, told = fit_call(theirs, forward_of(flax_module), "the Flax module")
    report.notices += told

    made = taken_apart(flax_module, "float32")
    fitting = []

    def attempt(candidate: Call) -> None:
        fitting.append(jaxpr_of(made, candidate))

    if flax_inputs is not None:
        try:
            attempt(theirs)
        except Exception as e:
            raise failed("the Flax module", e, "see that it takes flax_inputs") from e
        return call, theirs, draws(fitting[-1]) or made.asks
    try:
        theirs, told = fit_axes(theirs, attempt)
    except UsageError:
        traced(torch_module, call)  # inputs that neither takes are no fault of Flax's
        raise
    report.notices += told
    # Numbers drawn from a constant key are in no jaxpr where constants are computed at once.
    return call, theirs, draws(fitting[-1]) or made.asks


def widen(torch_module: Any, flax_module: Any, call: Call, report: Report) -> None:
    """Make both, which are copies, ready for float32 and float64 where they are of 16-bit floats:
    layers of Flax's that are told to compute in torch's own narrow dtype no longer do."""
    ours = narrow_dtypes(state(torch_module).values())
    theirs = narrow_dtypes(taken_apart(flax_module).values.values())
    for title, found in (("torch", ours), ("Flax", theirs)):
        if found and report.level != "bits":
            report.notices.append(
                f"the {title} module has parameters of {' and '.join(found)}, and computes in it "
                "as written: the verdict is about float32 and float64 of the same weights"
            )
    if not ours:
        return
    widen_layers(flax_module, ours)
    try:
        trace_torch(torch_module, call)
    except RuntimeError:  # casts that are written into it meet float32
        torch_module.forward = Rounding(torch_module, ours)


def traced(module: Any, call: Call) -> Trace:
    """A recorded run. UsageError, with what the module said, where it fails."""
    try:
        return trace_torch(module, call)
    except Exception as e:
        advice = "see that it takes these inputs, cast to float32 as its parameters are"
        raise failed("the torch module", e, advice) from e
