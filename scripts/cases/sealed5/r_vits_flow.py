"""VITS: text encoder with relative positions, duration predictor and a flow of WaveNet coupling layers."""
import math

import jax
import jax.numpy as jnp
from flax import nnx
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

VOCAB, HIDDEN, HEADS, FILTER, WINDOW, INTER, FLOW_HIDDEN, GIN, SPEAKERS = 17, 12, 3, 20, 2, 6, 10, 5, 4
WN_LAYERS, RATE, KERNEL = 3, 2, 3

# ---- torch, after jaywalnut310/vits (modules.py, attentions.py, models.py)
def sequence_mask(length, max_length):
    return torch.arange(max_length)[None, :] < length[:, None]

class LayerNorm(nn.Module):
    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.channels, self.eps = channels, eps
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
    def forward(self, x):
        return F.layer_norm(x.transpose(1, -1), (self.channels,), self.gamma, self.beta, self.eps).transpose(1, -1)

class WN(nn.Module):
    def __init__(self, hidden_channels, kernel_size, dilation_rate, n_layers, gin_channels):
        super().__init__()
        self.hidden_channels, self.n_layers = hidden_channels, n_layers
        self.in_layers, self.res_skip_layers = nn.ModuleList(), nn.ModuleList()
        self.cond_layer = weight_norm(nn.Conv1d(gin_channels, 2 * hidden_channels * n_layers, 1))
        for i in range(n_layers):
            d = dilation_rate ** i
            self.in_layers.append(weight_norm(nn.Conv1d(hidden_channels, 2 * hidden_channels, kernel_size,
                                                        dilation=d, padding=(kernel_size * d - d) // 2)))
            out = 2 * hidden_channels if i < n_layers - 1 else hidden_channels
            self.res_skip_layers.append(weight_norm(nn.Conv1d(hidden_channels, out, 1)))
    def forward(self, x, x_mask, g):
        n, output, g = self.hidden_channels, torch.zeros_like(x), self.cond_layer(g)
        for i in range(self.n_layers):
            in_act = self.in_layers[i](x) + g[:, i * 2 * n:(i + 1) * 2 * n]
            res_skip_acts = self.res_skip_layers[i](torch.tanh(in_act[:, :n]) * torch.sigmoid(in_act[:, n:]))
            if i < self.n_layers - 1:
                x = (x + res_skip_acts[:, :n]) * x_mask
                output = output + res_skip_acts[:, n:]
            else:
                output = output + res_skip_acts
        return output * x_mask

class ResidualCouplingLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.half_channels = INTER // 2
        self.pre = nn.Conv1d(INTER // 2, FLOW_HIDDEN, 1)
        self.enc = WN(FLOW_HIDDEN, KERNEL, RATE, WN_LAYERS, GIN)
        self.post = nn.Conv1d(FLOW_HIDDEN, INTER, 1)
    def forward(self, x, x_mask, g):
        x0, x1 = torch.split(x, [self.half_channels] * 2, 1)
        h = self.enc(self.pre(x0) * x_mask, x_mask, g)
        m, logs = torch.split(self.post(h) * x_mask, [self.half_channels] * 2, 1)
        x1 = m + x1 * torch.exp(logs) * x_mask
        return torch.cat([x0, x1], 1), torch.sum(logs, [1, 2])

class Flip(nn.Module):
    def forward(self, x, x_mask, g):
        return torch.flip(x, [1]), torch.zeros(x.size(0)).to(dtype=x.dtype)

class ResidualCouplingBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.flows = nn.ModuleList([ResidualCouplingLayer(), Flip(), ResidualCouplingLayer(), Flip()])
    def forward(self, x, x_mask, g):
        total = 0
        for flow in self.flows:
            x, logdet = flow(x, x_mask, g)
            total = total + logdet
        return x, total

class MultiHeadAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.k_channels = HIDDEN // HEADS
        self.conv_q, self.conv_k, self.conv_v, self.conv_o = (nn.Conv1d(HIDDEN, HIDDEN, 1) for _ in range(4))
        self.emb_rel_k = nn.Parameter(torch.zeros(1, 2 * WINDOW + 1, self.k_channels))
        self.emb_rel_v = nn.Parameter(torch.zeros(1, 2 * WINDOW + 1, self.k_channels))
    def _get_relative_embeddings(self, emb, length):
        pad, start = max(length - (WINDOW + 1), 0), max((WINDOW + 1) - length, 0)
        return F.pad(emb, [0, 0, pad, pad])[:, start:start + 2 * length - 1]
    def _relative_position_to_absolute_position(self, x):
        b, h, n, _ = x.size()
        x = F.pad(F.pad(x, [0, 1]).view(b, h, n * 2 * n), [0, n - 1])
        return x.view(b, h, n + 1, 2 * n - 1)[:, :, :n, n - 1:]
    def _absolute_position_to_relative_position(self, x):
        b, h, n, _ = x.size()
        x = F.pad(F.pad(x, [0, n - 1]).view(b, h, n * n + n * (n - 1)), [n, 0])
        return x.view(b, h, n, 2 * n)[:, :, :, 1:]
    def forward(self, x, c, attn_mask):
        b, d, n = x.shape
        heads = lambda t: t.view(b, HEADS, self.k_channels, n).transpose(2, 3)
        query, key, value = heads(self.conv_q(x)), heads(self.conv_k(c)), heads(self.conv_v(c))
        query = query / math.sqrt(self.k_channels)
        rel = torch.matmul(query, self._get_relative_embeddings(self.emb_rel_k, n).unsqueeze(0).transpose(-2, -1))
        scores = query @ key.transpose(-2, -1) + self._relative_position_to_absolute_position(rel)
        p_attn = F.softmax(scores.masked_fill(attn_mask == 0, -1e4), dim=-1)
        weights = self._absolute_position_to_relative_position(p_attn)
        out = p_attn @ value + torch.matmul(weights, self._get_relative_embeddings(self.emb_rel_v, n).unsqueeze(0))
        return self.conv_o(out.transpose(2, 3).contiguous().view(b, d, n))

class TextEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(VOCAB, HIDDEN)
        self.attn_layers = nn.ModuleList([MultiHeadAttention() for _ in range(2)])
        self.norm_layers = nn.ModuleList([LayerNorm(HIDDEN) for _ in range(2)])
        self.proj = nn.Conv1d(HIDDEN, INTER * 2, 1)
    def forward(self, x, x_mask):
        x = (self.emb(x) * math.sqrt(HIDDEN)).transpose(1, -1) * x_mask
        attn_mask = x_mask.unsqueeze(2) * x_mask.unsqueeze(-1)
        for attn, norm in zip(self.attn_layers, self.norm_layers):
            x = norm(x + attn(x, x, attn_mask))
        x = x * x_mask
        m, logs = torch.split(self.proj(x) * x_mask, INTER, dim=1)
        return x, m, logs

class DurationPredictor(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_1 = nn.Conv1d(HIDDEN, FILTER - 1, KERNEL, padding=KERNEL // 2)
        self.norm_1 = LayerNorm(FILTER - 1)
        self.conv_2 = nn.Conv1d(FILTER - 1, FILTER - 1, KERNEL, padding=KERNEL // 2)
        self.norm_2 = LayerNorm(FILTER - 1)
        self.proj = nn.Conv1d(FILTER - 1, 1, 1)
        self.cond = nn.Conv1d(GIN, HIDDEN, 1)
    def forward(self, x, x_mask, g):
        x = torch.detach(x) + self.cond(torch.detach(g))
        x = self.norm_1(torch.relu(self.conv_1(x * x_mask)))
        x = self.norm_2(torch.relu(self.conv_2(x * x_mask)))
        return self.proj(x * x_mask) * x_mask

class SynthesizerTrn(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc_p, self.flow, self.dp = TextEncoder(), ResidualCouplingBlock(), DurationPredictor()
        self.emb_g = nn.Embedding(SPEAKERS, GIN)
    def forward(self, x, x_lengths, z, z_lengths, sid):
        x_mask = sequence_mask(x_lengths, x.size(1)).unsqueeze(1).to(z.dtype)
        h, m_p, logs_p = self.enc_p(x, x_mask)
        g = self.emb_g(sid).unsqueeze(-1)
        z_mask = sequence_mask(z_lengths, z.size(2)).unsqueeze(1).to(z.dtype)
        z_p, logdet = self.flow(z * z_mask, z_mask, g)
        return m_p, logs_p, z_p, logdet, self.dp(h, x_mask, g).squeeze(1)

# ---- Flax NNX: time before channels; relative positions gathered into a table of query by key
class NormedConv(nnx.Module):
    """A convolution whose kernel is gain * direction / |direction|, one length for each output."""
    def __init__(self, i, o, width, dilation=1):
        self.direction = nnx.Param(jnp.ones((width, i, o)))
        self.gain = nnx.Param(jnp.ones(o))
        self.bias = nnx.Param(jnp.zeros(o))
        self.dilation = dilation
    def __call__(self, x):
        v = self.direction[...]
        kernel = self.gain[...] * v / jnp.sqrt(jnp.sum(v * v, axis=(0, 1), keepdims=True))
        return jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", rhs_dilation=(self.dilation,),
                                            dimension_numbers=("NWC", "WIO", "NWC")) + self.bias[...]

class Coupling(nnx.Module):
    def __init__(self, rngs):
        c = FLOW_HIDDEN
        self.enter = nnx.Linear(INTER // 2, c, rngs=rngs)
        self.leave = nnx.Linear(c, INTER, rngs=rngs)
        self.speaker = NormedConv(GIN, 2 * c * WN_LAYERS, 1)
        self.dilated = nnx.List([NormedConv(c, 2 * c, KERNEL, RATE ** i) for i in range(WN_LAYERS)])
        self.mix = nnx.List([NormedConv(c, c if i == WN_LAYERS - 1 else 2 * c, 1) for i in range(WN_LAYERS)])
    def __call__(self, x, mask, g):
        keep, change = jnp.split(x, 2, axis=-1)
        h, skips = self.enter(keep) * mask, 0
        for dilated, mix, cond in zip(self.dilated, self.mix, jnp.split(self.speaker(g), WN_LAYERS, axis=-1)):
            a, b = jnp.split(dilated(h) + cond, 2, axis=-1)
            out = mix(jnp.tanh(a) * jax.nn.sigmoid(b))
            res, skip = out[..., :-FLOW_HIDDEN], out[..., -FLOW_HIDDEN:]
            skips = skips + skip
            h = (h + res) * mask if res.shape[-1] else h
        m, logs = jnp.split(self.leave(skips * mask) * mask, 2, axis=-1)
        return jnp.concatenate([keep, m + change * jnp.exp(logs) * mask], axis=-1), logs.sum((1, 2))

class RelativeAttention(nnx.Module):
    def __init__(self, rngs):
        hd = HIDDEN // HEADS
        self.q, self.k, self.v = (nnx.LinearGeneral(HIDDEN, (HEADS, hd), rngs=rngs) for _ in range(3))
        self.o = nnx.LinearGeneral((HEADS, hd), HIDDEN, axis=(-2, -1), rngs=rngs)
        self.near_k, self.near_v = (nnx.Param(jnp.zeros((2 * WINDOW + 1, hd))) for _ in range(2))
    def __call__(self, x, mask):
        t = jnp.arange(x.shape[1])
        shift = t[None, :] - t[:, None]
        table = lambda e: jnp.where(jnp.abs(shift)[..., None] <= WINDOW, e[jnp.clip(shift + WINDOW, 0, 2 * WINDOW)], 0)
        q, k, v = self.q(x) / math.sqrt(HIDDEN // HEADS), self.k(x), self.v(x)
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) + jnp.einsum("bqhd,qkd->bhqk", q, table(self.near_k[...]))
        both = (mask * mask.swapaxes(1, 2))[:, None] > 0
        p = jax.nn.softmax(jnp.where(both, s, -1e4))
        return self.o(jnp.einsum("bhqk,bkhd->bqhd", p, v) + jnp.einsum("bhqk,qkd->bqhd", p, table(self.near_v[...])))

def conv(i, o, rngs):
    return nnx.Conv(i, o, KERNEL, rngs=rngs)

def norm(c, rngs):
    return nnx.LayerNorm(c, epsilon=1e-5, use_fast_variance=False, rngs=rngs)

class Vits(nnx.Module):
    def __init__(self, r):
        self.tokens, self.speakers = nnx.Param(jnp.zeros((VOCAB, HIDDEN))), nnx.Param(jnp.zeros((SPEAKERS, GIN)))
        self.attns, self.norms = nnx.List([RelativeAttention(r) for _ in "ab"]), nnx.List([norm(HIDDEN, r) for _ in "ab"])
        self.stats = nnx.Linear(HIDDEN, 2 * INTER, rngs=r)
        self.couplings = nnx.List([Coupling(r) for _ in range(2)])
        c = FILTER - 1
        self.dur_conv1, self.dur_conv2 = conv(HIDDEN, c, r), conv(c, c, r)
        self.dur_norm1, self.dur_norm2 = norm(c, r), norm(c, r)
        self.dur_out, self.dur_speaker = nnx.Linear(c, 1, rngs=r), nnx.Linear(GIN, HIDDEN, rngs=r)
    def durations(self, h, mask, g):
        h = h + self.dur_speaker(g)
        h = self.dur_norm1(jax.nn.relu(self.dur_conv1(h * mask)))
        h = self.dur_norm2(jax.nn.relu(self.dur_conv2(h * mask)))
        return (self.dur_out(h * mask) * mask)[..., 0]
    def __call__(self, ids, n_ids, z, n_z, speaker):
        mask = (jnp.arange(ids.shape[1]) < n_ids[:, None])[..., None].astype(z.dtype)
        g = self.speakers[...][speaker][:, None]
        h = self.tokens[...][ids] * math.sqrt(HIDDEN) * mask
        for attn, ln in zip(self.attns, self.norms):
            h = ln(h + attn(h, mask))
        m, logs = jnp.split(self.stats(h * mask) * mask, 2, axis=-1)
        z_mask = (jnp.arange(z.shape[1]) < n_z[:, None])[..., None].astype(z.dtype)
        z, logdet = z * z_mask, 0
        for coupling in self.couplings:
            z, d = coupling(z, z_mask, g)
            z, logdet = z[..., ::-1], logdet + d
        dur = self.durations(jax.lax.stop_gradient(h), mask, jax.lax.stop_gradient(g))
        return m.swapaxes(1, 2), logs.swapaxes(1, 2), z.swapaxes(1, 2), logdet, dur

def port_weights(net):
    model = Vits(nnx.Rngs(0))
    put = lambda dst, t: dst.set_value(jnp.asarray(t.detach().numpy()).reshape(dst.shape))
    def plain(dst, src):
        put(dst.kernel, src.weight.permute(2, 1, 0))
        put(dst.bias, src.bias)
    def lnorm(dst, src):
        put(dst.scale, src.gamma), put(dst.bias, src.beta)
    def normed(dst, src):
        gain, direction = src.parametrizations.weight.original0, src.parametrizations.weight.original1
        put(dst.gain, gain)
        put(dst.direction, direction.permute(2, 1, 0))
        put(dst.bias, src.bias)

    enc, dp = net.enc_p, net.dp
    put(model.tokens, enc.emb.weight)
    put(model.speakers, net.emb_g.weight)
    for dst, ln, a, src in zip(model.attns, model.norms, enc.attn_layers, enc.norm_layers):
        for x, y in zip((dst.q, dst.k, dst.v, dst.o), (a.conv_q, a.conv_k, a.conv_v, a.conv_o)):
            plain(x, y)
        put(dst.near_k, a.emb_rel_k)
        put(dst.near_v, a.emb_rel_v)
        lnorm(ln, src)
    for x, y in zip((model.stats, model.dur_conv1, model.dur_conv2, model.dur_out, model.dur_speaker),
                    (enc.proj, dp.conv_1, dp.conv_2, dp.proj, dp.cond)):
        plain(x, y)
    lnorm(model.dur_norm1, dp.norm_1)
    lnorm(model.dur_norm2, dp.norm_2)
    for dst, src in zip(model.couplings, net.flow.flows[::2]):
        plain(dst.enter, src.pre)
        plain(dst.leave, src.post)
        normed(dst.speaker, src.enc.cond_layer)
        for x, y in zip([*dst.dilated, *dst.mix], [*src.enc.in_layers, *src.enc.res_skip_layers]):
            normed(x, y)
    return model

def build(seed):
    torch.manual_seed(seed)
    net = SynthesizerTrn()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith(("gamma", "original0")):
                p.copy_(0.4 + torch.rand_like(p))
            else:
                p.copy_(torch.randn_like(p) * (0.4 if p.ndim < 3 or "rel" in name else p[0].numel() ** -0.5))
    net.eval()
    rng = np.random.RandomState(seed + 1)
    ids, sid, z = rng.randint(0, VOCAB, (2, 7)), np.array([3, 1]), rng.randn(2, INTER, 11).astype(np.float32)
    lengths, z_lengths = np.array([7, 5]), np.array([8, 11])
    return {"torch": net, "flax": port_weights(net), "inputs": (ids, lengths, z, z_lengths, sid),
            "flax_inputs": (ids, lengths, z.transpose(0, 2, 1), z_lengths, sid)}

IN = [f"flow.flows.{k}.enc.in_layers.{i}" for k in (0, 2) for i in range(3)]
NORMED = IN + [n.replace("in_layers", "res_skip_layers") for n in IN] + [f"flow.flows.{k}.enc.cond_layer" for k in (0, 2)]
FAULTS = [
    {"title": "weight norm takes a length for each tap of the kernel, not one over taps and inputs",
     "edits": [("jnp.sum(v * v, axis=(0, 1), keepdims=True)", "jnp.sum(v * v, axis=1, keepdims=True)")],
     "layers": IN + [n + s for n in IN for s in (".parametrizations.weight.0", ".parametrizations.weight")],
     "between": None, "causes": ["axis"], "level": "outputs"},
    {"title": "relative positions are counted from key to query, so before and after are exchanged",
     "edits": [("shift = t[None, :] - t[:, None]", "shift = t[:, None] - t[None, :]")],
     "layers": [f"enc_p.attn_layers.{i}" for i in (0, 1)],
     "between": ("enc_p.attn_layers.0.conv_v", "enc_p.attn_layers.0.conv_o"),
     "causes": ["flipped", "operand", "reversed"], "level": "outputs"},
    {"title": "the dilation of the WaveNet layers does not grow",
     "edits": [("NormedConv(c, 2 * c, KERNEL, RATE ** i)", "NormedConv(c, 2 * c, KERNEL)")],
     "layers": [n for n in IN if not n.endswith("0")],
     "between": None, "causes": ["dilation"], "level": "outputs"},
    {"title": "the direction is copied from the finished weight, which the gain has scaled already",
     "edits": [("src.parametrizations.weight.original0, src.parametrizations.weight.original1",
                "src.parametrizations.weight.original0, src.weight")],
     "layers": NORMED + [n + s for n in NORMED for s in (".parametrizations.weight", ".parametrizations.weight.0")],
     "between": None, "causes": ["values", "scale", "weights"], "level": "bits"},
    {"title": "the duration predictor's gradient goes on into the text encoder",
     "edits": [("self.durations(jax.lax.stop_gradient(h), mask,", "self.durations(h, mask,")],
     "layers": ["dp", ""],
     "between": ("enc_p", "dp.conv_1"), "causes": ["stop_gradient"], "level": "gradients"},
]
