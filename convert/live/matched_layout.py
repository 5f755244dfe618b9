"""What `convert.match` finds, for who needs a layout and has none."""

from __future__ import annotations

import importlib
from typing import Any

from zoo.containers.errors import UsageError
from zoo.layout import Layout


def matched_layout(torch_side: Any, flax_side: Any) -> tuple[Layout, list[str]]:
    """The layout of two sides (modules, or checkpoints), without running anything, and what to tell
    of it. Raises ZooError, listing it, where anything is open."""
    try:
        match = importlib.import_module("convert.matching.match")
    except ModuleNotFoundError:
        raise UsageError(
            "nothing says which tensor is which of the Flax definition's",
            "give a layout, such as convert.layout_of(torch_module)",
        ) from None
    found: Layout = match.match_tensors(torch_side, flax_side)
    return found, list(getattr(found, "notices", ()))
