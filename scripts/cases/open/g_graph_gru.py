"""Molecule graph network: edge-gated messages with GRUCell updates, graph transformer convolution, readout."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
from flax import nnx

NUM_GRAPHS = 2


def scatter_mean(src, index, size):
    out = src.new_zeros(size, src.size(-1)).index_add_(0, index, src)
    count = src.new_zeros(size).index_add_(0, index, src.new_ones(index.numel()))
    return out / count.clamp(min=1).unsqueeze(-1)


def scatter_max(src, index, size):
    idx = index.view(-1, *[1] * (src.dim() - 1)).expand_as(src)
    return src.new_full((size, *src.shape[1:]), -float("inf")).scatter_reduce(0, idx, src, "amax")


def scatter_softmax(src, index, size):
    src = (src - scatter_max(src, index, size)[index]).exp()
    total = src.new_zeros(size, *src.shape[1:]).index_add_(0, index, src)
    return src / (total[index] + 1e-16)


class GatedMessageLayer(nn.Module):
    def __init__(self, dim, edge_dim, dropout):
        super().__init__()
        self.message = nn.Sequential(nn.Linear(2 * dim + edge_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.gate = nn.Linear(edge_dim, dim)
        self.update = nn.GRUCell(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.edge_mlp = nn.Linear(2 * dim + edge_dim, edge_dim)
        self.edge_norm = nn.LayerNorm(edge_dim)

    def forward(self, h, e, edge_index):
        src, dst = edge_index
        msg = self.message(torch.cat([h[dst], h[src], e], dim=-1)) * torch.sigmoid(self.gate(e))
        agg = scatter_mean(msg, dst, h.size(0))
        h = self.dropout(self.update(agg, h))
        e = e + self.edge_norm(self.edge_mlp(torch.cat([h[dst], h[src], e], dim=-1)))
        return h, e


class TransformerConv(nn.Module):
    def __init__(self, dim, edge_dim, heads):
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.lin_query = nn.Linear(dim, dim)
        self.lin_key = nn.Linear(dim, dim)
        self.lin_value = nn.Linear(dim, dim)
        self.lin_edge = nn.Linear(edge_dim, dim, bias=False)
        self.lin_skip = nn.Linear(dim, dim)
        self.lin_beta = nn.Linear(3 * dim, 1, bias=False)

    def forward(self, x, e, edge_index):
        src, dst = edge_index
        n, H, C = x.size(0), self.heads, self.head_dim
        query = self.lin_query(x).view(-1, H, C)
        key = self.lin_key(x).view(-1, H, C)
        value = self.lin_value(x).view(-1, H, C)
        edge = self.lin_edge(e).view(-1, H, C)
        alpha = (query[dst] * (key[src] + edge)).sum(-1) / C**0.5
        alpha = scatter_softmax(alpha, dst, n)
        out = ((value[src] + edge) * alpha.unsqueeze(-1)).view(-1, H * C)
        out = x.new_zeros(n, H * C).index_add_(0, dst, out)
        x_r = self.lin_skip(x)
        beta = self.lin_beta(torch.cat([out, x_r, out - x_r], dim=-1)).sigmoid()
        return beta * x_r + (1 - beta) * out


class Readout(nn.Module):
    def __init__(self, dim, out_dim):
        super().__init__()
        self.gate_nn = nn.Linear(dim, 1)
        self.out = nn.Linear(2 * dim, out_dim)

    def forward(self, h, batch):
        weight = scatter_softmax(self.gate_nn(h), batch, NUM_GRAPHS)
        pooled = h.new_zeros(NUM_GRAPHS, h.size(-1)).index_add_(0, batch, weight * h)
        return self.out(torch.cat([pooled, scatter_max(h, batch, NUM_GRAPHS)], dim=-1))


class MolNet(nn.Module):
    def __init__(self, node_dim=7, bond_dim=5, dim=12, edge_dim=8, heads=3, dropout=0.1, out_dim=4):
        super().__init__()
        self.node_encoder = nn.Linear(node_dim, dim)
        self.edge_encoder = nn.Linear(bond_dim, edge_dim)
        self.layers = nn.ModuleList([GatedMessageLayer(dim, edge_dim, dropout) for _ in range(2)])
        self.attn = TransformerConv(dim, edge_dim, heads)
        self.readout = Readout(dim, out_dim)
        self.aux_head = nn.Linear(dim, 2)

    def forward(self, x, edge_index, edge_attr, batch):
        h, e = self.node_encoder(x), self.edge_encoder(edge_attr)
        for layer in self.layers:
            h, e = layer(h, e, edge_index)
        h = self.attn(h, e, edge_index)
        return self.readout(h, batch), self.aux_head(h.detach())


def segment_mean(data, ids, num):
    total = jax.ops.segment_sum(data, ids, num)
    count = jax.ops.segment_sum(jnp.ones(ids.shape, data.dtype), ids, num)
    return total / jnp.maximum(count, 1)[:, None]


def segment_softmax(logits, ids, num):
    top = jax.ops.segment_max(logits, ids, num)
    unnorm = jnp.exp(logits - top[ids])
    return unnorm / (jax.ops.segment_sum(unnorm, ids, num)[ids] + 1e-16)


class GRUUpdate(nnx.Module):
    def __init__(self, dim, rngs):
        self.dense_i = nnx.Linear(dim, 3 * dim, rngs=rngs)
        self.dense_h = nnx.Linear(dim, 3 * dim, rngs=rngs)

    def __call__(self, carry, inputs):
        ir, iz, in_ = jnp.split(self.dense_i(inputs), 3, axis=-1)
        hr, hz, hn = jnp.split(self.dense_h(carry), 3, axis=-1)
        r, z = nnx.sigmoid(ir + hr), nnx.sigmoid(iz + hz)
        n = jnp.tanh(in_ + r * hn)
        return (1.0 - z) * n + z * carry


class EdgeGatedBlock(nnx.Module):
    def __init__(self, dim, edge_dim, dropout_rate, rngs):
        self.msg_in = nnx.Linear(2 * dim + edge_dim, dim, rngs=rngs)
        self.msg_out = nnx.Linear(dim, dim, rngs=rngs)
        self.gate = nnx.Linear(edge_dim, dim, rngs=rngs)
        self.update = GRUUpdate(dim, rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        self.edge_dense = nnx.Linear(2 * dim + edge_dim, edge_dim, rngs=rngs)
        self.edge_norm = nnx.LayerNorm(edge_dim, epsilon=1e-5, rngs=rngs)

    def __call__(self, nodes, edges, edge_index):
        senders, receivers = edge_index
        pair = jnp.concatenate([nodes[receivers], nodes[senders], edges], axis=-1)
        msg = self.msg_out(nnx.silu(self.msg_in(pair))) * nnx.sigmoid(self.gate(edges))
        incoming = segment_mean(msg, receivers, nodes.shape[0])
        nodes = self.dropout(self.update(nodes, incoming))
        pair = jnp.concatenate([nodes[receivers], nodes[senders], edges], axis=-1)
        return nodes, edges + self.edge_norm(self.edge_dense(pair))


class GraphAttention(nnx.Module):
    def __init__(self, dim, edge_dim, num_heads, rngs):
        self.num_heads = num_heads
        self.query = nnx.Linear(dim, dim, rngs=rngs)
        self.key = nnx.Linear(dim, dim, rngs=rngs)
        self.value = nnx.Linear(dim, dim, rngs=rngs)
        self.edge = nnx.Linear(edge_dim, dim, use_bias=False, rngs=rngs)
        self.skip = nnx.Linear(dim, dim, rngs=rngs)
        self.beta = nnx.Linear(3 * dim, 1, use_bias=False, rngs=rngs)

    def split(self, x):
        return x.reshape(x.shape[0], self.num_heads, -1)

    def __call__(self, nodes, edges, edge_index):
        source, target = edge_index
        count = nodes.shape[0]
        q, k, v = self.split(self.query(nodes)), self.split(self.key(nodes)), self.split(self.value(nodes))
        bond = self.split(self.edge(edges))
        logits = jnp.sum(q[target] * (k[source] + bond), axis=-1) / jnp.sqrt(q.shape[-1])
        alpha = segment_softmax(logits, target, count)
        weighted = (v[source] + bond) * alpha[..., None]
        out = jax.ops.segment_sum(weighted.reshape(weighted.shape[0], -1), target, count)
        root = self.skip(nodes)
        beta = nnx.sigmoid(self.beta(jnp.concatenate([out, root, out - root], axis=-1)))
        return beta * root + (1 - beta) * out


class FlaxMolNet(nnx.Module):
    def __init__(self, node_dim=7, bond_dim=5, dim=12, edge_dim=8, heads=3, out_dim=4, *, rngs):
        self.embed_nodes = nnx.Linear(node_dim, dim, rngs=rngs)
        self.embed_edges = nnx.Linear(bond_dim, edge_dim, rngs=rngs)
        self.blocks = nnx.List([EdgeGatedBlock(dim, edge_dim, 0.1, rngs) for _ in range(2)])
        self.attention = GraphAttention(dim, edge_dim, heads, rngs)
        self.pool_gate = nnx.Linear(dim, 1, rngs=rngs)
        self.head = nnx.Linear(2 * dim, out_dim, rngs=rngs)
        self.aux_head = nnx.Linear(dim, 2, rngs=rngs)

    def pool(self, nodes, batch):
        weight = segment_softmax(self.pool_gate(nodes), batch, NUM_GRAPHS)
        mean = jax.ops.segment_sum(weight * nodes, batch, NUM_GRAPHS)
        peak = jnp.full(mean.shape, -jnp.inf, mean.dtype).at[batch].max(nodes)
        return self.head(jnp.concatenate([mean, peak], axis=-1))

    def __call__(self, x, edge_index, edge_attr, batch):
        nodes, edges = self.embed_nodes(x), self.embed_edges(edge_attr)
        for block in self.blocks:
            nodes, edges = block(nodes, edges, edge_index)
        nodes = self.attention(nodes, edges, edge_index)
        probe = self.aux_head(jax.lax.stop_gradient(nodes))
        return self.pool(nodes, batch), probe


def put(dst, weight, bias=None):
    dst.kernel = nnx.Param(jnp.asarray(weight.detach().numpy().T))
    if bias is not None:
        dst.bias = nnx.Param(jnp.asarray(bias.detach().numpy()))


def port(net, model):
    pairs = [(model.embed_nodes, net.node_encoder), (model.embed_edges, net.edge_encoder),
             (model.pool_gate, net.readout.gate_nn), (model.head, net.readout.out), (model.aux_head, net.aux_head)]
    for new, old in zip(model.blocks, net.layers):
        pairs += [(new.msg_in, old.message[0]), (new.msg_out, old.message[2]), (new.gate, old.gate),
                  (new.edge_dense, old.edge_mlp)]
        put(new.update.dense_i, old.update.weight_ih, old.update.bias_ih)
        put(new.update.dense_h, old.update.weight_hh, old.update.bias_hh)
        new.edge_norm.scale = nnx.Param(jnp.asarray(old.edge_norm.weight.detach().numpy()))
        new.edge_norm.bias = nnx.Param(jnp.asarray(old.edge_norm.bias.detach().numpy()))
    for name in ("query", "key", "value", "edge", "skip", "beta"):
        pairs.append((getattr(model.attention, name), getattr(net.attn, f"lin_{name}")))
    for new, old in pairs:
        put(new, old.weight, old.bias)
    return model


def build(seed):
    """The right pair with random weights and inputs that follow from the seed."""
    torch.manual_seed(seed)
    net = MolNet().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "norm.weight" in name:
                p.uniform_(0.6, 1.5)
            elif "bias" in name:
                p.normal_(0, 0.3)
            else:
                p.mul_(1.6)
    model = port(net, FlaxMolNet(rngs=nnx.Rngs(0)))
    model.eval()
    rng = np.random.default_rng(seed)
    batch = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    first = rng.integers(0, 4, (2, 9))
    second = rng.integers(4, 9, (2, 13))
    inputs = (rng.normal(size=(10, 7)).astype(np.float32), np.concatenate([first, second], axis=1),
              rng.normal(size=(22, 5)).astype(np.float32), batch)
    return {"torch": net, "flax": model, "inputs": inputs}


FAULTS = [
    {
        "title": "senders and receivers of the message layers exchanged",
        "edits": [("senders, receivers = edge_index", "receivers, senders = edge_index")],
        "layers": ["layers.0"],
        "between": ("edge_encoder", "layers.0.message.0"),
        "causes": ["swapped", "operand"],
        "level": "outputs",
    },
    {
        "title": "messages summed, not averaged",
        "edits": [("return total / jnp.maximum(count, 1)[:, None]", "return total")],
        "layers": ["layers.0"],
        "between": ("layers.0.gate", "layers.0.update"),
        "causes": ["operation", "left_out", "scale"],
        "level": "outputs",
    },
    {
        "title": "GRUCell called as (input, state) where the Flax cell takes (state, input)",
        "edits": [("self.update(nodes, incoming)", "self.update(incoming, nodes)")],
        "layers": ["layers.0.update"],
        "causes": ["operand", "swapped"],
        "level": "outputs",
    },
    {
        "title": "heads split off as (head_dim, heads)",
        "edits": [("        return x.reshape(x.shape[0], self.num_heads, -1)\n",
                   "        return x.reshape(x.shape[0], -1, self.num_heads).swapaxes(1, 2)\n")],
        "layers": ["attn"],
        "between": ("attn.lin_query", "attn.lin_key"),
        "causes": ["heads", "rearranged"],
        "level": "outputs",
    },
    {
        "title": "attention weights normalised over all edges, not over those that enter a node",
        "edits": [("alpha = segment_softmax(logits, target, count)", "alpha = jax.nn.softmax(logits, axis=0)")],
        "layers": ["attn"],
        "between": ("attn.lin_edge", "attn.lin_skip"),
        "causes": ["softmax_axis", "axis"],
        "level": "outputs",
    },
    {
        "title": "edge features added to the keys only, not to the values",
        "edits": [("weighted = (v[source] + bond) * alpha[..., None]", "weighted = v[source] * alpha[..., None]")],
        "layers": ["attn"],
        "between": ("attn.lin_edge", "attn.lin_skip"),
        "causes": ["residual", "left_out"],
        "level": "outputs",
    },
    {
        "title": "maximum over a graph's nodes starts from zero, so negative peaks are cut off",
        "edits": [("jnp.full(mean.shape, -jnp.inf, mean.dtype)", "jnp.zeros(mean.shape, mean.dtype)")],
        "layers": ["readout"],
        "between": ("readout.gate_nn", "readout.out"),
        "causes": ["constant", "operation"],
        "level": "outputs",
    },
    {
        "title": "auxiliary head sends its gradient into the network",
        "edits": [("probe = self.aux_head(jax.lax.stop_gradient(nodes))", "probe = self.aux_head(nodes)")],
        "layers": ["", "aux_head"],
        "between": ("readout.out", "aux_head"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "dropout given the share to keep",
        "edits": [("EdgeGatedBlock(dim, edge_dim, 0.1, rngs)", "EdgeGatedBlock(dim, edge_dim, 0.9, rngs)")],
        "layers": ["layers.0.dropout"],
        "causes": ["training_attribute", "dropout"],
        "level": "attributes",
    },
]
