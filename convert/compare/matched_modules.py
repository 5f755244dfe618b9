"""Two modules matched by running them: the order of execution settles what names leave open, and
the outputs decide."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from convert.compare.module_calls import fit_calls, split_sides
from convert.compare.modules import Hints, compare_modules, drawn_call
from convert.compare.report import Report
from convert.compare.settings import Settings
from convert.matching.evidence import MatchedLayout, Open, OpenMatch
from convert.matching.match_tensors import NOT_CHECKED, match_tensors
from convert.matching.pair import Pair, layout_matches
from convert.matching.pairing import pair_modules
from convert.runtime.arrays import to_numpy
from convert.runtime.flax_module import with_values
from convert.runtime.precision import full_precision
from convert.runtime.torch_module import state
from zoo.checkpoint.apply import apply
from zoo.containers.errors import ZooError

_EXCHANGES = 24  # orders of what names leave open that are run


def match_modules(
    torch_side: Any,
    flax_side: Any,
    inputs: Any,
    flax_inputs: Any,
    pairs: Mapping[str, str] | None,
    rotary: str | None,
) -> MatchedLayout:
    """As `convert.match`. ZooError where something is open, or where no layout that was found gives
    torch's outputs."""
    with full_precision():
        module, flax, _ = split_sides(torch_side, flax_side, None)
        report = Report("torch", "flax", "outputs")
        if isinstance(inputs, str):
            inputs = drawn_call(module, flax, 0, report)
        call, flax_call, _ = fit_calls(module, flax, inputs, flax_inputs, report)
        pairing = pair_modules(Pair(module, flax, call, flax_call))
    sides, given = (torch_side, flax_side), dict(pairs or {})
    failed: list[str] = []
    refused: list[ZooError] = []
    seen: list[MatchedLayout] = []

    def attempt(settled: dict[str, str], turned: str, order_first: bool) -> MatchedLayout | None:
        """The layout found so, if Flax gives torch's outputs with it."""
        try:
            made = match_tensors(*sides, settled, turned, pairing, order_first)
        except ZooError as e:
            refused.append(e)
            return None
        if made in seen:
            return None
        seen.append(made)
        outputs = _compared(module, flax, made, (inputs, flax_inputs))
        if outputs.verdict == "same":
            return _checked(made, outputs, settled.keys() - given.keys())
        failed.append(_told(outputs, order_first, turned))
        return None

    for turned in (rotary,) if rotary else ("same", "pairs"):
        for order_first in (False, True):
            if made := attempt(given, turned, order_first):
                return made
    if refused and isinstance(refused[0], OpenMatch):
        for settled in itertools.islice(_exchanged(refused[0].open), _EXCHANGES):
            if made := attempt(given | settled, rotary or "same", False):
                return made
    if refused and not failed:
        raise refused[0]
    raise ZooError(
        "every tensor has a counterpart, but with torch's weights Flax's outputs are others",
        "see which layer differs first: the layout may be wrong there (--pair), or Flax's code",
        failed,
    )


def _exchanged(unsettled: Sequence[Open]) -> Iterator[dict[str, str]]:
    """What is open on both sides, paired in each order: names, "#" for numbers."""
    both = [o for o in unsettled if len(o.torch) == len(o.flax) == 1]
    if 1 < len(both) == len(unsettled):
        for order in itertools.permutations(o.flax[0] for o in both):
            yield dict(zip((o.torch[0] for o in both), order, strict=True))


def _compared(module: Any, flax: Any, layout: MatchedLayout, inputs: tuple[Any, Any]) -> Report:
    """Both run, Flax with torch's weights."""
    tensors = {n: to_numpy(t) for n, t in state(module).items()}
    values: dict[str, Any] = {}
    for m in layout_matches(layout):
        made = apply(m.ops, [tensors[n] for n in m.torch])
        values |= dict(zip(m.flax, made, strict=True))
    loaded = with_values(flax, values)
    options = Settings(explain=0)
    return compare_modules((module, loaded), None, inputs, "outputs", Hints(layout=layout), options)


def _checked(made: MatchedLayout, report: Report, exchanged: Set[str]) -> MatchedLayout:
    evidence = [
        dataclasses.replace(
            e,
            checked=e.checked or "outputs",
            by="outputs" if exchanged & set(e.torch) else e.by,
        )
        for e in made.evidence
    ]
    told = [n for n in made.notices if n != NOT_CHECKED]
    told += [f"the outputs do not tell: {b.sentence}" for b in report.blind_spots]
    rows = f"outputs: {len(report.outputs)} compared, the same"
    return MatchedLayout(made.entries, evidence, told, [*made.tried, rows])


def _told(report: Report, order_first: bool, turned: str | None) -> str:
    what = "order of execution first" if order_first else "names first"
    first = report.first_divergence
    where = f"; first at {first.layer or 'the model itself'}: {first.diagnosis}" if first else ""
    return f"{what}, rotary {turned}{where}"
