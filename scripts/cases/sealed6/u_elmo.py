"""ELMo: a character CNN with highways, a bidirectional LSTM with projections, a scalar mix of its layers."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

CHARS, CHAR_DIM, WORD, FILTERS, HIGHWAYS = 31, 5, 9, ((1, 4), (2, 7), (3, 6)), 2
PROJ, CELL, LAYERS, CELL_CLIP, PROJ_CLIP = 8, 12, 2, 1.1, 1.4
WIDTH = sum(n for _, n in FILTERS)


# ---- PyTorch ---------------------------------------------------------------------------------
class Highway(nn.Module):
    def __init__(self, input_dim, num_layers):
        super().__init__()
        self._layers = nn.ModuleList(nn.Linear(input_dim, input_dim * 2) for _ in range(num_layers))

    def forward(self, inputs):
        current = inputs
        for layer in self._layers:
            nonlinear_part, gate = layer(current).chunk(2, dim=-1)
            gate = torch.sigmoid(gate)
            current = gate * current + (1 - gate) * torch.relu(nonlinear_part)
        return current


class ElmoCharacterEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self._char_embedding = nn.Embedding(CHARS, CHAR_DIM)
        self._convolutions = nn.ModuleList(
            nn.Conv1d(CHAR_DIM, num, kernel_size=width, bias=True) for width, num in FILTERS)
        self._highways = Highway(WIDTH, HIGHWAYS)
        self._projection = nn.Linear(WIDTH, PROJ)

    def forward(self, inputs):
        mask = (inputs > 0).any(dim=-1)
        batch, length, word = inputs.shape
        chars = self._char_embedding(inputs.view(-1, word)).transpose(1, 2)
        convs = []
        for conv in self._convolutions:
            convolved, _ = torch.max(conv(chars), dim=-1)
            convs.append(torch.relu(convolved))
        token = self._projection(self._highways(torch.cat(convs, dim=-1)))
        return token.view(batch, length, -1), mask


class LstmCellWithProjection(nn.Module):
    """One direction over a batch of sequences padded at their ends."""

    def __init__(self, input_size, hidden_size, cell_size, go_forward):
        super().__init__()
        self.hidden_size, self.cell_size, self.go_forward = hidden_size, cell_size, go_forward
        self.input_linearity = nn.Linear(input_size, 4 * cell_size, bias=False)
        self.state_linearity = nn.Linear(hidden_size, 4 * cell_size, bias=True)
        self.state_projection = nn.Linear(cell_size, hidden_size, bias=False)

    def forward(self, inputs, mask):
        batch, length, _ = inputs.shape
        state = inputs.new_zeros(batch, self.hidden_size)
        memory = inputs.new_zeros(batch, self.cell_size)
        outputs = [None] * length
        for index in (range(length) if self.go_forward else reversed(range(length))):
            gates = self.input_linearity(inputs[:, index]) + self.state_linearity(state)
            input_gate, forget_gate, memory_init, output_gate = gates.chunk(4, dim=-1)
            input_gate, forget_gate = torch.sigmoid(input_gate), torch.sigmoid(forget_gate)
            new_memory = input_gate * torch.tanh(memory_init) + forget_gate * memory
            new_memory = torch.clamp(new_memory, -CELL_CLIP, CELL_CLIP)
            new_state = self.state_projection(torch.sigmoid(output_gate) * torch.tanh(new_memory))
            new_state = torch.clamp(new_state, -PROJ_CLIP, PROJ_CLIP)
            here = mask[:, index, None]
            state, memory = torch.where(here, new_state, state), torch.where(here, new_memory, memory)
            outputs[index] = torch.where(here, new_state, torch.zeros_like(new_state))
        return torch.stack(outputs, dim=1)


class ElmoLstm(nn.Module):
    def __init__(self):
        super().__init__()
        for i in range(LAYERS):
            self.add_module(f"forward_layer_{i}", LstmCellWithProjection(PROJ, PROJ, CELL, True))
            self.add_module(f"backward_layer_{i}", LstmCellWithProjection(PROJ, PROJ, CELL, False))

    def forward(self, inputs, mask):
        forward = backward = inputs
        sequence_outputs = []
        for i in range(LAYERS):
            forward_cache, backward_cache = forward, backward
            forward = getattr(self, f"forward_layer_{i}")(forward, mask)
            backward = getattr(self, f"backward_layer_{i}")(backward, mask)
            if i != 0:                                   # skip connections, not around the first layer
                forward, backward = forward + forward_cache, backward + backward_cache
            sequence_outputs.append(torch.cat([forward, backward], -1))
        return sequence_outputs


class ScalarMix(nn.Module):
    def __init__(self, mixture_size):
        super().__init__()
        self.scalar_parameters = nn.ParameterList(
            nn.Parameter(torch.zeros(1)) for _ in range(mixture_size))
        self.gamma = nn.Parameter(torch.ones(1))

    def forward(self, tensors):
        weights = torch.softmax(torch.cat([p for p in self.scalar_parameters]), dim=0)
        return self.gamma * sum(weight * tensor for weight, tensor in zip(weights.split(1), tensors))


class Elmo(nn.Module):
    def __init__(self):
        super().__init__()
        self._token_embedder = ElmoCharacterEncoder()
        self._elmo_lstm = ElmoLstm()
        self.scalar_mix = ScalarMix(LAYERS + 1)

    def forward(self, inputs):
        token, mask = self._token_embedder(inputs)
        layers = self._elmo_lstm(token, mask)
        return self.scalar_mix([torch.cat([token, token], dim=-1) * mask[..., None]] + layers)


# ---- Flax ------------------------------------------------------------------------------------
class WordCNN(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (CHARS, CHAR_DIM)))
        self.convs = nnx.List([nnx.Conv(CHAR_DIM, n, (w,), padding="VALID", rngs=rngs) for w, n in FILTERS])
        self.carry = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(HIGHWAYS)])
        self.change = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(HIGHWAYS)])
        self.out = nnx.Linear(WIDTH, PROJ, rngs=rngs)

    def __call__(self, chars):
        letters = self.table[...][chars]                                      # n, t, word, dim
        x = jnp.concatenate([conv(letters).max(axis=-2) for conv in self.convs], axis=-1)
        x = jax.nn.relu(x)
        for carry, change in zip(self.carry, self.change):
            keep = jax.nn.sigmoid(carry(x))
            new = jax.nn.relu(change(x))
            x = new + keep * (x - new)
        return self.out(x)


class TwoWayLSTM(nnx.Module):
    """Both directions at once: weights carry a leading axis (forward, backward).

    Gates lie in the order input, output, forget, candidate.
    """

    def __init__(self, rngs):
        key = rngs.params()
        self.kernel = nnx.Param(jax.random.normal(key, (2, 2 * PROJ, 4 * CELL)))
        self.bias = nnx.Param(jnp.zeros((2, 4 * CELL)))
        self.project = nnx.Param(jax.random.normal(key, (2, CELL, PROJ)))

    def __call__(self, x, lengths):
        """x: (2, n, t, PROJ), each direction's own input; the same out."""
        steps = jnp.arange(x.shape[2])
        turned = jnp.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)
        rows = jnp.arange(x.shape[1])[:, None]
        valid = steps < lengths[:, None]

        def step(carry, now):
            h, c = carry
            joined = jnp.concatenate([now, h], axis=-1)
            z = jnp.einsum("dni,dio->dno", joined, self.kernel[...]) + self.bias[...][:, None]
            squashed = jax.nn.sigmoid(z[..., :3 * CELL])
            i, o, f = jnp.split(squashed, 3, axis=-1)
            c = i * jnp.tanh(z[..., 3 * CELL:]) + f * c
            c = jnp.clip(c, -CELL_CLIP, CELL_CLIP)
            h = jnp.einsum("dnc,dcp->dnp", o * jnp.tanh(c), self.project[...])
            h = jnp.clip(h, -PROJ_CLIP, PROJ_CLIP)
            return (h, c), h

        inputs = jnp.stack([x[0], x[1][rows, turned]])
        start = (jnp.zeros((2, x.shape[1], PROJ), x.dtype), jnp.zeros((2, x.shape[1], CELL), x.dtype))
        _, hs = jax.lax.scan(step, start, jnp.moveaxis(inputs, 2, 0))
        hs = jnp.moveaxis(hs, 0, 2)
        hs = jnp.stack([hs[0], hs[1][rows, turned]])
        return jnp.where(valid[..., None], hs, 0)


