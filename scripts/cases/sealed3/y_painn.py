"""PaiNN on a padded batch of molecules: scalar and vector messages over a neighbour list; energy and dipole."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen
from torch import nn


class BesselRBF(nn.Module):
    def __init__(self, n_rbf, cutoff):
        super().__init__()
        self.register_buffer("freqs", torch.arange(1, n_rbf + 1) * math.pi / cutoff, persistent=False)

    def forward(self, d):
        return torch.sin(d[:, None] * self.freqs) / d[:, None]


class CosineCutoff(nn.Module):
    def __init__(self, cutoff):
        super().__init__()
        self.cutoff = cutoff

    def forward(self, d):
        return 0.5 * (torch.cos(d * math.pi / self.cutoff) + 1.0) * (d < self.cutoff).to(d)


class PaiNNInteraction(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.n = n
        self.context_net = nn.Sequential(nn.Linear(n, n), nn.SiLU(), nn.Linear(n, 3 * n))

    def forward(self, q, mu, wij, dir_ij, idx_i, idx_j):
        x = self.context_net(q)
        x = wij * x[idx_j]
        dq, dmu_r, dmu_mu = torch.split(x, self.n, dim=-1)
        dmu = dmu_r[:, None] * dir_ij[..., None] + dmu_mu[:, None] * mu[idx_j]
        q = q + torch.zeros_like(q).index_add(0, idx_i, dq)
        mu = mu + torch.zeros_like(mu).index_add(0, idx_i, dmu)
        return q, mu


class PaiNNMixing(nn.Module):
    def __init__(self, n, epsilon=1e-12):
        super().__init__()
        self.n, self.epsilon = n, epsilon
        self.mu_channel_mix = nn.Linear(n, 2 * n, bias=False)
        self.context_net = nn.Sequential(nn.Linear(2 * n, n), nn.SiLU(), nn.Linear(n, 3 * n))

    def forward(self, q, mu):
        mu_v, mu_w = torch.split(self.mu_channel_mix(mu), self.n, dim=-1)
        mu_vn = torch.sqrt(torch.sum(mu_v ** 2, dim=1) + self.epsilon)
        x = self.context_net(torch.cat([q, mu_vn], dim=-1))
        dq, dmu, dqmu = torch.split(x, self.n, dim=-1)
        q = q + dq + dqmu * torch.sum(mu_v * mu_w, dim=1)
        mu = mu + dmu[:, None] * mu_w
        return q, mu


class PaiNN(nn.Module):
    def __init__(self, n=10, depth=2, n_rbf=7, cutoff=2.6, max_z=9):
        super().__init__()
        self.n = n
        self.embedding = nn.Embedding(max_z, n, padding_idx=0)
        self.radial_basis = BesselRBF(n_rbf, cutoff)
        self.cutoff_fn = CosineCutoff(cutoff)
        self.filter_net = nn.Linear(n_rbf, depth * 3 * n)
        self.interactions = nn.ModuleList([PaiNNInteraction(n) for _ in range(depth)])
        self.mixing = nn.ModuleList([PaiNNMixing(n) for _ in range(depth)])
        self.energy_net = nn.Sequential(nn.Linear(n, 6), nn.SiLU(), nn.Linear(6, 1))
        self.dipole_net = nn.Linear(n, 1, bias=False)

    def forward(self, z, pos, idx_i, idx_j, mol):
        r_ij = pos[idx_j] - pos[idx_i]
        d_ij = torch.norm(r_ij, dim=1)
        dir_ij = r_ij / d_ij[:, None]
        phi = self.radial_basis(d_ij)
        fcut = self.cutoff_fn(d_ij)
        filters = self.filter_net(phi) * fcut[:, None]
        filter_list = torch.split(filters, 3 * self.n, dim=-1)
        q = self.embedding(z)
        mu = torch.zeros(q.shape[0], 3, self.n, dtype=q.dtype)
        for wij, interaction, mixing in zip(filter_list, self.interactions, self.mixing):
            q, mu = interaction(q, mu, wij, dir_ij, idx_i, idx_j)
            q, mu = mixing(q, mu)
        e = self.energy_net(q).squeeze(-1)
        dip = self.dipole_net(mu).squeeze(-1)
        n_mol = int(mol.max()) + 1
        energy = torch.zeros(n_mol, dtype=e.dtype).index_add(0, mol, e)
        dipole = torch.zeros(n_mol, 3, dtype=e.dtype).index_add(0, mol, dip)
        return energy, dipole


# ------------- Flax Linen; the last graph of a batch holds its padding -------------


def bessel(d, count, r_cut):
    return jnp.sin(d[:, None] * jnp.pi / r_cut * jnp.arange(1, count + 1)) / d[:, None]


def envelope(d, r_cut):
    return jnp.where(d < r_cut, (1 + jnp.cos(jnp.pi / r_cut * d)) / 2, 0)


class TwoLayer(linen.Module):
    hidden: int
    out: int

    @linen.compact
    def __call__(self, x):
        x = linen.silu(linen.Dense(self.hidden, name="lower")(x))
        return linen.Dense(self.out, name="upper")(x)


class Message(linen.Module):
    width: int

    @linen.compact
    def __call__(self, s, v, filters, unit, receivers, senders):
        h = TwoLayer(self.width, 3 * self.width, name="phi")(s)
        ds, along, carried = jnp.split(filters * h[senders], 3, axis=-1)
        dv = along[:, None, :] * unit[:, :, None] + carried[:, None, :] * v[senders]
        collect = lambda m: jax.ops.segment_sum(m, receivers, num_segments=s.shape[0])
        return s + collect(ds), v + collect(dv)


class Update(linen.Module):
    width: int

    @linen.compact
    def __call__(self, s, v):
        left, right = jnp.split(linen.Dense(2 * self.width, use_bias=False, name="uv")(v), 2, axis=-1)
        length = jnp.sqrt(jnp.sum(left ** 2, axis=1) + 1e-12)
        h = TwoLayer(self.width, 3 * self.width, name="psi")(jnp.concatenate([s, length], axis=-1))
        a_ss, a_vv, a_sv = jnp.split(h, 3, axis=-1)
        s = s + a_ss + a_sv * jnp.einsum("nkf,nkf->nf", left, right)
        return s, v + a_vv[:, None, :] * right


class Painn(linen.Module):
    width: int = 10
    depth: int = 2
    basis: int = 7
    r_cut: float = 2.6
    species: int = 9
    graphs: int = 3

    @linen.compact
    def __call__(self, numbers, positions, receivers, senders, graph):
        delta = positions[senders] - positions[receivers]
        d = jnp.sqrt(jnp.sum(delta ** 2, axis=-1))
        unit = delta / d[:, None]
        w = linen.Dense(self.depth * 3 * self.width, name="filters")(bessel(d, self.basis, self.r_cut))
        w = (w * envelope(d, self.r_cut)[:, None]).reshape(-1, self.depth, 3 * self.width)
        s = linen.Embed(self.species, self.width, name="species_table")(numbers)
        s = jnp.where((numbers == 0)[:, None], jax.lax.stop_gradient(s), s)
        v = jnp.zeros((s.shape[0], 3, self.width), s.dtype)
        for i in range(self.depth):
            s, v = Message(self.width, name=f"message_{i}")(s, v, w[:, i], unit, receivers, senders)
            s, v = Update(self.width, name=f"update_{i}")(s, v)
        energies = TwoLayer(6, 1, name="energy")(s)[:, 0]
        dipoles = linen.Dense(1, use_bias=False, name="dipole")(v)[..., 0]
        pool = lambda x: jax.ops.segment_sum(x, graph, num_segments=self.graphs)
        return pool(energies), pool(dipoles)


def port(net):
    sd = {k: jnp.asarray(p.detach().numpy()) for k, p in net.state_dict().items()}

    def dense(name):
        out = {"kernel": sd[name + ".weight"].T}
        if name + ".bias" in sd:
            out["bias"] = sd[name + ".bias"]
        return out

    two = lambda name: {"lower": dense(name + ".0"), "upper": dense(name + ".2")}
    params = {"species_table": {"embedding": sd["embedding.weight"]}, "filters": dense("filter_net"),
              "energy": two("energy_net"), "dipole": dense("dipole_net")}
    for i in range(len(net.interactions)):
        params[f"message_{i}"] = {"phi": two(f"interactions.{i}.context_net")}
        params[f"update_{i}"] = {"uv": dense(f"mixing.{i}.mu_channel_mix"), "psi": two(f"mixing.{i}.context_net")}
    return {"params": params}


def build(seed):
    torch.manual_seed(seed)
    net = PaiNN().eval()
    for name, p in net.named_parameters():
        scale = 0.8 if "embedding" in name else 1.1 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.3
        p.data.normal_(0, scale)
    model = Painn()
    variables = port(net)
    rng = np.random.default_rng(seed)
    lattice = np.stack(np.meshgrid(np.arange(3), np.arange(2), np.arange(2), indexing="ij"), -1).reshape(-1, 3)
    pos = 1.6 * rng.permutation(lattice)[:11] + rng.uniform(-0.2, 0.2, size=(11, 3))
    z = np.concatenate([rng.integers(1, 9, size=9), [0, 0]])  # two atoms of padding
    mol = np.array([0] * 5 + [1] * 4 + [2] * 2)
    pairs = np.array([(i, j) for i in range(9) for j in range(9)
                      if i != j and mol[i] == mol[j] and rng.random() < 0.7])
    inputs = (z, pos.astype(np.float32), pairs[:, 0], pairs[:, 1], mol)
    flax_inputs = tuple(a if a.dtype == np.float32 else a.astype(np.int32) for a in inputs)
    apply = lambda variables, *args: model.apply(variables, *args)
    return {"torch": net, "flax": (apply, variables), "inputs": inputs, "flax_inputs": flax_inputs}


FAULTS = [
    {
        "title": "the row of the padding in the table of species learns too",
        "edits": [("        s = jnp.where((numbers == 0)[:, None], jax.lax.stop_gradient(s), s)\n", "")],
        "layers": ["embedding"],
        "causes": ["padding_idx", "stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "length of the vectors by linalg.norm, without the epsilon under the root",
        "edits": [("jnp.sqrt(jnp.sum(left ** 2, axis=1) + 1e-12)", "jnp.linalg.norm(left, axis=1)")],
        "layers": ["mixing.0", "mixing.1"],
        "between": ("mixing.0.mu_channel_mix", "mixing.0.context_net.0"),
        "causes": ["kink", "epsilon", "left_out", "constant"],
        "level": "gradients",
    },
    {
        "title": "messages run from the receivers to the senders",
        "edits": [("w[:, i], unit, receivers, senders)", "w[:, i], unit, senders, receivers)")],
        "layers": ["interactions.0", "interactions.1", ""],
        "between": ("interactions.0.context_net.2", "mixing.0.mu_channel_mix"),
        "causes": ["swapped", "operand"],
        "level": "outputs",
    },
    {
        "title": "cosine of the cutoff not cut off beyond it",
        "edits": [("jnp.where(d < r_cut, (1 + jnp.cos(jnp.pi / r_cut * d)) / 2, 0)",
                   "(1 + jnp.cos(jnp.pi / r_cut * d)) / 2")],
        "layers": ["cutoff_fn"],
        "causes": ["mask", "left_out"],
        "level": "outputs",
    },
    {
        "title": "filters of the layers taken from the last axis of a view, where torch splits blocks",
        "edits": [(".reshape(-1, self.depth, 3 * self.width)", ".reshape(-1, 3 * self.width, self.depth)"),
                  ("(s, v, w[:, i], unit", "(s, v, w[:, :, i], unit")],
        "layers": ["", "filter_net"],
        "between": ("filter_net", "interactions.0.context_net.0"),
        "causes": ["rearranged", "transposed", "permuted", "blocks"],
        "level": "outputs",
    },
]
