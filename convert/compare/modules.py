"""A torch module and a Flax module of anybody's, compared as far as a level asks for."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.compare.report import Report
from convert.judge.bits import TensorDifference, compare
from convert.matching.pair import LayerPair, Match, Pair
from convert.runtime.call import Call
from convert.runtime.fitting import failed, fit_axes, fit_call, input_names
from zoo.checkpoint.apply import apply
from zoo.containers.errors import MissingExtra, UsageError, ZooError
from zoo.layout.ops import inverse, run_shapes

if TYPE_CHECKING:
    from convert.compare.module_sides import ModuleFlaxSide, ModuleTorchSide
    from convert.compare.settings import Settings
    from convert.runtime.trace import Trace


@dataclasses.dataclass(frozen=True)
class Hints:
    """What the user says of the pair, where names and calls do not tell."""

    layers: Mapping[str, str] | None = None
    layout: Any = None
    variables: Mapping[str, Any] | None = None


def compare_modules(
    modules: tuple[Any, Any],
    titles: tuple[str, str] | None,
    inputs: tuple[Any, Any],
    level: str,
    hints: Hints,
    options: Settings,
) -> Report:
    """The report for one module of torch and one of Flax, in either order. `inputs` are those of
    either, Flax's None where they are torch's."""
    from convert.compare.levels import weights_differ
    from convert.judge.noise import full_precision

    with full_precision():
        torch_module, flax_module, swapped = _sides(*modules, hints.variables)
        first, second = titles or (_title(modules[0]), _title(modules[1]))
        report = Report(second, first, level) if swapped else Report(first, second, level)
        call, flax_call = _calls(torch_module, flax_module, *inputs, report)
        layers = dict(hints.layers or {})
        pair = Pair(torch_module, flax_module, call, flax_call, layers, _stated(hints.layout))
        case = Case(pair, report)
        case.bits()
        if level == "bits":
            report.first_divergence = weights_differ(report)
        else:
            case.run(options)
    return report


class Case:
    """One pair, run once in float32 to see which layers and parameters are each other's."""

    def __init__(self, pair: Pair, report: Report) -> None:
        from convert.matching import layers as pairing
        from convert.matching import parameters
        from convert.runtime.capture_flax import Side, record

        self.pair = pair
        self.report = report
        self.torch_trace = trace_torch_module(pair.torch, pair.call)
        side = Side(pair.flax, "float32")
        self.flax_trace = record(side, pair.flax_call)
        if self.flax_trace.output is None and self.flax_trace.notes:
            raise UsageError(
                f"the Flax module fails: {'; '.join(self.flax_trace.notes)}",
                "see that it takes these inputs",
            )
        found = pairing.pair_traces(pair, self.torch_trace, side, self.flax_trace)
        self.layers: list[LayerPair] = found.layers
        report.notices += found.notes
        matches, *self.unmatched = parameters.parameters(pair, found, side)
        if pair.matches is not None:
            matches = list(pair.matches)
            self.unmatched = list(parameters.unmatched(pair.torch, side, matches))
        self.matches: tuple[Match, ...] = tuple(matches)
        self.state = _state(pair.torch)

    def bits(self) -> None:
        """Paired parameters bit for bit; at this level those without a partner are differences."""
        from convert.diagnose.weights import diagnose_tensor
        from convert.runtime.flax_modules import params_and_statistics

        flax, report = params_and_statistics(self.pair.flax), self.report
        ours = {n: _numpy(self.state[n]) for m in self.matches for n in m.torch if n in self.state}
        for match in self.matches:
            if wrong := self._misfit(match, flax):
                raise UsageError(
                    f"{', '.join(match.torch)}: {wrong}", "mend the layout or the pair"
                )
            undo = inverse(match.ops, [ours[n].shape for n in match.torch])
            made = apply(undo, [flax[n] for n in match.flax])
            for name, theirs in zip(match.torch, made, strict=True):
                difference = compare(name, ours[name], theirs)
                report.compared += 1
                report.nbytes += ours[name].nbytes
                if difference is None:
                    continue
                others = {n: x for n, x in ours.items() if n != name}
                why = diagnose_tensor(name, ours[name], theirs, others, match.kind)
                report.differences.append(dataclasses.replace(difference, diagnosis=why))
        self._tell_unmatched()

    def _misfit(self, match: Match, flax: Mapping[str, np.ndarray]) -> str | None:
        """Why a match that was given cannot be, if it cannot."""
        if missing := [n for n in match.torch if n not in self.state]:
            return f"the torch module has no {', '.join(missing)}"
        if missing := [n for n in match.flax if n not in flax]:
            return f"the Flax module has no {', '.join(missing)}"
        try:
            shapes = run_shapes(match.ops, [tuple(self.state[n].shape) for n in match.torch])
        except ValueError as e:
            return str(e)
        held = [flax[n].shape for n in match.flax]
        return None if shapes == held else f"is {shapes} in Flax's axes, and there it is {held}"

    def _tell_unmatched(self) -> None:
        for title, names in zip((self.report.a, self.report.b), self.unmatched, strict=True):
            if not names:
                continue
            if self.report.level == "bits":
                self.report.differences += [
                    TensorDifference(n, f"of {title}, has no counterpart that could be told")
                    for n in names
                ]
            else:
                told = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")
                self.report.notices.append(
                    f"not compared one by one, for want of a counterpart in {title}'s other: {told}"
                )

    def run(self, options: Settings) -> None:
        """The levels above bits."""
        from convert.compare.levels import compare_sides

        torch_side, flax_side = self._module_sides(options.seed)
        self._wide(torch_side, flax_side)
        pair = dataclasses.replace(self.pair, matches=self.matches)
        compare_sides(torch_side, torch_side, flax_side, self.report, options, lambda: pair)

    def _module_sides(self, seed: int) -> tuple[ModuleTorchSide, ModuleFlaxSide]:
        from convert.compare.module_sides import (
            ModuleFlaxSide,
            ModuleTorchSide,
            Moves,
            align_layers,
        )

        pair = self.pair
        aligned = align_layers(self.layers, self.torch_trace, self.flax_trace)
        torch_side = ModuleTorchSide(pair.torch, pair.call, seed=seed)
        torch_side.aligned = aligned
        torch_side.combined = self._combined()
        outputs, moves = _outputs(self.torch_trace, self.flax_trace, self.report)
        names = input_names(torch_side.names, pair.flax_call)
        moves |= _input_moves(torch_side.names, names, pair)
        trained = {n for n, p in pair.torch.named_parameters() if p.requires_grad}
        flax_side = ModuleFlaxSide(
            pair.flax,
            pair.flax_call,
            Moves(moves),
            aligned,
            tuple(outputs),
            matches=self.matches,
            shapes={n: tuple(t.shape) for n, t in self.state.items()},
            inputs=names,
            seed=seed,
            frozen=frozenset(f for m in self.matches if not trained & set(m.torch) for f in m.flax),
        )
        return torch_side, flax_side

    def _combined(self) -> frozenset[str]:
        """torch's parameters without a counterpart, where Flax has such too: those may hold the
        same in fewer tensors (an LSTM's one bias), which rounds to float32 once more."""
        ours, theirs = self.unmatched
        if not ours or not theirs:
            return frozenset()
        self.report.notices.append(
            "these may have been combined in float32: what one unit in their last place changes "
            "is allowed in float64 too"
        )
        return frozenset(ours)

    def _wide(self, torch_side: ModuleTorchSide, flax_side: ModuleFlaxSide) -> None:
        """Judge in float32 only what does not really compute in float64."""
        for side, title in ((torch_side, "torch"), (flax_side, "Flax")):
            try:
                why = side.narrow_operation()
                told = f"computes {why} even when all of it is cast to float64"
            except ZooError:
                raise
            except Exception as e:
                why = f"{type(e).__name__}: {' '.join(str(e).split())[:120]}"
                told = f"does not run in float64 ({why})"
            if why is not None:
                side.precisions = ("float32",)
                self.report.notices.append(
                    f"the {title} module {told}: it is judged in float32 only"
                )


