"""ViT with class token and registers, layer scale and stochastic depth; nnx.MultiHeadAttention on the Flax side."""
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
from flax import nnx


@dataclass
class ViTConfig:
    image_size: tuple = (12, 20)
    patch: int = 4
    width: int = 24
    depth: int = 2
    heads: int = 4
    registers: int = 2
    mlp: int = 56
    classes: int = 7
    drop: float = 0.1
    eps: float = 1e-6

    @property
    def grid(self):
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch


class PatchEmbed(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.proj = nn.Conv2d(3, cfg.width, cfg.patch, stride=cfg.patch)

    def forward(self, img):
        return self.proj(img).flatten(2).transpose(1, 2).detach()


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(1e-5 * torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.fc1 = nn.Linear(cfg.width, cfg.mlp)
        self.act = nn.GELU()
        self.drop = nn.Dropout(cfg.drop)
        self.fc2 = nn.Linear(cfg.mlp, cfg.width)

    def forward(self, x):
        return self.fc2(self.drop(self.act(self.fc1(x))))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.attn = nn.MultiheadAttention(cfg.width, cfg.heads, batch_first=True)
        self.ls1 = LayerScale(cfg.width)
        self.norm2 = nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.mlp = Mlp(cfg)
        self.ls2 = LayerScale(cfg.width)

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.ls1(self.attn(h, h, h, need_weights=False)[0])
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        tokens = cfg.grid[0] * cfg.grid[1]
        self.patch_embed = PatchEmbed(cfg)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.reg_tokens = nn.Parameter(torch.zeros(1, cfg.registers, cfg.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + tokens, cfg.width))
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.depth)])
        self.norm = nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.head = nn.Linear(2 * cfg.width, cfg.classes)

    def forward(self, img):
        x = self.patch_embed(img)
        b = x.shape[0]
        x = torch.cat([self.cls_token.expand(b, -1, -1), x], dim=1) + self.pos_embed
        x = torch.cat([x[:, :1], self.reg_tokens.expand(b, -1, -1), x[:, 1:]], dim=1)
        for blk in self.blocks:
            x = blk(x)
        x = self.norm(x)
        patches = x[:, 1 + self.cfg.registers:]
        return self.head(torch.cat([x[:, 0], patches.mean(dim=1)], dim=-1))


# ----------------------------------------------------------------------------- Flax


