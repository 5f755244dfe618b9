"""What `lint` prints."""

from __future__ import annotations

import textwrap

import click

from convert.linting.findings import IDS, SEVERITIES, Finding, Lint
from zoo.containers.errors import printable

_SHOWN = 3  # patterns of a finding
_WIDTH = 100


def lint(found: Lint, every: bool) -> None:
    """Counts, then each finding; notes in a line each unless `every`."""
    pair = f" and {printable(found.other)}" if found.other else ""
    what = printable(found.model or "unknown model")
    click.echo(f"{printable(found.path)}{pair}: {what}, {found.tensors} tensors")
    names = {"wrong": "wrong", "check": "to check", "note": "noted"}
    click.echo("  " + ", ".join(f"{len(found.of(s))} {names[s]}" for s in SEVERITIES))
    for finding in found.findings:
        _finding(finding, every)
    if found.of("note") and not every:
        click.echo("--all explains the notes; docs/lint.md explains every finding")


def _finding(f: Finding, every: bool) -> None:
    click.echo(printable(f"{f.severity:<5}  {f.id:<18}  {f.here}"))
    if f.severity == "note" and not every:
        return
    _told("why", f"{IDS[f.id]}: {f.why}")
    _told("do", f.check)
    shown = f.tensors if every else f.tensors[:_SHOWN]
    for name in shown:
        click.echo(f"         on:  {printable(name)}")
    if len(shown) < len(f.tensors):
        click.echo(f"         on:  ... and {len(f.tensors) - len(shown)} more (--all lists them)")


def _told(label: str, text: str) -> None:
    lines = textwrap.wrap(printable(text), _WIDTH - 14) or [""]
    click.echo(f"         {label + ':':<5}{lines[0]}")
    for line in lines[1:]:
        click.echo(" " * 14 + line)