def _sides(a: Any, b: Any, variables: Any) -> tuple[Any, Any, bool]:
    """The torch module and the Flax one, both apart from the user's and in eval mode; and whether
    the Flax one was given first."""
    try:
        import torch
    except ImportError:
        raise MissingExtra("running the models", "torch") from None
    from convert.runtime.flax_modules import as_flax

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
                "give a torch.nn.Module and an nnx.Module, a bound linen.Module or "
                "(linen.Module, variables); load checkpoints first",
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


def _title(module: Any) -> str:
    return type(module[0] if isinstance(module, tuple) else module).__name__


def _calls(
    torch_module: Any, flax_module: Any, inputs: Any, flax_inputs: Any, report: Report
) -> tuple[Call, Call]:
    """Both calls, and in `report` what had to be fitted."""
    import jax

    from convert.judge.noise import named_outputs, precision_of
    from convert.runtime.call import cast, leaves, with_leaves
    from convert.runtime.flax_modules import function, widened
    from convert.runtime.inputs import as_call

    if inputs is None:
        raise UsageError(
            "two modules need inputs to be run on", "give inputs=... (--inputs FILE.npz)"
        )
    given = as_call(inputs)
    call, told = fit_call(given, torch_module.forward, "the torch module")
    report.notices += told
    theirs = given if flax_inputs is None else as_call(flax_inputs)
    theirs, told = fit_call(theirs, flax_module.__call__, "the Flax module")
    report.notices += told

    def attempt(candidate: Call) -> None:
        with precision_of("float32"), widened("float32"):
            made = function(flax_module, "float32")
            values = cast(leaves(candidate), "float32")
            args, kwargs = with_leaves(candidate, values)
            jax.eval_shape(
                lambda p, s: named_outputs(made(p, s, args, kwargs)[0]),
                made.params,
                made.statistics,
            )

    if flax_inputs is not None:
        try:
            attempt(theirs)
        except Exception as e:
            raise failed("the Flax module", e, "see that it takes flax_inputs") from e
        return call, theirs
    try:
        theirs, told = fit_axes(theirs, attempt)
    except UsageError:
        trace_torch_module(torch_module, call)  # inputs that neither takes are no fault of Flax's
        raise
    report.notices += told
    return call, theirs


