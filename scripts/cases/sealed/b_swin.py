"""Swin: windows, shifted windows with masks, relative position bias, patch merging; Linen in Flax."""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import jax
import jax.numpy as jnp
import flax.linen as fnn

DEPTHS = (2, 2)
HEADS = (2, 4)
WINDOWS = (4, 2)
DROP_PATH = 0.3


def window_partition_pt(x, ws):
    B, H, W, C = x.shape
    x = x.view(B, H // ws, ws, W // ws, ws, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, ws * ws, C)


def window_reverse_pt(windows, ws, H, W):
    B = windows.shape[0] // (H // ws * W // ws)
    x = windows.view(B, H // ws, W // ws, ws, ws, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, -1)


def shift_mask_pt(H, W, ws, shift):
    img = torch.zeros(1, H, W, 1)
    count = 0
    for h in (slice(0, -ws), slice(-ws, -shift), slice(-shift, None)):
        for w in (slice(0, -ws), slice(-ws, -shift), slice(-shift, None)):
            img[:, h, w] = count
            count += 1
    ids = window_partition_pt(img, ws).squeeze(-1)
    diff = ids.unsqueeze(1) - ids.unsqueeze(2)
    return diff.masked_fill(diff != 0, -100.0).masked_fill(diff == 0, 0.0)


class DropPath(nn.Module):
    def __init__(self, drop_prob=0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep) / keep


class WindowAttention(nn.Module):
    def __init__(self, dim, ws, num_heads):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * ws - 1) ** 2, num_heads))
        coords = torch.stack(torch.meshgrid(torch.arange(ws), torch.arange(ws), indexing="ij")).flatten(1)
        rel = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0).contiguous()
        rel += ws - 1
        rel[:, :, 0] *= 2 * ws - 1
        self.register_buffer("relative_position_index", rel.sum(-1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x, mask=None):
        Bw, N, C = x.shape
        qkv = self.qkv(x).reshape(Bw, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
        attn = q @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(N, N, -1)
        attn = attn + bias.permute(2, 0, 1).unsqueeze(0)
        if mask is not None:
            nW = mask.shape[0]
            attn = attn.view(Bw // nW, nW, self.num_heads, N, N) + mask.to(attn)[None, :, None]
            attn = attn.view(-1, self.num_heads, N, N)
        x = (self.softmax(attn) @ v).transpose(1, 2).reshape(Bw, N, C)
        return self.proj(x)


class SwinBlock(nn.Module):
    def __init__(self, dim, heads, ws, shift, drop_path):
        super().__init__()
        self.ws, self.shift = ws, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, ws, heads)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 3 * dim), nn.GELU(), nn.Linear(3 * dim, dim))

    def forward(self, x):
        B, H, W, C = x.shape
        h, mask = self.norm1(x), None
        if self.shift:
            h = torch.roll(h, (-self.shift, -self.shift), (1, 2))
            mask = shift_mask_pt(H, W, self.ws, self.shift)
        h = self.attn(window_partition_pt(h, self.ws), mask)
        h = window_reverse_pt(h, self.ws, H, W)
        if self.shift:
            h = torch.roll(h, (self.shift, self.shift), (1, 2))
        x = x + self.drop_path(h)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.reduction(self.norm(x))


