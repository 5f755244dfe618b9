"""`zooconvert port`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convert.cli import output
from convert.cli.options import notices, output_options

if TYPE_CHECKING:
    from convert.live.port_files import Port


_SHOWN = 40  # lines of a difference


@click.command()
@click.argument("module", metavar="MODULE:NAME")
@click.option(
    "--inputs",
    "inputs_files",
    type=click.Path(),
    required=True,
    multiple=True,
    metavar="FILE",
    help="One call of it: an .npz or .npy file, with PyTorch's axes. Given again: a call for which "
    "the source must be right too.",
)
@click.option(
    "-o",
    "--output",
    "path",
    type=click.Path(),
    required=True,
    metavar="NAME.py",
    help="The file to write; NAME.layout.json, NAME.safetensors, ... lie beside it. With --family "
    "a new folder.",
)
@click.option("--weights", type=click.Path(), metavar="CKPT", help="Weights in place of its own.")
@click.option(
    "--level",
    type=click.Choice(["outputs", "gradients", "training"]),
    default="outputs",
    show_default=True,
    help="How far the report beside the file compares the two modules.",
)
@click.option(
    "--image-axes",
    type=click.Choice(["last", "first"]),
    help="Where images have their channels in the source: last as in Flax (the default), or first "
    "as in PyTorch, and as a family has them.",
)
@click.option("--test", is_flag=True, help="Write a parity test for pytest too.")
@click.option(
    "--standalone", is_flag=True, help="Write what it uses of zoo.nn into it: no import of zoo."
)
@click.option(
    "--family", is_flag=True, help="Write a family of the zoo: a folder with both definitions."
)
@click.option("--no-verify", is_flag=True, help="Do not run and compare the result.")
@output_options
def port(
    module: str,
    inputs_files: tuple[str, ...],
    path: str,
    weights: str | None,
    level: Any,
    image_axes: Any,
    test: bool,
    standalone: bool,
    family: bool,
    no_verify: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Write a torch module as Flax source, with its layout, weights and proof.

    MODULE:NAME is a torch module, or a class or function that gives one without arguments:
    pkg.mod:NAME or path/to/file.py:NAME. Runs its code. The source is imported afresh and held
    against torch at the sizes of the inputs and at others before anything is written. A file that
    you have edited since is left alone: the new source is NAME.py.new.

    Arrays of an .npz go by the names of forward's arguments: x, mask; batch.x is an array of the
    dict batch.

    \b
    Examples:
      zooconvert port nets.py:Net --inputs x.npz -o net_flax.py
      zooconvert port nets.py:Net --inputs x.npz -o net_flax.py --weights last.pt --test
      zooconvert port torchvision.models:resnet18 --inputs image.npy -o resnet.py --level training
      zooconvert port nets.py:Net --inputs x.npz -o zoo/models/my_net --family
    """
    from convert.api import port as run
    from convert.cli.user_modules import users_code
    from convert.live.port_family import check_family, save_family
    from convert.live.port_files import check_name
    from convert.runtime.inputs import read_inputs
    from zoo.containers.errors import UsageError

    if family and (test or standalone or image_axes == "last"):
        raise UsageError(
            "a family has its own tests, blocks of zoo.nn, and torch's axes",
            "leave --test, --standalone and --image-axes out",
        )
    if not family:
        check_name(Path(path))
    inputs, *others = (read_inputs(Path(file)) for file in inputs_files)
    with users_code() as load:
        compared = None if no_verify else level
        definition = load(module, make=False)
        if family:
            check_family(Path(path), definition)
        made = run(
            definition, inputs, weights,
            others=others, level=compared, verify=not no_verify,
            image_axes=image_axes or ("first" if family else "last"),
            standalone=standalone,
        )  # fmt: skip
        written = save_family(made, definition, path) if family else made.save(path, test=test)
    notices(made.proved.notices, quiet)
    if as_json:
        output.json(_data(made, written))
    elif not quiet:
        _show(module, made, written)


def _difference(new: Path) -> list[str]:
    """How a new source differs from the edited one beside it, as far as it is short."""
    import difflib

    old = new.with_suffix("")
    a, b = (p.read_text().splitlines() for p in (old, new))
    found = list(difflib.unified_diff(a, b, old.name, new.name, lineterm="", n=1))
    more = len(found) - _SHOWN
    return [*found[:_SHOWN], f"... and {more} lines more"] if more > 0 else found


def _data(made: Port, written: list[Path]) -> dict[str, Any]:
    return {
        "model": made.model,
        "verdict": made.proved.verdict,
        "sizes": list(made.proved.rows),
        "baked": made.proved.baked,
        "notices": made.proved.notices,
        "files": [str(p) for p in written],
    }


def _show(source: str, made: Port, written: list[Path]) -> None:
    """What was written, and what was proved."""
    from zoo.containers.errors import printable

    first, *others = (printable(str(p)) for p in written)
    lines = len(made.source.splitlines())
    click.echo(f"{printable(source)} -> {first}")
    click.echo(f"  class {made.model}, {lines} lines; beside it {', '.join(others)}")
    if first.endswith(".new"):
        click.echo(
            "  the file that was there has been edited, and is left as it is; what is new in it:"
        )
        for line in _difference(written[0]):
            click.echo(f"    {printable(line)}")
    if made.proved.verdict == "not proved":
        click.echo("  not run (--no-verify)")
    for sizes, rows in made.proved.rows.items():
        worst = max((r.ratio for r in rows), default=0.0)
        click.echo(
            f"  verified: {printable(sizes)}: {len(rows)} output{'s' * (len(rows) != 1)}, at most "
            f"{worst:.2f} times the rounding noise"
        )
    if made.report is not None:
        click.echo(f"  verified: level {made.report.level}: {made.report.verdict}")
    for told in made.proved.baked:
        click.echo(f"  baked in: {printable(told)}")
