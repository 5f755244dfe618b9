"""Users' own modules, torch and Flax (NNX or Linen), right and with a fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax import Array
from torch import Tensor, nn

from convert.matching.pair import Pair
from convert.runtime.call import Call
from zoo import probe


def seeded(module: nn.Module) -> nn.Module:
    """A torch module with weights by its tensors' names, in eval mode."""
    state = {
        n: torch.from_numpy(probe.weight(n, tuple(t.shape))) if t.is_floating_point() else t
        for n, t in module.state_dict().items()
    }
    module.load_state_dict(state)
    return module.eval()


def arrays(module: nn.Module) -> dict[str, np.ndarray]:
    return {n: t.detach().numpy() for n, t in module.state_dict().items()}


# --- torch.nn.TransformerEncoder and its Linen twin ---


class EncoderLayer(linen.Module):
    heads: int
    width: int
    epsilon: float = 1e-5

    @linen.compact
    def __call__(self, x: Array) -> Array:
        attention = linen.MultiHeadDotProductAttention(self.heads, name="self_attn")
        x = linen.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="norm1")(x + attention(x))
        y = linen.Dense(self.width, name="linear1")(x)
        y = linen.Dense(x.shape[-1], name="linear2")(jax.nn.relu(y))
        norm = linen.LayerNorm(epsilon=self.epsilon, use_fast_variance=False, name="norm2")
        return norm(x + y)


class Encoder(linen.Module):
    heads: int
    width: int
    epsilons: tuple[float, ...]

    @linen.compact
    def __call__(self, x: Array) -> Array:
        for i, epsilon in enumerate(self.epsilons):
            x = EncoderLayer(self.heads, self.width, epsilon, name=f"layers_{i}")(x)
        return x


def encoder_values(w: dict[str, np.ndarray], layers: int, heads: int) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for i in range(layers):
        p = f"layers.{i}."
        E = w[p + "norm1.weight"].size
        qkv = zip(
            ("query", "key", "value"),
            np.split(w[p + "self_attn.in_proj_weight"], 3),
            np.split(w[p + "self_attn.in_proj_bias"], 3),
            strict=True,
        )
        attention: dict[str, Any] = {
            name: {"kernel": k.T.reshape(E, heads, -1), "bias": b.reshape(heads, -1)}
            for name, k, b in qkv
        }
        attention["out"] = {
            "kernel": w[p + "self_attn.out_proj.weight"].T.reshape(heads, -1, E),
            "bias": w[p + "self_attn.out_proj.bias"],
        }
        params[f"layers_{i}"] = {
            "self_attn": attention,
            **{n: {"kernel": w[f"{p}{n}.weight"].T, "bias": w[f"{p}{n}.bias"]}
               for n in ("linear1", "linear2")},
            **{n: {"scale": w[f"{p}{n}.weight"], "bias": w[f"{p}{n}.bias"]}
               for n in ("norm1", "norm2")},
        }  # fmt: skip
    return params


def encoder_pair(
    epsilon: float = 1e-5, spoil: Callable[[dict[str, Any]], None] | None = None
) -> Pair:
    """Two layers of nn.TransformerEncoderLayer; `epsilon` is that of the last Linen norm."""
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    a = seeded(nn.TransformerEncoder(layer, 2))
    params = encoder_values(arrays(a), 2, 4)
    if spoil:
        spoil(params)
    b = Encoder(4, 24, (1e-5, epsilon)).bind({"params": params})
    x = probe.normal("x", (2, 5, 16)).astype(np.float32)
    return Pair(a, b, Call((x,)), Call((x,)))


def wrong_heads(params: dict[str, Any]) -> None:
    query = params["layers_1"]["self_attn"]["query"]
    E, N, D = query["kernel"].shape
    query["kernel"] = query["kernel"].reshape(E, D, N).swapaxes(1, 2)


# --- A Sequential and a compact module without names ---


