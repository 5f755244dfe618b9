"""What runs while a tape is on, as operations with their places in the user's code."""

from __future__ import annotations

import contextlib
import functools
import linecache
import os
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from convert.program.opened import OPENED
from convert.program.operations import Leaf, Operation, Ref, Site, find, mapped, short_name
from convert.program.recurrent import CELLS, as_recurrent, recurrent


def _torch() -> Any:
    import torch

    return torch


def _variable_function(func: Any) -> str:
    """The name of a function that torch does not list: of packed sequences."""
    name = getattr(func, "__name__", "")
    held = getattr(_torch()._C._VariableFunctions, name, None) if name else None
    return f"torch._C._VariableFunctions.{name}" if held is not None else ""


def tape(outside: CodeType) -> Any:
    """A TorchFunctionMode that records, muted at first."""
    from torch.overrides import TorchFunctionMode, resolve_name

    class Mode(TorchFunctionMode, Tape):
        def __init__(self) -> None:
            TorchFunctionMode.__init__(self)
            Tape.__init__(self, outside)

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if self.muted:
                return func(*args, **kwargs)
            name = resolve_name(func) or _variable_function(func)
            if not name or name.startswith(("torch.nn.init.", "torch.Tensor.requires_grad")):
                return func(*args, **kwargs)
            if (opened := self.written_out(name, args, kwargs)) is not None:
                # What asks for more than is written out stays one operation.
                with contextlib.suppress(NotImplementedError, TypeError), self, self.at_one_site():
                    return opened()
            return self.call(name, func, args, kwargs)

    return Mode()


class Tape:
    """What has been recorded so far."""

    def __init__(self, outside: CodeType) -> None:
        self.outside = outside  # the code that runs the module: what is around it is not the user's
        self.operations: list[Operation] = []
        self.leaves: dict[int, Leaf] = {}
        self.values: dict[int, Any] = {}  # of leaves
        self.made: set[int] = set()  # values that an operation makes
        self.ids: dict[int, int] = {}  # id of a tensor -> its value
        self.held: list[Any] = []  # so that no id is used again
        self.frames: dict[int, int] = {}  # id of a frame -> its number
        self.held_frames: list[Any] = []
        self.module = ""
        self.muted = 1
        self.site: Site | None = None

    def quiet(self) -> Any:
        """Nothing is recorded meanwhile."""
        return _Quiet(self)

    def at_one_site(self) -> Any:
        """What is recorded meanwhile stands where this call stands."""
        return _AtSite(self)

    def leaf(self, tensor: Any, name: str, kind: Any) -> int:
        """A value that nothing recorded makes."""
        value = self.number(tensor)
        self.leaves[value] = Leaf(name, kind)
        self.values[value] = tensor.detach().clone()
        return value

    def number(self, tensor: Any) -> int:
        """A new value for what the tensor holds now."""
        value = len(self.held)
        self.held.append(tensor)
        self.ids[id(tensor)] = value
        return value

    def passed_on(self, value: int) -> None:
        """A value that is handed on as it is, as an operation of its own."""
        number = self.number(self.values[value])
        place = self.site
        self.operations.append(
            Operation("torch.clone", (Ref(value),), {}, (number,), self.module, place)
        )

    def written_out(self, name: str, args: Any, kwargs: Any) -> Callable[[], Any] | None:
        """A fused call by its steps, if it can be."""
        if name.startswith("torch.") and name.removeprefix("torch.") in CELLS:
            try:
                given, named = as_recurrent(name.removeprefix("torch."), args)
            except NotImplementedError:
                return None
            return lambda: self.call("recurrent", recurrent, given, named)
        if (opened := OPENED.get(name)) is None:
            return None
        return lambda: opened(*args, **kwargs)

    def call(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation, and record it if it makes or changes a tensor."""
        torch = _torch()
        given = _tensors((args, kwargs))
        before = [t._version for t in given]
        output = func(*args, **kwargs)
        written = [i for i, t in enumerate(given) if t._version != before[i]]
        made = [given[written[0]]] if written else _tensors(output)
        if not made or short_name(name) in ("data", "grad", "detach_", "requires_grad_"):
            return output
        known = [t for t in given if id(t) in self.ids]
        for t in given:
            if id(t) not in self.ids:
                self.leaf(t, "a tensor", "constant")

        def ref(x: Any) -> Any:
            return Ref(self.ids[id(x)]) if isinstance(x, torch.Tensor) else x

        plain = (mapped(tuple(args), ref), mapped(dict(kwargs), ref))
        if not _is_plain(plain) or (written and not known and not given):
            for t in made:
                self.leaf(t, f"what {short_name(name)} gives", "constant")
            return output
        numbers = tuple(self.number(t) for t in made)
        self.made |= set(numbers)
        site = self.site or self.place()
        writes = written[0] if written else None
        self.operations.append(Operation(name, *plain, numbers, self.module, site, writes))
        return output

    def place(self) -> Site | None:
        """The innermost frame of the user's own code, and the calls around it."""
        frame: FrameType | None = sys._getframe(1)
        users = []
        while frame is not None and frame.f_code is not self.outside:
            if not frame.f_code.co_filename.startswith(_not_users()):
                users.append(frame)
            frame = frame.f_back
        if not users:
            return None
        for user in reversed(users):
            if id(user) not in self.frames:
                self.frames[id(user)] = len(self.frames)
                self.held_frames.append(user)
        code, at = users[0].f_code, users[0].f_lasti
        line, text = _expression(users[0])
        position = (code.co_filename, code.co_firstlineno, at)
        calls = tuple(self.frames[id(user)] for user in reversed(users))
        return Site(code.co_filename, line, text, _title(code), position, calls)


class _Quiet:
    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def __enter__(self) -> None:
        self.tape.muted += 1

    def __exit__(self, *exception: object) -> None:
        self.tape.muted -= 1


class _AtSite:
    def __init__(self, tape: Tape) -> None:
        self.tape, self.before = tape, tape.site

    def __enter__(self) -> None:
        self.tape.site = self.tape.site or self.tape.place()

    def __exit__(self, *exception: object) -> None:
        self.tape.site = self.before


@functools.cache
def _not_users() -> tuple[str, ...]:
    """Where code lies that is neither the user's nor a library's of models."""
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return os.path.dirname(_torch().__file__), ours, contextlib.__file__


def _title(code: Any) -> str:
    return str(getattr(code, "co_qualname", code.co_name)).replace("<locals>.", "")


def _expression(frame: FrameType) -> tuple[int, str]:
    """The line and the expression that a frame is at."""
    positions = list(frame.f_code.co_positions())
    line, last, start, end = positions[frame.f_lasti // 2]
    if line is None:
        return frame.f_lineno, linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    file = frame.f_code.co_filename
    lines = [linecache.getline(file, n) for n in range(line, (last or line) + 1)]
    if lines and start is not None and end is not None:
        lines[-1] = lines[-1].encode()[:end].decode(errors="ignore")
        lines[0] = lines[0].encode()[start:].decode(errors="ignore")
    return line, " ".join(" ".join(lines).split())


def _tensors(tree: Any) -> list[Any]:
    return list(find(tree, _torch().Tensor))


def _is_plain(tree: Any) -> bool:
    """Whether arguments are data."""
    torch = _torch()
    plain = (
        Ref, int, float, complex, str, bool, type(None), type(Ellipsis),
        torch.dtype, torch.device, torch.layout, torch.memory_format,
    )  # fmt: skip
    good = True

    def look(x: Any) -> Any:
        nonlocal good
        good = good and isinstance(x, plain)
        return x

    mapped(tree, look)
    return good
