"""Images resized by another rule: another kernel, smoothed where they shrink, edges otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from convert.diagnose.repair.edit import Edit, Node
from convert.program.replay import At


def resized(node: Node) -> Iterator[Edit]:
    """The rules of torch's `interpolate`, and cubic ones that it has not."""
    if node.name in ("interpolate", "upsample"):
        yield from _by_torch(node)
        yield from _cubic(node)


def _by_torch(node: Node) -> Iterator[Edit]:
    from torch.nn import functional

    axes = node.tensors[0].ndim - 2
    smooth = {1: "linear", 2: "bilinear", 3: "trilinear"}.get(axes, "bilinear")
    ways: list[dict[str, Any]] = [{"mode": m} for m in ("nearest", "nearest-exact", "area")]
    for mode in (smooth, *(["bicubic"] if axes == 2 else [])):
        for corners in (False, True):
            ways.append({"mode": mode, "align_corners": corners})
        if axes == 2:
            ways.append({"mode": mode, "antialias": True})
    for way in ways:

        def change(at: At, way: dict[str, Any] = way) -> Any:
            return functional.interpolate(at.args[0], size=_size(at), **way)

        said = ", ".join(f"{k}={v}" for k, v in way.items())
        yield node.edit(1.0, "operation", f"resizing with {said}", change)


def _cubic(node: Node) -> Iterator[Edit]:
    """Keys' kernel with a = -0.5, as jax.image.resize has it; torch's has a = -0.75."""
    if node.tensors[0].ndim != 4:
        return
    for a, cut in ((-0.5, True), (-0.5, False), (-0.75, True)):

        def change(at: At, a: float = a, cut: bool = cut) -> Any:
            made = at.args[0]
            for axis, size in zip((-2, -1), _size(at), strict=True):
                weights = _weights(made.shape[axis], size, a, cut).to(made)
                made = (made.movedim(axis, -1) @ weights).movedim(-1, axis)
            return made

        edges = "what lies outside left out" if cut else "edges repeated"
        said = f"a cubic kernel of a = {a}, {edges}"
        yield node.edit(1.05, "constant" if a == -0.5 else "padding", said, change)


def _size(at: At) -> tuple[int, ...]:
    """What torch's call gives."""
    return tuple(at.run().shape[2:])


def _weights(before: int, after: int, a: float, cut: bool) -> Any:
    """(before, after): how much of each pixel is in each new one."""
    import torch

    places = (torch.arange(after, dtype=torch.float64) + 0.5) * before / after - 0.5
    made = torch.zeros(before, after, dtype=torch.float64)
    for k in range(-1, 3):
        taken = places.floor() + k
        x = (places - taken).abs()
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        weight = torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
        inside = (taken >= 0) & (taken < before)
        index = taken.clamp(0, before - 1).long()[None]
        made.scatter_add_(0, index, (weight * (inside | (not cut)))[None])
    return made / made.sum(0)
