"""R2D2-like recurrent dueling C51 agent on images with an IMPALA encoder; Flax side is Linen, PureJaxRL style."""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F


class ResidualBlock(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.relu = torch.nn.ReLU(inplace=True)
        self.conv0 = torch.nn.Conv2d(channels, channels, 3, padding=1)
        self.conv1 = torch.nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        out = self.conv0(self.relu(x))
        out = self.conv1(self.relu(out))
        return out + x


class ConvSequence(torch.nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = torch.nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.max_pool2d = torch.nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.res0 = ResidualBlock(out_channels)
        self.res1 = ResidualBlock(out_channels)

    def forward(self, x):
        return self.res1(self.res0(self.max_pool2d(self.conv(x))))


class ImpalaEncoder(torch.nn.Module):
    def __init__(self, in_channels, channels, spatial, features):
        super().__init__()
        sizes = [in_channels, *channels]
        self.seqs = torch.nn.ModuleList([ConvSequence(a, b) for a, b in zip(sizes, sizes[1:])])
        self.fc = torch.nn.Linear(channels[-1] * spatial[0] * spatial[1], features)

    def forward(self, obs):
        x = obs / 255.0
        for seq in self.seqs:
            x = seq(x)
        x = torch.flatten(F.relu(x), start_dim=1)
        return F.relu(self.fc(x))


class RecurrentCore(torch.nn.Module):
    def __init__(self, in_dim, hidden, burn_in):
        super().__init__()
        self.burn_in = burn_in
        self.cell = torch.nn.GRUCell(in_dim, hidden)

    def forward(self, xs, done, h):
        outs = []
        for t in range(xs.shape[0]):
            if t == self.burn_in:
                h = h.detach()
            h = h * (~done[t])[:, None]
            h = self.cell(xs[t], h)
            outs.append(h)
        return torch.stack(outs), h


class DuelingHead(torch.nn.Module):
    def __init__(self, hidden, inner, num_actions, num_atoms):
        super().__init__()
        self.num_actions, self.num_atoms = num_actions, num_atoms
        self.value = torch.nn.Sequential(torch.nn.Linear(hidden, inner), torch.nn.ReLU(), torch.nn.Linear(inner, num_atoms))
        self.advantage = torch.nn.Sequential(
            torch.nn.Linear(hidden, inner), torch.nn.ReLU(), torch.nn.Linear(inner, num_actions * num_atoms)
        )

    def forward(self, h):
        v = self.value(h).unsqueeze(-2)
        a = self.advantage(h).view(*h.shape[:-1], self.num_actions, self.num_atoms)
        return F.log_softmax(v + a - a.mean(dim=-2, keepdim=True), dim=-1)


def signed_hyperbolic(x, eps=1e-2):
    return torch.sign(x) * (torch.sqrt(torch.abs(x) + 1) - 1) + eps * x


class R2D2(torch.nn.Module):
    def __init__(self, in_channels=3, channels=(6, 8), spatial=(3, 4), features=20, hidden=16, inner=18, num_actions=5, num_atoms=7, v_min=-4.0, v_max=10.0, burn_in=2):
        super().__init__()
        self.num_actions = num_actions
        self.encoder = ImpalaEncoder(in_channels, channels, spatial, features)
        self.core = RecurrentCore(features + num_actions + 1, hidden, burn_in)
        self.head = DuelingHead(hidden, inner, num_actions, num_atoms)
        self.register_buffer("support", torch.linspace(v_min, v_max, num_atoms, dtype=torch.float64))

    def forward(self, obs, prev_action, prev_reward, done, h0):
        t, b = obs.shape[:2]
        feats = self.encoder(obs.flatten(0, 1)).view(t, b, -1)
        one_hot = F.one_hot(prev_action, self.num_actions).to(feats.dtype)
        reward = signed_hyperbolic(prev_reward).unsqueeze(-1)
        hs, h = self.core(torch.cat([feats, one_hot, reward], dim=-1), done, h0)
        log_p = self.head(hs)
        q = (log_p.exp() * self.support).sum(-1)
        return q, log_p, h


# ---------------------------------------------------------------- Flax


class FlaxResidual(nn.Module):
    channels: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(x)
        y = nn.Conv(self.channels, (3, 3))(x)
        y = nn.relu(y)
        y = nn.Conv(self.channels, (3, 3))(y)
        return x + y


class FlaxImpala(nn.Module):
    channels: tuple = (6, 8)
    features: int = 20

    @nn.compact
    def __call__(self, x):
        x = x / 255.0
        for c in self.channels:
            x = nn.Conv(c, (3, 3))(x)
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
            x = FlaxResidual(c)(x)
            x = FlaxResidual(c)(x)
        x = nn.relu(x)
        x = x.reshape((x.shape[0], -1))
        return nn.relu(nn.Dense(self.features)(x))


class ScannedRNN(nn.Module):
    hidden: int

    @functools.partial(
        nn.scan, variable_broadcast="params", in_axes=0, out_axes=0, split_rngs={"params": False}
    )
    @nn.compact
    def __call__(self, carry, xs):
        ins, resets = xs
        carry = jnp.where(resets[:, None], jnp.zeros_like(carry), carry)
        new_carry, y = nn.GRUCell(features=self.hidden, name="GRUCell_0")(carry, ins)
        return new_carry, y


def value_rescale(x, eps=1e-2):
    return jnp.sign(x) * (jnp.sqrt(jnp.abs(x) + 1) - 1) + eps * x


class RecurrentC51(nn.Module):
    hidden: int = 16
    inner: int = 18
    num_actions: int = 5
    num_atoms: int = 7
    v_min: float = -4.0
    v_max: float = 10.0
    burn_in: int = 2

    @nn.compact
    def __call__(self, obs, prev_action, prev_reward, done, h0):
        t, b = obs.shape[:2]
        feats = FlaxImpala(name="torso")(obs.reshape((t * b,) + obs.shape[2:])).reshape(t, b, -1)
        one_hot = jax.nn.one_hot(prev_action, self.num_actions, dtype=feats.dtype)
        reward = value_rescale(prev_reward)[..., None]
        xs = jnp.concatenate([feats, one_hot, reward], axis=-1)

        rnn = ScannedRNN(self.hidden, name="rnn")
        h, warm = rnn(h0, (xs[: self.burn_in], done[: self.burn_in]))
        h = jax.lax.stop_gradient(h)
        h, rest = rnn(h, (xs[self.burn_in :], done[self.burn_in :]))
        hs = jnp.concatenate([warm, rest], axis=0)

        v = nn.Dense(self.num_atoms, name="value_out")(nn.relu(nn.Dense(self.inner, name="value_hidden")(hs)))
        a = nn.Dense(self.num_actions * self.num_atoms, name="adv_out")(nn.relu(nn.Dense(self.inner, name="adv_hidden")(hs)))
        a = a.reshape(t, b, self.num_actions, self.num_atoms)
        logits = v[..., None, :] + a - a.mean(axis=2, keepdims=True)
        log_p = nn.log_softmax(logits, axis=-1)
        atoms = jnp.linspace(self.v_min, self.v_max, self.num_atoms)
        q = jnp.sum(jnp.exp(log_p) * atoms, axis=-1)
        return q, log_p, h


def port(net):
    t = lambda w: jnp.asarray(w.detach().numpy())
    conv = lambda m: {"kernel": t(m.weight).transpose(2, 3, 1, 0), "bias": t(m.bias)}
    dense = lambda m: {"kernel": t(m.weight).T, "bias": t(m.bias)}

    torso = {}
    for i, seq in enumerate(net.encoder.seqs):
        torso[f"Conv_{i}"] = conv(seq.conv)
        for j, res in enumerate((seq.res0, seq.res1)):
            torso[f"FlaxResidual_{2 * i + j}"] = {"Conv_0": conv(res.conv0), "Conv_1": conv(res.conv1)}
    fc = net.encoder.fc
    w = t(fc.weight).reshape(-1, 8, 3, 4).transpose(0, 2, 3, 1)
    torso["Dense_0"] = {"kernel": w.reshape(w.shape[0], -1).T, "bias": t(fc.bias)}

    cell = net.core.cell
    w_ir, w_iz, w_in = jnp.split(t(cell.weight_ih), 3)
    w_hr, w_hz, w_hn = jnp.split(t(cell.weight_hh), 3)
    b_ir, b_iz, b_in = jnp.split(t(cell.bias_ih), 3)
    b_hr, b_hz, b_hn = jnp.split(t(cell.bias_hh), 3)
    gru = {
        "ir": {"kernel": w_ir.T, "bias": b_ir + b_hr},
        "iz": {"kernel": w_iz.T, "bias": b_iz + b_hz},
        "in": {"kernel": w_in.T, "bias": b_in},
        "hr": {"kernel": w_hr.T},
        "hz": {"kernel": w_hz.T},
        "hn": {"kernel": w_hn.T, "bias": b_hn},
    }
    return {
        "torso": torso,
        "rnn": {"GRUCell_0": gru},
        "value_hidden": dense(net.head.value[0]),
        "value_out": dense(net.head.value[2]),
        "adv_hidden": dense(net.head.advantage[0]),
        "adv_out": dense(net.head.advantage[2]),
    }


def build(seed):
    torch.manual_seed(seed)
    net = R2D2().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.normal_(0, 0.25 if p.ndim > 1 else 0.4)
            if p.ndim == 1:  # sums of the GRU's two biases are exact in float32
                p.copy_(torch.round(p * 1024) / 1024)
    rng = np.random.default_rng(seed)
    obs = rng.integers(0, 256, (6, 2, 3, 12, 14)).astype(np.float32)
    action = rng.integers(0, 5, (6, 2))
    reward = rng.normal(0, 3, (6, 2)).astype(np.float32)
    done = np.zeros((6, 2), dtype=bool)
    done[1, 0] = done[4, 0] = done[3, 1] = True
    h0 = rng.normal(0, 0.5, (2, 16)).astype(np.float32)
    return {
        "torch": net,
        "flax": (RecurrentC51(), {"params": port(net)}),
        "inputs": (obs, action, reward, done, h0),
        "flax_inputs": (obs.transpose(0, 1, 3, 4, 2), action, reward, done, h0),
    }


FAULTS = [
    {
        "title": "fc's kernel keeps the channel-first flatten",
        "edits": [("{\"kernel\": w.reshape(w.shape[0], -1).T, \"bias\": t(fc.bias)}", "{\"kernel\": t(fc.weight).T, \"bias\": t(fc.bias)}")],
        "layers": ["encoder.fc"],
        "causes": ["flatten"],
        "level": "outputs",
    },
    {
        "title": "hidden state reset after the step that reports done, not before it",
        "edits": [
            ("        carry = jnp.where(resets[:, None], jnp.zeros_like(carry), carry)\n", ""),
            ("        return new_carry, y\n", "        new_carry = jnp.where(resets[:, None], jnp.zeros_like(new_carry), new_carry)\n        return new_carry, y\n"),
        ],
        "layers": ["core", "core.cell"],
        "between": ("encoder.fc", "core.cell"),
        "causes": ["order", "offset"],
        "level": "outputs",
    },
    {
        "title": "advantages centred over the atoms, not over the actions",
        "edits": [("a.mean(axis=2, keepdims=True)", "a.mean(axis=-1, keepdims=True)")],
        "layers": ["head"],
        "between": ("head.advantage.2", None),
        "causes": ["axis"],
        "level": "outputs",
    },
    {
        "title": "distribution normalised over the actions",
        "edits": [("nn.log_softmax(logits, axis=-1)", "nn.log_softmax(logits, axis=-2)")],
        "layers": ["head"],
        "between": ("head.advantage.2", None),
        "causes": ["softmax_axis", "axis"],
        "level": "outputs",
    },
    {
        "title": "max pool padded SAME, which at stride 2 on even sizes pads behind only",
        "edits": [("padding=((1, 1), (1, 1))", "padding=\"SAME\"")],
        "layers": ["encoder.seqs.0.max_pool2d", "encoder.seqs.0"],
        "between": ("encoder.seqs.0.conv", "encoder.seqs.0.res0.conv0"),
        "causes": ["pooling", "padding"],
        "level": "outputs",
    },
    {
        "title": "residual adds the input as it was before torch's in-place ReLU",
        "edits": [(
            "        x = nn.relu(x)\n        y = nn.Conv(self.channels, (3, 3))(x)\n",
            "        y = nn.Conv(self.channels, (3, 3))(nn.relu(x))\n",
        )],
        "layers": ["encoder.seqs.0.res0"],
        "between": ("encoder.seqs.0.res0.conv1", "encoder.seqs.0.res1.conv0"),
        "causes": ["residual", "activation", "operand"],
        "level": "outputs",
    },
    {
        "title": "atoms without the end point of the support",
        "edits": [("jnp.linspace(self.v_min, self.v_max, self.num_atoms)", "jnp.linspace(self.v_min, self.v_max, self.num_atoms, endpoint=False)")],
        "layers": [""],
        "between": ("head.advantage.2", None),
        "causes": ["constant", "scale"],
        "level": "outputs",
    },
    {
        "title": "linear term of the reward's rescaling at the paper's 1e-3, not this code's 1e-2",
        "edits": [("def value_rescale(x, eps=1e-2):", "def value_rescale(x, eps=1e-3):")],
        "layers": ["", "core.cell"],
        "between": ("encoder.fc", "core.cell"),
        "causes": ["constant", "scale"],
        "level": "outputs",
    },
    {
        "title": "reward concatenated before the previous action",
        "edits": [("xs = jnp.concatenate([feats, one_hot, reward]", "xs = jnp.concatenate([feats, reward, one_hot]")],
        "layers": ["", "core.cell"],
        "between": ("encoder.fc", "core.cell"),
        "causes": ["concat"],
        "level": "outputs",
    },
    {
        "title": "hidden weights of the GRU read as z, r, n",
        "edits": [("w_hr, w_hz, w_hn = jnp", "w_hz, w_hr, w_hn = jnp")],
        "layers": ["core.cell"],
        "causes": ["gates", "swapped"],
        "level": "outputs",
    },
    {
        "title": "gradient flows back into the burn-in steps",
        "edits": [("        h = jax.lax.stop_gradient(h)\n", "")],
        "layers": ["core", "core.cell"],
        "between": ("core.cell", "core.cell"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
]
