"""SASRec user tower and an item tower with category bags, scored by cosine with a learnt temperature."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx


class PointWiseFeedForward(torch.nn.Module):
    def __init__(self, hidden_units, dropout_rate):
        super().__init__()
        self.conv1 = torch.nn.Conv1d(hidden_units, hidden_units, kernel_size=1)
        self.dropout1 = torch.nn.Dropout(p=dropout_rate)
        self.relu = torch.nn.ReLU()
        self.conv2 = torch.nn.Conv1d(hidden_units, hidden_units, kernel_size=1)
        self.dropout2 = torch.nn.Dropout(p=dropout_rate)

    def forward(self, inputs):
        outputs = self.dropout2(self.conv2(self.relu(self.dropout1(self.conv1(inputs.transpose(-1, -2))))))
        outputs = outputs.transpose(-1, -2)
        outputs = outputs + inputs
        return outputs


class SASRecTower(torch.nn.Module):
    def __init__(self, hidden_units, maxlen, num_blocks, num_heads, dropout_rate):
        super().__init__()
        self.hidden_units = hidden_units
        self.pos_emb = torch.nn.Embedding(maxlen + 1, hidden_units)
        self.emb_dropout = torch.nn.Dropout(p=dropout_rate)
        self.attention_layernorms = torch.nn.ModuleList()
        self.attention_layers = torch.nn.ModuleList()
        self.forward_layernorms = torch.nn.ModuleList()
        self.forward_layers = torch.nn.ModuleList()
        self.last_layernorm = torch.nn.LayerNorm(hidden_units, eps=1e-8)
        for _ in range(num_blocks):
            self.attention_layernorms.append(torch.nn.LayerNorm(hidden_units, eps=1e-8))
            self.attention_layers.append(torch.nn.MultiheadAttention(hidden_units, num_heads, dropout_rate, batch_first=True))
            self.forward_layernorms.append(torch.nn.LayerNorm(hidden_units, eps=1e-8))
            self.forward_layers.append(PointWiseFeedForward(hidden_units, dropout_rate))

    def forward(self, seqs, log_seqs):
        timeline_mask = log_seqs == 0
        length = log_seqs.shape[1]
        poss = torch.arange(1, length + 1)[None] * (~timeline_mask)
        pos = self.pos_emb(poss)
        seqs = self.emb_dropout(seqs * self.hidden_units**0.5 + pos)
        seqs = seqs * ~timeline_mask.unsqueeze(-1)
        attention_mask = ~torch.tril(torch.ones((length, length), dtype=torch.bool))
        for i in range(len(self.attention_layers)):
            Q = self.attention_layernorms[i](seqs)
            mha_outputs, _ = self.attention_layers[i](Q, seqs, seqs, attn_mask=attention_mask)
            seqs = Q + mha_outputs
            seqs = self.forward_layernorms[i](seqs)
            seqs = self.forward_layers[i](seqs)
            seqs = seqs * ~timeline_mask.unsqueeze(-1)
        return self.last_layernorm(seqs)[:, -1]


class ItemTower(torch.nn.Module):
    def __init__(self, num_cats, hidden_units, cat_dim, inner):
        super().__init__()
        self.cat_bag = torch.nn.EmbeddingBag(num_cats, cat_dim, mode="mean", padding_idx=0)
        self.fc1 = torch.nn.Linear(hidden_units + cat_dim, inner)
        self.bn = torch.nn.BatchNorm1d(inner)
        self.act = torch.nn.LeakyReLU(0.2)
        self.fc2 = torch.nn.Linear(inner, hidden_units)

    def forward(self, item_vecs, cats):
        b, c, k = cats.shape
        cat_vecs = self.cat_bag(cats.reshape(b * c, k))
        x = torch.cat([item_vecs.reshape(b * c, -1), cat_vecs], dim=-1)
        x = self.fc2(self.act(self.bn(self.fc1(x))))
        return x.view(b, c, -1)


class CosineScorer(torch.nn.Module):
    def __init__(self, max_scale=100.0):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))
        self.max_scale = max_scale

    def forward(self, user, items):
        user = torch.nn.functional.normalize(user, dim=-1)
        items = torch.nn.functional.normalize(items, dim=-1)
        scale = self.logit_scale.exp().clamp(max=self.max_scale)
        return scale * torch.einsum("bd,bcd->bc", user, items)


class TwoTower(torch.nn.Module):
    def __init__(self, num_items=31, num_cats=13, hidden_units=14, maxlen=9, num_blocks=2, num_heads=2, cat_dim=6, inner=18, dropout_rate=0.2):
        super().__init__()
        self.item_emb = torch.nn.Embedding(num_items + 1, hidden_units, padding_idx=0)
        self.user = SASRecTower(hidden_units, maxlen, num_blocks, num_heads, dropout_rate)
        self.items = ItemTower(num_cats, hidden_units, cat_dim, inner)
        self.scorer = CosineScorer()

    def forward(self, log_seqs, cand_ids, cand_cats):
        user = self.user(self.item_emb(log_seqs), log_seqs)
        items = self.items(self.item_emb(cand_ids), cand_cats)
        return self.scorer(user, items)


# ---------------------------------------------------------------- Flax


def l2_normalize(x, axis, eps=1e-12):
    return x / jnp.maximum(jnp.linalg.norm(x, axis=axis, keepdims=True), eps)


class PaddedEmbed(nnx.Module):
    """Row 0 is padding; torch never updates it."""

    def __init__(self, num, dim, *, rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (num, dim)))

    def __call__(self, ids):
        table = self.embedding[...]
        table = table.at[0].set(jax.lax.stop_gradient(table[0]))
        return table[ids]


class CausalMHA(nnx.Module):
    def __init__(self, dim, num_heads, *, rngs):
        self.num_heads = num_heads
        self.query = nnx.Linear(dim, dim, rngs=rngs)
        self.key = nnx.Linear(dim, dim, rngs=rngs)
        self.value = nnx.Linear(dim, dim, rngs=rngs)
        self.out = nnx.Linear(dim, dim, rngs=rngs)

    def __call__(self, q_in, kv_in):
        b, t, d = q_in.shape
        shape = (b, t, self.num_heads, d // self.num_heads)
        q = self.query(q_in).reshape(shape)
        k = self.key(kv_in).reshape(shape)
        v = self.value(kv_in).reshape(shape)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (d // self.num_heads) ** 0.5
        causal = jnp.tril(jnp.ones((t, t), dtype=bool))
        weights = nnx.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return self.out(y.reshape(b, t, d))


class SASRecBlock(nnx.Module):
    def __init__(self, dim, num_heads, rate, *, rngs):
        self.attn_norm = nnx.LayerNorm(dim, epsilon=1e-8, rngs=rngs)
        self.attn = CausalMHA(dim, num_heads, rngs=rngs)
        self.ffn_norm = nnx.LayerNorm(dim, epsilon=1e-8, rngs=rngs)
        self.Dense_0 = nnx.Linear(dim, dim, rngs=rngs)
        self.Dense_1 = nnx.Linear(dim, dim, rngs=rngs)
        self.drop1 = nnx.Dropout(rate, rngs=rngs)
        self.drop2 = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x, valid):
        q = self.attn_norm(x)
        x = q + self.attn(q, x)
        x = self.ffn_norm(x)
        x = x + self.drop2(self.Dense_1(nnx.relu(self.drop1(self.Dense_0(x)))))
        x = x * valid
        return x


class UserTower(nnx.Module):
    def __init__(self, dim, maxlen, num_blocks, num_heads, rate, *, rngs):
        self.dim = dim
        self.pos_emb = nnx.Embed(maxlen + 1, dim, rngs=rngs)
        self.emb_dropout = nnx.Dropout(rate, rngs=rngs)
        self.blocks = nnx.List([SASRecBlock(dim, num_heads, rate, rngs=rngs) for _ in range(num_blocks)])
        self.final_norm = nnx.LayerNorm(dim, epsilon=1e-8, rngs=rngs)

    def __call__(self, seq_vecs, ids):
        valid = ids != 0
        positions = jnp.where(valid, jnp.arange(1, ids.shape[1] + 1)[None], 0)
        x = seq_vecs * self.dim**0.5 + self.pos_emb.embedding[positions]
        x = self.emb_dropout(x) * valid[..., None]
        for block in self.blocks:
            x = block(x, valid[..., None])
        x = self.final_norm(x)
        return x[:, -1]


class FlaxItemTower(nnx.Module):
    def __init__(self, num_cats, dim, cat_dim, inner, *, rngs):
        self.cat_emb = nnx.Embed(num_cats, cat_dim, rngs=rngs)
        self.fc1 = nnx.Linear(dim + cat_dim, inner, rngs=rngs)
        self.bn = nnx.BatchNorm(inner, use_running_average=True, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.fc2 = nnx.Linear(inner, dim, rngs=rngs)

    def __call__(self, item_vecs, cats):
        present = (cats != 0)[..., None]
        count = jnp.maximum(present.sum(axis=-2), 1)
        cat_vecs = jnp.sum(self.cat_emb.embedding[cats] * present, axis=-2) / count
        x = jnp.concatenate([item_vecs, cat_vecs], axis=-1)
        x = nnx.leaky_relu(self.bn(self.fc1(x)), negative_slope=0.2)
        return self.fc2(x)


class FlaxTwoTower(nnx.Module):
    def __init__(self, num_items=31, num_cats=13, dim=14, maxlen=9, num_blocks=2, num_heads=2, cat_dim=6, inner=18, rate=0.2, *, rngs):
        self.item_emb = PaddedEmbed(num_items + 1, dim, rngs=rngs)
        self.user_tower = UserTower(dim, maxlen, num_blocks, num_heads, rate, rngs=rngs)
        self.item_tower = FlaxItemTower(num_cats, dim, cat_dim, inner, rngs=rngs)
        self.log_temperature = nnx.Param(jnp.zeros(()))

    def __call__(self, seq, cand_ids, cand_cats):
        user = self.user_tower(self.item_emb(seq), seq)
        items = self.item_tower(self.item_emb(cand_ids), cand_cats)
        user = l2_normalize(user, axis=-1)
        items = l2_normalize(items, axis=-1)
        scale = jnp.minimum(jnp.exp(self.log_temperature[...]), 100.0)
        return scale * jnp.einsum("bd,bcd->bc", user, items)


def port(net, model):
    t = lambda w: jnp.asarray(w.detach().numpy())

    def linear(dst, weight, bias):
        dst.kernel.set_value(t(weight).T)
        dst.bias.set_value(t(bias))

    def norm(dst, src):
        dst.scale.set_value(t(src.weight))
        dst.bias.set_value(t(src.bias))

    model.item_emb.embedding.set_value(t(net.item_emb.weight))
    user = net.user
    model.user_tower.pos_emb.embedding.set_value(t(user.pos_emb.weight))
    for i, block in enumerate(model.user_tower.blocks):
        norm(block.attn_norm, user.attention_layernorms[i])
        norm(block.ffn_norm, user.forward_layernorms[i])
        mha = user.attention_layers[i]
        wq, wk, wv = mha.in_proj_weight.chunk(3)
        bq, bk, bv = mha.in_proj_bias.chunk(3)
        linear(block.attn.query, wq, bq)
        linear(block.attn.key, wk, bk)
        linear(block.attn.value, wv, bv)
        linear(block.attn.out, mha.out_proj.weight, mha.out_proj.bias)
        ffn = user.forward_layers[i]
        linear(block.Dense_0, ffn.conv1.weight[:, :, 0], ffn.conv1.bias)
        linear(block.Dense_1, ffn.conv2.weight[:, :, 0], ffn.conv2.bias)
    norm(model.user_tower.final_norm, user.last_layernorm)
    tower = net.items
    model.item_tower.cat_emb.embedding.set_value(t(tower.cat_bag.weight))
    linear(model.item_tower.fc1, tower.fc1.weight, tower.fc1.bias)
    linear(model.item_tower.fc2, tower.fc2.weight, tower.fc2.bias)
    norm(model.item_tower.bn, tower.bn)
    model.item_tower.bn.mean.set_value(t(tower.bn.running_mean))
    model.item_tower.bn.var.set_value(t(tower.bn.running_var))
    model.log_temperature.set_value(t(net.scorer.logit_scale))


def build(seed):
    torch.manual_seed(seed)
    net = TwoTower().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "norm" in name and name.endswith("weight") or name == "items.bn.weight":
                p.uniform_(0.5, 1.5)
            elif name != "scorer.logit_scale":
                p.normal_(0, 0.4)
        net.scorer.logit_scale.uniform_(4.7, 4.9)
        net.items.bn.running_mean.normal_(0, 0.5)
        net.items.bn.running_var.uniform_(0.5, 2.0)
    model = FlaxTwoTower(rngs=nnx.Rngs(seed))
    port(net, model)
    model.eval()
    rng = np.random.default_rng(seed)
    seq = rng.integers(1, 32, (3, 9))
    seq[0, :4] = 0
    seq[2, :2] = 0
    cand = rng.integers(1, 32, (3, 5))
    cand[0, 4] = 0
    cand[2, 3:] = 0
    cats = rng.integers(1, 13, (3, 5, 4))
    cats[:, ::2, 2:] = 0
    cats[1, 1, 1:] = 0
    return {"torch": net, "flax": model, "inputs": (seq, cand, cats)}


FAULTS = [
    {
        "title": "sqrt(d) applied after the position embedding is added",
        "edits": [("x = seq_vecs * self.dim**0.5 + self.pos_emb.embedding[positions]", "x = (seq_vecs + self.pos_emb.embedding[positions]) * self.dim**0.5")],
        "layers": ["user"],
        "between": ("item_emb", "user.attention_layernorms.0"),
        "causes": ["scale", "order"],
        "level": "outputs",
    },
    {
        "title": "keys and values from the normalised sequence, as in ordinary pre-norm",
        "edits": [("x = q + self.attn(q, x)", "x = q + self.attn(q, q)")],
        "layers": ["user", "user.attention_layers.0"],
        "between": ("user.attention_layernorms.0", "user.attention_layers.0"),
        "causes": ["operand", "norm_order", "wiring"],
        "level": "outputs",
    },
    {
        "title": "padded steps are not zeroed again after a block",
        "edits": [("        x = x * valid\n", "")],
        "layers": ["user"],
        "between": ("user.forward_layers.0.conv2", "user.attention_layernorms.1"),
        "causes": ["left_out", "mask"],
        "level": "outputs",
    },
    {
        "title": "category bag divides by the number of slots, padding included",
        "edits": [("count = jnp.maximum(present.sum(axis=-2), 1)", "count = cats.shape[-1]")],
        "layers": ["items.cat_bag"],
        "causes": ["operation", "scale"],
        "level": "outputs",
    },
    {
        "title": "candidates normalised over the candidates' axis",
        "edits": [("items = l2_normalize(items, axis=-1)", "items = l2_normalize(items, axis=1)")],
        "layers": ["scorer"],
        "between": ("items.fc2", None),
        "causes": ["axis"],
        "level": "outputs",
    },
    {
        "title": "temperature clamped before exp, at the bound meant for after it",
        "edits": [("jnp.minimum(jnp.exp(self.log_temperature[...]), 100.0)", "jnp.exp(jnp.minimum(self.log_temperature[...], 100.0))")],
        "layers": ["scorer"],
        "between": ("items.fc2", None),
        "causes": ["order", "constant"],
        "level": "outputs",
    },
    {
        "title": "user vector at index length - 1, as for sequences padded on the right",
        "edits": [("        return x[:, -1]\n", "        last = valid.sum(axis=1) - 1\n        return x[jnp.arange(x.shape[0]), last]\n")],
        "layers": ["user"],
        "between": ("user.last_layernorm", "item_emb"),
        "causes": ["token"],
        "level": "outputs",
    },
    {
        "title": "leaky ReLU at jax's default slope 0.01",
        "edits": [("nnx.leaky_relu(self.bn(self.fc1(x)), negative_slope=0.2)", "nnx.leaky_relu(self.bn(self.fc1(x)))")],
        "layers": ["items.act", "items"],
        "between": ("items.bn", "items.fc2"),
        "causes": ["activation", "constant"],
        "level": "outputs",
    },
    {
        "title": "in_proj chunks read as query, value, key",
        "edits": [
            ("wq, wk, wv = mha.in_proj_weight", "wq, wv, wk = mha.in_proj_weight"),
            ("bq, bk, bv = mha.in_proj_bias", "bq, bv, bk = mha.in_proj_bias"),
        ],
        "layers": ["user.attention_layers.0"],
        "causes": ["blocks", "swapped"],
        "level": "outputs",
    },
    {
        "title": "row of padding receives a gradient",
        "edits": [("        table = table.at[0].set(jax.lax.stop_gradient(table[0]))\n", "")],
        "layers": ["item_emb"],
        "causes": ["padding_idx"],
        "level": "gradients",
    },
    {
        "title": "BatchNorm momentum copied as torch's 0.1",
        "edits": [("momentum=0.9, epsilon=1e-5", "momentum=0.1, epsilon=1e-5")],
        "layers": ["items.bn"],
        "causes": ["momentum"],
        "level": "training",
    },
]
