"""What a conversion and a plan print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from convert.api import Prepared
from convert.cli.output import size, table
from convert.engine.targets import Target
from convert.training_state.summary import line, summary
from zoo.checkpoint.certificate import Certificate
from zoo.checkpoint.identification import dims, title
from zoo.containers import filenames
from zoo.containers.errors import printable
from zoo.layout.ops import describe


def converted(source: str, prepared: Prepared, certificate: Certificate) -> None:
    """Two lines: what was done, and what was proved."""
    p, target = prepared.plan, prepared.target
    total = sum(s.nbytes for s in p.steps)
    made = sum(i.nbytes for s in p.steps for i in s.target_infos)
    click.echo(f"{printable(source)} -> {printable(str(target.path))}")
    beside = sum(a.tied_to is None for a in p.aside)
    kept = f" + {beside} kept in the label" if beside else ""
    sizes = size(total) if made == total else f"{size(total)} -> {size(made)}"
    counts = f"{len(p.steps)} tensors{kept}, {sizes}"
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


def converted_data(prepared: Prepared, certificate: Certificate) -> dict[str, Any]:
    """The same for machines."""
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
        "training": {k: v for k, v in certificate.training.items() if k != "sha256"},
        "verified": certificate.verified,
        "notices": [*prepared.notices, *certificate.notices[len(prepared.plan.notices) :]],
    }


def plan(prepared: Prepared) -> None:
    """Every step, and what it all needs."""
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
    table(("source", "target", "op", "dtype", "shape"), rows)
    kept = [a.source for a in p.aside if a.tied_to is None]
    click.echo()
    if kept:
        click.echo(f"kept in the label: {', '.join(map(printable, kept))}")
    click.echo(f"{_title(prepared)}, {len(p.steps)} tensors, {_kind(prepared)}")
    if told := line(summary(prepared.training)):
        click.echo(f"{printable(told)} -> {_beside(target)}")
    click.echo(f"target {printable(str(target.path))}: not written (--dry-run)")
    reads = sum(s.nbytes for s in p.steps)
    click.echo(
        f"reads {size(reads)}, holds at most {size(prepared.memory)} of tensors at a time, "
        f"needs {size(prepared.disk)} of disk"
    )


def plan_data(prepared: Prepared) -> dict[str, Any]:
    """The plan for machines."""
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
    p = prepared.plan
    return title(p.model, p.config, p.unknown)


def _kind(prepared: Prepared) -> str:
    tree = prepared.plan.target_tree
    return prepared.target.to + ("" if tree == "torch" else f", {tree} tree")


def _beside(target: Target) -> str:
    """The name of the optimizer.safetensors that belongs to the target."""
    return printable(Path(target.beside(filenames.OPTIMIZER)).name)


def _is_cast(step: Any) -> bool:
    return bool(step.source_infos[0].dtype != step.target_infos[0].dtype)
