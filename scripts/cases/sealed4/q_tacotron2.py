"""Tacotron-2-like decoder (prenet, location-sensitive attention, two LSTM cells, postnet) and an NNX port with a scan."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

MEL, MEMORY, PRENET, RNN, DEC, ATT, FILTERS, KERNEL = 5, 9, 8, 10, 11, 6, 4, 3
POST, POST_KERNEL, POST_LAYERS = 7, 5, 3


# ------------------------------------------------------------------ PyTorch


class LinearNorm(torch.nn.Module):
    def __init__(self, in_dim, out_dim, bias=True):
        super().__init__()
        self.linear_layer = torch.nn.Linear(in_dim, out_dim, bias=bias)

    def forward(self, x):
        return self.linear_layer(x)


class ConvNorm(torch.nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, bias=True):
        super().__init__()
        self.conv = torch.nn.Conv1d(in_channels, out_channels, kernel_size, padding=(kernel_size - 1) // 2, bias=bias)

    def forward(self, signal):
        return self.conv(signal)


class LocationLayer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.location_conv = ConvNorm(2, FILTERS, KERNEL, bias=False)
        self.location_dense = LinearNorm(FILTERS, ATT, bias=False)

    def forward(self, attention_weights_cat):
        return self.location_dense(self.location_conv(attention_weights_cat).transpose(1, 2))


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.query_layer = LinearNorm(RNN, ATT, bias=False)
        self.memory_layer = LinearNorm(MEMORY, ATT, bias=False)
        self.v = LinearNorm(ATT, 1, bias=False)
        self.location_layer = LocationLayer()

    def forward(self, attention_hidden_state, memory, processed_memory, attention_weights_cat, mask):
        processed_query = self.query_layer(attention_hidden_state.unsqueeze(1))
        location = self.location_layer(attention_weights_cat)
        energies = self.v(torch.tanh(processed_query + location + processed_memory)).squeeze(-1)
        energies = energies.masked_fill(mask, -float("inf"))
        attention_weights = torch.softmax(energies, dim=1)
        return torch.bmm(attention_weights.unsqueeze(1), memory).squeeze(1), attention_weights


class Prenet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([LinearNorm(MEL, PRENET, bias=False), LinearNorm(PRENET, PRENET, bias=False)])

    def forward(self, x):  # without the dropout of the paper
        for linear in self.layers:
            x = torch.relu(linear(x))
        return x


class Postnet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        widths = [MEL] + [POST] * (POST_LAYERS - 1) + [MEL]
        self.convolutions = torch.nn.ModuleList([
            torch.nn.Sequential(ConvNorm(a, b, POST_KERNEL), torch.nn.BatchNorm1d(b)) for a, b in zip(widths, widths[1:])])

    def forward(self, x):
        for layer in self.convolutions[:-1]:
            x = torch.tanh(layer(x))
        return self.convolutions[-1](x)


class Decoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.prenet = Prenet()
        self.attention_rnn = torch.nn.LSTMCell(PRENET + MEMORY, RNN)
        self.attention_layer = Attention()
        self.decoder_rnn = torch.nn.LSTMCell(RNN + MEMORY, DEC)
        self.linear_projection = LinearNorm(DEC + MEMORY, MEL)
        self.gate_layer = LinearNorm(DEC + MEMORY, 1)

    def forward(self, memory, decoder_inputs, mask):
        b, n = memory.shape[:2]
        decoder_inputs = self.prenet(decoder_inputs)
        hidden, cell = memory.new_zeros(b, RNN), memory.new_zeros(b, RNN)
        dec_hidden, dec_cell = memory.new_zeros(b, DEC), memory.new_zeros(b, DEC)
        attention_weights, attention_weights_cum = memory.new_zeros(b, n), memory.new_zeros(b, n)
        attention_context = memory.new_zeros(b, MEMORY)
        processed_memory = self.attention_layer.memory_layer(memory)
        mels, gates = [], []
        for t in range(decoder_inputs.shape[1]):
            cell_input = torch.cat((decoder_inputs[:, t], attention_context), -1)
            hidden, cell = self.attention_rnn(cell_input, (hidden, cell))
            attention_weights_cat = torch.stack((attention_weights, attention_weights_cum), dim=1)
            attention_context, attention_weights = self.attention_layer(
                hidden, memory, processed_memory, attention_weights_cat, mask)
            attention_weights_cum = attention_weights_cum + attention_weights
            dec_hidden, dec_cell = self.decoder_rnn(torch.cat((hidden, attention_context), -1), (dec_hidden, dec_cell))
            both = torch.cat((dec_hidden, attention_context), dim=1)
            mels.append(self.linear_projection(both))
            gates.append(self.gate_layer(both))
        return torch.stack(mels, dim=1), torch.cat(gates, dim=1)


class Tacotron2Tail(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = Decoder()
        self.postnet = Postnet()

    def forward(self, memory, decoder_inputs, mask):
        mel, gate = self.decoder(memory, decoder_inputs, mask)
        return mel, mel + self.postnet(mel.transpose(1, 2)).transpose(1, 2), gate


# ------------------------------------------------------------------ Flax


class ChannelNorm(nnx.Module):
    """Batch norm over batch and time; the running variance is the unbiased one."""

    def __init__(self, width):
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(width)), nnx.BatchStat(jnp.ones(width))
        self.use_running_average = False

    def __call__(self, x):
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            mean = x.mean((0, 1))
            var = jnp.square(x - mean).mean((0, 1))
            n = x.shape[0] * x.shape[1]
            keep = 0.9
            self.mean[...] = keep * self.mean[...] + (1 - keep) * jax.lax.stop_gradient(mean)
            self.var[...] = keep * self.var[...] + (1 - keep) * jax.lax.stop_gradient(var) * n / (n - 1)
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * self.scale[...] + self.bias[...]


class Cell(nnx.Module):
    """LSTM with one fused kernel over [input, hidden] and one bias per side."""

    def __init__(self, fan_in, width, rngs):
        self.from_input = nnx.Linear(fan_in, 4 * width, rngs=rngs)
        self.from_hidden = nnx.Linear(width, 4 * width, rngs=rngs)

    def __call__(self, x, state):
        h, c = state
        i, f, g, o = jnp.split(self.from_input(x) + self.from_hidden(h), 4, axis=-1)
        c = nnx.sigmoid(f) * c + nnx.sigmoid(i) * jnp.tanh(g)
        return nnx.sigmoid(o) * jnp.tanh(c), c


class MelDecoder(nnx.Module):
    def __init__(self, rngs):
        self.pre1 = nnx.Linear(MEL, PRENET, use_bias=False, rngs=rngs)
        self.pre2 = nnx.Linear(PRENET, PRENET, use_bias=False, rngs=rngs)
        self.listen, self.speak = Cell(PRENET + MEMORY, RNN, rngs), Cell(RNN + MEMORY, DEC, rngs)
        self.query = nnx.Linear(RNN, ATT, use_bias=False, rngs=rngs)
        self.key = nnx.Linear(MEMORY, ATT, use_bias=False, rngs=rngs)
        self.energy = nnx.Linear(ATT, 1, use_bias=False, rngs=rngs)
        self.place_conv = nnx.Conv(2, FILTERS, (KERNEL,), use_bias=False, rngs=rngs)
        self.place = nnx.Linear(FILTERS, ATT, use_bias=False, rngs=rngs)
        self.frame_and_stop = nnx.Linear(DEC + MEMORY, MEL + 1, rngs=rngs)

    def attend(self, hidden, memory, keys, past, blocked):
        place = self.place(self.place_conv(past))
        score = self.energy(jnp.tanh(self.query(hidden)[:, None] + place + keys))[..., 0]
        weights = nnx.softmax(jnp.where(blocked, -jnp.inf, score), axis=-1)
        return jnp.einsum("bn,bnd->bd", weights, memory), weights

    def __call__(self, memory, frames, blocked):
        b, n = blocked.shape
        x = nnx.relu(self.pre1(frames))
        x = nnx.relu(self.pre2(x))
        keys = self.key(memory)

        def zeros(width):
            return jnp.zeros((b, width), memory.dtype)

        def step(carry, frame):
            listen, speak, context, last, total = carry
            listen = self.listen(jnp.concatenate([frame, context], -1), listen)
            past = jnp.stack([last, total], axis=-1)
            new_context, last = self.attend(listen[0], memory, keys, past, blocked)
            speak = self.speak(jnp.concatenate([listen[0], new_context], -1), speak)
            out = self.frame_and_stop(jnp.concatenate([speak[0], new_context], -1))
            return (listen, speak, new_context, last, total + last), out

        start = ((zeros(RNN), zeros(RNN)), (zeros(DEC), zeros(DEC)), zeros(MEMORY), zeros(n), zeros(n))
        _, out = jax.lax.scan(step, start, x.swapaxes(0, 1))
        out = out.swapaxes(0, 1)
        return out[..., :MEL], out[..., MEL]


class Speech(nnx.Module):
    def __init__(self, rngs):
        self.decoder = MelDecoder(rngs)
        widths = [MEL] + [POST] * (POST_LAYERS - 1) + [MEL]
        self.convs = nnx.List([nnx.Conv(a, b, (POST_KERNEL,), rngs=rngs) for a, b in zip(widths, widths[1:])])
        self.norms = nnx.List([ChannelNorm(b) for b in widths[1:]])

    def __call__(self, memory, frames, blocked):
        coarse, stop = self.decoder(memory, frames, blocked)
        x = coarse
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = norm(conv(x))
            if i < len(self.convs) - 1:
                x = jnp.tanh(x)
        return coarse, coarse + x, stop


# ------------------------------------------------------------------ weights


def port(net):
    new = Speech(nnx.Rngs(0))
    d, a = net.decoder, net.decoder.attention_layer

    def put(linear, weight, bias=None):
        kernel = weight.detach().numpy()
        linear.kernel.set_value(jnp.asarray(kernel.transpose(2, 1, 0) if kernel.ndim == 3 else kernel.T))
        if bias is not None:
            linear.bias.set_value(jnp.asarray(bias.detach().numpy()))

    for mine, theirs in [(new.decoder.pre1, d.prenet.layers[0]), (new.decoder.pre2, d.prenet.layers[1]),
                         (new.decoder.query, a.query_layer), (new.decoder.key, a.memory_layer),
                         (new.decoder.energy, a.v), (new.decoder.place, a.location_layer.location_dense)]:
        put(mine, theirs.linear_layer.weight)
    put(new.decoder.place_conv, a.location_layer.location_conv.conv.weight)
    for mine, cell in [(new.decoder.listen, d.attention_rnn), (new.decoder.speak, d.decoder_rnn)]:
        put(mine.from_input, cell.weight_ih, cell.bias_ih)
        put(mine.from_hidden, cell.weight_hh, cell.bias_hh)
    mel, gate = d.linear_projection.linear_layer, d.gate_layer.linear_layer
    put(new.decoder.frame_and_stop, torch.cat([mel.weight, gate.weight]), torch.cat([mel.bias, gate.bias]))
    for conv, norm, layer in zip(new.convs, new.norms, net.postnet.convolutions):
        put(conv, layer[0].conv.weight, layer[0].conv.bias)
        for mine, theirs in [(norm.scale, layer[1].weight), (norm.bias, layer[1].bias),
                             (norm.mean, layer[1].running_mean), (norm.var, layer[1].running_var)]:
            mine.set_value(jnp.asarray(theirs.detach().numpy()))
    new.eval()
    return new


def build(seed):
    torch.manual_seed(seed)
    net = Tacotron2Tail().eval()
    with torch.no_grad():
        for name, p in [*net.named_parameters(), *net.named_buffers()]:
            if "running_var" in name or name.startswith("postnet") and name.endswith("1.weight"):
                p.copy_(0.6 + torch.rand(p.shape))
            elif p.is_floating_point():
                p.copy_(torch.randn(p.shape) * (0.4 if p.ndim == 1 else 1.5 / math.sqrt(p[0].numel())))
    rng = np.random.default_rng(seed)
    mask = np.zeros((2, 12), bool)
    mask[1, 9:] = True
    frames = rng.standard_normal((2, 4, MEL)).astype(np.float32)
    frames[:, 0] = 0  # the go frame
    return {"torch": net, "flax": port(net), "inputs": (rng.standard_normal((2, 12, MEMORY)).astype(np.float32), frames, mask)}


FAULTS = [
    {"title": "the decoder's LSTM gets the attention context of the step before",
     "edits": [("self.speak(jnp.concatenate([listen[0], new_context], -1), speak)", "self.speak(jnp.concatenate([listen[0], context], -1), speak)")],
     "layers": ["decoder", "decoder.decoder_rnn"],
     "between": ("decoder.attention_layer", "decoder.linear_projection"),
     "causes": ["operand", "token", "order"], "level": "outputs"},
    {"title": "the two channels of the location features, last and summed weights, stand in the other order",
     "edits": [("past = jnp.stack([last, total], axis=-1)", "past = jnp.stack([total, last], axis=-1)")],
     "layers": ["decoder", "decoder.attention_layer.location_layer.location_conv", "decoder.attention_layer.location_layer.location_conv.conv"],
     "between": ("decoder.attention_rnn", "decoder.attention_layer.location_layer.location_dense"),
     "causes": ["concat", "swapped", "order"], "level": "outputs"},
    {"title": "the prenet's relu is a maximum with zero, whose gradient at the zeros of the go frame is a half",
     "edits": [("x = nnx.relu(self.pre1(frames))", "x = jnp.maximum(self.pre1(frames), 0)"),
               ("x = nnx.relu(self.pre2(x))", "x = jnp.maximum(self.pre2(x), 0)")],
     "layers": ["decoder.prenet", "decoder.prenet.layers.0", "decoder.prenet.layers.1"],
     "between": ("the input", "decoder.attention_rnn"),
     "causes": ["kink", "activation"], "level": "gradients"},
    {"title": "the running variance is fed with the biased variance of the batch",
     "edits": [("jax.lax.stop_gradient(var) * n / (n - 1)", "jax.lax.stop_gradient(var)")],
     "layers": [f"postnet.convolutions.{i}.1" for i in range(3)],
     "between": None,
     "causes": ["unbiased_variance"], "level": "training"},
    {"title": "in training no gradient goes through the mean of the batch",
     "edits": [("mean = x.mean((0, 1))", "mean = jax.lax.stop_gradient(x).mean((0, 1))")],
     "layers": [f"postnet.convolutions.{i}.1" for i in range(3)],
     "between": None,
     "causes": ["stop_gradient"], "level": "training"},
]
