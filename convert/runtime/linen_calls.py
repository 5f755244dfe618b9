"""A bound Linen module's generators, what it may change, and how its layers compute."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from convert.runtime.norm_modes import keeps, switched
from convert.runtime.precision import dtype_attributes, wide_attributes

_SOWN = ("intermediates",)


def with_dropout(module: Any) -> Any:
    """The bound linen module with a generator for dropout: one that is left on is then found and
    named, where it would only raise."""
    import jax

    rngs = generators(module)
    if "dropout" in rngs:
        return module
    bare, variables = module.unbind()
    rngs["dropout"] = jax.random.key(0)
    return bare.bind(variables, rngs=rngs, mutable=module.scope.mutable)


def generators(module: Any) -> dict[str, Any]:
    """The keys of a bound module, by stream."""
    return {name: rng.as_jax_rng() for name, rng in module.scope.rngs.items()}


def with_batch_statistics(
    still: Collection[str], call: Any, args: Any, kwargs: Any, context: Any
) -> Any:
    """Linen's BatchNorm in training mode, however the module calls it; and somebody's own that
    keeps statistics, and is told by an argument. Those whose paths are in `still` stay as they are.
    """
    from flax import linen

    layer = context.module
    if context.method_name != "__call__" or not keeps(layer):
        return call(*args, **kwargs)
    if ".".join(layer.path) in still:
        return call(*args, **kwargs)
    if not isinstance(layer, linen.BatchNorm):
        args, kwargs = switched(layer, args, kwargs, training=True)
        return call(*args, **kwargs)
    given = layer.use_running_average
    object.__setattr__(layer, "use_running_average", None)  # else the argument is refused
    try:
        return call(*args[:1], **{**kwargs, "use_running_average": False})
    finally:
        object.__setattr__(layer, "use_running_average", given)


@contextlib.contextmanager
def widened(precision: str, dtypes: Collection[str] = ()) -> Iterator[None]:
    """Linen layers whose `dtype` is float32, or one of `dtypes`, computing in `precision`: NNX ones
    are cast as they are copied, but Linen's exist only while they are called."""
    from flax import linen

    def compute(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        # An RNN asks its cell for a state to start from without calling it.
        layers = [context.module, getattr(context.module, "cell", None)]
        held = [
            (layer, name, value)
            for layer in layers
            if layer is not None
            for name, value in _narrowed(layer, dtypes).items()
        ]
        for layer, name, _ in held:
            object.__setattr__(layer, name, np.dtype(precision))
        try:
            return call(*args, **kwargs)
        finally:
            for layer, name, value in held:
                object.__setattr__(layer, name, value)

    with linen.intercept_methods(compute):
        yield


def _narrowed(layer: Any, dtypes: Collection[str]) -> dict[str, Any]:
    """The attributes of a layer that say what it computes in, where that is to be widened."""
    narrow = {n: d for n, d in dtype_attributes(layer).items() if d.name in dtypes}
    return dict(wide_attributes(layer)) | narrow


@contextlib.contextmanager
def rewound(module: Any) -> Iterator[None]:
    """A layer that may be called once more within its own call: a Linen one refuses names that it
    has given out. NNX layers need nothing."""
    scope = getattr(module, "scope", None)
    if scope is None:
        yield
        return
    object.__setattr__(module, "scope", scope.rewound())
    try:
        yield
    finally:
        object.__setattr__(module, "scope", scope)


def mutable(given: Any, *more: str) -> Any:
    """What a bound module may change, what we want to see changed, and the collections `more`."""
    if given is True:
        return True
    if given is False or given is None:
        given = ()
    if isinstance(given, str):
        given = (given,)
    if isinstance(given, tuple | list | set | frozenset):
        return list(dict.fromkeys((*given, *_SOWN, *more)))
    return given  # a DenyList
