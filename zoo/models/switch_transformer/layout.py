"""Every tensor of the Switch Transformer, under the names that transformers publishes it with."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from zoo.layout import Entry, Tensor, embedding, linear, norm, tie
from zoo.layout.ops import Permute, Shape, Stack
from zoo.model import count, dim
from zoo.models.switch_transformer.config import PRESETS, Config

ROOTS = frozenset({"shared", "encoder", "decoder", "lm_head"})

# What names and shapes cannot tell.
UNKNOWN = frozenset(
    {
        "expert_capacity",
        "relative_attention_max_distance",
        "layer_norm_epsilon",
        "dense_act_fn",
        "tie_word_embeddings",
    }
)


def layout(c: Config) -> Iterator[Entry]:
    """All entries, in the order of the state_dict."""
    yield from embedding("shared", c.vocab_size, c.d_model)
    for stack, layers in (("encoder", c.num_layers), ("decoder", c.num_decoder_layers)):
        words = (c.vocab_size, c.d_model)
        yield tie(f"{stack}.embed_tokens.weight", words, to="shared.weight")
        for i in range(layers):
            yield from _block(f"{stack}.block.{i}.layer", c, stack == "decoder", i)
        yield from norm(f"{stack}.final_layer_norm", c.d_model, bias=False)
    if c.tie_word_embeddings:
        yield tie("lm_head.weight", (c.vocab_size, c.d_model), to="shared.weight")
    else:
        yield from linear("lm_head", c.d_model, c.vocab_size, bias=False)


def _block(name: str, c: Config, decoder: bool, i: int) -> Iterator[Entry]:
    yield from _attention(f"{name}.0.SelfAttention", c)
    if i == 0:
        buckets = c.relative_attention_num_buckets
        bias = f"{name}.0.SelfAttention.relative_attention_bias"
        yield from embedding(bias, buckets, c.num_heads)
    yield from norm(f"{name}.0.layer_norm", c.d_model, bias=False)
    if decoder:
        yield from _attention(f"{name}.1.EncDecAttention", c)
        yield from norm(f"{name}.1.layer_norm", c.d_model, bias=False)
    last = 2 if decoder else 1
    if c.is_sparse(decoder, i):
        yield from _experts(f"{name}.{last}.mlp", c)
    else:
        yield from linear(f"{name}.{last}.mlp.wi", c.d_model, c.d_ff, bias=False)
        yield from linear(f"{name}.{last}.mlp.wo", c.d_ff, c.d_model, bias=False)
    yield from norm(f"{name}.{last}.layer_norm", c.d_model, bias=False)


def _attention(name: str, c: Config) -> Iterator[Entry]:
    inner = c.num_heads * c.d_kv
    for projection in ("q", "k", "v"):
        yield from linear(f"{name}.{projection}", c.d_model, inner, bias=False)
    yield from linear(f"{name}.o", inner, c.d_model, bias=False)


def _experts(name: str, c: Config) -> Iterator[Entry]:
    """One matrix an expert <-> all experts' in one array, so that one product serves them all."""
    X, M, F = c.num_experts, c.d_model, c.d_ff
    yield from linear(f"{name}.router.classifier", M, X, bias=c.router_bias)
    yield Entry(
        "linear",
        tuple(
            Tensor(f"{name}.experts.expert_{i}.{leaf}.weight", shape)
            for i in range(X)
            for leaf, shape in (("wi", (F, M)), ("wo", (M, F)))
        ),
        (
            Tensor(f"{name}.experts.wi", (X, M, F)),
            Tensor(f"{name}.experts.wo", (X, F, M)),
        ),
        (Permute((1, 0)), Stack(0, groups=2)),
    )


def infer(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """The Config fields that names and shapes tell; None where this is no Switch Transformer."""
    if not {n.partition(".")[0] for n in shapes} <= ROOTS:
        return None
    if not any(".mlp.router.classifier." in n for n in shapes):
        return None
    layers = {s: count(shapes, rf"^{s}\.block\.(\d+)\.layer\.") for s in ("encoder", "decoder")}
    if not all(layers.values()):
        return None
    heads = dim(shapes, r"relative_attention_bias\.weight$", 1)
    inner = dim(shapes, r"Attention\.[qkv]\.weight$", 0)
    fields = {
        "vocab_size": dim(shapes, r"^(shared|\w+\.embed_tokens|lm_head)\.weight$", 0),
        "d_model": dim(shapes, r"layer_norm\.weight$", 0),
        "d_kv": inner // heads if inner and heads else None,
        # of dense layers and single experts, or where all layers are of stacked ones
        "d_ff": dim(shapes, r"\.wi\.weight$", 0) or dim(shapes, r"\.experts\.wi$", 2),
        "num_layers": layers["encoder"],
        "num_sparse_encoder_layers": _sparse(shapes, "encoder", layers["encoder"]),
        "num_decoder_layers": layers["decoder"],
        "num_sparse_decoder_layers": _sparse(shapes, "decoder", layers["decoder"]),
        "num_heads": heads,
        "num_experts": dim(shapes, r"router\.classifier\.(weight|bias)$", 0),
        "relative_attention_num_buckets": dim(shapes, r"relative_attention_bias\.weight$", 0),
    }
    found: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    found["router_bias"] = any(n.endswith("router.classifier.bias") for n in shapes)
    same = [p for p in PRESETS.values() if found.items() <= asdict(p).items()]
    if len(same) == 1:
        found |= {name: getattr(same[0], name) for name in UNKNOWN}
    if "lm_head.weight" not in shapes:
        found["tie_word_embeddings"] = True
    elif not any(".embed_tokens." in n for n in shapes):  # whoever leaves out ties left none out
        found["tie_word_embeddings"] = False
    return found


def _sparse(shapes: Mapping[str, Shape], stack: str, layers: int) -> int:
    """A number of sparse layers from which `Config.is_sparse` finds those that have a router."""
    pattern = rf"^{stack}\.block\.(\d+)\.layer\.\d\.mlp\.router\."
    routed = {int(m[1]) for n in shapes if (m := re.match(pattern, n))}
    likely: list[int] = [len(routed), *range(layers + 2)]
    for number in likely:
        c = Config(num_layers=layers, num_sparse_encoder_layers=number)
        if routed == {i for i in range(layers) if c.is_sparse(False, i)}:
            return number
    return len(routed)


def init(c: Config, name: str, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Normal values as upstream draws them (Raffel 2020); norms `initializer_factor`."""
    factor = c.initializer_factor
    if name.endswith("norm.weight"):
        return np.full(shape, factor)
    if name.endswith("router.classifier.bias"):
        return np.zeros(shape)
    width = c.d_model**-0.5
    leaf = name.split(".")[-2]
    deviation = {
        "shared": 1.0,
        "lm_head": 1.0,
        "classifier": 1.0,
        "q": (c.d_model * c.d_kv) ** -0.5,
        "o": (c.num_heads * c.d_kv) ** -0.5,
        "wo": width if ".experts." in name else c.d_ff**-0.5,
    }.get(leaf, width)
    return rng.normal(0.0, factor * deviation, shape)
