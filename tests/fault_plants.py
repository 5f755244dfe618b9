"""Ways to plant a fault in the Flax twin of a model of the zoo: values, settings, behaviours."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from support import canonical

from convert.proof.pair import Call, Pair
from zoo.loading import build
from zoo.models.bert.model_flax import BertModel
from zoo.nn.attention_flax import dot_product_attention
from zoo.registry import families


def twins(
    family: str,
    tiny: str,
    spoil: Callable[[Any], Any] = lambda flax: None,
    flax_config: Mapping[str, Any] | None = None,
    train: bool = False,
    weights: Callable[[dict[str, np.ndarray]], None] = lambda w: None,
    **config: Any,
) -> Pair:
    """A family's twins with name-seeded weights; `spoil` plants the fault in the Flax one."""
    model = families()[family]
    c = replace(model.tiny[tiny], **config)
    values = canonical(model, c)
    weights(values)
    a = build(model, c, "torch", values)
    b = build(model, replace(c, **(flax_config or {})), "flax", values)
    if train:
        a.train()
        b.train()
    spoil(b)
    inputs = model.inputs(c)
    flax = {k: model.to_flax(k, v) for k, v in inputs.items()}
    return Pair(a, b, Call(kwargs=inputs), Call(kwargs=flax))


def at(module: Any, path: str) -> Any:
    """The submodule, list item or variable at a dotted path."""
    for part in path.split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


def value(path: str, change: Callable[..., Any], *others: str) -> Callable[[Any], None]:
    """A variable set to `change` of itself (and of other variables)."""

    def spoil(module: Any) -> None:
        found = [at(module, p)[...] for p in (path, *others)]
        at(module, path)[...] = jnp.asarray(change(*found))

    return spoil


def exchange(a: str, b: str) -> Callable[[Any], None]:
    """Two variables swapped."""

    def spoil(module: Any) -> None:
        x, y = at(module, a)[...], at(module, b)[...]
        at(module, a)[...], at(module, b)[...] = y, x

    return spoil


def setting(path: str, name: str, to: Any) -> Callable[[Any], None]:
    """Another attribute of a submodule."""
    return lambda module: setattr(at(module, path), name, to)


def behaviour(path: str, call: Callable[..., Any]) -> Callable[[Any], None]:
    """Another `__call__` for one submodule: a subclass of its class."""

    def spoil(module: Any) -> None:
        part = at(module, path) if path else module
        cls = type(part)
        part.__class__ = types.new_class(
            cls.__name__, (cls,), exec_body=lambda ns: ns.update(__call__=call)
        )

    return spoil


def both(*spoils: Callable[[Any], None]) -> Callable[[Any], None]:
    """Several at once."""
    return lambda module: [s(module) for s in spoils]  # type: ignore[func-returns-value]


# --- Wrong behaviours ---


def self_attention(**changes: Any) -> Callable[..., Array]:
    """BERT's self-attention with something else in it."""

    def call(self: Any, x: Array, bias: Array) -> Array:
        B, T, H = x.shape
        q, k, v = self.query(x), self.key(x), self.value(x)
        if changes.get("split") == "heads last":
            q, k, v = (y.reshape(B, T, -1, self.heads).swapaxes(-1, -2) for y in (q, k, v))
        else:
            q, k, v = (y.reshape(B, T, self.heads, -1) for y in (q, k, v))
        if changes.get("axis"):
            logits = jnp.einsum("btnd,bsnd->bnts", q, k) * q.shape[-1] ** -0.5 + bias
            weights = jax.nn.softmax(logits, axis=changes["axis"])
            return jnp.einsum("bnts,bsnd->btnd", weights, v).reshape(B, T, H)
        bias = None if changes.get("mask") == "none" else bias
        out = dot_product_attention(q, k, v, bias, self.dropout, changes.get("scale"))
        out = out.swapaxes(-1, -2) if changes.get("split") == "heads last" else out
        return out.reshape(B, T, H)

    return call


def bert_with_mask(make: Callable[[Array], Array]) -> Callable[..., Any]:
    """BertModel's own call with another additive mask."""

    def call(self: Any, input_ids: Array, **kw: Any) -> Any:
        from zoo.models.bert import model_flax

        original = model_flax.mask_bias
        model_flax.mask_bias = lambda mask, dtype: make(mask).astype(dtype)
        try:
            return BertModel.__call__(self, input_ids, **kw)
        finally:
            model_flax.mask_bias = original

    return call


def quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


def no_residual(self: Any, x: Array, residual: Array) -> Array:
    return self.LayerNorm(self.dropout(self.dense(x)))


def last_token(self: Any, x: Array) -> Array:
    return jnp.tanh(self.dense(x[:, -1]))


def stopped(self: Any, x: Array) -> Array:
    return jnp.tanh(self.dense(jax.lax.stop_gradient(x[:, 0])))


def shifted_positions(
    self: Any, input_ids: Array, token_type_ids: Array, position_ids: Array
) -> Array:
    x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
    return self.dropout(self.LayerNorm(x + self.position_embeddings(position_ids + 1)))


def half_precision(self: Any, x: Array) -> Array:
    return self.activation(self.dense(x).astype(jnp.float16)).astype(jnp.float32)


