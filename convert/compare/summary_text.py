"""What `verify` says on a terminal: the verdict first, and no more than a screen."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import click

from convert.compare.columns import size, table
from convert.compare.report import Report
from convert.diagnose.divergence import Divergence
from convert.judge.bits import TensorDifference
from convert.judge.rows import Row
from zoo.containers.errors import printable

_GROUP = 3  # differences for one reason that are still listed one by one
_SHOWN = 5  # rows of a table
_BLIND = 6  # blind spots
_WIDTH = 96


def text(found: Report) -> str:
    """What `report` prints, without what the command line adds."""
    with contextlib.redirect_stdout(io.StringIO()) as made:
        report(found, ways=False)
    return made.getvalue().rstrip()


def report(found: Report, file: str | None = None, *, ways: bool = True) -> None:
    """Verdict, where and why they part, then a line a level and what is farthest off. `ways`: the
    ways to see all of it."""
    same = found.verdict == "same"
    told = f", with {_spots(found)}" if same and found.blind_spots else ""
    click.echo(f"{found.verdict}{told}: {printable(found.a)} and {printable(found.b)}")
    if same:
        _blind(found)
    if found.first_divergence is not None:
        _divergence(found.first_divergence)
    total = f"{found.compared} tensors, {size(found.nbytes)}"
    if not found.differences:
        click.echo(f"  bits: {total}, all equal")
    else:
        count = len(found.differences)
        click.echo(f"  bits: {total} compared, {count} difference{'s' * (count != 1)}")
    if found.outputs:
        _level("outputs", found.outputs, "outputs and intermediates in float32 and float64")
    if found.gradients:
        _level("gradients", found.gradients, "parameters and inputs in float32 and float64")
    _training(found)
    _differences(found)
    _rows(found)
    if not same:
        _blind(found)
    if ways and not same and file is None:
        click.echo("  all of it: --report FILE.html, or --json")
    if file is not None:
        click.echo(f"  report: {printable(file)}")


def _spots(found: Report) -> str:
    count = len(found.blind_spots)
    return f"{count} blind spot{'s' * (count != 1)}"


def _blind(found: Report) -> None:
    """What the verdict does not cover, a line each where they are short."""
    for spot in found.blind_spots[:_BLIND]:
        click.echo("  not seen: " + "\n    ".join(_wrapped(spot.sentence)))
    if len(found.blind_spots) > _BLIND:
        click.echo(f"  ... and {len(found.blind_spots) - _BLIND} more")


def _divergence(d: Divergence) -> None:
    where = printable(d.layer) or "the whole"
    if d.flax_layer and d.flax_layer != d.layer:
        where += f" ({printable(d.flax_layer)} in Flax)"
    if d.between is not None:
        ends = " and ".join(printable(name) or "the start" for name in d.between)
        where += f", between {ends}"
    title = {"forward": "", "backward": ", backward", "training": ", training"}[d.direction]
    click.echo(f"  first to differ{title}: {where}")
    for line in _wrapped(d.diagnosis):
        click.echo(f"    {line}")
    if d.flax_source and d.flax_source not in d.diagnosis:
        click.echo(f"    in Flax: {printable(d.flax_source)}")
    if d.noise or d.scale:
        click.echo(
            f"    error {d.error:.2e} where values reach {d.scale:.2e}: "
            f"{_times(d.ratio)} the rounding noise"
        )
    elif d.error:
        click.echo(f"    error {d.error:.2e}")
    for i, line in enumerate(_wrapped(d.advice)):
        click.echo(f"  {'try: ' if i == 0 else '     '}{line}")


def _level(name: str, rows: Sequence[Row], what: str) -> None:
    judged = [row for row in rows if row.judged]
    bad = sum(not row.same for row in judged)
    verdict = f"{bad} beyond the rounding noise" if bad else "all within the rounding noise"
    left = len(rows) - len(judged)
    told = f" ({left} not judged)" if left else ""
    click.echo(f"  {name}: {len(rows)} {what}, {verdict}{told}")


def _training(found: Report) -> None:
    if not found.training:
        return
    bad = [t.optimizer for t in found.training if any(r.judged and not r.same for r in t.rows)]
    names = ", ".join(t.optimizer for t in found.training)
    verdict = f"beyond the rounding noise: {', '.join(bad)}" if bad else "all within the noise"
    left = {r.name for t in found.training for r in t.rows if not r.judged}
    told = f" ({len(left)} not judged)" if left else ""
    steps = max(t.steps for t in found.training)
    click.echo(f"  training: {steps} steps of {names}: losses and weights {verdict}{told}")


def _rows(found: Report) -> None:
    """The first rows that differ, else the one that is farthest off."""
    rows = [(row.name, row) for row in found.outputs]
    rows += [(f"gradient of {row.name}", row) for row in found.gradients]
    rows += [(f"{t.optimizer}: {row.name}", row) for t in found.training for row in t.rows]
    judged = [(name, row) for name, row in rows if row.judged]
    bad = [(name, row) for name, row in judged if not row.same]
    if not judged:
        return
    shown = bad[:_SHOWN] or [max(judged, key=lambda pair: pair[1].ratio)]
    table(
        ("differs" if bad else "farthest off", "error", "noise", "ratio", "float64"),
        [
            (name, f"{r.error:.2e}", f"{r.noise:.2e}", f"{r.ratio:.2f}", f"{r.error64:.2e}")
            for name, r in shown
        ],
    )
    if len(bad) > _SHOWN:
        click.echo(f"  ... and {len(bad) - _SHOWN} more")


def _differences(found: Report) -> None:
    """Grouped by reason where one reason has many, else a row each."""
    by_reason: dict[str, list[TensorDifference]] = {}
    for d in found.differences:
        by_reason.setdefault(d.why, []).append(d)
    single: list[TensorDifference] = []
    groups = 0
    for why, group in by_reason.items():
        if len(group) > _GROUP and groups < _GROUP:
            groups += 1
            first = printable(group[0].name)
            click.echo(f"  {len(group)} tensors: {printable(why)} ({first}, ...)")
        else:
            single += group
    shown = single[:_SHOWN]
    if shown:
        table(
            ("tensor", "difference", "max error", "first at"),
            [
                (
                    d.name,
                    d.why,
                    "" if d.max_error is None else f"{d.max_error:.2e}",
                    "" if d.first is None else str(list(d.first)),
                )
                for d in shown
            ],
        )
    # Sentences, which would make the table wider than a terminal.
    for d in shown:
        if d.diagnosis:
            told = d.diagnosis if d.name in d.diagnosis else f"{d.name}: {d.diagnosis}"
            click.echo("  " + "\n    ".join(_wrapped(told)))
    if len(single) > len(shown):
        click.echo(f"  ... and {len(single) - len(shown)} more")


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 10 else f"{ratio:.1f} times"


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(printable(text), _WIDTH, break_long_words=False)[:3]
