"""Recurrent actor-critic (CNN, LSTM with episode resets, previous action and reward) against Linen."""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F


def layer_init(layer, std=2 ** 0.5, bias_std=0.2):
    torch.nn.init.orthogonal_(layer.weight, std)
    torch.nn.init.normal_(layer.bias, 0.0, bias_std)
    return layer


class Agent(torch.nn.Module):
    def __init__(self, channels, num_actions, hidden):
        super().__init__()
        self.num_actions = num_actions
        self.network = torch.nn.Sequential(
            layer_init(torch.nn.Conv2d(channels, 6, 4, stride=2)),
            torch.nn.ReLU(),
            layer_init(torch.nn.Conv2d(6, 10, 3, stride=1)),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            layer_init(torch.nn.Linear(10 * 2 * 4, 20)),
            torch.nn.ReLU(),
        )
        self.lstm = torch.nn.LSTM(20 + num_actions + 1 + 1, hidden)
        for name, param in self.lstm.named_parameters():
            if "bias" in name:
                torch.nn.init.normal_(param, 0.0, 0.3)
            else:
                torch.nn.init.orthogonal_(param, 1.0)
        self.actor = layer_init(torch.nn.Linear(hidden, num_actions), std=0.5)
        self.critic = torch.nn.Sequential(
            layer_init(torch.nn.Linear(hidden, 12)), torch.nn.Tanh(), layer_init(torch.nn.Linear(12, 1), std=1)
        )

    def get_states(self, obs, prev_action, prev_reward, done, lstm_state):
        T, B = done.shape
        hidden = self.network(obs.flatten(0, 1) / 255.0)
        action = F.one_hot(prev_action + 1, self.num_actions + 1).to(hidden.dtype)
        reward = prev_reward.clamp(-1.0, 1.0).unsqueeze(-1)
        hidden = torch.cat([hidden.reshape(T, B, -1), action, reward], dim=-1)
        outputs = []
        for h, d in zip(hidden, done):
            keep = (1.0 - d).view(1, -1, 1)
            h, lstm_state = self.lstm(h.unsqueeze(0), (keep * lstm_state[0], keep * lstm_state[1]))
            outputs.append(h)
        return torch.cat(outputs), lstm_state

    def forward(self, obs, prev_action, prev_reward, done, h0, c0):
        hidden, (h, c) = self.get_states(obs, prev_action, prev_reward, done, (h0[None], c0[None]))
        return self.actor(hidden), self.critic(hidden).squeeze(-1), h[0], c[0]


class ScannedLSTM(nn.Module):
    hidden: int

    @functools.partial(
        nn.scan, variable_broadcast="params", in_axes=0, out_axes=0, split_rngs={"params": False}
    )
    @nn.compact
    def __call__(self, carry, inputs):
        x, resets = inputs
        carry = jax.tree.map(lambda s: jnp.where(resets[:, None] > 0, 0.0, s), carry)
        return nn.OptimizedLSTMCell(self.hidden, name="cell")(carry, x)


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x / 255.0
        x = nn.relu(nn.Conv(6, (4, 4), strides=(2, 2), padding="VALID")(x))
        x = nn.relu(nn.Conv(10, (3, 3), padding="VALID")(x))
        x = jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)
        return nn.relu(nn.Dense(20)(x))


class ActorCriticRNN(nn.Module):
    num_actions: int
    hidden: int

    @nn.compact
    def __call__(self, obs, prev_action, prev_reward, done, h0, c0):
        T, B = done.shape
        emb = Encoder()(obs.reshape((T * B,) + obs.shape[2:])).reshape(T, B, -1)
        act = jax.nn.one_hot(prev_action + 1, self.num_actions + 1, dtype=emb.dtype)
        rew = jnp.clip(prev_reward, -1, 1)[..., None]
        rnn_in = jnp.concatenate([emb, act, rew], axis=-1)
        (c, h), y = ScannedLSTM(self.hidden)((c0, h0), (rnn_in, done))
        logits = nn.Dense(self.num_actions, name="actor")(y)
        v = jnp.tanh(nn.Dense(12, name="critic_0")(y))
        value = nn.Dense(1, name="critic_1")(v)
        return logits, jnp.squeeze(value, -1), h, c


