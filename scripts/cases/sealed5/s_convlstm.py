"""Encoder-forecaster ConvLSTM with peepholes for video, and its Linen port (NHWC, nn.scan over time)."""
import flax.linen as lnn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

BATCH, T_IN, T_OUT, C_IN, HEIGHT, WIDTH = 2, 5, 3, 2, 8, 10
STEM, FINE, MID, COARSE, UP = 4, 6, 5, 7, 3


# ---- PyTorch
class ConvLSTM(nn.Module):
    def __init__(self, input_channel, num_filter, size, kernel_size=3, padding=1):
        super().__init__()
        self._conv = nn.Conv2d(input_channel + num_filter, num_filter * 4, kernel_size, 1, padding)
        self._size = size
        self._input_channel = input_channel
        self._num_filter = num_filter
        self.Wci = nn.Parameter(torch.zeros(1, num_filter, *size))
        self.Wcf = nn.Parameter(torch.zeros(1, num_filter, *size))
        self.Wco = nn.Parameter(torch.zeros(1, num_filter, *size))

    def forward(self, inputs=None, states=None, seq_len=T_IN):
        ref = inputs if inputs is not None else states[0]
        batch = ref.shape[1] if inputs is not None else ref.shape[0]
        if states is None:
            c = ref.new_zeros(batch, self._num_filter, *self._size)
            h = ref.new_zeros(batch, self._num_filter, *self._size)
        else:
            h, c = states
        outputs = []
        for index in range(seq_len):
            if inputs is None:
                x = h.new_zeros(h.size(0), self._input_channel, *self._size)
            else:
                x = inputs[index]
            conv_x = self._conv(torch.cat([x, h], dim=1))
            i, f, tmp_c, o = torch.chunk(conv_x, 4, dim=1)
            i = torch.sigmoid(i + self.Wci * c)
            f = torch.sigmoid(f + self.Wcf * c)
            c = f * c + i * torch.tanh(tmp_c)
            o = torch.sigmoid(o + self.Wco * c)
            h = o * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs), (h, c)


