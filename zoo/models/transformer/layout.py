"""Every tensor of the Transformer: torch.nn.Transformer's, and three matrices of words around."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from zoo.layout import Entry, attention, embedding, linear, norm, param, tie
from zoo.layout.ops import Shape
from zoo.model import count, dim
from zoo.models.transformer.config import PRESETS, Config

ROOTS = frozenset({"src_embedding", "tgt_embedding", "encoder", "decoder", "generator"})

# What names and shapes cannot tell.
UNKNOWN = frozenset({"nhead", "activation", "layer_norm_eps", "norm_first", "tie_embeddings"})


def layout(c: Config) -> Iterator[Entry]:
    """All entries, in the order of the state_dict."""
    E = c.d_model
    words = "src_embedding.weight"
    if not c.bare:
        yield from embedding("src_embedding", c.src_vocab_size, E)
        if c.tie_embeddings:
            yield tie("tgt_embedding.weight", (c.tgt_vocab_size, E), to=words)
        else:
            yield from embedding("tgt_embedding", c.tgt_vocab_size, E)
    for i in range(c.num_encoder_layers):
        yield from _layer(f"encoder.layers.{i}", c, ("self_attn",))
    yield from norm("encoder.norm", E)
    for i in range(c.num_decoder_layers):
        yield from _layer(f"decoder.layers.{i}", c, ("self_attn", "multihead_attn"))
    yield from norm("decoder.norm", E)
    if c.bare:
        return
    if c.tie_embeddings:
        yield tie("generator.weight", (c.tgt_vocab_size, E), to=words)
        yield param("generator.bias", c.tgt_vocab_size)
    else:
        yield from linear("generator", E, c.tgt_vocab_size)


def _layer(name: str, c: Config, attentions: tuple[str, ...]) -> Iterator[Entry]:
    for attn in attentions:
        yield from attention(f"{name}.{attn}", c.d_model)
    yield from linear(f"{name}.linear1", c.d_model, c.dim_feedforward)
    yield from linear(f"{name}.linear2", c.dim_feedforward, c.d_model)
    for i in range(1, len(attentions) + 2):
        yield from norm(f"{name}.norm{i}", c.d_model)


def infer(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """The Config fields that names and shapes tell; None where this is no such Transformer.

    A file that spells out all three matrices of words is read as one in which they differ: that
    is right whether or not they do. Where only one is there, they are one.
    """
    if not {n.partition(".")[0] for n in shapes} <= ROOTS:
        return None
    layers = {
        side: count(shapes, rf"^{side}\.layers\.(\d+)\.{attn}\.")
        for side, attn in (("encoder", "self_attn"), ("decoder", "multihead_attn"))
    }
    if not all(layers.values()):
        return None
    words = {n.partition(".")[0] for n in shapes} - {"encoder", "decoder"}
    source = dim(shapes, r"^src_embedding\.weight$", 0)
    target = dim(shapes, r"^(tgt_embedding\.weight|generator\.(weight|bias))$", 0)
    if not words:  # torch.nn.Transformer itself
        source = target = 0
    tied = not any(n in shapes for n in ("tgt_embedding.weight", "generator.weight")) and words
    fields = {
        "src_vocab_size": source if source is not None else target,
        "tgt_vocab_size": target if target is not None else source,
        "d_model": dim(shapes, r"norm\d?\.(weight|bias)$", 0),
        "num_encoder_layers": layers["encoder"],
        "num_decoder_layers": layers["decoder"],
        "dim_feedforward": dim(shapes, r"linear1\.(weight|bias)$", 0),
    }
    found: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    same = [p for p in PRESETS.values() if found.items() <= asdict(p).items()]
    if len(same) == 1:
        found |= {name: getattr(same[0], name) for name in UNKNOWN}
    elif found.get("d_model", 512) % 8:  # heads cannot be told: any number that divides will do
        found["nhead"] = 1
    return found | {"tie_embeddings": bool(tied) and found.get("src_vocab_size") == target}


def init(c: Config, name: str, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """As torch.nn.Transformer: matrices by Glorot and Bengio 2010, attention's biases zero.

    Words are normal with a variance of 1 / d_model, so that scaled by sqrt(d_model) they are of
    the size of the positions.
    """
    if "embedding" in name:
        return rng.normal(0.0, c.d_model**-0.5, shape)
    if len(shape) > 1:
        bound = math.sqrt(6 / sum(shape))
        return rng.uniform(-bound, bound, shape)
    if "norm" in name:
        return np.ones(shape) if name.endswith("weight") else np.zeros(shape)
    if "attn" in name:
        return np.zeros(shape)
    bound = (c.dim_feedforward if "linear2" in name else c.d_model) ** -0.5
    return rng.uniform(-bound, bound, shape)
