"""Modules that a command line names, loaded and run: what their code prints is not our result."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click


@contextlib.contextmanager
def users_code() -> Iterator[Callable[..., Any]]:
    """Gives `convert.runtime.user_code.load` without its `say`: notes go to stderr, each once, and
    so does what is printed within. MissingExtra for a framework that is not installed."""
    from convert.runtime.user_code import load
    from zoo.containers.errors import MissingExtra

    said: set[str] = set()

    def say(text: str) -> None:
        if text not in said:
            click.echo(f"note: {text}", err=True)
        said.add(text)

    def loaded(target: str, seed: int = 0, only_shapes: bool = False, make: bool = True) -> Any:
        return load(target, seed, say, only_shapes, make)

    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield loaded
    except ModuleNotFoundError as e:
        if e.name in ("torch", "flax", "jax"):
            extra = "torch" if e.name == "torch" else "flax"
            raise MissingExtra("importing a module", extra) from e
        raise
