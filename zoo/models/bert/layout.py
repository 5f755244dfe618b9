"""Every tensor of BERT, under the names that transformers publishes it with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from zoo.layout import Constant, Entry, constant, embedding, linear, norm, param, tie
from zoo.layout.ops import Shape
from zoo.model import count, dim
from zoo.models.bert.config import Config

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
    if c.head in ("masked_lm", "pretraining"):
        yield param("cls.predictions.bias", c.vocab_size)
        yield from linear("cls.predictions.transform.dense", H, H)
        yield from norm("cls.predictions.transform.LayerNorm", H)
        words = f"{e}.word_embeddings.weight"
        yield tie("cls.predictions.decoder.weight", (c.vocab_size, H), to=words)
        yield tie("cls.predictions.decoder.bias", (c.vocab_size,), to="cls.predictions.bias")
    if c.head == "pretraining":
        yield from linear("cls.seq_relationship", H, 2)
    if c.head in ("sequence_classification", "token_classification"):
        yield from linear("classifier", H, c.num_labels)


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
    head: str | None
    if any(n.startswith("classifier.") for n in shapes):
        # With a pooler it may be either: token classifiers kept theirs until transformers 4.
        head = None if pooler else "token_classification"
    elif any(n.startswith("cls.") for n in shapes):
        seq = any(n.startswith("cls.seq_relationship.") for n in shapes)
        head = "pretraining" if seq else "masked_lm"
    else:
        head = "none"
    fields = {
        "vocab_size": dim(shapes, r"word_embeddings\.weight$", 0),
        "hidden_size": dim(shapes, r"LayerNorm\.(weight|bias)$", 0),
        "num_hidden_layers": layers,
        "intermediate_size": dim(shapes, r"intermediate\.dense\.(weight|bias)$", 0),
        "max_position_embeddings": dim(shapes, r"position_embeddings\.weight$", 0),
        "type_vocab_size": dim(shapes, r"token_type_embeddings\.weight$", 0),
        "num_labels": dim(shapes, r"^classifier\.(weight|bias)$", 0),
        "head": head,
        "pooler": pooler,
    }
    return {name: value for name, value in fields.items() if value is not None}


def init(c: Config, name: str, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Devlin 2018, as upstream does it: normal(0, initializer_range), norms one, biases zero."""
    if name.endswith("LayerNorm.weight"):
        return np.ones(shape)
    return np.zeros(shape) if len(shape) == 1 else rng.normal(0.0, c.initializer_range, shape)
