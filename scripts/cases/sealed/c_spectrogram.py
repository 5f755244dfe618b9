"""An audio classifier: STFT, mel filters, log scale and PCEN side by side, a small CNN, attention pooling over time."""
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

N_FFT, WIN, HOP, N_MELS, RATE = 16, 12, 5, 7, 8000


def mel_filterbank():
    """Triangular HTK filters, (n_fft // 2 + 1, n_mels)."""
    to_mel = lambda f: 2595.0 * np.log10(1.0 + f / 700.0)
    to_hz = lambda m: 700.0 * (10.0 ** (m / 2595.0) - 1.0)
    points = to_hz(np.linspace(to_mel(0.0), to_mel(RATE / 2), N_MELS + 2))
    freqs = np.linspace(0, RATE / 2, N_FFT // 2 + 1)
    slopes = points[None, :] - freqs[:, None]
    down = -slopes[:, :-2] / np.diff(points)[:-1]
    up = slopes[:, 2:] / np.diff(points)[1:]
    return np.maximum(0.0, np.minimum(down, up)).astype(np.float32) + 0.01


class MelSpectrogram(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("window", torch.hann_window(WIN, dtype=torch.float64).float())
        self.register_buffer("fb", torch.from_numpy(mel_filterbank()))

    def forward(self, wave):
        spec = torch.stft(wave, N_FFT, HOP, WIN, window=self.window, center=True, pad_mode="reflect", return_complex=True)
        power = spec.real**2 + spec.imag**2
        return torch.matmul(power.transpose(1, 2), self.fb).transpose(1, 2)


class LogNorm(torch.nn.Module):
    def forward(self, mel):
        x = torch.log10(mel.clamp(min=1e-10))
        x = torch.maximum(x, x.amax(dim=(1, 2), keepdim=True) - 1.5)
        mean = x.mean(dim=-1, keepdim=True)
        std = x.std(dim=-1, keepdim=True, unbiased=False)
        return (x - mean) / (std + 1e-3)


class PCEN(torch.nn.Module):
    def __init__(self, bands):
        super().__init__()
        self.alpha = torch.nn.Parameter(torch.full((bands,), 0.9))
        self.delta = torch.nn.Parameter(torch.full((bands,), 2.0))
        self.root = torch.nn.Parameter(torch.full((bands,), 2.0))
        self.smooth = torch.nn.Parameter(torch.full((bands,), 0.1))

    def forward(self, mel):
        s = self.smooth.clamp(0.0, 1.0)
        state, states = mel[..., 0], []
        for t in range(mel.shape[-1]):
            state = (1.0 - s) * state + s * mel[..., t]
            states.append(state)
        m = torch.stack(states, dim=-1)
        alpha, delta = self.alpha[:, None], self.delta[:, None]
        power = 1.0 / self.root.clamp(min=1.0)[:, None]
        return (mel / (1e-6 + m) ** alpha + delta) ** power - delta**power


class AudioClassifier(torch.nn.Module):
    def __init__(self, channels=8, hidden=12, n_classes=5):
        super().__init__()
        self.melspec = MelSpectrogram()
        self.lognorm = LogNorm()
        self.pcen = PCEN(N_MELS)
        self.conv = torch.nn.Conv2d(2, channels, 3, padding=1)
        self.bn = torch.nn.BatchNorm2d(channels)
        self.drop = torch.nn.Dropout2d(0.15)
        self.pool = torch.nn.AvgPool2d(3, stride=2, padding=1)
        self.proj = torch.nn.Linear(channels * 4, hidden)
        self.score = torch.nn.Linear(hidden, 1)
        self.fc = torch.nn.Linear(hidden, n_classes)

    def forward(self, wave):
        mel = self.melspec(wave)
        x = torch.stack([self.lognorm(mel), self.pcen(mel)], dim=1)
        x = self.pool(self.drop(F.relu(self.bn(self.conv(x)))))
        x = x.permute(0, 3, 1, 2).flatten(2)
        x = torch.tanh(self.proj(x))
        w = torch.softmax(self.score(x), dim=1)
        return self.fc((w * x).sum(1))


def hann(n):
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)


def mel_power(wave):
    """(batch, time) -> (batch, frames, mels)"""
    half = N_FFT // 2
    wave = jnp.pad(wave, ((0, 0), (half, half)), mode="reflect")
    n_frames = 1 + (wave.shape[1] - N_FFT) // HOP
    idx = np.arange(n_frames)[:, None] * HOP + np.arange(N_FFT)[None]
    side = (N_FFT - WIN) // 2
    window = np.pad(hann(WIN).astype(np.float32), (side, N_FFT - WIN - side))
    spec = jnp.fft.rfft(wave[:, idx] * window, axis=-1)
    return (spec.real**2 + spec.imag**2) @ mel_filterbank()


def log_norm(mel):
    x = jnp.log10(jnp.maximum(mel, 1e-10))
    x = jnp.maximum(x, jnp.max(x, axis=(1, 2), keepdims=True) - 1.5)
    mean = jnp.mean(x, axis=1, keepdims=True)
    std = jnp.std(x, axis=1, keepdims=True)
    return (x - mean) / (std + 1e-3)


class FlaxPCEN(nn.Module):
    bands: int

    @nn.compact
    def __call__(self, mel):
        alpha = self.param("alpha", nn.initializers.constant(0.9), (self.bands,))
        delta = self.param("delta", nn.initializers.constant(2.0), (self.bands,))
        root = self.param("root", nn.initializers.constant(2.0), (self.bands,))
        smooth = self.param("smooth", nn.initializers.constant(0.1), (self.bands,))
        s = jnp.clip(smooth, 0.0, 1.0)

        def step(state, frame):
            state = (1.0 - s) * state + s * frame
            return state, state

        _, m = jax.lax.scan(step, mel[:, 0], mel.swapaxes(0, 1))
        power = 1.0 / jnp.maximum(root, 1.0)
        return (mel / (1e-6 + m.swapaxes(0, 1)) ** alpha + delta) ** power - delta**power


class FlaxAudioClassifier(nn.Module):
    channels: int = 8
    hidden: int = 12
    n_classes: int = 5

    @nn.compact
    def __call__(self, wave, train: bool = False):
        mel = mel_power(wave)
        x = jnp.stack([log_norm(mel), FlaxPCEN(N_MELS)(mel)], axis=-1)  # batch, time, mel, channel
        x = nn.Conv(self.channels, (3, 3), padding=1)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x))
        x = nn.Dropout(0.15, broadcast_dims=(1, 2), deterministic=not train)(x)
        x = nn.avg_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        x = x.swapaxes(2, 3).reshape(x.shape[0], x.shape[1], -1)
        x = jnp.tanh(nn.Dense(self.hidden)(x))
        w = jax.nn.softmax(nn.Dense(1)(x), axis=1)
        return nn.Dense(self.n_classes)(jnp.sum(w * x, axis=1))


