"""Every value that a Flax module computes on its way, layers or none, and what comes back to it.

MemoryError where that would be more than a machine holds.
"""

from __future__ import annotations

import functools
import linecache
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.runtime.call import Call
from convert.runtime.jaxpr import closed_jaxpr_of
from convert.runtime.pure_module import FlaxModule

_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # where an equation holds what it calls
_DERIVED = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")  # derivatives by hand
_LOOPS = ("scan", "while", "cond")
_STEPS = 32  # a longer scan is run as a whole
_FRAMES = 64  # of a traceback
_MOST = 2**28  # numbers in all values together


GIVEN = "given"


@dataclass
class Computed:
    """A floating-point value, and which of those before it it is made of."""

    primitive: str  # of the equation that gives it; GIVEN: of none
    refs: tuple[int, ...]  # by their places among all of them
    place: str | None  # the file and line of the user's code
    text: str  # that line
    value: np.ndarray


def computed_by(module: FlaxModule, call: Call) -> list[Computed]:
    """The floating-point arrays in the order in which they are computed, those inside of calls and
    of short scans too; what the module holds comes first. Raises what the module raises."""
    import jax

    closed = closed_jaxpr_of(module, call)
    with module.precise():
        return _all(closed, jax.tree.leaves(module.values), inside=True)


def cotangents_of(closed: Any, given: Sequence[Any]) -> tuple[list[Computed], list[np.ndarray]]:
    """Every floating-point value of a jaxpr that gives a loss, its arguments first, and the loss's
    derivative by each. What has a derivative by hand is one step."""
    import jax
    import jax.numpy as jnp

    computed = _all(closed, given, inside=False)
    zeros = [jnp.zeros(c.value.shape, c.value.dtype) for c in computed]

    @jax.jit
    def loss(probes: list[Any]) -> Any:
        return _Evaluation(False, lambda number, x: x + probes[number]).run(closed, given)[0]

    return computed, [np.asarray(cotangent) for cotangent in jax.grad(loss)(zeros)]


def _all(closed: Any, given: Sequence[Any], inside: bool) -> list[Computed]:
    import jax

    evaluations: list[_Evaluation] = []

    @jax.jit
    def run(given: Sequence[Any]) -> list[Any]:
        kept: list[Any] = []

        def keep(number: int, x: Any) -> Any:
            kept.append(x)
            return x

        evaluations.append(_Evaluation(inside, keep))
        evaluations[-1].run(closed, given)
        return kept

    if (count := sum(x.size for x in jax.eval_shape(run, list(given)))) > _MOST:
        raise MemoryError(f"all values together are {count} numbers")
    values = run(list(given))
    made = evaluations[-1].computed
    for one, value in zip(made, values, strict=True):
        one.value = np.asarray(value)
    return made


class _Evaluation:
    """One run of a jaxpr. Each floating-point value is numbered, and passes `mark`. `inside`:
    whether what has a derivative by hand is opened, whose derivative is then another."""

    def __init__(self, inside: bool, mark: Callable[[int, Any], Any]) -> None:
        self.inside, self.mark = inside, mark
        self.computed: list[Computed] = []
        self._line: tuple[str | None, str] = (None, "")  # of the user's code that is evaluated

    def run(self, closed: Any, given: Sequence[Any]) -> list[Any]:
        """What it gives."""
        marked = [self._marked(GIVEN, (), x) for x in given]
        made = self._evaluate(closed.jaxpr, [(c, None) for c in closed.consts], marked)
        return [x for x, _ in made]

    def _marked(self, primitive: str, refs: tuple[int, ...], x: Any) -> tuple[Any, int | None]:
        import jax.numpy as jnp

        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            return x, None
        number = len(self.computed)
        self.computed.append(Computed(primitive, refs, *self._line, np.empty(0)))
        return self.mark(number, x), number

    def _evaluate(self, jaxpr: Any, constants: Any, args: Any) -> list[tuple[Any, int | None]]:
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *args), strict=True))

        def read(v: Any) -> tuple[Any, int | None]:
            return (v.val, None) if hasattr(v, "val") else known[v]

        for equation in jaxpr.eqns:
            around, line = self._line, user_line(equation)
            self._line = line if line[0] is not None else around
            made = self._made(equation, [read(v) for v in equation.invars])
            known |= zip(equation.outvars, made, strict=True)
            self._line = around
        return [read(v) for v in jaxpr.outvars]

    def _made(self, equation: Any, given: list[Any]) -> list[tuple[Any, int | None]]:
        name, params = equation.primitive.name, equation.params
        inner = next((params[k] for k in _CALLS if k in params), None)
        if name == "scan" and params["length"] <= _STEPS:
            return self._scanned(params, given)
        if inner is not None and name not in _LOOPS and (self.inside or name not in _DERIVED):
            jaxpr = getattr(inner, "jaxpr", inner)
            if len(jaxpr.invars) == len(given):
                constants = [(c, None) for c in getattr(inner, "consts", ())]
                return self._evaluate(jaxpr, constants, given)
        bound = equation.primitive.get_bind_params(params)
        functions, rest = bound if isinstance(bound, tuple) else ((), bound)  # as JAX before 0.10
        made = equation.primitive.bind(*functions, *(x for x, _ in given), **rest)
        refs = tuple(n for _, n in given if n is not None)
        every = made if equation.primitive.multiple_results else [made]
        return [self._marked(name, refs, x) for x in every]

    def _scanned(self, params: Any, given: list[Any]) -> list[tuple[Any, int | None]]:
        import jax.numpy as jnp

        body, ahead = params["jaxpr"], params["num_consts"]
        stop = ahead + params["num_carry"]
        constants, carry, every = given[:ahead], given[ahead:stop], given[stop:]
        steps = range(params["length"])
        rows: list[list[tuple[Any, int | None]]] = []
        held = [(c, None) for c in body.consts]
        for i in reversed(steps) if params["reverse"] else steps:
            parts = [self._marked("index", _ref(n), x[i]) for x, n in every]
            made = self._evaluate(body.jaxpr, held, [*constants, *carry, *parts])
            carry = made[: len(carry)]
            rows.append(made[len(carry) :])
        rows = rows[::-1] if params["reverse"] else rows
        stacked = []
        for column in zip(*rows, strict=True):
            refs = tuple(n for _, n in column if n is not None)
            stacked.append(self._marked("stack", refs, jnp.stack([x for x, _ in column])))
        return [*carry, *stacked]


def _ref(number: int | None) -> tuple[int, ...]:
    return () if number is None else (number,)


def user_line(equation: Any) -> tuple[str | None, str]:
    """File and line of the innermost frame of an equation that is not Flax's or ours, and what
    stands there."""
    from jax.extend.source_info_util import summarize

    for frame in reversed(summarize(equation.source_info, _FRAMES).splitlines()):
        file, _, rest = frame.partition(":")
        line = rest.partition(":")[0]
        if line.isdigit() and not file.startswith(_libraries()):
            shown = os.path.relpath(file)
            shown = file if shown.startswith("..") else shown
            return f"{shown}:{line}", linecache.getline(file, int(line)).strip()
    return None, ""


@functools.cache
def _libraries() -> tuple[str, ...]:
    """Where code lies that is not the user's."""
    import flax

    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return os.path.dirname(flax.__file__), ours
