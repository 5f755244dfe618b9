"""Dropout that a module's code calls as a function, as layers that the module holds.

In eval mode such a call leaves nothing in a graph. So the module is run once in train mode to see
who drops what, and then gets a `torch.nn.Dropout` for each: the calls go there while `installed`
lasts. A module that does nothing in eval mode and drops in train mode (DropPath, StochasticDepth)
is found by what it does to numbers, whatever its code, and stands there as a Dropout too.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import itertools
import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import BoundArguments
from types import FrameType
from typing import Any
from unittest import mock

from convert.program import attention_by_steps as by_steps
from convert.program.calls import buffers_kept, fresh, in_mode

_DROPOUTS = {
    "dropout": "Dropout",
    "dropout1d": "Dropout1d",
    "dropout2d": "Dropout2d",
    "dropout3d": "Dropout3d",
}
_ATTENTION = "scaled_dot_product_attention"
_ROWS = 1024  # of the trial of a module: enough that a rate of 0.01 shows

Place = tuple[str, int, int]  # file, line, and which of the calls of that line


@dataclass(frozen=True)
class Dropped:
    """One call of a function that drops: its name, its rate, and what the code calls that."""

    function: str
    rate: float
    name: str


def with_dropout_layers(module: Any, call: BoundArguments) -> contextlib.AbstractContextManager:
    """A context in which the functional dropouts of `module(*call.args, **call.kwargs)` are layers
    of its parts, where they are the same at every call of a part. Elsewhere, and where the module
    does not run in train mode, nothing is changed."""
    made = _Layers(module)
    try:
        with in_mode(module, training=True):
            made.note(call)
    except Exception:  # whatever a stranger's module raises
        return contextlib.nullcontext()
    return made.installed()


class _Layers:
    def __init__(self, module: Any) -> None:
        self.module = module
        self.calls: dict[Any, list[dict[Place, Dropped]]] = {}  # of each part, each of its calls
        self.axes: dict[Any, int] = {}  # of what each part was given, where that is one array
        self.names: dict[Any, str] = {}  # of layers

    # What train mode does.

    def note(self, call: BoundArguments) -> None:
        """Run the module, and note what drops."""
        import torch

        def noted(running: _Running, function: str, rate: float, caller: FrameType) -> None:
            place = running.place(caller)
            if rate:
                running.seen[place] = Dropped(function, rate, _called(_text(caller), function))

        def began(part: Any, args: Any) -> None:
            if len(args) == 1 and isinstance(args[0], torch.Tensor):
                self.axes[part] = args[0].ndim

        def ended(running: _Running) -> None:
            self.calls.setdefault(running.part, []).append(running.seen)

        with torch.no_grad(), torch.random.fork_rng([]), buffers_kept(self.module):
            given = fresh(call)
            with _functions(noted, began, ended):
                self.module(*given.args, **given.kwargs)

    # As layers.

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """While it lasts, parts hold layers, and their calls of functions go there."""
        import torch

        places = {part: self._places(part) for part in self.calls}
        plans = {part: self._plan(part, found) for part, found in places.items() if found}

        def routed(running: _Running, function: str, rate: float, caller: FrameType) -> Any:
            layer = plans.get(running.part, {}).get(running.place(caller))
            if layer is None:
                return None
            if function == _ATTENTION:
                return functools.partial(by_steps.attention, layer)
            return lambda x, *args, **kwargs: layer(x)

        before = {m: dict(m._modules) for m in self.module.modules()}
        swapped = {m: made for m in self.axes if (made := self._dropping(m)) is not None}
        for part, plan in plans.items():
            for layer in plan.values():
                part._modules.setdefault(self.names[layer], layer)
        alike = {(type(p), n): swapped[m] for p in before for n, m in before[p].items()
                 if m in swapped}  # fmt: skip
        for part in before:
            for name, held in part._modules.items():
                other = alike.get((type(part), name))
                if held in swapped:
                    part._modules[name] = swapped[held]
                elif other is not None and type(held) in (torch.nn.Identity, *map(type, swapped)):
                    part._modules[name] = _dropout_of(0.0, other.shared_axes)
        try:
            with _functions(routed):
                yield
        finally:
            for part, parts in before.items():
                part._modules.clear()
                part._modules.update(parts)

    def _places(self, part: Any) -> dict[Place, Dropped]:
        """Where a part drops, if it is so at all of its calls."""
        calls = self.calls[part]
        return calls[0] if all(one == calls[0] for one in calls) else {}

    def _plan(self, part: Any, places: dict[Place, Dropped]) -> dict[Place, Any]:
        """The layer for each place: one for those of one name, kind and rate."""
        import torch

        made: dict[tuple[str, str, float], Any] = {}
        plan: dict[Place, Any] = {}
        taken = {*part._modules, *part._parameters, *part._buffers}
        for place, one in places.items():
            kind = _DROPOUTS.get(one.function, "Dropout")
            key = one.name, kind, one.rate
            if key in made:
                plan[place] = made[key]
                continue
            held = part._modules.get(one.name)
            if type(held).__name__ == kind and held.p == one.rate:
                layer, name = held, one.name  # whose rate the code takes
            else:
                layer = getattr(torch.nn, kind)(one.rate).train(part.training)
                numbered = (f"{one.name}{k or ''}" for k in (0, *range(2, 1000)))
                name = next(n for n in numbered if n not in taken)
            taken.add(name)
            self.names[layer] = name
            made[key] = plan[place] = layer
        return plan

    def _dropping(self, part: Any) -> Any:
        """The Dropout that a module is by what it does to numbers; None for others."""
        import torch

        of = type(part)
        if of.__module__.startswith("torch.nn") or [*part.parameters(), *part.buffers()]:
            return None
        if not self.axes[part] or [*part.children()]:
            return None
        x = torch.ones(_ROWS, *range(2, self.axes[part] + 1))
        try:
            with torch.random.fork_rng([]), torch.no_grad():
                with in_mode(part, training=False):
                    same = part(x.clone())
                with in_mode(part, training=True):
                    dropped = part(x.clone())
                    doubled = part(x * 2)
        except Exception:
            return None
        if not all(isinstance(t, torch.Tensor) and t.shape == x.shape for t in (same, dropped)):
            return None
        left = {*dropped.unique().tolist(), *(doubled / 2).unique().tolist()}
        scale = max(left)
        if not torch.equal(same, x) or left != {0.0, scale} or scale <= 1:
            return None
        rate = next(
            (p for p in vars(part).values() if type(p) is float and abs(1 - 1 / scale - p) < 1e-5),
            round(1 - 1 / scale, 6),
        )
        shared = tuple(
            a for a in range(x.ndim) if torch.equal(dropped, dropped.narrow(a, 0, 1).expand_as(x))
        )
        return _dropout_of(rate, shared)


class _Running:
    """A call of a part that has not returned, and what dropped in it so far."""

    def __init__(self, part: Any) -> None:
        self.part = part
        self.seen: dict[Place, Dropped] = {}
        self.times: Counter[tuple[str, int]] = Counter()

    def place(self, caller: FrameType) -> Place:
        """Where a function is called from, this time."""
        file, line = caller.f_code.co_filename, caller.f_lineno
        self.times[file, line] += 1
        return file, line, self.times[file, line]


@contextlib.contextmanager
def _functions(
    seen: Callable[..., Any],
    began: Callable[[Any, Any], None] = lambda part, args: None,
    ended: Callable[[_Running], None] = lambda running: None,
) -> Iterator[None]:
    """While it lasts, functions that drop say so first: `seen` may give what is called instead.
    `began` and `ended` are told of every call of a part."""
    import torch

    functional: Any = torch.nn.functional
    running: list[_Running] = []
    originals = {n: getattr(functional, n) for n in (*_DROPOUTS, _ATTENTION)}

    def enter(part: Any, args: Any) -> None:
        running.append(_Running(part))
        began(part, args)

    def leave(part: Any, args: Any, output: Any) -> None:
        ended(running.pop())

    def instead(function: str) -> Callable[..., Any]:
        original = originals[function]

        def called(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            if not running or type(running[-1].part).__module__.startswith("torch.nn"):
                return original(*args, **kwargs)
            made = seen(running[-1], function, _rate(function, args, kwargs), caller)
            return original(*args, **kwargs) if made is None else made(*args, **kwargs)

        return called

    hooks = torch.nn.modules.module
    handles = [
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave, always_call=True),
    ]
    ours: dict[str, Any] = {name: instead(name) for name in originals}
    try:
        with mock.patch.multiple(functional, **ours):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _dropout_of(rate: float, shared: tuple[int, ...]) -> Any:
    import torch

    layer: Any = torch.nn.Dropout(rate)
    layer.shared_axes = shared
    return layer


def _rate(function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The rate at which a call drops: 0 where it is told not to train."""
    if function == _ATTENTION:
        return float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
    rate = float(kwargs.get("p", args[1] if len(args) > 1 else 0.5))
    return rate if kwargs.get("training", args[2] if len(args) > 2 else True) else 0.0


