"""Every tensor of BERT, under the names that transformers publishes it with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from zoo.layout import Constant, Entry, constant, embedding, linear, norm, param, tie
from zoo.layout.ops import Shape
from zoo.model import count, dim
from zoo.models.bert.config import HEADS, Config, Head

PREFIX = "bert."  # before the encoder's tensors once there is a head

SPELLINGS = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))


def layout(c: Config) -> Iterator[Entry]:
    """All entries, in the order of the state_dict."""
    H = c.hidden_size
    root = "" if c.head == "none" else PREFIX
    e = f"{root}embeddings"
    yield constant(
        f"{e}.position_ids", (1, c.max_position_embeddings), Constant("arange", "I64", False)
    )
    yield from embedding(f"{e}.word_embeddings", c.vocab_size, H)
    yield from embedding(f"{e}.position_embeddings", c.max_position_embeddings, H)
    yield from embedding(f"{e}.token_type_embeddings", c.type_vocab_size, H)
    yield from norm(f"{e}.LayerNorm", H)
    for i in range(c.num_hidden_layers):
        yield from _layer(f"{root}encoder.layer.{i}", H, c.intermediate_size)
    if c.pooler:
        yield from linear(f"{root}pooler.dense", H, H)
    head = HEADS[c.head]
    if head.words:
        yield from _words(c, f"{e}.word_embeddings.weight")
    if head.module:
        yield from linear(head.module, H, head.outputs or c.num_labels)


def _words(c: Config, embeddings: str) -> Iterator[Entry]:
    H, decoder, bias = c.hidden_size, "cls.predictions.decoder", "cls.predictions.bias"
    if c.tie_decoder_bias:
        yield param(bias, c.vocab_size)
    else:
        yield constant(bias, (c.vocab_size,), Constant("zeros", "F32", True))
    yield from linear("cls.predictions.transform.dense", H, H)
    yield from norm("cls.predictions.transform.LayerNorm", H)
    if c.tie_word_embeddings:
        yield tie(f"{decoder}.weight", (c.vocab_size, H), to=embeddings)
    else:
        yield from linear(decoder, H, c.vocab_size, bias=not c.tie_decoder_bias)
    if c.tie_decoder_bias:
        yield tie(f"{decoder}.bias", (c.vocab_size,), to=bias)


def _layer(name: str, hidden: int, intermediate: int) -> Iterator[Entry]:
    H = hidden
    for projection in ("query", "key", "value"):
        yield from linear(f"{name}.attention.self.{projection}", H, H)
    yield from linear(f"{name}.attention.output.dense", H, H)
    yield from norm(f"{name}.attention.output.LayerNorm", H)
    yield from linear(f"{name}.intermediate.dense", H, intermediate)
    yield from linear(f"{name}.output.dense", intermediate, H)
    yield from norm(f"{name}.output.LayerNorm", H)


def infer(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """The Config fields that names and shapes tell; None where this is no BERT."""
    layers = count(shapes, r"^(?:bert\.)?encoder\.layer\.(\d+)\.attention\.self\.")
    if not layers:
        return None
    pooler = any("pooler.dense." in n for n in shapes)
    fields = {
        "vocab_size": dim(shapes, r"word_embeddings\.weight$", 0),
        "hidden_size": dim(shapes, r"LayerNorm\.(weight|bias)$", 0),
        "num_hidden_layers": layers,
        "intermediate_size": dim(shapes, r"intermediate\.dense\.(weight|bias)$", 0),
        "max_position_embeddings": dim(shapes, r"position_embeddings\.weight$", 0),
        "type_vocab_size": dim(shapes, r"token_type_embeddings\.weight$", 0),
        "num_labels": dim(shapes, r"^classifier\.(weight|bias)$", 0),
        "head": _head(shapes, pooler),
        "pooler": pooler,
        # A file may spell out what is tied: its values tell.
        "tie_word_embeddings": "cls.predictions.decoder.weight" not in shapes or None,
        "tie_decoder_bias": "cls.predictions.decoder.bias" not in shapes or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _head(shapes: Mapping[str, Shape], pooler: bool) -> Head | None:
    """The head that has these names; None where there are several.

    With a pooler, a classifier may be one of tokens too: they kept theirs until transformers 4.
    """
    words = any(n.startswith("cls.predictions.") for n in shapes)
    fits: list[Head] = []
    for head, of in HEADS.items():
        outputs = dim(shapes, rf"^{of.module}\.(weight|bias)$", 0) if of.module else None
        there = outputs is not None if of.module else not any(map(_is_output, shapes))
        if there and of.words == words and (pooler or not of.pooled):
            fits += [head] if of.outputs in (None, outputs) else []
    return fits[0] if len(fits) == 1 else None


def _is_output(name: str) -> bool:
    return any(of.module and name.startswith(f"{of.module}.") for of in HEADS.values())


def init(c: Config, name: str, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Devlin 2018, as upstream does it: normal(0, initializer_range), norms one, biases zero."""
    if name.endswith("LayerNorm.weight"):
        return np.ones(shape)
    return np.zeros(shape) if len(shape) == 1 else rng.normal(0.0, c.initializer_range, shape)
