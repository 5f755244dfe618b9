"""Which families a large header may be of: by how its names end, before every name is tried on
every family in every spelling. Small ones are tried on all."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Collection

from zoo.layout import TREES
from zoo.model import Model
from zoo.registry import families

LARGE = 4096  # tensors
_NUMBERS = re.compile(r"\d+")


def likely(names: Collection[str]) -> list[Model]:
    """The families of which at least one tensor in a hundred may be."""
    every = list(families().values())
    if len(names) < LARGE:
        return every
    ends = Counter(".".join(n.removesuffix(".value").rsplit(".", 2)[-2:]) for n in names)
    found = []
    for model in every:
        known = _ends(model.name)
        count = sum(n for end, n in ends.items() if _end(model.respell(end)) in known)
        if 100 * count >= len(names):
            found.append(model)
    return found


@functools.lru_cache(maxsize=256)
def _ends(family: str) -> frozenset[str]:
    """How the names of a family's tensors end, in all of its spellings."""
    model = families()[family]
    layouts = [model.layout_of(config) for config in model.tiny.values()]
    trees = [*TREES, *(d.name for d in model.dialects)]
    views = (view for layout in layouts for tree in trees for view in layout.view(tree))
    return frozenset(_end(t.name) for view in views for t in view.tensors)


def _end(name: str) -> str:
    """The last two parts of a name, whatever numbers are in them."""
    return _NUMBERS.sub("#", ".".join(name.rsplit(".", 2)[-2:]))
