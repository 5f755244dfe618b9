"""DETR: padded feature maps, 2-D sine positions, encoder-decoder with object queries and boxes refined layer by layer."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn


class PositionEmbeddingSine(nn.Module):
    def __init__(self, num_pos_feats, temperature=10000, scale=2 * math.pi):
        super().__init__()
        self.num_pos_feats, self.temperature, self.scale = num_pos_feats, temperature, scale

    def forward(self, mask):
        not_mask = ~mask
        y_embed = not_mask.cumsum(1, dtype=torch.float64)
        x_embed = not_mask.cumsum(2, dtype=torch.float64)
        y_embed = y_embed / (y_embed[:, -1:, :] + 1e-6) * self.scale
        x_embed = x_embed / (x_embed[:, :, -1:] + 1e-6) * self.scale
        dim_t = torch.arange(self.num_pos_feats, dtype=torch.float64)
        dim_t = self.temperature ** (2 * torch.div(dim_t, 2, rounding_mode="floor") / self.num_pos_feats)
        pos_x, pos_y = x_embed[:, :, :, None] / dim_t, y_embed[:, :, :, None] / dim_t
        pos_x = torch.stack((pos_x[..., 0::2].sin(), pos_x[..., 1::2].cos()), dim=4).flatten(3)
        pos_y = torch.stack((pos_y[..., 0::2].sin(), pos_y[..., 1::2].cos()), dim=4).flatten(3)
        return torch.cat((pos_y, pos_x), dim=3).permute(0, 3, 1, 2)


class EncoderLayer(nn.Module):
    def __init__(self, d, heads, ff):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d, heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(d, ff), nn.Linear(ff, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, src, mask, pos):
        q = k = src + pos
        src = self.norm1(src + self.self_attn(q, k, src, key_padding_mask=mask, need_weights=False)[0])
        return self.norm2(src + self.linear2(F.relu(self.linear1(src))))


class DecoderLayer(nn.Module):
    def __init__(self, d, heads, ff):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d, heads, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(d, heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(d, ff), nn.Linear(ff, d)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, tgt, memory, mask, pos, query_pos):
        q = k = tgt + query_pos
        tgt = self.norm1(tgt + self.self_attn(q, k, tgt, need_weights=False)[0])
        cross = self.multihead_attn(tgt + query_pos, memory + pos, memory, key_padding_mask=mask, need_weights=False)[0]
        tgt = self.norm2(tgt + cross)
        return self.norm3(tgt + self.linear2(F.relu(self.linear1(tgt))))


class MLP(nn.Module):
    def __init__(self, d, out, num_layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(d, out if i == num_layers - 1 else d) for i in range(num_layers))

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = F.relu(layer(x)) if i < len(self.layers) - 1 else layer(x)
        return x


def inverse_sigmoid(x, eps=1e-5):
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


class DETR(nn.Module):
    def __init__(self, cin=10, d=16, heads=2, ff=28, layers=2, queries=5, classes=4):
        super().__init__()
        self.position = PositionEmbeddingSine(d // 2)
        self.input_proj = nn.Conv2d(cin, d, 1)
        self.encoder = nn.ModuleList([EncoderLayer(d, heads, ff) for _ in range(layers)])
        self.query_embed = nn.Embedding(queries, d)
        self.reference_points = nn.Linear(d, 4)
        self.decoder = nn.ModuleList([DecoderLayer(d, heads, ff) for _ in range(layers)])
        self.norm = nn.LayerNorm(d)
        self.class_embed = nn.Linear(d, classes + 1)
        self.bbox_embed = nn.ModuleList([MLP(d, 4, 3) for _ in range(layers)])

    def forward(self, features, mask):
        pos = self.position(mask).to(features.dtype).flatten(2).transpose(1, 2)
        memory = self.input_proj(features).flatten(2).transpose(1, 2)
        mask = mask.flatten(1)
        for layer in self.encoder:
            memory = layer(memory, mask, pos)
        query_pos = self.query_embed.weight.unsqueeze(0).repeat(features.shape[0], 1, 1)
        ref = self.reference_points(query_pos).sigmoid()
        tgt = torch.zeros_like(query_pos)
        logits, boxes = [], []
        for layer, bbox in zip(self.decoder, self.bbox_embed):
            tgt = layer(tgt, memory, mask, pos, query_pos)
            hs = self.norm(tgt)
            new = (bbox(hs) + inverse_sigmoid(ref)).sigmoid()
            logits.append(self.class_embed(hs))
            boxes.append(new)
            ref = new.detach()
        return {"pred_boxes": torch.stack(boxes), "pred_logits": torch.stack(logits)}


# ---------------------------------------------------------------- nnx


def sine_positions(mask, feats, temperature=10000.0, scale=2.0 * math.pi):
    valid = jnp.logical_not(mask).astype(float)
    y = jnp.cumsum(valid, axis=1)
    x = jnp.cumsum(valid, axis=2)
    y = y / (y[:, -1:, :] + 1e-6) * scale
    x = x / (x[:, :, -1:] + 1e-6) * scale
    inv = temperature ** (-2.0 * jnp.arange(feats // 2) / feats)

    def encode(coord):
        angle = coord[..., None] * inv
        waves = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
        return waves.reshape(*coord.shape, feats)

    return jnp.concatenate([encode(y), encode(x)], axis=-1)


class MultiHead(nnx.Module):
    def __init__(self, d, heads, rngs):
        self.heads = heads
        self.q_proj = nnx.Linear(d, d, rngs=rngs)
        self.k_proj = nnx.Linear(d, d, rngs=rngs)
        self.v_proj = nnx.Linear(d, d, rngs=rngs)
        self.o_proj = nnx.Linear(d, d, rngs=rngs)

    def __call__(self, query, key, value, padding=None):
        split = lambda x: x.reshape(x.shape[0], x.shape[1], self.heads, -1)
        q, k, v = split(self.q_proj(query)), split(self.k_proj(key)), split(self.v_proj(value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        if padding is not None:
            scores = jnp.where(padding[:, None, None, :], -jnp.inf, scores)
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return self.o_proj(out.reshape(*query.shape))


class FlaxEncoderLayer(nnx.Module):
    def __init__(self, d, heads, ff, rngs):
        self.attention = MultiHead(d, heads, rngs)
        self.linear1, self.linear2 = nnx.Linear(d, ff, rngs=rngs), nnx.Linear(ff, d, rngs=rngs)
        self.norm1 = nnx.LayerNorm(d, epsilon=1e-5, rngs=rngs)
        self.norm2 = nnx.LayerNorm(d, epsilon=1e-5, rngs=rngs)

    def __call__(self, src, padding, pos):
        with_pos = src + pos
        src = self.norm1(src + self.attention(with_pos, with_pos, src, padding))
        return self.norm2(src + self.linear2(nnx.relu(self.linear1(src))))


class FlaxDecoderLayer(nnx.Module):
    def __init__(self, d, heads, ff, rngs):
        self.self_attention = MultiHead(d, heads, rngs)
        self.cross_attention = MultiHead(d, heads, rngs)
        self.linear1, self.linear2 = nnx.Linear(d, ff, rngs=rngs), nnx.Linear(ff, d, rngs=rngs)
        self.norm1, self.norm2, self.norm3 = (nnx.LayerNorm(d, epsilon=1e-5, rngs=rngs) for _ in range(3))

    def __call__(self, target, memory, padding, pos, query_pos):
        x = target + query_pos
        target = self.norm1(target + self.self_attention(x, x, target))
        x = self.cross_attention(target + query_pos, memory + pos, memory, padding)
        target = self.norm2(target + x)
        x = self.linear2(nnx.relu(self.linear1(target)))
        return self.norm3(target + x)


class BoxHead(nnx.Module):
    def __init__(self, d, rngs):
        self.layers = nnx.List([nnx.Linear(d, n, rngs=rngs) for n in (d, d, 4)])

    def __call__(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < len(self.layers) - 1:
                x = nnx.relu(x)
        return x


def logit(p, eps=1e-5):
    p = jnp.clip(p, 0.0, 1.0)
    return jnp.log(jnp.maximum(p, eps) / jnp.maximum(1.0 - p, eps))


class FlaxDETR(nnx.Module):
    def __init__(self, cin=10, d=16, heads=2, ff=28, layers=2, queries=5, classes=4, *, rngs):
        self.d = d
        self.input_proj = nnx.Linear(cin, d, rngs=rngs)
        self.encoder = nnx.List([FlaxEncoderLayer(d, heads, ff, rngs) for _ in range(layers)])
        self.queries = nnx.Param(jnp.zeros((queries, d)))
        self.reference = nnx.Linear(d, 4, rngs=rngs)
        self.decoder = nnx.List([FlaxDecoderLayer(d, heads, ff, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(d, epsilon=1e-5, rngs=rngs)
        self.classify = nnx.Linear(d, classes + 1, rngs=rngs)
        self.box_heads = nnx.List([BoxHead(d, rngs) for _ in range(layers)])

    def __call__(self, features, mask):
        b, h, w, _ = features.shape
        pos = sine_positions(mask, self.d // 2).reshape(b, h * w, self.d)
        memory = self.input_proj(features).reshape(b, h * w, self.d)
        padding = mask.reshape(b, h * w)
        for layer in self.encoder:
            memory = layer(memory, padding, pos)
        query_pos = jnp.broadcast_to(self.queries[...], (b, *self.queries.shape))
        ref = nnx.sigmoid(self.reference(query_pos))
        target, logits, boxes = jnp.zeros_like(query_pos), [], []
        for layer, box_head in zip(self.decoder, self.box_heads):
            target = layer(target, memory, padding, pos, query_pos)
            hidden = self.norm(target)
            box = nnx.sigmoid(box_head(hidden) + logit(ref))
            logits.append(self.classify(hidden))
            boxes.append(box)
            ref = jax.lax.stop_gradient(box)
        return {"pred_boxes": jnp.stack(boxes), "pred_logits": jnp.stack(logits)}


def t2j(t):
    return jnp.asarray(t.detach().numpy())


def set_linear(dst, weight, bias):
    dst.kernel[...] = t2j(weight).T
    dst.bias[...] = t2j(bias)


def set_mha(dst, src):
    for layer, w, b in zip((dst.q_proj, dst.k_proj, dst.v_proj), src.in_proj_weight.chunk(3), src.in_proj_bias.chunk(3)):
        set_linear(layer, w, b)
    set_linear(dst.o_proj, src.out_proj.weight, src.out_proj.bias)


def set_norm(dst, src):
    dst.scale[...] = t2j(src.weight)
    dst.bias[...] = t2j(src.bias)


def port(net, model):
    set_linear(model.input_proj, net.input_proj.weight[:, :, 0, 0], net.input_proj.bias)
    for dst, src in zip(model.encoder, net.encoder):
        set_mha(dst.attention, src.self_attn)
        set_norm(dst.norm1, src.norm1)
        set_norm(dst.norm2, src.norm2)
        for name in ("linear1", "linear2"):
            set_linear(getattr(dst, name), getattr(src, name).weight, getattr(src, name).bias)
    for dst, src in zip(model.decoder, net.decoder):
        set_mha(dst.self_attention, src.self_attn)
        set_mha(dst.cross_attention, src.multihead_attn)
        for name in ("norm1", "norm2", "norm3"):
            set_norm(getattr(dst, name), getattr(src, name))
        for name in ("linear1", "linear2"):
            set_linear(getattr(dst, name), getattr(src, name).weight, getattr(src, name).bias)
    model.queries[...] = t2j(net.query_embed.weight)
    set_linear(model.reference, net.reference_points.weight, net.reference_points.bias)
    set_norm(model.norm, net.norm)
    set_linear(model.classify, net.class_embed.weight, net.class_embed.bias)
    for dst, src in zip(model.box_heads, net.bbox_embed):
        for a, b in zip(dst.layers, src.layers):
            set_linear(a, b.weight, b.bias)
    return model


def build(seed):
    torch.manual_seed(seed)
    net = DETR().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 10, 3, 4))
    mask = np.zeros((2, 3, 4), bool)
    mask[1, 2:] = mask[1, :, 3:] = True
    model = port(net, FlaxDETR(rngs=nnx.Rngs(seed)))
    return {"torch": net, "flax": model, "inputs": {"features": x, "mask": mask},
            "flax_inputs": {"features": x.transpose(0, 2, 3, 1), "mask": mask}}


FAULTS = [
    {
        "title": "positions added to the values as well",
        "edits": [("self.attention(with_pos, with_pos, src, padding)", "self.attention(with_pos, with_pos, with_pos, padding)")],
        "layers": ["encoder.0", "encoder.0.self_attn"],
        "between": ("input_proj", "encoder.0.norm1"),
        "causes": ["operand", "residual"],
        "level": "outputs",
    },
    {
        "title": "rows counted along the width, columns along the height",
        "edits": [("y = jnp.cumsum(valid, axis=1)\n    x = jnp.cumsum(valid, axis=2)",
                   "y = jnp.cumsum(valid, axis=2)\n    x = jnp.cumsum(valid, axis=1)")],
        "layers": ["position"],
        "between": (None, "input_proj"),
        "causes": ["axis", "swapped"],
        "level": "outputs",
    },
    {
        "title": "sines and cosines side by side, not interleaved",
        "edits": [("waves = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)",
                   "waves = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-2)")],
        "layers": ["position"],
        "between": (None, "input_proj"),
        "causes": ["rearranged", "concat", "axis"],
        "level": "outputs",
    },
    {
        "title": "padding ignored in the cross-attention",
        "edits": [("memory + pos, memory, padding)", "memory + pos, memory)")],
        "layers": ["decoder.0.multihead_attn", "decoder.0"],
        "between": ("decoder.0.norm1", "decoder.0.norm2"),
        "causes": ["mask"],
        "level": "outputs",
    },
    {
        "title": "decoder's last norm ahead of its feed-forward",
        "edits": [("        x = self.linear2(nnx.relu(self.linear1(target)))\n        return self.norm3(target + x)",
                   "        x = self.linear2(nnx.relu(self.linear1(self.norm3(target))))\n        return target + x")],
        "layers": ["decoder.0"],
        "between": ("decoder.0.norm2", "decoder.0.linear1"),
        "causes": ["norm_order", "order"],
        "level": "outputs",
    },
    {
        "title": "in_proj taken for key, query, value",
        "edits": [("zip((dst.q_proj, dst.k_proj, dst.v_proj),", "zip((dst.k_proj, dst.q_proj, dst.v_proj),")],
        "layers": ["encoder.0.self_attn"],
        "causes": ["blocks", "swapped"],
        "level": "outputs",
    },
    {
        "title": "boxes refined with gradients through the layer before",
        "edits": [("ref = jax.lax.stop_gradient(box)", "ref = box")],
        "layers": [""],
        "between": ("class_embed", "decoder.1.norm1"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "ReLU also behind the last layer of the box head",
        "edits": [("if i < len(self.layers) - 1:\n                x = nnx.relu(x)", "if i < len(self.layers):\n                x = nnx.relu(x)")],
        "layers": ["bbox_embed.0"],
        "between": ("bbox_embed.0.layers.2", "class_embed"),
        "causes": ["left_out", "activation", "offset"],
        "level": "outputs",
    },
]
