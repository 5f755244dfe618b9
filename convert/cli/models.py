"""`zooconvert models`."""

from __future__ import annotations

import click

from convert.cli.options import output_options


@click.command()
@click.argument("pattern", default="*")
@click.option("--weights", is_flag=True, help="List pretrained weights, with their scores.")
@output_options
def models(pattern: str, weights: bool, as_json: bool, quiet: bool, debug: bool) -> None:
    """List the presets whose name or family contains PATTERN, or matches it as a shell pattern.

    With --weights those that are installed here: they are loaded by their name.

    \b
    Examples:
      zooconvert models
      zooconvert models bert
      zooconvert models 'resnet*' --json
      zooconvert models --weights
    """
    from convert.cli import output as display
    from convert.cli import show_models as shown
    from zoo.containers.errors import UsageError
    from zoo.registry import get, names

    if weights:
        _weights(pattern, as_json, quiet)
        return
    low = pattern.lower()
    every = [(name, get(name)) for name in names()]
    matching = names(pattern)
    found = [
        (n, f) for n, f in every if n in matching or low in n.lower() or low in f.model.name.lower()
    ]
    if not found:
        raise UsageError(f"no model matches {pattern!r}", "`zooconvert models` lists them all")
    if as_json:
        display.json([shown.model_row(name, f) for name, f in found])
    elif not quiet:
        shown.models([shown.model_row(name, f) for name, f in found])


def _weights(pattern: str, as_json: bool, quiet: bool) -> None:
    import fnmatch

    from convert.cli import output as display
    from convert.cli import show_models as shown
    from zoo import hub
    from zoo.containers.errors import UsageError

    low = pattern.lower()
    rows = [shown.weights_row(name, path) for name, path in sorted(hub.pretrained().items())]
    found = [
        row
        for row in rows
        if low in row["name"].lower()
        or low == row["family"]
        or fnmatch.fnmatchcase(row["name"], pattern)
    ]
    if not found:
        raise UsageError(
            f"no weights match {pattern!r}", "`zooconvert models --weights` lists them all"
        )
    if as_json:
        display.json(found)
    elif not quiet:
        shown.weights(found)
