"""The world model of DreamerV3: an RSSM with a normalised GRU, categorical latents and a two-hot reward."""
import jax
import jax.numpy as jnp
from flax import nnx
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

OBS, ACT, EMBED, HIDDEN, DETER, STOCH, CLASSES, BINS = 7, 3, 10, 12, 14, 4, 5, 11
UNIMIX, FREE, DYN_SCALE, REP_SCALE = 0.01, 0.3, 0.5, 0.1


# ---- torch, after NM512/dreamerv3-torch (networks.py, tools.py, models.py)
def symlog(x):
    return torch.sign(x) * torch.log(torch.abs(x) + 1.0)


def symexp(x):
    return torch.sign(x) * (torch.exp(torch.abs(x)) - 1.0)


class OneHotDist:
    def __init__(self, logits, unimix_ratio=UNIMIX):
        probs = F.softmax(logits, dim=-1)
        probs = probs * (1.0 - unimix_ratio) + unimix_ratio / probs.shape[-1]
        self.logits = torch.log(probs)

    def mode(self):
        _mode = F.one_hot(torch.argmax(self.logits, dim=-1), self.logits.shape[-1]).to(self.logits.dtype)
        return _mode.detach() + self.logits - self.logits.detach()

    def kl(self, other):
        return (self.logits.exp() * (self.logits - other.logits)).sum(-1).sum(-1)


class DiscDist:
    def __init__(self, logits, low=-5.0, high=5.0):
        self.logits = logits
        self.buckets = torch.linspace(low, high, BINS, dtype=logits.dtype)

    def mean(self):
        return symexp((torch.softmax(self.logits, -1) * self.buckets).sum(dim=-1))

    def log_prob(self, x):
        x = symlog(x)
        below = (self.buckets <= x[..., None]).sum(-1) - 1
        above = BINS - (self.buckets > x[..., None]).sum(-1)
        below, above = below.clip(0, BINS - 1), above.clip(0, BINS - 1)
        equal = below == above
        dist_to_below = torch.where(equal, 1, torch.abs(self.buckets[below] - x))
        dist_to_above = torch.where(equal, 1, torch.abs(self.buckets[above] - x))
        total = dist_to_below + dist_to_above
        target = (F.one_hot(below, BINS) * (dist_to_above / total)[..., None]
                  + F.one_hot(above, BINS) * (dist_to_below / total)[..., None])
        log_pred = self.logits - torch.logsumexp(self.logits, -1, keepdim=True)
        return (target * log_pred).sum(-1)


class GRUCell(nn.Module):
    def __init__(self, inp_size, size, update_bias=-1):
        super().__init__()
        self._size, self._update_bias = size, update_bias
        self.layers = nn.Sequential()
        self.layers.add_module("GRU_linear", nn.Linear(inp_size + size, 3 * size, bias=False))
        self.layers.add_module("GRU_norm", nn.LayerNorm(3 * size, eps=1e-03))

    def forward(self, inputs, state):
        parts = self.layers(torch.cat([inputs, state], -1))
        reset, cand, update = torch.split(parts, [self._size] * 3, -1)
        reset = torch.sigmoid(reset)
        cand = torch.tanh(reset * cand)
        update = torch.sigmoid(update + self._update_bias)
        return update * cand + (1 - update) * state


def linear_norm_act(i, o):
    return nn.Sequential(nn.Linear(i, o, bias=False), nn.LayerNorm(o, eps=1e-03), nn.SiLU())


class RSSM(nn.Module):
    def __init__(self):
        super().__init__()
        self._img_in_layers = linear_norm_act(STOCH * CLASSES + ACT, HIDDEN)
        self._cell = GRUCell(HIDDEN, DETER)
        self._img_out_layers = linear_norm_act(DETER, HIDDEN)
        self._obs_out_layers = linear_norm_act(DETER + EMBED, HIDDEN)
        self._imgs_stat_layer = nn.Linear(HIDDEN, STOCH * CLASSES)
        self._obs_stat_layer = nn.Linear(HIDDEN, STOCH * CLASSES)
        self.W = nn.Parameter(torch.zeros(1, DETER))

    def _suff_stats_layer(self, layer, x):
        return layer(x).reshape(-1, STOCH, CLASSES)

    def initial(self, batch_size):
        deter = torch.tanh(self.W).repeat(batch_size, 1)
        stats = self._suff_stats_layer(self._imgs_stat_layer, self._img_out_layers(deter))
        return OneHotDist(stats).mode(), deter

    def observe(self, embed, action, is_first):
        post, deters, priors, posts = None, [], [], []
        for t in range(embed.shape[1]):
            first = is_first[:, t].to(embed.dtype)[:, None]
            init_stoch, init_deter = self.initial(embed.shape[0])
            if post is None:
                post = init_stoch, init_deter
            prev_action = action[:, t] * (1.0 - first)
            stoch = post[0] * (1.0 - first[..., None]) + init_stoch * first[..., None]
            deter = post[1] * (1.0 - first) + init_deter * first
            x = self._img_in_layers(torch.cat([stoch.flatten(1), prev_action], -1))
            deter = self._cell(x, deter)
            prior = self._suff_stats_layer(self._imgs_stat_layer, self._img_out_layers(deter))
            x = self._obs_out_layers(torch.cat([deter, embed[:, t]], -1))
            stats = self._suff_stats_layer(self._obs_stat_layer, x)
            post = OneHotDist(stats).mode(), deter
            deters.append(deter), priors.append(prior), posts.append((stats, post[0]))
        return (torch.stack(deters, 1), torch.stack(priors, 1),
                torch.stack([p[0] for p in posts], 1), torch.stack([p[1] for p in posts], 1))

    def kl_loss(self, post, prior):
        rep_loss = OneHotDist(post).kl(OneHotDist(prior.detach()))
        dyn_loss = OneHotDist(post.detach()).kl(OneHotDist(prior))
        rep_loss, dyn_loss = torch.clip(rep_loss, min=FREE), torch.clip(dyn_loss, min=FREE)
        return DYN_SCALE * dyn_loss + REP_SCALE * rep_loss


class WorldModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = linear_norm_act(OBS, EMBED)
        self.dynamics = RSSM()
        self.heads = nn.ModuleDict({"reward": nn.Sequential(
            *linear_norm_act(STOCH * CLASSES + DETER, HIDDEN + 1), nn.Linear(HIDDEN + 1, BINS))})

    def forward(self, obs, action, is_first, reward):
        embed = self.encoder(symlog(obs))
        deter, prior, post, stoch = self.dynamics.observe(embed, action, is_first)
        dist = DiscDist(self.heads["reward"](torch.cat([stoch.flatten(2), deter], -1)))
        return post, dist.mean(), -dist.log_prob(reward), self.dynamics.kl_loss(post, prior)


# ---- Flax NNX: time runs in a lax.scan; log-probabilities instead of distribution objects
def sym_log(x):
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def sym_exp(x):
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


def mixed_log_probs(logits):
    p = jax.nn.softmax(logits, axis=-1)
    return jnp.log((1 - UNIMIX) * p + UNIMIX / CLASSES)


def straight_through(logits):
    logp = mixed_log_probs(logits)
    hard = jax.nn.one_hot(jnp.argmax(logp, axis=-1), CLASSES, dtype=logp.dtype)
    return logp + jax.lax.stop_gradient(hard - logp)


def divergence(left, right):
    a, b = mixed_log_probs(left), mixed_log_probs(right)
    return jnp.maximum(jnp.sum(jnp.exp(a) * (a - b), axis=(-2, -1)), FREE)


def two_hot(x, edges):
    x = jnp.clip(x, edges[0], edges[-1])
    return jax.nn.relu(1 - jnp.abs(x[..., None] - edges) / (edges[1] - edges[0]))


class NormedDense(nnx.Module):
    def __init__(self, i, o, rngs, act=jax.nn.silu):
        self.dense = nnx.Linear(i, o, use_bias=False, rngs=rngs)
        self.norm = nnx.LayerNorm(o, epsilon=1e-3, use_fast_variance=False, rngs=rngs)
        self.act = act

    def __call__(self, *parts):
        return self.act(self.norm(self.dense(jnp.concatenate(parts, axis=-1))))


class NormedGRU(nnx.Module):
    def __init__(self, i, size, rngs):
        self.dense = nnx.Linear(i + size, 3 * size, use_bias=False, rngs=rngs)
        self.norm = nnx.LayerNorm(3 * size, epsilon=0.001, use_fast_variance=False, rngs=rngs)

    def __call__(self, x, h):
        r, c, u = jnp.split(self.norm(self.dense(jnp.concatenate([x, h], axis=-1))), 3, axis=-1)
        u = jax.nn.sigmoid(u - 1)
        return h + u * (jnp.tanh(jax.nn.sigmoid(r) * c) - h)


