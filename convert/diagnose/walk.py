"""The forward walk: Flax runs once, and every paired call gets torch's own inputs.

What a paired call gives is compared with what torch's gave for the same inputs, and then replaced
by it. So each value is one step away from the reference: an error at a call's output is that
call's own, and an error at a call's input is made by the code of the module around it.

Two right modules need not be cut alike: one pads, normalises or adds inside a layer where the other
does so around it. So a wrong value is a fault only where it does harm. A layer that gives the right
output for other inputs is right; a wrong value at the border of a module with layers inside is a
suspect, which stays as it is, until a layer is wrong: then the first suspect is told that, put
right, puts this layer right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.diagnose.divergence import Judged
from convert.diagnose.reference import Reference
from convert.diagnose.unseen import PART, is_telling, is_within
from convert.matching.alignment import Aligned, align, likely_moves, moves, to_flax, to_torch
from convert.matching.directions import AS_IT_IS, REVERSE, turned, turned_axis
from convert.matching.pair import LayerPair
from convert.matching.pairing import Pairing
from convert.runtime.arrays import leaves, replaced, to_numpy
from convert.runtime.call import Call
from convert.runtime.flax_calls import traced
from convert.runtime.linen_calls import rewound
from convert.runtime.pure_module import FlaxModule
from convert.runtime.torch_recurrent import is_single
from convert.runtime.trace import Recorded, array_arguments, with_arguments
from zoo.layout.kinds import flax_kind, torch_kind

Place = tuple[str, int, str, str]  # torch's name, which call, "input" or "output", of which array
_SUSPECTS = 8


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

    @property
    def place(self) -> Place:
        """Which value it is, the same in every walk."""
        return self.pair.torch, self.call.index, self.where, self.key


_NEAR = 1e-5  # of the largest value: several layers have rounded


class Stop(Exception):
    """Ends a run whose first event is known; carries what was found."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found


class Failed(Stop):
    """`explain` itself failed, which is no fault of the module that runs around it."""


@dataclass
class Undecided:
    """A layer is wrong, and values before it may be why."""

    event: Event
    suspects: list[Event]


