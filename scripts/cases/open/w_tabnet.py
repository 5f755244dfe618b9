"""TabNet encoder: ghost batch norm, shared and own GLU blocks, sparsemax attention with priors."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn


class GBN(nn.Module):
    def __init__(self, dim, virtual=6, momentum=0.02):
        super().__init__()
        self.bn = nn.BatchNorm1d(dim, momentum=momentum)
        self.virtual = virtual

    def forward(self, x):
        if not self.training:
            return self.bn(x)
        return torch.cat([self.bn(c) for c in x.split(self.virtual, 0)], dim=0)


def sparsemax(z):
    s = z.sort(dim=-1, descending=True).values
    k = torch.arange(1, z.shape[-1] + 1).to(z.dtype)
    cum = s.cumsum(-1) - 1
    support = (k * s > cum).sum(-1, keepdim=True)
    tau = cum.gather(-1, support - 1) / support
    return torch.clamp(z - tau, min=0)


class GLULayer(nn.Module):
    def __init__(self, din, dout, fc=None):
        super().__init__()
        self.fc = fc if fc is not None else nn.Linear(din, 2 * dout, bias=False)
        self.bn = GBN(2 * dout)
        self.dout = dout

    def forward(self, x):
        x = self.bn(self.fc(x))
        return x[:, :self.dout] * torch.sigmoid(x[:, self.dout:])


class FeatTransformer(nn.Module):
    def __init__(self, din, dout, shared):
        super().__init__()
        self.first = GLULayer(din, dout, shared[0])
        self.second = GLULayer(dout, dout, shared[1])
        self.own = GLULayer(dout, dout)

    def forward(self, x):
        x = self.first(x)
        for layer in (self.second, self.own):
            x = (x + layer(x)) * 0.5 ** 0.5
        return x


class AttentiveTransformer(nn.Module):
    def __init__(self, din, dout):
        super().__init__()
        self.fc = nn.Linear(din, dout, bias=False)
        self.bn = GBN(dout)

    def forward(self, priors, a):
        return sparsemax(self.bn(self.fc(a)) * priors)


class TabNet(nn.Module):
    def __init__(self, din=9, dout=3, n_d=5, n_a=4, steps=3, gamma=1.3):
        super().__init__()
        self.n_d, self.gamma = n_d, gamma
        self.initial_bn = nn.BatchNorm1d(din, momentum=0.01)
        width = n_d + n_a
        self.shared = nn.ModuleList([nn.Linear(din, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)])
        self.initial_splitter = FeatTransformer(din, width, self.shared)
        self.feat = nn.ModuleList([FeatTransformer(din, width, self.shared) for _ in range(steps)])
        self.att = nn.ModuleList([AttentiveTransformer(n_a, din) for _ in range(steps)])
        self.final_mapping = nn.Linear(n_d, dout, bias=False)

    def forward(self, x):
        x = self.initial_bn(x)
        prior = torch.ones_like(x)
        a = self.initial_splitter(x)[:, self.n_d:]
        total, m_loss = 0, 0
        for feat, att in zip(self.feat, self.att):
            m = att(prior, a)
            m_loss = m_loss + (m * torch.log(m + 1e-10)).sum(1).mean()
            prior = prior * (self.gamma - m)
            out = feat(m * x)
            total = total + torch.relu(out[:, :self.n_d])
            a = out[:, self.n_d:]
        return self.final_mapping(total), m_loss / len(self.feat)


# ====== NNX version ======


class BatchNorm(nnx.Module):
    """torch's batch norm: biased variance to normalise, unbiased to remember; in virtual batches."""

    def __init__(self, dim, momentum, virtual=None):
        self.scale, self.bias = nnx.Param(jnp.ones((dim,))), nnx.Param(jnp.zeros((dim,)))
        self.mean, self.var = nnx.BatchStat(jnp.zeros((dim,))), nnx.BatchStat(jnp.ones((dim,)))
        self.momentum, self.virtual = momentum, virtual
        self.use_running_average = False

    def normalise(self, x, mean, var):
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * self.scale[...] + self.bias[...]

    def __call__(self, x):
        if self.use_running_average:
            return self.normalise(x, self.mean[...], self.var[...])
        size = self.virtual or x.shape[0]
        outs = []
        for start in range(0, x.shape[0], size):
            chunk = x[start:start + size]
            mean, var, n = chunk.mean(0), chunk.var(0), chunk.shape[0]
            keep = lambda old, new: (1 - self.momentum) * old + self.momentum * jax.lax.stop_gradient(new)
            self.mean[...] = keep(self.mean[...], mean)
            self.var[...] = keep(self.var[...], var * n / (n - 1))
            outs.append(self.normalise(chunk, mean, var))
        return jnp.concatenate(outs)


def sparse_max(z):
    n = z.shape[-1]
    top = jnp.flip(jnp.sort(z, axis=-1), axis=-1)
    csum = jnp.cumsum(top, axis=-1) - 1
    rank = jnp.arange(1, n + 1, dtype=z.dtype)
    k = jnp.sum(rank * top > csum, axis=-1, keepdims=True)
    tau = jnp.take_along_axis(csum, k - 1, axis=-1) / k
    return jax.nn.relu(z - tau)


class GLU(nnx.Module):
    def __init__(self, linear, width):
        self.linear, self.norm, self.width = linear, BatchNorm(2 * width, 0.02, 6), width

    def __call__(self, x):
        h = self.norm(self.linear(x))
        return h[:, :self.width] * nnx.sigmoid(h[:, self.width:])


