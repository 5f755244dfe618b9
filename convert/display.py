"""What the commands print: tables on a terminal, plain lines elsewhere, JSON on request."""

from __future__ import annotations

import contextlib
import json as _json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from convert.api import Prepared
from convert.certificate import Certificate
from convert.inspection import Inspection
from convert.proof.report import Report, TensorDifference
from convert.run import Progress as Callback
from zoo.containers.errors import printable
from zoo.identification import dims, title
from zoo.ops import describe
from zoo.registry import Found

_SHOWN = 40  # tensors of a long list
_GROUP = 5  # differences for one reason that are still listed one by one
_STAGES = {"convert": "converting", "verify": "verifying", "bits": "comparing"}


def json(data: Any) -> None:
    """One JSON document on stdout."""
    click.echo(_json.dumps(data, indent=1))


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Callback]:
    """A callback that draws bars on a terminal, and does nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(_STAGES.get(stage, stage), total=total)
            bars.update(tasks[stage], completed=done)

        yield show


def size(nbytes: int) -> str:
    """Bytes for people, in powers of ten."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"


def converted(source: str, prepared: Prepared, certificate: Certificate) -> None:
    """Two lines: what was done, and what was proved."""
    p, target = prepared.plan, prepared.target
    total = sum(s.nbytes for s in p.steps)
    made = sum(i.nbytes for s in p.steps for i in s.target_infos)
    click.echo(f"{printable(source)} -> {printable(str(target.path))}")
    beside = sum(a.tied_to is None for a in p.aside)
    kept = f" + {beside} kept in the label" if beside else ""
    sizes = size(total) if made == total else f"{size(total)} -> {size(made)}"
    counts = f"{len(p.steps)} tensors{kept}, {sizes}"
    click.echo(f"  {_title(prepared)}, {counts}, {_kind(prepared)}")
    verified = certificate.verified
    if verified["level"] == "none":
        click.echo("  not verified (--no-verify)")
        return
    cast = any(r.dtype != r.target_dtype for r in certificate.tensors)
    how = (
        "re-read: the bits that were meant" if cast else "re-read and mapped back: every bit equal"
    )
    click.echo(f"  verified: {how}")
    if verified["level"] == "outputs":
        worst = verified["worst"]
        click.echo(
            f"  verified: {verified['outputs']} outputs and intermediates of both twins, "
            f"at most {worst['ratio']:.2f} times the rounding noise ({printable(worst['name'])})"
        )


def converted_data(prepared: Prepared, certificate: Certificate) -> dict[str, Any]:
    """The same for machines."""
    target = prepared.target
    return {
        "target": str(target.path),
        "certificate": str(target.path.parent / target.beside("certificate.json")),
        "container": target.to,
        "tree": prepared.plan.target_tree,
        "model": certificate.model,
        "config": certificate.config,
        "tensors": len(prepared.plan.steps),
        "bytes": sum(s.nbytes for s in prepared.plan.steps),
        "verified": certificate.verified,
        "notices": [*prepared.notices, *certificate.notices[len(prepared.plan.notices) :]],
    }


def plan(prepared: Prepared) -> None:
    """Every step, and what it all needs."""
    p, target = prepared.plan, prepared.target
    rows = [
        (
            " + ".join(s.sources),
            " + ".join(s.targets),
            describe(s.ops),
            s.source_infos[0].dtype + (f" -> {s.target_infos[0].dtype}" if _is_cast(s) else ""),
            " + ".join(dims(i.shape) for i in s.target_infos),
        )
        for s in p.steps
    ]
    _table(("source", "target", "op", "dtype", "shape"), rows)
    kept = [a.source for a in p.aside if a.tied_to is None]
    click.echo()
    if kept:
        click.echo(f"kept in the label: {', '.join(map(printable, kept))}")
    click.echo(f"{_title(prepared)}, {len(p.steps)} tensors, {_kind(prepared)}")
    click.echo(f"target {printable(str(target.path))}: not written (--dry-run)")
    reads = sum(s.nbytes for s in p.steps)
    click.echo(
        f"reads {size(reads)}, holds at most {size(prepared.memory)} of tensors at a time, "
        f"needs {size(prepared.disk)} of disk"
    )


