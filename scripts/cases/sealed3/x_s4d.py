"""S4D: diagonal state spaces as long convolutions by FFT, GLU output, post-norm residual layers, mean over time."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen
from torch import nn


class S4DKernel(nn.Module):
    def __init__(self, d_model, n):
        super().__init__()
        self.log_dt = nn.Parameter(torch.zeros(d_model))
        self.C = nn.Parameter(torch.zeros(d_model, n, 2))
        self.log_A_real = nn.Parameter(torch.zeros(d_model, n))
        self.A_imag = nn.Parameter(torch.zeros(d_model, n))

    def forward(self, length):
        dt = torch.exp(self.log_dt)
        C = torch.view_as_complex(self.C)
        A = -torch.exp(self.log_A_real) + 1j * self.A_imag
        dtA = A * dt.unsqueeze(-1)
        K = dtA.unsqueeze(-1) * torch.arange(length)
        C = C * (torch.exp(dtA) - 1.0) / A
        return 2 * torch.einsum("hn,hnl->hl", C, torch.exp(K)).real


class S4D(nn.Module):
    def __init__(self, d_model, n):
        super().__init__()
        self.D = nn.Parameter(torch.zeros(d_model))
        self.kernel = S4DKernel(d_model, n)
        self.activation = nn.GELU()
        self.output_linear = nn.Sequential(nn.Conv1d(d_model, 2 * d_model, 1), nn.GLU(dim=-2))

    def forward(self, u):
        length = u.shape[-1]
        k = self.kernel(length)
        k_f = torch.fft.rfft(k, n=2 * length)
        u_f = torch.fft.rfft(u, n=2 * length)
        y = torch.fft.irfft(u_f * k_f, n=2 * length)[..., :length]
        y = y + u * self.D.unsqueeze(-1)
        return self.output_linear(self.activation(y))


class S4Model(nn.Module):
    def __init__(self, d_input=3, d_output=5, d_model=8, n=6, layers=2):
        super().__init__()
        self.encoder = nn.Linear(d_input, d_model)
        self.s4_layers = nn.ModuleList([S4D(d_model, n) for _ in range(layers)])
        self.norms = nn.ModuleList([nn.LayerNorm(d_model) for _ in range(layers)])
        self.decoder = nn.Linear(d_model, d_output)

    def forward(self, x):
        x = self.encoder(x).transpose(-1, -2)
        for layer, norm in zip(self.s4_layers, self.norms):
            x = layer(x) + x
            x = norm(x.transpose(-1, -2)).transpose(-1, -2)
        return self.decoder(x.transpose(-1, -2).mean(dim=1))


# JAX side: Linen, [batch, time, width]


def long_convolution(u, k):
    """Causal convolution of u [batch, time, width] with k [time, width]."""
    t = u.shape[1]
    n = 2 * t
    spectrum = jnp.fft.rfft(u, n, axis=1) * jnp.fft.rfft(k, n, axis=0)
    return jnp.fft.irfft(spectrum, n, axis=1)[:, :t]


class DiagonalSSM(linen.Module):
    width: int
    states: int

    def setup(self):
        init, shape = linen.initializers.normal(0.5), (self.width, self.states)
        self.log_step = self.param("log_step", init, (self.width,))
        self.decay, self.frequency = self.param("decay", init, shape), self.param("frequency", init, shape)
        self.c_re, self.c_im = self.param("c_re", init, shape), self.param("c_im", init, shape)
        self.skip = self.param("skip", init, (self.width,))
        self.out = linen.Dense(2 * self.width)

    def impulse_response(self, t):
        lam = jax.lax.complex(-jnp.exp(self.decay), self.frequency)
        z = lam * jnp.exp(self.log_step)[:, None]
        c = jax.lax.complex(self.c_re, self.c_im) * (jnp.exp(z) - 1.0) / lam
        modes = jnp.exp(jnp.arange(t)[:, None, None] * z)
        return 2.0 * jnp.real(jnp.einsum("hn,thn->th", c, modes))

    def __call__(self, u):
        y = long_convolution(u, self.impulse_response(u.shape[1])) + self.skip * u
        return linen.glu(self.out(linen.gelu(y, approximate=False)), axis=-1)


class Classifier(linen.Module):
    width: int = 8
    states: int = 6
    depth: int = 2
    classes: int = 5

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(self.width, name="embed")(x)
        for i in range(self.depth):
            ssm = DiagonalSSM(self.width, self.states, name=f"ssm_{i}")
            norm = linen.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=f"norm_{i}")
            x = norm(x + ssm(x))
        return linen.Dense(self.classes, name="classes")(x.mean(axis=1))


def port(net):
    f = lambda t: jnp.asarray(t.detach().numpy())
    lin = lambda m: {"kernel": f(m.weight).T, "bias": f(m.bias)}
    params = {"embed": lin(net.encoder), "classes": lin(net.decoder)}
    for i, (layer, norm) in enumerate(zip(net.s4_layers, net.norms)):
        k, conv = layer.kernel, layer.output_linear[0]
        re, im = f(k.C[..., 0]), f(k.C[..., 1])
        params[f"ssm_{i}"] = {
            "log_step": f(k.log_dt), "decay": f(k.log_A_real), "frequency": f(k.A_imag), "c_re": re, "c_im": im,
            "skip": f(layer.D), "out": {"kernel": f(conv.weight)[:, :, 0].T, "bias": f(conv.bias)},
        }
        params[f"norm_{i}"] = {"scale": f(norm.weight), "bias": f(norm.bias)}
    return {"params": params}


def build(seed):
    torch.manual_seed(seed)
    net = S4Model().eval()
    for p in net.parameters():
        p.data.normal_(0, 0.6)
    for layer, norm in zip(net.s4_layers, net.norms):
        norm.weight.data.uniform_(0.6, 1.5)
        k = layer.kernel
        k.log_dt.data.uniform_(math.log(0.05), math.log(0.4))
        k.log_A_real.data.uniform_(math.log(0.3), math.log(0.8))
        k.A_imag.data.copy_(math.pi * torch.arange(6) + torch.rand(8, 6))
        k.C.data.normal_(0, 1.0)
    model = Classifier()
    x = np.random.default_rng(seed).normal(size=(4, 15, 3)).astype(np.float32)
    return {"torch": net, "flax": (lambda variables, *inputs: model.apply(variables, *inputs), port(net)), "inputs": (x,)}


FAULTS = [
    {
        "title": "the transforms are as long as the sequence, so that the convolution wraps around",
        "edits": [("    n = 2 * t\n", "    n = t\n")],
        "layers": ["s4_layers.0"],
        "between": ("s4_layers.0.kernel", "s4_layers.0.activation"),
        "causes": ["size", "padding"],
        "level": "outputs",
    },
    {
        "title": "real and imaginary parts of C exchanged",
        "edits": [("re, im = f(k.C[..., 0]), f(k.C[..., 1])", "im, re = f(k.C[..., 0]), f(k.C[..., 1])")],
        "layers": ["s4_layers.0.kernel", "s4_layers.1.kernel"],
        "causes": ["swapped", "flipped"],
        "level": "bits",
    },
    {
        "title": "conjugate modes not counted: the kernel without its factor two",
        "edits": [("return 2.0 * jnp.real(", "return jnp.real(")],
        "layers": ["s4_layers.0.kernel"],
        "causes": ["scale", "constant", "left_out"],
        "level": "outputs",
    },
    {
        "title": "norm before each layer, not after the sum",
        "edits": [("            x = norm(x + ssm(x))\n", "            x = x + ssm(norm(x))\n")],
        "layers": ["norms.0", "s4_layers.0", ""],
        "causes": ["norm_order", "order"],
        "level": "outputs",
    },
    {
        "title": "output projection computed in bfloat16",
        "edits": [("self.out = linen.Dense(2 * self.width)", "self.out = linen.Dense(2 * self.width, dtype=jnp.bfloat16)")],
        "layers": ["s4_layers.0.output_linear.0", "s4_layers.0.output_linear", "s4_layers.0"],
        "causes": ["dtype"],
        "level": "outputs",
    },
]