def port(net):
    sd = {k: jnp.asarray(v.numpy()) for k, v in net.state_dict().items()}
    dense = lambda name: {"kernel": sd[name + ".weight"].T, "bias": sd[name + ".bias"]}
    params = {
        "FlaxPCEN_0": {name: sd["pcen." + name] for name in ("alpha", "delta", "root", "smooth")},
        "Conv_0": {"kernel": sd["conv.weight"].transpose(3, 2, 1, 0), "bias": sd["conv.bias"]},
        "BatchNorm_0": {"scale": sd["bn.weight"], "bias": sd["bn.bias"]},
        "Dense_0": dense("proj"),
        "Dense_1": dense("score"),
        "Dense_2": dense("fc"),
    }
    return {"params": params, "batch_stats": {"BatchNorm_0": {"mean": sd["bn.running_mean"], "var": sd["bn.running_var"]}}}


def build(seed):
    """The right pair with random weights and inputs that follow from the seed."""
    torch.manual_seed(seed)
    net = AudioClassifier().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.startswith("pcen."):
                p.mul_(0.7 + 0.6 * torch.rand_like(p))
            else:
                p.normal_(0.0, 0.4)
        net.pcen.smooth.add_(0.15)
        net.bn.running_mean.normal_(0.0, 0.5)
        net.bn.running_var.uniform_(0.5, 2.0)
    wave = np.random.default_rng(seed).normal(size=(2, 83)) * np.linspace(0.2, 2.0, 83)
    wave[1] *= 0.3
    return {"torch": net, "flax": (FlaxAudioClassifier(), port(net)), "inputs": wave.astype(np.float32)}


