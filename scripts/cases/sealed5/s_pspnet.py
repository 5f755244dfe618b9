"""PSPNet (dilated residual backbone, pyramid pooling, auxiliary head), and its NNX port in NHWC."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn

BATCH, HEIGHT, WIDTH, CLASSES = 3, 26, 22, 4
STEM, C1, C2, C3, AUX, REDUCED, HEAD, BINS = 5, 6, 8, 10, 7, 3, 9, (1, 2, 3)


# ---- PyTorch
class BasicBlock(nn.Module):
    def __init__(self, inplanes, planes, stride=1, dilation=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x):
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            residual = self.downsample(x)
        return self.relu(out + residual)


def make_layer(inplanes, planes, blocks, stride=1, dilation=1):
    downsample = None
    if stride != 1 or inplanes != planes:
        downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
    layers = [BasicBlock(inplanes, planes, stride, dilation, downsample)]
    for _ in range(1, blocks):
        layers.append(BasicBlock(planes, planes, dilation=dilation))
    return nn.Sequential(*layers)


class PPM(nn.Module):
    def __init__(self, in_dim, reduction_dim, bins):
        super().__init__()
        self.features = nn.ModuleList([nn.Sequential(
            nn.AdaptiveAvgPool2d(bin), nn.Conv2d(in_dim, reduction_dim, kernel_size=1, bias=False),
            nn.BatchNorm2d(reduction_dim), nn.ReLU(inplace=True)) for bin in bins])

    def forward(self, x):
        x_size = x.size()
        out = [x]
        for f in self.features:
            out.append(F.interpolate(f(x), x_size[2:], mode='bilinear', align_corners=False))
        return torch.cat(out, 1)


class PSPNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer0 = nn.Sequential(nn.Conv2d(3, STEM, 3, 2, 1, bias=False), nn.BatchNorm2d(STEM),
                                    nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        self.layer1 = make_layer(STEM, C1, 1)
        self.layer2 = make_layer(C1, C2, 2, dilation=2)
        self.layer3 = make_layer(C2, C3, 1, dilation=4)
        self.ppm = PPM(C3, REDUCED, BINS)
        self.cls = nn.Sequential(nn.Conv2d(C3 + REDUCED * len(BINS), HEAD, 3, padding=1, bias=False),
                                 nn.BatchNorm2d(HEAD), nn.ReLU(inplace=True), nn.Conv2d(HEAD, CLASSES, 1))
        self.aux = nn.Sequential(nn.Conv2d(C2, AUX, 3, padding=1, bias=False), nn.BatchNorm2d(AUX),
                                 nn.ReLU(inplace=True), nn.Conv2d(AUX, CLASSES, 1))

    def forward(self, x):
        size = x.shape[2:]
        x = self.layer1(self.layer0(x))
        x_tmp = self.layer2(x)
        x = self.cls(self.ppm(self.layer3(x_tmp)))
        x = F.interpolate(x, size=size, mode='bilinear', align_corners=False)
        aux = F.interpolate(self.aux(x_tmp), size=size, mode='bilinear', align_corners=False)
        return x, aux


# ---- Flax
class Norm(nnx.Module):
    """Batch normalisation that keeps torch's unbiased variance."""
    def __init__(self, width, momentum=0.1, epsilon=1e-5):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.shift = nnx.Param(jnp.zeros(width, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(width, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(width, jnp.float32))
        self.momentum, self.epsilon = momentum, epsilon
        self.use_running_average = False

    def __call__(self, x, frozen=False):
        if frozen or self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            mean = x.mean((0, 1, 2))
            var = jnp.mean(jnp.square(x - mean), (0, 1, 2))
            count = x.size // x.shape[-1]
            self.mean[...] += self.momentum * (mean - self.mean[...])
            self.var[...] += self.momentum * (var * (count / (count - 1)) - self.var[...])
        return (x - mean) * (self.scale[...] * jax.lax.rsqrt(var + self.epsilon)) + self.shift[...]


class ConvNorm(nnx.Module):
    def __init__(self, cin, cout, size, stride=1, dilation=1, momentum=0.1, *, rngs):
        pad = dilation * (size // 2)
        self.conv = nnx.Conv(cin, cout, (size, size), strides=stride, kernel_dilation=dilation,
                             padding=((pad, pad), (pad, pad)), use_bias=False, rngs=rngs)
        self.norm = Norm(cout, momentum=momentum)

    def __call__(self, x):
        return self.norm(self.conv(x))


class Residual(nnx.Module):
    def __init__(self, cin, cout, dilation, *, rngs):
        self.one = ConvNorm(cin, cout, 3, dilation=dilation, rngs=rngs)
        self.two = ConvNorm(cout, cout, 3, dilation=dilation, rngs=rngs)
        self.short = None if cin == cout else ConvNorm(cin, cout, 1, rngs=rngs)

    def __call__(self, x):
        y = self.two(jax.nn.relu(self.one(x)))
        return jax.nn.relu(y + (x if self.short is None else self.short(x)))


def averaging(length, bins, dtype):
    """(bins, length): row k averages what torch's adaptive pool puts into bin k."""
    k = np.arange(bins)
    low, high = k * length // bins, -(-(k + 1) * length // bins)
    place = np.arange(length)
    inside = (place >= low[:, None]) & (place < high[:, None])
    return jnp.asarray(inside / inside.sum(1, keepdims=True), dtype)


def upsample(x, size):
    return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), 'bilinear')


class Pyramid(nnx.Module):
    def __init__(self, cin, cout, bins, *, rngs):
        self.bins = tuple(bins)
        self.squeeze = nnx.List([ConvNorm(cin, cout, 1, rngs=rngs) for _ in bins])

    def __call__(self, x):
        _, h, w, _ = x.shape
        levels = [x]
        for bins, layer in zip(self.bins, self.squeeze):
            cells = jnp.einsum('ph,qw,bhwc->bpqc', averaging(h, bins, x.dtype), averaging(w, bins, x.dtype), x)
            cells = jax.nn.relu(layer.norm(layer.conv(cells)))
            levels.append(upsample(cells, (h, w)))
        return jnp.concatenate(levels, axis=-1)


class Head(nnx.Module):
    def __init__(self, cin, mid, momentum=0.1, *, rngs):
        self.body = ConvNorm(cin, mid, 3, momentum=momentum, rngs=rngs)
        self.logits = nnx.Conv(mid, CLASSES, (1, 1), rngs=rngs)

    def __call__(self, x, size):
        return upsample(self.logits(jax.nn.relu(self.body(x))), size)


class SceneParser(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = ConvNorm(3, STEM, 3, stride=2, rngs=rngs)
        self.early = nnx.List([Residual(STEM, C1, 1, rngs=rngs),
                               Residual(C1, C2, 2, rngs=rngs), Residual(C2, C2, 2, rngs=rngs)])
        self.late = nnx.List([Residual(C2, C3, 4, rngs=rngs)])
        self.pyramid = Pyramid(C3, REDUCED, BINS, rngs=rngs)
        self.main = Head(C3 + REDUCED * len(BINS), HEAD, rngs=rngs)
        self.helper = Head(C2, AUX, momentum=0.1, rngs=rngs)

    def __call__(self, image):
        size = image.shape[1:3]
        x = jax.nn.relu(self.stem(image))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for block in self.early:
            x = block(x)
        middle = x
        for block in self.late:
            x = block(x)
        return self.main(self.pyramid(x), size), self.helper(middle, size)


def port_weights(net):
    arr = lambda t: jnp.asarray(t.detach().numpy())
    model = SceneParser(rngs=nnx.Rngs(0))

    def pair(dst, conv, bn):
        dst.conv.kernel.set_value(arr(conv.weight.permute(2, 3, 1, 0)))
        dst.norm.scale.set_value(arr(bn.weight))
        dst.norm.shift.set_value(arr(bn.bias))
        dst.norm.mean.set_value(arr(bn.running_mean))
        dst.norm.var.set_value(arr(bn.running_var))

    def residual(dst, src):
        pair(dst.one, src.conv1, src.bn1)
        pair(dst.two, src.conv2, src.bn2)
        if src.downsample is not None:
            pair(dst.short, *src.downsample)

    def head(dst, src):
        pair(dst.body, src[0], src[1])
        dst.logits.kernel.set_value(arr(src[3].weight.permute(2, 3, 1, 0)))
        dst.logits.bias.set_value(arr(src[3].bias))

    pair(model.stem, net.layer0[0], net.layer0[1])
    for dst, src in zip(model.early, [*net.layer1, *net.layer2]):
        residual(dst, src)
    for dst, src in zip(model.late, net.layer3):
        residual(dst, src)
    for dst, src in zip(model.pyramid.squeeze, net.ppm.features):
        pair(dst, src[1], src[2])
    head(model.main, net.cls)
    head(model.helper, net.aux)
    model.eval()
    return model


def build(seed):
    torch.manual_seed(seed)
    net = PSPNet()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) / p[0].numel() ** 0.5 if p.dim() > 1 else 0.3 * torch.randn_like(p))
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.add_(1.2)
                m.running_mean.copy_(0.3 * torch.randn_like(m.running_mean))
                m.running_var.copy_(0.5 + torch.rand_like(m.running_var))
    net.eval()
    image = np.random.RandomState(seed).randn(BATCH, 3, HEIGHT, WIDTH).astype(np.float32)
    return {'torch': net, 'flax': port_weights(net), 'inputs': image,
            'flax_inputs': np.ascontiguousarray(image.transpose(0, 2, 3, 1))}


