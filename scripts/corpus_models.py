"""Every model that is installed of torchvision, timm and transformers, small, with its inputs."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.util import find_spec
from operator import attrgetter
from typing import Any
from unittest import mock

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
    _draw_zeros(module)
    return module.eval(), inputs, shrunk


def _draw_zeros(module: Any) -> None:
    """Give matrices of zeros values: they hide what follows, or leave it to chance (the experts of
    a router that likes all alike)."""
    import torch

    with torch.no_grad():
        for p in module.parameters():
            if p.ndim > 1 and p.is_floating_point() and not p.any():
                p.normal_(0, 0.1)


# torchvision's deep models: two blocks a stage tell what forty do. Class -> its argument.
_DEEP = re.compile(
    r"convnext|densenet|efficientnet_(b[3-7]|v2)|regnet_._(3_2|8|16|32|128)gf"
    r"|(wide_)?res(net|next)1|swin|vit_|maxvit"
)
_STAGES = {
    "convnext.ConvNeXt": "block_setting",
    "densenet.DenseNet": "block_config",
    "efficientnet.EfficientNet": "inverted_residual_setting",
    "regnet.RegNet": "block_params",
    "resnet.ResNet": "layers",
    "swin_transformer.SwinTransformer": "depths",
    "vision_transformer.VisionTransformer": "num_layers",
    "maxvit.MaxVit": "block_layers",
}
_BLOCKS = 2


def _capped(value: Any) -> Any:
    """Depths, or what states them, with at most two blocks a stage."""
    if isinstance(value, int):
        return min(value, _BLOCKS)
    if isinstance(value, list | tuple):
        return type(value)(_capped(v) for v in value)
    for name in ("num_layers", "depths"):
        if getattr(value, name, None) is not None:
            setattr(value, name, _capped(getattr(value, name)))
    return value


def _capping(init: Callable[..., None], argument: str) -> Callable[..., None]:
    """A constructor that caps one of its arguments."""

    def capped(*args: Any, **more: Any) -> None:
        call = inspect.signature(init).bind(*args, **more)
        call.arguments[argument] = _capped(call.arguments[argument])
        init(*call.args, **call.kwargs)

    return capped


@contextmanager
def _shallow() -> Iterator[None]:
    """torchvision's constructors, called with at most two blocks a stage."""
    import torchvision.models as tm

    with ExitStack() as stack:
        for path, argument in _STAGES.items():
            owner = attrgetter(path)(tm)

            stack.enter_context(
                mock.patch.object(owner, "__init__", _capping(owner.__init__, argument))
            )
        yield


def _torchvision(model: str) -> tuple[Any, dict[str, Any], str]:
    import torch
    import torchvision.models as tm

    options: dict[str, Any] = {"num_classes": 10}
    if model == "googlenet" or model.startswith("inception"):
        options |= {"init_weights": False, "aux_logits": False, "transform_input": False}
    deep = bool(_DEEP.match(model))
    with _shallow() if deep else nullcontext():
        module = tm.get_model(model, weights=None, **options)
    size = 224 if re.match("vit|maxvit", model) else 96 if model.startswith("inception") else 64
    shrunk = f"{size} x {size} pixels, 10 classes" + (", two blocks a stage" if deep else "")
    return module, {"x": torch.randn(2, 3, size, size)}, shrunk


# Families of timm whose smallest model is not told by its name, or is deep.
_CHOSEN: dict[str, tuple[str, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", {"depth": 2}),
    "deepseek_vit": ("deepseek_vit_412m", {"depth": 2}),
    "densenet": ("densenet121", {}),
    "dla": ("dla46_c", {}),
    "dpn": ("dpn48b", {}),
    "fastvit": ("fastvit_t8", {}),
    "gemma4_vit": ("gemma4_vit_167m", {"depth": 2}),
    "mlp_mixer": ("gmlp_ti16_224", {}),
    "mobilenetv5": ("mobilenetv5_base", {}),
    "naflexvit": ("naflexvit_base_patch16_gap", {"depth": 2}),
    "qwen3_vit": ("qwen3_vit_88m", {"depth": 2}),
    "res2net": ("res2net50_48w_2s", {}),
    "resnest": ("resnest14d", {}),
    "tresnet": ("tresnet_m", {}),
    "vision_transformer_sam": (
        "samvit_base_patch16",
        {"depth": 2, "img_size": 256, "global_attn_indexes": (1,)},
    ),
}


def _timm(family: str) -> tuple[Any, dict[str, Any], str]:
    import timm
    import torch

    def rank(model: str) -> tuple[int, str]:
        words = [i for i, word in enumerate(_SMALL) if word in f"{model}_"]
        return (min(words) if words else len(_SMALL), model)

    model, options = _CHOSEN.get(family, ("", {}))
    model = model or min(timm.list_models(module=family), key=rank)
    module = timm.create_model(model, pretrained=False, num_classes=10, **options).eval()
    config = module.pretrained_cfg
    channels, side, _ = config.get("input_size", (3, 224, 224))
    for size in (96, 128, options.get("img_size", side)):
        inputs = {"x": torch.randn(2, channels, size, size)}
        try:
            with torch.no_grad():
                module(**inputs)
        except Exception:  # whatever a model raises for an image of another size than its own
            continue
        break
    told = "".join(f", {k} {v}" for k, v in options.items())
    return module, inputs, f"{model}, 10 classes{told}, {size} x {size} pixels"


def failure_class(error: str) -> str:
    """The class of a failure from its last line, without what is the model's own."""
    last = error.strip().splitlines()[-1] if error.strip() else "no message"
    return re.sub(r"[0-9]+", "N", last)[:160]
