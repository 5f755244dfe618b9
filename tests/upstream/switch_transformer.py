"""transformers' Switch Transformer, with eager attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn
from transformers.models.switch_transformers import modeling_switch_transformers as hf

from upstream import Tensors, Upstream
from zoo.models.switch_transformer.config import Config, to_hf

FIELDS = (
    "logits",
    "encoder_last_hidden_state",
    "encoder_router_logits",
    "decoder_router_logits",
)
LOSSES = tuple(f"{side}_{kind}_loss" for side in ("encoder", "decoder") for kind in ("z", "aux"))


def make(config: Config) -> nn.Module:
    settings = transformers.SwitchTransformersConfig(**to_hf(config), attn_implementation="eager")
    return transformers.SwitchTransformersForConditionalGeneration(settings)


def call(module: nn.Module, given: Tensors) -> Any:
    found = module(**given, output_router_logits=True)
    losses = {} if forgets(module.config) else {n: getattr(found, n) for n in LOSSES}
    return {n: getattr(found, n) for n in FIELDS} | losses


def forgets(config: Any) -> tuple[str, ...]:
    """Where all layers are sparse upstream forgets their losses."""
    sparse = config.num_sparse_encoder_layers == config.num_layers
    return ("*_loss",) if sparse else ()


@contextlib.contextmanager
def wide() -> Iterator[None]:
    """Upstream without its float32: the norms' variance, the routers and the share of tokens."""

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))

    route = hf.SwitchTransformersTop1Router.forward

    def router(self: Any, x: torch.Tensor) -> Any:
        self.dtype = torch.float64
        return route(self, x)

    with (
        mock.patch.object(hf.SwitchTransformersLayerNorm, "forward", norm),
        mock.patch.object(hf.SwitchTransformersTop1Router, "forward", router),
    ):
        yield


# float32 remains in upstream's share of tokens, of which the aux loss is made; its float32 is held
# against a golden file.
UPSTREAM = Upstream(
    make, call, exactly=wide, precisions=("float64",), rough=("*_aux_loss",), forgets=forgets
)
