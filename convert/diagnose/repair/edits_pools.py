"""Pools whose padding lies elsewhere: before the image, or as Flax's "SAME" has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from convert.diagnose.repair.edit import Edit, Node
from convert.program.replay import At, resolve

_POOLS = {f"{kind}_pool{n}d": n for kind in ("max", "avg") for n in (1, 2, 3)}
_WAYS: tuple[tuple[str, Callable[[int], tuple[int, int]]], ...] = (
    ("its padding in front of the image", lambda t: (t, 0)),
    ("padding SAME, the odd one behind the image", lambda t: (t // 2, t - t // 2)),
    ("its padding behind the image", lambda t: (0, t)),
)
_ADAPTIVE = {f"adaptive_{name}": n for name, n in _POOLS.items()}
Cells = Callable[[int, int, int], tuple[int, int]]
_CELLS: tuple[tuple[str, Cells], ...] = (
    ("cells that end at the floor and do not overlap",
     lambda i, size, bins: (i * size // bins, (i + 1) * size // bins)),
    ("cells of one size, the rest left out",
     lambda i, size, bins: (i * (size // bins), (i + 1) * (size // bins))),
    ("cells of one size and stride, the last at the end", lambda i, size, bins: (
        i * (size // bins), i * (size // bins) + size - (bins - 1) * (size // bins))),
)  # fmt: skip


def padded(node: Node) -> Iterator[Edit]:
    """Where the windows do not fill the image: the first one is cut, both ends, or the last."""
    if node.name in _POOLS:
        for said, way in _WAYS:
            yield node.edit(1.1, "pooling", said, _pooled(way))
    if node.name in _ADAPTIVE:
        for said, cells in _CELLS:
            yield node.edit(1.1, "pooling", said, _in_cells(cells))


def _in_cells(cells: Cells) -> Callable[[At], Any]:
    def change(at: At) -> Any:
        made, count = at.args[0], _ADAPTIVE[at.operation.name]
        for axis, bins in zip(range(-count, 0), at.run().shape[-count:], strict=True):
            size = made.shape[axis]
            parts = [made.narrow(axis, a, b - a) for a, b in (cells(i, size, bins)
                     for i in range(bins))]  # fmt: skip
            made = _joined(at, parts, axis)
        return made

    return change


def _joined(at: At, parts: list[Any], axis: int) -> Any:
    import torch

    reduce = torch.amax if "max" in at.operation.name else torch.mean
    return torch.cat([reduce(p, dim=axis, keepdim=True) for p in parts], axis)


def _pooled(way: Callable[[int], tuple[int, int]]) -> Callable[[At], Any]:
    def change(at: At) -> Any:
        import torch.nn.functional as F

        count = _POOLS[at.operation.name]
        image = at.args[0].shape[-count:]
        window, stride = _window(at.args, at.kwargs, count)
        short = [max((-(-n // s) - 1) * s + w - n, 0)
                 for n, w, s in zip(image, window, stride, strict=True)]  # fmt: skip
        flat = [p for t in reversed(short) for p in way(t)]
        fill = float("-inf") if at.operation.name.startswith("max") else 0.0
        x = F.pad(at.args[0], flat, value=fill)
        return resolve(at.operation.function)(x, window, stride)

    return change


def _window(args: tuple[Any, ...], kwargs: Mapping[str, Any], count: int) -> list[tuple[int, ...]]:
    """Window and stride, a number an axis."""
    window = args[1] if len(args) > 1 else kwargs["kernel_size"]
    stride = args[2] if len(args) > 2 else kwargs.get("stride")
    stride = stride if stride not in (None, (), []) else window
    return [(x,) * count if isinstance(x, int) else tuple(x) for x in (window, stride)]
