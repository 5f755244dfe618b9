"""How large a stated layout may be: bounds on its JSON, checked before a layout is made of it."""

from __future__ import annotations

import math
from typing import Any

ENTRIES = 200_000
TENSORS = 1 << 16  # on one side of an entry
OPS = 16  # of one entry
UNSTACKS = 1024  # ops of which each may make thousands of tensors from one
RANK = 32  # NumPy goes up to 64
NAME = 1024  # characters
CONSTANT = 1 << 26  # elements of a tensor that is made of its stated value
_LARGEST = 1 << 62  # an axis, or the elements of a tensor


def check(data: Any) -> None:
    """Raises ValueError for JSON data that asks for more than a layout ever needs."""
    if not isinstance(data, list):
        raise ValueError("it is not a list of entries")
    if len(data) > ENTRIES:
        raise ValueError(f"{len(data)} entries, at most {ENTRIES} are read")
    unstacks = 0
    for entry in data:
        if not isinstance(entry, dict):
            raise ValueError(f"{_shown(entry)} is not an entry")
        _check_entry(entry)
        every = entry.get("ops", []) + entry.get("compact_ops", [])
        unstacks += sum(op["op"] == "unstack" for op in every)
    if unstacks > UNSTACKS:
        raise ValueError(f"{unstacks} ops that unstack, at most {UNSTACKS} are run")


def _check_entry(entry: dict[str, Any]) -> None:
    for key in ("kind", "collection", "tied_to"):
        if entry.get(key) is not None:
            _check_name(entry[key])
    for side in ("torch", "flax"):
        tensors = entry.get(side, {})
        if not isinstance(tensors, dict) or len(tensors) > TENSORS:
            raise ValueError(f"{side}: {_shown(tensors)} is not name -> shape")
        for name, shape in tensors.items():
            _check_name(name)
            _check_shape(shape)
            if "constant" in entry and math.prod(shape) > CONSTANT:
                raise ValueError(f"{name} is a constant of more than {CONSTANT} elements")
    for key in ("ops", "compact_ops"):
        ops = entry.get(key, [])
        if not isinstance(ops, list) or len(ops) > OPS:
            raise ValueError(f"{key}: {_shown(ops)} is not a list of at most {OPS} ops")
        for op in ops:
            _check_op(op)


def _check_op(op: Any) -> None:
    if not isinstance(op, dict) or not isinstance(op.get("op"), str):
        raise ValueError(f"{_shown(op)} is not an op")
    for key, value in op.items():
        if key == "op":
            continue
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) > TENSORS:
            raise ValueError(f"{key} of {op['op']} has {len(numbers)} elements")
        for n in numbers:
            if key == "names":
                _check_name(n)
            elif type(n) is not int or not 0 <= n < _LARGEST:
                raise ValueError(f"{key} of {op['op']} is {_shown(value)}")


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= NAME:
        raise ValueError(f"{_shown(name)} is not a name of at most {NAME} characters")


def _check_shape(shape: Any) -> None:
    whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    if not whole or len(shape) > RANK or math.prod(shape) >= _LARGEST:
        raise ValueError(f"{_shown(shape)} is not a shape")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
