"""N-HiTS (blocks with pooling, backcast residuals, interpolated forecasts, reversible normalisation) and plain JAX functions."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch

BATCH, INPUT_SIZE, H = 3, 13, 8
POOL_KERNELS = (5, 3, 2)
FREQ_DOWNSAMPLE = (4, 2, 1)
MLP_UNITS = ((11, 9), (9, 10))


# ------------------------------------------------------------------ PyTorch


class RevIN(torch.nn.Module):
    """Reversible instance normalisation; its statistics are detached, as in the paper's code."""

    def __init__(self, eps=1e-3):
        super().__init__()
        self.eps = eps
        self.affine_weight = torch.nn.Parameter(torch.ones(1))
        self.affine_bias = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, mask):
        count = mask.sum(dim=1, keepdim=True)
        mean = ((x * mask).sum(dim=1, keepdim=True) / count).detach()
        var = (((x - mean) ** 2 * mask).sum(dim=1, keepdim=True) / count).detach()
        stdev = torch.sqrt(var + self.eps)
        return (x - mean) / stdev * self.affine_weight + self.affine_bias, mean, stdev

    def inverse(self, x, mean, stdev):
        return (x - self.affine_bias) / (self.affine_weight + self.eps * self.eps) * stdev + mean


class _IdentityBasis(torch.nn.Module):
    def __init__(self, backcast_size, forecast_size, interpolation_mode="linear"):
        super().__init__()
        self.backcast_size, self.forecast_size = backcast_size, forecast_size
        self.interpolation_mode = interpolation_mode

    def forward(self, theta):
        backcast = theta[:, : self.backcast_size]
        knots = theta[:, self.backcast_size:]
        forecast = torch.nn.functional.interpolate(knots[:, None, :], size=self.forecast_size, mode=self.interpolation_mode)
        return backcast, forecast[:, 0, :]


class NHITSBlock(torch.nn.Module):
    def __init__(self, input_size, h, n_theta, mlp_units, basis, n_pool_kernel_size):
        super().__init__()
        pooled = math.ceil(input_size / n_pool_kernel_size)
        self.pooling_layer = torch.nn.MaxPool1d(n_pool_kernel_size, stride=n_pool_kernel_size, ceil_mode=True)
        hidden = [torch.nn.Linear(pooled, mlp_units[0][0])]
        for fan_in, fan_out in mlp_units:
            hidden += [torch.nn.Linear(fan_in, fan_out), torch.nn.ReLU()]
        self.layers = torch.nn.Sequential(*hidden, torch.nn.Linear(mlp_units[-1][1], n_theta))
        self.basis = basis

    def forward(self, insample_y):
        y = self.pooling_layer(insample_y.unsqueeze(1)).squeeze(1)
        return self.basis(self.layers(y))