def plan_data(prepared: Prepared) -> dict[str, Any]:
    """The plan for machines."""
    p = prepared.plan
    return {
        "target": str(prepared.target.path),
        "container": prepared.target.to,
        "tree": p.target_tree,
        "model": p.model.name,
        "memory": prepared.memory,
        "disk": prepared.disk,
        "steps": [
            {
                "source": list(s.sources),
                "target": list(s.targets),
                "op": describe(s.ops),
                "dtype": s.source_infos[0].dtype,
                "target_dtype": s.target_infos[0].dtype,
                "shapes": [list(i.shape) for i in s.target_infos],
                "bytes": s.nbytes,
            }
            for s in p.steps
        ],
        "notices": prepared.notices,
    }


def inspection(found: Inspection, every: bool) -> None:
    """Model, totals, then a table of tensors."""
    what = " or ".join(found.models) or f"unknown model ({found.why_not})"
    if found.unknown:
        what += f"; not told: {', '.join(found.unknown)}"
    click.echo(f"{printable(found.path)}: {printable(what)}")
    spelled = f", {found.tree} names" if found.tree else ""
    click.echo(
        f"{found.container}{spelled}, {len(found.tensors)} tensors, "
        f"{found.values:,} values, {size(found.nbytes)}"
    )
    for difference in found.differences:
        click.echo(f"  {difference}")
    for notice in found.notices:
        click.echo(f"note: {printable(notice)}", err=True)
    shown = list(found.tensors.items())
    if not every:
        shown = shown[:_SHOWN]
    rows = [
        (
            n,
            t.dtype,
            dims(t.shape),
            size(t.nbytes),
            f"= {found.ties[n]}" if n in found.ties else "",
        )
        for n, t in shown
    ]
    header = ("name", "dtype", "shape", "size", "tied")
    _table(header if found.ties else header[:4], [r if found.ties else r[:4] for r in rows])
    if len(shown) < len(found.tensors):
        click.echo(f"... and {len(found.tensors) - len(shown)} more (--all lists them)")
    if found.optimizer:
        click.echo(f"holds an optimizer's state: {len(found.optimizer)} tensors")
    for key, value in {**found.metadata, **found.extras}.items():
        text = printable(str(value))
        cut = len(text) > 100 and not every
        click.echo(f"{printable(key)}: {text[:100] + '...' if cut else text}")


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
        shown = bad[:_SHOWN] or [worst]
        _table(
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
        _table(("tensor", "difference", "max error", "first at"), rows[:_SHOWN])
    if len(rows) > _SHOWN:
        click.echo(f"  ... and {len(rows) - _SHOWN} more (--json lists them)")


def model_row(name: str, found: Found) -> dict[str, Any]:
    """What `models` says of one preset."""
    layout = found.model.layout_of(found.config)
    return {
        "name": name,
        "family": found.model.name,
        "parameters": layout.parameters,
        "tensors": len(layout.shapes("torch")),
        "summary": found.model.summary,
    }


def models(rows: Sequence[dict[str, Any]]) -> None:
    """A table of presets."""
    _table(
        ("name", "family", "parameters", "tensors", "summary"),
        [
            (r["name"], r["family"], f"{r['parameters']:,}", str(r["tensors"]), r["summary"])
            for r in rows
        ],
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns, as wide as they need to be: a name that is broken in two is no name."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in header:
        right = name in ("parameters", "tensors", "size", "error", "noise", "ratio", "max error")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console(highlight=False, width=1000)
    with console.capture() as text:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in text.get().splitlines()))


def _title(prepared: Prepared) -> str:
    p = prepared.plan
    return title(p.model, p.config, p.unknown)


def _kind(prepared: Prepared) -> str:
    tree = prepared.plan.target_tree
    return prepared.target.to + ("" if tree == "torch" else f", {tree} tree")


def _is_cast(step: Any) -> bool:
    return bool(step.source_infos[0].dtype != step.target_infos[0].dtype)
