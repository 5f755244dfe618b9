"""Mamba-like selective scan with a causal depthwise convolution; functional JAX, layers stacked under lax.scan."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

D_MODEL, D_STATE, D_CONV, EXPAND, N_LAYER, VOCAB = 12, 5, 4, 2, 2, 33
D_INNER, DT_RANK = EXPAND * D_MODEL, math.ceil(D_MODEL / 4)


class RMSNorm(nn.Module):
    def __init__(self, d_model, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class MambaMixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_proj = nn.Linear(D_MODEL, 2 * D_INNER, bias=False)
        self.conv1d = nn.Conv1d(D_INNER, D_INNER, D_CONV, groups=D_INNER, padding=D_CONV - 1)
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(D_INNER, DT_RANK + 2 * D_STATE, bias=False)
        self.dt_proj = nn.Linear(DT_RANK, D_INNER)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, D_STATE + 1).repeat(D_INNER, 1)))
        self.D = nn.Parameter(torch.ones(D_INNER))
        self.out_proj = nn.Linear(D_INNER, D_MODEL, bias=False)

    def forward(self, u):
        b, length, _ = u.shape
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x = self.act(self.conv1d(x.transpose(1, 2))[..., :length]).transpose(1, 2)
        dt, B, C = self.x_proj(x).split([DT_RANK, D_STATE, D_STATE], dim=-1)
        dt = F.softplus(self.dt_proj(dt))
        y = self.selective_scan(x, dt, -torch.exp(self.A_log), B, C)
        return self.out_proj(y * F.silu(z))

    def selective_scan(self, x, dt, A, B, C):
        deltaA = torch.exp(torch.einsum("bld,dn->bldn", dt, A))
        deltaB_x = torch.einsum("bld,bln,bld->bldn", dt, B, x)
        h = x.new_zeros(x.shape[0], D_INNER, D_STATE)
        ys = []
        for t in range(x.shape[1]):
            h = deltaA[:, t] * h + deltaB_x[:, t]
            ys.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
        return torch.stack(ys, dim=1) + x * self.D


class ResidualBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer = MambaMixer()
        self.norm = RMSNorm(D_MODEL)

    def forward(self, x):
        return self.mixer(self.norm(x)) + x


class Mamba(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, D_MODEL)
        self.layers = nn.ModuleList([ResidualBlock() for _ in range(N_LAYER)])
        self.norm_f = RMSNorm(D_MODEL)
        self.lm_head = nn.Linear(D_MODEL, VOCAB, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm_f(x))


def rms_norm(x, scale, eps=1e-5):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps) * scale


def causal_depthwise_conv(x, kernel, bias):
    """x: (batch, length, channels), kernel: (width, 1, channels)"""
    y = jax.lax.conv_general_dilated(
        x, kernel, window_strides=(1,), padding=[(kernel.shape[0] - 1, 0)],
        dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=x.shape[-1])
    return y + bias


def selective_scan(x, dt, A, B, C, D):
    def step(h, inputs):
        x_t, dt_t, b_t, c_t = inputs
        decay = jnp.exp(dt_t[..., None] * A)
        drive = (dt_t * x_t)[..., None] * b_t[:, None, :]
        h_new = decay * h + drive
        y_t = jnp.einsum("bdn,bn->bd", h_new, c_t)
        return h_new, y_t

    h0 = jnp.zeros((x.shape[0], *A.shape), x.dtype)
    _, ys = jax.lax.scan(step, h0, jax.tree.map(lambda t: jnp.moveaxis(t, 1, 0), (x, dt, B, C)))
    return jnp.moveaxis(ys, 0, 1) + x * D


def mixer(p, u):
    xz = u @ p["in_proj"]["kernel"]
    x, z = jnp.split(xz, 2, axis=-1)
    x = causal_depthwise_conv(x, p["conv1d"]["kernel"], p["conv1d"]["bias"])
    x = jax.nn.silu(x)
    proj = x @ p["x_proj"]["kernel"]
    dt, B, C = jnp.split(proj, [DT_RANK, DT_RANK + D_STATE], axis=-1)
    dt = dt @ p["dt_proj"]["kernel"] + p["dt_proj"]["bias"]
    dt = jax.nn.softplus(dt)
    A = -jnp.exp(p["A_log"])
    y = selective_scan(x, dt, A, B, C, p["D"])
    return (y * jax.nn.silu(z)) @ p["out_proj"]["kernel"]


def mamba(params, input_ids):
    table = params["embedding"]
    x = jnp.take(table, input_ids, axis=0)

    def body(h, layer):
        return h + mixer(layer["mixer"], rms_norm(h, layer["norm"]["scale"])), None

    x, _ = jax.lax.scan(body, x, params["layers"])
    return rms_norm(x, params["norm_f"]["scale"]) @ table.T


def port_layer(layer):
    m = layer.mixer
    array = lambda t: jnp.asarray(t.detach().numpy())
    return {
        "norm": {"scale": array(layer.norm.weight)},
        "mixer": {
            "in_proj": {"kernel": array(m.in_proj.weight).T},
            "conv1d": {"kernel": jnp.transpose(array(m.conv1d.weight), (2, 1, 0)), "bias": array(m.conv1d.bias)},
            "x_proj": {"kernel": array(m.x_proj.weight).T},
            "dt_proj": {"kernel": array(m.dt_proj.weight).T, "bias": array(m.dt_proj.bias)},
            "A_log": array(m.A_log),
            "D": array(m.D),
            "out_proj": {"kernel": array(m.out_proj.weight).T},
        },
    }


def port(net):
    layers = [port_layer(layer) for layer in net.layers]
    return {
        "embedding": jnp.asarray(net.embedding.weight.detach().numpy()),
        "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers),
        "norm_f": {"scale": jnp.asarray(net.norm_f.weight.detach().numpy())},
    }


def build(seed):
    torch.manual_seed(seed)
    net = Mamba().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "norm" in name or name.endswith("D"):
                p.uniform_(0.5, 1.5)
            elif name.endswith("A_log"):
                p.add_(0.2 * torch.randn_like(p))
            elif name.endswith("bias"):
                p.normal_(0, 0.3)
            else:
                p.normal_(0, 0.4)
    ids = np.random.default_rng(seed).integers(0, VOCAB, (2, 9))
    return {"torch": net, "flax": (mamba, port(net)), "inputs": ids}


FAULTS = [
    {
        "title": "convolution padded on both sides, so that it sees the future",
        "edits": [("padding=[(kernel.shape[0] - 1, 0)]", 'padding="SAME"')],
        "layers": ["layers.0.mixer.conv1d"],
        "causes": ["padding"],
        "level": "outputs",
    },
    {
        "title": "bias of the step added by the projection and again within the softplus",
        "edits": [("dt = jax.nn.softplus(dt)", 'dt = jax.nn.softplus(dt + p["dt_proj"]["bias"])')],
        "layers": ["layers.0.mixer.dt_proj", "layers.0.mixer"],
        "between": ("layers.0.mixer.dt_proj", "layers.0.mixer.out_proj"),
        "causes": ["bias_twice"],
        "level": "outputs",
    },
    {
        "title": "A is -A_log, without the exponential",
        "edits": [('A = -jnp.exp(p["A_log"])', 'A = -p["A_log"]')],
        "layers": ["layers.0.mixer"],
        "between": ("layers.0.mixer.dt_proj", "layers.0.mixer.out_proj"),
        "causes": ["left_out", "operation"],
        "level": "outputs",
    },
    {
        "title": "B and C taken in one another's place",
        "edits": [("dt, B, C = jnp.split(proj", "dt, C, B = jnp.split(proj")],
        "layers": ["layers.0.mixer", "layers.0.mixer.x_proj"],
        "between": ("layers.0.mixer.x_proj", "layers.0.mixer.dt_proj"),
        "causes": ["swapped", "blocks", "operand"],
        "level": "outputs",
    },
    {
        "title": "state read before the step's own update",
        "edits": [('jnp.einsum("bdn,bn->bd", h_new, c_t)', 'jnp.einsum("bdn,bn->bd", h, c_t)')],
        "layers": ["layers.0.mixer"],
        "between": ("layers.0.mixer.dt_proj", "layers.0.mixer.out_proj"),
        "causes": ["operand", "order", "offset"],
        "level": "outputs",
    },
    {
        "title": "input discretised by the zero-order hold, not by dt * B",
        "edits": [("drive = (dt_t * x_t)[..., None] * b_t[:, None, :]", "drive = (decay - 1.0) / A * x_t[..., None] * b_t[:, None, :]")],
        "layers": ["layers.0.mixer"],
        "between": ("layers.0.mixer.dt_proj", "layers.0.mixer.out_proj"),
        "causes": ["operation"],
        "level": "outputs",
    },
    {
        "title": "depthwise kernel back to front",
        "edits": [("jnp.transpose(array(m.conv1d.weight), (2, 1, 0))", "jnp.transpose(array(m.conv1d.weight), (2, 1, 0))[::-1]")],
        "layers": ["layers.0.mixer.conv1d"],
        "causes": ["flipped"],
        "level": "outputs",
    },
    {
        "title": "no skip with D",
        "edits": [("return jnp.moveaxis(ys, 0, 1) + x * D", "return jnp.moveaxis(ys, 0, 1)")],
        "layers": ["layers.0.mixer"],
        "between": ("layers.0.mixer.dt_proj", "layers.0.mixer.out_proj"),
        "causes": ["residual", "left_out"],
        "level": "outputs",
    },
    {
        "title": "A does not learn",
        "edits": [("y = selective_scan(x, dt, A, B, C", "y = selective_scan(x, dt, jax.lax.stop_gradient(A), B, C")],
        "layers": ["layers.0.mixer", "layers.1.mixer"],
        "between": ("layers.0.mixer.dt_proj", "layers.0.mixer.out_proj"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
]
