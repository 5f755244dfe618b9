"""What to tell of sides that do not fit, beyond what is open."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from zoo.containers.errors import UsageError
from zoo.layout.kinds import kinds

_TWO_BIASES = re.compile(r"(.*)bias_(ih|hh)(_l\d+(?:_reverse)?|)")


def refuse_swapped(ours: Collection[str], theirs: Collection[str]) -> None:
    """UsageError where the first side's names end as Flax's do and the second's as torch's."""
    leaves = [leaf for kind in kinds().values() for leaf in kind.leaves.items()]
    torch, flax = {name for name, _ in leaves}, {there.nnx for _, there in leaves}

    def lean(names: Collection[str]) -> int:
        ends = [n.rpartition(".")[2] for n in names]
        return sum(e in torch - flax for e in ends) - sum(e in flax - torch for e in ends)

    if lean(ours) < 0 < lean(theirs):
        raise UsageError(
            "the first side has Flax's names, and the second PyTorch's", "give PyTorch's side first"
        )


def of_biases(left: Iterable[str]) -> list[str]:
    """A line where torch alone has both biases of a recurrent layer."""
    found: dict[tuple[str, str], set[str]] = {}
    for name in left:
        if m := _TWO_BIASES.fullmatch(name):
            found.setdefault((m[1], m[3]), set()).add(m[2])
    both = [f"{a}bias_ih{b} and {a}bias_hh{b}" for (a, b), of in found.items() if len(of) == 2]
    if not both:
        return []
    return [
        f"{both[0]} are two biases of one layer; a Flax cell that has one holds their sum, and no "
        "layout makes two of it again: give the cell two (zoo.nn.recurrent_flax)"
    ]
