"""A report as one HTML page that needs nothing but itself: no network, and no script to be read."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from convert.compare.html import page, plots
from convert.compare.html.text import number, plain, some, times
from convert.compare.report import Report
from convert.judge.noise import EXACT, MARGIN
from convert.matching.evidence import tally
from zoo.containers.errors import printable

_WORST = 5  # rows that a notebook's cell shows


def render(report: Report) -> str:
    """The page as text, to be written as UTF-8. Every name in it is escaped.

    It holds the report's JSON too, in the element `#report`. Needs the `report` extra.
    """
    script = _part("script.js")
    # Only this script runs, whatever else might get into the page.
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _made("page.html", report, _part("style.css"), script=script, script_hash=hashed)


def render_cell(report: Report) -> str:
    """What a notebook shows: the verdict, where the two part, the levels, and the rows that differ
    most; one element, without a script. Needs the `report` extra."""
    bad = [(s, r) for s in page.sections(report) for r in s.bad]
    worst = sorted(bad, key=lambda pair: -pair[1].ratio)[:_WORST]
    return _made("cell.html", report, _part("cell.css"), worst=worst, differing=len(bad))


def render_match(title: str, data: Mapping[str, Any]) -> str:
    """The page of a match, of the document of a `MatchedLayout` or an `OpenMatch`: what was paired
    by what, and what is open; without a script. Needs the `report` extra."""
    by = tally(data["evidence"])
    template = _environment().get_template("match.html")
    held = {"open": (), "notices": (), **data}
    made: str = template.render(
        title=title, data=held, paired=sum(n for _, n in by), by=by, style=_part("style.css")
    )
    return made


def _made(template: str, report: Report, style: str, **values: Any) -> str:
    sections = page.sections(report)
    made: str = (
        _environment()
        .get_template(template)
        .render(
            report=report,
            sections=sections,
            reason=page.reason(report, sections),
            style=style,
            **values,
        )
    )
    return made


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader(__package__, ""),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    filters = (number, plain, printable, some, times, plots.kind, page.telling)
    made.filters |= {f.__name__: f for f in filters}
    made.globals |= {"plots": plots, "STATISTICS": page.STATISTICS}
    made.globals |= {"EXACT": EXACT, "MARGIN": MARGIN}
    return made


def _part(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _shown(value: Any) -> Any:
    """What could move a cursor or reorder text is written out; the templates' own HTML stays."""
    return value if hasattr(value, "__html__") else printable(str(value))