class FlaxMlp(nnx.Module):
    def __init__(self, cfg: ViTConfig, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(cfg.width, cfg.mlp, rngs=rngs)
        self.drop = nnx.Dropout(cfg.drop, deterministic=True, rngs=rngs)
        self.fc2 = nnx.Linear(cfg.mlp, cfg.width, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.gelu(self.fc1(x), approximate=False)
        return self.fc2(self.drop(x))


class FlaxBlock(nnx.Module):
    def __init__(self, cfg: ViTConfig, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(cfg.width, epsilon=cfg.eps, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(cfg.heads, cfg.width, decode=False, deterministic=True, rngs=rngs)
        self.gamma_1 = nnx.Param(jnp.ones(cfg.width))
        self.norm2 = nnx.LayerNorm(cfg.width, epsilon=cfg.eps, rngs=rngs)
        self.mlp = FlaxMlp(cfg, rngs)
        self.gamma_2 = nnx.Param(jnp.ones(cfg.width))

    def __call__(self, x):
        x = x + self.gamma_1[...] * self.attn(self.norm1(x))
        x = x + self.gamma_2[...] * self.mlp(self.norm2(x))
        return x


class FlaxViT(nnx.Module):
    def __init__(self, cfg: ViTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        n = cfg.grid[0] * cfg.grid[1]
        self.patch = nnx.Conv(3, cfg.width, (cfg.patch, cfg.patch), strides=cfg.patch, padding="VALID", rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((1, 1, cfg.width)))
        self.registers = nnx.Param(jnp.zeros((1, cfg.registers, cfg.width)))
        self.pos = nnx.Param(jnp.zeros((1, n + 1, cfg.width)))
        self.blocks = nnx.List([FlaxBlock(cfg, rngs) for _ in range(cfg.depth)])
        self.norm = nnx.LayerNorm(cfg.width, epsilon=cfg.eps, rngs=rngs)
        self.head = nnx.Linear(2 * cfg.width, cfg.classes, rngs=rngs)

    def embed(self, images):
        feat = self.patch(images)
        b, h, w, c = feat.shape
        tokens = feat.reshape(b, h * w, c)
        return jax.lax.stop_gradient(tokens)

    def __call__(self, images):
        x = self.embed(images)
        b, _, c = x.shape
        pos = self.pos[...]
        cls = jnp.broadcast_to(self.cls[...] + pos[:, :1], (b, 1, c))
        reg = jnp.broadcast_to(self.registers[...], (b, self.cfg.registers, c))
        x = x + pos[:, 1:]
        x = jnp.concatenate([cls, reg, x], axis=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        cls, patches = x[:, 0], x[:, 1 + self.cfg.registers:]
        return self.head(jnp.concatenate([cls, patches.mean(axis=1)], axis=-1))


def a(t):
    return jnp.asarray(t.detach().numpy())


def port_linear(src, dst):
    dst.kernel[...] = a(src.weight).T
    dst.bias[...] = a(src.bias)


def port_norm(src, dst):
    dst.scale[...] = a(src.weight)
    dst.bias[...] = a(src.bias)


def port_attention(src, dst, heads):
    d = src.embed_dim
    for name, w, b in zip(("query", "key", "value"), src.in_proj_weight.chunk(3), src.in_proj_bias.chunk(3)):
        layer = getattr(dst, name)
        layer.kernel[...] = a(w).T.reshape(d, heads, d // heads)
        layer.bias[...] = a(b).reshape(heads, d // heads)
    dst.out.kernel[...] = a(src.out_proj.weight).T.reshape(heads, d // heads, d)
    dst.out.bias[...] = a(src.out_proj.bias)


def port(net, model):
    model.patch.kernel[...] = a(net.patch_embed.proj.weight).transpose(2, 3, 1, 0)
    model.patch.bias[...] = a(net.patch_embed.proj.bias)
    model.cls[...] = a(net.cls_token)
    model.registers[...] = a(net.reg_tokens)
    model.pos[...] = a(net.pos_embed)
    for src, dst in zip(net.blocks, model.blocks):
        port_norm(src.norm1, dst.norm1)
        port_attention(src.attn, dst.attn, net.cfg.heads)
        dst.gamma_1[...] = a(src.ls1.gamma)
        port_norm(src.norm2, dst.norm2)
        port_linear(src.mlp.fc1, dst.mlp.fc1)
        port_linear(src.mlp.fc2, dst.mlp.fc2)
        dst.gamma_2[...] = a(src.ls2.gamma)
    port_norm(net.norm, model.norm)
    port_linear(net.head, model.head)
    return model


def build(seed):
    torch.manual_seed(seed)
    cfg = ViTConfig()
    net = VisionTransformer(cfg).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 1:
                p.copy_((1.0 if "norm" in name and "weight" in name else 0.0) + 0.3 * torch.randn_like(p))
            elif "token" in name or "pos" in name:
                p.normal_(0, 0.5)
    model = port(net, FlaxViT(cfg, rngs=nnx.Rngs(seed)))
    img = np.random.default_rng(seed).normal(size=(3, 3, *cfg.image_size))
    return {"torch": net, "flax": model, "inputs": img, "flax_inputs": img.transpose(0, 2, 3, 1)}


FAULTS = [
    {
        "title": "patch grid flattened column by column",
        "edits": [("tokens = feat.reshape(b, h * w, c)", "tokens = feat.swapaxes(1, 2).reshape(b, h * w, c)")],
        "layers": ["patch_embed"],
        "between": ("patch_embed.proj", "blocks.0.norm1"),
        "causes": ["rearranged", "transposed"],
        "level": "outputs",
    },
    {
        "title": "patch projection is trained: stop_gradient forgotten",
        "edits": [("return jax.lax.stop_gradient(tokens)", "return tokens")],
        "layers": ["patch_embed", "patch_embed.proj"],
        "between": ("patch_embed.proj", "blocks.0.norm1"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "positions of the patches counted from the class token's row",
        "edits": [("x = x + pos[:, 1:]", "x = x + pos[:, : x.shape[1]]")],
        "layers": [""],
        "between": ("patch_embed.proj", "blocks.0.norm1"),
        "causes": ["offset"],
        "level": "outputs",
    },
    {
        "title": "pooled mean also over the registers",
        "edits": [("cls, patches = x[:, 0], x[:, 1 + self.cfg.registers:]", "cls, patches = x[:, 0], x[:, 1:]")],
        "layers": [""],
        "between": ("norm", "head"),
        "causes": ["token", "operand"],
        "level": "outputs",
    },
    {
        "title": "layer scale of the MLP branch multiplies its input",
        "edits": [("self.gamma_2[...] * self.mlp(self.norm2(x))", "self.mlp(self.gamma_2[...] * self.norm2(x))")],
        "layers": ["blocks.0", "blocks.0.ls2"],
        "between": ("blocks.0.norm2", "blocks.0.mlp.fc1"),
        "causes": ["order"],
        "level": "outputs",
    },
    {
        "title": "kernel of attention's out projection with head_dim before heads",
        "edits": [("a(src.out_proj.weight).T.reshape(heads, d // heads, d)",
                   "a(src.out_proj.weight).T.reshape(d // heads, heads, d).swapaxes(0, 1)")],
        "layers": ["blocks.0.attn.out_proj", "blocks.0.attn"],
        "causes": ["heads"],
        "level": "outputs",
    },
    {
        "title": "rate of dropout in the MLP taken for a keep probability",
        "edits": [("nnx.Dropout(cfg.drop, deterministic", "nnx.Dropout(1.0 - cfg.drop, deterministic")],
        "layers": ["blocks.0.mlp.drop"],
        "between": ("blocks.0.mlp.fc1", "blocks.0.mlp.fc2"),
        "causes": ["training_attribute", "dropout"],
        "level": "attributes",
    },
    {
        "title": "GELU with Flax's default (tanh)",
        "edits": [("jax.nn.gelu(self.fc1(x), approximate=False)", "jax.nn.gelu(self.fc1(x))")],
        "layers": ["blocks.0.mlp.act", "blocks.0.mlp"],
        "between": ("blocks.0.mlp.fc1", "blocks.0.mlp.fc2"),
        "causes": ["gelu"],
        "level": "outputs",
    },
]
