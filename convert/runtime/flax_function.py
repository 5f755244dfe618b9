"""NNX and Linen modules as pure functions of their parameters, both in one form."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

Values = dict[str, Any]  # dotted path -> array


class FlaxFunction(ABC):
    """A Flax module taken apart: `params` and `statistics` by dotted path, and the rest."""

    params: Values
    statistics: Values  # running statistics
    training: bool = False  # norms use and move their batch statistics

    @abstractmethod
    def __call__(
        self, params: Values, statistics: Values, args: Any, kwargs: Any
    ) -> tuple[Any, Values]:
        """Output, and the statistics afterwards. To be traced."""


class NnxFunction(FlaxFunction):
    """An nnx.Module."""

    def __init__(self, module: Any, training: bool = False) -> None:
        from flax import nnx

        self.training = training
        parts: Any = nnx.split(module, nnx.Param, nnx.BatchStat, ...)
        self._graph, params, statistics, self._rest = parts
        self._params, self._statistics = params, statistics
        self.params, self.statistics = _flat(params), _flat(statistics)

    def __call__(
        self, params: Values, statistics: Values, args: Any, kwargs: Any
    ) -> tuple[Any, Values]:
        from flax import nnx

        module = nnx.merge(
            self._graph,
            _filled(self._params, params),
            _filled(self._statistics, statistics),
            _renewed(self._rest),
        )
        if self.training:
            for _, part in nnx.iter_graph(module):
                if isinstance(part, nnx.BatchNorm):
                    part.use_running_average = False
        output = module(*args, **kwargs)
        return output, _flat(nnx.split(module, nnx.BatchStat, ...)[1])


class LinenFunction(FlaxFunction):
    """A linen module and its variables."""

    def __init__(
        self,
        module: Any,
        variables: Mapping[str, Any],
        training: bool = False,
        rngs: Mapping[str, Any] | None = None,
    ) -> None:
        self.training = training
        self._module = module
        self._rngs = rngs
        flat = {c: _flat_dict(v) for c, v in variables.items()}
        self.params = flat.pop("params", {})
        self.statistics = flat.pop("batch_stats", {})
        self._rest = flat

    def __call__(
        self, params: Values, statistics: Values, args: Any, kwargs: Any
    ) -> tuple[Any, Values]:
        every = {"params": params, "batch_stats": statistics, **self._rest}
        variables = {c: _nested(v) for c, v in every.items() if v}
        with batch_statistics() if self.training else contextlib.nullcontext():
            output, moved = self._module.apply(
                variables,
                *args,
                rngs=self._rngs,
                mutable=["batch_stats", "intermediates"],
                **kwargs,
            )
        after = _flat_dict(moved.get("batch_stats", {}))
        return output, {**statistics, **after}


@contextlib.contextmanager
def batch_statistics() -> Iterator[None]:
    """Linen's BatchNorm in training mode, however the module calls it."""
    from flax import linen

    def training(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if not isinstance(layer, linen.BatchNorm) or context.method_name != "__call__":
            return call(*args, **kwargs)
        given = layer.use_running_average
        object.__setattr__(layer, "use_running_average", None)  # else the argument is refused
        try:
            return call(*args, **{**kwargs, "use_running_average": False})
        finally:
            object.__setattr__(layer, "use_running_average", given)

    with linen.intercept_methods(training):
        yield


def _flat_dict(tree: Any) -> Values:
    """Dotted path -> leaf of a Linen collection."""
    found: Values = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{k}": v for k, v in _flat_dict(value).items()}
        else:
            found[key] = value.unbox() if hasattr(value, "unbox") else value
    return found


def _nested(flat: Values) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = made
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return made


def _flat(state: Any) -> Values:
    from flax import nnx

    return {".".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(state)}


def _renewed(state: Any) -> Any:
    """Generators and the like as variables of the trace in which they are used: a cell of an
    nnx.RNN and a dropout that is left on draw from theirs, which moves them."""
    from flax import nnx

    return nnx.from_flat_state(
        {
            path: v.replace(v.get_value()) if isinstance(v, nnx.Variable) else v
            for path, v in nnx.to_flat_state(state)
        }
    )


def _filled(state: Any, values: Values) -> Any:
    from flax import nnx

    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state(
        {path: v.replace(values[".".join(map(str, path))]) for path, v in flat}
    )
