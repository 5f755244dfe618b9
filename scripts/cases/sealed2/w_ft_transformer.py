"""FT-Transformer for tables: one token per feature, [CLS] at the end, pre-norm blocks with ReGLU, dropout in training."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn


class Tokenizer(nn.Module):
    def __init__(self, n_num, cardinalities, d):
        super().__init__()
        offsets = torch.tensor([0] + list(cardinalities[:-1])).cumsum(0)
        self.register_buffer("category_offsets", offsets)
        self.category_embeddings = nn.Embedding(sum(cardinalities), d)
        self.weight = nn.Parameter(torch.randn(n_num + 1, d))
        self.bias = nn.Parameter(torch.randn(n_num + len(cardinalities), d))

    def forward(self, x_num, x_cat):
        x_some = torch.cat([x_num.new_ones(len(x_num), 1), x_num], dim=1)
        x = self.weight[None] * x_some[:, :, None]
        x = torch.cat([x, self.category_embeddings(x_cat + self.category_offsets)], dim=1)
        return x + torch.cat([self.bias.new_zeros(1, self.bias.shape[1]), self.bias])[None]


class ReGLU(nn.Module):
    def forward(self, x):
        a, b = x.chunk(2, dim=-1)
        return a * torch.relu(b)


class Layer(nn.Module):
    def __init__(self, d, heads, hidden, first, p_att, p_ffn, p_res):
        super().__init__()
        self.attention = nn.MultiheadAttention(d, heads, dropout=p_att, batch_first=True)
        self.norm0 = nn.Identity() if first else nn.LayerNorm(d)
        self.norm1 = nn.LayerNorm(d)
        self.linear0, self.linear1 = nn.Linear(d, 2 * hidden), nn.Linear(hidden, d)
        self.activation, self.dropout, self.res_dropout = ReGLU(), nn.Dropout(p_ffn), nn.Dropout(p_res)

    def forward(self, x, last):
        h = self.norm0(x)
        q = h[:, :1] if last else h
        h = self.attention(q, h, h, need_weights=False)[0]
        x = (x[:, :1] if last else x) + self.res_dropout(h)
        h = self.linear1(self.dropout(self.activation(self.linear0(self.norm1(x)))))
        return x + self.res_dropout(h)


class FTTransformer(nn.Module):
    def __init__(self, n_num=4, cards=(3, 5), d=12, heads=3, hidden=10, layers=2, d_out=2):
        super().__init__()
        self.tokenizer = Tokenizer(n_num, cards, d)
        self.layers = nn.ModuleList([Layer(d, heads, hidden, i == 0, 0.1, 0.15, 0.4) for i in range(layers)])
        self.last_normalization = nn.LayerNorm(d)
        self.head = nn.Linear(d, d_out)

    def forward(self, x_num, x_cat):
        x = self.tokenizer(x_num, x_cat)
        for i, layer in enumerate(self.layers):
            x = layer(x, i + 1 == len(self.layers))
        return self.head(torch.relu(self.last_normalization(x[:, 0])))


# NNX ---------------------------------------------------------------


class FeatureTokens(nnx.Module):
    def __init__(self, n_num, cards, d, rngs):
        normal = nnx.initializers.normal(1.0)
        self.starts = tuple(int(v) for v in np.cumsum((0,) + tuple(cards[:-1])))
        self.cls = nnx.Param(normal(rngs.params(), (d,)))
        self.slope = nnx.Param(normal(rngs.params(), (n_num, d)))
        self.shift = nnx.Param(normal(rngs.params(), (n_num + len(cards), d)))
        self.table = nnx.Param(normal(rngs.params(), (sum(cards), d)))

    def __call__(self, numbers, categories):
        numeric = numbers[:, :, None] * self.slope[...]
        categorical = self.table[...][categories + jnp.asarray(self.starts)]
        features = jnp.concatenate([numeric, categorical], axis=1) + self.shift[...]
        cls = jnp.broadcast_to(self.cls[...], (numbers.shape[0], 1, features.shape[-1]))
        return jnp.concatenate([cls, features], axis=1)


class TabularBlock(nnx.Module):
    def __init__(self, d, heads, hidden, prenorm, rngs):
        self.att = nnx.MultiHeadAttention(heads, d, dropout_rate=0.1, decode=False, broadcast_dropout=False, rngs=rngs)
        self.ln_att = nnx.LayerNorm(d, epsilon=1e-5, rngs=rngs) if prenorm else None
        self.ln_ffn = nnx.LayerNorm(d, epsilon=1e-5, rngs=rngs)
        self.up, self.down = nnx.Linear(d, 2 * hidden, rngs=rngs), nnx.Linear(hidden, d, rngs=rngs)
        self.drop_ffn, self.drop_res = nnx.Dropout(0.15, rngs=rngs), nnx.Dropout(0.4, rngs=rngs)

    def __call__(self, x, only_cls):
        h = x if self.ln_att is None else self.ln_att(x)
        if only_cls:
            x, q = x[:, :1], h[:, :1]
        else:
            q = h
        x = x + self.drop_res(self.att(q, h, h))
        value, gate = jnp.split(self.up(self.ln_ffn(x)), 2, axis=-1)
        return x + self.drop_res(self.down(self.drop_ffn(value * nnx.relu(gate))))


class TabularTransformer(nnx.Module):
    def __init__(self, n_num=4, cards=(3, 5), d=12, heads=3, hidden=10, depth=2, out=2, *, rngs):
        self.tokens = FeatureTokens(n_num, cards, d, rngs)
        self.blocks = nnx.List([TabularBlock(d, heads, hidden, i > 0, rngs) for i in range(depth)])
        self.norm = nnx.LayerNorm(d, epsilon=1e-5, rngs=rngs)
        self.out = nnx.Linear(d, out, rngs=rngs)

    def __call__(self, numbers, categories):
        x = self.tokens(numbers, categories)
        for i, block in enumerate(self.blocks):
            x = block(x, i == len(self.blocks) - 1)
        return self.out(nnx.relu(self.norm(x[:, 0])))


def transfer(net, model, heads=3):
    a = lambda t: jnp.asarray(t.detach().numpy())

    def linear(dst, src):
        dst.kernel[...], dst.bias[...] = a(src.weight).T, a(src.bias)

    def norm(dst, src):
        dst.scale[...], dst.bias[...] = a(src.weight), a(src.bias)

    tok = net.tokenizer
    model.tokens.cls[...], model.tokens.slope[...] = a(tok.weight)[0], a(tok.weight)[1:]
    model.tokens.shift[...], model.tokens.table[...] = a(tok.bias), a(tok.category_embeddings.weight)
    for dst, src in zip(model.blocks, net.layers):
        att = src.attention
        w, b = a(att.in_proj_weight), a(att.in_proj_bias)
        d = w.shape[1]
        for i, lin in enumerate((dst.att.query, dst.att.key, dst.att.value)):
            lin.kernel[...] = w[i * d:(i + 1) * d].T.reshape(d, heads, -1)
            lin.bias[...] = b[i * d:(i + 1) * d].reshape(heads, -1)
        dst.att.out.kernel[...] = a(att.out_proj.weight).T.reshape(heads, -1, d)
        dst.att.out.bias[...] = a(att.out_proj.bias)
        if dst.ln_att is not None:
            norm(dst.ln_att, src.norm0)
        norm(dst.ln_ffn, src.norm1)
        linear(dst.up, src.linear0)
        linear(dst.down, src.linear1)
    norm(model.norm, net.last_normalization)
    linear(model.out, net.head)


def build(seed):
    torch.manual_seed(seed)
    net = FTTransformer().eval()
    for n, p in net.named_parameters():
        p.data.uniform_(0.5, 1.5) if "norm" in n and n.endswith("weight") else p.data.normal_(0, 0.5)
    model = TabularTransformer(rngs=nnx.Rngs(seed))
    transfer(net, model)
    model.eval()
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=(5, 4)).astype(np.float32)
    categories = np.stack([rng.integers(0, 3, 5), rng.integers(0, 5, 5)], axis=1)
    return {"torch": net, "flax": model, "inputs": (numbers, categories)}


FAULTS = [
    {
        "title": "category ids start at the wrong rows: offsets are the cumulative sizes without the leading zero",
        "edits": [("np.cumsum((0,) + tuple(cards[:-1])))", "np.cumsum(tuple(cards)))")],
        "layers": ["tokenizer", "tokenizer.category_embeddings"],
        "between": (None, "layers.0.attention"),
        "causes": ["offset"],
        "level": "outputs",
    },
    {
        "title": "GEGLU's order: the first half is the gate",
        "edits": [("value, gate = jnp.split(self.up(self.ln_ffn(x)), 2, axis=-1)", "gate, value = jnp.split(self.up(self.ln_ffn(x)), 2, axis=-1)")],
        "layers": ["layers.0.activation"],
        "between": ("layers.0.linear0", "layers.0.linear1"),
        "causes": ["swapped", "blocks", "gates"],
        "level": "outputs",
    },
    {
        "title": "dropout on the feed-forward's branch forgotten before its residual",
        "edits": [("return x + self.drop_res(self.down(self.drop_ffn(value * nnx.relu(gate))))", "return x + self.down(self.drop_ffn(value * nnx.relu(gate)))")],
        "layers": ["layers.0.res_dropout", "layers.0"],
        "between": ("layers.0.linear1", "layers.1.norm0"),
        "causes": ["dropout", "left_out", "missing_layer"],
        "level": "training",
    },
    {
        "title": "the last block's queries are taken before its norm",
        "edits": [("x, q = x[:, :1], h[:, :1]", "x, q = x[:, :1], x[:, :1]")],
        "layers": ["layers.1"],
        "between": ("layers.1.norm0", "layers.1.attention"),
        "causes": ["operand", "norm_order", "wiring"],
        "level": "outputs",
    },
    {
        "title": "[CLS] taken for the last row of the tokenizer's weights, where it is the first",
        "edits": [("model.tokens.cls[...], model.tokens.slope[...] = a(tok.weight)[0], a(tok.weight)[1:]", "model.tokens.cls[...], model.tokens.slope[...] = a(tok.weight)[-1], a(tok.weight)[:-1]")],
        "layers": ["tokenizer"],
        "between": (None, "layers.0.attention"),
        "causes": ["token", "permuted", "offset"],
        "level": "outputs",
    },
]
