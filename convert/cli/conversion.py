"""`zooconvert torch2flax`, `flax2torch` and `respell`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from convert.cli import output
from convert.cli.layouts import layout_options, stated_layout
from convert.cli.options import (
    Size,
    complete_dialect,
    model_options,
    notices,
    output_options,
)

if TYPE_CHECKING:
    from convert.engine.prepare import Prepared
    from convert.engine.targets import Target
    from zoo.checkpoint.certificate import Certificate


def _convert_options(f: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option(
            "--dtype", metavar="DTYPE", help="Cast floating-point tensors (bfloat16, ...)."
        ),
        click.option(
            "--max-shard-size", type=Size(), help="Write safetensors in shards no larger: 5GB."
        ),
        click.option(
            "--max-memory", type=Size(), help="Bytes of tensors to hold at a time.  [default: 96MB]"
        ),
        click.option(
            "--workers", type=int, metavar="N", help="Threads.  [default: one a core, 2 to 4]"
        ),
        click.option("--dry-run", is_flag=True, help="Print what would be done, and stop."),
        click.option("--resume", is_flag=True, help="Go on with one that was interrupted."),
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


_dialect = click.option(
    "--dialect",
    metavar="NAME",
    shell_complete=complete_dialect,
    help="Upstream's names: `zooconvert models --dialects` lists them.",
)


@click.command()
@click.argument("ckpt", type=click.Path())
@click.argument("dst", required=False, type=click.Path())
@model_options
@layout_options
@click.option(
    "--to", type=click.Choice(["orbax", "msgpack", "safetensors"]), help="[default: orbax]"
)
@click.option(
    "--tree",
    type=click.Choice(["nnx", "linen", "linen-compact", "nnx-scan", "linen-scan"]),
    default="nnx",
    show_default=True,
    help="How the Flax checkpoint is nested and named; -scan stacks equal layers.",
)
@_dialect
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
      zooconvert torch2flax last.pt --torch nets.py:Net
      zooconvert torch2flax hf://google-bert/bert-base-uncased bert.flax --dtype bfloat16
    """
    _convert(ckpt, dst, "flax", **options)


@click.command()
@click.argument("ckpt", type=click.Path())
@click.argument("dst", required=False, type=click.Path())
@model_options
@layout_options
@click.option("--to", type=click.Choice(["safetensors", "pt"]), help="[default: safetensors]")
@_dialect
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


@click.command()
@click.argument("ckpt", type=click.Path())
@click.argument("dst", type=click.Path())
@click.option(
    "--dialect",
    required=True,
    metavar="NAME",
    shell_complete=complete_dialect,
    help="Whose names: `zooconvert models --dialects` lists them.",
)
@model_options
@layout_options
@click.option(
    "--to",
    type=click.Choice(["orbax", "msgpack", "safetensors", "pt"]),
    help="[default: by DST, else orbax or safetensors]",
)
@_convert_options
@output_options
def respell(ckpt: str, dst: str, **options: Any) -> None:
    """Write a checkpoint under other names, most often of the same framework.

    CKPT is a checkpoint of either framework and any container; its own names are recognised.

    \b
    Examples:
      zooconvert respell resnet50.pth resnet50 --dialect transformers
      zooconvert respell hf://microsoft/resnet-50 resnet50.pth --dialect torchvision
      zooconvert respell model.flax stacked.flax --dialect linen-scan
    """
    _convert(ckpt, dst, None, **options)


def _convert(
    ckpt: str,
    dst: str | None,
    framework: str | None,
    *,
    as_json: bool,
    quiet: bool,
    debug: bool,
    dry_run: bool,
    no_verify: bool,
    level: str,
    force: bool,
    resume: bool,
    layout: str | None,
    torch: str | None,
    flax: str | None,
    **options: Any,
) -> None:
    from convert.api import convert as run
    from convert.api import plan

    if no_verify and level != "bits":
        raise click.UsageError("--no-verify and --level contradict each other")
    if level != "bits" and options["dtype"] is not None:
        raise click.UsageError(f"--level {level} compares with the source, which --dtype changes")
    options["layout"] = stated_layout(ckpt, layout, torch, flax, quiet)
    if dry_run:
        prepared = plan(ckpt, dst, framework=framework, force=force, level=level, **options)
        notices(prepared.notices, quiet)
        if as_json:
            output.json(_plan_data(prepared))
        elif not quiet:
            _show_plan(prepared)
        return
    planned: list[Prepared] = []

    def on_plan(prepared: Prepared) -> None:
        planned.append(prepared)
        notices(prepared.notices, quiet)

    with output.progress(quiet) as progress:
        certificate = run(
            ckpt,
            dst,
            framework=framework,
            force=force,
            resume=resume,
            verify=not no_verify,
            level=level,  # type: ignore[arg-type]
            progress=progress,
            on_plan=on_plan,
            **options,
        )
    notices([n for n in certificate.notices if n not in planned[0].plan.notices], quiet)
    if as_json:
        output.json(_data(planned[0], certificate))
    elif not quiet:
        _show(ckpt, planned[0], certificate)


