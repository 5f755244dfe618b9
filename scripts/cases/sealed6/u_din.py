"""Deep Interest Network: target attention over a user's history, pairwise interactions, a PReLU tower."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

USERS, ITEMS, CATES, DIM = 11, 29, 8, 4
HISTORY, COUNTS, ATT_HIDDEN, TOWER, BATCH = 7, 3, (10, 6), (16, 9), 5


# ---- PyTorch ---------------------------------------------------------------------------------
class DNN(nn.Module):
    def __init__(self, inputs_dim, hidden_units, per_channel):
        super().__init__()
        sizes = [inputs_dim] + list(hidden_units)
        self.linears = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes[:-1], sizes[1:]))
        self.activation_layers = nn.ModuleList(nn.PReLU(o if per_channel else 1) for o in hidden_units)

    def forward(self, x):
        for linear, activation in zip(self.linears, self.activation_layers):
            x = activation(linear(x))
        return x


class LocalActivationUnit(nn.Module):
    """The attention MLP on [query, key, query - key, query * key]."""

    def __init__(self, embedding_dim):
        super().__init__()
        self.dnn = DNN(4 * embedding_dim, ATT_HIDDEN, per_channel=False)
        self.dense = nn.Linear(ATT_HIDDEN[-1], 1)

    def forward(self, query, user_behavior):
        queries = query.expand(-1, user_behavior.size(1), -1)
        attention_input = torch.cat(
            [queries, user_behavior, queries - user_behavior, queries * user_behavior], dim=-1)
        return self.dense(self.dnn(attention_input))


class AttentionSequencePoolingLayer(nn.Module):
    def __init__(self, embedding_dim):
        super().__init__()
        self.local_att = LocalActivationUnit(embedding_dim)

    def forward(self, query, keys, keys_length):
        max_length = keys.size(1)
        keys_masks = (torch.arange(max_length)[None, :] < keys_length[:, None]).unsqueeze(1)   # B, 1, T
        score = self.local_att(query, keys).transpose(1, 2)
        score = score / keys.size(-1) ** 0.5
        score = torch.where(keys_masks, score, torch.full_like(score, -2.0 ** 32 + 1))
        return torch.matmul(F.softmax(score, dim=-1), keys)


class InnerProductLayer(nn.Module):
    """Inner products of every pair of fields, <e_i, e_j> for i < j."""

    def forward(self, fields):
        row, col = [], []
        num = fields.size(1)
        for i in range(num - 1):
            for j in range(i + 1, num):
                row.append(i)
                col.append(j)
        return torch.sum(fields[:, row] * fields[:, col], dim=-1)


class BiInteractionPooling(nn.Module):
    def forward(self, fields):
        square_of_sum = torch.pow(fields.sum(dim=1), 2)
        sum_of_square = (fields * fields).sum(dim=1)
        return 0.5 * (square_of_sum - sum_of_square)


class LogCounts(nn.Module):
    """Counts to logarithms; missing counts are negative."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(COUNTS))

    def forward(self, x):
        return self.weight * torch.log1p(F.relu(x))


class PredictionLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return torch.sigmoid(x + self.bias)


