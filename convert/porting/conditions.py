"""The conditions that a port is right under, in words: of its own axes, and none that follows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

_MORE = re.compile(r"\((-?\d+)\) \+ (\S+) >= (\d+)(.*)")  # (-1) + x.shape[1] >= 2
_LEAST = re.compile(r"(\S+) >= (\d+)(.*)")


def as_they_lie(told: Iterable[str], orders: Mapping[str, Sequence[int]]) -> list[str]:
    """Conditions on torch's axes as conditions on the port's. `orders` say of inputs with other
    axes which of torch's stands where."""
    made = []
    for one in told:
        for name, order in orders.items():

            def axis(found: re.Match[str], order: Sequence[int] = order) -> str:
                return f"{found[1]}{list(order).index(int(found[2]))}{found[3]}"

            one = re.sub(rf"(?<![\w.])({re.escape(name)}\.shape\[)(\d+)(\])", axis, one)
            if one.startswith(f"{name}: "):
                one = re.sub(r"(\baxis )(\d+)(\b)", axis, one)
        made.append(one)
    return made


def tightest(told: Iterable[str]) -> list[str]:
    """The conditions without those that others imply: of several bounds of a size the highest."""
    bounds: dict[str, tuple[int, str]] = {}
    order: dict[str, None] = {}
    for one in told:
        plain = one
        if found := _MORE.fullmatch(one):
            plain = f"{found[2]} >= {int(found[3]) - int(found[1])}{found[4]}"
        found = _LEAST.fullmatch(plain)
        order.setdefault(one if found is None else found[1])
        if found is not None and (found[1] not in bounds or bounds[found[1]][0] < int(found[2])):
            bounds[found[1]] = int(found[2]), plain
    return [bounds[key][1] if key in bounds else key for key in order]
