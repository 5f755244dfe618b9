"""Soft actor-critic with a tanh-Gaussian policy and twin implicit-quantile critics (taus and noise are inputs)."""
import math
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.distributions import Normal
import jax
import jax.numpy as jnp
from jax import lax

LOG_STD_MAX = 1.0
LOG_STD_MIN = -3.0


class ObservationClip(nn.Module):
    """Saturated sensors report the bound itself."""

    def __init__(self, bound=2.5):
        super().__init__()
        self.bound = bound

    def forward(self, obs):
        return torch.clamp(obs, -self.bound, self.bound)


class Actor(nn.Module):
    def __init__(self, obs_dim, act_dim, hidden, low, high):
        super().__init__()
        self.fc1 = nn.Linear(obs_dim, hidden[0])
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.fc_mean = nn.Linear(hidden[1], act_dim)
        self.fc_logstd = nn.Linear(hidden[1], act_dim)
        low, high = torch.tensor(low), torch.tensor(high)
        self.register_buffer("action_scale", (high - low) / 2.0)
        self.register_buffer("action_bias", (high + low) / 2.0)

    def forward(self, x):
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        mean = self.fc_mean(x)
        log_std = torch.clamp(self.fc_logstd(x), LOG_STD_MIN, LOG_STD_MAX)
        return mean, log_std

    def get_action(self, x, noise):
        mean, log_std = self(x)
        std = log_std.exp()
        normal = Normal(mean, std)
        x_t = mean + std * noise  # reparameterization trick
        y_t = torch.tanh(x_t)
        action = y_t * self.action_scale + self.action_bias
        log_prob = normal.log_prob(x_t)
        # enforcing action bound
        log_prob = log_prob - torch.log(self.action_scale * (1 - y_t.pow(2)) + 1e-6)
        return action, log_prob.sum(1)


class CosineEmbedding(nn.Module):
    def __init__(self, n_cos, dim):
        super().__init__()
        self.n_cos = n_cos
        self.linear = nn.Linear(n_cos, dim)

    def forward(self, taus):
        i_pi = math.pi * torch.arange(1, self.n_cos + 1, dtype=taus.dtype, device=taus.device)
        cosines = torch.cos(taus.unsqueeze(-1) * i_pi)
        return F.relu(self.linear(cosines))


class QuantileCritic(nn.Module):
    def __init__(self, obs_dim, act_dim, dim, n_cos, hidden):
        super().__init__()
        self.base = nn.Sequential(nn.Linear(obs_dim + act_dim, dim), nn.LayerNorm(dim), nn.ReLU())
        self.phi = CosineEmbedding(n_cos, dim)
        self.head = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, obs, action, taus):
        state = self.base(torch.cat([obs, action], dim=1))
        embedding = self.phi(taus)
        return self.head(state.unsqueeze(1) * embedding).squeeze(-1)


def quantile_huber_loss(pred, target, taus, kappa):
    """pred, taus: [batch, N]; target: [batch, N']"""
    td_errors = target.unsqueeze(1) - pred.unsqueeze(2)
    huber = F.huber_loss(pred.unsqueeze(2).expand_as(td_errors), target.unsqueeze(1).expand_as(td_errors),
                         reduction="none", delta=kappa)
    weight = torch.abs(taus.unsqueeze(2) - (td_errors.detach() < 0).to(pred.dtype))
    element_wise = weight * huber / kappa
    return element_wise.sum(dim=1).mean(dim=1)


class SACIQN(nn.Module):
    def __init__(self, obs_dim=7, act_dim=3, gamma=0.97, kappa=0.8):
        super().__init__()
        self.gamma, self.kappa = gamma, kappa
        self.obs_clip = ObservationClip()
        self.actor = Actor(obs_dim, act_dim, (10, 12), [-1.25, -1.25, -1.875], [1.75, 0.25, 2.125])
        self.critics = nn.ModuleList([QuantileCritic(obs_dim, act_dim, 11, 8, 13) for _ in range(2)])
        self.log_alpha = nn.Parameter(torch.tensor(-1.3))

    def forward(self, obs, action, reward, done, next_obs, noise, next_noise, taus, next_taus):
        obs, next_obs = self.obs_clip(obs), self.obs_clip(next_obs)
        alpha = self.log_alpha.exp()

        quantiles = [critic(obs, action, taus) for critic in self.critics]
        next_action, next_log_prob = self.actor.get_action(next_obs, next_noise)
        next_z = torch.min(*[critic(next_obs, next_action, next_taus) for critic in self.critics])
        next_z = next_z - alpha * next_log_prob.unsqueeze(1)
        target = reward.unsqueeze(1) + self.gamma * (1 - done.unsqueeze(1)) * next_z
        critic_loss = sum(quantile_huber_loss(z, target.detach(), taus, self.kappa) for z in quantiles)

        new_action, log_prob = self.actor.get_action(obs, noise)
        value = torch.min(*[critic(obs, new_action, taus).mean(dim=1) for critic in self.critics])
        actor_loss = alpha.detach() * log_prob - value
        return {"quantiles": torch.stack(quantiles), "target": target, "critic_loss": critic_loss,
                "action": new_action, "log_prob": log_prob, "actor_loss": actor_loss}


