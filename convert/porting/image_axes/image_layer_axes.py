"""What torch's layers do with axes: which take images, and which leave the axes as they are."""

from __future__ import annotations

import re
from typing import Any, Literal

from convert.porting.rendering.layer_text import torch_class
from convert.porting.rendering.renderers import RENDERERS

Kind = Literal["image", "bare", "same", "along", "flatten", "plain"]

_OF_SPACE = re.compile(
    r"(Conv|ConvTranspose|BatchNorm|InstanceNorm|(Adaptive)?(Max|Avg)Pool|Dropout"
    r"|(Zero|Constant|Reflection|Replication|Circular)Pad)([123])d"
)
_OTHERS = {"GroupNorm", "Upsample", "UpsamplingNearest2d", "UpsamplingBilinear2d"}
_OF_FOUR = {"PixelShuffle", "PixelUnshuffle", "Softmax2d"}
_ALONG = {"Softmax", "LogSoftmax", "GLU", "Softmin"}
_SAME = {"Identity", "Dropout", "AlphaDropout"}
_NORMS = ("BatchNorm", "GroupNorm", "InstanceNorm")


class NoSuchAxes(Exception):
    """A layer takes an image in other axes than (B, C, *D)."""


def kind_of(module: Any, n: int) -> Kind:
    """What a layer does with the axes of an array of n: "image" takes and gives channels last,
    "bare" is of such a class and has no axes of space, "same" leaves them, "along" has an axis
    among its arguments, "plain" takes torch's own order. NoSuchAxes for images without a batch."""
    base = torch_class(module)
    name = "" if base is None else base.__name__
    spatial = _OF_SPACE.fullmatch(name)
    if name == "PReLU":
        return "same" if module.num_parameters == 1 else "image" if n > 2 else "bare"
    if spatial or name in _OTHERS or name in _OF_FOUR:
        if n == 2 and name.startswith(_NORMS):
            return "bare"
        wanted = int(spatial[5]) + 2 if spatial else 4 if name in _OF_FOUR else max(n, 3)
        if n != wanted:
            raise NoSuchAxes(f"a {name} takes an array of {n} axes")
        return "image"
    if name in _ALONG:
        return "along"
    if name == "Flatten":
        return "flatten"
    if name in _SAME:
        return "same"
    home = getattr(RENDERERS.get(name), "__module__", "")
    activation = home.endswith("activation_layers") and name != "Unflatten"
    return "same" if activation else "plain"
