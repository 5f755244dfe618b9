"""Perceiver-IO-like image classifier: conv stem, Fourier positions, latent cross-attention, shared latent blocks."""
import math

import flax.linen as fnn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn


def build_linear_positions(index_dims):
    axes = [torch.linspace(-1.0, 1.0, n, dtype=torch.float64) for n in index_dims]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(index_dims))


def generate_fourier_features(pos, num_bands, max_resolution):
    bands = torch.stack([torch.linspace(1.0, res / 2, num_bands, dtype=pos.dtype) for res in max_resolution])
    features = (pos[:, :, None] * bands[None]).reshape(pos.shape[0], -1)
    return torch.cat([pos, torch.sin(math.pi * features), torch.cos(math.pi * features)], dim=-1)


class PerceiverAttention(nn.Module):
    def __init__(self, q_dim, kv_dim, qk_channels, v_channels, num_heads, out_dim, dropout):
        super().__init__()
        self.num_heads = num_heads
        self.layernorm1 = nn.LayerNorm(q_dim)
        self.layernorm2 = nn.LayerNorm(kv_dim)
        self.query = nn.Linear(q_dim, qk_channels)
        self.key = nn.Linear(kv_dim, qk_channels)
        self.value = nn.Linear(kv_dim, v_channels)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(v_channels, out_dim)

    def split_heads(self, x):
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def forward(self, x, inputs=None):
        x = self.layernorm1(x)
        inputs = self.layernorm2(x if inputs is None else inputs)
        q, k, v = (self.split_heads(f(z)) for f, z in ((self.query, x), (self.key, inputs), (self.value, inputs)))
        probs = nn.functional.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
        out = (self.dropout(probs) @ v).transpose(1, 2).flatten(2)
        return self.output(out)


class PerceiverMLP(nn.Module):
    def __init__(self, dim, widening):
        super().__init__()
        self.dense1 = nn.Linear(dim, widening * dim)
        self.act = nn.GELU()
        self.dense2 = nn.Linear(widening * dim, dim)

    def forward(self, x):
        return self.dense2(self.act(self.dense1(x)))


class PerceiverLayer(nn.Module):
    def __init__(self, q_dim, kv_dim, qk, v, heads, use_query_residual=True, dropout=0.1):
        super().__init__()
        self.use_query_residual = use_query_residual
        self.attention = PerceiverAttention(q_dim, kv_dim, qk, v, heads, q_dim, dropout)
        self.layernorm = nn.LayerNorm(q_dim)
        self.mlp = PerceiverMLP(q_dim, 2)

    def forward(self, x, inputs=None):
        out = self.attention(x, inputs)
        if self.use_query_residual:
            out = x + out
        return out + self.mlp(self.layernorm(out))


class ConvPreprocessor(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        self.batchnorm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.max_pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x):
        return self.max_pool(self.relu(self.batchnorm(self.conv(x))))


class PerceiverClassifier(nn.Module):
    def __init__(self, num_latents=5, d_latents=18, channels=10, num_bands=3, num_blocks=2, depth=2, num_labels=7):
        super().__init__()
        self.num_blocks, self.num_bands = num_blocks, num_bands
        d_in = channels + 2 + 4 * num_bands
        self.preprocessor = ConvPreprocessor(channels)
        self.latents = nn.Parameter(torch.randn(num_latents, d_latents))
        self.cross_attention = PerceiverLayer(d_latents, d_in, 12, 20, 2)
        self.self_attends = nn.ModuleList([PerceiverLayer(d_latents, d_latents, 12, 9, 3) for _ in range(depth)])
        self.decoder_query = nn.Parameter(torch.randn(1, d_latents))
        self.decoder = PerceiverLayer(d_latents, d_latents, 16, 8, 1, use_query_residual=False)
        self.final_layer = nn.Linear(d_latents, num_labels)

    def forward(self, images):
        x = self.preprocessor(images)
        b, _, h, w = x.shape
        pos = generate_fourier_features(build_linear_positions((h, w)), self.num_bands, (h, w)).to(x.dtype)
        inputs = torch.cat([x.flatten(2).transpose(1, 2), pos[None].expand(b, -1, -1)], dim=-1)
        z = self.cross_attention(self.latents.expand(b, -1, -1), inputs)
        for _ in range(self.num_blocks):
            for layer in self.self_attends:
                z = layer(z)
        out = self.decoder(self.decoder_query.expand(b, -1, -1), z)
        return self.final_layer(out)[:, 0]


def fourier_position_encoding(index_dims, num_bands, dtype):
    axes = [jnp.linspace(-1.0, 1.0, n) for n in index_dims]
    pos = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(index_dims))
    freqs = jnp.stack([jnp.linspace(1.0, n / 2, num_bands) for n in index_dims])
    phase = jnp.pi * (pos[:, :, None] * freqs).reshape(pos.shape[0], -1)
    return jnp.concatenate([pos, jnp.sin(phase), jnp.cos(phase)], axis=-1).astype(dtype)


