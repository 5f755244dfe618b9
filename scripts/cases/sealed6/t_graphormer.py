"""Graphormer (first version, reduced): centrality embeddings, spatial bias, virtual node; directed graphs."""
import numpy as np
import torch
from torch import nn
import jax
import jax.numpy as jnp
from jax import lax
import flax.linen as fnn


class FeedForwardNetwork(nn.Module):
    def __init__(self, hidden_size, ffn_size):
        super().__init__()
        self.layer1 = nn.Linear(hidden_size, ffn_size)
        self.gelu = nn.GELU()
        self.layer2 = nn.Linear(ffn_size, hidden_size)

    def forward(self, x):
        return self.layer2(self.gelu(self.layer1(x)))


class MultiHeadAttention(nn.Module):
    def __init__(self, hidden_size, attention_dropout_rate, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.att_size = att_size = hidden_size // num_heads
        self.scale = att_size ** -0.5
        self.linear_q = nn.Linear(hidden_size, num_heads * att_size)
        self.linear_k = nn.Linear(hidden_size, num_heads * att_size)
        self.linear_v = nn.Linear(hidden_size, num_heads * att_size)
        self.att_dropout = nn.Dropout(attention_dropout_rate)
        self.output_layer = nn.Linear(num_heads * att_size, hidden_size)

    def forward(self, q, k, v, attn_bias, padding_mask):
        batch_size, d = q.size(0), self.att_size
        q = self.linear_q(q).view(batch_size, -1, self.num_heads, d).transpose(1, 2)
        k = self.linear_k(k).view(batch_size, -1, self.num_heads, d).transpose(1, 2).transpose(2, 3)
        v = self.linear_v(v).view(batch_size, -1, self.num_heads, d).transpose(1, 2)
        x = torch.matmul(q * self.scale, k)
        x = x + attn_bias
        x = x.masked_fill(padding_mask[:, None, None, :], float("-inf"))
        x = self.att_dropout(torch.softmax(x, dim=3))
        x = x.matmul(v).transpose(1, 2).contiguous().view(batch_size, -1, self.num_heads * d)
        return self.output_layer(x)


class EncoderLayer(nn.Module):
    def __init__(self, hidden_size, ffn_size, dropout_rate, attention_dropout_rate, num_heads):
        super().__init__()
        self.self_attention_norm = nn.LayerNorm(hidden_size)
        self.self_attention = MultiHeadAttention(hidden_size, attention_dropout_rate, num_heads)
        self.self_attention_dropout = nn.Dropout(dropout_rate)
        self.ffn_norm = nn.LayerNorm(hidden_size)
        self.ffn = FeedForwardNetwork(hidden_size, ffn_size)
        self.ffn_dropout = nn.Dropout(dropout_rate)

    def forward(self, x, attn_bias, padding_mask):
        y = self.self_attention_norm(x)
        y = self.self_attention(y, y, y, attn_bias, padding_mask)
        x = x + self.self_attention_dropout(y)
        y = self.ffn(self.ffn_norm(x))
        return x + self.ffn_dropout(y)


class Graphormer(nn.Module):
    def __init__(self, n_layers=2, num_heads=3, hidden_dim=15, ffn_dim=17, num_atoms=19, num_degree=9,
                 num_spatial=8, dropout_rate=0.1, intput_dropout_rate=0.15, attention_dropout_rate=0.3, n_tasks=11):
        super().__init__()
        self.num_heads = num_heads
        self.atom_encoder = nn.Embedding(num_atoms, hidden_dim, padding_idx=0)
        self.spatial_pos_encoder = nn.Embedding(num_spatial, num_heads, padding_idx=0)
        self.in_degree_encoder = nn.Embedding(num_degree, hidden_dim, padding_idx=0)
        self.out_degree_encoder = nn.Embedding(num_degree, hidden_dim, padding_idx=0)
        self.input_dropout = nn.Dropout(intput_dropout_rate)
        self.layers = nn.ModuleList([
            EncoderLayer(hidden_dim, ffn_dim, dropout_rate, attention_dropout_rate, num_heads)
            for _ in range(n_layers)])
        self.final_ln = nn.LayerNorm(hidden_dim)
        self.downstream_out_proj = nn.Linear(hidden_dim, n_tasks)
        self.graph_token = nn.Embedding(1, hidden_dim)
        self.graph_token_virtual_distance = nn.Embedding(1, num_heads)

    def forward(self, x, in_degree, out_degree, spatial_pos, attn_bias):
        n_graph, n_node = x.size()[:2]
        graph_attn_bias = attn_bias.clone().unsqueeze(1).repeat(1, self.num_heads, 1, 1)
        # [n_graph, n_node, n_node, n_head] -> [n_graph, n_head, n_node, n_node]
        spatial_pos_bias = self.spatial_pos_encoder(spatial_pos).permute(0, 3, 1, 2)
        graph_attn_bias[:, :, 1:, 1:] = graph_attn_bias[:, :, 1:, 1:] + spatial_pos_bias
        # reset spatial pos here
        t = self.graph_token_virtual_distance.weight.view(1, self.num_heads, 1)
        graph_attn_bias[:, :, 1:, 0] = graph_attn_bias[:, :, 1:, 0] + t
        graph_attn_bias[:, :, 0, :] = graph_attn_bias[:, :, 0, :] + t
        graph_attn_bias = graph_attn_bias + attn_bias.unsqueeze(1)  # reset

        padding_mask = x[:, :, 0].eq(0)
        padding_mask = torch.cat([torch.zeros_like(padding_mask[:, :1]), padding_mask], dim=1)

        node_feature = self.atom_encoder(x).sum(dim=-2)
        node_feature = node_feature + self.in_degree_encoder(in_degree) + self.out_degree_encoder(out_degree)
        graph_token_feature = self.graph_token.weight.unsqueeze(0).repeat(n_graph, 1, 1)
        graph_node_feature = torch.cat([graph_token_feature, node_feature], dim=1)

        output = self.input_dropout(graph_node_feature)
        for enc_layer in self.layers:
            output = enc_layer(output, graph_attn_bias, padding_mask)
        output = self.final_ln(output)
        return self.downstream_out_proj(output[:, 0, :])


# ---- Flax half: Linen, the projections of a layer fused, tables as plain parameters ----


class Lookup(fnn.Module):
    """An embedding whose row 0 (padding) is never trained."""

    rows: int
    width: int

    @fnn.compact
    def __call__(self, ids):
        table = self.param("table", fnn.initializers.normal(0.02), (self.rows, self.width))
        table = jnp.concatenate([lax.stop_gradient(table[:1]), table[1:]])
        return jnp.take(table, ids, axis=0)


class GraphAttention(fnn.Module):
    heads: int
    att_drop: float

    @fnn.compact
    def __call__(self, x, bias, dead, deterministic):
        width = x.shape[-1]
        size = width // self.heads
        q, k, v = jnp.moveaxis(fnn.DenseGeneral((3, self.heads, size), name="qkv")(x), 2, 0)
        logits = jnp.einsum("bihd,bjhd->bhij", q, k) / jnp.sqrt(size).astype(x.dtype) + bias
        logits = jnp.where(dead[:, None, None, :], -jnp.inf, logits)
        share = jax.nn.softmax(logits)
        share = fnn.Dropout(self.att_drop)(share, deterministic=deterministic)
        mixed = jnp.einsum("bhij,bjhd->bihd", share, v)
        return fnn.DenseGeneral(width, axis=(-2, -1), name="merge")(mixed)


class GraphBlock(fnn.Module):
    heads: int
    inner: int
    drop: float
    att_drop: float

    @fnn.compact
    def __call__(self, x, bias, dead, deterministic):
        def dropped(v):
            return fnn.Dropout(self.drop)(v, deterministic=deterministic)

        y = fnn.LayerNorm(epsilon=1e-5, name="norm_a")(x)
        y = GraphAttention(self.heads, self.att_drop, name="attend")(y, bias, dead, deterministic)
        x = x + dropped(y)
        y = fnn.LayerNorm(epsilon=1e-5, name="norm_f")(x)
        y = fnn.gelu(fnn.Dense(self.inner, name="widen")(y), approximate=False)
        y = fnn.Dense(x.shape[-1], name="narrow")(y)
        return x + dropped(y)


class GraphNet(fnn.Module):
    depth: int = 2
    heads: int = 3
    width: int = 15
    inner: int = 17
    atoms: int = 19
    degrees: int = 9
    distances: int = 8
    drop: float = 0.1
    in_drop: float = 0.15
    att_drop: float = 0.3
    targets: int = 11

    @fnn.compact
    def __call__(self, atoms, degree_in, degree_out, distance, extra, deterministic=True):
        batch, nodes = atoms.shape[:2]
        hub = self.param("hub", fnn.initializers.normal(0.02), (self.width,))
        reach = self.param("reach", fnn.initializers.normal(0.02), (self.heads,))

        # the virtual node stands at index 0; its distance to and from every node is one learnt number per head
        spatial = Lookup(self.distances, self.heads, name="distance")(distance)
        bias = jnp.pad(spatial, ((0, 0), (1, 0), (1, 0), (0, 0)))
        n = jnp.arange(nodes + 1)
        touches_hub = (n[:, None] == 0) | (n[None, :] == 0)
        bias = jnp.where(touches_hub[None, :, :, None], reach, bias)
        bias = jnp.moveaxis(bias, -1, 1) + 2 * extra[:, None]

        dead = jnp.pad(atoms[:, :, 0] == 0, ((0, 0), (1, 0)))
        x = Lookup(self.atoms, self.width, name="atom")(atoms).sum(axis=2)
        x = x + Lookup(self.degrees, self.width, name="inward")(degree_in)
        x = x + Lookup(self.degrees, self.width, name="outward")(degree_out)
        first = jnp.broadcast_to(hub, (batch, 1, self.width)).astype(x.dtype)
        x = jnp.concatenate([first, x], axis=1)
        x = fnn.Dropout(self.in_drop)(x, deterministic=deterministic)
        for k in range(self.depth):
            block = GraphBlock(self.heads, self.inner, self.drop, self.att_drop, name=f"block{k}")
            x = block(x, bias, dead, deterministic)
        x = fnn.LayerNorm(epsilon=1e-5, name="last")(x[:, 0])
        return fnn.Dense(self.targets, name="readout")(x)


def port_weights(net):
    arr = lambda w: jnp.asarray(w.detach().numpy())
    dense = lambda l: {"kernel": arr(l.weight).T, "bias": arr(l.bias)}
    norm = lambda l: {"scale": arr(l.weight), "bias": arr(l.bias)}
    heads = net.num_heads

    def block(layer):
        att = layer.self_attention
        parts = (att.linear_q, att.linear_k, att.linear_v)
        kernel = jnp.stack([arr(l.weight).T.reshape(-1, heads, att.att_size) for l in parts], axis=1)
        bias = jnp.stack([arr(l.bias).reshape(heads, att.att_size) for l in parts])
        merge = dense(att.output_layer)
        merge["kernel"] = merge["kernel"].reshape(heads, att.att_size, -1)
        return {"attend": {"qkv": {"kernel": kernel, "bias": bias}, "merge": merge},
                "norm_a": norm(layer.self_attention_norm), "norm_f": norm(layer.ffn_norm),
                "widen": dense(layer.ffn.layer1), "narrow": dense(layer.ffn.layer2)}

    params = {f"block{k}": block(layer) for k, layer in enumerate(net.layers)}
    params["hub"] = arr(net.graph_token.weight)[0]
    params["reach"] = arr(net.graph_token_virtual_distance.weight)[0]
    params["atom"] = {"table": arr(net.atom_encoder.weight)}
    params["inward"] = {"table": arr(net.in_degree_encoder.weight)}
    params["outward"] = {"table": arr(net.out_degree_encoder.weight)}
    params["distance"] = {"table": arr(net.spatial_pos_encoder.weight)}
    params["last"] = norm(net.final_ln)
    params["readout"] = dense(net.downstream_out_proj)
    return GraphNet(), {"params": params}


def build(seed):
    torch.manual_seed(seed)
    net = Graphormer()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() == 1:
                shift = 1.1 if ("norm" in name or "final_ln" in name) and name.endswith("weight") else 0.0
                p.copy_(shift + 0.25 * torch.randn_like(p))
            else:
                p.copy_((0.6 if p.shape[0] < 10 or "encoder" in name else 0.35) * torch.randn_like(p))
    net.eval()
    rs = np.random.RandomState(seed + 1)
    graphs, nodes = 4, 6
    x = rs.randint(1, 19, (graphs, nodes, 2))
    in_degree, out_degree = rs.randint(1, 9, (2, graphs, nodes))
    spatial_pos = rs.randint(1, 8, (graphs, nodes, nodes))
    spatial_pos[:, np.arange(nodes), np.arange(nodes)] = 1
    spatial_pos[0, 1, 4] = spatial_pos[2, 0, 3] = 0
    for g, size in ((1, 4), (3, 5)):
        x[g, size:], in_degree[g, size:], out_degree[g, size:] = 0, 0, 0
        spatial_pos[g, size:], spatial_pos[g, :, size:] = 0, 0
    attn_bias = (0.4 * rs.randn(graphs, nodes + 1, nodes + 1)).astype(np.float32)
    return {"torch": net, "flax": port_weights(net),
            "inputs": {"x": x, "in_degree": in_degree, "out_degree": out_degree,
                       "spatial_pos": spatial_pos, "attn_bias": attn_bias}}


FAULTS = [
    {"title": "the padding mask is not shifted by the virtual node: its entry is put at the end",
     "edits": [("        dead = jnp.pad(atoms[:, :, 0] == 0, ((0, 0), (1, 0)))",
                "        dead = jnp.pad(atoms[:, :, 0] == 0, ((0, 0), (0, 1)))")],
     "layers": ["layers.0.self_attention", ""],
     "between": ("the input", "layers.0.self_attention.att_dropout"),
     "causes": ["mask", "offset", "concat"], "level": "outputs"},
    {"title": "the embedding of out-degrees is indexed with the in-degrees",
     "edits": [("name=\"outward\")(degree_out)", "name=\"outward\")(degree_in)")],
     "layers": ["out_degree_encoder"],
     "between": ("in_degree_encoder", "input_dropout"),
     "causes": ["operand", "swapped"], "level": "outputs"},
    {"title": "the attention bias given as input is added once and not twice (torch's 'reset')",
     "edits": [("jnp.moveaxis(bias, -1, 1) + 2 * extra[:, None]", "jnp.moveaxis(bias, -1, 1) + extra[:, None]")],
     "layers": ["", "layers.0.self_attention"],
     "between": ("the input", "layers.0.self_attention.att_dropout"),
     "causes": ["scale", "left_out", "constant"], "level": "outputs"},
    {"title": "the rows of padding of the embeddings get a gradient",
     "edits": [("        table = jnp.concatenate([lax.stop_gradient(table[:1]), table[1:]])\n", "")],
     "layers": ["atom_encoder", "spatial_pos_encoder", "in_degree_encoder", "out_degree_encoder"],
     "between": None,
     "causes": ["padding_idx", "stop_gradient"], "level": "gradients"},
    {"title": "the attention's dropout takes the rate of the residual dropout",
     "edits": [("        y = GraphAttention(self.heads, self.att_drop, name=", "        y = GraphAttention(self.heads, self.drop, name=")],
     "layers": ["layers.0.self_attention.att_dropout", "layers.1.self_attention.att_dropout"],
     "between": None,
     "causes": ["dropout", "training_attribute", "constant"], "level": "attributes"},
]
