"""The same random numbers for torch and for JAX, so that modules that draw can be compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np


class _Numbers:
    """Arrays of the n-th draw of a kind, the same for every object of this class."""

    def __init__(self) -> None:
        self.count = {"normal": 0, "uniform": 0}

    def next(self, kind: str, shape: Sequence[int]) -> Any:
        self.count[kind] += 1
        rng = np.random.default_rng((self.count[kind], *shape))
        return rng.standard_normal(shape) if kind == "normal" else rng.random(shape)


# What draws in torch: which kind, and how the result comes of the draw.
_KINDS = {
    "aten::randn": "normal",
    "aten::randn_like": "normal",
    "aten::normal_": "normal",
    "aten::normal": "normal",
    "aten::rand": "uniform",
    "aten::rand_like": "uniform",
    "aten::uniform_": "uniform",
}
KNOWN = frozenset(
    {
        *("aten.randn.default", "aten.randn_like.default", "aten.normal_functional.default"),
        *("aten.rand.default", "aten.rand_like.default", "aten.uniform.default"),
        *("aten.normal.Tensor_Tensor", "aten.normal.Tensor_float", "aten.normal.float_Tensor"),
    }
)


@contextlib.contextmanager
def torch_draws() -> Iterator[None]:
    """While it lasts, torch draws these numbers, from the first one on."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    numbers = _Numbers()

    mode: Any = TorchDispatchMode

    class Fixed(mode):  # type: ignore[misc]
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kind = _KINDS.get(op.name().partition(".")[0])
            made = op(*args, **(kwargs or {}))
            if kind is None:
                return made
            drawn = torch.as_tensor(numbers.next(kind, tuple(made.shape)), dtype=made.dtype)
            name, given = op.name().partition(".")[0], list(args)
            if name == "aten::normal":
                drawn = given[0] + drawn * given[1]
            elif name in ("aten::normal_", "aten::uniform_"):
                a, b = given[1:] + [0.0, 1.0][len(given) - 1 :]
                drawn = a + b * drawn if kind == "normal" else a + (b - a) * drawn
            return made.copy_(drawn)

    with Fixed():
        yield


@contextlib.contextmanager
def jax_draws() -> Iterator[None]:
    """While it lasts, jax.random's normal and uniform give these numbers, from the first one on."""
    import jax
    import jax.numpy as jnp

    numbers = _Numbers()

    def instead(kind: str) -> Any:
        def drawn(key: Any, shape: Sequence[int] = (), dtype: Any = None) -> Any:
            wide = jax.dtypes.canonicalize_dtype(dtype or float)
            return jnp.asarray(numbers.next(kind, tuple(shape)), wide)

        return drawn

    with mock.patch.multiple(jax.random, normal=instead("normal"), uniform=instead("uniform")):
        yield
