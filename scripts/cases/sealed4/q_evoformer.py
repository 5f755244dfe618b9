"""Evoformer-like block (row attention with pair bias, outer product mean, triangle multiplications) with recycling, in Linen."""
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

SEQS, RES, C_M, C_Z, C_OPM, C_MUL, HEADS, C_HEAD, CYCLES = 4, 6, 10, 8, 3, 7, 2, 5, 2


# ------------------------------------------------------------------ PyTorch


class MSARowAttentionWithPairBias(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer_norm_m = torch.nn.LayerNorm(C_M)
        self.layer_norm_z = torch.nn.LayerNorm(C_Z)
        self.linear_z = torch.nn.Linear(C_Z, HEADS, bias=False)
        self.linear_q = torch.nn.Linear(C_M, HEADS * C_HEAD, bias=False)
        self.linear_k = torch.nn.Linear(C_M, HEADS * C_HEAD, bias=False)
        self.linear_v = torch.nn.Linear(C_M, HEADS * C_HEAD, bias=False)
        self.linear_g = torch.nn.Linear(C_M, HEADS * C_HEAD)
        self.linear_o = torch.nn.Linear(HEADS * C_HEAD, C_M)

    def forward(self, m, z, mask):
        m = self.layer_norm_m(m)
        mask_bias = (1e9 * (mask - 1))[:, None, None, :]
        z = self.linear_z(self.layer_norm_z(z)).permute(2, 0, 1)[None]
        q, k, v = (f(m).view(*m.shape[:-1], HEADS, C_HEAD).transpose(-2, -3) for f in (self.linear_q, self.linear_k, self.linear_v))
        a = (q / math.sqrt(C_HEAD)) @ k.transpose(-1, -2)
        a = torch.softmax(a + mask_bias + z, dim=-1)
        o = (a @ v).transpose(-2, -3)
        g = torch.sigmoid(self.linear_g(m)).view(o.shape)
        return self.linear_o((o * g).flatten(-2))


class Transition(torch.nn.Module):
    def __init__(self, c, n):
        super().__init__()
        self.layer_norm = torch.nn.LayerNorm(c)
        self.linear_1 = torch.nn.Linear(c, n * c)
        self.relu = torch.nn.ReLU()
        self.linear_2 = torch.nn.Linear(n * c, c)

    def forward(self, x, mask):
        return self.linear_2(self.relu(self.linear_1(self.layer_norm(x)))) * mask.unsqueeze(-1)


class OuterProductMean(torch.nn.Module):
    def __init__(self, eps=1e-3):
        super().__init__()
        self.eps = eps
        self.layer_norm = torch.nn.LayerNorm(C_M)
        self.linear_1 = torch.nn.Linear(C_M, C_OPM)
        self.linear_2 = torch.nn.Linear(C_M, C_OPM)
        self.linear_out = torch.nn.Linear(C_OPM ** 2, C_Z)

    def forward(self, m, mask):
        m = self.layer_norm(m)
        mask = mask.unsqueeze(-1)
        a = (self.linear_1(m) * mask).transpose(-2, -3)
        b = (self.linear_2(m) * mask).transpose(-2, -3)
        outer = torch.einsum("...bac,...dae->...bdce", a, b)
        outer = self.linear_out(outer.reshape(outer.shape[:-2] + (-1,)))
        norm = torch.einsum("...abc,...adc->...bdc", mask, mask) + self.eps
        return outer / norm


class TriangleMultiplicativeUpdate(torch.nn.Module):
    def __init__(self, outgoing):
        super().__init__()
        self._outgoing = outgoing
        self.layer_norm_in, self.layer_norm_out = torch.nn.LayerNorm(C_Z), torch.nn.LayerNorm(C_MUL)
        self.linear_a_p, self.linear_a_g = torch.nn.Linear(C_Z, C_MUL), torch.nn.Linear(C_Z, C_MUL)
        self.linear_b_p, self.linear_b_g = torch.nn.Linear(C_Z, C_MUL), torch.nn.Linear(C_Z, C_MUL)
        self.linear_g, self.linear_z = torch.nn.Linear(C_Z, C_Z), torch.nn.Linear(C_MUL, C_Z)

    def forward(self, z, mask):
        mask = mask.unsqueeze(-1)
        z = self.layer_norm_in(z)
        a = mask * torch.sigmoid(self.linear_a_g(z)) * self.linear_a_p(z)
        b = mask * torch.sigmoid(self.linear_b_g(z)) * self.linear_b_p(z)
        if self._outgoing:
            p = torch.matmul(a.permute(2, 0, 1), b.permute(2, 1, 0))
        else:
            p = torch.matmul(a.permute(2, 1, 0), b.permute(2, 0, 1))
        x = self.linear_z(self.layer_norm_out(p.permute(1, 2, 0)))
        return x * torch.sigmoid(self.linear_g(z))


class EvoformerBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.msa_att_row = MSARowAttentionWithPairBias()
        self.msa_transition = Transition(C_M, 2)
        self.outer_product_mean = OuterProductMean()
        self.tri_mul_out = TriangleMultiplicativeUpdate(True)
        self.tri_mul_in = TriangleMultiplicativeUpdate(False)
        self.pair_transition = Transition(C_Z, 3)

    def forward(self, m, z, msa_mask, pair_mask):
        m = m + self.msa_att_row(m, z, msa_mask)
        m = m + self.msa_transition(m, msa_mask)
        z = z + self.outer_product_mean(m, msa_mask)
        z = z + self.tri_mul_out(z, pair_mask)
        z = z + self.tri_mul_in(z, pair_mask)
        return m, z + self.pair_transition(z, pair_mask)


class RecyclingEmbedder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer_norm_m, self.layer_norm_z = torch.nn.LayerNorm(C_M), torch.nn.LayerNorm(C_Z)

    def forward(self, m, z):
        return self.layer_norm_m(m), self.layer_norm_z(z)


class Recycled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.recycling_embedder = RecyclingEmbedder()
        self.evoformer = EvoformerBlock()

    def forward(self, msa, pair, msa_mask, pair_mask):
        msa_mask, pair_mask = msa_mask.to(msa.dtype), pair_mask.to(msa.dtype)
        m_prev, z_prev = torch.zeros_like(msa[0]), torch.zeros_like(pair)
        for _ in range(CYCLES):
            m_add, z_add = self.recycling_embedder(m_prev, z_prev)
            m = torch.cat([(msa[0] + m_add)[None], msa[1:]])
            m, z = self.evoformer(m, pair + z_add, msa_mask, pair_mask)
            m_prev, z_prev = m[0].detach(), z.detach()
        return m, z


# ------------------------------------------------------------------ Flax

Norm = partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)


