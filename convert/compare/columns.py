"""Columns and sizes as a terminal shows them. What is heavy is imported where it is used."""

from __future__ import annotations

from collections.abc import Sequence

import click


def size(nbytes: int) -> str:
    """Bytes for people, in powers of ten."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns, as wide as they need to be: a name broken in two is not a name."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from zoo.containers.errors import printable

    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name in header:
        right = name in ("parameters", "tensors", "size", "error", "noise", "ratio", "max error")
        grid.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(printable(cell)) for cell in row))
    console = Console(highlight=False, width=1000)
    with console.capture() as text:
        console.print(grid)
    click.echo("\n".join(line.rstrip() for line in text.get().splitlines()))
