"""CenterNet heads on a feature pyramid over a small ConvNeXt."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as tnn
import torch.nn.functional as F
from flax import nnx

DIMS, DEPTHS, PYRAMID, HEAD, CLASSES = (6, 8, 10), (1, 2, 1), 7, 9, 5


# ---- PyTorch

class LayerNorm2d(tnn.LayerNorm):
    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Block(tnn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dwconv = tnn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = tnn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = tnn.Linear(dim, 4 * dim)
        self.act = tnn.GELU()
        self.pwconv2 = tnn.Linear(4 * dim, dim)
        self.gamma = tnn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(tnn.Module):
    def __init__(self, in_chans=3):
        super().__init__()
        self.downsample_layers = tnn.ModuleList([tnn.Sequential(
            tnn.Conv2d(in_chans, DIMS[0], kernel_size=4, stride=4), LayerNorm2d(DIMS[0], eps=1e-6))])
        for a, b in zip(DIMS, DIMS[1:]):
            self.downsample_layers.append(tnn.Sequential(
                LayerNorm2d(a, eps=1e-6), tnn.Conv2d(a, b, kernel_size=2, stride=2)))
        self.stages = tnn.ModuleList(
            [tnn.Sequential(*[Block(d) for _ in range(n)]) for d, n in zip(DIMS, DEPTHS)])

    def forward(self, x):
        features = []
        for down, stage in zip(self.downsample_layers, self.stages):
            x = stage(down(x))
            features.append(x)
        return features


class FeaturePyramidNetwork(tnn.Module):
    def __init__(self):
        super().__init__()
        self.inner_blocks = tnn.ModuleList([tnn.Conv2d(d, PYRAMID, 1) for d in DIMS])
        self.layer_block = tnn.Sequential(
            tnn.Conv2d(PYRAMID, PYRAMID, 3, padding=1, bias=False), tnn.BatchNorm2d(PYRAMID), tnn.ReLU())

    def forward(self, features):
        last = self.inner_blocks[-1](features[-1])
        for i in range(len(features) - 2, -1, -1):
            lateral = self.inner_blocks[i](features[i])
            last = lateral + F.interpolate(last, size=lateral.shape[-2:], mode="nearest")
        return self.layer_block(last)


class CenterNet(tnn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = ConvNeXt()
        self.fpn = FeaturePyramidNetwork()
        self.heads = {"hm": CLASSES, "wh": 2, "reg": 2}
        for head, classes in self.heads.items():
            self.__setattr__(head, tnn.Sequential(
                tnn.Conv2d(PYRAMID, HEAD, kernel_size=3, padding=1), tnn.ReLU(), tnn.Conv2d(HEAD, classes, 1)))
        self.pool = tnn.MaxPool2d(3, stride=1, padding=1)

    def forward(self, images):
        x = self.fpn(self.backbone(images))
        heat = torch.clamp(torch.sigmoid(self.hm(x)), min=1e-4, max=1 - 1e-4)
        keep = (self.pool(heat) == heat).to(heat.dtype)
        return heat, heat * keep, self.wh(x), self.reg(x)


# ---- Flax (images are NHWC; the maps come back as torch's, channels first)

class MovingNorm(nnx.Module):
    """Batch norm over all axes but the last; keeps the variance over n - 1, as torch does."""

    def __init__(self, width, share=0.1, eps=1e-5):
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(width)), nnx.BatchStat(jnp.ones(width))
        self.share, self.eps = share, eps
        self.use_running_average = False

    def __call__(self, x):
        mean, var = self.mean[...], self.var[...]
        if not self.use_running_average:
            rows = x.reshape(-1, x.shape[-1])
            now, spread = rows.mean(0), rows.var(0)
            unbiased = spread * len(rows) / (len(rows) - 1)
            self.mean.set_value(mean + self.share * (jax.lax.stop_gradient(now) - mean))
            self.var.set_value(var + self.share * (jax.lax.stop_gradient(unbiased) - var))
            mean, var = now, spread
        return (x - mean) * jax.lax.rsqrt(var + self.eps) * self.scale[...] + self.bias[...]


def norm(width, rngs):
    return nnx.LayerNorm(width, epsilon=1e-6, use_fast_variance=False, rngs=rngs)


class Unit(nnx.Module):
    def __init__(self, width, rngs):
        self.spread = nnx.Conv(width, width, (7, 7), padding="SAME", feature_group_count=width, rngs=rngs)
        self.norm = norm(width, rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.layer_scale = nnx.Param(jnp.full(width, 1e-6))

    def __call__(self, x):
        y = jax.nn.gelu(self.up(self.norm(self.spread(x))), approximate=False)
        return x + self.layer_scale[...] * self.down(y)


class Detector(nnx.Module):
    def __init__(self, rngs):
        conv = lambda a, b, k, **more: nnx.Conv(a, b, (k, k), rngs=rngs, **more)
        wide = (3,) + DIMS
        self.shrink = nnx.List([conv(wide[i], wide[i + 1], k, strides=k, padding="VALID")
                                for i, k in enumerate((4, 2, 2))])
        # after the stem's convolution, before the two others
        self.shrink_norm = nnx.List([norm(d, rngs) for d in (DIMS[0], DIMS[0], DIMS[1])])
        self.stages = nnx.List([nnx.List([Unit(d, rngs) for _ in range(n)]) for d, n in zip(DIMS, DEPTHS)])
        self.lateral = nnx.List([nnx.Linear(d, PYRAMID, rngs=rngs) for d in DIMS])
        self.smooth = conv(PYRAMID, PYRAMID, 3, use_bias=False)
        self.smooth_norm = MovingNorm(PYRAMID)
        # the three heads' first convolutions in one
        self.stem = conv(PYRAMID, 3 * HEAD, 3)
        self.ends = nnx.List([nnx.Linear(HEAD, k, rngs=rngs) for k in (CLASSES, 2, 2)])

    def features(self, x):
        maps = []
        for i, stage in enumerate(self.stages):
            if i == 0:
                x = self.shrink_norm[0](self.shrink[0](x))
            else:
                x = self.shrink[i](self.shrink_norm[i](x))
            for unit in stage:
                x = unit(x)
            maps.append(x)
        return maps

    def __call__(self, images):
        maps = self.features(images)
        x = self.lateral[2](maps[2])
        for i in (1, 0):
            x = self.lateral[i](maps[i]) + jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = jax.nn.relu(self.smooth_norm(self.smooth(x)))
        parts = jnp.split(jax.nn.relu(self.stem(x)), 3, axis=-1)
        score, wh, reg = (end(part) for end, part in zip(self.ends, parts))
        heat = jnp.clip(jax.nn.sigmoid(score), 1e-4, 1 - 1e-4)
        top = nnx.max_pool(heat, (3, 3), strides=(1, 1), padding="SAME")
        peaks = jnp.where(top == heat, heat, 0)
        return tuple(jnp.moveaxis(m, -1, 1) for m in (heat, peaks, wh, reg))


def port_weights(net):
    model = Detector(nnx.Rngs(0))
    arr = lambda t: jnp.asarray(t.detach().numpy())

    def layer(dst, src):
        w = arr(src.weight)
        if w.ndim == 4:
            w = w.transpose(2, 3, 1, 0)
            w = w if isinstance(dst, nnx.Conv) else w[0, 0]
            dst.kernel.set_value(w)
        elif w.ndim == 2:
            dst.kernel.set_value(w.T)
        else:
            dst.scale.set_value(w)
        if src.bias is not None:
            dst.bias.set_value(arr(src.bias))

    body = net.backbone
    for i, down in enumerate(body.downsample_layers):
        layer(model.shrink[i], down[0 if i == 0 else 1])
        layer(model.shrink_norm[i], down[1 if i == 0 else 0])
    for stage, theirs in zip(model.stages, body.stages):
        for unit, block in zip(stage, theirs):
            layer(unit.spread, block.dwconv)
            layer(unit.norm, block.norm)
            layer(unit.up, block.pwconv1)
            layer(unit.down, block.pwconv2)
            unit.layer_scale.set_value(arr(block.gamma))
    for dst, src in zip(model.lateral, net.fpn.inner_blocks):
        layer(dst, src)
    layer(model.smooth, net.fpn.layer_block[0])
    bn = net.fpn.layer_block[1]
    layer(model.smooth_norm, bn)
    model.smooth_norm.mean.set_value(arr(bn.running_mean))
    model.smooth_norm.var.set_value(arr(bn.running_var))
    heads = [getattr(net, name) for name in ("hm", "wh", "reg")]
    model.stem.kernel.set_value(jnp.concatenate([arr(h[0].weight).transpose(2, 3, 1, 0) for h in heads], -1))
    model.stem.bias.set_value(jnp.concatenate([arr(h[0].bias) for h in heads]))
    for dst, head in zip(model.ends, heads):
        layer(dst, head[2])
    model.eval()
    return model


def build(seed):
    torch.manual_seed(seed)
    net = CenterNet().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() == 1:
                p.copy_(0.6 + 0.8 * torch.rand_like(p) if name.endswith(("weight", "gamma"))
                        else 0.3 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * 1.2 / p[0].numel() ** 0.5)
        bn = net.fpn.layer_block[1]
        bn.running_mean.normal_(0, 0.5)
        bn.running_var.uniform_(0.6, 1.8)
    images = np.random.RandomState(seed + 1).randn(2, 3, 32, 48).astype(np.float32)
    return {"torch": net, "flax": port_weights(net), "inputs": (images,),
            "flax_inputs": (np.ascontiguousarray(images.transpose(0, 2, 3, 1)),)}


FAULTS = [
    {"title": "the coarser map is tiled, not enlarged",
     "edits": [("jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)", "jnp.tile(x, (1, 2, 2, 1))")],
     "layers": ["fpn"], "between": ("fpn.inner_blocks.2", "fpn.layer_block"),
     "causes": ["rearranged", "operation"], "level": "outputs"},
    {"title": "the backbone's gelu is the tanh approximation",
     "edits": [("self.up(self.norm(self.spread(x))), approximate=False)", "self.up(self.norm(self.spread(x))))")],
     "layers": [f"backbone.stages.{i}.{j}.act" for i, j in ((0, 0), (1, 0), (1, 1), (2, 0))],
     "between": ("backbone.stages.0.0.pwconv1", "backbone.stages.0.0.pwconv2"),
     "causes": ["gelu", "activation"], "level": "outputs"},
    {"title": "the heat map's last bias keeps its starting value -2.19",
     "edits": [("    model.eval()\n    return model",
                "    model.ends[0].bias.set_value(jnp.full_like(model.ends[0].bias[...], -2.19))\n"
                "    model.eval()\n    return model")],
     "layers": ["hm.2"], "between": None, "causes": ["default", "values"], "level": "bits"},
    {"title": "in training the batch is normalised with the running statistics, which do move",
     "edits": [("            mean, var = now, spread\n", "")],
     "layers": ["fpn.layer_block.1"], "between": None,
     "causes": ["batch_statistics"], "level": "training"},
    {"title": "the running variance takes in the variance over n, not over n - 1",
     "edits": [("unbiased = spread * len(rows) / (len(rows) - 1)", "unbiased = spread")],
     "layers": ["fpn.layer_block.1"], "between": None,
     "causes": ["unbiased_variance"], "level": "training"},
]
