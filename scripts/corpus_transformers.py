"""Base models of transformers with small configurations, and inputs that they run on.

Nothing here is for one model type: sizes are set by the name that they have in a configuration, and
inputs made by the name that they have in `forward`. A configuration is made small, or, where the
model does not run so, shallow only; of the sets of inputs that its `forward` takes, the first that
runs is taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

LARGEST = 100_000_000  # parameters: what is larger takes longer than it tells
B, T = 2, 12  # batch, tokens


def names() -> list[str]:
    """Every model type that has a base model."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(MODEL_MAPPING_NAMES)


# What a number of a configuration is at most.
_DEPTHS: dict[str, int] = {
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_decoder_layers": 2, "depth": 2, "vocab_size": 99, "image_size": 32,
    "num_encoder_layers": 2, "max_source_positions": 64, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "top_k_experts": 2,
    "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "num_queries": 8, "num_frames": 2,
    "frames": 2, "prediction_length": 8, "context_length": 32, "num_expert_group": 1,
    "num_experts_per_token": 2, "moe_num_experts_per_tok": 2, "num_limited_groups": 1,
    "vocab_size_per_layer_input": 99, "max_length": 128, "n_words": 99,
    "encoder_num_hidden_layers": 2, "predictor_num_hidden_layers": 2, "pred_num_hidden_layers": 2,
}  # fmt: skip
_WIDTHS: dict[str, int] = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "dim": 32, "d_inner": 64,
    "embedding_size": 32, "intermediate_size": 64, "ffn_dim": 64, "n_inner": 64, "mlp_dim": 64,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_ff": 64, "num_attention_heads": 4,
    "n_head": 4, "num_heads": 4, "n_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "n_positions": 64, "patch_size": 8, "head_dim": 8, "d_kv": 8, "moe_intermediate_size": 32,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 16,
    "kv_lora_rank": 16, "rotary_dim": 4, "shared_expert_intermediate_size": 32,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "time_step_rank": 4,
    "state_size": 8, "out_hidden_size": 32, "lru_width": 32, "index_head_dim": 16,
    "index_n_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "attention_size": 32,
    "encoder_hidden_size": 32, "cross_hidden_size": 32, "cross_attention_hidden_size": 32,
    "emb_dim": 32, "mamba_d_ssm": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "n_mel_channels": 16,
}  # fmt: skip
_UNSTATED = ("head_dim", "num_key_value_heads", "n_routed_experts", "vocab_size")
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def _shrink(config: Any, sizes: dict[str, int], depth: int = 0) -> None:
    """Set what sizes a configuration has to small ones, in its parts too."""
    for key, value in list(vars(config).items()):
        if key == "use_cache":
            _set(config, key, False)
        elif key in _TOKENS and isinstance(value, int):
            _set(config, key, _TOKENS[key])
        elif key in sizes and isinstance(value, int) and not isinstance(value, bool):
            _set(config, key, min(value, sizes[key]))
        elif value is None and key in _UNSTATED and key in sizes:
            _set(config, key, sizes[key])
        elif hasattr(value, "to_dict") and depth < 3:
            _shrink(value, sizes, depth + 1)
        elif key.startswith("rope_") and isinstance(value, dict) and sizes.get("head_dim"):
            _section(config, value)
    layers = getattr(config, "num_hidden_layers", 2)
    for key in ("layer_types", "layers_block_type", "mlp_layer_types"):
        types = getattr(config, key, None)
        if isinstance(types, list) and isinstance(layers, int):
            kinds = list(dict.fromkeys(types))  # every kind of layer that there is, once
            _set(config, key, (kinds + types)[: max(layers, 1)])
    if getattr(config, "kv_lora_rank", None) and "head_dim" in sizes:  # latent attention: no groups
        _set(config, "num_key_value_heads", config.num_attention_heads)
    heads = getattr(config, "num_heads", None)
    if isinstance(heads, list | tuple) and "embed_dim" in sizes:  # one number for each stage
        _set(config, "embed_dim", 8 * heads[0])


def _section(config: Any, rope: dict[str, Any]) -> None:
    """The parts of a rotary embedding over time, height and width fill half of a head."""
    if "mrope_section" in rope or "rope_type" in rope:
        heads = getattr(config, "num_attention_heads", 4)
        width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 32) // heads
        half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]


def _set(config: Any, key: str, value: Any) -> None:
    """Set an attribute, but for one that a class derives of others."""
    try:
        setattr(config, key, value)
    except (AttributeError, TypeError, ValueError):
        return


def build(kind: str) -> tuple[Any, dict[str, Any], str]:
    """The module, inputs that it runs on, and what was made smaller. Raises what the first try
    raised."""
    import torch
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    failures: list[Exception] = []
    tries = (
        (_DEPTHS | _WIDTHS, "sizes of the configuration"),
        (_DEPTHS, "depths of the configuration"),
    )
    for sizes, shrunk in tries:
        try:
            config = AutoConfig.for_model(kind)
            _shrink(config, sizes)
            config.return_dict = True
            cls = MODEL_MAPPING[type(config)]
            cls = cls[0] if isinstance(cls, tuple) else cls
            with torch.device("meta"):
                count = sum(p.numel() for p in cls(config).parameters())
            if count > LARGEST:
                raise ValueError(f"{count:,} parameters are too many to judge it quickly")
            module = cls(config).eval()
        except Exception as e:  # whatever a configuration's class raises that these sizes break
            failures.append(e)
            continue
        for inputs in candidates(module, config):
            try:
                with torch.no_grad():
                    module(**inputs)
            except Exception as e:  # the same, of its forward
                failures.append(e)
                continue
            return module, inputs, shrunk
    raise failures[0] if failures else ValueError("no input of its forward is known here")


