"""A Flax module as one side of a comparison."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from convert.compare.sides import Optimizer, Run, Side, Trained
from convert.judge.noise import Arrays, loss_weights, named_outputs, precision_of
from convert.matching.pair import Match
from convert.runtime.call import Call, cast, leaves, with_leaves
from convert.runtime.flax_function import FlaxFunction, Values
from zoo.layout.ops import inverse
from zoo.layout.ops import run as apply_ops

# (precision, training) -> the module as a function, its parameters in that precision
Make = Callable[[str, bool], FlaxFunction]


class Axes(Protocol):
    """How outputs lie on the two sides."""

    @abstractmethod
    def to_flax(self, name: str, array: np.ndarray) -> np.ndarray:
        """An array with torch's axes in Flax's order."""

    @abstractmethod
    def from_flax(self, name: str, array: np.ndarray) -> np.ndarray:
        """The inverse."""


class FlaxSide(Side):
    """`call` has Flax's axes and leaves that are named as torch's are by `inputs` (path of a leaf
    -> name). `shapes` are those of torch's tensors, to which `matches` lead back."""

    framework = "flax"

    def __init__(
        self,
        make: Make,
        call: Call,
        axes: Axes,
        matches: tuple[Match, ...],
        shapes: Mapping[str, tuple[int, ...]],
        inputs: Mapping[str, str],
        *,
        taps: bool = False,
        seed: int = 0,
        frozen: frozenset[str] = frozenset(),
    ) -> None:
        self.make = make
        self.frozen = frozen  # parameters that are not trained
        self.call = call
        self.axes = axes
        self.matches = matches
        self.shapes = shapes
        self.inputs = inputs
        self.taps = taps
        self.seed = seed
        self._compiled: dict[tuple[str, bool], tuple[FlaxFunction, Any]] = {}

    def run(self, precision: str, *, backward: bool) -> Run:
        import jax

        with precision_of(precision):
            if backward:
                function, compiled = self._gradients(precision, False)
                params = self._trained(function.params)
                found = compiled(params, function.statistics, *self._given(precision))
                (loss, (output, taps, _)), gradients = jax.device_get(found)
            else:
                loss, gradients = 0.0, None
                output, taps = jax.device_get(self._forward(precision))
        outputs = {k: self._back(k, v) for k, v in {**taps, **output}.items()}
        if gradients is None:
            return Run(outputs)
        named = self.to_torch(gradients[0])
        for path, name in self.inputs.items():
            if path in gradients[1]:
                g = np.asarray(gradients[1][path])
                named[f"in.{name}"] = self.axes.from_flax(name, g)
        return Run(outputs, float(loss), named)

    def train(self, precision: str, optimizer: Optimizer, steps: int) -> Trained:
        import jax
        import optax
        from jax.flatten_util import ravel_pytree

        with precision_of(precision):
            function, compiled = self._gradients(precision, True)
            given, floats = self._given(precision)
            params, statistics = self._trained(function.params), function.statistics
            # Optimizers work element by element: on one long vector they compile at once.
            vector, unravel = ravel_pytree(params)
            ravel = jax.jit(lambda tree: ravel_pytree(tree)[0])
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
                losses.append(float(loss))
                if step < steps:
                    gradients.append(self.to_torch(jax.device_get(gradient)))
                    # In float32 optax's 1 - b2^t loses five digits, which torch's does not: that
                    # is no difference of the models. With 64 bits at hand it is exact.
                    with jax.enable_x64(True):
                        vector, state = update(vector, ravel(gradient), state)
                    params, statistics = unravel(vector), after
            return Trained(
                losses, self.to_torch(jax.device_get({**params, **statistics})), gradients
            )

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
        arrays = cast(leaves(self.call), precision)
        floats = {k: v for k, v in arrays.items() if np.issubdtype(v.dtype, np.floating)}
        return {k: v for k, v in arrays.items() if k not in floats}, floats

    def _trained(self, params: Values) -> Values:
        return {k: v for k, v in params.items() if k not in self.frozen}

    def _call(self, function: FlaxFunction, params: Values, statistics: Values, given: Any) -> Any:
        """Outputs by name (jit hands dicts back in another order), taps, statistics."""
        args, kwargs = with_leaves(self.call, given)
        if not self.taps:
            output, after = function(params, statistics, args, kwargs)
            return self._named(output), {}, after
        (output, taps), after = function(params, statistics, args, {**kwargs, "taps": True})
        return self._named(output), taps, after

    def _forward(self, precision: str) -> tuple[Any, Any]:
        import jax

        function = self.make(precision, False)

        @jax.jit
        def forward(params: Values, statistics: Values, given: Values, floats: Values) -> Any:
            return self._call(function, params, statistics, given | floats)[:2]

        found: tuple[Any, Any] = forward(
            function.params, function.statistics, *self._given(precision)
        )
        return found

    def _gradients(self, precision: str, training: bool) -> tuple[FlaxFunction, Any]:
        """(params, statistics, inputs) -> ((loss, (output, taps, statistics)), gradients)."""
        import jax

        key = precision, training
        if key not in self._compiled:
            function = self.make(precision, training)
            if training and not function.statistics:
                self._compiled[key] = self._gradients(precision, False)
                return self._compiled[key]

            def loss_of(params: Values, floats: Values, statistics: Values, given: Values) -> Any:
                every = {**function.params, **params}
                output, taps, after = self._call(function, every, statistics, given | floats)
                return self._scalar(output), (output, taps, after)

            @jax.jit
            def compiled(params: Values, statistics: Values, given: Values, floats: Values) -> Any:
                both = jax.value_and_grad(loss_of, (0, 1), has_aux=True)
                return both(params, floats, statistics, given)

            self._compiled[key] = function, compiled
        return self._compiled[key]

    def _scalar(self, outputs: Mapping[str, Any]) -> Any:
        """The loss: torch_side.scalar's."""
        import jax.numpy as jnp

        total: Any = 0.0
        for name, x in outputs.items():
            if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating):
                shape = self.axes.from_flax(name, np.empty(x.shape)).shape
                weights = self.axes.to_flax(name, loss_weights(name, shape, self.seed))
                finite = jnp.where(jnp.isfinite(x), x, 0)
                total = total + (jnp.sin(finite) * weights.astype(x.dtype)).sum()
        return total

    def _named(self, output: Any) -> dict[str, Any]:
        """Outputs under torch's names."""
        return named_outputs(output)

    def _back(self, name: str, x: Any) -> np.ndarray:
        array = np.asarray(x)
        if array.dtype.kind == "V" or array.dtype.name.startswith(("bfloat", "float8")):
            array = array.astype(np.float32)
        return self.axes.from_flax(name, array)
