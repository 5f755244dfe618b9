"""GPT-J: one norm a layer, parallel attention and MLP, rotary over neighbouring pairs on part of the head; nnx.scan over stacked layers."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn


def fixed_pos_embedding(dim, length, dtype):
    inv_freq = 1.0 / (10000 ** (torch.arange(0, dim, 2).to(dtype) / dim))
    return torch.outer(torch.arange(length).to(dtype), inv_freq)


def rotate_every_two(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def apply_rotary(x, angle):
    angle = angle.repeat_interleave(2, dim=-1)[:, None]
    return x * angle.cos() + rotate_every_two(x) * angle.sin()


class GPTJAttention(nn.Module):
    def __init__(self, d, heads, rotary):
        super().__init__()
        self.heads, self.rotary = heads, rotary
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(d, d, bias=False))

    def forward(self, x, mask):
        b, t, d = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1) for f in (self.q_proj, self.k_proj, self.v_proj))
        r = self.rotary
        angle = fixed_pos_embedding(r, t, x.dtype)
        q = torch.cat([apply_rotary(q[..., :r], angle), q[..., r:]], dim=-1).transpose(1, 2)
        k = torch.cat([apply_rotary(k[..., :r], angle), k[..., r:]], dim=-1).transpose(1, 2)
        w = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        w = w.masked_fill(~mask, torch.finfo(w.dtype).min).softmax(dim=-1)
        return self.out_proj((w @ v.transpose(1, 2)).transpose(1, 2).reshape(b, t, d))


class GPTJBlock(nn.Module):
    def __init__(self, d, heads, rotary):
        super().__init__()
        self.ln_1 = nn.LayerNorm(d, eps=1e-5)
        self.attn = GPTJAttention(d, heads, rotary)
        self.mlp = nn.Sequential(nn.Linear(d, 3 * d), nn.GELU(approximate="tanh"), nn.Linear(3 * d, d))

    def forward(self, x, mask):
        h = self.ln_1(x)
        return self.attn(h, mask) + self.mlp(h) + x


class GPTJ(nn.Module):
    def __init__(self, vocab=22, d=18, heads=3, rotary=4, layers=3):
        super().__init__()
        self.wte = nn.Embedding(vocab, d)
        self.h = nn.ModuleList([GPTJBlock(d, heads, rotary) for _ in range(layers)])
        self.ln_f = nn.LayerNorm(d, eps=1e-5)
        self.lm_head = nn.Linear(d, vocab)

    def forward(self, input_ids, attention_mask):
        t = input_ids.shape[1]
        mask = torch.ones(t, t, dtype=torch.bool).tril() & (attention_mask[:, None, None, :] > 0)
        x = self.wte(input_ids)
        for block in self.h:
            x = block(x, mask)
        return self.lm_head(self.ln_f(x))


# --- flax.nnx, layers stacked and scanned


def rotate_pairs(x, n):
    """x [b, t, heads, d]: the first n features turned, two neighbours at a time."""
    t = x.shape[1]
    freq = 10000.0 ** (-jnp.arange(0, n, 2).astype(x.dtype) / n)
    angle = (jnp.arange(t).astype(x.dtype)[:, None] * freq)[:, None, :]
    pairs = x[..., :n].reshape(*x.shape[:-1], n // 2, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    c, s = jnp.cos(angle), jnp.sin(angle)
    turned = jnp.stack([a * c - b * s, a * s + b * c], axis=-1).reshape(*x.shape[:-1], n)
    return jnp.concatenate([turned, x[..., n:]], axis=-1)


class ParallelBlock(nnx.Module):
    def __init__(self, d, heads, rotary, rngs):
        self.heads, self.rotary = heads, rotary
        self.norm = nnx.LayerNorm(d, epsilon=1e-5, rngs=rngs)
        self.qkv = nnx.Linear(d, 3 * d, use_bias=False, rngs=rngs)
        self.proj = nnx.Linear(d, d, use_bias=False, rngs=rngs)
        self.fc_in = nnx.Linear(d, 3 * d, rngs=rngs)
        self.fc_out = nnx.Linear(3 * d, d, rngs=rngs)

    def __call__(self, x, mask):
        b, t, d = x.shape
        h = self.norm(x)
        q, k, v = (z.reshape(b, t, self.heads, -1) for z in jnp.split(self.qkv(h), 3, axis=-1))
        q, k = rotate_pairs(q, self.rotary), rotate_pairs(k, self.rotary)
        score = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        weight = jax.nn.softmax(jnp.where(mask, score, jnp.finfo(score.dtype).min), axis=-1)
        att = jnp.einsum("bhqk,bkhd->bqhd", weight, v).reshape(b, t, d)
        mlp = self.fc_out(nnx.gelu(self.fc_in(h), approximate=True))
        return x + self.proj(att) + mlp


class ScannedGPTJ(nnx.Module):
    def __init__(self, vocab=22, d=18, heads=3, rotary=4, layers=3, *, rngs):
        self.table = nnx.Param(jnp.zeros((vocab, d)))

        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return ParallelBlock(d, heads, rotary, rngs)

        self.blocks = make(rngs)
        self.norm = nnx.LayerNorm(d, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(d, vocab, rngs=rngs)

    def __call__(self, tokens, attention_mask):
        causal = nnx.make_causal_mask(tokens)
        mask = nnx.combine_masks(causal, attention_mask[:, None, None, :] > 0, dtype=bool)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return block(x, mask)

        x = run(self.table[...][tokens], self.blocks)
        return self.head(self.norm(x))


def port(net, model):
    a = lambda t: t.detach().numpy()
    stack = lambda f: jnp.asarray(np.stack([f(b) for b in net.h]))
    model.table[...] = jnp.asarray(a(net.wte.weight))
    blocks = model.blocks
    blocks.norm.scale[...], blocks.norm.bias[...] = stack(lambda b: a(b.ln_1.weight)), stack(lambda b: a(b.ln_1.bias))
    blocks.qkv.kernel[...] = stack(lambda b: np.concatenate([a(p.weight).T for p in (b.attn.q_proj, b.attn.k_proj, b.attn.v_proj)], axis=1))
    blocks.proj.kernel[...] = stack(lambda b: a(b.attn.out_proj.weight).T)
    blocks.fc_in.kernel[...], blocks.fc_in.bias[...] = stack(lambda b: a(b.mlp[0].weight).T), stack(lambda b: a(b.mlp[0].bias))
    blocks.fc_out.kernel[...], blocks.fc_out.bias[...] = stack(lambda b: a(b.mlp[2].weight).T), stack(lambda b: a(b.mlp[2].bias))
    model.norm.scale[...], model.norm.bias[...] = jnp.asarray(a(net.ln_f.weight)), jnp.asarray(a(net.ln_f.bias))
    model.head.kernel[...], model.head.bias[...] = jnp.asarray(a(net.lm_head.weight).T), jnp.asarray(a(net.lm_head.bias))


def build(seed):
    torch.manual_seed(seed)
    net = GPTJ().eval()
    for n, p in net.named_parameters():
        p.data.uniform_(0.5, 1.5) if "ln_" in n and n.endswith("weight") else p.data.normal_(0, 0.35)
    model = ScannedGPTJ(rngs=nnx.Rngs(seed))
    port(net, model)
    tokens = np.random.default_rng(seed).integers(0, 22, (2, 7))
    keep = np.ones((2, 7), np.int64)
    keep[1, 5:] = 0
    return {"torch": net, "flax": model, "inputs": (tokens, keep)}


FAULTS = [
    {
        "title": "rotary in halves, as GPT-NeoX has it",
        "edits": [("    pairs = x[..., :n].reshape(*x.shape[:-1], n // 2, 2)\n    a, b = pairs[..., 0], pairs[..., 1]\n", "    a, b = jnp.split(x[..., :n], 2, axis=-1)\n"),
                  ("    turned = jnp.stack([a * c - b * s, a * s + b * c], axis=-1).reshape(*x.shape[:-1], n)\n", "    turned = jnp.concatenate([a * c - b * s, a * s + b * c], axis=-1)\n")],
        "layers": ["h.0.attn"],
        "between": ("h.0.attn.v_proj", "h.0.attn.out_proj"),
        "causes": ["rope"],
        "level": "outputs",
    },
    {
        "title": "the MLP reads the stream, not the normed one it shares with attention",
        "edits": [("nnx.gelu(self.fc_in(h), approximate=True)", "nnx.gelu(self.fc_in(x), approximate=True)")],
        "layers": ["h.0"],
        "between": ("h.0.attn.out_proj", "h.0.mlp.0"),
        "causes": ["operand", "wiring", "missing_layer"],
        "level": "outputs",
    },
    {
        "title": "fused kernel joined as k, q, v",
        "edits": [("(b.attn.q_proj, b.attn.k_proj, b.attn.v_proj)", "(b.attn.k_proj, b.attn.q_proj, b.attn.v_proj)")],
        "layers": ["h.0.attn.q_proj", "h.0.attn.k_proj"],
        "causes": ["swapped", "blocks"],
        "level": "outputs",
    },
    {
        "title": "rotated frequencies divided by the head's width, not by the rotated part",
        "edits": [("freq = 10000.0 ** (-jnp.arange(0, n, 2).astype(x.dtype) / n)", "freq = 10000.0 ** (-jnp.arange(0, n, 2).astype(x.dtype) / x.shape[-1])")],
        "layers": ["h.0.attn"],
        "between": ("h.0.attn.v_proj", "h.0.attn.out_proj"),
        "causes": ["rope", "constant"],
        "level": "outputs",
    },
    {
        "title": "stacked norms of the layers loaded from the first layer alone",
        "edits": [("stack(lambda b: a(b.ln_1.weight))", "stack(lambda b: a(net.h[0].ln_1.weight))")],
        "layers": ["h.1.ln_1"],
        "causes": ["values"],
        "level": "outputs",
    },
]
