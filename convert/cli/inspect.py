"""`zooconvert inspect`."""

from __future__ import annotations

import click

from convert.cli.options import output_options


@click.command()
@click.argument("ckpt", type=click.Path())
@click.option("--all", "every", is_flag=True, help="List every tensor, however many.")
@output_options
def inspect(ckpt: str, every: bool, as_json: bool, quiet: bool, debug: bool) -> None:
    """Show what is in a checkpoint: its model, and names, shapes, dtypes and sizes of its tensors.

    Reads no tensor and imports no framework.

    \b
    Examples:
      zooconvert inspect model.safetensors
      zooconvert inspect model.flax --json
    """
    from convert.cli import output as display
    from convert.cli.show_inspection import inspection
    from convert.inspection import inspect as look

    found = look(ckpt)
    if as_json:
        display.json(found.to_dict())
    elif not quiet:
        inspection(found, every)
