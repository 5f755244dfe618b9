"""A Flax module, or a function with its parameters, taken apart: a pure function of its values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.runtime.applied import Applied, as_applied, flattened
from convert.runtime.arrays import is_array
from convert.runtime.interception import Around
from convert.runtime.linen_calls import with_dropout
from convert.runtime.linen_module import LinenModule
from convert.runtime.nnx_module import NnxModule
from convert.runtime.pure_module import (
    FlaxModule,
    Values,
    dotted,
    flatten,
    folded,
    is_key,
    unflatten,
)
from zoo.containers.errors import UsageError


def as_flax(given: Any, variables: Mapping[str, Any] | None) -> Any | None:
    """An nnx.Module, a bound linen.Module or an Applied, in eval mode and apart from the user's;
    None for what is none of these. UsageError for a linen module without variables."""
    from flax import linen, nnx

    if isinstance(given, tuple) and len(given) == 2 and _is_linen_apply(given[0]):
        given = given[0].__self__, given[1]
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], linen.Module):
        given, variables = given
    if isinstance(given, nnx.Module):
        copied: Any = nnx.clone(given)
        copied.eval()
        return copied
    if not isinstance(given, linen.Module):
        return given if isinstance(given, Applied) else as_applied(given)
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
        return with_dropout(module.bind(variables))
    if given.scope is None:
        raise UsageError(
            f"{type(given).__name__} is a linen module without variables",
            "give (module, variables), or module.bind(variables)",
        )
    return with_dropout(given)


def _is_linen_apply(function: Any) -> bool:
    from flax import linen

    owner = getattr(function, "__self__", None)
    return isinstance(owner, linen.Module) and getattr(function, "__name__", "") == "apply"


def flax_module(module: Any, precision: str | None = None, training: bool = False) -> FlaxModule:
    """`module`, an nnx.Module, a bound linen.Module or an Applied, taken apart; it stays as it is.

    `precision` ("float32", "float64") casts values, and the dtypes that layers compute in; None
    leaves both. `training`: norms use and move their batch statistics. UsageError for what is
    neither.
    """
    from flax import linen, nnx

    if isinstance(module, nnx.Module):
        return NnxModule(module, precision, training)
    if isinstance(module, linen.Module) and module.scope is not None:
        return LinenModule(module, precision, training)
    if isinstance(module, Applied):
        return _Function(module, precision, training)
    raise UsageError(
        f"{type(module).__name__} is neither an nnx.Module nor a bound flax.linen.Module",
        "give module.bind(variables) of a Linen module",
    )


def with_values(module: Any, values: Values) -> Any:
    """A copy of a module that `as_flax` gave, with other values at the dotted paths given."""
    import jax.numpy as jnp
    from flax import linen, nnx

    if isinstance(module, nnx.Module):
        graph, state = nnx.split(nnx.clone(module))
        flat = dict(nnx.to_flat_state(state))
        for path, variable in flat.items():
            if (name := dotted(path)) in values:
                value = jnp.asarray(values[name])
                held = isinstance(variable, nnx.Variable)
                flat[path] = variable.replace(value) if held else value
        return nnx.merge(graph, nnx.from_flat_state(flat))
    if isinstance(module, linen.Module):
        inner, variables = module.unbind()
        every = {
            path: jnp.asarray(values[name]) if (name := dotted(path[1:])) in values else value
            for path, value in flatten(variables).items()
        }
        return inner.bind(unflatten(every))
    made: Applied = module.with_values(values)
    return made


class _Function(FlaxModule):
    """All floating-point parameters count as trained; there are no layers to see."""

    def __init__(self, module: Applied, precision: str | None, training: bool) -> None:
        super().__init__(module.function, precision, training)
        self._function = module.function
        self._leaves, self._together = flattened(module.params)
        self.modules[""] = module
        with self.precise():
            self.values = {n: self._cast(x) for n, x in self._leaves.items() if is_array(x)}
        self._trained = set(self.values)

    def _run(
        self, values: Values, args: Any, kwargs: Any, around: Around | None
    ) -> tuple[Any, Values]:
        every = {**self.values, **values}
        module = Applied(self._function, self._together({**self._leaves, **every}))
        self.modules = {"": module}
        if around is None:
            return module(*args, **kwargs), every
        return around("", module, module.__call__, args, kwargs), every

    def reseed(self) -> None:
        self._leaves = {n: folded(x) if is_key(x) else x for n, x in self._leaves.items()}
