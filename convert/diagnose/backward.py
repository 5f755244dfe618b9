"""The backward walk: every paired layer gets torch's own cotangents, and gives its gradients.

In one pass through Flax a gate stands at each input and output of each paired call. Forward it
puts in torch's value; backward it notes what reaches it and hands on torch's cotangent. So each
gradient is one step away from the reference, as values are in the forward walk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.diagnose.backward_torch import Cotangents, Place, backward
from convert.diagnose.divergence import Divergence, Judged
from convert.diagnose.hypotheses_gradient import Wrong, gradient
from convert.diagnose.matched import Matched
from convert.diagnose.reference import Reference
from convert.diagnose.walk import Forward
from convert.matching.alignment import Aligned, to_flax, to_torch
from convert.matching.pair import LayerPair, Pair
from convert.runtime.arrays import leaves, replaced, to_numpy
from convert.runtime.pure_module import FlaxModule
from convert.runtime.torch_module import replica
from convert.runtime.trace import Recorded, array_arguments, with_arguments
from zoo import probe


def first_backward(
    pair: Pair, reference: Reference, side: FlaxModule, walk: Forward, matched: Matched
) -> Divergence | None:
    """The first gradient that parts from torch's (see `_order`).

    `walk` is a forward walk that found nothing.
    """
    right = _torch(pair, reference, walk)
    if right is None:
        return None
    given = _flax(pair, side, right, matched)
    wrongs = (*right.cotangents(given), *right.gradients(given))
    for _, wrong in sorted(wrongs, key=_order):
        if not wrong.judged.same:
            return right.divergence(wrong, matched)
    return None


def _order(item: tuple[float, Wrong]) -> tuple[bool, float]:
    """Parameters before cotangents, which may only be summed up elsewhere: what makes a parameter's
    gradient stands in its own layer, the first of several alike."""
    moment, wrong = item
    return (False, moment) if wrong.where == "parameter" else (True, -moment)


def _torch(pair: Pair, reference: Reference, walk: Forward) -> _Right | None:
    """torch's passes; None if the model gives nothing to differentiate."""
    seeds = {
        k: probe.normal(f"cotangent.{k}", v.shape)
        for k, v in reference.trace.calls[0].outputs.items()
        if v.dtype.kind == "f"
    }
    if not seeds:
        return None
    names = {p.torch for p, _, _ in walk.aligned.values()}
    calls = {key: call for key, call in reference.calls.items() if call.name in names}
    ours = [replica(pair.torch, p) for p in ("float32", "float64")]
    rough = backward(ours[0], pair.call, "float32", calls, seeds)
    exact = backward(ours[1], pair.call, "float64", calls, seeds, rough.at)
    right = _Right(reference, walk, rough, exact)
    right.fold()
    return right


