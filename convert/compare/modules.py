"""A torch module and a Flax module of anybody's, compared as far as a level asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from convert.compare.axes import Moves, align_inputs, align_layers, align_outputs
from convert.compare.blind_inputs import unexercised_layers
from convert.compare.blind_spots import BlindSpot, listed
from convert.compare.blind_training import trained_apart, training_attributes
from convert.compare.by_itself import judge_leaves, leaves_of
from convert.compare.drawn_inputs import draw_inputs
from convert.compare.flax_side import FlaxSide
from convert.compare.levels import compare_sides, locate, weights_differ
from convert.compare.module_calls import fit_calls, split_sides, traced
from convert.compare.paired_outputs import pair_outputs
from convert.compare.randomness import Randomness
from convert.compare.report import Report
from convert.compare.settings import Settings
from convert.compare.sides import Side
from convert.compare.torch_side import TorchSide
from convert.diagnose.hypotheses_tensors import explained
from convert.judge.bits import TensorDifference, compare
from convert.judge.rows import Row
from convert.matching.pair import Match, Pair, layout_matches
from convert.matching.pairing import pair_traces
from convert.runtime.applied import name_of
from convert.runtime.arrays import to_numpy
from convert.runtime.call import Call
from convert.runtime.fitting import input_names
from convert.runtime.flax_calls import record
from convert.runtime.flax_module import flax_module
from convert.runtime.precision import full_precision
from convert.runtime.torch_module import computed, state
from convert.runtime.torch_recurrent import unstack
from convert.tensors import bits_of
from zoo.checkpoint.apply import apply
from zoo.checkpoint.request import as_layout
from zoo.containers.errors import UsageError, ZooError
from zoo.layout.kinds import torch_kind
from zoo.layout.ops import inverse, run_shapes

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


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
    with full_precision():
        torch_module, flax_module, swapped = split_sides(*modules, hints.variables)
        first, second = titles or (title(modules[0]), title(modules[1]))
        report = Report(second, first, level) if swapped else Report(first, second, level)
        if isinstance(inputs[0], str):
            inputs = drawn_call(torch_module, flax_module, options.seed, report), inputs[1]
        call, flax_call, draws = fit_calls(torch_module, flax_module, *inputs, report)
        layers = dict(hints.layers or {})
        pair = Pair(torch_module, flax_module, call, flax_call, layers, _stated(hints.layout))
        case = ModulePair(pair, report)
        case.bits()
        if level == "bits":
            report.first_divergence = weights_differ(report)
        else:
            case.run(options, draws)
    return report


class ModulePair:
    """One pair, run once in float32 to see which layers and parameters are each other's."""

    def __init__(self, pair: Pair, report: Report) -> None:
        unstack(pair.torch)  # apart from the user's own since `split_sides`
        self.pair = pair
        self.report = report
        self.torch_trace = traced(pair.torch, pair.call)
        self.side = flax_module(pair.flax, "float32")
        self.flax_trace = record(self.side, pair.flax_call)
        if self.flax_trace.output is None and self.flax_trace.notes:
            raise UsageError(
                f"the Flax module fails: {'; '.join(self.flax_trace.notes)}",
                "see that it takes these inputs",
            )
        found = pair_traces(pair, self.torch_trace, self.side, self.flax_trace)
        report.notices += found.notes
        self.layers, self.matches, self.unmatched = found.layers, found.matches, found.tensors_left
        self.state, self.ties = state(pair.torch), found.ties

    def bits(self) -> None:
        """Paired parameters bit for bit; at this level those without a partner are differences."""
        report = self.report
        flax = {n: np.asarray(v) for n, v in flax_module(self.pair.flax).values.items()}
        ours = {n: bits_of(self.state[n]) for m in self.matches for n in m.torch if n in self.state}
        other: list[str] = []  # of equal values
        off: list[tuple[TensorDifference, np.ndarray, str | None]] = []
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
                if _forgiven(ours[name], theirs, report.level):
                    other.append(f"{name} ({ours[name].dtype.name}, {theirs.dtype.name})")
                    continue
                off.append((difference, theirs, match.kind))
        right = ours.keys() - {d.name for d, *_ in off}
        for difference, theirs, kind in off:
            name = difference.name
            others = {n: x for n, x in ours.items() if n != name}
            given = name, ours[name], theirs, others, kind, right
            report.differences.append(explained(difference, *given))
        if other:
            report.notices.append(f"equal values of other dtypes: {listed(other)}")
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
        titles = (self.report.a, self.report.b)
        for k, (whose, title) in enumerate(zip(("torch's", "Flax's"), titles, strict=True)):
            names = self.unmatched[k]
            if not names:
                continue
            fixed = self._fixed(names)
            if self.report.level == "bits" and not fixed:
                self.report.differences += [
                    TensorDifference(n, f"of {title}, has no counterpart that could be told")
                    for n in self._lost_first(k)
                ]
            else:
                told = f"{whose} {listed(names)}: no counterpart, so not compared one by one"
                told += "; constants that the other side may compute" if fixed else ""
                self.report.blind_spots.append(BlindSpot("no counterpart", tuple(names), told))

    def _lost_first(self, side: int) -> list[str]:
        """The tensors of a side without a counterpart, those first with values that the other
        side's do not have."""
        held = [
            {n: np.ravel(to_numpy(of[n])) for n in names}
            for of, names in zip((self.state, self.side.values), self.unmatched, strict=True)
        ]
        others = np.concatenate([np.zeros(0), *held[1 - side].values()])
        return sorted(held[side], key=lambda n: bool(np.isin(held[side][n], others).all()))

    def _fixed(self, names: list[str]) -> bool:
        """Whether these are buffers of somebody's own torch modules, or of those of torch's that no
        layer of Flax's is (spectral norm), and Flax has nothing left for them: constants (masks,
        tables of positions) that stand in Flax's code."""
        owners = dict(self.pair.torch.named_modules())
        buffers = {n for n, _ in self.pair.torch.named_buffers()}
        own = {
            n
            for n in buffers
            if n.rpartition(".")[2] not in _STATISTICS and _is_own(owners[n.rpartition(".")[0]])
        }
        return set(names) <= own and not self.unmatched[1]

    def run(self, options: Settings, flax_draws: bool) -> None:
        """The levels above bits. `flax_draws`: whether Flax may draw random numbers."""
        pair = dataclasses.replace(self.pair, matches=self.matches)
        outputs = pair_outputs(self.torch_trace.output, self.flax_trace.output, self.report)
        chance = Randomness(pair, self.torch_trace, self.flax_trace, outputs, flax_draws)
        torch_side, flax_side = self._module_sides(options.seed, outputs, chance)
        rows = chance.rows(flax_side.axes)
        self.report.blind_spots += chance.blind_spots()
        self._tell_unseen()
        if chance.everywhere:
            self.report.outputs = rows
            locate(self.report, lambda: pair, options.explain)
        else:
            self._wide(torch_side, flax_side)
            layers = partial(self._by_itself, torch_side, flax_side)
            compare_sides(
                torch_side, torch_side, flax_side, self.report, options, lambda: pair, layers
            )
            self.report.outputs += rows
        chance.blame(self.report, {p.flax: p.torch for p in self.layers})

    def _tell_unseen(self) -> None:
        """What the calls of layers and their settings tell of blind spots."""
        pair, report = self.pair, self.report
        report.blind_spots += unexercised_layers(pair.torch, pair.call, self.torch_trace)
        traces = self.torch_trace, self.flax_trace
        report.blind_spots += training_attributes(
            pair, self.layers, self.side.modules, traces, report.level
        )
        if report.level == "outputs":
            report.blind_spots += trained_apart(self.matches, self.ties)

    def _by_itself(
        self, torch_side: TorchSide, flax_side: FlaxSide, outputs: list[Row]
    ) -> list[Row]:
        """Each leaf layer by itself; what stays float32's is a blind spot."""
        traces = self.torch_trace, self.flax_trace
        leaves = leaves_of(self.layers, torch_side, self.side.modules, *traces)
        if not leaves:
            return []
        try:
            rows = judge_leaves(leaves, torch_side, flax_side, outputs)
        except Exception as e:
            why = f"{type(e).__name__}: {' '.join(str(e).split())[:120]}"
            self.report.notices.append(f"no layer could be judged by itself in float64 ({why})")
            return []
        narrow = tuple(r.name for r in rows if r.note and r.judged)
        if narrow:
            told = f"{listed(narrow)}: of {len(rows)} layers judged by themselves, in float32 only"
            self.report.blind_spots.append(BlindSpot("float32 only", narrow, told))
        return rows

    def _module_sides(
        self, seed: int, outputs: dict[str, str], chance: Randomness
    ) -> tuple[TorchSide, FlaxSide]:
        pair = self.pair
        torch_side = TorchSide(pair.torch, pair.call, seed=seed)
        torch_side.combined = self._combined()
        names = input_names(torch_side.names, pair.flax_call)
        moves, made = align_inputs(torch_side.names, names, pair)
        moves |= align_outputs(self.torch_trace, self.flax_trace, made, self.report, outputs)
        outputs = {f: t for f, t in outputs.items() if t not in chance.left_out}
        torch_side.outputs = frozenset(outputs.values())
        seen = align_layers(self.layers, self.torch_trace, self.flax_trace)
        seen = tuple(i for i in seen if not chance.changes(i.torch, i.flax))
        moves |= {i.name: i.lies for i in seen}
        torch_side.watched = {i.torch: i.name for i in seen}
        trained = {n for n, p in pair.torch.named_parameters() if p.requires_grad}
        flax_side = FlaxSide(
            pair.flax,
            pair.flax_call,
            Moves(moves),
            self.matches,
            {n: tuple(t.shape) for n, t in self.state.items()},
            names,
            outputs=outputs,
            watched={i.flax: i.name for i in seen},
            seed=seed,
            frozen=frozenset(f for m in self.matches if not trained & set(m.torch) for f in m.flax),
            recorded=self.flax_trace if self.flax_trace.as_called else None,
        )
        return torch_side, flax_side

    def _combined(self) -> frozenset[str]:
        """torch's tensors without a counterpart that the other side may hold rounded otherwise:
        parameters where Flax has such too, the same in fewer (an LSTM's one bias), and constants
        that Flax's code computes, in float64 where torch has them in float32."""
        ours, theirs = self.unmatched
        matched = {n for m in self.matches for n in m.torch}
        made = frozenset(computed(self.pair.torch) - matched)  # tables that nobody saves
        if not ours or not (theirs or self._fixed(ours)):
            return made
        told = "may have been combined in float32" if theirs else "are constants of float32"
        self.report.notices.append(
            f"tensors without a counterpart {told}: what one unit in their last place changes is "
            "allowed in float64 too"
        )
        return made.union(ours)

    def _wide(self, torch_side: Side, flax_side: Side) -> None:
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
                told = f"the {title} module {told}: it is judged in float32 only"
                self.report.blind_spots.append(BlindSpot("float32 only", (title,), told))


