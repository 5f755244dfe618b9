"""SegFormer: overlap patch embeddings, spatial-reduction attention, Mix-FFN, all-MLP decoder (Linen setup)."""
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn as tnn


# ---------------------------------------------------------------- torch
class OverlapPatchEmbeddings(tnn.Module):
    def __init__(self, patch_size, stride, cin, cout):
        super().__init__()
        self.proj = tnn.Conv2d(cin, cout, patch_size, stride=stride, padding=patch_size // 2)
        self.layer_norm = tnn.LayerNorm(cout, eps=1e-5)

    def forward(self, pixels):
        x = self.proj(pixels)
        _, _, h, w = x.shape
        return self.layer_norm(x.flatten(2).transpose(1, 2)), h, w


class EfficientSelfAttention(tnn.Module):
    def __init__(self, dim, heads, sr):
        super().__init__()
        self.heads, self.hd, self.sr = heads, dim // heads, sr
        self.query = tnn.Linear(dim, dim)
        self.key = tnn.Linear(dim, dim)
        self.value = tnn.Linear(dim, dim)
        if sr > 1:
            self.sr_conv = tnn.Conv2d(dim, dim, sr, stride=sr)
            self.layer_norm = tnn.LayerNorm(dim)
        self.out = tnn.Linear(dim, dim)

    def split(self, x):
        return x.view(x.shape[0], -1, self.heads, self.hd).permute(0, 2, 1, 3)

    def forward(self, x, h, w):
        b, n, c = x.shape
        q = self.split(self.query(x))
        kv = x
        if self.sr > 1:
            kv = self.sr_conv(x.permute(0, 2, 1).reshape(b, c, h, w))
            kv = self.layer_norm(kv.reshape(b, c, -1).permute(0, 2, 1))
        k, v = self.split(self.key(kv)), self.split(self.value(kv))
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.hd)
        ctx = scores.softmax(-1) @ v
        return self.out(ctx.permute(0, 2, 1, 3).reshape(b, n, c))


