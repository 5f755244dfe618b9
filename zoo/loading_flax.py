"""NumPy arrays into an NNX module, without a change of bits."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zoo.containers.errors import UsageError
from zoo.model import Config, Model


def build(
    model: Model, config: Config, values: dict[str, np.ndarray], dtype: str | None, seed: int
) -> Any:
    """The NNX twin holding `values` (paths joined with dots), in eval mode. Empties `values`, so
    that no tensor is held twice for longer than it takes to copy it.

    Raises UsageError where JAX would change a dtype behind the caller's back.
    """
    if not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        wide = sorted(n for n, a in values.items() if a.dtype.itemsize == 8 and a.dtype.kind != "c")
        if wide:
            raise UsageError(
                f"{wide[0]} and {len(wide) - 1} more are of 64 bits, which JAX would cut to 32",
                "set jax_enable_x64 to keep them, or give param_dtype='float32'",
            )
    floats = [jnp.dtype(a.dtype) for a in values.values() if jnp.issubdtype(a.dtype, jnp.floating)]
    param_dtype = jnp.result_type(*set(floats)) if floats else jnp.float32
    compute = None if dtype is None else jnp.dtype(dtype)
    module = nnx.eval_shape(
        lambda: model.definition("flax")(
            config, dtype=compute, param_dtype=param_dtype, rngs=nnx.Rngs(seed)
        )
    )
    graph, abstract = nnx.split(module)
    missing: list[str] = []

    def fill(path: tuple[Any, ...], variable: Any) -> Any:
        name = ".".join(str(p) for p in path)
        if isinstance(variable, nnx.RngKey):
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
            return variable.replace(key)
        if isinstance(variable, nnx.RngCount):
            return variable.replace(jnp.zeros((), jnp.uint32))
        if name not in values:
            missing.append(name)
            return variable
        return variable.replace(jnp.asarray(values.pop(name)))

    state = nnx.map_state(fill, abstract)
    if missing:
        raise KeyError(f"the layout lacks {missing}")
    filled = nnx.merge(graph, state)
    filled.eval()
    return filled