class Compact(linen.Module):
    activation: Callable[[Array], Array]
    flat: bool = False
    pool: Callable[..., Array] = linen.max_pool

    @linen.compact
    def __call__(self, x: Array) -> Array:
        x = linen.Conv(6, (3, 3), padding=((1, 1), (1, 1)))(x)
        x = self.pool(self.activation(x), (2, 2), (2, 2))
        x = x if self.flat else jnp.moveaxis(x, -1, 1)
        x = linen.Dense(10)(x.reshape(len(x), -1))
        return linen.Dense(3)(self.activation(x))


def exact_gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def sequential_pair(**changes: Any) -> Pair:
    """torch's Sequential, its activation, pool and flattening modules of their own, which Flax
    does not have."""
    a = seeded(
        nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(6 * 4 * 5, 10), nn.GELU(), nn.Linear(10, 3),
        )
    )  # fmt: skip
    w = arrays(a)
    params = {
        "Conv_0": {"kernel": w["0.weight"].transpose(2, 3, 1, 0), "bias": w["0.bias"]},
        "Dense_0": {"kernel": w["4.weight"].T, "bias": w["4.bias"]},
        "Dense_1": {"kernel": w["6.weight"].T, "bias": w["6.bias"]},
    }
    b = Compact(**{"activation": exact_gelu, **changes}).bind({"params": params})
    x = probe.normal("x", (2, 2, 8, 10)).astype(np.float32)
    return Pair(a, b, Call((x,)), Call((x.transpose(0, 2, 3, 1),)))


# --- Attention with rotated positions ---


def torch_rotate(x: Tensor) -> Tensor:
    T, D = x.shape[1], x.shape[-1]
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)
    cos, sin = angle.cos()[None, :, None].to(x), angle.sin()[None, :, None].to(x)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rotate_halves(x: Array) -> Array:
    T, D = x.shape[1], x.shape[-1]
    angle = np.arange(T)[:, None] * 10000.0 ** (-np.arange(0, D, 2) / D)
    cos, sin = (f(angle)[None, :, None].astype(x.dtype) for f in (np.cos, np.sin))
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def rotate_pairs(x: Array) -> Array:
    T, D = x.shape[1], x.shape[-1]
    angle = np.arange(T)[:, None] * 10000.0 ** (-np.arange(0, D, 2) / D)
    cos, sin = (f(angle)[None, :, None].astype(x.dtype) for f in (np.cos, np.sin))
    a, b = x[..., ::2], x[..., 1::2]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)


class TorchRotary(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(dim, dim, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = torch_rotate(q), torch_rotate(k)
        logits = torch.einsum("btnd,bsnd->bnts", q, k) * q.shape[-1] ** -0.5
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = logits.masked_fill(causal, -torch.inf).softmax(-1)
        return self.o_proj(torch.einsum("bnts,bsnd->btnd", weights, v).flatten(2))


class FlaxRotary(nnx.Module):
    def __init__(
        self, dim: int, heads: int, rotate: Callable[[Array], Array], causal: bool
    ) -> None:
        rngs = nnx.Rngs(0)
        self.heads, self.rotate, self.causal = heads, rotate, causal
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nnx.Linear(dim, dim, use_bias=False, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: Array) -> Array:
        B, T, E = x.shape
        q, k, v = (
            f(x).reshape(B, T, self.heads, -1) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.rotate(q), self.rotate(k)
        logits = jnp.einsum("btnd,bsnd->bnts", q, k) * q.shape[-1] ** -0.5
        if self.causal:
            logits = jnp.where(np.triu(np.ones((T, T), bool), 1), -jnp.inf, logits)
        out = jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(logits, -1), v)
        return self.o_proj(out.reshape(B, T, E))


class TorchBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 16)
        self.attn = TorchRotary(16, 2)
        self.norm = nn.RMSNorm(16, eps=1e-6)
        self.head = nn.Linear(16, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.norm(x + self.attn(x)))


class FlaxBlock(nnx.Module):
    def __init__(self, rotate: Callable[[Array], Array], causal: bool, norm: type) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(13, 16, rngs=rngs)
        self.attn = FlaxRotary(16, 2, rotate, causal)
        self.norm = norm(16, epsilon=1e-6, use_fast_variance=False, rngs=rngs)
        self.head = nnx.Linear(16, 13, use_bias=False, rngs=rngs)

    def __call__(self, ids: Array) -> Array:
        x = self.embed(ids)
        return self.head(self.norm(x + self.attn(x)))


class PlusOne(nnx.RMSNorm):
    def __call__(self, x: Array, **kw: Any) -> Array:
        scale = self.scale
        y = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.epsilon)
        return y * (1 + scale[...])