@dataclass
class _Right:
    """torch's backward pass, as it runs in float32 and, each of its steps, in float64."""

    reference: Reference
    walk: Forward
    rough: Cotangents
    exact: Cotangents

    def fold(self) -> None:
        """Where torch takes one value several times (query, key and value) and Flax once, the
        cotangents are summed up in the place that Flax has."""
        met = {(p.torch, index, a.torch)
               for (_, index, where, _), (p, a, _) in self.walk.aligned.items()
               if where == "in"}  # fmt: skip
        for call in self.reference.trace.calls:
            ours = [k for k in call.inputs if (*call.key, k) in met]
            for key, value in call.inputs.items():
                same = [k for k in ours if key not in ours
                        and np.array_equal(call.inputs[k], value)]  # fmt: skip
                for at in (self.rough.at, self.exact.at) if same else ():
                    place, extra = (*call.key, "in", same[0]), (*call.key, "in", key)
                    if extra in at:
                        at[place] = at.get(place, 0) + at.pop(extra)

    def value(self, place: Place, pair: LayerPair, a: Aligned) -> np.ndarray:
        """torch's value at one of Flax's places."""
        call = self.reference.calls[pair.torch, place[1]]
        return (call.inputs if place[2] == "in" else call.outputs)[a.torch]

    def cotangents(self, given: Cotangents) -> Iterator[tuple[float, Wrong]]:
        """Flax's cotangents beside torch's, each with its moment in the forward pass."""
        for place, value in given.at.items():
            name, index, where, key = place
            call = self.reference.calls[name, index]
            if (name == "" and where == "out") or self._chance(call, where):
                continue  # the seeds, or what a dropout drew
            zeros = np.zeros((call.inputs if where == "in" else call.outputs)[key].shape)
            ours, right = self.rough.at.get(place, zeros), self.exact.at.get(place, zeros)
            judged = self.reference.judge(ours, right, value)
            moment = call.order if where == "in" else call.end
            yield moment, Wrong(where, name, key, judged, right, value)

    def gradients(self, given: Cotangents) -> Iterator[tuple[float, Wrong]]:
        """Flax's gradients of parameters beside torch's, each with its layer's first moment."""
        exact = self.exact.parameters
        scale = max((np.abs(g).max(initial=0.0) for g in exact.values()), default=0.0)
        for name, value in given.parameters.items():
            if name not in self.rough.parameters:
                continue
            judged = self.reference.judge(self.rough.parameters[name], exact[name], value)
            # Some have no gradient but rounding (PITFALLS 32): judged by the others' scale.
            if np.abs(exact[name]).max(initial=0.0) < 1e-6 * scale:
                judged = Judged(judged.error, judged.noise, float(scale), self.reference.precision)
            owner = name.rpartition(".")[0]
            calls = [c for c in self.reference.trace.calls if c.name == owner]
            if any(self._chance(c, "in") for c in calls):
                continue
            moment = min((c.order for c in calls), default=0) + 0.5
            yield moment, Wrong("parameter", owner, name, judged, exact[name], value)

    def _chance(self, call: Recorded, where: str) -> bool:
        """Whether chance plays a part in this step: in the layer itself, or, after it, in the code
        around it."""
        calls, random = self.reference.trace.calls, self.reference.random
        order = call.order if where == "in" else call.parent
        within = [c for c in calls if c.order == order]
        inside = [c for c in calls if c.parent == order]
        drawn = [v for c in inside for v in random.get(c.key, ()) if v.startswith("in:")]
        return bool(drawn or any(random.get(c.key) for c in within))

    def divergence(self, wrong: Wrong, matched: Matched) -> Divergence:
        """The layer at fault, and why."""
        layer, between = wrong.layer, None
        if wrong.where == "out":  # made by the code between this layer and those after it
            between = wrong.layer, self._next(wrong.layer)
            layer = self._container(wrong.layer) or wrong.layer
        others = {f"{n} {w} {k}".strip(): v for (n, _, w, k), v in self.rough.at.items()}
        pair = next((p for p in self.walk.pairs.values() if p.torch == layer), None)
        return Divergence.of(
            layer,
            gradient(wrong, self.reference, others, matched.copies()),
            wrong.judged,
            direction="backward",
            flax_layer=pair.flax if pair else None,
            between=between,
            tensor=wrong.key if wrong.where == "parameter" else None,
        )

    def _next(self, name: str) -> str:
        """The paired layer that runs after this one."""
        calls = self.reference.trace.calls
        end = max(c.end for c in calls if c.name == name)
        paired = {p.torch for p in self.walk.pairs.values()}
        return next((c.name for c in calls if c.order > end and c.name in paired), "the output")

    def _container(self, name: str) -> str:
        """The innermost paired module around a layer."""
        paired = {p.torch for p in self.walk.pairs.values()}
        by_order = {c.order: c for c in self.reference.trace.calls}
        parent = next(c.parent for c in by_order.values() if c.name == name)
        while parent is not None and by_order[parent].name not in paired:
            parent = by_order[parent].parent
        return "" if parent is None else by_order[parent].name


