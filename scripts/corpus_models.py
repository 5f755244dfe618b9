"""Every model that is installed of torchvision, timm and transformers, small, with its inputs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

# torchvision's compiled operators: their schemas alone let it be imported where they cannot load.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou) -> Tensor",
    "roi_align(Tensor x, Tensor rois, float scale, SymInt h, SymInt w, int n, bool a) -> Tensor",
    "_roi_align_backward(Tensor g, Tensor rois, float scale, SymInt h, SymInt w, SymInt b,"
    " SymInt c, SymInt hh, SymInt ww, int n, bool a) -> Tensor",
    "ps_roi_align(Tensor x, Tensor rois, float scale, SymInt h, SymInt w, int n)"
    " -> (Tensor, Tensor)",
    "_ps_roi_align_backward(Tensor g, Tensor rois, Tensor m, float scale, SymInt h, SymInt w,"
    " int n, SymInt b, SymInt c, SymInt hh, SymInt ww) -> Tensor",
    "roi_pool(Tensor x, Tensor rois, float scale, SymInt h, SymInt w) -> (Tensor, Tensor)",
    "_roi_pool_backward(Tensor g, Tensor rois, Tensor m, float scale, SymInt h, SymInt w,"
    " SymInt b, SymInt c, SymInt hh, SymInt ww) -> Tensor",
    "ps_roi_pool(Tensor x, Tensor rois, float scale, SymInt h, SymInt w) -> (Tensor, Tensor)",
    "_ps_roi_pool_backward(Tensor g, Tensor rois, Tensor m, float scale, SymInt h, SymInt w,"
    " SymInt b, SymInt c, SymInt hh, SymInt ww) -> Tensor",
    "deform_conv2d(Tensor x, Tensor w, Tensor o, Tensor m, Tensor b, SymInt sh, SymInt sw,"
    " SymInt ph, SymInt pw, SymInt dh, SymInt dw, SymInt g, SymInt og, bool um) -> Tensor",
    "_deform_conv2d_backward(Tensor g, Tensor x, Tensor w, Tensor o, Tensor m, Tensor b,"
    " SymInt sh, SymInt sw, SymInt ph, SymInt pw, SymInt dh, SymInt dw, SymInt gr, SymInt og,"
    " bool um) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_LIBRARIES: list[Any] = []  # a torch.library lives as long as its object

# Words of a timm name that say that a model is small, the smallest first.
_SMALL = (
    "test_", "femto", "atto", "pico", "nano", "xxs", "xx_s", "tiny", "_t_", "xs", "mini", "small",
    "_s_", "s0", "b0", "t0", "m0", "18", "26", "32",
)  # fmt: skip


def vision_without_operators() -> None:
    """Let torchvision be imported where its compiled operators are missing."""
    import torch

    if _LIBRARIES or hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _LIBRARIES.append(library)


def names() -> list[str]:
    """Names of all models of the packages that are installed: "timm/convnext"."""
    found: list[str] = []
    if find_spec("torchvision"):
        vision_without_operators()
        import torchvision.models as tm

        found += [f"torchvision/{n}" for n in tm.list_models(module=tm)]
    if find_spec("timm"):
        import timm

        found += [f"timm/{n}" for n in sorted(timm.list_modules())]
    if find_spec("transformers"):
        from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

        found += [f"transformers/{n}" for n in sorted(MODEL_MAPPING_NAMES)]
    return found


def build(name: str) -> tuple[Any, dict[str, Any], str]:
    """The module in eval mode, its inputs by name, and what was made smaller."""
    warnings.simplefilter("ignore")
    if find_spec("torchvision"):  # transformers imports it too
        vision_without_operators()
    package, _, model = name.partition("/")
    makers: dict[str, Callable[[str], tuple[Any, dict[str, Any], str]]] = {
        "torchvision": _torchvision,
        "timm": _timm,
        "transformers": _transformers,
    }
    module, inputs, shrunk = makers[package](model)
    return module.eval(), inputs, shrunk


def _torchvision(model: str) -> tuple[Any, dict[str, Any], str]:
    import torch
    import torchvision.models as tm

    options: dict[str, Any] = {"num_classes": 10}
    if model == "googlenet" or model.startswith("inception"):
        options |= {"init_weights": False, "aux_logits": False, "transform_input": False}
    module = tm.get_model(model, weights=None, **options)
    size = 224 if model.startswith("vit") else 96 if model.startswith("inception") else 64
    return module, {"x": torch.randn(2, 3, size, size)}, f"{size} x {size} pixels, 10 classes"


def _timm(family: str) -> tuple[Any, dict[str, Any], str]:
    import timm
    import torch

    def size(model: str) -> tuple[int, str]:
        rank = [i for i, word in enumerate(_SMALL) if word in f"{model}_"]
        return (min(rank) if rank else len(_SMALL), model)

    model = min(timm.list_models(module=family), key=size)
    module = timm.create_model(model, pretrained=False, num_classes=10)
    config = module.pretrained_cfg
    channels, *sides = config.get("input_size", (3, 224, 224))
    return module, {"x": torch.randn(2, channels, *sides)}, f"{model}, 10 classes"


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


def _transformers(kind: str) -> tuple[Any, dict[str, Any], str]:
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


def failure_class(error: str) -> str:
    """The class of a failure from its last line, without what is the model's own."""
    last = error.strip().splitlines()[-1] if error.strip() else "no message"
    return re.sub(r"[0-9]+", "N", last)[:160]
