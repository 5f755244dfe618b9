"""What a training checkpoint holds besides arrays: epoch, step, losses, a scheduler's numbers.

Values keep the dotted names that the readers give them, and anything that JSON can hold is kept.
Random states are not: neither framework's mean anything to the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from zoo.containers.base import Reader

_RANDOM = re.compile(r"(^|[._])(rngs?|random)([._]|$)|^key(\.|$)")
_SCHEDULE = re.compile(r"sched", re.IGNORECASE)
_TOLD = ("last_epoch", "_last_lr", "_step_count")


def is_plain(value: Any) -> bool:
    """Whether JSON holds it; tuples become lists there."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def listed(value: Any) -> Any:
    """The value as JSON gives it back: lists for tuples."""
    if isinstance(value, list | tuple):
        return [listed(v) for v in value]
    return {k: listed(v) for k, v in value.items()} if isinstance(value, dict) else value


def collect(
    reader: Reader, extras: Iterable[str], tensors: Iterable[str]
) -> tuple[dict[str, Any], list[str]]:
    """The plain values among these names, numbers stored as scalar tensors too; and what is not."""
    data: dict[str, Any] = {}
    rest: list[str] = []
    for name in extras:
        if is_plain(reader.extras[name]) and not _RANDOM.search(name):
            data[name] = listed(reader.extras[name])
        else:
            rest.append(name)
    for name in tensors:
        if not reader.tensors[name].shape and not _RANDOM.search(name):
            value = reader.read(name).item()
            if is_plain(value):
                data[name.removesuffix(".value")] = value
                continue
        rest.append(name)
    return data, rest


def schedule_notices(data: Mapping[str, Any]) -> list[str]:
    """A notice where the data is that of a learning-rate schedule."""
    names = [n for n in data if _SCHEDULE.search(n.partition(".")[0])]
    if not names:
        return []
    told = [f"{n} {data[n]}" for n in names if n.rpartition(".")[2] in _TOLD]
    where = sorted({n.partition(".")[0] for n in names})
    return [
        f"a schedule is code and does not move; its numbers are kept: {', '.join(told or where)}"
    ]
