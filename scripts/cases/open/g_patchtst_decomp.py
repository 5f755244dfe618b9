"""Time-series forecaster: RevIN, moving-average decomposition, PatchTST with residual attention, linear trend."""
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch


@dataclass(frozen=True)
class Config:
    seq_len: int = 18
    pred_len: int = 7
    channels: int = 3
    patch_len: int = 4
    stride: int = 3
    d_model: int = 12
    n_heads: int = 3
    d_ff: int = 20
    n_layers: int = 2
    kernel: int = 5
    dropout: float = 0.2

    @property
    def patch_num(self):
        return (self.seq_len - self.patch_len) // self.stride + 2


class RevIN(torch.nn.Module):
    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.affine_weight = torch.nn.Parameter(torch.ones(num_features))
        self.affine_bias = torch.nn.Parameter(torch.zeros(num_features))

    def forward(self, x, mode):
        if mode == "norm":
            self.mean = x.mean(dim=1, keepdim=True).detach()
            self.stdev = torch.sqrt(x.var(dim=1, keepdim=True, unbiased=False) + self.eps).detach()
            return (x - self.mean) / self.stdev * self.affine_weight + self.affine_bias
        x = (x - self.affine_bias) / (self.affine_weight + self.eps * self.eps)
        return x * self.stdev + self.mean


class SeriesDecomp(torch.nn.Module):
    def __init__(self, kernel_size):
        super().__init__()
        self.kernel_size = kernel_size
        self.avg = torch.nn.AvgPool1d(kernel_size=kernel_size, stride=1, padding=0)

    def forward(self, x):
        half = (self.kernel_size - 1) // 2
        front = x[:, 0:1, :].repeat(1, half, 1)
        end = x[:, -1:, :].repeat(1, half, 1)
        moving_mean = self.avg(torch.cat([front, x, end], dim=1).permute(0, 2, 1)).permute(0, 2, 1)
        return x - moving_mean, moving_mean


