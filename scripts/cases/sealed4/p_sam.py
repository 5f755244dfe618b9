"""Mask decoder of Segment Anything: two-way transformer, upscaling, hypernetworks."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as tnn
import torch.nn.functional as F
from flax import nnx


# ---- PyTorch

class MLPBlock(tnn.Module):
    def __init__(self, embedding_dim, mlp_dim):
        super().__init__()
        self.lin1, self.lin2 = tnn.Linear(embedding_dim, mlp_dim), tnn.Linear(mlp_dim, embedding_dim)
        self.act = tnn.ReLU()

    def forward(self, x):
        return self.lin2(self.act(self.lin1(x)))


class LayerNorm2d(tnn.Module):
    def __init__(self, num_channels, eps=1e-6):
        super().__init__()
        self.weight = tnn.Parameter(torch.ones(num_channels))
        self.bias = tnn.Parameter(torch.zeros(num_channels))
        self.eps = eps

    def forward(self, x):
        u = x.mean(1, keepdim=True)
        x = (x - u) / torch.sqrt((x - u).pow(2).mean(1, keepdim=True) + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Attention(tnn.Module):
    def __init__(self, embedding_dim, num_heads, downsample_rate=1):
        super().__init__()
        self.internal_dim = embedding_dim // downsample_rate
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj = (
            tnn.Linear(embedding_dim, self.internal_dim) for _ in range(3))
        self.out_proj = tnn.Linear(self.internal_dim, embedding_dim)

    def _separate_heads(self, x):
        b, n, c = x.shape
        return x.reshape(b, n, self.num_heads, c // self.num_heads).transpose(1, 2)

    def forward(self, q, k, v):
        q, k = self._separate_heads(self.q_proj(q)), self._separate_heads(self.k_proj(k))
        v = self._separate_heads(self.v_proj(v))
        attn = q @ k.permute(0, 1, 3, 2) / math.sqrt(q.shape[-1])
        out = torch.softmax(attn, dim=-1) @ v
        b, h, n, c = out.shape
        return self.out_proj(out.transpose(1, 2).reshape(b, n, h * c))


class TwoWayAttentionBlock(tnn.Module):
    def __init__(self, embedding_dim, num_heads, mlp_dim, skip_first_layer_pe):
        super().__init__()
        self.self_attn = Attention(embedding_dim, num_heads)
        self.norm1, self.norm2 = tnn.LayerNorm(embedding_dim), tnn.LayerNorm(embedding_dim)
        self.cross_attn_token_to_image = Attention(embedding_dim, num_heads, 2)
        self.mlp = MLPBlock(embedding_dim, mlp_dim)
        self.norm3, self.norm4 = tnn.LayerNorm(embedding_dim), tnn.LayerNorm(embedding_dim)
        self.cross_attn_image_to_token = Attention(embedding_dim, num_heads, 2)
        self.skip_first_layer_pe = skip_first_layer_pe

    def forward(self, queries, keys, query_pe, key_pe):
        if self.skip_first_layer_pe:
            queries = self.self_attn(q=queries, k=queries, v=queries)
        else:
            q = queries + query_pe
            queries = queries + self.self_attn(q=q, k=q, v=queries)
        queries = self.norm1(queries)
        q, k = queries + query_pe, keys + key_pe
        queries = self.norm2(queries + self.cross_attn_token_to_image(q=q, k=k, v=keys))
        queries = self.norm3(queries + self.mlp(queries))
        q, k = queries + query_pe, keys + key_pe
        keys = self.norm4(keys + self.cross_attn_image_to_token(q=k, k=q, v=queries))
        return queries, keys


class TwoWayTransformer(tnn.Module):
    def __init__(self, depth, embedding_dim, num_heads, mlp_dim):
        super().__init__()
        self.layers = tnn.ModuleList(TwoWayAttentionBlock(embedding_dim, num_heads, mlp_dim, i == 0) for i in range(depth))
        self.final_attn_token_to_image = Attention(embedding_dim, num_heads, 2)
        self.norm_final_attn = tnn.LayerNorm(embedding_dim)

    def forward(self, image_embedding, image_pe, point_embedding):
        keys, key_pe = image_embedding.flatten(2).permute(0, 2, 1), image_pe.flatten(2).permute(0, 2, 1)
        queries = point_embedding
        for layer in self.layers:
            queries, keys = layer(queries, keys, point_embedding, key_pe)
        queries = queries + self.final_attn_token_to_image(q=queries + point_embedding, k=keys + key_pe, v=keys)
        return self.norm_final_attn(queries), keys


class MLP(tnn.Module):
    def __init__(self, input_dim, hidden_dim, output_dim, num_layers):
        super().__init__()
        h = [hidden_dim] * (num_layers - 1)
        self.num_layers = num_layers
        self.layers = tnn.ModuleList(tnn.Linear(n, k) for n, k in zip([input_dim] + h, h + [output_dim]))

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = F.relu(layer(x)) if i < self.num_layers - 1 else layer(x)
        return x


class MaskDecoder(tnn.Module):
    def __init__(self, transformer_dim, transformer, num_multimask_outputs=3, iou_head_hidden_dim=15):
        super().__init__()
        self.transformer, self.num_mask_tokens = transformer, num_multimask_outputs + 1
        self.iou_token = tnn.Embedding(1, transformer_dim)
        self.mask_tokens = tnn.Embedding(self.num_mask_tokens, transformer_dim)
        self.output_upscaling = tnn.Sequential(
            tnn.ConvTranspose2d(transformer_dim, transformer_dim // 4, kernel_size=2, stride=2),
            LayerNorm2d(transformer_dim // 4), tnn.GELU(),
            tnn.ConvTranspose2d(transformer_dim // 4, transformer_dim // 8, kernel_size=2, stride=2),
            tnn.GELU())
        self.output_hypernetworks_mlps = tnn.ModuleList(
            [MLP(transformer_dim, 18, transformer_dim // 8, 3) for _ in range(self.num_mask_tokens)])
        self.iou_prediction_head = MLP(transformer_dim, iou_head_hidden_dim, self.num_mask_tokens, 3)

    def forward(self, image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings):
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight], dim=0)
        output_tokens = output_tokens.unsqueeze(0).expand(sparse_prompt_embeddings.size(0), -1, -1)
        tokens = torch.cat((output_tokens, sparse_prompt_embeddings), dim=1)
        src = torch.repeat_interleave(image_embeddings, tokens.shape[0], dim=0) + dense_prompt_embeddings
        pos_src = torch.repeat_interleave(image_pe, tokens.shape[0], dim=0)
        b, c, h, w = src.shape
        hs, src = self.transformer(src, pos_src, tokens)
        iou_token_out, mask_tokens_out = hs[:, 0, :], hs[:, 1:(1 + self.num_mask_tokens), :]
        upscaled = self.output_upscaling(src.transpose(1, 2).view(b, c, h, w))
        hyper_in = torch.stack([mlp(mask_tokens_out[:, i, :])
                                for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1)
        b, c, h, w = upscaled.shape
        masks = (hyper_in @ upscaled.view(b, c, h * w)).view(b, -1, h, w)
        return masks, self.iou_prediction_head(iou_token_out)


# ---- Flax

class MultiHead(nnx.Module):
    """Attention in a narrower space of `inner` features."""
    def __init__(self, dim, inner, heads, rngs):
        hd = inner // heads
        self.query, self.key, self.value = (nnx.LinearGeneral(dim, (heads, hd), rngs=rngs) for _ in range(3))
        self.out = nnx.LinearGeneral((heads, hd), dim, axis=(-2, -1), rngs=rngs)
        self.factor = hd ** -0.5

    def __call__(self, target, source, content):
        q = self.query(target) * self.factor
        p = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, self.key(source)), axis=-1)
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", p, self.value(content)))


class Layer(nnx.Module):
    def __init__(self, dim, heads, hidden, first, rngs):
        self.first = first
        self.among = MultiHead(dim, dim, heads, rngs)
        self.look = MultiHead(dim, dim // 2, heads, rngs)
        self.write = MultiHead(dim, dim // 2, heads, rngs)
        self.expand = nnx.Linear(dim, hidden, rngs=rngs)
        self.shrink = nnx.Linear(hidden, dim, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(dim, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
                               for _ in range(4)])

    def __call__(self, tok, img, tok_pos, img_pos):
        if self.first:
            tok = self.among(tok, tok, tok)
        else:
            tok = tok + self.among(tok + tok_pos, tok + tok_pos, tok)
        tok = self.norms[0](tok)
        tok = self.norms[1](tok + self.look(tok + tok_pos, img + img_pos, img))
        tok = self.norms[2](tok + self.shrink(jax.nn.relu(self.expand(tok))))
        img = self.norms[3](img + self.write(img + img_pos, tok + tok_pos, tok))
        return tok, img


class Double(nnx.Module):
    """Transposed convolution, kernel and stride 2: every pixel becomes a 2 x 2 tile."""

    def __init__(self, dim, out, rngs):
        self.tile = nnx.LinearGeneral(dim, (2, 2, out), use_bias=False, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(out))

    def __call__(self, x):
        b, h, w, _ = x.shape
        y = self.tile(x).transpose(0, 1, 3, 2, 4, 5)
        return y.reshape(b, 2 * h, 2 * w, -1) + self.bias[...]


class Stack(nnx.Module):
    """`count` equal perceptrons (count=None: one) with their weights stacked."""
    def __init__(self, sizes, count=None):
        lead = () if count is None else (count,)
        self.w = nnx.List([nnx.Param(jnp.zeros(lead + (a, b))) for a, b in zip(sizes, sizes[1:])])
        self.b = nnx.List([nnx.Param(jnp.zeros(lead + (b,))) for b in sizes[1:]])

    def __call__(self, x):
        for i, (w, b) in enumerate(zip(self.w, self.b)):
            x = jnp.einsum("...i,...io->...o", x, w[...]) + b[...]
            x = jax.nn.relu(x) if i + 1 < len(self.w) else x
        return x


class Decoder(nnx.Module):
    def __init__(self, dim, heads, hidden, depth, masks, rngs):
        self.seeds = nnx.Param(jnp.zeros((1 + masks, dim)))
        self.masks = masks
        self.layers = nnx.List([Layer(dim, heads, hidden, i == 0, rngs) for i in range(depth)])
        self.last = MultiHead(dim, dim // 2, heads, rngs)
        self.last_norm = nnx.LayerNorm(dim, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.up1, self.up2 = Double(dim, dim // 4, rngs), Double(dim // 4, dim // 8, rngs)
        self.up_norm = nnx.LayerNorm(dim // 4, epsilon=1e-6, use_fast_variance=False, rngs=rngs)
        self.hyper = Stack((dim, 18, 18, dim // 8), masks)
        self.quality = Stack((dim, 15, 15, masks))

    def __call__(self, image, image_pos, points, dense):
        n = points.shape[0]
        seeds = jnp.broadcast_to(self.seeds[...], (n,) + self.seeds[...].shape)
        start = jnp.concatenate([seeds, points], axis=1)
        grid = image + dense
        b, h, w, c = grid.shape
        img, pos = grid.reshape(b, h * w, c), image_pos.reshape(1, h * w, c)
        tok = start
        for layer in self.layers:
            tok, img = layer(tok, img, start, pos)
        tok = self.last_norm(tok + self.last(tok + start, img + pos, img))
        up = jax.nn.gelu(self.up_norm(self.up1(img.reshape(b, h, w, c))), approximate=False)
        up = jax.nn.gelu(self.up2(up), approximate=False)
        filters = self.hyper(tok[:, 1:1 + self.masks])
        quality = self.quality(tok[:, 0])
        return jnp.einsum("bmc,bhwc->bmhw", filters, up), quality


DIM, HEADS, HIDDEN, DEPTH, MASKS = 24, 3, 20, 2, 4


def port_weights(net):
    dec = Decoder(DIM, HEADS, HIDDEN, DEPTH, MASKS, nnx.Rngs(0))
    arr = lambda t: jnp.asarray(t.detach().numpy())

    def norm(dst, src):
        dst.scale.set_value(arr(src.weight))
        dst.bias.set_value(arr(src.bias))

    def attention(dst, src):
        for to, of in ((dst.query, src.q_proj), (dst.key, src.k_proj), (dst.value, src.v_proj)):
            to.kernel.set_value(arr(of.weight).T.reshape(to.kernel[...].shape))
            to.bias.set_value(arr(of.bias).reshape(to.bias[...].shape))
        dst.out.kernel.set_value(arr(src.out_proj.weight).T.reshape(dst.out.kernel[...].shape))
        dst.out.bias.set_value(arr(src.out_proj.bias))

    for dst, src in zip(dec.layers, net.transformer.layers):
        attention(dst.among, src.self_attn)
        attention(dst.look, src.cross_attn_token_to_image)
        attention(dst.write, src.cross_attn_image_to_token)
        for to, of in ((dst.expand, src.mlp.lin1), (dst.shrink, src.mlp.lin2)):
            to.kernel.set_value(arr(of.weight).T)
            to.bias.set_value(arr(of.bias))
        [norm(dst.norms[i], getattr(src, f"norm{i + 1}")) for i in range(4)]
    attention(dec.last, net.transformer.final_attn_token_to_image)
    norm(dec.last_norm, net.transformer.norm_final_attn)
    dec.seeds.set_value(jnp.concatenate([arr(net.iou_token.weight), arr(net.mask_tokens.weight)]))
    for dst, i in ((dec.up1, 0), (dec.up2, 3)):
        dst.tile.kernel.set_value(arr(net.output_upscaling[i].weight).transpose(0, 2, 3, 1))
        dst.bias.set_value(arr(net.output_upscaling[i].bias))
    norm(dec.up_norm, net.output_upscaling[1])
    mlps = net.output_hypernetworks_mlps
    for j in range(3):
        dec.hyper.w[j].set_value(jnp.stack([arr(mlps[i].layers[j].weight).T for i in range(MASKS)]))
        dec.hyper.b[j].set_value(jnp.stack([arr(mlps[i].layers[j].bias) for i in range(MASKS)]))
        dec.quality.w[j].set_value(arr(net.iou_prediction_head.layers[j].weight).T)
        dec.quality.b[j].set_value(arr(net.iou_prediction_head.layers[j].bias))
    return dec


def build(seed):
    torch.manual_seed(seed)
    net = MaskDecoder(DIM, TwoWayTransformer(DEPTH, DIM, HEADS, HIDDEN), MASKS - 1).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() == 1:
                p.copy_(0.6 + 0.8 * torch.rand_like(p) if name.endswith("weight") else 0.3 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * (1.5 / p[0].numel() ** 0.5 if "token" not in name[:10] else 0.8))
    g = np.random.RandomState(seed + 1)
    image, pe = g.randn(2, 1, DIM, 5, 7).astype(np.float32)
    sparse, dense = g.randn(2, 3, DIM).astype(np.float32), g.randn(2, DIM, 5, 7).astype(np.float32)
    last = lambda a: np.ascontiguousarray(a.transpose(0, 2, 3, 1))
    return {"torch": net, "flax": port_weights(net), "inputs": (image, pe, sparse, dense),
            "flax_inputs": (last(image), last(pe), sparse, last(dense))}


FAULTS = [
    {"title": "the last attention's keys come without the image's positions",
     "edits": [("self.last(tok + start, img + pos, img)", "self.last(tok + start, img, img)")],
     "layers": ["transformer.final_attn_token_to_image", "transformer"],
     "between": ("transformer.layers.1", "transformer.final_attn_token_to_image"),
     "causes": ["residual", "left_out", "operand"], "level": "outputs"},
    {"title": "scores are divided by the root of the head size before downsampling, also where downsampled",
     "edits": [("self.factor = hd ** -0.5", "self.factor = (dim // heads) ** -0.5")],
     "layers": ["transformer.layers.0.cross_attn_token_to_image", "transformer.layers.0.cross_attn_image_to_token",
                "transformer.layers.1.cross_attn_token_to_image", "transformer.layers.1.cross_attn_image_to_token",
                "transformer.final_attn_token_to_image"],
     "between": None, "causes": ["scale", "constant"], "level": "outputs"},
    {"title": "the hypernetworks read the tokens from 0 (the IoU token) instead of from 1",
     "edits": [("tok[:, 1:1 + self.masks]", "tok[:, :self.masks]")],
     "layers": ["", "output_hypernetworks_mlps.0"],
     "between": ("transformer", "output_hypernetworks_mlps.0"),
     "causes": ["offset", "token", "operand"], "level": "outputs"},
    {"title": "the quality head's input is cut off from the gradient",
     "edits": [("self.quality(tok[:, 0])", "self.quality(jax.lax.stop_gradient(tok[:, 0]))")],
     "layers": ["", "iou_prediction_head"],
     "between": ("transformer", "iou_prediction_head"),
     "causes": ["stop_gradient"], "level": "gradients"},
    {"title": "every hypernetwork gets the first one's weights (not biases)",
     "edits": [("arr(mlps[i].layers[j].weight).T", "arr(mlps[0].layers[j].weight).T")],
     "layers": [f"output_hypernetworks_mlps.{i}.layers.{j}" for i in (1, 2, 3) for j in (0, 1, 2)]
     + [f"output_hypernetworks_mlps.{i}" for i in (1, 2, 3)],
     "between": None, "causes": ["values", "swapped", "weights"], "level": "bits"},
]
