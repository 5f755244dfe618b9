"""The options that say what the tensors are where no family does: --layout, --torch, --flax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from convert.cli.options import notices
from convert.cli.user_modules import users_code


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
    from zoo.containers.errors import UsageError

    if layout is not None:
        raise UsageError(
            "--layout says what --torch and --flax would say too", "give the one or the others"
        )
    with users_code() as load:
        if flax is not None:
            matched = match_tensors(ckpt if torch is None else load(torch), load(flax))
            notices(list(matched.notices), quiet)
            return matched
        made, told = derive_layout(load(torch, only_shapes=True))
    notices(told, quiet)
    return made