class MultiheadAttention(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_heads, self.d_k = cfg.n_heads, cfg.d_model // cfg.n_heads
        self.W_Q = torch.nn.Linear(cfg.d_model, cfg.d_model)
        self.W_K = torch.nn.Linear(cfg.d_model, cfg.d_model)
        self.W_V = torch.nn.Linear(cfg.d_model, cfg.d_model)
        self.to_out = torch.nn.Linear(cfg.d_model, cfg.d_model)

    def forward(self, x, prev=None):
        bs = x.size(0)
        q = self.W_Q(x).view(bs, -1, self.n_heads, self.d_k).transpose(1, 2)
        k = self.W_K(x).view(bs, -1, self.n_heads, self.d_k).permute(0, 2, 3, 1)
        v = self.W_V(x).view(bs, -1, self.n_heads, self.d_k).transpose(1, 2)
        scores = torch.matmul(q, k) * self.d_k ** -0.5
        if prev is not None:
            scores = scores + prev
        out = torch.matmul(torch.softmax(scores, dim=-1), v)
        out = out.transpose(1, 2).contiguous().view(bs, -1, self.n_heads * self.d_k)
        return self.to_out(out), scores


class TSTEncoderLayer(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.self_attn = MultiheadAttention(cfg)
        self.dropout_attn = torch.nn.Dropout(cfg.dropout)
        self.norm_attn = torch.nn.BatchNorm1d(cfg.d_model)
        self.ff = torch.nn.Sequential(
            torch.nn.Linear(cfg.d_model, cfg.d_ff), torch.nn.GELU(), torch.nn.Dropout(cfg.dropout),
            torch.nn.Linear(cfg.d_ff, cfg.d_model))
        self.dropout_ffn = torch.nn.Dropout(cfg.dropout)
        self.norm_ffn = torch.nn.BatchNorm1d(cfg.d_model)

    def forward(self, src, prev=None):
        src2, scores = self.self_attn(src, prev)
        src = src + self.dropout_attn(src2)
        src = self.norm_attn(src.transpose(1, 2)).transpose(1, 2)
        src = src + self.dropout_ffn(self.ff(src))
        src = self.norm_ffn(src.transpose(1, 2)).transpose(1, 2)
        return src, scores


class FlattenHead(torch.nn.Module):
    def __init__(self, nf, pred_len):
        super().__init__()
        self.flatten = torch.nn.Flatten(start_dim=-2)
        self.linear = torch.nn.Linear(nf, pred_len)

    def forward(self, x):
        return self.linear(self.flatten(x))


class Backbone(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.padding_patch_layer = torch.nn.ReplicationPad1d((0, cfg.stride))
        self.W_P = torch.nn.Linear(cfg.patch_len, cfg.d_model)
        self.W_pos = torch.nn.Parameter(torch.randn(cfg.patch_num, cfg.d_model) * 0.3)
        self.layers = torch.nn.ModuleList([TSTEncoderLayer(cfg) for _ in range(cfg.n_layers)])
        self.head = FlattenHead(cfg.d_model * cfg.patch_num, cfg.pred_len)

    def forward(self, z):
        z = self.padding_patch_layer(z)
        z = z.unfold(dimension=-1, size=self.cfg.patch_len, step=self.cfg.stride)
        bs, n_vars, n_patches, _ = z.shape
        u = self.W_P(z).reshape(bs * n_vars, n_patches, -1) + self.W_pos
        scores = None
        for layer in self.layers:
            u, scores = layer(u, scores)
        u = u.reshape(bs, n_vars, n_patches, -1).permute(0, 1, 3, 2)
        return self.head(u)


class Model(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.revin = RevIN(cfg.channels)
        self.decomp = SeriesDecomp(cfg.kernel)
        self.backbone = Backbone(cfg)
        self.linear_trend = torch.nn.Linear(cfg.seq_len, cfg.pred_len)

    def forward(self, x):
        x = self.revin(x, "norm")
        seasonal, trend = self.decomp(x)
        y = self.backbone(seasonal.permute(0, 2, 1)) + self.linear_trend(trend.permute(0, 2, 1))
        return self.revin(y.permute(0, 2, 1), "denorm")


def moving_average(x, window):
    half = (window - 1) // 2
    padded = jnp.pad(x, ((0, 0), (half, half), (0, 0)), mode="edge")
    return nn.avg_pool(padded, (window,), strides=(1,), padding="VALID")


def series_decomp(x, window):
    trend = moving_average(x, window)
    return x - trend, trend


def make_patches(x, cfg):
    """(batch, time, channels) -> (batch, channels, patches, patch_len), the last value repeated at the end."""
    x = jnp.swapaxes(x, 1, 2)
    x = jnp.concatenate([x, jnp.repeat(x[..., -1:], cfg.stride, axis=-1)], axis=-1)
    index = np.arange(cfg.patch_num)[:, None] * cfg.stride + np.arange(cfg.patch_len)[None, :]
    return x[..., index]


class FlaxRevIN(nn.Module):
    features: int
    eps: float = 1e-5

    def setup(self):
        self.scale = self.param("scale", nn.initializers.ones, (self.features,))
        self.bias = self.param("bias", nn.initializers.zeros, (self.features,))

    def normalize(self, x):
        mean = jnp.mean(x, axis=1, keepdims=True)
        std = jnp.sqrt(jnp.var(x, axis=1, keepdims=True) + self.eps)
        mean, std = jax.lax.stop_gradient((mean, std))
        return (x - mean) / std * self.scale + self.bias, (mean, std)

    def denormalize(self, y, stats):
        mean, std = stats
        y = (y - self.bias) / (self.scale + self.eps**2)
        return y * std + mean


class EncoderLayer(nn.Module):
    cfg: Config
    train: bool = False

    @nn.compact
    def __call__(self, carry, _):
        cfg = self.cfg
        x, prev = carry
        drop = nn.Dropout(cfg.dropout, deterministic=not self.train)
        head_dim = cfg.d_model // cfg.n_heads
        qkv = nn.Dense(3 * cfg.d_model, name="qkv")(x)
        q, k, v = (t.reshape(*t.shape[:2], cfg.n_heads, head_dim) for t in jnp.split(qkv, 3, axis=-1))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * head_dim**-0.5
        scores = scores + prev
        y = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v).reshape(x.shape)
        x = x + drop(nn.Dense(cfg.d_model, name="out")(y))
        x = nn.BatchNorm(use_running_average=not self.train, momentum=0.9, epsilon=1e-5, name="norm_attn")(x)
        y = nn.gelu(nn.Dense(cfg.d_ff, name="fc1")(x), approximate=False)
        y = nn.Dense(cfg.d_model, name="fc2")(drop(y))
        x = x + drop(y)
        x = nn.BatchNorm(use_running_average=not self.train, momentum=0.9, name="norm_ffn")(x)
        return (x, scores), None


class FlaxModel(nn.Module):
    cfg: Config

    @nn.compact
    def __call__(self, x, train: bool = False):
        cfg = self.cfg
        revin = FlaxRevIN(cfg.channels, name="revin")
        x, stats = revin.normalize(x)
        seasonal, trend = series_decomp(x, cfg.kernel)
        patches = make_patches(seasonal, cfg)
        b, c, n, _ = patches.shape
        u = nn.Dense(cfg.d_model, name="patch_embed")(patches).reshape(b * c, n, cfg.d_model)
        u = u + self.param("pos_embed", nn.initializers.normal(0.02), (n, cfg.d_model))
        scores = jnp.zeros((b * c, cfg.n_heads, n, n), u.dtype)
        stack = nn.scan(EncoderLayer, variable_axes={"params": 0, "batch_stats": 0},
                        split_rngs={"params": True, "dropout": True}, length=cfg.n_layers)
        (u, _), _ = stack(cfg, train, name="layers")((u, scores), None)
        u = jnp.swapaxes(u.reshape(b, c, n, cfg.d_model), 2, 3)
        y = nn.Dense(cfg.pred_len, name="head")(u.reshape(b, c, -1))
        y = y + nn.Dense(cfg.pred_len, name="trend")(jnp.swapaxes(trend, 1, 2))
        return revin.denormalize(jnp.swapaxes(y, 1, 2), stats)


def arr(t):
    return t.detach().numpy()


def dense(m):
    return {"kernel": arr(m.weight).T, "bias": arr(m.bias)}


def port(net):
    def layer(m):
        att = m.self_attn
        parts = [dense(p) for p in (att.W_Q, att.W_K, att.W_V)]
        return {"qkv": {k: np.concatenate([p[k] for p in parts], axis=-1) for k in ("kernel", "bias")},
                "out": dense(att.to_out), "fc1": dense(m.ff[0]), "fc2": dense(m.ff[3]),
                "norm_attn": {"scale": arr(m.norm_attn.weight), "bias": arr(m.norm_attn.bias)},
                "norm_ffn": {"scale": arr(m.norm_ffn.weight), "bias": arr(m.norm_ffn.bias)}}

    def stats(m):
        return {name: {"mean": arr(getattr(m, name).running_mean), "var": arr(getattr(m, name).running_var)}
                for name in ("norm_attn", "norm_ffn")}

    def stack(trees):
        return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

    core = net.backbone
    params = {"revin": {"scale": arr(net.revin.affine_weight), "bias": arr(net.revin.affine_bias)},
              "patch_embed": dense(core.W_P), "pos_embed": arr(core.W_pos),
              "layers": stack([layer(m) for m in core.layers]),
              "head": dense(core.head.linear), "trend": dense(net.linear_trend)}
    return {"params": params, "batch_stats": {"layers": stack([stats(m) for m in core.layers])}}


def build(seed):
    """The right pair with random weights and inputs that follow from the seed."""
    torch.manual_seed(seed)
    cfg = Config()
    net = Model(cfg).eval()
    with torch.no_grad():
        net.revin.affine_weight.uniform_(0.6, 1.6)
        net.revin.affine_bias.normal_(0, 0.5)
        for m in net.modules():
            if isinstance(m, torch.nn.BatchNorm1d):
                m.weight.uniform_(0.6, 1.5)
                m.bias.normal_(0, 0.3)
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.3, 1.5)
            if isinstance(m, torch.nn.Linear):
                m.weight.mul_(1.7)
    rng = np.random.default_rng(seed)
    x = (np.cumsum(rng.normal(size=(2, 18, 3)), axis=1) + 2.0).astype(np.float32)
    return {"torch": net, "flax": (FlaxModel(cfg), port(net)), "inputs": x}


FAULTS = [
    {
        "title": "RevIN's variance over n - 1",
        "edits": [("jnp.var(x, axis=1, keepdims=True)", "jnp.var(x, axis=1, ddof=1, keepdims=True)")],
        "layers": ["revin"],
        "causes": ["unbiased_variance"],
        "level": "outputs",
    },
    {
        "title": "denormalisation divides by the scale before it takes the bias off",
        "edits": [("y = (y - self.bias) / (self.scale + self.eps**2)", "y = y / (self.scale + self.eps**2) - self.bias")],
        "layers": ["revin"],
        "causes": ["order"],
        "level": "outputs",
    },
    {
        "title": "decomposition returns trend and seasonal part in the other order",
        "edits": [("    return x - trend, trend\n", "    return trend, x - trend\n")],
        "layers": ["decomp"],
        "between": ("revin", "backbone.W_P"),
        "causes": ["swapped"],
        "level": "outputs",
    },
    {
        "title": "fused projection joined as key, query, value",
        "edits": [("(att.W_Q, att.W_K, att.W_V)", "(att.W_K, att.W_Q, att.W_V)")],
        "layers": ["backbone.layers.0.self_attn.W_Q"],
        "causes": ["blocks", "swapped"],
        "level": "outputs",
    },
    {
        "title": "scores scaled by the model's width, not by the head's",
        "edits": [("q, k) * head_dim**-0.5", "q, k) * cfg.d_model**-0.5")],
        "layers": ["backbone.layers.0.self_attn"],
        "between": ("backbone.layers.0.self_attn.W_V", "backbone.layers.0.self_attn.to_out"),
        "causes": ["scale"],
        "level": "outputs",
    },
    {
        "title": "residual attention left out: scores of the layer before are not added",
        "edits": [("head_dim**-0.5\n        scores = scores + prev\n", "head_dim**-0.5\n")],
        "layers": ["backbone.layers.1.self_attn"],
        "between": ("backbone.layers.1.self_attn.W_V", "backbone.layers.1.self_attn.to_out"),
        "causes": ["residual"],
        "level": "outputs",
    },
    {
        "title": "GELU by tanh, Flax's default",
        "edits": [('name="fc1")(x), approximate=False)', 'name="fc1")(x))')],
        "layers": ["backbone.layers.0.ff.1"],
        "causes": ["gelu"],
        "level": "outputs",
    },
    {
        "title": "head flattens (patches, width) where torch flattens (width, patches)",
        "edits": [("u = jnp.swapaxes(u.reshape(b, c, n, cfg.d_model), 2, 3)", "u = u.reshape(b, c, n, cfg.d_model)")],
        "layers": ["backbone", "backbone.head", "backbone.head.flatten"],
        "between": ("backbone.layers.1.norm_ffn", "backbone.head.linear"),
        "causes": ["flatten", "rearranged", "transposed"],
        "level": "outputs",
    },
    {
        "title": "batch norm after the attention always on running averages, also in training",
        "edits": [('use_running_average=not self.train, momentum=0.9, epsilon=1e-5, name="norm_attn"',
                   'use_running_average=True, momentum=0.9, epsilon=1e-5, name="norm_attn"')],
        "layers": ["backbone.layers.0.norm_attn"],
        "causes": ["statistics", "batch_statistics"],
        "level": "training",
    },
]
