"""Random numbers that a forward pass draws: which values they change, and what can be judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from convert.compare.blind_spots import BlindSpot
from convert.compare.report import Report
from convert.compare.sides import Axes
from convert.diagnose.causes import Reason, found
from convert.diagnose.divergence import Divergence
from convert.judge.noise import judge
from convert.judge.rows import Row
from convert.matching.alignment import gap
from convert.matching.pair import Pair
from convert.runtime.arrays import named_outputs, to_numpy
from convert.runtime.flax_calls import record_again
from convert.runtime.torch_calls import trace_torch
from convert.runtime.trace import Place, Recorded, Trace

NOTE = "drawn at random: changes from run to run"


class Randomness:
    """What another run of either side changes, with other seeds; a side is run again only where it
    may draw random numbers. `outputs` are the paired ones, Flax's name -> torch's."""

    def __init__(
        self, pair: Pair, torch: Trace, flax: Trace, outputs: Mapping[str, str], flax_draws: bool
    ) -> None:
        self._torch, self._flax, self._outputs = torch, flax, outputs
        self._moved: dict[str, Moved] = {"torch": Moved(), "Flax": Moved()}
        if torch.drawing:
            again = trace_torch(pair.torch, pair.call, seed=1)
            layer = next((n for n in torch.drawing if n), "")
            self._moved["torch"] = dataclasses.replace(moved(torch, again), layer=layer)
        if flax_draws:
            self._moved["Flax"] = moved(flax, record_again(pair.flax, pair.flax_call))
        ours = self._moved["torch"].outputs
        theirs = {outputs[n] for n in self._moved["Flax"].outputs if n in outputs}
        self.changing = {t: (t in ours, t in theirs) for t in outputs.values()}
        self.changing = {t: sides for t, sides in self.changing.items() if any(sides)}

    @property
    def everywhere(self) -> bool:
        """Whether there is no output without chance."""
        return len(self.changing) == len(self._outputs)

    @property
    def left_out(self) -> list[str]:
        """Torch's names of the outputs that cannot be judged. Where one side alone draws, that is
        a difference like any other."""
        return [n for n, sides in self.changing.items() if all(sides) and not self.everywhere]

    def changes(self, torch: Place, flax: Place) -> bool:
        """Whether chance moves an intermediate on both sides."""
        return torch in self._moved["torch"].places and flax in self._moved["Flax"].places

    def rows(self, axes: Axes) -> list[Row]:
        """The outputs that are not judged like others: different where none is, else not judged."""
        wanted = list(self.changing) if self.everywhere else self.left_out
        ours, theirs = (named_outputs(t.output) for t in (self._torch, self._flax))
        made = []
        for there, name in self._outputs.items():
            if name in wanted:
                x, y = to_numpy(ours[name]), axes.from_flax(name, to_numpy(theirs[there]))
                row = judge(name, (x, None), (y, None))
                made.append(dataclasses.replace(row, same=False, judged=self.everywhere, note=NOTE))
        return made

    def blind_spots(self) -> list[BlindSpot]:
        """What was left out, and how it can be compared."""
        if not self.left_out:
            return []
        reason = self._reason(self.left_out)
        told = f"{reason.diagnosis}: not judged; {reason.advice}"
        return [BlindSpot("random", tuple(self.left_out), told)]

    def blame(self, report: Report, torch_names: Mapping[str, str]) -> None:
        """Say that chance is the cause, where nothing better is known. `torch_names`: of Flax's
        paired layers."""
        judged = [n for n in self.changing if n not in self.left_out]
        bad = [r for r in report.outputs if r.judged and not r.same]
        wrong = [r for r in bad if r.name == "output" or r.name.startswith("output.")]
        known = report.first_divergence
        if not wrong or any(r.name not in judged for r in wrong):
            return
        if known is not None and not self._by_chance(known, torch_names):
            return
        ours, theirs = self._moved["torch"].layer, self._moved["Flax"].layer
        layer = ours or torch_names.get(theirs, "") or wrong[0].name
        report.first_divergence = Divergence.of(
            layer, self._reason(judged), wrong[0], flax_layer=theirs or None
        )

    def _by_chance(self, known: Divergence, torch_names: Mapping[str, str]) -> bool:
        """Whether a divergence is one of values that chance moves."""
        if known.cause in ("dropout", "raises", "weights"):
            return False
        if known.between is not None and known.between[1] == "the output":
            return True
        ours, theirs = self._moved["torch"], self._moved["Flax"]
        if known.between is not None:
            given = ours.given | {torch_names.get(n, n) for n in theirs.given}
            return known.between[1] in given
        made = {p[0] for p in ours.places} | {torch_names.get(p[0], p[0]) for p in theirs.places}
        return known.layer in made or known.layer in self.changing

    def _reason(self, names: list[str]) -> Reason:
        told = []
        for index, title in enumerate(("torch", "Flax")):
            if any(self.changing[n][index] for n in names):
                layer = self._moved[title].layer
                told.append(title + (f" (layer {layer})" if layer else ""))
        who = " and ".join(told) + (" draw" if len(told) > 1 else " draws")
        s = "" if len(names) > 1 else "s"
        return found("random", who=who, names=", ".join(names), s=s)


@dataclasses.dataclass(frozen=True)
class Moved:
    """What a run with other random numbers changed on one side."""

    outputs: frozenset[str] = frozenset()
    places: frozenset[Place] = frozenset()
    given: frozenset[str] = frozenset()  # names of the submodules whose inputs changed
    layer: str = ""  # the first one, from inside, where chance comes in


def moved(first: Trace, again: Trace) -> Moved:
    """What differs between two runs of one side. All of it, where the second one fails."""
    before = {n: to_numpy(x) for n, x in named_outputs(first.output).items()}
    after = {n: to_numpy(x) for n, x in named_outputs(again.output).items()}
    others = again.by_key()
    outputs = {n for n, x in before.items() if n not in after or gap(x, after[n]) > 0}
    places: set[Place] = set()
    given: set[str] = set()
    layer = ""
    for call in sorted(first.calls, key=lambda c: c.end):
        changed = _changed(call, others.get(call.key))
        places |= {(call.name, call.index, key) for key in changed}
        other = others.get(call.key)
        if other is None or _differ(call.inputs, other.inputs):
            given.add(call.name)
        elif changed and not layer:
            layer = call.name
    return Moved(frozenset(outputs), frozenset(places), frozenset(given), layer)


def _changed(call: Recorded, other: Recorded | None) -> set[str]:
    return set(call.outputs) if other is None else _differ(call.outputs, other.outputs)


def _differ(one: Mapping[str, object], other: Mapping[str, object]) -> set[str]:
    return {k for k, x in one.items() if k not in other or gap(x, other[k]) > 0}  # type: ignore[arg-type]
