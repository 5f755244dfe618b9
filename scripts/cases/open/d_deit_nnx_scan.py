"""Distilled DeiT with LayerScale against nnx blocks stacked with nnx.vmap and run with nnx.scan."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
from flax import nnx


class PatchEmbed(nn.Module):
    def __init__(self, patch_size=4, in_chans=3, embed_dim=24):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class LayerScale(nn.Module):
    def __init__(self, dim, init_values=1e-5):
        super().__init__()
        self.gamma = nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = (q @ k.transpose(-2, -1)) * self.scale
        x = (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, num_heads, hidden):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)
        self.ls2 = LayerScale(dim)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DistilledVisionTransformer(nn.Module):
    def __init__(self, num_patches, dim, num_heads, hidden, depth, num_classes, drop_rate=0.1):
        super().__init__()
        self.patch_embed = PatchEmbed(embed_dim=dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + 2, dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList([Block(dim, num_heads, hidden) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        self.head_dist = nn.Linear(dim, num_classes)

    def forward(self, x):
        x = self.patch_embed(x)
        cls = self.cls_token.expand(x.shape[0], -1, -1)
        dist = self.dist_token.expand(x.shape[0], -1, -1)
        x = torch.cat((cls, dist, x), dim=1)
        x = self.pos_drop(x + self.pos_embed)
        for blk in self.blocks:
            x = blk(x)
        x = self.norm(x)
        return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2


# ---- Flax NNX ----

class SelfAttention(nnx.Module):
    def __init__(self, dim, heads, *, rngs):
        self.heads = heads
        self.to_qkv = nnx.Linear(dim, 3 * dim, rngs=rngs)
        self.to_out = nnx.Linear(dim, dim, rngs=rngs)

    def __call__(self, x):
        b, n, d = x.shape
        q, k, v = jnp.split(self.to_qkv(x), 3, axis=-1)
        q, k, v = (t.reshape(b, n, self.heads, -1) for t in (q, k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        weights = nnx.softmax(scores, axis=-1)
        return self.to_out(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, n, d))


class EncoderBlock(nnx.Module):
    def __init__(self, dim, heads, hidden, *, rngs):
        self.ln_attn = nnx.LayerNorm(dim, rngs=rngs)
        self.attention = SelfAttention(dim, heads, rngs=rngs)
        self.gamma_attn = nnx.Param(jnp.full((dim,), 1e-5))
        self.ln_mlp = nnx.LayerNorm(dim, rngs=rngs)
        self.dense_in = nnx.Linear(dim, hidden, rngs=rngs)
        self.dense_out = nnx.Linear(hidden, dim, rngs=rngs)
        self.gamma_mlp = nnx.Param(jnp.full((dim,), 1e-5))

    def __call__(self, x):
        x = x + self.gamma_attn[...] * self.attention(self.ln_attn(x))
        y = nnx.gelu(self.dense_in(self.ln_mlp(x)), approximate=False)
        return x + self.gamma_mlp[...] * self.dense_out(y)


class FlaxDeiT(nnx.Module):
    def __init__(self, num_patches, dim, heads, hidden, depth, num_classes, *, rngs):
        self.patch = nnx.Conv(3, dim, (4, 4), strides=(4, 4), padding="VALID", rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((1, 1, dim)))
        self.dist = nnx.Param(jnp.zeros((1, 1, dim)))
        self.pos = nnx.Param(jnp.zeros((1, num_patches + 2, dim)))
        self.drop = nnx.Dropout(0.1, rngs=rngs)

        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return EncoderBlock(dim, heads, hidden, rngs=rngs)

        self.encoder = stack(rngs)
        self.ln = nnx.LayerNorm(dim, rngs=rngs)
        self.classifier = nnx.Linear(dim, num_classes, rngs=rngs)
        self.classifier_dist = nnx.Linear(dim, num_classes, rngs=rngs)

    def __call__(self, images):
        x = self.patch(images)
        b, h, w, d = x.shape
        x = x.reshape(b, h * w, d)
        tokens = [jnp.broadcast_to(t[...], (b, 1, d)) for t in (self.cls, self.dist)]
        x = jnp.concatenate(tokens + [x], axis=1)
        x = self.drop(x + self.pos[...])

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(carry, block):
            return block(carry)

        x = self.ln(run(x, self.encoder))
        return 0.5 * (self.classifier(x[:, 0]) + self.classifier_dist(x[:, 1]))


def port(net, model):
    arr = lambda t: jnp.asarray(t.detach().numpy())

    def dense(target, m):
        target.kernel[...], target.bias[...] = arr(m.weight).T, arr(m.bias)

    def norm(target, m):
        target.scale[...], target.bias[...] = arr(m.weight), arr(m.bias)

    def stacked(get):
        return jnp.stack([arr(get(blk)) for blk in net.blocks])

    model.patch.kernel[...] = arr(net.patch_embed.proj.weight).transpose(2, 3, 1, 0)
    model.patch.bias[...] = arr(net.patch_embed.proj.bias)
    model.cls[...], model.dist[...], model.pos[...] = arr(net.cls_token), arr(net.dist_token), arr(net.pos_embed)
    enc = model.encoder
    enc.ln_attn.scale[...] = stacked(lambda l: l.norm1.weight)
    enc.ln_attn.bias[...] = stacked(lambda l: l.norm1.bias)
    enc.ln_mlp.scale[...] = stacked(lambda l: l.norm2.weight)
    enc.ln_mlp.bias[...] = stacked(lambda l: l.norm2.bias)
    enc.attention.to_qkv.kernel[...] = stacked(lambda l: l.attn.qkv.weight.T)
    enc.attention.to_qkv.bias[...] = stacked(lambda l: l.attn.qkv.bias)
    enc.attention.to_out.kernel[...] = stacked(lambda l: l.attn.proj.weight.T)
    enc.attention.to_out.bias[...] = stacked(lambda l: l.attn.proj.bias)
    enc.dense_in.kernel[...] = stacked(lambda l: l.mlp.fc1.weight.T)
    enc.dense_in.bias[...] = stacked(lambda l: l.mlp.fc1.bias)
    enc.dense_out.kernel[...] = stacked(lambda l: l.mlp.fc2.weight.T)
    enc.dense_out.bias[...] = stacked(lambda l: l.mlp.fc2.bias)
    enc.gamma_attn[...] = stacked(lambda l: l.ls1.gamma)
    enc.gamma_mlp[...] = stacked(lambda l: l.ls2.gamma)
    norm(model.ln, net.norm)
    dense(model.classifier, net.head)
    dense(model.classifier_dist, net.head_dist)
    model.eval()
    return model


def build(seed):
    torch.manual_seed(seed)
    net = DistilledVisionTransformer(num_patches=15, dim=24, num_heads=3, hidden=56, depth=2, num_classes=6).eval()
    for name, p in net.named_parameters():
        if "norm" in name and "weight" in name or "gamma" in name:
            nn.init.uniform_(p, 0.4, 1.4)
        elif p.ndim < 2 or p.shape[0] == 1:
            nn.init.normal_(p, 0.0, 0.5)
        elif "qkv" in name:
            nn.init.normal_(p, 0.0, 0.4)
    image = np.random.default_rng(seed).standard_normal((2, 3, 12, 20))
    model = FlaxDeiT(15, 24, 3, 56, 2, 6, rngs=nnx.Rngs(seed))
    return {
        "torch": net,
        "flax": port(net, model),
        "inputs": image,
        "flax_inputs": np.moveaxis(image, 1, -1),
    }


FAULTS = [
    {
        "title": "distillation token in front of the class token",
        "edits": [("for t in (self.cls, self.dist)]", "for t in (self.dist, self.cls)]")],
        "layers": [""],
        "between": ("patch_embed.proj", "blocks.0.norm1"),
        "causes": ["concat", "swapped"],
        "level": "outputs",
    },
    {
        "title": "patches numbered column by column",
        "edits": [("        x = x.reshape(b, h * w, d)", "        x = x.swapaxes(1, 2).reshape(b, h * w, d)")],
        "layers": ["patch_embed"],
        "between": ("patch_embed.proj", "blocks.0.norm1"),
        "causes": ["transposed", "rearranged"],
        "level": "outputs",
    },
    {
        "title": "layer scale multiplies the stream after the residual sum",
        "edits": [("        x = x + self.gamma_attn[...] * self.attention(self.ln_attn(x))", "        x = self.gamma_attn[...] * (x + self.attention(self.ln_attn(x)))")],
        "layers": ["blocks.0", "blocks.0.ls1"],
        "between": ("blocks.0.attn.proj", "blocks.0.ls1"),
        "causes": ["order", "residual"],
        "level": "outputs",
    },
    {
        "title": "scores scaled by the root of the number of tokens",
        "edits": [("* q.shape[-1] ** -0.5", "* q.shape[1] ** -0.5")],
        "layers": ["blocks.0.attn"],
        "between": ("blocks.0.attn.qkv", "blocks.0.attn.proj"),
        "causes": ["scale", "constant"],
        "level": "outputs",
    },
    {
        "title": "dropout after the positions left at 0",
        "edits": [("self.drop = nnx.Dropout(0.1, rngs=rngs)", "self.drop = nnx.Dropout(0.0, rngs=rngs)")],
        "layers": ["pos_drop"],
        "causes": ["training_attribute", "dropout"],
        "level": "attributes",
    },
    {
        "title": "patch projection frozen as in MoCo v3",
        "edits": [("        x = self.patch(images)\n", "        x = jax.lax.stop_gradient(self.patch(images))\n")],
        "layers": ["patch_embed.proj", "patch_embed"],
        "between": ("patch_embed.proj", "blocks.0.norm1"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "stacked qkv kernel holds layer 0's weights in both layers",
        "edits": [("enc.attention.to_qkv.kernel[...] = stacked(lambda l: l.attn.qkv.weight.T)", "enc.attention.to_qkv.kernel[...] = arr(net.blocks[0].attn.qkv.weight.T)")],
        "layers": ["blocks.1.attn.qkv"],
        "causes": ["values", "swapped"],
        "level": "outputs",
    },
    {
        "title": "first position goes to the first patch: tokens get none, grid positions from index 0",
        "edits": [
            ("        x = jnp.concatenate(tokens + [x], axis=1)\n        x = self.drop(x + self.pos[...])",
             "        x = self.drop(x + self.pos[:, :h * w])\n        x = jnp.concatenate(tokens + [x], axis=1)"),
        ],
        "layers": [""],
        "between": ("patch_embed.proj", "blocks.0.norm1"),
        "causes": ["order", "offset"],
        "level": "outputs",
    },
]
