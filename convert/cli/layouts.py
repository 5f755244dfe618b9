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
        help="The Flax module that the tensors are for, where it calls them otherwise: as --torch.",
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


def stated_layout(
    ckpt: str, layout: str | None, torch: str | None, flax: str | None, quiet: bool
) -> Any:
    """What these options say of the checkpoint: a Layout, the path of one, or None. `ckpt` is the
    torch side where only Flax's definition is given."""
    if torch is None and flax is None:
        return layout
    from convert.matching.match_tensors import match_tensors
    from convert.runtime.torch_layout import derive_layout
    from convert.runtime.user_code import load
    from zoo.containers.errors import MissingExtra, UsageError

    if layout is not None:
        raise UsageError(
            "--layout says what --torch and --flax would say too", "give the one or the others"
        )
    said: list[str] = []

    def say(text: str) -> None:
        notices([text] if text not in said else [], quiet=False)
        said.append(text)

    def module(target: str) -> Any:
        return load(target, 0, say, only_shapes=flax is None)

    try:
        with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints is not ours
            if flax is not None:
                side = ckpt if torch is None else module(torch)
                matched = match_tensors(side, module(flax))
                notices(list(matched.notices), quiet)
                return matched
            assert torch is not None
            made, told = derive_layout(module(torch))
    except ModuleNotFoundError as e:
        if e.name in ("torch", "flax", "jax"):
            raise MissingExtra(
                "importing a module", "torch" if e.name == "torch" else "flax"
            ) from e
        raise
    notices(told, quiet)
    return made