# ---- Flax half: pure functions; both critics are one stack of arrays under vmap ----

CENTRE = (0.25, -0.5, 0.125)
REACH = (1.5, 0.75, 2.0)
DISCOUNT, BEND, SENSOR_BOUND = 0.97, 0.8, 2.5


def affine(p, x):
    return x @ p["w"] + p["b"]


def layer_norm(p, x):
    x = x - x.mean(axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-5) * p["w"] + p["b"]


def saturate(x):
    # a where, and no clip: a reading exactly at the bound keeps its full gradient, as in torch
    return jnp.where(jnp.abs(x) > SENSOR_BOUND, jnp.sign(x) * SENSOR_BOUND, x)


def sample(p, obs, noise):
    h = jax.nn.relu(affine(p["second"], jax.nn.relu(affine(p["first"], obs))))
    mu, log_sigma = jnp.split(affine(p["gaussian"], h), 2, axis=-1)
    log_sigma = jnp.clip(log_sigma, -3.0, 1.0)
    squashed = jnp.tanh(mu + jnp.exp(log_sigma) * noise)
    reach = jnp.asarray(REACH, obs.dtype)
    density = -0.5 * noise ** 2 - log_sigma - 0.5 * math.log(2 * math.pi)
    volume = jnp.log(reach * (1 - squashed ** 2) + 1e-6)
    return squashed * reach + jnp.asarray(CENTRE, obs.dtype), jnp.sum(density - volume, axis=-1)


def quantile_values(p, obs, act, tau):
    """-> [batch, taus]"""
    state = affine(p["state"], jnp.concatenate([obs, act], axis=-1))
    state = jax.nn.relu(layer_norm(p["state_norm"], state))
    waves = 1 + jnp.arange(p["tau"]["w"].shape[0], dtype=tau.dtype)
    level = jax.nn.relu(affine(p["tau"], jnp.cos(jnp.pi * tau[..., None] * waves)))
    joint = level * state[:, None]
    return affine(p["value"], jax.nn.relu(affine(p["wide"], joint)))[..., 0]


twins = jax.vmap(quantile_values, in_axes=(0, None, None, None))


def quantile_regression(predicted, goal, tau):
    """One sample: predicted and tau [n], goal [m]."""
    gap = goal[None, :] - predicted[:, None]
    size = jnp.abs(gap)
    bowl = jnp.where(size <= BEND, 0.5 * gap ** 2, BEND * (size - 0.5 * BEND)) / BEND
    tilt = jnp.abs(tau[:, None] - jnp.where(gap < 0, 1, 0))
    return jnp.sum(jnp.mean(tilt * bowl, axis=1))


def agent(params, obs, action, reward, done, next_obs, noise, next_noise, taus, next_taus):
    obs, next_obs = saturate(obs), saturate(next_obs)
    temperature = jnp.exp(params["log_temperature"])
    quantiles = twins(params["critics"], obs, action, taus)

    later, later_logp = sample(params["policy"], next_obs, next_noise)
    future = jnp.min(twins(params["critics"], next_obs, later, next_taus), axis=0)
    future = future - temperature * later_logp[:, None]
    goal = reward[:, None] + DISCOUNT * (1 - done)[:, None] * future
    per_sample = jax.vmap(quantile_regression)
    per_critic = jax.vmap(per_sample, in_axes=(0, None, None))
    critic_loss = per_critic(quantiles, lax.stop_gradient(goal), taus).sum(axis=0)

    fresh, logp = sample(params["policy"], obs, noise)
    value = twins(params["critics"], obs, fresh, taus).mean(axis=-1).min(axis=0)
    return {"quantiles": quantiles, "target": goal, "critic_loss": critic_loss, "action": fresh,
            "log_prob": logp, "actor_loss": lax.stop_gradient(temperature) * logp - value}


