"""`zooconvert lint`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from convert.cli import output
from convert.cli.layouts import layout_options, stated_layout
from convert.cli.options import model_options, notices, output_options

if TYPE_CHECKING:
    from convert.linting.findings import Finding, Lint

_SHOWN = 3  # patterns of a finding
_WIDTH = 100


@click.command()
@click.argument("ckpt", type=click.Path())
@click.argument("other", required=False, type=click.Path())
@click.option("--all", "every", is_flag=True, help="Print notes in full, and every tensor.")
@model_options
@layout_options
@output_options
def lint(
    ckpt: str,
    other: str | None,
    every: bool,
    layout: str | None,
    torch: str | None,
    flax: str | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **of: Any,
) -> None:
    """Say what is easily ported wrong in a checkpoint, and how to check each. Exit code 3 if
    something is wrong: the config contradicts the tensors, or OTHER contradicts CKPT.

    Hyper-parameters that frameworks read differently, and tensors where a wrong rule fits just as
    well. Reads no tensor and, without --torch, imports no framework; docs/lint.md explains every
    finding.

    \b
    Examples:
      zooconvert lint model.safetensors
      zooconvert lint model.safetensors model.flax
      zooconvert lint ~/models/gpt2 --json
    """
    from convert.linting.run import lint as run

    found = run(ckpt, other, layout=stated_layout(ckpt, layout, torch, flax, quiet), **of)
    notices(found.notices, quiet)
    if as_json:
        output.json(found.to_dict())
    elif not quiet:
        _show(found, every)
    if found.contradicts:
        sys.exit(3)


def _show(found: Lint, every: bool) -> None:
    """Counts, then each finding; notes in a line each unless `every`."""
    from convert.linting.findings import SEVERITIES
    from zoo.containers.errors import printable

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
    from convert.linting.findings import IDS
    from zoo.containers.errors import printable

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
    import textwrap

    from zoo.containers.errors import printable

    lines = textwrap.wrap(printable(text), _WIDTH - 14) or [""]
    click.echo(f"         {label + ':':<5}{lines[0]}")
    for line in lines[1:]:
        click.echo(" " * 14 + line)
