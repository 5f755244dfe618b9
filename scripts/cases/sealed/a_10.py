"""BART-like encoder-decoder: post-norm, learned positions with an offset, embedding norms, a sentence head at the last </s>; Linen."""
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

PAD, EOS = 1, 2


class BartLearnedPositionalEmbedding(torch.nn.Embedding):
    def __init__(self, num, dim):
        self.offset = 2
        super().__init__(num + self.offset, dim)

    def forward(self, input_ids):
        positions = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        return super().forward(positions + self.offset)


class BartAttention(torch.nn.Module):
    def __init__(self, dim, heads, is_causal=False):
        super().__init__()
        self.heads, self.scaling, self.is_causal = heads, (dim // heads) ** -0.5, is_causal
        self.k_proj = torch.nn.Linear(dim, dim)
        self.v_proj = torch.nn.Linear(dim, dim)
        self.q_proj = torch.nn.Linear(dim, dim)
        self.out_proj = torch.nn.Linear(dim, dim)

    def forward(self, x, memory=None, keep=None):
        b, n, d = x.shape
        memory = x if memory is None else memory
        shape = lambda y: y.view(b, -1, self.heads, d // self.heads).transpose(1, 2)
        q = shape(self.q_proj(x) * self.scaling)
        k, v = shape(self.k_proj(memory)), shape(self.v_proj(memory))
        scores = q @ k.transpose(2, 3)
        if self.is_causal:
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), torch.finfo(scores.dtype).min)
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None, :], torch.finfo(scores.dtype).min)
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, d))


class BartEncoderLayer(torch.nn.Module):
    def __init__(self, dim, heads, ffn):
        super().__init__()
        self.self_attn = BartAttention(dim, heads)
        self.self_attn_layer_norm = torch.nn.LayerNorm(dim)
        self.dropout, self.activation_dropout = torch.nn.Dropout(0.1), torch.nn.Dropout(0.05)
        self.fc1, self.fc2 = torch.nn.Linear(dim, ffn), torch.nn.Linear(ffn, dim)
        self.activation_fn = torch.nn.GELU()
        self.final_layer_norm = torch.nn.LayerNorm(dim)

    def forward(self, x, keep):
        x = self.self_attn_layer_norm(x + self.dropout(self.self_attn(x, keep=keep)))
        h = self.activation_dropout(self.activation_fn(self.fc1(x)))
        return self.final_layer_norm(x + self.fc2(h))


class BartDecoderLayer(torch.nn.Module):
    def __init__(self, dim, heads, ffn):
        super().__init__()
        self.self_attn = BartAttention(dim, heads, is_causal=True)
        self.self_attn_layer_norm = torch.nn.LayerNorm(dim)
        self.encoder_attn = BartAttention(dim, heads)
        self.encoder_attn_layer_norm = torch.nn.LayerNorm(dim)
        self.fc1, self.fc2 = torch.nn.Linear(dim, ffn), torch.nn.Linear(ffn, dim)
        self.activation_fn = torch.nn.GELU()
        self.final_layer_norm = torch.nn.LayerNorm(dim)

    def forward(self, x, memory, keep):
        x = self.self_attn_layer_norm(x + self.self_attn(x))
        x = self.encoder_attn_layer_norm(x + self.encoder_attn(x, memory, keep))
        return self.final_layer_norm(x + self.fc2(self.activation_fn(self.fc1(x))))


class BartStack(torch.nn.Module):
    def __init__(self, shared, layer, dim, heads, ffn, n_layers, max_len):
        super().__init__()
        self.embed_tokens, self.embed_scale = shared, math.sqrt(dim)
        self.embed_positions = BartLearnedPositionalEmbedding(max_len, dim)
        self.layernorm_embedding = torch.nn.LayerNorm(dim)
        self.layers = torch.nn.ModuleList([layer(dim, heads, ffn) for _ in range(n_layers)])

    def forward(self, ids, *args):
        positions = self.embed_positions(ids)
        x = self.embed_tokens(ids) * self.embed_scale
        x = self.layernorm_embedding(x + positions)
        for layer in self.layers:
            x = layer(x, *args)
        return x


