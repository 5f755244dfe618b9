"""Write the generated documents: docs/cli.md from the commands' own help, docs/weights.md from the
cards beside the weights, docs/onnx.md from its measurements, and the README's table of models from
docs/measured.json. With --check, say which are stale instead, and exit with 1."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import click

from convert.cli.main import cli
from zoo.card import read_card
from zoo.registry import get, names

ROOT = Path(__file__).parents[1]
LARGEST = 150_000_000  # parameters of a preset that scripts/onnx_table.py exports
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
| 3 | not equivalent: `verify` or `lint` found a difference, or a result failed its verification |
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


def weights_page() -> str:
    """A row for each set of pretrained weights, from its card, and how it is made again."""
    rows, commands = [], []
    bundled = sorted((ROOT / "zoo" / "models").glob("*/weights/*.safetensors"))
    for path in sorted(bundled, key=lambda p: p.name):
        card = read_card(path)
        assert card is not None, f"{path} has no card"
        assert card.score is not None, f"the card of {path} has no score"
        s = card.score
        counted = f"{s.correct} of {s.n}" if s.correct is not None else f"n = {s.n}"
        rows.append(
            f"| `{card.name}` | {card.summary} | {s.metric} {s.value:.4g} | {s.low:.4g} to "
            f"{s.high:.4g} | {counted} | {path.stat().st_size / 1000:.0f} kB |"
        )
        commands.append(
            f"| `{card.name}` | `{card.command}` | {card.data} | {s.on} | `{card.sha256[:16]}` |"
        )
    total = sum(path.stat().st_size for path in bundled) / 1e6
    return _WEIGHTS.format(
        rows="\n".join(rows), commands="\n".join(commands), count=len(rows), total=total
    )


_WEIGHTS = """\
# Pretrained weights

Written by `scripts/docs.py` from the cards beside the weights. {count} sets of weights,
{total:.1f} MB together, come with the package: `zoo.load("mnist_cnn.digits", framework="flax")`, or
`framework="torch"`. `zooconvert models --weights` lists them, and those of installed packages.
Your own go into a package with `zooconvert pack`.

Each was trained once, with the seed that its command names; the score is that of these weights on
held-out data, with a 95% confidence interval over those data. Another seed gives another score,
in reinforcement learning most of all; where settings were chosen by the score, the second table
says so. `tests/test_weights.py` finds every score again in both frameworks.

| name | task | score | 95% interval | cases | size |
|---|---|---|---|---|---:|
{rows}

The weights are under the project's licence, Apache-2.0.

| name | trained by | data | scored on | SHA-256 |
|---|---|---|---|---|
{commands}
"""


def onnx_page() -> str:
    """The text of onnx_page.md, and the tables that scripts/onnx_*.py measured."""
    foreign = _read("onnx_foreign.json")
    counts = [r["outcome"] for r in foreign.values()]
    lm = _read("onnx_minilm.json")
    presets = _read("onnx.json")
    found = {n: get(n) for n in names()}
    small = [n for n, f in found.items() if f.model.layout_of(f.config).parameters <= LARGEST]
    absent = [n for n in small if n not in presets]
    return (
        (ROOT / "scripts" / "onnx_page.md")
        .read_text()
        .format(
            foreign=_foreign_files(foreign),
            total=len(counts),
            recovered=counts.count("recovered"),
            refused=counts.count("refused"),
            wrong=counts.count("WRONG"),
            presets=_exported(presets),
            missing=f"Not run yet: {', '.join(absent)}.\n\n" if absent else "",
            gap=max(lm["similarities"].values()),
            same=lm["returned"][0],
            of=lm["returned"][1],
        )
    )


def _foreign_files(results: dict[str, Any]) -> str:
    lines = ["| file | tensors | |", "|---|---:|---|"]
    for name, r in results.items():
        if r["outcome"] == "recovered":
            lines.append(f"| {name} | {r['tensors']} | bit for bit |")
        else:
            lines.append(f"| {name} | | {r['outcome']}: {'; '.join(r['reason'])} |")
    return "\n".join(lines)


def _exported(results: dict[str, Any]) -> str:
    lines = [
        "| preset | values | free sizes | noise | beside | weights back | export | |",
        "|---|---:|---|---:|---|---|---:|---|",
    ]
    for name, r in results.items():
        if isinstance(r.get("error"), str):
            lines.append(f"| `{name}` | {r['values']:,} | | | | | | fails: {r['error']} |")
            continue
        every = (n for dims in r["sizes"].values() for n in dims if isinstance(n, str))
        free = ", ".join(dict.fromkeys(every)) or "none"
        told = [n for n in r["notices"] if n.startswith(("fixed:", "all ", "without", "no output"))]
        lines.append(
            f"| `{name}` | {r['values']:,} | {free} | {r['ratio']:.2f} | {r['side']} "
            f"| {'every bit' if r['back'] else 'NO'} | {r['seconds']:.0f} s | {_short(told)} |"
        )
    return "\n".join(lines)


def _short(notices: list[str]) -> str:
    return "; ".join(n if len(n) < 160 else f"{n[:160]}..." for n in notices).replace("|", "/")


def _read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "docs" / name).read_text())  # type: ignore[no-any-return]


def pages() -> dict[Path, str]:
    """Every generated file and its text."""
    readme = ROOT / "README.md"
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    text = pattern.sub(lambda _: BEGIN + "\n" + model_table() + "\n" + END, readme.read_text())
    return {
        readme: text,
        ROOT / "docs" / "cli.md": cli_page(),
        ROOT / "docs" / "weights.md": weights_page(),
        ROOT / "docs" / "onnx.md": onnx_page(),
    }


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