def port_weights(net):
    arr = lambda w: jnp.asarray(w.detach().numpy())
    dense = lambda l: {"w": arr(l.weight).T, "b": arr(l.bias)}
    actor = net.actor
    policy = {"first": dense(actor.fc1), "second": dense(actor.fc2)}
    policy["gaussian"] = {"w": jnp.concatenate([arr(actor.fc_mean.weight), arr(actor.fc_logstd.weight)]).T,
                          "b": jnp.concatenate([arr(actor.fc_mean.bias), arr(actor.fc_logstd.bias)])}

    def critic(c):
        norm = {"w": arr(c.base[1].weight), "b": arr(c.base[1].bias)}
        return {"state": dense(c.base[0]), "state_norm": norm, "tau": dense(c.phi.linear),
                "wide": dense(c.head[0]), "value": dense(c.head[2])}

    critics = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[critic(c) for c in net.critics])
    return agent, {"policy": policy, "critics": critics, "log_temperature": arr(net.log_alpha)}


def build(seed):
    torch.manual_seed(seed)
    net = SACIQN()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() == 2:
                p.copy_(torch.randn_like(p) * ((0.5 if "fc_mean" in name else 1.6) / p.shape[1]) ** 0.5)
            elif p.dim() == 1:
                p.copy_(0.25 * torch.randn_like(p) + (1.1 if name.endswith("base.1.weight") else 0.0))
    net.eval()
    rs = np.random.RandomState(seed + 1)
    batch, n, m = 6, 5, 4
    obs, next_obs = 1.3 * rs.randn(batch, 7), 1.3 * rs.randn(batch, 7)
    obs[0, 2], obs[3, 5], next_obs[2, 1], next_obs[4, 6] = 2.5, -2.5, 2.5, -2.5
    obs[1, 4], next_obs[5, 0] = 3.1, -2.9
    inputs = {"obs": obs, "action": np.tanh(rs.randn(batch, 3)) * np.array(REACH) + np.array(CENTRE),
              "reward": rs.randn(batch), "done": np.array([0, 0, 1, 0, 0, 1]), "next_obs": next_obs,
              "noise": rs.randn(batch, 3), "next_noise": rs.randn(batch, 3),
              "taus": rs.uniform(0.03, 0.97, (batch, n)), "next_taus": rs.uniform(0.03, 0.97, (batch, m))}
    return {"torch": net, "flax": port_weights(net), "inputs": {k: v.astype(np.float32) for k, v in inputs.items()}}


FAULTS = [
    {"title": "the cosines of the taus count from 0, not from 1",
     "edits": [("    waves = 1 + jnp.arange(", "    waves = jnp.arange(")],
     "layers": ["critics.0.phi", "critics.1.phi"],
     "between": ("critics.0.base", "critics.0.phi.linear"),
     "causes": ["offset", "constant"], "level": "outputs"},
    {"title": "the embedding of the taus is added to the state, not multiplied with it",
     "edits": [("    joint = level * state[:, None]", "    joint = level + state[:, None]")],
     "layers": ["critics.0", "critics.1"],
     "between": ("critics.0.phi", "critics.0.head"),
     "causes": ["operation", "residual"], "level": "outputs"},
    {"title": "the log-probability's correction for tanh forgets the scale of the action",
     "edits": [("    volume = jnp.log(reach * (1 - squashed ** 2) + 1e-6)", "    volume = jnp.log(1 - squashed ** 2 + 1e-6)")],
     "layers": ["actor", ""],
     "between": ("actor", "the output"),
     "causes": ["left_out", "scale"], "level": "outputs"},
    {"title": "the quantile loss sums over the targets and averages over the predictions",
     "edits": [("    return jnp.sum(jnp.mean(tilt * bowl, axis=1))", "    return jnp.sum(jnp.mean(tilt * bowl, axis=0))")],
     "layers": [""],
     "between": ("critics.1", "the output"),
     "causes": ["axis", "scale", "order"], "level": "outputs"},
    {"title": "observations are clipped with jnp.clip, which halves the gradient of readings exactly at the bound",
     "edits": [("    return jnp.where(jnp.abs(x) > SENSOR_BOUND, jnp.sign(x) * SENSOR_BOUND, x)",
                "    return jnp.clip(x, -SENSOR_BOUND, SENSOR_BOUND)")],
     "layers": ["obs_clip"],
     "between": ("the input", "critics.0.base.0"),
     "causes": ["kink"], "level": "gradients"},
]
