"""T5-like encoder-decoder: relative position buckets, gated GELU, no scaling of scores, tied head; Linen setup."""
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

VOCAB, D_MODEL, D_KV, N_HEADS, D_FF, BUCKETS, MAX_DISTANCE = 33, 20, 6, 3, 28, 8, 10


class T5LayerNorm(torch.nn.Module):
    def __init__(self, d, eps=1e-6):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def relative_position_bucket(relative_position, bidirectional, num_buckets, max_distance):
    buckets = torch.zeros_like(relative_position)
    if bidirectional:
        num_buckets //= 2
        buckets = buckets + (relative_position > 0).long() * num_buckets
        relative_position = relative_position.abs()
    else:
        relative_position = -torch.min(relative_position, torch.zeros_like(relative_position))
    max_exact = num_buckets // 2
    large = max_exact + (torch.log(relative_position.double().clamp(min=1) / max_exact)
                         / np.log(max_distance / max_exact) * (num_buckets - max_exact)).long()
    large = torch.clamp(large, max=num_buckets - 1)
    return buckets + torch.where(relative_position < max_exact, relative_position, large)


class T5Attention(torch.nn.Module):
    def __init__(self, is_decoder=False, has_bias=False):
        super().__init__()
        self.is_decoder, inner = is_decoder, N_HEADS * D_KV
        self.q = torch.nn.Linear(D_MODEL, inner, bias=False)
        self.k = torch.nn.Linear(D_MODEL, inner, bias=False)
        self.v = torch.nn.Linear(D_MODEL, inner, bias=False)
        self.o = torch.nn.Linear(inner, D_MODEL, bias=False)
        if has_bias:
            self.relative_attention_bias = torch.nn.Embedding(BUCKETS, N_HEADS)

    def compute_bias(self, q_len, k_len):
        rel = torch.arange(k_len)[None, :] - torch.arange(q_len)[:, None]
        bucket = relative_position_bucket(rel, not self.is_decoder, BUCKETS, MAX_DISTANCE)
        return self.relative_attention_bias(bucket).permute(2, 0, 1).unsqueeze(0)

    def forward(self, x, mask, kv=None, position_bias=None):
        kv = x if kv is None else kv
        b = x.shape[0]
        split = lambda y: y.view(b, -1, N_HEADS, D_KV).transpose(1, 2)
        q, k, v = split(self.q(x)), split(self.k(kv)), split(self.v(kv))
        scores = torch.matmul(q, k.transpose(3, 2))
        if position_bias is None:
            if hasattr(self, "relative_attention_bias"):
                position_bias = self.compute_bias(q.shape[2], k.shape[2])
            else:
                position_bias = torch.zeros((1, N_HEADS, q.shape[2], k.shape[2]), dtype=x.dtype)
        weights = F.softmax(scores + position_bias + (~mask).to(x.dtype) * -1e9, dim=-1)
        out = torch.matmul(weights, v).transpose(1, 2).reshape(b, -1, N_HEADS * D_KV)
        return self.o(out), position_bias


class T5DenseGatedActDense(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wi_0 = torch.nn.Linear(D_MODEL, D_FF, bias=False)
        self.wi_1 = torch.nn.Linear(D_MODEL, D_FF, bias=False)
        self.wo = torch.nn.Linear(D_FF, D_MODEL, bias=False)
        self.act = torch.nn.GELU(approximate="tanh")

    def forward(self, x):
        gelu = self.act(self.wi_0(x))
        return self.wo(gelu * self.wi_1(x))


class T5Block(torch.nn.Module):
    def __init__(self, is_decoder, has_bias):
        super().__init__()
        self.self_norm, self.self_attn = T5LayerNorm(D_MODEL), T5Attention(is_decoder, has_bias)
        if is_decoder:
            self.cross_norm, self.cross_attn = T5LayerNorm(D_MODEL), T5Attention()
        self.ff_norm, self.ff = T5LayerNorm(D_MODEL), T5DenseGatedActDense()

    def forward(self, x, mask, bias, memory=None, memory_mask=None):
        out, bias = self.self_attn(self.self_norm(x), mask, position_bias=bias)
        x = x + out
        if memory is not None:
            x = x + self.cross_attn(self.cross_norm(x), memory_mask, kv=memory)[0]
        return x + self.ff(self.ff_norm(x)), bias


class T5Stack(torch.nn.Module):
    def __init__(self, is_decoder):
        super().__init__()
        self.block = torch.nn.ModuleList([T5Block(is_decoder, i == 0) for i in range(2)])
        self.final_layer_norm = T5LayerNorm(D_MODEL)

    def forward(self, x, mask, memory=None, memory_mask=None):
        bias = None
        for block in self.block:
            x, bias = block(x, mask, bias, memory, memory_mask)
        return self.final_layer_norm(x)


class T5(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = torch.nn.Embedding(VOCAB, D_MODEL)
        self.encoder, self.decoder = T5Stack(False), T5Stack(True)

    def forward(self, input_ids, attention_mask, labels):
        enc_mask = attention_mask[:, None, None, :].bool()
        memory = self.encoder(self.shared(input_ids), enc_mask)
        dec_ids = labels.new_zeros(labels.shape)
        dec_ids[:, 1:] = labels[:, :-1]
        dec_ids = dec_ids.masked_fill(dec_ids == -100, 0)
        n = labels.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
        h = self.decoder(self.shared(dec_ids), causal, memory, enc_mask)
        return F.linear(h * D_MODEL**-0.5, self.shared.weight)


class RMSScale(nn.Module):
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x):
        w = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        return w * (x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps))


