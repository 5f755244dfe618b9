"""ALBERT for masked words: one layer used several times, factorised embeddings, tied decoder."""
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as tnn
import torch.nn.functional as F

VOCAB, EMB, HID, HEADS, INNER, LAYERS, POSITIONS, PAD = 23, 8, 12, 3, 20, 4, 11, 0


# ---- PyTorch

class AlbertEmbeddings(tnn.Module):
    def __init__(self):
        super().__init__()
        self.word_embeddings = tnn.Embedding(VOCAB, EMB, padding_idx=PAD)
        self.position_embeddings = tnn.Embedding(POSITIONS, EMB)
        self.token_type_embeddings = tnn.Embedding(2, EMB)
        self.LayerNorm = tnn.LayerNorm(EMB, eps=1e-12)
        self.dropout = tnn.Dropout(0.1)
        self.register_buffer("position_ids", torch.arange(POSITIONS).expand((1, -1)), persistent=False)

    def forward(self, input_ids, token_type_ids):
        position_ids = self.position_ids[:, :input_ids.size(1)]
        embeddings = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        embeddings = embeddings + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embeddings))


class AlbertAttention(tnn.Module):
    def __init__(self):
        super().__init__()
        self.num_attention_heads = HEADS
        self.attention_head_size = HID // HEADS
        self.query = tnn.Linear(HID, HID)
        self.key = tnn.Linear(HID, HID)
        self.value = tnn.Linear(HID, HID)
        self.attention_dropout = tnn.Dropout(0.3)
        self.output_dropout = tnn.Dropout(0.1)
        self.dense = tnn.Linear(HID, HID)
        self.LayerNorm = tnn.LayerNorm(HID, eps=1e-12)

    def transpose_for_scores(self, x):
        return x.view(x.shape[:-1] + (self.num_attention_heads, self.attention_head_size)).permute(0, 2, 1, 3)

    def forward(self, hidden_states, attention_mask):
        query_layer = self.transpose_for_scores(self.query(hidden_states))
        key_layer = self.transpose_for_scores(self.key(hidden_states))
        value_layer = self.transpose_for_scores(self.value(hidden_states))
        scores = torch.matmul(query_layer, key_layer.transpose(-1, -2))
        scores = scores / math.sqrt(self.attention_head_size) + attention_mask
        probs = self.attention_dropout(F.softmax(scores, dim=-1))
        context = torch.matmul(probs, value_layer).transpose(2, 1).flatten(2)
        projected = self.output_dropout(self.dense(context))
        return self.LayerNorm(hidden_states + projected)


class AlbertLayer(tnn.Module):
    def __init__(self):
        super().__init__()
        self.full_layer_layer_norm = tnn.LayerNorm(HID, eps=1e-12)
        self.attention = AlbertAttention()
        self.ffn = tnn.Linear(HID, INNER)
        self.ffn_output = tnn.Linear(INNER, HID)
        self.activation = tnn.GELU(approximate="tanh")
        self.dropout = tnn.Dropout(0.1)

    def forward(self, hidden_states, attention_mask):
        attention_output = self.attention(hidden_states, attention_mask)
        ffn_output = self.dropout(self.ffn_output(self.activation(self.ffn(attention_output))))
        return self.full_layer_layer_norm(ffn_output + attention_output)


class AlbertLayerGroup(tnn.Module):
    def __init__(self):
        super().__init__()
        self.albert_layers = tnn.ModuleList([AlbertLayer()])

    def forward(self, hidden_states, attention_mask):
        for albert_layer in self.albert_layers:
            hidden_states = albert_layer(hidden_states, attention_mask)
        return hidden_states


class AlbertTransformer(tnn.Module):
    def __init__(self):
        super().__init__()
        self.embedding_hidden_mapping_in = tnn.Linear(EMB, HID)
        self.albert_layer_groups = tnn.ModuleList([AlbertLayerGroup()])

    def forward(self, hidden_states, attention_mask):
        hidden_states = self.embedding_hidden_mapping_in(hidden_states)
        for _ in range(LAYERS):
            hidden_states = self.albert_layer_groups[0](hidden_states, attention_mask)
        return hidden_states


