"""A small Stable-Diffusion-like U-Net (time embedding, cross-attention, GEGLU, down and up) and an NHWC Linen port."""
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

CH_IN, CH1, CH2, CONTEXT, HEADS, GROUPS, TIME = 3, 8, 12, 7, 3, 4, 10


# ------------------------------------------------------------------ PyTorch


class Timesteps(torch.nn.Module):
    def __init__(self, num_channels, flip_sin_to_cos=True, downscale_freq_shift=0):
        super().__init__()
        self.num_channels, self.flip, self.shift = num_channels, flip_sin_to_cos, downscale_freq_shift

    def forward(self, timesteps):
        half = self.num_channels // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=timesteps.dtype) / (half - self.shift)
        emb = timesteps[:, None] * torch.exp(exponent)[None, :]
        parts = [torch.sin(emb), torch.cos(emb)]
        return torch.cat(parts[::-1] if self.flip else parts, dim=-1)


class TimestepEmbedding(torch.nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.linear_1, self.act, self.linear_2 = torch.nn.Linear(dim, out), torch.nn.SiLU(), torch.nn.Linear(out, out)

    def forward(self, sample):
        return self.linear_2(self.act(self.linear_1(sample)))


class ResnetBlock2D(torch.nn.Module):
    def __init__(self, cin, cout, dropout=0.1):
        super().__init__()
        self.norm1 = torch.nn.GroupNorm(GROUPS, cin)
        self.conv1 = torch.nn.Conv2d(cin, cout, 3, padding=1)
        self.time_emb_proj = torch.nn.Linear(15, cout)
        self.norm2 = torch.nn.GroupNorm(GROUPS, cout)
        self.dropout = torch.nn.Dropout(dropout)
        self.conv2 = torch.nn.Conv2d(cout, cout, 3, padding=1)
        self.nonlinearity = torch.nn.SiLU()
        self.conv_shortcut = torch.nn.Conv2d(cin, cout, 1)

    def forward(self, x, temb):
        h = self.conv1(self.nonlinearity(self.norm1(x)))
        h = h + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        h = self.conv2(self.dropout(self.nonlinearity(self.norm2(h))))
        return self.conv_shortcut(x) + h


class CrossAttention(torch.nn.Module):
    def __init__(self, dim, context_dim):
        super().__init__()
        self.to_q = torch.nn.Linear(dim, dim, bias=False)
        self.to_k = torch.nn.Linear(context_dim, dim, bias=False)
        self.to_v = torch.nn.Linear(context_dim, dim, bias=False)
        self.to_out = torch.nn.ModuleList([torch.nn.Linear(dim, dim)])

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        a = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        return self.to_out[0]((a @ v).transpose(1, 2).flatten(2))


class GEGLU(torch.nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.proj = torch.nn.Linear(dim, inner * 2)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * torch.nn.functional.gelu(gate)


class FeedForward(torch.nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.net = torch.nn.ModuleList([GEGLU(dim, inner), torch.nn.Linear(inner, dim)])

    def forward(self, x):
        return self.net[1](self.net[0](x))


class BasicTransformerBlock(torch.nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (torch.nn.LayerNorm(dim) for _ in range(3))
        self.attn1, self.attn2, self.ff = CrossAttention(dim, dim), CrossAttention(dim, CONTEXT), FeedForward(dim, 14)

    def forward(self, x, context):
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class Transformer2DModel(torch.nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = torch.nn.GroupNorm(GROUPS, dim, eps=1e-6)
        self.proj_in, self.proj_out = torch.nn.Conv2d(dim, dim, 1), torch.nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = torch.nn.ModuleList([BasicTransformerBlock(dim)])

    def forward(self, x, context):
        b, c, h, w = x.shape
        y = self.proj_in(self.norm(x)).permute(0, 2, 3, 1).reshape(b, h * w, c)
        y = self.transformer_blocks[0](y, context)
        return self.proj_out(y.reshape(b, h, w, c).permute(0, 3, 1, 2)) + x


class Upsample2D(torch.nn.Module):
    def __init__(self, cin):
        super().__init__()
        self.conv = torch.nn.Conv2d(cin, cin, 3, padding=1)

    def forward(self, x):
        return self.conv(torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet2DConditionModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = torch.nn.Conv2d(CH_IN, CH1, 3, padding=1)
        self.time_proj, self.time_embedding = Timesteps(TIME), TimestepEmbedding(TIME, 15)
        self.down_resnet = ResnetBlock2D(CH1, CH1)
        self.downsampler = torch.nn.Conv2d(CH1, CH1, 3, stride=2, padding=1)
        self.mid_resnet, self.mid_attention = ResnetBlock2D(CH1, CH2), Transformer2DModel(CH2)
        self.upsampler = Upsample2D(CH2)
        self.up_resnet = ResnetBlock2D(CH2 + CH1, CH1)
        self.conv_norm_out, self.conv_act = torch.nn.GroupNorm(GROUPS, CH1), torch.nn.SiLU()
        self.conv_out = torch.nn.Conv2d(CH1, CH_IN, 3, padding=1)

    def forward(self, sample, timesteps, encoder_hidden_states):
        emb = self.time_embedding(self.time_proj(timesteps.to(sample.dtype)))
        skip = self.down_resnet(self.conv_in(sample), emb)
        x = self.mid_resnet(self.downsampler(skip), emb)
        x = self.upsampler(self.mid_attention(x, encoder_hidden_states))
        x = self.up_resnet(torch.cat([x, skip], dim=1), emb)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))


# ------------------------------------------------------------------ Flax

Group = partial(nn.GroupNorm, num_groups=GROUPS, epsilon=1e-5, use_fast_variance=False)
Layer = partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)
Conv3 = partial(nn.Conv, kernel_size=(3, 3), padding=((1, 1), (1, 1)))


def sinusoids(steps, width, shift=0.0):
    half = width // 2
    rates = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=steps.dtype) / (half - shift))
    angles = jnp.outer(steps, rates)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


class Res(nn.Module):
    width: int
    rate: float = 0.1

    @nn.compact
    def __call__(self, x, time, train=False):
        y = Conv3(self.width, name="conv_a")(nn.silu(Group(name="norm_a")(x)))
        y += nn.Dense(self.width, name="time")(nn.silu(time))[:, None, None]
        y = nn.Dropout(self.rate, deterministic=not train)(nn.silu(Group(name="norm_b")(y)))
        return Conv3(self.width, name="conv_b")(y) + nn.Dense(self.width, name="skip")(x)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, context):
        width = x.shape[-1]
        heads = partial(nn.DenseGeneral, (HEADS, width // HEADS), use_bias=False)
        q, k, v = heads(name="q")(x), heads(name="k")(context), heads(name="v")(context)
        probs = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1]))
        return nn.DenseGeneral(width, axis=(-2, -1), name="o")(jnp.einsum("bhqk,bkhd->bqhd", probs, v))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, image, context):
        b, h, w, c = image.shape
        x = nn.Dense(c, name="enter")(Group(epsilon=1e-6, name="norm")(image)).reshape(b, h * w, c)
        y = Layer(name="norm_self")(x)
        x += Attention(name="self")(y, y)
        x += Attention(name="cross")(Layer(name="norm_cross")(x), context)
        wide = nn.Dense(2 * 14, name="wide")(Layer(name="norm_mlp")(x))
        value, gate = jnp.split(wide, 2, axis=-1)
        x += nn.Dense(c, name="narrow")(value * nn.gelu(gate, approximate=False))
        return image + nn.Dense(c, name="leave")(x).reshape(b, h, w, c)