def block_pair(
    rotate: Callable[[Array], Array] = rotate_halves,
    causal: bool = True,
    norm: type = nnx.RMSNorm,
    spoil: Callable[[Any], None] = lambda m: None,
) -> Pair:
    """A decoder's block: rotated attention, RMSNorm, tied output."""
    a = seeded(TorchBlock())
    a.head.weight = a.embed.weight
    b = FlaxBlock(rotate, causal, norm)
    w = arrays(a)
    b.embed.embedding[...] = jnp.asarray(w["embed.weight"])
    b.norm.scale[...] = jnp.asarray(w["norm.weight"])
    b.head.kernel[...] = jnp.asarray(w["embed.weight"].T)
    for n in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(b.attn, n).kernel[...] = jnp.asarray(w[f"attn.{n}.weight"].T)
    spoil(b)
    ids = probe.integers("ids", (2, 6), 13)
    return Pair(a, b, Call((ids,)), Call((ids,)))


def untie(module: Any) -> None:
    module.head.kernel[...] = jnp.asarray(probe.weight("other", (16, 13)))


def interleave(module: Any) -> None:
    for n in ("q_proj", "k_proj"):
        kernel = getattr(module.attn, n).kernel
        kernel[...] = kernel[...].reshape(16, 2, 2, 4).swapaxes(2, 3).reshape(16, 16)


# --- A decoder of images ---


class TorchImages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 4, 2, 1)
        self.norm = nn.GroupNorm(2, 6)
        self.act = nn.LeakyReLU(0.2)
        self.out = nn.Conv2d(6, 3, 3, padding=1, padding_mode="zeros")

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.norm(self.up(x))))


class FlaxImages(linen.Module):
    flip: bool = True
    groups: int = 2
    slope: float = 0.2
    padding: Any = ((1, 1), (1, 1))

    @linen.compact
    def __call__(self, x: Array) -> Array:
        pads = ((2, 2), (2, 2))
        x = linen.ConvTranspose(
            6, (4, 4), (2, 2), padding=pads, transpose_kernel=self.flip, name="up"
        )(x)
        x = linen.GroupNorm(self.groups, epsilon=1e-5, use_fast_variance=False, name="norm")(x)
        x = jax.nn.leaky_relu(x, self.slope)
        return linen.Conv(3, (3, 3), padding=self.padding, name="out")(x)


def images_pair(**changes: Any) -> Pair:
    """Transposed convolution, group norm, leaky ReLU, convolution."""
    a = seeded(TorchImages())
    w = arrays(a)
    flip = changes.get("flip", True)
    # With transpose_kernel=True Flax holds (h, w, out, in); without, (h, w, in, out), not flipped.
    up = w["up.weight"].transpose(2, 3, 1, 0) if flip else w["up.weight"].transpose(2, 3, 0, 1)
    params = {
        "up": {"kernel": up, "bias": w["up.bias"]},
        "norm": {"scale": w["norm.weight"], "bias": w["norm.bias"]},
        "out": {"kernel": w["out.weight"].transpose(2, 3, 1, 0), "bias": w["out.bias"]},
    }
    b = FlaxImages(**changes).bind({"params": params})
    x = probe.normal("x", (2, 4, 5, 6)).astype(np.float32)
    return Pair(a, b, Call((x,)), Call((x.transpose(0, 2, 3, 1),)))


# --- nn.LSTM and nnx.RNN ---


class TorchReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class FlaxReader(nnx.Module):
    def __init__(self, reverse: bool = False) -> None:
        rngs = nnx.Rngs(0)
        self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(5, 4, rngs=rngs), reverse=reverse)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.head(self.lstm(x))