def bucket_of(rel, bidirectional, num_buckets=BUCKETS, max_distance=MAX_DISTANCE):
    base = 0
    if bidirectional:
        num_buckets //= 2
        base = jnp.where(rel > 0, num_buckets, 0)
        dist = jnp.abs(rel)
    else:
        dist = jnp.maximum(-rel, 0)
    exact = num_buckets // 2
    log_ratio = jnp.log(jnp.maximum(dist, 1) / exact) / jnp.log(max_distance / exact)
    far = exact + (log_ratio * (num_buckets - exact)).astype(jnp.int32)
    return base + jnp.where(dist < exact, dist, jnp.minimum(far, num_buckets - 1))


class FlaxT5Attention(nn.Module):
    causal: bool = False
    has_bias: bool = False

    def setup(self):
        dense = lambda n: nn.Dense(n, use_bias=False)
        self.q, self.k, self.v = dense(N_HEADS * D_KV), dense(N_HEADS * D_KV), dense(N_HEADS * D_KV)
        self.o = dense(D_MODEL)
        if self.has_bias:
            self.relative_attention_bias = nn.Embed(BUCKETS, N_HEADS)

    def position_bias(self, q_len, k_len):
        query_position = jnp.arange(q_len)[:, None]
        memory_position = jnp.arange(k_len)[None, :]
        bucket = bucket_of(memory_position - query_position, bidirectional=not self.causal)
        values = self.relative_attention_bias(bucket)
        return jnp.transpose(values, (2, 0, 1))[None]

    def __call__(self, x, mask, kv=None, bias=None):
        kv = x if kv is None else kv
        b = x.shape[0]
        q = self.q(x).reshape(b, -1, N_HEADS, D_KV)
        k = self.k(kv).reshape(b, -1, N_HEADS, D_KV)
        v = self.v(kv).reshape(b, -1, N_HEADS, D_KV)
        if bias is None and self.has_bias:
            bias = self.position_bias(q.shape[1], k.shape[1])
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        if bias is not None:
            scores = scores + bias
        scores = jnp.where(mask, scores, -1e9)
        out = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v)
        return self.o(out.reshape(b, -1, N_HEADS * D_KV)), bias