def per_frame(layer, x):
    """x: (T, B, C, H, W)"""
    y = layer(x.reshape(-1, *x.shape[2:]))
    return y.reshape(x.shape[0], x.shape[1], *y.shape[1:])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(C_IN, STEM, 3, 1, 1), nn.LeakyReLU(0.2))
        self.rnn1 = ConvLSTM(STEM, FINE, (HEIGHT, WIDTH))
        self.stage2 = nn.Sequential(nn.Conv2d(FINE, MID, 3, 2, 1), nn.LeakyReLU(0.2))
        self.rnn2 = ConvLSTM(MID, COARSE, (HEIGHT // 2, WIDTH // 2))

    def forward(self, x):
        x = per_frame(self.stage1, x)
        x, state1 = self.rnn1(x)
        x = per_frame(self.stage2, x)
        _, state2 = self.rnn2(x)
        return state1, state2


class Forecaster(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn2 = ConvLSTM(MID, COARSE, (HEIGHT // 2, WIDTH // 2))
        self.stage2 = nn.Sequential(nn.ConvTranspose2d(COARSE, UP, 4, 2, 1), nn.LeakyReLU(0.2))
        self.rnn1 = ConvLSTM(UP, FINE, (HEIGHT, WIDTH))
        self.stage1 = nn.Sequential(nn.Conv2d(FINE, STEM, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(STEM, 1, 1))

    def forward(self, state1, state2):
        x, _ = self.rnn2(None, state2, T_OUT)
        x = per_frame(self.stage2, x)
        x, _ = self.rnn1(x, state1, T_OUT)
        return per_frame(self.stage1, x)


class EF(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.forecaster = Forecaster()

    def forward(self, input):
        """input: (B, T, C, H, W) -> (B, T_OUT, 1, H, W)"""
        state1, state2 = self.encoder(input.transpose(0, 1))
        return self.forecaster(state1, state2).transpose(0, 1)


# ---- Flax
def leaky(x):
    return jnp.where(x > 0, x, 0.2 * x)


class PeepholeCell(lnn.Module):
    """One step; the part of the gates that comes from the input is computed outside, for all steps at once."""
    features: int

    @lnn.compact
    def __call__(self, carry, drive):
        memory, hidden = carry
        shape = (3, *memory.shape[1:])
        peep_i, peep_f, peep_o = self.param('peephole', lnn.initializers.normal(0.1), shape)
        recur = lnn.Conv(4 * self.features, (3, 3), use_bias=False, name='recur')(hidden)
        z_i, z_f, z_g, z_o = jnp.split(drive + recur, 4, axis=-1)
        write = lnn.sigmoid(z_i + peep_i * memory)
        keep = lnn.sigmoid(z_f + peep_f * memory)
        fresh = keep * memory + write * jnp.tanh(z_g)
        emit = lnn.sigmoid(z_o + peep_o * fresh)
        hidden = emit * jnp.tanh(fresh)
        return (fresh, hidden), hidden


class ConvRecurrence(lnn.Module):
    """frames: (B, T, H, W, C), or None with a number of steps: the cell runs on its state alone."""
    features: int
    in_features: int

    @lnn.compact
    def __call__(self, frames, carry=None, steps=None):
        if frames is None:
            _, h, w, _ = carry[0].shape
            frames = jnp.zeros((carry[0].shape[0], steps, h, w, self.in_features), carry[0].dtype)
        drive = lnn.Conv(4 * self.features, (3, 3), name='drive')(frames)
        if carry is None:
            blank = jnp.zeros((*drive[:, 0].shape[:-1], self.features), drive.dtype)
            carry = (blank, blank)
        scan = lnn.scan(PeepholeCell, variable_broadcast='params', split_rngs={'params': False},
                        in_axes=1, out_axes=1)
        return scan(self.features, name='cell')(carry, drive)


class Downstream(lnn.Module):
    """Reads the clip, keeps the last state of both levels."""

    @lnn.compact
    def __call__(self, clip):
        x = leaky(lnn.Conv(STEM, (3, 3), name='stem')(clip))
        fine, x = ConvRecurrence(FINE, STEM, name='fine')(x)
        x = leaky(lnn.Conv(MID, (3, 3), strides=2, padding=((1, 1), (1, 1)), name='shrink')(x))
        coarse, _ = ConvRecurrence(COARSE, MID, name='coarse')(x)
        return fine, coarse


class Upstream(lnn.Module):
    """Unrolls the future from the two states, coarse level first."""
    steps: int

    @lnn.compact
    def __call__(self, fine, coarse):
        _, x = ConvRecurrence(COARSE, MID, name='coarse')(None, coarse, self.steps)
        x = lnn.ConvTranspose(UP, (4, 4), strides=(2, 2), padding=((2, 2), (2, 2)), name='grow')(x)
        x = leaky(x)
        _, x = ConvRecurrence(FINE, UP, name='fine')(x, fine)
        x = leaky(lnn.Conv(STEM, (3, 3), name='mix')(x))
        return lnn.Conv(1, (1, 1), name='paint')(x)


class VideoForecaster(lnn.Module):
    steps: int = T_OUT

    def setup(self):
        self.reader = Downstream()
        self.writer = Upstream(self.steps)

    def __call__(self, clip):
        fine, coarse = self.reader(clip)
        return self.writer(fine, coarse)


def port_weights(net):
    arr = lambda t: jnp.asarray(t.detach().numpy())

    def conv(c):
        return {'kernel': arr(c.weight).transpose(2, 3, 1, 0), 'bias': arr(c.bias)}

    def deconv(c):
        return {'kernel': arr(c.weight).transpose(2, 3, 0, 1)[::-1, ::-1], 'bias': arr(c.bias)}

    def rnn(cell):
        kernel = arr(cell._conv.weight).transpose(2, 3, 1, 0)
        n = cell._input_channel
        peep = [arr(w)[0].transpose(1, 2, 0) for w in (cell.Wci, cell.Wcf, cell.Wco)]
        return {'drive': {'kernel': kernel[:, :, :n], 'bias': arr(cell._conv.bias)},
                'cell': {'recur': {'kernel': kernel[:, :, n:]}, 'peephole': jnp.stack(peep)}}

    enc, dec = net.encoder, net.forecaster
    params = {
        'reader': {'stem': conv(enc.stage1[0]), 'fine': rnn(enc.rnn1),
                   'shrink': conv(enc.stage2[0]), 'coarse': rnn(enc.rnn2)},
        'writer': {'coarse': rnn(dec.rnn2), 'grow': deconv(dec.stage2[0]), 'fine': rnn(dec.rnn1),
                   'mix': conv(dec.stage1[0]), 'paint': conv(dec.stage1[2])},
    }
    return VideoForecaster(), {'params': params}


def build(seed):
    torch.manual_seed(seed)
    net = EF()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith(('Wci', 'Wcf', 'Wco')):
                p.copy_(0.7 * torch.randn_like(p))
            elif p.dim() > 1:
                p.copy_(1.5 * torch.randn_like(p) / p[0].numel() ** 0.5)
            else:
                p.copy_(0.4 * torch.randn_like(p))
    net.eval()
    clip = np.random.RandomState(seed).randn(BATCH, T_IN, C_IN, HEIGHT, WIDTH).astype(np.float32)
    return {'torch': net, 'flax': port_weights(net), 'inputs': clip,
            'flax_inputs': np.ascontiguousarray(clip.transpose(0, 1, 3, 4, 2))}


FAULTS = [
    {'title': 'the output gate looks at the memory of the step before, not at the new one',
     'edits': [('emit = lnn.sigmoid(z_o + peep_o * fresh)', 'emit = lnn.sigmoid(z_o + peep_o * memory)')],
     'layers': ['encoder.rnn1'], 'between': ('encoder.rnn1._conv', 'encoder.stage2'),
     'causes': ['operand', 'order'], 'level': 'outputs'},
    {'title': 'the transposed convolution is padded so that the image moves by one pixel',
     'edits': [('padding=((2, 2), (2, 2)), name=\'grow\'', 'padding=((1, 3), (1, 3)), name=\'grow\'')],
     'layers': ['forecaster.stage2.0', 'forecaster.stage2'],
     'between': ('forecaster.rnn2', 'forecaster.stage2.1'),
     'causes': ['padding', 'offset'], 'level': 'outputs'},
    {'title': 'the state handed to the coarse forecaster has memory and hidden exchanged',
     'edits': [('(None, coarse, self.steps)', '(None, coarse[::-1], self.steps)')],
     'layers': ['forecaster.rnn2', 'forecaster'],
     'between': ('encoder.rnn2', 'forecaster.rnn2._conv'),
     'causes': ['swapped', 'operand', 'order'], 'level': 'outputs'},
    {'title': 'the leaky ReLU after the forecaster\'s mixing convolution has Flax\'s default slope 0.01, not 0.2',
     'edits': [("x = leaky(lnn.Conv(STEM, (3, 3), name='mix')(x))", "x = lnn.leaky_relu(lnn.Conv(STEM, (3, 3), name='mix')(x))")],
     'layers': ['forecaster.stage1.1'],
     'between': ('forecaster.stage1.0', 'forecaster.stage1.2'),
     'causes': ['constant', 'activation'], 'level': 'outputs'},
    {'title': 'the input gate\'s peephole is also copied to the forget gate: Wcf is never read',
     'edits': [('for w in (cell.Wci, cell.Wcf, cell.Wco)]', 'for w in (cell.Wci, cell.Wci, cell.Wco)]')],
     'layers': ['encoder.rnn1', 'encoder.rnn2', 'forecaster.rnn1', 'forecaster.rnn2'],
     'between': None, 'causes': ['values', 'swapped'], 'level': 'bits'},
]
