"""Set Transformer (induced attention, masks, pooling by attention) with a batch-normed input, and an NNX port."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

DIM_IN, DIM, HEADS, INDUCED, SEEDS, DIM_OUT = 5, 12, 3, 4, 2, 6


# ------------------------------------------------------------------ PyTorch


class MAB(torch.nn.Module):
    def __init__(self, dim_Q, dim_K, dim_V, num_heads):
        super().__init__()
        self.dim_V, self.num_heads = dim_V, num_heads
        self.fc_q = torch.nn.Linear(dim_Q, dim_V)
        self.fc_k = torch.nn.Linear(dim_K, dim_V)
        self.fc_v = torch.nn.Linear(dim_K, dim_V)
        self.ln0 = torch.nn.LayerNorm(dim_V)
        self.ln1 = torch.nn.LayerNorm(dim_V)
        self.fc_o = torch.nn.Linear(dim_V, dim_V)

    def forward(self, Q, K, mask=None):
        Q = self.fc_q(Q)
        K, V = self.fc_k(K), self.fc_v(K)
        dim_split = self.dim_V // self.num_heads
        Q_ = torch.cat(Q.split(dim_split, 2), 0)
        K_ = torch.cat(K.split(dim_split, 2), 0)
        V_ = torch.cat(V.split(dim_split, 2), 0)
        A = Q_.bmm(K_.transpose(1, 2)) / math.sqrt(self.dim_V)
        if mask is not None:
            A = A.masked_fill(~mask.repeat(self.num_heads, 1)[:, None, :], float("-inf"))
        A = torch.softmax(A, 2)
        O = torch.cat((Q_ + A.bmm(V_)).split(Q.size(0), 0), 2)
        O = self.ln0(O)
        O = O + torch.relu(self.fc_o(O))
        return self.ln1(O)


class SAB(torch.nn.Module):
    def __init__(self, dim_in, dim_out, num_heads):
        super().__init__()
        self.mab = MAB(dim_in, dim_in, dim_out, num_heads)

    def forward(self, X):
        return self.mab(X, X)


class ISAB(torch.nn.Module):
    def __init__(self, dim_in, dim_out, num_heads, num_inds):
        super().__init__()
        self.I = torch.nn.Parameter(torch.empty(1, num_inds, dim_out))
        self.mab0 = MAB(dim_out, dim_in, dim_out, num_heads)
        self.mab1 = MAB(dim_in, dim_out, dim_out, num_heads)

    def forward(self, X, mask):
        H = self.mab0(self.I.repeat(X.size(0), 1, 1), X, mask)
        return self.mab1(X, H)


class PMA(torch.nn.Module):
    def __init__(self, dim, num_heads, num_seeds):
        super().__init__()
        self.S = torch.nn.Parameter(torch.empty(1, num_seeds, dim))
        self.mab = MAB(dim, dim, dim, num_heads)

    def forward(self, X, mask):
        return self.mab(self.S.repeat(X.size(0), 1, 1), X, mask)


class SetTransformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.input_norm = torch.nn.BatchNorm1d(DIM_IN)
        self.enc1 = ISAB(DIM_IN, DIM, HEADS, INDUCED)
        self.enc2 = ISAB(DIM, DIM, HEADS, INDUCED)
        self.pool = PMA(DIM, HEADS, SEEDS)
        self.dec = SAB(DIM, DIM, HEADS)
        self.out = torch.nn.Linear(DIM, DIM_OUT)

    def forward(self, X, mask):
        X = self.input_norm(X.transpose(1, 2)).transpose(1, 2)
        X = self.enc2(self.enc1(X, mask), mask)
        return self.out(self.dec(self.pool(X, mask)))


# ------------------------------------------------------------------ Flax


class Whiten(nnx.Module):
    """Batch norm over all points of all sets, with torch's running statistics."""

    def __init__(self, width):
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(width)), nnx.BatchStat(jnp.ones(width))
        self.use_running_average = False
        self.momentum = 0.9

    def __call__(self, x):
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            points = x.reshape(-1, x.shape[-1])
            mean, var = points.mean(0), points.var(0)
            news = [(self.mean, mean), (self.var, points.var(0, ddof=1))]
            for old, new in news:
                old[...] = self.momentum * old[...] + (1 - self.momentum) * jax.lax.stop_gradient(new)
        return (x - mean) / jnp.sqrt(var + 1e-5) * self.scale[...] + self.bias[...]


class Attend(nnx.Module):
    """Queries look at a set: attention, a residual of the projected query, a rectified layer."""

    def __init__(self, query_dim, key_dim, rngs):
        self.query = nnx.Linear(query_dim, DIM, rngs=rngs)
        self.key_value = nnx.Linear(key_dim, 2 * DIM, rngs=rngs)
        self.dense = nnx.Linear(DIM, DIM, rngs=rngs)
        self.norm_in = nnx.LayerNorm(DIM, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.norm_out = nnx.LayerNorm(DIM, epsilon=1e-5, use_fast_variance=False, rngs=rngs)

    def __call__(self, query, points, keep=None):
        def heads(x):
            return x.reshape(*x.shape[:-1], HEADS, DIM // HEADS)

        q = self.query(query)
        k, v = jnp.split(self.key_value(points), 2, axis=-1)
        # the authors divide by the root of the whole width, not of a head's
        logits = jnp.einsum("bqhd,bkhd->bhqk", heads(q), heads(k)) / math.sqrt(DIM)
        if keep is not None:
            logits = jnp.where(keep[:, None, None, :], logits, -jnp.inf)
        seen = jnp.einsum("bhqk,bkhd->bqhd", nnx.softmax(logits, axis=-1), heads(v))
        total = q + seen.reshape(q.shape)
        x = self.norm_in(total)
        x = x + nnx.relu(self.dense(x))
        return self.norm_out(x)


class Induced(nnx.Module):
    def __init__(self, fan_in, rngs):
        self.anchors = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (INDUCED, DIM)))
        self.gather = Attend(DIM, fan_in, rngs)
        self.spread = Attend(fan_in, DIM, rngs)

    def __call__(self, points, keep):
        anchors = jnp.broadcast_to(self.anchors[...], (points.shape[0], INDUCED, DIM))
        return self.spread(points, self.gather(anchors, points, keep))


