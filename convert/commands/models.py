"""`zooconvert models`."""

from __future__ import annotations

import click

from convert.commands.options import output_options


@click.command()
@click.argument("pattern", default="*")
@output_options
def models(pattern: str, as_json: bool, quiet: bool, debug: bool) -> None:
    """List the presets whose name or family contains PATTERN, or matches it as a shell pattern.

    \b
    Examples:
      zooconvert models
      zooconvert models bert
      zooconvert models 'resnet*' --json
    """
    from convert import display
    from convert.display import models as shown
    from zoo.containers.errors import UsageError
    from zoo.registry import get, names

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
