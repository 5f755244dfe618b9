"""Message passing on molecules: a GINE layer, then a PNA layer (mean, max, std with degree scalers), a virtual node, pooled per graph."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
from flax import nnx

ATOM_DIMS = (7, 4, 3)
BOND_DIMS = (4, 3)
AVG_LOG_DEG = 1.15


def scatter(src, index, n, reduce="sum"):
    index = index.view(-1, *[1] * (src.dim() - 1)).expand_as(src)
    out = src.new_zeros(n, *src.shape[1:])
    if reduce == "sum":
        return out.scatter_add_(0, index, src)
    return out.scatter_reduce_(0, index, src, reduce="amax", include_self=False)


class CategoricalEncoder(nn.Module):
    """One table for all the features, each with its own stretch of rows."""

    def __init__(self, dims, emb_dim):
        super().__init__()
        self.emb = nn.Embedding(sum(dims), emb_dim)
        self.register_buffer("offset", torch.tensor([0, *np.cumsum(dims)[:-1].tolist()]))

    def forward(self, x):
        return self.emb(x + self.offset).sum(dim=1)


class GINEConv(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.bond_encoder = CategoricalEncoder(BOND_DIMS, dim)
        self.eps = nn.Parameter(torch.zeros(1))
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.BatchNorm1d(2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, x, edge_index, edge_attr):
        message = torch.relu(x[edge_index[0]] + self.bond_encoder(edge_attr))
        return self.mlp((1 + self.eps) * x + scatter(message, edge_index[1], x.size(0)))


class PNAConv(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.pre = nn.Linear(2 * dim, dim)
        self.post = nn.Linear(10 * dim, dim)

    def forward(self, x, edge_index, edge_attr):
        n, (src, dst) = x.size(0), edge_index
        m = self.pre(torch.cat([x[dst], x[src]], dim=-1))
        deg = scatter(torch.ones_like(m[:, :1]), dst, n)
        count = deg.clamp(min=1)
        mean = scatter(m, dst, n) / count
        std = torch.sqrt(torch.relu(scatter(m * m, dst, n) / count - mean * mean) + 1e-5)
        agg = torch.cat([mean, scatter(m, dst, n, "max"), std], dim=-1)
        log_deg = torch.log(count + 1)
        out = torch.cat([x, agg, agg * (log_deg / AVG_LOG_DEG), agg * (AVG_LOG_DEG / log_deg)], dim=-1)
        return self.post(out)


class MolNet(nn.Module):
    def __init__(self, emb_dim=12, n_tasks=5):
        super().__init__()
        self.atom_encoder = CategoricalEncoder(ATOM_DIMS, emb_dim)
        self.virtualnode = nn.Embedding(1, emb_dim)
        self.convs = nn.ModuleList([GINEConv(emb_dim), PNAConv(emb_dim)])
        self.batch_norms = nn.ModuleList([nn.BatchNorm1d(emb_dim) for _ in range(2)])
        self.mlp_virtualnode = nn.Sequential(nn.Linear(emb_dim, 20), nn.ReLU(), nn.Linear(20, emb_dim), nn.ReLU())
        self.graph_pred = nn.Linear(emb_dim, n_tasks)

    def forward(self, x, edge_index, edge_attr, batch):
        n_graphs = 3
        h = self.atom_encoder(x)
        vn = self.virtualnode(torch.zeros(n_graphs, dtype=batch.dtype))
        for layer in range(2):
            h_in = h + vn[batch]
            h = self.batch_norms[layer](self.convs[layer](h_in, edge_index, edge_attr))
            if layer == 0:
                h = torch.relu(h)
                vn = vn + self.mlp_virtualnode(scatter(h_in, batch, n_graphs) + vn)
            h = h + h_in
        size = scatter(torch.ones_like(h[:, :1]), batch, n_graphs)
        return h, self.graph_pred(scatter(h, batch, n_graphs) / size)


class FeatureEmbed(nnx.Module):
    def __init__(self, dims, features, rngs):
        self.table = nnx.Embed(sum(dims), features, rngs=rngs)
        self.dims = tuple(dims)

    def __call__(self, x):
        offset = jnp.array([sum(self.dims[:i]) for i in range(len(self.dims))])
        return jnp.sum(self.table.embedding[...][x + offset], axis=1)


class GINELayer(nnx.Module):
    def __init__(self, dim, rngs):
        self.bonds = FeatureEmbed(BOND_DIMS, dim, rngs)
        self.eps = nnx.Param(jnp.zeros(()))
        self.dense1 = nnx.Linear(dim, 2 * dim, rngs=rngs)
        self.norm = nnx.BatchNorm(2 * dim, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.dense2 = nnx.Linear(2 * dim, dim, rngs=rngs)

    def __call__(self, x, senders, receivers, edge_attr):
        message = nnx.relu(x[senders] + self.bonds(edge_attr))
        total = jax.ops.segment_sum(message, receivers, x.shape[0])
        y = (1 + self.eps[...]) * x + total
        return self.dense2(nnx.relu(self.norm(self.dense1(y))))


class PNALayer(nnx.Module):
    def __init__(self, dim, rngs):
        self.pre = nnx.Linear(2 * dim, dim, rngs=rngs)
        self.post = nnx.Linear(10 * dim, dim, rngs=rngs)

    def __call__(self, x, senders, receivers, edge_attr):
        n = x.shape[0]
        m = self.pre(jnp.concatenate([x[receivers], x[senders]], axis=-1))
        degree = jnp.maximum(jax.ops.segment_sum(jnp.ones_like(m[:, :1]), receivers, n), 1)
        mean = jax.ops.segment_sum(m, receivers, n) / degree
        square = jax.ops.segment_sum(m * m, receivers, n) / degree
        std = jnp.sqrt(nnx.relu(square - mean**2) + 1e-5)
        peak = jax.ops.segment_max(m, receivers, n)
        peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
        agg = jnp.concatenate([mean, peak, std], axis=-1)
        amplify = jnp.log(degree + 1) / AVG_LOG_DEG
        scaled = jnp.stack([agg, agg * amplify, agg / amplify], axis=1)
        return self.post(jnp.concatenate([x, scaled.reshape(n, -1)], axis=-1))


class FlaxMolNet(nnx.Module):
    def __init__(self, dim=12, n_tasks=5, *, rngs):
        self.atoms = FeatureEmbed(ATOM_DIMS, dim, rngs)
        self.virtual = nnx.Param(jnp.zeros((dim,)))
        self.conv0, self.conv1 = GINELayer(dim, rngs), PNALayer(dim, rngs)
        self.bn0 = nnx.BatchNorm(dim, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.bn1 = nnx.BatchNorm(dim, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.vn_in, self.vn_out = nnx.Linear(dim, 20, rngs=rngs), nnx.Linear(20, dim, rngs=rngs)
        self.head = nnx.Linear(dim, n_tasks, rngs=rngs)

    def __call__(self, x, edge_index, edge_attr, batch):
        senders, receivers = edge_index[0], edge_index[1]
        graphs = 3
        vn = jnp.broadcast_to(self.virtual[...], (graphs, self.virtual[...].shape[0]))
        h_in = self.atoms(x) + vn[batch]
        h = nnx.relu(self.bn0(self.conv0(h_in, senders, receivers, edge_attr)))
        pooled = jax.ops.segment_sum(h_in, batch, graphs) + vn
        vn = vn + nnx.relu(self.vn_out(nnx.relu(self.vn_in(pooled))))
        h_in = h + h_in + vn[batch]
        h = self.bn1(self.conv1(h_in, senders, receivers, edge_attr)) + h_in
        size = jax.ops.segment_sum(jnp.ones_like(h[:, :1]), batch, graphs)
        return h, self.head(jax.ops.segment_sum(h, batch, graphs) / size)


def port(net, model):
    a = lambda t: jnp.asarray(t.detach().numpy())

    def linear(dst, src):
        dst.kernel[...], dst.bias[...] = a(src.weight).T, a(src.bias)

    def norm(dst, src):
        dst.scale[...], dst.bias[...] = a(src.weight), a(src.bias)
        dst.mean[...], dst.var[...] = a(src.running_mean), a(src.running_var)

    gine, pna = net.convs
    model.atoms.table.embedding[...] = a(net.atom_encoder.emb.weight)
    model.virtual[...] = a(net.virtualnode.weight)[0]
    model.conv0.bonds.table.embedding[...] = a(gine.bond_encoder.emb.weight)
    model.conv0.eps[...] = a(gine.eps)[0]
    linear(model.conv0.dense1, gine.mlp[0])
    norm(model.conv0.norm, gine.mlp[1])
    linear(model.conv0.dense2, gine.mlp[3])
    linear(model.conv1.pre, pna.pre)
    linear(model.conv1.post, pna.post)
    norm(model.bn0, net.batch_norms[0])
    norm(model.bn1, net.batch_norms[1])
    linear(model.vn_in, net.mlp_virtualnode[0])
    linear(model.vn_out, net.mlp_virtualnode[2])
    linear(model.head, net.graph_pred)


def build(seed):
    """The right pair with random weights and inputs that follow from the seed."""
    torch.manual_seed(seed)
    net = MolNet().eval()
    for name, t in [*net.named_parameters(), *net.named_buffers()]:
        if "running_var" in name:
            t.data.uniform_(0.5, 2.0)
        elif t.is_floating_point():
            t.data.normal_(0.0, 0.5)
    model = FlaxMolNet(rngs=nnx.Rngs(seed))
    port(net, model)
    model.eval()
    rng = np.random.default_rng(seed)
    batch = np.repeat(np.arange(3), (6, 4, 3))
    x = np.stack([rng.integers(0, d, 13) for d in ATOM_DIMS], axis=1)
    starts = np.array([0, 6, 10])
    receivers = rng.integers(0, 13, 28)
    receivers[receivers == 12] = 11
    graph = batch[receivers]
    senders = starts[graph] + rng.integers(0, 100, 28) % np.array([6, 4, 3])[graph]
    edge_attr = np.stack([rng.integers(0, d, 28) for d in BOND_DIMS], axis=1)
    return {"torch": net, "flax": model, "inputs": (x, np.stack([senders, receivers]), edge_attr, batch)}


FAULTS = [
    {
        "title": "GIN's own node weighed by eps and not by 1 + eps",
        "edits": [("y = (1 + self.eps[...]) * x + total", "y = self.eps[...] * x + total")],
        "layers": ["convs.0"],
        "between": ("convs.0.bond_encoder.emb", "convs.0.mlp.0"),
        "causes": ["scale_plus_one", "scale"],
        "level": "outputs",
    },
    {
        "title": "eps is a variable and not a parameter",
        "edits": [("self.eps = nnx.Param(jnp.zeros(()))", "self.eps = nnx.Variable(jnp.zeros(()))")],
        "layers": ["convs.0"],
        "between": ("convs.0.bond_encoder.emb", "convs.0.mlp.0"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "spread of the messages over n - 1",
        "edits": [("std = jnp.sqrt(nnx.relu(square - mean**2) + 1e-5)", "std = jnp.sqrt(nnx.relu(square - mean**2) * degree / jnp.maximum(degree - 1, 1) + 1e-5)")],
        "layers": ["convs.1"],
        "between": ("convs.1.pre", "convs.1.post"),
        "causes": ["unbiased_variance"],
        "level": "outputs",
    },
    {
        "title": "degree scaler adds a tenth and not one inside the log",
        "edits": [("amplify = jnp.log(degree + 1) / AVG_LOG_DEG", "amplify = jnp.log(degree + 0.1) / AVG_LOG_DEG")],
        "layers": ["convs.1"],
        "between": ("convs.1.pre", "convs.1.post"),
        "causes": ["constant"],
        "level": "outputs",
    },
    {
        "title": "largest message clipped from below at the zeros it starts from",
        "edits": [("peak = jnp.where(jnp.isfinite(peak), peak, 0.0)", "peak = jnp.maximum(peak, 0.0)")],
        "layers": ["convs.1"],
        "between": ("convs.1.pre", "convs.1.post"),
        "causes": ["operation", "left_out"],
        "level": "outputs",
    },
    {
        "title": "categorical features all count from row 0",
        "edits": [("self.table.embedding[...][x + offset]", "self.table.embedding[...][x]")],
        "layers": ["atom_encoder", "atom_encoder.emb"],
        "between": (None, "atom_encoder.emb"),
        "causes": ["offset"],
        "level": "outputs",
    },
    {
        "title": "scalers interleaved with the aggregators",
        "edits": [("agg / amplify], axis=1)", "agg / amplify], axis=2)")],
        "layers": ["convs.1"],
        "between": ("convs.1.pre", "convs.1.post"),
        "causes": ["rearranged", "concat"],
        "level": "outputs",
    },
    {
        "title": "the virtual node gathers what comes out of the layer, not what goes in",
        "edits": [("pooled = jax.ops.segment_sum(h_in, batch, graphs) + vn", "pooled = jax.ops.segment_sum(h, batch, graphs) + vn")],
        "layers": [""],
        "between": ("batch_norms.0", "mlp_virtualnode.0"),
        "causes": ["operand"],
        "level": "outputs",
    },
]
