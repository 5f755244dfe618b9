"""`zooconvert inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from convert.cli import output
from convert.cli.layouts import layout_options, stated_layout
from convert.cli.options import output_options

if TYPE_CHECKING:
    from convert.inspection import Inspection


@click.command()
@click.argument("ckpt", type=click.Path())
@click.option("--all", "every", is_flag=True, help="List every tensor, however many.")
@layout_options
@output_options
def inspect(
    ckpt: str,
    every: bool,
    layout: str | None,
    torch: str | None,
    flax: str | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Show what is in a checkpoint: its model, and names, shapes, dtypes and sizes of its tensors.

    Reads no tensor and, without --torch, imports no framework.

    \b
    Examples:
      zooconvert inspect model.safetensors
      zooconvert inspect model.flax --json
    """
    from convert.inspection import inspect as look

    found = look(ckpt, layout=stated_layout(ckpt, layout, torch, flax, quiet))
    if as_json:
        output.json(found.to_dict())
    elif not quiet:
        _show(found, every)


def _show(found: Inspection, every: bool) -> None:
    """Model, totals, then a table of tensors."""
    from convert.inspection import brief
    from zoo.checkpoint.problems import dims
    from zoo.containers.errors import printable

    what = " or ".join(found.models) or f"unknown model ({found.why_not})"
    if found.unknown:
        what += f"; not told: {', '.join(found.unknown)}"
    click.echo(f"{printable(found.path)}: {printable(what)}")
    spelled = f", {found.tree} names" if found.tree else ""
    click.echo(
        f"{found.container}{spelled}, {len(found.tensors)} tensors, "
        f"{found.values:,} values, {output.size(found.nbytes)}"
    )
    for difference in found.differences:
        click.echo(f"  {difference}")
    for notice in found.notices:
        click.echo(f"note: {printable(notice)}", err=True)
    shown = list(found.tensors.items())
    if not every:
        shown = shown[: output.SHOWN]
    rows = [
        (
            n if every else n[:200],
            t.dtype,
            dims(t.shape),
            output.size(t.nbytes),
            f"= {found.ties[n]}" if n in found.ties else "",
        )
        for n, t in shown
    ]
    header = ("name", "dtype", "shape", "size", "tied")
    output.table(header if found.ties else header[:4], [r if found.ties else r[:4] for r in rows])
    if len(shown) < len(found.tensors):
        click.echo(f"... and {len(found.tensors) - len(shown)} more (--all lists them)")
    if found.training:
        _show_training(found.training)
    extras = {k: v for k, v in found.extras.items() if "param_groups" not in k.split(".")}
    for key, value in {**found.metadata, **extras}.items():
        text = printable(value if every and isinstance(value, str) else brief(value))
        cut = len(text) > 100 and not every
        click.echo(f"{printable(key[:200])}: {text[:100] + '...' if cut else text}")


def _show_training(told: Mapping[str, Any]) -> None:
    """What there is besides weights: a line, and a row for each group of parameters."""
    from convert.training_state.summary import line
    from zoo.containers.errors import printable

    if summed := line(told):
        click.echo(printable(summed))
    rows = [
        (
            o["name"] or o["rule"],
            str(group["parameters"]),
            ", ".join(
                f"{key} {value}"
                for key, value in group.items()
                if key != "parameters" and value is not None and value is not False
            ),
        )
        for o in told["optimizers"]
        for group in o["groups"]
    ]
    if rows:
        output.table(("optimizer", "parameters", "options"), rows)