def port(net):
    def a(t):
        return t.detach().double().numpy()

    def dense(m):
        return {"kernel": a(m.weight).T, "bias": a(m.bias)}

    def conv(m):
        return {"kernel": a(m.weight).transpose(2, 3, 1, 0), "bias": a(m.bias)}

    w_ih, w_hh = a(net.lstm.weight_ih_l0), a(net.lstm.weight_hh_l0)
    b = a(net.lstm.bias_ih_l0) + a(net.lstm.bias_hh_l0)
    cell = {}
    for gate, wi, wh, bias in zip("ifgo", np.split(w_ih, 4), np.split(w_hh, 4), np.split(b, 4)):
        cell["i" + gate] = {"kernel": wi.T}
        cell["h" + gate] = {"kernel": wh.T, "bias": bias}
    return {"params": {
        "Encoder_0": {"Conv_0": conv(net.network[0]), "Conv_1": conv(net.network[2]), "Dense_0": dense(net.network[5])},
        "ScannedLSTM_0": {"cell": cell},
        "actor": dense(net.actor),
        "critic_0": dense(net.critic[0]),
        "critic_1": dense(net.critic[2]),
    }}


def build(seed):
    torch.manual_seed(seed)
    net = Agent(channels=2, num_actions=5, hidden=14).eval()
    rng = np.random.default_rng(seed)
    T, B = 6, 3
    obs = rng.integers(0, 256, (T, B, 2, 10, 14)).astype(np.float64)
    prev_action = rng.integers(0, 5, (T, B))
    prev_action[0] = -1
    prev_reward = rng.normal(0, 2, (T, B))
    done = np.zeros((T, B))
    done[2, 0] = done[4, 1] = done[0, 2] = 1.0
    h0, c0 = rng.normal(0, 0.5, (2, B, 14))
    inputs = {"obs": obs, "prev_action": prev_action, "prev_reward": prev_reward, "done": done, "h0": h0, "c0": c0}
    flax_inputs = dict(inputs, obs=np.moveaxis(obs, 2, -1))
    variables = jax.tree.map(jnp.asarray, port(net))
    return {"torch": net, "flax": (ActorCriticRNN(5, 14), variables), "inputs": inputs, "flax_inputs": flax_inputs}


FAULTS = [
    {
        "title": "states reset after the step that ends the episode, not before the next one",
        "edits": [
            ("        carry = jax.tree.map(lambda s: jnp.where(resets[:, None] > 0, 0.0, s), carry)\n        return nn.OptimizedLSTMCell(self.hidden, name=\"cell\")(carry, x)",
             "        carry, y = nn.OptimizedLSTMCell(self.hidden, name=\"cell\")(carry, x)\n        carry = jax.tree.map(lambda s: jnp.where(resets[:, None] > 0, 0.0, s), carry)\n        return carry, y"),
        ],
        "layers": ["", "lstm"],
        "between": ("network.5", "lstm"),
        "causes": ["order"],
        "level": "outputs",
    },
    {
        "title": "initial carry given as (h, c) as torch has it",
        "edits": [("((c0, h0), (rnn_in, done))", "((h0, c0), (rnn_in, done))")],
        "layers": ["", "lstm"],
        "between": ("network.5", "lstm"),
        "causes": ["swapped", "operand"],
        "level": "outputs",
    },
    {
        "title": "rows of the LSTM read in the order i, f, o, g",
        "edits": [("zip(\"ifgo\", np.split", "zip(\"ifog\", np.split")],
        "layers": ["lstm"],
        "causes": ["gates"],
        "level": "outputs",
    },
    {
        "title": "pixels scaled to -1..1",
        "edits": [("        x = x / 255.0\n", "        x = x / 127.5 - 1.0\n")],
        "layers": [""],
        "between": (None, "network.0"),
        "causes": ["constant", "scale"],
        "level": "outputs",
    },
    {
        "title": "channel-last flattening before the dense layer",
        "edits": [("x = jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)", "x = x.reshape(x.shape[0], -1)")],
        "layers": ["network.4", "network"],
        "between": ("network.2", "network.5"),
        "causes": ["flatten"],
        "level": "outputs",
    },
    {
        "title": "sign of the reward in place of the clipped reward",
        "edits": [("rew = jnp.clip(prev_reward, -1, 1)[..., None]", "rew = jnp.sign(prev_reward)[..., None]")],
        "layers": [""],
        "between": ("network.5", "lstm"),
        "causes": ["operation"],
        "level": "outputs",
    },
    {
        "title": "previous actions one-hot without the shift for 'no action'",
        "edits": [("jax.nn.one_hot(prev_action + 1, self.num_actions + 1", "jax.nn.one_hot(prev_action, self.num_actions + 1")],
        "layers": [""],
        "between": ("network.5", "lstm"),
        "causes": ["offset"],
        "level": "outputs",
    },
    {
        "title": "resets zero the hidden state but keep the cell state",
        "edits": [("        carry = jax.tree.map(lambda s: jnp.where(resets[:, None] > 0, 0.0, s), carry)\n", "        c, h = carry\n        carry = (c, jnp.where(resets[:, None] > 0, 0.0, h))\n")],
        "layers": ["", "lstm"],
        "between": ("network.5", "lstm"),
        "causes": ["left_out", "mask"],
        "level": "outputs",
    },
]
