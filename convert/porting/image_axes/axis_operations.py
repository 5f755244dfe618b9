"""What operations do with axes: which of their arguments name one, and what becomes of it.

An operation that is in no table here takes torch's own order and gives it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from convert.porting.image_axes.orders import Order
from convert.porting.rendering.templates import templates
from convert.porting.rules.elementwise import COPIES
from convert.program.graph import GraphNode

GETITEM = "operator.getitem"
PERMUTE = "aten.permute.default"
UNSQUEEZE = "aten.unsqueeze.default"
VIEW = "aten.view.default"
Place = tuple[int, str]  # of an argument: its position and its name

# The array keeps its axes; the argument says along which one, or which ones.
ALONG: Mapping[str, Place] = {
    **dict.fromkeys(
        (
            *("aten.softmax.int", "aten.log_softmax.int", "aten._softmax.default"),
            *("aten._log_softmax.default", "aten.cumsum.default", "aten.cumprod.default"),
            *("aten.slice.Tensor", "aten.slice_copy.Tensor", "aten.narrow.default"),
            *("aten.index_select.default", "aten.glu.default"),
            *("aten.sort.default", "aten.argsort.default"),
        ),
        (1, "dim"),
    ),
    "aten.flip.default": (1, "dims"),
    "aten.roll.default": (2, "dims"),
    "aten.cat.default": (1, "dim"),
    "aten.topk.default": (2, "dim"),
    "aten.repeat_interleave.self_int": (2, "dim"),
    "aten.split.Tensor": (2, "dim"),
    "aten.split_with_sizes.default": (2, "dim"),
    "aten.chunk.default": (2, "dim"),
}
_FIRST = {"aten.cat.default", *(o for o in ALONG if "split" in o or "slice" in o or "chunk" in o)}

# Axes go, unless `keepdim` (the second place) says that they stay.
REDUCE: Mapping[str, tuple[Place, Place]] = {
    **dict.fromkeys(
        (
            *("aten.sum.dim_IntList", "aten.mean.dim", "aten.amax.default", "aten.amin.default"),
            *("aten.max.dim", "aten.min.dim", "aten.argmax.default", "aten.argmin.default"),
            *("aten.logsumexp.default", "aten.prod.dim_int", "aten.all.dim", "aten.any.dim"),
            *("aten.all.dims", "aten.any.dims"),
            *("aten.var.correction", "aten.std.correction"),
            *("aten.var_mean.correction", "aten.std_mean.correction"),
        ),
        ((1, "dim"), (2, "keepdim")),
    ),
    "aten.var.dim": ((1, "dim"), (3, "keepdim")),
    "aten.std.dim": ((1, "dim"), (3, "keepdim")),
    "aten.linalg_vector_norm.default": ((2, "dim"), (3, "keepdim")),
}
# One axis goes, or those of size 1.
DROP = {
    *("aten.select.int", "aten.select_copy.int", "aten.unbind.int", "aten.unbind_copy.int"),
    *("aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze_copy.dims"),
}
VIEWS = {
    *("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default"),
    *("aten.view_copy.default", "aten._reshape_copy.default", "aten.flatten.using_ints"),
    *("aten.unflatten.int", "aten.squeeze.default", "aten.view_as.default"),
}
# A number for each axis.
SIZED = {
    *("aten.expand.default", "aten.expand_copy.default", "aten.broadcast_to.default"),
    *("aten.repeat.default", "aten.tile.default"),
}
PADS = {
    *("aten.constant_pad_nd.default", "aten.pad.default", "aten._pad_enum.default"),
    *(f"aten.{kind}_pad{n}d.default" for kind in ("reflection", "replication") for n in (1, 2, 3)),
    "aten._pad_circular.default",
}
_MORE = {
    *("aten.dropout.default", "aten.expand_as.default", "aten.empty_like.default"),
    *("aten.erf.default", "aten.erfinv.default", "aten.rand_like.default"),
    *("aten.detach.default", "aten.detach_copy.default"),
    *(f"aten.{n}_like.default" for n in ("full", "zeros", "ones")),
}


@functools.cache
def elementwise() -> frozenset[str]:
    """Operations that give each element of arrays that broadcast something of its own."""
    homes = ("pointwise", "activating", "casting")
    found = {
        op for op, f in templates().items() if f.__module__.rpartition(".")[2] in homes
    }  # fmt: skip
    axed = {*ALONG, "aten.prelu.default", "aten.special_softmax.default",
            "aten.special_log_softmax.default"}  # fmt: skip
    return frozenset((found | set(COPIES) | _MORE) - axed)


def argument(node: GraphNode, place: Place, default: Any = None) -> Any:
    """An argument by its position or name."""
    index, name = place
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def with_argument(
    args: list[Any], kwargs: dict[str, Any], place: Place, value: Any
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments with another one at a place."""
    index, name = place
    if len(args) > index:
        return [*args[:index], value, *args[index + 1 :]], kwargs
    return args, {**kwargs, name: value}


def along(node: GraphNode) -> tuple[Place, Any]:
    """The place of the axis of an operation in ALONG, and the axis."""
    place = ALONG[node.op]
    return place, argument(node, place, 0 if node.op in _FIRST else -1)


def listed(dims: Any, n: int) -> list[int]:
    """Axes as torch takes them, counted from the front."""
    found = dims if isinstance(dims, list | tuple) else [] if dims is None else [dims]
    return [int(d) % n for d in found]


def permutation(node: GraphNode, n: int) -> Order | None:
    """The axes of torch's that an operation puts in each place, if that is all it does."""
    op = node.op.split(".")[1]
    axes = list(range(n))
    if op in ("permute", "permute_copy"):
        return tuple(int(d) % n for d in argument(node, (1, "dims")))
    if op in ("transpose", "swapaxes", "swapdims", "transpose_copy") and n:
        a, b = (int(argument(node, (k, f"dim{k - 1}"))) % n for k in (1, 2))
        axes[a], axes[b] = axes[b], axes[a]
        return tuple(axes)
    if op in ("t", "numpy_T", "mT", "t_copy") and n == 2:
        return (1, 0)
    if op == "movedim":
        source, destination = (
            listed(argument(node, (k, name)), n) for k, name in ((1, "source"), (2, "destination"))
        )
        left = iter([a for a in axes if a not in source])
        placed = dict(zip(destination, source, strict=True))
        return tuple(placed[k] if k in placed else next(left) for k in range(n))
    return None
