"""A jaxpr run with its sums in 64 bits, and all else as it stands; or operation by operation.

XLA adds on the CPU one number after the other: the sum of a thousand float32 loses two digits that
torch's pairwise sum keeps. That is no property of the module which asks for the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_SUMS = ("reduce_sum", "cumsum", "reduce_window_sum", "scatter-add")
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # where an equation holds what it calls
_LOOPS = ("while", "cond")  # are left as they are


def exactly_summed(closed: Any, given: Sequence[Any]) -> list[Any]:
    """What a closed jaxpr gives for these arrays. To be called where 64 bits are enabled."""
    return _evaluate(closed.jaxpr, closed.consts, given, _SUMS)


def uncompiled(closed: Any, given: Sequence[Any]) -> list[Any]:
    """The same, operation by operation, with its sums as they stand."""
    return _evaluate(closed.jaxpr, closed.consts, given)


def _evaluate(
    jaxpr: Any, constants: Sequence[Any], given: Sequence[Any], sums: tuple[str, ...] = ()
) -> list[Any]:
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *given), strict=True))

    def read(v: Any) -> Any:
        return v.val if hasattr(v, "val") else known[v]

    for equation in jaxpr.eqns:
        made = _made(equation, [read(v) for v in equation.invars], sums)
        known |= zip(equation.outvars, made, strict=True)
    return [read(v) for v in jaxpr.outvars]


def _made(equation: Any, given: list[Any], sums: tuple[str, ...]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return _scanned(params, given, sums)
    inner = next((params[k] for k in _CALLS if k in params), None)
    if inner is not None and name not in _LOOPS:
        jaxpr = getattr(inner, "jaxpr", inner)
        if len(jaxpr.invars) == len(given):
            return _evaluate(jaxpr, getattr(inner, "consts", ()), given, sums)
    if name in sums:
        given = [_wide(x) for x in given]
    bound = equation.primitive.get_bind_params(params)
    functions, rest = bound if isinstance(bound, tuple) else ((), bound)  # as JAX before 0.10
    made = equation.primitive.bind(*functions, *given, **rest)
    made = made if equation.primitive.multiple_results else [made]
    return [x.astype(v.aval.dtype) if name in sums else x
            for x, v in zip(made, equation.outvars, strict=True)]  # fmt: skip


def _scanned(params: Any, given: list[Any], sums: tuple[str, ...]) -> list[Any]:
    import jax

    body, ahead, carried = params["jaxpr"], params["num_consts"], params["num_carry"]

    def step(carry: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
        made = _evaluate(body.jaxpr, body.consts, [*given[:ahead], *carry, *rows], sums)
        return made[:carried], made[carried:]

    first, every = given[ahead : ahead + carried], given[ahead + carried :]
    carry, rows = jax.lax.scan(
        step, first, every, length=params["length"], reverse=params["reverse"]
    )
    return [*carry, *rows]


def _wide(x: Any) -> Any:
    import jax.numpy as jnp

    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    complex_ = jnp.issubdtype(x.dtype, jnp.complexfloating)
    return x.astype(jnp.complex128 if complex_ else jnp.float64)