class Forward:
    """One walk. `explain` gets the first event, while Flax's run still stands; what it gives is the
    walk's result, None lets the walk go on.

    With `chosen` the event at that place is told, and no other.
    """

    def __init__(
        self,
        reference: Reference,
        side: FlaxModule,
        pairing: Pairing,
        explain: Callable[[Event], Any],
        chosen: Place | None = None,
    ) -> None:
        self.reference, self.side, self.pairing = reference, side, pairing
        self.pairs = pairing.of_flax()
        self.holding = {f.rpartition(".")[0] for f in self.pairs if f}
        self.holding |= {h[:i] for h in self.holding for i, c in enumerate(h) if c == "."} | {""}
        self.explain = explain
        self.chosen = chosen
        self.counts: dict[str, int] = {}
        self.stack: list[LayerPair] = []
        self.past: list[str] = []
        self.suspects: list[Event] = []
        self.right = 0  # values that are torch's
        self.shapeless: list[tuple[Event, int]] = []
        self.input_moves: set[str] = set()  # how the model's own inputs lie in Flax
        self.values_after: dict[str, Any] = {}
        # (Flax path, index of the call, "in" or "out", name of the array) -> its counterpart, of
        # values that are torch's: where one side scales inside a layer, gradients differ too.
        self.aligned: dict[tuple[str, int, str, str], tuple[LayerPair, Aligned, np.ndarray]] = {}

    def run(self, call: Call) -> Any:
        """What `explain` made of the first event; None if there is none."""
        with self.side.precise():
            try:
                args, kwargs = self.side.arguments(call)
                _, self.values_after = self.side(self.side.values, args, kwargs, self._around)
            except Failed as failed:
                raise failed.found from failed
            except Stop as stop:
                if isinstance(stop.found, Undecided):
                    return self._decided(stop.found, call)
                return stop.found
        return None

    def _decided(self, open_: Undecided, call: Call) -> Any:
        """The first suspect that, put right, puts the event right; else the event. It is told in a
        walk of its own."""
        chosen = open_.event
        for suspect in open_.suspects[:_SUSPECTS]:
            if suspect.given.shape != suspect.rough.shape or self._mends(
                suspect, open_.event, call
            ):
                chosen = suspect
                break
        walk = Forward(self.reference, self.side, self.pairing, self.explain, chosen.place)
        found = walk.run(call)
        vars(self).update(vars(walk))
        return found

    def _mends(self, suspect: Event, event: Event, call: Call) -> bool:
        """Whether the event is none where the suspect's values are torch's."""
        trial = _Mended(self, suspect.place)
        trial.run(call)
        return trial.same.get(event.place, False)

    def _around(self, path: str, module: Any, proceed: Any, args: Any, kwargs: Any) -> Any:
        function = type(module).__call__
        given = array_arguments(function, (module, *args), kwargs)
        visit = None if traced(given) else self._visit(path, module, given)
        if visit is None:
            return proceed(*args, **kwargs)
        turn = self._turn(visit)
        visit.flax_inputs = turn(visit.flax_inputs)

        def run(arrays: dict[str, np.ndarray]) -> Any:
            arrays = turn(arrays)
            values = {k: _like(v, given[k]) for k, v in arrays.items()}
            others, keywords = with_arguments(function, (module, *args), kwargs, values)
            return proceed(*others[1:], **keywords)

        forced, wrong = self._inputs(visit)
        if path in self.holding:
            self._suspect(wrong)
        visit.flax_inputs |= forced
        self.stack.append(visit.pair)
        try:
            output = run(forced)
        except Stop:
            raise
        except Exception as e:
            event = self._event(visit, "raises", next(iter(visit.call.outputs), ""))
            event.message = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
            self._fault(wrong[0] if wrong else event)
            raise
        finally:
            self.stack.pop()

        def again(inputs: dict[str, np.ndarray]) -> np.ndarray:
            with rewound(module):
                made = {k: to_numpy(v) for k, v in leaves(run(forced | inputs)).items()}
                return next(iter(turn(made).values()))

        visit.again = again
        made = leaves(output)
        right, unlike = self._outputs(visit, turn({k: to_numpy(v) for k, v in made.items()}))
        if wrong and path not in self.holding and not right and not unlike:
            self._suspect(wrong)  # nothing says whether they do harm
        elif not unlike:
            self.past.append(visit.pair.torch)
        elif path in self.holding and self.stack:
            self._suspect(unlike)
        elif wrong:
            self._fault(wrong[0])
        else:  # the suspects have no part in what a layer makes of the right inputs
            for event in unlike:
                self._fault(event, certain=bool(self.stack))
            self.past.append(visit.pair.torch)
        return replaced(output, {k: _like(v, made[k]) for k, v in turn(right).items()})

    def _turn(self, visit: Visit) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
        """What turns Flax's sequences into the order that torch's have, and back."""
        module = self.reference.modules.get(visit.pair.torch)
        backwards = is_single(module) and visit.pair.torch.endswith(REVERSE)
        axis = turned_axis(visit.call.inputs, visit.flax_inputs) if backwards else None
        if axis is None or axis == AS_IT_IS:
            return lambda arrays: arrays
        steps = max(visit.flax_inputs.values(), key=np.size).shape[:2]
        return lambda arrays: turned(arrays, axis, steps)

    def _suspect(self, events: list[Event]) -> None:
        """What may be wrong: told where it is the one that is looked for."""
        for event in events:
            if event.place == self.chosen:
                self._tell(event)
        self.suspects += events

    def _fault(self, event: Event, certain: bool = False) -> None:
        """What is wrong, of itself or by one of the suspects."""
        shapeless = [e for e, right in self.shapeless if right == self.right]
        if self.chosen is None and shapeless:
            raise Stop(Undecided(event, shapeless[:1]))
        if self.chosen is None and self.suspects and not certain:
            raise Stop(Undecided(event, self.suspects))
        if self.chosen in (None, event.place):
            self._tell(event)

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
        if self._is_step(pair, call, arrays):
            return None
        return Visit(pair, call, module, around, arrays)

    def _is_step(self, pair: LayerPair, call: Recorded, given: dict[str, np.ndarray]) -> bool:
        """Whether Flax calls step by step what goes through a whole sequence in torch."""
        if torch_kind(self.reference.modules[pair.torch]) != "recurrent":
            return False
        whole = max(call.inputs.values(), key=np.size, default=np.zeros(0))
        return not any(moves(whole.shape, x.shape) for x in given.values())

    def _inputs(self, visit: Visit) -> tuple[dict[str, np.ndarray], list[Event]]:
        """torch's own inputs as Flax has them, and the events of those that Flax made otherwise,
        which stay as they are."""
        call, arrays = visit.call, visit.flax_inputs
        forced: dict[str, np.ndarray] = {}
        wrong: list[Event] = []
        single = _without_repeats(call.inputs, arrays)
        for a in align(call.inputs, single):
            right, given = call.inputs[a.torch], single[a.flax]
            if right.dtype.kind != "f" and not (
                right.dtype.kind in "iu" and _looks_up(visit.flax_module)
            ):
                continue  # masks and lengths may be meant otherwise: the output tells
            alike = not self.stack  # the model's own inputs are the caller's to choose
            if alike:
                self.input_moves |= likely_moves(right, given)
            else:
                event = self._event(visit, "input", a.torch, given, a)
                alike = self._same(event) or f"in:{a.torch}" in self._random(call)
                if alike:
                    lying = to_flax(right, a.move, given.shape)
                    forced[a.flax] = _repeated(lying, arrays[a.flax])
                else:
                    wrong.append(event)
            if alike and given is arrays[a.flax]:
                self._aligned(visit, "in", a, given)
        unmet = [k for k, v in call.inputs.items() if v.dtype.kind == "f"]
        theirs = [v for v in arrays.values() if v.dtype.kind == "f"]
        if self.stack and unmet and theirs and not forced and not wrong and self._is_leaf(visit):
            self._unlike(self._event(visit, "input", unmet[0], theirs[0]))
        return forced, wrong

    def _outputs(
        self, visit: Visit, made: dict[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], list[Event]]:
        """torch's own outputs as Flax has them, and the events of those that Flax gave otherwise.
        Those of a module with layers inside stay as they are."""
        call = visit.call
        right: dict[str, np.ndarray] = {}
        wrong: list[Event] = []
        single = _without_repeats(call.outputs, made)
        pairs = align(call.outputs, single, None if self.stack else self.input_moves)
        # The largest first: of two last states of one shape, which is which is told by order only.
        for a in sorted(pairs, key=lambda a: -call.outputs[a.torch].size):
            event = self._event(visit, "output", a.torch, single[a.flax], a)
            same = self._same(event) or f"out:{a.torch}" in self._random(call)
            if not same:
                wrong.append(event)
            if same or visit.pair.flax not in self.holding:
                lying = to_flax(call.outputs[a.torch], a.move, single[a.flax].shape)
                right[a.flax] = _repeated(lying, made[a.flax])
            if same and single[a.flax] is made[a.flax]:
                self._aligned(visit, "out", a, made[a.flax])
        if not pairs and call.outputs and made and (not self.stack or self._is_leaf(visit)):
            key, theirs = next(iter(call.outputs)), next(iter(made.values()))
            event = self._event(visit, "output", key, theirs)
            if not self.stack:
                wrong.append(event)
            else:
                self._unlike(event)
        return right, wrong

    def _same(self, event: Event) -> bool:
        """Whether the value is torch's."""
        self.right += event.judged.same
        return event.judged.same

    def _unlike(self, event: Event) -> None:
        """A layer's input or output that lies in no way that is known: cut otherwise, or a fault if
        the next value that can be compared is wrong. What holds all of torch's numbers is right."""
        if _holds(event):
            self.right += 1
        else:
            self.shapeless.append((event, self.right))
        if event.place == self.chosen:
            self._tell(event)

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
        event = Event(where, visit, key, judged, rough, exact, given, list(self.past), raw)
        self._met(event)
        return event

    def _met(self, event: Event) -> None:
        """Called with every value that is compared."""

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

    def _random(self, call: Recorded) -> set[str]:
        return self.reference.random.get(call.key, set())


