"""A layout both ways, on JAX's arrays while it traces and on NumPy's: torch's tensors, Flax's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.layout import Entry, Layout
from zoo.layout.ops import Concat, Op, Ops, Stack, inverse


class ByName:
    """The tensors of a layout by torch's names and by Flax's."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.entries: dict[str, Entry] = {t.name: e for e in layout.entries for t in e.torch}

    def owner(self, name: str) -> str:
        """The torch name whose values a name has: its own, or the one that it is tied to."""
        entry = self.entries.get(name)
        return name if entry is None or entry.tied_to is None else entry.tied_to

    def flax_of(self, name: str) -> Entry | None:
        """The entry of a torch tensor that Flax has; None if it has it not."""
        entry = self.entries.get(self.owner(name))
        return entry if entry is not None and entry.flax else None

    def torch(self, names: Sequence[str], flax: Mapping[str, Any]) -> dict[str, Any]:
        """The torch tensors of these names, of Flax's arrays by name; views where that can be."""
        made: dict[str, Any] = {}
        for name in names:
            entry = self.flax_of(name)
            if entry is None:
                continue
            if entry.torch[0].name not in made:
                arrays = [flax[t.name] for t in entry.flax]
                ops = inverse(entry.ops, [t.shape for t in entry.torch])
                pairs = zip(entry.torch, applied(ops, arrays), strict=True)
                made |= {t.name: x for t, x in pairs}
            made[name] = made[self.owner(name)]
        return made

    def flax(self, torch: Mapping[str, Any]) -> dict[str, Any]:
        """Flax's arrays of the torch tensors that are given."""
        made: dict[str, Any] = {}
        for entry in self.layout.entries:
            if entry.flax and all(t.name in torch for t in entry.torch):
                arrays = applied(entry.ops, [torch[t.name] for t in entry.torch])
                made |= {t.name: x for t, x in zip(entry.flax, arrays, strict=True)}
        return made


def applied(ops: Ops, arrays: Sequence[Any]) -> list[Any]:
    """The arrays after all ops, of NumPy or of JAX."""
    result = list(arrays)
    for op in ops:
        result = _applied(op, result)
    return result


def _applied(op: Op, arrays: list[Any]) -> list[Any]:
    import jax
    import jax.numpy as jnp

    if isinstance(op, Concat | Stack) and any(isinstance(a, jax.Array) for a in arrays):
        if isinstance(op, Concat):
            return [jnp.concatenate(arrays, op.axis)]
        return [jnp.stack(arrays[i :: op.groups], op.axis) for i in range(op.groups)]
    return op.run(arrays)
