"""Options that several commands share, and how notices are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


class Size(click.ParamType):
    """5GB, 500MB, 4096: powers of ten, as disks and hubs count."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        text = str(value).strip().upper().removesuffix("B")
        factor = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}.get(text[-1:], 1)
        try:
            size = int(float(text.rstrip("KMGT")) * factor)
        except (ValueError, OverflowError):
            size = 0
        if size <= 0:
            self.fail(f"{value!r} is not a size; write 5GB or 500MB", param, ctx)
        return size


def complete_model(ctx: Any, param: Any, incomplete: str) -> list[str]:
    from zoo.registry import families, names

    return [n for n in (*names(), *families()) if n.startswith(incomplete)]


def complete_dialect(ctx: Any, param: Any, incomplete: str) -> list[str]:
    from zoo.registry import families

    known = {name for model in families().values() for name in model.dialect_sides}
    return [n for n in sorted(known) if n.startswith(incomplete)]


def model_options(f: Callable[..., Any]) -> Callable[..., Any]:
    f = click.option(
        "--config",
        type=click.Path(),
        metavar="FILE|PRESET",
        help="What the tensors do not tell: a config.json, or a preset.",
    )(f)
    f = click.option(
        "--prefix",
        metavar="NAME",
        help="What stands before the model's names, where the file holds more than one.",
    )(f)
    return click.option(
        "--model",
        metavar="NAME",
        shell_complete=complete_model,
        help="A family or preset, where the checkpoint does not say.",
    )(f)


def output_options(f: Callable[..., Any]) -> Callable[..., Any]:
    f = click.option("--debug", is_flag=True, help="Show the traceback of an error.")(f)
    f = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")(f)
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(f)


def notices(notices: list[str], quiet: bool) -> None:
    from zoo.containers.errors import printable

    if not quiet:
        for notice in notices:
            click.echo(f"note: {printable(notice)}", err=True)


def paired(texts: tuple[str, ...], absent: bool = False) -> dict[str, str]:
    """What `--pair TORCH=FLAX` says, given any number of times; with `absent`, Flax's part may be
    empty."""
    from zoo.containers.errors import UsageError

    made = {text.partition("=")[0]: text.partition("=")[2] for text in texts}
    wrong = [t for t in texts if "=" not in t or t[0] == "=" or not (absent or t[-1] != "=")]
    if wrong:
        raise UsageError(f"--pair {wrong[0]} is not a pair", "write --pair torch.name=flax.path")
    return made
