"""StableLM/Phi-like decoder: partial rotary, LayerNorm, parallel attention and MLP, grouped keys; Linen with nn.scan."""
from dataclasses import dataclass

import flax.linen as fnn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class StableLmConfig:
    vocab_size: int = 31
    hidden_size: int = 24
    intermediate_size: int = 40
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    partial_rotary_factor: float = 0.67
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-5
    embd_pdrop: float = 0.1
    resid_pdrop: float = 0.2

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self):
        return int(self.partial_rotary_factor * self.head_dim)


class RotaryEmbedding(nn.Module):
    def __init__(self, dim, base):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, x, position_ids):
        freqs = position_ids[:, :, None].to(self.inv_freq.dtype) * self.inv_freq
        emb = torch.cat((freqs, freqs), dim=-1)[:, None]
        return emb.cos().to(x.dtype), emb.sin().to(x.dtype)


def rotate_half(x):
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2:]
    return torch.cat((-x2, x1), dim=-1)


def repeat_kv(x, n_rep):
    b, h, s, d = x.shape
    return x[:, :, None].expand(b, h, n_rep, s, d).reshape(b, h * n_rep, s, d)


class StableLmAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.head_dim = config, config.head_dim
        self.rotary_ndims = config.rotary_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.rotary_emb = RotaryEmbedding(self.rotary_ndims, config.rope_theta)

    def forward(self, x, mask, position_ids):
        b, s, _ = x.shape
        q = self.q_proj(x).view(b, s, -1, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, s, -1, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, s, -1, self.head_dim).transpose(1, 2)
        cos, sin = self.rotary_emb(v, position_ids)
        q_rot, q_pass = q[..., : self.rotary_ndims], q[..., self.rotary_ndims:]
        k_rot, k_pass = k[..., : self.rotary_ndims], k[..., self.rotary_ndims:]
        q = torch.cat((q_rot * cos + rotate_half(q_rot) * sin, q_pass), dim=-1)
        k = torch.cat((k_rot * cos + rotate_half(k_rot) * sin, k_pass), dim=-1)
        n_rep = self.config.num_attention_heads // self.config.num_key_value_heads
        k, v = repeat_kv(k, n_rep), repeat_kv(v, n_rep)
        w = q @ k.transpose(2, 3) / self.head_dim ** 0.5
        w = w.masked_fill(~mask, torch.finfo(w.dtype).min).softmax(dim=-1)
        return self.o_proj((w @ v).transpose(1, 2).reshape(b, s, -1))


class StableLmMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class StableLmDecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = StableLmAttention(config)
        self.mlp = StableLmMLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x, mask, position_ids):
        h = self.input_layernorm(x)
        attn = self.resid_dropout(self.self_attn(h, mask, position_ids))
        return x + attn + self.resid_dropout(self.mlp(h))


class StableLmForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_dropout = nn.Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList([StableLmDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids, attention_mask):
        b, s = input_ids.shape
        causal = torch.ones(s, s, dtype=torch.bool).tril()
        mask = causal[None, None] & attention_mask[:, None, None, :].bool()
        position_ids = torch.arange(s)[None].expand(b, s)
        x = self.embed_dropout(self.embed_tokens(input_ids))
        for layer in self.layers:
            x = layer(x, mask, position_ids)
        return self.lm_head(self.norm(x))


def rotary_tables(length, dim, base, dtype):
    inv_freq = 1.0 / base ** (jnp.arange(0, dim, 2) / dim)
    angles = jnp.outer(jnp.arange(length), inv_freq)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles).astype(dtype)[None, :, None, :], jnp.sin(angles).astype(dtype)[None, :, None, :]


def apply_partial_rotary(x, cos, sin, rotary_dim):
    x_rot, x_pass = x[..., :rotary_dim], x[..., rotary_dim:]
    x1, x2 = jnp.split(x_rot, 2, axis=-1)
    x_rot = x_rot * cos + jnp.concatenate([-x2, x1], axis=-1) * sin
    return jnp.concatenate([x_rot, x_pass], axis=-1)


