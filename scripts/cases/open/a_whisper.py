"""Whisper-like encoder-decoder: log-mel clipping, conv front end with a BatchNorm, sinusoids, cross attention; nnx, channels last."""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import jax
import jax.numpy as jnp
from flax import nnx


def sinusoids(length, channels, max_timescale=10000):
    increment = np.log(max_timescale) / (channels // 2 - 1)
    inv = torch.exp(-increment * torch.arange(channels // 2, dtype=torch.float64))
    scaled = torch.arange(length, dtype=torch.float64)[:, None] * inv[None, :]
    return torch.cat([torch.sin(scaled), torch.cos(scaled)], dim=1)


class MultiHeadAttention(nn.Module):
    def __init__(self, n_state, n_head):
        super().__init__()
        self.n_head = n_head
        self.query = nn.Linear(n_state, n_state)
        self.key = nn.Linear(n_state, n_state, bias=False)
        self.value = nn.Linear(n_state, n_state)
        self.out = nn.Linear(n_state, n_state)

    def forward(self, x, xa=None, mask=None):
        q = self.query(x)
        k = self.key(x if xa is None else xa)
        v = self.value(x if xa is None else xa)
        b, t, d = q.shape
        scale = (d // self.n_head) ** -0.25
        q = q.view(b, t, self.n_head, -1).permute(0, 2, 1, 3) * scale
        k = k.view(b, k.shape[1], self.n_head, -1).permute(0, 2, 3, 1) * scale
        v = v.view(b, v.shape[1], self.n_head, -1).permute(0, 2, 1, 3)
        qk = q @ k
        if mask is not None:
            qk = qk + mask[:t, :t]
        return self.out((F.softmax(qk, dim=-1) @ v).permute(0, 2, 1, 3).flatten(start_dim=2))


class ResidualAttentionBlock(nn.Module):
    def __init__(self, n_state, n_head, cross_attention=False):
        super().__init__()
        self.attn = MultiHeadAttention(n_state, n_head)
        self.attn_ln = nn.LayerNorm(n_state)
        self.cross_attn = MultiHeadAttention(n_state, n_head) if cross_attention else None
        self.cross_attn_ln = nn.LayerNorm(n_state) if cross_attention else None
        self.mlp = nn.Sequential(nn.Linear(n_state, n_state * 4), nn.GELU(), nn.Linear(n_state * 4, n_state))
        self.mlp_ln = nn.LayerNorm(n_state)

    def forward(self, x, xa=None, mask=None):
        x = x + self.attn(self.attn_ln(x), mask=mask)
        if self.cross_attn is not None:
            x = x + self.cross_attn(self.cross_attn_ln(x), xa)
        return x + self.mlp(self.mlp_ln(x))


class AudioEncoder(nn.Module):
    def __init__(self, n_mels, n_ctx, n_state, n_head, n_layer):
        super().__init__()
        self.conv1 = nn.Conv1d(n_mels, n_state, kernel_size=3, padding=1)
        self.bn1 = nn.BatchNorm1d(n_state)
        self.conv2 = nn.Conv1d(n_state, n_state, kernel_size=3, stride=2, padding=1)
        self.act = nn.GELU()
        self.register_buffer("positional_embedding", sinusoids(n_ctx, n_state))
        self.blocks = nn.ModuleList([ResidualAttentionBlock(n_state, n_head) for _ in range(n_layer)])
        self.ln_post = nn.LayerNorm(n_state)

    def forward(self, mel):
        log_spec = torch.clamp(mel, min=1e-10).log10()
        log_spec = torch.maximum(log_spec, log_spec.amax(dim=(1, 2), keepdim=True) - 8.0)
        x = (log_spec + 4.0) / 4.0
        x = F.gelu(self.bn1(self.conv1(x)))
        x = self.act(self.conv2(x)).permute(0, 2, 1)
        x = x + self.positional_embedding.to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x)


class TextDecoder(nn.Module):
    def __init__(self, n_vocab, n_ctx, n_state, n_head, n_layer):
        super().__init__()
        self.token_embedding = nn.Embedding(n_vocab, n_state)
        self.positional_embedding = nn.Parameter(torch.empty(n_ctx, n_state))
        self.blocks = nn.ModuleList([ResidualAttentionBlock(n_state, n_head, True) for _ in range(n_layer)])
        self.ln = nn.LayerNorm(n_state)
        self.register_buffer("mask", torch.empty(n_ctx, n_ctx).fill_(-np.inf).triu_(1), persistent=False)

    def forward(self, tokens, xa):
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[-1]]
        for block in self.blocks:
            x = block(x, xa, mask=self.mask)
        return self.ln(x) @ self.token_embedding.weight.T


class Whisper(nn.Module):
    def __init__(self, n_mels=10, audio_ctx=8, vocab=29, text_ctx=12, n_state=20, n_head=5, n_layer=2):
        super().__init__()
        self.encoder = AudioEncoder(n_mels, audio_ctx, n_state, n_head, n_layer)
        self.decoder = TextDecoder(vocab, text_ctx, n_state, n_head, n_layer)

    def forward(self, mel, tokens):
        return self.decoder(tokens, self.encoder(mel))


def sinusoid_table(length, channels, max_timescale=10000.0):
    half = channels // 2
    log_increment = jnp.log(max_timescale) / (half - 1)
    inv_timescales = jnp.exp(-log_increment * jnp.arange(half))
    time = jnp.arange(length)[:, None] * inv_timescales[None]
    return jnp.concatenate([jnp.sin(time), jnp.cos(time)], axis=-1)


def log_mel(mel):
    """(batch, time, mels) powers to Whisper's clipped logarithm."""
    log_spec = jnp.log10(jnp.clip(mel, 1e-10))
    peak = log_spec.max(axis=(1, 2), keepdims=True)
    return (jnp.maximum(log_spec, peak - 8.0) + 4.0) / 4.0


class Attention(nnx.Module):
    def __init__(self, dim, heads, *, rngs):
        self.heads = heads
        self.query = nnx.Linear(dim, dim, rngs=rngs)
        self.key = nnx.Linear(dim, dim, use_bias=False, rngs=rngs)
        self.value = nnx.Linear(dim, dim, rngs=rngs)
        self.out = nnx.Linear(dim, dim, rngs=rngs)

    def __call__(self, x, context=None, mask=None):
        context = x if context is None else context
        split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)
        q, k, v = split(self.query(x)), split(self.key(context)), split(self.value(context))
        scale = q.shape[-1] ** -0.25
        logits = jnp.einsum("bqhd,bkhd->bhqk", q * scale, k * scale)
        if mask is not None:
            logits = jnp.where(mask, logits, -jnp.inf)
        y = jnp.einsum("bhqk,bkhd->bqhd", nnx.softmax(logits, axis=-1), v)
        return self.out(y.reshape(x.shape))


class Mlp(nnx.Module):
    def __init__(self, dim, *, rngs):
        self.fc1 = nnx.Linear(dim, 4 * dim, rngs=rngs)
        self.fc2 = nnx.Linear(4 * dim, dim, rngs=rngs)

    def __call__(self, x):
        return self.fc2(nnx.gelu(self.fc1(x), approximate=False))


class Block(nnx.Module):
    def __init__(self, dim, heads, cross, *, rngs):
        norm = lambda: nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.attn, self.attn_ln = Attention(dim, heads, rngs=rngs), norm()
        self.cross = cross
        if cross:
            self.cross_attn, self.cross_attn_ln = Attention(dim, heads, rngs=rngs), norm()
        self.mlp, self.mlp_ln = Mlp(dim, rngs=rngs), norm()

    def __call__(self, x, context=None, mask=None):
        x = x + self.attn(self.attn_ln(x), mask=mask)
        if self.cross:
            x = x + self.cross_attn(self.cross_attn_ln(x), context)
        return x + self.mlp(self.mlp_ln(x))


class FlaxEncoder(nnx.Module):
    def __init__(self, n_mels, n_ctx, dim, heads, layers, *, rngs):
        self.n_ctx, self.dim = n_ctx, dim
        self.conv1 = nnx.Conv(n_mels, dim, kernel_size=3, padding=1, rngs=rngs)
        self.bn1 = nnx.BatchNorm(dim, use_running_average=True, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.conv2 = nnx.Conv(dim, dim, kernel_size=3, strides=2, padding=1, rngs=rngs)
        self.blocks = nnx.List([Block(dim, heads, False, rngs=rngs) for _ in range(layers)])
        self.ln_post = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)

    def __call__(self, mel):
        x = log_mel(mel)
        x = nnx.gelu(self.bn1(self.conv1(x)), approximate=False)
        x = nnx.gelu(self.conv2(x), approximate=False)
        x = x + sinusoid_table(self.n_ctx, self.dim)
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x)