def _text(caller: FrameType) -> str:
    """The text of the call that a frame is at."""
    position = next(itertools.islice(caller.f_code.co_positions(), caller.f_lasti // 2, None))
    first, last, begin, end = position
    if first is None or last is None or begin is None or end is None:
        return ""
    lines = [
        linecache.getline(caller.f_code.co_filename, n).encode() for n in range(first, last + 1)
    ]
    if not lines or not lines[-1]:
        return ""
    lines[-1] = lines[-1][:end]
    lines[0] = lines[0][begin:]
    return b"".join(lines).decode()


def _called(text: str, function: str) -> str:
    """What a call's code calls its rate: `self.attn_drop`, or `self.attn_drop.p`."""
    try:
        call = ast.parse(f"({text})", mode="eval").body
    except SyntaxError:
        return "dropout"
    if not isinstance(call, ast.Call):
        return "dropout"
    keyword, place = ("dropout_p", 4) if function == _ATTENTION else ("p", 1)
    given: list[ast.expr] = [k.value for k in call.keywords if k.arg == keyword]
    given += call.args[place : place + 1]
    rate = given[0] if given else None
    if isinstance(rate, ast.IfExp):
        rate = rate.orelse if isinstance(rate.body, ast.Constant) else rate.body
    if isinstance(rate, ast.Attribute) and rate.attr == "p":
        rate = rate.value
    name = getattr(rate, "attr", None) or getattr(rate, "id", None) or ""
    return name if "drop" in name and name != "dropout_p" else "dropout"
