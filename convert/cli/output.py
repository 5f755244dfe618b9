"""What the commands print: tables on a terminal, plain lines elsewhere, JSON on request.

Is imported with the command line itself, so what is heavy is imported where it is used.
"""

from __future__ import annotations

import contextlib
import json as _json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from zoo.checkpoint.progress import Progress as Callback

SHOWN = 40  # rows of a long list
_STAGES = {"convert": "converting", "verify": "verifying", "bits": "comparing"}


def json(data: Any) -> None:
    """One JSON document on stdout."""
    click.echo(_json.dumps(data, indent=1))


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Callback]:
    """A callback that draws bars on a terminal, and does nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    if quiet or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(_STAGES.get(stage, stage), total=total)
            bars.update(tasks[stage], completed=done)

        yield show


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
