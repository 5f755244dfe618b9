"""A Conformer encoder: macaron feed-forwards, Transformer-XL relative attention, GLU and depthwise convolution with BatchNorm."""
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch


class RelPositionalEncoding(torch.nn.Module):
    """Table of sines for the relative distances T-1 ... -(T-1)."""

    def __init__(self, d_model):
        super().__init__()
        self.d_model = d_model
        self.xscale = math.sqrt(d_model)

    def forward(self, x):
        t = x.size(1)
        pos = torch.arange(t - 1, -t, -1, dtype=x.dtype).unsqueeze(1)
        div = torch.exp(torch.arange(0, self.d_model, 2, dtype=x.dtype) * -(math.log(10000.0) / self.d_model))
        pe = x.new_zeros(2 * t - 1, self.d_model)
        pe[:, 0::2] = torch.sin(pos * div)
        pe[:, 1::2] = torch.cos(pos * div)
        return x * self.xscale, pe.unsqueeze(0)


class RelPositionMultiHeadAttention(torch.nn.Module):
    def __init__(self, d_model, n_head):
        super().__init__()
        self.h, self.d_k = n_head, d_model // n_head
        self.linear_q = torch.nn.Linear(d_model, d_model)
        self.linear_k = torch.nn.Linear(d_model, d_model)
        self.linear_v = torch.nn.Linear(d_model, d_model)
        self.linear_out = torch.nn.Linear(d_model, d_model)
        self.linear_pos = torch.nn.Linear(d_model, d_model, bias=False)
        self.pos_bias_u = torch.nn.Parameter(torch.zeros(n_head, self.d_k))
        self.pos_bias_v = torch.nn.Parameter(torch.zeros(n_head, self.d_k))

    def rel_shift(self, x):
        b, h, q, p = x.size()
        x = torch.nn.functional.pad(x, (1, 0)).view(b, h, p + 1, q)
        return x[:, :, 1:].reshape(b, h, q, p)

    def forward(self, x, pos_emb, pad_mask):
        b, t, _ = x.size()
        q = self.linear_q(x).view(b, t, self.h, self.d_k)
        k = self.linear_k(x).view(b, t, self.h, self.d_k).transpose(1, 2)
        v = self.linear_v(x).view(b, t, self.h, self.d_k).transpose(1, 2)
        p = self.linear_pos(pos_emb).view(1, -1, self.h, self.d_k).transpose(1, 2)
        q_u = (q + self.pos_bias_u).transpose(1, 2)
        q_v = (q + self.pos_bias_v).transpose(1, 2)
        ac = torch.matmul(q_u, k.transpose(-2, -1))
        bd = self.rel_shift(torch.matmul(q_v, p.transpose(-2, -1)))[..., :t]
        scores = (ac + bd) / math.sqrt(self.d_k)
        mask = pad_mask[:, None, None, :]
        attn = torch.softmax(scores.masked_fill(mask, -10000.0), dim=-1).masked_fill(mask, 0.0)
        return self.linear_out(torch.matmul(attn, v).transpose(1, 2).reshape(b, t, -1))


