"""A graph convolutional network on dense batches: symmetric normalisation, BatchNorm, jumping knowledge, personalised PageRank."""
from typing import Tuple

import flax.linen as fnn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, nn


def gcn_norm(adj: Tensor) -> Tensor:
    adj = adj + torch.eye(adj.size(-1), dtype=adj.dtype, device=adj.device)
    deg_inv_sqrt = adj.sum(dim=-1).clamp(min=1).pow(-0.5)
    return deg_inv_sqrt.unsqueeze(-1) * adj * deg_inv_sqrt.unsqueeze(-2)


class GraphConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.lin = nn.Linear(in_channels, out_channels, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        return torch.matmul(adj, self.lin(x)) + self.bias


class APPNP(nn.Module):
    def __init__(self, K: int, alpha: float):
        super().__init__()
        self.K, self.alpha = K, alpha

    def forward(self, h: Tensor, adj: Tensor) -> Tensor:
        z = h
        for _ in range(self.K):
            z = (1 - self.alpha) * torch.matmul(adj, z) + self.alpha * h
        return z


class GCN(nn.Module):
    def __init__(self, in_dim=9, hidden=(16, 12), out_dim=6, n_graph=4, K=4, alpha=0.2, dropout=0.5):
        super().__init__()
        dims = [in_dim, *hidden]
        self.convs = nn.ModuleList([GraphConv(a, b) for a, b in zip(dims[:-1], dims[1:])])
        self.bns = nn.ModuleList([nn.BatchNorm1d(b) for b in hidden])
        self.drop = nn.Dropout(dropout)
        self.jump = nn.Linear(sum(hidden), out_dim)
        self.prop = APPNP(K, alpha)
        self.readout = nn.Linear(2 * out_dim, n_graph)

    def forward(self, x: Tensor, adj: Tensor, mask: Tensor) -> Tuple[Tensor, Tensor]:
        adj = gcn_norm(adj)
        xs = []
        for conv, bn in zip(self.convs, self.bns):
            x = conv(x, adj)
            x = bn(x.transpose(1, 2)).transpose(1, 2)
            x = self.drop(torch.relu(x)) * mask.unsqueeze(-1)
            xs.append(x)
        h = self.jump(torch.cat(xs, dim=-1))
        z = self.prop(h, adj)
        m = mask.unsqueeze(-1)
        mean = (z * m).sum(1) / m.sum(1)
        top = z.masked_fill(~m, float("-inf")).max(dim=1).values
        return z, self.readout(torch.cat([mean, top], dim=-1))


def normalized_adjacency(adj):
    """D^-1/2 (A + I) D^-1/2"""
    loops = adj + jnp.eye(adj.shape[-1], dtype=adj.dtype)
    degree = jnp.maximum(jnp.sum(loops, axis=-1), 1.0)
    inv = jax.lax.rsqrt(degree)
    return inv[..., :, None] * loops * inv[..., None, :]


class GCNLayer(fnn.Module):
    features: int

    @fnn.compact
    def __call__(self, x, adj):
        x = fnn.Dense(self.features, use_bias=False)(x)
        bias = self.param("bias", fnn.initializers.zeros, (self.features,))
        return jnp.einsum("bij,bjf->bif", adj, x) + bias


class FlaxGCN(fnn.Module):
    hidden: Tuple[int, ...] = (16, 12)
    out_dim: int = 6
    n_graph: int = 4
    steps: int = 4
    alpha: float = 0.2
    rate: float = 0.5

    @fnn.compact
    def __call__(self, x, adj, mask, train: bool = False):
        adj = normalized_adjacency(adj)
        m = mask[..., None]
        xs = []
        for width in self.hidden:
            x = GCNLayer(width)(x, adj)
            x = fnn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x)
            x = fnn.Dropout(self.rate, deterministic=not train)(fnn.relu(x)) * m
            xs.append(x)
        h = fnn.Dense(self.out_dim, name="jump")(jnp.concatenate(xs, axis=-1))
        z = h
        for _ in range(self.steps):
            z = (1 - self.alpha) * (adj @ z) + self.alpha * h
        mean = jnp.sum(z * m, axis=1) / jnp.sum(m, axis=1)
        top = jnp.max(jnp.where(m, z, -jnp.inf), axis=1)
        return z, fnn.Dense(self.n_graph, name="readout")(jnp.concatenate([mean, top], axis=-1))


