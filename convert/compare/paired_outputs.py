"""Which output of a torch module is which of a Flax module."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from convert.compare.report import Report
from convert.runtime.arrays import caches, named_outputs, to_numpy, unread_outputs
from zoo.containers.errors import UsageError

Arrays = Mapping[str, np.ndarray]


def pair_outputs(torch: Any, flax: Any, report: Report) -> dict[str, str]:
    """Flax's name -> torch's, in Flax's order.

    By name where the names of one side are all among the other's, else in order where both give as
    many. Caches and named outputs that only one side gives are left out, and `report` says so.
    UsageError where the two cannot be paired.
    """
    ours, theirs = _outputs(torch, "torch", report), _outputs(flax, "Flax", report)
    if len(ours) != len(theirs):
        ours = _without_caches(ours, caches(torch), "torch", report)
        theirs = _without_caches(theirs, caches(flax), "Flax", report)
    pairs = _by_name(ours, theirs, report)
    if pairs is None:
        if len(ours) != len(theirs):
            raise UsageError(
                f"the torch module gives {len(ours)} outputs, the Flax one {len(theirs)}",
                "let both return the same, or both a dict or NamedTuple: names then tell which are "
                "each other's",
                [f"torch: {_shapes(ours)}", f"Flax: {_shapes(theirs)}"],
            )
        report.notices.append(
            f"outputs are paired in order: {', '.join(ours)} with {', '.join(theirs)}"
        )
        pairs = dict(zip(theirs, ours, strict=True))
    if not any(ours[name].size for name in pairs.values()):
        raise UsageError(
            "the torch module gives no output that could be compared"
            + (f": {_shapes(ours)}" if ours else ""),
            "return arrays, and give inputs that are not empty",
        )
    return pairs


def _outputs(output: Any, title: str, report: Report) -> Arrays:
    if unread := unread_outputs(output):
        told = ", ".join(f"{name} ({kind})" for name, kind in unread.items())
        report.notices.append(f"not compared: {told} of {title} is not made of arrays")
    return {name: to_numpy(x) for name, x in named_outputs(output).items()}


def _without_caches(found: Arrays, held: Collection[str], title: str, report: Report) -> Arrays:
    """What is no cache, where anything else is."""
    kept = {n: x for n, x in found.items() if not any(_below(n, cache) for cache in held)}
    if not kept or len(kept) == len(found):
        return found
    names = ", ".join(name for name in held if any(_below(n, name) for n in found))
    report.notices.append(
        f"only {title} gives caches ({names}): they are left out; use_cache=False gives none"
    )
    return kept


def _by_name(ours: Arrays, theirs: Arrays, report: Report) -> dict[str, str] | None:
    """The pairs, if all names of one side are among the other's; indices are no names."""
    both = [name for name in theirs if name in ours]
    if len(both) != min(len(ours), len(theirs)):
        return None
    left = {
        "torch": [n for n in ours if n not in theirs],
        "Flax": [n for n in theirs if n not in ours],
    }
    if not any(left.values()):
        return {name: name for name in both}
    if any(_unnamed(name) for name in (*both, *left["torch"], *left["Flax"])):
        return None
    for title, names in left.items():
        if names:
            report.notices.append(f"only {title} gives {', '.join(names)}: not compared")
    return {name: name for name in both}


def _unnamed(name: str) -> bool:
    """Whether an output is known by its place alone: "output", "output.0"."""
    return name == "output" or name.split(".")[1].isdigit()


def _below(name: str, above: str) -> bool:
    return name == above or name.startswith(f"{above}.")


def _shapes(arrays: Arrays) -> str:
    return ", ".join(f"{name} {x.shape}" for name, x in arrays.items()) or "none"
