"""Every model that is installed of torchvision, timm and transformers, small, with its inputs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import corpus_transformers

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
        found += [f"transformers/{n}" for n in corpus_transformers.names()]
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
        "transformers": corpus_transformers.build,
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


def failure_class(error: str) -> str:
    """The class of a failure from its last line, without what is the model's own."""
    last = error.strip().splitlines()[-1] if error.strip() else "no message"
    return re.sub(r"[0-9]+", "N", last)[:160]
