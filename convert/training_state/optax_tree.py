"""What stands where in a tree of optax states, by the dotted names of its leaves.

A live tree, an nnx.Optimizer's and a checkpoint give the same names: `0.mu.fc1.kernel` is the field
`mu` of the state at place `0`, of the parameter `fc1.kernel`; `0.count` is a number there. Places
nest: `inner_states.decay.inner_state.0` lies in a part of a multi_transform.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from convert.training_state.rules import rules

# Numbers that count updates, in whatever state they stand.
COUNTS = frozenset({"count", "gradient_step", "step"})
_WRAPPERS = ("value", "raw_value")  # what an nnx.Variable's values lie under
_PASSING = {"acc_grads", "grad_acc"}  # what waits for the next update and no torch optimizer keeps


@dataclass(frozen=True)
class Spot:
    """One leaf: `param` is the parameter that it is of, None for a number; `hyper` that it is a
    hyper-parameter that was injected."""

    name: str
    place: str
    field: str
    param: str | None = None
    hyper: bool = False


def parse(name: str, params: Collection[str]) -> Spot:
    """The spot of a dotted name, given the names of all parameters."""
    parts = name.split(".")
    if parts[-1] in _WRAPPERS and len(parts) > 1:
        parts = parts[:-1]
    for i in range(1, len(parts)):
        if (param := ".".join(parts[i:])) in params:
            return Spot(name, ".".join(parts[: i - 1]), parts[i - 1], param)
    if len(parts) > 1 and parts[-2] == "hyperparams":
        return Spot(name, ".".join(parts[:-2]), parts[-1], hyper=True)
    return Spot(name, ".".join(parts[:-1]), parts[-1])


def within(place: str, ancestor: str) -> bool:
    """Whether `place` is `ancestor` or lies in it."""
    return not ancestor or place == ancestor or place.startswith(f"{ancestor}.")


def ancestors(place: str) -> list[str]:
    """The place itself, what it lies in, ..., the root ""."""
    parts = place.split(".") if place else []
    return [".".join(parts[:i]) for i in range(len(parts), -1, -1)]


@dataclass
class Holding:
    """A state that keeps moments: `fields` of it -> torch's slot, and the parameters it is of."""

    place: str
    fields: Mapping[str, str]
    params: list[str]
    ours: bool  # of convert.optim: torch's meaning already

    @property
    def scalable(self) -> bool:
        """Whether it is a momentum that may be kept times the learning rate."""
        return "trace" in self.fields and not self.ours


@dataclass
class StateTree:
    """All spots of a tree, sorted."""

    spots: list[Spot]
    holdings: list[Holding] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # place -> why its state cannot be moved
    unknown: dict[str, str] = field(default_factory=dict)  # place -> a state that is left fresh
    classes: Mapping[str, str] | None = None  # place -> class of the state there, if it is known

    def holdings_of(self, param: str) -> list[Holding]:
        """Where the moments of one parameter are."""
        return [h for h in self.holdings if param in h.params]

    def slots_of(self, param: str) -> set[str]:
        """Which slots the tree keeps for a parameter."""
        return {slot for h in self.holdings_of(param) for slot in h.fields.values()}

    def strangers(self) -> list[Spot]:
        """What is kept of a parameter, in a state that is not known."""
        places = {h.place for h in self.holdings} | self.refused.keys() | self.unknown.keys()
        spots = (s for s in self.spots if s.param is not None and not s.hyper)
        return [s for s in spots if s.place not in places and s.field not in _PASSING]

    def behind_the_rate(self) -> bool:
        """Whether momentum is kept behind the learning rate, and so times it.

        Of a chain whose members are known, a trace that is the last is. Of a checkpoint they are
        not: there it is where optax.rmsprop has it, two after the moments; next to them, or alone
        as in optax.sgd, it comes before the rate.
        """
        return any(self._behind(h) for h in self.holdings if h.scalable)

    def _behind(self, trace: Holding) -> bool:
        around, _, last = trace.place.rpartition(".")
        if not last.isdigit():
            return False
        start = f"{around}." if around else ""
        if self.classes is not None:
            after = f"{start}{int(last) + 1}"
            return not any(within(place, after) for place in self.classes)
        others = [h.place.removeprefix(start) for h in self.holdings if within(h.place, around)]
        return any(o.isdigit() and int(last) - int(o) > 1 for o in others)

    def scope(self, place: str) -> list[str]:
        """The parameters that a number at `place` counts for: those kept nearest around it."""
        for around in ancestors(place):
            if found := [p for h in self.holdings if within(h.place, around) for p in h.params]:
                return list(dict.fromkeys(found))
        return []


def read_tree(
    names: Iterable[str], params: Collection[str], classes: Mapping[str, str] | None = None
) -> StateTree:
    """Sort the leaves. `classes` is the class of the state at each place, where it is known.

    Of a checkpoint it is not: then fields that no optimizer has are somebody else's.
    """
    known = set(params)
    tree = StateTree([parse(name, known) for name in names], classes=classes)
    found: dict[str, list[Spot]] = {}
    for spot in tree.spots:
        if not spot.hyper:
            found.setdefault(spot.place, []).append(spot)
    for place, spots in found.items():
        fields = {s.field for s in spots if s.param is not None} - _PASSING
        if fields:
            numbers = {s.field for s in spots if s.param is None}
            of = list(dict.fromkeys(s.param for s in spots if s.param is not None))
            _sort(tree, place, fields, numbers, of, None if classes is None else classes.get(place))
    return tree


def _sort(
    tree: StateTree,
    place: str,
    fields: set[str],
    numbers: set[str],
    params: list[str],
    cls: str | None,
) -> None:
    torch_slots = {slot for rule in rules().values() for slot in rule.slots}
    if fields <= torch_slots:
        extra = {n: n for n in numbers if n in torch_slots}
        held = {f: f for f in fields} | extra
        tree.holdings.append(Holding(place, held, params, ours=True))
        return
    counts = "count" in numbers
    for rule in rules().values():
        for stock in rule.stock:
            same = fields == stock.fields.keys() and counts == stock.counts
            if same and (cls is None or stock.cls in ("", cls)):
                tree.holdings.append(Holding(place, stock.fields, params, ours=False))
                return
    if "nu_max" in fields:
        tree.refused[place] = (
            "optax.amsgrad keeps the maximum of bias-corrected moments, torch that of the moments"
        )
    elif {"nu"} <= fields <= {"mu", "nu"} and counts and cls in (*_CORRECTED, None):
        tree.refused[place] = "optax.rmsprop(bias_correction=True) corrects what torch does not"
    elif cls is not None:
        tree.unknown[place] = cls


_CORRECTED = ("ScaleByRmsWithCountState", "ScaleByRStdDevWithCountState")


def classes_of(tree: Any, place: str = "") -> dict[str, str]:
    """Place -> class of every named tuple in a live tree of states."""
    found: dict[str, str] = {}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        found[place] = type(tree).__name__
        parts = dict(zip(tree._fields, tree, strict=True)).items()
    elif isinstance(tree, tuple | list):
        parts = {str(i): v for i, v in enumerate(tree)}.items()
    elif isinstance(tree, Mapping) and type(tree).__module__.partition(".")[0] != "flax":
        parts = {str(k): v for k, v in tree.items()}.items()
    else:
        return found
    for key, value in parts:
        found |= classes_of(value, f"{place}.{key}" if place else str(key))
    return found
