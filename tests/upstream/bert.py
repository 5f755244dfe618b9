"""transformers' BERT, with eager attention."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from upstream import Tensors, Upstream
from zoo.models.bert.config import HEADS, Config, to_hf

FIELDS = {  # other classes give logits alone
    "BertModel": ("last_hidden_state", "pooler_output"),
    "BertForPreTraining": ("prediction_logits", "seq_relationship_logits"),
    "BertForQuestionAnswering": ("start_logits", "end_logits"),
}


def make(config: Config) -> nn.Module:
    hf = transformers.BertConfig(**to_hf(config), attn_implementation="eager")
    extra = {} if config.head != "none" else {"add_pooling_layer": config.pooler}
    return getattr(transformers, HEADS[config.head].hf)(hf, **extra)


def call(module: nn.Module, given: Tensors) -> Any:
    found = module(**given)
    fields = FIELDS.get(type(module).__name__)
    return found.logits if fields is None else {f: getattr(found, f) for f in fields}


UPSTREAM = Upstream(make, call)
