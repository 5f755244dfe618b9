"""GPT-2-like decoder: Conv1D weights, fused qkv, learned positions, tied head; Linen @nn.compact."""
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch


@dataclass(frozen=True)
class GPT2Config:
    vocab_size: int = 41
    n_positions: int = 16
    n_embd: int = 24
    n_layer: int = 2
    n_head: int = 3
    embd_pdrop: float = 0.1
    resid_pdrop: float = 0.15
    layer_norm_epsilon: float = 1e-5
    scale_attn_by_inverse_layer_idx: bool = True


class Conv1D(torch.nn.Module):
    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = torch.nn.Parameter(torch.empty(nx, nf).normal_(0, 0.3))
        self.bias = torch.nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class NewGELU(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.gelu(x, approximate="tanh")


class GPT2Attention(torch.nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = torch.nn.Dropout(config.resid_pdrop)

    def forward(self, x):
        b, t, c = x.shape
        h = self.config.n_head
        q, k, v = (y.view(b, t, h, c // h).transpose(1, 2) for y in self.c_attn(x).split(c, dim=2))
        w = q @ k.transpose(-1, -2) / (c // h) ** 0.5
        if self.config.scale_attn_by_inverse_layer_idx:
            w = w / float(self.layer_idx + 1)
        causal = torch.tril(torch.ones(t, t, dtype=torch.bool))
        w = torch.where(causal, w, torch.finfo(w.dtype).min)
        y = (torch.softmax(w, dim=-1) @ v).transpose(1, 2).reshape(b, t, c)
        return self.resid_dropout(self.c_proj(y))


class GPT2MLP(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Conv1D(4 * config.n_embd, config.n_embd)
        self.act = NewGELU()
        self.c_proj = Conv1D(config.n_embd, 4 * config.n_embd)
        self.dropout = torch.nn.Dropout(config.resid_pdrop)

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class GPT2Block(torch.nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.ln_1 = torch.nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, layer_idx)
        self.ln_2 = torch.nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2LMHead(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = torch.nn.Embedding(config.n_positions, config.n_embd)
        self.drop = torch.nn.Dropout(config.embd_pdrop)
        self.h = torch.nn.ModuleList([GPT2Block(config, i) for i in range(config.n_layer)])
        self.ln_f = torch.nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, input_ids):
        x = self.wte(input_ids)
        pos = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.drop(x + self.wpe(pos))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class FlaxAttention(nn.Module):
    config: GPT2Config
    layer_idx: int
    deterministic: bool = True

    @nn.compact
    def __call__(self, x):
        cfg = self.config
        batch, length, width = x.shape
        fused = nn.Dense(3 * width, name="c_attn")(x)
        query, key, value = jnp.split(fused, 3, axis=-1)
        heads = lambda y: y.reshape(batch, length, cfg.n_head, width // cfg.n_head)
        query, key, value = heads(query), heads(key), heads(value)
        query = query / jnp.sqrt(query.shape[-1])
        weights = jnp.einsum("...qhd,...khd->...hqk", query, key)
        if cfg.scale_attn_by_inverse_layer_idx:
            weights = weights / (self.layer_idx + 1)
        mask = nn.make_causal_mask(jnp.ones((batch, length)), dtype=bool)
        weights = jnp.where(mask, weights, jnp.finfo(weights.dtype).min)
        weights = nn.softmax(weights, axis=-1)
        out = jnp.einsum("...hqk,...khd->...qhd", weights, value).reshape(x.shape)
        out = nn.Dense(width, name="c_proj")(out)
        return nn.Dropout(rate=cfg.resid_pdrop, name="resid_dropout")(out, deterministic=self.deterministic)


class FlaxMLP(nn.Module):
    config: GPT2Config
    deterministic: bool = True

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        x = nn.Dense(4 * width, name="c_fc")(x)
        x = nn.gelu(x, approximate=True)
        x = nn.Dense(width, name="c_proj")(x)
        return nn.Dropout(rate=self.config.resid_pdrop, name="mlp_dropout")(x, deterministic=self.deterministic)


class FlaxBlock(nn.Module):
    config: GPT2Config
    layer_idx: int

    @nn.compact
    def __call__(self, x):
        norm = lambda name: nn.LayerNorm(epsilon=self.config.layer_norm_epsilon, name=name)
        x = x + FlaxAttention(self.config, self.layer_idx, name="attn")(norm("ln_1")(x))
        return x + FlaxMLP(self.config, name="mlp")(norm("ln_2")(x))


class FlaxGPT2(nn.Module):
    config: GPT2Config
    deterministic: bool = True

    @nn.compact
    def __call__(self, input_ids):
        cfg = self.config
        wte = nn.Embed(cfg.vocab_size, cfg.n_embd, name="wte")
        wpe = nn.Embed(cfg.n_positions, cfg.n_embd, name="wpe")
        positions = jnp.broadcast_to(jnp.arange(input_ids.shape[-1]), input_ids.shape)
        x = wte(input_ids) + wpe(positions)
        x = nn.Dropout(rate=cfg.embd_pdrop, name="drop")(x, deterministic=self.deterministic)
        for i in range(cfg.n_layer):
            x = FlaxBlock(cfg, i, name=f"h_{i}")(x)
        x = nn.LayerNorm(epsilon=cfg.layer_norm_epsilon, name="ln_f")(x)
        return wte.attend(x)


def port(net) -> dict[str, Any]:
    def array(t):
        return jnp.asarray(t.detach().numpy())

    def conv1d(m):
        return {"kernel": array(m.weight), "bias": array(m.bias)}

    def norm(m):
        return {"scale": array(m.weight), "bias": array(m.bias)}

    params = {"wte": {"embedding": array(net.wte.weight)}, "wpe": {"embedding": array(net.wpe.weight)}}
    for i, block in enumerate(net.h):
        params[f"h_{i}"] = {
            "ln_1": norm(block.ln_1),
            "ln_2": norm(block.ln_2),
            "attn": {"c_attn": conv1d(block.attn.c_attn), "c_proj": conv1d(block.attn.c_proj)},
            "mlp": {"c_fc": conv1d(block.mlp.c_fc), "c_proj": conv1d(block.mlp.c_proj)},
        }
    params["ln_f"] = norm(net.ln_f)
    return params


def build(seed):
    torch.manual_seed(seed)
    cfg = GPT2Config()
    net = GPT2LMHead(cfg).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.2)
            elif "ln_" in name:
                p.uniform_(0.5, 1.5)
        net.wte.weight.mul_(0.5)
    ids = np.random.default_rng(seed).integers(0, cfg.vocab_size, (2, 9))
    return {"torch": net, "flax": (FlaxGPT2(cfg), {"params": port(net)}), "inputs": ids}


FAULTS = [
    {
        "title": "exact gelu for gelu_new",
        "edits": [("nn.gelu(x, approximate=True)", "nn.gelu(x, approximate=False)")],
        "layers": ["h.0.mlp.act", "h.0.mlp"],
        "between": ("h.0.mlp.c_fc", "h.0.mlp.c_proj"),
        "causes": ["gelu"],
        "level": "outputs",
    },
    {
        "title": "learned positions count from 1",
        "edits": [("jnp.broadcast_to(jnp.arange(input_ids.shape[-1]), input_ids.shape)",
                   "jnp.broadcast_to(jnp.arange(1, input_ids.shape[-1] + 1), input_ids.shape)")],
        "layers": ["wpe", ""],
        "between": ("wte", "wpe"),
        "causes": ["offset"],
        "level": "outputs",
    },
    {
        "title": "fused projection split as key, query, value",
        "edits": [("query, key, value = jnp.split(fused, 3, axis=-1)", "key, query, value = jnp.split(fused, 3, axis=-1)")],
        "layers": ["h.0.attn", "h.0.attn.c_attn"],
        "between": ("h.0.attn.c_attn", "h.0.attn.c_proj"),
        "causes": ["blocks", "swapped", "operand"],
        "level": "outputs",
    },
    {
        "title": "head with its own copy of the embedding",
        "edits": [("return wte.attend(x)", 'return nn.Dense(cfg.vocab_size, use_bias=False, name="lm_head")(x)'),
                  ('    params["ln_f"] = norm(net.ln_f)\n',
                   '    params["ln_f"] = norm(net.ln_f)\n    params["lm_head"] = {"kernel": array(net.lm_head.weight).T}\n')],
        "layers": ["lm_head", "wte"],
        "causes": ["tied"],
        "level": "gradients",
    },
    {
        "title": "inverse layer index not applied",
        "edits": [("            weights = weights / (self.layer_idx + 1)\n", "            weights = weights / 1.0\n")],
        "layers": ["h.1.attn"],
        "between": ("h.1.attn.c_attn", "h.1.attn.c_proj"),
        "causes": ["scale", "left_out"],
        "level": "outputs",
    },
    {
        "title": "embedding dropout takes the residual rate",
        "edits": [('nn.Dropout(rate=cfg.embd_pdrop, name="drop")', 'nn.Dropout(rate=cfg.resid_pdrop, name="drop")')],
        "layers": ["drop"],
        "between": ("wpe", "h.0.ln_1"),
        "causes": ["training_attribute"],
        "level": "attributes",
    },
    {
        "title": "Conv1D weight of the square output projection transposed as if it were a Linear's",
        "edits": [('"c_proj": conv1d(block.attn.c_proj)}', '"c_proj": {"kernel": array(block.attn.c_proj.weight).T, "bias": array(block.attn.c_proj.bias)}}')],
        "layers": ["h.0.attn.c_proj"],
        "causes": ["transposed"],
        "level": "outputs",
    },
    {
        "title": "final LayerNorm with Flax's default epsilon",
        "edits": [('nn.LayerNorm(epsilon=cfg.layer_norm_epsilon, name="ln_f")', 'nn.LayerNorm(name="ln_f")')],
        "layers": ["ln_f"],
        "causes": ["epsilon"],
        "level": "outputs",
    },
]
