"""Attentive neural process (Kim et al. 2019): deterministic and latent paths over masked point sets."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

X_DIM, Y_DIM, HIDDEN, LATENT, HEADS = 2, 3, 12, 8, 4


# ---- torch, after deepmind/neural-processes (attentive_neural_process.ipynb)
class BatchMLP(nn.Module):
    def __init__(self, in_size, output_sizes):
        super().__init__()
        sizes = [in_size] + list(output_sizes)
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:])])

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class MultiheadAttention(nn.Module):
    def __init__(self, d, num_heads):
        super().__init__()
        self.num_heads, self.head_size = num_heads, d // num_heads
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.out_proj = nn.Linear(d, d, bias=False)

    def forward(self, q, k, v, mask):
        split = lambda t: t.view(t.shape[0], t.shape[1], self.num_heads, self.head_size).transpose(1, 2)
        q, k, v = split(self.q_proj(q)), split(self.k_proj(k)), split(self.v_proj(v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_size)
        scores = scores.masked_fill(~mask[:, None, None, :], -1e9)
        rep = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)
        return self.out_proj(rep)


class Attention(nn.Module):
    """Keys and queries are embedded by one and the same MLP before the product."""

    def __init__(self, x_size, d, num_heads):
        super().__init__()
        self.rep_mlp = BatchMLP(x_size, [HIDDEN + 2, d])
        self.multihead = MultiheadAttention(d, num_heads)

    def forward(self, x1, x2, r, mask):
        k, q = self.rep_mlp(x1), self.rep_mlp(x2)
        return self.multihead(q, k, r, mask)


class DeterministicEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = BatchMLP(X_DIM + Y_DIM, [HIDDEN, HIDDEN])
        self.cross_attention = Attention(X_DIM, HIDDEN, HEADS)

    def forward(self, context_x, context_y, mask, target_x):
        hidden = self.mlp(torch.cat([context_x, context_y], dim=-1))
        return self.cross_attention(context_x, target_x, hidden, mask)


class LatentEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = BatchMLP(X_DIM + Y_DIM, [HIDDEN, HIDDEN + 1])
        self.penultimate_layer = nn.Linear(HIDDEN + 1, (HIDDEN + LATENT) // 2)
        self.mean_layer = nn.Linear((HIDDEN + LATENT) // 2, LATENT)
        self.std_layer = nn.Linear((HIDDEN + LATENT) // 2, LATENT)

    def forward(self, x, y, mask):
        hidden = self.mlp(torch.cat([x, y], dim=-1)) * mask.unsqueeze(-1)
        hidden = hidden.sum(dim=1) / mask.sum(dim=1, keepdim=True)
        hidden = F.relu(self.penultimate_layer(hidden))
        mu, log_sigma = self.mean_layer(hidden), self.std_layer(hidden)
        sigma = 0.1 + 0.9 * torch.sigmoid(log_sigma)
        return Normal(loc=mu, scale=sigma, validate_args=False)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = BatchMLP(HIDDEN + LATENT + X_DIM, [HIDDEN + 3, HIDDEN + 1, 2 * Y_DIM])

    def forward(self, representation, target_x):
        hidden = self.mlp(torch.cat([representation, target_x], dim=-1))
        mu, log_sigma = torch.chunk(hidden, 2, dim=-1)
        sigma = 0.1 + 0.9 * F.softplus(log_sigma)
        return mu, sigma


class LatentModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.latent_encoder = LatentEncoder()
        self.deterministic_encoder = DeterministicEncoder()
        self.decoder = Decoder()

    def forward(self, context_x, context_y, context_mask, target_x, target_y, target_mask, eps):
        prior = self.latent_encoder(context_x, context_y, context_mask)
        posterior = self.latent_encoder(target_x, target_y, target_mask)
        z = posterior.loc + posterior.scale * eps
        latent_rep = z.unsqueeze(1).expand(-1, target_x.shape[1], -1)
        deterministic_rep = self.deterministic_encoder(context_x, context_y, context_mask, target_x)
        mu, sigma = self.decoder(torch.cat([deterministic_rep, latent_rep], dim=-1), target_x)
        log_p = Normal(mu, sigma, validate_args=False).log_prob(target_y).sum(dim=-1) * target_mask
        kl = kl_divergence(posterior, prior).sum(dim=-1) / target_mask.sum(dim=1)
        return mu, sigma, log_p, kl


# ---- Flax side: a plain function of params, written for one task and mapped over the batch
def mlp(layers, x):
    *body, last = layers
    for w in body:
        x = jax.nn.relu(x @ w["kernel"] + w["bias"])
    return x @ last["kernel"] + last["bias"]


def latent_path(params, x, y, valid):
    """Mean and deviation of the latent variable of one set of points."""
    h = mlp(params["points"], jnp.concatenate([x, y], axis=-1))
    n = jnp.sum(valid)
    pooled = jnp.sum(jnp.where(valid[:, None], h, 0), axis=0) / n
    h = jax.nn.relu(mlp([params["squeeze"]], pooled))
    raw = mlp([params["moments"]], h)
    mean, log_std = raw[:LATENT], raw[LATENT:]
    return mean, 0.1 + 0.9 * jax.nn.sigmoid(log_std)


def deterministic_path(params, x, y, valid, at):
    r = mlp(params["points"], jnp.concatenate([x, y], axis=-1))
    a = params["attention"]
    q = jnp.einsum("qi,ihd->qhd", mlp(params["embed"], at), a["q"])
    k = jnp.einsum("ki,ihd->khd", mlp(params["embed"], x), a["k"])
    v = jnp.einsum("ki,ihd->khd", r, a["v"])
    scores = jnp.einsum("qhd,khd->qkh", q, k) * q.shape[-1] ** -0.5
    scores = jnp.where(valid[None, :, None], scores, -1e9)
    weights = jax.nn.softmax(scores, axis=1)
    return jnp.einsum("qkh,khd,hdo->qo", weights, v, a["o"])


def gaussian_kl(p, q):
    """KL(p || q) of two diagonal Gaussians given as (mean, deviation)."""
    (mp, sp), (mq, sq) = p, q
    return jnp.sum(jnp.log(sq / sp) + (sp ** 2 + (mp - mq) ** 2) / (2 * sq ** 2) - 0.5)


def one_task(params, cx, cy, cvalid, tx, ty, tvalid, noise):
    prior = latent_path(params["latent"], cx, cy, cvalid)
    posterior = latent_path(params["latent"], tx, ty, tvalid)
    mean, std = posterior
    z = mean + std * noise
    r = deterministic_path(params["deterministic"], cx, cy, cvalid, tx)
    h = jnp.concatenate([r, jnp.tile(z, (tx.shape[0], 1)), tx], axis=-1)
    mu, raw = jnp.split(mlp(params["decoder"], h), 2, axis=-1)
    sigma = 0.1 + 0.9 * jax.nn.softplus(raw)
    resid = (ty - mu) / sigma
    log_p = -0.5 * resid ** 2 - jnp.log(sigma) - 0.5 * math.log(2 * math.pi)
    log_p = jnp.where(tvalid, jnp.sum(log_p, axis=-1), 0)
    kl = gaussian_kl(posterior, prior) / jnp.sum(tvalid)
    return mu, sigma, log_p, kl


def predict(params, *batch):
    return jax.vmap(one_task, in_axes=(None,) + (0,) * len(batch))(params, *batch)


def port_weights(net):
    arr = lambda t: t.detach().numpy()
    dense = lambda m: {"kernel": arr(m.weight).T, "bias": arr(m.bias)}
    stack = lambda m: [dense(layer) for layer in m.layers]
    lat, det = net.latent_encoder, net.deterministic_encoder
    heads_out = lambda m: arr(m.weight).T.reshape(HIDDEN, HEADS, HIDDEN // HEADS)
    mh = det.cross_attention.multihead
    heads = [dense(lat.mean_layer), dense(lat.std_layer)]
    params = {
        "latent": {
            "points": stack(lat.mlp),
            "squeeze": dense(lat.penultimate_layer),
            "moments": {k: np.concatenate([h[k] for h in heads], axis=-1) for k in ("kernel", "bias")},
        },
        "deterministic": {
            "points": stack(det.mlp),
            "embed": stack(det.cross_attention.rep_mlp),
            "attention": {
                "q": heads_out(mh.q_proj), "k": heads_out(mh.k_proj), "v": heads_out(mh.v_proj),
                "o": arr(mh.out_proj.weight).T.reshape(HEADS, HIDDEN // HEADS, HIDDEN),
            },
        },
        "decoder": stack(net.decoder.mlp),
    }
    return predict, jax.tree.map(jnp.asarray, params)


def build(seed):
    torch.manual_seed(seed)
    net = LatentModel()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 1.4 / math.sqrt(p.shape[1])))
    net.eval()
    rng = np.random.RandomState(seed + 1)
    f = lambda *s: rng.randn(*s).astype(np.float32)
    context, target = np.ones((3, 5), bool), np.ones((3, 7), bool)
    context[0, 3:] = context[2, 4:] = False
    target[1, 5:] = target[2, 6:] = False
    inputs = {
        "context_x": f(3, 5, X_DIM), "context_y": f(3, 5, Y_DIM), "context_mask": context,
        "target_x": f(3, 7, X_DIM), "target_y": f(3, 7, Y_DIM), "target_mask": target,
        "eps": f(3, LATENT),
    }
    return {"torch": net, "flax": port_weights(net), "inputs": inputs}


FAULTS = [
    {
        "title": "the latent path divides by the number of all points, not of the valid ones",
        "edits": [("n = jnp.sum(valid)", "n = valid.shape[0]")],
        "layers": ["latent_encoder"],
        "between": ("latent_encoder.mlp", "latent_encoder.penultimate_layer"),
        "causes": ["mask", "scale", "operand"],
        "level": "outputs",
    },
    {
        "title": "the cross-attention is normalised over the heads, not over the context points",
        "edits": [("jax.nn.softmax(scores, axis=1)", "jax.nn.softmax(scores, axis=-1)")],
        "layers": ["deterministic_encoder.cross_attention.multihead"],
        "between": ("deterministic_encoder.cross_attention.multihead.v_proj",
                    "deterministic_encoder.cross_attention.multihead.out_proj"),
        "causes": ["softmax_axis", "axis"],
        "level": "outputs",
    },
    {
        "title": "the decoder's deviation goes through a sigmoid, as the latent one does, not a softplus",
        "edits": [("jax.nn.softplus(raw)", "jax.nn.sigmoid(raw)")],
        "layers": ["decoder"],
        "between": ("decoder.mlp", "the output"),
        "causes": ["activation", "operation"],
        "level": "outputs",
    },
    {
        "title": "the divergence is taken from the prior to the posterior",
        "edits": [("gaussian_kl(posterior, prior)", "gaussian_kl(prior, posterior)")],
        "layers": [""],
        "between": ("decoder", "the output"),
        "causes": ["swapped", "operand", "order"],
        "level": "outputs",
    },
    {
        "title": "no gradient goes through the deviation into the latent sample",
        "edits": [("z = mean + std * noise", "z = mean + jax.lax.stop_gradient(std) * noise")],
        "layers": ["", "latent_encoder", "latent_encoder.std_layer"],
        "between": ("latent_encoder", "deterministic_encoder"),
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
]
