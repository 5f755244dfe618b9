"""A Flax module of either kind, taken apart: a pure function of its values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from convert.runtime.arrays import dtype_in, is_array, is_inexact, leaves, to_numpy
from convert.runtime.call import Call
from convert.runtime.interception import Around, intercepted
from convert.runtime.precision import jax_precision
from convert.runtime.unrolled import Unrolled
from zoo.containers.errors import UsageError

Values = dict[str, Any]  # dotted path -> array

_DTYPES = ("dtype", "param_dtype")
_LINEN_MUTABLE = ("batch_stats", "intermediates")


def as_flax(given: Any, variables: Mapping[str, Any] | None) -> Any | None:
    """An nnx.Module or a bound linen.Module, in eval mode and apart from the user's; None for what
    is not a Flax module. UsageError for a linen module without variables."""
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

    rngs = _linen_rngs(module)
    if "dropout" in rngs:
        return module
    bare, variables = module.unbind()
    rngs["dropout"] = jax.random.key(0)
    return bare.bind(variables, rngs=rngs, mutable=module.scope.mutable)


def _linen_rngs(module: Any) -> dict[str, Any]:
    return {name: rng.as_jax_rng() for name, rng in module.scope.rngs.items()}


def flax_module(module: Any, precision: str | None = None, training: bool = False) -> FlaxModule:
    """`module`, an nnx.Module or a bound linen.Module, taken apart; it stays as it is.

    `precision` ("float32", "float64") casts values, and the dtypes that layers compute in; None
    leaves both. `training`: norms use and move their batch statistics. UsageError for what is
    neither.
    """
    from flax import linen, nnx

    if isinstance(module, nnx.Module):
        return _Nnx(module, precision, training)
    if isinstance(module, linen.Module) and module.scope is not None:
        return _Linen(module, precision, training)
    raise UsageError(
        f"{type(module).__name__} is neither an nnx.Module nor a bound flax.linen.Module",
        "give module.bind(variables) of a Linen module",
    )


class FlaxModule:
    """`values` are its arrays by dotted path (Linen's without the collection): parameters, running
    statistics and other state, but no generators. Calling it is a pure function of such values."""

    def __init__(self, precision: str | None, training: bool) -> None:
        self.precision = precision
        self.training = training
        self.values: Values = {}
        self._trained: set[str] = set()
        self._moving: set[str] = set()
        self.modules: dict[str, Any] = {}  # path -> submodule, as last seen
        self.unroll = False  # whether scanned layers are called one by one where `around` is given
        self.stacks: dict[str, int] = {}  # path of a scanned stack -> its layers, once it was run

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
        raise NotImplementedError

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
        arrays = {k: self._cast(to_numpy(x)) for k, x in call.arrays().items()}
        return call.replaced(arrays)

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

        super().__init__(precision, training)
        made = nnx.clone(module)
        for path, part in nnx.iter_modules(made):
            self.modules[_dotted(path)] = part
            if training and isinstance(part, nnx.BatchNorm):
                part.use_running_average = False
            for name in _DTYPES if precision else ():  # nnx.Embed fixes its own when it is made
                if _is_wide(vars(part).get(name)):
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

    def __call__(
        self, values: Values, args: Any, kwargs: Any, around: Around | None = None
    ) -> tuple[Any, Values]:
        from flax import nnx

        # Variables are made anew, as belonging to the trace in which this run happens to be: a cell
        # of an nnx.RNN and a dropout that is left on draw from generators, which moves these.
        flat = {p: _renewed(v) for p, v in self._rest.items()}
        for name, value in {**self.values, **values}.items():
            path, variable = self._variables[name]
            held = isinstance(variable, nnx.Variable)
            flat[path] = variable.replace(value) if held else value
        module: Any = nnx.merge(self._graph, nnx.from_flat_state(flat))
        if self.training:
            around = _with_nnx_batch_statistics(around)
        if around is None:
            output = module(*args, **kwargs)
        else:
            self.modules = {_dotted(p): m for p, m in nnx.iter_modules(module)}
            every = {**self.values, **values}
            with (
                self._layer_by_layer(every, around) as (scans, named),
                intercepted(dict(self.modules), named, scans.find),
            ):
                output = module(*args, **kwargs)
        after = {_dotted(p): _raw(v) for p, v in nnx.to_flat_state(nnx.state(module))}
        return output, {n: after[n] for n in self.values if n in after}


class _Linen(FlaxModule):
    def __init__(self, module: Any, precision: str | None, training: bool) -> None:
        super().__init__(precision, training)
        self._rngs = _linen_rngs(module)
        self._mutable = _mutable(module.scope.mutable)
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

    def __call__(
        self, values: Values, args: Any, kwargs: Any, around: Around | None = None
    ) -> tuple[Any, Values]:
        from flax import linen

        every = {**self.values, **values}
        flat = self._rest | {self._collections[n]: v for n, v in every.items()}
        variables = _unflatten(flat)
        with contextlib.ExitStack() as stack:
            if around is not None:
                _, named = stack.enter_context(self._layer_by_layer(every, around))
                stack.enter_context(linen.intercept_methods(self._interceptor(named)))
            if self.training:
                stack.enter_context(linen.intercept_methods(_with_batch_statistics))
            if self.precision:
                stack.enter_context(widened(self.precision))
            output, moved = self._module.apply(
                variables, *args, rngs=self._rngs, mutable=self._mutable, **kwargs
            )
        names = {path: n for n, path in self._collections.items()}
        after = {names[p]: _unboxed(v) for p, v in _flatten(moved).items() if p in names}
        return output, {**every, **after}

    def _interceptor(self, around: Around) -> Any:
        def intercept(proceed: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if context.method_name != "__call__" or module.scope is None:
                return proceed(*args, **kwargs)
            return around(".".join(module.path), module, proceed, args, dict(kwargs))

        return intercept


def _with_nnx_batch_statistics(around: Around | None) -> Around:
    """NNX's BatchNorm in training mode, however the module calls it."""
    from flax import nnx

    def training(path: str, part: Any, proceed: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(part, nnx.BatchNorm):
            args, kwargs = args[:1], {**kwargs, "use_running_average": False}
        if around is None:
            return proceed(*args, **kwargs)
        return around(path, part, proceed, args, kwargs)

    return training


def _with_batch_statistics(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Linen's BatchNorm in training mode, however the module calls it."""
    from flax import linen

    layer = context.module
    if not isinstance(layer, linen.BatchNorm) or context.method_name != "__call__":
        return call(*args, **kwargs)
    given = layer.use_running_average
    object.__setattr__(layer, "use_running_average", None)  # else the argument is refused
    try:
        return call(*args, **{**kwargs, "use_running_average": False})
    finally:
        object.__setattr__(layer, "use_running_average", given)


@contextlib.contextmanager
def widened(precision: str) -> Iterator[None]:
    """Linen layers whose `dtype` is float32 computing in `precision`: NNX ones are cast as they are
    copied, but Linen's exist only while they are called."""
    from flax import linen

    def compute(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        # An RNN asks its cell for a state to start from without calling it.
        layers = [
            m for m in (context.module, getattr(context.module, "cell", None)) if m is not None
        ]
        held = [(m, n, vars(m)[n]) for m in layers for n in _DTYPES if _is_wide(vars(m).get(n))]
        for layer, name, _ in held:
            object.__setattr__(layer, name, np.dtype(precision))
        try:
            return call(*args, **kwargs)
        finally:
            for layer, name, value in held:
                object.__setattr__(layer, name, value)

    with linen.intercept_methods(compute):
        yield


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


def narrow_operation(module: FlaxModule, call: Call) -> str | None:
    """An operation that computes in fewer than 64 bits though `module` is in float64, if there is
    one. Nothing is run. Raises what the module raises."""
    import jax

    with module.precise():
        args, kwargs = module.arguments(call)

        def forward(values: Values) -> Any:
            output, after = module(values, args, kwargs)
            return leaves(output), after

        return _narrow(jax.make_jaxpr(forward)(module.values).jaxpr)


def narrow_outputs(jaxpr: Any) -> list[str | None]:
    """Of each output of a jaxpr an operation in fewer than 64 bits on the way to it, if any."""
    by: dict[Any, str] = {}
    for equation in jaxpr.eqns:
        before = (by.get(v) for v in equation.invars if not hasattr(v, "val"))
        found = next(filter(None, before), None) or _narrow_equation(equation)
        if found is not None:
            by |= dict.fromkeys(equation.outvars, found)
    return [None if hasattr(v, "val") else by.get(v) for v in jaxpr.outvars]


def _narrow(jaxpr: Any) -> str | None:
    return next(filter(None, map(_narrow_equation, jaxpr.eqns)), None)


def _narrow_equation(equation: Any) -> str | None:
    import jax.numpy as jnp

    for value in equation.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns") and (found := _narrow(inner)):
                return found
    for out in equation.outvars:
        dtype = getattr(out.aval, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            continue
        if dtype.itemsize < (16 if jnp.issubdtype(dtype, jnp.complexfloating) else 8):
            return f"{equation.primitive.name} in {dtype.name}"
    return None


def _mutable(mutable: Any) -> Any:
    """What a bound module may change, and what we want to see changed."""
    if mutable is True:
        return True
    if mutable is False or mutable is None:
        mutable = ()
    if isinstance(mutable, str):
        mutable = (mutable,)
    if isinstance(mutable, tuple | list | set | frozenset):
        return [*mutable, *(c for c in _LINEN_MUTABLE if c not in mutable)]
    return mutable  # a DenyList


def _renewed(variable: Any) -> Any:
    from flax import nnx

    return variable.replace(_raw(variable)) if isinstance(variable, nnx.Variable) else variable


def _raw(variable: Any) -> Any:
    """What a Variable stores, not what its `on_get_value` makes of it; anything else as it is."""
    from flax import nnx

    return variable.get_raw_value() if isinstance(variable, nnx.Variable) else variable


def _is_wide(dtype: Any) -> bool:
    with contextlib.suppress(TypeError):
        return dtype is not None and np.dtype(dtype) in (np.float32, np.float64)
    return False


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
