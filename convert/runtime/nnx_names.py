"""What an NNX module calls its variables, and what a layout calls them.

torch's nn.Sequential holds its layers below itself (`net.0.weight`), nnx.Sequential below `layers`
(`net.layers.0.kernel`). A layout that was made of a torch module has the shorter path, one that was
made with the Flax module the longer.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from typing import Any

from zoo.layout import Layout, Tensor


def variables_of(module: Any, known: Container[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """A module's weights (parameters, running statistics) and its other nnx.Variables, the random
    streams' left out: each by the name that a layout with the names `known` gives it."""
    from flax import nnx

    names = module_names(module, known)

    def named(state: Any) -> dict[str, Any]:
        return {names[".".join(map(str, p))]: v for p, v in nnx.to_flat_state(state)}

    kinds = nnx.Any(nnx.Param, nnx.BatchStat), nnx.Not(nnx.RngState), ...
    weights, others, _ = nnx.state(module, *kinds)
    return named(weights), named(others)


def module_names(module: Any, known: Container[str] = ()) -> dict[str, str]:
    """What the module calls each variable -> what a layout with the names `known` calls it."""
    from flax import nnx

    within = [path for path, part in nnx.iter_modules(module) if isinstance(part, nnx.Sequential)]
    names = {}
    for path, _ in nnx.to_flat_state(nnx.state(module)):
        own = ".".join(map(str, path))
        dropped = {len(p) for p in within if path[: len(p)] == p and path[len(p)] == "layers"}
        kept = [str(part) for i, part in enumerate(path) if i not in dropped]
        names[own] = own if own in known else ".".join(kept)
    return names


def flax_names(layout: Layout) -> set[str]:
    """What a layout calls Flax's tensors."""
    return {t.name for e in layout.entries for t in e.flax}


def respelled(layout: Layout, module: Any) -> Layout:
    """The layout with the module's own names on the Flax side."""
    names = module_names(module, flax_names(layout))
    own = {plain: name for name, plain in names.items() if name != plain}
    if not own:
        return layout
    return Layout(
        replace(e, flax=tuple(Tensor(own.get(t.name, t.name), t.shape) for t in e.flax))
        for e in layout.entries
    )
