"""Query and key of attention with rotary positions: codebases rotate halves of a head's features,
or neighbours, and keep the weights accordingly. Names and shapes do not tell which.

Source: "RoFormer", arXiv 2104.09864; transformers' convert_llama_weights_to_hf (permute).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from convert.matching.groups import TensorGroup
from convert.matching.orientation import UnitPair
from convert.matching.vocabulary import said
from zoo.containers.errors import UsageError
from zoo.layout import Entry
from zoo.layout.ops import Reorder

ROTARY = (
    "rotary features lie in halves or in pairs, which names do not tell: settle it with "
    "--rotary same|pairs"
)
_KEPT = ("q_proj", "k_proj", "query_key_value", "qkv_proj", "c_attn")  # names that came from torch


def rotated(pair: UnitPair, groups: Sequence[TensorGroup]) -> bool:
    """Whether a pair is of queries or keys, of a model without a table of positions, in a codebase
    that does not call them as torch does."""
    proj = pair.ours.features.classes.get("proj")
    if proj not in ("q", "k", "qkv") or "norm" in pair.ours.features.meanings:
        return False
    told = {m for g in groups for m in said(p.replace("#", "") for p in g.parts).meanings}
    if {"table:position", "relative", "cross"} & told:
        return False
    parts = {p for g in pair.theirs.groups for p in g.parts}
    return not parts & set(_KEPT)


def in_pairs(made: list[Entry], pair: UnitPair) -> list[Entry]:
    """The entries with the features of each head in pairs. UsageError where Flax's shape does not
    tell how many features a head has."""
    found = []
    for e in made:
        (target,) = e.flax if len(e.flax) == 1 else (None,)
        splits = [op for op in e.ops if getattr(op, "names", ()) == ("heads", "head_dim")]
        if target is None or not splits:
            raise UsageError(
                f"{pair.theirs.name} does not tell how many features a head has",
                "give both sides the same weights, or modules with inputs",
            )
        size = splits[-1].sizes[-1]  # type: ignore[attr-defined]
        axis = max(k for k, n in enumerate(target.shape) if n == size)
        found.append(dataclasses.replace(e, ops=(*e.ops, Reorder(axis, (2, size // 2), (1, 0)))))
    return found
