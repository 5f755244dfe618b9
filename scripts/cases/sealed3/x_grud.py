"""GRU-D: irregular clinical series with missing values; decays of inputs and states; class and next values."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn


class FilterLinear(nn.Module):
    """A linear layer whose weight is diagonal."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return x * self.weight + self.bias


class GRUDCell(nn.Module):
    def __init__(self, size, hidden):
        super().__init__()
        self.gamma_x_l = FilterLinear(size)
        self.gamma_h_l = nn.Linear(size, hidden)
        self.zl = nn.Linear(2 * size + hidden, hidden)
        self.rl = nn.Linear(2 * size + hidden, hidden)
        self.hl = nn.Linear(2 * size + hidden, hidden)

    def forward(self, x, x_last, x_mean, h, mask, delta):
        delta_x = torch.exp(-torch.relu(self.gamma_x_l(delta)))
        delta_h = torch.exp(-torch.relu(self.gamma_h_l(delta)))
        x = mask * x + (1 - mask) * (delta_x * x_last + (1 - delta_x) * x_mean)
        h = delta_h * h
        combined = torch.cat((x, h, mask), 1)
        z = torch.sigmoid(self.zl(combined))
        r = torch.sigmoid(self.rl(combined))
        h_tilde = torch.tanh(self.hl(torch.cat((x, r * h, mask), 1)))
        return (1 - z) * h + z * h_tilde


class GRUD(nn.Module):
    def __init__(self, size=4, hidden=6, classes=3):
        super().__init__()
        self.hidden = hidden
        self.register_buffer("x_mean", torch.zeros(size))
        self.cell = GRUDCell(size, hidden)
        self.fc = nn.Linear(hidden, classes)
        self.forecast = nn.Linear(hidden, size)

    def deltas(self, mask, times):
        out = [torch.zeros_like(mask[:, 0])]
        for t in range(1, mask.shape[1]):
            gap = (times[:, t] - times[:, t - 1])[:, None]
            out.append(gap + (1 - mask[:, t - 1]) * out[-1])
        return torch.stack(out, dim=1)

    def forward(self, x, mask, times, lengths):
        delta = self.deltas(mask, times)
        h = x.new_zeros(x.shape[0], self.hidden)
        last = torch.zeros_like(x[:, 0])
        states = []
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], last, self.x_mean, h, mask[:, t], delta[:, t])
            last = mask[:, t] * x[:, t] + (1 - mask[:, t]) * last
            states.append(h)
        states = torch.stack(states, dim=1)
        final = states[torch.arange(x.shape[0]), lengths - 1]
        return self.fc(final).log_softmax(-1), self.forecast(states)


# JAX: functions; time goes first in the scans ==============================================


def dense(p, x):
    return jnp.matmul(x, p["kernel"]) + p["bias"]


def intervals(times, seen):
    """Time since each variable was last observed, [time, batch, variable]."""
    def step(delta, inputs):
        gap, was_seen = inputs
        delta = gap[:, None] + (1.0 - was_seen) * delta
        return delta, delta

    first = jnp.zeros_like(seen[0])
    _, rest = jax.lax.scan(step, first, (jnp.diff(times, axis=0), seen[:-1]))
    return jnp.concatenate([first[None], rest], axis=0)


def last_observed(x, seen):
    """The value observed last before each step."""
    def step(last, inputs):
        value, m = inputs
        return jnp.where(m > 0, value, last), last

    return jax.lax.scan(step, jnp.zeros_like(x[0]), (x, seen))[1]


def gate(p, x, h, m):
    return dense(p, jnp.concatenate([x, h, m], axis=-1))


def cell(p, mean, h, inputs):
    x, m, delta, last = inputs
    keep_x = jnp.exp(-jax.nn.relu(p["decay_x"]["scale"] * delta + p["decay_x"]["bias"]))
    keep_h = jnp.exp(-jax.nn.relu(dense(p["decay_h"], delta)))
    imputed = keep_x * last + (1.0 - keep_x) * mean
    x = jnp.where(m > 0, x, imputed)
    h = keep_h * h
    update, reset = jax.nn.sigmoid(gate(p["update"], x, h, m)), jax.nn.sigmoid(gate(p["reset"], x, h, m))
    new = jnp.tanh(gate(p["candidate"], x, reset * h, m))
    return h + update * (new - h)


