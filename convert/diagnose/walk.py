"""The forward walk: Flax runs once, and every paired call gets torch's own inputs.

What a paired call gives is compared with what torch's gave for the same inputs, and then replaced
by it. So each value is one step away from the reference: an error at a call's output is that
call's own, and an error at a call's input is made by the code of the module around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convert.diagnose.reference import Judged, Reference
from convert.matching.alignment import Aligned, align, to_flax, to_torch
from convert.matching.pair import LayerPair
from convert.matching.pairing import Pairing
from convert.runtime.arrays import leaves, replaced, to_numpy
from convert.runtime.call import Call
from convert.runtime.flax_calls import traced
from convert.runtime.flax_module import FlaxModule
from convert.runtime.trace import Recorded, array_arguments, with_arguments
from zoo.layout.kinds import flax_kind, torch_kind


@dataclass
class Event:
    """A value that is not what it should be; arrays have torch's axes."""

    where: str  # "input", "output", "statistics", "raises", "shape"
    pair: LayerPair  # whose input or output
    call: Recorded  # torch's
    key: str  # which of its arrays
    judged: Judged
    rough: np.ndarray  # torch's value
    exact: np.ndarray  # the same in float64
    given: np.ndarray  # Flax's value
    flax_module: Any = None
    flax_inputs: dict[str, np.ndarray] = field(default_factory=dict)
    around: LayerPair | None = None  # the innermost paired module around it
    message: str = ""  # of what was raised
    again: Callable[[dict[str, np.ndarray]], np.ndarray] | None = None  # Flax's, other inputs
    past: list[str] = field(default_factory=list)  # torch names of paired calls that have ended
    raw: np.ndarray | None = None  # Flax's value with its own axes


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
        self.values_after: dict[str, Any] = {}
        # (Flax path, index of the call, "in" or "out", name of the array) -> its counterpart
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
                return stop.found
        return None

    def _around(self, path: str, module: Any, proceed: Any, args: Any, kwargs: Any) -> Any:
        function = type(module).__call__
        given = array_arguments(function, (module, *args), kwargs)
        pair = self.pairs.get(path)
        if pair is None or traced(given):
            return proceed(*args, **kwargs)
        index = self.counts.get(path, 0)
        self.counts[path] = index + 1
        call = self.reference.calls.get((pair.torch, index))
        if call is None:  # torch calls it less often: nothing to compare with
            return proceed(*args, **kwargs)
        arrays = {k: to_numpy(v) for k, v in given.items()}
        forced = self._inputs(pair, call, module, arrays)
        values = {k: _like(v, given[k]) for k, v in forced.items()}
        all_args, kwargs = with_arguments(function, (module, *args), kwargs, values)
        args = all_args[1:]
        self.stack.append(pair)
        try:
            output = proceed(*args, **kwargs)
        except Stop:
            raise
        except Exception as e:
            event = self._event("raises", pair, call, "", None, None, module)
            event.message = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
            event.flax_inputs = arrays | forced
            self._tell(event)
            raise
        finally:
            self.stack.pop()

        def again(inputs: dict[str, np.ndarray]) -> np.ndarray:
            new = {k: _like(v, given[k]) for k, v in inputs.items()}
            other, keywords = with_arguments(function, (module, *args), kwargs, new)
            made = leaves(proceed(*other[1:], **keywords))
            return to_numpy(next(iter(made.values())))

        made = leaves(output)
        right = self._outputs(pair, call, module, made, arrays | forced, again)
        self.past.append(pair.torch)
        return replaced(output, {k: _like(v, made[k]) for k, v in right.items()})

    def _inputs(
        self, pair: LayerPair, call: Recorded, module: Any, arrays: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """torch's own inputs as Flax has them, each compared with what Flax made of it."""
        forced: dict[str, np.ndarray] = {}
        for a in align(call.inputs, arrays):
            right, given = call.inputs[a.torch], arrays[a.flax]
            if right.dtype.kind != "f" and not (right.dtype.kind in "iu" and _looks_up(module)):
                continue  # masks and lengths may be meant otherwise: the output tells
            event = self._event("input", pair, call, a.torch, a, given, module)
            if not self.stack:  # the model's own inputs are the caller's to choose
                self._aligned("in", pair, call, a, given)
                continue
            if not event.judged.same and f"in:{a.torch}" not in self._random(call):
                event.flax_inputs = arrays
                self._tell(event)
            forced[a.flax] = to_flax(right, a.move, given.shape)
            self._aligned("in", pair, call, a, given)
        unmet = [k for k, v in call.inputs.items() if v.dtype.kind == "f"]
        if (
            self.stack
            and unmet
            and not forced
            and _has_floats(arrays)
            and _is_leaf(self.reference, pair)
        ):
            theirs = next(v for v in arrays.values() if v.dtype.kind == "f")
            event = self._event("input", pair, call, unmet[0], None, theirs, module)
            event.flax_inputs = arrays
            self._tell(event)
        return forced

    def _outputs(
        self,
        pair: LayerPair,
        call: Recorded,
        module: Any,
        made: dict[str, Any],
        inputs: dict[str, np.ndarray],
        again: Any,
    ) -> dict[str, np.ndarray]:
        """torch's own outputs as Flax has them, each compared with what Flax gave."""
        arrays = {k: to_numpy(v) for k, v in made.items()}
        right: dict[str, np.ndarray] = {}
        pairs = align(call.outputs, arrays)
        for a in pairs:
            event = self._event("output", pair, call, a.torch, a, arrays[a.flax], module)
            event.flax_inputs, event.again = inputs, again
            if not event.judged.same and f"out:{a.torch}" not in self._random(call):
                self._tell(event)
            right[a.flax] = to_flax(call.outputs[a.torch], a.move, arrays[a.flax].shape)
            self._aligned("out", pair, call, a, arrays[a.flax])
        whole = not self.stack or _is_leaf(self.reference, pair)
        if not pairs and call.outputs and arrays and whole:
            key = next(iter(call.outputs))
            event = self._event(
                "output", pair, call, key, None, next(iter(arrays.values())), module
            )
            event.flax_inputs = inputs
            self._tell(event)
        return right

    def _event(
        self,
        where: str,
        pair: LayerPair,
        call: Recorded,
        key: str,
        aligned: Aligned | None,
        given: np.ndarray | None,
        module: Any,
    ) -> Event:
        side = "inputs" if where == "input" else "outputs"
        key = key if where != "raises" else next(iter(call.outputs), "")
        empty = np.zeros(0)
        rough = getattr(call, side).get(key, empty)
        exact = getattr(self.reference.exact_call(call), side).get(key, empty)
        raw = given
        if given is None:
            given = np.zeros(0)
        elif aligned is not None:
            given = to_torch(given, aligned.move, rough.shape)
        judged = self.reference.judge(rough, exact, given)
        around = self.stack[-1] if self.stack else None
        return Event(
            where, pair, call, key, judged, rough, exact, given, module, {}, around,
            past=list(self.past), raw=raw,
        )  # fmt: skip

    def _aligned(
        self, where: str, pair: LayerPair, call: Recorded, a: Aligned, given: np.ndarray
    ) -> None:
        if given.dtype.kind == "f":
            self.aligned[pair.flax, call.index, where, a.flax] = pair, a, given

    def _tell(self, event: Event) -> None:
        try:
            found = self.explain(event)
        except Exception as e:
            raise Failed(e) from e
        if found is not None:
            raise Stop(found)

    def _random(self, call: Recorded) -> set[str]:
        return self.reference.random.get(call.key, set())


def _like(value: np.ndarray, given: Any) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(value).astype(given.dtype)


def _looks_up(module: Any) -> bool:
    return flax_kind(module) == "embedding"


def _has_floats(arrays: dict[str, np.ndarray]) -> bool:
    return any(v.dtype.kind == "f" for v in arrays.values())


def _is_leaf(reference: Reference, pair: LayerPair) -> bool:
    return torch_kind(reference.modules[pair.torch]) != "other"
