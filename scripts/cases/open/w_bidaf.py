"""BiDAF: padded words, highway layers, a shared BiGRU, attention flow both ways, modelling GRU, start and end logits."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn


class Highway(nn.Module):
    def __init__(self, size, n):
        super().__init__()
        self.transforms = nn.ModuleList([nn.Linear(size, size) for _ in range(n)])
        self.gates = nn.ModuleList([nn.Linear(size, size) for _ in range(n)])

    def forward(self, x):
        for gate, transform in zip(self.gates, self.transforms):
            g = torch.sigmoid(gate(x))
            x = g * torch.relu(transform(x)) + (1 - g) * x
        return x


class AttentionFlow(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.att_weight_c = nn.Linear(size, 1)
        self.att_weight_q = nn.Linear(size, 1)
        self.att_weight_cq = nn.Parameter(torch.zeros(1, 1, size))

    def forward(self, c, q, c_mask, q_mask):
        s = (c * self.att_weight_cq) @ q.transpose(1, 2)
        s = s + self.att_weight_c(c) + self.att_weight_q(q).transpose(1, 2)
        a = s.masked_fill(~q_mask[:, None, :], -1e30).softmax(dim=2)
        c2q = a @ q
        top = s.masked_fill(~q_mask[:, None, :], -1e30).max(dim=2).values
        b = top.masked_fill(~c_mask, -1e30).softmax(dim=1)
        q2c = (b[:, None] @ c).expand(-1, c.shape[1], -1)
        return torch.cat([c, c2q, c * c2q, c * q2c], dim=-1)


class BiDAF(nn.Module):
    def __init__(self, vocab=23, emb=6, hidden=4):
        super().__init__()
        self.word_emb = nn.Embedding(vocab, emb, padding_idx=0)
        self.highway = Highway(emb, 2)
        self.context_gru = nn.GRU(emb, hidden, bidirectional=True, batch_first=True)
        self.attention = AttentionFlow(2 * hidden)
        self.modeling_gru = nn.GRU(8 * hidden, hidden, bidirectional=True, batch_first=True)
        self.p1_weight_g = nn.Linear(8 * hidden, 1)
        self.p1_weight_m = nn.Linear(2 * hidden, 1)
        self.p2_weight_g = nn.Linear(8 * hidden, 1)
        self.p2_weight_m = nn.Linear(2 * hidden, 1)

    def forward(self, context, query):
        c_mask, q_mask = context != 0, query != 0
        c = self.context_gru(self.highway(self.word_emb(context)))[0]
        q = self.context_gru(self.highway(self.word_emb(query)))[0]
        g = self.attention(c, q, c_mask, q_mask)
        m = self.modeling_gru(g)[0]
        start = (self.p1_weight_g(g) + self.p1_weight_m(m)).squeeze(-1)
        end = (self.p2_weight_g(g) + self.p2_weight_m(m)).squeeze(-1)
        return start.masked_fill(~c_mask, -9.0), end.masked_fill(~c_mask, -9.0)


# JAX: pure functions over a dict of arrays -------------------------------------------------


def affine(p, x):
    return x @ p["w"] + p["b"]


def highway(ps, x):
    for p in ps:
        g = jax.nn.sigmoid(affine(p["gate"], x))
        h = jax.nn.relu(affine(p["transform"], x))
        x = g * h + (1.0 - g) * x
    return x


def gru(p, xs, reverse=False):
    """xs [batch, time, features]; torch's gate order r, z, n."""
    def step(h, gx):
        gh = h @ p["w_h"] + p["b_h"]
        xr, xz, xn = jnp.split(gx, 3, axis=-1)
        hr, hz, hn = jnp.split(gh, 3, axis=-1)
        r, z = jax.nn.sigmoid(xr + hr), jax.nn.sigmoid(xz + hz)
        n = jnp.tanh(xn + r * hn)
        h = (1 - z) * n + z * h
        return h, h

    gates = jnp.swapaxes(xs @ p["w_x"] + p["b_x"], 0, 1)
    h0 = jnp.zeros((xs.shape[0], p["w_h"].shape[0]), xs.dtype)
    _, hs = jax.lax.scan(step, h0, gates, reverse=reverse)
    return jnp.swapaxes(hs, 0, 1)


def bigru(p, xs):
    return jnp.concatenate([gru(p["fwd"], xs), gru(p["bwd"], xs, reverse=True)], axis=-1)


def attention_flow(p, c, q, c_mask, q_mask):
    s = jnp.einsum("bcd,d,bqd->bcq", c, p["cq"], q)
    s = s + affine(p["c"], c) + jnp.swapaxes(affine(p["q"], q), 1, 2)
    s = jnp.where(q_mask[:, None, :], s, -1e30)
    c2q = jax.nn.softmax(s, axis=-1) @ q
    best = jnp.where(c_mask, jnp.max(s, axis=-1), -1e30)
    q2c = jnp.einsum("bc,bcd->bd", jax.nn.softmax(best, axis=-1), c)[:, None, :]
    return jnp.concatenate([c, c2q, c * c2q, c * q2c], axis=-1)