class ConvolutionModule(torch.nn.Module):
    def __init__(self, d_model, kernel_size):
        super().__init__()
        self.pointwise_conv1 = torch.nn.Conv1d(d_model, d_model * 2, 1)
        self.glu = torch.nn.GLU(dim=1)
        self.depthwise_conv = torch.nn.Conv1d(d_model, d_model, kernel_size, padding=(kernel_size - 1) // 2, groups=d_model)
        self.batch_norm = torch.nn.BatchNorm1d(d_model)
        self.activation = torch.nn.SiLU()
        self.pointwise_conv2 = torch.nn.Conv1d(d_model, d_model, 1)

    def forward(self, x, pad_mask):
        x = self.glu(self.pointwise_conv1(x.transpose(1, 2)))
        x = x.masked_fill(pad_mask.unsqueeze(1), 0.0)
        x = self.activation(self.batch_norm(self.depthwise_conv(x)))
        return self.pointwise_conv2(x).transpose(1, 2)


class FeedForward(torch.nn.Module):
    def __init__(self, d_model, d_ff):
        super().__init__()
        self.linear1 = torch.nn.Linear(d_model, d_ff)
        self.activation = torch.nn.SiLU()
        self.linear2 = torch.nn.Linear(d_ff, d_model)

    def forward(self, x):
        return self.linear2(self.activation(self.linear1(x)))


class ConformerLayer(torch.nn.Module):
    def __init__(self, d_model, d_ff, n_head, kernel_size):
        super().__init__()
        self.norm_feed_forward1 = torch.nn.LayerNorm(d_model)
        self.feed_forward1 = FeedForward(d_model, d_ff)
        self.norm_self_att = torch.nn.LayerNorm(d_model)
        self.self_attn = RelPositionMultiHeadAttention(d_model, n_head)
        self.norm_conv = torch.nn.LayerNorm(d_model)
        self.conv = ConvolutionModule(d_model, kernel_size)
        self.norm_feed_forward2 = torch.nn.LayerNorm(d_model)
        self.feed_forward2 = FeedForward(d_model, d_ff)
        self.norm_out = torch.nn.LayerNorm(d_model)

    def forward(self, x, pos_emb, pad_mask):
        x = x + 0.5 * self.feed_forward1(self.norm_feed_forward1(x))
        x = x + self.self_attn(self.norm_self_att(x), pos_emb, pad_mask)
        x = x + self.conv(self.norm_conv(x), pad_mask)
        x = x + 0.5 * self.feed_forward2(self.norm_feed_forward2(x))
        return self.norm_out(x)


class ConformerEncoder(torch.nn.Module):
    def __init__(self, feat_in=14, d_model=16, d_ff=36, n_head=2, kernel_size=5, n_layers=2):
        super().__init__()
        self.pre_encode = torch.nn.Linear(feat_in, d_model)
        self.pos_enc = RelPositionalEncoding(d_model)
        self.layers = torch.nn.ModuleList([ConformerLayer(d_model, d_ff, n_head, kernel_size) for _ in range(n_layers)])

    def forward(self, audio_signal, length):
        x, pos_emb = self.pos_enc(self.pre_encode(audio_signal))
        pad_mask = torch.arange(x.size(1))[None, :] >= length[:, None]
        for layer in self.layers:
            x = layer(x, pos_emb, pad_mask)
        return x


def relative_positions(t, dim, dtype):
    pos = jnp.arange(t - 1, -t, -1, dtype=dtype)[:, None]
    freq = jnp.exp(jnp.arange(0, dim, 2, dtype=dtype) * -(math.log(10000.0) / dim))
    angle = pos * freq
    table = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return table.reshape(1, 2 * t - 1, dim)


def rel_shift(x):
    b, h, q, p = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (1, 0))).reshape(b, h, p + 1, q)
    return x[:, :, 1:].reshape(b, h, q, p)


class FeedForwardModule(nn.Module):
    d_ff: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(epsilon=1e-5)(x)
        y = nn.silu(nn.Dense(self.d_ff)(y))
        return nn.Dense(x.shape[-1])(y)


class RelAttention(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x, pos, pad):
        b, t, d = x.shape
        dk = d // self.heads
        q = nn.DenseGeneral((self.heads, dk), name="query")(x)
        k = nn.DenseGeneral((self.heads, dk), name="key")(x)
        v = nn.DenseGeneral((self.heads, dk), name="value")(x)
        p = nn.DenseGeneral((self.heads, dk), use_bias=False, name="pos")(pos)[0]
        u_bias = self.param("u", nn.initializers.zeros, (self.heads, dk))
        v_bias = self.param("v", nn.initializers.zeros, (self.heads, dk))
        content = jnp.einsum("bqhd,bkhd->bhqk", q + u_bias, k)
        position = rel_shift(jnp.einsum("bqhd,phd->bhqp", q + v_bias, p))[..., :t]
        scores = (content + position) / math.sqrt(dk)
        scores = jnp.where(pad[:, None, None, :], -10000.0, scores)
        probs = jnp.where(pad[:, None, None, :], 0.0, jax.nn.softmax(scores, axis=-1))
        y = jnp.einsum("bhqk,bkhd->bqhd", probs, v)
        return nn.DenseGeneral(d, axis=(-2, -1), name="out")(y)


