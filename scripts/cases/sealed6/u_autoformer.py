"""A small Autoformer: series decomposition, auto-correlation over the best delays, trends added up in the decoder."""
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

SERIES, MARKS, D_MODEL, HEADS, D_FF, WINDOW, FACTOR = 5, 4, 9, 3, 13, 7, 1.5
SEQ, LABEL, PRED, E_LAYERS, D_LAYERS, DROP = 12, 6, 8, 2, 1, 0.15

# ---- PyTorch ---------------------------------------------------------------------------------
class moving_avg(torch.nn.Module):
    def __init__(self, kernel_size, stride):
        super().__init__()
        self.kernel_size = kernel_size
        self.avg = torch.nn.AvgPool1d(kernel_size=kernel_size, stride=stride, padding=0)
    def forward(self, x):
        front = x[:, 0:1, :].repeat(1, (self.kernel_size - 1) // 2, 1)
        end = x[:, -1:, :].repeat(1, (self.kernel_size - 1) // 2, 1)
        x = torch.cat([front, x, end], dim=1)
        return self.avg(x.permute(0, 2, 1)).permute(0, 2, 1)

class series_decomp(torch.nn.Module):
    def __init__(self, kernel_size):
        super().__init__()
        self.moving_avg = moving_avg(kernel_size, stride=1)
    def forward(self, x):
        moving_mean = self.moving_avg(x)
        return x - moving_mean, moving_mean

class my_Layernorm(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.layernorm = torch.nn.LayerNorm(channels)
    def forward(self, x):
        x_hat = self.layernorm(x)
        return x_hat - torch.mean(x_hat, dim=1).unsqueeze(1).repeat(1, x.shape[1], 1)

class AutoCorrelation(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def time_delay_agg(self, values, corr):
        batch, head, channel, length = values.shape
        init_index = torch.arange(length).view(1, 1, 1, -1).repeat(batch, head, channel, 1)
        top_k = int(self.factor * math.log(length))
        weights, delay = torch.topk(corr.mean(dim=1).mean(dim=1), top_k, dim=-1)
        tmp_corr = torch.softmax(weights, dim=-1)
        tmp_values = values.repeat(1, 1, 1, 2)
        delays_agg = torch.zeros_like(values)
        for i in range(top_k):
            tmp_delay = init_index + delay[:, i].view(-1, 1, 1, 1)
            pattern = torch.gather(tmp_values, dim=-1, index=tmp_delay)
            delays_agg = delays_agg + pattern * tmp_corr[:, i].view(-1, 1, 1, 1)
        return delays_agg
    def forward(self, queries, keys, values):
        length, size = queries.shape[1], values.shape[1]
        if length > size:
            zeros = torch.zeros_like(queries[:, :(length - size)])
            values, keys = torch.cat([values, zeros], dim=1), torch.cat([keys, zeros], dim=1)
        else:
            values, keys = values[:, :length], keys[:, :length]
        q_fft = torch.fft.rfft(queries.permute(0, 2, 3, 1).contiguous(), dim=-1)
        k_fft = torch.fft.rfft(keys.permute(0, 2, 3, 1).contiguous(), dim=-1)
        corr = torch.fft.irfft(q_fft * torch.conj(k_fft), dim=-1)
        return self.time_delay_agg(values.permute(0, 2, 3, 1).contiguous(), corr).permute(0, 3, 1, 2)

class AutoCorrelationLayer(torch.nn.Module):
    def __init__(self, d_model, n_heads):
        super().__init__()
        self.inner_correlation = AutoCorrelation(FACTOR)
        self.query_projection = torch.nn.Linear(d_model, d_model)
        self.key_projection = torch.nn.Linear(d_model, d_model)
        self.value_projection = torch.nn.Linear(d_model, d_model)
        self.out_projection = torch.nn.Linear(d_model, d_model)
        self.n_heads = n_heads
    def forward(self, queries, keys, values):
        (b, l, _), s, h = queries.shape, keys.shape[1], self.n_heads
        queries = self.query_projection(queries).view(b, l, h, -1)
        keys = self.key_projection(keys).view(b, s, h, -1)
        values = self.value_projection(values).view(b, s, h, -1)
        out = self.inner_correlation(queries, keys, values)
        return self.out_projection(out.reshape(b, l, -1))

class EncoderLayer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = AutoCorrelationLayer(D_MODEL, HEADS)
        self.conv1 = torch.nn.Conv1d(D_MODEL, D_FF, 1, bias=False)
        self.conv2 = torch.nn.Conv1d(D_FF, D_MODEL, 1, bias=False)
        self.decomp1, self.decomp2 = series_decomp(WINDOW), series_decomp(WINDOW)
        self.dropout = torch.nn.Dropout(DROP)
    def forward(self, x):
        x = x + self.dropout(self.attention(x, x, x))
        x, _ = self.decomp1(x)
        y = self.dropout(F.gelu(self.conv1(x.transpose(-1, 1))))
        y = self.dropout(self.conv2(y).transpose(-1, 1))
        return self.decomp2(x + y)[0]

class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn_layers = torch.nn.ModuleList(EncoderLayer() for _ in range(E_LAYERS))
        self.norm = my_Layernorm(D_MODEL)
    def forward(self, x):
        for layer in self.attn_layers:
            x = layer(x)
        return self.norm(x)

class DecoderLayer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attention = AutoCorrelationLayer(D_MODEL, HEADS)
        self.cross_attention = AutoCorrelationLayer(D_MODEL, HEADS)
        self.conv1 = torch.nn.Conv1d(D_MODEL, D_FF, 1, bias=False)
        self.conv2 = torch.nn.Conv1d(D_FF, D_MODEL, 1, bias=False)
        self.decomp1, self.decomp2, self.decomp3 = (series_decomp(WINDOW) for _ in range(3))
        self.dropout = torch.nn.Dropout(DROP)
        self.projection = torch.nn.Conv1d(D_MODEL, SERIES, 3, padding=1, padding_mode="circular", bias=False)
    def forward(self, x, cross):
        x = x + self.dropout(self.self_attention(x, x, x))
        x, trend1 = self.decomp1(x)
        x = x + self.dropout(self.cross_attention(x, cross, cross))
        x, trend2 = self.decomp2(x)
        y = self.dropout(F.gelu(self.conv1(x.transpose(-1, 1))))
        y = self.dropout(self.conv2(y).transpose(-1, 1))
        x, trend3 = self.decomp3(x + y)
        return x, self.projection((trend1 + trend2 + trend3).permute(0, 2, 1)).transpose(1, 2)

class Decoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(DecoderLayer() for _ in range(D_LAYERS))
        self.norm = my_Layernorm(D_MODEL)
        self.projection = torch.nn.Linear(D_MODEL, SERIES)
    def forward(self, x, cross, trend):
        for layer in self.layers:
            x, residual_trend = layer(x, cross)
            trend = trend + residual_trend
        return self.projection(self.norm(x)), trend

class DataEmbedding_wo_pos(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.value_embedding = torch.nn.Conv1d(SERIES, D_MODEL, 3, padding=1, padding_mode="circular", bias=False)
        self.temporal_embedding = torch.nn.Linear(MARKS, D_MODEL, bias=False)
        self.dropout = torch.nn.Dropout(DROP)
    def forward(self, x, x_mark):
        x = self.value_embedding(x.permute(0, 2, 1)).transpose(1, 2)
        return self.dropout(x + self.temporal_embedding(x_mark))

class Autoformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.decomp = series_decomp(WINDOW)
        self.enc_embedding, self.dec_embedding = DataEmbedding_wo_pos(), DataEmbedding_wo_pos()
        self.encoder, self.decoder = Encoder(), Decoder()
    def forward(self, x_enc, x_mark_enc, x_mark_dec):
        mean = x_enc.mean(dim=1, keepdim=True).repeat(1, PRED, 1)
        seasonal, trend = self.decomp(x_enc)
        trend = torch.cat([trend[:, -LABEL:], mean], dim=1)
        seasonal = F.pad(seasonal[:, -LABEL:], (0, 0, 0, PRED))
        enc_out = self.encoder(self.enc_embedding(x_enc, x_mark_enc))
        seasonal, trend = self.decoder(self.dec_embedding(seasonal, x_mark_dec), enc_out, trend)
        return (trend + seasonal)[:, -PRED:]

# ---- Flax ------------------------------------------------------------------------------------
def split_trend(x):
    half = WINDOW // 2
    padded = jnp.pad(x, ((0, 0), (half, half), (0, 0)), mode="edge")
    trend = sum(padded[:, i:i + x.shape[1]] for i in range(WINDOW)) / WINDOW
    return x - trend, trend

class SeasonalNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(epsilon=1e-5, name="ln")(x)
        return x - x.mean(axis=1, keepdims=True)

class RollAttention(nn.Module):
    """The correlation is averaged over all channels, so heads need not be told apart."""
    @nn.compact
    def __call__(self, x, memory):
        n = x.shape[1]
        q = nn.Dense(D_MODEL, name="q")(x)
        k, v = jnp.split(nn.Dense(2 * D_MODEL, name="kv")(memory), 2, axis=-1)
        short = max(0, n - k.shape[1])
        k, v = (jnp.pad(a[:, :n], ((0, 0), (0, short), (0, 0))) for a in (k, v))
        spectrum = jnp.fft.rfft(q, axis=1) * jnp.conj(jnp.fft.rfft(k, axis=1))
        strength = jnp.fft.irfft(spectrum, n=n, axis=1).mean(-1)
        best, lag = jax.lax.top_k(strength, int(FACTOR * math.log(n)))
        share = jax.nn.softmax(best, axis=-1)
        source = (jnp.arange(n) + lag[..., None]) % n                        # batch, k, n
        rolled = jax.vmap(lambda series, at: series[at])(v, source)
        return nn.Dense(D_MODEL, name="out")(jnp.einsum("bk,bknd->bnd", share, rolled))

class FeedForward(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        x = nn.gelu(nn.Dense(D_FF, use_bias=False, name="up")(x), approximate=False)
        x = nn.Dropout(DROP, name="drop_inner")(x, deterministic=deterministic)
        x = nn.Dense(D_MODEL, use_bias=False, name="down")(x)
        return nn.Dropout(DROP, name="drop_outer")(x, deterministic=deterministic)

class EncBlock(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        y = RollAttention(name="attn")(x, x)
        x, _ = split_trend(x + nn.Dropout(DROP, name="drop")(y, deterministic=deterministic))
        return split_trend(x + FeedForward(name="ff")(x, deterministic))[0]

class DecBlock(nn.Module):
    @nn.compact
    def __call__(self, x, memory, deterministic):
        drop = nn.Dropout(DROP, name="drop_attention", deterministic=deterministic)
        x, first = split_trend(x + drop(RollAttention(name="own")(x, x)))
        x, second = split_trend(x + drop(RollAttention(name="cross")(x, memory)))
        x, third = split_trend(x + FeedForward(name="ff")(x, deterministic))
        trend = nn.Conv(SERIES, (3,), padding="CIRCULAR", use_bias=False, name="trend")(first + second + third)
        return x, trend

class Embed(nn.Module):
    @nn.compact
    def __call__(self, x, marks, deterministic):
        x = nn.Conv(D_MODEL, (3,), padding="CIRCULAR", use_bias=False, name="value")(x)
        x = x + nn.Dense(D_MODEL, use_bias=False, name="time")(marks)
        return nn.Dropout(DROP, name="drop_embedded")(x, deterministic=deterministic)

class Forecaster(nn.Module):
    @nn.compact
    def __call__(self, past, past_marks, future_marks, deterministic=True):
        season, trend = split_trend(past)
        season = jnp.pad(season[:, -LABEL:], ((0, 0), (0, PRED), (0, 0)))
        level = jnp.broadcast_to(past.mean(1, keepdims=True), (past.shape[0], PRED, SERIES))
        trend = jnp.concatenate([trend[:, -LABEL:], level], axis=1)
        memory = Embed(name="embed_past")(past, past_marks, deterministic)
        for i in range(E_LAYERS):
            memory = EncBlock(name=f"enc{i}")(memory, deterministic)
        memory = SeasonalNorm(name="enc_norm")(memory)
        x = Embed(name="embed_future")(season, future_marks, deterministic)
        for i in range(D_LAYERS):
            x, more = DecBlock(name=f"dec{i}")(x, memory, deterministic)
            trend += more
        season = nn.Dense(SERIES, name="head")(SeasonalNorm(name="dec_norm")(x))
        return (season + trend)[:, LABEL:]

def port_weights(net):
    def a(t):
        return jnp.asarray(t.detach().numpy())

    def dense(*layers):
        out = {"kernel": jnp.concatenate([a(l.weight).reshape(l.weight.shape[:2]).T for l in layers], axis=1)}
        if layers[0].bias is not None:
            out["bias"] = jnp.concatenate([a(l.bias) for l in layers])
        return out

    def conv(c):
        return {"kernel": a(c.weight).transpose(2, 1, 0)}

    def norm(m):
        return {"ln": {"scale": a(m.layernorm.weight), "bias": a(m.layernorm.bias)}}

    def attention(m):
        return {"q": dense(m.query_projection), "kv": dense(m.key_projection, m.value_projection),
                "out": dense(m.out_projection)}

    def embed(m):
        return {"value": conv(m.value_embedding), "time": dense(m.temporal_embedding)}

    def forward(m):
        return {"up": dense(m.conv1), "down": dense(m.conv2)}

    params = {"embed_past": embed(net.enc_embedding), "embed_future": embed(net.dec_embedding),
              "enc_norm": norm(net.encoder.norm), "dec_norm": norm(net.decoder.norm),
              "head": dense(net.decoder.projection)}
    for i, m in enumerate(net.encoder.attn_layers):
        params[f"enc{i}"] = {"attn": attention(m.attention), "ff": forward(m)}
    for i, m in enumerate(net.decoder.layers):
        params[f"dec{i}"] = {"own": attention(m.self_attention), "cross": attention(m.cross_attention),
                             "ff": forward(m), "trend": conv(m.projection)}
    return Forecaster(), {"params": params}

def build(seed):
    torch.manual_seed(seed)
    net = Autoformer().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(1 + 0.3 * torch.randn_like(p) if "layernorm.weight" in name else 0.4 * torch.randn_like(p))
    rs = np.random.RandomState(seed)
    past = np.cumsum(rs.randn(2, SEQ, SERIES), axis=1) * 0.6
    inputs = (past, rs.uniform(-0.5, 0.5, (2, SEQ, MARKS)), rs.uniform(-0.5, 0.5, (2, LABEL + PRED, MARKS)))
    return {"torch": net, "flax": port_weights(net), "inputs": tuple(x.astype(np.float32) for x in inputs)}

CORRELATIONS = [f"{x}.inner_correlation" for x in (
    "encoder.attn_layers.0.attention", "encoder.attn_layers.1.attention",
    "decoder.layers.0.self_attention", "decoder.layers.0.cross_attention")]
DECOMPS = ["decomp"] + [f"encoder.attn_layers.{i}.decomp{j}" for i in (0, 1) for j in (1, 2)] + [
    f"decoder.layers.0.decomp{j}" for j in (1, 2, 3)]
FAULTS = [
    {"title": "the moving average pads the series with zeros in place of its ends",
     "edits": [('(half, half), (0, 0)), mode="edge")', '(half, half), (0, 0)))')],
     "layers": DECOMPS + [d + ".moving_avg" for d in DECOMPS],
     "between": ("the input", "decomp.moving_avg.avg"),
     "causes": ["padding"], "level": "outputs"},
    {"title": "the conjugate is taken of the query's spectrum, so that delays run the other way",
     "edits": [("jnp.fft.rfft(q, axis=1) * jnp.conj(jnp.fft.rfft(k, axis=1))",
                "jnp.conj(jnp.fft.rfft(q, axis=1)) * jnp.fft.rfft(k, axis=1)")],
     "layers": CORRELATIONS + [c.rsplit(".", 1)[0] for c in CORRELATIONS],
     "between": ("encoder.attn_layers.0.attention.value_projection", "encoder.attn_layers.0.attention.out_projection"),
     "causes": ["operand", "swapped", "reversed"], "level": "outputs"},
    {"title": "the seasonal norm subtracts the mean over the channels in place of that over time",
     "edits": [("x.mean(axis=1, keepdims=True)", "x.mean(axis=-1, keepdims=True)")],
     "layers": ["encoder.norm", "decoder.norm"],
     "between": ("encoder.norm.layernorm", "dec_embedding.value_embedding"),
     "causes": ["axis"], "level": "outputs"},
    {"title": "the weights of the delays carry no gradient to queries and keys",
     "edits": [("share = jax.nn.softmax(best, axis=-1)", "share = jax.nn.softmax(jax.lax.stop_gradient(best), axis=-1)")],
     "layers": CORRELATIONS + [c.rsplit(".", 1)[0] for c in CORRELATIONS], "between": None,
     "causes": ["stop_gradient"], "level": "gradients"},
    {"title": "the dropout after the encoder's attention is given the share to keep",
     "edits": [('nn.Dropout(DROP, name="drop")', 'nn.Dropout(1 - DROP, name="drop")')],
     "layers": ["encoder.attn_layers.0.dropout", "encoder.attn_layers.1.dropout",
                "encoder.attn_layers.0", "encoder.attn_layers.1"], "between": None,
     "causes": ["training_attribute", "dropout"], "level": "attributes"},
]
