"""What the commands print: tables on a terminal, plain lines elsewhere, JSON on request.

Is imported with the command line itself, so what is heavy is imported where it is used.
"""

from __future__ import annotations

import contextlib
import json as _json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from convert.compare.columns import size as size
from convert.compare.columns import table as table

if TYPE_CHECKING:
    from zoo.checkpoint.progress import Progress as Callback

SHOWN = 40  # rows of a long list
_STAGES = {"check": "checking", "convert": "converting", "verify": "verifying", "bits": "comparing"}


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
