"""What a Flax module computes in, and whether it draws random numbers: read from its jaxpr."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from convert.runtime.arrays import leaves
from convert.runtime.call import Call
from convert.runtime.pure_module import FlaxModule, Values

_DRAWS = ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform")


def jaxpr_of(module: FlaxModule, call: Call) -> Any:
    """The module's jaxpr. Nothing is run. Raises what the module raises."""
    return closed_jaxpr_of(module, call).jaxpr


def closed_jaxpr_of(module: FlaxModule, call: Call) -> Any:
    """As `jaxpr_of`, with the constants in it. What asks for numbers while it is traced, and gets
    them where constants are computed at once, is remembered."""
    import jax

    with module.precise():
        args, kwargs = module.arguments(call)

        def forward(values: Values) -> Any:
            output, after = module(values, args, kwargs)
            return leaves(output), after

        try:
            return jax.make_jaxpr(forward)(module.values)
        except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError):
            with jax.ensure_compile_time_eval():
                made = jax.make_jaxpr(forward)(module.values)
            module.remember_asking()
            return made


def narrow_operation(jaxpr: Any) -> str | None:
    """An operation that computes in fewer than 64 bits, if there is one, in the jaxpr of a module
    that is in float64."""
    return next(filter(None, map(_narrow, _equations(jaxpr))), None)


def narrow_outputs(jaxpr: Any) -> list[str | None]:
    """Of each output of a jaxpr an operation in fewer than 64 bits on the way to it, if any."""
    by: dict[Any, str] = {}
    for equation in jaxpr.eqns:
        before = (by.get(v) for v in equation.invars if not hasattr(v, "val"))
        inside = filter(None, map(_narrow, (*_inner(equation), equation)))
        found = next(filter(None, before), None) or next(inside, None)
        if found is not None:
            by |= dict.fromkeys(equation.outvars, found)
    return [None if hasattr(v, "val") else by.get(v) for v in jaxpr.outvars]


def _narrow(equation: Any) -> str | None:
    """The equation, where it computes in fewer than 64 bits."""
    import jax.numpy as jnp

    for out in equation.outvars:
        dtype = getattr(out.aval, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            continue
        if dtype.itemsize < (16 if jnp.issubdtype(dtype, jnp.complexfloating) else 8):
            return f"{equation.primitive.name} in {dtype.name}"
    return None


def compares_floats(jaxpr: Any) -> bool:
    """Whether floating-point numbers are looked for among others, as JAX's gradient of a maximum
    does."""
    import jax.numpy as jnp

    return any(
        e.primitive.name == "eq" and jnp.issubdtype(e.invars[0].aval.dtype, jnp.floating)
        for e in _equations(jaxpr)
    )


def draws(jaxpr: Any) -> bool:
    """Whether random numbers are drawn."""
    return any(equation.primitive.name in _DRAWS for equation in _equations(jaxpr))


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, those of inner jaxprs before the one that holds them."""
    for equation in jaxpr.eqns:
        yield from _inner(equation)
        yield equation


def _inner(equation: Any) -> Iterator[Any]:
    """The equations of the jaxprs that an equation holds."""
    for value in equation.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)
