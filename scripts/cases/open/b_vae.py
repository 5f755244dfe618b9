"""Convolutional VAE: BatchNorm and leaky ReLU, latents rounded straight through, decoder of transposed convolutions."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from flax import nnx


class Encoder(nn.Module):
    def __init__(self, channels, latent, size):
        super().__init__()
        layers, cin = [], 3
        for c in channels:
            layers += [nn.Conv2d(cin, c, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(c), nn.LeakyReLU(0.2)]
            cin = c
        self.net = nn.Sequential(*layers)
        flat = cin * (size[0] // 4) * (size[1] // 4)
        self.fc_mu = nn.Linear(flat, latent)
        self.fc_logvar = nn.Linear(flat, latent)

    def forward(self, x):
        h = self.net(x).flatten(1)
        return self.fc_mu(h), self.fc_logvar(h)


class Decoder(nn.Module):
    def __init__(self, channels, latent, size):
        super().__init__()
        self.start = (channels[1], size[0] // 4, size[1] // 4)
        self.fc = nn.Linear(latent, int(np.prod(self.start)))
        self.up1 = nn.ConvTranspose2d(channels[1], channels[0], 3, stride=2, padding=1, output_padding=1)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.up2 = nn.ConvTranspose2d(channels[0], channels[0], 4, stride=2, padding=1)
        self.out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, z):
        h = F.leaky_relu(self.fc(z), 0.2).view(-1, *self.start)
        h = F.leaky_relu(self.bn1(self.up1(h)), 0.2)
        h = F.leaky_relu(self.up2(h), 0.2)
        return torch.tanh(self.out(h))


class VAE(nn.Module):
    def __init__(self, channels=(8, 12), latent=7, size=(12, 16), levels=4.0):
        super().__init__()
        self.levels = levels
        self.encoder = Encoder(channels, latent, size)
        self.decoder = Decoder(channels, latent, size)

    def reparameterize(self, mu, logvar, noise):
        std = torch.exp(0.5 * logvar)
        return mu + noise * std

    def forward(self, x, noise):
        mu, logvar = self.encoder(x)
        z = self.reparameterize(mu, logvar, noise)
        z = z + (torch.round(z * self.levels) / self.levels - z).detach()
        recon = self.decoder(z)
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=1).mean()
        return recon, kl


# ------------------------------------------------------------------ nnx


class ConvNormAct(nnx.Module):
    def __init__(self, cin, cout, rngs, slope=0.2):
        self.conv = nnx.Conv(cin, cout, kernel_size=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1)), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(cout, use_running_average=True, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.slope = slope

    def __call__(self, x):
        return nnx.leaky_relu(self.bn(self.conv(x)), self.slope)


class FlaxEncoder(nnx.Module):
    def __init__(self, channels, latent, size, rngs):
        self.layers = nnx.List([ConvNormAct(i, o, rngs) for i, o in zip((3, *channels), channels)])
        flat = channels[-1] * (size[0] // 4) * (size[1] // 4)
        self.mean = nnx.Linear(flat, latent, rngs=rngs)
        self.logvar = nnx.Linear(flat, latent, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        x = jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)
        return self.mean(x), self.logvar(x)


class FlaxDecoder(nnx.Module):
    def __init__(self, channels, latent, size, rngs):
        self.start = (channels[1], size[0] // 4, size[1] // 4)
        self.fc = nnx.Linear(latent, int(np.prod(self.start)), rngs=rngs)
        self.up1 = nnx.ConvTranspose(channels[1], channels[0], (3, 3), strides=(2, 2), padding=((1, 2), (1, 2)), rngs=rngs)
        self.bn1 = nnx.BatchNorm(channels[0], use_running_average=True, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.up2 = nnx.ConvTranspose(channels[0], channels[0], (4, 4), strides=(2, 2), padding=((2, 2), (2, 2)), rngs=rngs)
        self.out = nnx.Conv(channels[0], 3, (3, 3), padding="SAME", rngs=rngs)

    def __call__(self, z):
        h = nnx.leaky_relu(self.fc(z), negative_slope=0.2)
        h = jnp.transpose(h.reshape(-1, *self.start), (0, 2, 3, 1))
        h = self.bn1(self.up1(h))
        h = nnx.leaky_relu(h, 0.2)
        h = self.up2(h)
        h = nnx.leaky_relu(h, negative_slope=2e-1)
        return jnp.tanh(self.out(h))


class FlaxVAE(nnx.Module):
    def __init__(self, channels=(8, 12), latent=7, size=(12, 16), levels=4.0, *, rngs):
        self.levels = levels
        self.encoder = FlaxEncoder(channels, latent, size, rngs)
        self.decoder = FlaxDecoder(channels, latent, size, rngs)

    def __call__(self, x, noise):
        mean, logvar = self.encoder(x)
        z = mean + jnp.exp(0.5 * logvar) * noise
        rounded = jnp.round(z * self.levels) / self.levels
        z = z + jax.lax.stop_gradient(rounded - z)
        recon = self.decoder(z)
        kl = -0.5 * jnp.sum(1.0 + logvar - jnp.square(mean) - jnp.exp(logvar), axis=-1)
        return recon, jnp.mean(kl)


def port(net, model):
    sd = {k: v.numpy() for k, v in net.state_dict().items()}

    def copy(module, prefix):
        if isinstance(module, nnx.BatchNorm):
            module.scale[...] = sd[prefix + ".weight"]
            module.bias[...] = sd[prefix + ".bias"]
            module.mean[...] = sd[prefix + ".running_mean"]
            module.var[...] = sd[prefix + ".running_var"]
            return
        w = sd[prefix + ".weight"]
        if isinstance(module, nnx.ConvTranspose):
            w = np.flip(w.transpose(2, 3, 0, 1), (0, 1))
        elif isinstance(module, nnx.Conv):
            w = w.transpose(2, 3, 1, 0)
        else:
            w = w.T
        module.kernel[...] = w
        if prefix + ".bias" in sd:
            module.bias[...] = sd[prefix + ".bias"]

    for i, layer in enumerate(model.encoder.layers):
        copy(layer.conv, f"encoder.net.{3 * i}")
        copy(layer.bn, f"encoder.net.{3 * i + 1}")
    copy(model.encoder.mean, "encoder.fc_mu")
    copy(model.encoder.logvar, "encoder.fc_logvar")
    for name in ("fc", "up1", "bn1", "up2", "out"):
        copy(getattr(model.decoder, name), f"decoder.{name}")
    return model


def build(seed):
    torch.manual_seed(seed)
    net = VAE().eval()
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.6, 1.5)
                m.bias.normal_(0, 0.3)
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.2, 0.9)
    model = port(net, FlaxVAE(rngs=nnx.Rngs(1)))
    rng = np.random.default_rng(seed)
    x, noise = rng.normal(size=(2, 3, 12, 16)), rng.normal(size=(2, 7))
    return {"torch": net, "flax": model, "inputs": {"x": x, "noise": noise},
            "flax_inputs": {"x": np.moveaxis(x, 1, -1), "noise": noise}}


FAULTS = [
    {
        "title": "kernels of the transposed convolutions not turned round",
        "edits": [("w = np.flip(w.transpose(2, 3, 0, 1), (0, 1))", "w = w.transpose(2, 3, 0, 1)")],
        "layers": ["decoder.up1"],
        "causes": ["flipped"],
        "level": "outputs",
    },
    {
        "title": "output padding put in front",
        "edits": [("padding=((1, 2), (1, 2))", "padding=((2, 1), (2, 1))")],
        "layers": ["decoder.up1"],
        "causes": ["padding"],
        "level": "outputs",
    },
    {
        "title": "decoder's start read channel last",
        "edits": [("h = jnp.transpose(h.reshape(-1, *self.start), (0, 2, 3, 1))",
                   "h = h.reshape(-1, *self.start[1:], self.start[0])")],
        "layers": ["decoder"],
        "between": ("decoder.fc", "decoder.up1"),
        "causes": ["flatten", "rearranged"],
        "level": "outputs",
    },
    {
        "title": "log variance taken for a log standard deviation",
        "edits": [("jnp.exp(0.5 * logvar) * noise", "jnp.exp(logvar) * noise")],
        "layers": [""],
        "between": ("encoder.fc_logvar", "decoder.fc"),
        "causes": ["scale", "constant"],
        "level": "outputs",
    },
    {
        "title": "slope of the leaky ReLU after the last up-sampling left at its default",
        "edits": [("nnx.leaky_relu(h, negative_slope=2e-1)", "nnx.leaky_relu(h)")],
        "layers": ["decoder"],
        "between": ("decoder.up2", "decoder.out"),
        "causes": ["constant", "activation"],
        "level": "outputs",
    },
    {
        "title": "KL averaged over the latents",
        "edits": [("kl = -0.5 * jnp.sum(", "kl = -0.5 * jnp.mean(")],
        "layers": [""],
        "between": ("decoder.out", None),
        "causes": ["operation", "scale"],
        "level": "outputs",
    },
    {
        "title": "rounded latents without the straight-through gradient",
        "edits": [("z = z + jax.lax.stop_gradient(rounded - z)", "z = rounded")],
        "layers": [""],
        "between": ("encoder.fc_logvar", "decoder.fc"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "running variances not loaded",
        "edits": [('            module.var[...] = sd[prefix + ".running_var"]\n', "")],
        "layers": ["encoder.net.1"],
        "causes": ["default"],
        "level": "outputs",
    },
    {
        "title": "heads of mean and log variance exchanged",
        "edits": [('copy(model.encoder.mean, "encoder.fc_mu")', 'copy(model.encoder.mean, "encoder.fc_logvar")'),
                  ('copy(model.encoder.logvar, "encoder.fc_logvar")', 'copy(model.encoder.logvar, "encoder.fc_mu")')],
        "layers": ["encoder.fc_mu", "encoder.fc_logvar"],
        "causes": ["swapped"],
        "level": "outputs",
    },
]
