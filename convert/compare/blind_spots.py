"""What a comparison could not see, as data: each weakens "same", and is said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

# Every kind that there is, and what it means.
KINDS: Mapping[str, str] = MappingProxyType(
    {
        "no dependence": "layers and parameters that no output depends on under these inputs",
        "rows not reached": "rows of a table that no output depends on under these inputs",
        "zero values": "values that are zero throughout: what made them may hide any fault",
        "float32 only": "what was judged in float32 only",
        "fitted axes": "outputs whose axes were permuted to fit",
        "ambiguous axes": "outputs of which sizes and values do not tell how their axes lie",
        "random": "what was drawn at random",
        "training attribute": "settings that act in training only, and differ",
        "inputs": "what these inputs never exercised: padding, masks, lengths, sizes",
        "mask gradient": "inputs of zeros and ones, by which the gradients differ",
        "no counterpart": "tensors that were not compared one by one",
    }
)
_NAMED = 4


@dataclass(frozen=True, slots=True)
class BlindSpot:
    """One thing that a verdict does not cover. `names` are the layers, tensors, inputs or outputs
    that it concerns, all of them; the sentence may name the first few only."""

    kind: str  # one of KINDS
    names: tuple[str, ...]
    sentence: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"there is no kind {self.kind!r} of blind spot")


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many there are besides."""
    every = [name or "the whole" for name in names]
    more = f" and {len(every) - _NAMED} more" if len(every) > _NAMED else ""
    return ", ".join(every[:_NAMED]) + more
