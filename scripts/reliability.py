"""docs/reliability.md: each of the scripts that measure writes its own section."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"


def section(title: str) -> str:
    """What a section says; nothing where there is none."""
    parts = re.split(r"^## (.*)\n", PAGE.read_text() if PAGE.is_file() else "", flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True)).get(title, "").strip()


def write_section(title: str, text: str) -> None:
    """Put a section in its place, or at the end."""
    old = PAGE.read_text() if PAGE.is_file() else "# Reliability\n"
    made = f"## {title}\n\n{text.strip()}\n"
    parts = re.split(r"^(?=## )", old, flags=re.M)
    kept = [p.rstrip() + "\n" for p in parts]
    at = [i for i, p in enumerate(kept) if p.startswith(f"## {title}\n")]
    kept[at[0] if at else len(kept) : (at[0] + 1) if at else len(kept)] = [made]
    PAGE.write_text("\n".join(kept))
