"""EfficientDet's BiFPN (two cells on P3..P5) and a box head that shares convolutions but not norms over levels."""
import jax
import jax.numpy as jnp
import flax.linen as fnn
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

CHANNELS, WIDTH, ANCHORS = (4, 6, 9), 10, 3


# ---- torch, after zylo117/Yet-Another-EfficientDet-Pytorch (efficientdet/model.py)
def batch_norm(c):
    return nn.BatchNorm2d(c, momentum=0.01, eps=1e-3)


class MaxPool2dStaticSamePadding(nn.Module):
    """TensorFlow's SAME padding, with zeros, before the pool."""

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(3, 2)

    def forward(self, x):
        h, w = x.shape[-2:]
        extra_h, extra_w = (-(-h // 2) - 1) * 2 - h + 3, (-(-w // 2) - 1) * 2 - w + 3
        left, top = extra_w // 2, extra_h // 2
        return self.pool(F.pad(x, [left, extra_w - left, top, extra_h - top]))


class SeparableConvBlock(nn.Module):
    def __init__(self, in_channels, out_channels=None, norm=True):
        super().__init__()
        out_channels = out_channels or in_channels
        self.depthwise_conv = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
        self.pointwise_conv = nn.Conv2d(in_channels, out_channels, 1)
        self.norm = norm
        if norm:
            self.bn = batch_norm(out_channels)

    def forward(self, x):
        x = self.pointwise_conv(self.depthwise_conv(x))
        return self.bn(x) if self.norm else x


class BiFPN(nn.Module):
    def __init__(self, num_channels, conv_channels, first_time=False, epsilon=1e-4):
        super().__init__()
        self.epsilon, self.first_time = epsilon, first_time
        for name in ("conv5_up", "conv4_up", "conv3_up", "conv4_down", "conv5_down", "conv6_down"):
            setattr(self, name, SeparableConvBlock(num_channels))
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.downsample = MaxPool2dStaticSamePadding()
        self.swish = nn.SiLU()
        if first_time:
            down = lambda c: nn.Sequential(nn.Conv2d(c, num_channels, 1), batch_norm(num_channels))
            self.p5_down_channel, self.p4_down_channel = down(conv_channels[2]), down(conv_channels[1])
            self.p3_down_channel = down(conv_channels[0])
            self.p5_to_p6 = nn.Sequential(*down(conv_channels[2]), MaxPool2dStaticSamePadding())
            self.p4_down_channel_2, self.p5_down_channel_2 = down(conv_channels[1]), down(conv_channels[2])
        for name, n in (("p5_w1", 2), ("p4_w1", 2), ("p3_w1", 2), ("p4_w2", 3), ("p5_w2", 3), ("p6_w2", 2)):
            setattr(self, name, nn.Parameter(torch.ones(n)))

    def fuse(self, weight, *feats):
        w = F.relu(weight)
        weight = w / (torch.sum(w, dim=0) + self.epsilon)
        return self.swish(sum(weight[i] * f for i, f in enumerate(feats)))

    def forward(self, inputs):
        if self.first_time:
            p3, p4, p5 = inputs
            p6_in = self.p5_to_p6(p5)
            p3_in, p4_in, p5_in = self.p3_down_channel(p3), self.p4_down_channel(p4), self.p5_down_channel(p5)
        else:
            p3_in, p4_in, p5_in, p6_in = inputs
        p5_up = self.conv5_up(self.fuse(self.p5_w1, p5_in, self.upsample(p6_in)))
        p4_up = self.conv4_up(self.fuse(self.p4_w1, p4_in, self.upsample(p5_up)))
        p3_out = self.conv3_up(self.fuse(self.p3_w1, p3_in, self.upsample(p4_up)))
        if self.first_time:
            p4_in, p5_in = self.p4_down_channel_2(p4), self.p5_down_channel_2(p5)
        p4_out = self.conv4_down(self.fuse(self.p4_w2, p4_in, p4_up, self.downsample(p3_out)))
        p5_out = self.conv5_down(self.fuse(self.p5_w2, p5_in, p5_up, self.downsample(p4_out)))
        p6_out = self.conv6_down(self.fuse(self.p6_w2, p6_in, self.downsample(p5_out)))
        return p3_out, p4_out, p5_out, p6_out


class Regressor(nn.Module):
    def __init__(self, in_channels, num_anchors, pyramid_levels=4):
        super().__init__()
        self.conv = SeparableConvBlock(in_channels, norm=False)
        self.bn_list = nn.ModuleList([batch_norm(in_channels) for _ in range(pyramid_levels)])
        self.header = SeparableConvBlock(in_channels, num_anchors * 4, norm=False)
        self.swish = nn.SiLU()

    def forward(self, inputs):
        feats = []
        for feat, bn in zip(inputs, self.bn_list):
            feat = self.header(self.swish(bn(self.conv(feat))))
            feats.append(feat.permute(0, 2, 3, 1).reshape(feat.shape[0], -1, 4))
        return torch.cat(feats, dim=1)


class EfficientDetBackbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.bifpn = nn.Sequential(BiFPN(WIDTH, CHANNELS, True), BiFPN(WIDTH, CHANNELS))
        self.regressor = Regressor(WIDTH, ANCHORS)

    def forward(self, p3, p4, p5):
        return self.regressor(self.bifpn((p3, p4, p5)))


# ---- Flax Linen: NHWC, cells as lists of nodes, a norm of its own with torch's running variance
class Norm(fnn.Module):
    momentum: float = 0.01

    @fnn.compact
    def __call__(self, x, train=False):
        c = x.shape[-1]
        mean = self.variable("batch_stats", "mean", jnp.zeros, (c,))
        var = self.variable("batch_stats", "var", jnp.ones, (c,))
        scale = self.param("scale", fnn.initializers.ones, (c,))
        bias = self.param("bias", fnn.initializers.zeros, (c,))
        m, v = mean.value, var.value
        if train:
            n = x.size // c
            m = x.mean((0, 1, 2))
            v = jnp.square(x - m).mean((0, 1, 2))
            mean.value += self.momentum * (m - mean.value)
            var.value += self.momentum * (v * n / (n - 1) - var.value)
        return (x - m) * jax.lax.rsqrt(v + 1e-3) * scale + bias


def pool(x):
    same = jax.lax.padtype_to_pads(x.shape[1:3], (3, 3), (2, 2), "SAME")
    x = jnp.pad(x, [(0, 0), *same, (0, 0)])
    return fnn.max_pool(x, (3, 3), (2, 2), "VALID")


def grow(x):
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


class Separable(fnn.Module):
    features: int

    @fnn.compact
    def __call__(self, x):
        c = x.shape[-1]
        x = fnn.Conv(c, (3, 3), feature_group_count=c, use_bias=False, name="depth")(x)
        return fnn.Conv(self.features, (1, 1), name="point")(x)


class Lateral(fnn.Module):
    @fnn.compact
    def __call__(self, x, train):
        x = fnn.Conv(WIDTH, (1, 1), name="conv")(x)
        return Norm(name="norm")(x, train)


class Node(fnn.Module):
    """Fast normalised fusion of several maps of one size, then a separable convolution."""

    @fnn.compact
    def __call__(self, maps, train):
        w = fnn.relu(self.param("fusion", fnn.initializers.ones, (len(maps),)))
        w = w / (w.sum() + 1e-4)
        x = fnn.silu(jnp.einsum("k,kbhwc->bhwc", w, jnp.stack(maps)))
        return Norm(name="norm")(Separable(WIDTH, name="conv")(x), train)


class Cell(fnn.Module):
    @fnn.compact
    def __call__(self, maps, train):
        down = dict(zip((3, 4, 5, 6), maps))
        again = dict(down)
        if len(maps) == 3:
            raw = down
            down = {i: Lateral(name=f"lateral{i}")(raw[i], train) for i in (3, 4, 5)}
            down[6] = pool(Lateral(name="lateral6")(raw[5], train))
            again = {i: Lateral(name=f"again{i}")(raw[i], train) for i in (4, 5)}
            again[6] = down[6]
        top = {6: down[6]}
        for i in (5, 4, 3):
            top[i] = Node(name=f"top{i}")([down[i], grow(top[i + 1])], train)
        out = {3: top[3]}
        for i in (4, 5, 6):
            own = [again[i], top[i]] if i < 6 else [again[i]]
            out[i] = Node(name=f"out{i}")([*own, pool(out[i - 1])], train)
        return [out[i] for i in (3, 4, 5, 6)]


class BoxHead(fnn.Module):
    @fnn.compact
    def __call__(self, maps, train):
        conv, last = Separable(WIDTH, name="conv"), Separable(4 * ANCHORS, name="boxes")
        boxes = []
        for i, x in enumerate(maps):
            x = fnn.silu(Norm(name=f"norm{i}")(conv(x), train))
            boxes.append(last(x).reshape(x.shape[0], -1, 4))
        return jnp.concatenate(boxes, axis=1)


class Detector(fnn.Module):
    @fnn.compact
    def __call__(self, p3, p4, p5, train=False):
        maps = Cell(name="cell0")([p3, p4, p5], train)
        maps = Cell(name="cell1")(maps, train)
        return BoxHead(name="head")(maps, train)


def port_weights(net):
    params, stats = {}, {}
    arr = lambda t: jnp.asarray(t.detach().numpy())

    def put(tree, path, leaves):
        for p in path.split("/"):
            tree = tree.setdefault(p, {})
        tree.update(leaves)

    def conv(path, m):
        leaves = {"kernel": arr(m.weight.permute(2, 3, 1, 0))}
        put(params, path, leaves if m.bias is None else {**leaves, "bias": arr(m.bias)})

    def norm(path, m):
        put(params, path, {"scale": arr(m.weight), "bias": arr(m.bias)})
        put(stats, path, {"mean": arr(m.running_mean), "var": arr(m.running_var)})

    def separable(path, m):
        conv(path + "/depth", m.depthwise_conv)
        conv(path + "/point", m.pointwise_conv)

    for k, cell in enumerate(net.bifpn):
        for i, up, role, w in ((5, "up", "top", 1), (4, "up", "top", 1), (3, "up", "top", 1),
                               (4, "down", "out", 2), (5, "down", "out", 2), (6, "down", "out", 2)):
            block, path = getattr(cell, f"conv{i}_{up}"), f"cell{k}/{role}{i}"
            put(params, path, {"fusion": arr(getattr(cell, f"p{i}_w{w}"))})
            separable(path + "/conv", block)
            norm(path + "/norm", block.bn)
        if cell.first_time:
            for path, m in (("lateral3", cell.p3_down_channel), ("lateral4", cell.p4_down_channel),
                            ("lateral5", cell.p5_down_channel), ("lateral6", cell.p5_to_p6),
                            ("again4", cell.p4_down_channel_2), ("again5", cell.p5_down_channel_2)):
                conv(f"cell{k}/{path}/conv", m[0])
                norm(f"cell{k}/{path}/norm", m[1])
    separable("head/conv", net.regressor.conv)
    separable("head/boxes", net.regressor.header)
    for i, m in enumerate(net.regressor.bn_list):
        norm(f"head/norm{i}", m)
    return Detector(), {"params": params, "batch_stats": stats}


def build(seed):
    torch.manual_seed(seed)
    net = EfficientDetBackbone()
    with torch.no_grad():
        for name, p in net.named_parameters():
            fan = p[0].numel()
            p.copy_(torch.randn_like(p) * 1.3 * fan ** -0.5 if p.ndim > 1 else 0.4 * torch.rand_like(p) + 0.5)
            if name.endswith("bias"):
                p.copy_(0.4 * torch.randn_like(p))
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.copy_(0.3 * torch.randn_like(m.running_mean))
                m.running_var.copy_(0.5 + torch.rand_like(m.running_var))
    net.eval()
    rng = np.random.RandomState(seed + 1)
    maps = tuple(rng.randn(2, c, 24 // s, 16 // s).astype(np.float32) for c, s in zip(CHANNELS, (1, 2, 4)))
    return {"torch": net, "flax": port_weights(net), "inputs": maps,
            "flax_inputs": tuple(x.transpose(0, 2, 3, 1) for x in maps)}


NORMS = [f"bifpn.{k}.conv{n}.bn" for k in (0, 1) for n in ("5_up", "4_up", "3_up", "4_down", "5_down", "6_down")]
LATERALS = [f"bifpn.0.{n}.1" for n in ("p3_down_channel", "p4_down_channel", "p5_down_channel", "p5_to_p6",
                                       "p4_down_channel_2", "p5_down_channel_2")]
HEAD = [f"regressor.bn_list.{i}" for i in range(4)]
FAULTS = [
    {
        "title": "the pool is Flax's SAME one, which pads with minus infinity and not with zeros",
        "edits": [("    same = jax.lax.padtype_to_pads(x.shape[1:3], (3, 3), (2, 2), \"SAME\")\n"
                   "    x = jnp.pad(x, [(0, 0), *same, (0, 0)])\n", ""),
                  ('fnn.max_pool(x, (3, 3), (2, 2), "VALID")', 'fnn.max_pool(x, (3, 3), (2, 2), "SAME")')],
        "layers": ["bifpn.0.p5_to_p6.2", "bifpn.0.p5_to_p6", "bifpn.0.downsample", "bifpn.1.downsample"],
        "between": ("bifpn.0.p5_to_p6.1", "bifpn.0.conv5_up"),
        "causes": ["pooling", "padding", "constant"],
        "level": "outputs",
    },
    {
        "title": "P4 enters the bottom-up path through the projection of the top-down path",
        "edits": [("            again[6] = down[6]\n", "            again[6], again[4] = down[6], down[4]\n")],
        "layers": ["bifpn.0", "bifpn.0.p4_down_channel_2", "bifpn.0.p4_down_channel"],
        "between": ("bifpn.0.conv3_up", "bifpn.0.conv4_down"),
        "causes": ["operand", "wiring"],
        "level": "outputs",
    },
    {
        "title": "the norms of the lateral projections keep torch's default momentum, not EfficientDet's",
        "edits": [('return Norm(name="norm")(x, train)', 'return Norm(momentum=0.1, name="norm")(x, train)')],
        "layers": LATERALS,
        "between": None,
        "causes": ["momentum", "constant"],
        "level": "training",
    },
    {
        "title": "the running variance takes the biased variance of the batch",
        "edits": [("(v * n / (n - 1) - var.value)", "(v - var.value)")],
        "layers": NORMS + LATERALS + HEAD,
        "between": None,
        "causes": ["unbiased_variance", "statistics"],
        "level": "training",
    },
    {
        "title": "the head's norms are not told that they train and use their running statistics",
        "edits": [('fnn.silu(Norm(name=f"norm{i}")(conv(x), train))', 'fnn.silu(Norm(name=f"norm{i}")(conv(x)))')],
        "layers": HEAD,
        "between": None,
        "causes": ["batch_statistics", "statistics", "training_attribute"],
        "level": "training",
    },
]
