"""Tables that were computed when the module was made: positions, rotations, means and deviations.

Their code is not in the record, but what most tables hold is known: sines and cosines of position
times frequency. Such a table is recognised, and made again with one thing otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from convert.diagnose.repair.edit import Edit, first_users, word
from convert.program.operations import Program
from convert.program.replay import Values

_BASES = (10000.0, 500000.0, 1000000.0, 100.0, 1000.0, 1e-4)  # the last: frequencies that grow
_CLOSE = 1e-5


@dataclass(frozen=True)
class SineTable:
    """How a table of sines and cosines is made."""

    base: float
    less: int  # frequencies are base^(-k / (n - less))
    start: int  # the first position
    layout: str  # one of _LAYOUTS

    def make(self, shape: tuple[int, ...]) -> Any:
        """The table, float64; None where the shape is none of the layout's."""
        import torch

        width = shape[-1]
        half = width if self.layout in ("cos", "sin", "polar", "frequencies") else width // 2
        if half * (width // half) != width or half - self.less <= 0:
            return None
        steps = torch.arange(half, dtype=torch.float64)
        frequencies = self.base ** (-steps / (half - self.less))
        if self.layout == "frequencies":
            return frequencies.reshape(shape) if frequencies.numel() == _size(shape) else None
        count = _size(shape) // width
        positions = torch.arange(self.start, self.start + count, dtype=torch.float64)
        angles = torch.outer(positions, frequencies)
        made = _LAYOUTS[self.layout](angles)
        return made.reshape(shape) if made.numel() == _size(shape) else None


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _stacked(*parts: Any) -> Any:
    import torch

    return torch.stack(parts, -1).flatten(-2)


def _joined(*parts: Any) -> Any:
    import torch

    return torch.cat(parts, -1)


def _polar(angles: Any) -> Any:
    import torch

    return torch.polar(torch.ones_like(angles), angles)


_LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "frequencies": lambda a: a,
    "sin, cos": lambda a: _joined(a.sin(), a.cos()),
    "cos, sin": lambda a: _joined(a.cos(), a.sin()),
    "sin, cos alternating": lambda a: _stacked(a.sin(), a.cos()),
    "cos, sin alternating": lambda a: _stacked(a.cos(), a.sin()),
    "cos": lambda a: a.cos(),
    "sin": lambda a: a.sin(),
    "cos twice": lambda a: _joined(a.cos(), a.cos()),
    "sin twice": lambda a: _joined(a.sin(), a.sin()),
    "cos doubled": lambda a: _stacked(a.cos(), a.cos()),
    "sin doubled": lambda a: _stacked(a.sin(), a.sin()),
    "polar": _polar,
}
# What each layout is taken for, and the word for it.
_OTHERS = {
    "sin, cos": (("cos, sin", "concat"), ("sin, cos alternating", "rearranged")),
    "cos, sin": (("sin, cos", "concat"), ("cos, sin alternating", "rearranged")),
    "sin, cos alternating": (("cos, sin alternating", "concat"), ("sin, cos", "rearranged")),
    "cos, sin alternating": (("sin, cos alternating", "concat"), ("cos, sin", "rearranged")),
    "cos twice": (("cos doubled", "rope"),),
    "sin twice": (("sin doubled", "rope"),),
    "cos doubled": (("cos twice", "rope"),),
    "sin doubled": (("sin twice", "rope"),),
}


def form_of(table: Any) -> SineTable | None:
    """The form that gives a table, if one does."""
    import torch

    if table.ndim < 1 or table.shape[-1] < 2 or table.numel() > 1 << 20:
        return None
    shape = tuple(table.shape)
    for base, less, start, layout in itertools.product(_BASES, (0, 1), (0, 1), _LAYOUTS):
        if (layout == "polar") != table.is_complex():
            continue
        form = SineTable(base, less, start, layout)
        made = form.make(shape)
        if made is not None and torch.allclose(made, table.to(made.dtype), rtol=0, atol=_CLOSE):
            return form
    return None