def _flax(pair: Pair, side: FlaxModule, right: _Right, matched: Matched) -> Cotangents:
    """Flax's pass, its cotangents and gradients as torch lays them out."""
    import jax
    import jax.numpy as jnp

    places = right.walk.aligned
    floats = {n: v for n, v in side.values.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    rest = {n: v for n, v in side.values.items() if n not in floats}

    with side.precise():
        args, kwargs = side.arguments(pair.flax_call)
        probes = {p: jnp.zeros(given.shape, given.dtype) for p, (_, _, given) in places.items()}

        def loss(values: Any, probes: Any) -> Any:
            run = _Gated(right, probes)
            output, _ = side({**values, **rest}, args, kwargs, run.around)
            made = leaves(output)
            return sum((v.sum() for k, v in made.items() if ("", 0, "out", k) in places), 0.0)

        of_values, of_probes = jax.jit(jax.grad(loss, argnums=(0, 1)))(floats, probes)
    found = Cotangents()
    for place, cotangent in of_probes.items():
        layer, a, _ = places[place]
        there = (layer.torch, place[1], place[2], a.torch)
        shape = right.value(place, layer, a).shape
        found.at[there] = to_torch(to_numpy(cotangent), a.move, shape)
    for m in matched.matches:
        if all(n in of_values for n in m.flax):
            made = matched.to_torch(m, [to_numpy(of_values[n]) for n in m.flax])
            for name, value in zip(m.torch, made, strict=True):
                # Of several copies in Flax the first: each has a part of torch's gradient.
                found.parameters.setdefault(matched.names[matched.ids[name]][0], value)
    return found


class _Gated:
    """Puts a gate at every aligned input and output."""

    def __init__(self, right: _Right, probes: dict[Any, Any]) -> None:
        self.right, self.probes = right, probes
        self.counts: dict[str, int] = {}

    def around(self, path: str, module: Any, proceed: Any, args: Any, kwargs: Any) -> Any:
        """The call with its gates."""
        if path not in self.right.walk.pairs or path not in self.right.walk.counts:
            return proceed(*args, **kwargs)
        index = self.counts.get(path, 0)
        self.counts[path] = index + 1
        function = type(module).__call__
        given = array_arguments(function, (module, *args), kwargs)
        values = self._gates((path, index, "in"), given)
        args, kwargs = with_arguments(function, (module, *args), kwargs, values)
        output = proceed(*args[1:], **kwargs)
        return replaced(output, self._gates((path, index, "out"), leaves(output)))

    def _gates(self, call: tuple[str, int, str], values: dict[str, Any]) -> dict[str, Any]:
        made = {}
        for key, x in values.items():
            place = (*call, key)
            if place not in self.right.walk.aligned:
                continue
            pair, a, _ = self.right.walk.aligned[place]
            there = (pair.torch, place[1], place[2], a.torch)
            cotangents = self.right.rough.at
            if there not in cotangents and not _differentiated(x):
                continue  # a constant on both sides
            value = self.right.value(place, pair, a)
            cotangent = cotangents.get(there, np.zeros(value.shape))
            moved = [to_flax(v, a.move, x.shape) for v in (value, cotangent)]
            made[key] = _gate(x, self.probes[place], *moved)
        return made


def _differentiated(x: Any) -> bool:
    """Whether x depends on what is differentiated: JAX then has it in a tracer of derivatives."""
    return type(x).__name__ in ("JVPTracer", "LinearizeTracer")


def _gate(x: Any, probe: Any, value: np.ndarray, cotangent: np.ndarray) -> Any:
    """`value` forward; backward, `cotangent` for x, and what came for `probe`."""
    import jax
    import jax.numpy as jnp

    @jax.custom_vjp
    def gate(x: Any, probe: Any) -> Any:
        return jnp.asarray(value).astype(x.dtype)

    def forward(x: Any, probe: Any) -> Any:
        return gate(x, probe), jnp.zeros((), x.dtype)

    def back(like: Any, arrived: Any) -> Any:
        return jnp.asarray(cotangent).astype(like.dtype), arrived.astype(probe.dtype)

    gate.defvjp(forward, back)
    return gate(x, probe)