def apply(params, x, mask, times, lengths):
    x, seen, times = jnp.moveaxis(x, 1, 0), jnp.moveaxis(mask, 1, 0), times.T
    delta, last = intervals(times, seen), last_observed(x, seen)
    mean = jax.lax.stop_gradient(params["mean"])

    def step(h, inputs):
        h = cell(params["cell"], mean, h, inputs)
        return h, h

    h0 = jnp.zeros((x.shape[1], params["classes"]["kernel"].shape[0]), x.dtype)
    _, states = jax.lax.scan(step, h0, (x, seen, delta, last))
    final = jnp.take_along_axis(states, (lengths - 1)[None, :, None], axis=0)[0]
    return jax.nn.log_softmax(dense(params["classes"], final)), jnp.moveaxis(dense(params["values"], states), 0, 1)


def weights(net):
    f = lambda t: jnp.asarray(t.detach().numpy())
    lin = lambda m: {"kernel": f(m.weight).T, "bias": f(m.bias)}
    c = net.cell
    return {
        "mean": f(net.x_mean),
        "cell": {"decay_x": {"scale": f(c.gamma_x_l.weight), "bias": f(c.gamma_x_l.bias)}, "decay_h": lin(c.gamma_h_l),
                 "update": lin(c.zl), "reset": lin(c.rl), "candidate": lin(c.hl)},
        "classes": lin(net.fc),
        "values": lin(net.forecast),
    }


def build(seed):
    torch.manual_seed(seed)
    net = GRUD().eval()
    for p in net.parameters():
        p.data.normal_(0, 0.6)
    net.cell.gamma_x_l.bias.data.uniform_(0.1, 0.5)
    net.cell.gamma_h_l.weight.data.normal_(0.06, 0.12)
    net.cell.gamma_h_l.bias.data.normal_(0.1, 0.3)
    net.x_mean.normal_(0.5, 0.8)
    rng = np.random.default_rng(seed)
    mask = (rng.random((5, 9, 4)) < 0.55).astype(np.float32)
    x = rng.normal(size=(5, 9, 4)).astype(np.float32) * mask
    times = np.cumsum(rng.uniform(0.2, 1.2, (5, 9)), axis=1).astype(np.float32)
    return {"torch": net, "flax": (apply, weights(net)), "inputs": (x, mask, times, np.array([9, 7, 4, 8, 6]))}


FAULTS = [
    {
        "title": "time since the last observation restarts by the mask of this step, not of the one before",
        "edits": [("(jnp.diff(times, axis=0), seen[:-1])", "(jnp.diff(times, axis=0), seen[1:])")],
        "layers": ["", "cell", "cell.gamma_x_l"],
        "causes": ["offset", "token", "mask", "operand"],
        "level": "outputs",
    },
    {
        "title": "update gate keeps the old state, as in nn.GRU",
        "edits": [("    return h + update * (new - h)", "    return new + update * (h - new)")],
        "layers": ["cell"],
        "between": ("cell.hl", "cell.gamma_x_l"),
        "causes": ["gru_update", "swapped", "gates"],
        "level": "outputs",
    },
    {
        "title": "the state's decay is not clamped at zero before the exponential",
        "edits": [("keep_h = jnp.exp(-jax.nn.relu(dense(p[\"decay_h\"], delta)))", "keep_h = jnp.exp(-dense(p[\"decay_h\"], delta))")],
        "layers": ["cell", "cell.gamma_h_l"],
        "between": ("cell.gamma_h_l", "cell.zl"),
        "causes": ["missing_layer", "left_out", "activation"],
        "level": "outputs",
    },
    {
        "title": "no gradient through time: the carried state is detached",
        "edits": [("    h = keep_h * h\n", "    h = keep_h * jax.lax.stop_gradient(h)\n")],
        "layers": ["cell"],
        "between": ("cell.gamma_h_l", "cell.zl"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "inputs of the gates joined as value, mask, state",
        "edits": [("    return dense(p, jnp.concatenate([x, h, m], axis=-1))", "    return dense(p, jnp.concatenate([x, m, h], axis=-1))")],
        "layers": ["cell", "cell.zl", "cell.rl", "cell.hl"],
        "between": ("cell.gamma_h_l", "cell.zl"),
        "causes": ["concat", "blocks", "order", "rearranged"],
        "level": "outputs",
    },
]
