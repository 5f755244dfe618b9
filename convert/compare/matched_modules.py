"""Two modules matched by running them: the order of execution settles what names leave open, and
the outputs decide."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from convert.compare.module_calls import fit_calls, split_sides
from convert.compare.modules import Hints, compare_modules, drawn_call
from convert.compare.report import Report
from convert.compare.settings import Settings
from convert.matching.evidence import MatchedLayout
from convert.matching.match_tensors import match_tensors
from convert.matching.pair import Pair, layout_matches
from convert.matching.pairing import pair_modules
from convert.runtime.arrays import to_numpy
from convert.runtime.flax_module import with_values
from convert.runtime.precision import full_precision
from convert.runtime.torch_module import state
from zoo.checkpoint.apply import apply
from zoo.containers.errors import ZooError


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
    failed: list[str] = []
    refused: ZooError | None = None
    seen: list[MatchedLayout] = []
    for order_first, turned in _attempts(rotary):
        try:
            made = match_tensors(torch_side, flax_side, pairs, turned, pairing, order_first)
        except ZooError as e:
            refused = refused or e
            continue
        if made in seen:
            continue
        seen.append(made)
        outputs = _compared(module, flax, made, (inputs, flax_inputs))
        if outputs.verdict == "same":
            return _checked(made, outputs)
        failed.append(_told(outputs, order_first, turned))
    if refused is not None and not failed:
        raise refused
    raise ZooError(
        "every tensor has a counterpart, but with torch's weights Flax's outputs are others",
        "see which layer differs first: the layout may be wrong there (--pair), or Flax's code",
        failed,
    )


def _attempts(rotary: str | None) -> Iterator[tuple[bool, str | None]]:
    """Names or execution first, and each way in which rotated features may lie."""
    for turned in (rotary,) if rotary else ("same", "pairs"):
        yield from ((False, turned), (True, turned))


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


def _checked(made: MatchedLayout, report: Report) -> MatchedLayout:
    evidence = [dataclasses.replace(e, checked=e.checked or "outputs") for e in made.evidence]
    told = [n for n in made.notices if not n.startswith("not checked")]
    rows = f"outputs: {len(report.outputs)} compared, the same"
    return MatchedLayout(made.entries, evidence, told, [*made.tried, rows])


def _told(report: Report, order_first: bool, turned: str | None) -> str:
    what = "order of execution first" if order_first else "names first"
    first = report.first_divergence
    where = f"; first at {first.layer or 'the model itself'}: {first.diagnosis}" if first else ""
    return f"{what}, rotary {turned}{where}"
