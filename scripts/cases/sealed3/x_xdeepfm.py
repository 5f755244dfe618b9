"""xDeepFM: one table for all fields, compressed interaction network with split halves, MLP with batch norm, wide part."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn


class FeaturesLinear(nn.Module):
    def __init__(self, field_dims):
        super().__init__()
        self.fc = nn.Embedding(sum(field_dims), 1)
        self.bias = nn.Parameter(torch.zeros(1))
        self.offsets = np.array((0, *np.cumsum(field_dims)[:-1]), dtype=np.int64)

    def forward(self, x):
        x = x + x.new_tensor(self.offsets).unsqueeze(0)
        return torch.sum(self.fc(x), dim=1) + self.bias


class FeaturesEmbedding(nn.Module):
    def __init__(self, field_dims, embed_dim):
        super().__init__()
        self.embedding = nn.Embedding(sum(field_dims), embed_dim)
        self.offsets = np.array((0, *np.cumsum(field_dims)[:-1]), dtype=np.int64)

    def forward(self, x):
        return self.embedding(x + x.new_tensor(self.offsets).unsqueeze(0))


class CompressedInteractionNetwork(nn.Module):
    def __init__(self, fields, sizes):
        super().__init__()
        self.conv_layers = nn.ModuleList()
        prev, total = fields, 0
        for i, size in enumerate(sizes):
            self.conv_layers.append(nn.Conv1d(fields * prev, size, 1))
            prev = size // 2 if i < len(sizes) - 1 else size
            total += prev
        self.fc = nn.Linear(total, 1)

    def forward(self, x):
        xs = []
        x0, h = x.unsqueeze(2), x
        for i, conv in enumerate(self.conv_layers):
            x = x0 * h.unsqueeze(1)
            b, f0, fin, e = x.shape
            x = F.relu(conv(x.view(b, f0 * fin, e)))
            if i < len(self.conv_layers) - 1:
                x, h = torch.split(x, x.shape[1] // 2, dim=1)
            xs.append(x)
        return self.fc(torch.sum(torch.cat(xs, dim=1), 2))


class MultiLayerPerceptron(nn.Module):
    def __init__(self, size, dims):
        super().__init__()
        layers = []
        for dim in dims:
            layers += [nn.Linear(size, dim), nn.BatchNorm1d(dim), nn.ReLU()]
            size = dim
        self.mlp = nn.Sequential(*layers, nn.Linear(size, 1))

    def forward(self, x):
        return self.mlp(x)


class XDeepFM(nn.Module):
    def __init__(self, field_dims=(5, 8, 3, 6), embed_dim=7, mlp_dims=(12, 9), cross=(6, 8, 5)):
        super().__init__()
        self.embedding = FeaturesEmbedding(field_dims, embed_dim)
        self.cin = CompressedInteractionNetwork(len(field_dims), cross)
        self.mlp = MultiLayerPerceptron(len(field_dims) * embed_dim, mlp_dims)
        self.linear = FeaturesLinear(field_dims)

    def forward(self, x):
        e = self.embedding(x)
        y = self.linear(x) + self.cin(e) + self.mlp(e.view(e.shape[0], -1))
        return torch.sigmoid(y.squeeze(1))


# ~~~~~~~~ Flax NNX ~~~~~~~~


class Norm1d(nnx.Module):
    def __init__(self, n):
        self.scale, self.bias = nnx.Param(jnp.ones(n)), nnx.Param(jnp.zeros(n))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(n)), nnx.BatchStat(jnp.ones(n))
        self.use_running_average = False

    def __call__(self, x):
        if self.use_running_average:
            m, v = self.mean[...], self.var[...]
        else:
            m, v = x.mean(axis=0), x.var(axis=0)
            self.track(m, x.var(axis=0, ddof=1))
        return self.scale[...] * (x - m) * jax.lax.rsqrt(v + 1e-5) + self.bias[...]

    def track(self, m, v, momentum=0.1):
        self.mean[...] += momentum * (jax.lax.stop_gradient(m) - self.mean[...])
        self.var[...] += momentum * (jax.lax.stop_gradient(v) - self.var[...])


class CrossLayer(nnx.Module):
    def __init__(self, fields, before, after):
        self.kernel = nnx.Param(jnp.zeros((fields, before, after)))
        self.bias = nnx.Param(jnp.zeros((after,)))

    def __call__(self, base, hidden):
        y = jnp.einsum("bie,bje,ijo->boe", base, hidden, self.kernel[...])
        return nnx.relu(y + self.bias[...][:, None])


class Interactions(nnx.Module):
    def __init__(self, fields, sizes, rngs):
        layers, before, width = [], fields, 0
        for i, size in enumerate(sizes):
            layers.append(CrossLayer(fields, before, size))
            before = size if i + 1 == len(sizes) else size // 2
            width += before
        self.layers = nnx.List(layers)
        self.out = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, base):
        hidden, parts = base, []
        *inner, last = self.layers
        for layer in inner:
            direct, hidden = jnp.split(layer(base, hidden), 2, axis=1)
            parts.append(direct)
        parts.append(last(base, hidden))
        pooled = jnp.sum(jnp.concatenate(parts, axis=1), axis=-1)
        return self.out(pooled)


class DeepPart(nnx.Module):
    def __init__(self, size, dims, rngs):
        sizes = (size, *dims)
        self.hidden = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in zip(sizes, dims)])
        self.norms = nnx.List([Norm1d(o) for o in dims])
        self.out = nnx.Linear(sizes[-1], 1, rngs=rngs)

    def __call__(self, x):
        for linear, norm in zip(self.hidden, self.norms):
            x = nnx.relu(norm(linear(x)))
        return self.out(x)


class ClickModel(nnx.Module):
    def __init__(self, vocab=(5, 8, 3, 6), dim=7, deep=(12, 9), cross=(6, 8, 5), *, rngs):
        self.starts = tuple(sum(vocab[:i]) for i in range(len(vocab)))
        self.wide, self.wide_bias = nnx.Embed(sum(vocab), 1, rngs=rngs), nnx.Param(jnp.zeros((1,)))
        self.table = nnx.Embed(sum(vocab), dim, rngs=rngs)
        self.interactions = Interactions(len(vocab), cross, rngs)
        self.deep = DeepPart(len(vocab) * dim, deep, rngs)

    def __call__(self, ids):
        rows = ids + jnp.array(self.starts, ids.dtype)
        e = self.table(rows)
        wide = self.wide(rows).sum(axis=1) + self.wide_bias[...]
        logit = wide + self.interactions(e) + self.deep(e.reshape(e.shape[0], -1))
        return nnx.sigmoid(logit[:, 0])


def port(net, model):
    f = lambda t: jnp.asarray(t.detach().numpy())

    def lin(dst, src):
        dst.kernel[...], dst.bias[...] = f(src.weight).T, f(src.bias)

    model.table.embedding[...] = f(net.embedding.embedding.weight)
    model.wide.embedding[...], model.wide_bias[...] = f(net.linear.fc.weight), f(net.linear.bias)
    for layer, conv in zip(model.interactions.layers, net.cin.conv_layers):
        n, m, _ = layer.kernel.shape
        layer.kernel[...] = f(conv.weight).reshape(-1, n, m).transpose(1, 2, 0)
        layer.bias[...] = f(conv.bias)
    lin(model.interactions.out, net.cin.fc)
    *hidden, out = (m for m in net.mlp.mlp if isinstance(m, nn.Linear))
    for dst, src in zip(model.deep.hidden, hidden):
        lin(dst, src)
    lin(model.deep.out, out)
    for dst, src in zip(model.deep.norms, (m for m in net.mlp.mlp if isinstance(m, nn.BatchNorm1d))):
        dst.scale[...], dst.bias[...] = f(src.weight), f(src.bias)
        dst.mean[...], dst.var[...] = f(src.running_mean), f(src.running_var)


def build(seed):
    torch.manual_seed(seed)
    net = XDeepFM()
    for p in net.parameters():
        p.data.normal_(0, 0.3)
    net.embedding.embedding.weight.data.normal_(0, 0.9)
    net.cin.fc.weight.data.normal_(0, 0.12)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.weight.data.uniform_(0.6, 1.5)
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 1.5)
    net.eval()
    model = ClickModel(rngs=nnx.Rngs(seed))
    port(net, model)
    model.eval()
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.integers(0, n, 11) for n in (5, 8, 3, 6)], axis=1)
    return {"torch": net, "flax": model, "inputs": (ids,)}


FAULTS = [
    {
        "title": "wide part looks up the ids without the offsets of the fields",
        "edits": [("wide = self.wide(rows).sum(axis=1)", "wide = self.wide(ids).sum(axis=1)")],
        "layers": ["linear", "linear.fc"],
        "causes": ["offset", "wiring", "left_out"],
        "level": "outputs",
    },
    {
        "title": "the first half goes on to the next layer, the second to the output",
        "edits": [("direct, hidden = jnp.split(layer(base, hidden), 2, axis=1)", "hidden, direct = jnp.split(layer(base, hidden), 2, axis=1)")],
        "layers": ["cin"],
        "between": ("cin.conv_layers.0", "cin.conv_layers.1"),
        "causes": ["blocks", "swapped", "order"],
        "level": "outputs",
    },
    {
        "title": "interactions averaged over the embedding's axis, not summed",
        "edits": [("pooled = jnp.sum(jnp.concatenate(parts, axis=1), axis=-1)", "pooled = jnp.mean(jnp.concatenate(parts, axis=1), axis=-1)")],
        "layers": ["cin", "cin.fc"],
        "between": ("cin.conv_layers.2", "cin.fc"),
        "causes": ["operation", "scale", "pooling"],
        "level": "outputs",
    },
    {
        "title": "pairs of fields unpacked from the convolution's kernel with the hidden field first",
        "edits": [(".reshape(-1, n, m).transpose(1, 2, 0)", ".reshape(-1, m, n).transpose(2, 1, 0)")],
        "layers": ["cin.conv_layers.0", "cin.conv_layers.1", "cin.conv_layers.2"],
        "causes": ["transposed", "rearranged", "permuted"],
        "level": "bits",
    },
    {
        "title": "batch norm never remembers the statistics of a batch",
        "edits": [("            self.track(m, x.var(axis=0, ddof=1))\n", "")],
        "layers": ["mlp.mlp.1", "mlp.mlp.4"],
        "causes": ["statistics"],
        "level": "training",
    },
]
