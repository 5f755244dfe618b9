"""Core of the Temporal Fusion Transformer: variable selection, gated residual networks, LSTMs, attention."""
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as tnn
import torch.nn.functional as F

HIDDEN, HEADS, QUANTILES = 10, 2, 3
STATIC, PAST, FUTURE = 4, 6, 5        # numbers of variables
T_PAST, T_FUTURE, BATCH = 8, 7, 2


# ---- PyTorch

class GatedLinearUnit(tnn.Module):
    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.fc = tnn.Linear(input_size, hidden_size * 2)

    def forward(self, x):
        return F.glu(self.fc(x), dim=-1)


class GateAddNorm(tnn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.glu = GatedLinearUnit(hidden_size, hidden_size)
        self.norm = tnn.LayerNorm(hidden_size)

    def forward(self, x, skip):
        return self.norm(self.glu(x) + skip)


class GatedResidualNetwork(tnn.Module):
    def __init__(self, input_size, hidden_size, output_size, context_size=None):
        super().__init__()
        self.resample = tnn.Linear(input_size, output_size) if input_size != output_size else None
        self.fc1 = tnn.Linear(input_size, hidden_size)
        self.elu = tnn.ELU()
        self.context = tnn.Linear(context_size, hidden_size, bias=False) if context_size else None
        self.fc2 = tnn.Linear(hidden_size, output_size)
        self.gate_norm = GateAddNorm(output_size)

    def forward(self, x, context=None):
        residual = x if self.resample is None else self.resample(x)
        x = self.fc1(x)
        if context is not None:
            x = x + self.context(context)
        return self.gate_norm(self.fc2(self.elu(x)), residual)


class VariableSelectionNetwork(tnn.Module):
    def __init__(self, num_inputs, hidden_size, context_size=None):
        super().__init__()
        self.prescalers = tnn.ModuleList([tnn.Linear(1, hidden_size) for _ in range(num_inputs)])
        self.single_variable_grns = tnn.ModuleList(
            [GatedResidualNetwork(hidden_size, hidden_size, hidden_size) for _ in range(num_inputs)])
        self.flattened_grn = GatedResidualNetwork(num_inputs * hidden_size, hidden_size, num_inputs, context_size)

    def forward(self, x, context=None):
        embeddings = [scale(x[..., i:i + 1]) for i, scale in enumerate(self.prescalers)]
        outputs = torch.stack([grn(e) for grn, e in zip(self.single_variable_grns, embeddings)], dim=-1)
        weights = self.flattened_grn(torch.cat(embeddings, dim=-1), context)
        weights = F.softmax(weights, dim=-1).unsqueeze(-2)
        return (outputs * weights).sum(dim=-1)


class InterpretableMultiHeadAttention(tnn.Module):
    def __init__(self, n_head, d_model):
        super().__init__()
        self.n_head = n_head
        self.d_k = self.d_q = self.d_v = d_model // n_head
        self.v_layer = tnn.Linear(d_model, self.d_v)
        self.q_layers = tnn.ModuleList([tnn.Linear(d_model, self.d_q) for _ in range(n_head)])
        self.k_layers = tnn.ModuleList([tnn.Linear(d_model, self.d_k) for _ in range(n_head)])
        self.w_h = tnn.Linear(self.d_v, d_model, bias=False)

    def forward(self, q, k, v, mask):
        heads = []
        vs = self.v_layer(v)
        for i in range(self.n_head):
            attn = torch.bmm(self.q_layers[i](q), self.k_layers[i](k).permute(0, 2, 1)) / self.d_k ** 0.5
            attn = attn.masked_fill(mask, -1e9).softmax(dim=2)
            heads.append(torch.bmm(attn, vs))
        return self.w_h(torch.stack(heads, dim=2).mean(dim=2))


class TemporalFusionTransformer(tnn.Module):
    def __init__(self):
        super().__init__()
        h = HIDDEN
        self.static_variable_selection = VariableSelectionNetwork(STATIC, h)
        self.encoder_variable_selection = VariableSelectionNetwork(PAST, h, h)
        self.decoder_variable_selection = VariableSelectionNetwork(FUTURE, h, h)
        self.static_context_variable_selection = GatedResidualNetwork(h, h, h)
        self.static_context_initial_hidden_lstm = GatedResidualNetwork(h, h, h)
        self.static_context_initial_cell_lstm = GatedResidualNetwork(h, h, h)
        self.static_context_enrichment = GatedResidualNetwork(h, h, h)
        self.lstm_encoder = tnn.LSTM(h, h, batch_first=True)
        self.lstm_decoder = tnn.LSTM(h, h, batch_first=True)
        self.post_lstm_gate_norm = GateAddNorm(h)
        self.static_enrichment = GatedResidualNetwork(h, h, h, h)
        self.multihead_attn = InterpretableMultiHeadAttention(HEADS, h)
        self.post_attn_gate_norm = GateAddNorm(h)
        self.pos_wise_ff = GatedResidualNetwork(h, h, h)
        self.pre_output_gate_norm = GateAddNorm(h)
        self.output_layer = tnn.Linear(h, QUANTILES)

    def forward(self, static, past, future):
        n, m = past.shape[1], future.shape[1]
        s = self.static_variable_selection(static)
        selection = self.static_context_variable_selection(s)[:, None]
        encoder_in = self.encoder_variable_selection(past, selection.expand(-1, n, -1))
        decoder_in = self.decoder_variable_selection(future, selection.expand(-1, m, -1))
        hidden = self.static_context_initial_hidden_lstm(s)[None]
        cell = self.static_context_initial_cell_lstm(s)[None]
        encoded, state = self.lstm_encoder(encoder_in, (hidden, cell))
        decoded, _ = self.lstm_decoder(decoder_in, state)
        lstm_out = self.post_lstm_gate_norm(torch.cat([encoded, decoded], 1), torch.cat([encoder_in, decoder_in], 1))
        enrichment = self.static_context_enrichment(s)
        attn_in = self.static_enrichment(lstm_out, enrichment[:, None].expand(-1, n + m, -1))
        steps = torch.arange(n + m, device=past.device)
        mask = (steps[None] >= steps[n:, None] + 1).expand(past.shape[0], -1, -1)
        attn_out = self.multihead_attn(attn_in[:, n:], attn_in, attn_in, mask)
        attn_out = self.post_attn_gate_norm(attn_out, attn_in[:, n:])
        output = self.pre_output_gate_norm(self.pos_wise_ff(attn_out), lstm_out[:, n:])
        return self.output_layer(output)


# ---- Flax

class GateNorm(nn.Module):
    @nn.compact
    def __call__(self, x, skip):
        width = skip.shape[-1]
        gated = nn.Dense(width, name="value")(x) * jax.nn.sigmoid(nn.Dense(width, name="gate")(x))
        return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="norm")(gated + skip)