class MixFFN(tnn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.dense1 = tnn.Linear(dim, hidden)
        self.dwconv = tnn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.dense2 = tnn.Linear(hidden, dim)

    def forward(self, x, h, w):
        x = self.dense1(x)
        b, n, c = x.shape
        x = self.dwconv(x.transpose(1, 2).view(b, c, h, w)).flatten(2).transpose(1, 2)
        return self.dense2(F.gelu(x))


class Layer(tnn.Module):
    def __init__(self, dim, heads, sr, ratio):
        super().__init__()
        self.layer_norm_1 = tnn.LayerNorm(dim, eps=1e-6)
        self.attention = EfficientSelfAttention(dim, heads, sr)
        self.layer_norm_2 = tnn.LayerNorm(dim, eps=1e-6)
        self.mlp = MixFFN(dim, dim * ratio)

    def forward(self, x, h, w):
        x = x + self.attention(self.layer_norm_1(x), h, w)
        return x + self.mlp(self.layer_norm_2(x), h, w)


class Encoder(tnn.Module):
    def __init__(self, dims, heads, srs, depth):
        super().__init__()
        cins = (3,) + dims[:-1]
        self.patch_embeddings = tnn.ModuleList([
            OverlapPatchEmbeddings(7 if i == 0 else 3, 4 if i == 0 else 2, cins[i], dims[i]) for i in range(len(dims))])
        self.block = tnn.ModuleList([
            tnn.ModuleList([Layer(dims[i], heads[i], srs[i], 2) for _ in range(depth)]) for i in range(len(dims))])
        self.layer_norm = tnn.ModuleList([tnn.LayerNorm(d, eps=1e-6) for d in dims])

    def forward(self, x):
        feats = []
        for embed, blocks, norm in zip(self.patch_embeddings, self.block, self.layer_norm):
            x, h, w = embed(x)
            for blk in blocks:
                x = blk(x, h, w)
            x = norm(x)
            x = x.reshape(x.shape[0], h, w, -1).permute(0, 3, 1, 2).contiguous()
            feats.append(x)
        return feats


class DecodeHead(tnn.Module):
    def __init__(self, dims, width, classes):
        super().__init__()
        self.linear_c = tnn.ModuleList([tnn.Linear(d, width) for d in dims])
        self.linear_fuse = tnn.Conv2d(width * len(dims), width, 1, bias=False)
        self.batch_norm = tnn.BatchNorm2d(width)
        self.activation = tnn.ReLU()
        self.dropout = tnn.Dropout(0.1)
        self.classifier = tnn.Conv2d(width, classes, 1)

    def forward(self, feats):
        ups = []
        for f, mlp in zip(feats, self.linear_c):
            b, _, h, w = f.shape
            y = mlp(f.flatten(2).transpose(1, 2)).permute(0, 2, 1).reshape(b, -1, h, w)
            ups.append(F.interpolate(y, size=feats[0].shape[2:], mode="bilinear", align_corners=False))
        y = self.linear_fuse(torch.cat(ups[::-1], dim=1))
        return self.classifier(self.dropout(self.activation(self.batch_norm(y))))


class SegFormer(tnn.Module):
    def __init__(self, dims=(8, 12, 20), heads=(1, 2, 4), srs=(4, 2, 1), depth=2, width=16, classes=5):
        super().__init__()
        self.encoder = Encoder(dims, heads, srs, depth)
        self.decode_head = DecodeHead(dims, width, classes)

    def forward(self, pixel_values):
        return self.decode_head(self.encoder(pixel_values))


# ---------------------------------------------------------------- flax
class FlaxPatchEmbed(nn.Module):
    patch: int
    stride: int
    features: int

    def setup(self):
        p = self.patch // 2
        self.proj = nn.Conv(self.features, (self.patch, self.patch), (self.stride, self.stride),
                            padding=((p, p), (p, p)))
        self.norm = nn.LayerNorm(epsilon=1e-5)

    def __call__(self, x):
        return self.norm(self.proj(x))


class FlaxSRAttention(nn.Module):
    dim: int
    heads: int
    sr: int

    def setup(self):
        hd = self.dim // self.heads
        self.query = nn.DenseGeneral((self.heads, hd))
        self.key = nn.DenseGeneral((self.heads, hd))
        self.value = nn.DenseGeneral((self.heads, hd))
        self.out = nn.DenseGeneral(self.dim, axis=(-2, -1))
        if self.sr > 1:
            self.reduce = nn.Conv(self.dim, (self.sr, self.sr), (self.sr, self.sr), padding="VALID")
            self.reduce_norm = nn.LayerNorm(epsilon=1e-5)

    def __call__(self, x):
        b, h, w, c = x.shape
        q = self.query(x.reshape(b, h * w, c))
        kv = x
        if self.sr > 1:
            kv = self.reduce_norm(self.reduce(x))
        kv = kv.reshape(b, -1, c)
        k, v = self.key(kv), self.value(kv)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        ctx = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)
        return self.out(ctx).reshape(b, h, w, c)


class FlaxMixFFN(nn.Module):
    dim: int
    hidden: int

    def setup(self):
        self.dense1 = nn.Dense(self.hidden)
        self.dwconv = nn.Conv(self.hidden, (3, 3), padding=1, feature_group_count=self.hidden)
        self.dense2 = nn.Dense(self.dim)

    def __call__(self, x):
        y = self.dense1(x)
        y = self.dwconv(y)
        y = nn.gelu(y, approximate=False)
        return self.dense2(y)


