"""What `verify` prints."""

from __future__ import annotations

import click

from convert.display import SHOWN, size, table
from convert.proof.report import Report, TensorDifference
from zoo.containers.errors import printable

_GROUP = 5  # differences for one reason that are still listed one by one


def report(found: Report) -> None:
    """The verdict first, then what differs most."""
    click.echo(f"{found.verdict}: {printable(found.a)} and {printable(found.b)}")
    total = f"{found.compared} tensors, {size(found.nbytes)}"
    if not found.differences:
        click.echo(f"  bits: {total}, all equal")
    else:
        click.echo(f"  bits: {total} compared, {len(found.differences)} differences")
        _differences(found)
    if found.outputs:
        bad = [row for row in found.outputs if not row.same]
        worst = found.worst
        assert worst is not None
        click.echo(
            f"  outputs: {len(found.outputs)} outputs and intermediates in float32 and float64, "
            + (f"{len(bad)} beyond the rounding noise" if bad else "all within the rounding noise")
        )
        shown = bad[:SHOWN] or [worst]
        table(
            ("first to differ" if bad else "farthest off", "error", "noise", "ratio", "float64"),
            [
                (r.name, f"{r.error:.2e}", f"{r.noise:.2e}", f"{r.ratio:.2f}", f"{r.error64:.2e}")
                for r in shown
            ],
        )


def _differences(found: Report) -> None:
    """Grouped by reason where one reason has many, else a row each."""
    by_reason: dict[str, list[TensorDifference]] = {}
    for d in found.differences:
        by_reason.setdefault(d.why, []).append(d)
    rows = []
    for why, group in by_reason.items():
        if len(group) > _GROUP:
            click.echo(
                f"  {len(group)} tensors: {printable(why)} ({printable(group[0].name)}, ...)"
            )
            continue
        rows += [
            (
                d.name,
                d.why,
                "" if d.max_error is None else f"{d.max_error:.2e}",
                "" if d.first is None else str(list(d.first)),
            )
            for d in group
        ]
    if rows:
        table(("tensor", "difference", "max error", "first at"), rows[:SHOWN])
    if len(rows) > SHOWN:
        click.echo(f"  ... and {len(rows) - SHOWN} more (--json lists them)")