class Dreamer(nnx.Module):
    def __init__(self, rngs):
        z = STOCH * CLASSES
        self.embed = NormedDense(OBS, EMBED, rngs)
        self.mix = NormedDense(z + ACT, HIDDEN, rngs)
        self.gru = NormedGRU(HIDDEN, DETER, rngs)
        self.prior = NormedDense(DETER, HIDDEN, rngs)
        self.prior_logits = nnx.Linear(HIDDEN, z, rngs=rngs)
        self.post = NormedDense(DETER + EMBED, HIDDEN, rngs)
        self.post_logits = nnx.Linear(HIDDEN, z, rngs=rngs)
        self.start = nnx.Param(jnp.zeros(DETER))
        self.reward = NormedDense(z + DETER, HIDDEN + 1, rngs)
        self.reward_logits = nnx.Linear(HIDDEN + 1, BINS, rngs=rngs)

    def prior_of(self, h):
        return self.prior_logits(self.prior(h)).reshape(*h.shape[:-1], STOCH, CLASSES)

    def __call__(self, obs, action, is_first, reward):
        e = self.embed(sym_log(obs))
        h0 = jnp.broadcast_to(jnp.tanh(self.start[...]), (obs.shape[0], DETER))
        z0 = straight_through(self.prior_of(h0)).reshape(obs.shape[0], -1)

        def step(carry, xs):
            h, z = carry
            e_t, a_t, reset = xs
            reset = reset[:, None]
            h, z = jnp.where(reset, h0, h), jnp.where(reset, z0, z)
            a_t = jnp.where(reset, 0, a_t)
            h = self.gru(self.mix(z, a_t), h)
            logits = self.post_logits(self.post(h, e_t)).reshape(-1, STOCH, CLASSES)
            z = straight_through(logits).reshape(z.shape)
            return (h, z), (h, z, logits)

        time_major = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (e, action, is_first))
        _, out = jax.lax.scan(step, (h0, z0), time_major)
        h, z, post = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), out)
        prior = self.prior_of(h)
        sg = jax.lax.stop_gradient
        kl = DYN_SCALE * divergence(sg(post), prior) + REP_SCALE * divergence(post, sg(prior))
        logits = self.reward_logits(self.reward(z, h))
        edges = jnp.linspace(-5, 5, BINS, dtype=logits.dtype)
        mean = sym_exp(jax.nn.softmax(logits) @ edges)
        nll = -jnp.sum(two_hot(sym_log(reward), edges) * jax.nn.log_softmax(logits), axis=-1)
        return post, mean, nll, kl


def port_weights(net):
    model = Dreamer(nnx.Rngs(0))
    a = lambda t: jnp.asarray(t.detach().numpy())

    def normed(dst, linear, norm):
        dst.dense.kernel.set_value(a(linear.weight.T))
        dst.norm.scale.set_value(a(norm.weight))
        dst.norm.bias.set_value(a(norm.bias))

    def plain(dst, src):
        dst.kernel.set_value(a(src.weight.T))
        dst.bias.set_value(a(src.bias))

    rssm, head = net.dynamics, net.heads["reward"]
    normed(model.embed, *net.encoder[:2])
    normed(model.mix, *rssm._img_in_layers[:2])
    normed(model.gru, *rssm._cell.layers)
    normed(model.prior, *rssm._img_out_layers[:2])
    normed(model.post, *rssm._obs_out_layers[:2])
    normed(model.reward, *head[:2])
    plain(model.prior_logits, rssm._imgs_stat_layer)
    plain(model.post_logits, rssm._obs_stat_layer)
    plain(model.reward_logits, head[3])
    model.start.set_value(a(rssm.W[0]))
    return model


def build(seed):
    torch.manual_seed(seed)
    net = WorldModel()
    with torch.no_grad():
        for name, p in net.named_parameters():
            norm = name.endswith(("norm.weight", ".1.weight"))
            p.copy_(0.3 * torch.randn_like(p) + norm if p.ndim == 1 else torch.randn_like(p) * 1.5 * p.shape[1] ** -0.5)
    net.eval()
    rng = np.random.RandomState(seed + 1)
    f = lambda *s: rng.randn(*s).astype(np.float32)
    first = np.zeros((2, 6), bool)
    first[:, 0] = first[1, 3] = True
    return {"torch": net, "flax": port_weights(net), "inputs": (f(2, 6, OBS), f(2, 6, ACT), first, 9 * f(2, 6))}


FAULTS = [
    {
        "title": "the norm of the GRU has an epsilon of 1e-5",
        "edits": [("epsilon=0.001", "epsilon=1e-5")],
        "layers": ["dynamics._cell.layers.GRU_norm", "dynamics._cell.layers", "dynamics._cell"],
        "between": ("dynamics._cell.layers.GRU_linear", "dynamics._img_out_layers"),
        "causes": ["epsilon"],
        "level": "outputs",
    },
    {
        "title": "the uniform share of unimix is spread over the number of latents, not of classes",
        "edits": [("UNIMIX / CLASSES", "UNIMIX / STOCH")],
        "layers": ["dynamics", ""],
        "between": None,
        "causes": ["constant", "scale", "operand"],
        "level": "outputs",
    },
    {
        "title": "the action is not zeroed where an episode begins",
        "edits": [("            a_t = jnp.where(reset, 0, a_t)\n", "")],
        "layers": ["dynamics"],
        "between": ("encoder", "dynamics._img_in_layers"),
        "causes": ["left_out", "mask"],
        "level": "outputs",
    },
    {
        "title": "the scales of the dynamics and the representation loss are exchanged",
        "edits": [("DYN_SCALE * divergence(sg(post), prior) + REP_SCALE * divergence(post, sg(prior))",
                   "REP_SCALE * divergence(sg(post), prior) + DYN_SCALE * divergence(post, sg(prior))")],
        "layers": ["dynamics", ""],
        "between": None,
        "causes": ["stop_gradient", "swapped", "scale"],
        "level": "gradients",
    },
    {
        "title": "the one-hot latent has no straight-through gradient",
        "edits": [("return logp + jax.lax.stop_gradient(hard - logp)", "return hard")],
        "layers": ["dynamics", ""],
        "between": ("dynamics._obs_stat_layer", "heads.reward"),
        "causes": ["stop_gradient", "left_out"],
        "level": "gradients",
    },
]
