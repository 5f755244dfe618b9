"""What other packages add by an entry point: models, weights, kinds of layers.

A broken plugin is a warning that says what to edit, and the others are still there.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any

_TOLD = "see docs/adding-a-model.md"
# Modules that plugins were told to import once, and what to do now that they are gone.
_GONE = {
    "zoo.nn.taps": "delete `taps` from its models",
    "zoo.ops": "import zoo.layout.ops",
}


def load(group: str) -> Iterator[tuple[EntryPoint, Any]]:
    """The entry points of a group, each with the object that it names."""
    for point in entry_points(group=group):
        try:
            yield point, point.load()
        except Exception as e:  # whatever a stranger's module raises, the others are still there
            refuse(point, edit(e) or f"is broken: {e}")


def refuse(point: EntryPoint, why: str) -> None:
    """Warn that a plugin is not used: "the plugin NAME (its module) WHY"."""
    warnings.warn(f"the plugin {point.name} ({point.value}) {why}", stacklevel=3)


def warn_of_taps(built: Any, where: str) -> None:
    """Warn where the forward pass of a twin still takes `taps`."""
    for name in ("forward", "__call__"):
        method = vars(built).get(name) if isinstance(built, type) else None
        if method is not None and "taps" in inspect.signature(method).parameters:
            told = "still takes `taps`, which nothing gives it any more: delete it"
            warnings.warn(f"{where} {told}; {_TOLD}", stacklevel=3)


def edit(error: Exception) -> str:
    """The edit that a plugin written for an earlier version needs: "imports X, which is gone: ...";
    "" where the error is none of that."""
    if isinstance(error, ImportError) and str(error.name or "").partition(".")[0] == "zoo":
        missing = re.search(r"cannot import name '(\w+)'", str(error))
        what = f"{missing[1]} from {error.name}" if missing else str(error.name)
        advice = _GONE.get(str(error.name), "import what today's zoo has")
        return f"imports {what}, which is gone: {advice}; {_TOLD}"
    field = re.search(r"Model\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if isinstance(error, TypeError) and field:
        return f"gives Model a field {field[1]}, which is gone: delete it; {_TOLD}"
    lacks = re.search(r"Model\.__init__\(\) missing .*: (.+)", str(error))
    if isinstance(error, TypeError) and lacks:
        return f"lacks fields that a Model has today: add {lacks[1]}; {_TOLD}"
    return ""
