"""The command line: arguments in, `convert`'s functions called, results out.

Results go to stdout, everything else to stderr. Only click is imported before a command runs.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from convert.api import Prepared

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Size(click.ParamType):
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
            self.fail(f"{value!r} is no size; write 5GB or 500MB", param, ctx)
        return size


def _complete_model(ctx: Any, param: Any, incomplete: str) -> list[str]:
    from zoo.registry import families, names

    return [n for n in (*names(), *families()) if n.startswith(incomplete)]


def _model_options(f: Callable[..., Any]) -> Callable[..., Any]:
    f = click.option(
        "--config",
        type=click.Path(),
        metavar="FILE|PRESET",
        help="What the tensors do not tell: a config.json, or a preset.",
    )(f)
    return click.option(
        "--model",
        metavar="NAME",
        shell_complete=_complete_model,
        help="A family or preset, where the checkpoint does not say.",
    )(f)


def _output_options(f: Callable[..., Any]) -> Callable[..., Any]:
    f = click.option("--debug", is_flag=True, help="Show the traceback of an error.")(f)
    f = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")(f)
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(f)


def _convert_options(f: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option(
            "--dtype", metavar="DTYPE", help="Cast floating-point tensors (bfloat16, ...)."
        ),
        click.option(
            "--max-shard-size", type=_Size(), help="Write safetensors in shards no larger: 5GB."
        ),
        click.option("--dry-run", is_flag=True, help="Print what would be done, and stop."),
        click.option("--force", is_flag=True, help="Replace an existing checkpoint."),
        click.option("--no-verify", is_flag=True, help="Do not re-read and compare the result."),
        click.option(
            "--level",
            type=click.Choice(["bits", "outputs"]),
            default="bits",
            show_default=True,
            help="How far to verify the result.",
        ),
    ]
    for option in reversed(options):
        f = option(f)
    return f


@click.group(context_settings=_CONTEXT)
@click.version_option(package_name="zooconvert", message="%(prog)s %(version)s")
def cli() -> None:
    """Move checkpoints between PyTorch and Flax, and prove that nothing changed."""


@cli.command()
@click.argument("ckpt", type=click.Path())
@click.argument("dst", required=False, type=click.Path())
@_model_options
@click.option(
    "--to", type=click.Choice(["orbax", "msgpack", "safetensors"]), help="[default: orbax]"
)
@click.option(
    "--tree",
    type=click.Choice(["nnx", "linen", "linen-compact"]),
    default="nnx",
    show_default=True,
    help="How the Flax checkpoint is nested and named.",
)
@_convert_options
@_output_options
def torch2flax(ckpt: str, dst: str | None, **options: Any) -> None:
    """Convert a PyTorch checkpoint to Flax.

    CKPT is a .pt, .pth, .bin or .safetensors file, an index of shards, a directory with one of
    these, pkg:MODULE/PATH or hf://ORG/REPO. DST defaults to STEM.flax beside it.

    \b
    Examples:
      zooconvert torch2flax model.safetensors
      zooconvert torch2flax pytorch_model.bin model.msgpack --level outputs
      zooconvert torch2flax hf://google-bert/bert-base-uncased bert.flax --dtype bfloat16
    """
    _convert(ckpt, dst, "flax", **options)


@cli.command()
@click.argument("ckpt", type=click.Path())
@click.argument("dst", required=False, type=click.Path())
@_model_options
@click.option("--to", type=click.Choice(["safetensors", "pt"]), help="[default: safetensors]")
@_convert_options
@_output_options
def flax2torch(ckpt: str, dst: str | None, **options: Any) -> None:
    """Convert a Flax checkpoint to PyTorch.

    CKPT is an Orbax directory, a msgpack or safetensors file, a directory with one of these,
    pkg:MODULE/PATH or hf://ORG/REPO. DST defaults to STEM.safetensors beside it.

    \b
    Examples:
      zooconvert flax2torch model.flax
      zooconvert flax2torch flax_model.msgpack out/ --max-shard-size 5GB
      zooconvert flax2torch model.flax model.pt
    """
    _convert(ckpt, dst, "torch", **options)


@cli.command()
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option(
    "--level",
    type=click.Choice(["bits", "outputs"]),
    default="bits",
    show_default=True,
    help="Compare the weights only, or run both models too.",
)
@_model_options
@_output_options
def verify(a: str, b: str, level: str, as_json: bool, quiet: bool, debug: bool, **of: Any) -> None:
    """Say whether checkpoints A and B are the same model. Exit code 3 if they are not.

    Either may be of either framework and of any container.

    \b
    Examples:
      zooconvert verify model.safetensors model.flax
      zooconvert verify model.safetensors model.flax --level outputs
    """
    from convert import display
    from convert.api import verify as run

    with display.progress(quiet) as progress:
        report = run(a, b, level, progress=progress, **of)  # type: ignore[arg-type]
    _notices(report.notices, quiet)
    if as_json:
        click.echo(report.to_json())
    elif not quiet:
        display.report(report)
    if report.verdict == "different":
        sys.exit(3)


@cli.command()
@click.argument("ckpt", type=click.Path())
@click.option("--all", "every", is_flag=True, help="List every tensor, however many.")
@_output_options
def inspect(ckpt: str, every: bool, as_json: bool, quiet: bool, debug: bool) -> None:
    """Show what is in a checkpoint: its model, and names, shapes, dtypes and sizes of its tensors.

    Reads no tensor and imports no framework.

    \b
    Examples:
      zooconvert inspect model.safetensors
      zooconvert inspect model.flax --json
    """
    from convert import display
    from convert.inspection import inspect as look

    found = look(ckpt)
    if as_json:
        display.json(found.to_dict())
    elif not quiet:
        display.inspection(found, every)


@cli.command()
@click.argument("pattern", default="*")
@_output_options
def models(pattern: str, as_json: bool, quiet: bool, debug: bool) -> None:
    """List the presets whose name or family contains PATTERN, or matches it as a shell pattern.

    \b
    Examples:
      zooconvert models
      zooconvert models bert
      zooconvert models 'resnet*' --json
    """
    from convert import display
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
        display.json([display.model_row(name, f) for name, f in found])
    elif not quiet:
        display.models([display.model_row(name, f) for name, f in found])


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell.

    \b
    Examples:
      eval "$(zooconvert completion bash)"    # in ~/.bashrc
    """
    from click.shell_completion import get_completion_class

    cls = get_completion_class(shell)
    assert cls is not None
    click.echo(cls(cli, {}, "zooconvert", "_ZOOCONVERT_COMPLETE").source())


