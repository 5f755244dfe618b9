"""The forward walk: Flax runs once, and every paired call gets torch's own inputs.

What a paired call gives is compared with what torch's gave for the same inputs, and then replaced
by it. So each value is one step away from the reference: an error at a call's output is that
call's own, and an error at a call's input is made by the code of the module around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.diagnose.divergence import Judged
from convert.diagnose.reference import Reference
from convert.matching.alignment import Aligned, align, likely_moves, moves, to_flax, to_torch
from convert.matching.pair import LayerPair
from convert.matching.pairing import Pairing
from convert.runtime.arrays import leaves, replaced, to_numpy
from convert.runtime.call import Call
from convert.runtime.flax_calls import traced
from convert.runtime.flax_module import FlaxModule
from convert.runtime.trace import Recorded, array_arguments, with_arguments
from zoo.layout.kinds import flax_kind, torch_kind


@dataclass
class Visit:
    """One call of a paired layer, on both sides."""

    pair: LayerPair
    call: Recorded  # torch's
    flax_module: Any
    around: LayerPair | None  # the innermost paired module around it
    flax_inputs: dict[str, np.ndarray]  # what Flax's code gives it, then what it is run with
    again: Callable[[dict[str, np.ndarray]], np.ndarray] | None = None  # Flax's, other inputs


@dataclass
class Event:
    """A value that is not what it should be; arrays have torch's axes."""

    where: str  # "input", "output", "raises"
    visit: Visit  # whose input or output
    key: str  # which of its arrays
    judged: Judged
    rough: np.ndarray  # torch's value
    exact: np.ndarray  # the same in float64
    given: np.ndarray  # Flax's value
    past: list[str]  # torch names of paired calls that have ended
    raw: np.ndarray | None = None  # Flax's value with its own axes
    message: str = ""  # of what was raised

    @property
    def pair(self) -> LayerPair:
        """The layer whose value it is."""
        return self.visit.pair

    @property
    def call(self) -> Recorded:
        """torch's call of it."""
        return self.visit.call


