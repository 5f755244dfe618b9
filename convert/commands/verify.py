"""`zooconvert verify`."""

from __future__ import annotations

import sys
from typing import Any

import click

from convert.commands.options import model_options, notices, output_options


@click.command()
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option(
    "--level",
    type=click.Choice(["bits", "outputs"]),
    default="bits",
    show_default=True,
    help="Compare the weights only, or run both models too.",
)
@model_options
@output_options
def verify(a: str, b: str, level: str, as_json: bool, quiet: bool, debug: bool, **of: Any) -> None:
    """Say whether checkpoints A and B are the same model. Exit code 3 if they are not.

    Either may be of either framework and of any container.

    \b
    Examples:
      zooconvert verify model.safetensors model.flax
      zooconvert verify model.safetensors model.flax --level outputs
    """
    from convert import display
    from convert.api import verify as run
    from convert.display.report import report as show

    with display.progress(quiet) as progress:
        report = run(a, b, level, progress=progress, **of)  # type: ignore[arg-type]
    notices(report.notices, quiet)
    if as_json:
        click.echo(report.to_json())
    elif not quiet:
        show(report)
    if report.verdict == "different":
        sys.exit(3)
