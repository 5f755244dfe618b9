"""Every value that a Flax module computes on its way, layers or none."""

from __future__ import annotations

from typing import Any

import numpy as np

from convert.runtime.call import Call
from convert.runtime.flax_module import FlaxModule
from convert.runtime.jaxpr import closed_jaxpr_of

_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # where an equation holds what it calls
_STEPS = 32  # a longer scan is run as a whole


def values_of(module: FlaxModule, call: Call) -> list[np.ndarray]:
    """The floating-point arrays in the order in which they are computed, those inside of calls and
    of short scans too. Raises what the module raises."""
    import jax

    closed = closed_jaxpr_of(module, call)
    with module.precise():
        flat = jax.tree.leaves(module.values)

        @jax.jit
        def run(flat: list[Any]) -> list[Any]:
            kept: list[Any] = []
            _evaluate(closed.jaxpr, closed.consts, flat, kept)
            return kept

        return [np.asarray(x) for x in run(flat)]


def _evaluate(jaxpr: Any, constants: Any, args: Any, kept: list[Any]) -> list[Any]:
    import jax.numpy as jnp

    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *args), strict=True))

    def read(v: Any) -> Any:
        return v.val if hasattr(v, "val") else known[v]

    for equation in jaxpr.eqns:
        made = _made(equation, [read(v) for v in equation.invars], kept)
        known |= zip(equation.outvars, made, strict=True)
        kept += [x for x in made if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    return [read(v) for v in jaxpr.outvars]


def _made(equation: Any, given: list[Any], kept: list[Any]) -> list[Any]:
    """What an equation gives; `kept` gets what is computed inside it."""
    name, params = equation.primitive.name, equation.params
    inner = next((params[k] for k in _CALLS if k in params), None)
    if name == "scan" and params["length"] <= _STEPS:
        return _scanned(params, given, kept)
    if inner is not None and name not in ("scan", "while", "cond"):
        jaxpr = getattr(inner, "jaxpr", inner)
        if len(jaxpr.invars) == len(given):
            return _evaluate(jaxpr, getattr(inner, "consts", ()), given, kept)
    bound = equation.primitive.get_bind_params(params)
    functions, rest = bound if isinstance(bound, tuple) else ((), bound)  # as JAX before 0.10
    made = equation.primitive.bind(*functions, *given, **rest)
    return list(made) if equation.primitive.multiple_results else [made]


def _scanned(params: Any, given: list[Any], kept: list[Any]) -> list[Any]:
    import jax.numpy as jnp

    body, ahead = params["jaxpr"], params["num_consts"]
    stop = ahead + params["num_carry"]
    constants, carry, every = given[:ahead], given[ahead:stop], given[stop:]
    steps = range(params["length"])
    rows: list[list[Any]] = []
    for i in reversed(steps) if params["reverse"] else steps:
        made = _evaluate(
            body.jaxpr, body.consts, [*constants, *carry, *(x[i] for x in every)], kept
        )
        carry = made[: len(carry)]
        rows.append(made[len(carry) :])
    rows = rows[::-1] if params["reverse"] else rows
    return [*carry, *(jnp.stack(column) for column in zip(*rows, strict=True))]
