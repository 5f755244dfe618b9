"""Conv-TasNet: learnt encoder, dilated depthwise blocks with skip sums, masks, overlap-add decoder."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as tnn


# ---- PyTorch

class GlobalLayerNorm(tnn.Module):
    """gLN: over channels and time together."""

    def __init__(self, channel_size, eps=1e-8):
        super().__init__()
        self.gamma = tnn.Parameter(torch.ones(1, channel_size, 1))
        self.beta = tnn.Parameter(torch.zeros(1, channel_size, 1))
        self.eps = eps

    def forward(self, y):
        mean = y.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True)
        var = torch.pow(y - mean, 2).mean(dim=1, keepdim=True).mean(dim=2, keepdim=True)
        return self.gamma * (y - mean) / torch.pow(var + self.eps, 0.5) + self.beta


class ConvBlock(tnn.Module):
    def __init__(self, io_channels, hidden_channels, kernel_size, padding, dilation, no_residual):
        super().__init__()
        self.conv_layers = tnn.Sequential(
            tnn.Conv1d(io_channels, hidden_channels, 1),
            tnn.PReLU(),
            GlobalLayerNorm(hidden_channels),
            tnn.Conv1d(hidden_channels, hidden_channels, kernel_size, padding=padding,
                       dilation=dilation, groups=hidden_channels),
            tnn.PReLU(),
            GlobalLayerNorm(hidden_channels))
        self.res_out = None if no_residual else tnn.Conv1d(hidden_channels, io_channels, 1)
        self.skip_out = tnn.Conv1d(hidden_channels, io_channels, 1)

    def forward(self, input):
        feature = self.conv_layers(input)
        residual = None if self.res_out is None else self.res_out(feature)
        return residual, self.skip_out(feature)


class MaskGenerator(tnn.Module):
    def __init__(self, input_dim, num_sources, kernel_size, num_feats, num_hidden, num_layers, num_stacks):
        super().__init__()
        self.input_dim = input_dim
        self.num_sources = num_sources
        self.input_norm = GlobalLayerNorm(input_dim)
        self.input_conv = tnn.Conv1d(input_dim, num_feats, 1)
        self.conv_layers = tnn.ModuleList()
        for s in range(num_stacks):
            for l in range(num_layers):
                multi = 2 ** l
                self.conv_layers.append(ConvBlock(
                    num_feats, num_hidden, kernel_size, multi * (kernel_size - 1) // 2, multi,
                    no_residual=l == num_layers - 1 and s == num_stacks - 1))
        self.output_prelu = tnn.PReLU()
        self.output_conv = tnn.Conv1d(num_feats, input_dim * num_sources, 1)
        self.mask_activate = tnn.Sigmoid()

    def forward(self, input):
        batch_size = input.shape[0]
        feats = self.input_conv(self.input_norm(input))
        output = 0.0
        for layer in self.conv_layers:
            residual, skip = layer(feats)
            if residual is not None:
                feats = feats + residual
            output = output + skip
        output = self.output_conv(self.output_prelu(output))
        return self.mask_activate(output).view(batch_size, self.num_sources, self.input_dim, -1)


class ConvTasNet(tnn.Module):
    def __init__(self, num_sources, enc_kernel_size, enc_num_feats, msk_kernel_size, msk_num_feats,
                 msk_num_hidden, msk_num_layers, msk_num_stacks):
        super().__init__()
        self.num_sources = num_sources
        self.enc_num_feats = enc_num_feats
        self.enc_kernel_size = enc_kernel_size
        self.enc_stride = enc_kernel_size // 2
        self.encoder = tnn.Conv1d(1, enc_num_feats, enc_kernel_size, stride=self.enc_stride,
                                  padding=self.enc_stride, bias=False)
        self.mask_generator = MaskGenerator(enc_num_feats, num_sources, msk_kernel_size, msk_num_feats,
                                            msk_num_hidden, msk_num_layers, msk_num_stacks)
        self.decoder = tnn.ConvTranspose1d(enc_num_feats, 1, enc_kernel_size, stride=self.enc_stride,
                                           padding=self.enc_stride, bias=False)

    def _align_num_frames_with_strides(self, input):
        batch_size, num_channels, num_frames = input.shape
        num_remainings = num_frames % self.enc_stride
        if num_remainings == 0:
            return input, 0
        num_paddings = self.enc_stride - num_remainings
        pad = torch.zeros(batch_size, num_channels, num_paddings, dtype=input.dtype, device=input.device)
        return torch.cat([input, pad], 2), num_paddings

    def forward(self, input):
        padded, num_pads = self._align_num_frames_with_strides(input)
        batch_size, num_padded_frames = padded.shape[0], padded.shape[2]
        feats = torch.relu(self.encoder(padded))
        masked = self.mask_generator(feats) * feats.unsqueeze(1)
        masked = masked.view(batch_size * self.num_sources, self.enc_num_feats, -1)
        decoded = self.decoder(masked)
        output = decoded.view(batch_size, self.num_sources, num_padded_frames)
        if num_pads > 0:
            output = output[..., :-num_pads]
        return output


# ---- Flax (a plain function over (batch, frames, features))

SOURCES, WINDOW, FEATS, TAPS, NARROW, WIDE, DEPTH, STACKS = 2, 6, 10, 3, 7, 9, 3, 2
HOP = WINDOW // 2


def leaky(x, slope):
    return jnp.where(x > 0, x, slope * x)


def whole_norm(x, p, eps=1e-8):
    mean = x.mean((1, 2), keepdims=True)
    var = jnp.square(x - mean).mean((1, 2), keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + eps) * p["scale"] + p["shift"]


def affine(x, p):
    return x @ p["w"] + p["b"]


def depthwise(x, p, rate):
    """Same-size depthwise convolution as a sum over taps; p["w"] is (taps, features)."""
    taps, frames = p["w"].shape[0], x.shape[1]
    side = rate * (taps - 1) // 2
    x = jnp.pad(x, ((0, 0), (side, side), (0, 0)))
    return sum(x[:, t * rate:t * rate + frames] * p["w"][t] for t in range(taps)) + p["b"]


def block(x, p, rate):
    y = whole_norm(leaky(affine(x, p["widen"]), p["slope1"]), p["norm1"])
    y = whole_norm(leaky(depthwise(y, p["depth"], rate), p["slope2"]), p["norm2"])
    stay = x + affine(y, p["stay"]) if "stay" in p else x
    return stay, affine(y, p["skip"])


def masks_of(params, feats):
    x = affine(whole_norm(feats, params["norm"]), params["enter"])
    total = jnp.zeros_like(x)
    for i, p in enumerate(params["blocks"]):
        x, skip = block(x, p, 2 ** (i % DEPTH))
        total = total + skip
    y = affine(leaky(total, params["slope"]), params["leave"])
    b, t, _ = y.shape
    return jax.nn.sigmoid(y).reshape(b, t, SOURCES, FEATS)


def separate(params, wave):
    """wave (batch, 1, samples) -> (batch, sources, samples)"""
    wave = wave[:, 0]
    samples = wave.shape[1]
    tail = -samples % HOP
    padded = jnp.pad(wave, ((0, 0), (HOP, tail + HOP)))
    frames = (padded.shape[1] - WINDOW) // HOP + 1
    where = np.arange(frames)[:, None] * HOP + np.arange(WINDOW)
    feats = jax.nn.relu(padded[:, where] @ params["analysis"])
    masked = masks_of(params, feats) * feats[:, :, None]
    pieces = jnp.einsum("btsf,fw->bstw", masked, params["synthesis"])
    out = jnp.zeros(pieces.shape[:2] + (padded.shape[1],), pieces.dtype)
    out = out.at[:, :, where].add(pieces)
    return out[:, :, HOP:HOP + samples]


def port_weights(net):
    arr = lambda t: jnp.asarray(t.detach().numpy())
    point = lambda m: {"w": arr(m.weight)[:, :, 0].T, "b": arr(m.bias)}
    norm = lambda m: {"scale": arr(m.gamma)[0, :, 0], "shift": arr(m.beta)[0, :, 0]}
    gen = net.mask_generator
    blocks = []
    for m in gen.conv_layers:
        seq = m.conv_layers
        p = {"widen": point(seq[0]), "slope1": arr(seq[1].weight), "norm1": norm(seq[2]),
             "depth": {"w": arr(seq[3].weight)[:, 0].T, "b": arr(seq[3].bias)},
             "slope2": arr(seq[4].weight), "norm2": norm(seq[5]), "skip": point(m.skip_out)}
        if m.res_out is not None:
            p["stay"] = point(m.res_out)
        blocks.append(p)
    return separate, {
        "analysis": arr(net.encoder.weight)[:, 0].T,
        "norm": norm(gen.input_norm),
        "enter": point(gen.input_conv),
        "blocks": blocks,
        "slope": arr(gen.output_prelu.weight),
        "leave": point(gen.output_conv),
        "synthesis": arr(net.decoder.weight)[:, 0],
    }


def build(seed):
    torch.manual_seed(seed)
    net = ConvTasNet(SOURCES, WINDOW, FEATS, TAPS, NARROW, WIDE, DEPTH, STACKS).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("gamma"):
                p.copy_(0.6 + 0.8 * torch.rand_like(p))
            elif p.numel() == 1:
                p.copy_(0.1 + 0.3 * torch.rand_like(p))
            elif p.dim() == 1 or name.endswith("beta"):
                p.copy_(0.3 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * 1.2 / p[0].numel() ** 0.5)
    wave = np.random.RandomState(seed + 1).randn(3, 1, 41).astype(np.float32)
    wave[1, :, 26:] = 0.0   # a shorter recording, filled up with silence
    return {"torch": net, "flax": port_weights(net), "inputs": (wave,)}


FAULTS = [
    {"title": "the dilation goes on doubling in the second stack instead of starting from 1",
     "edits": [("block(x, p, 2 ** (i % DEPTH))", "block(x, p, 2 ** i)")],
     "layers": ["mask_generator.conv_layers.3.conv_layers.3", "mask_generator.conv_layers.4.conv_layers.3",
                "mask_generator.conv_layers.5.conv_layers.3"],
     "between": None, "causes": ["dilation"], "level": "outputs"},
    {"title": "the global norm takes its variance over features only (its mean over features and time)",
     "edits": [("var = jnp.square(x - mean).mean((1, 2), keepdims=True)",
                "var = jnp.square(x - mean).mean(-1, keepdims=True)")],
     "layers": ["mask_generator.input_norm"]
     + [f"mask_generator.conv_layers.{i}.conv_layers.{j}" for i in range(6) for j in (2, 5)],
     "between": None, "causes": ["axis", "norm_kind"], "level": "outputs"},
    {"title": "the masks are made of the residual stream instead of the sum of the skips",
     "edits": [("leaky(total, params[\"slope\"])", "leaky(x, params[\"slope\"])")],
     "layers": ["mask_generator", "mask_generator.output_prelu"],
     "between": ("mask_generator.conv_layers.5", "mask_generator.output_prelu"),
     "causes": ["operand", "wiring"], "level": "outputs"},
    {"title": "the decoder's surplus is cut off at the end only, not on both sides",
     "edits": [("return out[:, :, HOP:HOP + samples]", "return out[:, :, :samples]")],
     "layers": ["decoder", ""], "between": ("mask_generator", "the output"),
     "causes": ["padding", "offset"], "level": "outputs"},
    {"title": "relu as a maximum with 0, which halves the gradient where silence gives exactly 0",
     "edits": [('jax.nn.relu(padded[:, where] @ params["analysis"])',
                'jnp.maximum(padded[:, where] @ params["analysis"], 0.0)')],
     "layers": ["encoder", ""], "between": ("encoder", "mask_generator"),
     "causes": ["kink", "activation"], "level": "gradients"},
]
