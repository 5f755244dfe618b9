"""HRNet (reduced): three parallel resolutions, one fusing module, a segmentation head and an auxiliary head."""
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
import jax
import jax.numpy as jnp
from jax import lax
from flax import nnx

BN_MOMENTUM = 0.1


def conv3x3(in_planes, out_planes, stride=1):
    return nn.Conv2d(in_planes, out_planes, kernel_size=3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    def __init__(self, planes):
        super().__init__()
        self.conv1 = conv3x3(planes, planes)
        self.bn1 = nn.BatchNorm2d(planes, momentum=BN_MOMENTUM)
        self.relu = nn.ReLU()
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes, momentum=BN_MOMENTUM)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + x)


class HighResolutionModule(nn.Module):
    def __init__(self, num_channels):
        super().__init__()
        self.num_branches = len(num_channels)
        self.branches = nn.ModuleList([nn.Sequential(BasicBlock(c)) for c in num_channels])
        self.fuse_layers = self._make_fuse_layers(num_channels)
        self.relu = nn.ReLU()

    def _make_fuse_layers(self, chans):
        fuse_layers = []
        for i in range(self.num_branches):
            fuse_layer = []
            for j in range(self.num_branches):
                if j > i:
                    fuse_layer.append(nn.Sequential(
                        nn.Conv2d(chans[j], chans[i], 1, 1, 0, bias=False),
                        nn.BatchNorm2d(chans[i], momentum=BN_MOMENTUM),
                        nn.Upsample(scale_factor=2 ** (j - i), mode="nearest")))
                elif j == i:
                    fuse_layer.append(nn.Identity())
                else:
                    conv3x3s = []
                    for k in range(i - j):
                        last = k == i - j - 1
                        outchannels = chans[i] if last else chans[j]
                        step = [conv3x3(chans[j], outchannels, 2), nn.BatchNorm2d(outchannels, momentum=BN_MOMENTUM)]
                        conv3x3s.append(nn.Sequential(*step) if last else nn.Sequential(*step, nn.ReLU()))
                    fuse_layer.append(nn.Sequential(*conv3x3s))
            fuse_layers.append(nn.ModuleList(fuse_layer))
        return nn.ModuleList(fuse_layers)

    def forward(self, x):
        x = [branch(v) for branch, v in zip(self.branches, x)]
        x_fuse = []
        for i in range(self.num_branches):
            y = self.fuse_layers[i][0](x[0])
            for j in range(1, self.num_branches):
                y = y + self.fuse_layers[i][j](x[j])
            x_fuse.append(self.relu(y))
        return x_fuse


class HighResolutionNet(nn.Module):
    def __init__(self, stem=7, chans=(5, 8, 11), classes=4):
        super().__init__()
        self.conv1 = conv3x3(3, stem, 2)
        self.bn1 = nn.BatchNorm2d(stem, momentum=BN_MOMENTUM)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(BasicBlock(stem))
        self.transition1 = nn.ModuleList()
        for i, c in enumerate(chans):
            steps = []
            for k in range(max(i, 1)):
                out = c if k == max(i, 1) - 1 else stem
                steps.append(nn.Sequential(conv3x3(stem, out, 2 if i else 1),
                                           nn.BatchNorm2d(out, momentum=BN_MOMENTUM), nn.ReLU()))
            self.transition1.append(nn.Sequential(*steps))
        self.stage2 = nn.Sequential(HighResolutionModule(chans))
        total = sum(chans)
        self.aux_head = nn.Conv2d(total, classes - 1, kernel_size=1)
        self.last_layer = nn.Sequential(
            nn.Conv2d(total, 13, kernel_size=1, bias=False),
            nn.BatchNorm2d(13, momentum=BN_MOMENTUM),
            nn.ReLU(),
            nn.Conv2d(13, classes, kernel_size=1))

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer1(x)
        x = self.stage2([t(x) for t in self.transition1])
        h, w = x[0].shape[2:]
        ups = [F.interpolate(v, size=(h, w), mode="bilinear", align_corners=True) for v in x[1:]]
        feats = torch.cat([x[0]] + ups, 1)
        aux = self.aux_head(feats.detach())
        return self.last_layer(feats), aux


# ---- Flax half: NNX, NHWC; the norm keeps torch's unbiased running variance ----

class RunningNorm(nnx.Module):
    def __init__(self, width, keep=0.9, eps=1e-5):
        self.gain = nnx.Param(jnp.ones((width,)))
        self.shift = nnx.Param(jnp.zeros((width,)))
        self.mean = nnx.BatchStat(jnp.zeros((width,)))
        self.var = nnx.BatchStat(jnp.ones((width,)))
        self.keep, self.eps = keep, eps
        self.use_running_average = False

    def __call__(self, x):
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            n = x.size // x.shape[-1]
            mean = jnp.mean(x, axis=(0, 1, 2))
            var = jnp.mean(jnp.square(x - mean), axis=(0, 1, 2))
            seen = lax.stop_gradient(var * n / (n - 1))
            self.mean[...] = self.keep * self.mean[...] + (1 - self.keep) * lax.stop_gradient(mean)
            self.var[...] = self.keep * self.var[...] + (1 - self.keep) * seen
        return (x - mean) * (self.gain[...] * lax.rsqrt(var + self.eps)) + self.shift[...]