class GRN(nn.Module):
    width: int
    out: int | None = None

    @nn.compact
    def __call__(self, x, context=None):
        out = self.out or self.width
        skip = x if x.shape[-1] == out else nn.Dense(out, name="skip")(x)
        y = nn.Dense(self.width, name="inner")(x)
        if context is not None:
            y = y + nn.Dense(self.width, use_bias=False, name="context")(context)
        return GateNorm(name="close")(nn.Dense(out, name="outer")(nn.elu(y)), skip)


class Select(nn.Module):
    """Variable selection, the variables' own networks side by side on axis -2 of (..., variables, width)."""
    width: int

    @nn.compact
    def __call__(self, x, context=None):
        count = x.shape[-1]
        scale = self.param("scale", nn.initializers.normal(1.0), (count, self.width))
        shift = self.param("shift", nn.initializers.zeros, (count, self.width))
        embedded = x[..., None] * scale + shift
        each = nn.vmap(GRN, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=-2, out_axes=-2)
        values = each(self.width, name="each")(embedded)
        logits = GRN(self.width, count, name="joint")(embedded.reshape(x.shape[:-1] + (-1,)), context)
        return jnp.einsum("...v,...vd->...d", jax.nn.softmax(logits, axis=-1), values)


class SharedValueAttention(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, target, source, allowed):
        width = source.shape[-1]
        hd = width // self.heads
        q = nn.DenseGeneral((self.heads, hd), name="q")(target)
        k = nn.DenseGeneral((self.heads, hd), name="k")(source)
        v = nn.Dense(hd, name="v")(source)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * hd ** -0.5
        probs = jax.nn.softmax(jnp.where(allowed, scores, -1e9), axis=-1)
        mixed = jnp.einsum("bqk,bkd->bqd", probs.mean(axis=1), v)
        return nn.Dense(width, use_bias=False, name="out")(mixed)


