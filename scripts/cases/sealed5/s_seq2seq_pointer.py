"""Pointer-generator with coverage (See et al., after pointer_summarizer, with GRUs), and its NNX port."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

VOCAB, OOV, EMB, HID = 17, 3, 6, 5
BATCH, SOURCE, TARGET, PAD = 3, 8, 4, 0


# ---- PyTorch
class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, EMB, padding_idx=PAD)
        self.gru = nn.GRU(EMB, HID, num_layers=1, batch_first=True, bidirectional=True)
        self.W_h = nn.Linear(HID * 2, HID * 2, bias=False)

    def forward(self, input, seq_lens):
        embedded = self.embedding(input)
        packed = pack_padded_sequence(embedded, seq_lens.cpu(), batch_first=True, enforce_sorted=False)
        output, hidden = self.gru(packed)
        encoder_outputs, _ = pad_packed_sequence(output, batch_first=True, total_length=input.shape[1])
        return encoder_outputs, self.W_h(encoder_outputs), hidden


class ReduceState(nn.Module):
    def __init__(self):
        super().__init__()
        self.reduce_h = nn.Linear(HID * 2, HID)

    def forward(self, hidden):
        h_in = hidden.transpose(0, 1).reshape(-1, HID * 2)
        return F.relu(self.reduce_h(h_in)).unsqueeze(0)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.W_c = nn.Linear(1, HID * 2, bias=False)
        self.decode_proj = nn.Linear(HID, HID * 2)
        self.v = nn.Linear(HID * 2, 1, bias=False)

    def forward(self, s_t, encoder_outputs, encoder_feature, enc_padding_mask, coverage):
        att_features = encoder_feature + self.decode_proj(s_t).unsqueeze(1) + self.W_c(coverage.unsqueeze(-1))
        scores = self.v(torch.tanh(att_features)).squeeze(-1)
        attn_dist_ = F.softmax(scores, dim=1) * enc_padding_mask
        attn_dist = attn_dist_ / attn_dist_.sum(1, keepdim=True)
        c_t = torch.bmm(attn_dist.unsqueeze(1), encoder_outputs).squeeze(1)
        return c_t, attn_dist, coverage + attn_dist


class Decoder(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.attention_network = Attention()
        self.embedding = embedding
        self.x_context = nn.Linear(HID * 2 + EMB, EMB)
        self.gru = nn.GRU(EMB, HID, num_layers=1, batch_first=True)
        self.p_gen_linear = nn.Linear(HID * 3 + EMB, 1)
        self.out1 = nn.Linear(HID * 3, HID)
        self.out2 = nn.Linear(HID, VOCAB)

    def forward(self, y_t, s_t, encoder_outputs, encoder_feature, mask, c_t, extend_vocab, coverage):
        x = self.x_context(torch.cat((c_t, self.embedding(y_t)), 1))
        out, s_t = self.gru(x.unsqueeze(1), s_t)
        out = out.squeeze(1)
        c_t, attn_dist, coverage = self.attention_network(out, encoder_outputs, encoder_feature, mask, coverage)
        p_gen = torch.sigmoid(self.p_gen_linear(torch.cat((c_t, out, x), 1)))
        vocab_dist = F.softmax(self.out2(self.out1(torch.cat((out, c_t), 1))), dim=1)
        extra_zeros = vocab_dist.new_zeros(vocab_dist.shape[0], OOV)
        final_dist = torch.cat([p_gen * vocab_dist, extra_zeros], 1)
        final_dist = final_dist.scatter_add(1, extend_vocab, (1 - p_gen) * attn_dist)
        return final_dist, s_t, c_t, attn_dist, coverage


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder(self.encoder.embedding)
        self.reduce_state = ReduceState()

    def forward(self, source, lengths, extend_vocab, target):
        """-> distributions (B, T, VOCAB + OOV), coverage loss of every step (B, T)"""
        encoder_outputs, encoder_feature, hidden = self.encoder(source, lengths)
        mask = (torch.arange(source.shape[1], device=source.device) < lengths.unsqueeze(1)).to(encoder_outputs.dtype)
        s_t = self.reduce_state(hidden)
        c_t = encoder_outputs.new_zeros(source.shape[0], HID * 2)
        coverage = torch.zeros_like(mask)
        dists, losses = [], []
        for t in range(target.shape[1]):
            dist, s_t, c_t, attn_dist, next_coverage = self.decoder(
                target[:, t], s_t, encoder_outputs, encoder_feature, mask, c_t, extend_vocab, coverage)
            losses.append(torch.sum(torch.min(attn_dist, coverage), 1))
            coverage = next_coverage
            dists.append(dist)
        return torch.stack(dists, 1), torch.stack(losses, 1)


# ---- Flax
def gru_step(weights, x, h):
    """weights: w_in (in, 3, hid), w_rec (hid, 3, hid), b_in, b_rec (3, hid)."""
    w_in, w_rec, b_in, b_rec = weights
    r_x, z_x, n_x = jnp.unstack(jnp.einsum('be,egh->gbh', x, w_in) + b_in[:, None])
    r_h, z_h, n_h = jnp.unstack(jnp.einsum('be,egh->gbh', h, w_rec) + b_rec[:, None])
    reset = jax.nn.sigmoid(r_x + r_h)
    update = jax.nn.sigmoid(z_x + z_h)
    candidate = jnp.tanh(n_x + reset * n_h)
    return candidate + update * (h - candidate)


class GRUWeights(nnx.Module):
    def __init__(self, lead, cin, hid, *, rngs):
        make = lambda *shape: nnx.Param(rngs.normal((*lead, *shape), jnp.float32))
        self.w_in, self.w_rec = make(cin, 3, hid), make(hid, 3, hid)
        self.b_in, self.b_rec = make(3, hid), make(3, hid)

    def __call__(self):
        return self.w_in[...], self.w_rec[...], self.b_in[...], self.b_rec[...]


class Reader(nnx.Module):
    """Both directions at once: their weights are stacked, the second reads the sentence turned around."""
    def __init__(self, *, rngs):
        self.cells = GRUWeights((2,), EMB, HID, rngs=rngs)
        self.key = nnx.Linear(2 * HID, 2 * HID, use_bias=False, rngs=rngs)

    def __call__(self, x, lengths):
        batch, steps, _ = x.shape
        place = jnp.arange(steps)[None]
        valid = place < lengths[:, None]
        turned = jnp.where(valid, lengths[:, None] - 1 - place, place)
        turn = lambda a: jnp.take_along_axis(a, turned[..., None], axis=1)

        def run(weights, sequence):
            def step(h, now):
                x_t, on = now
                h = jnp.where(on[:, None], gru_step(weights, x_t, h), h)
                return h, jnp.where(on[:, None], h, 0)
            start = jnp.zeros((batch, HID), x.dtype)
            last, out = jax.lax.scan(step, start, (sequence.swapaxes(0, 1), valid.T))
            return last, out.swapaxes(0, 1)

        last, out = jax.vmap(run)(self.cells(), jnp.stack([x, turn(x)]))
        states = jnp.concatenate([out[0], turn(out[1])], axis=-1)
        return states, self.key(states), jnp.concatenate([last[0], last[1]], axis=-1), valid


class Coverage(nnx.Module):
    """Additive attention that sees how much each source word has been attended to."""
    def __init__(self, *, rngs):
        self.query = nnx.Linear(HID, 2 * HID, rngs=rngs)
        self.seen = nnx.Param(rngs.normal((2 * HID,), jnp.float32))
        self.score = nnx.Param(rngs.normal((2 * HID,), jnp.float32))

    def __call__(self, h, states, keys, valid, seen):
        mixed = keys + self.query(h)[:, None] + seen[..., None] * self.seen[...]
        logits = jnp.tanh(mixed) @ self.score[...]
        share = jax.nn.softmax(logits, axis=1, where=valid)
        return jnp.einsum('bs,bsd->bd', share, states), share


class Writer(nnx.Module):
    def __init__(self, *, rngs):
        self.attend = Coverage(rngs=rngs)
        self.fuse = nnx.Linear(2 * HID + EMB, EMB, rngs=rngs)
        self.cell = GRUWeights((), EMB, HID, rngs=rngs)
        self.switch = nnx.Linear(3 * HID + EMB, 1, rngs=rngs)
        self.narrow = nnx.Linear(3 * HID, HID, rngs=rngs)
        self.words = nnx.Linear(HID, VOCAB, rngs=rngs)

    def __call__(self, carry, emb, states, keys, valid, copies):
        h, context, seen = carry
        x = self.fuse(jnp.concatenate([context, emb], -1))
        h = gru_step(self.cell(), x, h)
        context, share = self.attend(h, states, keys, valid, seen)
        generate = jax.nn.sigmoid(self.switch(jnp.concatenate([context, h, x], -1)))
        vocab = jax.nn.softmax(self.words(self.narrow(jnp.concatenate([h, context], -1))))
        dist = jnp.pad(generate * vocab, ((0, 0), (0, OOV)))
        rows = jnp.arange(dist.shape[0])[:, None]
        dist = dist.at[rows, copies].add((1 - generate) * share)
        repeat = jnp.minimum(share, seen).sum(axis=1)
        seen = seen + share
        return (h, context, seen), (dist, repeat)


class PointerNet(nnx.Module):
    def __init__(self, *, rngs):
        self.table = nnx.Param(rngs.normal((VOCAB, EMB), jnp.float32))
        self.reader = Reader(rngs=rngs)
        self.bridge = nnx.Linear(2 * HID, HID, rngs=rngs)
        self.writer = Writer(rngs=rngs)

    def lookup(self, ids):
        rows = self.table[...][ids]
        return jnp.where((ids == PAD)[..., None], jax.lax.stop_gradient(rows), rows)

    def __call__(self, source, lengths, copies, target):
        states, keys, last, valid = self.reader(self.lookup(source), lengths)
        carry = (jax.nn.relu(self.bridge(last)), jnp.zeros_like(states[:, 0]), jnp.zeros_like(states[..., 0]))
        dists, repeats = [], []
        for emb in jnp.unstack(self.lookup(target), axis=1):
            carry, (dist, repeat) = self.writer(carry, emb, states, keys, valid, copies)
            dists.append(dist)
            repeats.append(repeat)
        return jnp.stack(dists, axis=1), jnp.stack(repeats, axis=1)


def port_weights(net):
    arr = lambda t: jnp.asarray(t.detach().numpy())
    model = PointerNet(rngs=nnx.Rngs(0))

    def linear(dst, src):
        dst.kernel.set_value(arr(src.weight).T)
        if src.bias is not None:
            dst.bias.set_value(arr(src.bias))

    def gates(w):
        return jnp.moveaxis(arr(w).reshape(3, HID, -1), -1, 0)

    enc, dec = net.encoder, net.decoder
    model.table.set_value(arr(enc.embedding.weight))
    two, g = model.reader.cells, enc.gru
    two.w_in.set_value(jnp.stack([gates(g.weight_ih_l0), gates(g.weight_ih_l0_reverse)]))
    two.w_rec.set_value(jnp.stack([gates(g.weight_hh_l0), gates(g.weight_hh_l0_reverse)]))
    two.b_in.set_value(jnp.stack([arr(g.bias_ih_l0), arr(g.bias_ih_l0_reverse)]).reshape(2, 3, HID))
    two.b_rec.set_value(jnp.stack([arr(g.bias_hh_l0), arr(g.bias_hh_l0_reverse)]).reshape(2, 3, HID))
    linear(model.reader.key, enc.W_h)
    linear(model.bridge, net.reduce_state.reduce_h)
    one, g = model.writer.cell, dec.gru
    one.w_in.set_value(gates(g.weight_ih_l0))
    one.w_rec.set_value(gates(g.weight_hh_l0))
    one.b_in.set_value(arr(g.bias_ih_l0).reshape(3, HID))
    one.b_rec.set_value(arr(g.bias_hh_l0).reshape(3, HID))
    att = dec.attention_network
    linear(model.writer.attend.query, att.decode_proj)
    model.writer.attend.seen.set_value(arr(att.W_c.weight)[:, 0])
    model.writer.attend.score.set_value(arr(att.v.weight)[0])
    for dst, src in ((model.writer.fuse, dec.x_context), (model.writer.switch, dec.p_gen_linear),
                     (model.writer.narrow, dec.out1), (model.writer.words, dec.out2)):
        linear(dst, src)
    return model


def build(seed):
    torch.manual_seed(seed)
    net = Model()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (1.4 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.5))
        net.reduce_state.reduce_h.bias.abs_()
    net.eval()
    r = np.random.RandomState(seed)
    lengths = np.array([5, SOURCE, 3])
    extended = r.randint(1, VOCAB + OOV, (BATCH, SOURCE))
    extended[:, 2] = extended[:, 0]                       # a word that stands twice in its source
    extended[1, 5] = extended[1, 1]
    extended[np.arange(SOURCE) >= lengths[:, None]] = PAD
    source = np.where(extended < VOCAB, extended, 1)
    target = r.randint(1, VOCAB, (BATCH, TARGET))
    target[2, 2:] = PAD
    inputs = {'source': source, 'lengths': lengths, 'extend_vocab': extended, 'target': target}
    return {'torch': net, 'flax': port_weights(net), 'inputs': inputs, 'flax_inputs': tuple(inputs.values())}


FAULTS = [
    {'title': 'the padded places of the source are not masked in the attention',
     'edits': [('share = jax.nn.softmax(logits, axis=1, where=valid)', 'share = jax.nn.softmax(logits, axis=1)')],
     'layers': ['decoder.attention_network'],
     'between': ('decoder.attention_network.v', 'decoder.p_gen_linear'),
     'causes': ['mask', 'left_out'], 'level': 'outputs'},
    {'title': 'the copy distribution overwrites the vocabulary\'s probabilities and repeated words, it does not add to them',
     'edits': [('dist = dist.at[rows, copies].add((1 - generate) * share)', 'dist = dist.at[rows, copies].set((1 - generate) * share)')],
     'layers': ['decoder'], 'between': ('decoder.out2', 'the output'),
     'causes': ['operation', 'residual'], 'level': 'outputs'},
    {'title': 'the coverage loss compares the attention with the coverage that already includes it',
     'edits': [('        repeat = jnp.minimum(share, seen).sum(axis=1)\n        seen = seen + share\n',
                '        seen = seen + share\n        repeat = jnp.minimum(share, seen).sum(axis=1)\n')],
     'layers': [''], 'between': ('decoder', 'the output'),
     'causes': ['order', 'operand'], 'level': 'outputs'},
    {'title': 'the row of padding of the embedding gets a gradient from padded targets',
     'edits': [('return jnp.where((ids == PAD)[..., None], jax.lax.stop_gradient(rows), rows)', 'return rows')],
     'layers': ['encoder.embedding'],
     'between': None, 'causes': ['padding_idx', 'stop_gradient'], 'level': 'gradients'},
    {'title': 'the hidden bias of the encoder\'s backward direction is left at zero',
     'edits': [('jnp.stack([arr(g.bias_hh_l0), arr(g.bias_hh_l0_reverse)])', 'jnp.stack([arr(g.bias_hh_l0), 0 * arr(g.bias_hh_l0_reverse)])')],
     'layers': ['encoder.gru'], 'between': None, 'causes': ['bias_missing', 'default'], 'level': 'bits'},
]