class FlaxDecoder(nnx.Module):
    def __init__(self, vocab, n_ctx, dim, heads, layers, *, rngs):
        self.token_embedding = nnx.Param(jnp.zeros((vocab, dim)))
        self.positional_embedding = nnx.Param(jnp.zeros((n_ctx, dim)))
        self.blocks = nnx.List([Block(dim, heads, True, rngs=rngs) for _ in range(layers)])
        self.ln = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)

    def __call__(self, tokens, context):
        n = tokens.shape[-1]
        x = self.token_embedding[...][tokens] + self.positional_embedding[...][:n]
        mask = jnp.tril(jnp.ones((n, n), bool))
        for block in self.blocks:
            x = block(x, context, mask)
        return self.ln(x) @ self.token_embedding[...].T


class FlaxWhisper(nnx.Module):
    def __init__(self, n_mels=10, audio_ctx=8, vocab=29, text_ctx=12, dim=20, heads=5, layers=2, *, rngs):
        self.encoder = FlaxEncoder(n_mels, audio_ctx, dim, heads, layers, rngs=rngs)
        self.decoder = FlaxDecoder(vocab, text_ctx, dim, heads, layers, rngs=rngs)

    def __call__(self, mel, tokens):
        return self.decoder(tokens, self.encoder(mel))


