"""`zooconvert check`."""

from __future__ import annotations

import click

from convert.cli import output
from convert.cli.options import output_options


@click.command()
@click.argument("ckpt", type=click.Path())
@output_options
def check(ckpt: str, as_json: bool, quiet: bool, debug: bool) -> int:
    """Hold a checkpoint against the certificate that was written with it.

    Every tensor is read and hashed, with the header, the optimizer and the files beside. The exit
    code is 0 where all are as they were written, 2 where there is no certificate, 5 where anything
    is damaged.

    \b
    Examples:
      zooconvert check model.flax
      zooconvert check tuned.safetensors --json
    """
    from convert.api import check as run
    from zoo.containers.errors import printable

    with output.progress(quiet) as progress:
        found = run(ckpt, progress=progress)
    if as_json:
        output.json(
            {
                "path": str(found.path),
                "certificate": str(found.certificate),
                "created": found.created,
                "intact": found.intact,
                "damaged": found.damaged,
                "tensors": found.tensors,
                "bytes": found.nbytes,
            }
        )
    if not as_json or found.damaged:
        found.refuse_damage()
    if not as_json and not quiet:
        click.echo(
            f"intact: {printable(str(found.path))}, {found.tensors} tensors, "
            f"{output.size(found.nbytes)}, as written {found.created}"
        )
    return 0
