"""Point clouds: an input transform, one set abstraction (farthest points, nearest neighbours), pooling by multi-head attention."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from flax import nnx


def index_points(points, idx):
    """points (B, N, C), idx (B, S[, K]) -> (B, S[, K], C)"""
    batch = torch.arange(points.shape[0], device=points.device).view(-1, *[1] * (idx.dim() - 1))
    return points[batch, idx]


def square_distance(src, dst):
    return ((src[:, :, None] - dst[:, None]) ** 2).sum(-1)


def farthest_point_sample(xyz, npoint):
    b, n, _ = xyz.shape
    distance = xyz.new_full((b, n), 1e10)
    farthest = torch.zeros(b, dtype=torch.long, device=xyz.device)
    chosen = []
    for _ in range(npoint):
        chosen.append(farthest)
        centroid = index_points(xyz, farthest[:, None])
        distance = torch.minimum(distance, ((xyz - centroid) ** 2).sum(-1))
        farthest = distance.max(-1)[1]
    return torch.stack(chosen, dim=1)


class TNet(nn.Module):
    def __init__(self, k=3):
        super().__init__()
        self.k = k
        self.conv1, self.conv2 = nn.Conv1d(k, 8, 1), nn.Conv1d(8, 14, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(8), nn.BatchNorm1d(14)
        self.fc = nn.Linear(14, k * k)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x))).max(dim=2)[0]
        return self.fc(x).view(-1, self.k, self.k) + torch.eye(self.k, dtype=x.dtype, device=x.device)


class SetAbstraction(nn.Module):
    def __init__(self, npoint, nsample, in_channel, mlp):
        super().__init__()
        self.npoint, self.nsample = npoint, nsample
        self.mlp_convs, self.mlp_bns = nn.ModuleList(), nn.ModuleList()
        last = in_channel + 3
        for out in mlp:
            self.mlp_convs.append(nn.Conv2d(last, out, 1))
            self.mlp_bns.append(nn.BatchNorm2d(out))
            last = out

    def forward(self, xyz, points):
        new_xyz = index_points(xyz, farthest_point_sample(xyz, self.npoint))
        idx = square_distance(new_xyz, xyz).argsort(dim=-1)[:, :, : self.nsample]
        grouped = index_points(xyz, idx) - new_xyz[:, :, None]
        grouped = torch.cat([grouped, index_points(points, idx)], dim=-1).permute(0, 3, 2, 1)
        for conv, bn in zip(self.mlp_convs, self.mlp_bns):
            grouped = F.relu(bn(conv(grouped)))
        return new_xyz, grouped.max(dim=2)[0].transpose(1, 2)


class MAB(nn.Module):
    def __init__(self, dim_Q, dim_K, dim_V, num_heads):
        super().__init__()
        self.dim_V, self.num_heads = dim_V, num_heads
        self.fc_q = nn.Linear(dim_Q, dim_V)
        self.fc_k = nn.Linear(dim_K, dim_V)
        self.fc_v = nn.Linear(dim_K, dim_V)
        self.ln0, self.ln1 = nn.LayerNorm(dim_V), nn.LayerNorm(dim_V)
        self.fc_o = nn.Linear(dim_V, dim_V)

    def forward(self, Q, K):
        Q = self.fc_q(Q)
        K, V = self.fc_k(K), self.fc_v(K)
        split = self.dim_V // self.num_heads
        Q_, K_, V_ = (torch.cat(t.split(split, 2), 0) for t in (Q, K, V))
        A = torch.softmax(Q_.bmm(K_.transpose(1, 2)) / math.sqrt(self.dim_V), 2)
        O = torch.cat((Q_ + A.bmm(V_)).split(Q.size(0), 0), 2)
        O = self.ln0(O)
        return self.ln1(O + F.relu(self.fc_o(O)))


class PointSetNet(nn.Module):
    def __init__(self, n_classes=5, feat=4, dim=18, heads=3, seeds=2):
        super().__init__()
        self.stn = TNet(3)
        self.sa = SetAbstraction(6, 4, feat, (10, 16))
        self.S = nn.Parameter(torch.randn(1, seeds, dim))
        self.pma = MAB(dim, 16 + 3, dim, heads)
        self.dec = nn.Linear(seeds * dim, n_classes)

    def forward(self, xyz, feats):
        trans = self.stn(xyz.transpose(1, 2))
        xyz = torch.bmm(xyz, trans)
        centers, x = self.sa(xyz, feats)
        x = torch.cat([centers, x], dim=-1)
        x = self.pma(self.S.repeat(x.size(0), 1, 1), x)
        return self.dec(x.flatten(1)), trans


# ------------------------------------------------------------------------------------------- Flax


def gather(points, idx):
    return jax.vmap(lambda p, i: p[i])(points, idx)


def sample_farthest(xyz, count):
    dist = jnp.full(xyz.shape[:2], 1e10, xyz.dtype)
    last = jnp.zeros(xyz.shape[0], int)
    out = []
    for _ in range(count):
        out.append(last)
        center = gather(xyz, last[:, None])
        dist = jnp.minimum(dist, jnp.sum((xyz - center) ** 2, axis=-1))
        last = jnp.argmax(dist, axis=-1)
    return jnp.stack(out, axis=1)


class DenseBN(nnx.Module):
    """A pointwise layer: Linear, BatchNorm, ReLU."""

    def __init__(self, din, dout, rngs):
        self.linear = nnx.Linear(din, dout, rngs=rngs)
        self.bn = nnx.BatchNorm(dout, momentum=0.9, epsilon=1e-5, rngs=rngs)

    def __call__(self, x):
        return jax.nn.relu(self.bn(self.linear(x)))


class InputTransform(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.Sequential(DenseBN(3, 8, rngs), DenseBN(8, 14, rngs))
        self.out = nnx.Linear(14, 9, rngs=rngs)

    def __call__(self, x):
        x = jnp.max(self.layers(x), axis=1)
        return self.out(x).reshape(-1, 3, 3) + jnp.eye(3, dtype=x.dtype)


class FlaxMAB(nnx.Module):
    def __init__(self, dq, dk, dv, heads, rngs):
        self.dv, self.heads = dv, heads
        self.q, self.k = nnx.Linear(dq, dv, rngs=rngs), nnx.Linear(dk, dv, rngs=rngs)
        self.v, self.o = nnx.Linear(dk, dv, rngs=rngs), nnx.Linear(dv, dv, rngs=rngs)
        self.norm0 = nnx.LayerNorm(dv, epsilon=1e-5, rngs=rngs)
        self.norm1 = nnx.LayerNorm(dv, epsilon=1e-5, rngs=rngs)

    def __call__(self, queries, keys):
        split = lambda t: t.reshape(*t.shape[:2], self.heads, -1)
        q, k, v = split(self.q(queries)), split(self.k(keys)), split(self.v(keys))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(self.dv), axis=-1)
        out = q + jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        out = self.norm0(out.reshape(*out.shape[:2], self.dv))
        return self.norm1(out + jax.nn.relu(self.o(out)))


class FlaxPointSetNet(nnx.Module):
    def __init__(self, n_classes=5, feat=4, dim=18, heads=3, seeds=2, npoint=6, nsample=4, *, rngs):
        self.npoint, self.nsample = npoint, nsample
        self.transform = InputTransform(rngs)
        self.mlp = nnx.List([DenseBN(3 + feat, 10, rngs), DenseBN(10, 16, rngs)])
        self.seeds = nnx.Param(jnp.zeros((seeds, dim)))
        self.pma = FlaxMAB(dim, 19, dim, heads, rngs)
        self.classifier = nnx.Linear(seeds * dim, n_classes, rngs=rngs)

    def abstraction(self, xyz, feats):
        centers = gather(xyz, sample_farthest(xyz, self.npoint))
        squared = jnp.sum((centers[:, :, None] - xyz[:, None]) ** 2, axis=-1)
        idx = jnp.argsort(squared, axis=-1)[:, :, : self.nsample]
        local = gather(xyz, idx) - centers[:, :, None]
        x = jnp.concatenate([local, gather(feats, idx)], axis=-1)
        for layer in self.mlp:
            x = layer(x)
        return centers, jnp.max(x, axis=2)

    def __call__(self, xyz, feats):
        trans = self.transform(xyz)
        xyz = jnp.einsum("bnc,bcd->bnd", xyz, trans)
        centers, x = self.abstraction(xyz, feats)
        x = jnp.concatenate([centers, x], axis=-1)
        seeds = jnp.broadcast_to(self.seeds[...], (x.shape[0], *self.seeds[...].shape))
        x = self.pma(seeds, x)
        return self.classifier(x.reshape(x.shape[0], -1)), trans


def port(net, model):
    a = lambda t: jnp.asarray(t.detach().numpy())

    def linear(dst, src):
        dst.kernel[...] = a(src.weight).reshape(src.weight.shape[:2]).T
        dst.bias[...] = a(src.bias)

    def norm(dst, src):
        dst.scale[...], dst.bias[...] = a(src.weight), a(src.bias)

    def dense_bn(dst, conv, bn):
        linear(dst.linear, conv)
        norm(dst.bn, bn)
        dst.bn.mean[...], dst.bn.var[...] = a(bn.running_mean), a(bn.running_var)

    stn = net.stn
    dense_bn(model.transform.layers.layers[0], stn.conv1, stn.bn1)
    dense_bn(model.transform.layers.layers[1], stn.conv2, stn.bn2)
    linear(model.transform.out, stn.fc)
    for dst, conv, bn in zip(model.mlp, net.sa.mlp_convs, net.sa.mlp_bns):
        dense_bn(dst, conv, bn)
    model.seeds[...] = a(net.S)[0]
    for name in "qkvo":
        linear(getattr(model.pma, name), getattr(net.pma, f"fc_{name}"))
    norm(model.pma.norm0, net.pma.ln0)
    norm(model.pma.norm1, net.pma.ln1)
    linear(model.classifier, net.dec)


def build(seed):
    """The right pair with random weights and inputs that follow from the seed."""
    torch.manual_seed(seed)
    net = PointSetNet().eval()
    for name, t in [*net.named_parameters(), *net.named_buffers()]:
        if "running_var" in name:
            t.data.uniform_(0.5, 2.0)
        elif t.is_floating_point():
            t.data.normal_(0.0, 0.5)
    model = FlaxPointSetNet(rngs=nnx.Rngs(seed))
    port(net, model)
    model.eval()
    rng = np.random.default_rng(seed)
    xyz = rng.normal(size=(2, 12, 3)).astype(np.float32)
    return {"torch": net, "flax": model, "inputs": (xyz, rng.normal(size=(2, 12, 4)).astype(np.float32))}


FAULTS = [
    {
        "title": "attention scaled by the width of a head",
        "edits": [("/ math.sqrt(self.dv), axis=-1)", "/ math.sqrt(self.dv // self.heads), axis=-1)")],
        "layers": ["pma"],
        "between": ("pma.fc_v", "pma.ln0"),
        "causes": ["scale"],
        "level": "outputs",
    },
    {
        "title": "neighbours not taken relative to their centre",
        "edits": [("local = gather(xyz, idx) - centers[:, :, None]", "local = gather(xyz, idx)")],
        "layers": ["sa"],
        "between": ("stn.fc", "sa.mlp_convs.0"),
        "causes": ["left_out", "residual"],
        "level": "outputs",
    },
    {
        "title": "no identity added to the input transform",
        "edits": [("return self.out(x).reshape(-1, 3, 3) + jnp.eye(3, dtype=x.dtype)", "return self.out(x).reshape(-1, 3, 3)")],
        "layers": ["stn"],
        "between": ("stn.fc", "sa.mlp_convs.0"),
        "causes": ["residual", "left_out"],
        "level": "outputs",
    },
    {
        "title": "farthest points by the largest distance to those chosen, not the smallest",
        "edits": [("dist = jnp.full(xyz.shape[:2], 1e10, xyz.dtype)", "dist = jnp.zeros(xyz.shape[:2], xyz.dtype)"),
                  ("dist = jnp.minimum(dist, jnp.sum(", "dist = jnp.maximum(dist, jnp.sum(")],
        "layers": ["sa"],
        "between": ("stn.fc", "sa.mlp_convs.0"),
        "causes": ["operation"],
        "level": "outputs",
    },
    {
        "title": "a point is no longer its own first neighbour",
        "edits": [("[:, :, : self.nsample]\n        local", "[:, :, 1 : self.nsample + 1]\n        local")],
        "layers": ["sa"],
        "between": ("stn.fc", "sa.mlp_convs.0"),
        "causes": ["offset"],
        "level": "outputs",
    },
    {
        "title": "points multiplied by the transform's transpose",
        "edits": [("jnp.einsum(\"bnc,bcd->bnd\", xyz, trans)", "jnp.einsum(\"bnc,bdc->bnd\", xyz, trans)")],
        "layers": [""],
        "between": ("stn.fc", "sa.mlp_convs.0"),
        "causes": ["transposed"],
        "level": "outputs",
    },
    {
        "title": "mean over the neighbours, not the maximum",
        "edits": [("return centers, jnp.max(x, axis=2)", "return centers, jnp.mean(x, axis=2)")],
        "layers": ["sa"],
        "between": ("sa.mlp_bns.1", "pma.fc_q"),
        "causes": ["pooling", "operation"],
        "level": "outputs",
    },
    {
        "title": "Flax's own default for the BatchNorm momentum",
        "edits": [("nnx.BatchNorm(dout, momentum=0.9, epsilon=1e-5, rngs=rngs)", "nnx.BatchNorm(dout, epsilon=1e-5, rngs=rngs)")],
        "layers": ["stn.bn1", "stn.bn2", "sa.mlp_bns.0"],
        "causes": ["momentum"],
        "level": "training",
    },
]
