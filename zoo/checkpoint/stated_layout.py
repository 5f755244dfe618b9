"""A layout that travels with a checkpoint of no family: in its metadata, or in a file beside it.

    zoo.entries: [{"kind": "linear", "torch": {...}, ...}, ...]
    zoo.entries: {"sha256": "...", "file": "layout-0123456789abcdef.json"}     above 1 MB

It is input like any other: every number in it is bounded before anything is made of it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from zoo.checkpoint.budgets import check
from zoo.containers import filenames, json_text
from zoo.containers.errors import CorruptInput, UsageError
from zoo.layout import TREES, Layout

FORMAT = 1  # of a layout's own file
INLINE_MAX = 1 << 20  # bytes of JSON in the metadata itself
FILE_MAX = 64 << 20  # bytes of JSON at all
_ADVICE = "copy the checkpoint again, with the files beside it, or give the layout yourself"


def identity(layout: Layout) -> str:
    """What a certificate calls a layout of no family: "entries/sha256:..." of its JSON."""
    return f"entries/sha256:{_sha256(_text(layout))}"


def stated(layout: Layout) -> tuple[Any, dict[str, str]]:
    """What the metadata says of a layout; and name -> text of the file beside it, if any."""
    text = _text(layout)
    if len(text) <= INLINE_MAX:
        return layout.to_json(), {}
    digest = _sha256(text)
    name = filenames.layout_file(digest)
    return {"sha256": digest, "file": name}, {name: text}


def read(value: Any, source: str, beside: Path) -> Layout:
    """The layout that `stated` wrote. `beside` is the checkpoint, or a file in it.

    Raises CorruptInput for a file that is missing or has another hash, and for what is not a
    layout, is too large, or contradicts itself.
    """
    if isinstance(value, dict):
        value = _named_file(value, source, beside if beside.is_dir() else beside.parent)
    return _layout(value, f"{source} states a layout that is not one", _ADVICE)


def read_data(data: Any, source: str) -> Layout:
    """The layout in JSON data: a list of entries, or {"format": 1, "entries": [...], ...}, where
    whatever else it says is passed over. `source` is what errors call it.

    Raises CorruptInput for what is not a layout, is too large, or contradicts itself; UsageError
    for a later format.
    """
    problem, advice = f"{source} is not a layout", "docs/layout.md says what one is"
    try:
        value = json.loads(json.dumps(data))  # tuples are lists there
    except (TypeError, ValueError, RecursionError) as e:
        raise CorruptInput(f"{problem}: {e}", advice) from None
    if isinstance(value, dict):
        if type(value.get("format")) is not int or "entries" not in value:
            raise CorruptInput(f'{problem}: it has no "format" and "entries"', advice)
        if value["format"] > FORMAT:
            raise UsageError(
                f"{source} has format {value['format']}, this version knows {FORMAT}",
                "upgrade zooconvert",
            )
        value = value["entries"]
    return _layout(value, problem, advice)


def read_file(path: Path) -> Layout:
    """The layout in a file of its own; raises what `read_data` raises."""
    try:
        return read_data(json_text.parse(_bytes(path, str(path))), str(path))
    except ValueError as e:
        raise CorruptInput(
            f"{path} is not JSON: {e}", "docs/layout.md says what a layout is"
        ) from None


def _layout(value: Any, problem: str, advice: str) -> Layout:
    try:
        check(value)
        layout = Layout.from_json(value)
        for tree in TREES:
            names = [t.name for v in layout.view(tree) for t in v.tensors]
            if len(set(names)) != len(names):
                raise ValueError(f"two tensors of the {tree} tree have one name")
        return layout
    except (ValueError, TypeError, KeyError, IndexError, ArithmeticError, AttributeError) as e:
        why = f"{type(e).__name__} {e}" if isinstance(e, KeyError) else str(e)
        raise CorruptInput(f"{problem}: {why}", advice) from None


def _named_file(told: dict[str, Any], source: str, folder: Path) -> Any:
    name, digest = told.get("file"), told.get("sha256")
    if not (isinstance(name, str) and isinstance(digest, str) and filenames.is_layout(name)):
        raise CorruptInput(f"{source} names no layout-....json and its sha256", _ADVICE)
    path = folder / name
    data = _bytes(path, f"{path}, which {source} names,")
    if hashlib.sha256(data).hexdigest() != digest:
        raise CorruptInput(f"{path} is not the layout that {source} names: another hash", _ADVICE)
    try:
        return json_text.parse(data)
    except ValueError as e:
        raise CorruptInput(f"{path} is not JSON: {e}", _ADVICE) from None


def _bytes(path: Path, what: str) -> bytes:
    try:
        if path.stat().st_size > FILE_MAX:
            raise CorruptInput(f"{path} has more than {FILE_MAX} bytes", _ADVICE)
        return path.read_bytes()
    except OSError as e:
        raise CorruptInput(f"{what} cannot be read: {e.strerror or e}", _ADVICE) from None


def _text(layout: Layout) -> str:
    return json.dumps(layout.to_json(), separators=(",", ":"))  # ASCII


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
