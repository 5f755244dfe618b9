"""`zooconvert clean`."""

from __future__ import annotations

import click

from convert.cli import output
from convert.cli.options import output_options

_KINDS = {
    "dead": "",
    "resumable": ", which the same command with --resume goes on with",
    "committed": ", whole: it goes to its place",
}


@click.command()
@click.argument("directory", type=click.Path(), metavar="DIR")
@click.option("--dry-run", is_flag=True, help="List them, and remove nothing.")
@output_options
def clean(directory: str, dry_run: bool, as_json: bool, quiet: bool, debug: bool) -> None:
    """Remove what conversions that were killed left in DIR.

    They work in hidden directories beside their targets, .TARGET.zooconvert-..., which the next
    conversion to the same target removes too, or with --resume goes on with. What was whole and
    only had to be moved is put in its place. Those of running conversions are left alone.

    \b
    Examples:
      zooconvert clean checkpoints
      zooconvert clean . --dry-run
    """
    from convert.api import clean as run
    from zoo.containers.errors import printable

    found = run(directory, dry_run=dry_run)
    if as_json:
        told = [{"path": str(f.path), "bytes": f.nbytes, "kind": f.kind} for f in found]
        output.json([one | {"removed": not dry_run} for one in told])
    elif not quiet:
        for f in found:
            click.echo(f"{printable(str(f.path))}  {output.size(f.nbytes)}{_KINDS[f.kind]}")
        what = "would be removed" if dry_run else "removed"
        click.echo(f"{len(found)} {what}, {output.size(sum(f.nbytes for f in found))}")