class ConvNorm(nnx.Module):
    def __init__(self, inner, outer, size, step, active, rngs):
        around = [(size // 2, size // 2)] * 2
        self.conv = nnx.Conv(inner, outer, (size, size), strides=(step, step), padding=around,
                             use_bias=False, rngs=rngs)
        self.norm = RunningNorm(outer)
        self.active = active

    def __call__(self, x):
        x = self.norm(self.conv(x))
        return nnx.relu(x) if self.active else x


class Residual(nnx.Module):
    def __init__(self, width, rngs):
        self.a = ConvNorm(width, width, 3, 1, True, rngs)
        self.b = ConvNorm(width, width, 3, 1, False, rngs)

    def __call__(self, x):
        return nnx.relu(x + self.b(self.a(x)))


def run(chain, x):
    for layer in chain:
        x = layer(x)
    return x


def enlarge(x, times):
    return jnp.repeat(jnp.repeat(x, times, axis=1), times, axis=2)


def hat(small, large, dtype):
    """[large, small]: linear interpolation whose first and last samples coincide."""
    where = jnp.linspace(0, small - 1, large, dtype=dtype)
    return jnp.clip(1 - jnp.abs(where[:, None] - jnp.arange(small, dtype=dtype)), 0, 1)


def stretch(x, h, w):
    rows, cols = hat(x.shape[1], h, x.dtype), hat(x.shape[2], w, x.dtype)
    return jnp.einsum("ah,bw,nhwc->nabc", rows, cols, x)


class Segmenter(nnx.Module):
    def __init__(self, rngs, stem=7, widths=(5, 8, 11), classes=4):
        self.stem = ConvNorm(3, stem, 3, 2, True, rngs)
        self.first = Residual(stem, rngs)
        self.split = nnx.List([nnx.List([
            ConvNorm(stem, c if k == max(i, 1) - 1 else stem, 3, 2 if i else 1, True, rngs)
            for k in range(max(i, 1))]) for i, c in enumerate(widths)])
        self.blocks = nnx.List([Residual(c, rngs) for c in widths])
        self.cross = nnx.Dict()
        for to, c in enumerate(widths):
            for of, d in enumerate(widths):
                if of > to:
                    self.cross[f"from{of}to{to}"] = nnx.List([ConvNorm(d, c, 1, 1, False, rngs)])
                elif of < to:
                    self.cross[f"from{of}to{to}"] = nnx.List([
                        ConvNorm(d, c if k == to - of - 1 else d, 3, 2, k < to - of - 1, rngs)
                        for k in range(to - of)])
        self.helper = nnx.Linear(sum(widths), classes - 1, rngs=rngs)
        self.mix = ConvNorm(sum(widths), 13, 1, 1, True, rngs)
        self.classify = nnx.Linear(13, classes, rngs=rngs)

    def fuse(self, levels, to):
        total = levels[to]
        for of, x in enumerate(levels):
            if of != to:
                y = run(self.cross[f"from{of}to{to}"], x)
                total = total + (enlarge(y, 2 ** (of - to)) if of > to else y)
        return nnx.relu(total)

    def __call__(self, image):
        x = self.first(self.stem(image))
        levels = [block(run(chain, x)) for chain, block in zip(self.split, self.blocks)]
        levels = [self.fuse(levels, to) for to in range(len(levels))]
        _, h, w, _ = levels[0].shape
        joined = jnp.concatenate([levels[0]] + [stretch(v, h, w) for v in levels[1:]], axis=-1)
        helped = self.helper(lax.stop_gradient(joined))
        logits = self.classify(self.mix(joined))
        return jnp.moveaxis(logits, -1, 1), jnp.moveaxis(helped, -1, 1)


def port_weights(net):
    model = Segmenter(nnx.Rngs(0))
    arr = lambda w: jnp.asarray(w.detach().numpy())

    def pair(mine, conv, norm):
        mine.conv.kernel = nnx.Param(arr(conv.weight).transpose(2, 3, 1, 0))
        mine.norm.gain, mine.norm.shift = nnx.Param(arr(norm.weight)), nnx.Param(arr(norm.bias))
        mine.norm.mean = nnx.BatchStat(arr(norm.running_mean))
        mine.norm.var = nnx.BatchStat(arr(norm.running_var))

    def residual(mine, his):
        pair(mine.a, his.conv1, his.bn1)
        pair(mine.b, his.conv2, his.bn2)

    def dense(mine, conv):
        mine.kernel, mine.bias = nnx.Param(arr(conv.weight)[:, :, 0, 0].T), nnx.Param(arr(conv.bias))

    pair(model.stem, net.conv1, net.bn1)
    residual(model.first, net.layer1[0])
    for mine, his in zip(model.split, net.transition1):
        for m, s in zip(mine, his):
            pair(m, s[0], s[1])
    stage = net.stage2[0]
    for i, branch in enumerate(stage.branches):
        residual(model.blocks[i], branch[0])
        for j, his in enumerate(stage.fuse_layers[i]):
            if j > i:
                pair(model.cross[f"from{j}to{i}"][0], his[0], his[1])
            elif j < i:
                for m, s in zip(model.cross[f"from{j}to{i}"], his):
                    pair(m, s[0], s[1])
    dense(model.helper, net.aux_head)
    pair(model.mix, net.last_layer[0], net.last_layer[1])
    dense(model.classify, net.last_layer[3])
    model.eval()
    return model


def build(seed):
    torch.manual_seed(seed)
    net = HighResolutionNet()
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.copy_(1.1 + 0.25 * torch.randn_like(m.weight))
                m.bias.copy_(0.25 * torch.randn_like(m.bias))
                m.running_mean.copy_(0.3 * torch.randn_like(m.running_mean))
                m.running_var.copy_(0.6 + 1.3 * torch.rand_like(m.running_var))
            elif isinstance(m, nn.Conv2d):
                m.weight.copy_(torch.randn_like(m.weight) * (1.3 / m.weight[0].numel()) ** 0.5)
                if m.bias is not None:
                    m.bias.copy_(0.2 * torch.randn_like(m.bias))
    net.eval()
    image = (np.random.RandomState(seed + 1).randn(2, 3, 24, 16) + 0.15).astype(np.float32)
    return {"torch": net, "flax": port_weights(net), "inputs": image,
            "flax_inputs": np.ascontiguousarray(image.transpose(0, 2, 3, 1))}


FAULTS = [
    {"title": "strided convolutions are padded 'SAME', that is at the far sides only",
     "edits": [("        around = [(size // 2, size // 2)] * 2\n", "        around = \"SAME\"\n")],
     "layers": ["conv1"],
     "between": ("the input", "bn1"),
     "causes": ["padding"], "level": "outputs"},
    {"title": "the head's upsampling takes half-pixel centres and not aligned corners",
     "edits": [("    rows, cols = hat(x.shape[1], h, x.dtype), hat(x.shape[2], w, x.dtype)\n"
                "    return jnp.einsum(\"ah,bw,nhwc->nabc\", rows, cols, x)\n",
                "    return jax.image.resize(x, (x.shape[0], h, w, x.shape[3]), \"bilinear\")\n")],
     "layers": [""],
     "between": ("stage2", "aux_head"),
     "causes": ["operation", "offset", "constant"], "level": "outputs"},
    {"title": "the auxiliary head sends its gradient into the backbone",
     "edits": [("self.helper(lax.stop_gradient(joined))", "self.helper(joined)")],
     "layers": ["", "aux_head"],
     "between": ("stage2", "aux_head"),
     "causes": ["stop_gradient"], "level": "gradients"},
    {"title": "the running statistics take nine tenths of the batch (momentum of the other convention)",
     "edits": [("def __init__(self, width, keep=0.9, eps=1e-5)", "def __init__(self, width, keep=0.1, eps=1e-5)")],
     "layers": ["bn1", "layer1.0.bn1", "layer1.0.bn2", "transition1.0.0.1", "transition1.1.0.1",
                "transition1.2.0.1", "transition1.2.1.1", "stage2.0.branches.0.0.bn1",
                "stage2.0.branches.0.0.bn2", "stage2.0.branches.1.0.bn1", "stage2.0.branches.1.0.bn2",
                "stage2.0.branches.2.0.bn1", "stage2.0.branches.2.0.bn2", "stage2.0.fuse_layers.0.1.1",
                "stage2.0.fuse_layers.0.2.1", "stage2.0.fuse_layers.1.0.0.1", "stage2.0.fuse_layers.1.2.1",
                "stage2.0.fuse_layers.2.0.0.1", "stage2.0.fuse_layers.2.0.1.1",
                "stage2.0.fuse_layers.2.1.0.1", "last_layer.1"],
     "between": None,
     "causes": ["momentum"], "level": "training"},
    {"title": "the running variance takes the batch's biased variance",
     "edits": [("lax.stop_gradient(var * n / (n - 1))", "lax.stop_gradient(var)")],
     "layers": ["bn1", "layer1.0.bn1", "layer1.0.bn2", "transition1.0.0.1", "transition1.1.0.1",
                "transition1.2.0.1", "transition1.2.1.1", "stage2.0.branches.0.0.bn1",
                "stage2.0.branches.0.0.bn2", "stage2.0.branches.1.0.bn1", "stage2.0.branches.1.0.bn2",
                "stage2.0.branches.2.0.bn1", "stage2.0.branches.2.0.bn2", "stage2.0.fuse_layers.0.1.1",
                "stage2.0.fuse_layers.0.2.1", "stage2.0.fuse_layers.1.0.0.1", "stage2.0.fuse_layers.1.2.1",
                "stage2.0.fuse_layers.2.0.0.1", "stage2.0.fuse_layers.2.0.1.1",
                "stage2.0.fuse_layers.2.1.0.1", "last_layer.1"],
     "between": None,
     "causes": ["unbiased_variance"], "level": "training"},
]