class ParallelBlock(fnn.Module):
    cfg: StableLmConfig
    deterministic: bool = True

    @fnn.compact
    def __call__(self, x, mask):
        cfg = self.cfg
        b, s, d = x.shape
        nh, nkv, hd = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        h = fnn.LayerNorm(epsilon=cfg.layer_norm_eps, name="ln")(x)

        qkv = fnn.Dense((nh + 2 * nkv) * hd, name="qkv")(h).reshape(b, s, nh + 2 * nkv, hd)
        q, k, v = jnp.split(qkv, [nh, nh + nkv], axis=2)
        cos, sin = rotary_tables(s, cfg.rotary_dim, cfg.rope_theta, x.dtype)
        q = apply_partial_rotary(q, cos, sin, cfg.rotary_dim)
        k = apply_partial_rotary(k, cos, sin, cfg.rotary_dim)
        k, v = jnp.repeat(k, nh // nkv, axis=2), jnp.repeat(v, nh // nkv, axis=2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(hd).astype(x.dtype)
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v).reshape(b, s, d)
        attn = fnn.Dense(d, use_bias=False, name="out")(out)
        attn = fnn.Dropout(cfg.resid_pdrop)(attn, deterministic=self.deterministic)

        mlp = fnn.Dense(cfg.intermediate_size, name="fc1")(h)
        mlp = fnn.Dense(d, name="fc2")(jax.nn.gelu(mlp))
        mlp = fnn.Dropout(cfg.resid_pdrop)(mlp, deterministic=self.deterministic)
        return x + attn + mlp, None


class FlaxStableLm(fnn.Module):
    cfg: StableLmConfig
    deterministic: bool = True

    @fnn.compact
    def __call__(self, input_ids, attention_mask):
        cfg = self.cfg
        embed = fnn.Embed(cfg.vocab_size, cfg.hidden_size, name="wte")
        x = embed(input_ids)
        x = fnn.Dropout(cfg.embd_pdrop, name="drop")(x, deterministic=self.deterministic)
        mask = fnn.combine_masks(
            fnn.make_causal_mask(input_ids, dtype=bool),
            attention_mask.astype(bool)[:, None, None, :],
            dtype=bool,
        )
        blocks = fnn.scan(
            ParallelBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=fnn.broadcast,
            length=cfg.num_hidden_layers,
        )
        x, _ = blocks(cfg, self.deterministic, name="blocks")(x, mask)
        x = fnn.LayerNorm(epsilon=1e-5, name="ln_f")(x)
        return embed.attend(x)


def convert_weights(net):
    sd = {k: v.detach().numpy() for k, v in net.state_dict().items()}
    n = len(net.layers)

    def stack(fmt, transpose=False):
        return jnp.stack([sd[fmt.format(i)].T if transpose else sd[fmt.format(i)] for i in range(n)])

    def fused(kind, axis):
        parts = [[sd[f"layers.{i}.self_attn.{p}_proj.{kind}"] for p in ("q", "k", "v")] for i in range(n)]
        return jnp.stack([np.concatenate([p.T for p in layer], axis=axis) for layer in parts])

    blocks = {
        "ln": {"scale": stack("layers.{}.input_layernorm.weight"), "bias": stack("layers.{}.input_layernorm.bias")},
        "qkv": {"kernel": fused("weight", 1), "bias": fused("bias", 0)},
        "out": {"kernel": stack("layers.{}.self_attn.o_proj.weight", True)},
    }
    for name in ("fc1", "fc2"):
        blocks[name] = {"kernel": stack("layers.{}.mlp." + name + ".weight", True),
                        "bias": stack("layers.{}.mlp." + name + ".bias")}
    return {"params": {
        "wte": {"embedding": jnp.asarray(sd["embed_tokens.weight"])},
        "blocks": blocks,
        "ln_f": {"scale": jnp.asarray(sd["norm.weight"]), "bias": jnp.asarray(sd["norm.bias"])},
    }}


def build(seed):
    torch.manual_seed(seed)
    cfg = StableLmConfig()
    net = StableLmForCausalLM(cfg).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(1 + 0.2 * torch.randn_like(p) if "norm.weight" in name else 0.3 * torch.randn_like(p))
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, cfg.vocab_size, size=(3, 8))
    attention_mask = np.ones((3, 8), dtype=np.int64)
    attention_mask[0, 5:] = 0
    attention_mask[2, 6:] = 0
    variables = convert_weights(net)
    return {
        "torch": net,
        "flax": (FlaxStableLm(cfg), variables),
        "inputs": {"input_ids": ids, "attention_mask": attention_mask},
    }


