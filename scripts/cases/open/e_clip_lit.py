"""CLIP/LiT-like: locked vision tower, causal text tower pooled at EOT, linear projections and a logit scale."""
import math
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    def __init__(self, d_model, n_head):
        super().__init__()
        self.attn = nn.MultiheadAttention(d_model, n_head, batch_first=True)
        self.ln_1 = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(OrderedDict([
            ("c_fc", nn.Linear(d_model, d_model * 2)),
            ("gelu", QuickGELU()),
            ("c_proj", nn.Linear(d_model * 2, d_model)),
        ]))
        self.ln_2 = nn.LayerNorm(d_model)

    def forward(self, x, attn_mask=None):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class VisionTower(nn.Module):
    def __init__(self, width, layers, heads, patch, grid):
        super().__init__()
        self.grid = grid
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.resblocks = nn.ModuleList([ResidualAttentionBlock(width, heads) for _ in range(layers)])
        self.ln_post = nn.LayerNorm(width)

    def interpolate_pos(self, h, w):
        cls, pos = self.positional_embedding[:1], self.positional_embedding[1:]
        pos = pos.reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        pos = F.interpolate(pos, size=(h, w), mode="bilinear", align_corners=False)
        return torch.cat([cls, pos.flatten(2)[0].t()], dim=0)

    def forward(self, x):
        x = self.conv1(x)
        h, w = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1)
        x = self.ln_pre(x + self.interpolate_pos(h, w))
        for block in self.resblocks:
            x = block(x)
        return self.ln_post(x[:, 0])


class TextTower(nn.Module):
    def __init__(self, vocab, context, width, layers, heads, embed_dim):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, width)
        self.positional_embedding = nn.Parameter(torch.randn(context, width))
        self.resblocks = nn.ModuleList([ResidualAttentionBlock(width, heads) for _ in range(layers)])
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Linear(width, embed_dim, bias=False)

    def forward(self, text):
        n = text.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).triu(1)
        x = self.token_embedding(text) + self.positional_embedding[:n]
        for block in self.resblocks:
            x = block(x, mask)
        x = self.ln_final(x)
        return self.text_projection(x[torch.arange(x.shape[0]), text.argmax(dim=-1)])


class LiT(nn.Module):
    def __init__(self, embed_dim=16, vision_width=12, text_width=16):
        super().__init__()
        self.visual = VisionTower(vision_width, layers=2, heads=3, patch=4, grid=3)
        self.image_proj = nn.Linear(vision_width, embed_dim, bias=False)
        self.text = TextTower(27, 9, text_width, layers=2, heads=4, embed_dim=embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, image, text):
        image_features = self.image_proj(self.visual(image).detach())
        text_features = self.text(text)
        image_features = F.normalize(image_features, dim=-1)
        text_features = F.normalize(text_features, dim=-1)
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
        logits_per_image = scale * image_features @ text_features.t()
        return logits_per_image, image_features, text_features


def quick_gelu(x):
    return x * jax.nn.sigmoid(1.702 * x)


def l2_normalize(x, axis=-1, eps=1e-12):
    return x / jnp.maximum(jnp.linalg.norm(x, axis=axis, keepdims=True), eps)


class Mlp(nnx.Module):
    def __init__(self, width, rngs):
        self.fc1 = nnx.Linear(width, 2 * width, rngs=rngs)
        self.fc2 = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        return self.fc2(quick_gelu(self.fc1(x)))


class SelfAttention(nnx.Module):
    def __init__(self, width, heads, rngs):
        head_dim = width // heads
        self.query = nnx.LinearGeneral(width, (heads, head_dim), rngs=rngs)
        self.key = nnx.LinearGeneral(width, (heads, head_dim), rngs=rngs)
        self.value = nnx.LinearGeneral(width, (heads, head_dim), rngs=rngs)
        self.out = nnx.LinearGeneral((heads, head_dim), width, axis=(-2, -1), rngs=rngs)

    def __call__(self, x, mask=None):
        q, k, v = self.query(x), self.key(x), self.value(x)
        weights = jnp.einsum("bqhd,bkhd->bhqk", q / math.sqrt(q.shape[-1]), k)
        if mask is not None:
            weights = jnp.where(mask, weights, jnp.finfo(weights.dtype).min)
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", nnx.softmax(weights, axis=-1), v))


