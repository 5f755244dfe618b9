"""The options that say what the tensors are where no family does: --layout, --torch, --flax."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import click

from convert.cli.options import notices


def layout_options(f: Callable[..., Any]) -> Callable[..., Any]:
    f = click.option(
        "--flax",
        metavar="MODULE:NAME",
        help="With --torch, the Flax definition that the tensors are for: as --torch.",
    )(f)
    f = click.option(
        "--torch",
        metavar="MODULE:NAME",
        help="The torch module that the tensors are of: pkg.mod:NAME or path/to/file.py:NAME, an "
        "instance, or a class or function without arguments. Runs its code.",
    )(f)
    return click.option(
        "--layout",
        type=click.Path(),
        metavar="FILE",
        help="What the tensors are, as JSON; or a checkpoint that a layout came with.",
    )(f)


def stated_layout(layout: str | None, torch: str | None, flax: str | None, quiet: bool) -> Any:
    """What these options say: a Layout, the path of one, or None."""
    from convert.runtime.torch_layout import derive_layout
    from convert.runtime.user_code import load
    from zoo.containers.errors import MissingExtra, UsageError

    if torch is None and flax is None:
        return layout
    if layout is not None:
        raise UsageError(
            "--layout says what --torch and --flax would say too", "give the one or the others"
        )
    if torch is None:
        raise UsageError("--flax alone does not say what the tensors are in PyTorch", "add --torch")
    said: set[str] = set()

    def say(text: str) -> None:
        notices([text] if text not in said else [], quiet=False)
        said.add(text)

    # What the user's code prints is not our result.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            module = load(torch, 0, say, only_shapes=True)
            made, told = derive_layout(module)
        except ModuleNotFoundError as e:
            if e.name == "torch":
                raise MissingExtra("--torch", "torch") from None
            raise
    notices(told, quiet)
    return made