def candidates(module: Any, config: Any) -> Iterator[dict[str, Any]]:
    """Sets of inputs that the model's `forward` may want, the likeliest first."""
    parameters = inspect.signature(module.forward).parameters
    required = [
        n
        for n, p in parameters.items()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    known = [n for n in parameters if n in _INPUTS]
    main = getattr(module, "main_input_name", "input_ids")
    texts = [n for n in known if n in ("input_ids", "decoder_input_ids")]
    least = dict.fromkeys([*required, *([main] if main in known else []), *texts[:1]])
    sets = [
        [n for n in least if n in known],
        [n for n in [*required, main] if n in known],
        [*least, *texts],
        [*required, main, *texts[1:]],
        [n for n in known if n not in _SELDOM],
        [n for n in known if n not in _SELDOM and n not in ("input_ids", "pixel_values_videos")],
        [n for n in known if n != "input_ids"],
        known,
    ]
    tried: list[frozenset[str]] = []
    for some in sets:
        chosen = frozenset(n for n in some if n in known)
        if not chosen or chosen in tried:
            continue
        tried.append(chosen)
        forms = max(len(_INPUTS[n]) for n in chosen)
        for form in range(forms):
            made = {n: _INPUTS[n][min(form, len(_INPUTS[n]) - 1)](config) for n in sorted(chosen)}
            if "use_cache" in parameters:
                made["use_cache"] = False
            yield made


_SELDOM = ("pixel_values_videos", "attention_mask", "past_values_mask", "padding_mask", "freq")


def _of(config: Any, *keys: str, default: int) -> int:
    """The first of the sizes that a configuration, or a part of it, has."""
    parts = [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))]
    for part in parts:
        for key in keys:
            value = getattr(part, key, None)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return default


def _ids(tokens: int = T) -> Callable[[Any], Any]:
    def made(config: Any) -> Any:
        import torch

        return torch.randint(3, min(90, max(5, _of(config, "vocab_size", default=90))), (B, tokens))

    return made


def _image(*frames: int, side: int = 0) -> Callable[[Any], Any]:
    def made(config: Any) -> Any:
        import torch

        size = side or _of(config, "image_size", "img_size", "input_size", default=64)
        channels = _of(config, "num_channels", "in_channels", "in_chans", default=3)
        return torch.randn(B, *frames, channels, size, size)

    return made


def _video(config: Any) -> Any:
    import torch

    frames = _of(config, "num_frames", "frames", "frames_per_clip", default=2)
    size = _of(config, "image_size", "crop_size", default=64)
    return torch.randn(B, frames, _of(config, "num_channels", "in_chans", default=3), size, size)


def _floats(*shape: int) -> Callable[[Any], Any]:
    def made(config: Any) -> Any:
        import torch

        return torch.randn(*shape)

    return made


def _ones(*shape: int) -> Callable[[Any], Any]:
    def made(config: Any) -> Any:
        import torch

        return torch.ones(*shape, dtype=torch.long)

    return made


def _spectrum(frames_last: bool, frames: int = 128) -> Callable[[Any], Any]:
    def made(config: Any) -> Any:
        import torch

        bins = _of(
            config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim",
            "model_in_dim", "input_dim", "n_mels", "num_mels", default=80,
        )  # fmt: skip
        return torch.randn(B, bins, frames) if frames_last else torch.randn(B, frames, bins)

    return made


def _sized(*keys: str, tokens: int = T) -> Callable[[Any], Any]:
    def made(config: Any) -> Any:
        import torch

        return torch.randn(B, tokens, _of(config, *keys, default=32))

    return made


def _series(config: Any) -> Any:
    import torch

    channels = _of(config, "num_input_channels", default=0)
    length = _of(config, "context_length", default=64)
    return torch.randn(B, length, *([channels] if channels else []))


def _boxes(config: Any) -> Any:
    import torch

    low = torch.randint(0, 400, (B, T, 2))
    return torch.cat([low, low + torch.randint(1, 400, (B, T, 2))], dim=-1)


# The name of an input -> the forms in which a model may want it.
_INPUTS: dict[str, tuple[Callable[[Any], Any], ...]] = {
    "input_ids": (_ids(), _ids(), _ids(8)),
    "decoder_input_ids": (_ids(7),),
    "inputs_embeds": (_sized("hidden_size", "d_model"),),
    "pixel_values": (_image(), _image(side=64), _video, _image(2), _image(side=128)),
    "pixel_values_videos": (_video,),
    "input_values": (
        _floats(B, 4000), _floats(B, 1, 3840), _spectrum(False), _sized("num_mel_bins", tokens=40),
    ),
    "input_features": (
        _spectrum(True), _spectrum(False), _spectrum(True, 96), _spectrum(False, 64),
    ),
    "input_features_mask": (_ones(B, 128), _ones(B, 128), _ones(B, 96), _ones(B, 64)),
    "input_ids_mask": (_ones(B, T),),
    "attention_mask": (_ones(B, T), _ones(B, 128)),
    "bbox": (_boxes,),
    "past_values": (_series,),
    "states": (_sized("state_dim"),),
    "actions": (_sized("act_dim"),),
    "rewards": (_floats(B, T, 1),),
    "returns_to_go": (_floats(B, T, 1),),
    "timesteps": (_ids(),),
    "query_embeds": (_sized("hidden_size", tokens=6),),
    "qformer_input_ids": (_ids(),),
    "visual_feats": (_sized("visual_feat_dim", tokens=5),),
    "visual_pos": (_floats(B, 5, 4),),
    "hidden_states": (_sized("hidden_size"), _floats(B, 64, 20)),
    "spectrogram": (_spectrum(False),),
}  # fmt: skip
