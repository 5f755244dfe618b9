"""SchNet: energies and forces of molecules (after schnetpack 2), and its Linen port."""
import math

import flax.linen as lnn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

MAX_Z, BASIS, FILTERS, RBF, LAYERS, HIDDEN, CUTOFF = 9, 10, 8, 7, 2, 5, 2.6
ATOMS, MOLECULES = (4, 6, 3), 3
MEAN, STDDEV = -1.375, 0.75


# ---- PyTorch
def shifted_softplus(x):
    return F.softplus(x) - math.log(2.0)


def gaussian_rbf(inputs, offsets, widths):
    coeff = -0.5 / torch.pow(widths, 2)
    diff = inputs[..., None] - offsets
    return torch.exp(coeff * torch.pow(diff, 2))


class GaussianRBF(nn.Module):
    def __init__(self, n_rbf, cutoff, start=0.0):
        super().__init__()
        self.n_rbf = n_rbf
        offset = torch.linspace(start, cutoff, n_rbf)
        widths = torch.abs(offset[1] - offset[0]) * torch.ones_like(offset)
        self.widths = nn.Parameter(widths)
        self.offsets = nn.Parameter(offset)

    def forward(self, inputs):
        return gaussian_rbf(inputs, self.offsets, self.widths)


class CosineCutoff(nn.Module):
    def __init__(self, cutoff):
        super().__init__()
        self.cutoff = cutoff

    def forward(self, input):
        input_cut = 0.5 * (torch.cos(input * math.pi / self.cutoff) + 1.0)
        return input_cut * (input < self.cutoff).to(input.dtype)


class Dense(nn.Linear):
    def __init__(self, in_features, out_features, bias=True, activation=None):
        super().__init__(in_features, out_features, bias)
        self.activation = activation

    def forward(self, input):
        y = F.linear(input, self.weight, self.bias)
        return y if self.activation is None else self.activation(y)


class SchNetInteraction(nn.Module):
    def __init__(self, n_atom_basis, n_rbf, n_filters):
        super().__init__()
        self.in2f = Dense(n_atom_basis, n_filters, bias=False)
        self.f2out = nn.Sequential(Dense(n_filters, n_atom_basis, activation=shifted_softplus),
                                   Dense(n_atom_basis, n_atom_basis))
        self.filter_network = nn.Sequential(Dense(n_rbf, n_filters, activation=shifted_softplus),
                                            Dense(n_filters, n_filters))

    def forward(self, x, f_ij, idx_i, idx_j, rcut_ij):
        x = self.in2f(x)
        Wij = self.filter_network(f_ij)
        Wij = Wij * rcut_ij[:, None]
        x_ij = x[idx_j] * Wij
        x = x.new_zeros(x.shape).index_add(0, idx_i, x_ij)
        return self.f2out(x)


class SchNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(MAX_Z, BASIS)
        self.radial_basis = GaussianRBF(RBF, CUTOFF)
        self.cutoff_fn = CosineCutoff(CUTOFF)
        self.interactions = nn.ModuleList([SchNetInteraction(BASIS, RBF, FILTERS) for _ in range(LAYERS)])

    def forward(self, z, r_ij, idx_i, idx_j):
        x = self.embedding(z)
        d_ij = torch.norm(r_ij, dim=1)
        f_ij = self.radial_basis(d_ij)
        rcut_ij = self.cutoff_fn(d_ij)
        for interaction in self.interactions:
            x = x + interaction(x, f_ij, idx_i, idx_j, rcut_ij)
        return x


class Atomwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.outnet = nn.Sequential(Dense(BASIS, HIDDEN, activation=shifted_softplus), Dense(HIDDEN, 1))
        self.atomref = nn.Embedding(MAX_Z, 1)
        self.register_buffer('mean', torch.tensor(MEAN))
        self.register_buffer('stddev', torch.tensor(STDDEV))

    def forward(self, x, z, idx_m):
        y = self.outnet(x) * self.stddev + self.mean
        y = (y + self.atomref(z)).squeeze(-1)
        return y.new_zeros(MOLECULES).index_add(0, idx_m, y)


