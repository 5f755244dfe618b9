"""Decision Transformer: returns, states and actions interleaved, GPT-2 blocks with left-padded windows, three heads."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen
from torch import nn


class Conv1D(nn.Module):
    """GPT-2's linear layer; the weight lies as [in, out]."""

    def __init__(self, nin, nout):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(nin, nout))
        self.bias = nn.Parameter(torch.zeros(nout))

    def forward(self, x):
        return x @ self.weight + self.bias


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.c_attn = Conv1D(dim, 3 * dim)
        self.c_proj = Conv1D(dim, dim)

    def forward(self, x, mask):
        b, t, d = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.c_attn(x).split(d, dim=2))
        w = q @ k.transpose(-1, -2) / (d // self.heads) ** 0.5
        keep = torch.ones(t, t, dtype=torch.bool).tril() & mask[:, None, None, :]
        w = w.masked_fill(~keep, torch.finfo(w.dtype).min).softmax(dim=-1)
        return self.c_proj((w @ v).transpose(1, 2).reshape(b, t, d))


class MLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.c_fc = Conv1D(dim, 4 * dim)
        self.act = nn.ReLU()
        self.c_proj = Conv1D(4 * dim, dim)

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)

    def forward(self, x, mask):
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class DecisionTransformer(nn.Module):
    def __init__(self, state_dim=7, act_dim=3, hidden=12, heads=3, layers=2, max_ep_len=20):
        super().__init__()
        self.embed_timestep = nn.Embedding(max_ep_len, hidden)
        self.embed_return = nn.Linear(1, hidden)
        self.embed_state = nn.Linear(state_dim, hidden)
        self.embed_action = nn.Linear(act_dim, hidden)
        self.embed_ln = nn.LayerNorm(hidden)
        self.h = nn.ModuleList([Block(hidden, heads) for _ in range(layers)])
        self.ln_f = nn.LayerNorm(hidden)
        self.predict_state = nn.Linear(hidden, state_dim)
        self.predict_action = nn.Sequential(nn.Linear(hidden, act_dim), nn.Tanh())
        self.predict_return = nn.Linear(hidden, 1)

    def forward(self, states, actions, returns_to_go, timesteps, attention_mask):
        b, t = states.shape[:2]
        s, a, r = self.embed_state(states), self.embed_action(actions), self.embed_return(returns_to_go)
        time = self.embed_timestep(timesteps)
        s, a, r = s + time, a + time, r + time
        x = torch.stack((r, s, a), dim=1).permute(0, 2, 1, 3).reshape(b, 3 * t, -1)
        x = self.embed_ln(x)
        mask = torch.stack((attention_mask,) * 3, dim=1).permute(0, 2, 1).reshape(b, 3 * t).bool()
        for block in self.h:
            x = block(x, mask)
        x = self.ln_f(x).reshape(b, t, 3, -1).permute(0, 2, 1, 3)
        return self.predict_state(x[:, 2]), self.predict_action(x[:, 1]), self.predict_return(x[:, 2])


# ---- Linen ----


class CausalAttention(linen.Module):
    heads: int

    @linen.compact
    def __call__(self, x, valid):
        t, d = x.shape[-2:]
        head = d // self.heads
        qkv = linen.DenseGeneral((3, self.heads, head), name="qkv")(x)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * head ** -0.5
        seen = jnp.tril(jnp.ones((t, t), bool)) & valid[:, None, None, :]
        probs = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min), axis=-1)
        y = jnp.einsum("bhqk,bkhd->bqhd", probs, v)
        return linen.DenseGeneral(d, axis=(-2, -1), name="out")(y)


class GPTLayer(linen.Module):
    heads: int

    @linen.compact
    def __call__(self, x, valid):
        x = x + CausalAttention(self.heads, name="attention")(linen.LayerNorm(epsilon=1e-5, name="norm1")(x), valid)
        y = linen.Dense(4 * x.shape[-1], name="up")(linen.LayerNorm(epsilon=1e-5, name="norm2")(x))
        return x + linen.Dense(x.shape[-1], name="down")(linen.relu(y))


class FlaxDecision(linen.Module):
    state_dim: int = 7
    act_dim: int = 3
    dim: int = 12
    heads: int = 3
    depth: int = 2
    max_steps: int = 20

    @linen.compact
    def __call__(self, states, actions, rtg, timesteps, valid):
        b, t = timesteps.shape
        time = linen.Embed(self.max_steps, self.dim, name="time")(timesteps)
        r = linen.Dense(self.dim, name="rtg")(rtg) + time
        s = linen.Dense(self.dim, name="state")(states) + time
        a = linen.Dense(self.dim, name="action")(actions) + time
        x = jnp.stack((r, s, a), axis=2).reshape(b, 3 * t, self.dim)
        x = linen.LayerNorm(epsilon=1e-5, name="norm_in")(x)
        mask = jnp.repeat(valid, 3, axis=1).astype(bool)
        for i in range(self.depth):
            x = GPTLayer(self.heads, name=f"layer_{i}")(x, mask)
        x = linen.LayerNorm(epsilon=1e-5, name="norm_out")(x)
        at_state, at_action = x[:, 1::3], x[:, 2::3]
        next_state = linen.Dense(self.state_dim, name="next_state")(at_action)
        action = jnp.tanh(linen.Dense(self.act_dim, name="policy")(at_state))
        return next_state, action, linen.Dense(1, name="next_return")(at_action)