class FlaxGatedDense(nn.Module):
    def setup(self):
        self.wi_0 = nn.Dense(D_FF, use_bias=False)
        self.wi_1 = nn.Dense(D_FF, use_bias=False)
        self.wo = nn.Dense(D_MODEL, use_bias=False)

    def __call__(self, x):
        return self.wo(nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class FlaxT5Block(nn.Module):
    causal: bool
    has_bias: bool

    def setup(self):
        self.self_norm, self.self_attn = RMSScale(), FlaxT5Attention(self.causal, self.has_bias)
        if self.causal:
            self.cross_norm, self.cross_attn = RMSScale(), FlaxT5Attention()
        self.ff_norm, self.ff = RMSScale(), FlaxGatedDense()

    def __call__(self, x, mask, bias, memory=None, memory_mask=None):
        out, bias = self.self_attn(self.self_norm(x), mask, bias=bias)
        x = x + out
        if memory is not None:
            x = x + self.cross_attn(self.cross_norm(x), memory_mask, kv=memory)[0]
        return x + self.ff(self.ff_norm(x)), bias


class FlaxT5Stack(nn.Module):
    causal: bool

    def setup(self):
        self.block = [FlaxT5Block(self.causal, i == 0) for i in range(2)]
        self.final_layer_norm = RMSScale()

    def __call__(self, x, mask, memory=None, memory_mask=None):
        bias = None
        for block in self.block:
            x, bias = block(x, mask, bias, memory, memory_mask)
        return self.final_layer_norm(x)


def shift_right(labels, start=0):
    shifted = jnp.roll(labels, 1, axis=-1).at[:, 0].set(start)
    return jnp.where(shifted == -100, 0, shifted)


class FlaxT5(nn.Module):
    def setup(self):
        self.shared = nn.Embed(VOCAB, D_MODEL)
        self.encoder = FlaxT5Stack(causal=False)
        self.decoder = FlaxT5Stack(causal=True)

    def __call__(self, input_ids, attention_mask, labels):
        source_mask = attention_mask[:, None, None, :].astype(bool)
        memory = self.encoder(self.shared(input_ids), source_mask)
        causal = jnp.tril(jnp.ones((labels.shape[1],) * 2, bool))[None, None]
        decoder_ids = shift_right(labels)
        h = self.decoder(self.shared(decoder_ids), causal, memory, source_mask)
        return self.shared.attend(h * D_MODEL**-0.5)


def port(net):
    params = {}
    for name, value in net.state_dict().items():
        path = name.replace("block.", "block_").split(".")
        value = jnp.asarray(value.numpy())
        if path[-2] in ("shared", "relative_attention_bias"):
            path[-1] = "embedding"
        elif not path[-2].endswith("norm"):
            path[-1], value = "kernel", value.T
        node = params
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return params


def build(seed):
    torch.manual_seed(seed)
    net = T5().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(0, 0.25)
        for stack in (net.encoder, net.decoder):
            stack.block[0].self_attn.relative_attention_bias.weight.normal_(0, 1.0)
    rng = np.random.default_rng(seed)
    ids, labels = rng.integers(1, VOCAB, (2, 11)), rng.integers(1, VOCAB, (2, 8))
    keep = np.ones((2, 11), np.int64)
    keep[1, 8:] = 0
    labels[0, 6:] = -100
    return {"torch": net, "flax": (FlaxT5(), {"params": port(net)}), "inputs": (ids, keep, labels)}


FAULTS = [
    {
        "title": "decoder's buckets bidirectional",
        "edits": [("bidirectional=not self.causal)", "bidirectional=True)")],
        "layers": ["decoder.block.0.self_attn", "decoder.block.0.self_attn.relative_attention_bias"],
        "between": ("decoder.block.0.self_attn.v", "decoder.block.0.self_attn.relative_attention_bias"),
        "causes": ["operation", "offset", "left_out"],
        "level": "outputs",
    },
    {
        "title": "relative position is query minus memory",
        "edits": [("bucket_of(memory_position - query_position,", "bucket_of(query_position - memory_position,")],
        "layers": ["encoder.block.0.self_attn", "encoder.block.0.self_attn.relative_attention_bias"],
        "between": ("encoder.block.0.self_attn.v", "encoder.block.0.self_attn.relative_attention_bias"),
        "causes": ["operand", "reversed"],
        "level": "outputs",
    },
    {
        "title": "scores divided by the root of the head's width",
        "edits": [('scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)', 'scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(D_KV)')],
        "layers": ["encoder.block.0.self_attn"],
        "between": ("encoder.block.0.self_attn.v", "encoder.block.0.self_attn.o"),
        "causes": ["scale"],
        "level": "outputs",
    },
    {
        "title": "position bias not handed on from the first block",
        "edits": [("            x, bias = block(x, mask, bias, memory, memory_mask)\n        return self.final_layer_norm(x)\n\n\ndef shift_right",
                   "            x, _ = block(x, mask, bias, memory, memory_mask)\n        return self.final_layer_norm(x)\n\n\ndef shift_right")],
        "layers": ["encoder.block.1.self_attn", "encoder"],
        "between": ("encoder.block.1.self_attn.v", "encoder.block.1.self_attn.o"),
        "causes": ["left_out"],
        "level": "outputs",
    },
    {
        "title": "buckets reach to twice the distance",
        "edits": [("num_buckets=BUCKETS, max_distance=MAX_DISTANCE", "num_buckets=BUCKETS, max_distance=2 * MAX_DISTANCE")],
        "layers": ["encoder.block.0.self_attn", "encoder.block.0.self_attn.relative_attention_bias"],
        "between": ("encoder.block.0.self_attn.v", "encoder.block.0.self_attn.relative_attention_bias"),
        "causes": ["constant", "size"],
        "level": "outputs",
    },
    {
        "title": "relu of T5 1.0 in the gate",
        "edits": [("nn.gelu(self.wi_0(x), approximate=True)", "nn.relu(self.wi_0(x))")],
        "layers": ["encoder.block.0.ff.act", "encoder.block.0.ff"],
        "between": ("encoder.block.0.ff.wi_0", "encoder.block.0.ff.wi_1"),
        "causes": ["activation"],
        "level": "outputs",
    },
    {
        "title": "labels rolled, their first place not set to the start token",
        "edits": [("jnp.roll(labels, 1, axis=-1).at[:, 0].set(start)", "jnp.roll(labels, 1, axis=-1)")],
        "layers": ["", "shared"],
        "between": ("encoder.final_layer_norm", "shared"),
        "causes": ["left_out", "token"],
        "level": "outputs",
    },
    {
        "title": "no gradient reaches the relative bias",
        "edits": [("values = self.relative_attention_bias(bucket)", "values = jax.lax.stop_gradient(self.relative_attention_bias(bucket))")],
        "layers": ["encoder.block.0.self_attn.relative_attention_bias", "encoder.block.0.self_attn"],
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
]