class AlbertModel(tnn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = AlbertEmbeddings()
        self.encoder = AlbertTransformer()

    def forward(self, input_ids, attention_mask, token_type_ids):
        embedding_output = self.embeddings(input_ids, token_type_ids)
        dtype = embedding_output.dtype
        extended = (1.0 - attention_mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min
        return self.encoder(embedding_output, extended)


class AlbertMLMHead(tnn.Module):
    def __init__(self):
        super().__init__()
        self.LayerNorm = tnn.LayerNorm(EMB, eps=1e-12)
        self.dense = tnn.Linear(HID, EMB)
        self.decoder = tnn.Linear(EMB, VOCAB)
        self.activation = tnn.GELU(approximate="tanh")

    def forward(self, hidden_states):
        return self.decoder(self.LayerNorm(self.activation(self.dense(hidden_states))))


class AlbertForMaskedLM(tnn.Module):
    def __init__(self):
        super().__init__()
        self.albert = AlbertModel()
        self.predictions = AlbertMLMHead()
        self.predictions.decoder.weight = self.albert.embeddings.word_embeddings.weight

    def forward(self, input_ids, attention_mask, token_type_ids):
        return self.predictions(self.albert(input_ids, attention_mask, token_type_ids))


# ---- Flax

class SharedLayer(nn.Module):
    heads: int
    inner: int
    attn_rate: float = 0.3
    rate: float = 0.1

    @nn.compact
    def __call__(self, carry, keep, deterministic):
        x = carry
        width = x.shape[-1]
        norm = lambda name: nn.LayerNorm(epsilon=1e-12, use_fast_variance=False, name=name)
        qkv = nn.DenseGeneral((3, self.heads, width // self.heads), name="qkv")(x)
        q, k, v = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        scores = jnp.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
        scores = jnp.where(keep[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        probs = nn.Dropout(self.attn_rate)(jax.nn.softmax(scores), deterministic=deterministic)
        mixed = jnp.einsum("bhij,bjhd->bihd", probs, v)
        mixed = nn.DenseGeneral(width, axis=(-2, -1), name="merge")(mixed)
        mixed = nn.Dropout(self.rate)(mixed, deterministic=deterministic)
        x = norm("norm_attn")(x + mixed)
        y = nn.gelu(nn.Dense(self.inner, name="up")(x), approximate=True)
        y = nn.Dense(width, name="down")(y)
        y = nn.Dropout(self.rate)(y, deterministic=deterministic)
        return norm("norm_out")(x + y), None


class LiteBert(nn.Module):
    vocab: int = VOCAB
    emb: int = EMB
    hidden: int = HID
    heads: int = HEADS
    inner: int = INNER
    repeats: int = LAYERS
    positions: int = POSITIONS
    pad: int = PAD

    @nn.compact
    def __call__(self, ids, mask, segments, deterministic=True):
        small = nn.initializers.normal(0.02)
        words = self.param("words", small, (self.vocab, self.emb))
        places = self.param("places", small, (self.positions, self.emb))
        kinds = self.param("kinds", small, (2, self.emb))
        looked = words[ids]
        # a padding token does not teach the table
        looked = jnp.where((ids == self.pad)[..., None], jax.lax.stop_gradient(looked), looked)
        x = looked + places[:ids.shape[1]] + kinds[segments]
        x = nn.LayerNorm(epsilon=1e-12, use_fast_variance=False, name="norm_emb")(x)
        x = nn.Dropout(0.1)(x, deterministic=deterministic)
        x = nn.Dense(self.hidden, name="widen")(x)
        scanned = nn.scan(SharedLayer, variable_broadcast="params", variable_axes={},
                          split_rngs={"params": False, "dropout": True},
                          in_axes=(nn.broadcast, nn.broadcast), length=self.repeats)
        x, _ = scanned(self.heads, self.inner, name="layer")(x, mask > 0, deterministic)
        x = nn.gelu(nn.Dense(self.emb, name="narrow")(x), approximate=True)
        x = nn.LayerNorm(epsilon=1e-12, use_fast_variance=False, name="norm_head")(x)
        bias = self.param("word_bias", nn.initializers.zeros, (self.vocab,))
        return x @ words.T + bias


def port_weights(net):
    arr = lambda t: jnp.asarray(t.detach().numpy())
    dense = lambda m: {"kernel": arr(m.weight).T, "bias": arr(m.bias)}
    norm = lambda m: {"scale": arr(m.weight), "bias": arr(m.bias)}
    emb, enc, head = net.albert.embeddings, net.albert.encoder, net.predictions
    layer = enc.albert_layer_groups[0].albert_layers[0]
    att = layer.attention
    hd = HID // HEADS
    three = (att.query, att.key, att.value)
    params = {
        "words": arr(emb.word_embeddings.weight),
        "places": arr(emb.position_embeddings.weight),
        "kinds": arr(emb.token_type_embeddings.weight),
        "norm_emb": norm(emb.LayerNorm),
        "widen": dense(enc.embedding_hidden_mapping_in),
        "layer": {
            "qkv": {"kernel": jnp.stack([arr(m.weight).T.reshape(HID, HEADS, hd) for m in three], axis=1),
                    "bias": jnp.stack([arr(m.bias).reshape(HEADS, hd) for m in three])},
            "merge": {"kernel": arr(att.dense.weight).T.reshape(HEADS, hd, HID), "bias": arr(att.dense.bias)},
            "norm_attn": norm(att.LayerNorm),
            "up": dense(layer.ffn),
            "down": dense(layer.ffn_output),
            "norm_out": norm(layer.full_layer_layer_norm),
        },
        "narrow": dense(head.dense),
        "norm_head": norm(head.LayerNorm),
        "word_bias": arr(head.decoder.bias),
    }
    return LiteBert(), {"params": params}


def build(seed):
    torch.manual_seed(seed)
    net = AlbertForMaskedLM().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() == 1:
                p.copy_(0.6 + 0.8 * torch.rand_like(p) if name.endswith("weight") else 0.3 * torch.randn_like(p))
            elif "embeddings" in name:
                p.copy_(0.03 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * 1.2 / p.shape[1] ** 0.5)
    g = np.random.RandomState(seed + 1)
    ids = g.randint(1, VOCAB, (2, 7))
    mask = np.ones((2, 7), np.int64)
    ids[1, 5:], mask[1, 5:] = PAD, 0
    kinds = np.zeros((2, 7), np.int64)
    kinds[:, 3:] = 1
    return {"torch": net, "flax": port_weights(net),
            "inputs": {"input_ids": ids.astype(np.int64), "attention_mask": mask, "token_type_ids": kinds},
            "flax_inputs": (ids.astype(np.int32), mask.astype(np.int32), kinds.astype(np.int32))}


LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0"
FAULTS = [
    {"title": "the norm of the embeddings has Flax's epsilon 1e-6 instead of 1e-12",
     "edits": [('nn.LayerNorm(epsilon=1e-12, use_fast_variance=False, name="norm_emb")',
                'nn.LayerNorm(use_fast_variance=False, name="norm_emb")')],
     "layers": ["albert.embeddings.LayerNorm"], "between": None,
     "causes": ["epsilon"], "level": "outputs"},
    {"title": "the attention's norm acts on its output before the residual sum, not after",
     "edits": [('norm("norm_attn")(x + mixed)', 'x + norm("norm_attn")(mixed)')],
     "layers": [LAYER + ".attention.LayerNorm", LAYER + ".attention"],
     "between": (LAYER + ".attention.output_dropout", LAYER + ".ffn"),
     "causes": ["norm_order", "order", "residual"], "level": "outputs"},
    {"title": "the mask of padding hides queries, not keys",
     "edits": [("keep[:, None, None, :]", "keep[:, None, :, None]")],
     "layers": [LAYER + ".attention"],
     "between": (LAYER + ".attention.value", LAYER + ".attention.attention_dropout"),
     "causes": ["mask", "axis"], "level": "outputs"},
    {"title": "the table's row of padding gets a gradient from the look-up",
     "edits": [("looked = jnp.where((ids == self.pad)[..., None], jax.lax.stop_gradient(looked), looked)",
                "looked = looked")],
     "layers": ["albert.embeddings.word_embeddings"], "between": None,
     "causes": ["padding_idx", "stop_gradient"], "level": "gradients"},
    {"title": "attention's probabilities are dropped at the hidden rate of 0.1 instead of 0.3",
     "edits": [("nn.Dropout(self.attn_rate)", "nn.Dropout(self.rate)")],
     "layers": [LAYER + ".attention.attention_dropout"],
     "between": None, "causes": ["dropout", "training_attribute"], "level": "attributes"},
]
