"""The backward walk: every paired layer gets torch's own cotangents, and gives its gradients.

In one pass through Flax a gate stands at each input and output of each paired call. Forward it
puts in torch's value; backward it notes what reaches it and hands on torch's cotangent. So each
gradient is one step away from the reference, as values are in the forward walk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from convert.diagnose.backward_torch import Cotangents, backward
from convert.diagnose.divergence import Divergence
from convert.diagnose.hypotheses_gradient import Wrong, gradient
from convert.diagnose.matched import Matched
from convert.diagnose.reference import Judged, Reference
from convert.diagnose.walk import Forward
from convert.matching.alignment import Aligned, to_flax, to_torch
from convert.matching.pair import LayerPair, Pair
from convert.runtime.arrays import leaves, replaced, to_numpy
from convert.runtime.flax_module import FlaxModule
from convert.runtime.torch_module import replica
from convert.runtime.trace import Recorded, array_arguments, with_arguments
from zoo import probe


def first_backward(
    pair: Pair, reference: Reference, side: FlaxModule, walk: Forward, matched: Matched
) -> Divergence | None:
    """The first gradient, against the order of execution, that parts from torch's.

    `walk` is a forward walk that found nothing.
    """
    trace = reference.trace
    root = trace.calls[0]
    seeds = {
        k: probe.normal(f"cotangent.{k}", v.shape)
        for k, v in root.outputs.items()
        if v.dtype.kind == "f"
    }
    if not seeds:
        return None
    names = {p.torch for p, _, _ in walk.aligned.values()}
    ours = [replica(pair.torch, p) for p in ("float32", "float64")]
    rough = backward(ours[0], pair.call, "float32", trace, seeds, names)
    exact = backward(ours[1], pair.call, "float64", trace, seeds, names, rough.at)
    _fold(reference, walk, rough, exact)
    given = _flax(pair, reference, side, walk, rough, matched)
    for wrong in _wrongs(reference, walk, rough, exact, given, matched):
        if not wrong.judged.same:
            return _divergence(reference, walk, wrong, rough)
    return None


def _flax(
    pair: Pair,
    reference: Reference,
    side: FlaxModule,
    walk: Forward,
    rough: Cotangents,
    matched: Matched,
) -> Cotangents:
    """Flax's pass, its cotangents and gradients as torch lays them out."""
    import jax
    import jax.numpy as jnp

    places = walk.aligned
    floats = {n: v for n, v in side.values.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    rest = {n: v for n, v in side.values.items() if n not in floats}

    with side.precise():
        args, kwargs = side.arguments(pair.flax_call)
        probes = {p: jnp.zeros(given.shape, given.dtype) for p, (_, _, given) in places.items()}

        def loss(values: Any, probes: Any) -> Any:
            run = _Gated(reference, walk, rough, probes)
            output, _ = side({**values, **rest}, args, kwargs, run.around)
            made = leaves(output)
            return sum((v.sum() for k, v in made.items() if ("", 0, "out", k) in places), 0.0)

        of_values, of_probes = jax.jit(jax.grad(loss, argnums=(0, 1)))(floats, probes)
    found = Cotangents()
    for place, cotangent in of_probes.items():
        layer, a, _ = places[place]
        right = _value(reference, layer, place, a)
        there = (layer.torch, place[1], place[2], a.torch)
        found.at[there] = to_torch(to_numpy(cotangent), a.move, right.shape)
    for m in matched.matches:
        if all(n in of_values for n in m.flax):
            made = matched.to_torch(m, [to_numpy(of_values[n]) for n in m.flax])
            for name, value in zip(m.torch, made, strict=True):
                # What torch has once and Flax twice: torch's gradient is the sum of both.
                first = matched.names[matched.ids[name]][0]
                found.parameters[first] = found.parameters.get(first, 0) + value
    return found


def _fold(reference: Reference, walk: Forward, *passes: Cotangents) -> None:
    """Where torch takes one value several times (query, key and value) and Flax once, the
    cotangents are summed up in the place that Flax has."""
    met = {(p.torch, index, a.torch) for (_, index, where, _), (p, a, _) in walk.aligned.items()
           if where == "in"}  # fmt: skip
    for call in reference.trace.calls:
        ours = [k for k in call.inputs if (*call.key, k) in met]
        for key, value in call.inputs.items():
            same = [k for k in ours if key not in ours and np.array_equal(call.inputs[k], value)]
            if not same:
                continue
            for cotangents in passes:
                at = cotangents.at
                place, extra = (*call.key, "in", same[0]), (*call.key, "in", key)
                if extra in at:
                    at[place] = at.get(place, 0) + at.pop(extra)


class _Gated:
    """Puts a gate at every aligned input and output."""

    def __init__(
        self, reference: Reference, walk: Forward, rough: Cotangents, probes: dict[Any, Any]
    ) -> None:
        self.reference, self.walk, self.rough, self.probes = reference, walk, rough, probes
        self.counts: dict[str, int] = {}

    def around(self, path: str, module: Any, proceed: Any, args: Any, kwargs: Any) -> Any:
        """The call with its gates."""
        if path not in self.walk.pairs or path not in self.walk.counts:
            return proceed(*args, **kwargs)
        index = self.counts.get(path, 0)
        self.counts[path] = index + 1
        function = type(module).__call__
        given = array_arguments(function, (module, *args), kwargs)
        values = self._gates(path, index, "in", given)
        args, kwargs = with_arguments(function, (module, *args), kwargs, values)
        output = proceed(*args[1:], **kwargs)
        return replaced(output, self._gates(path, index, "out", leaves(output)))

    def _gates(self, path: str, index: int, where: str, values: dict[str, Any]) -> dict[str, Any]:
        made = {}
        for key, x in values.items():
            place = (path, index, where, key)
            if place not in self.walk.aligned:
                continue
            pair, a, _ = self.walk.aligned[place]
            there = (pair.torch, index, where, a.torch)
            if there not in self.rough.at and not _differentiated(x):
                continue  # a constant on both sides
            right = _value(self.reference, pair, place, a)
            cotangent = self.rough.at.get(there, np.zeros(right.shape))
            moved = [to_flax(v, a.move, x.shape) for v in (right, cotangent)]
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


def _value(
    reference: Reference, pair: LayerPair, place: tuple[str, int, str, str], a: Aligned
) -> np.ndarray:
    call = reference.calls[pair.torch, place[1]]
    return (call.inputs if place[2] == "in" else call.outputs)[a.torch]


def _wrongs(
    reference: Reference,
    walk: Forward,
    rough: Cotangents,
    exact: Cotangents,
    given: Cotangents,
    matched: Matched,
) -> Iterator[Wrong]:
    """Every gradient, the last of the forward pass first."""
    moments: list[tuple[float, Wrong]] = []
    for place, value in given.at.items():
        name, index, where, key = place
        call = reference.calls[name, index]
        side = call.inputs if where == "in" else call.outputs
        zeros = np.zeros(side[key].shape)
        ours, right = rough.at.get(place, zeros), exact.at.get(place, zeros)
        if (name == "" and where == "out") or _chance(reference, call, where):
            continue  # the seeds, or what a dropout drew
        judged = reference.judge(ours, right, value)
        when = call.order if where == "in" else call.end
        moments.append((when, Wrong(where, name, key, judged, right, value)))
    scale = max((np.abs(g).max(initial=0.0) for g in exact.parameters.values()), default=0.0)
    for name, value in given.parameters.items():
        if name not in rough.parameters:
            continue
        judged = reference.judge(rough.parameters[name], exact.parameters[name], value)
        # Some have no gradient but rounding (PITFALLS 32): those are judged by the others' scale.
        if np.abs(exact.parameters[name]).max(initial=0.0) < 1e-6 * scale:
            judged = Judged(judged.error, judged.noise, float(scale), reference.precision)
        owner = name.rpartition(".")[0]
        called = [c for c in reference.trace.calls if c.name == owner]
        if any(_chance(reference, c, "in") for c in called):
            continue
        first = min((c.order for c in reference.trace.calls if c.name == owner), default=0)
        wrong = Wrong("parameter", owner, name, judged, exact.parameters[name], value)
        moments.append((first + 0.5, wrong))
    yield from (w for _, w in sorted(moments, key=lambda m: -m[0]))


def _chance(reference: Reference, call: Recorded, where: str) -> bool:
    """Whether chance plays a part in this step: in the layer itself, or, after it, in the code
    around it."""
    order = call.order if where == "in" else call.parent
    within = [c for c in reference.trace.calls if c.order == order]
    inside = [c for c in reference.trace.calls if c.parent == order]
    drawn = [v for c in inside for v in reference.random.get(c.key, ()) if v.startswith("in:")]
    return bool(drawn or any(reference.random.get(c.key) for c in within))


def _divergence(reference: Reference, walk: Forward, wrong: Wrong, rough: Cotangents) -> Divergence:
    layer, between = wrong.layer, None
    if wrong.where == "out":  # made by the code between this layer and those that take its output
        between = wrong.layer, _next(reference, walk, wrong.layer)
        layer = _container(reference, walk, wrong.layer) or wrong.layer
    others = {f"{n} {w} {k}".strip(): v for (n, _, w, k), v in rough.at.items()}
    finding = gradient(wrong, reference, others)
    pair = next((p for p in walk.pairs.values() if p.torch == layer), None)
    j = wrong.judged
    return Divergence(
        layer, finding.diagnosis, finding.cause, finding.advice, "backward",
        pair.flax if pair else None, between, wrong.key if wrong.where == "parameter" else None,
        j.error, j.noise, j.scale,
    )  # fmt: skip


def _next(reference: Reference, walk: Forward, name: str) -> str:
    end = max(c.end for c in reference.trace.calls if c.name == name)
    paired = {p.torch for p in walk.pairs.values()}
    after = [c for c in reference.trace.calls if c.order > end and c.name in paired]
    return after[0].name if after else "the output"


def _container(reference: Reference, walk: Forward, name: str) -> str:
    paired = {p.torch for p in walk.pairs.values()}
    call = next(c for c in reference.trace.calls if c.name == name)
    by_order = {c.order: c for c in reference.trace.calls}
    parent = call.parent
    while parent is not None and by_order[parent].name not in paired:
        parent = by_order[parent].parent
    return "" if parent is None else by_order[parent].name
