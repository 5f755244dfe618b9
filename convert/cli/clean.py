"""`zooconvert clean`."""

from __future__ import annotations

import click

from convert.cli import output
from convert.cli.options import output_options


@click.command()
@click.argument("directory", type=click.Path(), metavar="DIR")
@click.option("--dry-run", is_flag=True, help="List them, and remove nothing.")
@output_options
def clean(directory: str, dry_run: bool, as_json: bool, quiet: bool, debug: bool) -> None:
    """Remove what conversions that were killed left in DIR.

    They work in hidden directories beside their targets, .TARGET.zooconvert-..., which the next
    conversion to the same target removes too. Those of running conversions are left alone.

    \b
    Examples:
      zooconvert clean checkpoints
      zooconvert clean . --dry-run
    """
    from convert.api import clean as run
    from zoo.containers.errors import printable

    found = run(directory, dry_run=dry_run)
    if as_json:
        output.json([{"path": str(p), "bytes": n, "removed": not dry_run} for p, n in found])
    elif not quiet:
        for path, size in found:
            click.echo(f"{printable(str(path))}  {output.size(size)}")
        what = "would be removed" if dry_run else "removed"
        click.echo(f"{len(found)} {what}, {output.size(sum(n for _, n in found))}")