def sinusoids(program: Program, values: Values) -> Iterator[Edit]:
    """Every table of sines and cosines made with another base, divisor, first position or order;
    all of one form alike."""
    used = first_users(program)
    found: dict[int, SineTable] = {}
    for value, leaf in program.leaves.items():
        x = values[value]
        if leaf.kind in ("buffer", "constant", "parameter") and value in used and (
            x.is_floating_point() or x.is_complex()
        ) and (form := form_of(x)) is not None:  # fmt: skip
            found[value] = form
    for group in {(f.base, f.less, f.start) for f in found.values()}:
        held = {v: f for v, f in found.items() if (f.base, f.less, f.start) == group}
        at = min(used[v] for v in held)
        names = " and ".join(program.leaves[v].name for v in list(held)[:2])
        for cause, said, change in _changes(*group):
            tables = {v: change(f).make(tuple(values[v].shape)) for v, f in held.items()}
            if all(t is not None for t in tables.values()):
                leaves = {v: partial(_instead, t) for v, t in tables.items()}
                yield Edit(1.2, cause, f"{names} with {said}", leaves=leaves, at=at)
    yield from _layouts(program, values, found, used)


def _instead(table: Any, x: Any) -> Any:
    return table.to(x.dtype)


def _turned(d: int) -> Callable[[Any], Any]:
    return lambda t: t.flip(d)


def _rolled(by: int, d: int) -> Callable[[Any], Any]:
    return lambda t: t.roll(by, d)


def _changes(
    base: float, less: int, start: int
) -> Iterator[tuple[str, str, Callable[[SineTable], SineTable]]]:
    for other in _BASES:
        if other != base and (other > 1) == (base > 1):
            said = f"the base {word(other)} in place of {word(base)}"
            yield "constant", said, partial(replace, base=other)
    divisor = "n - 1" if not less else "n"
    yield "constant", f"exponents over {divisor}", lambda f: replace(f, less=1 - less)
    said = f"positions from {1 - start} in place of {start}"
    yield "offset", said, lambda f: replace(f, start=1 - start)


def _layouts(
    program: Program, values: Values, found: dict[int, SineTable], used: dict[int, int]
) -> Iterator[Edit]:
    causes = {cause for f in found.values() for _, cause in _OTHERS.get(f.layout, ())}
    for cause in sorted(causes):
        leaves: dict[int, Callable[[Any], Any]] = {}
        said = ""
        for value, form in found.items():
            other = next((o for o, c in _OTHERS.get(form.layout, ()) if c == cause), None)
            if other is None:
                continue
            table = replace(form, layout=other).make(tuple(values[value].shape))
            leaves[value] = partial(_instead, table)
            said = f"{program.leaves[value].name} as {other}, not {form.layout}"
        yield Edit(1.1, cause, said, leaves=leaves, at=min(used[v] for v in leaves))


def tables(program: Program, values: Values) -> Iterator[Edit]:
    """All tables of one shape turned round alike: means and deviations for BGR."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    first = first_users(program)
    for value, leaf in program.leaves.items():
        x = values[value]
        if leaf.kind in ("buffer", "constant") and x.is_floating_point() and value in first:
            by_shape.setdefault(tuple(x.shape), []).append(value)
    for shape, used in by_shape.items():
        names = " and ".join(program.leaves[v].name for v in used[:2])
        at = min(first[v] for v in used)
        for d, n in enumerate(shape):
            if n > 1:
                yield Edit(1.2, "reversed", f"{names} back to front along axis {d}",
                           leaves=dict.fromkeys(used, _turned(d)),
                           at=at)  # fmt: skip
            if n > 3 and n % 2 == 0:
                yield Edit(1.2, "concat", f"the halves of {names} along axis {d} exchanged",
                           leaves=dict.fromkeys(used, _rolled(n // 2, d)),
                           at=at)  # fmt: skip