class ClassificationHead(torch.nn.Module):
    def __init__(self, dim, n):
        super().__init__()
        self.dense, self.out_proj = torch.nn.Linear(dim, dim), torch.nn.Linear(dim, n)

    def forward(self, x):
        return self.out_proj(torch.tanh(self.dense(x)))


class Bart(torch.nn.Module):
    def __init__(self, vocab=39, dim=16, heads=2, ffn=28, n_layers=2, max_len=14, n_classes=3):
        super().__init__()
        self.shared = torch.nn.Embedding(vocab, dim, padding_idx=PAD)
        self.encoder = BartStack(self.shared, BartEncoderLayer, dim, heads, ffn, n_layers, max_len)
        self.decoder = BartStack(self.shared, BartDecoderLayer, dim, heads, ffn, n_layers, max_len)
        self.lm_head = torch.nn.Linear(dim, vocab)
        self.classification_head = ClassificationHead(dim, n_classes)

    def forward(self, input_ids, decoder_input_ids):
        keep = input_ids != PAD
        memory = self.encoder(input_ids, keep)
        h = self.decoder(decoder_input_ids, memory, keep)
        last = (decoder_input_ids.eq(EOS) * torch.arange(1, h.shape[1] + 1)).argmax(dim=1)
        scores = self.classification_head(h[torch.arange(h.shape[0]), last])
        return self.lm_head(h), scores


layer_norm = functools.partial(nn.LayerNorm, epsilon=1e-5)