class EncoderLayer(nnx.Module):
    def __init__(self, width, heads, rngs):
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.attention = SelfAttention(width, heads, rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.mlp = Mlp(width, rngs)

    def __call__(self, x, mask=None):
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.mlp(self.norm2(x))


class ImageEncoder(nnx.Module):
    def __init__(self, width, layers, heads, patch, grid, rngs):
        self.grid = grid
        self.patch_embed = nnx.Conv(3, width, (patch, patch), strides=(patch, patch), padding="VALID", use_bias=False, rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((width,)))
        self.pos_embed = nnx.Param(jnp.zeros((grid * grid + 1, width)))
        self.norm_pre = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.layers = nnx.List([EncoderLayer(width, heads, rngs) for _ in range(layers)])
        self.norm_post = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)

    def position_table(self, h, w):
        table = self.pos_embed[...]
        spatial = table[1:].reshape(self.grid, self.grid, -1)
        spatial = jax.image.resize(spatial, (h, w, spatial.shape[-1]), method="bilinear")
        return jnp.concatenate([table[:1], spatial.reshape(h * w, -1)], axis=0)

    def __call__(self, images):
        x = self.patch_embed(images)
        b, h, w, c = x.shape
        x = x.reshape(b, h * w, c)
        cls = jnp.broadcast_to(self.cls[...], (b, 1, c))
        x = jnp.concatenate([cls, x], axis=1)
        x = self.norm_pre(x + self.position_table(h, w))
        for layer in self.layers:
            x = layer(x)
        return self.norm_post(x[:, 0])


