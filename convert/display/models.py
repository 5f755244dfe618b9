"""What `models` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convert.display import table
from zoo.registry import Found


def model_row(name: str, found: Found) -> dict[str, Any]:
    """What `models` says of one preset."""
    layout = found.model.layout_of(found.config)
    return {
        "name": name,
        "family": found.model.name,
        "parameters": layout.parameters,
        "tensors": len(layout.shapes("torch")),
        "summary": found.model.summary,
    }


def models(rows: Sequence[dict[str, Any]]) -> None:
    """A table of presets."""
    table(
        ("name", "family", "parameters", "tensors", "summary"),
        [
            (r["name"], r["family"], f"{r['parameters']:,}", str(r["tensors"]), r["summary"])
            for r in rows
        ],
    )
