"""`zooconvert torch2flax` and `flax2torch`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from convert.cli.options import Size, model_options, notices, output_options

if TYPE_CHECKING:
    from convert.engine.prepare import Prepared


def _convert_options(f: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option(
            "--dtype", metavar="DTYPE", help="Cast floating-point tensors (bfloat16, ...)."
        ),
        click.option(
            "--max-shard-size", type=Size(), help="Write safetensors in shards no larger: 5GB."
        ),
        click.option("--dry-run", is_flag=True, help="Print what would be done, and stop."),
        click.option("--force", is_flag=True, help="Replace an existing checkpoint."),
        click.option("--no-verify", is_flag=True, help="Do not re-read and compare the result."),
        click.option(
            "--level",
            type=click.Choice(["bits", "outputs", "gradients", "training"]),
            default="bits",
            show_default=True,
            help="How far to verify the result.",
        ),
    ]
    for option in reversed(options):
        f = option(f)
    return f


@click.command()
@click.argument("ckpt", type=click.Path())
@click.argument("dst", required=False, type=click.Path())
@model_options
@click.option(
    "--to", type=click.Choice(["orbax", "msgpack", "safetensors"]), help="[default: orbax]"
)
@click.option(
    "--tree",
    type=click.Choice(["nnx", "linen", "linen-compact"]),
    default="nnx",
    show_default=True,
    help="How the Flax checkpoint is nested and named.",
)
@_convert_options
@output_options
def torch2flax(ckpt: str, dst: str | None, **options: Any) -> None:
    """Convert a PyTorch checkpoint to Flax.

    CKPT is a .pt, .pth, .bin or .safetensors file, an index of shards, a directory with one of
    these, pkg:MODULE/PATH or hf://ORG/REPO. DST defaults to STEM.flax beside it.

    \b
    Examples:
      zooconvert torch2flax model.safetensors
      zooconvert torch2flax pytorch_model.bin model.msgpack --level outputs
      zooconvert torch2flax hf://google-bert/bert-base-uncased bert.flax --dtype bfloat16
    """
    _convert(ckpt, dst, "flax", **options)


@click.command()
@click.argument("ckpt", type=click.Path())
@click.argument("dst", required=False, type=click.Path())
@model_options
@click.option("--to", type=click.Choice(["safetensors", "pt"]), help="[default: safetensors]")
@click.option(
    "--learning-rate",
    type=float,
    metavar="RATE",
    help="That of the last update, where the state of optax.rmsprop is to come along.",
)
@_convert_options
@output_options
def flax2torch(ckpt: str, dst: str | None, **options: Any) -> None:
    """Convert a Flax checkpoint to PyTorch.

    CKPT is an Orbax directory, a msgpack or safetensors file, a directory with one of these,
    pkg:MODULE/PATH or hf://ORG/REPO. DST defaults to STEM.safetensors beside it.

    \b
    Examples:
      zooconvert flax2torch model.flax
      zooconvert flax2torch flax_model.msgpack out/ --max-shard-size 5GB
      zooconvert flax2torch model.flax model.pt
    """
    _convert(ckpt, dst, "torch", **options)


def _convert(
    ckpt: str,
    dst: str | None,
    framework: str,
    *,
    as_json: bool,
    quiet: bool,
    debug: bool,
    dry_run: bool,
    no_verify: bool,
    level: str,
    force: bool,
    **options: Any,
) -> None:
    from convert.api import convert as run
    from convert.api import plan
    from convert.cli import output as display
    from convert.cli import show_conversion as shown

    if no_verify and level != "bits":
        raise click.UsageError("--no-verify and --level contradict each other")
    if level != "bits" and options["dtype"] is not None:
        raise click.UsageError(f"--level {level} compares with the source, which --dtype changes")
    if dry_run:
        prepared = plan(ckpt, dst, framework=framework, force=force, **options)
        notices(prepared.notices, quiet)
        if as_json:
            display.json(shown.plan_data(prepared))
        elif not quiet:
            shown.plan(prepared)
        return
    planned: list[Prepared] = []

    def on_plan(prepared: Prepared) -> None:
        planned.append(prepared)
        notices(prepared.notices, quiet)

    with display.progress(quiet) as progress:
        certificate = run(
            ckpt,
            dst,
            framework=framework,
            force=force,
            verify=not no_verify,
            level=level,  # type: ignore[arg-type]
            progress=progress,
            on_plan=on_plan,
            **options,
        )
    notices([n for n in certificate.notices if n not in planned[0].plan.notices], quiet)
    if as_json:
        display.json(shown.converted_data(planned[0], certificate))
    elif not quiet:
        shown.converted(ckpt, planned[0], certificate)