class Stop(Exception):
    """Ends a run whose first event is known; carries what was found."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found


class Failed(Stop):
    """`explain` itself failed, which is no fault of the module that runs around it."""


class Forward:
    """One walk. `explain` gets the first event, while Flax's run still stands; what it gives is the
    walk's result, None lets the walk go on."""

    def __init__(
        self,
        reference: Reference,
        side: FlaxModule,
        pairing: Pairing,
        explain: Callable[[Event], Any],
    ) -> None:
        self.reference, self.side = reference, side
        self.pairs = pairing.of_flax()
        self.explain = explain
        self.counts: dict[str, int] = {}
        self.stack: list[LayerPair] = []
        self.past: list[str] = []
        self.input_moves: set[str] = set()  # how the model's own inputs lie in Flax
        self.values_after: dict[str, Any] = {}
        self.unlike: Event | None = None  # the first value that lies in no way that is known
        # (Flax path, index of the call, "in" or "out", name of the array) -> its counterpart
        self.aligned: dict[tuple[str, int, str, str], tuple[LayerPair, Aligned, np.ndarray]] = {}

    def run(self, call: Call) -> Any:
        """What `explain` made of the first event; None if there is none."""
        with self.side.precise():
            try:
                args, kwargs = self.side.arguments(call)
                _, self.values_after = self.side(self.side.values, args, kwargs, self._around)
                if self.unlike is not None:
                    self._tell(self.unlike)
            except Failed as failed:
                raise failed.found from failed
            except Stop as stop:
                return stop.found
        return None

    def _around(self, path: str, module: Any, proceed: Any, args: Any, kwargs: Any) -> Any:
        function = type(module).__call__
        given = array_arguments(function, (module, *args), kwargs)
        visit = None if traced(given) else self._visit(path, module, given)
        if visit is None:
            return proceed(*args, **kwargs)

        def run(arrays: dict[str, np.ndarray]) -> Any:
            values = {k: _like(v, given[k]) for k, v in arrays.items()}
            others, keywords = with_arguments(function, (module, *args), kwargs, values)
            return proceed(*others[1:], **keywords)

        forced = self._inputs(visit)
        visit.flax_inputs |= forced
        self.stack.append(visit.pair)
        try:
            output = run(forced)
        except Stop:
            raise
        except Exception as e:
            event = self._event(visit, "raises", next(iter(visit.call.outputs), ""))
            event.message = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
            self._tell(event)
            raise
        finally:
            self.stack.pop()

        def again(inputs: dict[str, np.ndarray]) -> np.ndarray:
            return to_numpy(next(iter(leaves(run(forced | inputs)).values())))

        visit.again = again
        made = leaves(output)
        right = self._outputs(visit, {k: to_numpy(v) for k, v in made.items()})
        self.past.append(visit.pair.torch)
        return replaced(output, {k: _like(v, made[k]) for k, v in right.items()})

    def _visit(self, path: str, module: Any, given: dict[str, Any]) -> Visit | None:
        """What this call is on torch's side; None where there is nothing to compare with."""
        pair = self.pairs.get(path)
        if pair is None:
            return None
        index = self.counts.get(path, 0)
        self.counts[path] = index + 1
        call = self.reference.calls.get((pair.torch, index))
        if call is None:  # torch calls it less often
            return None
        around = self.stack[-1] if self.stack else None
        arrays = {k: to_numpy(v) for k, v in given.items()}
        return Visit(pair, call, module, around, arrays)

    def _inputs(self, visit: Visit) -> dict[str, np.ndarray]:
        """torch's own inputs as Flax has them, each compared with what Flax made of it."""
        call, arrays = visit.call, visit.flax_inputs
        forced: dict[str, np.ndarray] = {}
        single = _without_repeats(call.inputs, arrays)
        for a in align(call.inputs, single):
            right, given = call.inputs[a.torch], single[a.flax]
            if right.dtype.kind != "f" and not (
                right.dtype.kind in "iu" and _looks_up(visit.flax_module)
            ):
                continue  # masks and lengths may be meant otherwise: the output tells
            if given is arrays[a.flax]:
                self._aligned(visit, "in", a, given)
            if not self.stack:  # the model's own inputs are the caller's to choose
                self.input_moves |= likely_moves(right, given)
                continue
            event = self._event(visit, "input", a.torch, given, a)
            if not event.judged.same and f"in:{a.torch}" not in self._random(call):
                self._tell(event)
            forced[a.flax] = _repeated(to_flax(right, a.move, given.shape), arrays[a.flax])
        unmet = [k for k, v in call.inputs.items() if v.dtype.kind == "f"]
        theirs = [v for v in arrays.values() if v.dtype.kind == "f"]
        if self.stack and unmet and theirs and not forced and self._is_leaf(visit):
            self._tell_unlike(self._event(visit, "input", unmet[0], theirs[0]))
        return forced

    def _outputs(self, visit: Visit, made: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """torch's own outputs as Flax has them, each compared with what Flax gave."""
        call = visit.call
        right: dict[str, np.ndarray] = {}
        single = _without_repeats(call.outputs, made)
        pairs = align(call.outputs, single, None if self.stack else self.input_moves)
        # The largest first: of two last states of one shape, which is which is told by order only.
        for a in sorted(pairs, key=lambda a: -call.outputs[a.torch].size):
            event = self._event(visit, "output", a.torch, single[a.flax], a)
            if not event.judged.same and f"out:{a.torch}" not in self._random(call):
                self._tell(event)
            lying = to_flax(call.outputs[a.torch], a.move, single[a.flax].shape)
            right[a.flax] = _repeated(lying, made[a.flax])
            if single[a.flax] is made[a.flax]:
                self._aligned(visit, "out", a, made[a.flax])
        if not pairs and call.outputs and made and (not self.stack or self._is_leaf(visit)):
            key, theirs = next(iter(call.outputs)), next(iter(made.values()))
            self._tell_unlike(self._event(visit, "output", key, theirs))
        return right

    def _event(
        self,
        visit: Visit,
        where: str,
        key: str,
        raw: np.ndarray | None = None,
        aligned: Aligned | None = None,
    ) -> Event:
        side = "inputs" if where == "input" else "outputs"
        empty = np.zeros(0)
        rough = getattr(visit.call, side).get(key, empty)
        exact = getattr(self.reference.exact_call(visit.call), side).get(key, empty)
        given = empty if raw is None else raw
        if aligned is not None:
            given = to_torch(given, aligned.move, rough.shape)
        judged = self.reference.judge(rough, exact, given)
        return Event(where, visit, key, judged, rough, exact, given, list(self.past), raw)

    def _aligned(self, visit: Visit, where: str, a: Aligned, given: np.ndarray) -> None:
        if given.dtype.kind == "f":
            self.aligned[visit.pair.flax, visit.call.index, where, a.flax] = visit.pair, a, given

    def _is_leaf(self, visit: Visit) -> bool:
        return torch_kind(self.reference.modules[visit.pair.torch]) != "other"

    def _tell(self, event: Event) -> None:
        try:
            found = self.explain(event)
        except Exception as e:
            raise Failed(e) from e
        if found is not None:
            raise Stop(found)

    def _tell_unlike(self, event: Event) -> None:
        """Of another shape: a fault, unless it has as many elements. Those may only lie otherwise;
        then it is told if nothing else is."""
        if event.given.size != event.rough.size:
            self._tell(event)
        elif self.unlike is None:
            self.unlike = event

    def _random(self, call: Recorded) -> set[str]:
        return self.reference.random.get(call.key, set())


def _without_repeats(
    torch: dict[str, np.ndarray], flax: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Flax's arrays; those of which every row of the batch is the same, where torch has one row
    only (positions), as one row."""

    def once(x: np.ndarray) -> np.ndarray:
        few = x.ndim > 1 and len(x) > 1 and not any(moves(y.shape, x.shape) for y in torch.values())
        shapes = {y.shape for y in torch.values()}
        return x[0] if few and x.shape[1:] in shapes and bool((x == x[:1]).all()) else x

    return {k: once(x) for k, x in flax.items()}


def _repeated(row: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The row as often as Flax has it."""
    return row if row.shape == like.shape else np.broadcast_to(row, like.shape)


def _like(value: np.ndarray, given: Any) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(value).astype(given.dtype)


def _looks_up(module: Any) -> bool:
    return flax_kind(module) == "embedding"
