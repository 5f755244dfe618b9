"""`zooconvert pack`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from convert.cli import output
from convert.cli.options import model_options, output_options

if TYPE_CHECKING:
    from convert.packing import Packed


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
    from convert.packing import pack as run

    with output.progress(quiet) as progress:
        result = run(ckpt, name, out, progress=progress, **options)
    if as_json:
        output.json(_data(result))
    elif not quiet:
        _show(ckpt, result)


def _show(source: str, result: Packed) -> None:
    """What was packed, and the two lines that a colleague types."""
    import shlex

    from zoo.containers.errors import printable

    size_of_wheel = output.size(result.path.stat().st_size)
    click.echo(f"{printable(source)} -> {printable(str(result.path))} ({size_of_wheel})")
    click.echo(
        f"  {printable(result.title)}, {output.size(result.nbytes)} of tensors, "
        "verified bit for bit"
    )
    if not result.card.license:
        click.echo("  the card names no licence: add one with --card", err=True)
    click.echo(f"  install: pip install {shlex.quote(printable(str(result.path)))}")
    click.echo(f'  load:    zoo.load("{result.name}", framework="torch")  # or "flax"')


def _data(result: Packed) -> dict[str, Any]:
    """The same for machines."""
    import dataclasses

    return {
        "wheel": str(result.path),
        "name": result.name,
        "distribution": result.distribution,
        "model": result.title,
        "bytes": result.nbytes,
        "card": dataclasses.asdict(result.card),
    }