def a(tensor):
    return jnp.asarray(tensor.detach().numpy())


def port_block(dst, src):
    def attention(d, s):
        d.query.kernel[...], d.query.bias[...] = a(s.query.weight.T), a(s.query.bias)
        d.key.kernel[...] = a(s.key.weight.T)
        d.value.kernel[...], d.value.bias[...] = a(s.value.weight.T), a(s.value.bias)
        d.out.kernel[...], d.out.bias[...] = a(s.out.weight.T), a(s.out.bias)

    attention(dst.attn, src.attn)
    pairs = [(dst.attn_ln, src.attn_ln), (dst.mlp_ln, src.mlp_ln)]
    if dst.cross:
        attention(dst.cross_attn, src.cross_attn)
        pairs.append((dst.cross_attn_ln, src.cross_attn_ln))
    for d, s in pairs:
        d.scale[...], d.bias[...] = a(s.weight), a(s.bias)
    for d, s in ((dst.mlp.fc1, src.mlp[0]), (dst.mlp.fc2, src.mlp[2])):
        d.kernel[...], d.bias[...] = a(s.weight.T), a(s.bias)


def port(net, model):
    enc, dec = net.encoder, net.decoder
    for d, s in ((model.encoder.conv1, enc.conv1), (model.encoder.conv2, enc.conv2)):
        d.kernel[...], d.bias[...] = a(s.weight.permute(2, 1, 0)), a(s.bias)
    bn = model.encoder.bn1
    bn.scale[...], bn.bias[...] = a(enc.bn1.weight), a(enc.bn1.bias)
    bn.mean[...], bn.var[...] = a(enc.bn1.running_mean), a(enc.bn1.running_var)
    model.decoder.token_embedding[...] = a(dec.token_embedding.weight)
    model.decoder.positional_embedding[...] = a(dec.positional_embedding)
    for d, s in ((model.encoder.ln_post, enc.ln_post), (model.decoder.ln, dec.ln)):
        d.scale[...], d.bias[...] = a(s.weight), a(s.bias)
    for d, s in [*zip(model.encoder.blocks, enc.blocks), *zip(model.decoder.blocks, dec.blocks)]:
        port_block(d, s)
    return model


