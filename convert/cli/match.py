"""`zooconvert match`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from convert.cli import output
from convert.cli.options import notices, output_options, paired
from convert.cli.user_modules import users_code

_WIDE = 60  # characters of a name in a table


@click.command()
@click.argument("torch_side", metavar="TORCH", type=click.Path())
@click.argument("flax_side", metavar="FLAX", type=click.Path())
@click.option("-o", "--output", "out", type=click.Path(), help="Write the layout: FILE.json.")
@click.option(
    "--inputs", "inputs_file", metavar="FILE|auto",
    help="Of two modules: run both on a .npz or .npy file, or on drawn inputs.",
)  # fmt: skip
@click.option("--flax-inputs", metavar="FILE", help="Where the Flax module takes others.")
@click.option(
    "--pair", "pairs", multiple=True, metavar="TORCH=FLAX",
    help="Settle a tensor; TORCH= for one that Flax does not have.",
)  # fmt: skip
@click.option(
    "--rotary", type=click.Choice(["same", "pairs"]),
    help="How Flax keeps rotated features, where nothing else tells.",
)  # fmt: skip
@click.option("--report", "report_file", type=click.Path(), help="Write a page: FILE.html.")
@output_options
def match(
    torch_side: str,
    flax_side: str,
    out: str | None,
    inputs_file: str | None,
    flax_inputs: str | None,
    pairs: tuple[str, ...],
    rotary: str | None,
    report_file: str | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Find which tensor of a PyTorch model is which of a Flax model, of anybody's.

    TORCH and FLAX are checkpoints of any container, or modules: pkg.mod:NAME or
    path/to/file.py:NAME. Where both hold the same weights, values decide, bit for bit; else names
    and shapes, and, with --inputs, the order of execution and the outputs. Nothing is guessed: what
    stays open is an error that lists it. The layout goes to `--layout FILE` of other commands.

    \b
    Examples:
      zooconvert match model.safetensors flax_model.msgpack -o layout.json
      zooconvert match nets.py:TorchNet nets.py:FlaxNet --inputs x.npz -o layout.json
      zooconvert match llama/ maxtext.msgpack --rotary pairs -o layout.json
    """
    from convert.compare.report_file import check_report, write_match
    from convert.matching.evidence import OpenMatch

    if report_file is not None:
        check_report(Path(report_file))
    target = _checked(out)
    title = f"{torch_side} and {flax_side}"
    try:
        layout = _found(torch_side, flax_side, inputs_file, flax_inputs, pairs, rotary)
    except OpenMatch as e:
        if report_file is not None:
            write_match(Path(report_file), title, e.document())
        if as_json:
            output.json(e.document())
        elif not quiet:
            _show(e.document())
        raise
    data = layout.document()
    notices(list(layout.notices), quiet)
    if target is not None:
        layout.save(target)
    if report_file is not None:
        write_match(Path(report_file), title, data)
    if as_json:
        output.json(data)
    elif not quiet:
        _show(data)
        _summary(data, out)


def _checked(out: str | None) -> Path | None:
    from zoo.containers.errors import UsageError

    if out is None:
        return None
    path = Path(out)
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"{out} cannot be written", "name a file in a directory that exists")
    return path


def _found(
    torch_side: str,
    flax_side: str,
    inputs_file: str | None,
    flax_inputs: str | None,
    pairs: tuple[str, ...],
    rotary: str | None,
) -> Any:
    from convert.api import match as run
    from convert.runtime.inputs import read_inputs
    from convert.runtime.user_code import is_target

    given: dict[str, Any] = {"pairs": paired(pairs, absent=True), "rotary": rotary}
    if inputs_file is not None:
        given["inputs"] = inputs_file if inputs_file == "auto" else read_inputs(Path(inputs_file))
    if flax_inputs is not None:
        given["flax_inputs"] = read_inputs(Path(flax_inputs))
    with users_code() as load:
        sides = [load(text) if is_target(text) else text for text in (torch_side, flax_side)]
        return run(*sides, **given)


def _show(data: dict[str, Any]) -> None:
    """A line for every group of tensors."""
    rows = [
        (
            _names(e["torch"]),
            _names(e["flax"]),
            str(e["entries"]),
            e["ops"],
            e["by"] + (f", axes by {e['axes']}" if e["axes"] not in ("", e["by"]) else ""),
            "" if e["margin"] is None else f"{e['margin']:.1f}",
            e["checked"] or "not checked",
        )
        for e in data["evidence"]
    ]
    if rows:
        output.table(("torch", "flax", "tensors", "op", "by", "margin", "checked"), rows)


def _names(names: Any) -> str:
    text = " + ".join(names)
    return text if len(text) <= 2 * _WIDE else f"{text[: 2 * _WIDE - 1]}…"


def _summary(data: dict[str, Any], out: str | None) -> None:
    from convert.matching.evidence import tally
    from zoo.containers.errors import printable

    by = tally(data["evidence"])
    told = ", ".join(f"{n} by {word}" for word, n in by)
    click.echo(f"{sum(n for _, n in by)} tensors paired: {told}")
    for line in data["tried"]:
        click.echo(f"  {printable(line)}")
    if out is not None:
        click.echo(f"layout: {printable(out)}")
    else:
        click.echo("-o FILE.json writes the layout, for --layout of torch2flax and others")