class SetEncoder(nnx.Module):
    def __init__(self, rngs):
        self.whiten = Whiten(DIM_IN)
        self.stages = nnx.List([Induced(DIM_IN, rngs), Induced(DIM, rngs)])
        self.seeds = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (SEEDS, DIM)))
        self.pooling = Attend(DIM, DIM, rngs)
        self.mixing = Attend(DIM, DIM, rngs)
        self.head = nnx.Linear(DIM, DIM_OUT, rngs=rngs)

    def __call__(self, points, keep):
        x = self.whiten(points)
        for stage in self.stages:
            x = stage(x, keep)
        seeds = jnp.broadcast_to(self.seeds[...], (x.shape[0], SEEDS, DIM))
        pooled = self.pooling(seeds, x, keep)
        return self.head(self.mixing(pooled, pooled))


# ------------------------------------------------------------------ weights


def port(net):
    new = SetEncoder(nnx.Rngs(0))

    def put(variable, *tensors, transpose=False):
        array = np.concatenate([t.detach().numpy() for t in tensors])
        variable.set_value(jnp.asarray(array.T if transpose else array))

    def linear(mine, *theirs):
        put(mine.kernel, *[t.weight for t in theirs], transpose=True)
        put(mine.bias, *[t.bias for t in theirs])

    def norm(mine, theirs):
        put(mine.scale, theirs.weight)
        put(mine.bias, theirs.bias)

    def attend(mine, mab):
        linear(mine.query, mab.fc_q)
        linear(mine.key_value, mab.fc_k, mab.fc_v)
        linear(mine.dense, mab.fc_o)
        norm(mine.norm_in, mab.ln0)
        norm(mine.norm_out, mab.ln1)

    norm(new.whiten, net.input_norm)
    put(new.whiten.mean, net.input_norm.running_mean)
    put(new.whiten.var, net.input_norm.running_var)
    for stage, isab in zip(new.stages, (net.enc1, net.enc2)):
        put(stage.anchors, isab.I[0])
        attend(stage.gather, isab.mab0)
        attend(stage.spread, isab.mab1)
    put(new.seeds, net.pool.S[0])
    attend(new.pooling, net.pool.mab)
    attend(new.mixing, net.dec.mab)
    linear(new.head, net.out)
    new.eval()
    return new


def build(seed):
    torch.manual_seed(seed)
    net = SetTransformer().eval()
    with torch.no_grad():
        for name, p in [*net.named_parameters(), *net.named_buffers()]:
            if "running_var" in name or ("ln" in name or "norm" in name) and name.endswith("weight"):
                p.copy_(0.6 + torch.rand(p.shape))
            elif p.is_floating_point():
                p.copy_(torch.randn(p.shape) * (0.4 if p.ndim == 1 else 1.0 if p.ndim == 3 else 1.4 / math.sqrt(p.shape[1])))
    rng = np.random.default_rng(seed)
    mask = np.ones((3, 7), bool)
    mask[0, 5:] = False
    mask[2, 3:] = False
    return {"torch": net, "flax": port(net), "inputs": ((rng.standard_normal((3, 7, DIM_IN)) * 1.3 + 0.4).astype(np.float32), mask)}


MABS = ["enc1.mab0", "enc1.mab1", "enc2.mab0", "enc2.mab1", "pool.mab", "dec.mab"]

FAULTS = [
    {"title": "the logits are divided by the root of a head's width, not of the whole width",
     "edits": [("heads(k)) / math.sqrt(DIM)", "heads(k)) / math.sqrt(DIM // HEADS)")],
     "layers": MABS,
     "between": ("enc1.mab0.fc_v", "enc1.mab0.ln0"),
     "causes": ["scale", "constant"], "level": "outputs"},
    {"title": "the residual of the rectified layer is the value before the norm",
     "edits": [("x = x + nnx.relu(self.dense(x))", "x = total + nnx.relu(self.dense(x))")],
     "layers": MABS,
     "between": ("enc1.mab0.fc_o", "enc1.mab0.ln1"),
     "causes": ["residual", "operand", "norm_order"], "level": "outputs"},
    {"title": "the pooling attends to the padded points as well",
     "edits": [("pooled = self.pooling(seeds, x, keep)", "pooled = self.pooling(seeds, x)")],
     "layers": ["pool", "pool.mab"],
     "between": ("enc2", "pool.mab.ln0"),
     "causes": ["mask", "left_out"], "level": "outputs"},
    {"title": "the weights of the second norm of each attention block are not loaded",
     "edits": [("        norm(mine.norm_out, mab.ln1)\n", "")],
     "layers": [m + ".ln1" for m in MABS],
     "between": ("enc1.mab0.fc_o", "enc1.mab1"),
     "causes": ["default", "values"], "level": "bits"},
    {"title": "the running statistics take nine tenths of the batch: torch's momentum under the other convention",
     "edits": [("self.momentum = 0.9", "self.momentum = 0.1")],
     "layers": ["input_norm"],
     "between": None,
     "causes": ["momentum", "constant", "training_attribute"], "level": "training"},
]
