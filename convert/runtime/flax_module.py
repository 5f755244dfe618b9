"""A Flax module, or a function with its parameters, taken apart: a pure function of its values."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from convert.runtime.applied import Applied, as_applied, flattened
from convert.runtime.arrays import dtype_in, is_array, is_inexact, to_numpy
from convert.runtime.asking import asks, computed_at_once, remember_asking
from convert.runtime.call import Call
from convert.runtime.interception import Around, intercepted
from convert.runtime.linen_calls import (
    generators,
    mutable,
    widened,
    with_batch_statistics,
    with_dropout,
)
from convert.runtime.narrow import widened_dtypes
from convert.runtime.norm_modes import Modes, keeps, switched, switches_of
from convert.runtime.precision import jax_precision, wide_attributes
from convert.runtime.unrolled import Unrolled
from zoo.containers.errors import UsageError

LOG = logging.getLogger(__name__)
Values = dict[str, Any]  # dotted path -> array


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
        return _Nnx(module, precision, training)
    if isinstance(module, linen.Module) and module.scope is not None:
        return _Linen(module, precision, training)
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
            if (name := _dotted(path)) in values:
                value = jnp.asarray(values[name])
                held = isinstance(variable, nnx.Variable)
                flat[path] = variable.replace(value) if held else value
        return nnx.merge(graph, nnx.from_flat_state(flat))
    if isinstance(module, linen.Module):
        inner, variables = module.unbind()
        every = {
            path: jnp.asarray(values[name]) if (name := _dotted(path[1:])) in values else value
            for path, value in _flatten(variables).items()
        }
        return inner.bind(_unflatten(every))
    made: Applied = module.with_values(values)
    return made


class FlaxModule:
    """`values` are its arrays by dotted path (Linen's without the collection): parameters, running
    statistics and other state, but no generators. Calling it is a pure function of such values."""

    def __init__(self, kept: Any, precision: str | None, training: bool) -> None:
        self._kept = kept  # what its code belongs to: a class, a function
        self.precision = precision
        self.training = training
        self.values: Values = {}
        self._trained: set[str] = set()
        self._moving: set[str] = set()
        self.modules: dict[str, Any] = {}  # path -> submodule, as last seen
        self.unroll = False  # whether scanned layers are called one by one where `around` is given
        self.stacks: dict[str, int] = {}  # path of a scanned stack -> its layers, once it was run
        self.recording: tuple[Call, Any] | None = None  # of which call, and what runs it again
        self.still: frozenset[str] | None = None  # norms that do not train, once that is known
        self.forced = True  # whether norms train where no switch of the module's makes them

    @property
    def params(self) -> Values:
        """What is trained."""
        return {n: v for n, v in self.values.items() if n in self._trained}

    @property
    def statistics(self) -> Values:
        """Running statistics."""
        return {n: v for n, v in self.values.items() if n in self._moving}

    def __call__(
        self, values: Values, args: Any, kwargs: Any, around: Around | None = None
    ) -> tuple[Any, Values]:
        """The output, and the values afterwards. `values` may leave out what stays as it is;
        `around` takes the place of every submodule's call. May be traced by JAX."""
        with computed_at_once(self._kept):
            if self.training and self._moving and self.still is None:
                self.still = self._stay_still(values, args, kwargs)
            return self._run(values, args, kwargs, around)

    def _stay_still(self, values: Values, args: Any, kwargs: Any) -> frozenset[str]:
        """The norms, by path, that stay in eval mode where the model is told to train; none where
        it cannot be told or run so."""
        import jax

        modes = Modes()
        try:
            jax.eval_shape(lambda: self._as_users_train(values, args, kwargs, modes))
        except Exception:
            LOG.debug("it does not run in train mode", exc_info=True)
            self.training = self.forced
            return frozenset()
        return modes.still(self.forced)

    def _as_users_train(self, values: Values, args: Any, kwargs: Any, modes: Modes) -> Any:
        """The output in train mode, dropout and all."""
        raise NotImplementedError

    def _run(
        self, values: Values, args: Any, kwargs: Any, around: Around | None
    ) -> tuple[Any, Values]:
        raise NotImplementedError

    @property
    def asks(self) -> bool:
        """Whether its code is known to ask for numbers while JAX traces it."""
        return asks(self._kept)

    def remember_asking(self) -> None:
        """From now on every module of this class computes its constants at once."""
        remember_asking(self._kept)

    def reseed(self) -> None:
        """Other keys in the module's generators, so that a run draws other numbers."""

    def unstacked(self) -> Values:
        """`values`, with those of scanned stacks layer by layer: `layers.0.kernel`, ..."""
        made: Values = {}
        for name, value in self.values.items():
            stack = next((s for s in self.stacks if name.startswith(f"{s}.")), None)
            if stack is None:
                made[name] = value
                continue
            rest = name.removeprefix(stack)
            made |= {f"{stack}.{i}{rest}": x for i, x in enumerate(to_numpy(value))}
        return made

    @contextlib.contextmanager
    def _layer_by_layer(self, values: Values, around: Around) -> Iterator[tuple[Unrolled, Around]]:
        """`around` with the paths of single layers, and what knows them."""
        scans = Unrolled(values)

        def named(path: str, part: Any, proceed: Any, args: Any, kwargs: Any) -> Any:
            path = scans.path(path)
            self.modules[path] = part
            return around(path, part, proceed, args, kwargs)

        with scans.running() if self.unroll else contextlib.nullcontext():
            yield scans, named
        self.stacks |= scans.stacks

    def arguments(self, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments as JAX arrays, floating-point ones in the module's precision."""
        return call.replaced(self.given(call))

    def given(self, call: Call) -> Values:
        """The call's arrays alone, by path."""
        return {k: self._cast(to_numpy(x)) for k, x in call.arrays().items()}

    def _cast(self, value: Any) -> Any:
        if self.precision is None:  # as it is stored: JAX would cut the 64 bits of NumPy's arrays
            return value
        import jax.numpy as jnp

        value = jnp.asarray(value)
        if not is_inexact(value):
            return value
        return value.astype(dtype_in(value, self.precision))

    @contextlib.contextmanager
    def precise(self) -> Iterator[None]:
        """The state of JAX that the precision needs."""
        with jax_precision(self.precision) if self.precision else contextlib.nullcontext():
            yield


class _Nnx(FlaxModule):
    def __init__(self, module: Any, precision: str | None, training: bool) -> None:
        from flax import nnx

        super().__init__(type(module), precision, training)
        made = nnx.clone(module)
        for path, part in nnx.iter_modules(made):
            self.modules[_dotted(path)] = part
            for name, value in _training_attributes(part) if training else ():
                setattr(part, name, value)
            for name in wide_attributes(part) if precision else ():  # nnx.Embed fixes its own
                setattr(part, name, np.dtype(precision))
        self._graph, state = nnx.split(made)
        self._rest: dict[Any, Any] = {}
        self._variables: dict[str, tuple[Any, Any]] = {}
        with self.precise():
            for path, variable in nnx.to_flat_state(state):
                value = _raw(variable)
                if isinstance(variable, nnx.RngState) or not is_array(value):
                    self._rest[path] = variable
                    continue
                name = _dotted(path)
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
        after = {_dotted(p): _raw(v) for p, v in nnx.to_flat_state(nnx.state(module))}
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
        self.modules = {_dotted(p): m for p, m in nnx.iter_modules(module)}
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
            if _is_key(value := _raw(variable)):
                self._rest[path] = variable.replace(_folded(value))


class _Linen(FlaxModule):
    def __init__(self, module: Any, precision: str | None, training: bool) -> None:
        super().__init__(type(module), precision, training)
        self._rngs = generators(module)
        self._widened = widened_dtypes(module)
        self._given = module.scope.mutable
        self._mutable: Any = None  # what a call may change, once that is known
        self._module, variables = module.unbind()
        self._collections: dict[str, tuple[str, ...]] = {}
        self._rest: dict[tuple[str, ...], Any] = {}  # what was sown, and other trees of arrays
        with self.precise():
            for path, value in _flatten(variables).items():
                if not is_array(_unboxed(value)):
                    self._rest[path] = value
                    continue
                name = ".".join(map(str, path[1:]))
                name = name if name not in self.values else ".".join(map(str, path))
                self._collections[name] = path
                self.values[name] = self._cast(_unboxed(value))
                if path[0] == "params":
                    self._trained.add(name)
                elif path[0] == "batch_stats":
                    self._moving.add(name)

    def _run(
        self, values: Values, args: Any, kwargs: Any, around: Around | None
    ) -> tuple[Any, Values]:
        from flax import linen

        every = {**self.values, **values}
        variables = self._variables(every)
        self._mutable = self._mutable or self._may_change(variables, args, kwargs)
        with contextlib.ExitStack() as stack:
            if around is not None:
                _, named = stack.enter_context(self._layer_by_layer(every, around))
                stack.enter_context(linen.intercept_methods(self._interceptor(named)))
            if self.training:
                trained = functools.partial(with_batch_statistics, self.still or ())
                stack.enter_context(linen.intercept_methods(trained))
            if self.precision:
                stack.enter_context(widened(self.precision, self._widened))
            output, moved = self._module.apply(
                variables, *args, rngs=self._rngs, mutable=self._mutable, **kwargs
            )
        names = {path: n for n, path in self._collections.items()}
        after = {names[p]: _unboxed(v) for p, v in _flatten(moved).items() if p in names}
        return output, {**every, **after}

    def _variables(self, every: Values) -> dict[str, Any]:
        return _unflatten(self._rest | {self._collections[n]: v for n, v in every.items()})

    def _as_users_train(self, values: Values, args: Any, kwargs: Any, modes: Modes) -> Any:
        from flax import linen

        module = self._module.clone(**switches_of(self._module))
        args, kwargs = switched(module, args, kwargs, training=True)
        with linen.intercept_methods(self._interceptor(modes)):
            return module.apply(
                self._variables({**self.values, **values}),
                *args,
                rngs=self._rngs,
                mutable=mutable(self._given, "batch_stats"),
                **kwargs,
            )[0]

    def _may_change(self, variables: Any, args: Any, kwargs: Any) -> Any:
        """In evaluation no statistics, since modules tell by that which mode they are in; but all
        of them where the module moves them even so, which is then found and named."""
        import jax
        from flax import errors

        every, still = mutable(self._given, "batch_stats"), mutable(self._given)
        if self.training or not self._moving:
            return every
        apply = functools.partial(self._module.apply, rngs=self._rngs, mutable=still)
        try:
            jax.eval_shape(lambda: apply(variables, *args, **kwargs)[0])
        except errors.ModifyScopeVariableError:
            return every
        return still

    def reseed(self) -> None:
        self._rngs = {name: _folded(key) for name, key in self._rngs.items()}

    def _interceptor(self, around: Around) -> Any:
        def intercept(proceed: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if context.method_name != "__call__" or module.scope is None:
                return proceed(*args, **kwargs)
            return around(".".join(module.path), module, proceed, args, dict(kwargs))

        return intercept


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
        self._leaves = {n: _folded(x) if _is_key(x) else x for n, x in self._leaves.items()}


def _is_key(value: Any) -> bool:
    return str(getattr(value, "dtype", "")).startswith("key")


def _folded(key: Any) -> Any:
    import jax

    return jax.random.fold_in(key, 1)


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


def cell_path(module: FlaxModule, path: str) -> str:
    """Where the cell of an RNN keeps its values, which in Linen may lie beside it; "" where there
    is none."""
    cell = getattr(module.modules.get(path), "cell", None)
    if cell is None:
        return ""
    try:
        return ".".join(cell.path)
    except (AttributeError, ValueError):
        return f"{path}.cell"


def _renewed(variable: Any) -> Any:
    from flax import nnx

    return variable.replace(_raw(variable)) if isinstance(variable, nnx.Variable) else variable


def _raw(variable: Any) -> Any:
    """What a Variable stores, not what its `on_get_value` makes of it; anything else as it is."""
    from flax import nnx

    return variable.get_raw_value() if isinstance(variable, nnx.Variable) else variable


def _dotted(path: Any) -> str:
    return ".".join(map(str, path))


def _flatten(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    found: dict[tuple[str, ...], Any] = {}
    for key, part in tree.items():
        found |= _flatten(part, (*path, key)) if isinstance(part, Mapping) else {(*path, key): part}
    return found


def _unflatten(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def _unboxed(value: Any) -> Any:
    return value.unbox() if hasattr(value, "unbox") else value
