"""Decoder with a capacity-limited top-2 mixture of experts and a mixture-of-depths block (nnx, einsum dispatch)."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx


class CausalSelfAttention(torch.nn.Module):
    def __init__(self, dim, n_head):
        super().__init__()
        self.n_head = n_head
        self.c_attn = torch.nn.Linear(dim, 3 * dim)
        self.c_proj = torch.nn.Linear(dim, dim)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for y in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(~torch.tril(torch.ones(T, T, dtype=torch.bool)), float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class Expert(torch.nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.w1 = torch.nn.Linear(dim, inner, bias=False)
        self.w3 = torch.nn.Linear(dim, inner, bias=False)
        self.w2 = torch.nn.Linear(inner, dim, bias=False)

    def forward(self, x):
        gate, up = self.w1(x), self.w3(x)
        return self.w2(F.silu(gate) * up)


class SparseMoE(torch.nn.Module):
    def __init__(self, dim, inner, num_experts, top_k, capacity_factor):
        super().__init__()
        self.num_experts, self.top_k, self.capacity_factor = num_experts, top_k, capacity_factor
        self.router = torch.nn.Linear(dim, num_experts, bias=False)
        self.experts = torch.nn.ModuleList([Expert(dim, inner) for _ in range(num_experts)])

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        n = flat.shape[0]
        logits = self.router(flat)
        probs = logits.softmax(-1)
        gates, chosen = probs.topk(self.top_k, dim=-1)
        gates = gates / gates.sum(-1, keepdim=True)
        density = F.one_hot(chosen[:, 0], self.num_experts).to(probs.dtype).mean(0)
        aux = self.num_experts * (density * probs.mean(0)).sum()
        z = torch.logsumexp(logits, dim=-1).square().mean()

        capacity = int(self.capacity_factor * self.top_k * n / self.num_experts)
        one_hot = F.one_hot(chosen.T.reshape(-1), self.num_experts)  # all first choices, then all second ones
        place = (one_hot.cumsum(0) * one_hot).sum(-1) - 1
        kept = (place < capacity).view(self.top_k, n).T
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            rows, choice = torch.where((chosen == e) & kept)
            out = out.index_add(0, rows, gates[rows, choice][:, None] * expert(flat[rows]))
        return out.view_as(x), aux, z


class MoEBlock(torch.nn.Module):
    def __init__(self, dim, n_head, inner, num_experts, top_k, capacity_factor):
        super().__init__()
        self.ln_1 = torch.nn.LayerNorm(dim)
        self.attn = CausalSelfAttention(dim, n_head)
        self.ln_2 = torch.nn.LayerNorm(dim)
        self.moe = SparseMoE(dim, inner, num_experts, top_k, capacity_factor)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        y, aux, z = self.moe(self.ln_2(x))
        return x + y, aux, z


class MoDBlock(torch.nn.Module):
    """Only the `keep` best tokens of a sequence go through attention and MLP."""

    def __init__(self, dim, n_head, keep, dropout):
        super().__init__()
        self.keep = keep
        self.router = torch.nn.Linear(dim, 1)
        self.ln = torch.nn.LayerNorm(dim)
        self.attn = CausalSelfAttention(dim, n_head)
        self.ln_mlp = torch.nn.LayerNorm(dim)
        self.fc = torch.nn.Linear(dim, 3 * dim)
        self.proj = torch.nn.Linear(3 * dim, dim)
        self.drop = torch.nn.Dropout(dropout)

    def forward(self, x):
        weights = self.router(x).squeeze(-1)
        top, index = torch.topk(weights, self.keep, dim=1)
        index, perm = torch.sort(index, dim=1)
        top = torch.gather(top, 1, perm)
        gather = index[..., None].expand(-1, -1, x.shape[-1])
        sub = torch.gather(x, 1, gather)
        a = self.attn(self.ln(sub))
        h = a + self.drop(self.proj(F.relu(self.fc(self.ln_mlp(sub + a))).square()))
        return x.scatter_add(1, gather, torch.sigmoid(top)[..., None] * h)


class RoutedGPT(torch.nn.Module):
    def __init__(self, vocab=23, ctx=9, dim=12, n_head=2, inner=10, num_experts=4, top_k=2, capacity_factor=0.75, keep=5, dropout=0.1):
        super().__init__()
        self.wte = torch.nn.Embedding(vocab, dim)
        self.wpe = torch.nn.Embedding(ctx, dim)
        self.moe_block = MoEBlock(dim, n_head, inner, num_experts, top_k, capacity_factor)
        self.mod_block = MoDBlock(dim, n_head, keep, dropout)
        self.ln_f = torch.nn.LayerNorm(dim)
        self.lm_head = torch.nn.Linear(dim, vocab, bias=False)

    def forward(self, idx):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        x, aux, z = self.moe_block(x)
        x = self.mod_block(x)
        return self.lm_head(self.ln_f(x)), aux, z


# ---------------------------------------------------------------- Flax


class Attention(nnx.Module):
    def __init__(self, dim, n_head, *, rngs):
        self.n_head = n_head
        self.qkv = nnx.Linear(dim, 3 * dim, rngs=rngs)
        self.out = nnx.Linear(dim, dim, rngs=rngs)

    def __call__(self, x):
        b, s, d = x.shape
        qkv = self.qkv(x).reshape(b, s, 3, self.n_head, d // self.n_head)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        att = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(d // self.n_head)
        att = jnp.where(jnp.tril(jnp.ones((s, s), dtype=bool)), att, -jnp.inf)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(att, axis=-1), v)
        return self.out(y.reshape(b, s, d))


class FlaxMoE(nnx.Module):
    def __init__(self, dim, inner, num_experts, top_k, capacity_factor, *, rngs):
        self.num_experts, self.top_k, self.capacity_factor = num_experts, top_k, capacity_factor
        self.gate = nnx.Linear(dim, num_experts, use_bias=False, rngs=rngs)
        init = nnx.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)
        self.wi = nnx.Param(init(rngs.params(), (num_experts, dim, 2 * inner)))
        self.wo = nnx.Param(init(rngs.params(), (num_experts, inner, dim)))

    def __call__(self, x):
        flat = x.reshape(-1, x.shape[-1])
        n = flat.shape[0]
        logits = self.gate(flat)
        probs = jax.nn.softmax(logits, axis=-1)
        gates, chosen = jax.lax.top_k(probs, self.top_k)
        gates = gates / gates.sum(axis=-1, keepdims=True)

        density = jax.nn.one_hot(chosen[:, 0], self.num_experts, dtype=probs.dtype).mean(axis=0)
        aux = jnp.sum(density * probs.mean(axis=0)) * self.num_experts
        z = jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)

        capacity = int(self.capacity_factor * self.top_k * n / self.num_experts)
        expert = jax.nn.one_hot(chosen, self.num_experts, dtype=jnp.int32)  # [N, K, E]
        ranked = expert.transpose(1, 0, 2).reshape(-1, self.num_experts)
        place = jnp.cumsum(ranked, axis=0) - 1
        place = place.reshape(self.top_k, n, self.num_experts).transpose(1, 0, 2)
        slot = jnp.sum(place * expert, axis=-1)
        slots = jax.nn.one_hot(slot, capacity, dtype=flat.dtype)  # zeros from capacity on
        dispatch = jnp.einsum("nke,nkc->nkec", expert.astype(flat.dtype), slots)
        combine = jnp.einsum("nk,nkec->nec", gates, dispatch)

        inputs = jnp.einsum("nkec,nd->ecd", dispatch, flat)
        gate, up = jnp.split(jnp.einsum("ecd,edf->ecf", inputs, self.wi[...]), 2, axis=-1)
        outputs = jnp.einsum("ecf,efd->ecd", jax.nn.silu(gate) * up, self.wo[...])
        return jnp.einsum("nec,ecd->nd", combine, outputs).reshape(x.shape), aux, z


class FlaxMoD(nnx.Module):
    def __init__(self, dim, n_head, keep, dropout, *, rngs):
        self.keep = keep
        self.router = nnx.Linear(dim, 1, rngs=rngs)
        self.norm1 = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.attn = Attention(dim, n_head, rngs=rngs)
        self.norm2 = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.up = nnx.Linear(dim, 3 * dim, rngs=rngs)
        self.down = nnx.Linear(3 * dim, dim, rngs=rngs)
        self.dropout = nnx.Dropout(rate=dropout, rngs=rngs)

    def __call__(self, x):
        scores = self.router(x)[..., 0]
        _, index = jax.lax.top_k(scores, self.keep)
        index = jnp.sort(index, axis=1)
        top = jnp.take_along_axis(scores, index, axis=1)
        sub = jnp.take_along_axis(x, index[..., None], axis=1)
        a = self.attn(self.norm1(sub))
        h = self.up(self.norm2(sub + a))
        h = a + self.dropout(self.down(jnp.square(jax.nn.relu(h))))
        weight = jax.nn.sigmoid(top)[..., None]
        rows = jnp.arange(x.shape[0])[:, None]
        return x.at[rows, index].add(weight * h)


class FlaxRoutedGPT(nnx.Module):
    def __init__(self, vocab=23, ctx=9, dim=12, n_head=2, inner=10, num_experts=4, top_k=2, capacity_factor=0.75, keep=5, dropout=0.1, *, rngs):
        self.tok = nnx.Param(jax.random.normal(rngs.params(), (vocab, dim)))
        self.pos = nnx.Param(jax.random.normal(rngs.params(), (ctx, dim)))
        self.norm_attn = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.attn = Attention(dim, n_head, rngs=rngs)
        self.norm_moe = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.moe = FlaxMoE(dim, inner, num_experts, top_k, capacity_factor, rngs=rngs)
        self.mod = FlaxMoD(dim, n_head, keep, dropout, rngs=rngs)
        self.norm_f = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(dim, vocab, use_bias=False, rngs=rngs)

    def __call__(self, idx):
        x = self.tok[...][idx] + self.pos[...][: idx.shape[1]]
        x = x + self.attn(self.norm_attn(x))
        y, aux, z = self.moe(self.norm_moe(x))
        x = self.mod(x + y)
        return self.head(self.norm_f(x)), aux, z


def port(net, model):
    t = lambda w: jnp.asarray(w.detach().numpy())

    def dense(dst, src):
        dst.kernel.set_value(t(src.weight).T)
        if src.bias is not None:
            dst.bias.set_value(t(src.bias))

    def norm(dst, src):
        dst.scale.set_value(t(src.weight))
        dst.bias.set_value(t(src.bias))

    def attention(dst, src):
        dense(dst.qkv, src.c_attn)
        dense(dst.out, src.c_proj)

    model.tok.set_value(t(net.wte.weight))
    model.pos.set_value(t(net.wpe.weight))
    block, mod = net.moe_block, net.mod_block
    norm(model.norm_attn, block.ln_1)
    attention(model.attn, block.attn)
    norm(model.norm_moe, block.ln_2)
    dense(model.moe.gate, block.moe.router)
    wi = [jnp.concatenate([t(e.w1.weight).T, t(e.w3.weight).T], axis=1) for e in block.moe.experts]
    model.moe.wi.set_value(jnp.stack(wi))
    model.moe.wo.set_value(jnp.stack([t(e.w2.weight).T for e in block.moe.experts]))
    dense(model.mod.router, mod.router)
    norm(model.mod.norm1, mod.ln)
    attention(model.mod.attn, mod.attn)
    norm(model.mod.norm2, mod.ln_mlp)
    dense(model.mod.up, mod.fc)
    dense(model.mod.down, mod.proj)
    norm(model.norm_f, net.ln_f)
    dense(model.head, net.lm_head)


def build(seed):
    torch.manual_seed(seed)
    net = RoutedGPT().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if ".ln" in name and name.endswith("weight") or name == "ln_f.weight":
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(0, 0.5)
    model = FlaxRoutedGPT(rngs=nnx.Rngs(params=seed, dropout=seed + 1))
    port(net, model)
    model.eval()
    idx = np.random.default_rng(seed).integers(0, 23, (2, 9))
    return {"torch": net, "flax": model, "inputs": idx}


FAULTS = [
    {
        "title": "places in the experts' buffers counted token by token, not first choices first",
        "edits": [
            ("ranked = expert.transpose(1, 0, 2).reshape(-1, self.num_experts)", "ranked = expert.reshape(-1, self.num_experts)"),
            ("place = place.reshape(self.top_k, n, self.num_experts).transpose(1, 0, 2)", "place = place.reshape(n, self.top_k, self.num_experts)"),
        ],
        "layers": ["moe_block.moe"],
        "between": ("moe_block.moe.router", "moe_block.moe.experts.0.w1"),
        "causes": ["rearranged", "order", "transposed"],
        "level": "outputs",
    },
    {
        "title": "place in the buffer counts from one, so slot 0 stays empty",
        "edits": [("place = jnp.cumsum(ranked, axis=0) - 1", "place = jnp.cumsum(ranked, axis=0)")],
        "layers": ["moe_block.moe"],
        "between": ("moe_block.moe.router", "moe_block.moe.experts.0.w1"),
        "causes": ["offset", "size"],
        "level": "outputs",
    },
    {
        "title": "capacity rounded up",
        "edits": [("capacity = int(self.capacity_factor * self.top_k * n / self.num_experts)\n        expert", "capacity = math.ceil(self.capacity_factor * self.top_k * n / self.num_experts)\n        expert")],
        "layers": ["moe_block.moe"],
        "between": ("moe_block.moe.router", "moe_block.moe.experts.0.w1"),
        "causes": ["size", "operation"],
        "level": "outputs",
    },
    {
        "title": "balancing loss without the number of experts",
        "edits": [("jnp.sum(density * probs.mean(axis=0)) * self.num_experts", "jnp.sum(density * probs.mean(axis=0))")],
        "layers": ["moe_block.moe"],
        "between": ("moe_block.moe.router", "moe_block.moe.experts.0.w1"),
        "causes": ["scale"],
        "level": "outputs",
    },
    {
        "title": "router's logits rounded to bfloat16",
        "edits": [("logits = self.gate(flat)", "logits = self.gate(flat).astype(jnp.bfloat16).astype(flat.dtype)")],
        "layers": ["moe_block.moe.router", "moe_block.moe"],
        "between": ("moe_block.moe.router", "moe_block.moe.experts.0.w1"),
        "causes": ["dtype"],
        "level": "outputs",
    },
    {
        "title": "experts' fused kernel holds up before gate",
        "edits": [("[t(e.w1.weight).T, t(e.w3.weight).T]", "[t(e.w3.weight).T, t(e.w1.weight).T]")],
        "layers": ["moe_block.moe.experts.0.w1", "moe_block.moe.experts.0.w3", "moe_block.moe.experts.0"],
        "causes": ["blocks", "swapped", "concat"],
        "level": "outputs",
    },
    {
        "title": "fused projection split with the heads before q, k, v",
        "edits": [
            ("reshape(b, s, 3, self.n_head, d // self.n_head)", "reshape(b, s, self.n_head, 3, d // self.n_head)"),
            ("jnp.moveaxis(qkv, 2, 0)", "jnp.moveaxis(qkv, 3, 0)"),
        ],
        "layers": ["moe_block.attn", "moe_block.attn.c_attn"],
        "between": ("moe_block.attn.c_attn", "moe_block.attn.c_proj"),
        "causes": ["heads", "blocks", "rearranged"],
        "level": "outputs",
    },
    {
        "title": "chosen tokens stay in the order of their scores under the causal mask",
        "edits": [("        index = jnp.sort(index, axis=1)\n", "")],
        "layers": ["mod_block"],
        "between": ("mod_block.router", "mod_block.ln"),
        "causes": ["left_out", "order", "causal"],
        "level": "outputs",
    },
    {
        "title": "chosen tokens overwritten by the block's output instead of added to",
        "edits": [("x.at[rows, index].add(weight * h)", "x.at[rows, index].set(weight * h)")],
        "layers": ["mod_block"],
        "between": ("mod_block.proj", "ln_f"),
        "causes": ["residual", "operation"],
        "level": "outputs",
    },
    {
        "title": "block's output weighted by the raw router score",
        "edits": [("weight = jax.nn.sigmoid(top)[..., None]", "weight = top[..., None]")],
        "layers": ["mod_block"],
        "between": ("mod_block.proj", "ln_f"),
        "causes": ["activation", "left_out"],
        "level": "outputs",
    },
    {
        "title": "combine weights give the router no gradient",
        "edits": [("combine = jnp.einsum(\"nk,nkec->nec\", gates, dispatch)", "combine = jnp.einsum(\"nk,nkec->nec\", jax.lax.stop_gradient(gates), dispatch)")],
        "layers": ["moe_block.moe", "moe_block.moe.router"],
        "between": ("moe_block.moe.router", "moe_block.moe.experts.0.w1"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "dropout given the probability of keeping",
        "edits": [("nnx.Dropout(rate=dropout, rngs=rngs)", "nnx.Dropout(rate=1 - dropout, rngs=rngs)")],
        "layers": ["mod_block.drop"],
        "causes": ["training_attribute", "dropout"],
        "level": "attributes",
    },
]
