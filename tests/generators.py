"""Families that make tokens one after another, as data, and one way to have them do it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from support import Arrays, canonical

from zoo.loading import build
from zoo.model import Config, Model
from zoo.registry import families

STEPS = 64


@dataclass(frozen=True)
class Generator:
    """How a family's `generate` is called, and which weights make what it says vary."""

    family: str
    config: Config
    lively: tuple[str, float]  # tensors of this ending are so much larger
    source: str  # its inputs, by their names in `Model.inputs`
    mask: str
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Model:
        return families()[self.family]

    def weights(self) -> Arrays:
        """Weights with which the likeliest token changes from step to step."""
        ending, factor = self.lively
        weights = canonical(self.model, self.config)
        return {n: a * factor if n.endswith(ending) else a for n, a in weights.items()}

    def decode(self, framework: str, config: Config | None = None, **options: Any) -> np.ndarray:
        """Tokens for the family's sample source, (2, STEPS)."""
        inputs = self.model.inputs(self.config)
        model = build(self.model, config or self.config, framework, self.weights())
        source, mask = inputs[self.source], inputs[self.mask]
        options = {**self.options, **options}
        if framework == "torch":
            options = {
                k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v
                for k, v in options.items()
            }
            source, mask = torch.from_numpy(source), torch.from_numpy(mask)
        return np.asarray(model.generate(source, STEPS, **{self.mask: mask}, **options))


GENERATORS = {
    g.family: g
    for g in (
        Generator(
            "transformer",
            replace(families()["transformer"].tiny["two_vocabularies"], num_encoder_layers=1),
            ("linear2.weight", 5),
            "src",
            "src_key_padding_mask",
            "tgt",
            {"start_token": 1},
        ),
        Generator(
            "switch_transformer",
            families()["switch_transformer"].tiny["tied"],
            ("wo.weight", 10),
            "input_ids",
            "attention_mask",
            "decoder_input_ids",
            {"eos_token": -1},  # never
        ),
    )
}