class _Silent(Forward):
    """A walk that tells nothing."""

    def _fault(self, event: Event, certain: bool = False) -> None:
        pass

    def run(self, call: Call) -> Any:
        with contextlib.suppress(Exception):  # what raises ends it: the values before are known
            super().run(call)


class _Mended(_Silent):
    """A walk in which the values that one call takes, or gives, are torch's. `same` says of each
    place after it whether the value is torch's."""

    def __init__(self, walk: Forward, place: Place) -> None:
        super().__init__(walk.reference, walk.side, walk.pairing, walk.explain)
        self.place = place
        self.same: dict[Place, bool] = {}

    def _same(self, event: Event) -> bool:
        self.same[event.place] = event.judged.same
        return event.judged.same or event.place[:3] == self.place[:3]


class Onward(_Silent):
    """A walk that puts in nothing from one place on. `later` are the values that come after it, as
    Flax's own code makes them of the wrong one."""

    def __init__(
        self, reference: Reference, side: FlaxModule, pairing: Pairing, start: Event
    ) -> None:
        super().__init__(reference, side, pairing, lambda event: None)
        self.start = start.place
        self.reached = False
        self.later: list[Event] = []

    def _met(self, event: Event) -> None:
        if self.reached and event.given.shape == event.rough.shape:
            self.later.append(event)
        self.reached = self.reached or event.place == self.start

    def _inputs(self, visit: Visit) -> tuple[dict[str, np.ndarray], list[Event]]:
        forced, wrong = super()._inputs(visit)
        return ({} if self.reached else forced), wrong

    def _outputs(
        self, visit: Visit, made: dict[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], list[Event]]:
        right, wrong = super()._outputs(visit, made)
        return ({} if self.reached else right), wrong


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


def _holds(event: Event) -> bool:
    """Whether Flax's value has other axes and every number of torch's, and some more: pairs of a
    grid for a list of edges, padding beside a packed sequence. A pool takes a fourth of them."""
    a, b = event.rough, event.given
    if a.ndim == b.ndim or not a.size < b.size < PART * a.size or not is_telling(a):
        return False
    near = max(event.judged.tolerance, _NEAR * float(np.abs(a).max()))
    return is_within(np.sort(a, None), np.sort(b, None), near)


def _looks_up(module: Any) -> bool:
    return flax_kind(module) == "embedding"
