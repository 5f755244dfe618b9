"""GraphSAGE over edge lists: mean aggregation, unit-length features, batch norm and dropout between, jumping sum, link scores."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn


class SAGEConv(nn.Module):
    def __init__(self, din, dout, normalize=True):
        super().__init__()
        self.lin_l = nn.Linear(din, dout)
        self.lin_r = nn.Linear(din, dout, bias=False)
        self.normalize = normalize

    def forward(self, x, edge_index):
        src, dst = edge_index
        total = x.new_zeros(x.shape).index_add_(0, dst, x[src])
        count = x.new_zeros(len(x)).index_add_(0, dst, torch.ones_like(dst).to(x.dtype))
        out = self.lin_l(total / count.clamp(min=1)[:, None]) + self.lin_r(x)
        return F.normalize(out, p=2, dim=-1) if self.normalize else out


class GraphSAGE(nn.Module):
    def __init__(self, din=6, hidden=8, layers=3, dropout=0.25):
        super().__init__()
        self.convs = nn.ModuleList([SAGEConv(din if i == 0 else hidden, hidden, i < layers - 1) for i in range(layers)])
        self.bns = nn.ModuleList([nn.BatchNorm1d(hidden) for _ in range(layers - 1)])
        self.dropout = nn.Dropout(dropout)
        self.jump = nn.Linear(2 * hidden, hidden)
        self.prelu = nn.PReLU()

    def forward(self, x, edge_index, pairs):
        kept = []
        for conv, bn in zip(self.convs, self.bns):
            x = self.dropout(self.prelu(bn(conv(x, edge_index))))
            kept.append(x)
        z = self.convs[-1](x, edge_index) + self.jump(torch.cat(kept, dim=-1))
        return z, (z[pairs[0]] * z[pairs[1]]).sum(-1)


# ---- nnx port ----


def neighbour_mean(x, senders, receivers):
    n = x.shape[0]
    total = jax.ops.segment_sum(x[senders], receivers, num_segments=n)
    degree = jax.ops.segment_sum(jnp.ones(senders.shape, x.dtype), receivers, num_segments=n)
    return total / jnp.maximum(degree, 1)[:, None]


class Sage(nnx.Module):
    def __init__(self, din, dout, unit, rngs):
        self.neigh = nnx.Linear(din, dout, rngs=rngs)
        self.self_ = nnx.Linear(din, dout, use_bias=False, rngs=rngs)
        self.unit = unit

    def __call__(self, x, senders, receivers):
        h = self.neigh(neighbour_mean(x, senders, receivers)) + self.self_(x)
        if self.unit:
            h = h / jnp.maximum(jnp.linalg.norm(h, axis=-1, keepdims=True), 1e-12)
        return h


class TorchBatchNorm(nnx.Module):
    """Remembers the unbiased variance, as torch does."""

    def __init__(self, d):
        self.scale, self.bias = nnx.Param(jnp.ones((d,))), nnx.Param(jnp.zeros((d,)))
        self.mean, self.var = nnx.BatchStat(jnp.zeros((d,))), nnx.BatchStat(jnp.ones((d,)))
        self.use_running_average = False

    def __call__(self, x):
        mean, var = self.mean[...], self.var[...]
        if not self.use_running_average:
            mean, var = x.mean(0), x.var(0)
            bessel = x.shape[0] / (x.shape[0] - 1)
            self.mean[...] = 0.9 * self.mean[...] + 0.1 * jax.lax.stop_gradient(mean)
            self.var[...] = 0.9 * self.var[...] + 0.1 * bessel * jax.lax.stop_gradient(var)
        return (x - mean) / jnp.sqrt(var + 1e-5) * self.scale[...] + self.bias[...]


class SageNet(nnx.Module):
    def __init__(self, din=6, hidden=8, *, rngs):
        self.layers = nnx.List([Sage(din, hidden, True, rngs), Sage(hidden, hidden, True, rngs)])
        self.norms = nnx.List([TorchBatchNorm(hidden), TorchBatchNorm(hidden)])
        self.last = Sage(hidden, hidden, False, rngs)
        self.drop = nnx.Dropout(0.25, rngs=rngs)
        self.jump = nnx.Linear(2 * hidden, hidden, rngs=rngs)
        self.slope = nnx.Param(jnp.full((1,), 0.25))

    def __call__(self, x, edge_index, pairs):
        senders, receivers = edge_index
        kept = []
        for layer, norm in zip(self.layers, self.norms):
            x = norm(layer(x, senders, receivers))
            x = self.drop(jnp.where(x >= 0, x, self.slope[...] * x))
            kept.append(x)
        z = self.last(x, senders, receivers) + self.jump(jnp.concatenate(kept, axis=-1))
        return z, jnp.sum(z[pairs[0]] * z[pairs[1]], axis=-1)


def load(net, model):
    a = lambda t: jnp.asarray(t.detach().numpy())
    for dst, src in zip((*model.layers, model.last), net.convs):
        dst.neigh.kernel[...], dst.neigh.bias[...] = a(src.lin_l.weight).T, a(src.lin_l.bias)
        dst.self_.kernel[...] = a(src.lin_r.weight).T
    for dst, src in zip(model.norms, net.bns):
        dst.scale[...], dst.bias[...] = a(src.weight), a(src.bias)
        dst.mean[...], dst.var[...] = a(src.running_mean), a(src.running_var)
    model.jump.kernel[...], model.jump.bias[...] = a(net.jump.weight).T, a(net.jump.bias)
    model.slope[...] = a(net.prelu.weight)


def build(seed):
    torch.manual_seed(seed)
    net = GraphSAGE().eval()
    for n, p in net.named_parameters():
        if not n.startswith("prelu"):
            p.data.uniform_(0.6, 1.4) if p.dim() == 1 and n.endswith("weight") else p.data.normal_(0, 0.6)
    for n, b in net.named_buffers():
        if b.is_floating_point():
            b.uniform_(0.1, 0.6) if n.endswith("var") else b.normal_(0, 0.2)
    model = SageNet(rngs=nnx.Rngs(seed))
    load(net, model)
    model.eval()
    rng = np.random.default_rng(seed)
    edges = np.stack([rng.integers(0, 12, 26), rng.integers(0, 10, 26)])
    x = rng.normal(size=(12, 6)).astype(np.float32)
    return {"torch": net, "flax": model, "inputs": (x, edges, rng.integers(0, 12, (2, 9)))}


FAULTS = [
    {
        "title": "degree counted over the senders",
        "edits": [("jax.ops.segment_sum(jnp.ones(senders.shape, x.dtype), receivers, num_segments=n)", "jax.ops.segment_sum(jnp.ones(senders.shape, x.dtype), senders, num_segments=n)")],
        "layers": ["convs.0"],
        "between": (None, "convs.0.lin_l"),
        "causes": ["operand", "axis"],
        "level": "outputs",
    },
    {
        "title": "bias and both projections, but the unit length taken of the neighbours' part only",
        "edits": [("        h = self.neigh(neighbour_mean(x, senders, receivers)) + self.self_(x)\n", "        h = self.neigh(neighbour_mean(x, senders, receivers))\n"),
                  ("        return h\n", "        return h + self.self_(x)\n")],
        "layers": ["convs.0"],
        "between": ("convs.0.lin_l", "bns.0"),
        "causes": ["order", "wiring"],
        "level": "outputs",
    },
    {
        "title": "running variance kept biased",
        "edits": [("bessel = x.shape[0] / (x.shape[0] - 1)", "bessel = 1.0")],
        "layers": ["bns.0"],
        "causes": ["unbiased_variance"],
        "level": "training",
    },
    {
        "title": "keep probability handed to nnx.Dropout, which takes the rate",
        "edits": [("nnx.Dropout(0.25, rngs=rngs)", "nnx.Dropout(0.75, rngs=rngs)")],
        "layers": ["dropout"],
        "causes": ["dropout"],
        "level": "training",
    },
    {
        "title": "the norm's flag has a name that model.train() does not know: running statistics in training too",
        "edits": [("        self.use_running_average = False\n", "        self.frozen = True\n"), ("if not self.use_running_average:", "if not self.frozen:")],
        "layers": ["bns.0"],
        "causes": ["batch_statistics", "training_attribute"],
        "level": "training",
    },
]
