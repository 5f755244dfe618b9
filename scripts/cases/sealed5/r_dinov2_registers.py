"""DINOv2 with registers: a ViT with register tokens, LayerScale, SwiGLU and interpolated positions."""
import math

import jax
import jax.numpy as jnp
from flax import nnx
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

IMG, PATCH, DIM, HEADS, DEPTH, REGS = 16, 4, 18, 3, 2, 2


# ---- torch, after facebookresearch/dinov2
class PatchEmbed(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, DIM, kernel_size=PATCH, stride=PATCH)
        self.num_patches = (IMG // PATCH) ** 2

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.scale = (DIM // HEADS) ** -0.5
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1)).softmax(dim=-1)
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class SwiGLUFFN(nn.Module):
    def __init__(self, in_features, hidden_features):
        super().__init__()
        hidden_features = (int(hidden_features * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(in_features, 2 * hidden_features)
        self.w3 = nn.Linear(hidden_features, in_features)

    def forward(self, x):
        x1, x2 = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(x1) * x2)


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM, eps=1e-6)
        self.attn = Attention()
        self.ls1 = LayerScale(DIM)
        self.norm2 = nn.LayerNorm(DIM, eps=1e-6)
        self.mlp = SwiGLUFFN(DIM, 4 * DIM)
        self.ls2 = LayerScale(DIM)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DinoVisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_size = PATCH
        self.num_register_tokens = REGS
        self.patch_embed = PatchEmbed()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, DIM))
        self.register_tokens = nn.Parameter(torch.zeros(1, REGS, DIM))
        self.mask_token = nn.Parameter(torch.zeros(1, DIM))
        self.blocks = nn.ModuleList([Block() for _ in range(DEPTH)])
        self.norm = nn.LayerNorm(DIM, eps=1e-6)

    def interpolate_pos_encoding(self, x, h, w):
        N = self.pos_embed.shape[1] - 1
        class_pos_embed, patch_pos_embed = self.pos_embed[:, 0], self.pos_embed[:, 1:]
        dim = x.shape[-1]
        h0, w0 = h // self.patch_size, w // self.patch_size
        M = int(math.sqrt(N))
        patch_pos_embed = F.interpolate(patch_pos_embed.reshape(1, M, M, dim).permute(0, 3, 1, 2),
                                        size=(h0, w0), mode="bicubic", antialias=False)
        patch_pos_embed = patch_pos_embed.permute(0, 2, 3, 1).view(1, -1, dim)
        return torch.cat((class_pos_embed.unsqueeze(0), patch_pos_embed), dim=1)

    def prepare_tokens_with_masks(self, x, masks):
        _, _, h, w = x.shape
        x = self.patch_embed(x)
        x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype).unsqueeze(0), x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + self.interpolate_pos_encoding(x, h, w)
        return torch.cat((x[:, :1], self.register_tokens.expand(x.shape[0], -1, -1), x[:, 1:]), dim=1)

    def forward(self, x, masks):
        x = self.prepare_tokens_with_masks(x, masks)
        for blk in self.blocks:
            x = blk(x)
        x_norm = self.norm(x)
        return x_norm[:, 0], x_norm[:, self.num_register_tokens + 1:]


# ---- Flax NNX: NHWC, separate projections, bicubic interpolation as two small matrices
def cubic_matrix(src, dst, dtype):
    """Rows of weights of torch's bicubic resize, half-pixel centres, the border repeated."""
    a = -0.75
    m = np.zeros((dst, src))
    for i in range(dst):
        centre = (i + 0.5) * src / dst - 0.5
        left = math.floor(centre)
        for j in range(left - 1, left + 3):
            d = abs(centre - j)
            if d <= 1:
                wt = ((a + 2) * d - (a + 3)) * d * d + 1
            else:
                wt = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
            m[i, min(max(j, 0), src - 1)] += wt
    return jnp.asarray(m, dtype)


