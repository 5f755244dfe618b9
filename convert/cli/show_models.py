"""What `models` and `pack` print."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from convert.cli.output import size, table
from convert.packing import Packed
from zoo.card import Card, read_card
from zoo.containers.errors import UsageError, printable
from zoo.registry import Found, get


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


def weights_row(name: str, path: Path) -> dict[str, Any]:
    """What `models --weights` says of one set of weights; without a card little is known."""
    card = read_card(path) or Card(name)
    try:
        family = get(name).model.name
    except UsageError:  # a packed checkpoint may have a name of its own
        family = ""
    nbytes = path.stat().st_size if path.is_file() else None
    told = dataclasses.asdict(card) | {"name": name}
    return {"family": family, "path": str(path), "bytes": nbytes} | told


def weights(rows: Sequence[dict[str, Any]]) -> None:
    """A table of pretrained weights and their scores."""
    table(
        ("name", "score on held-out data", "95% interval", "n", "size", "task"),
        [
            (
                printable(r["name"]),
                *_score(r["score"]),
                "" if r["bytes"] is None else size(r["bytes"]),
                printable(r["summary"]),
            )
            for r in rows
        ],
    )


def _score(score: dict[str, Any] | None) -> tuple[str, str, str]:
    if score is None:
        return "none stated", "", ""
    value = f"{printable(str(score['metric']))} {score['value']:.4g}"
    return value, f"{score['low']:.4g} to {score['high']:.4g}", f"{score['n']:,}"


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
