"""Users' Flax modules, NNX or Linen: told apart, copied, cast to a precision, looked into."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from convert.runtime.flax_function import FlaxFunction, LinenFunction, NnxFunction
from zoo.containers.errors import UsageError

_DTYPES = ("dtype", "param_dtype")


def as_flax(given: Any, variables: Mapping[str, Any] | None) -> Any | None:
    """An nnx.Module or a bound linen.Module, in eval mode and apart from the user's; None for what
    is no Flax module. UsageError for a linen module without variables."""
    from flax import linen, nnx

    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], linen.Module):
        given, variables = given
    if isinstance(given, nnx.Module):
        copied: Any = nnx.clone(given)
        copied.eval()
        return copied
    if not isinstance(given, linen.Module):
        return None
    if variables is not None:
        if not isinstance(variables, Mapping):
            raise UsageError(
                f"the variables of {type(given).__name__} are a {type(variables).__name__}",
                "give the dict that module.init returns: {'params': ...}",
            )
        if "params" not in variables and variables:
            raise UsageError(
                f"the variables of {type(given).__name__} have no collection 'params'",
                f"wrap them: {{'params': variables}}; they have {', '.join(map(str, variables))}",
            )
        module = given.unbind()[0] if given.scope is not None else given
        return _with_dropout(module.bind(variables))
    if given.scope is None:
        raise UsageError(
            f"{type(given).__name__} is a linen module without variables",
            "give (module, variables), or module.bind(variables)",
        )
    return _with_dropout(given)


def _with_dropout(module: Any) -> Any:
    """The bound linen module with a generator for dropout: one that is left on is then found and
    named, where it would only raise."""
    import jax

    rngs = linen_rngs(module)
    if "dropout" in rngs:
        return module
    bare, variables = module.unbind()
    rngs["dropout"] = jax.random.key(0)
    return bare.bind(variables, rngs=rngs, mutable=module.scope.mutable)


def linen_rngs(module: Any) -> dict[str, Any]:
    """The generators of a bound linen module."""
    return {name: rng.as_jax_rng() for name, rng in module.scope.rngs.items()}


def function(module: Any, precision: str, training: bool = False) -> FlaxFunction:
    """The module as a function, its parameters in `precision`. To be called, and what it gives to
    be traced, inside `precision_of(precision)` and `widened(precision)`."""
    from flax import nnx

    if isinstance(module, nnx.Module):
        return NnxFunction(_cast_nnx(module, precision), training)
    bare, variables = module.unbind()
    return LinenFunction(bare, _cast(variables, precision), training, linen_rngs(module))


def params_and_statistics(module: Any) -> dict[str, np.ndarray]:
    """Every parameter and running statistic by its dotted path, as it is stored."""
    from flax import nnx

    made = (
        NnxFunction(module) if isinstance(module, nnx.Module) else LinenFunction(*module.unbind())
    )
    return {k: np.asarray(v) for k, v in {**made.params, **made.statistics}.items()}


@contextlib.contextmanager
def widened(precision: str) -> Iterator[None]:
    """Linen layers whose `dtype` is float32 computing in `precision`: NNX ones are cast as they are
    copied, but Linen's exist only while they are called."""
    from flax import linen

    def compute(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        held = {n: vars(layer)[n] for n in _DTYPES if _is_wide(vars(layer).get(n))}
        for name in held:
            object.__setattr__(layer, name, np.dtype(precision))
        try:
            return call(*args, **kwargs)
        finally:
            for name, value in held.items():
                object.__setattr__(layer, name, value)

    with linen.intercept_methods(compute):
        yield


def narrow_operation(module: Any, call: Any, precision: str = "float64") -> str | None:
    """An operation that computes in fewer bits than asked for, if there is one. Nothing is run.

    `call` is (args, kwargs). Raises what the module raises.
    """
    import jax

    from convert.judge.noise import named_outputs

    made = function(module, precision)
    args, kwargs = call

    def forward(params: Any, statistics: Any) -> Any:
        output, after = made(params, statistics, args, kwargs)
        return named_outputs(output), after

    return _narrow(jax.make_jaxpr(forward)(made.params, made.statistics).jaxpr)


def _narrow(jaxpr: Any) -> str | None:
    import jax.numpy as jnp

    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns") and (found := _narrow(inner)):
                    return found
        for out in equation.outvars:
            dtype = getattr(out.aval, "dtype", None)
            if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 8:
                return f"{equation.primitive.name} in {dtype.name}"
    return None


def _is_wide(dtype: Any) -> bool:
    with contextlib.suppress(TypeError):
        return dtype is not None and np.dtype(dtype) in (np.float32, np.float64)
    return False


def _cast_nnx(module: Any, precision: str) -> Any:
    from flax import nnx

    made = nnx.clone(module)
    for _, part in nnx.iter_modules(made):
        for name in _DTYPES:
            if _is_wide(vars(part).get(name)):
                setattr(part, name, np.dtype(precision))
    parts: Any = nnx.split(made, nnx.Any(nnx.Param, nnx.BatchStat), ...)
    graph, weights, rest = parts
    return nnx.merge(graph, _cast(weights, precision), _cast(rest, precision))


def _cast(tree: Any, precision: str) -> Any:
    import jax
    import jax.numpy as jnp

    def one(x: Any) -> Any:
        dtype = getattr(x, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            return x
        return jnp.asarray(x).astype(precision)

    return jax.tree.map(one, tree)