class ConvModule(nn.Module):
    kernel_size: int

    @nn.compact
    def __call__(self, x, pad, train=False):
        d = x.shape[-1]
        y = nn.Dense(2 * d, name="pointwise1")(x)
        value, gate = jnp.split(y, 2, axis=-1)
        y = value * jax.nn.sigmoid(gate)
        y = jnp.where(pad[..., None], 0.0, y)
        half = (self.kernel_size - 1) // 2
        y = nn.Conv(d, (self.kernel_size,), padding=[(half, half)], feature_group_count=d, name="depthwise")(y)
        y = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name="bn")(y)
        return nn.Dense(d, name="pointwise2")(nn.silu(y))


class Block(nn.Module):
    d_ff: int
    heads: int
    kernel_size: int

    @nn.compact
    def __call__(self, x, pos, pad, train=False):
        x = x + 0.5 * FeedForwardModule(self.d_ff, name="ff1")(x)
        y = nn.LayerNorm(epsilon=1e-5, name="att_norm")(x)
        x = x + RelAttention(self.heads, name="att")(y, pos, pad)
        y = nn.LayerNorm(epsilon=1e-5, name="conv_norm")(x)
        x = x + ConvModule(self.kernel_size, name="conv")(y, pad, train)
        x = x + 0.5 * FeedForwardModule(self.d_ff, name="ff2")(x)
        return nn.LayerNorm(epsilon=1e-5, name="final_norm")(x)


class Conformer(nn.Module):
    d_model: int = 16
    d_ff: int = 36
    heads: int = 2
    kernel_size: int = 5
    n_layers: int = 2

    @nn.compact
    def __call__(self, feats, length, train=False):
        x = nn.Dense(self.d_model, name="in_proj")(feats)
        x = x * math.sqrt(self.d_model)
        pos = relative_positions(x.shape[1], self.d_model, x.dtype)
        pad = jnp.arange(x.shape[1])[None] >= length[:, None]
        for i in range(self.n_layers):
            x = Block(self.d_ff, self.heads, self.kernel_size, name=f"block_{i}")(x, pos, pad, train)
        return x


def port(net):
    sd = {k: np.asarray(v) for k, v in net.state_dict().items()}
    heads, dk = 2, 8

    def dense(name):
        w = sd[name + ".weight"]
        return {"kernel": (w[..., 0] if w.ndim == 3 else w).T, "bias": sd[name + ".bias"]}

    def norm(name):
        return {"scale": sd[name + ".weight"], "bias": sd[name + ".bias"]}

    def split_heads(name):
        out = {"kernel": sd[name + ".weight"].T.reshape(-1, heads, dk)}
        if name + ".bias" in sd:
            out["bias"] = sd[name + ".bias"].reshape(heads, dk)
        return out

    params, stats = {"in_proj": dense("pre_encode")}, {}
    for i in range(len(net.layers)):
        p = f"layers.{i}."
        a, c = p + "self_attn.", p + "conv."
        out = dense(a + "linear_out")
        params[f"block_{i}"] = {
            "ff1": {"LayerNorm_0": norm(p + "norm_feed_forward1"), "Dense_0": dense(p + "feed_forward1.linear1"),
                    "Dense_1": dense(p + "feed_forward1.linear2")},
            "att_norm": norm(p + "norm_self_att"),
            "att": {"query": split_heads(a + "linear_q"), "key": split_heads(a + "linear_k"), "value": split_heads(a + "linear_v"),
                    "pos": split_heads(a + "linear_pos"), "u": sd[a + "pos_bias_u"], "v": sd[a + "pos_bias_v"],
                    "out": {"kernel": out["kernel"].reshape(heads, dk, -1), "bias": out["bias"]}},
            "conv_norm": norm(p + "norm_conv"),
            "conv": {"pointwise1": dense(c + "pointwise_conv1"), "pointwise2": dense(c + "pointwise_conv2"),
                     "depthwise": {"kernel": sd[c + "depthwise_conv.weight"].transpose(2, 1, 0), "bias": sd[c + "depthwise_conv.bias"]},
                     "bn": norm(c + "batch_norm")},
            "ff2": {"LayerNorm_0": norm(p + "norm_feed_forward2"), "Dense_0": dense(p + "feed_forward2.linear1"),
                    "Dense_1": dense(p + "feed_forward2.linear2")},
            "final_norm": norm(p + "norm_out"),
        }
        stats[f"block_{i}"] = {"conv": {"bn": {"mean": sd[c + "batch_norm.running_mean"], "var": sd[c + "batch_norm.running_var"]}}}
    return jax.tree.map(jnp.array, {"params": params, "batch_stats": stats})


