"""E(n)-equivariant graph network with edge features, masks and moving coordinates; one number per graph."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as tnn
from flax import nnx


# ---- PyTorch

def unsorted_segment_sum(data, segment_ids, num_segments):
    result = data.new_zeros((num_segments, data.size(1)))
    return result.index_add(0, segment_ids, data)


class E_GCL(tnn.Module):
    """E(n) equivariant convolutional layer."""

    def __init__(self, input_nf, output_nf, hidden_nf, edges_in_d):
        super().__init__()
        self.epsilon = 1e-8
        self.edge_mlp = tnn.Sequential(
            tnn.Linear(input_nf * 2 + 1 + edges_in_d, hidden_nf), tnn.SiLU(),
            tnn.Linear(hidden_nf, hidden_nf), tnn.SiLU())
        self.node_mlp = tnn.Sequential(
            tnn.Linear(hidden_nf + input_nf, hidden_nf), tnn.SiLU(), tnn.Linear(hidden_nf, output_nf))
        self.coord_mlp = tnn.Sequential(
            tnn.Linear(hidden_nf, hidden_nf), tnn.SiLU(), tnn.Linear(hidden_nf, 1, bias=False))
        self.att_mlp = tnn.Sequential(tnn.Linear(hidden_nf, 1), tnn.Sigmoid())

    def edge_model(self, source, target, radial, edge_attr, edge_mask):
        out = self.edge_mlp(torch.cat([source, target, radial, edge_attr], dim=1))
        out = out * self.att_mlp(out)
        return out * edge_mask

    def node_model(self, x, edge_index, edge_attr):
        agg = unsorted_segment_sum(edge_attr, edge_index[0], x.size(0))
        return x + self.node_mlp(torch.cat([x, agg], dim=1))

    def coord_model(self, coord, edge_index, coord_diff, edge_feat, edge_mask):
        trans = coord_diff * self.coord_mlp(edge_feat) * edge_mask
        agg = unsorted_segment_sum(trans, edge_index[0], coord.size(0))
        count = unsorted_segment_sum(edge_mask, edge_index[0], coord.size(0))
        return coord + agg / count.clamp(min=1)

    def coord2radial(self, edge_index, coord):
        row, col = edge_index
        coord_diff = coord[row] - coord[col]
        radial = torch.sum(coord_diff ** 2, 1).unsqueeze(1)
        norm = torch.sqrt(radial).detach() + self.epsilon
        return radial, coord_diff / norm

    def forward(self, h, edge_index, coord, edge_attr, edge_mask):
        row, col = edge_index
        radial, coord_diff = self.coord2radial(edge_index, coord)
        edge_feat = self.edge_model(h[row], h[col], radial, edge_attr, edge_mask)
        coord = self.coord_model(coord, edge_index, coord_diff, edge_feat, edge_mask)
        return self.node_model(h, edge_index, edge_feat), coord


class EGNN(tnn.Module):
    def __init__(self, in_node_nf, in_edge_nf, hidden_nf, n_layers):
        super().__init__()
        self.n_layers = n_layers
        self.embedding = tnn.Linear(in_node_nf, hidden_nf)
        for i in range(n_layers):
            self.add_module("gcl_%d" % i, E_GCL(hidden_nf, hidden_nf, hidden_nf, in_edge_nf))
        self.node_dec = tnn.Sequential(tnn.Linear(hidden_nf, hidden_nf), tnn.SiLU(),
                                       tnn.Linear(hidden_nf, hidden_nf))
        self.graph_norm = tnn.BatchNorm1d(hidden_nf)
        self.graph_dec = tnn.Sequential(tnn.Linear(hidden_nf, hidden_nf), tnn.SiLU(), tnn.Linear(hidden_nf, 1))

    def forward(self, h0, x, edge_attr, node_mask):
        """h0 (graphs, nodes, features), x (.., 3), edge_attr (graphs, nodes, nodes, features), node_mask (..)"""
        b, n = h0.shape[:2]
        pair = torch.nonzero(~torch.eye(n, dtype=torch.bool, device=x.device).repeat(b, 1, 1))
        g, i, j = pair.unbind(1)
        edges = (g * n + i, g * n + j)
        edge_attr = edge_attr[g, i, j]
        flat_mask = node_mask.reshape(b * n, 1)
        edge_mask = flat_mask[edges[0]] * flat_mask[edges[1]]
        h, x = self.embedding(h0.reshape(b * n, -1)), x.reshape(b * n, 3)
        for k in range(self.n_layers):
            h, x = self._modules["gcl_%d" % k](h, edges, x, edge_attr, edge_mask)
        h = self.node_dec(h) * flat_mask
        h = h.view(b, n, -1).sum(1)
        return self.graph_dec(self.graph_norm(h)).squeeze(1), x.view(b, n, 3)


# ---- Flax

class TwoLayer(nnx.Module):
    def __init__(self, din, hidden, out, rngs, last_bias=True):
        self.first = nnx.Linear(din, hidden, rngs=rngs)
        self.second = nnx.Linear(hidden, out, use_bias=last_bias, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.silu(self.first(x)))


class MovingNorm(nnx.Module):
    """Batch norm over the first axis; keeps the variance over n - 1, as torch does."""

    def __init__(self, width, share=0.1, eps=1e-5):
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(width)), nnx.BatchStat(jnp.ones(width))
        self.share, self.eps = share, eps
        self.use_running_average = False

    def __call__(self, x):
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            mean, var, n = x.mean(0), x.var(0), x.shape[0]
            kept = 1 - self.share
            self.mean.set_value(kept * self.mean[...] + self.share * jax.lax.stop_gradient(mean))
            self.var.set_value(kept * self.var[...] + self.share * jax.lax.stop_gradient(var) * n / (n - 1))
        return (x - mean) / jnp.sqrt(var + self.eps) * self.scale[...] + self.bias[...]


class Interaction(nnx.Module):
    """All pairs of the nodes of a graph at once, masked."""

    def __init__(self, width, edge_width, rngs):
        lin = lambda d, bias: nnx.Linear(d, width, use_bias=bias, rngs=rngs)
        self.to_me, self.from_you = lin(width, True), lin(width, False)
        self.by_distance, self.by_bond = lin(1, False), lin(edge_width, False)
        self.message = lin(width, True)
        self.importance = nnx.Linear(width, 1, rngs=rngs)
        self.update = TwoLayer(2 * width, width, width, rngs)
        self.push = TwoLayer(width, width, 1, rngs, last_bias=False)

    def __call__(self, h, x, bonds, linked):
        away = x[:, :, None] - x[:, None, :]
        squared = jnp.sum(away ** 2, -1, keepdims=True)
        # a node's distance to itself is replaced: the root has no gradient at 0
        own = jnp.eye(x.shape[1], dtype=bool)[None, :, :, None]
        length = jax.lax.stop_gradient(jnp.sqrt(jnp.where(own, 1.0, squared)))
        unit = away / (length + 1e-8)
        m = self.to_me(h)[:, :, None] + self.from_you(h)[:, None] + self.by_distance(squared) + self.by_bond(bonds)
        m = nnx.silu(self.message(nnx.silu(m)))
        m = m * nnx.sigmoid(self.importance(m))
        m = m * linked
        neighbours = jnp.maximum(linked.sum(2), 1.0)
        x = x + (unit * self.push(m) * linked).sum(2) / neighbours
        h = h + self.update(jnp.concatenate([h, m.sum(2)], axis=-1))
        return h, x


class PointCloudNet(nnx.Module):
    def __init__(self, features, bond_features, width, depth, rngs):
        self.embed = nnx.Linear(features, width, rngs=rngs)
        self.steps = nnx.List([Interaction(width, bond_features, rngs) for _ in range(depth)])
        self.per_node = TwoLayer(width, width, width, rngs)
        self.norm = MovingNorm(width)
        self.per_graph = TwoLayer(width, width, 1, rngs)

    def __call__(self, feats, x, bonds, present):
        pairs = present[:, :, None] * present[:, None]
        linked = (pairs * (1 - jnp.eye(x.shape[1], dtype=x.dtype)))[..., None]
        h = self.embed(feats)
        for step in self.steps:
            h, x = step(h, x, bonds, linked)
        whole = jnp.einsum("bnd,bn->bd", self.per_node(h), present)
        return self.per_graph(self.norm(whole))[:, 0], x


FEATURES, BONDS, WIDTH, DEPTH = 6, 4, 11, 2


def port_weights(net):
    model = PointCloudNet(FEATURES, BONDS, WIDTH, DEPTH, nnx.Rngs(0))
    arr = lambda t: jnp.asarray(t.detach().numpy())

    def linear(dst, src):
        dst.kernel.set_value(arr(src.weight).T)
        if src.bias is not None:
            dst.bias.set_value(arr(src.bias))

    def two(dst, seq):
        linear(dst.first, seq[0])
        linear(dst.second, seq[2])

    linear(model.embed, net.embedding)
    for i, step in enumerate(model.steps):
        layer = getattr(net, f"gcl_{i}")
        w = arr(layer.edge_mlp[0].weight).T
        me, you, dist, bond = jnp.split(w, (WIDTH, 2 * WIDTH, 2 * WIDTH + 1))
        step.to_me.kernel.set_value(me)
        step.to_me.bias.set_value(arr(layer.edge_mlp[0].bias))
        step.from_you.kernel.set_value(you)
        step.by_distance.kernel.set_value(dist)
        step.by_bond.kernel.set_value(bond)
        linear(step.message, layer.edge_mlp[2])
        linear(step.importance, layer.att_mlp[0])
        two(step.update, layer.node_mlp)
        two(step.push, layer.coord_mlp)
    two(model.per_node, net.node_dec)
    two(model.per_graph, net.graph_dec)
    model.norm.scale.set_value(arr(net.graph_norm.weight))
    model.norm.bias.set_value(arr(net.graph_norm.bias))
    model.norm.mean.set_value(arr(net.graph_norm.running_mean))
    model.norm.var.set_value(arr(net.graph_norm.running_var))
    model.eval()
    return model


def build(seed):
    torch.manual_seed(seed)
    net = EGNN(FEATURES, BONDS, WIDTH, DEPTH).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() == 1:
                p.copy_(0.6 + 0.8 * torch.rand_like(p) if name.endswith("weight") else 0.3 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * 1.2 / p.shape[1] ** 0.5)
        net.graph_norm.running_mean.normal_(0, 0.5)
        net.graph_norm.running_var.uniform_(0.6, 1.8)
    g = np.random.RandomState(seed + 1)
    b, n = 5, 7
    h = g.randn(b, n, FEATURES).astype(np.float32)
    x = g.randn(b, n, 3).astype(np.float32)
    bonds = g.randn(b, n, n, BONDS).astype(np.float32)
    present = (np.arange(n) < np.array([7, 5, 4, 6, 7])[:, None]).astype(np.float32)
    return {"torch": net, "flax": port_weights(net), "inputs": (h, x, bonds, present)}


FAULTS = [
    {"title": "the vector between two nodes points from the centre to the neighbour, not to the centre",
     "edits": [("away = x[:, :, None] - x[:, None, :]", "away = x[:, None, :] - x[:, :, None]")],
     "layers": ["gcl_0", "gcl_1"], "between": ("embedding", "gcl_0.edge_mlp"),
     "causes": ["operand", "scale", "swapped"], "level": "outputs"},
    {"title": "messages from padding and from the node itself are not masked",
     "edits": [("        m = m * linked\n", "")],
     "layers": ["gcl_0", "gcl_1"], "between": ("gcl_0.att_mlp", "gcl_0.coord_mlp"),
     "causes": ["mask", "left_out"], "level": "outputs"},
    {"title": "the node update concatenates messages and features in the other order",
     "edits": [("jnp.concatenate([h, m.sum(2)], axis=-1)", "jnp.concatenate([m.sum(2), h], axis=-1)")],
     "layers": ["gcl_0", "gcl_1", "gcl_0.node_mlp", "gcl_1.node_mlp", "gcl_0.node_mlp.0", "gcl_1.node_mlp.0"],
     "between": ("gcl_0.coord_mlp", "gcl_0.node_mlp"),
     "causes": ["concat", "order"], "level": "outputs"},
    {"title": "the distance that the vectors are divided by is not cut off from the gradient",
     "edits": [("jax.lax.stop_gradient(jnp.sqrt(jnp.where(own, 1.0, squared)))",
                "jnp.sqrt(jnp.where(own, 1.0, squared))")],
     "layers": ["gcl_0", "gcl_1"], "between": ("embedding", "gcl_0.edge_mlp"),
     "causes": ["stop_gradient"], "level": "gradients"},
    {"title": "the running statistics keep a tenth and take nine tenths of the batch",
     "edits": [("width, share=0.1, eps=1e-5", "width, share=0.9, eps=1e-5")],
     "layers": ["graph_norm"], "between": None, "causes": ["momentum"], "level": "training"},
]
