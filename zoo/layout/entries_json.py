"""Entries as JSON data, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zoo.layout.entries import Constant, Entry, Tensor
from zoo.layout.ops import Op, op_from_json, op_to_json


def entry_to_json(e: Entry) -> dict[str, Any]:
    """The entry as JSON data, without what is empty or usual."""
    data: dict[str, Any] = {"kind": e.kind, "torch": {t.name: list(t.shape) for t in e.torch}}
    if e.flax:
        data["flax"] = {t.name: list(t.shape) for t in e.flax}
    if e.ops:
        data["ops"] = [op_to_json(op) for op in e.ops]
    if e.compact_ops:
        data["compact_ops"] = [op_to_json(op) for op in e.compact_ops]
    if e.collection != "params":
        data["collection"] = e.collection
    if e.tied_to is not None:
        data["tied_to"] = e.tied_to
    if e.constant is not None:
        c = e.constant
        data["constant"] = {"fill": c.fill, "dtype": c.dtype, "in_state_dict": c.in_state_dict}
    return data


_KEYS = {"kind", "torch", "flax", "ops", "compact_ops", "collection", "tied_to", "constant"}


def entry_from_json(data: Mapping[str, Any]) -> Entry:
    """The entry that `entry_to_json` gave. ValueError or KeyError for what is not one."""
    if surplus := data.keys() - _KEYS:
        raise ValueError(f"an entry has no {', '.join(sorted(surplus))}")

    def tensors(key: str) -> tuple[Tensor, ...]:
        return tuple(Tensor(n, tuple(s)) for n, s in data.get(key, {}).items())

    def ops(key: str) -> tuple[Op, ...]:
        return tuple(op_from_json(op) for op in data.get(key, ()))

    return replace(
        Entry(data["kind"], tensors("torch"), tensors("flax"), ops("ops")),
        collection=data.get("collection", "params"),
        tied_to=data.get("tied_to"),
        constant=Constant(**data["constant"]) if "constant" in data else None,
        compact_ops=ops("compact_ops"),
    )
