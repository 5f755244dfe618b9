"""The Transformer's hyper-parameters, under torch.nn.Transformer's names, and the paper's sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

Activation = Literal["relu", "gelu"]

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


@dataclass(frozen=True)
class Config:
    """Defaults are those of the paper's base model for English and German (table 3)."""

    src_vocab_size: int = 37000  # 0, and 0 of the target: torch.nn.Transformer itself, of vectors
    tgt_vocab_size: int = 37000
    d_model: int = 512
    nhead: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    dim_feedforward: int = 2048
    dropout: float = 0.1
    activation: Activation = "relu"  # gelu is by erf
    layer_norm_eps: float = 1e-5
    norm_first: bool = False  # False: norms after the residual sums, as in the paper
    tie_embeddings: bool = True  # one matrix for both embeddings and the generator

    def __post_init__(self) -> None:
        if self.d_model % self.nhead or self.d_model % 2:
            raise ValueError(f"d_model {self.d_model} is odd or no multiple of nhead {self.nhead}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is none of {', '.join(ACTIVATIONS)}")
        if bool(self.src_vocab_size) != bool(self.tgt_vocab_size):
            raise ValueError("a vocabulary of one side only: both are 0, or none is")
        if self.tie_embeddings and self.src_vocab_size != self.tgt_vocab_size:
            raise ValueError(
                f"tie_embeddings needs one vocabulary, not {self.src_vocab_size} source and "
                f"{self.tgt_vocab_size} target tokens"
            )

    @property
    def bare(self) -> bool:
        """Whether there are no words: neither embeddings nor a generator."""
        return self.src_vocab_size == 0


BASE = Config()

PRESETS = {
    "transformer_base": BASE,
    "transformer_big": replace(BASE, d_model=1024, nhead=16, dim_feedforward=4096, dropout=0.3),
    "transformer_small": replace(
        BASE,
        src_vocab_size=8000,
        tgt_vocab_size=8000,
        d_model=256,
        num_encoder_layers=3,
        num_decoder_layers=3,
        dim_feedforward=1024,
    ),
    "transformer_tiny": replace(  # for generated tasks: sums, brackets
        BASE,
        src_vocab_size=32,
        tgt_vocab_size=32,
        d_model=64,
        nhead=4,
        num_encoder_layers=2,
        num_decoder_layers=2,
        dim_feedforward=128,
        dropout=0.0,
    ),
}

_TINY = Config(
    src_vocab_size=61,
    tgt_vocab_size=61,
    d_model=32,
    nhead=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    dim_feedforward=48,
)
TINY = {
    "tied": _TINY,
    "two_vocabularies": replace(_TINY, tgt_vocab_size=67, tie_embeddings=False),
    "norm_first": replace(
        _TINY,
        norm_first=True,
        activation="gelu",
        tie_embeddings=False,
        num_encoder_layers=1,
        num_decoder_layers=1,
    ),
    "bare": replace(
        _TINY,
        src_vocab_size=0,
        tgt_vocab_size=0,
        tie_embeddings=False,
        num_encoder_layers=1,
        num_decoder_layers=1,
    ),
}
