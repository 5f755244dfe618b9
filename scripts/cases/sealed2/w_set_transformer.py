"""Set Transformer: induced set attention, pooling by seeds, masked sets; the scale of the whole width."""
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F


class MAB(torch.nn.Module):
    def __init__(self, dim_q, dim_k, dim, heads):
        super().__init__()
        self.dim, self.heads = dim, heads
        self.fc_q = torch.nn.Linear(dim_q, dim)
        self.fc_k = torch.nn.Linear(dim_k, dim)
        self.fc_v = torch.nn.Linear(dim_k, dim)
        self.ln0, self.ln1 = torch.nn.LayerNorm(dim), torch.nn.LayerNorm(dim)
        self.fc_o = torch.nn.Linear(dim, dim)

    def forward(self, q, k, mask=None):
        q, k, v = self.fc_q(q), self.fc_k(k), self.fc_v(k)
        stack = lambda x: torch.cat(x.split(self.dim // self.heads, 2), 0)
        q_, k_, v_ = stack(q), stack(k), stack(v)
        a = q_ @ k_.transpose(1, 2) / self.dim ** 0.5
        if mask is not None:
            a = a.masked_fill(~mask[:, None].repeat(self.heads, 1, 1), -1e9)
        o = torch.cat((q_ + a.softmax(2) @ v_).split(q.size(0), 0), 2)
        o = self.ln0(o)
        return self.ln1(o + F.relu(self.fc_o(o)))


class ISAB(torch.nn.Module):
    def __init__(self, din, dout, heads, n_inds):
        super().__init__()
        self.I = torch.nn.Parameter(torch.randn(1, n_inds, dout))
        self.mab0 = MAB(dout, din, dout, heads)
        self.mab1 = MAB(din, dout, dout, heads)

    def forward(self, x, mask):
        h = self.mab0(self.I.repeat(x.size(0), 1, 1), x, mask)
        return self.mab1(x, h)


class PMA(torch.nn.Module):
    def __init__(self, dim, heads, seeds):
        super().__init__()
        self.S = torch.nn.Parameter(torch.randn(1, seeds, dim))
        self.fc = torch.nn.Linear(dim, dim)
        self.mab = MAB(dim, dim, dim, heads)

    def forward(self, x, mask):
        return self.mab(self.S.repeat(x.size(0), 1, 1), F.relu(self.fc(x)), mask)


class SetTransformer(torch.nn.Module):
    def __init__(self, din=3, dim=12, heads=3, inds=4, seeds=2, dout=5):
        super().__init__()
        self.enc = torch.nn.ModuleList([ISAB(din, dim, heads, inds), ISAB(dim, dim, heads, inds)])
        self.pma = PMA(dim, heads, seeds)
        self.sab = MAB(dim, dim, dim, heads)
        self.dec = torch.nn.Linear(dim, dout)

    def forward(self, x, sizes):
        mask = torch.arange(x.size(1))[None] < sizes[:, None]
        for layer in self.enc:
            x = layer(x, mask)
        x = self.pma(x, mask)
        return self.dec(self.sab(x, x))


# ~~~~~~~~~~~~~~~~ Linen ~~~~~~~~~~~~~~~~


class AttentionBlock(nn.Module):
    width: int
    heads: int

    def setup(self):
        self.q, self.k, self.v = (nn.Dense(self.width) for _ in range(3))
        self.norm_a, self.norm_b = nn.LayerNorm(epsilon=1e-5), nn.LayerNorm(epsilon=1e-5)
        self.o = nn.Dense(self.width)

    def __call__(self, x, y, mask=None):
        heads = lambda z: z.reshape(*z.shape[:2], self.heads, -1)
        q, k, v = heads(self.q(x)), heads(self.k(y)), heads(self.v(y))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * self.width ** -0.5
        if mask is not None:
            logits = jnp.where(mask[:, None, None, :], logits, -1e9)
        h = q + jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(logits), v)
        h = self.norm_a(h.reshape(*x.shape[:2], self.width))
        return self.norm_b(h + nn.relu(self.o(h)))


class Induced(nn.Module):
    width: int
    heads: int
    points: int

    @nn.compact
    def __call__(self, x, mask):
        points = self.param("points_", nn.initializers.normal(1.0), (self.points, self.width))
        points = jnp.broadcast_to(points, (x.shape[0], *points.shape))
        h = AttentionBlock(self.width, self.heads, name="gather")(points, x, mask)
        return AttentionBlock(self.width, self.heads, name="spread")(x, h)


class Pool(nn.Module):
    heads: int
    seeds: int

    @nn.compact
    def __call__(self, x, mask):
        d = x.shape[-1]
        seeds = self.param("seeds_", nn.initializers.normal(1.0), (self.seeds, d))
        y = nn.relu(nn.Dense(d, name="pre")(x))
        return AttentionBlock(d, self.heads, name="attend")(jnp.broadcast_to(seeds, (x.shape[0], *seeds.shape)), y, mask)


class FlaxSetTransformer(nn.Module):
    width: int = 12
    heads: int = 3
    points: int = 4
    seeds: int = 2
    out: int = 5

    @nn.compact
    def __call__(self, x, sizes):
        mask = jnp.arange(x.shape[1])[None, :] < sizes[:, None]
        x = Induced(self.width, self.heads, self.points, name="isab0")(x, mask)
        x = Induced(self.width, self.heads, self.points, name="isab1")(x, mask)
        x = Pool(self.heads, self.seeds, name="pool")(x, mask)
        x = AttentionBlock(self.width, self.heads, name="mix")(x, x)
        return nn.Dense(self.out, name="head")(x)


def translate(net):
    a = lambda t: jnp.asarray(t.detach().numpy())
    dense = lambda m: {"kernel": a(m.weight).T, "bias": a(m.bias)}
    norm = lambda m: {"scale": a(m.weight), "bias": a(m.bias)}

    def block(m):
        return {"q": dense(m.fc_q), "k": dense(m.fc_k), "v": dense(m.fc_v), "o": dense(m.fc_o),
                "norm_a": norm(m.ln0), "norm_b": norm(m.ln1)}

    p = {f"isab{i}": {"points_": a(m.I)[0], "gather": block(m.mab0), "spread": block(m.mab1)} for i, m in enumerate(net.enc)}
    p["pool"] = {"seeds_": a(net.pma.S)[0], "pre": dense(net.pma.fc), "attend": block(net.pma.mab)}
    return {"params": p | {"mix": block(net.sab), "head": dense(net.dec)}}


def build(seed):
    torch.manual_seed(seed)
    net = SetTransformer().eval()
    for n, p in net.named_parameters():
        p.data.uniform_(0.5, 1.5) if ".ln" in n and n.endswith("weight") else p.data.normal_(0, 0.6)
    x = np.random.default_rng(seed).normal(size=(3, 7, 3)).astype(np.float32)
    return {"torch": net, "flax": (FlaxSetTransformer(), translate(net)), "inputs": (x, np.array([7, 4, 5]))}


FAULTS = [
    {
        "title": "scores scaled by the width of a head, as usual; here it is the whole width",
        "edits": [("* self.width ** -0.5", "* (self.width // self.heads) ** -0.5")],
        "layers": ["enc.0.mab0"],
        "between": ("enc.0.mab0.fc_v", "enc.0.mab0.ln0"),
        "causes": ["scale"],
        "level": "outputs",
    },
    {
        "title": "the residual adds the query from before its projection",
        "edits": [("        h = q + jnp.einsum(\"bhqk,bkhd->bqhd\", nn.softmax(logits), v)\n        h = self.norm_a(h.reshape(*x.shape[:2], self.width))\n",
                   "        h = jnp.einsum(\"bhqk,bkhd->bqhd\", nn.softmax(logits), v).reshape(*x.shape[:2], self.width)\n        h = self.norm_a(h + x if x.shape == h.shape else h + q.reshape(h.shape))\n")],
        "layers": ["enc.0.mab0"],
        "between": ("enc.0.mab0.fc_v", "enc.0.mab0.ln0"),
        "causes": ["residual", "operand"],
        "level": "outputs",
    },
    {
        "title": "heads split with the head fastest",
        "edits": [("heads = lambda z: z.reshape(*z.shape[:2], self.heads, -1)", "heads = lambda z: z.reshape(*z.shape[:2], -1, self.heads).swapaxes(2, 3)"),
                  ("h = self.norm_a(h.reshape(*x.shape[:2], self.width))", "h = self.norm_a(h.swapaxes(2, 3).reshape(*x.shape[:2], self.width))")],
        "layers": ["enc.0.mab0"],
        "between": ("enc.0.mab0.fc_v", "enc.0.mab0.ln0"),
        "causes": ["heads", "rearranged"],
        "level": "outputs",
    },
    {
        "title": "pooling attends to the padding",
        "edits": [("(jnp.broadcast_to(seeds, (x.shape[0], *seeds.shape)), y, mask)", "(jnp.broadcast_to(seeds, (x.shape[0], *seeds.shape)), y)")],
        "layers": ["pma", "pma.mab"],
        "between": ("pma.mab.fc_v", "pma.mab.ln0"),
        "causes": ["mask", "left_out"],
        "level": "outputs",
    },
    {
        "title": "the feed-forward's ReLU outside its residual",
        "edits": [("return self.norm_b(h + nn.relu(self.o(h)))", "return self.norm_b(nn.relu(h + self.o(h)))")],
        "layers": ["enc.0.mab0"],
        "between": ("enc.0.mab0.fc_o", "enc.0.mab0.ln1"),
        "causes": ["order", "activation", "residual"],
        "level": "outputs",
    },
]
