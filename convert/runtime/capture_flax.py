"""Runs of a Flax module, NNX or Linen, with every call of every submodule seen or replaced."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from convert.runtime.arrays import is_float, leaves, replaced, to_numpy
from convert.runtime.call import Call
from convert.runtime.trace import Recorder, Trace, array_arguments

# (path, module, call of the original, args, kwargs) -> output
Around = Callable[[str, Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
Values = dict[str, Any]


def trace_flax(module: Any, call: Call, precision: str = "float32") -> Trace:
    """Every call of every submodule of an nnx.Module or a bound flax.linen.Module, run eagerly.

    The run is that of a copy in `precision`: state and generators of `module` stay as they are.
    """
    return record(Side(module, precision), call)


class Side:
    """A copy of a Flax module of either kind, whose values are held apart from it."""

    def __init__(self, module: Any, precision: str) -> None:
        from flax import nnx

        self.precision = precision
        self.nnx = isinstance(module, nnx.Module)
        self.modules: dict[str, Any] = {}  # path -> module, as last seen
        with precise(precision):
            if self.nnx:
                self._split(module)
            else:
                self._unbind(module)

    def _split(self, module: Any) -> None:
        from flax import nnx

        made = nnx.clone(module)
        wide = {"float32": np.float32, "float64": np.float64}[self.precision]
        for path, part in nnx.iter_modules(made):
            self.modules[".".join(map(str, path))] = part
            for name in ("dtype", "param_dtype"):  # nnx.Embed fixes its own when it is made
                if getattr(part, name, None) in (np.float32, np.float64):
                    setattr(part, name, wide)
        graph, state = nnx.split(made)
        flat = nnx.to_flat_state(state)
        self._graph, self._rest = graph, {}
        self.values: Values = {}
        for path, variable in flat:
            value = variable.get_value() if hasattr(variable, "get_value") else variable
            if isinstance(variable, nnx.RngState) or not _is_weight(value):
                self._rest[path] = variable
            else:
                self.values[".".join(map(str, path))] = self._cast(value)
        self._paths = {".".join(map(str, p)): (p, v) for p, v in flat}

    def _unbind(self, module: Any) -> None:
        from flax import linen

        if not isinstance(module, linen.Module) or module.scope is None:
            from zoo.containers.errors import UsageError

            raise UsageError(
                f"{type(module).__name__} is neither an nnx.Module nor a bound flax.linen.Module",
                "give module.bind(variables) of a Linen module",
            )
        scope: Any = module.scope
        self._mutable = scope.mutable
        self._rngs = {k: v.as_jax_rng() for k, v in scope.rngs.items()}
        self._linen, variables = module.unbind()
        self._collections: dict[str, tuple[str, ...]] = {}
        self.values = {}
        for path, value in _flatten(dict(variables)).items():
            name = ".".join(map(str, path[1:]))
            name = name if name not in self.values else ".".join(map(str, path))
            self._collections[name] = path
            self.values[name] = self._cast(_plain(value))

    def _cast(self, value: Any) -> Any:
        import jax.numpy as jnp

        value = jnp.asarray(value)
        return value.astype(self.precision) if is_float(value) else value

    def run(self, call: Call, around: Around, values: Values | None = None) -> tuple[Any, Values]:
        """The output and the values afterwards (running statistics may have moved)."""
        args, kwargs = self.arguments(call)
        given = self.values if values is None else values
        if self.nnx:
            return self._run_nnx(args, kwargs, around, given)
        return self._run_linen(args, kwargs, around, given)

    def _run_nnx(
        self, args: Any, kwargs: Any, around: Around, values: Values
    ) -> tuple[Any, Values]:
        from flax import nnx

        # Variables are made anew, as belonging to the trace in which this run happens to be.
        flat = {p: v.replace(v.get_value()) for p, v in self._rest.items()} | {
            self._paths[n][0]: self._paths[n][1].replace(v) for n, v in values.items()
        }
        module = nnx.merge(self._graph, nnx.from_flat_state(flat))
        self.modules = {".".join(map(str, p)): m for p, m in nnx.iter_modules(module)}
        with intercepted(self.modules, around):
            output = module(*args, **kwargs)
        after = {
            ".".join(map(str, p)): v.get_value()
            for p, v in nnx.to_flat_state(nnx.state(module))
            if ".".join(map(str, p)) in values
        }
        return output, after

    def _run_linen(
        self, args: Any, kwargs: Any, around: Around, values: Values
    ) -> tuple[Any, Values]:
        from flax import linen

        def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if context.method_name != "__call__" or module.scope is None:
                return next_fun(*args, **kwargs)
            path = ".".join(module.path)
            self.modules[path] = module
            return around(path, module, next_fun, args, dict(kwargs))

        flat = {self._collections[n]: v for n, v in values.items()}
        variables = _unflatten(flat)
        with linen.intercept_methods(interceptor):
            made: Any = self._linen.apply(
                variables, *args, rngs=self._rngs, mutable=self._mutable, **kwargs
            )
        if self._mutable is False or (isinstance(self._mutable, list) and not self._mutable):
            return made, values
        output, changed = made
        moved = _flatten(dict(changed))
        names = {path: n for n, path in self._collections.items()}
        new = {names[p]: _plain(v) for p, v in moved.items() if p in names}
        return output, {**values, **new}

    def arguments(self, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments as arrays of JAX, floating-point ones in the side's precision."""

        def arrays(tree: Any) -> Any:
            return replaced(tree, {k: self._cast(to_numpy(x)) for k, x in leaves(tree).items()})

        return tuple(arrays(a) for a in call.args), {k: arrays(v) for k, v in call.kwargs.items()}


