"""The report of a match: a page, or its data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from convert.compare.report_file import write_text


def write_page(path: Path, title: str, data: dict[str, Any]) -> None:
    """Write the document of a `MatchedLayout` or an `OpenMatch` as FILE.html or FILE.json."""
    if path.suffix.lower() == ".html":
        from convert.compare.html import render_match

        write_text(path, render_match(title, data))
    else:
        write_text(path, json.dumps(data, indent=1) + "\n")
