"""N-BEATS (trend, seasonality, generic stacks with doubly residual links) against functional JAX."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F


class TrendBasis(torch.nn.Module):
    def __init__(self, degree, backcast_size, forecast_size):
        super().__init__()
        self.n = degree + 1
        back = torch.arange(backcast_size, dtype=torch.float64) / backcast_size
        fore = torch.arange(forecast_size, dtype=torch.float64) / forecast_size
        self.register_buffer("backcast_time", torch.stack([back ** i for i in range(self.n)]))
        self.register_buffer("forecast_time", torch.stack([fore ** i for i in range(self.n)]))

    def forward(self, theta):
        backcast = torch.einsum("bp,pt->bt", theta[:, self.n:], self.backcast_time)
        forecast = torch.einsum("bp,pt->bt", theta[:, :self.n], self.forecast_time)
        return backcast, forecast


class SeasonalityBasis(torch.nn.Module):
    def __init__(self, harmonics, backcast_size, forecast_size):
        super().__init__()
        self.harmonics = harmonics
        freq = torch.arange(1, harmonics + 1, dtype=torch.float64)[:, None]
        back = -2 * np.pi * (torch.arange(backcast_size, dtype=torch.float64)[None] / forecast_size) * freq
        fore = 2 * np.pi * (torch.arange(forecast_size, dtype=torch.float64)[None] / forecast_size) * freq
        self.register_buffer("back_cos", back.cos())
        self.register_buffer("back_sin", back.sin())
        self.register_buffer("fore_cos", fore.cos())
        self.register_buffer("fore_sin", fore.sin())

    def forward(self, theta):
        bc, bs, fc, fs = theta.chunk(4, dim=1)
        return bc @ self.back_cos + bs @ self.back_sin, fc @ self.fore_cos + fs @ self.fore_sin


class GenericBasis(torch.nn.Module):
    def __init__(self, backcast_size):
        super().__init__()
        self.backcast_size = backcast_size

    def forward(self, theta):
        return theta[:, :self.backcast_size], theta[:, self.backcast_size:]


class NBeatsBlock(torch.nn.Module):
    def __init__(self, input_size, theta_size, basis, depth, width):
        super().__init__()
        sizes = [input_size] + [width] * depth
        self.layers = torch.nn.ModuleList([torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])])
        self.basis_parameters = torch.nn.Linear(width, theta_size)
        self.basis = basis

    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.basis(self.basis_parameters(x))


class NBeats(torch.nn.Module):
    def __init__(self, lookback, horizon, degree, harmonics, depth, width):
        super().__init__()
        self.blocks = torch.nn.ModuleList([
            NBeatsBlock(lookback, 2 * (degree + 1), TrendBasis(degree, lookback, horizon), depth, width),
            NBeatsBlock(lookback, 4 * harmonics, SeasonalityBasis(harmonics, lookback, horizon), depth, width),
            NBeatsBlock(lookback, lookback + horizon, GenericBasis(lookback), depth, width),
        ])

    def forward(self, x, input_mask):
        residuals = x.flip(dims=(1,))
        input_mask = input_mask.flip(dims=(1,))
        forecast = x[:, -1:]
        for block in self.blocks:
            backcast, block_forecast = block(residuals)
            residuals = (residuals - backcast) * input_mask
            forecast = forecast + block_forecast
        return forecast, residuals


# ------------------------------------------------------------------ JAX

HARMONICS, DEGREE = 3, 2


def trend_basis(theta, lookback, horizon):
    powers = jnp.arange(DEGREE + 1)[:, None]
    t_back = (jnp.arange(lookback) / lookback)[None, :] ** powers
    t_fore = (jnp.arange(horizon) / horizon)[None, :] ** powers
    p_fore, p_back = jnp.split(theta, 2, axis=-1)
    return p_back @ t_back, p_fore @ t_fore


def seasonality_basis(theta, lookback, horizon):
    k = jnp.arange(1, HARMONICS + 1)[:, None]
    phase_back = -2 * jnp.pi * k * jnp.arange(lookback) / horizon
    phase_fore = 2 * jnp.pi * k * jnp.arange(horizon) / horizon
    waves_back = jnp.concatenate([jnp.cos(phase_back), jnp.sin(phase_back)])
    waves_fore = jnp.concatenate([jnp.cos(phase_fore), jnp.sin(phase_fore)])
    half = 2 * HARMONICS
    return theta[:, :half] @ waves_back, theta[:, half:] @ waves_fore


def generic_basis(theta, lookback, horizon):
    del horizon
    return theta[:, :lookback], theta[:, lookback:]


BASES = {"trend": trend_basis, "seasonality": seasonality_basis, "generic": generic_basis}
STACK = ("trend", "seasonality", "generic")


def affine(p, x):
    return jnp.dot(x, p["w"]) + p["b"]


def block_apply(p, kind, h, lookback, horizon):
    for i in range(len(p["fc"])):
        h = jax.nn.relu(affine(p["fc"][str(i)], h))
    theta = affine(p["theta"], h)
    return BASES[kind](theta, lookback, horizon)


def make_apply(horizon):
    def apply(params, x, input_mask):
        lookback = x.shape[1]
        level = x[:, -1:]
        res = jnp.flip(x, axis=1)
        mask = jnp.flip(input_mask, axis=1)
        out = jnp.broadcast_to(level, (x.shape[0], horizon))
        for kind in STACK:
            back, fore = block_apply(params[kind], kind, res, lookback, horizon)
            res = (res - back) * mask
            out = out + fore
        return out, res

    return apply


def port(net):
    def lin(m):
        return {"w": jnp.asarray(m.weight.detach().numpy().T), "b": jnp.asarray(m.bias.detach().numpy())}

    return {
        kind: {"fc": {str(i): lin(m) for i, m in enumerate(block.layers)}, "theta": lin(block.basis_parameters)}
        for kind, block in zip(STACK, net.blocks)
    }


def build(seed):
    torch.manual_seed(seed)
    net = NBeats(lookback=11, horizon=5, degree=DEGREE, harmonics=HARMONICS, depth=2, width=16).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.3)
    rng = np.random.default_rng(seed)
    x = rng.normal(1.0, 1.0, size=(3, 11))
    mask = (rng.random((3, 11)) > 0.2).astype(np.float64)
    mask[:, 2] = 0.0
    flax_params = port(net)
    return {"torch": net, "flax": (make_apply(5), flax_params), "inputs": (x, mask)}


FAULTS = [
    {
        "title": "the window is not reversed before the first block",
        "edits": [("res = jnp.flip(x, axis=1)", "res = x")],
        "layers": [""],
        "between": (None, "blocks.0.layers.0"),
        "causes": ["reversed", "left_out"],
        "level": "outputs",
    },
    {
        "title": "level of the forecast read from the already reversed window",
        "edits": [
            ("        level = x[:, -1:]\n", ""),
            ("        mask = jnp.flip(input_mask, axis=1)\n", "        mask = jnp.flip(input_mask, axis=1)\n        level = res[:, -1:]\n"),
        ],
        "layers": [""],
        "between": (None, "blocks.0.layers.0"),
        "causes": ["token", "operand", "reversed"],
        "level": "outputs",
    },
    {
        "title": "time grid of the trend is a linspace that includes the end",
        "edits": [("(jnp.arange(lookback) / lookback)", "jnp.linspace(0.0, 1.0, lookback)"),
                  ("(jnp.arange(horizon) / horizon)", "jnp.linspace(0.0, 1.0, horizon)")],
        "layers": ["blocks.0.basis"],
        "between": ("blocks.0.basis_parameters", "blocks.1.layers.0"),
        "causes": ["constant"],
        "level": "outputs",
    },
    {
        "title": "harmonics counted from 0",
        "edits": [("jnp.arange(1, HARMONICS + 1)", "jnp.arange(HARMONICS)")],
        "layers": ["blocks.1.basis"],
        "between": ("blocks.1.basis_parameters", "blocks.2.layers.0"),
        "causes": ["offset", "constant"],
        "level": "outputs",
    },
    {
        "title": "only the backcast is masked, not the whole residual",
        "edits": [("res = (res - back) * mask", "res = res - back * mask")],
        "layers": [""],
        "between": ("blocks.0.basis_parameters", "blocks.1.layers.0"),
        "causes": ["order", "mask"],
        "level": "outputs",
    },
    {
        "title": "backcast treated as a constant in the residual",
        "edits": [("res = (res - back) * mask", "res = (res - jax.lax.stop_gradient(back)) * mask")],
        "layers": [""],
        "between": ("blocks.0.basis_parameters", "blocks.1.layers.0"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "last fully connected layer of a block left linear",
        "edits": [(
            "        h = jax.nn.relu(affine(p[\"fc\"][str(i)], h))\n",
            "        h = affine(p[\"fc\"][str(i)], h)\n        h = jax.nn.relu(h) if i < len(p[\"fc\"]) - 1 else h\n",
        )],
        "layers": ["blocks.0"],
        "between": ("blocks.0.layers.1", "blocks.0.basis_parameters"),
        "causes": ["missing_layer", "activation", "left_out"],
        "level": "outputs",
    },
    {
        "title": "backcast and forecast halves of the trend's theta exchanged",
        "edits": [("p_fore, p_back = jnp.split", "p_back, p_fore = jnp.split")],
        "layers": ["blocks.0.basis"],
        "between": ("blocks.0.basis_parameters", "blocks.1.layers.0"),
        "causes": ["blocks", "swapped"],
        "level": "outputs",
    },
]