class Attention(fnn.Module):
    heads: int
    qk_channels: int
    v_channels: int
    out_channels: int
    dropout_prob: float = 0.1

    @fnn.compact
    def __call__(self, inputs_q, inputs_kv, train=False):
        b, n = inputs_q.shape[:2]
        split = lambda z: z.reshape(b, z.shape[1], self.heads, -1)
        q = split(fnn.Dense(self.qk_channels)(inputs_q))
        k = split(fnn.Dense(self.qk_channels)(inputs_kv))
        v = split(fnn.Dense(self.v_channels)(inputs_kv))
        scale = 1.0 / math.sqrt(self.qk_channels // self.heads)
        attn = jnp.einsum("bthd,bThd->bhtT", q, k) * scale
        probs = jax.nn.softmax(attn, axis=-1)
        probs = fnn.Dropout(self.dropout_prob)(probs, deterministic=not train)
        summed = jnp.einsum("bhtT,bThd->bthd", probs, v).reshape(b, n, self.v_channels)
        return fnn.Dense(self.out_channels)(summed)


class MLP(fnn.Module):
    widening_factor: int = 2

    @fnn.compact
    def __call__(self, x):
        dim = x.shape[-1]
        x = fnn.Dense(self.widening_factor * dim)(x)
        return fnn.Dense(dim)(jax.nn.gelu(x, approximate=False))


class AttentionBlock(fnn.Module):
    heads: int
    qk_channels: int
    v_channels: int
    use_query_residual: bool = True

    @fnn.compact
    def __call__(self, x, inputs=None, train=False):
        normed = fnn.LayerNorm(epsilon=1e-5)(x)
        context = fnn.LayerNorm(epsilon=1e-5)(normed if inputs is None else inputs)
        out = Attention(self.heads, self.qk_channels, self.v_channels, x.shape[-1])(normed, context, train)
        if self.use_query_residual:
            out = out + x
        return out + MLP()(fnn.LayerNorm(epsilon=1e-5)(out))


class ConvStem(fnn.Module):
    channels: int

    @fnn.compact
    def __call__(self, x, train=False):
        x = fnn.Conv(self.channels, (7, 7), strides=(2, 2), padding=((3, 3), (3, 3)), use_bias=False)(x)
        x = fnn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x)
        x = fnn.relu(x)
        return fnn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


class FlaxPerceiver(fnn.Module):
    num_latents: int = 5
    d_latents: int = 18
    channels: int = 10
    num_bands: int = 3
    num_blocks: int = 2
    depth: int = 2
    num_labels: int = 7

    @fnn.compact
    def __call__(self, images, train=False):
        x = ConvStem(self.channels)(images, train)
        b, h, w, c = x.shape
        pos = fourier_position_encoding((h, w), self.num_bands, x.dtype)
        pos = jnp.broadcast_to(pos[None], (b,) + pos.shape)
        inputs = jnp.concatenate([x.reshape(b, h * w, c), pos], axis=-1)

        latents = self.param("latents", fnn.initializers.normal(0.02), (self.num_latents, self.d_latents))
        query = self.param("decoder_query", fnn.initializers.normal(0.02), (1, self.d_latents))
        z = jnp.broadcast_to(latents, (b,) + latents.shape)
        z = AttentionBlock(2, 12, 20, name="encoder")(z, inputs, train=train)
        layers = [AttentionBlock(3, 12, 9, name=f"processor_{i}") for i in range(self.depth)]
        for _ in range(self.num_blocks):
            for layer in layers:
                z = layer(z, train=train)
        query = jnp.broadcast_to(query, (b,) + query.shape)
        out = AttentionBlock(1, 16, 8, use_query_residual=False, name="decoder")(query, z, train=train)
        return fnn.Dense(self.num_labels, name="head")(out)[:, 0]


def port(net):
    def arr(t):
        return jnp.asarray(t.detach().numpy())

    def dense(m):
        return {"kernel": arr(m.weight.T), "bias": arr(m.bias)}

    def norm(m):
        return {"scale": arr(m.weight), "bias": arr(m.bias)}

    def block(m):
        a = m.attention
        return {
            "LayerNorm_0": norm(a.layernorm1), "LayerNorm_1": norm(a.layernorm2), "LayerNorm_2": norm(m.layernorm),
            "Attention_0": {"Dense_0": dense(a.query), "Dense_1": dense(a.key),
                            "Dense_2": dense(a.value), "Dense_3": dense(a.output)},
            "MLP_0": {"Dense_0": dense(m.mlp.dense1), "Dense_1": dense(m.mlp.dense2)},
        }

    stem = net.preprocessor
    params = {
        "ConvStem_0": {"Conv_0": {"kernel": arr(stem.conv.weight.permute(2, 3, 1, 0))},
                       "BatchNorm_0": norm(stem.batchnorm)},
        "latents": arr(net.latents),
        "decoder_query": arr(net.decoder_query),
        "encoder": block(net.cross_attention),
        "decoder": block(net.decoder),
        "head": dense(net.final_layer),
    }
    for i, layer in enumerate(net.self_attends):
        params[f"processor_{i}"] = block(layer)
    stats = {"mean": arr(stem.batchnorm.running_mean), "var": arr(stem.batchnorm.running_var)}
    return {"params": params, "batch_stats": {"ConvStem_0": {"BatchNorm_0": stats}}}


