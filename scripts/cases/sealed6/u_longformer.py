"""A small Longformer encoder: attention in a sliding window (computed by chunks) and global tokens."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn

VOCAB, DIM, HEADS, WINDOW, FFN, LAYERS, MAXPOS, PAD = 41, 24, 4, 3, 34, 2, 22, 1
EPS = 1e-5


# ---- PyTorch ---------------------------------------------------------------------------------
class LongformerEmbeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCAB, DIM, padding_idx=PAD)
        self.position_embeddings = nn.Embedding(MAXPOS, DIM, padding_idx=PAD)
        self.LayerNorm = nn.LayerNorm(DIM, eps=EPS)

    def forward(self, input_ids):
        mask = input_ids.ne(PAD).long()
        position_ids = torch.cumsum(mask, dim=1) * mask + PAD
        return self.LayerNorm(self.word_embeddings(input_ids) + self.position_embeddings(position_ids))


class LongformerSelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim, self.one_sided = HEADS, DIM // HEADS, WINDOW
        self.query = nn.Linear(DIM, DIM)
        self.key = nn.Linear(DIM, DIM)
        self.value = nn.Linear(DIM, DIM)
        self.query_global = nn.Linear(DIM, DIM)
        self.key_global = nn.Linear(DIM, DIM)
        self.value_global = nn.Linear(DIM, DIM)

    def _split(self, x):
        return x.view(x.shape[0], x.shape[1], self.num_heads, self.head_dim)

    def _sliding_chunks_query_key_matmul(self, q, k):
        """(B, L, H, D) twice -> (B, L, H, 2w + 1)"""
        b, length, h, d = q.shape
        w = self.one_sided
        q = q.view(b, length // w, w, h, d)
        k = F.pad(k, (0, 0, 0, 0, w, w)).unfold(1, 3 * w, w)                # B, chunks, H, D, 3w
        chunked = torch.einsum("bcxhd,bchdy->bcxhy", q, k)
        diag = torch.arange(w)[:, None] + torch.arange(2 * w + 1)
        diag = diag[None, None, :, None].expand(b, length // w, w, h, 2 * w + 1)
        return chunked.gather(-1, diag).reshape(b, length, h, 2 * w + 1)

    def forward(self, hidden_states, is_index_masked, is_index_global):
        b, length, _ = hidden_states.shape
        w = self.one_sided
        q, k, v = self.query(hidden_states), self.key(hidden_states), self.value(hidden_states)
        q, k, v = self._split(q / math.sqrt(self.head_dim)), self._split(k), self._split(v)
        low = torch.finfo(q.dtype).min
        local = self._sliding_chunks_query_key_matmul(q, k)
        usable = F.pad(~(is_index_masked | is_index_global), (w, w), value=False).unfold(1, 2 * w + 1, 1)
        local = local.masked_fill(~usable[:, :, None], low)

        count = is_index_global.sum(1)
        most = int(count.max())
        slot = torch.arange(most)[None] < count[:, None]                     # real slots of the gathered tokens
        where, into = is_index_global.nonzero(as_tuple=True), slot.nonzero(as_tuple=True)
        k_only, v_only = k.new_zeros(b, most, *k.shape[2:]), v.new_zeros(b, most, *v.shape[2:])
        k_only[into], v_only[into] = k[where], v[where]
        to_global = torch.einsum("blhd,bghd->blhg", q, k_only).masked_fill(~slot[:, None, None], low)

        probs = torch.softmax(torch.cat([to_global, local], -1), -1)
        probs = probs.masked_fill(is_index_masked[:, :, None, None], 0.0)
        windows = F.pad(v, (0, 0, 0, 0, w, w)).unfold(1, 2 * w + 1, 1)        # B, L, H, D, 2w + 1
        out = torch.einsum("blhg,bghd->blhd", probs[..., :most], v_only)
        out = out + torch.einsum("blhw,blhdw->blhd", probs[..., most:], windows)

        chosen = hidden_states.new_zeros(b, most, hidden_states.shape[-1])
        chosen[into] = hidden_states[where]
        qg = self._split(self.query_global(chosen) / math.sqrt(self.head_dim))
        kg, vg = self._split(self.key_global(hidden_states)), self._split(self.value_global(hidden_states))
        scores = torch.einsum("bghd,blhd->bhgl", qg, kg).masked_fill(is_index_masked[:, None, None], low)
        full = torch.einsum("bhgl,blhd->bghd", torch.softmax(scores, -1), vg)
        out[where] = full[into]
        return out.reshape(b, length, -1)


class LongformerSelfOutput(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.dense = nn.Linear(inner, DIM)
        self.LayerNorm = nn.LayerNorm(DIM, eps=EPS)

    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dense(hidden_states) + input_tensor)


class LongformerAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.self = LongformerSelfAttention()
        self.output = LongformerSelfOutput(DIM)

    def forward(self, x, masked, is_global):
        return self.output(self.self(x, masked, is_global), x)


class LongformerIntermediate(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(DIM, FFN)

    def forward(self, x):
        return F.gelu(self.dense(x))


class LongformerLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = LongformerAttention()
        self.intermediate = LongformerIntermediate()
        self.output = LongformerSelfOutput(FFN)

    def forward(self, x, masked, is_global):
        x = self.attention(x, masked, is_global)
        return self.output(self.intermediate(x), x)


class LongformerEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList(LongformerLayer() for _ in range(LAYERS))

    def forward(self, x, masked, is_global):
        for layer in self.layer:
            x = layer(x, masked, is_global)
        return x


class LongformerPooler(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(DIM, DIM)

    def forward(self, x):
        return torch.tanh(self.dense(x[:, 0]))


class LongformerModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = LongformerEmbeddings()
        self.encoder = LongformerEncoder()
        self.pooler = LongformerPooler()

    def forward(self, input_ids, global_attention_mask):
        x = self.embeddings(input_ids)
        x = self.encoder(x, input_ids.eq(PAD), global_attention_mask > 0)
        return x, self.pooler(x)


# ---- Flax ------------------------------------------------------------------------------------
class TokenEmbedder(nnx.Module):
    def __init__(self, rngs):
        self.tokens = nnx.Embed(VOCAB, DIM, rngs=rngs)
        self.positions = nnx.Embed(MAXPOS, DIM, rngs=rngs)
        self.norm = nnx.LayerNorm(DIM, epsilon=EPS, rngs=rngs)

    def __call__(self, ids):
        real = ids != PAD
        pos = jnp.where(real, jnp.cumsum(real, axis=1), 0) + PAD
        emb = self.tokens.embedding[ids] + self.positions.embedding[pos]
        emb = jnp.where(real[..., None], emb, jax.lax.stop_gradient(emb))
        return self.norm(emb)


class BandedAttention(nnx.Module):
    def __init__(self, rngs):
        self.qkv = nnx.Linear(DIM, 3 * DIM, rngs=rngs)
        self.wide_q = nnx.Linear(DIM, DIM, rngs=rngs)
        self.wide_kv = nnx.Linear(DIM, 2 * DIM, rngs=rngs)

    def __call__(self, x, pad, wide):
        n, t, _ = x.shape
        dh = DIM // HEADS
        low = jnp.finfo(x.dtype).min
        q, k, v = (a.reshape(n, t, HEADS, dh) for a in jnp.split(self.qkv(x), 3, axis=-1))
        q = q * dh ** -0.5
        near = jnp.arange(t)[:, None] + jnp.arange(-WINDOW, WINDOW + 1)
        inside = (near >= 0) & (near < t)
        near = jnp.clip(near, 0, t - 1)
        allowed = inside & ~pad[:, near] & ~wide[:, near]                    # n, t, 2w + 1
        band = jnp.einsum("nthd,ntwhd->nthw", q, k[:, near])
        band = jnp.where(allowed[:, :, None], band, low)
        far = jnp.einsum("nthd,nshd->nths", q, k)
        far = jnp.where(wide[:, None, None], far, low)
        p = jax.nn.softmax(jnp.concatenate([far, band], axis=-1), axis=-1)
        p = jnp.where(pad[:, :, None, None], 0.0, p)
        y = jnp.einsum("nths,nshd->nthd", p[..., :t], v)
        y = y + jnp.einsum("nthw,ntwhd->nthd", p[..., t:], v[:, near])

        wq = self.wide_q(x).reshape(n, t, HEADS, dh) * dh ** -0.5
        wk, wv = (a.reshape(n, t, HEADS, dh) for a in jnp.split(self.wide_kv(x), 2, axis=-1))
        s = jnp.einsum("nthd,nshd->nhts", wq, wk)
        s = jax.nn.softmax(jnp.where(pad[:, None, None], low, s), axis=-1)
        z = jnp.einsum("nhts,nshd->nthd", s, wv)
        return jnp.where(wide[..., None, None], z, y).reshape(n, t, DIM)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attend = BandedAttention(rngs)
        self.proj = nnx.Linear(DIM, DIM, rngs=rngs)
        self.norm_a = nnx.LayerNorm(DIM, epsilon=EPS, rngs=rngs)
        self.up = nnx.Linear(DIM, FFN, rngs=rngs)
        self.down = nnx.Linear(FFN, DIM, rngs=rngs)
        self.norm_b = nnx.LayerNorm(DIM, epsilon=EPS, rngs=rngs)

    def __call__(self, x, pad, wide):
        x = self.norm_a(x + self.proj(self.attend(x, pad, wide)))
        return self.norm_b(x + self.down(jax.nn.gelu(self.up(x), approximate=False)))


class LongEncoder(nnx.Module):
    def __init__(self, rngs):
        self.embed = TokenEmbedder(rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.pool = nnx.Linear(DIM, DIM, rngs=rngs)

    def __call__(self, ids, global_mask):
        pad, wide = ids == PAD, global_mask > 0
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, pad, wide)
        return x, jnp.tanh(self.pool(x[:, 0]))


def port_weights(net):
    model = LongEncoder(nnx.Rngs(0))

    def a(t):
        return jnp.asarray(t.detach().numpy())

    def linear(dst, *srcs):
        dst.kernel.set_value(jnp.concatenate([a(s.weight).T for s in srcs], axis=1))
        dst.bias.set_value(jnp.concatenate([a(s.bias) for s in srcs]))

    def norm(dst, src):
        dst.scale.set_value(a(src.weight))
        dst.bias.set_value(a(src.bias))

    model.embed.tokens.embedding.set_value(a(net.embeddings.word_embeddings.weight))
    model.embed.positions.embedding.set_value(a(net.embeddings.position_embeddings.weight))
    norm(model.embed.norm, net.embeddings.LayerNorm)
    for dst, src in zip(model.blocks, net.encoder.layer):
        att = src.attention.self
        linear(dst.attend.qkv, att.query, att.key, att.value)
        linear(dst.attend.wide_q, att.query_global)
        linear(dst.attend.wide_kv, att.key_global, att.value_global)
        linear(dst.proj, src.attention.output.dense)
        norm(dst.norm_a, src.attention.output.LayerNorm)
        linear(dst.up, src.intermediate.dense)
        linear(dst.down, src.output.dense)
        norm(dst.norm_b, src.output.LayerNorm)
    linear(model.pool, net.pooler.dense)
    return model


def build(seed):
    torch.manual_seed(seed)
    net = LongformerModel().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "LayerNorm.weight" in name:
                p.copy_(1 + 0.3 * torch.randn_like(p))
            elif "embeddings.weight" in name:
                p.copy_(torch.randn_like(p))
            else:
                p.copy_(0.3 * torch.randn_like(p))
    rs = np.random.RandomState(seed)
    ids = rs.randint(2, VOCAB, (2, 15))
    ids[1, 12:] = PAD
    wide = np.zeros((2, 15), np.int64)
    wide[0, [0, 7]] = 1
    wide[1, [0, 4, 6]] = 1
    return {"torch": net, "flax": port_weights(net), "inputs": (ids, wide)}


ATTENTIONS = ["encoder.layer.0.attention.self", "encoder.layer.1.attention.self"]
FAULTS = [
    {"title": "global tokens are not taken out of the window, so that they count twice in the softmax",
     "edits": [("& ~pad[:, near] & ~wide[:, near] ", "& ~pad[:, near] ")],
     "layers": ATTENTIONS,
     "between": ("encoder.layer.0.attention.self.value", "encoder.layer.0.attention.self.query_global"),
     "causes": ["mask", "left_out"], "level": "outputs"},
    {"title": "the rows of the global tokens sum the local values in place of the global ones",
     "edits": [('"nhts,nshd->nthd", s, wv)', '"nhts,nshd->nthd", s, v)')],
     "layers": ATTENTIONS + [x + ".value_global" for x in ATTENTIONS],
     "between": ("encoder.layer.0.attention.self.value_global", "encoder.layer.0.attention.output.dense"),
     "causes": ["operand", "swapped"], "level": "outputs"},
    {"title": "the global query is not divided by the root of the head's width",
     "edits": [("wq = self.wide_q(x).reshape(n, t, HEADS, dh) * dh ** -0.5",
                "wq = self.wide_q(x).reshape(n, t, HEADS, dh)")],
     "layers": ATTENTIONS,
     "between": ("encoder.layer.0.attention.self.query_global", "encoder.layer.0.attention.output.dense"),
     "causes": ["scale", "left_out"], "level": "outputs"},
    {"title": "the embeddings' rows of padding receive a gradient",
     "edits": [("        emb = jnp.where(real[..., None], emb, jax.lax.stop_gradient(emb))\n", "")],
     "layers": ["embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings"],
     "between": None,
     "causes": ["padding_idx", "stop_gradient"], "level": "gradients"},
    {"title": "the global query projection is loaded from the local one",
     "edits": [("linear(dst.attend.wide_q, att.query_global)", "linear(dst.attend.wide_q, att.query)")],
     "layers": [x + ".query_global" for x in ATTENTIONS],
     "between": None,
     "causes": ["values", "weights", "operand"], "level": "bits"},
]
