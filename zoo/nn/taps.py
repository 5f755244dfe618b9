"""Named intermediates. A model records them by the path of the module that made them."""

from __future__ import annotations

from typing import Any


class Taps:
    """A recorder that is handed down through the modules of a forward pass.

    `tap("dense", x)` records x under the current path and returns it; `tap.at("layer.0")` is the
    recorder for a submodule. Made with `on=False` it records nothing.
    """

    def __init__(self, on: bool, path: str = "", record: dict[str, Any] | None = None) -> None:
        self.on = on
        self.path = path
        self.record: dict[str, Any] = {} if record is None else record

    def __call__(self, name: str, value: Any) -> Any:
        if self.on:
            self.record[self.path + name] = value
        return value

    def at(self, name: str) -> Taps:
        """The recorder whose names start with `name.`."""
        return Taps(self.on, f"{self.path}{name}.", self.record) if self.on else self

    def result(self, output: Any) -> Any:
        """`output`, with the record beside it if there is one."""
        return (output, self.record) if self.on else output
