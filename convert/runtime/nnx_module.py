"""An NNX module taken apart."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from convert.runtime.arrays import is_array
from convert.runtime.interception import Around, intercepted
from convert.runtime.norm_modes import Modes, keeps, switched, switches_of
from convert.runtime.precision import wide_attributes
from convert.runtime.pure_module import FlaxModule, Values, dotted, folded, is_key, raw


class NnxModule(FlaxModule):
    """As a graph and its state; a clone, so the user's module stays as it is."""

    def __init__(self, module: Any, precision: str | None, training: bool) -> None:
        from flax import nnx

        super().__init__(type(module), precision, training)
        made = nnx.clone(module)
        for path, part in nnx.iter_modules(made):
            self.modules[dotted(path)] = part
            for name, value in _training_attributes(part) if training else ():
                setattr(part, name, value)
            for name in wide_attributes(part) if precision else ():  # nnx.Embed fixes its own
                setattr(part, name, np.dtype(precision))
        self._graph, state = nnx.split(made)
        self._rest: dict[Any, Any] = {}
        self._variables: dict[str, tuple[Any, Any]] = {}
        with self.precise():
            for path, variable in nnx.to_flat_state(state):
                value = raw(variable)
                if isinstance(variable, nnx.RngState) or not is_array(value):
                    self._rest[path] = variable
                    continue
                name = dotted(path)
                self.values[name] = self._cast(value)
                self._variables[name] = path, variable
                if isinstance(variable, nnx.Param):
                    self._trained.add(name)
                elif isinstance(variable, nnx.BatchStat):
                    self._moving.add(name)

    def _run(
        self, values: Values, args: Any, kwargs: Any, around: Around | None
    ) -> tuple[Any, Values]:
        from flax import nnx

        module = self._made(values)
        if self.training:
            around = _with_nnx_batch_statistics(around, self.still or ())
        output = self._output(module, values, args, kwargs, around)
        after = {dotted(p): raw(v) for p, v in nnx.to_flat_state(nnx.state(module))}
        return output, {n: after[n] for n in self.values if n in after}

    def _made(self, values: Values) -> Any:
        from flax import nnx

        # Variables are made anew, as belonging to the trace in which this run happens to be: a cell
        # of an nnx.RNN and a dropout that is left on draw from generators, which moves these.
        flat = {p: _renewed(v) for p, v in self._rest.items()}
        for name, value in {**self.values, **values}.items():
            path, variable = self._variables[name]
            held = isinstance(variable, nnx.Variable)
            flat[path] = variable.replace(value) if held else value
        return nnx.merge(self._graph, nnx.from_flat_state(flat))

    def _output(
        self, module: Any, values: Values, args: Any, kwargs: Any, around: Around | None
    ) -> Any:
        from flax import nnx

        if around is None:
            return module(*args, **kwargs)
        self.modules = {dotted(p): m for p, m in nnx.iter_modules(module)}
        with (
            self._layer_by_layer({**self.values, **values}, around) as (scans, named),
            intercepted(dict(self.modules), named, scans.find),
        ):
            return module(*args, **kwargs)

    def _as_users_train(self, values: Values, args: Any, kwargs: Any, modes: Modes) -> Any:
        module = self._made(values)
        module.train()
        args, kwargs = switched(module, args, kwargs, training=True)
        return self._output(module, values, args, kwargs, modes)

    def reseed(self) -> None:
        for path, variable in self._rest.items():
            if is_key(value := raw(variable)):
                self._rest[path] = variable.replace(folded(value))


def _training_attributes(part: Any) -> Iterator[tuple[str, bool]]:
    """What puts a norm into train mode: NNX's own, or somebody's own that keeps statistics. Others
    that keep something may be told by `deterministic`: torch's counterparts are not trained."""
    if keeps(part):
        yield from ((n, v) for n, v in switches_of(part).items() if n != "deterministic")


def _with_nnx_batch_statistics(around: Around | None, still: Collection[str]) -> Around:
    """NNX's BatchNorm, and somebody's own that keeps statistics, in training mode, however the
    module calls it; in eval mode where its path is in `still`."""
    from flax import nnx

    def training(path: str, part: Any, proceed: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(part, nnx.BatchNorm):
            args, kwargs = args[:1], {**kwargs, "use_running_average": path in still}
        elif keeps(part) and path not in still:
            args, kwargs = switched(part, args, kwargs, training=True)
        if around is None:
            return proceed(*args, **kwargs)
        return around(path, part, proceed, args, kwargs)

    return training


def _renewed(variable: Any) -> Any:
    from flax import nnx

    return variable.replace(raw(variable)) if isinstance(variable, nnx.Variable) else variable
