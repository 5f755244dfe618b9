"""A wav2vec2-like speech encoder: strided conv front end, weight-normalised positional conv, post-norm transformer."""
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn


@dataclass
class Config:
    conv_dim: int = 12
    conv_kernel: tuple = (10, 3, 3)
    conv_stride: tuple = (5, 2, 2)
    hidden_size: int = 24
    num_heads: int = 3
    intermediate_size: int = 40
    num_layers: int = 2
    pos_kernel: int = 4
    pos_groups: int = 2
    vocab_size: int = 11
    feat_proj_dropout: float = 0.05
    hidden_dropout: float = 0.1
    eps: float = 1e-5


class ConvLayer(nn.Module):
    def __init__(self, c, i):
        super().__init__()
        self.conv = nn.Conv1d(1 if i == 0 else c.conv_dim, c.conv_dim, c.conv_kernel[i], c.conv_stride[i], bias=False)
        self.layer_norm = nn.GroupNorm(c.conv_dim, c.conv_dim) if i == 0 else None
        self.activation = nn.GELU()

    def forward(self, x):
        x = self.conv(x)
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        return self.activation(x)


class FeatureEncoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv_layers = nn.ModuleList(ConvLayer(c, i) for i in range(len(c.conv_kernel)))

    def forward(self, wave):
        x = wave[:, None]
        for layer in self.conv_layers:
            x = layer(x)
        return x