def record(side: Side, call: Call) -> Trace:
    """A run of `side`, recorded. What raises ends the trace with a note; the calls before stay."""
    recorder = Recorder()

    def around(path: str, module: Any, proceed: Any, args: Any, kwargs: Any) -> Any:
        given = array_arguments(type(module).__call__, (module, *args), kwargs)
        if traced(given):
            recorder.note(f"{path}: inside jit, scan or vmap there are no values to record")
            return proceed(*args, **kwargs)
        arrays = {k: to_numpy(v) for k, v in given.items()}
        recorder.enter(path, type(module).__name__, arrays)
        output = proceed(*args, **kwargs)
        recorder.leave({k: to_numpy(v) for k, v in leaves(output).items()})
        return output

    with precise(side.precision):
        try:
            recorder.trace.output, _ = side.run(call, around)
        except Exception as e:
            within = recorder.current.name if recorder.current else ""
            text = str(e).partition("\n")[0]
            recorder.note(f"{within or 'the module'} raises {type(e).__name__}: {text}")
    return recorder.trace


def traced(values: Mapping[str, Any]) -> bool:
    """Whether any of these arrays is a tracer of JAX."""
    import jax

    return any(isinstance(v, jax.core.Tracer) for v in values.values())


@contextlib.contextmanager
def precise(precision: str) -> Iterator[None]:
    """JAX with 64 bits where they are asked for and its most precise products."""
    import jax

    with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("highest"):
        yield


@contextlib.contextmanager
def intercepted(modules: Mapping[str, Any], around: Around) -> Iterator[None]:
    """`around` the `__call__` of each of these NNX modules; the classes are restored afterwards.

    A module is known by its identity, so that others of its class pass through, and so does what a
    `__call__` asks of its own base class.
    """
    paths = {id(m): path for path, m in modules.items()}
    active: list[Any] = []

    def wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def called(self: Any, *args: Any, **kwargs: Any) -> Any:
            path = paths.get(id(self))
            if path is None or any(a is self for a in active):
                return original(self, *args, **kwargs)
            active.append(self)
            try:
                proceed = functools.partial(original, self)
                return around(path, self, proceed, args, kwargs)
            finally:
                active.pop()

        return called

    classes: set[Any] = {type(m) for m in modules.values() if callable(m)}
    own = {c: c.__dict__.get("__call__") for c in classes}
    originals = {c: c.__call__ for c in classes}
    try:
        for c in classes:
            c.__call__ = wrapper(originals[c])
        yield
    finally:
        for c in classes:
            if own[c] is None:
                del c.__call__
            else:
                c.__call__ = own[c]


def attributes(module: Any) -> dict[str, Any]:
    """The plain settings of a Flax module: epsilon, momentum, padding, ..."""
    if dataclasses.is_dataclass(module):
        found = {f.name: getattr(module, f.name, None) for f in dataclasses.fields(module)}
        return {k: v for k, v in found.items() if k not in ("parent", "name")}
    return {k: v for k, v in vars(module).items() if not k.startswith("_")}


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


def _plain(value: Any) -> Any:
    return value.unbox() if hasattr(value, "unbox") else value


def _is_weight(value: Any) -> bool:
    return hasattr(value, "dtype") and not str(value.dtype).startswith("key")
