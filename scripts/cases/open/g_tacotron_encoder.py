"""Tacotron text encoder: prenet, CBHG (conv bank, max pool, projections, highway, bidirectional GRU)."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import linen, nnx
from torch import nn


class BatchNormConv1d(nn.Module):
    def __init__(self, in_dim, out_dim, kernel_size, relu=True):
        super().__init__()
        self.conv = nn.Conv1d(in_dim, out_dim, kernel_size, stride=1, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm1d(out_dim, momentum=0.99, eps=1e-3)
        self.use_relu = relu

    def forward(self, x):
        x = self.conv(x)
        if self.use_relu:
            x = F.relu(x)
        return self.bn(x)


class Highway(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.H = nn.Linear(size, size)
        self.T = nn.Linear(size, size)

    def forward(self, inputs):
        H = torch.relu(self.H(inputs))
        T = torch.sigmoid(self.T(inputs))
        return H * T + inputs * (1.0 - T)


class Prenet(nn.Module):
    def __init__(self, in_dim, sizes=(12, 8)):
        super().__init__()
        in_sizes = [in_dim] + list(sizes[:-1])
        self.layers = nn.ModuleList([nn.Linear(i, o) for i, o in zip(in_sizes, sizes)])
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs):
        for linear in self.layers:
            inputs = self.dropout(F.relu(linear(inputs)))
        return inputs


class CBHG(nn.Module):
    def __init__(self, in_dim, K=4, projections=(16, 8), highway_dim=9, hidden=6):
        super().__init__()
        self.conv1d_banks = nn.ModuleList([BatchNormConv1d(in_dim, in_dim, k) for k in range(1, K + 1)])
        self.max_pool1d = nn.MaxPool1d(kernel_size=2, stride=1, padding=1)
        in_sizes = [K * in_dim] + list(projections[:-1])
        flags = [True] * (len(projections) - 1) + [False]
        self.conv1d_projections = nn.ModuleList(
            [BatchNormConv1d(i, o, 3, relu=f) for i, o, f in zip(in_sizes, projections, flags)])
        self.pre_highway = nn.Linear(projections[-1], highway_dim, bias=False)
        self.highways = nn.ModuleList([Highway(highway_dim) for _ in range(2)])
        self.gru = nn.GRU(highway_dim, hidden, 1, batch_first=True, bidirectional=True)

    def forward(self, inputs):
        x = inputs.transpose(1, 2)
        T = x.size(-1)
        x = torch.cat([conv1d(x)[:, :, :T] for conv1d in self.conv1d_banks], dim=1)
        x = self.max_pool1d(x)[:, :, :T]
        for conv1d in self.conv1d_projections:
            x = conv1d(x)
        x = x.transpose(1, 2)
        x = self.pre_highway(x + inputs)
        for highway in self.highways:
            x = highway(x)
        outputs, _ = self.gru(x)
        return outputs


class Encoder(nn.Module):
    def __init__(self, vocab=20, embed_dim=10):
        super().__init__()
        self.embedding = nn.Embedding(vocab, embed_dim, padding_idx=0)
        self.prenet = Prenet(embed_dim)
        self.cbhg = CBHG(8)

    def forward(self, ids):
        return self.cbhg(self.prenet(self.embedding(ids)))


class ConvBN(nnx.Module):
    def __init__(self, din, dout, width, act=True, *, rngs):
        self.conv = nnx.Conv(din, dout, (width,), padding=[(width // 2, width // 2)], use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(dout, momentum=0.01, epsilon=1e-3, rngs=rngs)
        self.act = act

    def __call__(self, x):
        y = self.conv(x)
        if self.act:
            y = nnx.relu(y)
        y = self.norm(y)
        return y


class HighwayLayer(nnx.Module):
    def __init__(self, dim, *, rngs):
        self.plain = nnx.Linear(dim, dim, rngs=rngs)
        self.gate = nnx.Linear(dim, dim, rngs=rngs)

    def __call__(self, x):
        h = nnx.relu(self.plain(x))
        t = nnx.sigmoid(self.gate(x))
        return t * h + (1.0 - t) * x


class GRUDirection(nnx.Module):
    def __init__(self, din, hidden, *, rngs):
        self.hidden = hidden
        self.inp = nnx.Linear(din, 3 * hidden, rngs=rngs)
        self.rec = nnx.Linear(hidden, 3 * hidden, rngs=rngs)

    def __call__(self, x):
        gates = self.inp(x)

        def step(h, g):
            xr, xz, xn = jnp.split(g, 3, axis=-1)
            hr, hz, hn = jnp.split(self.rec(h), 3, axis=-1)
            r = nnx.sigmoid(xr + hr)
            z = nnx.sigmoid(xz + hz)
            n = jnp.tanh(xn + r * hn)
            h = (1 - z) * n + z * h
            return h, h

        h0 = jnp.zeros((x.shape[0], self.hidden), x.dtype)
        _, ys = jax.lax.scan(step, h0, jnp.swapaxes(gates, 0, 1))
        return jnp.swapaxes(ys, 0, 1)


class FlaxCBHG(nnx.Module):
    def __init__(self, din, num_banks=4, projections=(16, 8), highway_dim=9, hidden=6, *, rngs):
        self.banks = nnx.List([ConvBN(din, din, w, rngs=rngs) for w in range(1, num_banks + 1)])
        self.proj1 = ConvBN(num_banks * din, projections[0], 3, rngs=rngs)
        self.proj2 = ConvBN(projections[0], projections[1], 3, act=False, rngs=rngs)
        self.pre_highway = nnx.Linear(projections[1], highway_dim, use_bias=False, rngs=rngs)
        self.highways = nnx.List([HighwayLayer(highway_dim, rngs=rngs) for _ in range(2)])
        self.forward_rnn = GRUDirection(highway_dim, hidden, rngs=rngs)
        self.backward_rnn = GRUDirection(highway_dim, hidden, rngs=rngs)

    def __call__(self, inputs):
        steps = inputs.shape[1]
        feats = [bank(inputs)[:, :steps] for bank in self.banks]
        x = jnp.concatenate(feats, axis=-1)
        x = linen.max_pool(x, (2,), strides=(1,), padding=[(1, 1)])[:, :steps]
        x = self.proj2(self.proj1(x))
        x = self.pre_highway(x + inputs)
        for layer in self.highways:
            x = layer(x)
        fwd = self.forward_rnn(x)
        bwd = jnp.flip(self.backward_rnn(jnp.flip(x, axis=1)), axis=1)
        return jnp.concatenate([fwd, bwd], axis=-1)


class FlaxEncoder(nnx.Module):
    def __init__(self, vocab=20, embed_dim=10, *, rngs):
        self.embed = nnx.Embed(vocab, embed_dim, rngs=rngs)
        self.pre1 = nnx.Linear(embed_dim, 12, rngs=rngs)
        self.pre2 = nnx.Linear(12, 8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.cbhg = FlaxCBHG(8, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        x = jnp.where((ids == 0)[..., None], jax.lax.stop_gradient(x), x)
        x = self.drop(nnx.relu(self.pre1(x)))
        x = self.drop(nnx.relu(self.pre2(x)))
        return self.cbhg(x)


def arr(t):
    return jnp.asarray(t.detach().numpy())


def put_linear(dst, src):
    dst.kernel = nnx.Param(arr(src.weight).T)
    if src.bias is not None:
        dst.bias = nnx.Param(arr(src.bias))


def put_conv_bn(dst, src):
    dst.conv.kernel = nnx.Param(arr(src.conv.weight).transpose(2, 1, 0))
    dst.norm.scale = nnx.Param(arr(src.bn.weight))
    dst.norm.bias = nnx.Param(arr(src.bn.bias))
    dst.norm.mean = nnx.BatchStat(arr(src.bn.running_mean))
    dst.norm.var = nnx.BatchStat(arr(src.bn.running_var))


def put_gru(dst, gru, suffix):
    for lin, tag in ((dst.inp, "ih"), (dst.rec, "hh")):
        lin.kernel = nnx.Param(arr(getattr(gru, f"weight_{tag}_l0{suffix}")).T)
        lin.bias = nnx.Param(arr(getattr(gru, f"bias_{tag}_l0{suffix}")))


def port(net, model):
    model.embed.embedding = nnx.Param(arr(net.embedding.weight))
    put_linear(model.pre1, net.prenet.layers[0])
    put_linear(model.pre2, net.prenet.layers[1])
    for dst, src in zip(model.cbhg.banks, net.cbhg.conv1d_banks):
        put_conv_bn(dst, src)
    put_conv_bn(model.cbhg.proj1, net.cbhg.conv1d_projections[0])
    put_conv_bn(model.cbhg.proj2, net.cbhg.conv1d_projections[1])
    put_linear(model.cbhg.pre_highway, net.cbhg.pre_highway)
    for dst, src in zip(model.cbhg.highways, net.cbhg.highways):
        dst.plain.kernel = nnx.Param(arr(src.H.weight).T)
        dst.plain.bias = nnx.Param(arr(src.H.bias))
        dst.gate.kernel = nnx.Param(arr(src.T.weight).T)
        dst.gate.bias = nnx.Param(arr(src.T.bias))
    put_gru(model.cbhg.forward_rnn, net.cbhg.gru, "")
    put_gru(model.cbhg.backward_rnn, net.cbhg.gru, "_reverse")
    return model


def build(seed):
    """The right pair with random weights and inputs that follow from the seed."""
    torch.manual_seed(seed)
    net = Encoder().eval()
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.BatchNorm1d):
                m.weight.uniform_(0.6, 1.5)
                m.bias.normal_(0, 0.3)
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.05, 0.6)
        net.embedding.weight.normal_()
    model = port(net, FlaxEncoder(rngs=nnx.Rngs(0)))
    model.eval()
    ids = np.random.default_rng(seed).integers(1, 20, (3, 7))
    ids[1, 5:] = 0
    ids[2, 4:] = 0
    return {"torch": net, "flax": model, "inputs": ids}


FAULTS = [
    {
        "title": "even kernels of the conv bank padded as SAME, which puts the odd column on the right",
        "edits": [("padding=[(width // 2, width // 2)]", 'padding="SAME"')],
        "layers": ["cbhg.conv1d_banks.1.conv"],
        "causes": ["padding"],
        "level": "outputs",
    },
    {
        "title": "max pool of two looks at the next step, not at the last one (SAME)",
        "edits": [("strides=(1,), padding=[(1, 1)])", 'strides=(1,), padding="SAME")')],
        "layers": ["cbhg.max_pool1d", "cbhg"],
        "between": ("cbhg.conv1d_banks.3.bn", "cbhg.conv1d_projections.0.conv"),
        "causes": ["pooling", "padding"],
        "level": "outputs",
    },
    {
        "title": "conv, batch norm, ReLU for Tacotron's conv, ReLU, batch norm",
        "edits": [("""        if self.act:
            y = nnx.relu(y)
        y = self.norm(y)