class NeuralNetworkPotential(nn.Module):
    def __init__(self):
        super().__init__()
        self.representation = SchNet()
        self.atomwise = Atomwise()

    def forward(self, R, Z, idx_i, idx_j, idx_m):
        """-> energies (molecules,), forces (atoms, 3)"""
        tracked = torch.is_grad_enabled()
        with torch.enable_grad():
            if not R.requires_grad:
                R = R.detach().requires_grad_()
            x = self.representation(Z, R[idx_j] - R[idx_i], idx_i, idx_j)
            energy = self.atomwise(x, Z, idx_m)
            forces = -torch.autograd.grad(energy.sum(), R, create_graph=tracked)[0]
        return (energy, forces) if tracked else (energy.detach(), forces.detach())


# ---- Flax
def ssp(x):
    return lnn.softplus(x) - math.log(2)


class RadialFeatures(lnn.Module):
    """Gaussians of the distance with centres and widths that are trained, and the smooth envelope."""
    count: int = RBF
    reach: float = CUTOFF

    @lnn.compact
    def __call__(self, distance):
        grid = np.linspace(0, self.reach, self.count)
        centres = self.param('centres', lambda _: jnp.asarray(grid, distance.dtype))
        spreads = self.param('spreads', lambda _: jnp.full(self.count, grid[1], distance.dtype))
        gauss = jnp.exp(-jnp.square((distance[:, None] - centres) / spreads) / 2)
        envelope = jnp.square(jnp.cos(distance * (math.pi / (2 * self.reach))))
        envelope = jnp.where(distance < self.reach, envelope, 0)
        return gauss, envelope


class ContinuousFilterBlock(lnn.Module):
    """One interaction; the blocks are stacked by nn.scan, so a block returns its (carry, output)."""

    @lnn.compact
    def __call__(self, atoms, edges):
        gauss, envelope, receiver, sender = edges
        source = lnn.Dense(FILTERS, use_bias=False, name='project')(atoms)
        kernel = ssp(lnn.Dense(FILTERS, name='filter_a')(gauss))
        kernel = lnn.Dense(FILTERS, name='filter_b')(kernel) * envelope[:, None]
        message = jnp.take(source, sender, axis=0) * kernel
        pooled = jax.ops.segment_sum(message, receiver, num_segments=atoms.shape[0])
        update = ssp(lnn.Dense(BASIS, name='mix_a')(pooled))
        return atoms + lnn.Dense(BASIS, name='mix_b')(update), None


class EnergyModel(lnn.Module):
    """Energy of every molecule from positions, species, directed edges and the atoms' molecule."""
    molecules: int = MOLECULES
    depth: int = LAYERS
    spread: float = STDDEV
    level: float = MEAN

    @lnn.compact
    def __call__(self, xyz, species, receiver, sender, owner):
        table = self.param('species', lnn.initializers.normal(1.), (MAX_Z, BASIS))
        isolated = self.param('isolated', lnn.initializers.normal(1.), (MAX_Z,))
        edge = jnp.take(xyz, sender, axis=0) - jnp.take(xyz, receiver, axis=0)
        distance = jnp.sqrt(jnp.sum(edge * edge, axis=-1))
        gauss, envelope = RadialFeatures(name='radial')(distance)
        stack = lnn.scan(ContinuousFilterBlock, variable_axes={'params': 0}, split_rngs={'params': True},
                         in_axes=lnn.broadcast, length=self.depth)
        atoms, _ = stack(name='blocks')(table[species], (gauss, envelope, receiver, sender))
        hidden = ssp(lnn.Dense(HIDDEN, name='head_a')(atoms))
        share = lnn.Dense(1, name='head_b')(hidden)[:, 0]
        share = share * self.spread + self.level + isolated[species]
        energy = jax.ops.segment_sum(share, owner, num_segments=self.molecules)
        return energy


class Potential(lnn.Module):
    @lnn.compact
    def __call__(self, xyz, species, receiver, sender, owner):
        def total(model, where):
            energy = model(where, species, receiver, sender, owner)
            return energy.sum(), energy
        (_, energy), (slope,) = lnn.value_and_grad(total, EnergyModel(name='energy'), xyz, has_aux=True)
        return energy, -slope


