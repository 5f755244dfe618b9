"""Every tensor of Translatotron. No names are in wide use, so these are plain ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from zoo.layout import (
    Entry,
    batchnorm,
    conv,
    embedding,
    linear,
    param,
    recurrent,
    recurrent_cell,
)
from zoo.layout.ops import Shape
from zoo.model import count, dim
from zoo.models.translatotron.config import PRESETS, Config

GATES = 4  # of an LSTM
MODULES = {"encoder", "decoder", "postnet"}
UNKNOWN = frozenset({"source_layer", "target_layer", "zoneout"})


def layout(c: Config) -> Iterator[Entry]:
    """All entries, in the order of the state_dict."""
    both = 2 * c.encoder_size
    for i in range(c.encoder_layers):
        width = both if i else c.mel_channels
        yield from recurrent(
            f"encoder.layers.{i}", GATES, width, c.encoder_size, bidirectional=True
        )
    A = c.attention_size
    yield from linear("decoder.prenet.fc1", c.frame_size, c.prenet_size)
    yield from linear("decoder.prenet.fc2", c.prenet_size, c.prenet_size)
    yield from _attentive(
        "decoder.rnn", c.prenet_size, c.decoder_size, c.decoder_layers, both, A, c.attention_heads
    )
    yield from linear("decoder.frame", c.decoder_size + A, c.reduction * c.frame_size)
    yield from linear("decoder.stop", c.decoder_size + A, 1)
    yield from _postnet(c)
    size = c.auxiliary_size
    for name, symbols in (
        ("source_decoder", c.source_phonemes),
        ("target_decoder", c.target_phonemes),
    ):
        if symbols:
            yield from embedding(f"{name}.embedding", symbols, size)
            yield from _attentive(f"{name}.rnn", size, size, c.auxiliary_layers, both, size, 1)
            yield from linear(f"{name}.output", 2 * size, symbols)


def _attentive(
    name: str, n_in: int, size: int, layers: int, memory: int, attention: int, heads: int
) -> Iterator[Entry]:
    for i in range(layers):
        width = size if i else n_in + attention
        yield from recurrent_cell(f"{name}.cells.{i}", GATES, width, size)
    yield param(f"{name}.attention.score", heads, attention // heads)
    yield from linear(f"{name}.attention.query", size, attention, bias=False)
    yield from linear(f"{name}.attention.key", memory, attention)
    yield from linear(f"{name}.attention.value", memory, attention)
    yield from linear(f"{name}.attention.out", attention, attention)


def _postnet(c: Config) -> Iterator[Entry]:
    widths = c.postnet_widths
    for i, (n_in, n_out) in enumerate(widths):
        yield from conv(f"postnet.convs.{i}", n_in, n_out, c.postnet_kernel, bias=False)
    for i, (_, n_out) in enumerate(widths):
        yield from batchnorm(f"postnet.norms.{i}", n_out)


def infer(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """The Config fields that names and shapes tell; None where this is no Translatotron.

    If exactly one preset has these sizes, all that they do not tell is taken from it.
    """
    modules = {n.partition(".")[0] for n in shapes}
    if not modules >= MODULES or not count(shapes, r"^decoder\.rnn\.cells\.(\d+)\."):
        return None
    layers = count(shapes, r"^postnet\.(?:convs|norms)\.(\d+)\.")
    frame = dim(shapes, rf"^postnet\.(convs|norms)\.{layers - 1}\.", 0)
    step = dim(shapes, r"^decoder\.frame\.(weight|bias)$", 0)
    attention = r"^decoder\.rnn\.attention"
    auxiliary = r"^(?:source|target)_decoder"
    sizes = {
        "mel_channels": dim(shapes, r"^encoder\.layers\.0\.weight_ih_", 1),
        "encoder_layers": count(shapes, r"^encoder\.layers\.(\d+)\."),
        "encoder_size": dim(shapes, r"^encoder\..*\.weight_hh_", 1),
        "prenet_size": dim(shapes, r"^decoder\.prenet\.", 0),
        "decoder_layers": count(shapes, r"^decoder\.rnn\.cells\.(\d+)\."),
        "decoder_size": dim(shapes, r"^decoder\.rnn\.cells\..*\.weight_hh$", 1),
        "attention_size": dim(shapes, rf"{attention}\.(query|key|value|out)\.", 0),
        "attention_heads": dim(shapes, rf"{attention}\.score$", 0),
        "frame_size": frame,
        "reduction": step // frame if step and frame else None,
        "postnet_layers": layers,
        "postnet_size": dim(shapes, r"^postnet\.convs\.0\.", 0) if layers > 1 else None,
        "postnet_kernel": dim(shapes, r"^postnet\.convs\.", 2),
        "source_phonemes": dim(shapes, r"^source_decoder\.(embedding|output)\.", 0) or 0,
        "target_phonemes": dim(shapes, r"^target_decoder\.(embedding|output)\.", 0) or 0,
        "auxiliary_layers": count(shapes, rf"{auxiliary}\.rnn\.cells\.(\d+)\.") or None,
        "auxiliary_size": dim(shapes, rf"{auxiliary}\.embedding\.", 1),
    }
    found = {name: value for name, value in sizes.items() if value is not None}
    same = [p for p in PRESETS.values() if all(getattr(p, k) == v for k, v in found.items())]
    return dict(vars(same[0])) if len(same) == 1 else found
