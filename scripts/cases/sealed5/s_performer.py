"""Performer language model: FAVOR+ causal linear attention (after performer-pytorch), and its NNX port."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import einsum, nn

VOCAB, DIM, DEPTH, HEADS, DIM_HEAD, FEATURES = 19, 12, 2, 3, 5, 14
MAX_LEN, LENGTH, BATCH, MULT, DROPOUT = 9, 7, 2, 2, 0.1


# ---- PyTorch
def orthogonal_matrix_chunk(cols):
    q, _ = torch.linalg.qr(torch.randn(cols, cols), mode='reduced')
    return q.t()


def gaussian_orthogonal_random_matrix(nb_rows, nb_columns):
    blocks = [orthogonal_matrix_chunk(nb_columns) for _ in range(nb_rows // nb_columns)]
    rest = nb_rows - nb_columns * len(blocks)
    if rest:
        blocks.append(orthogonal_matrix_chunk(nb_columns)[:rest])
    multiplier = torch.randn(nb_rows, nb_columns).norm(dim=1)
    return torch.diag(multiplier) @ torch.cat(blocks)


def softmax_kernel(data, projection_matrix, is_query, eps=1e-4):
    data_normalizer = data.shape[-1] ** -0.25
    ratio = projection_matrix.shape[0] ** -0.5
    data_dash = einsum('bhid,jd->bhij', data_normalizer * data, projection_matrix)
    diag_data = (data ** 2).sum(dim=-1)
    diag_data = ((diag_data / 2.0) * (data_normalizer ** 2)).unsqueeze(-1)
    if is_query:
        top = torch.amax(data_dash, dim=-1, keepdim=True).detach()
    else:
        top = torch.amax(data_dash, dim=(-1, -2), keepdim=True).detach()
    return ratio * (torch.exp(data_dash - diag_data - top) + eps)


def causal_linear_attention(q, k, v, eps=1e-6):
    k_cumsum = k.cumsum(dim=-2)
    D_inv = 1. / einsum('bhnd,bhnd->bhn', q, k_cumsum + eps)
    context = einsum('bhnd,bhne->bhnde', k, v).cumsum(dim=-3)
    return einsum('bhnde,bhnd,bhn->bhne', context, q, D_inv)


class FastAttention(nn.Module):
    def __init__(self, dim_heads, nb_features):
        super().__init__()
        self.register_buffer('projection_matrix', gaussian_orthogonal_random_matrix(nb_features, dim_heads))

    def forward(self, q, k, v):
        q = softmax_kernel(q, self.projection_matrix, is_query=True)
        k = softmax_kernel(k, self.projection_matrix, is_query=False)
        return causal_linear_attention(q, k, v)


class SelfAttention(nn.Module):
    def __init__(self, dim, heads, dim_head, nb_features):
        super().__init__()
        inner_dim = dim_head * heads
        self.fast_attention = FastAttention(dim_head, nb_features)
        self.heads = heads
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_k = nn.Linear(dim, inner_dim, bias=False)
        self.to_v = nn.Linear(dim, inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, dim)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2)
                   for t in (self.to_q(x), self.to_k(x), self.to_v(x)))
        out = self.fast_attention(q, k, v)
        out = out.transpose(1, 2).reshape(b, n, -1)
        return self.dropout(self.to_out(out))


class FeedForward(nn.Module):
    def __init__(self, dim, mult):
        super().__init__()
        self.w1 = nn.Linear(dim, dim * mult * 2)
        self.act = nn.GELU()
        self.dropout = nn.Dropout(DROPOUT)
        self.w2 = nn.Linear(dim * mult, dim)

    def forward(self, x):
        x, v = self.w1(x).chunk(2, dim=-1)
        x = self.act(x) * v
        return self.w2(self.dropout(x))


class PreLayerNorm(nn.Module):
    def __init__(self, dim, fn):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x):
        return self.fn(self.norm(x))


class SequentialSequence(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        for f, g in self.layers:
            x = x + f(x)
            x = x + g(x)
        return x


class Performer(nn.Module):
    def __init__(self):
        super().__init__()
        layers = nn.ModuleList([nn.ModuleList([
            PreLayerNorm(DIM, SelfAttention(DIM, HEADS, DIM_HEAD, FEATURES)),
            PreLayerNorm(DIM, FeedForward(DIM, MULT))]) for _ in range(DEPTH)])
        self.net = SequentialSequence(layers)

    def forward(self, x):
        return self.net(x)


class PerformerLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.token_emb = nn.Embedding(VOCAB, DIM)
        self.pos_emb = nn.Embedding(MAX_LEN, DIM)
        self.dropout = nn.Dropout(DROPOUT)
        self.performer = Performer()
        self.norm = nn.LayerNorm(DIM)
        self.to_out = nn.Linear(DIM, VOCAB)

    def forward(self, x):
        x = self.token_emb(x) + self.pos_emb(torch.arange(x.shape[1], device=x.device))
        x = self.performer(self.dropout(x))
        return self.to_out(self.norm(x))


# ---- Flax
class Projection(nnx.Variable):
    """The fixed random features: saved, never trained."""


def positive_features(x, omega, axes, eps=1e-4):
    """x: (batch, time, heads, depth) -> (batch, time, heads, features)."""
    x = x / math.sqrt(math.sqrt(x.shape[-1]))
    proj = jnp.einsum('bthd,md->bthm', x, omega)
    half_norm = 0.5 * jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    peak = jax.lax.stop_gradient(jnp.max(proj, axis=axes, keepdims=True))
    return (jnp.exp(proj - half_norm - peak) + eps) / math.sqrt(omega.shape[0])


def prefix_attention(qf, kf, v, eps=1e-6):
    """Walks along time with the running sums of k and k v^T as the state."""
    def step(state, now):
        total, outer = state
        q, k, val = now
        total = total + k
        outer = outer + k[..., :, None] * val[..., None, :]
        numerator = jnp.einsum('bhm,bhmd->bhd', q, outer)
        denominator = jnp.sum(q * (total + eps), axis=-1)
        return (total, outer), numerator / denominator[..., None]

    time_major = [jnp.moveaxis(a, 1, 0) for a in (qf, kf, v)]
    b, _, h, m = kf.shape
    init = (jnp.zeros((b, h, m), kf.dtype), jnp.zeros((b, h, m, v.shape[-1]), kf.dtype))
    _, out = jax.lax.scan(step, init, tuple(time_major))
    return jnp.moveaxis(out, 0, 1)


class Favor(nnx.Module):
    def __init__(self, width, heads, depth, features, *, rngs):
        self.qkv = nnx.LinearGeneral(width, (3, heads, depth), use_bias=False, rngs=rngs)
        self.merge = nnx.LinearGeneral((heads, depth), width, axis=(-2, -1), rngs=rngs)
        self.omega = Projection(rngs.normal((features, depth), jnp.float32))
        self.drop = nnx.Dropout(DROPOUT, rngs=rngs)

    def __call__(self, x):
        q, k, v = jnp.moveaxis(self.qkv(x), -3, 0)
        omega = self.omega[...]
        qf = positive_features(q, omega, axes=-1)
        kf = positive_features(k, omega, axes=(1, 3))
        return self.drop(self.merge(prefix_attention(qf, kf, v)))


class GatedMLP(nnx.Module):
    def __init__(self, width, hidden, *, rngs):
        self.up = nnx.Linear(width, 2 * hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)
        self.inner_drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        gate, value = jnp.split(self.up(x), 2, axis=-1)
        return self.down(self.inner_drop(jax.nn.gelu(gate, approximate=False) * value))


class Layer(nnx.Module):
    def __init__(self, *, rngs):
        self.ln_a = nnx.LayerNorm(DIM, epsilon=1e-5, rngs=rngs)
        self.mixer = Favor(DIM, HEADS, DIM_HEAD, FEATURES, rngs=rngs)
        self.ln_b = nnx.LayerNorm(DIM, epsilon=1e-5, rngs=rngs)
        self.mlp = GatedMLP(DIM, DIM * MULT, rngs=rngs)

    def __call__(self, x):
        x = x + self.mixer(self.ln_a(x))
        return x + self.mlp(self.ln_b(x))


class LinearAttentionLM(nnx.Module):
    def __init__(self, *, rngs):
        self.words = nnx.Param(rngs.normal((VOCAB, DIM), jnp.float32))
        self.places = nnx.Param(rngs.normal((MAX_LEN, DIM), jnp.float32))
        self.drop = nnx.Dropout(DROPOUT, rngs=rngs)
        self.layers = nnx.List([Layer(rngs=rngs) for _ in range(DEPTH)])
        self.final = nnx.LayerNorm(DIM, epsilon=1e-5, rngs=rngs)
        self.readout = nnx.Linear(DIM, VOCAB, rngs=rngs)

    def __call__(self, ids):
        x = self.drop(self.words[...][ids] + self.places[...][:ids.shape[1]])
        for layer in self.layers:
            x = layer(x)
        return self.readout(self.final(x))


def port_weights(net):
    arr = lambda t: jnp.asarray(t.detach().numpy())
    model = LinearAttentionLM(rngs=nnx.Rngs(0))

    def linear(dst, src):
        dst.kernel.set_value(arr(src.weight.t()))
        dst.bias.set_value(arr(src.bias))

    def norm(dst, src):
        dst.scale.set_value(arr(src.weight))
        dst.bias.set_value(arr(src.bias))

    model.words.set_value(arr(net.token_emb.weight))
    model.places.set_value(arr(net.pos_emb.weight))
    for dst, (att, ff) in zip(model.layers, net.performer.net.layers):
        norm(dst.ln_a, att.norm)
        norm(dst.ln_b, ff.norm)
        a = att.fn
        heads = [arr(w.weight).T.reshape(DIM, HEADS, DIM_HEAD) for w in (a.to_q, a.to_k, a.to_v)]
        dst.mixer.qkv.kernel.set_value(jnp.stack(heads, axis=1))
        dst.mixer.merge.kernel.set_value(arr(a.to_out.weight).T.reshape(HEADS, DIM_HEAD, DIM))
        dst.mixer.merge.bias.set_value(arr(a.to_out.bias))
        dst.mixer.omega.set_value(arr(a.fast_attention.projection_matrix))
        linear(dst.mlp.up, ff.fn.w1)
        linear(dst.mlp.down, ff.fn.w2)
    norm(model.final, net.norm)
    linear(model.readout, net.to_out)
    model.eval()
    return model


def build(seed):
    torch.manual_seed(seed)
    net = PerformerLM()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (0.6 if p.dim() > 1 else 0.3) + (0. if p.dim() > 1 else 0.4))
    net.eval()
    ids = np.random.RandomState(seed).randint(0, VOCAB, (BATCH, LENGTH))
    return {'torch': net, 'flax': port_weights(net), 'inputs': ids}


FAULTS = [
    {'title': 'the squared norm in the exponent is taken before the scaling by depth^-1/4, so it is too large',
     'edits': [('    x = x / math.sqrt(math.sqrt(x.shape[-1]))\n    proj = jnp.einsum(\'bthd,md->bthm\', x, omega)\n    half_norm = 0.5 * jnp.sum(jnp.square(x), axis=-1, keepdims=True)\n',
                '    half_norm = 0.5 * jnp.sum(jnp.square(x), axis=-1, keepdims=True)\n    x = x / math.sqrt(math.sqrt(x.shape[-1]))\n    proj = jnp.einsum(\'bthd,md->bthm\', x, omega)\n')],
     'layers': ['performer.net.layers.0.0.fn.fast_attention', 'performer.net.layers.0.0.fn'],
     'between': ('performer.net.layers.0.0.fn.to_v', 'performer.net.layers.0.0.fn.to_out'),
     'causes': ['scale', 'order', 'operand'], 'level': 'outputs'},
    {'title': 'the output of a step is read from the state before the step\'s own key is added (strictly causal numerator)',
     'edits': [("numerator = jnp.einsum('bhm,bhmd->bhd', q, outer)", "numerator = jnp.einsum('bhm,bhmd->bhd', q, state[1])")],
     'layers': ['performer.net.layers.0.0.fn.fast_attention', 'performer.net.layers.0.0.fn'],
     'between': ('performer.net.layers.0.0.fn.to_v', 'performer.net.layers.0.0.fn.to_out'),
     'causes': ['causal', 'operand', 'order'], 'level': 'outputs'},
    {'title': 'the gated feed-forward applies GELU to the second half and multiplies by the first',
     'edits': [('gate, value = jnp.split(self.up(x), 2, axis=-1)', 'value, gate = jnp.split(self.up(x), 2, axis=-1)')],
     'layers': ['performer.net.layers.0.1.fn', 'performer.net.layers.0.1.fn.act'],
     'between': ('performer.net.layers.0.1.fn.w1', 'performer.net.layers.0.1.fn.w2'),
     'causes': ['blocks', 'swapped', 'operand'], 'level': 'outputs'},
    {'title': 'the maximum subtracted in the feature map is not cut off from the gradient',
     'edits': [('peak = jax.lax.stop_gradient(jnp.max(proj, axis=axes, keepdims=True))', 'peak = jnp.max(proj, axis=axes, keepdims=True)')],
     'layers': ['performer.net.layers.0.0.fn.fast_attention', 'performer.net.layers.0.0.fn',
                'performer.net.layers.1.0.fn.fast_attention', 'performer.net.layers.1.0.fn'],
     'between': None, 'causes': ['stop_gradient'], 'level': 'gradients'},
    {'title': 'the dropout inside the feed-forward keeps another share of its values',
     'edits': [('self.inner_drop = nnx.Dropout(0.1, rngs=rngs)', 'self.inner_drop = nnx.Dropout(0.2, rngs=rngs)')],
     'layers': ['performer.net.layers.0.1.fn.dropout', 'performer.net.layers.1.1.fn.dropout'],
     'between': None, 'causes': ['training_attribute', 'dropout'], 'level': 'attributes'},
]
