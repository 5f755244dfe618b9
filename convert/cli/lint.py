"""`zooconvert lint`."""

from __future__ import annotations

import sys
from typing import Any

import click

from convert.cli.options import model_options, notices, output_options


@click.command()
@click.argument("ckpt", type=click.Path())
@click.argument("other", required=False, type=click.Path())
@click.option("--all", "every", is_flag=True, help="Print notes in full, and every tensor.")
@model_options
@output_options
def lint(
    ckpt: str, other: str | None, every: bool, as_json: bool, quiet: bool, debug: bool, **of: Any
) -> None:
    """Say what is easily ported wrong in a checkpoint, and how to check each. Exit code 3 if
    something is wrong: the config contradicts the tensors, or OTHER contradicts CKPT.

    Hyper-parameters that frameworks read differently, and tensors where a wrong rule fits just as
    well. Reads no tensor and imports no framework; docs/lint.md explains every finding.

    \b
    Examples:
      zooconvert lint model.safetensors
      zooconvert lint model.safetensors model.flax
      zooconvert lint ~/models/gpt2 --json
    """
    from convert.cli import output as display
    from convert.cli.show_lint import lint as show
    from convert.linting.run import lint as run

    found = run(ckpt, other, **of)
    notices(found.notices, quiet)
    if as_json:
        display.json(found.to_dict())
    elif not quiet:
        show(found, every)
    if found.contradicts:
        sys.exit(3)
