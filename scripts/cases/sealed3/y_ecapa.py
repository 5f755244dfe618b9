"""ECAPA-TDNN speaker encoder: SE-Res2 blocks, channel and context dependent statistics pooling."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn


class SEModule(nn.Module):
    def __init__(self, channels, bottleneck):
        super().__init__()
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool1d(1),
            nn.Conv1d(channels, bottleneck, 1),
            nn.ReLU(),
            nn.Conv1d(bottleneck, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return x * self.se(x)


class Bottle2neck(nn.Module):
    def __init__(self, planes, kernel_size, dilation, scale):
        super().__init__()
        self.width, self.nums = planes // scale, scale - 1
        self.conv1 = nn.Conv1d(planes, self.width * scale, 1)
        self.bn1 = nn.BatchNorm1d(self.width * scale)
        pad = kernel_size // 2 * dilation
        self.convs = nn.ModuleList([nn.Conv1d(self.width, self.width, kernel_size, dilation=dilation, padding=pad)
                                    for _ in range(self.nums)])
        self.bns = nn.ModuleList([nn.BatchNorm1d(self.width) for _ in range(self.nums)])
        self.conv3 = nn.Conv1d(self.width * scale, planes, 1)
        self.bn3 = nn.BatchNorm1d(planes)
        self.se = SEModule(planes, 6)

    def forward(self, x):
        out = self.bn1(torch.relu(self.conv1(x)))
        spx = torch.split(out, self.width, 1)
        outs = []
        for i in range(self.nums):
            sp = spx[i] if i == 0 else sp + spx[i]
            sp = self.bns[i](torch.relu(self.convs[i](sp)))
            outs.append(sp)
        out = torch.cat(outs + [spx[self.nums]], 1)
        out = self.bn3(torch.relu(self.conv3(out)))
        return self.se(out) + x


class ECAPA(nn.Module):
    def __init__(self, mels=10, c=16, mid=20, emb=5):
        super().__init__()
        self.conv1 = nn.Conv1d(mels, c, 5, padding=2)
        self.bn1 = nn.BatchNorm1d(c)
        self.layer1 = Bottle2neck(c, 3, 2, 4)
        self.layer2 = Bottle2neck(c, 3, 3, 4)
        self.layer3 = Bottle2neck(c, 3, 4, 4)
        self.layer4 = nn.Conv1d(3 * c, mid, 1)
        self.attention = nn.Sequential(
            nn.Conv1d(3 * mid, 7, 1), nn.ReLU(), nn.BatchNorm1d(7), nn.Tanh(),
            nn.Conv1d(7, mid, 1), nn.Softmax(dim=2),
        )
        self.bn5 = nn.BatchNorm1d(2 * mid)
        self.fc6 = nn.Linear(2 * mid, emb)
        self.bn6 = nn.BatchNorm1d(emb)

    def forward(self, x):
        x = x - torch.mean(x, dim=-1, keepdim=True)
        x = self.bn1(torch.relu(self.conv1(x)))
        x1 = self.layer1(x)
        x2 = self.layer2(x + x1)
        x3 = self.layer3(x + x1 + x2)
        x = torch.relu(self.layer4(torch.cat((x1, x2, x3), dim=1)))
        t = x.size(-1)
        mean = torch.mean(x, dim=2, keepdim=True).repeat(1, 1, t)
        std = torch.sqrt(torch.var(x, dim=2, keepdim=True).clamp(min=1e-4)).repeat(1, 1, t)
        w = self.attention(torch.cat((x, mean, std), dim=1))
        mu = torch.sum(x * w, dim=2)
        sg = torch.sqrt((torch.sum((x ** 2) * w, dim=2) - mu ** 2).clamp(min=1e-4))
        x = self.bn5(torch.cat((mu, sg), 1))
        return self.bn6(self.fc6(x))


# ================= Flax NNX, (batch, time, channels) =================


class Norm(nnx.Module):
    def __init__(self, dim, decay=0.9):
        self.gamma, self.beta = nnx.Param(jnp.ones(dim)), nnx.Param(jnp.zeros(dim))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(dim)), nnx.BatchStat(jnp.ones(dim))
        self.decay, self.use_running_average = decay, False

    def __call__(self, x):
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            axes, n = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
            mean, var = jnp.mean(x, axes), jnp.var(x, axes)
            blend = lambda old, new: self.decay * old + (1 - self.decay) * jax.lax.stop_gradient(new)
            self.mean[...] = blend(self.mean[...], mean)
            self.var[...] = blend(self.var[...], var * (n / (n - 1)))
        return (x - mean) / jnp.sqrt(var + 1e-5) * self.gamma[...] + self.beta[...]


class ConvReluNorm(nnx.Module):
    def __init__(self, din, dout, width, dilation, rngs):
        self.conv = nnx.Conv(din, dout, (width,), kernel_dilation=dilation, padding="SAME", rngs=rngs)
        self.norm = Norm(dout)

    def __call__(self, x):
        return self.norm(nnx.relu(self.conv(x)))


class Res2Block(nnx.Module):
    def __init__(self, ch, parts, dilation, rngs):
        self.parts = parts
        self.enter = ConvReluNorm(ch, ch, 1, 1, rngs)
        self.steps = nnx.List([ConvReluNorm(ch // parts, ch // parts, 3, dilation, rngs) for _ in range(parts - 1)])
        self.leave = ConvReluNorm(ch, ch, 1, 1, rngs)
        self.squeeze, self.excite = nnx.Linear(ch, 6, rngs=rngs), nnx.Linear(6, ch, rngs=rngs)

    def __call__(self, x):
        chunks = jnp.split(self.enter(x), self.parts, axis=-1)
        done, carry = [], 0.0
        for chunk, step in zip(chunks, self.steps):
            carry = step(carry + chunk)
            done.append(carry)
        done.append(chunks[-1])
        h = self.leave(jnp.concatenate(done, axis=-1))
        gate = nnx.sigmoid(self.excite(nnx.relu(self.squeeze(h.mean(axis=1)))))
        return x + h * gate[:, None]


class SpeakerEncoder(nnx.Module):
    def __init__(self, mels=10, ch=16, mid=20, emb=5, *, rngs):
        self.stem = ConvReluNorm(mels, ch, 5, 1, rngs)
        self.blocks = nnx.List([Res2Block(ch, 4, 2 + i, rngs) for i in range(3)])
        self.merge = nnx.Conv(3 * ch, mid, (1,), rngs=rngs)
        self.att_in = ConvReluNorm(3 * mid, 7, 1, 1, rngs)
        self.att_out = nnx.Conv(7, mid, (1,), rngs=rngs)
        self.pool_norm = Norm(2 * mid)
        self.embed = nnx.Linear(2 * mid, emb, rngs=rngs)
        self.embed_norm = Norm(emb)

    def __call__(self, mel):
        total = self.stem(mel - jnp.mean(mel, axis=1, keepdims=True))
        outs = []
        for block in self.blocks:
            outs.append(block(total))
            total = total + outs[-1]
        h = nnx.relu(self.merge(jnp.concatenate(outs, axis=-1)))
        mean = jnp.broadcast_to(h.mean(axis=1, keepdims=True), h.shape)
        var = jnp.var(h, axis=1, ddof=1, keepdims=True)
        std = jnp.broadcast_to(jnp.sqrt(jnp.maximum(var, 1e-4)), h.shape)
        score = self.att_out(jnp.tanh(self.att_in(jnp.concatenate([h, mean, std], axis=-1))))
        weight = nnx.softmax(score, axis=1)
        mu = jnp.sum(weight * h, axis=1)
        sigma = jnp.sqrt(jnp.maximum(jnp.sum(weight * h ** 2, axis=1) - mu ** 2, 1e-4))
        pooled = self.pool_norm(jnp.concatenate([mu, sigma], axis=-1))
        return self.embed_norm(self.embed(pooled))


def port(net, model):
    f = lambda t: jnp.asarray(t.detach().numpy())

    def norm(dst, bn):
        dst.gamma[...], dst.beta[...] = f(bn.weight), f(bn.bias)
        dst.mean[...], dst.var[...] = f(bn.running_mean), f(bn.running_var)

    def conv(dst, src):
        dst.kernel[...], dst.bias[...] = f(src.weight).transpose(2, 1, 0), f(src.bias)

    def both(dst, src, bn):
        conv(dst.conv, src)
        norm(dst.norm, bn)

    both(model.stem, net.conv1, net.bn1)
    for dst, src in zip(model.blocks, (net.layer1, net.layer2, net.layer3)):
        both(dst.enter, src.conv1, src.bn1)
        for step, c, bn in zip(dst.steps, src.convs, src.bns):
            both(step, c, bn)
        both(dst.leave, src.conv3, src.bn3)
        for linear, c in ((dst.squeeze, src.se.se[1]), (dst.excite, src.se.se[3])):
            linear.kernel[...], linear.bias[...] = f(c.weight)[:, :, 0].T, f(c.bias)
    conv(model.merge, net.layer4)
    both(model.att_in, net.attention[0], net.attention[2])
    conv(model.att_out, net.attention[4])
    norm(model.pool_norm, net.bn5)
    model.embed.kernel[...], model.embed.bias[...] = f(net.fc6.weight).T, f(net.fc6.bias)
    norm(model.embed_norm, net.bn6)


def build(seed):
    torch.manual_seed(seed)
    net = ECAPA()
    norms = {n for n, m in net.named_modules() if isinstance(m, nn.BatchNorm1d)}
    for name, p in net.named_parameters():
        if p.dim() > 1:
            p.data.normal_(0, 1.3 / p[0].numel() ** 0.5)
        elif name.rsplit(".", 1)[0] in norms and name.endswith("weight"):
            p.data.uniform_(0.6, 1.5)
        else:
            p.data.normal_(0, 0.3)
    for name, b in net.named_buffers():
        if b.is_floating_point():
            b.uniform_(0.5, 1.6) if name.endswith("var") else b.normal_(0, 0.3)
    net.eval()
    model = SpeakerEncoder(rngs=nnx.Rngs(seed))
    port(net, model)
    model.eval()
    x = np.random.default_rng(seed).normal(size=(4, 10, 21)).astype(np.float32)
    return {"torch": net, "flax": model, "inputs": (x,), "flax_inputs": (x.transpose(0, 2, 1),)}


FAULTS = [
    {
        "title": "the biased variance goes into the running statistics",
        "edits": [("blend(self.var[...], var * (n / (n - 1)))", "blend(self.var[...], var)")],
        "layers": ["bn6", "bn5", "bn1", "attention.2", "layer1.bn1", "layer2.bn1", "layer3.bn1",
                   "layer1.bn3", "layer2.bn3", "layer3.bn3", "layer1.bns.0", "layer1.bns.1", "layer1.bns.2",
                   "layer2.bns.0", "layer2.bns.1", "layer2.bns.2", "layer3.bns.0", "layer3.bns.1", "layer3.bns.2"],
        "causes": ["unbiased_variance"],
        "level": "training",
    },
    {
        "title": "the first chunk passes by the convs of Res2Net, as in the paper, not the last one",
        "edits": [("done, carry = [], 0.0", "done, carry = [chunks[0]], 0.0"),
                  ("in zip(chunks, self.steps)", "in zip(chunks[1:], self.steps)"),
                  ("        done.append(chunks[-1])\n", "")],
        "layers": ["layer1", "layer2", "layer3"],
        "between": ("layer1.bn1", "layer1.convs.0"),
        "causes": ["rearranged", "wiring", "operand", "concat", "order"],
        "level": "outputs",
    },
    {
        "title": "no tanh in the attention",
        "edits": [("self.att_out(jnp.tanh(self.att_in(jnp.concatenate([h, mean, std], axis=-1))))",
                   "self.att_out(self.att_in(jnp.concatenate([h, mean, std], axis=-1)))")],
        "layers": ["attention.3", "attention"],
        "causes": ["missing_layer", "activation", "left_out"],
        "level": "outputs",
    },
    {
        "title": "context of the attention has the standard deviation before the mean",
        "edits": [("[h, mean, std]", "[h, std, mean]")],
        "layers": [""],
        "between": ("layer4", "attention.0"),
        "causes": ["concat", "swapped"],
        "level": "outputs",
    },
    {
        "title": "dilations of the blocks count from 1, not from 2",
        "edits": [("Res2Block(ch, 4, 2 + i, rngs)", "Res2Block(ch, 4, 1 + i, rngs)")],
        "layers": ["layer1.convs.0", "layer1.convs.1", "layer1.convs.2", "layer2.convs.0", "layer2.convs.1",
                   "layer2.convs.2", "layer3.convs.0", "layer3.convs.1", "layer3.convs.2"],
        "causes": ["dilation"],
        "level": "outputs",
    },
]
