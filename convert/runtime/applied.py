"""A plain JAX function with its parameters, `fn(params, *inputs)`, as a module without layers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from convert.runtime.arrays import is_array
from zoo.containers.errors import UsageError

Tree = tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]


class Applied:
    """`function(params, *inputs)`, where `params` is any pytree of arrays."""

    def __init__(self, function: Callable[..., Any], params: Any) -> None:
        self.function = function
        self.params = params

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's output for these inputs."""
        return self.function(self.params, *args, **kwargs)

    def with_values(self, values: dict[str, Any]) -> Applied:
        """The function with other values at the dotted paths given."""
        named, together = flattened(self.params)
        return Applied(self.function, together({**named, **values}))


def as_applied(given: Any) -> Applied | None:
    """(function, params), or (what has such an `.apply`, params); None for anything else.

    An `.apply` that asks for `rng` beside the parameters, as haiku's do, gets None for it.
    """
    if not isinstance(given, tuple) or len(given) != 2 or hasattr(given, "_fields"):
        return None
    function, params = given
    owner, function = function, getattr(function, "apply", function)
    if not callable(function) or isinstance(function, type):
        return None
    if not any(is_array(x) for x in flattened(params)[0].values()):
        raise UsageError(
            f"the parameters of {name_of(owner)} hold no array",
            "give (function, params) with a dict, list or NamedTuple of arrays",
        )
    if function is not owner and _asks_for_generator(function):
        apply = function

        @functools.wraps(apply)
        def function(params: Any, *args: Any, **kwargs: Any) -> Any:
            return apply(params, None, *args, **kwargs)

        parameters = list(inspect.signature(apply).parameters.values())
        function.__signature__ = inspect.Signature(parameters[:1] + parameters[2:])
    return Applied(function, params)


def _asks_for_generator(function: Any) -> bool:
    try:
        return list(inspect.signature(function).parameters)[1:2] == ["rng"]
    except (TypeError, ValueError):
        return False


def forward_of(module: Any) -> Callable[..., Any]:
    """What a Flax module is called by, with the signature that its inputs must fit."""
    if isinstance(module, Applied):
        return functools.partial(module.function, module.params)
    return module.__call__  # type: ignore[no-any-return]


def name_of(function: Any) -> str:
    """What to call a function, or what has an `.apply`."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", None) or type(function).__name__)


def flattened(params: Any) -> Tree:
    """The leaves of a pytree by dotted path, and what puts such leaves together again."""
    import jax

    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    named = {".".join(map(_word, path)): x for path, x in leaves}

    def together(values: dict[str, Any]) -> Any:
        return jax.tree_util.tree_unflatten(structure, [values[n] for n in named])

    return named, together


def _word(key: Any) -> str:
    """One step of a path: a key, an index or a field."""
    found = (getattr(key, n) for n in ("key", "idx", "name") if hasattr(key, n))
    return str(next(found, key))
