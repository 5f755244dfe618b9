"""The keyword arguments that every NNX layer and model of the zoo takes and passes on."""

from __future__ import annotations

from typing import Required, TypedDict

from flax import nnx
from jax.typing import DTypeLike


class Options(TypedDict, total=False):
    """`def __init__(self, ..., **kw: Unpack[Options])`."""

    dtype: DTypeLike | None  # of the computation; None: what inputs and parameters promote to
    param_dtype: DTypeLike  # of the parameters
    rngs: Required[nnx.Rngs]  # of initial values and dropout, as everywhere in NNX