class FlaxBartAttention(nn.Module):
    heads: int
    causal: bool = False

    @nn.compact
    def __call__(self, x, memory=None, keep=None):
        dim = x.shape[-1]
        memory = x if memory is None else memory
        proj = lambda name: nn.DenseGeneral((self.heads, dim // self.heads), name=name)
        q, k, v = proj("query")(x), proj("key")(memory), proj("value")(memory)
        mask = nn.make_causal_mask(x[..., 0], dtype=bool) if self.causal else None
        if keep is not None:
            padding = keep[:, None, None, :]
            mask = nn.combine_masks(mask, padding, dtype=bool)
        y = nn.dot_product_attention(q, k, v, mask=mask)
        return nn.DenseGeneral(dim, axis=(-2, -1), name="out")(y)


class FlaxBartEncoderLayer(nn.Module):
    heads: int
    ffn: int
    dropout: float = 0.1
    activation_dropout: float = 0.05

    def setup(self):
        self.self_attn = FlaxBartAttention(self.heads)
        self.self_attn_layer_norm = layer_norm()
        self.resid_drop = nn.Dropout(self.dropout, deterministic=True)
        self.act_drop = nn.Dropout(self.activation_dropout, deterministic=True)
        self.fc1 = nn.Dense(self.ffn)
        self.fc2 = nn.Dense(16)
        self.final_layer_norm = layer_norm()

    def __call__(self, x, keep):
        attn = self.resid_drop(self.self_attn(x, keep=keep))
        x = self.self_attn_layer_norm(x + attn)
        y = self.act_drop(nn.gelu(self.fc1(x), approximate=False))
        return self.final_layer_norm(x + self.fc2(y))


class FlaxBartDecoderLayer(nn.Module):
    heads: int
    ffn: int

    def setup(self):
        self.self_attn = FlaxBartAttention(self.heads, causal=True)
        self.self_attn_layer_norm = layer_norm()
        self.encoder_attn = FlaxBartAttention(self.heads)
        self.encoder_attn_layer_norm = layer_norm()
        self.fc1 = nn.Dense(self.ffn)
        self.fc2 = nn.Dense(16)
        self.final_layer_norm = layer_norm()

    def __call__(self, x, memory, keep):
        x = self.self_attn_layer_norm(x + self.self_attn(x))
        x = self.encoder_attn_layer_norm(x + self.encoder_attn(x, memory, keep))
        h = nn.gelu(self.fc1(x), approximate=False)
        return self.final_layer_norm(x + self.fc2(h))


class FlaxBart(nn.Module):
    vocab: int = 39
    dim: int = 16
    heads: int = 2
    ffn: int = 28
    n_layers: int = 2
    max_len: int = 14
    n_classes: int = 3
    offset: int = 2

    def setup(self):
        self.shared = self.param("shared", nn.initializers.normal(0.02), (self.vocab, self.dim))
        self.encoder_positions = nn.Embed(self.max_len + self.offset, self.dim)
        self.decoder_positions = nn.Embed(self.max_len + self.offset, self.dim)
        self.encoder_norm, self.decoder_norm = layer_norm(), layer_norm()
        self.encoder_layers = [FlaxBartEncoderLayer(self.heads, self.ffn) for _ in range(self.n_layers)]
        self.decoder_layers = [FlaxBartDecoderLayer(self.heads, self.ffn) for _ in range(self.n_layers)]
        self.lm_head = nn.Dense(self.vocab)
        self.cls_dense, self.cls_out = nn.Dense(self.dim), nn.Dense(self.n_classes)

    def embed(self, ids, positions, norm):
        # nn.Embedding(padding_idx=...): the row of padding takes part, but does not learn
        table = self.shared.at[PAD].set(jax.lax.stop_gradient(self.shared[PAD]))
        x = table[ids] * math.sqrt(self.dim)
        x = x + positions(jnp.arange(ids.shape[1]) + self.offset)[None]
        return norm(x)

    def __call__(self, input_ids, decoder_input_ids):
        keep = input_ids != PAD
        memory = self.embed(input_ids, self.encoder_positions, self.encoder_norm)
        for layer in self.encoder_layers:
            memory = layer(memory, keep)
        h = self.embed(decoder_input_ids, self.decoder_positions, self.decoder_norm)
        for layer in self.decoder_layers:
            h = layer(h, memory, keep)
        is_eos = decoder_input_ids == EOS
        last = is_eos.shape[1] - 1 - jnp.argmax(is_eos[:, ::-1], axis=1)
        sentence = jnp.take_along_axis(h, last[:, None, None], axis=1)[:, 0]
        return self.lm_head(h), self.cls_out(jnp.tanh(self.cls_dense(sentence)))


def port(net, heads=2):
    sd = {k: jnp.asarray(v.numpy()) for k, v in net.state_dict().items()}

    def linear(name):
        return {"kernel": sd[name + ".weight"].T, "bias": sd[name + ".bias"]}

    def norm(name):
        return {"scale": sd[name + ".weight"], "bias": sd[name + ".bias"]}

    def attention(name):
        dim = sd[name + ".q_proj.bias"].shape[0]
        split = lambda n: {"kernel": sd[f"{name}.{n}.weight"].T.reshape(dim, heads, -1),
                           "bias": sd[f"{name}.{n}.bias"].reshape(heads, -1)}
        out = {"kernel": sd[f"{name}.out_proj.weight"].T.reshape(heads, -1, dim), "bias": sd[f"{name}.out_proj.bias"]}
        return {"query": split("q_proj"), "key": split("k_proj"), "value": split("v_proj"), "out": out}

    params = {"shared": sd["shared.weight"], "lm_head": linear("lm_head"),
              "cls_dense": linear("classification_head.dense"), "cls_out": linear("classification_head.out_proj")}
    for side in ("encoder", "decoder"):
        params[f"{side}_positions"] = {"embedding": sd[f"{side}.embed_positions.weight"]}
        params[f"{side}_norm"] = norm(f"{side}.layernorm_embedding")
        for i in range(2):
            pre = f"{side}.layers.{i}."
            layer = {n: norm(pre + n) for n in ("self_attn_layer_norm", "final_layer_norm")}
            layer.update({n: linear(pre + n) for n in ("fc1", "fc2")}, self_attn=attention(pre + "self_attn"))
            if side == "decoder":
                layer["encoder_attn"] = attention(pre + "encoder_attn")
                layer["encoder_attn_layer_norm"] = norm(pre + "encoder_attn_layer_norm")
            params[f"{side}_layers_{i}"] = layer
    return params


def build(seed):
    torch.manual_seed(seed)
    net = Bart().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.2)
            elif "norm" in name:
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(0, 0.35)
    rng = np.random.default_rng(seed)
    ids, dec = rng.integers(3, 39, (3, 12)), rng.integers(3, 39, (3, 9))
    ids[1, 9:], ids[2, 6:] = PAD, PAD
    dec[:, 0] = EOS
    dec[0, 8], dec[1, 5:7], dec[1, 7:], dec[2, 4], dec[2, 5:] = EOS, EOS, PAD, EOS, PAD
    return {"torch": net, "flax": (FlaxBart(), {"params": port(net)}), "inputs": (ids, dec)}


FAULTS = [
    {
        "title": "positions without BART's offset of 2",
        "edits": [("positions(jnp.arange(ids.shape[1]) + self.offset)", "positions(jnp.arange(ids.shape[1]))")],
        "layers": ["encoder.embed_positions"],
        "causes": ["offset"],
        "level": "outputs",
    },
    {
        "title": "encoder's attention pre-norm",
        "edits": [("        attn = self.resid_drop(self.self_attn(x, keep=keep))\n        x = self.self_attn_layer_norm(x + attn)\n",
                   "        attn = self.resid_drop(self.self_attn(self.self_attn_layer_norm(x), keep=keep))\n        x = x + attn\n")],
        "layers": ["encoder.layers.0", "encoder.layers.0.self_attn_layer_norm"],
        "between": ("encoder.layernorm_embedding", "encoder.layers.0.self_attn.q_proj"),
        "causes": ["norm_order"],
        "level": "outputs",
    },
    {
        "title": "embedding's factor applied after the positions are added",
        "edits": [("        x = table[ids] * math.sqrt(self.dim)\n", "        x = table[ids]\n"),
                  ("        return norm(x)\n", "        return norm(x * math.sqrt(self.dim))\n")],
        "layers": ["encoder"],
        "between": ("shared", "encoder.layernorm_embedding"),
        "causes": ["order", "scale"],
        "level": "outputs",
    },
    {
        "title": "the row of padding learns",
        "edits": [("        table = self.shared.at[PAD].set(jax.lax.stop_gradient(self.shared[PAD]))\n", "        table = self.shared\n")],
        "layers": ["shared"],
        "causes": ["padding_idx"],
        "level": "gradients",
    },
    {
        "title": "keys and values of the cross attention exchanged on loading",
        "edits": [('                layer["encoder_attn"] = attention(pre + "encoder_attn")\n',
                   '                cross = attention(pre + "encoder_attn")\n                layer["encoder_attn"] = {**cross, "key": cross["value"], "value": cross["key"]}\n')],
        "layers": ["decoder.layers.0.encoder_attn.k_proj", "decoder.layers.0.encoder_attn.v_proj"],
        "causes": ["swapped"],
        "level": "outputs",
    },
    {
        "title": "decoder sees later tokens",
        "edits": [("FlaxBartAttention(self.heads, causal=True)", "FlaxBartAttention(self.heads)")],
        "layers": ["decoder.layers.0.self_attn"],
        "between": ("decoder.layers.0.self_attn.v_proj", "decoder.layers.0.self_attn.out_proj"),
        "causes": ["causal", "mask"],
        "level": "outputs",
    },
    {
        "title": "mask of the source inverted",
        "edits": [("padding = keep[:, None, None, :]", "padding = ~keep[:, None, None, :]")],
        "layers": ["encoder.layers.0.self_attn"],
        "between": ("encoder.layers.0.self_attn.v_proj", "encoder.layers.0.self_attn.out_proj"),
        "causes": ["mask"],
        "level": "outputs",
    },
    {
        "title": "dropout within the feed-forward has the residual's rate",
        "edits": [("self.act_drop = nn.Dropout(self.activation_dropout,", "self.act_drop = nn.Dropout(self.dropout,")],
        "layers": ["encoder.layers.0.activation_dropout"],
        "between": ("encoder.layers.0.fc1", "encoder.layers.0.fc2"),
        "causes": ["training_attribute"],
        "level": "attributes",
    },
    {
        "title": "sentence read at the first </s>, which starts the decoder",
        "edits": [("last = is_eos.shape[1] - 1 - jnp.argmax(is_eos[:, ::-1], axis=1)", "last = jnp.argmax(is_eos, axis=1)")],
        "layers": [""],
        "between": ("decoder.layers.1.final_layer_norm", "classification_head.dense"),
        "causes": ["token"],
        "level": "outputs",
    },
]