def convnet(flat: bool = False, pool: Callable[..., Array] | None = None) -> Callable[..., Array]:
    """The small convolutional net with another flattening or pool."""

    def call(self: Any, x: Array, taps: bool = False) -> Array:
        from zoo.nn.pool_flax import flatten, max_pool2d

        c = self.config
        for i in range(len(c.channels)):
            x = jax.nn.relu(getattr(self, f"conv{i + 1}")(x))
            x = (pool or max_pool2d)(x, 2) if c.pool else x
        x = x.reshape(len(x), -1) if flat else flatten(x)
        for i in range(len(c.hidden)):
            x = jax.nn.relu(getattr(self, f"fc{i + 1}")(x))
        return getattr(self, f"fc{len(c.hidden) + 1}")(x)

    return call


def average(x: Array, size: int) -> Array:
    return nnx.avg_pool(x, (size, size), (size, size))


def resnet_same_pool(self: Any, x: Array, taps: bool = False) -> Array:
    from zoo.nn.pool_flax import adaptive_avg_pool2d, flatten
    from zoo.nn.taps import Taps

    x = jax.nn.relu(self.bn1(self.conv1(x)))
    x = nnx.max_pool(x, (3, 3), (2, 2), "SAME")
    for name in ("layer1", "layer2", "layer3", "layer4"):
        for block in getattr(self, name):
            x = block(x, Taps(False))
    return self.fc(flatten(adaptive_avg_pool2d(x, 1)))


def flax_batchnorm(
    share: float | None = None, unbiased: bool = True
) -> Callable[..., tuple[Array, Array]]:
    def statistics(self: Any, x: Array) -> tuple[Array, Array]:
        new = self.new_share if share is None else share
        count = x.size // x.shape[-1]
        axes = tuple(range(x.ndim - 1))
        mean, var = x.mean(axes), x.var(axes)
        for running, batch in (
            (self.mean, mean),
            (self.var, var * (count / (count - 1) if unbiased else 1)),
        ):
            running[...] = (1 - new) * running[...] + new * batch
        return mean, var

    return statistics


def every_batchnorm(method: Callable[..., Any]) -> Callable[[Any], None]:
    """Another way of moving running statistics, in every BatchNorm."""
    from zoo.nn.batchnorm_flax import BatchNorm

    def spoil(module: Any) -> None:
        cls = type("BatchNorm2d", (BatchNorm,), {"_batch_statistics": method})
        for _, part in nnx.iter_modules(module):
            if isinstance(part, BatchNorm):
                part.__class__ = cls

    return spoil


def wavenet_unit(self: Any, filter: Array, gate: Array) -> Array:
    return jax.nn.sigmoid(filter) * jnp.tanh(gate)


def unscaled_embedding(self: Any, words: Any, ids: Array, position: Any, length: int) -> Array:
    from zoo.nn.positions_flax import sinusoids

    x = words(ids)
    return self.dropout(
        x + sinusoids(jnp.arange(ids.shape[1]) + position, length, self.d_model, x.dtype)
    )


def methods(path: str, **others: Callable[..., Any]) -> Callable[[Any], None]:
    """Other methods for one submodule."""

    def spoil(module: Any) -> None:
        part = at(module, path) if path else module
        part.__class__ = type(type(part).__name__, (type(part),), others)

    return spoil


def not_causal(
    self: Any,
    x: Array,
    memory: Any,
    memory_bias: Any,
    padding: Any,
    past: Any,
    position: Any,
) -> Any:
    from zoo.nn.attention_flax import mask_bias

    mask = jnp.ones((1, 1, x.shape[1], x.shape[1]), bool)
    mask = mask if padding is None else mask & ~padding.astype(bool)[:, None, None, :]
    bias = mask_bias(mask, x.dtype)
    caches = []
    for i, layer in enumerate(self.layers):
        x, now = layer(x, memory[i], bias, memory_bias, None, position)
        caches.append(now)
    return self.norm(x), caches


def heads_last(self: Any, x: Array) -> Array:
    return x.reshape(*x.shape[:-1], -1, self.heads).swapaxes(-1, -2)


def gate_rows(order: tuple[int, ...]) -> Callable[[Array], np.ndarray]:
    def change(x: Array) -> np.ndarray:
        blocks = np.split(np.asarray(x), len(order))
        return np.concatenate([blocks[i] for i in order])

    return change


def gates_in_code(projected: Array, state: Any, w: Array, b: Array) -> Any:
    h, c = state
    i, f, o, g = jnp.split(projected + (h @ w.T + b), 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def reset_first(projected: Array, state: Any, w: Array, b: Array) -> Any:
    (h,) = state
    H = h.shape[-1]
    xr, xz, xn = jnp.split(projected, 3, axis=-1)
    hr, hz, _ = jnp.split(h @ w.T + b, 3, axis=-1)
    r, z = jax.nn.sigmoid(xr + hr), jax.nn.sigmoid(xz + hz)
    n = jnp.tanh(xn + (r * h) @ w[2 * H :].T + b[2 * H :])
    return (n + z * (h - n),)


def gru_biases(module: Any) -> None:
    """All three gates' biases added up, as a cell with one bias has them."""
    for suffix in ("", "_reverse"):
        ih, hh = (at(module, f"gru.bias_{s}_l0{suffix}") for s in ("ih", "hh"))
        ih[...] = ih[...] + hh[...]
        hh[...] = jnp.zeros_like(hh[...])


def raised(weights: dict[str, np.ndarray]) -> None:
    """A mean far from zero in front of a LayerNorm."""
    weights["embeddings.word_embeddings.weight"] += 30


def flat_rows(x: Array) -> np.ndarray:
    return np.asarray(x).reshape(6, -1, x.shape[1]).swapaxes(0, 1).reshape(x.shape)


def padded(pair: Pair) -> Pair:
    """The same with padding among its tokens."""
    for call in (pair.call, pair.flax_call):
        call.kwargs["input_ids"][:, -2:] = 0
    return pair