class Fusion(nn.Module):
    width: int = HIDDEN
    heads: int = HEADS
    quantiles: int = QUANTILES

    @nn.compact
    def __call__(self, static, past, future):
        w, n = self.width, past.shape[1]
        s = Select(w, name="select_static")(static)
        chooser = GRN(w, name="to_select")(s)[:, None]
        before = Select(w, name="select_past")(past, chooser)
        after = Select(w, name="select_future")(future, chooser)
        hidden, cell = GRN(w, name="to_hidden")(s), GRN(w, name="to_cell")(s)
        reader = nn.RNN(nn.OptimizedLSTMCell(w, name="cell_past"), return_carry=True)
        writer = nn.RNN(nn.OptimizedLSTMCell(w, name="cell_future"))
        carry, read = reader(before, initial_carry=(cell, hidden))
        wrote = writer(after, initial_carry=carry)
        both = jnp.concatenate([before, after], axis=1)
        local = GateNorm(name="close_lstm")(jnp.concatenate([read, wrote], axis=1), both)
        rich = GRN(w, name="enrich")(local, GRN(w, name="to_enrich")(s)[:, None])
        total = rich.shape[1]
        allowed = jnp.tril(jnp.ones((total, total), bool))[n:]
        seen = SharedValueAttention(self.heads, name="attend")(rich[:, n:], rich, allowed)
        seen = GateNorm(name="close_attend")(seen, rich[:, n:])
        out = GateNorm(name="close_all")(GRN(w, name="feed")(seen), local[:, n:])
        return nn.Dense(self.quantiles, name="quantile")(out)


def port_weights(net):
    arr = lambda t: jnp.asarray(t.detach().numpy())

    def dense(m):
        return {"kernel": arr(m.weight).T} | ({} if m.bias is None else {"bias": arr(m.bias)})

    def gate(m):
        w, b = arr(m.glu.fc.weight), arr(m.glu.fc.bias)
        h = w.shape[0] // 2
        return {"value": {"kernel": w[:h].T, "bias": b[:h]}, "gate": {"kernel": w[h:].T, "bias": b[h:]},
                "norm": {"scale": arr(m.norm.weight), "bias": arr(m.norm.bias)}}

    def grn(m):
        p = {"inner": dense(m.fc1), "outer": dense(m.fc2), "close": gate(m.gate_norm)}
        if m.resample is not None:
            p["skip"] = dense(m.resample)
        if m.context is not None:
            p["context"] = dense(m.context)
        return p

    def select(m):
        return {"scale": jnp.stack([arr(k.weight)[:, 0] for k in m.prescalers]),
                "shift": jnp.stack([arr(k.bias) for k in m.prescalers]),
                "each": jax.tree.map(lambda *a: jnp.stack(a), *[grn(k) for k in m.single_variable_grns]),
                "joint": grn(m.flattened_grn)}

    def lstm(m):
        p = {}
        biases = arr(m.bias_ih_l0) + arr(m.bias_hh_l0)
        for gate_name, wi, wh, b in zip("ifgo", jnp.split(arr(m.weight_ih_l0), 4),
                                        jnp.split(arr(m.weight_hh_l0), 4), jnp.split(biases, 4)):
            p["i" + gate_name] = {"kernel": wi.T}
            p["h" + gate_name] = {"kernel": wh.T, "bias": b}
        return p

    att = net.multihead_attn
    per_head = lambda ms: {"kernel": jnp.stack([arr(m.weight).T for m in ms], axis=1),
                           "bias": jnp.stack([arr(m.bias) for m in ms])}
    return Fusion(), {"params": {
        "select_static": select(net.static_variable_selection),
        "select_past": select(net.encoder_variable_selection),
        "select_future": select(net.decoder_variable_selection),
        "to_select": grn(net.static_context_variable_selection),
        "to_hidden": grn(net.static_context_initial_hidden_lstm),
        "to_cell": grn(net.static_context_initial_cell_lstm),
        "to_enrich": grn(net.static_context_enrichment),
        "cell_past": lstm(net.lstm_encoder), "cell_future": lstm(net.lstm_decoder),
        "close_lstm": gate(net.post_lstm_gate_norm),
        "enrich": grn(net.static_enrichment),
        "attend": {"q": per_head(att.q_layers), "k": per_head(att.k_layers),
                   "v": dense(att.v_layer), "out": dense(att.w_h)},
        "close_attend": gate(net.post_attn_gate_norm),
        "feed": grn(net.pos_wise_ff),
        "close_all": gate(net.pre_output_gate_norm),
        "quantile": dense(net.output_layer),
    }}


