"""`zooconvert verify`."""

from __future__ import annotations

import sys
from typing import Any

import click

from convert.cli import output
from convert.cli.layouts import layout_options, stated_layout
from convert.cli.options import model_options, notices, output_options, paired
from convert.cli.user_modules import users_code
from convert.compare.settings import OPTIMIZERS


@click.command()
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option(
    "--level",
    type=click.Choice(["bits", "outputs", "gradients", "training"]),
    help="How far to compare, each including those before.  "
    "[default: bits for checkpoints, outputs for modules]",
)
@click.option(
    "--report",
    "report_file",
    type=click.Path(),
    metavar="FILE",
    help="Write a page (.html) or data (.json) of everything that was compared.",
)
@click.option(
    "--inputs",
    "inputs_file",
    type=click.Path(),
    metavar="FILE|auto",
    help="What to run both on: an .npz or .npy file, with PyTorch's axes; or auto, which draws it.",
)
@click.option(
    "--flax-inputs",
    type=click.Path(),
    metavar="FILE",
    help="What the Flax module takes, where it takes something else.",
)
@click.option(
    "--pair",
    "pairs",
    multiple=True,
    metavar="TORCH=FLAX",
    help="Two layers that are each other's, where names do not tell.",
)
@click.option(
    "--optimizer",
    "optimizers",
    multiple=True,
    type=click.Choice(OPTIMIZERS),
    help="For level training, any number of times.  [default: all four]",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Optimizer steps for level training.",
)
@click.option(
    "--explain",
    type=click.FloatRange(0),
    default=20,
    show_default=True,
    metavar="SECONDS",
    help="How long to search for the cause of a difference that no known cause fits; 0: not.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the loss, and of modules made here."
)
@model_options
@layout_options
@output_options
def verify(
    a: str,
    b: str,
    report_file: str | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Say whether A and B are the same model. Exit code 3 if they are not.

    A and B are checkpoints of the zoo's models, each of either framework and of any container. Or
    they are modules of your own, one of PyTorch and one of Flax (NNX or Linen): pkg.mod:NAME or
    path/to/file.py:NAME, where NAME is a module, or a class or function that gives one without
    arguments; for Linen it gives (module, variables), for a JAX function (function, params).
    Importing them runs their code.

    \b
    Examples:
      zooconvert verify model.safetensors model.flax
      zooconvert verify model.safetensors model.flax --level training --report report.html
      zooconvert verify nets:TorchNet nets:FlaxNet --inputs auto
      zooconvert verify nets:TorchNet nets:FlaxNet --inputs inputs.npz
      zooconvert verify port.py:torch_net port.py:flax_net --inputs x.npy --pair fc=head
    """
    import shlex
    from pathlib import Path

    from convert.compare.report_file import check_report, write_report
    from convert.compare.summary_text import report as show

    if report_file is not None:
        check_report(Path(report_file))
    with output.progress(quiet) as bar:
        report = _compare(a, b, bar, quiet, **options)
    report.command = shlex.join(["zooconvert", *sys.argv[1:]])
    notices(report.notices, quiet)
    if report_file is not None:
        write_report(report, Path(report_file))
    if as_json:
        click.echo(report.to_json())
    elif not quiet:
        show(report, report_file)
    if report.verdict == "different":
        sys.exit(3)


def _compare(
    a: str,
    b: str,
    bar: Any,
    quiet: bool,
    *,
    level: Any,
    inputs_file: str | None,
    flax_inputs: str | None,
    pairs: tuple[str, ...],
    optimizers: tuple[str, ...],
    layout: str | None,
    torch: str | None,
    flax: str | None,
    **options: Any,
) -> Any:
    from pathlib import Path

    from convert.api import verify as run
    from convert.runtime.inputs import read_inputs
    from convert.runtime.user_code import is_target
    from zoo.containers.errors import UsageError

    targets = [is_target(text) for text in (a, b)]
    if any(targets) and not all(targets):
        module, other = (a, b) if targets[0] else (b, a)
        advice = f"name a function that loads {other} into a module, such as zoo.load does"
        if not Path(other).exists():
            advice += f"; a module is {other}:NAME"
        raise UsageError(f"{module} is a module and {other} a checkpoint", advice)
    options |= {"optimizers": optimizers or tuple(OPTIMIZERS), "level": level}
    if inputs_file is not None:
        auto = inputs_file == "auto"
        options["inputs"] = inputs_file if auto else read_inputs(Path(inputs_file))
    if not any(targets):
        if flax_inputs or pairs:
            raise UsageError("--flax-inputs and --pair are for modules", "leave them out")
        options["layout"] = stated_layout(a, layout, torch, flax, quiet)
        return run(a, b, progress=bar, **options)
    if torch or flax:
        raise UsageError(
            "--torch and --flax are for checkpoints", "leave them out: A and B are modules"
        )
    options["layout"] = layout
    if inputs_file is None:
        raise UsageError(
            "two modules need inputs to be run on",
            "save them with numpy.savez('inputs.npz', x=...) and give --inputs inputs.npz; "
            "or --inputs auto, which draws them",
        )
    if flax_inputs is not None:
        options["flax_inputs"] = read_inputs(Path(flax_inputs))
    options["layers"] = paired(pairs)
    with users_code() as load:
        modules = [load(text, options["seed"]) for text in (a, b)]
        return run(modules[0], modules[1], titles=(a, b), **options)
