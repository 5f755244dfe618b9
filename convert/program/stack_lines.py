"""While a module is exported, every line of the user's code on the way to an operation is kept.

torch keeps those in functions called "forward" only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

_CELLS = ("<ipython-input-", "<python-input-")


def is_made_up(file: str) -> bool:
    """Whether a frame's file is none, nor a cell of a notebook: code that was generated."""
    return file.startswith("<") and not file.startswith(_CELLS)


@contextlib.contextmanager
def every_line() -> Iterator[None]:
    """While it lasts, nodes of a trace have the lines of all functions but torch's machinery."""
    import torch.fx.proxy

    tracer: Any = torch.fx.proxy.TracerBase
    original = getattr(tracer, "_filter_traceback_frames", None)
    if original is None:  # torch before 2.10 keeps all
        yield
        return
    root = os.path.dirname(torch.__file__)
    layers = os.path.join(root, "nn", "modules")
    machinery = os.path.join(layers, "module.py")

    def kept(self: Any, summary: Any) -> Any:
        first = next((i for i, f in enumerate(summary) if f.name == "forward"), len(summary))
        made = type(summary)()
        for frame in summary[first:]:
            file = frame.filename
            inside = file.startswith(root) and not file.startswith(layers)
            if not inside and file != machinery and not is_made_up(file):
                made.append(frame)
        return made

    tracer._filter_traceback_frames = kept
    try:
        yield
    finally:
        tracer._filter_traceback_frames = original
