"""A graph attention network over edge lists with edge features: segment softmax over the targets, self loops, skip projections."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn


def scatter_sum(src, index, n):
    return src.new_zeros(n, *src.shape[1:]).index_add_(0, index, src)


def softmax(src, index, n):
    top = src.new_full((n, *src.shape[1:]), float("-inf"))
    top = top.scatter_reduce(0, index[:, None].expand_as(src), src, reduce="amax")
    out = (src - top[index]).exp()
    return out / (scatter_sum(out, index, n)[index] + 1e-16)


def add_self_loops(edge_index, edge_attr, n):
    """Every node's loop carries the mean of its incoming edges' attributes."""
    count = scatter_sum(torch.ones_like(edge_attr[:, :1]), edge_index[1], n).clamp(min=1)
    loop_attr = scatter_sum(edge_attr, edge_index[1], n) / count
    loop = torch.arange(n, device=edge_index.device).repeat(2, 1)
    return torch.cat([edge_index, loop], dim=1), torch.cat([edge_attr, loop_attr], dim=0)


class GATConv(nn.Module):
    def __init__(self, in_channels, out_channels, heads, edge_dim, concat=True, negative_slope=0.2, dropout=0.6):
        super().__init__()
        self.heads, self.out_channels, self.concat = heads, out_channels, concat
        self.negative_slope, self.dropout = negative_slope, dropout
        self.lin = nn.Linear(in_channels, heads * out_channels, bias=False)
        self.lin_edge = nn.Linear(edge_dim, heads * out_channels, bias=False)
        self.att_src = nn.Parameter(torch.randn(1, heads, out_channels))
        self.att_dst = nn.Parameter(torch.randn(1, heads, out_channels))
        self.att_edge = nn.Parameter(torch.randn(1, heads, out_channels))
        self.bias = nn.Parameter(torch.zeros(heads * out_channels if concat else out_channels))

    def forward(self, x, edge_index, edge_attr):
        n, (src, dst) = x.shape[0], edge_index
        h = self.lin(x).view(-1, self.heads, self.out_channels)
        e = self.lin_edge(edge_attr).view(-1, self.heads, self.out_channels)
        a_src, a_dst = (h * self.att_src).sum(-1), (h * self.att_dst).sum(-1)
        alpha = a_src[src] + a_dst[dst] + (e * self.att_edge).sum(-1)
        alpha = softmax(F.leaky_relu(alpha, self.negative_slope), dst, n)
        alpha = F.dropout(alpha, self.dropout, self.training)
        out = scatter_sum(h[src] * alpha.unsqueeze(-1), dst, n)
        out = out.flatten(1) if self.concat else out.mean(dim=1)
        return out + self.bias


class GAT(nn.Module):
    def __init__(self, in_dim=9, hidden=4, n_classes=5, heads=3, edge_dim=7):
        super().__init__()
        self.convs = nn.ModuleList([
            GATConv(in_dim, hidden, heads, edge_dim),
            GATConv(hidden * heads, n_classes, heads, edge_dim, concat=False),
        ])
        self.skips = nn.ModuleList([nn.Linear(in_dim, hidden * heads), nn.Linear(hidden * heads, n_classes)])
        self.act = nn.ELU()

    def forward(self, x, edge_index, edge_attr):
        edge_index, edge_attr = add_self_loops(edge_index, edge_attr, x.shape[0])
        x = self.act(self.convs[0](x, edge_index, edge_attr) + self.skips[0](x))
        return self.convs[1](x, edge_index, edge_attr) + self.skips[1](x)


# --- JAX


def segment_softmax(logits, segment_ids, num_segments):
    top = jax.ops.segment_max(logits, segment_ids, num_segments)
    weights = jnp.exp(logits - top[segment_ids])
    total = jax.ops.segment_sum(weights, segment_ids, num_segments)
    return weights / (total[segment_ids] + 1e-16)


def with_self_loops(senders, receivers, edges, n):
    count = jax.ops.segment_sum(jnp.ones_like(edges[:, :1]), receivers, n)
    loops = jax.ops.segment_sum(edges, receivers, n) / jnp.maximum(count, 1)
    nodes = jnp.arange(n)
    return jnp.append(senders, nodes), jnp.append(receivers, nodes), jnp.concatenate([edges, loops])


class GraphAttention(nnx.Module):
    def __init__(self, din, dout, heads, edge_dim, concat=True, *, rngs):
        self.heads, self.dout, self.concat = heads, dout, concat
        self.proj = nnx.Linear(din, heads * dout, use_bias=False, rngs=rngs)
        self.edge_proj = nnx.Linear(edge_dim, heads * dout, use_bias=False, rngs=rngs)
        init = nnx.initializers.lecun_normal()
        self.a_send = nnx.Param(init(rngs.params(), (heads, dout)))
        self.a_receive = nnx.Param(init(rngs.params(), (heads, dout)))
        self.a_edge = nnx.Param(init(rngs.params(), (heads, dout)))
        self.bias = nnx.Param(jnp.zeros((heads * dout if concat else dout,)))
        self.dropout = nnx.Dropout(0.6, rngs=rngs)

    def __call__(self, x, senders, receivers, edges):
        n = x.shape[0]
        h = self.proj(x).reshape(n, self.heads, self.dout)
        e = self.edge_proj(edges).reshape(-1, self.heads, self.dout)
        send = jnp.einsum("nhc,hc->nh", h, self.a_send[...])
        receive = jnp.einsum("nhc,hc->nh", h, self.a_receive[...])
        logits = send[senders] + receive[receivers] + jnp.einsum("ehc,hc->eh", e, self.a_edge[...])
        logits = jax.nn.leaky_relu(logits, 0.2)
        alpha = self.dropout(segment_softmax(logits, receivers, n))
        messages = h[senders] * alpha[..., None]
        out = jax.ops.segment_sum(messages, receivers, n)
        out = out.reshape(n, -1) if self.concat else jnp.mean(out, axis=1)
        return out + self.bias[...]


class FlaxGAT(nnx.Module):
    def __init__(self, in_dim=9, hidden=4, n_classes=5, heads=3, edge_dim=7, *, rngs):
        self.gat_0 = GraphAttention(in_dim, hidden, heads, edge_dim, rngs=rngs)
        self.gat_1 = GraphAttention(hidden * heads, n_classes, heads, edge_dim, concat=False, rngs=rngs)
        self.skip_0 = nnx.Linear(in_dim, hidden * heads, rngs=rngs)
        self.skip_1 = nnx.Linear(hidden * heads, n_classes, rngs=rngs)

    def __call__(self, x, edge_index, edge_attr):
        senders, receivers, edges = with_self_loops(edge_index[0], edge_index[1], edge_attr, x.shape[0])
        x = nnx.elu(self.gat_0(x, senders, receivers, edges) + self.skip_0(x))
        return self.gat_1(x, senders, receivers, edges) + self.skip_1(x)


def port(net, model):
    get = lambda t: jnp.asarray(t.detach().cpu().numpy())
    for dst, src in zip((model.gat_0, model.gat_1), net.convs):
        dst.proj.kernel[...] = get(src.lin.weight).T
        dst.edge_proj.kernel[...] = get(src.lin_edge.weight).T
        dst.a_send[...] = get(src.att_src)[0]
        dst.a_receive[...] = get(src.att_dst)[0]
        dst.a_edge[...] = get(src.att_edge)[0]
        dst.bias[...] = get(src.bias)
    for dst, src in zip((model.skip_0, model.skip_1), net.skips):
        dst.kernel[...] = get(src.weight).T
        dst.bias[...] = get(src.bias)


def build(seed):
    """The right pair with random weights and inputs that follow from the seed."""
    torch.manual_seed(seed)
    net = GAT().eval()
    for p in net.parameters():
        p.data.normal_(0.0, 0.7)
    model = FlaxGAT(rngs=nnx.Rngs(1))
    port(net, model)
    model.eval()
    rng = np.random.default_rng(seed)
    edge_index = np.stack([rng.integers(0, 11, size=30), rng.integers(0, 10, size=30)])
    x = rng.normal(size=(11, 9)).astype(np.float32)
    edge_attr = rng.normal(size=(30, 7)).astype(np.float32)
    return {"torch": net, "flax": model, "inputs": (x, edge_index, edge_attr)}


FAULTS = [
    {
        "title": "attention normalised over the edges of a sender",
        "edits": [("segment_softmax(logits, receivers, n)", "segment_softmax(logits, senders, n)")],
        "layers": ["convs.0"],
        "between": ("convs.0.lin_edge", "skips.0"),
        "causes": ["softmax_axis", "operand"],
        "level": "outputs",
    },
    {
        "title": "leaky ReLU on the edge term left out: the term is added after it",
        "edits": [("        logits = send[senders] + receive[receivers] + jnp.einsum(\"ehc,hc->eh\", e, self.a_edge[...])\n        logits = jax.nn.leaky_relu(logits, 0.2)\n",
                   "        logits = jax.nn.leaky_relu(send[senders] + receive[receivers], 0.2)\n        logits = logits + jnp.einsum(\"ehc,hc->eh\", e, self.a_edge[...])\n")],
        "layers": ["convs.0"],
        "between": ("convs.0.lin_edge", "skips.0"),
        "causes": ["order"],
        "level": "outputs",
    },
    {
        "title": "self loops get zeros for attributes, not the mean of the incoming",
        "edits": [("    loops = jax.ops.segment_sum(edges, receivers, n) / jnp.maximum(count, 1)\n", "    loops = jnp.zeros((n, edges.shape[1]), edges.dtype) * count\n")],
        "layers": [""],
        "between": (None, "convs.0.lin"),
        "causes": ["operation", "left_out"],
        "level": "outputs",
    },
    {
        "title": "heads of the last layer summed and not averaged",
        "edits": [("else jnp.mean(out, axis=1)", "else jnp.sum(out, axis=1)")],
        "layers": ["convs.1"],
        "between": ("convs.1.lin_edge", "skips.1"),
        "causes": ["operation", "scale"],
        "level": "outputs",
    },
    {
        "title": "node features split with the channels before the heads",
        "edits": [("h = self.proj(x).reshape(n, self.heads, self.dout)", "h = self.proj(x).reshape(n, self.dout, self.heads).swapaxes(1, 2)")],
        "layers": ["convs.0"],
        "between": ("convs.0.lin", "convs.0.lin_edge"),
        "causes": ["heads", "rearranged"],
        "level": "outputs",
    },
    {
        "title": "SELU for ELU",
        "edits": [("x = nnx.elu(self.gat_0(", "x = nnx.selu(self.gat_0(")],
        "layers": ["act", ""],
        "between": ("skips.0", "convs.1.lin"),
        "causes": ["activation"],
        "level": "outputs",
    },
    {
        "title": "attention vectors of senders and receivers loaded the wrong way round",
        "edits": [("dst.a_send[...] = get(src.att_src)[0]", "dst.a_send[...] = get(src.att_dst)[0]"),
                  ("dst.a_receive[...] = get(src.att_dst)[0]", "dst.a_receive[...] = get(src.att_src)[0]")],
        "layers": ["convs.0"],
        "between": ("convs.0.lin_edge", "skips.0"),
        "causes": ["swapped"],
        "level": "outputs",
    },
    {
        "title": "messages summed in bfloat16",
        "edits": [("out = jax.ops.segment_sum(messages, receivers, n)", "out = jax.ops.segment_sum(messages.astype(jnp.bfloat16), receivers, n).astype(x.dtype)")],
        "layers": ["convs.0"],
        "between": ("convs.0.lin_edge", "skips.0"),
        "causes": ["dtype"],
        "level": "outputs",
    },
]