class Transformer(nnx.Module):
    def __init__(self, shared, width, rngs):
        own = nnx.Linear(width, 2 * width, use_bias=False, rngs=rngs)
        self.glus = nnx.List([GLU(linear, width) for linear in (*shared, own)])

    def __call__(self, x):
        h = self.glus[0](x)
        for glu in self.glus[1:]:
            h = (h + glu(h)) * jnp.sqrt(0.5).astype(h.dtype)
        return h


class Attentive(nnx.Module):
    def __init__(self, na, din, rngs):
        self.linear = nnx.Linear(na, din, use_bias=False, rngs=rngs)
        self.norm = BatchNorm(din, 0.02, 6)

    def __call__(self, prior, a):
        return sparse_max(self.norm(self.linear(a)) * prior)


class FlaxTabNet(nnx.Module):
    def __init__(self, din=9, dout=3, nd=5, na=4, steps=3, gamma=1.3, *, rngs):
        width, self.nd, self.gamma = nd + na, nd, gamma
        make = lambda d: nnx.Linear(d, 2 * width, use_bias=False, rngs=rngs)
        shared = [make(din), make(width)]
        self.norm_in = BatchNorm(din, 0.01)
        self.splitter = Transformer(shared, width, rngs)
        self.transformers = nnx.List([Transformer(shared, width, rngs) for _ in range(steps)])
        self.attentives = nnx.List([Attentive(na, din, rngs) for _ in range(steps)])
        self.out = nnx.Linear(nd, dout, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = self.norm_in(x)
        prior = jnp.ones_like(x)
        a = self.splitter(x)[:, self.nd:]
        decision, entropy = 0.0, 0.0
        for transformer, attentive in zip(self.transformers, self.attentives):
            mask = attentive(prior, a)
            entropy += jnp.mean(jnp.sum(mask * jnp.log(mask + 1e-10), axis=1))
            prior = prior * (self.gamma - mask)
            h = transformer(mask * x)
            decision += nnx.relu(h[:, :self.nd])
            a = h[:, self.nd:]
        return self.out(decision), entropy / len(self.attentives)


def port(net, model):
    f = lambda t: jnp.asarray(t.detach().numpy())

    def norm(dst, src):
        dst.scale[...], dst.bias[...] = f(src.weight), f(src.bias)
        dst.mean[...], dst.var[...] = f(src.running_mean), f(src.running_var)

    norm(model.norm_in, net.initial_bn)
    for dst, src in zip((model.splitter, *model.transformers), (net.initial_splitter, *net.feat)):
        for glu, layer in zip(dst.glus, (src.first, src.second, src.own)):
            glu.linear.kernel[...] = f(layer.fc.weight).T
            norm(glu.norm, layer.bn.bn)
    for dst, src in zip(model.attentives, net.att):
        dst.linear.kernel[...] = f(src.fc.weight).T
        norm(dst.norm, src.bn.bn)
    model.out.kernel[...] = f(net.final_mapping.weight).T


def build(seed):
    torch.manual_seed(seed)
    net = TabNet()
    for name, p in net.named_parameters():
        p.data.uniform_(0.6, 1.5) if "bn" in name and name.endswith("weight") else p.data.normal_(0, 0.45)
    for name, b in net.named_buffers():
        if b.is_floating_point():
            b.uniform_(0.5, 1.5) if name.endswith("var") else b.normal_(0, 0.3)
    net.eval()
    model = FlaxTabNet(rngs=nnx.Rngs(seed))
    port(net, model)
    model.eval()
    x = np.random.default_rng(seed).normal(size=(18, 9)).astype(np.float32)
    return {"torch": net, "flax": model, "inputs": (x,)}


FAULTS = [
    {
        "title": "torch's momentum taken for that of Flax, which weighs the old value",
        "edits": [("(1 - self.momentum) * old + self.momentum * jax.lax.stop_gradient(new)", "self.momentum * old + (1 - self.momentum) * jax.lax.stop_gradient(new)")],
        "layers": ["initial_bn"],
        "causes": ["momentum"],
        "level": "training",
    },
    {
        "title": "norms of the blocks use the whole batch, not virtual batches",
        "edits": [("BatchNorm(2 * width, 0.02, 6)", "BatchNorm(2 * width, 0.02)")],
        "layers": ["initial_splitter.first.bn", "initial_splitter.first.bn.bn"],
        "causes": ["batch_statistics", "size"],
        "level": "training",
    },
    {
        "title": "every step has its own copy of the shared layers",
        "edits": [("        shared = [make(din), make(width)]\n", "        shared = lambda: [make(din), make(width)]\n"),
                  ("self.splitter = Transformer(shared, width, rngs)", "self.splitter = Transformer(shared(), width, rngs)"),
                  ("nnx.List([Transformer(shared, width, rngs)", "nnx.List([Transformer(shared(), width, rngs)")],
        "layers": ["shared.0", "shared.1", "initial_splitter.first.fc", "initial_splitter.second.fc"],
        "causes": ["tied"],
        "level": "gradients",
    },
    {
        "title": "prior replaced by gamma - mask, not multiplied with it",
        "edits": [("prior = prior * (self.gamma - mask)", "prior = self.gamma - mask")],
        "layers": [""],
        "between": ("att.1.bn", "feat.2.first.fc"),
        "causes": ["left_out", "operation"],
        "level": "outputs",
    },
    {
        "title": "square root of one half on the branch only",
        "edits": [("h = (h + glu(h)) * jnp.sqrt(0.5).astype(h.dtype)", "h = h + glu(h) * jnp.sqrt(0.5).astype(h.dtype)")],
        "layers": ["initial_splitter"],
        "between": ("initial_splitter.second", "initial_splitter.own.fc"),
        "causes": ["scale", "residual", "order"],
        "level": "outputs",
    },
]