class NHITS(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.revin = RevIN()
        self.blocks = torch.nn.ModuleList()
        for kernel, freq in zip(POOL_KERNELS, FREQ_DOWNSAMPLE):
            n_theta = INPUT_SIZE + max(H // freq, 1)
            self.blocks.append(NHITSBlock(INPUT_SIZE, H, n_theta, MLP_UNITS, _IdentityBasis(INPUT_SIZE, H), kernel))

    def forward(self, insample_y, insample_mask):
        insample_mask = insample_mask.to(insample_y.dtype)
        y, mean, stdev = self.revin(insample_y, insample_mask)
        residuals = y.flip(dims=(-1,))
        insample_mask = insample_mask.flip(dims=(-1,))
        forecast = y[:, -1:]  # level with Naive1
        for block in self.blocks:
            backcast, block_forecast = block(residuals)
            residuals = (residuals - backcast) * insample_mask
            forecast = forecast + block_forecast
        return self.revin.inverse(forecast, mean, stdev)


# ------------------------------------------------------------------ JAX


def masked_moments(series, seen):
    """Mean and variance of the observed steps, treated as constants."""
    total = jnp.sum(seen, axis=1, keepdims=True)
    mean = jax.lax.stop_gradient(jnp.sum(series * seen, axis=1, keepdims=True) / total)
    var = jax.lax.stop_gradient(jnp.sum(jnp.square(series - mean) * seen, axis=1, keepdims=True) / total)
    return mean, var


def pool_max(series, kernel):
    """Non-overlapping maxima; the last window may be shorter."""
    short = -series.shape[1] % kernel
    padded = jnp.pad(series, ((0, 0), (0, short)), constant_values=-jnp.inf)
    return padded.reshape(series.shape[0], -1, kernel).max(axis=-1)


def stretch(knots, length):
    """Linear interpolation of a few knots to `length` steps, pixel centres aligned."""
    n = knots.shape[1]
    where = (jnp.arange(length, dtype=knots.dtype) + 0.5) * n / length - 0.5
    where = jnp.clip(where, 0, n - 1)
    left = jnp.floor(where).astype(int)
    right = jnp.minimum(left + 1, n - 1)
    part = where - left
    return knots[:, left] * (1 - part) + knots[:, right] * part


def mlp(layers, x):
    """First layer linear, then rectified ones; the last one is linear again."""
    first, *middle, last = layers
    x = x @ first["w"] + first["b"]
    for layer in middle:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def forecaster(params, series, seen):
    gain, shift = params["normaliser"]["gain"], params["normaliser"]["shift"]
    eps = 1e-3
    seen = seen.astype(series.dtype)
    mean, var = masked_moments(series, seen)
    spread = jnp.sqrt(var + eps)
    level = (series - mean) / spread * gain + shift
    rest = level[:, ::-1]
    total = level[:, -1:]
    for layers, kernel in zip(params["stacks"], POOL_KERNELS):
        theta = mlp(layers, pool_max(rest, kernel))
        back, knots = jnp.split(theta, [INPUT_SIZE], axis=1)
        rest = (rest - back) * seen[:, ::-1]
        total = total + stretch(knots, H)
    return (total - shift) / (gain + eps ** 2) * spread + mean


# ------------------------------------------------------------------ weights


def port(net):
    def dense(linear):
        return {"w": jnp.asarray(linear.weight.detach().numpy().T), "b": jnp.asarray(linear.bias.detach().numpy())}

    return {
        "normaliser": {"gain": jnp.asarray(net.revin.affine_weight.detach().numpy()),
                       "shift": jnp.asarray(net.revin.affine_bias.detach().numpy())},
        "stacks": [[dense(m) for m in block.layers if isinstance(m, torch.nn.Linear)] for block in net.blocks],
    }


def build(seed):
    torch.manual_seed(seed)
    net = NHITS().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name == "revin.affine_weight":
                p.copy_(1.2 + 0.2 * torch.rand(p.shape))
            elif p.ndim == 1:
                p.copy_(0.4 * torch.randn(p.shape))
            else:
                p.copy_(torch.randn(p.shape) * math.sqrt(1.6 / p.shape[1]))
    rng = np.random.default_rng(seed)
    y = (rng.standard_normal((BATCH, INPUT_SIZE)) * 1.5 + rng.standard_normal((BATCH, 1)) * 2).astype(np.float32)
    mask = np.ones((BATCH, INPUT_SIZE), bool)
    mask[0, :4] = False
    mask[1, [0, 1, 6]] = False
    return {"torch": net, "flax": (forecaster, port(net)), "inputs": (y, mask)}


FAULTS = [
    {"title": "the shorter window of the pool is the first one, not the last: the padding stands at the front",
     "edits": [("jnp.pad(series, ((0, 0), (0, short)), constant", "jnp.pad(series, ((0, 0), (short, 0)), constant")],
     "layers": [f"blocks.{i}.pooling_layer" for i in range(3)],
     "between": ("revin", "blocks.0.layers"),
     "causes": ["pooling", "padding"], "level": "outputs"},
    {"title": "the knots are interpolated with aligned corners, where torch aligns the centres",
     "edits": [("where = (jnp.arange(length, dtype=knots.dtype) + 0.5) * n / length - 0.5",
                "where = jnp.arange(length, dtype=knots.dtype) * (n - 1) / (length - 1)")],
     "layers": [f"blocks.{i}.basis" for i in range(3)],
     "between": ("blocks.0.layers", "the output"),
     "causes": ["operation", "offset", "constant"], "level": "outputs"},
    {"title": "theta is split with the knots first, where torch has the backcast first",
     "edits": [("back, knots = jnp.split(theta, [INPUT_SIZE], axis=1)",
                "knots, back = jnp.split(theta, [theta.shape[1] - INPUT_SIZE], axis=1)")],
     "layers": [f"blocks.{i}.basis" for i in range(3)],
     "between": ("blocks.0.layers", "the output"),
     "causes": ["blocks", "concat", "order"], "level": "outputs"},
    {"title": "the mask of the residuals is not reversed with the series",
     "edits": [("rest = (rest - back) * seen[:, ::-1]", "rest = (rest - back) * seen")],
     "layers": [""],
     "between": ("blocks.0", "blocks.1"),
     "causes": ["reversed", "mask", "left_out"], "level": "outputs"},
    {"title": "the gradient goes through the variance of the normalisation, which torch detaches",
     "edits": [("var = jax.lax.stop_gradient(jnp.sum(jnp.square(series - mean) * seen, axis=1, keepdims=True) / total)",
                "var = jnp.sum(jnp.square(series - mean) * seen, axis=1, keepdims=True) / total")],
     "layers": ["revin"],
     "between": ("the input", "blocks.0"),
     "causes": ["stop_gradient"], "level": "gradients"},
]
