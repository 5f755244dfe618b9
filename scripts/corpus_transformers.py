"""Base models of transformers with small configurations, and inputs for them."""

from __future__ import annotations

from typing import Any


def names() -> list[str]:
    """Every model type that has a base model."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(MODEL_MAPPING_NAMES)


# What a size of a configuration becomes; longest name that fits wins.
_SIZES: dict[str, Any] = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "dim": 32, "d_inner": 64,
    "embedding_size": 32, "intermediate_size": 64, "ffn_dim": 64, "n_inner": 64, "mlp_dim": 64,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_ff": 64, "num_attention_heads": 4,
    "n_head": 4, "num_heads": 4, "n_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "n_layer": 2,
    "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_decoder_layers": 2, "vocab_size": 99, "max_position_embeddings": 64, "n_positions": 64,
    "image_size": 32, "patch_size": 8, "head_dim": 8, "d_kv": 8, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 32,
}  # fmt: skip
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def _shrink(config: Any, depth: int = 0) -> None:
    """Set what sizes a configuration has to small ones, in its parts too."""
    for key, value in list(vars(config).items()):
        if key in _SIZES and isinstance(value, int) and not isinstance(value, bool):
            setattr(config, key, min(value, _SIZES[key]))
        elif key in _TOKENS and isinstance(value, int):
            setattr(config, key, _TOKENS[key])
        elif hasattr(value, "to_dict") and depth < 3:
            _shrink(value, depth + 1)
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[: getattr(config, "num_hidden_layers", 2)]


def build(kind: str) -> tuple[Any, dict[str, Any], str]:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    config = AutoConfig.for_model(kind)
    _shrink(config)
    config.return_dict = True
    cls = MODEL_MAPPING[type(config)]
    module = (cls[0] if isinstance(cls, tuple) else cls)(config)
    return module, _inputs_of(module, config), "sizes of the configuration"


def _inputs_of(module: Any, config: Any) -> dict[str, Any]:
    """Inputs as the arguments of the model's forward ask for them."""
    import inspect

    import torch

    parameters = inspect.signature(module.forward).parameters
    inputs: dict[str, Any] = {}
    if "input_ids" in parameters:
        inputs["input_ids"] = torch.randint(3, 90, (2, 12))
    if "pixel_values" in parameters and module.main_input_name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 64)
        sides = (size, size) if isinstance(size, int) else tuple(size)
        inputs["pixel_values"] = torch.randn(2, getattr(vision, "num_channels", 3), *sides)
    if "decoder_input_ids" in parameters and "input_ids" in parameters:
        inputs["decoder_input_ids"] = torch.randint(3, 90, (2, 7))
    if "input_values" in parameters:
        bins = getattr(config, "num_mel_bins", None)
        length = getattr(config, "max_length", 128)
        inputs["input_values"] = torch.randn(2, length, bins) if bins else torch.randn(2, 4000)
    if "input_features" in parameters and "input_ids" not in parameters:
        inputs["input_features"] = torch.randn(2, getattr(config, "num_mel_bins", 80), 128)
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    return inputs
