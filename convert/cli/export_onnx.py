"""`zooconvert export`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from convert.cli import output
from convert.cli.options import model_options, notices, output_options

if TYPE_CHECKING:
    from convert.exporting.onnx_export import Exported


@click.command()
@click.argument("ckpt", type=click.Path())
@click.argument("dst", type=click.Path(), metavar="OUT.onnx")
@model_options
@click.option(
    "--torch",
    metavar="MODULE:NAME",
    help="The torch module that the tensors are of, where it is not the zoo's: pkg.mod:NAME or "
    "path/to/file.py:NAME. Runs its code.",
)
@click.option(
    "--inputs",
    "inputs_file",
    type=click.Path(),
    metavar="FILE",
    help="One call, for --torch: an .npz or .npy file, with PyTorch's axes.",
)
@click.option("--dtype", metavar="DTYPE", help="Cast floating-point tensors (float32, ...).")
@click.option(
    "--opset",
    type=click.IntRange(18),
    default=20,
    show_default=True,
    help="The version of ONNX's operations that the graph is of.",
)
@click.option("--static", is_flag=True, help="Fix all sizes to those of the sample inputs.")
@click.option(
    "--external-data", is_flag=True, help="Tensors in a file beside; above 1.8 GB always."
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--no-verify", is_flag=True, help="Do not run and compare the result.")
@output_options
def export(
    ckpt: str,
    dst: str,
    as_json: bool,
    quiet: bool,
    debug: bool,
    torch: str | None,
    inputs_file: str | None,
    static: bool,
    no_verify: bool,
    **options: Any,
) -> None:
    """Write a model as an ONNX file: its graph and its weights.

    CKPT is any checkpoint of a model of the zoo, of either framework; or, with --torch, of your
    own. The file is checked by onnx and run by onnxruntime beside both frameworks at two sizes
    before it is kept, and says which model it is: it comes back without a flag.

    \b
    Examples:
      zooconvert export model.safetensors model.onnx
      zooconvert export model.flax model.onnx --opset 18 --static
      zooconvert export last.pt net.onnx --torch nets.py:Net --inputs x.npy
      zooconvert torch2flax model.onnx
    """
    from pathlib import Path

    from convert.cli.user_modules import users_code
    from convert.exporting.onnx_export import export as run
    from convert.runtime.inputs import read_inputs

    if inputs_file is not None:
        options["inputs"] = read_inputs(Path(inputs_file))
    options |= {"dynamic": not static, "verify": not no_verify}
    if torch is None:
        made = run(ckpt, dst, **options)
    else:
        with users_code() as load:
            made = run(ckpt, dst, torch=load(torch), **options)
    notices(made.notices, quiet)
    if as_json:
        output.json(_data(made))
    elif not quiet:
        _show(ckpt, made)


def _show(source: str, made: Exported) -> None:
    """What was written, and what was proved."""
    from zoo.containers.errors import printable

    click.echo(f"{printable(source)} -> {printable(str(made.path))}")
    sizes = ", ".join(f"{n} {_dims(dims)}" for n, dims in made.sizes.items())
    click.echo(f"  {printable(made.title)}, opset {made.opset}, takes {printable(sizes)}")
    worst = made.worst
    if worst is None:
        click.echo("  not run (--no-verify)")
        return
    at = list(dict.fromkeys(h.sizes for h in made.held))
    sides = " and ".join(dict.fromkeys(h.side for h in made.held))
    click.echo(f"  verified: {made.certificate.verified['tensors']} tensors come back bit for bit")
    click.echo(
        f"  verified: onnxruntime beside {sides} at {printable('; '.join(at))}: at most "
        f"{worst.row.ratio:.2f} times the rounding noise ({printable(worst.row.name)})"
    )


def _dims(dims: tuple[str | int, ...]) -> str:
    return f"({', '.join(map(str, dims))})"


def _data(made: Exported) -> dict[str, Any]:
    """The same for machines."""
    return {
        "target": str(made.path),
        "certificate": f"{made.path}.certificate.json",
        "model": made.title,
        "opset": made.opset,
        "sizes": {n: list(dims) for n, dims in made.sizes.items()},
        "verified": made.certificate.verified,
        "notices": made.notices,
    }
