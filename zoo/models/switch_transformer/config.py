"""The Switch Transformer's hyper-parameters, under transformers' names, and published sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

Activation = Literal["relu", "gelu", "gelu_new", "silu"]

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


@dataclass(frozen=True)
class Config:
    """Defaults are those of google/switch-base-8."""

    vocab_size: int = 32128
    d_model: int = 768
    d_kv: int = 64
    d_ff: int = 3072
    expert_capacity: int = 64  # tokens of one sequence that an expert takes
    num_layers: int = 12
    num_sparse_encoder_layers: int = 6
    num_decoder_layers: int = 12
    num_sparse_decoder_layers: int = 6
    num_heads: int = 12
    num_experts: int = 8
    router_bias: bool = False
    router_jitter_noise: float = 0.01  # in training only
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    router_z_loss_coef: float = 0.001  # for whoever trains: the losses in Output are bare
    router_aux_loss_coef: float = 0.001
    initializer_factor: float = 1.0
    dense_act_fn: Activation = "relu"  # gelu is by erf, gelu_new by tanh
    tie_word_embeddings: bool = True
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0

    def __post_init__(self) -> None:
        if self.num_experts > 1 << 16:
            raise OverflowError(f"num_experts {self.num_experts} is more than {1 << 16}")
        if self.dense_act_fn not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"dense_act_fn {self.dense_act_fn!r} is none of {known}")
        if not 4 <= self.relative_attention_num_buckets < 2 * self.relative_attention_max_distance:
            raise ValueError(
                f"relative_attention_num_buckets {self.relative_attention_num_buckets} is less "
                f"than 4 or too many for a relative_attention_max_distance of "
                f"{self.relative_attention_max_distance}"
            )

    def is_sparse(self, decoder: bool, layer: int) -> bool:
        """Whether this layer has experts: every `step`-th, by upstream's rule."""
        layers = self.num_decoder_layers if decoder else self.num_layers
        sparse = self.num_sparse_decoder_layers if decoder else self.num_sparse_encoder_layers
        step = layers // sparse if sparse > 0 else layers
        return step == 1 or (step > 1 and layer % step == 1)


class Output(NamedTuple):
    """B pairs of sequences, S tokens in each source and T in each target, X experts."""

    logits: Any  # (B, T, V)
    encoder_z_loss: Any  # (), of all sparse layers together; 0 where there are none
    encoder_aux_loss: Any  # ()
    decoder_z_loss: Any  # ()
    decoder_aux_loss: Any  # ()
    encoder_last_hidden_state: Any  # (B, S, M)
    encoder_router_logits: Any  # for each sparse layer (B, S, X)
    decoder_router_logits: Any  # for each sparse layer (B, T, X)


BASE = Config()

PRESETS = {
    "switch_base_8": BASE,
    "switch_small": replace(
        BASE,
        d_model=256,
        d_kv=32,
        d_ff=1024,
        num_layers=4,
        num_sparse_encoder_layers=2,
        num_decoder_layers=4,
        num_sparse_decoder_layers=2,
        num_heads=8,
        num_experts=4,
    ),
    "switch_tiny": replace(  # for generated tasks: sums, brackets
        BASE,
        vocab_size=32,
        d_model=48,
        d_kv=12,
        d_ff=96,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_decoder_layers=2,
        num_sparse_decoder_layers=1,
        num_heads=4,
        num_experts=4,
        dropout_rate=0.0,
    ),
}

_TINY = Config(
    vocab_size=61,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_sparse_encoder_layers=1,
    num_decoder_layers=2,
    num_sparse_decoder_layers=1,
    num_heads=4,
    num_experts=3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=9,
)
TINY = {
    "tied": _TINY,
    "dropping": replace(
        _TINY,
        d_kv=6,
        expert_capacity=2,
        num_layers=1,
        num_decoder_layers=1,
        num_experts=4,
        router_bias=True,
        dense_act_fn="gelu_new",
        tie_word_embeddings=False,
    ),
}

_SHARED = list(asdict(BASE))  # transformers' config.json has every field under the same name


def from_hf(data: Mapping[str, Any]) -> Config:
    """The Config that a transformers config.json states.

    Raises ValueError for what Switch in transformers can be told to be and this one is not.
    """
    if (dtype := data.get("router_dtype", "float32")) != "float32":
        raise ValueError(f"router_dtype {dtype!r}; routers compute in float32 here")
    if "gated" in str(data.get("feed_forward_proj", "")):
        raise ValueError(f"feed_forward_proj {data['feed_forward_proj']!r}: no gates are here")
    if isinstance(data.get("eos_token_id"), list):
        raise ValueError(f"eos_token_id {data['eos_token_id']}: one token only ends a text here")
    # What transformers takes where the file says nothing.
    fields: dict[str, Any] = {"d_ff": 2048}
    fields |= {"num_sparse_encoder_layers": 3, "num_sparse_decoder_layers": 3}
    fields["num_decoder_layers"] = data.get("num_layers", BASE.num_layers)
    fields |= {name: data[name] for name in _SHARED if data.get(name) is not None}
    return Config(**fields)


def to_hf(config: Config) -> dict[str, Any]:
    """The keys of a transformers config.json; `from_hf` gives the Config back."""
    return {
        "model_type": "switch_transformers",
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "is_encoder_decoder": True,
        "router_dtype": "float32",
        **asdict(config),
    }