FAULTS = [
    {
        "title": "LayerNorm of the blocks with Flax's default epsilon 1e-6",
        "edits": [('fnn.LayerNorm(epsilon=cfg.layer_norm_eps, name="ln")', 'fnn.LayerNorm(name="ln")')],
        "layers": ["layers.0.input_layernorm"],
        "causes": ["epsilon"],
        "level": "outputs",
    },
    {
        "title": "the last channels of a head are rotated, not the first",
        "edits": [("x_rot, x_pass = x[..., :rotary_dim], x[..., rotary_dim:]",
                   "x_pass, x_rot = x[..., :-rotary_dim], x[..., -rotary_dim:]"),
                  ("return jnp.concatenate([x_rot, x_pass], axis=-1)", "return jnp.concatenate([x_pass, x_rot], axis=-1)")],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj"),
        "causes": ["rope"],
        "level": "outputs",
    },
    {
        "title": "inverse frequencies divided by the whole head's width",
        "edits": [("def rotary_tables(length, dim, base, dtype):", "def rotary_tables(length, dim, base, dtype, head_dim):"),
                  ("(jnp.arange(0, dim, 2) / dim)", "(jnp.arange(0, dim, 2) / head_dim)"),
                  ("cfg.rope_theta, x.dtype)", "cfg.rope_theta, x.dtype, hd)")],
        "layers": ["layers.0.self_attn.rotary_emb", "layers.0.self_attn"],
        "between": ("layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj"),
        "causes": ["constant", "rope"],
        "level": "outputs",
    },
    {
        "title": "shared keys and values tiled over the heads, not repeated",
        "edits": [("k, v = jnp.repeat(k, nh // nkv, axis=2), jnp.repeat(v, nh // nkv, axis=2)",
                   "k, v = jnp.tile(k, (1, 1, nh // nkv, 1)), jnp.tile(v, (1, 1, nh // nkv, 1))")],
        "layers": ["layers.0.self_attn"],
        "between": ("layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj"),
        "causes": ["rearranged", "heads"],
        "level": "outputs",
    },
    {
        "title": "MLP reads the attention's result as in a sequential block",
        "edits": [('mlp = fnn.Dense(cfg.intermediate_size, name="fc1")(h)',
                   'mlp = fnn.Dense(cfg.intermediate_size, name="fc1")(h + attn)')],
        "layers": ["layers.0"],
        "between": ("layers.0.self_attn.o_proj", "layers.0.mlp.fc1"),
        "causes": ["residual", "operand"],
        "level": "outputs",
    },
    {
        "title": "padding mask laid over the queries, not the keys",
        "edits": [("attention_mask.astype(bool)[:, None, None, :]", "attention_mask.astype(bool)[:, None, :, None]")],
        "layers": ["", "layers.0.self_attn"],
        "between": ("layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj"),
        "causes": ["mask", "axis"],
        "level": "outputs",
    },
    {
        "title": "fused qkv kernel and bias filled in the order q, v, k",
        "edits": [('for p in ("q", "k", "v")]', 'for p in ("q", "v", "k")]')],
        "layers": ["layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"],
        "causes": ["blocks", "swapped"],
        "level": "outputs",
    },
    {
        "title": "the output layer has its own copy of the tied embedding",
        "edits": [("return embed.attend(x)", 'return fnn.Dense(cfg.vocab_size, use_bias=False, name="lm_head")(x)'),
                  ('"wte": {"embedding": jnp.asarray(sd["embed_tokens.weight"])},',
                   '"wte": {"embedding": jnp.asarray(sd["embed_tokens.weight"])},\n'
                   '        "lm_head": {"kernel": jnp.asarray(sd["lm_head.weight"].T)},')],
        "layers": ["lm_head", "embed_tokens"],
        "causes": ["tied"],
        "level": "gradients",
    },
    {
        "title": "the embedding's dropout takes the residual rate",
        "edits": [('fnn.Dropout(cfg.embd_pdrop, name="drop")', 'fnn.Dropout(cfg.resid_pdrop, name="drop")')],
        "layers": ["embed_dropout"],
        "causes": ["training_attribute"],
        "level": "attributes",
    },
]
