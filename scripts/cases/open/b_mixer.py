"""MLP-Mixer with one token MLP shared by all blocks and gMLP spatial gating in the channel MLP; patches cut by hand."""
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F


@dataclasses.dataclass(frozen=True)
class MixerConfig:
    image: tuple = (12, 16)
    patch: int = 4
    dim: int = 20
    token_hidden: int = 14
    channel_hidden: int = 32
    depth: int = 3
    classes: int = 7

    @property
    def tokens(self):
        return (self.image[0] // self.patch) * (self.image[1] // self.patch)


class FeedForward(torch.nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = torch.nn.Linear(dim, hidden)
        self.act = torch.nn.GELU()
        self.fc2 = torch.nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class SpatialGatingUnit(torch.nn.Module):
    def __init__(self, hidden, tokens):
        super().__init__()
        self.norm = torch.nn.LayerNorm(hidden // 2)
        self.spatial_proj = torch.nn.Conv1d(tokens, tokens, kernel_size=1)

    def forward(self, x):
        u, v = x.chunk(2, dim=-1)
        v = self.spatial_proj(self.norm(v))
        return u * (v + 1.0)


class MixerBlock(torch.nn.Module):
    def __init__(self, cfg, token_mlp):
        super().__init__()
        self.norm1 = torch.nn.LayerNorm(cfg.dim)
        self.token_mlp = token_mlp
        self.norm2 = torch.nn.LayerNorm(cfg.dim)
        self.channel_in = torch.nn.Linear(cfg.dim, cfg.channel_hidden)
        self.sgu = SpatialGatingUnit(cfg.channel_hidden, cfg.tokens)
        self.channel_out = torch.nn.Linear(cfg.channel_hidden // 2, cfg.dim)

    def forward(self, x):
        x = x + self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        y = F.gelu(self.channel_in(self.norm2(x)))
        return x + self.channel_out(self.sgu(y))


class Mixer(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed = torch.nn.Linear(3 * cfg.patch ** 2, cfg.dim)
        shared = FeedForward(cfg.tokens, cfg.token_hidden)
        self.blocks = torch.nn.ModuleList([MixerBlock(cfg, shared) for _ in range(cfg.depth)])
        self.norm = torch.nn.LayerNorm(cfg.dim)
        self.head = torch.nn.Linear(cfg.dim, cfg.classes, bias=False)
        self.log_temperature = torch.nn.Parameter(torch.zeros(()))

    def forward(self, images):
        p = self.cfg.patch
        x = F.unfold(images, kernel_size=p, stride=p).transpose(1, 2)
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        x = F.normalize(self.norm(x).mean(dim=1), dim=-1)
        return self.head(x) * self.log_temperature.exp().clamp(max=20.0)


# ------------------------------------------------------------------ Linen


def extract_patches(images, p):
    b, h, w, c = images.shape
    x = images.reshape(b, h // p, p, w // p, p, c)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, (h // p) * (w // p), c * p * p)


class MlpBlock(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(self.hidden)(x)
        y = nn.gelu(y, approximate=False)
        return nn.Dense(x.shape[-1])(y)


class GatingUnit(nn.Module):
    @nn.compact
    def __call__(self, x):
        n = x.shape[1]
        u, v = jnp.split(x, 2, axis=-1)
        v = nn.LayerNorm(epsilon=1e-5, name="norm")(v)
        v = jnp.swapaxes(nn.Dense(n, name="spatial")(jnp.swapaxes(v, 1, 2)), 1, 2)
        return u * (v + 1.0)


class FlaxMixerBlock(nn.Module):
    cfg: MixerConfig

    @nn.compact
    def __call__(self, x, token_mlp):
        y = nn.LayerNorm(epsilon=1e-5, name="token_norm")(x)
        y = jnp.swapaxes(y, 1, 2)
        y = token_mlp(y)
        x = x + jnp.swapaxes(y, 1, 2)
        z = nn.LayerNorm(epsilon=1e-5, name="channel_norm")(x)
        z = nn.gelu(nn.Dense(self.cfg.channel_hidden, name="channel_in")(z), approximate=False)
        z = nn.Dense(self.cfg.dim, name="channel_out")(GatingUnit(name="gate")(z))
        return x + z


class FlaxMixer(nn.Module):
    cfg: MixerConfig

    @nn.compact
    def __call__(self, images):
        cfg = self.cfg
        x = nn.Dense(cfg.dim, name="stem")(extract_patches(images, cfg.patch))
        token_mlp = MlpBlock(cfg.token_hidden, name="token_mlp")
        for i in range(cfg.depth):
            x = FlaxMixerBlock(cfg, name=f"MixerBlock_{i}")(x, token_mlp)
        x = nn.LayerNorm(epsilon=1e-5, name="pre_head_norm")(x)
        x = x.mean(axis=1)
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        temperature = jnp.exp(self.param("log_temperature", nn.initializers.zeros, ()))
        x = nn.Dense(cfg.classes, use_bias=False, name="head")(x)
        return x * jnp.minimum(temperature, 20.0)


def port(net):
    def arr(t):
        return jnp.asarray(t.detach().numpy())

    def dense(m):
        p = {"kernel": arr(m.weight).T}
        if m.bias is not None:
            p["bias"] = arr(m.bias)
        return p

    def norm(m):
        return {"scale": arr(m.weight), "bias": arr(m.bias)}

    def mlp(m):
        return {"Dense_0": dense(m.fc1), "Dense_1": dense(m.fc2)}

    params = {
        "stem": dense(net.embed),
        "token_mlp": mlp(net.blocks[0].token_mlp),
        "pre_head_norm": norm(net.norm),
        "head": dense(net.head),
        "log_temperature": arr(net.log_temperature),
    }
    for i, b in enumerate(net.blocks):
        spatial = {"kernel": arr(b.sgu.spatial_proj.weight)[..., 0].T, "bias": arr(b.sgu.spatial_proj.bias)}
        params[f"MixerBlock_{i}"] = {
            "token_norm": norm(b.norm1),
            "channel_norm": norm(b.norm2),
            "channel_in": dense(b.channel_in),
            "gate": {"norm": norm(b.sgu.norm), "spatial": spatial},
            "channel_out": dense(b.channel_out),
        }
    return {"params": params}


def build(seed):
    torch.manual_seed(seed)
    cfg = MixerConfig()
    net = Mixer(cfg).eval()
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
        net.log_temperature.fill_(3.3)
    images = np.random.default_rng(seed).normal(size=(2, 3, *cfg.image))
    return {"torch": net, "flax": (FlaxMixer(cfg), port(net)), "inputs": images,
            "flax_inputs": np.moveaxis(images, 1, -1)}


FAULTS = [
    {
        "title": "pixels of a patch flattened channel last",
        "edits": [("x.transpose(0, 1, 3, 5, 2, 4).reshape", "x.transpose(0, 1, 3, 2, 4, 5).reshape")],
        "layers": ["", "embed"],
        "between": (None, "embed"),
        "causes": ["flatten", "rearranged"],
        "level": "outputs",
    },
    {
        "title": "a token MLP of its own in every block",
        "edits": [('        token_mlp = MlpBlock(cfg.token_hidden, name="token_mlp")\n        for i in range(cfg.depth):',
                   '        for i in range(cfg.depth):\n            token_mlp = MlpBlock(cfg.token_hidden, name=f"token_mlp_{i}")'),
                  ('        "token_mlp": mlp(net.blocks[0].token_mlp),',
                   '        **{f"token_mlp_{i}": mlp(b.token_mlp) for i, b in enumerate(net.blocks)},')],
        "layers": ["blocks.0.token_mlp", "blocks.0.token_mlp.fc1", "blocks.0.token_mlp.fc2"],
        "causes": ["tied"],
        "level": "gradients",
    },
    {
        "title": "statistics of the first norm taken over the tokens",
        "edits": [('y = nn.LayerNorm(epsilon=1e-5, name="token_norm")(x)\n        y = jnp.swapaxes(y, 1, 2)',
                   'y = nn.LayerNorm(epsilon=1e-5, name="token_norm", reduction_axes=1, feature_axes=-1)(x)\n        y = jnp.swapaxes(y, 1, 2)')],
        "layers": ["blocks.0.norm1"],
        "causes": ["axis"],
        "level": "outputs",
    },
    {
        "title": "gating unit gates with the first half",
        "edits": [("u, v = jnp.split(x, 2, axis=-1)", "v, u = jnp.split(x, 2, axis=-1)")],
        "layers": ["blocks.0.sgu"],
        "between": ("blocks.0.channel_in", "blocks.0.sgu.norm"),
        "causes": ["operand", "blocks", "swapped"],
        "level": "outputs",
    },
    {
        "title": "last LayerNorm without bias",
        "edits": [('nn.LayerNorm(epsilon=1e-5, name="pre_head_norm")', 'nn.LayerNorm(epsilon=1e-5, use_bias=False, name="pre_head_norm")')],
        "layers": ["norm"],
        "causes": ["missing_bias", "bias_missing"],
        "level": "outputs",
    },
    {
        "title": "head computed in bfloat16",
        "edits": [('nn.Dense(cfg.classes, use_bias=False, name="head")', 'nn.Dense(cfg.classes, use_bias=False, dtype=jnp.bfloat16, name="head")')],
        "layers": ["head"],
        "causes": ["dtype"],
        "level": "outputs",
    },
    {
        "title": "temperature not bounded above",
        "edits": [("return x * jnp.minimum(temperature, 20.0)", "return x * temperature")],
        "layers": [""],
        "between": ("head", None),
        "causes": ["left_out", "constant", "scale"],
        "level": "outputs",
    },
    {
        "title": "spatial projection's square kernel not transposed",
        "edits": [("arr(b.sgu.spatial_proj.weight)[..., 0].T", "arr(b.sgu.spatial_proj.weight)[..., 0]")],
        "layers": ["blocks.0.sgu.spatial_proj"],
        "causes": ["transposed"],
        "level": "outputs",
    },
]
