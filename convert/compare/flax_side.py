"""A Flax module as one side of a comparison."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from convert.compare.sides import Axes, Optimizer, Run, Side, Trained, loss_weights, real_parts
from convert.judge.noise import Arrays
from convert.matching.pair import Match
from convert.runtime.arrays import is_inexact, named_outputs, to_numpy
from convert.runtime.call import Call
from convert.runtime.exact_sums import exactly_summed, uncompiled
from convert.runtime.flax_calls import watch
from convert.runtime.flax_module import flax_module
from convert.runtime.jax_values import Computed, cotangents_of
from convert.runtime.jaxpr import compares_floats, narrow_operation, narrow_outputs
from convert.runtime.precision import precision_of
from convert.runtime.pure_module import FlaxModule, Values
from convert.runtime.trace import Place, Trace
from zoo.layout.ops import inverse
from zoo.layout.ops import run as apply_ops


class FlaxSide(Side):
    """`call` has Flax's axes and arrays that are named as torch's are by `inputs` (path of an array
    -> name). `shapes` are those of torch's tensors, to which `matches` lead back. `outputs` are
    those that are compared, Flax's name -> torch's; None for all, where both have the same names.
    `recorded` is a run in float32 that need not be made again.
    """

    framework = "flax"

    def __init__(
        self,
        module: Any,
        call: Call,
        axes: Axes,
        matches: tuple[Match, ...],
        shapes: Mapping[str, tuple[int, ...]],
        inputs: Mapping[str, str],
        *,
        outputs: Mapping[str, str] | None = None,
        watched: Mapping[Place, str] | None = None,
        seed: int = 0,
        frozen: frozenset[str] = frozenset(),
        recorded: Trace | None = None,
    ) -> None:
        self.module = module
        self.call = call
        self.axes = axes
        self.matches = matches
        self.shapes = shapes
        self.inputs = inputs
        self.outputs = outputs
        self.watched = watched
        self.seed = seed
        self.frozen = frozen  # parameters that are not trained
        self.forced = True  # norms train without a switch too, unless torch's all stay frozen
        self._still: frozenset[str] | None = None  # norms in eval mode; None as the model has them
        self._recorded = call, recorded
        self._compiled: dict[tuple[str, bool], tuple[FlaxModule, Any]] = {}
        self._forwards: dict[str, tuple[Any, Any]] = {}

    def run(self, precision: str, *, backward: bool) -> Run:
        import jax

        with precision_of(precision):
            given, floats = self._given(precision)
            if not backward:
                known, trace = self._recorded
                if precision == "float32" and trace is not None and known is self.call:
                    return self._run_of(self._named(trace.output), trace.places())
                traced, values = self._forward(precision)
                forward = traced.lower().compile()
                return self._run_of(*jax.device_get(forward(values, given | floats)))
            module, compiled = self._gradients(precision, False)
            found = compiled(self._trained(module), module.statistics, given, floats)
            return self._run_back(module, *jax.device_get(found))

    def exactly_summed(self, *, backward: bool) -> Run:
        import jax

        with precision_of("float32"):
            given, floats = self._given("float32")
            if backward:
                module, compiled = self._gradients("float32", False)
                taken: tuple[Any, ...] = (self._trained(module), module.statistics, given, floats)
                traced = compiled.trace(*taken)
            else:
                traced, values = self._forward("float32")
                taken = values, given | floats
        with jax.enable_x64(True):
            made = jax.jit(partial(exactly_summed, traced.jaxpr))(jax.tree.leaves(taken))
            found = jax.tree.unflatten(jax.tree.structure(traced.out_info), jax.device_get(made))
        return self._run_back(module, *found) if backward else self._run_of(*found)

    def one_by_one(self, precision: str) -> Run | None:
        """`run` with its gradients, no two operations compiled as one; None where that can change
        nothing, as no number is looked for among others."""
        import jax

        with precision_of(precision):
            given, floats = self._given(precision)
            module, compiled = self._gradients(precision, False)
            taken = self._trained(module), module.statistics, given, floats
            traced = compiled.trace(*taken)
            if not compares_floats(traced.jaxpr.jaxpr):
                return None
            made = uncompiled(traced.jaxpr, jax.tree.leaves(taken))
            found = jax.tree.unflatten(jax.tree.structure(traced.out_info), jax.device_get(made))
            return self._run_back(module, *found)

    def _run_of(self, output: Mapping[str, Any], seen: Mapping[Place, Any]) -> Run:
        return Run(self._back(output), self._back(self.named(seen)))

    def _run_back(self, module: FlaxModule, forward: Any, backward: Any) -> Run:
        """Of what `_gradients` gives."""
        (loss, (output, seen, _)), (of_params, of_inputs) = forward, backward
        idle = {n: np.zeros(v.shape, v.dtype) for n, v in module.values.items()
                if n not in of_params and n not in module.statistics and is_inexact(v)}  # fmt: skip
        gradients = self.to_torch(idle | _as_torchs(of_params))
        given = _as_torchs(of_inputs)
        for path, name in self.inputs.items():
            if path in given:
                gradients[f"in.{name}"] = self.axes.from_flax(name, np.asarray(given[path]))
        return Run(self._back(output), self._back(self.named(seen)), float(loss), gradients)

    def untrained(self) -> set[str]:
        """torch's names of what Flax holds, and not as parameters: it is differentiated by
        nobody."""
        module = flax_module(self.module)
        idle = module.values.keys() - module.params.keys() - module.statistics.keys()
        return {n for m in self.matches if set(m.flax) <= idle for n in m.torch}

    def train(self, precision: str, optimizer: Optimizer, steps: int) -> Trained:
        import jax
        import optax
        from jax.flatten_util import ravel_pytree

        with precision_of(precision):
            module, compiled = self._gradients(precision, True)
            given, floats = self._given(precision)
            params, statistics = self._trained(module), module.statistics
            # Optimizers work element by element: on one long vector they compile at once.
            # torch's own step the real and the imaginary part of complex numbers like any others.
            vector, unravel = ravel_pytree(_real(params))
            ravel = jax.jit(lambda tree: ravel_pytree(_real(tree))[0])
            rule = optimizer.optax()
            state = rule.init(vector)

            @jax.jit
            def update(vector: Any, gradient: Any, state: Any) -> Any:
                moved, state = rule.update(gradient, state, vector)
                return optax.apply_updates(vector, moved), state

            losses: list[float] = []
            gradients: list[Arrays] = []
            for step in range(steps + 1):
                found = compiled(params, statistics, given, floats)
                (loss, (_, _, after)), (gradient, _) = found
                gradient = _as_torchs(gradient)
                losses.append(float(loss))
                if step < steps:
                    gradients.append(self.to_torch(jax.device_get(gradient)))
                    # In float32 optax's 1 - b2^t loses five digits, which torch's does not: that
                    # is no difference of the models. With 64 bits at hand it is exact.
                    with jax.enable_x64(True):
                        vector, state = update(vector, ravel(gradient), state)
                    params, statistics = _complex(unravel(vector), params), after
            return Trained(
                losses, self.to_torch(jax.device_get({**params, **statistics})), gradients
            )

    def still_norms(self) -> frozenset[str]:
        """The norms, by Flax's paths, that stay in eval mode in `train`, once that has run."""
        runs = [module for (_, training), (module, _) in self._compiled.items() if training]
        return frozenset().union(*(module.still or () for module in runs))

    def with_still_norms(self, paths: frozenset[str]) -> FlaxSide:
        """The same with these left out, and no others."""
        made = copy.copy(self)
        made._compiled, made._still = {}, paths
        return made

    def alone(
        self, inputs: Mapping[tuple[str, int], Arrays]
    ) -> tuple[dict[Place, np.ndarray], dict[Place, str]]:
        """What each of these calls (path, index) gives for these inputs in float64, with Flax's
        axes, and which computes in float32 all the same. One function for all: what lies between
        the calls is not computed."""
        import jax
        from jax.extend.core import jaxpr_as_fun

        places: list[Place] = []
        with precision_of("float64"):
            module = flax_module(self.module, "float64")
            module.unroll = True
            args, kwargs = module.arguments(self.call)

            def forward(values: Values, given: list[Arrays]) -> list[Any]:
                found: dict[Place, Any] = {}
                around = watch(found, dict(zip(inputs, given, strict=True)))
                module(values, args, kwargs, around)
                places.extend(found)
                return list(found.values())

            taken = module.values, list(inputs.values())
            traced = jax.make_jaxpr(forward)(*taken)
            made = jax.jit(jaxpr_as_fun(traced))(*jax.tree.leaves(taken))
            narrow = zip(places, narrow_outputs(traced.jaxpr), strict=True)
            arrays = {p: to_numpy(x) for p, x in zip(places, jax.device_get(made), strict=True)}
            return arrays, {p: why for p, why in narrow if why is not None}

    def by_equation(self) -> tuple[list[Computed], list[np.ndarray]]:
        """Every value on the way to the loss in float64, and what comes back to each."""
        import jax

        with precision_of("float64"):
            module = flax_module(self.module, "float64")
            module.unroll = True
            given, floats = self._given("float64")
            trained = self._trained(module)

            def loss(params: Values, floats: Values) -> Any:
                values = {**module.values, **params}
                return self._scalar(self._call(module, values, given | floats, False)[0])

            closed = jax.make_jaxpr(loss)(trained, floats)
            return cotangents_of(closed, jax.tree.leaves((trained, floats)))

    def narrow_operation(self) -> str | None:
        with precision_of("float64"):
            return narrow_operation(self._forward("float64")[0].jaxpr.jaxpr)

    def _forward(self, precision: str) -> tuple[Any, Values]:
        """The forward pass as JAX traces it, (values, inputs) -> (outputs, intermediates); and the
        values. To be called in that precision."""
        import jax

        if precision not in self._forwards:
            module = flax_module(self.module, precision)
            given, floats = self._given(precision)
            forward = jax.jit(lambda values, arrays: self._call(module, values, arrays, True)[:2])
            self._forwards[precision] = forward.trace(module.values, given | floats), module.values
        return self._forwards[precision]

    def to_torch(self, values: Mapping[str, Any]) -> Arrays:
        """Torch's tensors for those of `values` that have a counterpart."""
        found: Arrays = {}
        for match in self.matches:
            if all(name in values for name in match.flax):
                undo = inverse(match.ops, [self.shapes[n] for n in match.torch])
                made = apply_ops(undo, [np.asarray(values[name]) for name in match.flax])
                found |= dict(zip(match.torch, made, strict=True))
        return found

    def _given(self, precision: str) -> tuple[Values, Values]:
        """Inputs that are not differentiated, and those that are."""
        arrays = self.call.cast(precision).arrays()
        floats = {k: v for k, v in arrays.items() if is_inexact(v)}
        return {k: v for k, v in arrays.items() if k not in floats}, floats

    def _trained(self, module: FlaxModule) -> Values:
        params = module.params.items()
        return {k: v for k, v in params if k not in self.frozen and is_inexact(v)}

    def _call(self, module: FlaxModule, values: Values, given: Any, watching: bool) -> Any:
        """Outputs by name (jit hands dicts back in another order), intermediates, statistics."""
        args, kwargs = self.call.replaced(given)
        seen: dict[Place, Any] = {}
        output, after = module(values, args, kwargs, watch(seen) if watching else None)
        seen = {p: x for p, x in seen.items() if self.watched is None or p in self.watched}
        return self._named(output), seen, {n: after[n] for n in module.statistics}

    def _gradients(self, precision: str, training: bool) -> tuple[FlaxModule, Any]:
        """(params, statistics, inputs) -> ((loss, (output, seen, statistics)), gradients)."""
        import jax

        key = precision, training
        if key not in self._compiled:
            module = flax_module(self.module, precision, training)
            module.forced = self.forced
            if self._still is not None:
                module.still = self._still
            if training and not module.statistics:
                self._compiled[key] = self._gradients(precision, False)
                return self._compiled[key]

            def loss_of(params: Values, floats: Values, statistics: Values, given: Values) -> Any:
                values = {**statistics, **params}
                output, *rest = self._call(module, values, given | floats, watching=not training)
                return self._scalar(output), (output, *rest)

            @jax.jit
            def compiled(params: Values, statistics: Values, given: Values, floats: Values) -> Any:
                both = jax.value_and_grad(loss_of, (0, 1), has_aux=True)
                return both(params, floats, statistics, given)

            self._compiled[key] = module, compiled
        return self._compiled[key]

    def _scalar(self, outputs: Mapping[str, Any]) -> Any:
        """The loss: torch_side.scalar's."""
        import jax.numpy as jnp

        total: Any = 0.0
        for name, x in real_parts(outputs, lambda x: hasattr(x, "dtype") and is_inexact(x)):
            axes = name.removesuffix(".imag") if name not in outputs else name
            shape = self.axes.from_flax(axes, np.empty(x.shape)).shape
            weights = self.axes.to_flax(axes, loss_weights(name, shape, self.seed))
            finite = jnp.where(jnp.isfinite(x), x, 0)
            total = total + (jnp.sin(finite) * weights.astype(x.dtype)).sum()
        return total

    def _named(self, output: Any) -> dict[str, Any]:
        """Outputs under torch's names."""
        named = named_outputs(output)
        if self.outputs is None:
            return named
        return {name: named[there] for there, name in self.outputs.items()}

    def _back(self, named: Mapping[str, Any]) -> Arrays:
        """The same with the axes that torch has."""
        return {k: self.axes.from_flax(k, to_numpy(x)) for k, x in named.items()}


def _as_torchs(gradients: Mapping[str, Any]) -> dict[str, Any]:
    """JAX's gradient of a real loss by a complex number is the conjugate of torch's."""
    return {k: g.conj() if "complex" in str(g.dtype) else g for k, g in gradients.items()}


def _real(values: Values) -> Values:
    """Complex arrays as real ones with a last axis of two."""
    import jax.numpy as jnp

    return {
        k: jnp.stack([x.real, x.imag], -1) if "complex" in str(x.dtype) else x
        for k, x in values.items()
    }


def _complex(values: Values, like: Values) -> Values:
    """The inverse of `_real`."""
    return {
        k: x[..., 0] + 1j * x[..., 1] if "complex" in str(like[k].dtype) else x
        for k, x in values.items()
    }
