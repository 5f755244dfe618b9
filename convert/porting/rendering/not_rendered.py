"""What stops a rendering."""

from __future__ import annotations

from zoo.containers.errors import UsageError


class NotRendered(UsageError):
    """What cannot be written as source."""

    def __init__(self, why: str) -> None:
        super().__init__(f"this module cannot be written as source: {why}", "use convert.to_flax")


class Again(Exception):
    """A class needs an argument that its calls so far do not give: write all of it again."""