class FeatureProjection(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.layer_norm = nn.LayerNorm(c.conv_dim, eps=c.eps)
        self.projection = nn.Linear(c.conv_dim, c.hidden_size)
        self.dropout = nn.Dropout(c.feat_proj_dropout)

    def forward(self, x):
        return self.dropout(self.projection(self.layer_norm(x)))


class PositionalConv(nn.Module):
    def __init__(self, c):
        super().__init__()
        conv = nn.Conv1d(c.hidden_size, c.hidden_size, c.pos_kernel, padding=c.pos_kernel // 2, groups=c.pos_groups)
        self.conv = nn.utils.parametrizations.weight_norm(conv, name="weight", dim=2)
        self.remove = 1 if c.pos_kernel % 2 == 0 else 0
        self.activation = nn.GELU()

    def forward(self, x):
        x = self.conv(x.transpose(1, 2))
        if self.remove:
            x = x[:, :, : -self.remove]
        return self.activation(x).transpose(1, 2)


class SelfAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.head_dim = c.num_heads, c.hidden_size // c.num_heads
        self.k_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.v_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.out_proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x, bias):
        b, t, d = x.shape
        split = lambda y: y.view(b, t, self.heads, self.head_dim).transpose(1, 2)
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        w = torch.softmax(q @ k.transpose(-1, -2) * self.head_dim**-0.5 + bias, dim=-1)
        return self.out_proj((w @ v).transpose(1, 2).reshape(b, t, d))


class EncoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attention = SelfAttention(c)
        self.layer_norm = nn.LayerNorm(c.hidden_size, eps=c.eps)
        self.intermediate_dense = nn.Linear(c.hidden_size, c.intermediate_size)
        self.output_dense = nn.Linear(c.intermediate_size, c.hidden_size)
        self.dropout = nn.Dropout(c.hidden_dropout)
        self.final_layer_norm = nn.LayerNorm(c.hidden_size, eps=c.eps)

    def forward(self, x, bias):
        x = self.layer_norm(x + self.dropout(self.attention(x, bias)))
        h = self.output_dense(F.gelu(self.intermediate_dense(x)))
        return self.final_layer_norm(x + self.dropout(h))


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.pos_conv_embed = PositionalConv(c)
        self.layer_norm = nn.LayerNorm(c.hidden_size, eps=c.eps)
        self.layers = nn.ModuleList(EncoderLayer(c) for _ in range(c.num_layers))

    def forward(self, x, mask):
        x = x * mask[..., None]
        bias = (~mask[:, None, None, :]) * -1e9
        x = self.layer_norm(x + self.pos_conv_embed(x))
        for layer in self.layers:
            x = layer(x, bias)
        return x


class Wav2Vec2ForCTC(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.feature_extractor = FeatureEncoder(c)
        self.feature_projection = FeatureProjection(c)
        self.encoder = Encoder(c)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size)

    def forward(self, wave, lengths):
        feats = self.feature_projection(self.feature_extractor(wave).transpose(1, 2))
        for k, s in zip(self.config.conv_kernel, self.config.conv_stride):
            lengths = torch.div(lengths - k, s, rounding_mode="floor") + 1
        mask = torch.arange(feats.shape[1])[None] < lengths[:, None]
        hidden = self.encoder(feats, mask)
        return hidden, self.lm_head(hidden)


# ---------------------------------------------------------------- Flax


class FlaxConvLayer(nnx.Module):
    def __init__(self, c, i, rngs):
        features = 1 if i == 0 else c.conv_dim
        self.conv = nnx.Conv(features, c.conv_dim, (c.conv_kernel[i],), strides=(c.conv_stride[i],), padding="VALID",
                             use_bias=False, rngs=rngs)
        self.layer_norm = nnx.GroupNorm(c.conv_dim, num_groups=c.conv_dim, epsilon=1e-5, rngs=rngs) if i == 0 else None

    def __call__(self, x):
        x = self.conv(x)
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        return jax.nn.gelu(x, approximate=False)


class FlaxFeatureProjection(nnx.Module):
    def __init__(self, c, rngs):
        self.layer_norm = nnx.LayerNorm(c.conv_dim, epsilon=c.eps, rngs=rngs)
        self.projection = nnx.Linear(c.conv_dim, c.hidden_size, rngs=rngs)
        self.dropout = nnx.Dropout(c.feat_proj_dropout, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.projection(self.layer_norm(x)))


class FlaxPositionalConv(nnx.Module):
    def __init__(self, c, rngs):
        self.groups, self.kernel_size = c.pos_groups, c.pos_kernel
        self.weight_g = nnx.Param(jnp.ones((c.pos_kernel, 1, 1)))
        self.weight_v = nnx.Param(jnp.ones((c.pos_kernel, c.hidden_size // c.pos_groups, c.hidden_size)))
        self.bias = nnx.Param(jnp.zeros((c.hidden_size,)))

    def __call__(self, x):
        v = self.weight_v[...]
        norm = jnp.sqrt(jnp.sum(v**2, axis=(1, 2), keepdims=True))
        kernel = self.weight_g[...] * v / norm
        pad = self.kernel_size // 2
        x = jax.lax.conv_general_dilated(x, kernel, (1,), [(pad, pad)], dimension_numbers=("NWC", "WIO", "NWC"),
                                         feature_group_count=self.groups) + self.bias[...]
        if self.kernel_size % 2 == 0:
            x = x[:, :-1]
        return jax.nn.gelu(x, approximate=False)


class FlaxSelfAttention(nnx.Module):
    def __init__(self, c, rngs):
        self.heads, self.head_dim = c.num_heads, c.hidden_size // c.num_heads
        linear = lambda: nnx.Linear(c.hidden_size, c.hidden_size, rngs=rngs)
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = linear(), linear(), linear(), linear()

    def __call__(self, x, bias):
        q, k, v = (f(x).reshape(*x.shape[:2], self.heads, self.head_dim) for f in (self.q_proj, self.k_proj, self.v_proj))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(self.head_dim)
        w = jax.nn.softmax(scores + bias, axis=-1)
        return self.out_proj(jnp.einsum("bhqk,bkhd->bqhd", w, v).reshape(x.shape))


class FlaxEncoderLayer(nnx.Module):
    def __init__(self, c, rngs):
        self.attention = FlaxSelfAttention(c, rngs)
        self.layer_norm = nnx.LayerNorm(c.hidden_size, epsilon=c.eps, rngs=rngs)
        self.intermediate_dense = nnx.Linear(c.hidden_size, c.intermediate_size, rngs=rngs)
        self.output_dense = nnx.Linear(c.intermediate_size, c.hidden_size, rngs=rngs)
        self.dropout = nnx.Dropout(c.hidden_dropout, rngs=rngs)
        self.final_layer_norm = nnx.LayerNorm(c.hidden_size, epsilon=c.eps, rngs=rngs)

    def __call__(self, x, bias):
        x = self.layer_norm(x + self.dropout(self.attention(x, bias)))
        h = self.output_dense(jax.nn.gelu(self.intermediate_dense(x), approximate=False))
        return self.final_layer_norm(x + self.dropout(h))


class FlaxWav2Vec2ForCTC(nnx.Module):
    def __init__(self, c, rngs):
        self.config = c
        self.conv_layers = nnx.List([FlaxConvLayer(c, i, rngs) for i in range(len(c.conv_kernel))])
        self.feature_projection = FlaxFeatureProjection(c, rngs)
        self.pos_conv_embed = FlaxPositionalConv(c, rngs)
        self.encoder_norm = nnx.LayerNorm(c.hidden_size, epsilon=c.eps, rngs=rngs)
        self.layers = nnx.List([FlaxEncoderLayer(c, rngs) for _ in range(c.num_layers)])
        self.lm_head = nnx.Linear(c.hidden_size, c.vocab_size, rngs=rngs)

    def __call__(self, wave, lengths):
        feats = wave[..., None]
        for layer in self.conv_layers:
            feats = layer(feats)
        for k, s in zip(self.config.conv_kernel, self.config.conv_stride):
            lengths = (lengths - k) // s + 1
        mask = jnp.arange(feats.shape[1])[None] < lengths[:, None]
        x = self.feature_projection(feats)
        x = jnp.where(mask[..., None], x, 0)
        bias = jnp.where(mask, 0.0, -1e9)[:, None, None, :]
        x = self.encoder_norm(x + self.pos_conv_embed(x))
        for layer in self.layers:
            x = layer(x, bias)
        return x, self.lm_head(x)


def arr(t):
    return jnp.asarray(t.detach().numpy())


def port(net, model):
    def linear(dst, src):
        dst.kernel[...] = arr(src.weight).T
        dst.bias[...] = arr(src.bias)

    def norm(dst, src):
        dst.scale[...] = arr(src.weight)
        dst.bias[...] = arr(src.bias)

    for dst, src in zip(model.conv_layers, net.feature_extractor.conv_layers):
        dst.conv.kernel[...] = arr(src.conv.weight).transpose(2, 1, 0)
        if dst.layer_norm is not None:
            norm(dst.layer_norm, src.layer_norm)
    norm(model.feature_projection.layer_norm, net.feature_projection.layer_norm)
    linear(model.feature_projection.projection, net.feature_projection.projection)
    pos = net.encoder.pos_conv_embed.conv
    model.pos_conv_embed.weight_g[...] = arr(pos.parametrizations.weight.original0).transpose(2, 1, 0)
    model.pos_conv_embed.weight_v[...] = arr(pos.parametrizations.weight.original1).transpose(2, 1, 0)
    model.pos_conv_embed.bias[...] = arr(pos.bias)
    norm(model.encoder_norm, net.encoder.layer_norm)
    for dst, src in zip(model.layers, net.encoder.layers):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(getattr(dst.attention, name), getattr(src.attention, name))
        norm(dst.layer_norm, src.layer_norm)
        norm(dst.final_layer_norm, src.final_layer_norm)
        linear(dst.intermediate_dense, src.intermediate_dense)
        linear(dst.output_dense, src.output_dense)
    linear(model.lm_head, net.lm_head)


def build(seed):
    """The right pair with random weights and inputs that follow from the seed."""
    torch.manual_seed(seed)
    net = Wav2Vec2ForCTC(Config()).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "norm" in name or "original0" in name:
                p.copy_(0.5 + torch.rand_like(p) if "bias" not in name else 0.3 * torch.randn_like(p))
            else:
                p.add_(0.1 * torch.randn_like(p))
    model = FlaxWav2Vec2ForCTC(Config(), nnx.Rngs(seed))
    port(net, model)
    model.eval()
    rng = np.random.default_rng(seed)
    wave = rng.normal(size=(2, 200)).astype(np.float32)
    return {"torch": net, "flax": model, "inputs": (wave, np.array([200, 131]))}


FAULTS = [
    {
        "title": "the first conv's GroupNorm as one group over all channels",
        "edits": [("num_groups=c.conv_dim, epsilon", "num_groups=1, epsilon")],
        "layers": ["feature_extractor.conv_layers.0.layer_norm"],
        "causes": ["groups", "axis"],
        "level": "outputs",
    },
    {
        "title": "SamePad layer drops the first step, not the last",
        "edits": [("x = x[:, :-1]\n", "x = x[:, 1:]\n")],
        "layers": ["encoder.pos_conv_embed", "encoder.pos_conv_embed.conv", "encoder.pos_conv_embed.activation"],
        "between": ("encoder.pos_conv_embed.conv", "encoder.layer_norm"),
        "causes": ["padding", "offset"],
        "level": "outputs",
    },
    {
        "title": "weight norm per output channel (weight_norm's default dim) and not per tap",
        "edits": [("jnp.sum(v**2, axis=(1, 2), keepdims=True)", "jnp.sum(v**2, axis=(0, 1), keepdims=True)")],
        "layers": ["encoder.pos_conv_embed.conv", "encoder.pos_conv_embed.conv.parametrizations.weight.0"],
        "causes": ["axis", "values"],
        "level": "outputs",
    },
    {
        "title": "padded frames not zeroed before the positional conv",
        "edits": [("        x = jnp.where(mask[..., None], x, 0)\n", "")],
        "layers": ["encoder"],
        "between": ("feature_projection.projection", "encoder.pos_conv_embed.conv"),
        "causes": ["left_out", "mask"],
        "level": "outputs",
    },
    {
        "title": "frame lengths by wave length // stride, kernel size not taken off",
        "edits": [("lengths = (lengths - k) // s + 1", "lengths = lengths // s")],
        "layers": ["", "encoder"],
        "between": ("feature_projection.projection", "encoder.pos_conv_embed.conv"),
        "causes": ["mask", "constant"],
        "level": "outputs",
    },
    {
        "title": "tanh gelu in the convolutional front end",
        "edits": [("            x = self.layer_norm(x)\n        return jax.nn.gelu(x, approximate=False)",
                   "            x = self.layer_norm(x)\n        return jax.nn.gelu(x)")],
        "layers": ["feature_extractor.conv_layers.0.activation", "feature_extractor.conv_layers.0"],
        "between": ("feature_extractor.conv_layers.0.layer_norm", "feature_extractor.conv_layers.1.conv"),
        "causes": ["gelu"],
        "level": "outputs",
    },
    {
        "title": "feature encoder frozen by a stop_gradient",
        "edits": [("        x = self.feature_projection(feats)\n", "        x = self.feature_projection(jax.lax.stop_gradient(feats))\n")],
        "layers": ["", "feature_extractor", "feature_extractor.conv_layers.2"],
        "between": ("feature_extractor.conv_layers.2.conv", "feature_projection.layer_norm"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "feature projection's dropout takes the rate of the hidden states",
        "edits": [("nnx.Dropout(c.feat_proj_dropout, rngs=rngs)", "nnx.Dropout(c.hidden_dropout, rngs=rngs)")],
        "layers": ["feature_projection.dropout"],
        "causes": ["training_attribute"],
        "level": "attributes",
    },
]