def port(net):
    f = lambda t: jnp.asarray(t.detach().numpy())
    lin = lambda m: {"kernel": f(m.weight).T, "bias": f(m.bias)}
    conv = lambda m: {"kernel": f(m.weight), "bias": f(m.bias)}
    norm = lambda m: {"scale": f(m.weight), "bias": f(m.bias)}

    def layer(m):
        d, n = m.attn.c_proj.weight.shape[0], m.attn.heads
        attention = {
            "qkv": {"kernel": f(m.attn.c_attn.weight).reshape(d, 3, n, d // n),
                    "bias": f(m.attn.c_attn.bias).reshape(3, n, d // n)},
            "out": {"kernel": f(m.attn.c_proj.weight).reshape(n, d // n, d), "bias": f(m.attn.c_proj.bias)},
        }
        return {"attention": attention, "norm1": norm(m.ln_1), "norm2": norm(m.ln_2),
                "up": conv(m.mlp.c_fc), "down": conv(m.mlp.c_proj)}

    params = {
        "time": {"embedding": f(net.embed_timestep.weight)},
        "rtg": lin(net.embed_return), "state": lin(net.embed_state), "action": lin(net.embed_action),
        "norm_in": norm(net.embed_ln), "norm_out": norm(net.ln_f),
        "next_state": lin(net.predict_state), "policy": lin(net.predict_action[0]),
        "next_return": lin(net.predict_return),
    }
    params.update({f"layer_{i}": layer(m) for i, m in enumerate(net.h)})
    return {"params": params}


def build(seed):
    torch.manual_seed(seed)
    net = DecisionTransformer().eval()
    for name, p in net.named_parameters():
        p.data.uniform_(0.6, 1.5) if "ln" in name and name.endswith("weight") else p.data.normal_(0, 0.35)
    model = FlaxDecision()
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(4, 5, 7)).astype(np.float32)
    actions = rng.uniform(-1, 1, size=(4, 5, 3)).astype(np.float32)
    returns = rng.uniform(0.5, 3, size=(4, 5, 1)).astype(np.float32)
    pads = np.array([0, 2, 3, 1])
    valid = (np.arange(5)[None] >= pads[:, None]).astype(np.int64)
    timesteps = np.maximum(np.arange(5)[None] - pads[:, None] + rng.integers(0, 14, (4, 1)), 0) * valid
    flax = (lambda variables, *inputs: model.apply(variables, *inputs), port(net))
    return {"torch": net, "flax": flax, "inputs": (states, actions, returns, timesteps, valid)}


FAULTS = [
    {
        "title": "the time step's embedding is not added to the return's token",
        "edits": [("r = linen.Dense(self.dim, name=\"rtg\")(rtg) + time", "r = linen.Dense(self.dim, name=\"rtg\")(rtg)")],
        "layers": ["", "embed_return"],
        "between": ("embed_timestep", "embed_ln"),
        "causes": ["residual", "left_out", "wiring"],
        "level": "outputs",
    },
    {
        "title": "GPT-2's usual GELU where this model has a ReLU",
        "edits": [("linen.relu(y)", "linen.gelu(y)")],
        "layers": ["h.0.mlp.act", "h.0.mlp"],
        "causes": ["activation", "gelu"],
        "level": "outputs",
    },
    {
        "title": "actions predicted from the tokens of the actions, not of the states",
        "edits": [("(linen.Dense(self.act_dim, name=\"policy\")(at_state))", "(linen.Dense(self.act_dim, name=\"policy\")(at_action))")],
        "layers": ["predict_action", ""],
        "between": ("ln_f", "predict_action"),
        "causes": ["token", "offset", "operand", "swapped"],
        "level": "outputs",
    },
    {
        "title": "the attention's output projection transposed as if it were an nn.Linear",
        "edits": [("f(m.attn.c_proj.weight).reshape(n, d // n, d)", "f(m.attn.c_proj.weight).T.reshape(n, d // n, d)")],
        "layers": ["h.0.attn.c_proj", "h.1.attn.c_proj"],
        "causes": ["transposed"],
        "level": "bits",
    },
    {
        "title": "mask of the three interleaved kinds of token tiled, not repeated step by step",
        "edits": [("mask = jnp.repeat(valid, 3, axis=1).astype(bool)", "mask = jnp.tile(valid, (1, 3)).astype(bool)")],
        "layers": ["", "h.0.attn", "h.0"],
        "causes": ["mask", "rearranged"],
        "level": "outputs",
    },
]