def reader_pair(order: tuple[int, ...] = (0, 1, 2, 3), bias: str = "sum") -> Pair:
    """An LSTM whose Flax cell has one bias: the sum of torch's two."""
    a = seeded(TorchReader())
    b = FlaxReader()
    w = arrays(a)

    def gates(x: np.ndarray) -> Array:
        return jnp.asarray(np.concatenate([np.split(x, 4)[i] for i in order]))

    cell = b.lstm.cell
    cell.dense_i.kernel[...] = gates(w["lstm.weight_ih_l0"]).T
    cell.dense_h.kernel[...] = gates(w["lstm.weight_hh_l0"]).T
    biases = {"sum": w["lstm.bias_ih_l0"] + w["lstm.bias_hh_l0"], "one": w["lstm.bias_hh_l0"]}
    cell.dense_h.bias[...] = gates(biases[bias])
    b.head.kernel[...], b.head.bias[...] = (
        jnp.asarray(w["head.weight"].T),
        jnp.asarray(w["head.bias"]),
    )
    x = probe.normal("x", (2, 6, 5)).astype(np.float32)
    return Pair(a, b, Call((x,)), Call((x,)))


RIGHT: dict[str, Callable[[], Pair]] = {
    "nn.TransformerEncoder and Linen": encoder_pair,
    "nn.Sequential and Linen compact": sequential_pair,
    "rotated attention and NNX": block_pair,
    "nn.ConvTranspose2d and Linen": images_pair,
    "nn.LSTM and nnx.RNN": reader_pair,
}
# title, family, how, layers, causes
FAULTS_OF_USERS: list[tuple[str, str, Callable[[], Pair], tuple[str, ...], tuple[str, ...]]] = [
    ("LayerNorm epsilon 1e-6 for 1e-5", "nn.TransformerEncoder", lambda: encoder_pair(1e-6),
     ("layers.1.norm2",), ("epsilon",)),
    ("head_dim before heads in a kernel", "nn.TransformerEncoder",
     lambda: encoder_pair(spoil=wrong_heads), ("layers.1.self_attn",), ("heads",)),
    ("GELU by tanh", "nn.Sequential", lambda: sequential_pair(activation=jax.nn.gelu),
     ("1",), ("gelu",)),
    ("ReLU for GELU", "nn.Sequential", lambda: sequential_pair(activation=jax.nn.relu),
     ("1",), ("activation",)),
    ("image flattened channel last", "nn.Sequential", lambda: sequential_pair(flat=True),
     ("3",), ("flatten",)),
    ("average pool for maximum", "nn.Sequential", lambda: sequential_pair(pool=linen.avg_pool),
     ("2",), ("pooling",)),
    ("RoPE in pairs, not in halves", "rotary decoder", lambda: block_pair(rotate_pairs),
     ("attn",), ("rope",)),
    ("query and key laid out for RoPE in pairs", "rotary decoder",
     lambda: block_pair(spoil=interleave), ("attn.q_proj",), ("rope",)),
    ("causal mask missing", "rotary decoder", lambda: block_pair(causal=False),
     ("attn",), ("causal",)),
    ("output not tied to the embeddings", "rotary decoder", lambda: block_pair(spoil=untie),
     ("head",), ("tied",)),
    ("RMSNorm multiplies by 1 + scale", "rotary decoder", lambda: block_pair(norm=PlusOne),
     ("norm",), ("scale_plus_one",)),
    ("transposed convolution's kernel not flipped", "image decoder",
     lambda: images_pair(flip=False), ("up",), ("flipped",)),
    ("GroupNorm of 3 groups for 2", "image decoder", lambda: images_pair(groups=3),
     ("norm",), ("groups",)),
    ("leaky ReLU of another slope", "image decoder", lambda: images_pair(slope=0.01),
     ("act",), ("activation",)),
    ("no padding", "image decoder", lambda: images_pair(padding="VALID"), ("out",), ("padding",)),
    ("gate order i,f,o,g", "nn.LSTM", lambda: reader_pair((0, 1, 3, 2)), ("lstm",), ("gates",)),
    ("bias_ih left out of the sum", "nn.LSTM", lambda: reader_pair(bias="one"),
     ("lstm",), ("bias_missing",)),
]  # fmt: skip