def _show(source: str, prepared: Prepared, certificate: Certificate) -> None:
    """Two lines: what was done, and what was proved."""
    from convert.training_state.summary import line
    from zoo.containers.errors import printable

    p, target = prepared.plan, prepared.target
    total = sum(s.nbytes for s in p.steps)
    made = sum(i.nbytes for s in p.steps for i in s.target_infos)
    click.echo(f"{printable(source)} -> {printable(str(target.path))}")
    beside = sum(a.tied_to is None for a in p.aside)
    kept = f" + {beside} kept in the label" if beside else ""
    sizes = output.size(total) if made == total else f"{output.size(total)} -> {output.size(made)}"
    count = sum(len(s.targets) for s in p.steps)
    counts = f"{count} tensors{kept}, {sizes}"
    click.echo(f"  {_title(prepared)}, {counts}, {_kind(prepared)}")
    if certificate.training:
        click.echo(f"  {printable(line(certificate.training))} -> {_beside(target)}")
    verified = certificate.verified
    if verified["level"] == "none":
        click.echo("  not verified (--no-verify)")
        return
    cast = any(r.dtype != r.target_dtype for r in certificate.tensors)
    how = (
        "re-read: the bits that were meant" if cast else "re-read and mapped back: every bit equal"
    )
    click.echo(f"  verified: {how}")
    if verified["level"] != "bits":
        worst = verified["worst"]
        click.echo(
            f"  verified: {verified['outputs']} outputs and intermediates of both twins, "
            f"at most {worst['ratio']:.2f} times the rounding noise ({printable(worst['name'])})"
        )
    if "gradients" in verified:
        click.echo(f"  verified: {verified['gradients']} gradients, within the rounding noise")
    if "training" in verified:
        told = ", ".join(f"{steps} steps of {name}" for name, steps in verified["training"].items())
        click.echo(f"  verified: {told}, within the rounding noise")


def _data(prepared: Prepared, certificate: Certificate) -> dict[str, Any]:
    """The same for machines."""
    from zoo.containers import filenames

    target = prepared.target
    return {
        "target": str(target.path),
        "certificate": str(target.path.parent / target.beside(filenames.CERTIFICATE)),
        "container": target.to,
        "tree": prepared.plan.target_tree,
        "model": certificate.model,
        "config": certificate.config,
        "tensors": len(prepared.plan.steps),
        "bytes": sum(s.nbytes for s in prepared.plan.steps),
        "training": {k: v for k, v in certificate.training.items() if k != "hashes"},
        "verified": certificate.verified,
        "notices": [*prepared.notices, *certificate.notices[len(prepared.plan.notices) :]],
    }


def _show_plan(prepared: Prepared) -> None:
    """Every step, and what it all needs."""
    from convert.training_state.summary import line, summary
    from zoo.checkpoint.problems import dims
    from zoo.containers.errors import printable
    from zoo.layout.ops import describe

    p, target = prepared.plan, prepared.target
    rows = [
        (
            " + ".join(s.sources),
            " + ".join(s.targets),
            describe(s.ops),
            s.source_infos[0].dtype + (f" -> {s.target_infos[0].dtype}" if _is_cast(s) else ""),
            " + ".join(dims(i.shape) for i in s.target_infos),
        )
        for s in p.steps
    ]
    output.table(("source", "target", "op", "dtype", "shape"), rows)
    kept = [a.source for a in p.aside if a.tied_to is None]
    click.echo()
    if kept:
        click.echo(f"kept in the label: {', '.join(map(printable, kept))}")
    count = sum(len(s.targets) for s in p.steps)
    click.echo(f"{_title(prepared)}, {count} tensors, {_kind(prepared)}")
    if told := line(summary(prepared.training)):
        click.echo(f"{printable(told)} -> {_beside(target)}")
    click.echo(f"target {printable(str(target.path))}: not written (--dry-run)")
    reads = sum(s.nbytes for s in p.steps)
    bound, ran = ("most", "") if prepared.level == "bits" else ("least", " while the models run")
    click.echo(
        f"reads {output.size(reads)}, "
        f"holds at {bound} {output.size(prepared.memory)} of tensors at a time{ran}, "
        f"needs {output.size(prepared.disk)} of disk"
    )


def _plan_data(prepared: Prepared) -> dict[str, Any]:
    """The plan for machines."""
    from convert.training_state.summary import summary
    from zoo.layout.ops import describe

    p = prepared.plan
    return {
        "target": str(prepared.target.path),
        "container": prepared.target.to,
        "tree": p.target_tree,
        "model": p.model.name if p.model else "",
        "memory": prepared.memory,
        "disk": prepared.disk,
        "training": summary(prepared.training),
        "steps": [
            {
                "source": list(s.sources),
                "target": list(s.targets),
                "op": describe(s.ops),
                "dtype": s.source_infos[0].dtype,
                "target_dtype": s.target_infos[0].dtype,
                "shapes": [list(i.shape) for i in s.target_infos],
                "bytes": s.nbytes,
            }
            for s in p.steps
        ],
        "notices": prepared.notices,
    }


def _title(prepared: Prepared) -> str:
    from zoo.checkpoint.readings import title

    p = prepared.plan
    return title(p.model, p.config, p.unknown)


def _kind(prepared: Prepared) -> str:
    from zoo.layout import TREES

    tree = prepared.plan.target_tree
    told = f", {tree} {'tree' if tree in TREES else 'names'}"
    return prepared.target.to + ("" if tree == "torch" else told)


def _beside(target: Target) -> str:
    """The name of the optimizer.safetensors that belongs to the target."""
    from pathlib import Path

    from zoo.containers import filenames
    from zoo.containers.errors import printable

    return printable(Path(target.beside(filenames.OPTIMIZER)).name)


def _is_cast(step: Any) -> bool:
    return bool(step.source_infos[0].dtype != step.target_infos[0].dtype)