def port_weights(net):
    arr = lambda t: jnp.asarray(t.detach().numpy())

    def dense(layer):
        out = {'kernel': arr(layer.weight).T}
        if layer.bias is not None:
            out['bias'] = arr(layer.bias)
        return out

    rep, head = net.representation, net.atomwise
    blocks = [{'project': dense(b.in2f), 'filter_a': dense(b.filter_network[0]), 'filter_b': dense(b.filter_network[1]),
               'mix_a': dense(b.f2out[0]), 'mix_b': dense(b.f2out[1])} for b in rep.interactions]
    energy = {
        'species': arr(rep.embedding.weight), 'isolated': arr(head.atomref.weight)[:, 0],
        'radial': {'centres': arr(rep.radial_basis.offsets), 'spreads': arr(rep.radial_basis.widths)},
        'blocks': jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks),
        'head_a': dense(head.outnet[0]),
        'head_b': dense(head.outnet[1]),
    }
    return Potential(), {'params': {'energy': energy}}


def build(seed):
    torch.manual_seed(seed)
    net = NeuralNetworkPotential()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if 'radial_basis' in name:
                p.add_(0.1 * torch.rand_like(p) + 0.02)
            else:
                p.copy_(torch.randn_like(p) * (1.3 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.4))
    net.eval()
    r = np.random.RandomState(seed)
    positions, first, second, owner, start = [], [], [], [], 0
    for m, count in enumerate(ATOMS):
        grid = np.stack(np.meshgrid(*[np.arange(2)] * 3), -1).reshape(-1, 3)[r.permutation(8)[:count]]
        positions.append(1.7 * grid + 0.25 * r.randn(count, 3))
        pairs = [(start + i, start + j) for i in range(count) for j in range(count) if i != j]
        first += [i for i, _ in pairs]
        second += [j for _, j in pairs]
        owner += [m] * count
        start += count
    inputs = {'R': np.concatenate(positions).astype(np.float32), 'Z': r.randint(1, MAX_Z, sum(ATOMS)),
              'idx_i': np.array(first), 'idx_j': np.array(second), 'idx_m': np.array(owner)}
    return {'torch': net, 'flax': port_weights(net), 'inputs': inputs, 'flax_inputs': tuple(inputs.values())}


FAULTS = [
    {'title': 'the Gaussians lack the factor one half in their exponent',
     'edits': [('/ spreads) / 2)', '/ spreads))')],
     'layers': ['representation.radial_basis'],
     'between': ('representation.embedding', 'representation.cutoff_fn'),
     'causes': ['scale', 'constant', 'left_out'], 'level': 'outputs'},
    {'title': 'the envelope is not set to zero beyond the cutoff, where the cosine rises again',
     'edits': [('        envelope = jnp.where(distance < self.reach, envelope, 0)\n', '')],
     'layers': ['representation.cutoff_fn'],
     'between': ('representation.radial_basis', 'representation.interactions.0'),
     'causes': ['mask', 'left_out'], 'level': 'outputs'},
    {'title': 'the mean energy is added once to each molecule, not to each of its atoms',
     'edits': [('share = share * self.spread + self.level + isolated[species]', 'share = share * self.spread + isolated[species]'),
               ('energy = jax.ops.segment_sum(share, owner, num_segments=self.molecules)',
                'energy = self.level + jax.ops.segment_sum(share, owner, num_segments=self.molecules)')],
     'layers': ['atomwise'], 'between': ('atomwise.outnet', 'the output'),
     'causes': ['order', 'scale'], 'level': 'outputs'},
    {'title': 'the widths of the Gaussians are held fixed, where torch trains them',
     'edits': [('spreads) / 2)', 'jax.lax.stop_gradient(spreads)) / 2)')],
     'layers': ['representation.radial_basis'], 'between': None, 'causes': ['stop_gradient'], 'level': 'gradients'},
    {'title': 'the port multiplies the last layer\'s weights by the standard deviation, and the code does it again',
     'edits': [("        'head_b': dense(head.outnet[1]),\n",
                "        'head_b': jax.tree.map(lambda a: a * STDDEV, dense(head.outnet[1])),\n")],
     'layers': ['atomwise.outnet.1'], 'between': None, 'causes': ['values', 'scale'], 'level': 'bits'},
]