class FlaxLayer(nn.Module):
    dim: int
    heads: int
    sr: int

    def setup(self):
        self.norm1 = nn.LayerNorm(epsilon=1e-6)
        self.attn = FlaxSRAttention(self.dim, self.heads, self.sr)
        self.norm2 = nn.LayerNorm(epsilon=1e-6)
        self.ffn = FlaxMixFFN(self.dim, 2 * self.dim)

    def __call__(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class FlaxSegFormer(nn.Module):
    dims: tuple = (8, 12, 20)
    heads: tuple = (1, 2, 4)
    srs: tuple = (4, 2, 1)
    depth: int = 2
    width: int = 16
    classes: int = 5

    def setup(self):
        ids = range(len(self.dims))
        self.embeds = [FlaxPatchEmbed(3 if i else 7, 2 if i else 4, self.dims[i]) for i in ids]
        self.stages = [[FlaxLayer(self.dims[i], self.heads[i], self.srs[i]) for _ in range(self.depth)] for i in ids]
        self.norms = [nn.LayerNorm(epsilon=1e-6) for _ in ids]
        self.mlps = [nn.Dense(self.width) for _ in ids]
        self.fuse = nn.Conv(self.width, (1, 1), use_bias=False)
        self.bn = nn.BatchNorm(momentum=0.9, epsilon=1e-5)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Conv(self.classes, (1, 1))

    def __call__(self, x, train: bool = False):
        feats = []
        for embed, blocks, norm in zip(self.embeds, self.stages, self.norms):
            x = embed(x)
            for block in blocks:
                x = block(x)
            x = norm(x)
            feats.append(x)
        height, width = feats[0].shape[1:3]
        ups = []
        for f, mlp in zip(feats, self.mlps):
            y = mlp(f)
            ups.append(jax.image.resize(y, (y.shape[0], height, width, y.shape[-1]), method="bilinear"))
        y = self.fuse(jnp.concatenate(ups[::-1], axis=-1))
        y = nn.relu(self.bn(y, use_running_average=not train))
        y = self.dropout(y, deterministic=not train)
        return self.classifier(y)


def dense(m):
    return {"kernel": m.weight.detach().numpy().T, "bias": m.bias.detach().numpy()}


def conv(m):
    out = {"kernel": m.weight.detach().numpy().transpose(2, 3, 1, 0)}
    if m.bias is not None:
        out["bias"] = m.bias.detach().numpy()
    return out


def norm(m):
    return {"scale": m.weight.detach().numpy(), "bias": m.bias.detach().numpy()}


def attention(m):
    hd = m.hd
    p = {}
    for name in ("query", "key", "value"):
        d = dense(getattr(m, name))
        p[name] = {"kernel": d["kernel"].reshape(-1, m.heads, hd), "bias": d["bias"].reshape(m.heads, hd)}
    d = dense(m.out)
    p["out"] = {"kernel": d["kernel"].reshape(m.heads, hd, -1), "bias": d["bias"]}
    if m.sr > 1:
        p["reduce"], p["reduce_norm"] = conv(m.sr_conv), norm(m.layer_norm)
    return p


def port(net):
    enc, head, p = net.encoder, net.decode_head, {}
    for i, (embed, blocks, ln) in enumerate(zip(enc.patch_embeddings, enc.block, enc.layer_norm)):
        p[f"embeds_{i}"] = {"proj": conv(embed.proj), "norm": norm(embed.layer_norm)}
        for j, blk in enumerate(blocks):
            p[f"stages_{i}_{j}"] = {
                "norm1": norm(blk.layer_norm_1), "attn": attention(blk.attention), "norm2": norm(blk.layer_norm_2),
                "ffn": {"dense1": dense(blk.mlp.dense1), "dwconv": conv(blk.mlp.dwconv), "dense2": dense(blk.mlp.dense2)}}
        p[f"norms_{i}"] = norm(ln)
        p[f"mlps_{i}"] = dense(head.linear_c[i])
    p["fuse"], p["bn"], p["classifier"] = conv(head.linear_fuse), norm(head.batch_norm), conv(head.classifier)
    stats = {"bn": {"mean": head.batch_norm.running_mean.numpy(), "var": head.batch_norm.running_var.numpy()}}
    return jax.tree.map(jnp.asarray, {"params": p, "batch_stats": stats})


def build(seed):
    """The right pair with random weights and inputs that follow from the seed."""
    torch.manual_seed(seed)
    net = SegFormer().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 1:
                p.copy_(0.4 * torch.randn_like(p) + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
        net.decode_head.batch_norm.running_mean.normal_(0, 0.3)
        net.decode_head.batch_norm.running_var.uniform_(0.4, 1.6)
    x = np.random.default_rng(seed).normal(size=(2, 3, 32, 64)).astype(np.float32)
    return {"torch": net, "flax": (FlaxSegFormer(), port(net)), "inputs": x, "flax_inputs": x.transpose(0, 2, 3, 1)}


FAULTS = [
    {
        "title": "padding SAME in the strided 7x7 and 3x3 patch embeddings",
        "edits": [("padding=((p, p), (p, p)))", 'padding="SAME")')],
        "layers": ["encoder.patch_embeddings.0.proj"],
        "causes": ["padding"],
        "level": "outputs",
    },
    {
        "title": "the reduced keys and values are not normalised",
        "edits": [("kv = self.reduce_norm(self.reduce(x))", "kv = self.reduce(x)")],
        "layers": ["encoder.block.0.0.attention.layer_norm", "encoder.block.0.0.attention"],
        "between": ("encoder.block.0.0.attention.sr_conv", "encoder.block.0.0.attention.key"),
        "causes": ["left_out"],
        "level": "outputs",
    },
    {
        "title": "GELU before the depthwise convolution",
        "edits": [("        y = self.dwconv(y)\n        y = nn.gelu(y, approximate=False)\n",
                   "        y = nn.gelu(y, approximate=False)\n        y = self.dwconv(y)\n")],
        "layers": ["encoder.block.0.0.mlp"],
        "between": ("encoder.block.0.0.mlp.dense1", "encoder.block.0.0.mlp.dwconv"),
        "causes": ["order", "activation"],
        "level": "outputs",
    },
    {
        "title": "the next stage gets the features before the stage's norm",
        "edits": [("            x = norm(x)\n            feats.append(x)", "            feats.append(norm(x))")],
        "layers": ["encoder", "encoder.layer_norm.0"],
        "between": ("encoder.layer_norm.0", "encoder.patch_embeddings.1.proj"),
        "causes": ["wiring", "operand", "left_out"],
        "level": "outputs",
    },
    {
        "title": "the decoder concatenates from fine to coarse",
        "edits": [("jnp.concatenate(ups[::-1], axis=-1)", "jnp.concatenate(ups, axis=-1)")],
        "layers": ["decode_head"],
        "between": ("decode_head.linear_c.2", "decode_head.linear_fuse"),
        "causes": ["concat"],
        "level": "outputs",
    },
    {
        "title": "nearest upsampling in the decoder",
        "edits": [('method="bilinear"', 'method="nearest"')],
        "layers": ["decode_head"],
        "between": ("decode_head.linear_c.1", "decode_head.linear_c.2"),
        "causes": ["operation"],
        "level": "outputs",
    },
    {
        "title": "scores are divided by the root of the model's width (same in the first stage: one head)",
        "edits": [("/ math.sqrt(q.shape[-1])", "/ math.sqrt(c)")],
        "layers": ["encoder.block.1.0.attention"],
        "between": ("encoder.block.1.0.attention.value", "encoder.block.1.0.attention.out"),
        "causes": ["scale"],
        "level": "outputs",
    },
    {
        "title": "the projection's weight is split as (head_dim, heads)",
        "edits": [('d["kernel"].reshape(m.heads, hd, -1)', 'd["kernel"].reshape(hd, m.heads, -1).swapaxes(0, 1)')],
        "layers": ["encoder.block.1.0.attention.out"],
        "causes": ["heads", "permuted"],
        "level": "outputs",
    },
    {
        "title": "the decoder's BatchNorm always takes the running statistics, also in training",
        "edits": [("self.bn(y, use_running_average=not train)", "self.bn(y, use_running_average=True)")],
        "layers": ["decode_head.batch_norm"],
        "causes": ["statistics", "batch_statistics"],
        "level": "training",
    },
]
