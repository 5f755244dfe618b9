"""Swin transformer: shifted windows, relative position bias, patch merging (timm-like torch, NHWC nnx)."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
from flax import nnx


# ---------------------------------------------------------------- torch
def window_partition(x, ws):
    B, H, W, C = x.shape
    x = x.view(B, H // ws, ws, W // ws, ws, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, ws, ws, C)


def window_reverse(windows, ws, H, W):
    B = windows.shape[0] // ((H // ws) * (W // ws))
    x = windows.view(B, H // ws, W // ws, ws, ws, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, -1)


class Mlp(nn.Module):
    def __init__(self, dim, hidden, drop=0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class WindowAttention(nn.Module):
    def __init__(self, dim, window_size, num_heads, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.dim, self.ws, self.num_heads = dim, window_size, num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        coords = torch.stack(torch.meshgrid(torch.arange(window_size), torch.arange(window_size), indexing="ij"))
        flat = torch.flatten(coords, 1)
        rel = (flat[:, :, None] - flat[:, None, :]).permute(1, 2, 0).contiguous()
        rel[:, :, 0] += window_size - 1
        rel[:, :, 1] += window_size - 1
        rel[:, :, 0] *= 2 * window_size - 1
        self.register_buffer("relative_position_index", rel.sum(-1))
        self.qkv = nn.Linear(dim, dim * 3)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x, mask=None):
        B_, N, C = x.shape
        qkv = self.qkv(x).reshape(B_, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(N, N, -1)
        attn = attn + bias.permute(2, 0, 1).unsqueeze(0)
        if mask is not None:
            nW = mask.shape[0]
            attn = attn.view(B_ // nW, nW, self.num_heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, N, N)
        attn = self.attn_drop(self.softmax(attn))
        x = (attn @ v).transpose(1, 2).reshape(B_, N, C)
        return self.proj_drop(self.proj(x))


class SwinBlock(nn.Module):
    def __init__(self, dim, resolution, num_heads, window_size, shift_size, drop, attn_drop):
        super().__init__()
        self.resolution, self.ws, self.shift = resolution, window_size, shift_size
        if min(resolution) <= window_size:
            self.shift = 0
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window_size, num_heads, attn_drop, drop)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, dim * 2, drop)

    def attn_mask(self, x):
        if self.shift == 0:
            return None
        H, W = self.resolution
        img = x.new_zeros((1, H, W, 1))
        cnt = 0
        cuts = (slice(0, -self.ws), slice(-self.ws, -self.shift), slice(-self.shift, None))
        for h in cuts:
            for w in cuts:
                img[:, h, w, :] = cnt
                cnt += 1
        win = window_partition(img, self.ws).view(-1, self.ws * self.ws)
        diff = win.unsqueeze(1) - win.unsqueeze(2)
        return diff.masked_fill(diff != 0, -100.0).masked_fill(diff == 0, 0.0)

    def forward(self, x):
        H, W = self.resolution
        B, L, C = x.shape
        shortcut = x
        x = self.norm1(x).view(B, H, W, C)
        if self.shift > 0:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        windows = window_partition(x, self.ws).view(-1, self.ws * self.ws, C)
        windows = self.attn(windows, self.attn_mask(x)).view(-1, self.ws, self.ws, C)
        x = window_reverse(windows, self.ws, H, W)
        if self.shift > 0:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        x = shortcut + x.view(B, H * W, C)
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    def __init__(self, resolution, dim):
        super().__init__()
        self.resolution = resolution
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x):
        H, W = self.resolution
        B, L, C = x.shape
        x = x.view(B, H, W, C)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.reduction(self.norm(x.view(B, -1, 4 * C)))


class BasicLayer(nn.Module):
    def __init__(self, dim, resolution, depth, num_heads, ws, drop, attn_drop, downsample):
        super().__init__()
        self.blocks = nn.ModuleList([
            SwinBlock(dim, resolution, num_heads, ws, 0 if i % 2 == 0 else ws // 2, drop, attn_drop) for i in range(depth)])
        self.downsample = PatchMerging(resolution, dim) if downsample else None

    def forward(self, x):
        for blk in self.blocks:
            x = blk(x)
        return x if self.downsample is None else self.downsample(x)


class SwinTransformer(nn.Module):
    def __init__(self, img=(12, 24), patch=2, embed_dim=12, heads=(2, 3), ws=3, num_classes=7, drop=0.1, attn_drop=0.2):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch, stride=patch)
        self.patch_norm = nn.LayerNorm(embed_dim)
        res = (img[0] // patch, img[1] // patch)
        self.layers = nn.ModuleList([
            BasicLayer(embed_dim * 2 ** i, (res[0] // 2 ** i, res[1] // 2 ** i), 2, heads[i], ws, drop, attn_drop,
                       downsample=i + 1 < len(heads)) for i in range(len(heads))])
        self.norm = nn.LayerNorm(embed_dim * 2)
        self.avgpool = nn.AdaptiveAvgPool1d(1)
        self.head = nn.Linear(embed_dim * 2, num_classes)

    def forward(self, x):
        x = self.patch_norm(self.proj(x).flatten(2).transpose(1, 2))
        for layer in self.layers:
            x = layer(x)
        x = self.avgpool(self.norm(x).transpose(1, 2))
        return self.head(torch.flatten(x, 1))


# ---------------------------------------------------------------- flax
def to_windows(x, ws):
    b, h, w, c = x.shape
    x = x.reshape(b, h // ws, ws, w // ws, ws, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, ws * ws, c)


def from_windows(win, ws, h, w):
    c = win.shape[-1]
    x = win.reshape(-1, h // ws, w // ws, ws, ws, c)
    x = jnp.einsum("bijxyc->bixjyc", x)
    return x.reshape(-1, h, w, c)


def relative_index(ws):
    grid = np.stack(np.meshgrid(np.arange(ws), np.arange(ws), indexing="ij")).reshape(2, -1)
    delta = grid[:, :, None] - grid[:, None, :] + ws - 1
    return delta[0] * (2 * ws - 1) + delta[1]


def shifted_mask(h, w, ws, shift):
    def zones(n):
        pos = np.arange(n)
        return (pos >= n - ws).astype(int) + (pos >= n - shift)
    ids = zones(h)[:, None] * 3 + zones(w)[None, :]
    ids = ids.reshape(h // ws, ws, w // ws, ws).transpose(0, 2, 1, 3).reshape(-1, ws * ws)
    return np.where(ids[:, :, None] != ids[:, None, :], -100.0, 0.0)


class FlaxWindowAttention(nnx.Module):
    def __init__(self, dim, ws, heads, attn_drop, proj_drop, *, rngs):
        self.heads, self.ws = heads, ws
        self.rel_bias = nnx.Param(jnp.zeros(((2 * ws - 1) ** 2, heads)))
        self.qkv = nnx.Linear(dim, 3 * dim, rngs=rngs)
        self.proj = nnx.Linear(dim, dim, rngs=rngs)
        self.attn_drop = nnx.Dropout(attn_drop, rngs=rngs)
        self.proj_drop = nnx.Dropout(proj_drop, rngs=rngs)

    def __call__(self, x, mask=None):
        bw, n, c = x.shape
        qkv = self.qkv(x).reshape(bw, n, 3, self.heads, c // self.heads)
        q, k, v = (t.transpose(0, 2, 1, 3) for t in (qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]))
        logits = jnp.einsum("bhid,bhjd->bhij", q, k) / np.sqrt(c // self.heads)
        bias = self.rel_bias[...][relative_index(self.ws)]
        logits = logits + bias.transpose(2, 0, 1)[None]
        if mask is not None:
            nw = mask.shape[0]
            logits = logits.reshape(-1, nw, self.heads, n, n) + mask[None, :, None]
            logits = logits.reshape(bw, self.heads, n, n)
        probs = self.attn_drop(jax.nn.softmax(logits, axis=-1))
        out = (probs @ v).transpose(0, 2, 1, 3).reshape(bw, n, c)
        return self.proj_drop(self.proj(out))


class FlaxSwinBlock(nnx.Module):
    def __init__(self, dim, res, heads, ws, shift, drop, attn_drop, *, rngs):
        self.res, self.ws = res, ws
        self.shift = 0 if min(res) <= ws else shift
        self.norm1 = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.attn = FlaxWindowAttention(dim, ws, heads, attn_drop, drop, rngs=rngs)
        self.norm2 = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.fc1 = nnx.Linear(dim, 2 * dim, rngs=rngs)
        self.fc2 = nnx.Linear(2 * dim, dim, rngs=rngs)
        self.drop = nnx.Dropout(drop, rngs=rngs)

    def __call__(self, x):
        h, w = self.res
        b, c = x.shape[0], x.shape[-1]
        y, mask = self.norm1(x), None
        if self.shift:
            y = jnp.roll(y, (-self.shift, -self.shift), axis=(1, 2))
            mask = jnp.asarray(shifted_mask(h, w, self.ws, self.shift))
        y = self.attn(to_windows(y, self.ws), mask)
        y = from_windows(y, self.ws, h, w)
        if self.shift:
            y = jnp.roll(y, (self.shift, self.shift), axis=(1, 2))
        x = x + y
        y = self.drop(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False))
        return x + self.drop(self.fc2(y))


class FlaxPatchMerging(nnx.Module):
    def __init__(self, dim, *, rngs):
        self.norm = nnx.LayerNorm(4 * dim, epsilon=1e-5, rngs=rngs)
        self.reduction = nnx.Linear(4 * dim, 2 * dim, use_bias=False, rngs=rngs)

    def __call__(self, x):
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(jnp.concatenate(parts, axis=-1)))


class FlaxSwin(nnx.Module):
    def __init__(self, img=(12, 24), patch=2, dim=12, heads=(2, 3), ws=3, classes=7, drop=0.1, attn_drop=0.2, *, rngs):
        self.patch_embed = nnx.Conv(3, dim, (patch, patch), strides=patch, padding="VALID", rngs=rngs)
        self.patch_norm = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        stages, merges = [], []
        for i, nh in enumerate(heads):
            res = tuple(s // patch // 2 ** i for s in img)
            stages.append(nnx.List([
                FlaxSwinBlock(dim * 2 ** i, res, nh, ws, (j % 2) * (ws // 2), drop, attn_drop, rngs=rngs)
                for j in range(2)]))
            if i + 1 < len(heads):
                merges.append(FlaxPatchMerging(dim * 2 ** i, rngs=rngs))
        self.stages, self.merges = nnx.List(stages), nnx.List(merges)
        self.norm = nnx.LayerNorm(2 * dim, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(2 * dim, classes, rngs=rngs)

    def __call__(self, x):
        x = self.patch_norm(self.patch_embed(x))
        for i, stage in enumerate(self.stages):
            for block in stage:
                x = block(x)
            if i < len(self.merges):
                x = self.merges[i](x)
        x = self.norm(x).mean(axis=(1, 2))
        return self.head(x)


def arr(t):
    return jnp.asarray(t.detach().numpy())


def put_linear(dst, src):
    dst.kernel[...] = arr(src.weight).T
    if src.bias is not None:
        dst.bias[...] = arr(src.bias)


def put_norm(dst, src):
    dst.scale[...], dst.bias[...] = arr(src.weight), arr(src.bias)


def port(net, model):
    model.patch_embed.kernel[...] = arr(net.proj.weight).transpose(2, 3, 1, 0)
    model.patch_embed.bias[...] = arr(net.proj.bias)
    put_norm(model.patch_norm, net.patch_norm)
    for i, layer in enumerate(net.layers):
        for src, dst in zip(layer.blocks, model.stages[i]):
            put_norm(dst.norm1, src.norm1)
            put_norm(dst.norm2, src.norm2)
            dst.attn.rel_bias[...] = arr(src.attn.relative_position_bias_table)
            put_linear(dst.attn.qkv, src.attn.qkv)
            put_linear(dst.attn.proj, src.attn.proj)
            put_linear(dst.fc1, src.mlp.fc1)
            put_linear(dst.fc2, src.mlp.fc2)
        if layer.downsample is not None:
            put_norm(model.merges[i].norm, layer.downsample.norm)
            put_linear(model.merges[i].reduction, layer.downsample.reduction)
    put_norm(model.norm, net.norm)
    put_linear(model.head, net.head)
    return model


def build(seed):
    """The right pair with random weights and inputs that follow from the seed."""
    torch.manual_seed(seed)
    net = SwinTransformer().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.3 * torch.randn_like(p))
            elif p.ndim == 1 or "table" in name:
                p.copy_(0.5 * torch.randn_like(p))
    model = port(net, FlaxSwin(rngs=nnx.Rngs(seed)))
    model.eval()
    x = np.random.default_rng(seed).normal(size=(2, 3, 12, 24)).astype(np.float32)
    return {"torch": net, "flax": model, "inputs": x, "flax_inputs": x.transpose(0, 2, 3, 1)}


FAULTS = [
    {
        "title": "the roll back after the shifted windows goes the wrong way",
        "edits": [("y = jnp.roll(y, (self.shift, self.shift), axis=(1, 2))",
                   "y = jnp.roll(y, (-self.shift, -self.shift), axis=(1, 2))")],
        "layers": ["layers.0.blocks.1"],
        "between": ("layers.0.blocks.1.attn.proj", "layers.0.blocks.1.norm2"),
        "causes": ["rearranged", "permuted", "constant"],
        "level": "outputs",
    },
    {
        "title": "the shift mask's regions begin at the window's end only: no cut at n - shift",
        "edits": [("return (pos >= n - ws).astype(int) + (pos >= n - shift)", "return (pos >= n - ws).astype(int)")],
        "layers": ["layers.0.blocks.1.attn", "layers.0.blocks.1.attn.softmax", "layers.0.blocks.1"],
        "between": ("layers.0.blocks.1.attn.qkv", "layers.0.blocks.1.attn.proj"),
        "causes": ["mask"],
        "level": "outputs",
    },
    {
        "title": "patch merging goes along the row first: the two middle quarters change places",
        "edits": [("for j in (0, 1) for i in (0, 1)]", "for i in (0, 1) for j in (0, 1)]")],
        "layers": ["layers.0.downsample"],
        "between": ("layers.0.blocks.1.mlp.fc2", "layers.0.downsample.norm"),
        "causes": ["concat", "swapped", "rearranged"],
        "level": "outputs",
    },
    {
        "title": "relative positions are key minus query",
        "edits": [("grid[:, :, None] - grid[:, None, :] + ws - 1", "grid[:, None, :] - grid[:, :, None] + ws - 1")],
        "layers": ["layers.0.blocks.0.attn", "layers.0.blocks.0.attn.softmax"],
        "between": ("layers.0.blocks.0.attn.qkv", "layers.0.blocks.0.attn.proj"),
        "causes": ["operand", "transposed", "flipped"],
        "level": "outputs",
    },
    {
        "title": "fused qkv split as (heads, 3, head_dim)",
        "edits": [("qkv = self.qkv(x).reshape(bw, n, 3, self.heads, c // self.heads)",
                   "qkv = self.qkv(x).reshape(bw, n, self.heads, 3, c // self.heads).swapaxes(2, 3)")],
        "layers": ["layers.0.blocks.0.attn", "layers.0.blocks.0.attn.qkv"],
        "between": ("layers.0.blocks.0.attn.qkv", "layers.0.blocks.0.attn.proj"),
        "causes": ["blocks", "heads", "rearranged"],
        "level": "outputs",
    },
    {
        "title": "the dropout of attention probabilities takes the rate of the projections",
        "edits": [("self.attn_drop = nnx.Dropout(attn_drop, rngs=rngs)", "self.attn_drop = nnx.Dropout(proj_drop, rngs=rngs)")],
        "layers": ["layers.0.blocks.0.attn.attn_drop"],
        "causes": ["training_attribute"],
        "level": "attributes",
    },
    {
        "title": "shift guard with < for <=: a stage exactly one window high is shifted too",
        "edits": [("self.shift = 0 if min(res) <= ws else shift", "self.shift = 0 if min(res) < ws else shift")],
        "layers": ["layers.1.blocks.1"],
        "between": ("layers.1.blocks.1.norm1", "layers.1.blocks.1.attn.qkv"),
        "causes": ["constant", "left_out", "rearranged"],
        "level": "outputs",
    },
    {
        "title": "average over the tokens first, final LayerNorm after it",
        "edits": [("x = self.norm(x).mean(axis=(1, 2))", "x = self.norm(x.mean(axis=(1, 2)))")],
        "layers": ["", "norm", "avgpool"],
        "between": ("layers.1.blocks.1.mlp.fc2", "norm"),
        "causes": ["norm_order", "order"],
        "level": "outputs",
    },
]