class RowAttention(nn.Module):
    @nn.compact
    def __call__(self, msa, pair, seen):
        x = Norm(name="norm")(msa)
        bias = nn.Dense(HEADS, use_bias=False, name="pair_bias")(Norm(name="pair_norm")(pair))
        qkv = nn.DenseGeneral((3, HEADS, C_HEAD), use_bias=False, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv, -3, 0)
        gate = nn.sigmoid(nn.DenseGeneral((HEADS, C_HEAD), name="gate")(x))
        logits = jnp.einsum("sqhc,skhc->shqk", q, k) / math.sqrt(C_HEAD) + jnp.moveaxis(bias, -1, 0)
        logits = jnp.where(seen[:, None, None, :], logits, -1e9)
        mixed = jnp.einsum("shqk,skhc->sqhc", nn.softmax(logits), v)
        return nn.DenseGeneral(C_M, axis=(-2, -1), name="merge")(mixed * gate)


class Mlp(nn.Module):
    factor: int

    @nn.compact
    def __call__(self, x, seen):
        y = nn.relu(nn.Dense(self.factor * x.shape[-1], name="up")(Norm(name="norm")(x)))
        return jnp.where(seen[..., None], nn.Dense(x.shape[-1], name="down")(y), 0)


class OuterMean(nn.Module):
    """Mean over the sequences of the outer products of two projections, where both residues are seen."""

    @nn.compact
    def __call__(self, msa, seen):
        weight = seen.astype(msa.dtype)
        sides = nn.DenseGeneral((2, C_OPM), name="sides")(Norm(name="norm")(msa)) * weight[..., None, None]
        outer = jnp.einsum("sic,sjd->ijcd", sides[..., 0, :], sides[..., 1, :])
        both = jnp.einsum("si,sj->ij", weight, weight)[..., None]
        out = nn.DenseGeneral(C_Z, axis=(-2, -1), name="out")(outer)
        return out / (both + 1e-3)


