"""Write the generated documents: docs/cli.md from the commands' own help, and the README's table of
models from docs/measured.json. With --check, say which are stale instead, and exit with 1."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import click

from convert.cli import cli
from zoo.registry import get, names

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- models: written by scripts/docs.py -->\n", "<!-- /models -->"


def cli_page() -> str:
    """Every command's help, as it prints it."""
    parts = [
        "# Command line\n\nWritten by `scripts/docs.py` from the commands' own help.\n",
        _help([]),
        *(_help([name]) for name in sorted(cli.commands)),
        _EXIT_CODES,
    ]
    return "\n".join(parts)


_EXIT_CODES = """\
## Exit codes

| code | meaning |
|---|---|
| 0 | done |
| 1 | the conversion failed: tensors do not fit, a file cannot be fetched, a bug |
| 2 | usage: an unknown model or option, no such file, an existing target |
| 3 | not equivalent: `verify` found a difference, or a result failed its verification |
| 4 | unsafe input refused: it would run code, or leave its directory |
| 5 | corrupt input: truncated, damaged, or no checkpoint at all |
| 6 | an extra is not installed; the message says which |
| 7 | no space on the disk |
| 130 | interrupted |

Errors go to stderr: a line that says what is wrong, a line that says what to do, and between them
every detail where many things are wrong at once. Results go to stdout; `--json` makes them JSON.
Progress bars are drawn on a terminal only, and `NO_COLOR` is respected. `HF_HUB_OFFLINE`, `HF_HOME`
and `HF_TOKEN` are huggingface_hub's own.
"""


def _help(path: list[str]) -> str:
    command: click.Command = cli
    for name in path:
        command = cli.commands[name]
    context = click.Context(
        command,
        info_name=" ".join(["zooconvert", *path]),
        help_option_names=["-h", "--help"],
        max_content_width=100,
        terminal_width=100,
    )
    title = " ".join(["zooconvert", *path])
    return f"## `{title}`\n\n```text\n{command.get_help(context)}\n```\n"


def model_table() -> str:
    """A row a preset: its size, and how far its twins are apart."""
    measured = json.loads((ROOT / "docs" / "measured.json").read_text())
    lines = [
        "| preset | family | parameters | outputs compared | float32 error | of rounding noise "
        "| float64 error |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name in names():
        found = get(name)
        count = found.model.layout_of(found.config).parameters
        row = f"| `{name}` | {found.model.name} | {count:,} |"
        if name in measured:
            m = measured[name]
            row += f" {m['outputs']} | {m['error']:.1e} | {m['ratio']:.2f} | {m['error64']:.1e} |"
        else:
            row += " not measured | | | |"
        lines.append(row)
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """Every generated file and its text."""
    readme = ROOT / "README.md"
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    text = pattern.sub(lambda _: BEGIN + "\n" + model_table() + "\n" + END, readme.read_text())
    return {readme: text, ROOT / "docs" / "cli.md": cli_page()}


def main() -> int:
    stale = [
        path for path, text in pages().items() if not path.is_file() or path.read_text() != text
    ]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale: run scripts/docs.py")
        return 1 if stale else 0
    for path in stale:
        path.write_text(pages()[path])
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