def build(seed):
    torch.manual_seed(seed)
    net = TemporalFusionTransformer().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() == 1:
                p.copy_(0.6 + 0.8 * torch.rand_like(p) if name.endswith("weight") else 0.3 * torch.randn_like(p))
                if "lstm_" in name:     # a sum of two must be exact in float32
                    p.copy_(torch.round(p * 4096) / 4096)
            else:
                p.copy_(torch.randn_like(p) * 1.2 / p.shape[1] ** 0.5)
    g = np.random.RandomState(seed + 1)
    return {"torch": net, "flax": port_weights(net),
            "inputs": tuple(g.randn(*shape).astype(np.float32) for shape in (
                (BATCH, STATIC), (BATCH, T_PAST, PAST), (BATCH, T_FUTURE, FUTURE)))}


FAULTS = [
    {"title": "the weights of the variables are a softmax over the axis before the last (time or batch)",
     "edits": [("jax.nn.softmax(logits, axis=-1)", "jax.nn.softmax(logits, axis=-2)")],
     "layers": ["static_variable_selection", "encoder_variable_selection", "decoder_variable_selection"],
     "between": ("static_variable_selection.flattened_grn", "static_context_variable_selection"),
     "causes": ["softmax_axis", "axis"], "level": "outputs"},
    {"title": "the heads of the attention are summed, not averaged",
     "edits": [("probs.mean(axis=1)", "probs.sum(axis=1)")],
     "layers": ["multihead_attn"], "between": ("multihead_attn", "multihead_attn.w_h"),
     "causes": ["operation", "scale"], "level": "outputs"},
    {"title": "a step of the future does not see itself",
     "edits": [("jnp.tril(jnp.ones((total, total), bool))", "jnp.tril(jnp.ones((total, total), bool), -1)")],
     "layers": ["", "multihead_attn"], "between": ("static_enrichment", "multihead_attn.w_h"),
     "causes": ["causal", "mask", "offset"], "level": "outputs"},
    {"title": "the first LSTM begins with hidden and cell state exchanged",
     "edits": [("initial_carry=(cell, hidden)", "initial_carry=(hidden, cell)")],
     "layers": ["lstm_encoder", ""], "between": ("static_context_initial_cell_lstm", "lstm_encoder"),
     "causes": ["swapped", "operand"], "level": "outputs"},
    {"title": "the LSTMs' second bias (hidden) is forgotten in the port",
     "edits": [("biases = arr(m.bias_ih_l0) + arr(m.bias_hh_l0)", "biases = arr(m.bias_ih_l0)")],
     "layers": ["lstm_encoder", "lstm_decoder"], "between": None,
     "causes": ["bias_missing", "bias_sum"], "level": "bits"},
]