def drawn_call(torch_module: Any, flax_module: Any, seed: int, report: Report) -> Call:
    """Inputs that both take, and in `report` what they are."""

    def accepts(call: Call) -> None:
        fit_calls(torch_module, flax_module, call, None, Report("", "", ""))

    call, told = draw_inputs(torch_module, flax_module, seed, accepts)
    report.notices += told
    return call


def _stated(layout: Any) -> tuple[Match, ...] | None:
    """The matches of a layout that the user gave."""
    return None if layout is None else layout_matches(as_layout(layout))


def _is_own(module: Any) -> bool:
    """Whether a torch module is somebody's own, or one of torch's without a kind."""
    return torch_kind(module) == "other" or not type(module).__module__.startswith("torch.")


def _forgiven(ours: np.ndarray, theirs: np.ndarray, level: str) -> bool:
    """Whether two tensors differ in their dtype alone where that is no difference: integers of
    torch's 64 bits, which JAX does not have by default; above "bits" other floats too."""
    kinds = {ours.dtype.kind, theirs.dtype.kind}
    if kinds <= {"i", "u"}:
        return np.array_equal(ours, theirs)
    if level == "bits" or ours.dtype == theirs.dtype or kinds & set("biuc"):
        return False
    return np.array_equal(ours.astype(np.float64), theirs.astype(np.float64), equal_nan=True)


def title(module: Any) -> str:
    """What a module is called in reports: its class; a function by its name."""
    if isinstance(module, tuple):
        return name_of(module[0])
    return type(module).__name__
