"""Mamba language model: causal depthwise conv, input-dependent selective scan, gated output, tied head."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, d, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class MambaMixer(nn.Module):
    def __init__(self, d_model, d_state, d_conv, expand):
        super().__init__()
        self.d_inner = expand * d_model
        self.d_state, self.dt_rank = d_state, math.ceil(d_model / 4)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        A = torch.arange(1, d_state + 1).float().repeat(self.d_inner, 1)
        self.A_log = nn.Parameter(torch.log(A))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(self, hidden):
        l = hidden.shape[1]
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        x = self.conv1d(x.transpose(1, 2))[..., :l].transpose(1, 2)
        x = F.silu(x)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = F.softplus(self.dt_proj(dt))
        y = self.selective_scan(x, dt, -torch.exp(self.A_log), B, C)
        y = y + x * self.D
        return self.out_proj(y * F.silu(z))

    def selective_scan(self, u, dt, A, B, C):
        dA = torch.exp(dt[..., None] * A)
        dBu = dt[..., None] * B[:, :, None, :] * u[..., None]
        h = torch.zeros_like(dBu[:, 0])
        ys = []
        for t in range(u.shape[1]):
            h = dA[:, t] * h + dBu[:, t]
            ys.append((h * C[:, t, None, :]).sum(-1))
        return torch.stack(ys, dim=1)


class Block(nn.Module):
    def __init__(self, d_model, **kw):
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.mixer = MambaMixer(d_model, **kw)

    def forward(self, x):
        return x + self.mixer(self.norm(x))


class MambaLM(nn.Module):
    def __init__(self, vocab=19, d_model=12, n_layer=2, d_state=5, d_conv=4, expand=2):
        super().__init__()
        self.embedding = nn.Embedding(vocab, d_model)
        self.layers = nn.ModuleList([Block(d_model, d_state=d_state, d_conv=d_conv, expand=expand) for _ in range(n_layer)])
        self.norm_f = RMSNorm(d_model)
        self.lm_head = nn.Linear(d_model, vocab, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm_f(x))


# ------------------------------------------------------------------ NNX


class SelectiveSSM(nnx.Module):
    """The recurrence alone; delta, B and C come from the input."""

    def __init__(self, inner, n, rank, rngs):
        self.n, self.rank = n, rank
        self.to_params = nnx.Linear(inner, rank + 2 * n, use_bias=False, rngs=rngs)
        self.delta_kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (rank, inner)))
        self.delta_bias = nnx.Param(jnp.zeros((inner,)))
        self.log_decay = nnx.Param(jnp.zeros((inner, n)))
        self.skip = nnx.Param(jnp.ones((inner,)))

    def __call__(self, u):
        delta, b, c = jnp.split(self.to_params(u), [self.rank, self.rank + self.n], axis=-1)
        delta = jax.nn.softplus(delta @ self.delta_kernel[...] + self.delta_bias[...])
        a = -jnp.exp(self.log_decay[...])
        decay = jnp.exp(jnp.einsum("bld,dn->bldn", delta, a))
        drive = jnp.einsum("bld,bln,bld->bldn", delta, b, u)

        def combine(left, right):
            (al, xl), (ar, xr) = left, right
            return al * ar, ar * xl + xr

        _, states = jax.lax.associative_scan(combine, (decay, drive), axis=1)
        y = jnp.einsum("bldn,bln->bld", states, c)
        return y + u * self.skip[...]


class MambaLayer(nnx.Module):
    def __init__(self, d, n, width, expand, rngs):
        inner = expand * d
        self.scale = nnx.RMSNorm(d, epsilon=1e-5, rngs=rngs)
        self.up = nnx.Linear(d, 2 * inner, use_bias=False, rngs=rngs)
        self.conv = nnx.Conv(inner, inner, (width,), padding="CAUSAL", feature_group_count=inner, rngs=rngs)
        self.ssm = SelectiveSSM(inner, n, -(-d // 4), rngs)
        self.down = nnx.Linear(inner, d, use_bias=False, rngs=rngs)

    def __call__(self, x):
        u, gate = jnp.split(self.up(self.scale(x)), 2, axis=-1)
        u = nnx.silu(self.conv(u))
        y = self.ssm(u)
        return x + self.down(y * nnx.silu(gate))


class Mamba(nnx.Module):
    def __init__(self, vocab=19, d=12, depth=2, n=5, width=4, expand=2, *, rngs):
        self.table = nnx.Param(0.02 * jax.random.normal(rngs.params(), (vocab, d)))
        self.stack = nnx.List([MambaLayer(d, n, width, expand, rngs) for _ in range(depth)])
        self.last = nnx.RMSNorm(d, epsilon=1e-5, rngs=rngs)

    def __call__(self, ids):
        x = self.table[...][ids]
        for layer in self.stack:
            x = layer(x)
        return self.last(x) @ self.table[...].T


def from_torch(net, model):
    a = lambda t: jnp.asarray(t.detach().numpy())
    model.table[...] = a(net.embedding.weight)
    for dst, src in zip(model.stack, net.layers):
        m = src.mixer
        dst.scale.scale[...] = a(src.norm.weight)
        dst.up.kernel[...] = a(m.in_proj.weight).T
        dst.conv.kernel[...] = a(m.conv1d.weight).transpose(2, 1, 0)
        dst.conv.bias[...] = a(m.conv1d.bias)
        dst.ssm.to_params.kernel[...] = a(m.x_proj.weight).T
        dst.ssm.delta_kernel[...] = a(m.dt_proj.weight).T
        dst.ssm.delta_bias[...] = a(m.dt_proj.bias)
        dst.ssm.log_decay[...] = a(m.A_log)
        dst.ssm.skip[...] = a(m.D)
        dst.down.kernel[...] = a(m.out_proj.weight).T
    model.last.scale[...] = a(net.norm_f.weight)
    return model


def build(seed):
    torch.manual_seed(seed)
    net = MambaLM().eval()
    with torch.no_grad():
        for n, p in net.named_parameters():
            if n.endswith("A_log"):
                p.add_(0.3 * torch.randn_like(p))
            elif "norm" in n or n.endswith(".D"):
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(0, 0.4)
    ids = torch.randint(0, 19, (2, 9)).numpy()
    return {"torch": net, "flax": from_torch(net, Mamba(rngs=nnx.Rngs(0))), "inputs": ids}


FAULTS = [
    {
        "title": "bias of delta added after the softplus",
        "edits": [("jax.nn.softplus(delta @ self.delta_kernel[...] + self.delta_bias[...])",
                   "jax.nn.softplus(delta @ self.delta_kernel[...]) + self.delta_bias[...]")],
        "layers": ["layers.0.mixer.dt_proj", "layers.0.mixer"],
        "between": ("layers.0.mixer.x_proj", "layers.0.mixer.out_proj"),
        "causes": ["order"],
        "level": "outputs",
    },
    {
        "title": "depthwise conv padded SAME: it looks ahead",
        "edits": [("padding=\"CAUSAL\"", "padding=\"SAME\"")],
        "layers": ["layers.0.mixer.conv1d"],
        "between": ("layers.0.mixer.in_proj", "layers.0.mixer.x_proj"),
        "causes": ["padding", "causal"],
        "level": "outputs",
    },
    {
        "title": "B discretised by zero-order hold, torch has plain delta * B",
        "edits": [("        drive = jnp.einsum(\"bld,bln,bld->bldn\", delta, b, u)\n",
                   "        drive = jnp.einsum(\"bldn,bln,bld->bldn\", (decay - 1) / a, b, u)\n")],
        "layers": ["layers.0.mixer"],
        "between": ("layers.0.mixer.dt_proj", "layers.0.mixer.out_proj"),
        "causes": ["operation"],
        "level": "outputs",
    },
    {
        "title": "head has its own kernel, a copy of the embedding",
        "edits": [("        self.last = nnx.RMSNorm(d, epsilon=1e-5, rngs=rngs)\n\n    def __call__(self, ids):",
                   "        self.last = nnx.RMSNorm(d, epsilon=1e-5, rngs=rngs)\n        self.head = nnx.Linear(d, vocab, use_bias=False, rngs=rngs)\n\n    def __call__(self, ids):"),
                  ("self.last(x) @ self.table[...].T", "self.head(self.last(x))"),
                  ("    model.last.scale[...] = a(net.norm_f.weight)\n", "    model.last.scale[...] = a(net.norm_f.weight)\n    model.head.kernel[...] = a(net.lm_head.weight).T\n")],
        "layers": ["lm_head", "embedding"],
        "causes": ["tied"],
        "level": "gradients",
    },
    {
        "title": "skip D and the scan's output gated separately: D's term is left ungated",
        "edits": [("        return y + u * self.skip[...]\n", "        return y\n"),
                  ("return x + self.down(y * nnx.silu(gate))", "return x + self.down(y * nnx.silu(gate) + u * self.ssm.skip[...])")],
        "layers": ["layers.0.mixer"],
        "between": ("layers.0.mixer.dt_proj", "layers.0.mixer.out_proj"),
        "causes": ["order", "wiring"],
        "level": "outputs",
    },
]