class TextEncoder(nnx.Module):
    def __init__(self, vocab, context, width, layers, heads, embed_dim, rngs):
        self.embed = nnx.Embed(vocab, width, rngs=rngs)
        self.pos_embed = nnx.Param(jnp.zeros((context, width)))
        self.layers = nnx.List([EncoderLayer(width, heads, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.proj = nnx.Linear(width, embed_dim, use_bias=False, rngs=rngs)

    def __call__(self, text):
        b, n = text.shape
        causal = jnp.tril(jnp.ones((1, 1, n, n), dtype=bool))
        x = self.embed(text) + self.pos_embed[:n]
        for layer in self.layers:
            x = layer(x, mask=causal)
        x = self.norm(x)
        pooled = x[jnp.arange(b), jnp.argmax(text, axis=-1)]
        return self.proj(pooled)


class FlaxLiT(nnx.Module):
    def __init__(self, embed_dim=16, vision_width=12, text_width=16, *, rngs):
        self.image_encoder = ImageEncoder(vision_width, 2, 3, 4, 3, rngs)
        self.image_proj = nnx.Linear(vision_width, embed_dim, use_bias=False, rngs=rngs)
        self.text_encoder = TextEncoder(27, 9, text_width, 2, 4, embed_dim, rngs)
        self.temperature = nnx.Param(jnp.zeros(()))

    def __call__(self, image, text):
        zimg = jax.lax.stop_gradient(self.image_encoder(image))
        zimg = self.image_proj(zimg)
        ztxt = self.text_encoder(text)
        zimg = l2_normalize(zimg)
        ztxt = l2_normalize(ztxt)
        scale = jnp.exp(jnp.minimum(self.temperature[...], math.log(100.0)))
        return scale * zimg @ ztxt.T, zimg, ztxt


def to_jax(t):
    return jnp.asarray(t.detach().cpu().numpy())


def load_norm(dst, src):
    dst.scale[...], dst.bias[...] = to_jax(src.weight), to_jax(src.bias)


def load_linear(dst, src):
    dst.kernel[...] = to_jax(src.weight).T
    if src.bias is not None:
        dst.bias[...] = to_jax(src.bias)


def load_blocks(dst_layers, src_layers, heads):
    for dst, src in zip(dst_layers, src_layers):
        load_norm(dst.norm1, src.ln_1)
        load_norm(dst.norm2, src.ln_2)
        load_linear(dst.mlp.fc1, src.mlp.c_fc)
        load_linear(dst.mlp.fc2, src.mlp.c_proj)
        weights = jnp.split(to_jax(src.attn.in_proj_weight), 3)
        biases = jnp.split(to_jax(src.attn.in_proj_bias), 3)
        width = weights[0].shape[0]
        for name, w, b in zip(("query", "key", "value"), weights, biases):
            proj = getattr(dst.attention, name)
            proj.kernel[...] = w.T.reshape(width, heads, width // heads)
            proj.bias[...] = b.reshape(heads, width // heads)
        dst.attention.out.kernel[...] = to_jax(src.attn.out_proj.weight).T.reshape(heads, width // heads, width)
        dst.attention.out.bias[...] = to_jax(src.attn.out_proj.bias)


def port(net, model):
    v, t = net.visual, net.text
    model.image_encoder.patch_embed.kernel[...] = to_jax(v.conv1.weight).transpose(2, 3, 1, 0)
    model.image_encoder.cls[...] = to_jax(v.class_embedding)
    model.image_encoder.pos_embed[...] = to_jax(v.positional_embedding)
    load_norm(model.image_encoder.norm_pre, v.ln_pre)
    load_norm(model.image_encoder.norm_post, v.ln_post)
    load_blocks(model.image_encoder.layers, v.resblocks, 3)
    load_linear(model.image_proj, net.image_proj)
    model.text_encoder.embed.embedding[...] = to_jax(t.token_embedding.weight)
    model.text_encoder.pos_embed[...] = to_jax(t.positional_embedding)
    load_blocks(model.text_encoder.layers, t.resblocks, 4)
    load_norm(model.text_encoder.norm, t.ln_final)
    model.text_encoder.proj.kernel[...] = to_jax(t.text_projection.weight).T
    model.temperature[...] = to_jax(net.logit_scale)
    return model


def build(seed):
    torch.manual_seed(seed)
    net = LiT().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            norm = ".ln_" in name and name.endswith("weight")
            p.copy_(1 + 0.2 * torch.randn_like(p) if norm else 0.3 * torch.randn_like(p))
        net.logit_scale.fill_(2.4 + 0.1 * torch.rand(()).item())
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(3, 3, 16, 20)).astype(np.float32)
    text = np.zeros((2, 7), dtype=np.int64)
    for row, length in zip(text, (4, 6)):
        row[0], row[1:length - 1], row[length - 1] = 25, rng.integers(1, 25, size=length - 2), 26
    return {
        "torch": net,
        "flax": port(net, FlaxLiT(rngs=nnx.Rngs(0))),
        "inputs": (image, text),
        "flax_inputs": (image.transpose(0, 2, 3, 1), text),
    }


FAULTS = [
    {
        "title": "jax.nn.gelu (tanh) for OpenAI's quick GELU",
        "edits": [("self.fc2(quick_gelu(self.fc1(x)))", "self.fc2(jax.nn.gelu(self.fc1(x)))")],
        "layers": ["visual.resblocks.0.mlp.gelu"],
        "between": ("visual.resblocks.0.mlp.c_fc", "visual.resblocks.0.mlp.c_proj"),
        "causes": ["gelu", "activation"],
        "level": "outputs",
    },
    {
        "title": "text pooled at the last position, not at the EOT token",
        "edits": [("pooled = x[jnp.arange(b), jnp.argmax(text, axis=-1)]", "pooled = x[:, -1]")],
        "layers": ["text"],
        "between": ("text.ln_final", "text.text_projection"),
        "causes": ["token"],
        "level": "outputs",
    },
    {
        "title": "the bound log(100) clips the scale after exp, not its logarithm",
        "edits": [("jnp.exp(jnp.minimum(self.temperature[...], math.log(100.0)))",
                   "jnp.minimum(jnp.exp(self.temperature[...]), math.log(100.0))")],
        "layers": [""],
        "between": ("text.text_projection", None),
        "causes": ["order", "constant"],
        "level": "outputs",
    },
    {
        "title": "class token appended behind the patches",
        "edits": [("x = jnp.concatenate([cls, x], axis=1)", "x = jnp.concatenate([x, cls], axis=1)")],
        "layers": ["visual"],
        "between": ("visual.conv1", "visual.ln_pre"),
        "causes": ["concat"],
        "level": "outputs",
    },
    {
        "title": "position grid resized with nearest, not bilinear",
        "edits": [('method="bilinear"', 'method="nearest"')],
        "layers": ["visual"],
        "between": ("visual.conv1", "visual.ln_pre"),
        "causes": ["operation"],
        "level": "outputs",
    },
    {
        "title": "the causal mask lets every token see the next one too",
        "edits": [("jnp.tril(jnp.ones((1, 1, n, n), dtype=bool))", "jnp.tril(jnp.ones((1, 1, n, n), dtype=bool), 1)")],
        "layers": ["text.resblocks.0.attn", "text"],
        "between": ("text.resblocks.0.ln_1", "text.resblocks.0.attn.out_proj"),
        "causes": ["causal", "mask"],
        "level": "outputs",
    },
    {
        "title": "the square text projection is not transposed",
        "edits": [("to_jax(t.text_projection.weight).T", "to_jax(t.text_projection.weight)")],
        "layers": ["text.text_projection"],
        "causes": ["transposed"],
        "level": "outputs",
    },
    {
        "title": "the locked image tower is trained",
        "edits": [("zimg = jax.lax.stop_gradient(self.image_encoder(image))", "zimg = self.image_encoder(image)")],
        "layers": ["", "visual"],
        "between": ("visual.ln_post", "image_proj"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
]