class ContextEmbedder(nnx.Module):
    def __init__(self, rngs):
        self.words = WordCNN(rngs)
        self.lstms = nnx.List([TwoWayLSTM(rngs) for _ in range(LAYERS)])
        self.mix = nnx.Param(jnp.zeros(LAYERS + 1))
        self.gain = nnx.Param(jnp.ones(()))

    def __call__(self, chars):
        real = (chars > 0).any(-1)
        lengths = real.sum(-1)
        words = self.words(chars)
        x = jnp.stack([words, words])
        layers = [x * real[..., None]]
        for depth, lstm in enumerate(self.lstms):
            y = lstm(x, lengths)
            x = x + y if depth else y
            layers.append(x)
        share = self.gain[...] * jax.nn.softmax(self.mix[...])
        mixed = jnp.einsum("l,ldntp->ntdp", share, jnp.stack(layers))
        return mixed.reshape(*mixed.shape[:2], 2 * PROJ)


def port_weights(net):
    model = ContextEmbedder(nnx.Rngs(0))

    def a(t):
        return jnp.asarray(t.detach().numpy())

    src, dst = net._token_embedder, model.words
    dst.table.set_value(a(src._char_embedding.weight))
    for conv, c in zip(dst.convs, src._convolutions):
        conv.kernel.set_value(a(c.weight).transpose(2, 1, 0))
        conv.bias.set_value(a(c.bias))
    for carry, change, h in zip(dst.carry, dst.change, src._highways._layers):
        for part, w, b in zip((change, carry), jnp.split(a(h.weight), 2), jnp.split(a(h.bias), 2)):
            part.kernel.set_value(w.T)
            part.bias.set_value(b)
    dst.out.kernel.set_value(a(src._projection.weight).T)
    dst.out.bias.set_value(a(src._projection.bias))

    def gates(t):
        i, f, g, o = jnp.split(t, 4, axis=-1)
        return jnp.concatenate([i, o, f, g], axis=-1)

    for n, lstm in enumerate(model.lstms):
        pair = [getattr(net._elmo_lstm, f"{way}_layer_{n}") for way in ("forward", "backward")]
        lstm.kernel.set_value(jnp.stack([
            gates(jnp.concatenate([a(p.input_linearity.weight).T, a(p.state_linearity.weight).T])) for p in pair]))
        lstm.bias.set_value(jnp.stack([gates(a(p.state_linearity.bias)) for p in pair]))
        lstm.project.set_value(jnp.stack([a(p.state_projection.weight).T for p in pair]))
    model.mix.set_value(jnp.concatenate([a(p) for p in net.scalar_mix.scalar_parameters]))
    model.gain.set_value(a(net.scalar_mix.gamma)[0])
    return model


