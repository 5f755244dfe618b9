"""A report as one HTML page that needs nothing but itself: no network, and no script to be read."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from string import Template

from convert.compare.html import page
from convert.compare.html.plots import MARKS
from convert.compare.html.text import code, text
from convert.compare.report import Report

_SECTIONS = (
    ("outputs", "Outputs", page.outputs),
    ("gradients", "Gradients", page.gradients),
    ("training", "Training", page.training),
    ("tensors", "Tensors", page.differences),
    ("notices", "Notices", page.notices),
    ("certificate", "Certificate", page.certificate),
    ("run", "What was run", page.run),
)


def render(report: Report) -> str:
    """The page as text, to be written as UTF-8. Every name in it is escaped.

    It holds the report's JSON too, in the element `#report`.
    """
    made = [(key, title, section(report)) for key, title, section in _SECTIONS]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, body in made if body)
    same = report.verdict == "same"
    script = _part("script.js")
    return Template(_part("template.html")).substitute(
        title=f"{report.verdict.capitalize()}: {text(report.a)} and {text(report.b)}",
        style=_part("style.css"),
        script=script,
        # Only this script runs, whatever else might get into the page.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        kind="same" if same else "different",
        verdict="Same" if same else "Different",
        sign=_SAME if same else _DIFFERENT,
        a=code(report.a),
        b=code(report.b),
        summary=page.summary(report),
        divergence=page.divergence(report.first_divergence),
        levels=page.levels(report),
        links=links,
        sections="".join(body for _, _, body in made),
        marks=MARKS,
        data=page.data(report),
    )


def _part(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


# A disc with a tick and a lozenge with a cross: told apart without colour.
_SAME = '<svg class="sign" viewBox="0 0 40 40" aria-hidden="true"><circle cx="20" cy="20" r="18"/>\
<path d="M11.5 20.5l6 6 11-12.5"/></svg>'
_DIFFERENT = '<svg class="sign" viewBox="0 0 40 40" aria-hidden="true">\
<path class="ground" d="M20 1L39 20 20 39 1 20z"/><path d="M14 14l12 12M26 14L14 26"/></svg>'