def port(state):
    state = {k: jnp.asarray(v.numpy()) for k, v in state.items()}
    params, stats = {}, {}
    for i in range(2):
        params[f"GCNLayer_{i}"] = {"Dense_0": {"kernel": state[f"convs.{i}.lin.weight"].T}, "bias": state[f"convs.{i}.bias"]}
        params[f"BatchNorm_{i}"] = {"scale": state[f"bns.{i}.weight"], "bias": state[f"bns.{i}.bias"]}
        stats[f"BatchNorm_{i}"] = {"mean": state[f"bns.{i}.running_mean"], "var": state[f"bns.{i}.running_var"]}
    for name in ("jump", "readout"):
        params[name] = {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}
    return {"params": params, "batch_stats": stats}


def build(seed):
    """The right pair with random weights and inputs that follow from the seed."""
    torch.manual_seed(seed)
    net = GCN().eval()
    for name, value in net.state_dict().items():
        if "running_var" in name:
            value.uniform_(0.4, 2.0)
        elif value.is_floating_point():
            value.normal_(0.0, 0.6)
    rng = np.random.default_rng(seed)
    n = np.array([7, 5, 6])
    mask = np.arange(7)[None] < n[:, None]
    adj = (rng.random((3, 7, 7)) < 0.5) * rng.uniform(0.5, 2.0, (3, 7, 7))
    adj = adj * mask[:, :, None] * mask[:, None, :] * (1 - np.eye(7))
    x = rng.normal(size=(3, 7, 9)) * mask[..., None]
    inputs = {"x": x.astype(np.float32), "adj": adj.astype(np.float32), "mask": mask}
    return {"torch": net, "flax": (FlaxGCN(), port(net.state_dict())), "inputs": inputs}


FAULTS = [
    {
        "title": "rows of the adjacency divided by the degree, not normalised on both sides",
        "edits": [("    inv = jax.lax.rsqrt(degree)\n    return inv[..., :, None] * loops * inv[..., None, :]\n", "    return loops / degree[..., :, None]\n")],
        "layers": [""],
        "between": (None, "convs.0.lin"),
        "causes": ["operation", "constant"],
        "level": "outputs",
    },
    {
        "title": "degrees counted before the self loops are added",
        "edits": [("jnp.maximum(jnp.sum(loops, axis=-1), 1.0)", "jnp.maximum(jnp.sum(adj, axis=-1), 1.0)")],
        "layers": [""],
        "between": (None, "convs.0.lin"),
        "causes": ["order", "operand"],
        "level": "outputs",
    },
    {
        "title": "messages flow against the edges",
        "edits": [("jnp.einsum(\"bij,bjf->bif\", adj, x) + bias", "jnp.einsum(\"bji,bjf->bif\", adj, x) + bias")],
        "layers": ["convs.0"],
        "between": ("convs.0.lin", "bns.0"),
        "causes": ["transposed"],
        "level": "outputs",
    },
    {
        "title": "bias added before the propagation",
        "edits": [("jnp.einsum(\"bij,bjf->bif\", adj, x) + bias", "jnp.einsum(\"bij,bjf->bif\", adj, x + bias)")],
        "layers": ["convs.0"],
        "between": ("convs.0.lin", "bns.0"),
        "causes": ["order"],
        "level": "outputs",
    },
    {
        "title": "the teleport goes back to the last step's values",
        "edits": [("z = (1 - self.alpha) * (adj @ z) + self.alpha * h", "z = (1 - self.alpha) * (adj @ z) + self.alpha * z")],
        "layers": ["prop"],
        "between": ("jump", "readout"),
        "causes": ["operand", "residual"],
        "level": "outputs",
    },
    {
        "title": "one step of propagation too few",
        "edits": [("for _ in range(self.steps):", "for _ in range(1, self.steps):")],
        "layers": ["prop"],
        "between": ("jump", "readout"),
        "causes": ["size", "constant"],
        "level": "outputs",
    },
    {
        "title": "jumping knowledge joins the last layer first",
        "edits": [("(jnp.concatenate(xs, axis=-1))", "(jnp.concatenate(xs[::-1], axis=-1))")],
        "layers": [""],
        "between": ("bns.1", "jump"),
        "causes": ["concat"],
        "level": "outputs",
    },
    {
        "title": "BatchNorm reads its running statistics while training",
        "edits": [("fnn.BatchNorm(use_running_average=not train, momentum", "fnn.BatchNorm(use_running_average=True, momentum")],
        "layers": ["bns.0", "bns.1"],
        "causes": ["statistics", "batch_statistics"],
        "level": "training",
    },
]
