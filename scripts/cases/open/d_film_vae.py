"""Conditional convolutional VAE: FiLM by label, GroupNorm encoder, BatchNorm decoder, noise as an input (nnx)."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from flax import nnx


class FiLM(nn.Module):
    def __init__(self, cond_dim, channels):
        super().__init__()
        self.proj = nn.Linear(cond_dim, 2 * channels)

    def forward(self, x, cond):
        gamma, beta = self.proj(cond)[:, :, None, None].chunk(2, dim=1)
        return x * (1 + gamma) + beta


class Encoder(nn.Module):
    def __init__(self, cond_dim):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 4, stride=2, padding=1)
        self.norm1 = nn.GroupNorm(2, 8)
        self.film = FiLM(cond_dim, 8)
        self.conv2 = nn.Conv2d(8, 12, 4, stride=2, padding=1)
        self.norm2 = nn.GroupNorm(4, 12)

    def forward(self, x, cond):
        h = F.silu(self.film(self.norm1(self.conv1(x)), cond))
        h = F.silu(self.norm2(self.conv2(h)))
        return torch.flatten(h, 1)


class Decoder(nn.Module):
    def __init__(self, latent, cond_dim, grid):
        super().__init__()
        self.grid = grid
        self.fc = nn.Linear(latent + cond_dim, 12 * grid[0] * grid[1])
        self.up1 = nn.ConvTranspose2d(12, 8, 4, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.act = nn.LeakyReLU(0.2)
        self.up2 = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.conv = nn.Conv2d(8, 10, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(10)
        self.out = nn.Conv2d(10, 3, 1)

    def forward(self, z, cond):
        h = self.fc(torch.cat([z, cond], dim=1)).view(z.shape[0], 12, *self.grid)
        h = self.act(self.bn1(self.up1(h)))
        h = self.act(self.bn2(self.conv(self.up2(h))))
        return torch.tanh(self.out(h))


class ConditionalVAE(nn.Module):
    def __init__(self, classes=5, cond_dim=6, latent=7, grid=(4, 3)):
        super().__init__()
        self.label = nn.Embedding(classes, cond_dim)
        self.encoder = Encoder(cond_dim)
        self.fc_mu = nn.Linear(12 * grid[0] * grid[1], latent)
        self.fc_logvar = nn.Linear(12 * grid[0] * grid[1], latent)
        self.decoder = Decoder(latent, cond_dim, grid)

    def reparameterize(self, mu, logvar, noise):
        if noise is None:
            noise = torch.randn_like(mu)
        return mu + noise * torch.exp(0.5 * logvar)

    def forward(self, x, label, noise=None):
        cond = self.label(label)
        h = self.encoder(x, cond)
        mu, logvar = self.fc_mu(h), self.fc_logvar(h).clamp(-4.0, 2.0)
        z = self.reparameterize(mu, logvar, noise)
        recon = self.decoder(z, cond)
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=1).mean()
        rec = F.mse_loss(recon, x, reduction="none").sum(dim=(1, 2, 3)).mean()
        return recon, mu, logvar, rec + 0.5 * kl


# ---- Flax, NHWC

class FlaxFiLM(nnx.Module):
    def __init__(self, cond_dim, channels, rngs):
        self.dense = nnx.Linear(cond_dim, 2 * channels, rngs=rngs)

    def __call__(self, x, cond):
        gamma, beta = jnp.split(self.dense(cond)[:, None, None, :], 2, axis=-1)
        return (1.0 + gamma) * x + beta


class FlaxEncoder(nnx.Module):
    def __init__(self, cond_dim, rngs):
        pad = ((1, 1), (1, 1))
        self.conv1 = nnx.Conv(3, 8, (4, 4), strides=2, padding=pad, rngs=rngs)
        self.gn1 = nnx.GroupNorm(8, num_groups=2, epsilon=1e-5, rngs=rngs)
        self.film = FlaxFiLM(cond_dim, 8, rngs)
        self.conv2 = nnx.Conv(8, 12, (4, 4), strides=2, padding=pad, rngs=rngs)
        self.gn2 = nnx.GroupNorm(12, num_groups=4, epsilon=1e-5, rngs=rngs)

    def __call__(self, x, cond):
        h = self.gn1(self.conv1(x))
        h = nnx.silu(self.film(h, cond))
        h = nnx.silu(self.gn2(self.conv2(h)))
        return h.transpose(0, 3, 1, 2).reshape(h.shape[0], -1)


class FlaxDecoder(nnx.Module):
    def __init__(self, latent, cond_dim, grid, rngs):
        self.grid = grid
        self.fc = nnx.Linear(latent + cond_dim, 12 * grid[0] * grid[1], rngs=rngs)
        self.deconv = nnx.ConvTranspose(
            12, 8, (4, 4), strides=2, padding=((2, 2), (2, 2)), transpose_kernel=True, rngs=rngs
        )
        self.bn1 = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.conv = nnx.Conv(8, 10, (3, 3), padding="SAME", rngs=rngs)
        self.bn2 = nnx.BatchNorm(10, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.out = nnx.Conv(10, 3, (1, 1), rngs=rngs)

    def __call__(self, z, cond):
        h = self.fc(jnp.concatenate([z, cond], axis=-1))
        h = h.reshape(-1, 12, *self.grid).transpose(0, 2, 3, 1)
        h = nnx.leaky_relu(self.bn1(self.deconv(h)), negative_slope=0.2)
        b, height, width, c = h.shape
        h = jax.image.resize(h, (b, 2 * height, 2 * width, c), method="bilinear")
        h = self.bn2(self.conv(h))
        h = nnx.leaky_relu(h, 0.2)
        return jnp.tanh(self.out(h))


class FlaxVAE(nnx.Module):
    def __init__(self, classes=5, cond_dim=6, latent=7, grid=(4, 3), *, rngs):
        self.label = nnx.Embed(classes, cond_dim, rngs=rngs)
        self.encoder = FlaxEncoder(cond_dim, rngs)
        self.to_moments = nnx.Linear(12 * grid[0] * grid[1], 2 * latent, rngs=rngs)
        self.decoder = FlaxDecoder(latent, cond_dim, grid, rngs)

    def __call__(self, x, label, noise):
        cond = self.label.embedding[...][label]
        mu, logvar = jnp.split(self.to_moments(self.encoder(x, cond)), 2, axis=-1)
        logvar = jnp.clip(logvar, -4.0, 2.0)
        std = jnp.exp(0.5 * logvar)
        recon = self.decoder(mu + std * noise, cond)
        kl = 0.5 * jnp.sum(jnp.exp(logvar) + mu ** 2 - 1.0 - logvar, axis=-1)
        rec = jnp.sum((recon - x) ** 2, axis=(1, 2, 3))
        return recon, mu, logvar, jnp.mean(rec + 0.5 * kl)


def port(net, model):
    arr = lambda t: jnp.asarray(t.detach().numpy())

    def conv(dst, src):
        dst.kernel[...], dst.bias[...] = arr(src.weight).transpose(2, 3, 1, 0), arr(src.bias)

    def dense(dst, src):
        dst.kernel[...], dst.bias[...] = arr(src.weight).T, arr(src.bias)

    def norm(dst, src):
        dst.scale[...], dst.bias[...] = arr(src.weight), arr(src.bias)
        if isinstance(src, nn.BatchNorm2d):
            dst.mean[...], dst.var[...] = arr(src.running_mean), arr(src.running_var)

    enc, dec = net.encoder, net.decoder
    model.label.embedding[...] = arr(net.label.weight)
    conv(model.encoder.conv1, enc.conv1)
    conv(model.encoder.conv2, enc.conv2)
    norm(model.encoder.gn1, enc.norm1)
    norm(model.encoder.gn2, enc.norm2)
    dense(model.encoder.film.dense, enc.film.proj)
    model.to_moments.kernel[...] = jnp.concatenate([arr(net.fc_mu.weight), arr(net.fc_logvar.weight)]).T
    model.to_moments.bias[...] = jnp.concatenate([arr(net.fc_mu.bias), arr(net.fc_logvar.bias)])
    dense(model.decoder.fc, dec.fc)
    conv(model.decoder.deconv, dec.up1)
    conv(model.decoder.conv, dec.conv)
    conv(model.decoder.out, dec.out)
    norm(model.decoder.bn1, dec.bn1)
    norm(model.decoder.bn2, dec.bn2)
    model.eval()
    return model


def build(seed):
    torch.manual_seed(seed)
    net = ConditionalVAE().eval()
    for m in net.modules():
        if isinstance(m, (nn.GroupNorm, nn.BatchNorm2d)):
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(0, 0.4)
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.2, 1.5)
    net.fc_logvar.weight.data.mul_(6.0)
    net.encoder.film.proj.weight.data.mul_(2.0)
    rng = np.random.default_rng(seed)
    x = np.tanh(rng.normal(size=(3, 3, 16, 12)))
    label = rng.integers(0, 5, (3,))
    noise = rng.normal(size=(3, 7))
    model = port(net, FlaxVAE(rngs=nnx.Rngs(seed)))
    return {
        "torch": net,
        "flax": model,
        "inputs": (x, label, noise),
        "flax_inputs": (x.transpose(0, 2, 3, 1), label, noise),
    }


FAULTS = [
    {
        "title": "exp(logvar) taken for the standard deviation",
        "edits": [("std = jnp.exp(0.5 * logvar)", "std = jnp.exp(logvar)")],
        "layers": [""],
        "between": ("fc_logvar", "decoder.fc"),
        "causes": ["constant", "scale"],
        "level": "outputs",
    },
    {
        "title": "first BatchNorm of the decoder left at Flax's momentum",
        "edits": [("self.bn1 = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)", "self.bn1 = nnx.BatchNorm(8, rngs=rngs)")],
        "layers": ["decoder.bn1"],
        "causes": ["momentum"],
        "level": "training",
    },
    {
        "title": "second BatchNorm always called with the running averages",
        "edits": [("h = self.bn2(self.conv(h))", "h = self.bn2(self.conv(h), use_running_average=True)")],
        "layers": ["decoder.bn2"],
        "causes": ["statistics", "batch_statistics"],
        "level": "training",
    },
    {
        "title": "GroupNorm built with the group size in place of the number of groups",
        "edits": [("nnx.GroupNorm(12, num_groups=4, epsilon=1e-5, rngs=rngs)", "nnx.GroupNorm(12, num_groups=None, group_size=4, epsilon=1e-5, rngs=rngs)")],
        "layers": ["encoder.norm2"],
        "causes": ["groups"],
        "level": "outputs",
    },
    {
        "title": "transposed convolution's kernel used without its spatial flip",
        "edits": [("transpose_kernel=True, rngs=rngs", "rngs=rngs"), ("conv(model.decoder.deconv, dec.up1)", "model.decoder.deconv.kernel[...], model.decoder.deconv.bias[...] = arr(dec.up1.weight).transpose(2, 3, 0, 1), arr(dec.up1.bias)")],
        "layers": ["decoder.up1"],
        "causes": ["flipped"],
        "level": "outputs",
    },
    {
        "title": "FiLM before the group norm",
        "edits": [("        h = self.gn1(self.conv1(x))\n        h = nnx.silu(self.film(h, cond))", "        h = self.film(self.conv1(x), cond)\n        h = nnx.silu(self.gn1(h))")],
        "layers": ["encoder"],
        "between": ("encoder.conv1", "encoder.norm1"),
        "causes": ["order", "norm_order"],
        "level": "outputs",
    },
    {
        "title": "upsampling by nearest neighbour",
        "edits": [("method=\"bilinear\"", "method=\"nearest\"")],
        "layers": ["decoder.up2"],
        "between": ("decoder.bn1", "decoder.conv"),
        "causes": ["operation"],
        "level": "outputs",
    },
    {
        "title": "slope of the first leaky ReLU left at 0.01",
        "edits": [(", negative_slope=0.2)", ")")],
        "layers": ["decoder.act", "decoder"],
        "between": ("decoder.bn1", "decoder.conv"),
        "causes": ["activation", "constant"],
        "level": "outputs",
    },
    {
        "title": "KL averaged over the latent dimensions",
        "edits": [("kl = 0.5 * jnp.sum(jnp.exp(logvar)", "kl = 0.5 * jnp.mean(jnp.exp(logvar)")],
        "layers": [""],
        "between": ("decoder.out", None),
        "causes": ["scale", "operation", "axis"],
        "level": "outputs",
    },
    {
        "title": "latent of the decoder concatenated after the condition",
        "edits": [("self.fc(jnp.concatenate([z, cond], axis=-1))", "self.fc(jnp.concatenate([cond, z], axis=-1))")],
        "layers": ["decoder"],
        "between": ("fc_logvar", "decoder.fc"),
        "causes": ["concat"],
        "level": "outputs",
    },
]
