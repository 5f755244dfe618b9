"""Gated PixelCNN: vertical and horizontal stacks of masked convs, class condition, 1x1 head."""
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F


class MaskedConv2d(torch.nn.Conv2d):
    """Type "A" hides the centre, "B" shows it; the vertical stack sees whole rows."""

    def __init__(self, cin, cout, k, mask_type, vertical):
        super().__init__(cin, cout, k, padding=(k[0] // 2, k[1] // 2))
        mask = torch.ones(k)
        r, c = k[0] // 2, k[1] // 2
        if vertical:
            mask[r + (mask_type == "B"):] = 0
        else:
            mask[r + 1:] = 0
            mask[r, c + (mask_type == "B"):] = 0
        self.register_buffer("mask", mask[None, None])

    def forward(self, x):
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class GatedActivation(torch.nn.Module):
    def forward(self, x):
        a, b = x.chunk(2, dim=1)
        return torch.tanh(a) * torch.sigmoid(b)


class GatedBlock(torch.nn.Module):
    def __init__(self, cin, ch, k, mask_type, n_classes, residual):
        super().__init__()
        self.residual = residual
        self.vert = MaskedConv2d(cin, 2 * ch, (k, k), mask_type, True)
        self.horiz = MaskedConv2d(cin, 2 * ch, (1, k), mask_type, False)
        self.vert_to_horiz = torch.nn.Conv2d(2 * ch, 2 * ch, 1)
        self.horiz_out = torch.nn.Conv2d(ch, ch, 1)
        self.class_cond = torch.nn.Embedding(n_classes, 2 * ch)
        self.gate = GatedActivation()

    def forward(self, v, h, label):
        cond = self.class_cond(label)[:, :, None, None]
        v_new = self.vert(v)
        out_v = self.gate(v_new + cond)
        x = self.horiz(h) + self.vert_to_horiz(v_new)
        out_h = self.horiz_out(self.gate(x + cond))
        return out_v, out_h + h if self.residual else out_h


class GatedPixelCNN(torch.nn.Module):
    def __init__(self, levels=6, ch=5, n_classes=4, layers=3):
        super().__init__()
        self.embedding = torch.nn.Embedding(levels, ch)
        self.layers = torch.nn.ModuleList([
            GatedBlock(ch, ch, 5 if i == 0 else 3, "A" if i == 0 else "B", n_classes, i > 0) for i in range(layers)])
        self.head = torch.nn.Sequential(torch.nn.Conv2d(ch, 9, 1), torch.nn.ReLU(), torch.nn.Conv2d(9, levels, 1))

    def forward(self, image, label):
        v = h = self.embedding(image).permute(0, 3, 1, 2)
        for layer in self.layers:
            v, h = layer(v, h, label)
        return self.head(h)


# -------- flax.linen; everything NHWC


def stack_mask(kh, kw, kind, vertical):
    row = np.arange(kh)[:, None] - kh // 2
    col = np.arange(kw)[None, :] - kw // 2
    seen = 1 if kind == "B" else 0
    if vertical:
        visible = row + 0 * col < seen
    else:
        visible = (row < 0) | ((row == 0) & (col < seen))
    return visible[:, :, None, None]


class CausalConv(nn.Module):
    features: int
    window: tuple
    kind: str
    vertical: bool

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (*self.window, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        kernel = kernel * stack_mask(*self.window, self.kind, self.vertical)
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + bias


def gated(x):
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.tanh(a) * nn.sigmoid(b)


class PixelBlock(nn.Module):
    channels: int
    k: int
    kind: str
    classes: int

    @nn.compact
    def __call__(self, v, h, label):
        ch = self.channels
        cond = nn.Embed(self.classes, 2 * ch, name="cond")(label)[:, None, None, :]
        v_pre = CausalConv(2 * ch, (self.k, self.k), self.kind, True, name="vertical")(v)
        h_pre = CausalConv(2 * ch, (1, self.k), self.kind, False, name="horizontal")(h)
        h_pre = h_pre + nn.Conv(2 * ch, (1, 1), name="v_to_h")(v_pre)
        out = nn.Conv(ch, (1, 1), name="h_out")(gated(h_pre + cond))
        if self.kind == "B":
            out = out + h
        return gated(v_pre + cond), out


class PixelCNN(nn.Module):
    levels: int = 6
    channels: int = 5
    classes: int = 4
    depth: int = 3

    @nn.compact
    def __call__(self, image, label):
        x = nn.Embed(self.levels, self.channels, name="pixels")(image)
        v, h = x, x
        for i in range(self.depth):
            first = i == 0
            block = PixelBlock(self.channels, 5 if first else 3, "A" if first else "B", self.classes, name=f"block{i}")
            v, h = block(v, h, label)
        h = nn.relu(nn.Conv(9, (1, 1), name="head0")(h))
        return nn.Conv(self.levels, (1, 1), name="head1")(h)


def params_from(sd):
    def conv(key):
        return {"kernel": jnp.asarray(sd[key + ".weight"].transpose(2, 3, 1, 0)), "bias": jnp.asarray(sd[key + ".bias"])}

    out = {"pixels": {"embedding": jnp.asarray(sd["embedding.weight"])}, "head0": conv("head.0"), "head1": conv("head.2")}
    for i in range(3):
        pre = f"layers.{i}."
        out[f"block{i}"] = {
            "vertical": conv(pre + "vert"),
            "horizontal": conv(pre + "horiz"),
            "v_to_h": conv(pre + "vert_to_horiz"),
            "h_out": conv(pre + "horiz_out"),
            "cond": {"embedding": jnp.asarray(sd[pre + "class_cond.weight"])},
        }
    return out


def build(seed):
    torch.manual_seed(seed)
    net = GatedPixelCNN().eval()
    for name, p in net.named_parameters():
        p.data.normal_(0, 0.3 if p.dim() == 4 else 0.6)
    rng = np.random.default_rng(seed)
    image, label = rng.integers(0, 6, (2, 7, 8)), rng.integers(0, 4, (2,))
    variables = {"params": params_from({k: v.numpy() for k, v in net.state_dict().items()})}
    return {"torch": net, "flax": (PixelCNN(), variables), "inputs": (image, label)}


FAULTS = [
    {
        "title": "masks applied once, when the weights are loaded, and not in the forward pass",
        "edits": [
            ("        kernel = kernel * stack_mask(*self.window, self.kind, self.vertical)\n", ""),
            ("            \"vertical\": conv(pre + \"vert\"),\n            \"horizontal\": conv(pre + \"horiz\"),\n",
             "            \"vertical\": masked(conv(pre + \"vert\"), i, True),\n            \"horizontal\": masked(conv(pre + \"horiz\"), i, False),\n"),
            ("    out = {\"pixels\":", "    def masked(p, i, vertical):\n        m = stack_mask(*p[\"kernel\"].shape[:2], \"B\" if i else \"A\", vertical)\n        return {\"kernel\": p[\"kernel\"] * m, \"bias\": p[\"bias\"]}\n\n    out = {\"pixels\":"),
        ],
        "layers": ["layers.0.vert", "layers.0.horiz"],
        "causes": ["mask"],
        "level": "gradients",
    },
    {
        "title": "the first layer has a mask of type B and sees its own pixel",
        "edits": [("seen = 1 if kind == \"B\" else 0", "seen = 1")],
        "layers": ["layers.0.vert", "layers.0.horiz"],
        "causes": ["mask", "causal", "offset"],
        "level": "outputs",
    },
    {
        "title": "vertical features reach the horizontal stack with the condition already added",
        "edits": [("nn.Conv(2 * ch, (1, 1), name=\"v_to_h\")(v_pre)", "nn.Conv(2 * ch, (1, 1), name=\"v_to_h\")(v_pre + cond)")],
        "layers": ["layers.0"],
        "between": ("layers.0.vert", "layers.0.vert_to_horiz"),
        "causes": ["operand", "wiring", "order"],
        "level": "outputs",
    },
    {
        "title": "tanh and sigmoid on each other's half",
        "edits": [("return jnp.tanh(a) * nn.sigmoid(b)", "return nn.sigmoid(a) * jnp.tanh(b)")],
        "layers": ["layers.0.gate"],
        "between": ("layers.0.vert", "layers.0.horiz_out"),
        "causes": ["swapped", "gates", "activation"],
        "level": "outputs",
    },
    {
        "title": "the input is added in the first layer too",
        "edits": [("        if self.kind == \"B\":\n            out = out + h\n", "        out = out + h\n")],
        "layers": ["layers.0"],
        "between": ("layers.0.horiz_out", "layers.1.horiz"),
        "causes": ["residual"],
        "level": "outputs",
    },
]
