"""docs/onnx.md: the text of onnx_page.md, and tables of docs/onnx.json, onnx_foreign.json and
onnx_minilm.json. `scripts/docs.py` writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_table

DOCS = Path(__file__).parents[1] / "docs"
TEXT = Path(__file__).with_suffix(".md")


def page() -> str:
    """The text of docs/onnx.md."""
    foreign = _read("onnx_foreign.json")
    counts = [r["outcome"] for r in foreign.values()]
    lm = _read("onnx_minilm.json")
    presets = _read("onnx.json")
    absent = [n for n, s in onnx_table.sizes().items() if s <= onnx_table.LARGEST]
    absent = [n for n in absent if n not in presets]
    return TEXT.read_text().format(
        foreign=_foreign(foreign),
        total=len(counts),
        recovered=counts.count("recovered"),
        refused=counts.count("refused"),
        wrong=counts.count("WRONG"),
        presets=_presets(presets),
        missing=f"Not run yet: {', '.join(absent)}.\n\n" if absent else "",
        gap=max(lm["similarities"].values()),
        same=lm["returned"][0],
        of=lm["returned"][1],
    )


def _foreign(results: dict[str, Any]) -> str:
    lines = ["| file | tensors | |", "|---|---:|---|"]
    for name, r in results.items():
        if r["outcome"] == "recovered":
            lines.append(f"| {name} | {r['tensors']} | bit for bit |")
        else:
            lines.append(f"| {name} | | {r['outcome']}: {'; '.join(r['reason'])} |")
    return "\n".join(lines)


def _presets(results: dict[str, Any]) -> str:
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
    return json.loads((DOCS / name).read_text())  # type: ignore[no-any-return]