class SwinTransformer(nn.Module):
    def __init__(self, dim=16, classes=5):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 2, 2)
        self.patch_norm = nn.LayerNorm(dim)
        rates = [r.item() for r in torch.linspace(0, DROP_PATH, sum(DEPTHS))]
        self.stages = nn.ModuleList()
        for i, depth in enumerate(DEPTHS):
            d, offset = dim * 2 ** i, sum(DEPTHS[:i])
            blocks = [SwinBlock(d, HEADS[i], WINDOWS[i], WINDOWS[i] // 2 if j % 2 else 0, rates[offset + j])
                      for j in range(depth)]
            self.stages.append(nn.ModuleList(blocks))
        self.merge = PatchMerging(dim)
        self.norm = nn.LayerNorm(2 * dim)
        self.head = nn.Linear(2 * dim, classes)

    def forward(self, img):
        x = self.patch_norm(self.patch_embed(img).permute(0, 2, 3, 1))
        for i, stage in enumerate(self.stages):
            for block in stage:
                x = block(x)
            if i == 0:
                x = self.merge(x)
        return self.head(self.norm(x).flatten(1, 2).mean(1))


# ------------------------------------------------------------------ Flax (Linen)


def to_windows(x, w):
    b, height, width, c = x.shape
    x = x.reshape(b, height // w, w, width // w, w, c)
    x = jnp.transpose(x, (0, 1, 3, 2, 4, 5))
    return x.reshape(-1, w * w, c)


def from_windows(windows, w, height, width):
    c = windows.shape[-1]
    x = windows.reshape(-1, height // w, width // w, w, w, c)
    return jnp.transpose(x, (0, 1, 3, 2, 4, 5)).reshape(-1, height, width, c)


def relative_index(w):
    ys, xs = np.divmod(np.arange(w * w), w)
    dy = ys[:, None] - ys[None, :] + w - 1
    dx = xs[:, None] - xs[None, :] + w - 1
    return dy * (2 * w - 1) + dx


def shifted_mask(height, width, w, shift):
    def region(n):
        return np.where(np.arange(n) < n - w, 0, np.where(np.arange(n) < n - shift, 1, 2))
    ids = region(height)[:, None] * 3 + region(width)[None, :]
    ids = np.asarray(to_windows(ids[None, :, :, None], w))[..., 0]
    return jnp.where(ids[:, None, :] == ids[:, :, None], 0.0, -100.0)


class WindowMSA(fnn.Module):
    heads: int
    window: int

    @fnn.compact
    def __call__(self, x, mask=None):
        n, length, dim = x.shape
        table = self.param("relative_position_bias_table", fnn.initializers.normal(0.02),
                           ((2 * self.window - 1) ** 2, self.heads))
        qkv = fnn.Dense(3 * dim, name="qkv")(x)
        qkv = qkv.reshape(n, length, 3, self.heads, -1)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        logits = jnp.einsum("nqhd,nkhd->nhqk", q, k) * (dim // self.heads) ** -0.5
        logits = logits + table[relative_index(self.window)].transpose(2, 0, 1)
        if mask is not None:
            logits = logits + jnp.tile(mask, (n // mask.shape[0], 1, 1))[:, None]
        weights = jax.nn.softmax(logits, axis=-1)
        out = jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(n, length, dim)
        return fnn.Dense(dim, name="proj")(out)


class Block(fnn.Module):
    heads: int
    window: int
    shift: int
    drop_path: float
    deterministic: bool = True

    @fnn.compact
    def __call__(self, x):
        _, height, width, dim = x.shape
        drop = fnn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3), deterministic=self.deterministic)
        y = fnn.LayerNorm(epsilon=1e-5, name="norm1")(x)
        mask = None
        if self.shift > 0:
            y = jnp.roll(y, (-self.shift, -self.shift), axis=(1, 2))
            mask = shifted_mask(height, width, self.window, self.shift)
        y = WindowMSA(self.heads, self.window, name="attn")(to_windows(y, self.window), mask)
        y = from_windows(y, self.window, height, width)
        if self.shift > 0:
            y = jnp.roll(y, (self.shift, self.shift), axis=(1, 2))
        x = x + drop(y)
        y = fnn.LayerNorm(epsilon=1e-5, name="norm2")(x)
        y = fnn.gelu(fnn.Dense(3 * dim, name="fc1")(y), approximate=False)
        return x + drop(fnn.Dense(dim, name="fc2")(y))


class Swin(fnn.Module):
    dim: int = 16
    classes: int = 5

    @fnn.compact
    def __call__(self, images):
        x = fnn.Conv(self.dim, (2, 2), strides=(2, 2), padding="VALID", name="patch_embed")(images)
        x = fnn.LayerNorm(epsilon=1e-5, name="patch_norm")(x)
        rates, k = np.linspace(0.0, DROP_PATH, sum(DEPTHS)), 0
        for i, depth in enumerate(DEPTHS):
            for j in range(depth):
                shift = WINDOWS[i] // 2 if j % 2 else 0
                x = Block(HEADS[i], WINDOWS[i], shift, float(rates[k]), name=f"layers_{i}_blocks_{j}")(x)
                k += 1
            if i == 0:
                x = jnp.concatenate(
                    [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], axis=-1)
                x = fnn.LayerNorm(epsilon=1e-5, name="downsample_norm")(x)
                x = fnn.Dense(2 * self.dim, use_bias=False, name="downsample")(x)
        x = fnn.LayerNorm(epsilon=1e-5, name="norm")(x)
        return fnn.Dense(self.classes, name="head")(x.mean(axis=(1, 2)))


def n(t):
    return jnp.asarray(t.detach().cpu().numpy())


def dense(m):
    return {"kernel": n(m.weight).T, "bias": n(m.bias)} if m.bias is not None else {"kernel": n(m.weight).T}


def norm(m):
    return {"scale": n(m.weight), "bias": n(m.bias)}


def port(net):
    params = {
        "patch_embed": {"kernel": n(net.patch_embed.weight).transpose(2, 3, 1, 0), "bias": n(net.patch_embed.bias)},
        "patch_norm": norm(net.patch_norm),
        "downsample_norm": norm(net.merge.norm),
        "downsample": dense(net.merge.reduction),
        "norm": norm(net.norm),
        "head": dense(net.head),
    }
    for i, stage in enumerate(net.stages):
        for j, blk in enumerate(stage):
            params[f"layers_{i}_blocks_{j}"] = {
                "norm1": norm(blk.norm1),
                "attn": {
                    "qkv": dense(blk.attn.qkv),
                    "proj": dense(blk.attn.proj),
                    "relative_position_bias_table": n(blk.attn.relative_position_bias_table),
                },
                "norm2": norm(blk.norm2),
                "fc1": dense(blk.mlp[0]),
                "fc2": dense(blk.mlp[2]),
            }
    return {"params": params}


def build(seed):
    torch.manual_seed(seed)
    net = SwinTransformer().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.2)
            if "table" in name:
                p.normal_(0, 0.7)
    img = np.random.RandomState(seed).randn(2, 3, 16, 24)
    return {"torch": net, "flax": (Swin(), port(net)), "inputs": img, "flax_inputs": img.transpose(0, 2, 3, 1)}


FAULTS = [
    {
        "title": "cyclic shift rolled towards the other side, and back",
        "edits": [("y = jnp.roll(y, (-self.shift, -self.shift), axis=(1, 2))\n            mask",
                   "y = jnp.roll(y, (self.shift, self.shift), axis=(1, 2))\n            mask"),
                  ("y = jnp.roll(y, (self.shift, self.shift), axis=(1, 2))\n        x = x",
                   "y = jnp.roll(y, (-self.shift, -self.shift), axis=(1, 2))\n        x = x")],
        "layers": ["stages.0.1"],
        "between": ("stages.0.1.norm1", "stages.0.1.attn.qkv"),
        "causes": ["operand", "reversed", "offset"],
        "level": "outputs",
    },
    {
        "title": "windows put back without exchanging the axes",
        "edits": [("return jnp.transpose(x, (0, 1, 3, 2, 4, 5)).reshape(-1, height, width, c)",
                   "return x.reshape(-1, height, width, c)")],
        "layers": ["stages.0.0"],
        "between": ("stages.0.0.attn.proj", "stages.0.0.norm2"),
        "causes": ["rearranged", "transposed"],
        "level": "outputs",
    },
    {
        "title": "mask of the shifted windows repeated per window, not per image",
        "edits": [("jnp.tile(mask, (n // mask.shape[0], 1, 1))", "jnp.repeat(mask, n // mask.shape[0], axis=0)")],
        "layers": ["stages.0.1.attn"],
        "between": ("stages.0.1.attn.qkv", "stages.0.1.attn.proj"),
        "causes": ["mask", "rearranged"],
        "level": "outputs",
    },
    {
        "title": "relative index with x counted in rows",
        "edits": [("return dy * (2 * w - 1) + dx", "return dx * (2 * w - 1) + dy")],
        "layers": ["stages.0.0.attn"],
        "between": ("stages.0.0.attn.qkv", "stages.0.0.attn.proj"),
        "causes": ["operand", "rearranged", "transposed"],
        "level": "outputs",
    },
    {
        "title": "patch merging: the quarters in reading order",
        "edits": [("[x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], axis=-1)",
                   "[x[:, 0::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 0::2], x[:, 1::2, 1::2]], axis=-1)")],
        "layers": ["merge"],
        "between": ("stages.0.1.mlp.2", "merge.norm"),
        "causes": ["concat", "rearranged"],
        "level": "outputs",
    },
    {
        "title": "scale applied to the logits after the relative bias",
        "edits": [('k) * (dim // self.heads) ** -0.5', 'k)'),
                  ("logits = logits + table[relative_index(self.window)].transpose(2, 0, 1)",
                   "logits = (logits + table[relative_index(self.window)].transpose(2, 0, 1)) * (dim // self.heads) ** -0.5")],
        "layers": ["stages.0.0.attn"],
        "between": ("stages.0.0.attn.qkv", "stages.0.0.attn.proj"),
        "causes": ["order", "scale"],
        "level": "outputs",
    },
    {
        "title": "norm after the patches with Linen's default epsilon",
        "edits": [('fnn.LayerNorm(epsilon=1e-5, name="patch_norm")', 'fnn.LayerNorm(name="patch_norm")')],
        "layers": ["patch_norm"],
        "causes": ["epsilon"],
        "level": "outputs",
    },
    {
        "title": "rates of stochastic depth start anew at every stage",
        "edits": [("float(rates[k]), name", "float(rates[j]), name")],
        "layers": ["stages.1.0.drop_path"],
        "between": ("stages.1.0.attn.proj", "stages.1.0.norm2"),
        "causes": ["training_attribute", "dropout"],
        "level": "attributes",
    },
]