class Triangle(nn.Module):
    equation: str

    @nn.compact
    def __call__(self, pair, seen):
        x = Norm(name="norm")(pair)
        values = nn.DenseGeneral((2, C_MUL), name="values")(x)
        values = values * nn.sigmoid(nn.DenseGeneral((2, C_MUL), name="gates")(x))
        values = jnp.where(seen[..., None, None], values, 0)
        edges = jnp.einsum(self.equation, values[:, :, 0], values[:, :, 1])
        y = nn.Dense(C_Z, name="out")(Norm(name="norm_out")(edges))
        return y * nn.sigmoid(nn.Dense(C_Z, name="gate_out")(x))


class Block(nn.Module):
    @nn.compact
    def __call__(self, msa, pair, msa_seen, pair_seen):
        msa += RowAttention(name="rows")(msa, pair, msa_seen)
        msa += Mlp(2, name="msa_mlp")(msa, msa_seen)
        pair += OuterMean(name="outer")(msa, msa_seen)
        pair += Triangle("ikc,jkc->ijc", name="outgoing")(pair, pair_seen)
        pair += Triangle("kic,kjc->ijc", name="incoming")(pair, pair_seen)
        return msa, pair + Mlp(3, name="pair_mlp")(pair, pair_seen)


class Trunk(nn.Module):
    """The block, run again upon its own output; only the last pass is trained."""

    @nn.compact
    def __call__(self, msa, pair, msa_seen, pair_seen):
        block, norm_m, norm_z = Block(name="block"), Norm(name="again_msa"), Norm(name="again_pair")
        first, again = jnp.zeros_like(msa[0]), jnp.zeros_like(pair)
        for _ in range(CYCLES):
            m, z = block(jnp.asarray(msa).at[0].add(norm_m(first)), pair + norm_z(again), msa_seen, pair_seen)
            first, again = jax.lax.stop_gradient((m[0], z))
        return m, z


# ------------------------------------------------------------------ weights


def port(net):
    def side_by_side(linears, *shape):
        """Several torch layers as one with axes (in, which, *shape)."""
        new = {"kernel": np.stack([l.weight.detach().numpy().T.reshape(-1, *shape) for l in linears], axis=1)}
        if linears[0].bias is not None:
            new["bias"] = np.stack([l.bias.detach().numpy().reshape(shape) for l in linears])
        return new

    def lin(l, inward=(-1,), outward=(-1,)):
        new = {"kernel": l.weight.detach().numpy().T.reshape(*inward, *outward)}
        if l.bias is not None:
            new["bias"] = l.bias.detach().numpy().reshape(outward)
        return new

    def norm(l):
        return {"scale": l.weight.detach().numpy(), "bias": l.bias.detach().numpy()}

    def mlp(t):
        return {"norm": norm(t.layer_norm), "up": lin(t.linear_1, (t.linear_1.in_features,)),
                "down": lin(t.linear_2, (t.linear_2.in_features,))}

    def triangle(t):
        return {"norm": norm(t.layer_norm_in), "norm_out": norm(t.layer_norm_out),
                "values": side_by_side([t.linear_a_p, t.linear_b_p], C_MUL),
                "gates": side_by_side([t.linear_a_g, t.linear_b_g], C_MUL),
                "out": lin(t.linear_z, (C_MUL,)), "gate_out": lin(t.linear_g, (C_Z,))}

    e = net.evoformer
    r, o = e.msa_att_row, e.outer_product_mean
    tree = {
        "again_msa": norm(net.recycling_embedder.layer_norm_m), "again_pair": norm(net.recycling_embedder.layer_norm_z),
        "block": {
            "rows": {"norm": norm(r.layer_norm_m), "pair_norm": norm(r.layer_norm_z), "pair_bias": lin(r.linear_z, (C_Z,)),
                     "qkv": side_by_side([r.linear_q, r.linear_k, r.linear_v], HEADS, C_HEAD),
                     "gate": lin(r.linear_g, (C_M,), (HEADS, C_HEAD)), "merge": lin(r.linear_o, (HEADS, C_HEAD))},
            "msa_mlp": mlp(e.msa_transition), "pair_mlp": mlp(e.pair_transition),
            "outer": {"norm": norm(o.layer_norm), "sides": side_by_side([o.linear_1, o.linear_2], C_OPM),
                      "out": lin(o.linear_out, (C_OPM, C_OPM))},
            "outgoing": triangle(e.tri_mul_out), "incoming": triangle(e.tri_mul_in)}}
    return {"params": jax.tree.map(jnp.asarray, tree)}


