"""What `models` and `pack` print."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

import click

from convert.display import size, table
from convert.packing import Packed
from zoo.containers.errors import printable
from zoo.registry import Found


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
    table(
        ("name", "family", "parameters", "tensors", "summary"),
        [
            (r["name"], r["family"], f"{r['parameters']:,}", str(r["tensors"]), r["summary"])
            for r in rows
        ],
    )


def packed(source: str, result: Packed) -> None:
    """What was packed, and the two lines that a colleague types."""
    size_of_wheel = size(result.path.stat().st_size)
    click.echo(f"{printable(source)} -> {printable(str(result.path))} ({size_of_wheel})")
    click.echo(
        f"  {printable(result.title)}, {size(result.nbytes)} of tensors, verified bit for bit"
    )
    if not result.card.license:
        click.echo("  the card names no licence: add one with --card", err=True)
    click.echo(f"  install: pip install {shlex.quote(printable(str(result.path)))}")
    click.echo(f'  load:    zoo.load("{result.name}", framework="torch")  # or "flax"')


def packed_data(result: Packed) -> dict[str, Any]:
    """The same for machines."""
    return {
        "wheel": str(result.path),
        "name": result.name,
        "distribution": result.distribution,
        "model": result.title,
        "bytes": result.nbytes,
        "card": dataclasses.asdict(result.card),
    }
