"""RWKV-4-like language model: linear attention with per-channel decay; the port is functional JAX with lax.scan."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn

VOCAB, WIDTH, HIDDEN, LAYERS = 37, 20, 33, 2


class RWKV_TimeMix(nn.Module):
    def __init__(self, n_embd):
        super().__init__()
        self.time_decay = nn.Parameter(torch.zeros(n_embd))
        self.time_first = nn.Parameter(torch.zeros(n_embd))
        self.time_mix_k = nn.Parameter(torch.ones(1, 1, n_embd))
        self.time_mix_v = nn.Parameter(torch.ones(1, 1, n_embd))
        self.time_mix_r = nn.Parameter(torch.ones(1, 1, n_embd))
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.key = nn.Linear(n_embd, n_embd, bias=False)
        self.value = nn.Linear(n_embd, n_embd, bias=False)
        self.receptance = nn.Linear(n_embd, n_embd, bias=False)
        self.output = nn.Linear(n_embd, n_embd, bias=False)

    def wkv(self, w, u, k, v):
        b, t, c = k.shape
        num, den = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0])
        top = torch.full_like(num, -1e38)
        out = []
        for i in range(t):
            kk, vv = k[:, i], v[:, i]
            q = torch.maximum(top, kk + u)
            e1, e2 = torch.exp(top - q), torch.exp(kk + u - q)
            out.append((e1 * num + e2 * vv) / (e1 * den + e2))
            q = torch.maximum(top + w, kk)
            e1, e2 = torch.exp(top + w - q), torch.exp(kk - q)
            num, den, top = e1 * num + e2 * vv, e1 * den + e2, q
        return torch.stack(out, dim=1)

    def forward(self, x):
        xx = self.time_shift(x)
        xk = x * self.time_mix_k + xx * (1 - self.time_mix_k)
        xv = x * self.time_mix_v + xx * (1 - self.time_mix_v)
        xr = x * self.time_mix_r + xx * (1 - self.time_mix_r)
        k = self.key(xk)
        v = self.value(xv)
        sr = torch.sigmoid(self.receptance(xr))
        rwkv = sr * self.wkv(-torch.exp(self.time_decay), self.time_first, k, v)
        return self.output(rwkv)


class RWKV_ChannelMix(nn.Module):
    def __init__(self, n_embd, hidden):
        super().__init__()
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.time_mix_k = nn.Parameter(torch.ones(1, 1, n_embd))
        self.time_mix_r = nn.Parameter(torch.ones(1, 1, n_embd))
        self.key = nn.Linear(n_embd, hidden, bias=False)
        self.receptance = nn.Linear(n_embd, n_embd, bias=False)
        self.value = nn.Linear(hidden, n_embd, bias=False)

    def forward(self, x):
        xx = self.time_shift(x)
        xk = x * self.time_mix_k + xx * (1 - self.time_mix_k)
        xr = x * self.time_mix_r + xx * (1 - self.time_mix_r)
        k = torch.square(torch.relu(self.key(xk)))
        return torch.sigmoid(self.receptance(xr)) * self.value(k)


class Block(nn.Module):
    def __init__(self, layer_id, n_embd, hidden):
        super().__init__()
        self.layer_id = layer_id
        self.ln1 = nn.LayerNorm(n_embd)
        self.ln2 = nn.LayerNorm(n_embd)
        if layer_id == 0:
            self.ln0 = nn.LayerNorm(n_embd)
        self.att = RWKV_TimeMix(n_embd)
        self.ffn = RWKV_ChannelMix(n_embd, hidden)

    def forward(self, x):
        if self.layer_id == 0:
            x = self.ln0(x)
        x = x + self.att(self.ln1(x))
        return x + self.ffn(self.ln2(x))


class RWKV(nn.Module):
    def __init__(self, vocab=VOCAB, n_embd=WIDTH, hidden=HIDDEN, n_layer=LAYERS):
        super().__init__()
        self.emb = nn.Embedding(vocab, n_embd)
        self.blocks = nn.ModuleList([Block(i, n_embd, hidden) for i in range(n_layer)])
        self.ln_out = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab, bias=False)

    def forward(self, idx):
        x = self.emb(idx)
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_out(x))


def layer_norm(p, x, eps=1e-5):
    mean = x.mean(axis=-1, keepdims=True)
    var = jnp.square(x - mean).mean(axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + eps) * p["scale"] + p["bias"]


def shift(x):
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))


def lerp(x, prev, mix):
    return x * mix + prev * (1 - mix)


def wkv_scan(decay, bonus, k, v):
    """k, v: (batch, time, channels). Log-space recurrence, the running maximum keeps exp in range."""

    def step(state, kv):
        num, den, top = state
        kt, vt = kv
        m = jnp.maximum(top, kt + bonus)
        a, b = jnp.exp(top - m), jnp.exp(kt + bonus - m)
        y = (a * num + b * vt) / (a * den + b)
        m = jnp.maximum(top + decay, kt)
        a, b = jnp.exp(top + decay - m), jnp.exp(kt - m)
        return (a * num + b * vt, a * den + b, m), y

    zeros = jnp.zeros_like(v[:, 0])
    init = (zeros, zeros, jnp.full_like(zeros, -1e38))
    _, y = jax.lax.scan(step, init, (k.swapaxes(0, 1), v.swapaxes(0, 1)))
    return y.swapaxes(0, 1)


def time_mixing(p, x):
    prev = shift(x)
    k = lerp(x, prev, p["mix_k"]) @ p["key"]
    v = lerp(x, prev, p["mix_v"]) @ p["value"]
    r = jax.nn.sigmoid(lerp(x, prev, p["mix_r"]) @ p["receptance"])
    y = wkv_scan(-jnp.exp(p["decay"]), p["bonus"], k, v)
    return (r * y) @ p["output"]


def channel_mixing(p, x):
    prev = shift(x)
    xk = lerp(x, prev, p["mix_k"])
    r = jax.nn.sigmoid(lerp(x, prev, p["mix_r"]) @ p["receptance"])
    k = jnp.square(jax.nn.relu(xk @ p["key"]))
    return r * (k @ p["value"])


def rwkv_forward(params, tokens):
    x = params["embed"][tokens]
    x = layer_norm(params["ln0"], x)
    for i in range(len(params["blocks"])):
        p = params["blocks"][str(i)]
        att_in = layer_norm(p["ln1"], x)
        x = x + time_mixing(p["att"], att_in)
        x = x + channel_mixing(p["ffn"], layer_norm(p["ln2"], x))
    return layer_norm(params["ln_out"], x) @ params["head"]


def params_from_torch(net):
    w = {k: jnp.asarray(v.detach().numpy()) for k, v in net.state_dict().items()}
    norm = lambda name: {"scale": w[name + ".weight"], "bias": w[name + ".bias"]}
    blocks = {}
    for i in range(len(net.blocks)):
        a, f = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        att = {n: w[a + n + ".weight"].T for n in ("key", "value", "receptance", "output")}
        att |= {"mix_k": w[a + "time_mix_k"].squeeze(), "mix_v": w[a + "time_mix_v"].squeeze()}
        att |= {"mix_r": w[a + "time_mix_r"].squeeze(), "decay": w[a + "time_decay"], "bonus": w[a + "time_first"]}
        ffn = {n: w[f + n + ".weight"].T for n in ("key", "value", "receptance")}
        ffn |= {n: w[f + "time_" + n].squeeze() for n in ("mix_k", "mix_r")}
        blocks[str(i)] = {"ln1": norm(f"blocks.{i}.ln1"), "ln2": norm(f"blocks.{i}.ln2"), "att": att, "ffn": ffn}
    return {"embed": w["emb.weight"], "ln0": norm("blocks.0.ln0"), "blocks": blocks,
            "ln_out": norm("ln_out"), "head": w["head.weight"].T}


def build(seed):
    torch.manual_seed(seed)
    net = RWKV().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "time_mix" in name:
                p.copy_(torch.rand_like(p))
            elif "time_decay" in name:
                p.copy_(torch.linspace(-3, 1.5, p.numel())[torch.randperm(p.numel())])
            elif "ln" in name and name.endswith("weight"):
                p.copy_(1 + 0.2 * torch.randn_like(p))
            else:
                p.copy_(0.4 * torch.randn_like(p))
    tokens = np.random.default_rng(seed).integers(0, VOCAB, size=(3, 11))
    return {"torch": net, "flax": (rwkv_forward, params_from_torch(net)), "inputs": tokens}


FAULTS = [
    {
        "title": "the decay parameter is used as the rate itself, without exp",
        "edits": [("wkv_scan(-jnp.exp(p[\"decay\"])", "wkv_scan(p[\"decay\"]")],
        "layers": ["blocks.0.att"],
        "between": ("blocks.0.att.receptance", "blocks.0.att.output"),
        "causes": ["left_out"],
        "level": "outputs",
    },
    {
        "title": "token shift wraps round: the first step mixes with the last",
        "edits": [("return jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))", "return jnp.roll(x, 1, axis=1)")],
        "layers": ["blocks.0.att.time_shift", "blocks.0.att"],
        "between": ("blocks.0.ln1", "blocks.0.att.key"),
        "causes": ["padding", "operation"],
        "level": "outputs",
    },
    {
        "title": "channel mixing weighs the previous step with mix_k, the present with 1 - mix_k",
        "edits": [('xk = lerp(x, prev, p["mix_k"])', 'xk = lerp(prev, x, p["mix_k"])')],
        "layers": ["blocks.0.ffn"],
        "between": ("blocks.0.ln2", "blocks.0.ffn.key"),
        "causes": ["operand", "swapped"],
        "level": "outputs",
    },
    {
        "title": "receptance gates the result of the output projection, not its input",
        "edits": [('return (r * y) @ p["output"]', 'return r * (y @ p["output"])')],
        "layers": ["blocks.0.att"],
        "between": ("blocks.0.att.receptance", "blocks.0.att.output"),
        "causes": ["order"],
        "level": "outputs",
    },
    {
        "title": "plain ReLU, not its square, in channel mixing",
        "edits": [('jnp.square(jax.nn.relu(xk @ p["key"]))', 'jax.nn.relu(xk @ p["key"])')],
        "layers": ["blocks.0.ffn"],
        "between": ("blocks.0.ffn.key", "blocks.0.ffn.receptance"),
        "causes": ["activation", "left_out"],
        "level": "outputs",
    },
    {
        "title": "the residual stream of block 0 skips ln0",
        "edits": [('    x = layer_norm(params["ln0"], x)\n', ""),
                  ('att_in = layer_norm(p["ln1"], x)',
                   'att_in = layer_norm(p["ln1"], layer_norm(params["ln0"], x) if i == 0 else x)')],
        "layers": ["blocks.0"],
        "between": ("blocks.0.att.output", "blocks.0.ln2"),
        "causes": ["residual"],
        "level": "outputs",
    },
    {
        "title": "time_mix_k and time_mix_v loaded into one another's place",
        "edits": [('"mix_k": w[a + "time_mix_k"].squeeze(), "mix_v": w[a + "time_mix_v"].squeeze()',
                   '"mix_k": w[a + "time_mix_v"].squeeze(), "mix_v": w[a + "time_mix_k"].squeeze()')],
        "layers": ["blocks.0.att"],
        "between": ("blocks.0.ln1", "blocks.0.att.key"),
        "causes": ["swapped"],
        "level": "outputs",
    },
    {
        "title": "keys and values pass through bfloat16 before the recurrence",
        "edits": [('y = wkv_scan(-jnp.exp(p["decay"]), p["bonus"], k, v)',
                   'k, v = (z.astype(jnp.bfloat16).astype(x.dtype) for z in (k, v))\n'
                   '    y = wkv_scan(-jnp.exp(p["decay"]), p["bonus"], k, v)')],
        "layers": ["blocks.0.att"],
        "between": ("blocks.0.att.receptance", "blocks.0.att.output"),
        "causes": ["dtype"],
        "level": "outputs",
    },
    {
        "title": "the current step's bonus stays in the state's running sums",
        "edits": [("m = jnp.maximum(top + decay, kt)\n        a, b = jnp.exp(top + decay - m), jnp.exp(kt - m)",
                   "m = jnp.maximum(top + decay, kt + bonus)\n        a, b = jnp.exp(top + decay - m), jnp.exp(kt + bonus - m)")],
        "layers": ["blocks.0.att"],
        "between": ("blocks.0.att.receptance", "blocks.0.att.output"),
        "causes": ["operand", "left_out"],
        "level": "outputs",
    },
]