def build(seed):
    torch.manual_seed(seed)
    net = PerceiverClassifier().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            p.copy_(1 + 0.2 * torch.randn_like(p) if norm else 0.3 * torch.randn_like(p))
        bn = net.preprocessor.batchnorm
        bn.running_mean.copy_(0.5 * torch.randn_like(bn.running_mean))
        bn.running_var.copy_(0.5 + torch.rand_like(bn.running_var))
    images = np.random.default_rng(seed).normal(size=(3, 3, 16, 24)).astype(np.float32)
    return {
        "torch": net,
        "flax": (FlaxPerceiver(), port(net)),
        "inputs": images,
        "flax_inputs": images.transpose(0, 2, 3, 1),
    }


FAULTS = [
    {
        "title": "TensorFlow's SAME for torch's padding=3 at stride 2",
        "edits": [("strides=(2, 2), padding=((3, 3), (3, 3)), use_bias=False", 'strides=(2, 2), padding="SAME", use_bias=False')],
        "layers": ["preprocessor.conv"],
        "causes": ["padding"],
        "level": "outputs",
    },
    {
        "title": "Fourier bands reach the resolution itself, not half of it (Nyquist)",
        "edits": [("jnp.linspace(1.0, n / 2, num_bands)", "jnp.linspace(1.0, n, num_bands)")],
        "layers": [""],
        "between": ("preprocessor.batchnorm", "cross_attention.attention.layernorm1"),
        "causes": ["constant", "scale"],
        "level": "outputs",
    },
    {
        "title": "softmax over the latents (queries), not over the inputs",
        "edits": [("jax.nn.softmax(attn, axis=-1)", "jax.nn.softmax(attn, axis=-2)")],
        "layers": ["cross_attention.attention"],
        "between": ("cross_attention.attention.value", "cross_attention.attention.output"),
        "causes": ["softmax_axis", "axis"],
        "level": "outputs",
    },
    {
        "title": "every shared layer repeated in turn, where torch repeats the whole stack",
        "edits": [("        for _ in range(self.num_blocks):\n            for layer in layers:\n",
                   "        for layer in layers:\n            for _ in range(self.num_blocks):\n")],
        "layers": [""],
        "between": ("self_attends.0.mlp.dense2", "self_attends.1.attention.layernorm1"),
        "causes": ["order"],
        "level": "outputs",
    },
    {
        "title": "the decoder adds its query",
        "edits": [("AttentionBlock(1, 16, 8, use_query_residual=False, name=\"decoder\")", "AttentionBlock(1, 16, 8, name=\"decoder\")")],
        "layers": ["decoder"],
        "between": ("decoder.attention.output", "decoder.layernorm"),
        "causes": ["residual"],
        "level": "outputs",
    },
    {
        "title": "value projection without its bias",
        "edits": [("v = split(fnn.Dense(self.v_channels)(inputs_kv))", "v = split(fnn.Dense(self.v_channels, use_bias=False)(inputs_kv))")],
        "layers": ["cross_attention.attention.value"],
        "causes": ["bias_missing"],
        "level": "outputs",
    },
    {
        "title": "torch's momentum 0.1 given to Flax's BatchNorm as it is",
        "edits": [("momentum=0.9", "momentum=0.1")],
        "layers": ["preprocessor.batchnorm"],
        "causes": ["momentum"],
        "level": "training",
    },
    {
        "title": "dropout on the attention's output, not on its probabilities",
        "edits": [("        probs = fnn.Dropout(self.dropout_prob)(probs, deterministic=not train)\n", ""),
                  ("return fnn.Dense(self.out_channels)(summed)",
                   "out = fnn.Dense(self.out_channels)(summed)\n"
                   "        return fnn.Dropout(self.dropout_prob)(out, deterministic=not train)")],
        "layers": ["cross_attention.attention.dropout", "cross_attention.attention"],
        "between": ("cross_attention.attention.value", "cross_attention.attention.output"),
        "causes": ["training_attribute"],
        "level": "attributes",
    },
]
