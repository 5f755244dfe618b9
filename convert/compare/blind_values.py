"""What no compared value depends on: zero gradients, rows that nothing reaches, zero values."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from convert.compare.blind_spots import BlindSpot, listed
from convert.compare.sides import Run
from convert.compare.torch_side import TorchSide
from convert.judge.noise import Arrays
from convert.runtime.torch_module import replica
from zoo.layout.kinds import torch_kind

_BLOCK = 4  # rows at the end of a table: units that are never active are not that many in a row


def unseen_values(
    reference: TorchSide, run: Run, compared: Collection[str], level: str
) -> Iterator[BlindSpot]:
    """The blind spots that values and gradients of the reference's most precise run tell; those of
    gradients from level "gradients" on. `compared` are the intermediates that were compared."""
    inside = {n: x for n, x in run.intermediates.items() if n in compared}
    if level == "outputs" and (names := _zero(inside)):
        yield BlindSpot(
            "zero values",
            names,
            f"{listed(names)}: zero throughout; dependence not examined "
            "(level gradients says which layers no output depends on)",
        )
    if names := _zero(run.outputs):
        yield BlindSpot("zero values", names, f"{listed(names)}: zero throughout")
    if level != "outputs":
        yield from _unreached(reference, run)


def _zero(arrays: Arrays) -> tuple[str, ...]:
    return tuple(n for n, x in arrays.items() if x.size and x.dtype.kind in "fc" and not x.any())


def _unreached(reference: TorchSide, run: Run) -> Iterator[BlindSpot]:
    parameters = {n: run.gradients[n] for n in _trained(reference.module)}
    zero = [n for n, g in parameters.items() if g.size and not g.any()]
    blind = _independent(reference, run, zero) if zero else []
    if blind:
        names = tuple(_outermost(blind, parameters))
        yield BlindSpot(
            "no dependence", names, f"no output depends on {listed(names)} under these inputs"
        )
    modules = dict(reference.module.named_modules())
    rows = {}
    for name, gradient in parameters.items():
        if gradient.any():
            module = modules[name.rpartition(".")[0]]
            missed, total = _rows(module, np.asarray(gradient))
            if missed:
                rows[name] = f"{name} ({missed} of {total})"
    if rows:
        yield BlindSpot(
            "rows not reached",
            tuple(rows),
            f"no output depends on these rows under these inputs: {listed(rows.values())}",
        )


def _trained(module: Any) -> list[str]:
    return [n for n, p in module.named_parameters() if p.requires_grad]


def _independent(reference: TorchSide, run: Run, names: Sequence[str]) -> list[str]:
    """Those of `names` that no output depends on. A gradient is zero also behind what is detached,
    or chosen by an argmax, where outputs do depend on it: so they are given other values."""

    def unchanged(group: Sequence[str]) -> bool:
        made = _with_other_values(reference, group).outputs
        return all(np.array_equal(x, made[n], equal_nan=True) for n, x in run.outputs.items())

    def search(group: Sequence[str]) -> list[str]:
        if unchanged(group):
            return list(group)
        half = len(group) // 2
        return [*search(group[:half]), *search(group[half:])] if half else []

    return search(names)


def _with_other_values(reference: TorchSide, names: Collection[str]) -> Run:
    import torch

    precision = reference.precisions[-1]
    module = replica(reference.module, precision)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name in names:
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device))
    return TorchSide(module, reference.call, seed=reference.seed).run(precision, backward=False)


def _outermost(names: Collection[str], every: Collection[str]) -> Iterator[str]:
    """The outermost modules all of whose parameters are among `names`, and what is left."""
    found = set(names)
    told = set()
    for name in names:
        outer = name
        while "." in outer:
            above = outer.rpartition(".")[0]
            if not all(n in found for n in every if n.startswith(f"{above}.")):
                break
            outer = above
        if outer not in told:
            told.add(outer)
            yield outer


def _rows(module: Any, gradient: np.ndarray) -> tuple[int, int]:
    """How many rows of a table have no gradient, and how many it has. Tables are embeddings, and
    the module's own parameters where it is no layer that is known: experts in one array, positions.
    Rows of weights are not: those of a unit that is never active are no table's."""
    if torch_kind(module) == "embedding":
        reached = _any_in_rows(gradient)
        if getattr(module, "padding_idx", None) is not None:
            reached[module.padding_idx] = True  # never has a gradient
        return int((~reached).sum()), len(reached)
    if torch_kind(module) != "other" or gradient.ndim not in (2, 3):
        return 0, 0
    axis = int(gradient.ndim == 3 and gradient.shape[0] == 1)
    reached = _any_in_rows(np.moveaxis(gradient, axis, 0))
    if gradient.ndim == 3 and axis == 0:
        return int((~reached).sum()), len(reached)
    last = int(np.flatnonzero(reached).max(initial=-1)) + 1
    missed = len(reached) - last
    return (missed, len(reached)) if missed >= _BLOCK else (0, 0)


def _any_in_rows(x: np.ndarray) -> np.ndarray:
    return np.asarray((x != 0).reshape(len(x), -1).any(axis=1))