def build(seed):
    torch.manual_seed(seed)
    net = Elmo().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "linearity" in name or "state_projection" in name:
                p.copy_(0.7 * torch.randn_like(p))
            elif "scalar_mix" in name:
                p.copy_(0.5 + torch.rand_like(p))
            else:
                p.copy_(0.4 * torch.randn_like(p))
    rs = np.random.RandomState(seed)
    chars = np.zeros((3, 6, WORD), np.int64)
    for row, words in enumerate((6, 4, 3)):
        for word in range(words):
            letters = rs.randint(2, WORD + 1)
            chars[row, word, :letters] = rs.randint(1, CHARS, letters)
    return {"torch": net, "flax": port_weights(net), "inputs": chars}


CELLS = [f"_elmo_lstm.{way}_layer_{i}" for i in range(LAYERS) for way in ("forward", "backward")]
FAULTS = [
    {"title": "the highways' gate weighs the new part, its complement the carried one",
     "edits": [("x = new + keep * (x - new)", "x = x + keep * (new - x)")],
     "layers": ["_token_embedder._highways"],
     "between": ("_token_embedder._highways._layers.0", "_token_embedder._highways._layers.1"),
     "causes": ["swapped", "operand"], "level": "outputs"},
    {"title": "the backward direction starts in the padding: whole rows are turned, not each sequence",
     "edits": [("jnp.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)",
                "jnp.broadcast_to(steps[::-1], x.shape[1:3])")],
     "layers": ["_elmo_lstm.backward_layer_0", "_elmo_lstm.backward_layer_1"],
     "between": ("_token_embedder", "_elmo_lstm.forward_layer_1"),
     "causes": ["reversed", "mask"], "level": "outputs"},
    {"title": "the memory is clipped for the next step only, after the output has been taken from it",
     "edits": [("            c = jnp.clip(c, -CELL_CLIP, CELL_CLIP)\n", ""),
               ("            return (h, c), h\n", "            return (h, jnp.clip(c, -CELL_CLIP, CELL_CLIP)), h\n")],
     "layers": CELLS,
     "between": ("_elmo_lstm.forward_layer_0.state_linearity", "_elmo_lstm.forward_layer_0.state_projection"),
     "causes": ["order"], "level": "outputs"},
    {"title": "the second layer of the LSTM lacks its skip connection",
     "edits": [("            x = x + y if depth else y\n", "            x = y\n")],
     "layers": ["_elmo_lstm"],
     "between": ("_elmo_lstm.backward_layer_1", "scalar_mix"),
     "causes": ["residual", "left_out"], "level": "outputs"},
    {"title": "porting adds one to the bias of the forget gates, as for a TensorFlow checkpoint",
     "edits": [("gates(a(p.state_linearity.bias)) for p",
                "gates(a(p.state_linearity.bias).at[CELL:2 * CELL].add(1)) for p")],
     "layers": [c + ".state_linearity" for c in CELLS],
     "between": None,
     "causes": ["forget_bias", "values"], "level": "bits"},
]
