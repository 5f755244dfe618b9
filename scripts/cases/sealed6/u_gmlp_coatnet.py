"""A small CoAtNet with a gMLP tail: MBConv, attention with a relative position bias, a spatial gating unit."""
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

IMAGE, GRID, STEM, DIM, EXPAND, HEADS, HEAD_DIM, FF, GATE, CLASSES = (12, 16), (3, 4), 6, 10, 4, 2, 7, 23, 18, 5


# ---- PyTorch ---------------------------------------------------------------------------------
class SE(torch.nn.Module):
    def __init__(self, inp, oup, expansion=0.5):
        super().__init__()
        self.avg_pool = torch.nn.AdaptiveAvgPool2d(1)
        self.fc = torch.nn.Sequential(
            torch.nn.Linear(oup, int(inp * expansion), bias=False), torch.nn.GELU(),
            torch.nn.Linear(int(inp * expansion), oup, bias=False), torch.nn.Sigmoid())

    def forward(self, x):
        b, c, _, _ = x.size()
        return x * self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1)


class PreNorm(torch.nn.Module):
    def __init__(self, dim, fn, norm):
        super().__init__()
        self.norm, self.fn = norm(dim), fn

    def forward(self, x):
        return self.fn(self.norm(x))


class MBConv(torch.nn.Module):
    def __init__(self, inp, oup, expansion):
        super().__init__()
        hidden = inp * expansion
        self.pool = torch.nn.MaxPool2d(3, 2, 1)
        self.proj = torch.nn.Conv2d(inp, oup, 1, 1, 0, bias=False)
        self.conv = PreNorm(inp, torch.nn.Sequential(
            torch.nn.Conv2d(inp, hidden, 1, 2, 0, bias=False), torch.nn.BatchNorm2d(hidden), torch.nn.GELU(),
            torch.nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, bias=False),
            torch.nn.BatchNorm2d(hidden), torch.nn.GELU(), SE(inp, hidden),
            torch.nn.Conv2d(hidden, oup, 1, 1, 0, bias=False), torch.nn.BatchNorm2d(oup)), torch.nn.BatchNorm2d)

    def forward(self, x):
        return self.proj(self.pool(x)) + self.conv(x)


class Attention(torch.nn.Module):
    def __init__(self, dim, image_size, heads, dim_head):
        super().__init__()
        self.ih, self.iw = image_size
        self.heads, self.scale = heads, dim_head ** -0.5
        self.relative_bias_table = torch.nn.Parameter(torch.zeros((2 * self.ih - 1) * (2 * self.iw - 1), heads))
        coords = torch.stack(torch.meshgrid(torch.arange(self.ih), torch.arange(self.iw), indexing="ij")).flatten(1)
        relative = coords[:, :, None] - coords[:, None, :]
        relative[0] += self.ih - 1
        relative[1] += self.iw - 1
        relative[0] *= 2 * self.iw - 1
        self.register_buffer("relative_index", relative.sum(0).flatten())
        self.attend = torch.nn.Softmax(dim=-1)
        self.to_qkv = torch.nn.Linear(dim, heads * dim_head * 3, bias=False)
        self.to_out = torch.nn.Linear(heads * dim_head, dim)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.to_qkv(x).chunk(3, dim=-1))
        dots = torch.matmul(q, k.transpose(-1, -2)) * self.scale
        bias = self.relative_bias_table[self.relative_index].view(n, n, self.heads).permute(2, 0, 1)
        out = torch.matmul(self.attend(dots + bias), v)
        return self.to_out(out.transpose(1, 2).reshape(b, n, -1))


