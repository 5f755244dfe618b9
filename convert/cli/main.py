"""The command line: arguments in, `convert`'s functions called, results out.

Results go to stdout, everything else to stderr. Only click is imported before a command runs.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import NoReturn

import click

from convert.cli import interrupt
from convert.cli.check import check
from convert.cli.clean import clean
from convert.cli.conversion import flax2torch, respell, torch2flax
from convert.cli.export_onnx import export
from convert.cli.inspect import inspect
from convert.cli.lint import lint
from convert.cli.match import match
from convert.cli.models import models
from convert.cli.pack import pack
from convert.cli.port import port
from convert.cli.verify import verify

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=_CONTEXT)
@click.version_option(package_name="zooconvert", message="%(prog)s %(version)s")
def cli() -> None:
    """Move checkpoints between PyTorch and Flax, and prove that nothing changed."""


for command in (
    torch2flax, flax2torch, respell, export, port, verify, check, match, inspect, lint, models,
    pack, clean,
):  # fmt: skip
    cli.add_command(command)


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


def main() -> NoReturn:
    """The console script. Every way out is an exit code of DESIGN: 0, 1, 2, 3, 4, 5, 6, 7, 130."""
    if sys.platform == "win32":
        _fail("zooconvert does not run on Windows", "use Linux, or the Linux of Windows (WSL)", 2)
    with interrupt.watched(sys.argv[1:]):
        _run()


def _run() -> NoReturn:
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
            import traceback

            traceback.print_exc()
        _report(e)


def _report(e: Exception) -> NoReturn:
    from zoo.containers.errors import ZooError, from_os

    if isinstance(e, ZooError):
        _fail(e.problem, e.advice, e.exit_code, e.details)
    if isinstance(e, MemoryError):
        _fail("there is not enough memory", "close something, or use a larger machine", 1)
    if isinstance(e, OSError):
        told = from_os(e, str(e.filename or "input"))
        _fail(told.problem, told.advice, told.exit_code if told.exit_code > 1 else 2)
    _fail(
        f"{type(e).__name__}: {e}", "this is a bug: please report it with the output of --debug", 1
    )


def _fail(
    problem: str, advice: str | None, code: int, details: list[str] | None = None
) -> NoReturn:
    interrupt.give_way()
    from zoo.containers.errors import printable

    color = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    paint = functools.partial(click.style, bold=True) if color else lambda text, **_: text
    click.echo(f"{paint('error:', fg='red')} {printable(problem)}", err=True, color=color)
    for detail in details or ():
        click.echo(f"  {detail}", err=True)
    if advice:
        click.echo(f"{paint('try:', fg='green')} {printable(advice)}", err=True, color=color)
    sys.exit(code)