def lookup(table, ids):
    rows = table[ids]
    return jnp.where((ids == 0)[..., None], jax.lax.stop_gradient(rows), rows)


def predict(params, context, query):
    c_mask, q_mask = context != 0, query != 0
    encode = lambda ids: bigru(params["encoder"], highway(params["highway"], lookup(params["words"], ids)))
    c, q = encode(context), encode(query)
    g = attention_flow(params["flow"], c, q, c_mask, q_mask)
    m = bigru(params["model"], g)
    logits = [(affine(params[k + "_g"], g) + affine(params[k + "_m"], m))[..., 0] for k in ("start", "end")]
    return tuple(jnp.where(c_mask, z, -9.0) for z in logits)


def weights(net):
    f = lambda t: jnp.asarray(t.detach().numpy())
    lin = lambda m: {"w": f(m.weight).T, "b": f(m.bias)}

    def rnn(m):
        one = lambda s: {"w_x": f(getattr(m, "weight_ih_l0" + s)).T, "w_h": f(getattr(m, "weight_hh_l0" + s)).T,
                         "b_x": f(getattr(m, "bias_ih_l0" + s)), "b_h": f(getattr(m, "bias_hh_l0" + s))}
        return {"fwd": one(""), "bwd": one("_reverse")}

    att = net.attention
    return {
        "words": f(net.word_emb.weight),
        "highway": [{"gate": lin(g), "transform": lin(t)} for g, t in zip(net.highway.gates, net.highway.transforms)],
        "encoder": rnn(net.context_gru),
        "flow": {"c": lin(att.att_weight_c), "q": lin(att.att_weight_q), "cq": f(att.att_weight_cq)[0, 0]},
        "model": rnn(net.modeling_gru),
        "start_g": lin(net.p1_weight_g), "start_m": lin(net.p1_weight_m),
        "end_g": lin(net.p2_weight_g), "end_m": lin(net.p2_weight_m),
    }


def build(seed):
    torch.manual_seed(seed)
    net = BiDAF().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.6)
        net.word_emb.weight[0] = 0.0
    rng = np.random.default_rng(seed)
    context, query = rng.integers(1, 23, (3, 8)), rng.integers(1, 23, (3, 5))
    context[1, 6:], context[2, 3:], query[0, 4:], query[2, 2:] = 0, 0, 0, 0
    return {"torch": net, "flax": (predict, weights(net)), "inputs": (context, query)}


FAULTS = [
    {
        "title": "the padding word's row is trained with the others",
        "edits": [("    return jnp.where((ids == 0)[..., None], jax.lax.stop_gradient(rows), rows)", "    return rows")],
        "layers": ["word_emb"],
        "causes": ["padding_idx"],
        "level": "gradients",
    },
    {
        "title": "reset gate multiplies the state before the matrix product",
        "edits": [("        hr, hz, hn = jnp.split(gh, 3, axis=-1)\n", "        hr, hz, _ = jnp.split(gh, 3, axis=-1)\n"),
                  ("        n = jnp.tanh(xn + r * hn)\n", "        k = h.shape[-1]\n        n = jnp.tanh(xn + (r * h) @ p[\"w_h\"][:, 2 * k:] + p[\"b_h\"][2 * k:])\n")],
        "layers": ["context_gru"],
        "causes": ["gru_reset"],
        "level": "outputs",
    },
    {
        "title": "padding of the context not masked in query-to-context attention",
        "edits": [("best = jnp.where(c_mask, jnp.max(s, axis=-1), -1e30)", "best = jnp.max(s, axis=-1)")],
        "layers": ["attention"],
        "between": ("attention.att_weight_q", "modeling_gru"),
        "causes": ["mask"],
        "level": "outputs",
    },
    {
        "title": "highway gate carries where it should transform",
        "edits": [("x = g * h + (1.0 - g) * x", "x = (1.0 - g) * h + g * x")],
        "layers": ["highway"],
        "between": ("highway.transforms.0", "highway.gates.1"),
        "causes": ["swapped", "gates"],
        "level": "outputs",
    },
    {
        "title": "backward GRU's outputs left in the order in which they were computed",
        "edits": [("    return jnp.concatenate([gru(p[\"fwd\"], xs), gru(p[\"bwd\"], xs, reverse=True)], axis=-1)",
                   "    return jnp.concatenate([gru(p[\"fwd\"], xs), gru(p[\"bwd\"], xs[:, ::-1])], axis=-1)")],
        "layers": ["context_gru"],
        "causes": ["reversed"],
        "level": "outputs",
    },
]
