"""A neural ODE image classifier: strided stem, RK4 over a conv field that sees the time, group norms, pooled head."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class ConcatConv2d(nn.Module):
    """The time joins as the first channel."""

    def __init__(self, cin, cout):
        super().__init__()
        self.layer = nn.Conv2d(cin + 1, cout, 3, padding=1)

    def forward(self, t, x):
        return self.layer(torch.cat([torch.ones_like(x[:, :1]) * t, x], dim=1))


class ODEFunc(nn.Module):
    def __init__(self, dim, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, dim)
        self.conv1 = ConcatConv2d(dim, dim)
        self.norm2 = nn.GroupNorm(groups, dim)
        self.conv2 = ConcatConv2d(dim, dim)
        self.norm3 = nn.GroupNorm(groups, dim)

    def forward(self, t, x):
        h = self.conv1(t, F.softplus(self.norm1(x)))
        return self.norm3(self.conv2(t, F.softplus(self.norm2(h))))


class ODEBlock(nn.Module):
    def __init__(self, func, steps, t1=1.0):
        super().__init__()
        self.odefunc, self.steps, self.t1 = func, steps, t1

    def forward(self, x):
        dt = self.t1 / self.steps
        for i in range(self.steps):
            t = i * dt
            k1 = self.odefunc(t, x)
            k2 = self.odefunc(t + dt / 3, x + dt * k1 / 3)
            k3 = self.odefunc(t + dt * 2 / 3, x + dt * (k2 - k1 / 3))
            k4 = self.odefunc(t + dt, x + dt * (k1 - k2 + k3))
            x = x + (k1 + 3 * (k2 + k3) + k4) * dt / 8
        return x


class ODENet(nn.Module):
    def __init__(self, dim=6, groups=3, classes=4, steps=2):
        super().__init__()
        self.downsample = nn.Sequential(nn.Conv2d(2, dim, 3), nn.GroupNorm(groups, dim), nn.ReLU(), nn.Conv2d(dim, dim, 4, 2, 1))
        self.feature = ODEBlock(ODEFunc(dim, groups), steps)
        self.norm = nn.GroupNorm(groups, dim)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(dim, classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.feature(self.downsample(x))))
        return self.fc(self.pool(x).flatten(1))


# In JAX: parameters in a dict, images NHWC ------------------------------------


def conv(p, x, stride=1, padding=0):
    out = jax.lax.conv_general_dilated(
        x, p["kernel"], (stride, stride), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return out + p["bias"]


def group_norm(p, x, groups, eps=1e-5):
    b, h, w, c = x.shape
    g = x.reshape(b, h * w, groups, c // groups)
    mean = g.mean((1, 3), keepdims=True)
    var = ((g - mean) ** 2).mean((1, 3), keepdims=True)
    return ((g - mean) / jnp.sqrt(var + eps)).reshape(x.shape) * p["scale"] + p["bias"]


def vector_field(p, t, x, groups):
    def timed(q, h):
        clock = jnp.broadcast_to(jnp.asarray(t, h.dtype), h[..., :1].shape)
        return conv(q, jnp.concatenate([clock, h], axis=-1), padding=1)

    h = timed(p["conv1"], jax.nn.softplus(group_norm(p["norm1"], x, groups)))
    h = timed(p["conv2"], jax.nn.softplus(group_norm(p["norm2"], h, groups)))
    return group_norm(p["norm3"], h, groups)


def integrate(f, x, steps, end=1.0):
    """Fourth order with the 3/8 rule, fixed steps."""
    dt = end / steps

    def step(x, t):
        k1 = f(t, x)
        k2 = f(t + dt / 3, x + dt * k1 / 3)
        k3 = f(t + 2 * dt / 3, x + dt * (k2 - k1 / 3))
        k4 = f(t + dt, x + dt * (k1 - k2 + k3))
        return x + dt * (k1 + 3 * k2 + 3 * k3 + k4) / 8, None

    times = jnp.arange(steps, dtype=x.dtype) * dt
    return jax.lax.scan(step, x, times)[0]


def ode_net(params, image, groups=3, steps=2):
    h = conv(params["stem0"], image)
    h = jax.nn.relu(group_norm(params["stem_norm"], h, groups))
    h = conv(params["stem1"], h, stride=2, padding=1)
    h = integrate(lambda t, x: vector_field(params["field"], t, x, groups), h, steps)
    h = jax.nn.relu(group_norm(params["norm"], h, groups)).mean((1, 2))
    return h @ params["fc"]["kernel"] + params["fc"]["bias"]


def port(sd):
    c = lambda k: {"kernel": jnp.asarray(sd[k + ".weight"].transpose(2, 3, 1, 0)), "bias": jnp.asarray(sd[k + ".bias"])}
    n = lambda k: {"scale": jnp.asarray(sd[k + ".weight"]), "bias": jnp.asarray(sd[k + ".bias"])}
    f = "feature.odefunc."
    field = {"norm1": n(f + "norm1"), "norm2": n(f + "norm2"), "norm3": n(f + "norm3"),
             "conv1": c(f + "conv1.layer"), "conv2": c(f + "conv2.layer")}
    return {"stem0": c("downsample.0"), "stem_norm": n("downsample.1"), "stem1": c("downsample.3"), "field": field,
            "norm": n("norm"), "fc": {"kernel": jnp.asarray(sd["fc.weight"].T), "bias": jnp.asarray(sd["fc.bias"])}}


def build(seed):
    torch.manual_seed(seed)
    net = ODENet().eval()
    for name, p in net.named_parameters():
        p.data.uniform_(0.5, 1.5) if "norm" in name and name.endswith("weight") else p.data.normal_(0, 0.35)
    image = np.random.default_rng(seed).normal(size=(2, 2, 10, 12)).astype(np.float32)
    params = port({k: v.numpy() for k, v in net.state_dict().items()})
    return {"torch": net, "flax": (ode_net, params), "inputs": (image,), "flax_inputs": (image.transpose(0, 2, 3, 1),)}


FAULTS = [
    {
        "title": "the classic Runge-Kutta rule: weights 1 2 2 1 over six at the same four points",
        "edits": [("dt * (k1 + 3 * k2 + 3 * k3 + k4) / 8", "dt * (k1 + 2 * k2 + 2 * k3 + k4) / 6")],
        "layers": ["feature"],
        "between": ("feature.odefunc.norm3", "norm"),
        "causes": ["constant", "scale"],
        "level": "outputs",
    },
    {
        "title": "time joined as the last channel",
        "edits": [("jnp.concatenate([clock, h], axis=-1)", "jnp.concatenate([h, clock], axis=-1)")],
        "layers": ["feature.odefunc.conv1"],
        "between": ("feature.odefunc.norm1", "feature.odefunc.conv1.layer"),
        "causes": ["concat", "permuted", "swapped"],
        "level": "outputs",
    },
    {
        "title": "times of the steps not multiplied by the step",
        "edits": [("times = jnp.arange(steps, dtype=x.dtype) * dt", "times = jnp.arange(steps, dtype=x.dtype)")],
        "layers": ["feature"],
        "between": ("downsample.3", "feature.odefunc.conv1.layer"),
        "causes": ["scale", "left_out"],
        "level": "outputs",
    },
    {
        "title": "groups made of every third channel",
        "edits": [("    g = x.reshape(b, h * w, groups, c // groups)\n    mean = g.mean((1, 3), keepdims=True)\n    var = ((g - mean) ** 2).mean((1, 3), keepdims=True)\n",
                   "    g = x.reshape(b, h * w, c // groups, groups)\n    mean = g.mean((1, 2), keepdims=True)\n    var = ((g - mean) ** 2).mean((1, 2), keepdims=True)\n")],
        "layers": ["downsample.1"],
        "causes": ["groups", "rearranged"],
        "level": "outputs",
    },
    {
        "title": "the second norm of the field loaded from the third and the third from the second",
        "edits": [("\"norm2\": n(f + \"norm2\"), \"norm3\": n(f + \"norm3\")", "\"norm2\": n(f + \"norm3\"), \"norm3\": n(f + \"norm2\")")],
        "layers": ["feature.odefunc.norm2"],
        "causes": ["swapped"],
        "level": "outputs",
    },
]