class MultiHead(nnx.Module):
    def __init__(self, dim, heads, rngs):
        hd = dim // heads
        self.query = nnx.LinearGeneral(dim, (heads, hd), rngs=rngs)
        self.key = nnx.LinearGeneral(dim, (heads, hd), rngs=rngs)
        self.value = nnx.LinearGeneral(dim, (heads, hd), rngs=rngs)
        self.out = nnx.LinearGeneral((heads, hd), dim, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v))


class GatedMlp(nnx.Module):
    def __init__(self, dim, hidden, rngs):
        self.hidden = hidden
        self.fused = nnx.Linear(dim, 2 * hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, dim, rngs=rngs)

    def __call__(self, x):
        h = self.fused(x)
        return self.down(jax.nn.silu(h[..., :self.hidden]) * h[..., self.hidden:])


class EncoderLayer(nnx.Module):
    def __init__(self, dim, heads, hidden, rngs):
        ln = lambda: nnx.LayerNorm(dim, epsilon=1e-6, use_fast_variance=False, rngs=rngs)
        self.pre_attn, self.pre_mlp = ln(), ln()
        self.attn = MultiHead(dim, heads, rngs)
        self.mlp = GatedMlp(dim, hidden, rngs)
        self.gain_attn = nnx.Param(jnp.ones(dim))
        self.gain_mlp = nnx.Param(jnp.ones(dim))

    def __call__(self, x):
        x = x + self.gain_attn[...] * self.attn(self.pre_attn(x))
        return x + self.gain_mlp[...] * self.mlp(self.pre_mlp(x))


class RegisterViT(nnx.Module):
    def __init__(self, rngs):
        grid = IMG // PATCH
        self.stem = nnx.Conv(3, DIM, (PATCH, PATCH), strides=PATCH, padding="VALID", rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((1, DIM)))
        self.cls_pos = nnx.Param(jnp.zeros((1, DIM)))
        self.grid_pos = nnx.Param(jnp.zeros((grid, grid, DIM)))
        self.registers = nnx.Param(jnp.zeros((REGS, DIM)))
        self.blank = nnx.Param(jnp.zeros(DIM))
        self.layers = nnx.List([EncoderLayer(DIM, HEADS, 48, rngs) for _ in range(DEPTH)])
        self.final = nnx.LayerNorm(DIM, epsilon=1e-6, use_fast_variance=False, rngs=rngs)

    def __call__(self, image, masked):
        b = image.shape[0]
        x = self.stem(image)
        gh, gw = x.shape[1:3]
        src = self.grid_pos.shape[0]
        rows, cols = cubic_matrix(src, gh, x.dtype), cubic_matrix(src, gw, x.dtype)
        pos = jnp.einsum("ip,jq,pqc->ijc", rows, cols, self.grid_pos[...])
        masked = masked.reshape(b, gh, gw, 1)
        x = jnp.where(masked, self.blank[...], x) + pos
        head = jnp.concatenate([self.cls[...] + self.cls_pos[...], self.registers[...]])
        head = jnp.broadcast_to(head, (b, *head.shape))
        x = jnp.concatenate([head, x.reshape(b, gh * gw, -1)], axis=1)
        for layer in self.layers:
            x = layer(x)
        x = self.final(x)
        start = 1 + self.registers.shape[0]
        return x[:, 0], x[:, start:start + gh * gw]


