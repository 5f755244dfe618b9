"""Numbers and words that a torch module has as attributes."""

from __future__ import annotations

from typing import Any

from convert.porting.rendering.variants import ABSENT


def plain_attribute(module: Any, name: str) -> Any:
    """A number, text or None that a module or its config has; ABSENT if neither has."""
    for held in (module, *vars(module).values()):
        found = getattr(held, name, ABSENT)
        if found is None or isinstance(found, bool | int | float | str):
            return found
    return ABSENT
