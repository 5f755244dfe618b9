"""With which arguments the parts of a torch module were made."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

Plain = (bool, int, float, str, type(None))


class Constructed:
    """The arguments of the constructors that ran while it was recording."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, dict[str, Any]]] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """While it lasts, the constructors of torch's modules are noted."""
        import torch

        base: Any = torch.nn.Module
        original = base.__init__

        def noted(module: Any, *args: Any, **kwargs: Any) -> None:
            frame = sys._getframe(1)
            outermost = None
            while frame is not None and _makes(frame, module):
                outermost = frame
                frame = frame.f_back  # type: ignore[assignment]
            if outermost is not None:
                found = inspect.getargvalues(outermost)
                self.made.append((module, {n: found.locals[n] for n in found.args[1:]}))
            original(module, *args, **kwargs)

        base.__init__ = noted
        try:
            yield
        finally:
            base.__init__ = original

    def by_path(self, module: Any) -> dict[str, dict[str, Any]]:
        """The arguments of each part of a module, by its path."""
        arguments = {id(m): given for m, given in self.made}
        return {p: arguments[id(m)] for p, m in module.named_modules() if id(m) in arguments}


def _makes(frame: Any, module: Any) -> bool:
    code = frame.f_code
    if code.co_name != "__init__" or not code.co_argcount:
        return False
    return frame.f_locals.get(code.co_varnames[0]) is module
