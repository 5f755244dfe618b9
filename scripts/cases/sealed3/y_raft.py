"""RAFT (small): correlation pyramid with lookup, separable conv GRU, convex upsampling of the flow."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from jax.scipy.ndimage import map_coordinates
from torch import nn


class SmallEncoder(nn.Module):
    def __init__(self, mid, dim, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(3, mid, 7, stride=2, padding=3)
        self.norm1 = norm(mid)
        self.conv2 = nn.Conv2d(mid, mid + 4, 3, stride=2, padding=1)
        self.norm2 = norm(mid + 4)
        self.conv3 = nn.Conv2d(mid + 4, dim, 1)

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.conv3(x)


def bilinear_sampler(img, coords):
    h, w = img.shape[-2:]
    x, y = coords.split([1, 1], dim=-1)
    grid = torch.cat([2 * x / (w - 1) - 1, 2 * y / (h - 1) - 1], dim=-1)
    return F.grid_sample(img, grid, align_corners=True)


class CorrBlock:
    def __init__(self, fmap1, fmap2, levels=2, radius=1):
        b, c, h, w = fmap1.shape
        corr = torch.matmul(fmap1.reshape(b, c, h * w).transpose(1, 2), fmap2.reshape(b, c, h * w)) / c ** 0.5
        corr = corr.view(b * h * w, 1, h, w)
        self.radius, self.pyramid = radius, [corr]
        for _ in range(levels - 1):
            corr = F.avg_pool2d(corr, 2, stride=2)
            self.pyramid.append(corr)

    def __call__(self, coords):
        coords = coords.permute(0, 2, 3, 1)
        b, h, w, _ = coords.shape
        d = torch.arange(-self.radius, self.radius + 1).to(coords)
        delta = torch.stack(torch.meshgrid(d, d, indexing="ij"), dim=-1)
        out = []
        for i, corr in enumerate(self.pyramid):
            centroid = coords.reshape(b * h * w, 1, 1, 2) / 2 ** i
            out.append(bilinear_sampler(corr, centroid + delta[None]).view(b, h, w, -1))
        return torch.cat(out, dim=-1).permute(0, 3, 1, 2).contiguous()


class MotionEncoder(nn.Module):
    def __init__(self, cor):
        super().__init__()
        self.convc1 = nn.Conv2d(cor, 14, 1)
        self.convf1 = nn.Conv2d(2, 12, 7, padding=3)
        self.conv = nn.Conv2d(26, 11, 3, padding=1)

    def forward(self, flow, corr):
        cor = F.relu(self.convc1(corr))
        flo = F.relu(self.convf1(flow))
        out = F.relu(self.conv(torch.cat([cor, flo], dim=1)))
        return torch.cat([out, flow], dim=1)


class SepConvGRU(nn.Module):
    def __init__(self, hidden, inp):
        super().__init__()
        for i, k, p in ((1, (1, 5), (0, 2)), (2, (5, 1), (2, 0))):
            for gate in "zrq":
                setattr(self, f"conv{gate}{i}", nn.Conv2d(hidden + inp, hidden, k, padding=p))

    def forward(self, h, x):
        for i in "12":
            hx = torch.cat([h, x], dim=1)
            z = torch.sigmoid(getattr(self, "convz" + i)(hx))
            r = torch.sigmoid(getattr(self, "convr" + i)(hx))
            q = torch.tanh(getattr(self, "convq" + i)(torch.cat([r * h, x], dim=1)))
            h = (1 - z) * h + z * q
        return h


class FlowHead(nn.Module):
    def __init__(self, hidden, mid):
        super().__init__()
        self.conv1 = nn.Conv2d(hidden, mid, 3, padding=1)
        self.conv2 = nn.Conv2d(mid, 2, 3, padding=1)

    def forward(self, x):
        return self.conv2(F.relu(self.conv1(x)))


class UpdateBlock(nn.Module):
    def __init__(self, hidden, context, cor):
        super().__init__()
        self.encoder = MotionEncoder(cor)
        self.gru = SepConvGRU(hidden, context + 13)
        self.flow_head = FlowHead(hidden, 10)
        self.mask = nn.Sequential(nn.Conv2d(hidden, 15, 3, padding=1), nn.ReLU(), nn.Conv2d(15, 16 * 9, 1))

    def forward(self, net, inp, corr, flow):
        motion = self.encoder(flow, corr)
        net = self.gru(net, torch.cat([inp, motion], dim=1))
        return net, self.flow_head(net), 0.25 * self.mask(net)


class RAFT(nn.Module):
    def __init__(self, hidden=9, context=7, dim=13, iters=3):
        super().__init__()
        self.hidden, self.context, self.iters = hidden, context, iters
        self.cnet = SmallEncoder(8, hidden + context, lambda c: nn.GroupNorm(4, c))
        self.fnet = SmallEncoder(6, dim, nn.InstanceNorm2d)
        self.update_block = UpdateBlock(hidden, context, 2 * 9)

    def upsample_flow(self, flow, mask, f=4):
        n, _, h, w = flow.shape
        mask = torch.softmax(mask.view(n, 1, 9, f, f, h, w), dim=2)
        up = F.unfold(f * flow, [3, 3], padding=1).view(n, 2, 9, 1, 1, h, w)
        up = torch.sum(mask * up, dim=2).permute(0, 1, 4, 2, 5, 3)
        return up.reshape(n, 2, f * h, f * w)

    def forward(self, image1, image2):
        image1, image2 = 2 * (image1 / 255.0) - 1.0, 2 * (image2 / 255.0) - 1.0
        net, inp = torch.split(self.cnet(image1), [self.hidden, self.context], dim=1)
        net, inp = torch.tanh(net), torch.relu(inp)
        fmap1, fmap2 = self.fnet(torch.cat([image1, image2], dim=0)).chunk(2, dim=0)
        corr_fn = CorrBlock(fmap1, fmap2)
        b, _, h, w = fmap1.shape
        ys, xs = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        coords0 = torch.stack([xs, ys])[None].to(fmap1).repeat(b, 1, 1, 1)
        coords1 = coords0.clone()
        flows = []
        for _ in range(self.iters):
            coords1 = coords1.detach()
            corr = corr_fn(coords1)
            net, delta, mask = self.update_block(net, inp, corr, coords1 - coords0)
            coords1 = coords1 + delta
            flows.append(self.upsample_flow(coords1 - coords0, mask))
        return tuple(flows)


# ------------------------------------------------------------------ Flax, NHWC


def instance_norm(x):
    mean = x.mean((1, 2), keepdims=True)
    return (x - mean) * jax.lax.rsqrt(x.var((1, 2), keepdims=True) + 1e-5)


class Trunk(nnx.Module):
    def __init__(self, mid, out, grouped, rngs):
        self.stem = nnx.Conv(3, mid, (7, 7), strides=2, padding=((3, 3), (3, 3)), rngs=rngs)
        self.down = nnx.Conv(mid, mid + 4, (3, 3), strides=2, padding=((1, 1), (1, 1)), rngs=rngs)
        self.head = nnx.Conv(mid + 4, out, (1, 1), rngs=rngs)
        norm = lambda c: nnx.GroupNorm(c, num_groups=4, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.stem_norm = norm(mid) if grouped else instance_norm
        self.down_norm = norm(mid + 4) if grouped else instance_norm

    def __call__(self, x):
        x = nnx.relu(self.stem_norm(self.stem(x)))
        return self.head(nnx.relu(self.down_norm(self.down(x))))


class Gates(nnx.Module):
    """One direction of the separable GRU."""

    def __init__(self, hidden, inp, kernel, rngs):
        conv = lambda: nnx.Conv(hidden + inp, hidden, kernel, rngs=rngs)
        self.update, self.reset, self.candidate = conv(), conv(), conv()

    def __call__(self, h, x):
        hx = jnp.concatenate([h, x], axis=-1)
        z = nnx.sigmoid(self.update(hx))
        r = nnx.sigmoid(self.reset(hx))
        q = jnp.tanh(self.candidate(jnp.concatenate([r * h, x], axis=-1)))
        return h + z * (q - h)


def correlation_pyramid(a, b, levels=2):
    n, h, w, c = a.shape
    volume = jnp.einsum("nijc,nklc->nijkl", a, b).reshape(n * h * w, h, w) / jnp.sqrt(c).astype(a.dtype)
    pyramid = [volume]
    for _ in range(levels - 1):
        m, h, w = volume.shape
        volume = volume.reshape(m, h // 2, 2, w // 2, 2).mean((2, 4))
        pyramid.append(volume)
    return pyramid


def lookup(pyramid, xy, radius=1):
    n, h, w, _ = xy.shape
    d = jnp.arange(-radius, radius + 1, dtype=xy.dtype)
    dx, dy = jnp.meshgrid(d, d, indexing="ij")
    sample = jax.vmap(lambda image, y, x: map_coordinates(image, [y, x], order=1, mode="constant"))
    found = []
    for level, volume in enumerate(pyramid):
        centre = xy.reshape(-1, 2) / 2 ** level
        x, y = centre[:, :1] + dx.ravel(), centre[:, 1:] + dy.ravel()
        found.append(sample(volume, y, x).reshape(n, h, w, -1))
    return jnp.concatenate(found, axis=-1)


def convex_upsample(flow, mask, f=4):
    n, h, w, _ = flow.shape
    weights = jax.nn.softmax(mask.reshape(n, h, w, 9, f, f), axis=3)
    padded = jnp.pad(f * flow, ((0, 0), (1, 1), (1, 1), (0, 0)))
    near = jnp.stack([padded[:, i:i + h, j:j + w] for i in range(3) for j in range(3)], axis=3)
    return jnp.einsum("nhwkij,nhwkc->nhiwjc", weights, near).reshape(n, f * h, f * w, 2)


class Raft(nnx.Module):
    def __init__(self, hidden=9, context=7, dim=13, steps=3, *, rngs):
        self.hidden, self.steps = hidden, steps
        self.context_trunk = Trunk(8, hidden + context, True, rngs)
        self.feature_trunk = Trunk(6, dim, False, rngs)
        conv = lambda i, o, k: nnx.Conv(i, o, (k, k), rngs=rngs)
        self.corr_in, self.flow_in, self.motion = conv(18, 14, 1), conv(2, 12, 7), conv(26, 11, 3)
        self.horizontal = Gates(hidden, context + 13, (1, 5), rngs)
        self.vertical = Gates(hidden, context + 13, (5, 1), rngs)
        self.flow_mid, self.flow_out = conv(hidden, 10, 3), conv(10, 2, 3)
        self.mask_mid, self.mask_out = conv(hidden, 15, 3), conv(15, 144, 1)

    def __call__(self, first, second):
        first, second = first / 127.5 - 1, second / 127.5 - 1
        context = self.context_trunk(first)
        state, context = jnp.tanh(context[..., :self.hidden]), nnx.relu(context[..., self.hidden:])
        pyramid = correlation_pyramid(self.feature_trunk(first), self.feature_trunk(second))
        n, h, w, _ = state.shape
        ys, xs = jnp.mgrid[:h, :w]
        start = jnp.broadcast_to(jnp.stack([xs, ys], axis=-1).astype(state.dtype), (n, h, w, 2))
        xy, flows = start, []
        for _ in range(self.steps):
            xy = jax.lax.stop_gradient(xy)
            flow = xy - start
            c = nnx.relu(self.corr_in(lookup(pyramid, xy)))
            m = nnx.relu(self.motion(jnp.concatenate([c, nnx.relu(self.flow_in(flow))], axis=-1)))
            x = jnp.concatenate([context, m, flow], axis=-1)
            state = self.vertical(self.horizontal(state, x), x)
            xy = xy + self.flow_out(nnx.relu(self.flow_mid(state)))
            mask = 0.25 * self.mask_out(nnx.relu(self.mask_mid(state)))
            flows.append(convex_upsample(xy - start, mask))
        return tuple(flows)


def port(net, model):
    f = lambda t: jnp.asarray(t.detach().numpy())

    def conv(dst, src):
        dst.kernel[...], dst.bias[...] = f(src.weight).transpose(2, 3, 1, 0), f(src.bias)

    for trunk, enc in ((model.context_trunk, net.cnet), (model.feature_trunk, net.fnet)):
        for dst, src in ((trunk.stem, enc.conv1), (trunk.down, enc.conv2), (trunk.head, enc.conv3)):
            conv(dst, src)
    for dst, src in ((model.context_trunk.stem_norm, net.cnet.norm1), (model.context_trunk.down_norm, net.cnet.norm2)):
        dst.scale[...], dst.bias[...] = f(src.weight), f(src.bias)
    up = net.update_block
    for dst, src in ((model.corr_in, up.encoder.convc1), (model.flow_in, up.encoder.convf1),
                     (model.motion, up.encoder.conv), (model.flow_mid, up.flow_head.conv1),
                     (model.flow_out, up.flow_head.conv2), (model.mask_mid, up.mask[0]), (model.mask_out, up.mask[2])):
        conv(dst, src)
    for i, gates in ((1, model.horizontal), (2, model.vertical)):
        for letter, dst in zip("zrq", (gates.update, gates.reset, gates.candidate)):
            conv(dst, getattr(up.gru, f"conv{letter}{i}"))


def build(seed):
    torch.manual_seed(seed)
    net = RAFT().eval()
    for name, p in net.named_parameters():
        if p.dim() > 1:
            p.data.normal_(0, 1.3 / p[0].numel() ** 0.5)
        elif "norm" in name and name.endswith("weight"):
            p.data.uniform_(0.6, 1.5)
        else:
            p.data.normal_(0, 0.25)
    model = Raft(rngs=nnx.Rngs(seed))
    port(net, model)
    model.eval()
    a, b = np.random.default_rng(seed).uniform(0, 255, size=(2, 2, 3, 24, 32)).astype(np.float32)
    return {"torch": net, "flax": model, "inputs": (a, b),
            "flax_inputs": (a.transpose(0, 2, 3, 1), b.transpose(0, 2, 3, 1))}


FAULTS = [
    {
        "title": "coordinates carry their gradient from one iteration to the next (no detach)",
        "edits": [("            xy = jax.lax.stop_gradient(xy)\n", "")],
        "layers": [""],
        "between": ("update_block.mask.2", "update_block.encoder.convc1"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "window of the lookup is gone through row by row, not (as RAFT does) column by column",
        "edits": [('jnp.meshgrid(d, d, indexing="ij")', "jnp.meshgrid(d, d)")],
        "layers": [""],
        "between": ("fnet.conv3", "update_block.encoder.convc1"),
        "causes": ["transposed", "rearranged", "swapped", "permuted", "order"],
        "level": "outputs",
    },
    {
        "title": "weights of the update and the reset gate loaded the wrong way round",
        "edits": [('zip("zrq", (gates.update', 'zip("rzq", (gates.update')],
        "layers": ["update_block.gru", "update_block.gru.convz1", "update_block.gru.convr1",
                   "update_block.gru.convz2", "update_block.gru.convr2"],
        "causes": ["swapped", "gates"],
        "level": "bits",
    },
    {
        "title": "SAME padding in the strided 3x3 conv of the encoders",
        "edits": [("strides=2, padding=((1, 1), (1, 1))", 'strides=2, padding="SAME"')],
        "layers": ["cnet.conv2", "fnet.conv2"],
        "causes": ["padding"],
        "level": "outputs",
    },
    {
        "title": "softmax of the upsampling mask over torch's axis 2, which is the width in NHWC",
        "edits": [("9, f, f), axis=3)", "9, f, f), axis=2)")],
        "layers": [""],
        "causes": ["softmax_axis", "axis"],
        "level": "outputs",
    },
]
