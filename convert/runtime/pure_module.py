"""A Flax module as a pure function of its values: what NNX, Linen and functions have in common."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from convert.runtime.arrays import dtype_in, is_inexact, to_numpy
from convert.runtime.asking import asks, computed_at_once, remember_asking
from convert.runtime.call import Call
from convert.runtime.interception import Around
from convert.runtime.norm_modes import Modes
from convert.runtime.precision import jax_precision
from convert.runtime.unrolled import Unrolled

LOG = logging.getLogger(__name__)
Values = dict[str, Any]  # dotted path -> array


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
        """As `__call__`."""
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


def is_key(value: Any) -> bool:
    """Whether a value is a JAX key for random numbers."""
    return str(getattr(value, "dtype", "")).startswith("key")


def folded(key: Any) -> Any:
    """Another key, made of this one."""
    import jax

    return jax.random.fold_in(key, 1)


def raw(variable: Any) -> Any:
    """What a Variable stores, not what its `on_get_value` makes of it; anything else as it is."""
    from flax import nnx

    return variable.get_raw_value() if isinstance(variable, nnx.Variable) else variable


def dotted(path: Any) -> str:
    """A path of names and numbers as one string."""
    return ".".join(map(str, path))


def flatten(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The leaves of nested mappings, by their keys from the outermost."""
    found: dict[tuple[str, ...], Any] = {}
    for key, part in tree.items():
        found |= flatten(part, (*path, key)) if isinstance(part, Mapping) else {(*path, key): part}
    return found


def unflatten(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """What `flatten` took apart."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree
