"""SlowFast (reduced): two pathways of 3D convolutions, fast-to-slow fusions, GroupNorm and frozen batch norms."""
import numpy as np
import torch
from torch import nn
import jax.numpy as jnp
from flax import nnx

ALPHA = 4
GN_GROUPS = 3


class FrozenStatsBatchNorm3d(nn.BatchNorm3d):
    """Batch norm of a finetuned backbone: trained scale and shift, statistics that never move (norm_eval)."""

    def train(self, mode=True):
        return super().train(False)


class ResNetBasicStem(nn.Module):
    def __init__(self, dim_in, dim_out, kernel, stride, padding):
        super().__init__()
        self.conv = nn.Conv3d(dim_in, dim_out, kernel, stride=stride, padding=padding, bias=False)
        self.bn = FrozenStatsBatchNorm3d(dim_out)
        self.relu = nn.ReLU()
        self.pool_layer = nn.MaxPool3d(kernel_size=[1, 3, 3], stride=[1, 2, 2], padding=[0, 1, 1])

    def forward(self, x):
        return self.pool_layer(self.relu(self.bn(self.conv(x))))


class VideoModelStem(nn.Module):
    def __init__(self, dim_in, dim_out, kernel, stride, padding):
        super().__init__()
        for pathway in range(2):
            stem = ResNetBasicStem(dim_in, dim_out[pathway], kernel[pathway], stride, padding[pathway])
            self.add_module(f"pathway{pathway}_stem", stem)

    def forward(self, x):
        return [self.pathway0_stem(x[0]), self.pathway1_stem(x[1])]


class FuseFastToSlow(nn.Module):
    def __init__(self, dim_in, dim_out, fusion_kernel, alpha):
        super().__init__()
        self.conv_f2s = nn.Conv3d(dim_in, dim_out, kernel_size=[fusion_kernel, 1, 1], stride=[alpha, 1, 1],
                                  padding=[fusion_kernel // 2, 0, 0], bias=False)
        self.bn = FrozenStatsBatchNorm3d(dim_out)
        self.relu = nn.ReLU()

    def forward(self, x):
        x_s, x_f = x
        fuse = self.conv_f2s(x_f)
        fuse = self.bn(fuse)
        fuse = self.relu(fuse)
        x_s_fuse = torch.cat([x_s, fuse], 1)
        return [x_s_fuse, x_f]


class BottleneckTransform(nn.Module):
    def __init__(self, dim_in, dim_out, temp_kernel_size, stride, dim_inner):
        super().__init__()
        self.a = nn.Conv3d(dim_in, dim_inner, [temp_kernel_size, 1, 1], padding=[temp_kernel_size // 2, 0, 0],
                           bias=False)
        self.a_bn = nn.GroupNorm(GN_GROUPS, dim_inner)
        self.a_relu = nn.ReLU()
        self.b = nn.Conv3d(dim_inner, dim_inner, [1, 3, 3], stride=[1, stride, stride], padding=[0, 1, 1], bias=False)
        self.b_bn = nn.GroupNorm(GN_GROUPS, dim_inner)
        self.b_relu = nn.ReLU()
        self.c = nn.Conv3d(dim_inner, dim_out, 1, bias=False)
        self.c_bn = nn.GroupNorm(GN_GROUPS, dim_out)

    def forward(self, x):
        x = self.a_relu(self.a_bn(self.a(x)))
        x = self.b_relu(self.b_bn(self.b(x)))
        return self.c_bn(self.c(x))


class ResBlock(nn.Module):
    def __init__(self, dim_in, dim_out, temp_kernel_size, stride, dim_inner):
        super().__init__()
        self.branch1 = nn.Conv3d(dim_in, dim_out, kernel_size=1, stride=[1, stride, stride], bias=False)
        self.branch1_bn = nn.GroupNorm(GN_GROUPS, dim_out)
        self.branch2 = BottleneckTransform(dim_in, dim_out, temp_kernel_size, stride, dim_inner)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.branch1_bn(self.branch1(x)) + self.branch2(x))


class ResStage(nn.Module):
    def __init__(self, dim_in, dim_out, temp_kernel_sizes, stride, dim_inner):
        super().__init__()
        for p in range(2):
            block = ResBlock(dim_in[p], dim_out[p], temp_kernel_sizes[p], stride, dim_inner[p])
            self.add_module(f"pathway{p}_res0", block)

    def forward(self, inputs):
        return [self.pathway0_res0(inputs[0]), self.pathway1_res0(inputs[1])]


class ResNetBasicHead(nn.Module):
    def __init__(self, dim_in, num_classes):
        super().__init__()
        self.pathway0_avgpool = nn.AdaptiveAvgPool3d(1)
        self.pathway1_avgpool = nn.AdaptiveAvgPool3d(1)
        self.projection = nn.Linear(sum(dim_in), num_classes)

    def forward(self, inputs):
        x = torch.cat([self.pathway0_avgpool(inputs[0]), self.pathway1_avgpool(inputs[1])], 1)
        return self.projection(x.flatten(1))


class SlowFast(nn.Module):
    def __init__(self, num_classes=8):
        super().__init__()
        self.s1 = VideoModelStem(3, (10, 5), ([1, 5, 5], [5, 5, 5]), [1, 2, 2], ([0, 2, 2], [2, 2, 2]))
        self.s1_fuse = FuseFastToSlow(5, 9, 5, ALPHA)
        self.s2 = ResStage((19, 5), (18, 12), (1, 3), 2, (6, 6))
        self.s2_fuse = FuseFastToSlow(12, 15, 7, ALPHA)
        self.s3 = ResStage((33, 12), (24, 18), (3, 3), 1, (12, 6))
        self.head = ResNetBasicHead((24, 18), num_classes)

    def pack_pathway(self, frames):
        """The slow pathway's frames are spread evenly from the first to the last one."""
        n = frames.shape[2]
        index = torch.linspace(0, n - 1, n // ALPHA).long()
        return [torch.index_select(frames, 2, index), frames]

    def forward(self, frames):
        x = self.pack_pathway(frames)
        x = self.s1(x)
        x = self.s1_fuse(x)
        x = self.s2(x)
        x = self.s2_fuse(x)
        x = self.s3(x)
        return self.head(x)


# ---- Flax half: NNX, videos as [batch, time, height, width, channel] ----

RATE = 4


def conv3(inner, outer, size, step=(1, 1, 1), *, rngs):
    around = [(s // 2, s // 2) for s in size]
    return nnx.Conv(inner, outer, size, strides=step, padding=around, use_bias=False, rngs=rngs)


class FixedNorm(nnx.Module):
    """Normalises with stored statistics, in training too."""

    def __init__(self, width, rngs):
        self.inner = nnx.BatchNorm(width, epsilon=1e-5, rngs=rngs)

    def __call__(self, x):
        return self.inner(x, use_running_average=True)


class GroupedNorm(nnx.Module):
    def __init__(self, width, groups=3):
        self.gain = nnx.Param(jnp.ones((width,)))
        self.shift = nnx.Param(jnp.zeros((width,)))
        self.groups = groups

    def __call__(self, x):
        b, c = x.shape[0], x.shape[-1]
        g = x.reshape(b, -1, self.groups, c // self.groups)
        g = g - g.mean(axis=(1, 3), keepdims=True)
        g = g / jnp.sqrt(jnp.mean(g ** 2, axis=(1, 3), keepdims=True) + 1e-5)
        return g.reshape(x.shape) * self.gain[...] + self.shift[...]


class Entry(nnx.Module):
    def __init__(self, inner, outer, frames, rngs):
        self.conv = conv3(inner, outer, (frames, 5, 5), (1, 2, 2), rngs=rngs)
        self.norm = FixedNorm(outer, rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return nnx.max_pool(x, (1, 3, 3), strides=(1, 2, 2), padding=((0, 0), (1, 1), (1, 1)))


class Lateral(nnx.Module):
    def __init__(self, inner, outer, frames, rngs):
        self.conv = conv3(inner, outer, (frames, 1, 1), (RATE, 1, 1), rngs=rngs)
        self.norm = FixedNorm(outer, rngs)

    def __call__(self, slow, fast):
        side = nnx.relu(self.norm(self.conv(fast)))
        return jnp.concatenate([slow, side], axis=-1)


class Unit(nnx.Module):
    def __init__(self, inner, outer, mid, frames, step, rngs):
        self.short = conv3(inner, outer, (1, 1, 1), (1, step, step), rngs=rngs)
        self.first = conv3(inner, mid, (frames, 1, 1), rngs=rngs)
        self.second = conv3(mid, mid, (1, 3, 3), (1, step, step), rngs=rngs)
        self.third = conv3(mid, outer, (1, 1, 1), rngs=rngs)
        self.norms = nnx.List([GroupedNorm(n) for n in (outer, mid, mid, outer)])

    def __call__(self, x):
        shortcut, one, two, three = self.norms
        y = nnx.relu(one(self.first(x)))
        y = nnx.relu(two(self.second(y)))
        return nnx.relu(three(self.third(y)) + shortcut(self.short(x)))


class TwoSpeeds(nnx.Module):
    def __init__(self, rngs, classes=8):
        self.slow_in, self.fast_in = Entry(3, 10, 1, rngs), Entry(3, 5, 5, rngs)
        self.join = nnx.List([Lateral(5, 9, 5, rngs), Lateral(12, 15, 7, rngs)])
        self.slow = nnx.List([Unit(19, 18, 6, 1, 2, rngs), Unit(33, 24, 12, 3, 1, rngs)])
        self.fast = nnx.List([Unit(5, 12, 6, 3, 2, rngs), Unit(12, 18, 6, 3, 1, rngs)])
        self.answer = nnx.Linear(42, classes, rngs=rngs)

    def __call__(self, video):
        n = video.shape[1]
        picked = video[:, np.linspace(0, n - 1, n // RATE).astype(int)]
        s, f = self.slow_in(picked), self.fast_in(video)
        for join, slow, fast in zip(self.join, self.slow, self.fast):
            s, f = slow(join(s, f)), fast(f)
        pooled = [v.mean(axis=(1, 2, 3)) for v in (s, f)]
        return self.answer(jnp.concatenate(pooled, axis=-1))


def port_weights(net):
    model = TwoSpeeds(nnx.Rngs(0))
    arr = lambda w: jnp.asarray(w.detach().numpy())

    def kernel(mine, conv):
        mine.kernel = nnx.Param(arr(conv.weight).transpose(2, 3, 4, 1, 0))

    def fixed(mine, bn):
        mine.inner.scale, mine.inner.bias = nnx.Param(arr(bn.weight)), nnx.Param(arr(bn.bias))
        mine.inner.mean = nnx.BatchStat(arr(bn.running_mean))
        mine.inner.var = nnx.BatchStat(arr(bn.running_var))

    def unit(mine, his):
        inner = his.branch2
        convs = (his.branch1, inner.a, inner.b, inner.c)
        for layer, conv in zip((mine.short, mine.first, mine.second, mine.third), convs):
            kernel(layer, conv)
        for norm, gn in zip(mine.norms, (his.branch1_bn, inner.a_bn, inner.b_bn, inner.c_bn)):
            norm.gain, norm.shift = nnx.Param(arr(gn.weight)), nnx.Param(arr(gn.bias))

    for mine, his in ((model.slow_in, net.s1.pathway0_stem), (model.fast_in, net.s1.pathway1_stem)):
        kernel(mine.conv, his.conv)
        fixed(mine.norm, his.bn)
    for mine, his in zip(model.join, (net.s1_fuse, net.s2_fuse)):
        kernel(mine.conv, his.conv_f2s)
        fixed(mine.norm, his.bn)
    for k, stage in enumerate((net.s2, net.s3)):
        unit(model.slow[k], stage.pathway0_res0)
        unit(model.fast[k], stage.pathway1_res0)
    model.answer.kernel = nnx.Param(arr(net.head.projection.weight).T)
    model.answer.bias = nnx.Param(arr(net.head.projection.bias))
    model.eval()
    return model


def build(seed):
    torch.manual_seed(seed)
    net = SlowFast()
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, (nn.Conv3d, nn.Linear)):
                m.weight.copy_(torch.randn_like(m.weight) * (1.4 / m.weight[0].numel()) ** 0.5)
            elif isinstance(m, (nn.BatchNorm3d, nn.GroupNorm)):
                m.weight.copy_(1.1 + 0.25 * torch.randn_like(m.weight))
            if isinstance(m, nn.BatchNorm3d):
                m.running_mean.copy_(0.35 * torch.randn_like(m.running_mean))
                m.running_var.copy_(0.6 + 1.2 * torch.rand_like(m.running_var))
            if getattr(m, "bias", None) is not None:
                m.bias.copy_(0.25 * torch.randn_like(m.bias))
    net.eval()
    frames = (np.random.RandomState(seed + 1).randn(2, 3, 12, 20, 14) + 0.1).astype(np.float32)
    return {"torch": net, "flax": port_weights(net), "inputs": frames,
            "flax_inputs": np.ascontiguousarray(frames.transpose(0, 2, 3, 4, 1))}


FAULTS = [
    {"title": "the slow pathway takes every fourth frame, not frames spread from the first to the last",
     "edits": [("video[:, np.linspace(0, n - 1, n // RATE).astype(int)]", "video[:, ::RATE]")],
     "layers": [""],
     "between": ("the input", "s1"),
     "causes": ["offset", "operand", "operation"], "level": "outputs"},
    {"title": "the lateral features are put before the slow ones",
     "edits": [("jnp.concatenate([slow, side], axis=-1)", "jnp.concatenate([side, slow], axis=-1)")],
     "layers": ["s1_fuse"],
     "between": ("s1_fuse.relu", "s2"),
     "causes": ["concat", "order", "blocks"], "level": "outputs"},
    {"title": "GroupNorm with two groups and not three",
     "edits": [("def __init__(self, width, groups=3):", "def __init__(self, width, groups=2):")],
     "layers": ["s2.pathway0_res0.branch1_bn", "s2.pathway0_res0.branch2.a_bn",
                "s2.pathway0_res0.branch2.b_bn", "s2.pathway0_res0.branch2.c_bn",
                "s2.pathway1_res0.branch1_bn", "s2.pathway1_res0.branch2.a_bn",
                "s2.pathway1_res0.branch2.b_bn", "s2.pathway1_res0.branch2.c_bn",
                "s3.pathway0_res0.branch1_bn", "s3.pathway0_res0.branch2.a_bn",
                "s3.pathway0_res0.branch2.b_bn", "s3.pathway0_res0.branch2.c_bn",
                "s3.pathway1_res0.branch1_bn", "s3.pathway1_res0.branch2.a_bn",
                "s3.pathway1_res0.branch2.b_bn", "s3.pathway1_res0.branch2.c_bn"],
     "between": None,
     "causes": ["groups", "constant"], "level": "outputs"},
    {"title": "the frozen norms normalise with the batch's statistics in training, and move their own",
     "edits": [("self.inner(x, use_running_average=True)", "self.inner(x)")],
     "layers": ["s1.pathway0_stem.bn", "s1.pathway1_stem.bn", "s1_fuse.bn", "s2_fuse.bn"],
     "between": None,
     "causes": ["batch_statistics", "statistics", "training_attribute"], "level": "training"},
    {"title": "the port does not load the running means",
     "edits": [("        mine.inner.mean = nnx.BatchStat(arr(bn.running_mean))\n", "")],
     "layers": ["s1.pathway0_stem.bn", "s1.pathway1_stem.bn", "s1_fuse.bn", "s2_fuse.bn"],
     "between": None,
     "causes": ["default"], "level": "bits"},
]
