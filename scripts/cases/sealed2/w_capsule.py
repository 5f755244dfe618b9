"""Capsule network: conv, primary capsules, dynamic routing with detached predictions, masked reconstruction."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def squash(x, dim=-1):
    n2 = (x ** 2).sum(dim=dim, keepdim=True)
    return n2 / (1 + n2) * x / (n2.sqrt() + 1e-8)


class PrimaryCaps(nn.Module):
    def __init__(self, cin, caps, dim):
        super().__init__()
        self.capsules = nn.Conv2d(cin, caps * dim, 3, stride=2)
        self.dim = dim

    def forward(self, x):
        x = self.capsules(x)
        b, c, h, w = x.shape
        x = x.view(b, c // self.dim, self.dim, h, w).permute(0, 1, 3, 4, 2)
        return squash(x.reshape(b, -1, self.dim))


class DigitCaps(nn.Module):
    def __init__(self, n_in, d_in, n_out, d_out, routings=3):
        super().__init__()
        self.routings = routings
        self.weight = nn.Parameter(0.01 * torch.randn(n_out, n_in, d_out, d_in))
        self.bias = nn.Parameter(torch.zeros(n_out, d_out))

    def forward(self, x):
        u = (self.weight @ x[:, None, :, :, None]).squeeze(-1)
        u_det = u.detach()
        b = u.new_zeros(u.shape[:3])
        for i in range(self.routings):
            c = b.softmax(dim=1)
            if i == self.routings - 1:
                v = squash((c[..., None] * u).sum(2) + self.bias)
            else:
                v = squash((c[..., None] * u_det).sum(2) + self.bias)
                b = b + (v[:, :, None] * u_det).sum(-1)
        return v


class CapsNet(nn.Module):
    def __init__(self, classes=4, d_out=6):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3)
        self.primary = PrimaryCaps(8, 3, 4)
        self.digit = DigitCaps(3 * 2 * 3, 4, classes, d_out)
        self.decoder = nn.Sequential(nn.Linear(classes * d_out, 14), nn.ReLU(inplace=True), nn.Linear(14, 8 * 9), nn.Sigmoid())

    def forward(self, x):
        v = self.digit(self.primary(F.relu(self.conv1(x))))
        length = v.norm(dim=-1)
        keep = F.one_hot(length.argmax(dim=1), length.shape[1]).to(v.dtype)
        return length, self.decoder((v * keep[:, :, None]).flatten(1))


# ------------------------------------------------------------ JAX, functional


def squashed(x):
    sq = jnp.sum(x * x, axis=-1, keepdims=True)
    return sq / (1 + sq) * x / (jnp.sqrt(sq) + 1e-8)


def conv(p, x, stride=1):
    y = jax.lax.conv_general_dilated(x, p["w"], (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y + p["b"]


def primary_capsules(p, x, dim):
    h = conv(p, x, 2)
    b, rows, cols, c = h.shape
    h = h.reshape(b, rows, cols, c // dim, dim)
    h = h.transpose(0, 3, 1, 2, 4)  # capsule type slowest, as in torch
    return squashed(h.reshape(b, -1, dim))


def route(p, x, rounds):
    votes = jnp.einsum("oiDd,bid->boiD", p["w"], x)
    fixed = jax.lax.stop_gradient(votes)
    logits = jnp.zeros(votes.shape[:3], votes.dtype)
    for _ in range(rounds - 1):
        coupling = jax.nn.softmax(logits, axis=1)
        v = squashed(jnp.einsum("boi,boiD->boD", coupling, fixed) + p["b"])
        logits = logits + jnp.einsum("boD,boiD->boi", v, fixed)
    coupling = jax.nn.softmax(logits, axis=1)
    return squashed(jnp.einsum("boi,boiD->boD", coupling, votes) + p["b"])


def capsnet(params, image):
    h = jax.nn.relu(conv(params["conv"], image))
    caps = route(params["route"], primary_capsules(params["primary"], h, 4), rounds=3)
    length = jnp.linalg.norm(caps, axis=-1)
    keep = jax.nn.one_hot(jnp.argmax(length, axis=1), length.shape[1], dtype=caps.dtype)
    h = (caps * keep[:, :, None]).reshape(image.shape[0], -1)
    h = jax.nn.relu(h @ params["dec0"]["w"] + params["dec0"]["b"])
    return length, jax.nn.sigmoid(h @ params["dec1"]["w"] + params["dec1"]["b"])


def load(sd):
    c = lambda k: {"w": jnp.asarray(sd[k + ".weight"].transpose(2, 3, 1, 0)), "b": jnp.asarray(sd[k + ".bias"])}
    d = lambda k: {"w": jnp.asarray(sd[k + ".weight"].T), "b": jnp.asarray(sd[k + ".bias"])}
    return {"conv": c("conv1"), "primary": c("primary.capsules"),
            "route": {"w": jnp.asarray(sd["digit.weight"]), "b": jnp.asarray(sd["digit.bias"])},
            "dec0": d("decoder.0"), "dec1": d("decoder.2")}


def build(seed):
    torch.manual_seed(seed)
    net = CapsNet().eval()
    for p in net.parameters():
        p.data.normal_(0, 0.45)
    image = np.random.default_rng(seed).normal(size=(3, 1, 8, 9)).astype(np.float32)
    params = load({k: v.numpy() for k, v in net.state_dict().items()})
    return {"torch": net, "flax": (capsnet, params), "inputs": (image,), "flax_inputs": (image.transpose(0, 2, 3, 1),)}


FAULTS = [
    {
        "title": "gradient runs through the routing rounds as well",
        "edits": [("fixed = jax.lax.stop_gradient(votes)", "fixed = votes")],
        "layers": ["digit"],
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "coupling normalised over the input capsules",
        "edits": [("        coupling = jax.nn.softmax(logits, axis=1)\n        v =", "        coupling = jax.nn.softmax(logits, axis=2)\n        v =")],
        "layers": ["digit"],
        "between": ("primary.capsules", "decoder.0"),
        "causes": ["softmax_axis"],
        "level": "outputs",
    },
    {
        "title": "primary capsules flattened with the place slowest",
        "edits": [("    h = h.transpose(0, 3, 1, 2, 4)  # capsule type slowest, as in torch\n", "")],
        "layers": ["primary"],
        "between": ("primary.capsules", "decoder.0"),
        "causes": ["rearranged", "flatten"],
        "level": "outputs",
    },
    {
        "title": "squash by the norm's square alone: the unit vector is left out",
        "edits": [("return sq / (1 + sq) * x / (jnp.sqrt(sq) + 1e-8)", "return sq / (1 + sq) * x")],
        "layers": ["primary"],
        "between": ("primary.capsules", "decoder.0"),
        "causes": ["left_out", "activation", "scale"],
        "level": "outputs",
    },
    {
        "title": "one round of routing too few",
        "edits": [("rounds=3)", "rounds=2)")],
        "layers": ["digit"],
        "between": ("primary.capsules", "decoder.0"),
        "causes": ["constant", "left_out"],
        "level": "outputs",
    },
]
