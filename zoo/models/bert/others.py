"""Models upstream whose tensors are called as BERT's, and which compute something else."""

from __future__ import annotations

import re
from collections.abc import Mapping

from zoo.layout.ops import Shape
from zoo.model import Others

_LIKE = re.compile(r"\.attention\.self\.(query|key|value)\.")
_OWN = re.compile(r"(^|\.)bert\.")

# What only one of them has in its names.
_TELLING = {
    "Data2Vec's": r"(^|\.)data2vec_text\.",
    "RoBERTa's": r"(^|\.)(xlm_)?roberta\.|(^|\.)lm_head\.(dense|layer_norm)\.",
    "ELECTRA's": r"(^|\.)electra\.|embeddings_project\.|(discriminator|generator)_predictions\.",
    "ERNIE's": r"(^|\.)ernie\.|task_type_embeddings\.",
}
# Others that have a name of their own before them.
_NAMED = re.compile(r"(^|\.)(splinter|yoso|mra|nystromformer|nezha|xmod|lilt|layoutlm|roc_bert)\.")
_POSITIONS = re.compile(r"(^|\.)embeddings\.position_embeddings\.(weight|embedding)$")


def others(shapes: Mapping[str, Shape]) -> Others:
    """Whose tensors these may be, or are, instead of BERT's."""
    if not any(map(_LIKE.search, shapes)):
        return Others()
    for whose, pattern in _TELLING.items():
        if found := next((n for n in shapes if re.search(pattern, n)), None):
            return Others(f"{whose} ({found})")
    if named := next(filter(None, map(_NAMED.search, shapes)), None):
        return Others(f"those of {named[2]} ({named.string})")
    for name, shape in shapes.items():
        # RoBERTa's positions begin after the padding token: two rows more, 514 of 512.
        if _POSITIONS.search(name) and shape and _is_power_of_two(shape[0] - 2):
            return Others(f"RoBERTa's ({name} of {shape[0]} rows, two of them no position)")
    if not any(map(_OWN.search, shapes)):
        return Others(alike="RoBERTa, ELECTRA, ERNIE and others")
    causal = any(".predictions." in n for n in shapes) and not any("pooler." in n for n in shapes)
    return Others(alike="the causal BertLMHeadModel" if causal else "")


def _is_power_of_two(n: int) -> bool:
    return n >= 16 and n & (n - 1) == 0
