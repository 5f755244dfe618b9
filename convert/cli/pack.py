"""`zooconvert pack`."""

from __future__ import annotations

from typing import Any

import click

from convert.cli.options import model_options, output_options


@click.command()
@click.argument("ckpt", type=click.Path())
@click.option("--name", required=True, help="What to load it by: preset.tag, or a new name.")
@click.option("--out", type=click.Path(), default=".", help="The directory of the wheel.")
@click.option("--version", default="1.0", show_default=True, help="Of the wheel.")
@click.option(
    "--card", type=click.Path(), metavar="FILE", help="JSON: data, license, score, and more."
)
@model_options
@click.option("--dtype", metavar="DTYPE", help="Cast floating-point tensors (bfloat16, ...).")
@click.option("--force", is_flag=True, help="Replace an existing wheel.")
@output_options
def pack(
    ckpt: str, name: str, out: str, as_json: bool, quiet: bool, debug: bool, **options: Any
) -> None:
    """Pack a checkpoint into a wheel that others install with pip and load by name.

    CKPT is any checkpoint of a model of the zoo, of either framework. The weights are stored in the
    canonical layout and verified; the wheel needs no build tool and runs no code.

    \b
    Examples:
      zooconvert pack digits.pt --name mnist_cnn.mine
      zooconvert pack model.flax --name our_bert --card card.json --out dist
    """
    from convert.cli import output as display
    from convert.cli.show_models import packed, packed_data
    from convert.packing import pack as run

    with display.progress(quiet) as progress:
        result = run(ckpt, name, out, progress=progress, **options)
    if as_json:
        display.json(packed_data(result))
    elif not quiet:
        packed(ckpt, result)
