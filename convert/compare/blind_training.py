"""Settings that act in training only, of both sides: dropout's rates and places, momenta of norms.

Rates are read where layers have them (`zoo.layout.kinds` says by what name). What torch drops by
`functional.dropout` is seen in a run; Flax has no such function to be seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convert.compare.blind_spots import BlindSpot, listed
from convert.matching.bare import copies
from convert.matching.pair import LayerPair, Match, Pair
from convert.runtime.torch_calls import run
from convert.runtime.trace import Recorded, Trace
from zoo.layout.kinds import flax_kind, kinds, of_group, torch_kind

_PLACED = (
    *("linear", "embedding", "norm", "batchnorm", "attention", "recurrent", "conv_transpose"),
    *of_group("conv"),
)
_CHANNELS = ("Dropout1d", "Dropout2d", "Dropout3d", "FeatureAlphaDropout")
_FUNCTIONS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout")


@dataclass(frozen=True)
class _Drop:
    """Something that drops values: its layer, its rate, and the paired layers (by torch's names)
    that ran just before and after; None where that is not known."""

    name: str
    rate: float
    around: tuple[str, ...] | None = None


@dataclass
class _Drops:
    """Those of one side in the order of execution; `idle` are layers that were not called."""

    called: list[_Drop]
    idle: list[_Drop]

    @property
    def every(self) -> list[_Drop]:
        return [*self.called, *self.idle]

    def rates(self) -> list[float]:
        return [d.rate for d in self.called]

    def counts(self) -> Counter[float]:
        return Counter(d.rate for d in self.every)


def training_attributes(
    pair: Pair,
    layers: Sequence[LayerPair],
    flax_modules: Mapping[str, Any],
    traces: tuple[Trace, Trace],
    level: str,
) -> Iterator[BlindSpot]:
    """What differs between the sides in training only; of momenta only below level "training",
    which finds them. `flax_modules` by path; `traces` are of torch and of Flax."""
    modules, (torch_trace, flax_trace) = dict(pair.torch.named_modules()), traces
    paired = [p for p in layers if p.kind in _PLACED]
    ours = _drops(modules, torch_trace, _torch_rates, {p.torch: p.torch for p in paired})
    theirs = _drops(flax_modules, flax_trace, _flax_rates, {p.flax: p.torch for p in paired})
    hidden = bool(flax_trace.notes)
    spot = _compare(pair, ours, theirs, hidden)
    if spot is not None or (spot := _channels(ours, theirs, modules, flax_modules)) is not None:
        yield spot
    if level != "training":
        yield from _momenta(modules, flax_modules, layers)


def _compare(pair: Pair, ours: _Drops, theirs: _Drops, hidden: bool) -> BlindSpot | None:
    if ours.rates() != theirs.rates() or ours.counts() != theirs.counts():
        ours.idle += _functional(pair)
    if ours.counts() == theirs.counts():
        return None if hidden else _misplaced(ours.called, theirs.called)
    # What was not called, or not seen, may be called any number of times.
    uncertain = hidden or ours.idle or theirs.idle
    if uncertain and set(ours.counts()) == set(theirs.counts()):
        return None
    names = tuple(dict.fromkeys(d.name for d in (*ours.every, *theirs.every)))
    if len(ours.every) == len(theirs.every):
        both = zip(ours.every, theirs.every, strict=True)
        apart = [(a, b) for a, b in both if a.rate != b.rate]
        told = listed(
            f"{a.name or 'the whole'} {a.rate:g} in torch and {b.rate:g} in Flax" for a, b in apart
        )
        names = tuple(dict.fromkeys(a.name for a, _ in apart))
        return BlindSpot("training attribute", names, f"dropout rates differ: {told}")
    told = f"torch drops {_places(ours)}, Flax {_places(theirs)}"
    return BlindSpot("training attribute", names, f"dropout differs: {told}")


def _channels(
    ours: _Drops, theirs: _Drops, modules: Mapping[str, Any], flax_modules: Mapping[str, Any]
) -> BlindSpot | None:
    """Dropouts of whole channels on one side, where every one drops single values on the other."""
    held = [modules.get(d.name) for d in ours.called], [
        flax_modules.get(d.name) for d in theirs.called]  # fmt: skip
    whole = [d.name for d, m in zip(ours.called, held[0], strict=True)
             if type(m).__name__ in _CHANNELS]  # fmt: skip
    other = [d.name for d, m in zip(theirs.called, held[1], strict=True)
             if getattr(m, "broadcast_dims", ())]  # fmt: skip
    if bool(whole) == bool(other) or not ours.called or not theirs.called:
        return None
    sides = ("torch", "Flax") if whole else ("Flax", "torch")
    told = f"dropout of whole channels in {sides[0]} ({listed(whole or other)}), of single values"
    return BlindSpot("training attribute", tuple(whole or other), f"{told} in {sides[1]}")


def _places(drops: _Drops) -> str:
    if not drops.every:
        return "nowhere that is seen"
    by_rate: dict[float, list[str]] = {}
    for d in drops.every:
        by_rate.setdefault(d.rate, []).append(d.name)
    count = len(drops.every)
    told = "; ".join(f"{rate:g}: {listed(names)}" for rate, names in by_rate.items())
    return f"at {count} place{'s' * (count != 1)} ({told})"


def _misplaced(ours: list[_Drop], theirs: list[_Drop]) -> BlindSpot | None:
    """Dropouts of torch's beside other layers than any of Flax's of that rate."""

    def near(a: _Drop, b: _Drop) -> bool:
        if a.around is None or b.around is None:
            return True
        return any(x == y for x, y in zip(a.around, b.around, strict=True))

    names = tuple(a.name for a in ours if not any(a.rate == b.rate and near(a, b) for b in theirs))
    if not names:
        return None
    told = f"dropout at another place in Flax: {listed(names)}"
    return BlindSpot("training attribute", names, told)


def _drops(
    modules: Mapping[str, Any],
    trace: Trace,
    rates: Callable[[Any], list[float]],
    paired: Mapping[str, str],
) -> _Drops:
    """`paired`: names of this side's layers between which dropouts are placed -> torch's."""
    placed = [c for c in trace.calls if c.name in paired]
    held = {name: found for name, m in modules.items() if (found := rates(m))}
    called = []
    for call in trace.calls:
        around = None if call.name in paired else _around(call, placed, paired)
        called += [_Drop(call.name, rate, around) for rate in held.get(call.name, ())]
    seen = {c.name for c in trace.calls}
    idle = [_Drop(n, rate) for n, found in held.items() if n not in seen for rate in found]
    return _Drops(called, idle)


def _around(
    call: Recorded, placed: Sequence[Recorded], paired: Mapping[str, str]
) -> tuple[str, ...]:
    before = max((c for c in placed if -1 < c.end < call.order), key=_end, default=None)
    after = min((c for c in placed if c.order > call.end), key=lambda c: c.order, default=None)
    return tuple("" if c is None else paired[c.name] for c in (before, after))


def _end(call: Recorded) -> int:
    return call.end


def _torch_rates(module: Any) -> list[float]:
    kind = torch_kind(module)
    if kind == "recurrent":  # between its layers
        return _nonzero(getattr(module, "dropout", 0.0)) * (getattr(module, "num_layers", 1) - 1)
    return _stated(module, kind)


def _flax_rates(module: Any) -> list[float]:
    return _stated(module, flax_kind(module))


def _stated(module: Any, kind: str) -> list[float]:
    """The rate that a layer of a kind that drops has, by any name that it may have."""
    row = kinds().get(kind)
    for a in row.attributes if row is not None else ():
        if {"rate", "dropout_rate"} & set(a.flax_names):
            for name in (*a.torch_names, *a.flax_names):
                if isinstance(found := getattr(module, name, None), int | float):
                    return _nonzero(found)
    return []


def _nonzero(rate: Any) -> list[float]:
    return [round(float(rate), 6)] if isinstance(rate, int | float) and rate else []


def _functional(pair: Pair) -> list[_Drop]:
    """What torch drops by functions, outside of layers that are dropouts."""
    from torch.overrides import TorchFunctionMode

    found: list[_Drop] = []
    stack: list[tuple[str, Any]] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if getattr(func, "__name__", "") in _FUNCTIONS and stack:
                name, part = stack[-1]
                rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
                if torch_kind(part) != "dropout":
                    found.extend(_Drop(name, r) for r in _nonzero(rate))
            return func(*args, **kwargs)

    def enter(name: str, part: Any, args: Any, kwargs: Any) -> Any:
        stack.append((name, part))
        return args, kwargs

    def leave(name: str, part: Any, output: Any) -> Any:
        stack.pop()
        return output

    with Watch():
        run(pair.torch, pair.call, "float32", enter, leave)
    return found


def _momenta(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], layers: Sequence[LayerPair]
) -> Iterator[BlindSpot]:
    attribute = kinds()["batchnorm"].attribute("momentum")
    told = {}
    for p in layers:
        norm: Any = ours.get(p.torch)
        other: Any = theirs.get(p.flax)
        share = getattr(other, "momentum", None)
        if torch_kind(norm) != "batchnorm" or flax_kind(other) != "batchnorm" or share is None:
            continue
        if getattr(norm, "running_mean", None) is None:
            continue
        try:
            wanted = attribute.to_flax(norm.momentum)
        except ValueError as e:
            told[p.torch] = f"{p.torch}: {e}"
            continue
        if abs(wanted - share) > 1e-6:
            told[p.torch] = (
                f"{p.torch} {norm.momentum:g} in torch, which is {wanted:g} in Flax's terms, "
                f"and there it is {share:g}"
            )
    if told:
        sentence = f"momenta of running statistics differ: {listed(told.values())}"
        yield BlindSpot("training attribute", tuple(told), sentence)


def trained_apart(matches: Iterable[Match], ties: Mapping[str, str]) -> Iterator[BlindSpot]:
    """What torch has once and Flax several times: only gradients differ. `ties` are torch's further
    names."""
    for first, (others, flax) in copies(matches, ties).items():
        told = f"{first} is one tensor with {listed(others)} in torch, and several in Flax"
        yield BlindSpot("training attribute", (first, *flax), f"{told}: {listed(flax)}")
