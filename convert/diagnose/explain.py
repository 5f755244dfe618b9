"""From the first value that is wrong to the layer at fault and the cause."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from convert.diagnose.case import Case, Rule, first
from convert.diagnose.causes import CAUSES, Reason, found
from convert.diagnose.divergence import Divergence
from convert.diagnose.hypotheses_attention import attention
from convert.diagnose.hypotheses_chain import replay
from convert.diagnose.hypotheses_layers import (
    convolution,
    embedding,
    linear,
    transposed_convolution,
)
from convert.diagnose.hypotheses_norm import norm
from convert.diagnose.hypotheses_pool import pooling
from convert.diagnose.hypotheses_recurrent import recurrent
from convert.diagnose.hypotheses_values import CERTAIN, LIKELY, low_precision, values
from convert.diagnose.matched import Matched
from convert.diagnose.reference import Reference
from convert.diagnose.walk import Event
from convert.judge.rows import FLOOR
from convert.matching.alignment import align, best_move, moves, to_flax, to_torch
from convert.matching.pair import LayerPair
from convert.matching.pairing import Pairing
from convert.runtime.flax_calls import attributes
from convert.runtime.pure_module import FlaxModule
from convert.runtime.trace import Recorded
from zoo.layout.kinds import flax_kind, torch_kind

LOG = logging.getLogger(__name__)
_RULES: dict[str, Rule] = {
    "linear": linear, "embedding": embedding, "norm": norm, "batchnorm": norm,
    "conv1d": convolution, "conv2d": convolution, "conv3d": convolution,
    "conv_transpose": transposed_convolution, "recurrent": recurrent, "attention": attention,
}  # fmt: skip
_WEAK = 50  # times the tolerance
_NEAREST = 24  # values before the fault that a hypothesis may start from


class Explainer:
    """Makes a Divergence of an event. `sure`: only of one whose cause is found."""

    def __init__(
        self, reference: Reference, side: FlaxModule, pairing: Pairing, matched: Matched, sure: bool
    ) -> None:
        self.reference, self.side, self.pairing = reference, side, pairing
        self.matched, self.sure = matched, sure
        self.paired = pairing.of_torch()
        self.first: tuple[Event, Divergence] | None = None  # what it was asked about first
        self.weak: tuple[Event, Divergence] | None = None  # a first one that is hardly one
        self.guessed = False  # whether that one's cause is of a rule that knows only torch's layers
        self._guessing = False

    def __call__(self, event: Event) -> Divergence | None:
        """The divergence, or None where it cannot be told from rounding inside the layer."""
        within = event.where in ("output", "raises") and not self._children(event.pair)
        try:
            divergence = self._layer(event) if within else self._between(event)
        except Exception:  # the place is known, whatever the cause
            LOG.debug("explaining %s of %s", event.where, event.pair.torch, exc_info=True)
            divergence = self._place(event, within)
        nameless = divergence.cause == "unknown"
        if nameless and event.judged.error <= _WEAK * event.judged.tolerance:
            # Rounding beyond its measure (sines of large numbers), or a fault that grows.
            self.weak = self.weak or (event, divergence)
            return None
        if self.first is None:
            self.first, self.guessed = (event, divergence), self._guessing
        return None if nameless and self.sure else divergence

    def case(self, reference: Reference, event: Event) -> Case:
        """What there is to explain, beside another reference's values."""
        return Explainer(reference, self.side, self.pairing, self.matched, False)._case(event, [])

    def flax_of(self, layer: str) -> str | None:
        """Flax's path of a torch layer, where it has one."""
        pair = self.paired.get(layer)
        return pair.flax if pair else None

    def _place(self, event: Event, within: bool) -> Divergence:
        """Where it is, without a cause."""
        if within:
            return self._divergence(event, event.pair.torch or self._last(event), None, None)
        return self._divergence(event, self._holding(event), None, self._neighbours(event))

    def _holding(self, event: Event) -> str:
        """The module whose code between two layers makes the event."""
        if made := self._producer(event) or self._common(event):
            return made
        container = event.visit.around if event.where == "input" else event.pair
        if container is not None:
            return container.torch
        return event.pair.torch if event.where == "input" else self._last(event)

    def _producer(self, event: Event) -> str | None:
        """torch's module without a counterpart that gave the value which is wrong in Flax."""
        if event.where != "input" or event.rough.size < 2:
            return None
        done = [c for c in self.reference.trace.calls if 0 < c.end < event.call.order]
        for c in sorted(done, key=lambda c: -c.end):
            same = (x for x in c.outputs.values() if x.shape == event.rough.shape)
            if any(np.array_equal(x, event.rough) for x in same):
                return c.name if c.name and c.name not in self.paired else None
        return None

    def _common(self, event: Event) -> str | None:
        """The innermost of torch's modules around a wrong input and the last value before it."""
        if event.where != "input":
            return None
        name = event.visit.around.torch if event.visit.around else ""
        inside = [n for n in event.past if self._under(n, name)]
        calls = self.reference.trace.calls
        ended = [c for c in calls if inside and c.name == inside[-1] and c.end < event.call.order]
        by_order = {c.order: c for c in calls}
        parent = event.call.parent if ended else None
        while parent is not None:
            call = by_order[parent]
            if call.order < ended[-1].order:
                return call.name
            parent = call.parent
        return None

    # --- A layer's own fault ---

    def _layer(self, event: Event) -> Divergence:
        name = event.pair.torch
        reason = first(partial(self.matched.of_layer, name, event.pair.flax))
        if reason is None and event.where == "raises":
            reason = self._raised(event)
        elif reason is None:
            case = self._case(event, self._inputs(event))
            rules = [_RULES[kind]] if (kind := self._kind(name)) in _RULES else []
            reason = first(*(partial(rule, case) for rule in rules))
            reason = reason or self._general(case, event)
            self._guessing = torch_kind(self.reference.modules[name]) == "other"
        return self._divergence(event, name or self._last(event), reason, None)

    def _general(self, case: Case, event: Event) -> Reason | None:
        case.past += self._nearest(event, inside=event.pair.torch)
        rules: tuple[Rule, ...] = (low_precision, attention, pooling, values)
        return first(*(partial(rule, case) for rule in rules))

    def _raised(self, event: Event) -> Reason:
        return found("raises", message=event.message)

    # --- The code between layers ---

    def _between(self, event: Event) -> Divergence:
        container = event.visit.around if event.where == "input" else event.pair
        name = container.torch if container is not None else ""
        reason = first(partial(self.matched.unverified, name, event.past, self.paired))
        if reason is not None and reason.tensor is not None:
            owner = self.matched.owner(reason.tensor)
            return self._divergence(event, owner, reason, None)
        if event.where == "input" and not self._children(event.pair):
            own = first(partial(self.matched.of_layer, event.pair.torch, event.pair.flax))
            if own is not None:  # what it gets may lie otherwise: one side pads before it
                return self._divergence(event, event.pair.torch, own, None)
        between = self._neighbours(event)
        if event.where == "raises":
            layer = name or self._last(event)
            return self._divergence(event, layer, self._raised(event), between)
        case = self._case(event, [])
        case.module = self.reference.modules[name]
        chained = first(partial(replay, self.reference, self._skipped(event), case))
        if chained is not None:
            return self._divergence(event, *chained, between)
        case.call = self._open_call(name, event) or event.call
        case.past += self._nearest(event, inside=name)
        case.flax = attributes(self.side.modules[container.flax]) if container else {}
        reason = first(partial(self._ordered, event), partial(values, case, CERTAIN))
        self._guessing = reason is None or reason.cause in ("heads", "rearranged")
        reason = reason or first(
            partial(pooling, case),
            partial(attention, case),
            partial(values, case, LIKELY),
        )
        layer = self._unpaired(event, reason) or self._holding(event)
        return self._divergence(event, layer, reason, between)

    def _ordered(self, event: Event) -> Reason | None:
        """Flax calls a normalisation before the layer whose result torch normalises, or after."""
        if event.where != "input":
            return None
        name = event.visit.around.torch if event.visit.around else ""
        inside = [c.name for c in self.reference.trace.calls if self._under(c.name, name)]
        position = inside.index(event.pair.torch) if event.pair.torch in inside else 0
        ended = [n for n in inside[:position] if not self._under(event.pair.torch, n)]
        before = [n for n in ended if n in self.paired and n not in event.past
                  and self._kind(n) != "other"]  # fmt: skip
        kinds = {self._kind(n) for n in (event.pair.torch, *before[-1:])}
        if before and kinds & {"norm", "batchnorm"}:
            return found("norm_order", layer=event.pair.torch, other=before[0])
        for call in self.reference.trace.calls:
            given = any(np.array_equal(x, event.rough) for x in call.outputs.values())
            later = event.past.count(call.name) <= call.index and call.name in self.paired
            if given and later and 0 < call.end < event.call.order:
                return found("order", layer=event.pair.torch, other=call.name)
        return None

    def _unpaired(self, event: Event, reason: Reason | None) -> str | None:
        """torch's own layer without a counterpart that ran just before the value went wrong, where
        the cause is one of such a layer's."""
        between = [c.name for c in self._skipped(event)]
        wanted = CAUSES[reason.cause].layer if reason else None
        return next((n for n in between if self._kind(n) == wanted), None)

    def _open_call(self, name: str, event: Event) -> Recorded | None:
        """The call of a container in which the event happens."""
        at = event.call.order
        return next(
            (c for c in self.reference.trace.calls if c.name == name and c.order <= at <= c.end),
            None,
        )

    def _skipped(self, event: Event) -> list[Recorded]:
        """Calls of torch's own layers without a counterpart, since the last paired one ended."""
        end = event.call.order if event.where == "input" else event.call.end
        start = max(
            (
                c.end
                for c in self.reference.trace.calls
                if c.name in self.paired and 0 < c.end < end
            ),
            default=0,
        )
        return [
            c
            for c in self.reference.trace.calls
            if start < c.order < end and c.end <= end and c.name not in self.paired
            and self._kind(c.name) != "other"
        ]  # fmt: skip

    # --- What a hypothesis gets ---

    def _case(self, event: Event, past: list[tuple[str, np.ndarray]]) -> Case:
        j = event.judged
        given = event.given.astype(np.float64)
        targets = [given]
        if given.shape != event.rough.shape and given.ndim >= 3:
            targets.append(np.moveaxis(given, -1, 1))
        if event.raw is not None and event.rough.ndim >= 4 and event.pair.torch:
            # As many channels as rows and columns: a wrong value does not tell how its axes lie.
            for move in moves(event.rough.shape, event.raw.shape):
                other = to_torch(event.raw, move, event.rough.shape).astype(np.float64)
                if not any(np.array_equal(other, t, equal_nan=True) for t in targets):
                    targets.append(other)
        scale = max(j.scale, float(np.abs(given[np.isfinite(given)]).max(initial=0.0)))
        tolerance = max(
            j.tolerance, 8 * FLOOR * scale if self.reference.precision == "float32" else 0
        )
        if np.isfinite(j.error):
            tolerance = min(tolerance, j.error / 3)
        module = self.reference.modules[event.pair.torch] if event.where == "output" else None
        case = Case(
            targets, event.exact.astype(np.float64), tolerance, self._kind(event.pair.torch),
            module, event.call, event.key, past=past, masks=self._masks(event),
        )  # fmt: skip
        if event.where == "output":
            case.flax = attributes(event.visit.flax_module)
            case.rerun = self._rerun(event)
        return case

    def _rerun(self, event: Event) -> Any:
        pairs = align(event.call.inputs, event.visit.flax_inputs)
        if event.visit.again is None or event.given.shape != event.rough.shape:
            return None

        def rerun(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
            new = {
                a.flax: to_flax(inputs[a.torch], a.move, event.visit.flax_inputs[a.flax].shape)
                for a in pairs
                if a.torch in inputs
            }
            made = event.visit.again(new)  # type: ignore[misc]
            if not moves(event.rough.shape, made.shape):
                return made.astype(np.float64)
            move = best_move(event.rough, made)
            return to_torch(made, move, event.rough.shape).astype(np.float64)

        return rerun

    def _inputs(self, event: Event) -> list[tuple[str, np.ndarray]]:
        floats = {k: v for k, v in event.call.inputs.items() if v.dtype.kind == "f"}
        return [("its input" if len(floats) == 1 else f"its input {k}", v.astype(np.float64))
                for k, v in floats.items()]  # fmt: skip

    def _nearest(self, event: Event, inside: str) -> list[tuple[str, np.ndarray]]:
        """Values of torch before the fault, the latest first; containers' inputs after them."""
        end = event.call.order if event.where == "input" else event.call.end
        found: list[tuple[str, np.ndarray]] = []
        done = [c for c in self.reference.trace.calls if 0 < c.end < end]
        for c in sorted(done, key=lambda c: -c.end)[:_NEAREST]:
            found += [(f"{c.name} {k}".strip(), v) for k, v in c.outputs.items()]
        open_calls = [c for c in self.reference.trace.calls if c.order <= end <= c.end]
        for c in reversed(open_calls):
            if event.where == "input" and c is event.call:
                continue
            found += [(f"the input {k} of {c.name or 'the model'}", v) for k, v in c.inputs.items()]
        return [(n, v.astype(np.float64)) for n, v in found if v.dtype.kind == "f"]

    def _masks(self, event: Event) -> list[tuple[str, np.ndarray]]:
        end = event.call.order if event.where == "input" else event.call.end
        found = {}
        for c in self.reference.trace.calls:
            if c.order <= end <= c.end or c is event.call:
                for k, v in c.inputs.items():
                    binary = v.dtype.kind in "biu" and set(np.unique(v)) <= {0, 1}
                    if 1 < v.ndim <= 4 and (binary or (v.dtype.kind == "f" and (v <= -1e4).any())):
                        found[k] = v
        return list(found.items())

    # --- Names ---

    def _kind(self, name: str) -> str:
        module = self.reference.modules[name]
        kind = torch_kind(module)
        if kind == "other" and name in self.paired:  # one's own class over a known one
            kind = flax_kind(self.side.modules.get(self.paired[name].flax))
            kind = kind if kind in ("norm", "embedding", "attention") else "other"
            named = [b.__name__ for b in type(module).__mro__]
            kind = "norm" if any(n.endswith("Norm") for n in named) else kind
        return kind

    def _children(self, pair: LayerPair) -> list[str]:
        return [n for n in self.paired if n != pair.torch and self._under(n, pair.torch)
                and n in self.reference.order]  # fmt: skip

    @staticmethod
    def _under(name: str, parent: str) -> bool:
        return not parent or name.startswith(f"{parent}.")

    def _last(self, event: Event) -> str:
        return event.past[-1] if event.past else event.pair.torch

    def _neighbours(self, event: Event) -> tuple[str, str] | None:
        name = (
            (event.visit.around.torch if event.visit.around else "")
            if event.where == "input"
            else event.pair.torch
        )
        inside = [n for n in event.past if self._under(n, name)]
        if inside:
            before = self._outermost(inside[-1], name)
        else:
            before = event.past[-1] if event.past else "the input"
        after = event.pair.torch if event.where == "input" else self._next(event.call)
        return before, after

    def _next(self, call: Recorded) -> str:
        """The paired layer that torch calls after this call has ended."""
        later = (c.name for c in self.reference.trace.calls if c.order > call.end)
        return next((n for n in later if n in self.paired), "the output")

    def _outermost(self, name: str, inside: str) -> str:
        """The paired module directly inside `inside` that holds `name`."""
        holding = [n for n in self.paired if n and self._under(n, inside) and n != inside
                   and (name == n or self._under(name, n))]  # fmt: skip
        return min(holding, key=len, default=name)

    def _divergence(
        self,
        event: Event,
        layer: str,
        reason: Reason | None,
        between: tuple[str, str] | None,
    ) -> Divergence:
        reason = reason or self._unknown(event, between)
        pair = self.paired.get(layer)
        flax = pair.flax if pair else None
        return Divergence.of(layer, reason, event.judged, flax_layer=flax, between=between)

    def _unknown(self, event: Event, between: tuple[str, str] | None) -> Reason:
        if event.given.shape != event.rough.shape:
            return found("shape", torch=event.rough.shape, flax=event.given.shape)
        if between is None:
            return found("unknown", "layer")
        return found("unknown", "between", before=between[0], after=between[1])