def build(seed):
    torch.manual_seed(seed)
    net = Recycled().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "norm" in name and name.endswith("weight"):
                p.copy_(0.6 + torch.rand(p.shape))
            else:
                p.copy_(torch.randn(p.shape) * (0.3 if p.ndim == 1 else 1.2 / math.sqrt(p.shape[1])))
    rng = np.random.default_rng(seed)
    msa = rng.standard_normal((SEQS, RES, C_M)).astype(np.float32)
    pair = rng.standard_normal((RES, RES, C_Z)).astype(np.float32)
    msa_mask, pair_mask = rng.random((SEQS, RES)) < 0.75, rng.random((RES, RES)) < 0.8
    msa_mask[:, 1] = True
    return {"torch": net, "flax": (Trunk(), port(net)), "inputs": (msa, pair, msa_mask, pair_mask)}


FAULTS = [
    {"title": "the outer product is divided by the number of sequences, not by the number of seen pairs",
     "edits": [("return out / (both + 1e-3)", "return out / (msa.shape[0] + 1e-3)")],
     "layers": ["evoformer.outer_product_mean"],
     "between": ("evoformer.outer_product_mean.linear_out", "evoformer.tri_mul_out"),
     "causes": ["mask", "operand", "scale"], "level": "outputs"},
    {"title": "the incoming triangle multiplication has its two operands exchanged, so that its result is transposed",
     "edits": [('Triangle("kic,kjc->ijc", name="incoming")', 'Triangle("kjc,kic->ijc", name="incoming")')],
     "layers": ["evoformer.tri_mul_in"],
     "between": ("evoformer.tri_mul_in.linear_b_p", "evoformer.tri_mul_in.layer_norm_out"),
     "causes": ["transposed", "operand", "swapped"], "level": "outputs"},
    {"title": "the output gate of the triangle multiplication is computed from the pair before its norm",
     "edits": [('return y * nn.sigmoid(nn.Dense(C_Z, name="gate_out")(x))', 'return y * nn.sigmoid(nn.Dense(C_Z, name="gate_out")(pair))')],
     "layers": ["evoformer.tri_mul_out", "evoformer.tri_mul_in", "evoformer.tri_mul_out.linear_g", "evoformer.tri_mul_in.linear_g"],
     "between": ("evoformer.tri_mul_out.linear_z", "evoformer.tri_mul_in"),
     "causes": ["operand", "norm_order", "left_out"], "level": "outputs"},
    {"title": "the bias from the pairs is added before the logits are scaled, and so is scaled too",
     "edits": [('q, k) / math.sqrt(C_HEAD) + jnp.moveaxis(bias, -1, 0)', 'q, k) + jnp.moveaxis(bias, -1, 0)\n        logits = logits / math.sqrt(C_HEAD)')],
     "layers": ["evoformer.msa_att_row"],
     "between": ("evoformer.msa_att_row.linear_v", "evoformer.msa_att_row.linear_o"),
     "causes": ["order", "scale"], "level": "outputs"},
    {"title": "the gradient goes back through the recycled values into the earlier pass",
     "edits": [("first, again = jax.lax.stop_gradient((m[0], z))", "first, again = m[0], z")],
     "layers": ["", "recycling_embedder"],
     "between": ("evoformer", "recycling_embedder"),
     "causes": ["stop_gradient"], "level": "gradients"},
]
