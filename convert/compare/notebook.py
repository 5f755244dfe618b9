"""A report as a notebook shows it."""

from __future__ import annotations

import html
import importlib.util

from convert.compare.report import Report
from convert.compare.summary_text import text


def cell(report: Report) -> str:
    """One HTML element; without the `report` extra the summary's text."""
    if importlib.util.find_spec("jinja2") is None:
        return f"<pre>{html.escape(text(report))}</pre>"
    from convert.compare.html import render_cell

    return render_cell(report)
