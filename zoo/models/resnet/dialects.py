"""ResNet as transformers spells it, in PyTorch and in the Flax of its version 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.layout.renames import Pairs
from zoo.model import Dialect
from zoo.models.resnet.config import EXPANSION, Config

_HEAD, _NO_HEAD = "ResNetForImageClassification", "ResNetModel"
# What transformers can be told to make otherwise, and this family cannot.
_FIXED = {
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}


def renames(c: Config, layer: str = "{k}") -> Pairs:
    """Our modules and theirs, in their order (models/resnet/modeling_resnet.py). `layer` is what a
    convolution within a block is called."""
    root = "resnet." if c.num_classes else ""
    stem, block = f"{root}embedder.embedder", f"{root}encoder.stages.{{s}}.layers.{{i}}"
    return (
        ("conv1", f"{stem}.convolution"),
        ("bn1", f"{stem}.normalization"),
        ("layer{s+1}.{i}.downsample.0", f"{block}.shortcut.convolution"),
        ("layer{s+1}.{i}.downsample.1", f"{block}.shortcut.normalization"),
        ("layer{s+1}.{i}.conv{k+1}", f"{block}.layer.{layer}.convolution"),
        ("layer{s+1}.{i}.bn{k+1}", f"{block}.layer.{layer}.normalization"),
        ("fc", "classifier.1"),
    )


def renames_flax(c: Config) -> Pairs:
    """The same in models/resnet/modeling_flax_resnet.py, whose basic blocks name their layers."""
    return renames(c, "layer_{k}" if c.block == "basic" else "{k}")


def from_hf(data: Mapping[str, Any]) -> Config:
    """The Config that a transformers config.json states.

    Raises ValueError for what ResNet in transformers can be told to be and this one is not.
    """
    if wrong := [k for k, v in _FIXED.items() if data.get(k, v) != v]:
        raise ValueError(f"{wrong[0]} is {data[wrong[0]]!r}; here it is {_FIXED[wrong[0]]!r}")
    block = data.get("layer_type", "bottleneck")
    width = data.get("embedding_size", 64)
    labels = data.get("num_labels") or len(data.get("id2label") or ()) or 2
    config = Config(
        block=block,
        layers=tuple(data.get("depths", (3, 4, 6, 3))),
        width=width,
        num_classes=0 if data.get("architectures") == [_NO_HEAD] else labels,
        in_channels=data.get("num_channels", 3),
    )
    sizes = list(data.get("hidden_sizes", _sizes(Config())))
    if sizes != _sizes(config):
        raise ValueError(f"hidden_sizes {sizes}; here they are {_sizes(config)}")
    return config


def to_hf(c: Config) -> dict[str, Any]:
    """The keys of a transformers config.json; `from_hf` gives the Config back. None at all for a
    stem that transformers cannot be told to make."""
    if (c.stem_kernel, c.stem_stride, c.stem_pool) != (7, 2, True):
        return {}
    return {
        "model_type": "resnet",
        "architectures": [_HEAD if c.num_classes else _NO_HEAD],
        "layer_type": c.block,
        "depths": list(c.layers),
        "embedding_size": c.width,
        "hidden_sizes": _sizes(c),
        "num_channels": c.in_channels,
        **_FIXED,
        "id2label": {str(i): f"LABEL_{i}" for i in range(c.num_classes)},
        "label2id": {f"LABEL_{i}": i for i in range(c.num_classes)},
    }


def _sizes(c: Config) -> list[int]:
    """Channels out of each stage."""
    return [c.width * 2**stage * c.expansion for stage in range(4)]


_EVERY = tuple(Config(block=b, num_classes=n) for b in EXPANSION for n in (0, 1))  # type: ignore[arg-type]

DIALECTS = (
    Dialect("transformers", "torch", renames, "transformers' ResNetForImageClassification", _EVERY),
    Dialect("transformers-flax", "linen", renames_flax, "FlaxResNet of transformers 4", _EVERY),
)