FAULTS = [
    {
        "title": "symmetric Hann window for the periodic one",
        "edits": [("np.cos(2 * np.pi * np.arange(n) / n)", "np.cos(2 * np.pi * np.arange(n) / (n - 1))")],
        "layers": ["melspec"],
        "between": (None, "pcen"),
        "causes": ["constant"],
        "level": "outputs",
    },
    {
        "title": "signal padded with zeros, not by reflection, before framing",
        "edits": [("jnp.pad(wave, ((0, 0), (half, half)), mode=\"reflect\")", "jnp.pad(wave, ((0, 0), (half, half)))")],
        "layers": ["melspec"],
        "between": (None, "pcen"),
        "causes": ["padding"],
        "level": "outputs",
    },
    {
        "title": "dynamic range cut below the loudest bin of the whole batch",
        "edits": [("jnp.max(x, axis=(1, 2), keepdims=True) - 1.5", "jnp.max(x) - 1.5")],
        "layers": ["lognorm"],
        "between": (None, "pcen"),
        "causes": ["axis"],
        "level": "outputs",
    },
    {
        "title": "the small number added to the variance and not to the deviation",
        "edits": [("std = jnp.std(x, axis=1, keepdims=True)\n    return (x - mean) / (std + 1e-3)", "std = jnp.std(x, axis=1, keepdims=True)\n    return (x - mean) / jnp.sqrt(std**2 + 1e-3)")],
        "layers": ["lognorm"],
        "between": (None, "pcen"),
        "causes": ["epsilon", "order"],
        "level": "outputs",
    },
    {
        "title": "smoother keeps s of its state and takes 1 - s of the frame",
        "edits": [("state = (1.0 - s) * state + s * frame", "state = s * state + (1.0 - s) * frame")],
        "layers": ["pcen"],
        "causes": ["operand", "swapped", "constant"],
        "level": "outputs",
    },
    {
        "title": "PCEN without the last difference",
        "edits": [("** alpha + delta) ** power - delta**power\n\n\nclass FlaxAudio", "** alpha + delta) ** power\n\n\nclass FlaxAudio")],
        "layers": ["pcen"],
        "causes": ["left_out", "residual"],
        "level": "outputs",
    },
    {
        "title": "average pool leaves the padding out of its count",
        "edits": [("strides=(2, 2), padding=((1, 1), (1, 1)))", "strides=(2, 2), padding=((1, 1), (1, 1)), count_include_pad=False)")],
        "layers": ["pool"],
        "between": ("bn", "proj"),
        "causes": ["pooling"],
        "level": "outputs",
    },
    {
        "title": "bands and channels flattened channel last",
        "edits": [("x = x.swapaxes(2, 3).reshape(x.shape[0], x.shape[1], -1)", "x = x.reshape(x.shape[0], x.shape[1], -1)")],
        "layers": [""],
        "between": ("bn", "proj"),
        "causes": ["flatten"],
        "level": "outputs",
    },
    {
        "title": "dropout of single values for dropout of whole channels",
        "edits": [("nn.Dropout(0.15, broadcast_dims=(1, 2), deterministic=not train)", "nn.Dropout(0.15, deterministic=not train)")],
        "layers": ["drop"],
        "causes": ["training_attribute"],
        "level": "attributes",
    },
]