def port_weights(net):
    model = RegisterViT(nnx.Rngs(0))
    a = lambda t: jnp.asarray(t.detach().numpy())
    hd = DIM // HEADS

    def affine(dst, src):
        if isinstance(dst, nnx.LayerNorm):
            dst.scale.set_value(a(src.weight))
        else:
            dst.kernel.set_value(a(src.weight.T))
        dst.bias.set_value(a(src.bias))

    model.stem.kernel.set_value(a(net.patch_embed.proj.weight.permute(2, 3, 1, 0)))
    model.stem.bias.set_value(a(net.patch_embed.proj.bias))
    model.cls.set_value(a(net.cls_token[0]))
    model.registers.set_value(a(net.register_tokens[0]))
    model.cls_pos.set_value(a(net.pos_embed[0, :1]))
    model.grid_pos.set_value(a(net.pos_embed[0, 1:]).reshape(model.grid_pos.shape))
    model.blank.set_value(a(net.mask_token[0]))
    for dst, src in zip(model.layers, net.blocks):
        affine(dst.pre_attn, src.norm1)
        affine(dst.pre_mlp, src.norm2)
        weight = a(src.attn.qkv.weight).reshape(3, HEADS, hd, DIM)
        bias = a(src.attn.qkv.bias).reshape(3, HEADS, hd)
        for i, lin in enumerate((dst.attn.query, dst.attn.key, dst.attn.value)):
            lin.kernel.set_value(weight[i].transpose(2, 0, 1))
            lin.bias.set_value(bias[i])
        dst.attn.out.kernel.set_value(a(src.attn.proj.weight.T).reshape(HEADS, hd, DIM))
        dst.attn.out.bias.set_value(a(src.attn.proj.bias))
        affine(dst.mlp.fused, src.mlp.w12)
        affine(dst.mlp.down, src.mlp.w3)
        dst.gain_attn.set_value(a(src.ls1.gamma))
        dst.gain_mlp.set_value(a(src.ls2.gamma))
    affine(model.final, net.norm)
    return model


def build(seed):
    torch.manual_seed(seed)
    net = DinoVisionTransformer()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "norm" in name or "gamma" in name:
                p.copy_(0.3 * torch.randn_like(p) + (0.9 if name.endswith(("weight", "gamma")) else 0.0))
            elif p.ndim > 1 and name.endswith("weight"):
                p.copy_(torch.randn_like(p) * 1.2 / math.sqrt(p[0].numel()))
            else:
                p.copy_(torch.randn_like(p) * 0.5)
    net.eval()
    rng = np.random.RandomState(seed + 1)
    image = rng.randn(2, 3, 20, 12).astype(np.float32)
    masks = rng.rand(2, 15) < 0.3
    return {"torch": net, "flax": port_weights(net), "inputs": (image, masks),
            "flax_inputs": (image.transpose(0, 2, 3, 1), masks)}


FAULTS = [
    {
        "title": "the bicubic kernel of the positions has a = -0.5, as jax.image.resize has it",
        "edits": [("a = -0.75", "a = -0.5")],
        "layers": ["", "patch_embed"],
        "between": ("patch_embed", "blocks.0"),
        "causes": ["constant"],
        "level": "outputs",
    },
    {
        "title": "the mask token replaces patches after the positions are added, so masked patches have none",
        "edits": [("jnp.where(masked, self.blank[...], x) + pos", "jnp.where(masked, self.blank[...], x + pos)")],
        "layers": ["", "patch_embed"],
        "between": ("patch_embed", "blocks.0"),
        "causes": ["order", "mask"],
        "level": "outputs",
    },
    {
        "title": "SwiGLU activates the second half and not the first",
        "edits": [("jax.nn.silu(h[..., :self.hidden]) * h[..., self.hidden:]",
                   "h[..., :self.hidden] * jax.nn.silu(h[..., self.hidden:])")],
        "layers": ["blocks.0.mlp", "blocks.1.mlp"],
        "between": ("blocks.0.mlp.w12", "blocks.0.mlp.w3"),
        "causes": ["blocks", "operand", "swapped"],
        "level": "outputs",
    },
    {
        "title": "the patch tokens are cut out as if there were no registers before them",
        "edits": [("start = 1 + self.registers.shape[0]", "start = 1")],
        "layers": ["", "norm"],
        "between": ("norm", "the output"),
        "causes": ["offset", "token"],
        "level": "outputs",
    },
    {
        "title": "the key's bias is set to zero, as BEiT-like checkpoints have none",
        "edits": [("lin.bias.set_value(bias[i])", "lin.bias.set_value(bias[i] * (i != 1))")],
        "layers": ["blocks.0.attn.qkv", "blocks.1.attn.qkv"],
        "between": None,
        "causes": ["bias_missing", "default", "values"],
        "level": "bits",
    },
]