class Transformer(torch.nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.attn = PreNorm(dim, Attention(dim, GRID, HEADS, HEAD_DIM), torch.nn.LayerNorm)
        self.ff = PreNorm(dim, torch.nn.Sequential(
            torch.nn.Linear(dim, FF), torch.nn.GELU(), torch.nn.Linear(FF, dim)), torch.nn.LayerNorm)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.ff(x)


class SpatialGatingUnit(torch.nn.Module):
    def __init__(self, dim, seq_len):
        super().__init__()
        self.norm = torch.nn.LayerNorm(dim // 2)
        self.proj = torch.nn.Linear(seq_len, seq_len)

    def forward(self, x):
        u, v = x.chunk(2, dim=-1)
        v = self.proj(self.norm(v).transpose(-1, -2)).transpose(-1, -2)
        return u * v


class gMLPBlock(torch.nn.Module):
    def __init__(self, dim, dim_ff, seq_len):
        super().__init__()
        self.norm = torch.nn.LayerNorm(dim)
        self.proj_in = torch.nn.Sequential(torch.nn.Linear(dim, dim_ff), torch.nn.GELU())
        self.sgu = SpatialGatingUnit(dim_ff, seq_len)
        self.proj_out = torch.nn.Linear(dim_ff // 2, dim)

    def forward(self, x):
        return x + self.proj_out(self.sgu(self.proj_in(self.norm(x))))


class CoAtNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.s0 = torch.nn.Sequential(
            torch.nn.Conv2d(3, STEM, 3, 2, 1, bias=False), torch.nn.BatchNorm2d(STEM), torch.nn.GELU())
        self.s1 = MBConv(STEM, DIM, EXPAND)
        self.s2 = Transformer(DIM)
        self.s3 = gMLPBlock(DIM, GATE, GRID[0] * GRID[1])
        self.fc = torch.nn.Linear(DIM, CLASSES, bias=False)

    def forward(self, x):
        x = self.s1(self.s0(x))
        x = self.s3(self.s2(x.flatten(2).transpose(1, 2)))
        return self.fc(x.mean(dim=1))


# ---- Flax ------------------------------------------------------------------------------------
class RunningNorm(nn.Module):
    """BatchNorm as torch counts: statistics of n values are kept with n / (n - 1) times their variance."""
    keep: float = 0.9

    @nn.compact
    def __call__(self, x, train=False):
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        m, v = mean.value, var.value
        if train:
            m, v = x.mean((0, 1, 2)), x.var((0, 1, 2))
            n = x.size // x.shape[-1]
            mean.value = self.keep * mean.value + (1 - self.keep) * m
            var.value = self.keep * var.value + (1 - self.keep) * v * n / (n - 1)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        return (x - m) * jax.lax.rsqrt(v + 1e-5) * scale + bias


def gelu(x):
    return nn.gelu(x, approximate=False)


class InvertedBottleneck(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        wide = EXPAND * x.shape[-1]
        shortcut = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        shortcut = nn.Dense(DIM, use_bias=False, name="shortcut")(shortcut)
        x = RunningNorm(name="norm_in")(x, train)[:, ::2, ::2]
        x = gelu(RunningNorm(name="norm_up")(nn.Dense(wide, use_bias=False, name="up")(x), train))
        x = nn.Conv(wide, (3, 3), padding="SAME", feature_group_count=wide, use_bias=False, name="depthwise")(x)
        x = gelu(RunningNorm(name="norm_depthwise")(x, train))
        squeezed = gelu(nn.Dense(wide // (2 * EXPAND), use_bias=False, name="squeeze")(x.mean((1, 2))))
        gate = nn.sigmoid(nn.Dense(wide, use_bias=False, name="excite")(squeezed))
        x = nn.Dense(DIM, use_bias=False, name="down")(x * gate[:, None, None])
        return shortcut + RunningNorm(name="norm_down")(x, train)


class GridAttention(nn.Module):
    """Attention among the places of an image, which stays an image: y, x attends to i, j."""
    @nn.compact
    def __call__(self, x):
        rows, cols = x.shape[1:3]
        q, k, v = (nn.DenseGeneral((HEADS, HEAD_DIM), use_bias=False, name=n)(x) for n in ("query", "key", "value"))
        table = self.param("bias_table", nn.initializers.zeros, (2 * rows - 1, 2 * cols - 1, HEADS))
        down = jnp.arange(rows)[:, None] - jnp.arange(rows) + rows - 1
        right = jnp.arange(cols)[:, None] - jnp.arange(cols) + cols - 1
        bias = table[down[:, None, :, None], right[None, :, None, :]]         # y, x, i, j, heads
        logits = jnp.einsum("byxhd,bijhd->bhyxij", q, k) * HEAD_DIM ** -0.5 + jnp.moveaxis(bias, -1, 0)
        p = jax.nn.softmax(logits, axis=(-2, -1))
        y = jnp.einsum("bhyxij,bijhd->byxhd", p, v)
        return nn.DenseGeneral(DIM, axis=(-2, -1), name="out")(y)


class SpatialGate(nn.Module):
    @nn.compact
    def __call__(self, x):
        rows, cols = x.shape[1:3]
        kept, mixed = jnp.split(x, 2, axis=-1)
        mixed = nn.LayerNorm(epsilon=1e-5, name="norm")(mixed)
        weight = self.param("weight", nn.initializers.zeros, (rows, cols, rows, cols))
        offset = self.param("offset", nn.initializers.ones, (rows, cols))
        return kept * (jnp.einsum("yxij,bijc->byxc", weight, mixed) + offset[..., None])


class HybridNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(STEM, (3, 3), strides=2, padding=1, use_bias=False, name="stem")(x)
        x = gelu(RunningNorm(name="stem_norm")(x, train))
        x = InvertedBottleneck(name="bottleneck")(x, train)
        x = x + GridAttention(name="attention")(nn.LayerNorm(epsilon=1e-5, name="norm_attention")(x))
        y = gelu(nn.Dense(FF, name="ff_up")(nn.LayerNorm(epsilon=1e-5, name="norm_ff")(x)))
        x = x + nn.Dense(DIM, name="ff_down")(y)
        y = gelu(nn.Dense(GATE, name="gate_up")(nn.LayerNorm(epsilon=1e-5, name="norm_gate")(x)))
        x = x + nn.Dense(DIM, name="gate_down")(SpatialGate(name="gate")(y))
        return nn.Dense(CLASSES, use_bias=False, name="head")(x.mean((1, 2)))


def port_weights(net):
    params, stats = {"bottleneck": {}}, {"bottleneck": {}}

    def a(t):
        return jnp.asarray(t.detach().numpy())

    def dense(m):
        weight = a(m.weight).reshape(m.weight.shape[:2]).T
        return {"kernel": weight} if m.bias is None else {"kernel": weight, "bias": a(m.bias)}

    def conv(m):
        return {"kernel": a(m.weight).transpose(2, 3, 1, 0)}

    def norm(m):
        return {"scale": a(m.weight), "bias": a(m.bias)}

    def running(m):
        return {"mean": a(m.running_mean), "var": a(m.running_var)}

    block = params["bottleneck"]
    fn = net.s1.conv.fn
    params["stem"], params["stem_norm"] = conv(net.s0[0]), norm(net.s0[1])
    stats["stem_norm"] = running(net.s0[1])
    for name, m in (("norm_in", net.s1.conv.norm), ("norm_up", fn[1]), ("norm_depthwise", fn[4]), ("norm_down", fn[8])):
        block[name], stats["bottleneck"][name] = norm(m), running(m)
    for name, m in (("shortcut", net.s1.proj), ("up", fn[0]), ("squeeze", fn[6].fc[0]), ("excite", fn[6].fc[2]),
                    ("down", fn[7])):
        block[name] = dense(m)
    block["depthwise"] = conv(fn[3])
    attn, ff, gate = net.s2.attn, net.s2.ff, net.s3
    heads = a(attn.fn.to_qkv.weight).reshape(3, HEADS, HEAD_DIM, DIM).transpose(0, 3, 1, 2)
    params["attention"] = {
        "query": {"kernel": heads[0]}, "key": {"kernel": heads[1]}, "value": {"kernel": heads[2]},
        "bias_table": a(attn.fn.relative_bias_table).reshape(2 * GRID[0] - 1, 2 * GRID[1] - 1, HEADS),
        "out": {"kernel": a(attn.fn.to_out.weight).T.reshape(HEADS, HEAD_DIM, DIM), "bias": a(attn.fn.to_out.bias)}}
    params.update(norm_attention=norm(attn.norm), norm_ff=norm(ff.norm), norm_gate=norm(gate.norm))
    params.update(ff_up=dense(ff.fn[0]), ff_down=dense(ff.fn[2]), gate_up=dense(gate.proj_in[0]),
                  gate_down=dense(gate.proj_out), head=dense(net.fc))
    params["gate"] = {"norm": norm(gate.sgu.norm), "weight": a(gate.sgu.proj.weight).reshape(GRID + GRID),
                      "offset": a(gate.sgu.proj.bias).reshape(GRID)}
    return HybridNet(), {"params": params, "batch_stats": stats}


def build(seed):
    torch.manual_seed(seed)
    net = CoAtNet().eval()
    norms = (torch.nn.BatchNorm2d, torch.nn.LayerNorm)
    with torch.no_grad():
        for m in net.modules():
            for name, p in m.named_parameters(recurse=False):
                if isinstance(m, norms) and name == "weight":
                    p.copy_(0.6 + 0.8 * torch.rand_like(p))
                else:
                    p.copy_(torch.randn_like(p) * (1.3 * p[0].numel() ** -0.5 if p.dim() > 1 else 0.3))
            if isinstance(m, torch.nn.BatchNorm2d):
                m.running_mean.copy_(0.3 * torch.randn_like(m.running_mean))
                m.running_var.copy_(0.5 + torch.rand_like(m.running_var))
    x = np.random.RandomState(seed).randn(3, 3, *IMAGE).astype(np.float32)
    return {"torch": net, "flax": port_weights(net), "inputs": x, "flax_inputs": x.transpose(0, 2, 3, 1)}


NORMS = ["s0.1", "s1.conv.norm", "s1.conv.fn.1", "s1.conv.fn.4", "s1.conv.fn.8"]
FAULTS = [
    {"title": "the shortcut's pool pads as TensorFlow does, at the end only",
     "edits": [("(3, 3), (2, 2), padding=((1, 1), (1, 1)))", '(3, 3), (2, 2), padding="SAME")')],
     "layers": ["s1.pool"],
     "between": ("s0", "s1.proj"),
     "causes": ["pooling", "padding"], "level": "outputs"},
    {"title": "the relative position bias is added before the scores are scaled, so that it is scaled too",
     "edits": [('q, k) * HEAD_DIM ** -0.5 + jnp.moveaxis(bias, -1, 0)\n',
                'q, k) + jnp.moveaxis(bias, -1, 0)\n        logits = logits * HEAD_DIM ** -0.5\n')],
     "layers": ["s2.attn.fn"],
     "between": ("s2.attn.fn.to_qkv", "s2.attn.fn.attend"),
     "causes": ["scale", "order"], "level": "outputs"},
    {"title": "the gating unit's norm keeps Flax's epsilon",
     "edits": [('nn.LayerNorm(epsilon=1e-5, name="norm")', 'nn.LayerNorm(name="norm")')],
     "layers": ["s3.sgu.norm"],
     "between": ("s3.proj_in", "s3.sgu.proj"),
     "causes": ["epsilon"], "level": "outputs"},
    {"title": "the running variance is of the biased kind",
     "edits": [("(1 - self.keep) * v * n / (n - 1)", "(1 - self.keep) * v")],
     "layers": NORMS, "between": None,
     "causes": ["unbiased_variance"], "level": "training"},
    {"title": "the stem's norm is not told of training: it normalises by, and keeps, its old statistics",
     "edits": [('gelu(RunningNorm(name="stem_norm")(x, train))', 'gelu(RunningNorm(name="stem_norm")(x))')],
     "layers": ["s0.1"], "between": None,
     "causes": ["statistics", "batch_statistics"], "level": "training"},
]
