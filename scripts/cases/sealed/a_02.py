"""Reference Llama with a complex freqs_cis buffer and a cache from an earlier chunk; functional JAX."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def precompute_freqs_cis(dim, end, theta=10000.0):
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))
    freqs = torch.outer(torch.arange(end, dtype=torch.float64), freqs)
    return torch.polar(torch.ones_like(freqs), freqs)


def apply_rotary_emb(x, freqs_cis):
    x_ = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(x_ * freqs_cis[None, :, None, :]).flatten(3)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, dim, n_heads, n_kv_heads):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, dim // n_heads
        self.wq = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(n_heads * self.head_dim, dim, bias=False)

    def forward(self, x, cache_k, cache_v, freqs_cis):
        bsz, seqlen, _ = x.shape
        start_pos = cache_k.shape[1]
        xq = self.wq(x).view(bsz, seqlen, self.n_heads, self.head_dim)
        xk = self.wk(x).view(bsz, seqlen, self.n_kv_heads, self.head_dim)
        xv = self.wv(x).view(bsz, seqlen, self.n_kv_heads, self.head_dim)
        freqs_cis = freqs_cis[start_pos : start_pos + seqlen]
        xq, xk = apply_rotary_emb(xq, freqs_cis), apply_rotary_emb(xk, freqs_cis)
        keys, values = torch.cat([cache_k, xk], dim=1), torch.cat([cache_v, xv], dim=1)
        n_rep = self.n_heads // self.n_kv_heads
        keys, values = keys.repeat_interleave(n_rep, dim=2), values.repeat_interleave(n_rep, dim=2)
        xq, keys, values = xq.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(self.head_dim)
        mask = torch.triu(torch.full((seqlen, seqlen), float("-inf"), dtype=x.dtype), diagonal=1)
        mask = torch.hstack([torch.zeros((seqlen, start_pos), dtype=x.dtype), mask])
        scores = F.softmax(scores + mask, dim=-1)
        output = torch.matmul(scores, values).transpose(1, 2).contiguous().view(bsz, seqlen, -1)
        return self.wo(output), xk, xv


class FeedForward(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, dim, n_heads, n_kv_heads, hidden_dim, eps):
        super().__init__()
        self.attention = Attention(dim, n_heads, n_kv_heads)
        self.feed_forward = FeedForward(dim, hidden_dim)
        self.attention_norm = RMSNorm(dim, eps)
        self.ffn_norm = RMSNorm(dim, eps)

    def forward(self, x, cache_k, cache_v, freqs_cis):
        attn, k, v = self.attention(self.attention_norm(x), cache_k, cache_v, freqs_cis)
        h = x + attn
        return h + self.feed_forward(self.ffn_norm(h)), k, v


class Transformer(nn.Module):
    def __init__(self, vocab=37, dim=20, n_layers=2, n_heads=5, n_kv_heads=1, hidden_dim=28, eps=1e-5, max_len=32):
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList([TransformerBlock(dim, n_heads, n_kv_heads, hidden_dim, eps) for _ in range(n_layers)])
        self.norm = RMSNorm(dim, eps)
        self.output = nn.Linear(dim, vocab, bias=False)
        self.register_buffer("freqs_cis", precompute_freqs_cis(dim // n_heads, max_len), persistent=False)

    def _apply(self, fn, *args, **kwargs):
        freqs = self._buffers.pop("freqs_cis")  # a complex buffer would lose its imaginary part in .double()
        super()._apply(fn, *args, **kwargs)
        self._buffers["freqs_cis"] = freqs
        return self

    def forward(self, tokens, cache_k, cache_v):
        h = self.tok_embeddings(tokens)
        freqs_cis = self.freqs_cis.to(torch.complex64) if h.dtype == torch.float32 else self.freqs_cis
        new = []
        for i, layer in enumerate(self.layers):
            h, k, v = layer(h, cache_k[i], cache_v[i], freqs_cis)
            new.append((k, v))
        logits = self.output(self.norm(h)[:, -1])
        return logits, torch.stack([k for k, _ in new]), torch.stack([v for _, v in new])


N_HEADS, N_KV, EPS = 5, 1, 1e-5


def rms_norm(w, x, eps=EPS):
    ms = jnp.mean(x**2, axis=-1, keepdims=True)
    return x / jnp.sqrt(ms + eps) * w


def freqs_table(head_dim, start, length, theta=10000.0):
    inv = 1.0 / theta ** (jnp.arange(0, head_dim, 2) / head_dim)
    ang = jnp.outer(jnp.arange(start, start + length), inv)
    return jax.lax.complex(jnp.cos(ang), jnp.sin(ang))


def rotate(x, cis):
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    z = jax.lax.complex(pairs[..., 0], pairs[..., 1]) * cis[None, :, None, :].astype(jnp.result_type(x, jnp.complex64))
    return jnp.stack([z.real, z.imag], axis=-1).reshape(x.shape)


def attention(p, x, past_k, past_v, cis, mask):
    b, s, dim = x.shape
    hd = dim // N_HEADS
    q = (x @ p["wq"]).reshape(b, s, N_HEADS, hd)
    k = (x @ p["wk"]).reshape(b, s, N_KV, hd)
    v = (x @ p["wv"]).reshape(b, s, N_KV, hd)
    q, k = rotate(q, cis), rotate(k, cis)
    new_k, new_v = k, v
    k = jnp.concatenate([past_k, k], axis=1)
    v = jnp.concatenate([past_v, v], axis=1)
    q = q.reshape(b, s, N_KV, N_HEADS // N_KV, hd)
    att = jnp.einsum("bsngd,btnd->bngst", q, k) * hd**-0.5
    att = jax.nn.softmax(jnp.where(mask, att, -jnp.inf), axis=-1)
    y = jnp.einsum("bngst,btnd->bsngd", att, v)
    return y.reshape(b, s, dim) @ p["wo"], new_k, new_v


def feed_forward(p, x):
    return (jax.nn.silu(x @ p["w1"]) * (x @ p["w3"])) @ p["w2"]


def transformer(params, tokens, cache_k, cache_v):
    s, start = tokens.shape[1], cache_k.shape[2]
    h = params["tok_embeddings"][tokens]
    cis = freqs_table(h.shape[-1] // N_HEADS, start, s)
    total = start + s
    mask = jnp.tril(jnp.ones((s, total), dtype=bool), k=start)
    ks, vs = [], []
    for i, layer in enumerate(params["layers"]):
        att, k, v = attention(layer["attention"], rms_norm(layer["attention_norm"], h), cache_k[i], cache_v[i], cis, mask)
        h = h + att
        h = h + feed_forward(layer["feed_forward"], rms_norm(layer["ffn_norm"], h))
        ks.append(k)
        vs.append(v)
    h = rms_norm(params["norm"], h)
    return h[:, -1, :] @ params["output"], jnp.stack(ks), jnp.stack(vs)


def port(net):
    w = {name: jnp.asarray(value.detach().numpy()) for name, value in net.named_parameters()}
    layers = []
    for i in range(len(net.layers)):
        base = f"layers.{i}"
        layers.append({
            "attention": {n: w[f"{base}.attention.{n}.weight"].T for n in ("wq", "wk", "wv", "wo")},
            "feed_forward": {n: w[f"{base}.feed_forward.{n}.weight"].T for n in ("w1", "w2", "w3")},
            "attention_norm": w[f"{base}.attention_norm.weight"],
            "ffn_norm": w[f"{base}.ffn_norm.weight"],
        })
    return {"tok_embeddings": w["tok_embeddings.weight"], "layers": layers,
            "norm": w["norm.weight"], "output": w["output.weight"].T}


def build(seed):
    torch.manual_seed(seed)
    net = Transformer().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(0, 0.4)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 37, (2, 7))
    past = rng.normal(size=(2, 2, 2, 3, 1, 4)).astype(np.float32)
    return {"torch": net, "flax": (transformer, port(net)), "inputs": (tokens, past[0], past[1])}


FAULTS = [
    {
        "title": "rotation in the opposite sense",
        "edits": [("jax.lax.complex(jnp.cos(ang), jnp.sin(ang))", "jax.lax.complex(jnp.cos(ang), -jnp.sin(ang))")],
        "layers": ["layers.0.attention"],
        "between": ("layers.0.attention.wv", "layers.0.attention.wo"),
        "causes": ["rope", "operation"],
        "level": "outputs",
    },
    {
        "title": "positions of the chunk start from 0, not from the cache's length",
        "edits": [("cis = freqs_table(h.shape[-1] // N_HEADS, start, s)", "cis = freqs_table(h.shape[-1] // N_HEADS, 0, s)")],
        "layers": ["layers.0.attention"],
        "between": ("layers.0.attention.wv", "layers.0.attention.wo"),
        "causes": ["offset", "rope"],
        "level": "outputs",
    },
    {
        "title": "causal mask not shifted by the cache's length",
        "edits": [("mask = jnp.tril(jnp.ones((s, total), dtype=bool), k=start)", "mask = jnp.tril(jnp.ones((s, total), dtype=bool))")],
        "layers": ["layers.0.attention"],
        "between": ("layers.0.attention.wv", "layers.0.attention.wo"),
        "causes": ["causal", "mask"],
        "level": "outputs",
    },
    {
        "title": "scores scaled by the model's width, not the head's",
        "edits": [("* hd**-0.5", "* dim**-0.5")],
        "layers": ["layers.0.attention"],
        "between": ("layers.0.attention.wv", "layers.0.attention.wo"),
        "causes": ["scale"],
        "level": "outputs",
    },
    {
        "title": "w1 and w3 of the feed-forward exchanged on loading",
        "edits": [('{n: w[f"{base}.feed_forward.{n}.weight"].T for n in ("w1", "w2", "w3")}',
                   '{n: w[f"{base}.feed_forward.{m}.weight"].T for n, m in (("w1", "w3"), ("w2", "w2"), ("w3", "w1"))}')],
        "layers": ["layers.0.feed_forward.w1"],
        "causes": ["swapped"],
        "level": "outputs",
    },
    {
        "title": "RMSNorm subtracts the mean",
        "edits": [("    ms = jnp.mean(x**2, axis=-1, keepdims=True)", "    x = x - jnp.mean(x, axis=-1, keepdims=True)\n    ms = jnp.mean(x**2, axis=-1, keepdims=True)")],
        "layers": ["layers.0.attention_norm"],
        "causes": ["norm_kind"],
        "level": "outputs",
    },
    {
        "title": "logits of the first position instead of the last",
        "edits": [("return h[:, -1, :] @", "return h[:, 0, :] @")],
        "layers": [""],
        "between": ("norm", "output"),
        "causes": ["token"],
        "level": "outputs",
    },
    {
        "title": "cache returned before the rotation",
        "edits": [("    q, k = rotate(q, cis), rotate(k, cis)\n    new_k, new_v = k, v\n",
                   "    new_k, new_v = k, v\n    q, k = rotate(q, cis), rotate(k, cis)\n")],
        "layers": ["layers.0.attention"],
        "between": ("layers.0.attention.wv", "layers.0.attention.wo"),
        "causes": ["order", "rope", "wiring"],
        "level": "outputs",
    },
]