FAULTS = [
    {'title': 'the last stage of the backbone is dilated by 2 like the stage before, not by 4',
     'edits': [('self.late = nnx.List([Residual(C2, C3, 4, rngs=rngs)])', 'self.late = nnx.List([Residual(C2, C3, 2, rngs=rngs)])')],
     'layers': ['layer3.0.conv1', 'layer3.0', 'layer3'],
     'between': ('layer2', 'layer3.0.bn1'),
     'causes': ['dilation'], 'level': 'outputs'},
    {'title': 'the adaptive pool\'s cells end at the floor, so they do not overlap and miss rows',
     'edits': [('low, high = k * length // bins, -(-(k + 1) * length // bins)', 'low, high = k * length // bins, (k + 1) * length // bins')],
     'layers': ['ppm.features.1.0', 'ppm.features.2.0'],
     'between': ('ppm.features.0', 'ppm.features.1.1'),
     'causes': ['pooling', 'size'], 'level': 'outputs'},
    {'title': 'the norm of the auxiliary head takes 1% of the batch into its running statistics, not 10%',
     'edits': [('self.helper = Head(C2, AUX, momentum=0.1, rngs=rngs)', 'self.helper = Head(C2, AUX, momentum=0.01, rngs=rngs)')],
     'layers': ['aux.1'], 'between': None, 'causes': ['momentum', 'training_attribute'], 'level': 'training'},
    {'title': 'the running variances take the biased variance of the batch',
     'edits': [('self.var[...] += self.momentum * (var * (count / (count - 1)) - self.var[...])', 'self.var[...] += self.momentum * (var - self.var[...])')],
     'layers': ['layer0.1', 'layer1.0.bn1', 'layer1.0.bn2', 'layer1.0.downsample.1', 'layer2.0.bn1', 'layer2.0.bn2',
                'layer2.0.downsample.1', 'layer2.1.bn1', 'layer2.1.bn2', 'layer3.0.bn1', 'layer3.0.bn2',
                'layer3.0.downsample.1', 'ppm.features.0.2', 'ppm.features.1.2', 'ppm.features.2.2', 'cls.1', 'aux.1'],
     'between': None, 'causes': ['unbiased_variance'], 'level': 'training'},
    {'title': 'the norms of the pyramid are frozen: in training they use their running statistics and leave them alone',
     'edits': [('cells = jax.nn.relu(layer.norm(layer.conv(cells)))', 'cells = jax.nn.relu(layer.norm(layer.conv(cells), frozen=True))')],
     'layers': ['ppm.features.0.2', 'ppm.features.1.2', 'ppm.features.2.2'],
     'between': None, 'causes': ['batch_statistics', 'statistics'], 'level': 'training'},
]
