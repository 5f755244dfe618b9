"""`zooconvert models`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from convert.cli import output
from convert.cli.options import output_options

if TYPE_CHECKING:
    from pathlib import Path

    from zoo.registry import Found


@click.command()
@click.argument("pattern", default="*")
@click.option("--weights", is_flag=True, help="List pretrained weights, with their scores.")
@click.option("--dialects", is_flag=True, help="List the names that upstream publishes it under.")
@output_options
def models(
    pattern: str, weights: bool, dialects: bool, as_json: bool, quiet: bool, debug: bool
) -> None:
    """List the presets whose name or family contains PATTERN, or matches it as a shell pattern.

    With --weights those that are installed here: they are loaded by their name. With --dialects
    every family's spellings: a file is read in any of them, and --dialect writes one.

    \b
    Examples:
      zooconvert models
      zooconvert models bert
      zooconvert models 'resnet*' --json
      zooconvert models --weights
      zooconvert models resnet --dialects
    """
    from zoo.containers.errors import UsageError
    from zoo.registry import get, names

    if weights and dialects:
        raise click.UsageError("--weights and --dialects are two lists: ask for one")
    if weights:
        _weights(pattern, as_json, quiet)
        return
    low = pattern.lower()
    every = [(name, get(name)) for name in names()]
    matching = names(pattern)
    found = [
        (n, f) for n, f in every if n in matching or low in n.lower() or low in f.model.name.lower()
    ]
    if not found:
        raise UsageError(f"no model matches {pattern!r}", "`zooconvert models` lists them all")
    if dialects:
        rows = [r for f in {f.model.name: f for _, f in found}.values() for r in _spelled(f)]
        if as_json:
            output.json(rows)
        elif not quiet:
            _show_dialects(rows)
        return
    if as_json:
        output.json([_row(name, f) for name, f in found])
    elif not quiet:
        _show([_row(name, f) for name, f in found])


def _weights(pattern: str, as_json: bool, quiet: bool) -> None:
    import fnmatch

    from zoo import hub
    from zoo.containers.errors import UsageError

    low = pattern.lower()
    rows = [_weights_row(name, path) for name, path in sorted(hub.pretrained().items())]
    found = [
        row
        for row in rows
        if low in row["name"].lower()
        or low == row["family"]
        or fnmatch.fnmatchcase(row["name"], pattern)
    ]
    if not found:
        raise UsageError(
            f"no weights match {pattern!r}", "`zooconvert models --weights` lists them all"
        )
    if as_json:
        output.json(found)
    elif not quiet:
        _show_weights(found)


def _row(name: str, found: Found) -> dict[str, Any]:
    """What `models` says of one preset."""
    layout = found.model.layout_of(found.config)
    return {
        "name": name,
        "family": found.model.name,
        "parameters": layout.parameters,
        "tensors": len(layout.shapes("torch")),
        "summary": found.model.summary,
    }


def _spelled(found: Found) -> list[dict[str, Any]]:
    """What `models --dialects` says of one family: every spelling of its preset."""
    from zoo.layout import STACKED, TREES

    model = found.model
    layout = model.layout_of(found.config)
    told = {d.name: d.summary for d in model.dialects}
    rows = []
    for tree in sorted((*TREES, *told), key=lambda t: layout.side(t) == "flax"):
        if tree in STACKED and not layout.stacks:
            continue
        shown = [v.tensors[0].name for v in layout.view(tree) if v.tensors]
        rows.append(
            {
                "family": model.name,
                "dialect": tree,
                "also": [name for name, of in model.called.items() if of == tree],
                "framework": layout.side(tree),
                "summary": told.get(tree, ""),
                "example": shown[len(shown) // 2],
            }
        )
    return rows


def _show_dialects(rows: Sequence[dict[str, Any]]) -> None:
    """A table of spellings."""
    output.table(
        ("family", "framework", "dialect", "also called", "whose", "for example"),
        [
            (
                r["family"],
                r["framework"],
                r["dialect"],
                ", ".join(r["also"]),
                r["summary"],
                r["example"],
            )
            for r in rows
        ],
    )


def _show(rows: Sequence[dict[str, Any]]) -> None:
    """A table of presets."""
    output.table(
        ("name", "family", "parameters", "tensors", "summary"),
        [
            (r["name"], r["family"], f"{r['parameters']:,}", str(r["tensors"]), r["summary"])
            for r in rows
        ],
    )


def _weights_row(name: str, path: Path) -> dict[str, Any]:
    """What `models --weights` says of one set of weights; without a card little is known."""
    import dataclasses

    from zoo.card import Card, read_card
    from zoo.containers.errors import UsageError
    from zoo.registry import get

    card = read_card(path) or Card(name)
    try:
        family = get(name).model.name
    except UsageError:  # a packed checkpoint may have a name of its own
        family = ""
    nbytes = path.stat().st_size if path.is_file() else None
    told = dataclasses.asdict(card) | {"name": name}
    return {"family": family, "path": str(path), "bytes": nbytes} | told


def _show_weights(rows: Sequence[dict[str, Any]]) -> None:
    """A table of pretrained weights and their scores."""
    from zoo.containers.errors import printable

    output.table(
        ("name", "score on held-out data", "95% interval", "n", "size", "task"),
        [
            (
                printable(r["name"]),
                *_score(r["score"]),
                "" if r["bytes"] is None else output.size(r["bytes"]),
                printable(r["summary"]),
            )
            for r in rows
        ],
    )


def _score(score: dict[str, Any] | None) -> tuple[str, str, str]:
    from zoo.containers.errors import printable

    if score is None:
        return "none stated", "", ""
    value = f"{printable(str(score['metric']))} {score['value']:.4g}"
    return value, f"{score['low']:.4g} to {score['high']:.4g}", f"{score['n']:,}"