def trace_torch_module(module: Any, call: Call) -> Trace:
    """A recorded run. UsageError, with what the module said, where it fails."""
    from convert.runtime.capture_torch import trace_torch

    try:
        return trace_torch(module, call)
    except Exception as e:
        advice = "see that it takes these inputs, cast to float32 as its parameters are"
        raise failed("the torch module", e, advice) from e


def _outputs(
    torch_trace: Trace, flax_trace: Trace, report: Report
) -> tuple[list[str], dict[str, Any]]:
    """Torch's names of the outputs in Flax's order, and how the axes of each lie in Flax."""
    from convert.compare.torch_side import to_numpy
    from convert.judge.noise import named_outputs
    from convert.matching import alignment

    ours = {k: to_numpy(v) for k, v in named_outputs(torch_trace.output).items()}
    theirs = {k: np.asarray(v) for k, v in named_outputs(flax_trace.output).items()}
    if len(ours) != len(theirs):
        raise UsageError(
            f"the torch module gives {len(ours)} outputs, the Flax one {len(theirs)}",
            "let both return the same",
            [f"torch: {_shapes(ours)}", f"Flax: {_shapes(theirs)}"],
        )
    if ours.keys() == theirs.keys():
        ours = {name: ours[name] for name in theirs}
    else:
        report.notices.append(
            f"outputs are paired in order: {', '.join(ours)} with {', '.join(theirs)}"
        )
    if not any(x.size for x in ours.values()):
        raise UsageError(
            "the torch module gives no output that could be compared"
            + (f": {_shapes(ours)}" if ours else ""),
            "return arrays, and give inputs that are not empty",
        )
    moves: dict[str, Any] = {}
    for (name, x), y in zip(ours.items(), theirs.values(), strict=True):
        if not alignment.moves(x.shape, y.shape):
            raise UsageError(
                f"{name} has shape {x.shape} in torch and {y.shape} in Flax",
                "let both return the same; axes may be in another order, sizes may not differ",
            )
        move = alignment.best_move(x, y)
        moves[name] = (move, x.shape, y.shape)
        if move != "same":
            report.notices.append(f"{name}: torch's {x.shape} is compared with Flax's {y.shape}")
    return list(ours), moves


def _input_moves(torch: Mapping[str, str], flax: Mapping[str, str], pair: Pair) -> dict[str, Any]:
    from convert.matching import alignment
    from convert.runtime.call import leaves

    ours = {torch[path]: x for path, x in leaves(pair.call).items()}
    theirs = leaves(pair.flax_call)
    moves: dict[str, Any] = {}
    for path, name in list(flax.items()):
        x, y = ours[name], theirs[path]
        if alignment.moves(x.shape, y.shape):
            moves[name] = (alignment.best_move(x, y), x.shape, y.shape)
    return moves


def _stated(layout: Any) -> tuple[Match, ...] | None:
    """The matches of a layout that the user gave, as a Layout or as its JSON data."""
    if layout is None:
        return None
    from convert.compare.twins import layout_matches
    from zoo.layout import Layout

    try:
        return layout_matches(layout if isinstance(layout, Layout) else Layout.from_json(layout))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UsageError(
            f"the layout cannot be understood: {type(e).__name__}: {e}",
            "give a zoo.layout.Layout, or the list that its to_json() gives",
        ) from None


def _state(module: Any) -> dict[str, Any]:
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())


def _numpy(tensor: Any) -> np.ndarray:
    """A tensor's own bits, bfloat16 included."""
    import torch

    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        bits = tensor.detach().cpu().contiguous().view(torch.int16).numpy()
        return np.array(bits.view(ml_dtypes.bfloat16))
    return np.array(tensor.detach().cpu().numpy())


def _shapes(arrays: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {x.shape}" for name, x in arrays.items()) or "none"