""", """        y = self.norm(y)
        if self.act:
            y = nnx.relu(y)
""")],
        "layers": ["cbhg.conv1d_banks.0"],
        "between": ("cbhg.conv1d_banks.0.conv", "cbhg.conv1d_banks.0.bn"),
        "causes": ["norm_order", "order"],
        "level": "outputs",
    },
    {
        "title": "the bank's features stacked on a new last axis and flattened, so channels interleave",
        "edits": [("x = jnp.concatenate(feats, axis=-1)",
                   "x = jnp.stack(feats, axis=-1).reshape(inputs.shape[0], steps, -1)")],
        "layers": ["cbhg"],
        "between": ("cbhg.conv1d_banks.3.bn", "cbhg.conv1d_projections.0.conv"),
        "causes": ["rearranged", "permuted"],
        "level": "outputs",
    },
    {
        "title": "highway: transform and carry gate exchanged",
        "edits": [("return t * h + (1.0 - t) * x", "return t * x + (1.0 - t) * h")],
        "layers": ["cbhg.highways.0"],
        "between": ("cbhg.highways.0.T", "cbhg.highways.1.H"),
        "causes": ["operand", "swapped"],
        "level": "outputs",
    },
    {
        "title": "outputs of the backward GRU are not turned round again",
        "edits": [("bwd = jnp.flip(self.backward_rnn(jnp.flip(x, axis=1)), axis=1)",
                   "bwd = self.backward_rnn(jnp.flip(x, axis=1))")],
        "layers": ["cbhg.gru"],
        "causes": ["reversed"],
        "level": "outputs",
    },
    {
        "title": "square kernel of the highway's transform gate copied without transposing",
        "edits": [("nnx.Param(arr(src.T.weight).T)", "nnx.Param(arr(src.T.weight))")],
        "layers": ["cbhg.highways.0.T"],
        "causes": ["transposed"],
        "level": "outputs",
    },
    {
        "title": "torch's batch norm momentum 0.99 taken over, which in Flax means the opposite",
        "edits": [("momentum=0.01, epsilon=1e-3", "momentum=0.99, epsilon=1e-3")],
        "layers": ["cbhg.conv1d_banks.0.bn"],
        "causes": ["momentum"],
        "level": "training",
    },
    {
        "title": "row of the padding symbol gets a gradient",
        "edits": [("        x = jnp.where((ids == 0)[..., None], jax.lax.stop_gradient(x), x)\n", "")],
        "layers": ["embedding"],
        "causes": ["padding_idx", "stop_gradient"],
        "level": "gradients",
    },
]
