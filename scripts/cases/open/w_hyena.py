"""Hyena operator: projections through a short conv, implicit long filters from sines, FFT convolution, gating."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Sin(nn.Module):
    def __init__(self, dim, w):
        super().__init__()
        self.freq = nn.Parameter(w * torch.ones(1, dim))

    def forward(self, x):
        return torch.sin(self.freq * x)


class HyenaFilter(nn.Module):
    """Filters of any length: an MLP of the position, times a decaying window."""

    def __init__(self, d_model, emb_dim=5, order=8, w=2.0):
        super().__init__()
        self.bands, self.d_model = (emb_dim - 1) // 2, d_model
        act = Sin(order, w)
        self.implicit_filter = nn.Sequential(
            nn.Linear(emb_dim, order), act, nn.Linear(order, order), act, nn.Linear(order, d_model, bias=False))
        self.bias = nn.Parameter(torch.randn(d_model))

    def positions(self, length, dtype):
        t = torch.linspace(0, 1, length, dtype=dtype)[:, None]
        angle = 2 * torch.pi * torch.arange(length, dtype=dtype)[:, None] / length
        f = torch.linspace(1e-4, self.bands - 1, self.bands, dtype=dtype)[None]
        return torch.cat([t, torch.cos(f * angle), -torch.sin(f * angle)], dim=-1), t

    def filter(self, length, dtype):
        z, t = self.positions(length, dtype)
        h = self.implicit_filter(z)
        low, high = torch.log(torch.tensor(0.01, dtype=dtype)) / 1.5, torch.log(torch.tensor(0.01, dtype=dtype)) / 0.3
        deltas = low + (high - low) * torch.linspace(0, 1, self.d_model, dtype=dtype)
        return h * (torch.exp(-t * deltas.abs()) + 0.05)

    def forward(self, x, length):
        k = self.filter(length, x.dtype).t()
        n = 2 * length
        y = torch.fft.irfft(torch.fft.rfft(x, n=n) * torch.fft.rfft(k, n=n), n=n)[..., :length]
        return y + x * self.bias[:, None]


class HyenaOperator(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.short_filter = nn.Conv1d(3 * d_model, 3 * d_model, 3, groups=3 * d_model, padding=2)
        self.filter_fn = HyenaFilter(d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, u):
        length = u.shape[1]
        u = self.short_filter(self.in_proj(u).transpose(1, 2))[..., :length]
        x0, x1, v = u.chunk(3, dim=1)
        v = self.filter_fn(v * x1, length)
        return self.out_proj((v * x0).transpose(1, 2))


class HyenaBlock(nn.Module):
    def __init__(self, d_model, inner):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.mixer = HyenaOperator(d_model)
        self.fc1, self.fc2 = nn.Linear(d_model, inner), nn.Linear(inner, d_model)

    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class HyenaClassifier(nn.Module):
    def __init__(self, d_in=4, d_model=8, classes=5, layers=2):
        super().__init__()
        self.encoder = nn.Linear(d_in, d_model)
        self.blocks = nn.ModuleList([HyenaBlock(d_model, 12) for _ in range(layers)])
        self.ln_f = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, classes)

    def forward(self, x):
        x = self.encoder(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x).mean(dim=1))


# JAX ------------------------------------------------------------------------------------------


def dense(p, x):
    y = x @ p["kernel"]
    return y + p["bias"] if "bias" in p else y


def norm(p, x, eps=1e-5):
    c = x - x.mean(-1, keepdims=True)
    return c / jnp.sqrt((c * c).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def short_conv(p, x):
    """Causal depthwise window of 3 over time; x [batch, time, channels]."""
    k = p["kernel"]
    padded = jnp.pad(x, ((0, 0), (k.shape[0] - 1, 0), (0, 0)))
    return sum(k[i] * padded[:, i:i + x.shape[1]] for i in range(k.shape[0])) + p["bias"]


def long_filter(p, length, width, dtype):
    bands = (p["mlp"][0]["kernel"].shape[0] - 1) // 2
    t = jnp.linspace(0, 1, length, dtype=dtype)[:, None]
    omega = 2 * jnp.pi * jnp.arange(length, dtype=dtype)[:, None] / length
    wave = jnp.linspace(1e-4, bands - 1, bands, dtype=dtype) * omega
    z = jnp.concatenate([t, jnp.cos(wave), -jnp.sin(wave)], axis=-1)
    h = jnp.sin(p["freq"] * dense(p["mlp"][0], z))
    h = jnp.sin(p["freq"] * dense(p["mlp"][1], h))
    h = dense(p["mlp"][2], h)
    rate = jnp.abs(jnp.linspace(np.log(0.01) / 1.5, np.log(0.01) / 0.3, width, dtype=dtype))
    return h * (jnp.exp(-t * rate) + 0.05)


def fft_conv(x, k):
    length = x.shape[1]
    size = 2 * length
    spectrum = jnp.fft.rfft(x, size, axis=1) * jnp.fft.rfft(k, size, axis=0)
    return jnp.fft.irfft(spectrum, size, axis=1)[:, :length]


def hyena(p, x):
    u = short_conv(p["short"], dense(p["in"], x))
    gate_out, gate_in, v = jnp.split(u, 3, axis=-1)
    v = v * gate_in
    k = long_filter(p["filter"], x.shape[1], x.shape[2], x.dtype)
    y = fft_conv(v, k) + v * p["filter"]["skip"]
    return dense(p["out"], y * gate_out)


def apply(params, x):
    x = dense(params["encoder"], x)
    for p in params["blocks"]:
        x = x + hyena(p["mixer"], norm(p["norm1"], x))
        h = jax.nn.gelu(dense(p["fc1"], norm(p["norm2"], x)), approximate=True)
        x = x + dense(p["fc2"], h)
    return dense(params["head"], norm(params["ln_f"], x).mean(axis=1))


def convert(net):
    arr = lambda t: jnp.asarray(t.detach().numpy())

    def lin(m):
        return {"kernel": arr(m.weight).T} | ({} if m.bias is None else {"bias": arr(m.bias)})

    ln = lambda m: {"scale": arr(m.weight), "bias": arr(m.bias)}
    blocks = []
    for b in net.blocks:
        m = b.mixer
        seq = m.filter_fn.implicit_filter
        blocks.append({
            "norm1": ln(b.norm1), "norm2": ln(b.norm2), "fc1": lin(b.fc1), "fc2": lin(b.fc2),
            "mixer": {
                "in": lin(m.in_proj), "out": lin(m.out_proj),
                "short": {"kernel": arr(m.short_filter.weight)[:, 0].T, "bias": arr(m.short_filter.bias)},
                "filter": {"mlp": [lin(seq[i]) for i in (0, 2, 4)], "freq": arr(seq[1].freq)[0], "skip": arr(m.filter_fn.bias)},
            },
        })
    return {"encoder": lin(net.encoder), "blocks": blocks, "ln_f": ln(net.ln_f), "head": lin(net.head)}


def build(seed):
    torch.manual_seed(seed)
    net = HyenaClassifier().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "freq" in name or "norm" in name and name.endswith("weight"):
                p.mul_(0.7 + 0.6 * torch.rand_like(p))
            else:
                p.normal_(0, 0.5)
    x = np.random.default_rng(seed).normal(size=(3, 10, 4)).astype(np.float32)
    return {"torch": net, "flax": (apply, convert(net)), "inputs": (x,)}


FAULTS = [
    {
        "title": "FFT without room for the tail: the convolution is circular",
        "edits": [("    size = 2 * length\n", "    size = length\n")],
        "layers": ["blocks.0.mixer.filter_fn"],
        "between": ("blocks.0.mixer.short_filter", "blocks.0.mixer.out_proj"),
        "causes": ["padding", "size", "causal"],
        "level": "outputs",
    },
    {
        "title": "short filter run as a true convolution, its window turned round",
        "edits": [("sum(k[i] * padded[:, i:i + x.shape[1]] for", "sum(k[-1 - i] * padded[:, i:i + x.shape[1]] for")],
        "layers": ["blocks.0.mixer.short_filter"],
        "causes": ["flipped", "reversed"],
        "level": "outputs",
    },
    {
        "title": "the three projections taken in the order of attention: q, k, v with the value first",
        "edits": [("gate_out, gate_in, v = jnp.split(u, 3, axis=-1)", "v, gate_in, gate_out = jnp.split(u, 3, axis=-1)")],
        "layers": ["blocks.0.mixer"],
        "between": ("blocks.0.mixer.short_filter", "blocks.0.mixer.filter_fn"),
        "causes": ["swapped", "blocks"],
        "level": "outputs",
    },
    {
        "title": "floor of the decay window left out",
        "edits": [("return h * (jnp.exp(-t * rate) + 0.05)", "return h * jnp.exp(-t * rate)")],
        "layers": ["blocks.0.mixer.filter_fn"],
        "between": ("blocks.0.mixer.filter_fn.implicit_filter", "blocks.0.mixer.out_proj"),
        "causes": ["left_out", "constant"],
        "level": "outputs",
    },
    {
        "title": "long filter evaluated in bfloat16",
        "edits": [("x.shape[2], x.dtype)\n", "x.shape[2], x.dtype).astype(jnp.bfloat16).astype(x.dtype)\n")],
        "layers": ["blocks.0.mixer.filter_fn"],
        "between": ("blocks.0.mixer.short_filter", "blocks.0.mixer.out_proj"),
        "causes": ["dtype"],
        "level": "outputs",
    },
]