def _convert(
    ckpt: str,
    dst: str | None,
    framework: str,
    *,
    as_json: bool,
    quiet: bool,
    debug: bool,
    dry_run: bool,
    no_verify: bool,
    level: str,
    force: bool,
    **options: Any,
) -> None:
    from convert import display
    from convert.api import convert as run
    from convert.api import plan

    if no_verify and level != "bits":
        raise click.UsageError("--no-verify and --level contradict each other")
    if level != "bits" and options["dtype"] is not None:
        raise click.UsageError("--level outputs compares with the source, which --dtype changes")
    if dry_run:
        prepared = plan(ckpt, dst, framework=framework, force=force, **options)
        _notices(prepared.notices, quiet)
        if as_json:
            display.json(display.plan_data(prepared))
        elif not quiet:
            display.plan(prepared)
        return
    planned: list[Prepared] = []

    def on_plan(prepared: Prepared) -> None:
        planned.append(prepared)
        _notices(prepared.notices, quiet)

    with display.progress(quiet) as progress:
        certificate = run(
            ckpt,
            dst,
            framework=framework,
            force=force,
            verify=not no_verify,
            level=level,  # type: ignore[arg-type]
            progress=progress,
            on_plan=on_plan,
            **options,
        )
    _notices([n for n in certificate.notices if n not in planned[0].plan.notices], quiet)
    if as_json:
        display.json(display.converted_data(planned[0], certificate))
    elif not quiet:
        display.converted(ckpt, planned[0], certificate)


def _notices(notices: list[str], quiet: bool) -> None:
    from zoo.containers.errors import printable

    if not quiet:
        for notice in notices:
            click.echo(f"note: {printable(notice)}", err=True)


def main() -> NoReturn:
    """The console script. Every way out is an exit code of DESIGN: 0, 1, 2, 3, 4, 5, 6, 7, 130."""
    signal.signal(signal.SIGTERM, _interrupt)
    debug = "--debug" in sys.argv
    try:
        code = cli.main(prog_name="zooconvert", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; nothing was left behind", None, 130)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as e:
        if debug:
            traceback.print_exc()
        _report(e)


def _report(e: Exception) -> NoReturn:
    import errno

    from zoo.containers.errors import ZooError

    if isinstance(e, ZooError):
        _fail(e.problem, e.advice, e.exit_code, e.details)
    if isinstance(e, MemoryError):
        _fail("there is not enough memory", "close something, or use a larger machine", 1)
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
        _fail(f"the disk is full: {e.filename or ''}", "make room and run it again", 7)
    if isinstance(e, OSError):
        _fail(
            f"{e.filename or 'input'}: {e.strerror or e}", "see that it exists and is readable", 2
        )
    _fail(
        f"{type(e).__name__}: {e}", "this is a bug: please report it with the output of --debug", 1
    )


def _fail(
    problem: str, advice: str | None, code: int, details: list[str] | None = None
) -> NoReturn:
    from zoo.containers.errors import printable

    color = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    paint = functools.partial(click.style, bold=True) if color else lambda text, **_: text
    click.echo(f"{paint('error:', fg='red')} {printable(problem)}", err=True, color=color)
    for detail in details or ():
        click.echo(f"  {detail}", err=True)
    if advice:
        click.echo(f"{paint('try:', fg='green')} {printable(advice)}", err=True, color=color)
    sys.exit(code)


def _interrupt(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt
