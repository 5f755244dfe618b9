"""NNX layers with torch's meaning, under the names that their torch twins have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from zoo.nn.options_flax import Options

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),  # the frameworks' defaults differ
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Embed(nnx.Embed):
    """nnx.Embed whose row `padding_idx` gets no gradient when it is looked up, as in torch."""

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        padding_idx: int | None = None,
        **kw: Unpack[Options],
    ) -> None:
        super().__init__(num_embeddings, features, **kw)
        self.padding_idx = padding_idx

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        x = super().__call__(inputs, out_sharding)
        if self.padding_idx is None:
            return x
        return jnp.where((inputs == self.padding_idx)[..., None], jax.lax.stop_gradient(x), x)


class LayerNorm(nnx.LayerNorm):
    """nnx.LayerNorm over the last axis as torch computes it; `eps` has no default.

    Flax's default epsilon is a tenth of torch's, and its fast variance loses digits where the
    mean is large. Several sizes are as many last axes, and the shape of `scale` and `bias`.
    """

    def __init__(self, dim: int | tuple[int, ...], eps: float, **kw: Unpack[Options]) -> None:
        shape = (dim,) if isinstance(dim, int) else dim
        axes = tuple(range(-len(shape), 0)) if len(shape) > 1 else -1
        super().__init__(
            math.prod(shape),
            epsilon=eps,
            use_fast_variance=False,
            reduction_axes=axes,
            feature_axes=axes,
            **kw,
        )
        if len(shape) > 1:
            self.scale = nnx.Param(jnp.ones(shape, self.param_dtype))
            self.bias = nnx.Param(jnp.zeros(shape, self.param_dtype))


class Bilinear(nnx.Module):
    """torch's Bilinear: y_o = x1 W_o x2 + b_o, with `weight` (out, in1, in2) and `bias` (out,)."""

    def __init__(
        self,
        in1_features: int,
        in2_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        bound = in1_features**-0.5
        shape = (out_features, in1_features, in2_features)
        draw = partial(jax.random.uniform, dtype=param_dtype, minval=-bound, maxval=bound)
        self.weight = nnx.Param(draw(rngs.params(), shape))
        self.bias = nnx.Param(draw(rngs.params(), (out_features,))) if bias else None
        self.dtype = dtype

    def __call__(self, input1: Array, input2: Array) -> Array:
        """(..., in1), (..., in2) -> (..., out)."""
        bias = None if self.bias is None else self.bias[...]
        given = (input1, input2, self.weight[...], bias)
        x1, x2, weight, bias = nnx.nn.dtypes.promote_dtype(given, dtype=self.dtype)
        y = jnp.einsum("...i,oij,...j->...o", x1, weight, x2)
        return y if bias is None else y + bias


class PReLU(nnx.Module):
    """torch's PReLU: x, or `weight` x where x is not positive; one weight, or one a channel.

    Channels are last. `weight` is (num_parameters,), as in torch; nnx.PReLU has a single one.
    """

    def __init__(self, num_parameters: int = 1, init: float = 0.25, **kw: Unpack[Options]) -> None:
        dtype = kw.get("param_dtype", jnp.float32)
        self.weight = nnx.Param(jnp.full(num_parameters, init, dtype))
        self.dtype = kw.get("dtype")

    def __call__(self, x: Array) -> Array:
        return jnp.where(x > 0, x, self.weight[...] * x)


def softplus(x: Array, beta: float = 1.0, threshold: float = 20.0) -> Array:
    """log(1 + exp(beta x)) / beta; x itself where beta x is above the threshold, as in torch."""
    above = x * beta > threshold
    return jnp.where(above, x, jax.nn.softplus(jnp.where(above, 0, x) * beta) / beta)


class ReLU(nnx.Module):
    """max(x, 0), as a module for use in a Sequential."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu(x)


class Sequential(nnx.List[Any]):
    """Layers called one after another, under torch's paths: `0.kernel`, `1.kernel`.

    In nnx.Sequential the paths would be `layers.0.kernel`, `layers.1.kernel`.
    """

    def __init__(self, *layers: Callable[[Array], Array]) -> None:
        super().__init__(layers)

    def __call__(self, x: Array) -> Array:
        for layer in self:
            x = layer(x)
        return x


class NamedSequential(nnx.Module):
    """Layers called one after another, under the names that they have in torch: `conv0.kernel`."""

    def __init__(self, layers: Mapping[str, Callable[[Array], Array]]) -> None:
        self._names = tuple(layers)
        for name, layer in layers.items():
            setattr(self, name, layer)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __call__(self, x: Array) -> Array:
        for name in self._names:
            x = getattr(self, name)(x)
        return x
