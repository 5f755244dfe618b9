"""The vocabulary of layouts: which tensors a model has, and what each is in the other framework.

A layout is a tuple of entries. An entry states one canonical tensor (name, shape, kind) or, where
one side joins what the other keeps apart, a group of them; both directions follow from that one
statement. Layouts are data: they need no framework, and go to JSON and back.

    def layout(c):
        yield from embedding("embeddings.word_embeddings", c.vocab_size, c.hidden_size)
        yield from linear("classifier", c.hidden_size, c.num_labels)

Canonical names and shapes are those of the PyTorch state_dict. NNX names follow from the kind:
`classifier.weight` (out, in) of kind linear is `classifier.kernel` (in, out).
"""

from __future__ import annotations

from zoo.layout.entries import (
    Constant,
    Entry,
    Tensor,
    View,
    attention,
    batchnorm,
    constant,
    conv,
    embedding,
    flat_linear,
    linear,
    norm,
    of_kind,
    param,
    recurrent,
    recurrent_cell,
    tie,
)
from zoo.layout.kinds import Kind
from zoo.layout.ops import Shape
from zoo.layout.renames import Renames
from zoo.layout.stacked import between, paired, unstacked
from zoo.layout.views import (
    COLLECTED,
    FLAX_TREES,
    STACKED,
    TREES,
    Layout,
    Side,
    Tree,
    canonical_guess,
)

__all__ = [
    "COLLECTED",
    "FLAX_TREES",
    "STACKED",
    "TREES",
    "Constant",
    "Entry",
    "Kind",
    "Layout",
    "Renames",
    "Shape",
    "Side",
    "Tensor",
    "Tree",
    "View",
    "attention",
    "batchnorm",
    "between",
    "canonical_guess",
    "constant",
    "conv",
    "embedding",
    "flat_linear",
    "linear",
    "norm",
    "of_kind",
    "paired",
    "param",
    "recurrent",
    "recurrent_cell",
    "tie",
    "unstacked",
]