def build(seed):
    """The right pair with random weights and inputs that follow from the seed."""
    torch.manual_seed(seed)
    net = ConformerEncoder().eval()
    with torch.no_grad():
        for name, t in [*net.named_parameters(), *net.named_buffers()]:
            if not t.is_floating_point():
                continue
            if "running_var" in name or ("norm" in name and name.endswith("weight")):
                t.uniform_(0.5, 1.6)
            elif t.ndim == 1 or "pos_bias" in name:
                t.normal_(0.0, 0.4)
    variables = port(net)
    rng = np.random.default_rng(seed)
    inputs = {"audio_signal": rng.normal(size=(3, 9, 14)).astype(np.float32), "length": np.array([9, 6, 8])}
    return {"torch": net, "flax": (Conformer(), variables), "inputs": inputs,
            "flax_inputs": (inputs["audio_signal"], inputs["length"])}


FAULTS = [
    {
        "title": "second macaron feed-forward added whole, not by half",
        "edits": [("x = x + 0.5 * FeedForwardModule(self.d_ff, name=\"ff2\")(x)", "x = x + FeedForwardModule(self.d_ff, name=\"ff2\")(x)")],
        "layers": ["layers.0"],
        "between": ("layers.0.feed_forward2.linear2", "layers.0.norm_out"),
        "causes": ["scale", "residual"],
        "level": "outputs",
    },
    {
        "title": "GLU gates with its first half",
        "edits": [("value, gate = jnp.split(y, 2, axis=-1)", "gate, value = jnp.split(y, 2, axis=-1)")],
        "layers": ["layers.0.conv.glu", "layers.0.conv"],
        "between": ("layers.0.conv.pointwise_conv1", "layers.0.conv.depthwise_conv"),
        "causes": ["operand", "swapped"],
        "level": "outputs",
    },
    {
        "title": "relative positions run from -(T-1) up",
        "edits": [("pos = jnp.arange(t - 1, -t, -1, dtype=dtype)[:, None]", "pos = jnp.arange(1 - t, t, dtype=dtype)[:, None]")],
        "layers": ["pos_enc"],
        "between": ("pre_encode", "layers.0.norm_feed_forward1"),
        "causes": ["reversed", "operation"],
        "level": "outputs",
    },
    {
        "title": "sines and cosines in two blocks, not interleaved",
        "edits": [("table = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)", "table = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)")],
        "layers": ["pos_enc"],
        "between": ("pre_encode", "layers.0.norm_feed_forward1"),
        "causes": ["rearranged", "permuted"],
        "level": "outputs",
    },
    {
        "title": "only the content term is scaled by sqrt(d_k)",
        "edits": [("scores = (content + position) / math.sqrt(dk)", "scores = content / math.sqrt(dk) + position")],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.linear_pos", "layers.0.self_attn.linear_out"),
        "causes": ["scale", "order"],
        "level": "outputs",
    },
    {
        "title": "padded frames reach the depthwise convolution",
        "edits": [("        y = jnp.where(pad[..., None], 0.0, y)\n", "")],
        "layers": ["layers.0.conv"],
        "between": ("layers.0.conv.pointwise_conv1", "layers.0.conv.depthwise_conv"),
        "causes": ["left_out", "mask"],
        "level": "outputs",
    },
    {
        "title": "position biases u and v swapped on loading",
        "edits": [("\"u\": sd[a + \"pos_bias_u\"], \"v\": sd[a + \"pos_bias_v\"]", "\"u\": sd[a + \"pos_bias_v\"], \"v\": sd[a + \"pos_bias_u\"]")],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.linear_pos", "layers.0.self_attn.linear_out"),
        "causes": ["swapped"],
        "level": "outputs",
    },
    {
        "title": "torch's BatchNorm momentum carried over as it is",
        "edits": [("momentum=0.9, epsilon=1e-5, name=\"bn\"", "momentum=0.1, epsilon=1e-5, name=\"bn\"")],
        "layers": ["layers.0.conv.batch_norm", "layers.1.conv.batch_norm"],
        "causes": ["momentum"],
        "level": "training",
    },
]
