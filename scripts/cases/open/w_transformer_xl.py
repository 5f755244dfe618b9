"""Transformer-XL: segment memory, relative positions with the shift trick, two bias vectors, post-norm layers."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn


class PositionalEmbedding(nn.Module):
    def __init__(self, demb):
        super().__init__()
        self.demb = demb

    def forward(self, pos_seq):
        inv_freq = 1 / (10000 ** (torch.arange(0.0, self.demb, 2.0).to(pos_seq.dtype) / self.demb))
        sinusoid = torch.outer(pos_seq, inv_freq)
        return torch.cat([sinusoid.sin(), sinusoid.cos()], dim=-1)


class RelMultiHeadAttn(nn.Module):
    def __init__(self, n_head, d_model, d_head):
        super().__init__()
        self.n_head, self.d_head, self.scale = n_head, d_head, d_head ** -0.5
        self.qkv_net = nn.Linear(d_model, 3 * n_head * d_head, bias=False)
        self.r_net = nn.Linear(d_model, n_head * d_head, bias=False)
        self.o_net = nn.Linear(n_head * d_head, d_model, bias=False)
        self.layer_norm = nn.LayerNorm(d_model)

    def _rel_shift(self, x):
        b, n, q, k = x.shape
        x = torch.cat([x.new_zeros(b, n, q, 1), x], dim=-1)
        return x.view(b, n, k + 1, q)[:, :, 1:].reshape(b, n, q, k)

    def forward(self, w, r, r_w_bias, r_r_bias, mems):
        b, qlen, _ = w.shape
        cat = torch.cat([mems, w], dim=1)
        q, k, v = self.qkv_net(cat).chunk(3, dim=-1)
        klen = cat.shape[1]
        q = q[:, -qlen:].view(b, qlen, self.n_head, self.d_head)
        k = k.view(b, klen, self.n_head, self.d_head)
        v = v.view(b, klen, self.n_head, self.d_head)
        r_k = self.r_net(r).view(klen, self.n_head, self.d_head)
        ac = torch.einsum("bind,bjnd->bnij", q + r_w_bias, k)
        bd = self._rel_shift(torch.einsum("bind,jnd->bnij", q + r_r_bias, r_k))
        score = (ac + bd) * self.scale
        future = torch.triu(torch.ones(qlen, klen, dtype=torch.bool), diagonal=1 + klen - qlen)
        prob = score.masked_fill(future, float("-inf")).softmax(dim=-1)
        vec = torch.einsum("bnij,bjnd->bind", prob, v).reshape(b, qlen, -1)
        return self.layer_norm(w + self.o_net(vec))


class PositionwiseFF(nn.Module):
    def __init__(self, d_model, d_inner):
        super().__init__()
        self.core = nn.Sequential(nn.Linear(d_model, d_inner), nn.ReLU(), nn.Linear(d_inner, d_model))
        self.layer_norm = nn.LayerNorm(d_model)

    def forward(self, x):
        return self.layer_norm(x + self.core(x))


class Layer(nn.Module):
    def __init__(self, n_head, d_model, d_head, d_inner):
        super().__init__()
        self.dec_attn = RelMultiHeadAttn(n_head, d_model, d_head)
        self.pos_ff = PositionwiseFF(d_model, d_inner)

    def forward(self, x, *args):
        return self.pos_ff(self.dec_attn(x, *args))


class MemTransformerLM(nn.Module):
    def __init__(self, n_token=17, n_layer=2, n_head=3, d_model=12, d_head=4, d_inner=18):
        super().__init__()
        self.word_emb = nn.Embedding(n_token, d_model)
        self.pos_emb = PositionalEmbedding(d_model)
        self.r_w_bias = nn.Parameter(torch.zeros(n_head, d_head))
        self.r_r_bias = nn.Parameter(torch.zeros(n_head, d_head))
        self.layers = nn.ModuleList([Layer(n_head, d_model, d_head, d_inner) for _ in range(n_layer)])
        self.crit = nn.Linear(d_model, n_token)

    def forward(self, data, mems):
        x = self.word_emb(data) * self.word_emb.embedding_dim ** 0.5
        klen = mems.shape[2] + data.shape[1]
        pos = self.pos_emb(torch.arange(klen - 1, -1, -1.0).to(x.dtype))
        hids = []
        for layer, mem in zip(self.layers, mems):
            hids.append(x)
            x = layer(x, pos, self.r_w_bias, self.r_r_bias, mem)
        with torch.no_grad():
            new = torch.stack([torch.cat([m, h], dim=1)[:, -m.shape[1]:] for m, h in zip(mems, hids)])
        return self.crit(x), new


###############################################################################
# JAX port. params: plain nested dict; memory [layer, batch, time, width]
###############################################################################


def layer_norm(p, x):
    mu = jnp.mean(x, -1, keepdims=True)
    return (x - mu) / jnp.sqrt(jnp.mean((x - mu) ** 2, -1, keepdims=True) + 1e-5) * p["g"] + p["b"]


def sinusoids(length, width, dtype):
    distance = jnp.arange(length - 1, -1, -1).astype(dtype)
    freq = 10000.0 ** (-jnp.arange(0, width, 2).astype(dtype) / width)
    angle = distance[:, None] * freq
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def relative_attention(p, x, memory, pos, u, v_bias, heads):
    b, n, d = x.shape
    full = jnp.concatenate([memory, x], axis=1)
    m = full.shape[1]
    split = lambda y: y.reshape(*y.shape[:-1], heads, -1)
    wq, wk, wv = jnp.split(p["qkv"], 3, axis=1)
    q, k, v = split(x @ wq), split(full @ wk), split(full @ wv)
    rel = split(pos @ p["r"])
    content = jnp.einsum("bqhd,bkhd->bhqk", q + u, k)
    by_pos = jnp.einsum("bqhd,khd->bhqk", q + v_bias, rel)
    i, j = jnp.arange(n)[:, None], jnp.arange(m)[None, :]
    distance = i + (m - n) - j
    index = m - 1 - distance
    by_pos = jnp.take_along_axis(by_pos, jnp.clip(index, 0, m - 1)[None, None], axis=-1)
    score = (content + by_pos) / (q.shape[-1] ** 0.5)
    score = jnp.where(distance >= 0, score, -jnp.inf)
    out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(score, axis=-1), v)
    return layer_norm(p["ln"], x + out.reshape(b, n, -1) @ p["o"])


def feed_forward(p, x):
    h = jax.nn.relu(x @ p["w1"] + p["b1"])
    return layer_norm(p["ln"], x + h @ p["w2"] + p["b2"])


def step(params, tokens, memory, heads):
    width = params["emb"].shape[1]
    x = params["emb"][tokens] * width ** 0.5
    pos = sinusoids(memory.shape[2] + tokens.shape[1], width, x.dtype)
    kept = []
    for p, mem in zip(params["layers"], memory):
        kept.append(jax.lax.stop_gradient(jnp.concatenate([mem, x], axis=1)[:, -mem.shape[1]:]))
        x = relative_attention(p["attn"], x, mem, pos, params["u"], params["v"], heads)
        x = feed_forward(p["ff"], x)
    return x @ params["out"]["w"] + params["out"]["b"], jnp.stack(kept)


def load(net):
    a = lambda t: jnp.asarray(t.detach().numpy())
    ln = lambda m: {"g": a(m.weight), "b": a(m.bias)}
    layers = []
    for layer in net.layers:
        at, ff = layer.dec_attn, layer.pos_ff
        layers.append({
            "attn": {"qkv": a(at.qkv_net.weight).T, "r": a(at.r_net.weight).T, "o": a(at.o_net.weight).T, "ln": ln(at.layer_norm)},
            "ff": {"w1": a(ff.core[0].weight).T, "b1": a(ff.core[0].bias), "w2": a(ff.core[2].weight).T, "b2": a(ff.core[2].bias),
                   "ln": ln(ff.layer_norm)},
        })
    return {"emb": a(net.word_emb.weight), "u": a(net.r_w_bias), "v": a(net.r_r_bias), "layers": layers,
            "out": {"w": a(net.crit.weight).T, "b": a(net.crit.bias)}}


def build(seed):
    torch.manual_seed(seed)
    net = MemTransformerLM().eval()
    for name, p in net.named_parameters():
        if name.endswith("layer_norm.weight"):
            p.data.uniform_(0.6, 1.4)
        else:
            p.data.normal_(0, 0.5 if p.dim() == 2 else 0.3)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 17, (2, 5))
    mems = rng.normal(size=(2, 2, 4, 12)).astype(np.float32)
    return {"torch": net, "flax": (functools.partial(step, heads=3), load(net)), "inputs": (tokens, mems)}


FAULTS = [
    {
        "title": "mask built for the segment alone: the memory's length is forgotten",
        "edits": [("    score = jnp.where(distance >= 0, score, -jnp.inf)\n", "    score = jnp.where(jnp.tril(jnp.ones((n, m), bool)), score, -jnp.inf)\n")],
        "layers": ["layers.0.dec_attn"],
        "between": ("layers.0.dec_attn.r_net", "layers.0.dec_attn.o_net"),
        "causes": ["mask", "causal", "offset"],
        "level": "outputs",
    },
    {
        "title": "position scores not shifted from row to row",
        "edits": [("    index = m - 1 - distance\n", "    index = jnp.broadcast_to(j, (n, m))\n")],
        "layers": ["layers.0.dec_attn"],
        "between": ("layers.0.dec_attn.r_net", "layers.0.dec_attn.o_net"),
        "causes": ["offset", "left_out", "rearranged"],
        "level": "outputs",
    },
    {
        "title": "the two bias vectors loaded the wrong way round",
        "edits": [("\"u\": a(net.r_w_bias), \"v\": a(net.r_r_bias)", "\"u\": a(net.r_r_bias), \"v\": a(net.r_w_bias)")],
        "layers": ["", "layers.0.dec_attn"],
        "between": ("layers.0.dec_attn.r_net", "layers.0.dec_attn.o_net"),
        "causes": ["swapped"],
        "level": "outputs",
    },
    {
        "title": "new memory handed on with its gradient",
        "edits": [("kept.append(jax.lax.stop_gradient(jnp.concatenate([mem, x], axis=1)[:, -mem.shape[1]:]))",
                   "kept.append(jnp.concatenate([mem, x], axis=1)[:, -mem.shape[1]:])")],
        "layers": [""],
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "memory stores each layer's output in place of its input",
        "edits": [("        kept.append(jax.lax.stop_gradient(jnp.concatenate([mem, x], axis=1)[:, -mem.shape[1]:]))\n", ""),
                  ("        x = feed_forward(p[\"ff\"], x)\n", "        x = feed_forward(p[\"ff\"], x)\n        kept.append(jax.lax.stop_gradient(jnp.concatenate([mem, x], axis=1)[:, -mem.shape[1]:]))\n")],
        "layers": [""],
        "causes": ["operand", "wiring", "order"],
        "level": "outputs",
    },
]