class UNet(nn.Module):
    @nn.compact
    def __call__(self, image, steps, context, train=False):
        time = nn.Dense(15, name="time_a")(sinusoids(steps.astype(image.dtype), TIME))
        time = nn.Dense(15, name="time_b")(nn.silu(time))
        skip = Res(CH1, name="res_down")(Conv3(CH1, name="first")(image), time, train)
        x = nn.Conv(CH1, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)), name="shrink")(skip)
        x = Res(CH2, name="res_mid")(x, time, train)
        x = Transformer(name="attend")(x, context)
        x = Conv3(CH2, name="grow")(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        x = Res(CH1, name="res_up")(jnp.concatenate([x, skip], axis=-1), time, train)
        return Conv3(CH_IN, name="last")(nn.silu(Group(name="norm_last")(x)))


# ------------------------------------------------------------------ weights


def port(net):
    def a(tensor, *shape):
        array = tensor.detach().numpy()
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        return jnp.asarray(array.reshape(shape) if shape else array)

    def lin(m):
        return {"kernel": a(m.weight), "bias": a(m.bias)}

    def pointwise(m):
        return {"kernel": a(m.weight)[0, 0], "bias": a(m.bias)}

    def norm(m):
        return {"scale": a(m.weight), "bias": a(m.bias)}

    def res(m):
        return {"norm_a": norm(m.norm1), "conv_a": lin(m.conv1), "time": lin(m.time_emb_proj),
                "norm_b": norm(m.norm2), "conv_b": lin(m.conv2), "skip": pointwise(m.conv_shortcut)}

    def attention(m):
        head = m.to_q.out_features // HEADS
        return {"q": {"kernel": a(m.to_q.weight, -1, HEADS, head)}, "k": {"kernel": a(m.to_k.weight, -1, HEADS, head)},
                "v": {"kernel": a(m.to_v.weight, -1, HEADS, head)},
                "o": {"kernel": a(m.to_out[0].weight, HEADS, head, -1), "bias": a(m.to_out[0].bias)}}

    t = net.mid_attention
    b = t.transformer_blocks[0]
    return {"params": {
        "time_a": lin(net.time_embedding.linear_1), "time_b": lin(net.time_embedding.linear_2),
        "first": lin(net.conv_in), "res_down": res(net.down_resnet), "shrink": lin(net.downsampler),
        "res_mid": res(net.mid_resnet), "grow": lin(net.upsampler.conv), "res_up": res(net.up_resnet),
        "norm_last": norm(net.conv_norm_out), "last": lin(net.conv_out),
        "attend": {"norm": norm(t.norm), "enter": pointwise(t.proj_in), "leave": pointwise(t.proj_out),
                   "norm_self": norm(b.norm1), "norm_cross": norm(b.norm2), "norm_mlp": norm(b.norm3),
                   "self": attention(b.attn1), "cross": attention(b.attn2),
                   "wide": lin(b.ff.net[0].proj), "narrow": lin(b.ff.net[1])},
    }}


def build(seed):
    torch.manual_seed(seed)
    net = UNet2DConditionModel().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "norm" in name and name.endswith("weight"):
                p.copy_(0.6 + torch.rand(p.shape))
            else:
                p.copy_(torch.randn(p.shape) * (0.3 if p.ndim == 1 else 1.2 / math.sqrt(p[0].numel())))
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((2, CH_IN, 6, 10)).astype(np.float32)
    context = rng.standard_normal((2, 5, CONTEXT)).astype(np.float32)
    steps = np.array([3, 41 + seed])
    return {"torch": net, "flax": (UNet(), port(net)), "inputs": (image, steps, context),
            "flax_inputs": (image.transpose(0, 2, 3, 1), steps, context)}


FAULTS = [
    {"title": "the gelu acts on the first half of the GEGLU, where torch's gate is the second",
     "edits": [("value, gate = jnp.split(wide, 2, axis=-1)", "gate, value = jnp.split(wide, 2, axis=-1)")],
     "layers": ["mid_attention.transformer_blocks.0.ff.net.0", "mid_attention.transformer_blocks.0.ff"],
     "between": ("mid_attention.transformer_blocks.0.ff.net.0.proj", "mid_attention.transformer_blocks.0.ff.net.1"),
     "causes": ["blocks", "swapped", "order"], "level": "outputs"},
    {"title": "the convolution that halves the image is padded 'SAME', after the image only",
     "edits": [('strides=(2, 2), padding=((1, 1), (1, 1)), name="shrink"', 'strides=(2, 2), padding="SAME", name="shrink"')],
     "layers": ["downsampler"],
     "between": ("down_resnet", "mid_resnet"),
     "causes": ["padding", "offset"], "level": "outputs"},
    {"title": "the frequencies of the time embedding are spread over half - 1 steps",
     "edits": [("def sinusoids(steps, width, shift=0.0):", "def sinusoids(steps, width, shift=1.0):")],
     "layers": ["time_proj"],
     "between": ("the input", "time_embedding"),
     "causes": ["constant", "offset"], "level": "outputs"},
    {"title": "the scale of the attention is folded into the weights of the queries, though the code divides too",
     "edits": [('"q": {"kernel": a(m.to_q.weight, -1, HEADS, head)}', '"q": {"kernel": a(m.to_q.weight, -1, HEADS, head) * head ** -0.5}')],
     "layers": ["mid_attention.transformer_blocks.0.attn1.to_q", "mid_attention.transformer_blocks.0.attn2.to_q"],
     "between": ("mid_attention.transformer_blocks.0.norm1", "mid_attention.transformer_blocks.0.attn1.to_out.0"),
     "causes": ["scale", "values", "weights"], "level": "bits"},
    {"title": "dropout is given the share that is kept, not the share that is dropped",
     "edits": [("rate: float = 0.1", "rate: float = 0.9")],
     "layers": ["down_resnet.dropout", "mid_resnet.dropout", "up_resnet.dropout"],
     "between": None,
     "causes": ["dropout", "training_attribute", "constant"], "level": "attributes"},
]