class DIN(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding_dict = nn.ModuleDict({
            "user": nn.Embedding(USERS, 2 * DIM),
            "item": nn.Embedding(ITEMS, DIM),
            "cate": nn.Embedding(CATES, DIM),
        })
        self.dense_norm = LogCounts()
        self.attention = AttentionSequencePoolingLayer(2 * DIM)
        self.inner_product = InnerProductLayer()
        self.bi_interaction = BiInteractionPooling()
        fields = 6
        width = fields * DIM + fields * (fields - 1) // 2 + DIM + COUNTS
        self.dnn = DNN(width, TOWER, per_channel=True)
        self.dnn_linear = nn.Linear(TOWER[-1], 1, bias=False)
        self.linear = nn.Linear(COUNTS, 1, bias=False)
        self.out = PredictionLayer()

    def forward(self, user_id, item_id, cate_id, hist_item_id, hist_cate_id, hist_length, counts):
        user = self.embedding_dict["user"](user_id)
        query = torch.cat([self.embedding_dict["item"](item_id), self.embedding_dict["cate"](cate_id)], dim=-1)
        keys = torch.cat(
            [self.embedding_dict["item"](hist_item_id), self.embedding_dict["cate"](hist_cate_id)], dim=-1)
        dense = self.dense_norm(counts)
        hist = self.attention(query.unsqueeze(1), keys, hist_length).squeeze(1)
        flat = torch.cat([user, query, hist], dim=-1)
        fields = flat.view(flat.size(0), -1, DIM)
        pairs, pooled = self.inner_product(fields), self.bi_interaction(fields)
        logit = self.dnn_linear(self.dnn(torch.cat([flat, pairs, pooled, dense], dim=-1))) + self.linear(dense)
        return self.out(logit).squeeze(-1)


# ---- Flax / JAX: plain functions of (params, inputs) -----------------------------------------
def prelu(x, slope):
    return jax.nn.relu(x) - slope * jax.nn.relu(-x)


def affine(p, x):
    return x @ p["w"] + p["b"]


def relevance(p, target, history):
    """Scores (n, t): the first layer acts on its four inputs one by one."""
    of_target, of_key, of_difference, of_product = p["first"]["w"]          # each width, hidden
    h = (target @ (of_target + of_difference))[:, None]
    h = h + history @ (of_key - of_difference)
    h = h + jnp.einsum("nc,ntc,ch->nth", target, history, of_product) + p["first"]["b"]
    h = prelu(h, p["first"]["slope"])
    for layer in p["hidden"]:
        h = prelu(affine(layer, h), layer["slope"])
    return affine(p["last"], h)[..., 0]


def attend(p, target, history, length):
    scores = relevance(p, target, history) / target.shape[-1] ** 0.5
    real = jnp.arange(history.shape[1]) < length[:, None]
    weights = jax.nn.softmax(scores, axis=-1, where=real)
    return jnp.einsum("nt,ntc->nc", jnp.where(real, weights, 0), history)


def interactions(fields):
    """Products of all pairs of fields (n, pairs) and their sum by feature (n, dim)."""
    first, second = np.triu_indices(fields.shape[1], 1)
    gram = jnp.einsum("nic,njc->nij", fields, fields)
    total = fields.sum(1)
    return gram[:, first, second], (total ** 2 - (fields ** 2).sum(1)) / 2


def tower(layers, x):
    for layer in layers:
        x = prelu(affine(layer, x), layer["slope"])
    return x


def interest_net(params, user, item, cate, past_items, past_cates, past_length, counts):
    tables = params["tables"]

    def lookup(items, cates):
        return jnp.concatenate([tables["item"][items], tables["cate"][cates]], axis=-1)

    target = lookup(item, cate)
    interest = attend(params["attention"], target, lookup(past_items, past_cates), past_length)
    flat = jnp.concatenate([tables["user"][user], target, interest], axis=-1)
    pairs, pooled = interactions(flat.reshape(flat.shape[0], -1, DIM))
    logs = params["counts"] * jnp.log1p(jax.nn.relu(counts))
    deep = tower(params["tower"], jnp.concatenate([flat, pairs, pooled, logs], axis=-1))
    logit = deep @ params["deep_out"] + logs @ params["wide_out"] + params["shift"]
    return jax.nn.sigmoid(logit)


def port_weights(net):
    def a(t):
        return jnp.asarray(t.detach().numpy())

    def dense(linear):
        return {"w": a(linear.weight).T, "b": a(linear.bias)}

    def with_slope(linear, activation):
        return {**dense(linear), "slope": a(activation.weight)}

    unit = net.attention.local_att
    first, *hidden = [with_slope(*x) for x in zip(unit.dnn.linears, unit.dnn.activation_layers)]
    first["w"] = first["w"].reshape(4, 2 * DIM, -1)
    params = {
        "tables": {name: a(table.weight) for name, table in net.embedding_dict.items()},
        "attention": {"first": first, "hidden": hidden, "last": dense(unit.dense)},
        "counts": a(net.dense_norm.weight),
        "tower": [with_slope(*x) for x in zip(net.dnn.linears, net.dnn.activation_layers)],
        "deep_out": a(net.dnn_linear.weight)[0],
        "wide_out": a(net.linear.weight)[0],
        "shift": a(net.out.bias),
    }
    return interest_net, params


def build(seed):
    torch.manual_seed(seed)
    net = DIN().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "activation_layers" in name:
                p.copy_(0.1 + 0.4 * torch.rand_like(p))
            elif name == "dense_norm.weight":
                p.copy_(0.5 + 0.4 * torch.rand_like(p))
            elif "embedding" in name:
                p.copy_(0.6 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3))
    rs = np.random.RandomState(seed)
    counts = rs.poisson(2.5, (BATCH, COUNTS)).astype(np.float32)
    counts[0, 1] = counts[2, 0] = counts[3, 2] = 0
    counts[1, 2] = -1
    inputs = {
        "user_id": rs.randint(0, USERS, BATCH),
        "item_id": rs.randint(0, ITEMS, BATCH),
        "cate_id": rs.randint(0, CATES, BATCH),
        "hist_item_id": rs.randint(0, ITEMS, (BATCH, HISTORY)),
        "hist_cate_id": rs.randint(0, CATES, (BATCH, HISTORY)),
        "hist_length": np.array([3, 7, 1, 5, 2]),
        "counts": counts,
    }
    return {"torch": net, "flax": port_weights(net), "inputs": inputs}


FAULTS = [
    {"title": "the attention's first layer takes its weights of the product for those of the difference",
     "edits": [("of_target, of_key, of_difference, of_product = p", "of_target, of_key, of_product, of_difference = p")],
     "layers": ["attention.local_att.dnn.linears.0", "attention.local_att.dnn", "attention.local_att"],
     "between": ("embedding_dict.cate", "attention.local_att.dnn.activation_layers.0"),
     "causes": ["concat", "blocks", "swapped"], "level": "outputs"},
    {"title": "the history's mask lets one step of padding through",
     "edits": [("jnp.arange(history.shape[1]) < length[:, None]", "jnp.arange(history.shape[1]) <= length[:, None]")],
     "layers": ["attention"],
     "between": ("attention.local_att", "inner_product"),
     "causes": ["mask", "offset"], "level": "outputs"},
    {"title": "the pairs of fields come in the order of the lower triangle",
     "edits": [("np.triu_indices(fields.shape[1], 1)", "np.tril_indices(fields.shape[1], -1)")],
     "layers": ["inner_product"],
     "between": ("attention", "dnn"),
     "causes": ["rearranged", "permuted", "transposed"], "level": "outputs"},
    {"title": "counts are bounded by jnp.maximum, which gives half a gradient at a count of zero",
     "edits": [("jnp.log1p(jax.nn.relu(counts))", "jnp.log1p(jnp.maximum(counts, 0))")],
     "layers": ["dense_norm"],
     "between": None,
     "causes": ["kink"], "level": "gradients"},
    {"title": "the prediction's global bias is not ported and stays zero",
     "edits": [('"shift": a(net.out.bias),', '"shift": jnp.zeros_like(a(net.out.bias)),')],
     "layers": ["out"],
     "between": None,
     "causes": ["bias_missing", "default"], "level": "bits"},
]