def build(seed):
    torch.manual_seed(seed)
    net = Whisper().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.2)
            elif "ln" in name.split(".")[-2] or "bn" in name:
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(0, 0.3)
        net.encoder.bn1.running_mean.normal_(0, 0.4)
        net.encoder.bn1.running_var.uniform_(0.5, 2.0)
    rng = np.random.default_rng(seed)
    mel = (10.0 ** rng.uniform(-9, 2, (2, 10, 16)) * np.array([1.0, 0.001])[:, None, None]).astype(np.float32)
    tokens = rng.integers(0, 29, (2, 7))
    model = port(net, FlaxWhisper(rngs=nnx.Rngs(seed)))
    return {"torch": net, "flax": model, "inputs": (mel, tokens), "flax_inputs": (mel.swapaxes(1, 2), tokens)}


FAULTS = [
    {
        "title": "second convolution padded SAME, with stride 2",
        "edits": [("kernel_size=3, strides=2, padding=1, rngs=rngs)", 'kernel_size=3, strides=2, padding="SAME", rngs=rngs)')],
        "layers": ["encoder.conv2"],
        "causes": ["padding"],
        "level": "outputs",
    },
    {
        "title": "cosines before sines in the table",
        "edits": [("jnp.concatenate([jnp.sin(time), jnp.cos(time)], axis=-1)", "jnp.concatenate([jnp.cos(time), jnp.sin(time)], axis=-1)")],
        "layers": ["encoder"],
        "between": ("encoder.conv2", "encoder.blocks.0.attn_ln"),
        "causes": ["concat"],
        "level": "outputs",
    },
    {
        "title": "timescales over half, not half - 1",
        "edits": [("log_increment = jnp.log(max_timescale) / (half - 1)", "log_increment = jnp.log(max_timescale) / half")],
        "layers": ["encoder"],
        "between": ("encoder.conv2", "encoder.blocks.0.attn_ln"),
        "causes": ["constant"],
        "level": "outputs",
    },
    {
        "title": "bias of the values not loaded, as if it were missing like the keys'",
        "edits": [("d.value.kernel[...], d.value.bias[...] = a(s.value.weight.T), a(s.value.bias)", "d.value.kernel[...] = a(s.value.weight.T)")],
        "layers": ["encoder.blocks.0.attn.value"],
        "causes": ["bias_missing", "default"],
        "level": "outputs",
    },
    {
        "title": "the fourth root scales the query alone",
        "edits": [("q * scale, k * scale)", "q * scale, k)")],
        "layers": ["encoder.blocks.0.attn"],
        "between": ("encoder.blocks.0.attn.value", "encoder.blocks.0.attn.out"),
        "causes": ["scale"],
        "level": "outputs",
    },
    {
        "title": "no gelu after the second convolution",
        "edits": [("x = nnx.gelu(self.conv2(x), approximate=False)", "x = self.conv2(x)")],
        "layers": ["encoder.act", "encoder"],
        "between": ("encoder.conv2", "encoder.blocks.0.attn_ln"),
        "causes": ["missing_layer", "activation"],
        "level": "outputs",
    },
    {
        "title": "peak of the logarithm over the whole batch",
        "edits": [("peak = log_spec.max(axis=(1, 2), keepdims=True)", "peak = log_spec.max()")],
        "layers": ["encoder"],
        "between": (None, "encoder.conv1"),
        "causes": ["axis"],
        "level": "outputs",
    },
    {
        "title": "the cross attention attends to the decoder itself",
        "edits": [("x = x + self.cross_attn(self.cross_attn_ln(x), context)", "x = x + self.cross_attn(self.cross_attn_ln(x))")],
        "layers": ["decoder.blocks.0.cross_attn", "decoder.blocks.0", "decoder.blocks.0.cross_attn.key"],
        "between": ("decoder.blocks.0.cross_attn.query", "decoder.blocks.0.cross_attn.key"),
        "causes": ["operand", "wiring", "left_out"],
        "level": "outputs",
    },
    {
        "title": "torch's momentum of 0.1 passed to Flax's BatchNorm",
        "edits": [("use_running_average=True, momentum=0.9,", "use_running_average=True, momentum=0.1,")],
        "layers": ["encoder.bn1"],
        "causes": ["momentum"],
        "level": "training",
    },
]
