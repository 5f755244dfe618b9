"""DLRM: bottom MLP, embedding bags (sum, mean, weighted), dot interaction, top MLP (nnx)."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
from flax import nnx


class DLRM_Net(nn.Module):
    def __init__(self, m_spa, ln_emb, n_users, ln_bot, ln_top, threshold):
        super().__init__()
        self.loss_threshold = threshold
        self.bot_l = self.create_mlp(ln_bot, sigmoid_layer=-1)
        self.emb_l = nn.ModuleList()
        for n, mode in ln_emb:
            self.emb_l.append(nn.EmbeddingBag(n, m_spa, mode=mode, padding_idx=0))
        self.user_emb = nn.Embedding(n_users, m_spa, padding_idx=0)
        self.top_l = self.create_mlp(ln_top, sigmoid_layer=len(ln_top) - 2)

    def create_mlp(self, ln, sigmoid_layer):
        layers = nn.ModuleList()
        for i in range(len(ln) - 1):
            layers.append(nn.Linear(ln[i], ln[i + 1]))
            layers.append(nn.Sigmoid() if i == sigmoid_layer else nn.ReLU())
        return nn.Sequential(*layers)

    def apply_emb(self, user, bags, weights):
        ly = [self.user_emb(user)]
        for k, emb in enumerate(self.emb_l):
            idx = bags[:, k] % emb.num_embeddings
            w = weights if emb.mode == "sum" else None
            ly.append(emb(idx, per_sample_weights=w))
        return ly

    def interact_features(self, x, ly):
        batch_size, d = x.shape
        T = torch.cat([x] + ly, dim=1).view(batch_size, -1, d)
        Z = torch.bmm(T, T.transpose(1, 2))
        _, ni, nj = Z.shape
        li = torch.tensor([i for i in range(ni) for j in range(i)])
        lj = torch.tensor([j for i in range(nj) for j in range(i)])
        return torch.cat([x, Z[:, li, lj]], dim=1)

    def forward(self, dense_x, user, bags, weights):
        x = self.bot_l(torch.log(dense_x + 1))
        ly = self.apply_emb(user, bags, weights)
        z = self.interact_features(x, ly)
        p = self.top_l(z)
        if 0.0 < self.loss_threshold < 1.0:
            p = torch.clamp(p, min=self.loss_threshold, max=1.0 - self.loss_threshold)
        return p


class MLP(nnx.Module):
    def __init__(self, sizes, rngs, final_activation=True):
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in zip(sizes[:-1], sizes[1:])])
        self.final_activation = final_activation

    def __call__(self, x):
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < last or self.final_activation:
                x = nnx.relu(x)
        return x


class EmbeddingBag(nnx.Module):
    def __init__(self, num, dim, mode, rngs):
        self.table = nnx.Embed(num, dim, rngs=rngs)
        self.mode = mode

    def __call__(self, idx, weights=None):
        idx = jnp.mod(idx, self.table.num_embeddings)
        vectors = jnp.take(self.table.embedding[...], idx, axis=0)
        valid = (idx != 0).astype(vectors.dtype)[..., None]
        if self.mode == "sum":
            return jnp.sum(vectors * valid * weights[..., None], axis=1)
        count = jnp.maximum(valid.sum(axis=1), 1)
        return jnp.sum(vectors * valid, axis=1) / count


class DLRM(nnx.Module):
    def __init__(self, dim, bag_sizes, n_users, bottom, top, threshold, *, rngs):
        self.bottom = MLP(bottom, rngs)
        self.bags = nnx.List([EmbeddingBag(n, dim, mode, rngs) for n, mode in bag_sizes])
        self.users = nnx.Embed(n_users, dim, rngs=rngs)
        self.top = MLP(top, rngs, final_activation=False)
        self.threshold = threshold

    def lookup_user(self, user):
        e = jnp.take(self.users.embedding[...], user, axis=0)
        return jnp.where((user == 0)[:, None], jax.lax.stop_gradient(e), e)

    def __call__(self, dense_x, user, bags, weights):
        x = self.bottom(jnp.log1p(dense_x))
        feats = [x, self.lookup_user(user)]
        for k, bag in enumerate(self.bags):
            feats.append(bag(bags[:, k], weights if bag.mode == "sum" else None))
        t = jnp.stack(feats, axis=1)
        gram = jnp.einsum("bid,bjd->bij", t, t)
        rows, cols = jnp.tril_indices(t.shape[1], k=-1)
        z = jnp.concatenate([x, gram[:, rows, cols]], axis=-1)
        p = nnx.sigmoid(self.top(z))
        if 0.0 < self.threshold < 1.0:
            p = jnp.clip(p, self.threshold, 1.0 - self.threshold)
        return p


def port(net, model):
    def fill(mlp, seq):
        for dst, src in zip(mlp.layers, [m for m in seq if isinstance(m, nn.Linear)]):
            dst.kernel[...] = jnp.asarray(src.weight.detach().numpy().T)
            dst.bias[...] = jnp.asarray(src.bias.detach().numpy())

    fill(model.bottom, net.bot_l)
    fill(model.top, net.top_l)
    for dst, src in zip(model.bags, net.emb_l):
        dst.table.embedding[...] = jnp.asarray(src.weight.detach().numpy())
    model.users.embedding[...] = jnp.asarray(net.user_emb.weight.detach().numpy())
    return model


BAGS = [(13, "sum"), (17, "mean"), (11, "mean")]


def build(seed):
    torch.manual_seed(seed)
    bottom, top = [7, 16, 9], [9 + 10, 14, 1]
    net = DLRM_Net(9, BAGS, 12, bottom, top, 0.3).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.normal_(0, 0.35) if p.ndim > 1 else p.uniform_(-0.3, 0.3)
        net.user_emb.weight[0] = 0.25
        net.top_l[2].bias -= 0.4
        net.top_l[2].weight *= 0.7
    rng = np.random.default_rng(seed)
    dense = rng.exponential(4.0, (6, 7))
    user = np.array([3, 0, 5, 11, 0, 2])
    bags = rng.integers(1, 40, (6, 3, 4))
    bags[::2, :, 3] = 0
    bags[1, :, 1] = 0
    weights = rng.uniform(0.2, 2.0, (6, 4))
    model = port(net, DLRM(9, BAGS, 12, bottom, top, 0.3, rngs=nnx.Rngs(seed)))
    return {"torch": net, "flax": model, "inputs": (dense, user, bags, weights)}


FAULTS = [
    {
        "title": "mean of a bag over its length, padding counted",
        "edits": [("        count = jnp.maximum(valid.sum(axis=1), 1)\n", "        count = idx.shape[1]\n")],
        "layers": ["emb_l.1"],
        "causes": ["scale", "operand"],
        "level": "outputs",
    },
    {
        "title": "pairs taken from the upper triangle, in another order",
        "edits": [("rows, cols = jnp.tril_indices(t.shape[1], k=-1)", "rows, cols = jnp.triu_indices(t.shape[1], k=1)")],
        "layers": [""],
        "between": ("emb_l.2", "top_l.0"),
        "causes": ["rearranged", "transposed"],
        "level": "outputs",
    },
    {
        "title": "interactions in front of the dense features",
        "edits": [("jnp.concatenate([x, gram[:, rows, cols]], axis=-1)", "jnp.concatenate([gram[:, rows, cols], x], axis=-1)")],
        "layers": [""],
        "between": ("emb_l.2", "top_l.0"),
        "causes": ["concat"],
        "level": "outputs",
    },
    {
        "title": "bottom MLP without its last ReLU",
        "edits": [("self.bottom = MLP(bottom, rngs)", "self.bottom = MLP(bottom, rngs, final_activation=False)")],
        "layers": ["bot_l.3", "bot_l"],
        "between": ("bot_l.2", "user_emb"),
        "causes": ["missing_layer", "activation"],
        "level": "outputs",
    },
    {
        "title": "row 0 of the users' table is trained",
        "edits": [("        return jnp.where((user == 0)[:, None], jax.lax.stop_gradient(e), e)", "        return e")],
        "layers": ["user_emb"],
        "causes": ["padding_idx"],
        "level": "gradients",
    },
    {
        "title": "hashed ids clamped into the table instead of wrapped",
        "edits": [("idx = jnp.mod(idx, self.table.num_embeddings)", "idx = jnp.minimum(idx, self.table.num_embeddings - 1)")],
        "layers": [""],
        "between": ("user_emb", "emb_l.0"),
        "causes": ["operation"],
        "level": "outputs",
    },
    {
        "title": "log of the counts without adding 1",
        "edits": [("self.bottom(jnp.log1p(dense_x))", "self.bottom(jnp.log(dense_x))")],
        "layers": [""],
        "between": (None, "bot_l.0"),
        "causes": ["left_out", "operation", "constant"],
        "level": "outputs",
    },
    {
        "title": "per-sample weights normalised within the bag",
        "edits": [("valid * weights[..., None], axis=1)", "valid * (weights / weights.sum(-1, keepdims=True))[..., None], axis=1)")],
        "layers": ["emb_l.0", ""],
        "causes": ["scale", "operation"],
        "level": "outputs",
    },
    {
        "title": "probability only clipped from above",
        "edits": [("jnp.clip(p, self.threshold, 1.0 - self.threshold)", "jnp.minimum(p, 1.0 - self.threshold)")],
        "layers": [""],
        "between": ("top_l.2", None),
        "causes": ["left_out", "constant"],
        "level": "outputs",
    },
]
