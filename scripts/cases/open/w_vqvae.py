"""VQ-VAE: strided conv encoder, in-place ReLU residual blocks, nearest code with straight-through, transposed conv decoder."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn


class ResBlock(nn.Module):
    def __init__(self, channel, hidden):
        super().__init__()
        self.conv = nn.Sequential(
            nn.ReLU(inplace=True),
            nn.Conv2d(channel, hidden, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channel, 1),
        )

    def forward(self, x):
        out = self.conv(x)  # x itself is rectified in place here
        return out + x


class Encoder(nn.Module):
    def __init__(self, cin, channel, hidden, n_res):
        super().__init__()
        blocks = [nn.Conv2d(cin, channel // 2, 4, stride=2, padding=1), nn.ReLU(inplace=True),
                  nn.Conv2d(channel // 2, channel, 3, padding=1)]
        blocks += [ResBlock(channel, hidden) for _ in range(n_res)]
        self.blocks = nn.Sequential(*blocks, nn.ReLU(inplace=True))

    def forward(self, x):
        return self.blocks(x)


class VectorQuantizer(nn.Module):
    def __init__(self, n_embed, dim, beta):
        super().__init__()
        self.embedding = nn.Embedding(n_embed, dim)
        self.beta = beta

    def forward(self, z):
        z = z.permute(0, 2, 3, 1).contiguous()
        flat = z.view(-1, z.shape[-1])
        w = self.embedding.weight
        d = flat.pow(2).sum(1, keepdim=True) + w.pow(2).sum(1) - 2 * flat @ w.t()
        idx = d.argmin(1)
        q = self.embedding(idx).view(z.shape)
        loss = F.mse_loss(q, z.detach()) + self.beta * F.mse_loss(z, q.detach())
        q = z + (q - z).detach()
        return q.permute(0, 3, 1, 2), loss, idx.view(z.shape[:-1])


class Decoder(nn.Module):
    def __init__(self, cin, channel, hidden, cout, n_res):
        super().__init__()
        blocks = [nn.Conv2d(cin, channel, 3, padding=1)]
        blocks += [ResBlock(channel, hidden) for _ in range(n_res)]
        blocks += [nn.ReLU(inplace=True), nn.ConvTranspose2d(channel, cout, 4, stride=2, padding=1)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x):
        return self.blocks(x)


class VQVAE(nn.Module):
    def __init__(self, channel=10, hidden=7, dim=6, n_embed=13, beta=0.25):
        super().__init__()
        self.enc = Encoder(3, channel, hidden, 2)
        self.quantize_conv = nn.Conv2d(channel, dim, 1)
        self.quantize = VectorQuantizer(n_embed, dim, beta)
        self.dec = Decoder(dim, channel, hidden, 3, 1)

    def forward(self, x):
        z = self.quantize_conv(self.enc(x))
        q, loss, _ = self.quantize(z)
        return self.dec(q), loss


# ---- Flax NNX, channels last


class Residual(nnx.Module):
    def __init__(self, ch, mid, rngs):
        self.spatial = nnx.Conv(ch, mid, (3, 3), rngs=rngs)
        self.pointwise = nnx.Conv(mid, ch, (1, 1), rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(x)
        h = self.pointwise(nnx.relu(self.spatial(x)))
        return x + h


class Quantizer(nnx.Module):
    def __init__(self, k, d, beta, rngs):
        self.codes = nnx.Param(jax.random.normal(rngs.params(), (k, d)))
        self.beta = beta

    def __call__(self, z):
        codes = self.codes[...]
        dist = (z ** 2).sum(-1, keepdims=True) - 2 * z @ codes.T + (codes ** 2).sum(-1)
        index = jnp.argmin(dist, axis=-1)
        q = codes[index]
        stop = jax.lax.stop_gradient
        codebook_loss = jnp.mean((q - stop(z)) ** 2)
        commitment = jnp.mean((z - stop(q)) ** 2)
        loss = codebook_loss + self.beta * commitment
        q = z + stop(q - z)
        return q, loss


class VQ(nnx.Module):
    def __init__(self, ch=10, mid=7, d=6, k=13, beta=0.25, *, rngs):
        self.down = nnx.Conv(3, ch // 2, (4, 4), strides=2, padding=((1, 1), (1, 1)), rngs=rngs)
        self.widen = nnx.Conv(ch // 2, ch, (3, 3), rngs=rngs)
        self.enc_res = nnx.List([Residual(ch, mid, rngs) for _ in range(2)])
        self.to_code = nnx.Conv(ch, d, (1, 1), rngs=rngs)
        self.quantizer = Quantizer(k, d, beta, rngs)
        self.from_code = nnx.Conv(d, ch, (3, 3), rngs=rngs)
        self.dec_res = nnx.List([Residual(ch, mid, rngs)])
        self.up = nnx.ConvTranspose(ch, 3, (4, 4), strides=(2, 2), padding="SAME", rngs=rngs)

    def __call__(self, x):
        h = self.widen(nnx.relu(self.down(x)))
        for r in self.enc_res:
            h = r(h)
        z = self.to_code(nnx.relu(h))
        q, loss = self.quantizer(z)
        h = self.from_code(q)
        for r in self.dec_res:
            h = r(h)
        return self.up(nnx.relu(h)), loss


def load(model, sd):
    def conv(dst, name):
        dst.kernel[...] = jnp.asarray(sd[name + ".weight"].transpose(2, 3, 1, 0))
        dst.bias[...] = jnp.asarray(sd[name + ".bias"])

    conv(model.down, "enc.blocks.0")
    conv(model.widen, "enc.blocks.2")
    for i, r in enumerate(model.enc_res):
        conv(r.spatial, f"enc.blocks.{3 + i}.conv.1")
        conv(r.pointwise, f"enc.blocks.{3 + i}.conv.3")
    conv(model.to_code, "quantize_conv")
    model.quantizer.codes[...] = jnp.asarray(sd["quantize.embedding.weight"])
    conv(model.from_code, "dec.blocks.0")
    for i, r in enumerate(model.dec_res):
        conv(r.spatial, f"dec.blocks.{1 + i}.conv.1")
        conv(r.pointwise, f"dec.blocks.{1 + i}.conv.3")
    w = sd["dec.blocks.3.weight"]  # in, out, kh, kw
    model.up.kernel[...] = jnp.asarray(w.transpose(2, 3, 0, 1)[::-1, ::-1].copy())
    model.up.bias[...] = jnp.asarray(sd["dec.blocks.3.bias"])


def build(seed):
    torch.manual_seed(seed)
    net = VQVAE().eval()
    for n, p in net.named_parameters():
        p.data.normal_(0, 0.8 if "embedding" in n else 0.25 if p.dim() > 1 else 0.2)
    model = VQ(rngs=nnx.Rngs(seed))
    load(model, {k: v.numpy() for k, v in net.state_dict().items()})
    model.eval()
    x = np.random.default_rng(seed).normal(size=(2, 3, 8, 12)).astype(np.float32)
    return {"torch": net, "flax": model, "inputs": (x,), "flax_inputs": (x.transpose(0, 2, 3, 1),)}


FAULTS = [
    {
        "title": "quantised codes handed on without the straight-through estimator",
        "edits": [("        q = z + stop(q - z)\n        return q, loss", "        return q, loss")],
        "layers": ["quantize"],
        "between": ("quantize_conv", "dec.blocks.0"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "beta weighs the codebook term, not the commitment",
        "edits": [("loss = codebook_loss + self.beta * commitment", "loss = self.beta * codebook_loss + commitment")],
        "layers": ["quantize"],
        "between": ("quantize_conv", "dec.blocks.0"),
        "causes": ["scale", "operand", "stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "the residual adds the input from before the (in-place) ReLU",
        "edits": [("        x = nnx.relu(x)\n        h = self.pointwise(nnx.relu(self.spatial(x)))",
                   "        h = self.pointwise(nnx.relu(self.spatial(nnx.relu(x))))")],
        "layers": ["enc.blocks.3"],
        "between": ("enc.blocks.3.conv.3", "enc.blocks.4"),
        "causes": ["residual", "operand", "activation"],
        "level": "outputs",
    },
    {
        "title": "transposed conv's kernel loaded without turning it round",
        "edits": [("w.transpose(2, 3, 0, 1)[::-1, ::-1].copy()", "w.transpose(2, 3, 0, 1)")],
        "layers": ["dec.blocks.3"],
        "causes": ["flipped"],
        "level": "outputs",
    },
    {
        "title": "code norms left out of the distance",
        "edits": [(" - 2 * z @ codes.T + (codes ** 2).sum(-1)", " - 2 * z @ codes.T")],
        "layers": ["quantize"],
        "between": ("quantize_conv", "dec.blocks.0"),
        "causes": ["left_out"],
        "level": "outputs",
    },
]
