"""The file that `--report` asks for."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from convert.compare.report import Report
from zoo.containers.base import fsync
from zoo.containers.errors import MissingExtra, UsageError

SUFFIXES = (".html", ".json")


def check_report(path: Path) -> None:
    """UsageError if no report can be written there, before any work is done; MissingExtra without
    what a page needs."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"the report {path} has no suffix that says what it is to be",
            "name it FILE.html (a page) or FILE.json (data)",
        )
    if path.is_dir():
        raise UsageError(f"the report {path} is a directory", "name a file")
    if not path.parent.is_dir():
        raise UsageError(f"the directory {path.parent} does not exist", "make it first")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise UsageError(f"{path} cannot be written to", "name another file")
    if path.suffix.lower() == ".html" and importlib.util.find_spec("jinja2") is None:
        raise MissingExtra("writing an HTML report", "report")


def write_report(report: Report, path: Path) -> None:
    """Write it whole: whoever reads the file meanwhile sees the old one."""
    if path.suffix.lower() == ".html":
        from convert.compare.html import render

        text = render(report)
    else:
        text = report.to_json() + "\n"
    write_text(path, text)


def write_match(path: Path, title: str, data: dict[str, Any]) -> None:
    """Write the document of a `MatchedLayout` or an `OpenMatch`, as a page or as it is."""
    if path.suffix.lower() == ".html":
        from convert.compare.html import render_match

        write_text(path, render_match(title, data))
    else:
        write_text(path, json.dumps(data, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    fsync(path.parent)
