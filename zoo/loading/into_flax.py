"""NumPy arrays into an NNX module, without a change of bits."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zoo.containers.errors import UsageError
from zoo.loading.into_shards import on_every_device
from zoo.model import Config, Model, with_config


def build(
    model: Model,
    config: Config,
    values: Iterable[tuple[str, np.ndarray | jax.Array]],
    dtype: str | None,
    seed: int,
) -> Any:
    """The NNX twin holding `values` (paths joined with dots), in eval mode.

    Arrays of JAX's stay where they are; random keys are then on all devices that hold the first.
    Raises UsageError where JAX would change a dtype behind the caller's back.
    """
    arrays: dict[str, jax.Array] = {}
    like: jax.sharding.Sharding | None = None
    for name, array in values:
        if isinstance(array, jax.Array):
            like = like or array.sharding
            arrays[name] = array
        else:
            arrays[name] = place(name, array)
    floats = {a.dtype for a in arrays.values() if jnp.issubdtype(a.dtype, jnp.floating)}
    param_dtype = jnp.result_type(*floats) if floats else jnp.float32
    compute = None if dtype is None else jnp.dtype(dtype)
    definition = functools.partial(
        model.definition("flax"), config, dtype=compute, param_dtype=param_dtype
    )
    module = nnx.eval_shape(lambda: with_config(definition(rngs=_still(seed)), config))
    if any(isinstance(node, _Still) for _, node in nnx.iter_graph(module)):  # it keeps them
        module = nnx.eval_shape(lambda: with_config(definition(rngs=nnx.Rngs(seed)), config))
    graph, abstract = nnx.split(module)

    @functools.cache
    def tables() -> dict[str, jax.Array]:
        """What the definition itself gives: of tables, which no checkpoint has."""
        state = nnx.to_flat_state(nnx.state(definition(rngs=nnx.Rngs(seed))))
        return {".".join(map(str, p)): v.get_value() for p, v in state}

    def fill(path: tuple[Any, ...], variable: Any) -> Any:
        name = ".".join(str(p) for p in path)
        if isinstance(variable, nnx.RngKey):
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
            return variable.replace(key if like is None else on_every_device(key, like))
        if isinstance(variable, nnx.RngCount):
            count = jnp.zeros((), jnp.uint32)
            return variable.replace(count if like is None else on_every_device(count, like))
        if name not in arrays:
            table = tables()[name]
            return variable.replace(table if like is None else on_every_device(table, like))
        return variable.replace(arrays[name])

    filled = nnx.merge(graph, nnx.map_state(fill, abstract))
    filled.eval()
    return filled


def check_width(name: str, dtype: np.dtype) -> None:
    """UsageError where JAX would change the dtype."""
    wide = dtype.itemsize == 8 and dtype.kind != "c"
    if wide and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise UsageError(
            f"{name} is {dtype.name}: JAX would cut its 64 bits to 32",
            "set jax_enable_x64 to keep them, or give param_dtype='float32'",
        )


def place(name: str, array: np.ndarray) -> jax.Array:
    """The array as JAX's; UsageError where JAX would change its dtype."""
    check_width(name, array.dtype)
    # Aligned memory becomes JAX's without a copy.
    made: jax.Array = jax.device_put(array)
    return made


class _Still(nnx.RngStream):
    """A stream that gives one key and counts nothing. Only shapes are wanted of what is drawn, and
    the counter of a real stream is most of the time that tracing a large module takes."""

    def __call__(self) -> jax.Array:
        return _key()

    def fork(self, *, split: int | tuple[int, ...] | None = None) -> nnx.RngStream:
        key = _key() if split is None else jax.random.split(_key(), split)
        return nnx.RngStream(key, tag=self.tag)

    def split(self, k: int | tuple[int, ...]) -> nnx.RngStream:
        return self.fork(split=k)


def _still(seed: int) -> nnx.Rngs:
    rngs = nnx.Rngs(seed)
    setattr(rngs, "default", _Still(_key(), tag="default"))  # noqa: B010 - unknown to the types
    return rngs


@functools.cache
def _key() -> jax.Array:
    with jax.ensure_compile_time_eval():
        return jax.random.key(0)
