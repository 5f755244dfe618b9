"""Other numbers, flags and words among the arguments of an operation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from convert.diagnose.repair.edit import (
    Edit,
    Node,
    Path,
    dims_of,
    is_table,
    scalars,
    with_scalar,
    word,
)
from convert.program.operations import Program
from convert.program.replay import At, Change, Values, resolve

_SHAPES = {
    "view", "reshape", "expand", "zeros", "ones", "full", "empty", "to", "size", "flatten",
    "unflatten", "new_zeros", "broadcast_to", "view_as", "type", "float", "double", "contiguous",
    "permute", "transpose", "swapaxes", "movedim", "unsqueeze", "squeeze", "expand_as", "new_ones",
}  # fmt: skip
_CAUSES = {
    "mul": "scale", "div": "scale", "masked_fill": "mask", "where": "mask", "tril": "causal",
    "triu": "causal", "roll": "offset", "pad": "padding", "topk": "size", "unfold": "size",
    "leaky_relu": "activation", "elu": "activation", "softplus": "activation", "celu": "activation",
    "hardtanh": "activation", "gelu": "gelu", "var": "unbiased_variance",
    "std": "unbiased_variance", "repeat_interleave": "rearranged", "repeat": "rearranged",
    "chunk": "rearranged", "split": "rearranged", "flip": "reversed", "interpolate": "operation",
    "einsum": "operand", "softmax": "softmax_axis", "log_softmax": "softmax_axis",
    "diagonal": "offset", "eq": "mask", "lt": "mask", "le": "mask", "gt": "mask", "ge": "mask",
    "ne": "mask", "one_hot": "offset", "pixel_shuffle": "rearranged", "upsample": "operation",
}  # fmt: skip
_CONVOLUTION = {2: "bias_missing", 3: "stride", 4: "padding", 5: "dilation", 6: "groups"}
_CONVOLUTION |= {"stride": "stride", "padding": "padding", "dilation": "dilation"}  # type: ignore[dict-item]
_WORDS = {
    "approximate": ("none", "tanh"),
    "mode": ("nearest", "bilinear", "bicubic", "area", "nearest-exact", "linear", "constant",
             "reflect", "replicate", "circular"),
    "reduce": ("sum", "prod", "mean", "amax", "amin"),
    "padding": ("same", "valid"),
}  # fmt: skip
# Arguments that are often left at their defaults, and what they are elsewhere.
_DEFAULTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "stft": {"pad_mode": ("constant", "replicate"), "center": (False,), "onesided": (False,)},
    "pad": {"mode": ("reflect", "replicate", "circular")},
    "grid_sample": {"align_corners": (True,), "padding_mode": ("border", "reflection")},
    "avg_pool1d": {"count_include_pad": (False,)},
    "avg_pool2d": {"count_include_pad": (False,)},
    "searchsorted": {"right": (True,)},
    "bucketize": {"right": (True,)},
    "conv_transpose1d": {"output_padding": (1,)},
    "conv_transpose2d": {"output_padding": (1,)},
}
_PADS = ("pad_mode", "padding_mode", "center")
# Numbers that stand in code: factors, slopes, bounds, bases, epsilons.
_GRID = (
    0.0, 1.0, -1.0, 2.0, 0.5, 0.25, 3.0, 4.0, 6.0, 10.0, 0.1, 0.2, 0.01, 0.3, 0.9, 0.99, 1.702,
    1e-3, 1e-5, 1e-6, 1e-8, 1e-12, 100.0, 1e3, 1e4, 5e5, 1e6, math.pi, 2 * math.pi, math.log(2),
)  # fmt: skip


def numbers(node: Node) -> Iterator[Edit]:
    """Other values for each plain argument."""
    axis = dims_of(node.operation)
    for path, value in scalars(node.operation):
        if axis is not None and path[: len(axis[0])] == axis[0]:
            continue
        if isinstance(value, bool):
            if path[-1] != "inplace":
                yield _one(node, path, not value, 1.0)
        elif isinstance(value, int):
            yield from _integers(node, path, value)
        elif isinstance(value, float):
            yield from _floats(node, path, value)
        elif isinstance(value, str):
            yield from _strings(node, path, value)
    yield from _alike(node)
    yield from _axes(node)
    for name, others in _DEFAULTS.get(node.name, {}).items():
        for other in others if name not in node.operation.kwargs else ():

            def change(at: At, name: str = name, other: Any = other) -> Any:
                return resolve(at.operation.function)(*at.args, **{**at.kwargs, name: other})

            yield node.edit(1.0, cause(node, ("kwargs", name)), f"{name} {other!r}", change)
    if node.name in ("conv1d", "conv2d", "conv3d"):
        yield from _dilations(node)


def shared(program: Program, values: Values) -> Iterator[Edit]:
    """A whole number that several operations of one call take, another one in all of them."""
    taken: dict[Any, dict[int, Path]] = {}
    for index, operation in enumerate(program.operations):
        if operation.name in _SHAPES or operation.site is None:
            continue
        for path, value in scalars(operation):
            if isinstance(value, int) and not isinstance(value, bool) and value > 3:
                taken.setdefault((operation.site.calls, value), {}).setdefault(index, path)
    for (_, value), paths in taken.items():
        if len(paths) < 2 or len({program.operations[i].name for i in paths}) < 2:
            continue
        for other in (value // 2, 2 * value, value + 1, value - 1):
            changes = {i: with_scalar(path, other) for i, path in paths.items()}
            said = f"{other} in place of {value}, wherever it is taken"
            yield Edit(1.3, "size", said, changes)


def _alike(node: Node) -> Iterator[Edit]:
    """Other values for all whole numbers of a tuple at once: shifts, windows, sizes."""
    axis = dims_of(node.operation)
    if node.name in _SHAPES or node.name == "recurrent":
        return
    tuples: dict[Path, list[int]] = {}
    for path, value in scalars(node.operation):
        if isinstance(value, int) and not isinstance(value, bool) and isinstance(path[-1], int):
            tuples.setdefault(path[:-1], []).append(value)
    for path, olds in tuples.items():
        if len(olds) < 2 or not path or (axis is not None and path == axis[0]):
            continue
        for news in ([-n for n in olds], [n + 1 for n in olds], [n - 1 for n in olds],
                     [2 * n for n in olds], [n // 2 for n in olds], olds[::-1]):  # fmt: skip
            if news != olds:
                said = f"{_called(node, path)} {tuple(news)} in place of {tuple(olds)}"
                turned = node.name == "roll" and news == [-n for n in olds]
                why = "rearranged" if turned else cause(node, path)
                yield node.edit(1.2, why, said, with_scalar(path, tuple(news)))


def _dilations(node: Node) -> Iterator[Edit]:
    """Another dilation, with the padding that keeps the size."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, node.args, strict=False)) | dict(node.operation.kwargs)
    padding, dilation = given.get("padding", 0), given.get("dilation", 1)
    if isinstance(padding, str):
        return
    kernel = node.tensors[1].shape[2:]
    pads, olds = (list(x) if isinstance(x, tuple | list) else [x] * len(kernel)
                  for x in (padding, dilation))  # fmt: skip
    for new in (1, 2, 3, 4, 5):
        if all(d == new for d in olds):
            continue
        wider = [p + (new - d) * (k - 1) // 2 for p, d, k in zip(pads, olds, kernel, strict=True)]

        def change(at: At, new: int = new, wider: list[int] = wider) -> Any:
            held = dict(zip(names, at.args, strict=False)) | dict(at.kwargs)
            held |= {"dilation": new, "padding": wider}
            return resolve(at.operation.function)(**held)

        if min(wider) >= 0:
            yield node.edit(1.0, "dilation", f"dilation {new} and padding {wider}", change)


def cause(node: Node, path: Path, value: Any = None) -> str:
    """The word for another value at this place of the arguments."""
    name = node.name
    if isinstance(value, bool) and name in ("topk", "sort", "argsort"):
        return "reversed"
    key = path[1] if path[0] == "kwargs" else path[0]
    if key in _PADS:
        return "padding"
    if name.startswith(("conv", "_conv")):
        return str(_CONVOLUTION.get(key, "size"))
    if "pool" in name:
        return "pooling"
    if key in ("eps", "epsilon") or (
        name in ("add", "clamp", "maximum", "clamp_min")
        and isinstance(value, float)
        and 0 < value < 1e-2
    ):
        return "epsilon"
    if key in ("alpha", "beta") and name.startswith(("add", "badd", "sub")):
        return "scale"  # of a summand
    if name == "arange":
        return "offset"
    if name in ("add", "sub") and isinstance(value, int):
        return "offset" if not node.out.is_floating_point() else "constant"
    if name in ("mul", "div", "add", "sub", "pow") and is_table(node):
        return "constant"
    return _CAUSES.get(name, "operation" if isinstance(value, bool) else "constant")


def _one(node: Node, path: Path, value: Any, cost: float) -> Edit:
    old = _at(node, path)
    what = _called(node, path)
    said = f"{what} {value!r} in place of {old!r}"
    return node.edit(cost, cause(node, path, old), said, with_scalar(path, value))


def _at(node: Node, path: Path) -> Any:
    return next(v for p, v in scalars(node.operation) if p == path)


def _called(node: Node, path: Path) -> str:
    key = next((k for k in path if isinstance(k, str) and k != "kwargs"), None)
    return str(key) if key else f"{node.name} with"


def _integers(node: Node, path: Path, value: int) -> Iterator[Edit]:
    if node.name in _SHAPES or node.name == "recurrent":
        return
    near = [value + 1, value - 1, -value, 2 * value, value // 2, 0, 1]
    if node.name in ("pow", "mul", "div", "add", "sub"):
        yield from _floats(node, path, float(value))
        near = near[:3]
    for other in dict.fromkeys(near):
        if other != value:
            yield _one(node, path, other, 1.3)


def _floats(node: Node, path: Path, value: float) -> Iterator[Edit]:
    if not math.isfinite(value):
        if node.name in ("masked_fill", "full", "where", "full_like"):
            for other in (-1e9, -1e4, -1.0, 0.0):
                yield _one(node, path, other, 1.5)
        return
    sizes = {n for t in node.tensors for n in t.shape if n > 1}
    related = [-value, value * 2, value / 2, value * value]
    if value > 0:
        related += [math.sqrt(value), 1 / value, 1 / math.sqrt(value)]
    for n in sizes:
        related += [float(n), math.sqrt(n), 1 / n, 1 / math.sqrt(n)]
    for other in dict.fromkeys((*related, *_GRID)):
        if other != value:
            yield _one(node, path, other, 1.4)
    why = cause(node, path, value)
    for factor, words in ((2.0, "twice"), (0.5, "half"), (-1.0, "minus")):
        said = f"{_called(node, path)} {words} the number"
        yield node.edit(1.45, why, said, _times(path, factor))
    said = f"{_called(node, path)} {{number}} in place of {word(value)}"
    index = node.index
    yield Edit(3.0, why, said, free=lambda c: {index: with_scalar(path, c)}, start=value, at=index)


def _times(path: Path, factor: float) -> Change:
    """A number times a factor, also where each run of the expression has another one."""

    def change(at: At) -> Any:
        held = next(v for p, v in scalars(at.operation) if p == path)
        return with_scalar(path, held * factor)(at)

    return change


def _strings(node: Node, path: Path, value: str) -> Iterator[Edit]:
    if node.name == "einsum":
        yield from _equations(node, path, value)
        return
    key = path[-1] if path[0] == "kwargs" else None
    for name, words in _WORDS.items():
        if value in words and (key in (name, None) or key is None):
            for other in words:
                if other != value:
                    yield _one(node, path, other, 1.0)


def _equations(node: Node, path: Path, equation: str) -> Iterator[Edit]:
    """An einsum with two of its letters exchanged in one of its terms."""
    compact = equation.replace(" ", "")
    left, arrow, right = compact.partition("->")
    terms = left.split(",")
    for i, term in enumerate([*terms, right]):
        for a in range(len(term)):
            for b in range(a + 1, len(term)):
                new = list(term)
                new[a], new[b] = new[b], new[a]
                made = [*terms, right]
                made[i] = "".join(new)
                text = ",".join(made[:-1]) + arrow + made[-1]
                yield node.edit(1.2, "operand" if i < len(terms) else "transposed",
                                f"einsum {text!r} in place of {compact!r}",
                                with_scalar(path, text))  # fmt: skip


_MANY = ("mean", "sum", "amax", "amin", "var", "std", "flip", "norm", "logsumexp")


def _axes(node: Node) -> Iterator[Edit]:
    """The same over another axis, or other axes."""
    found = dims_of(node.operation)
    if found is None or not node.tensors:
        return
    path, old = found
    if node.name in ("unsqueeze", "squeeze", "unflatten"):
        return
    n = node.tensors[0].ndim
    why = {"softmax": "softmax_axis", "log_softmax": "softmax_axis", "flip": "reversed",
           "cat": "concat"}.get(node.name, "axis")  # fmt: skip
    olds = [old] if isinstance(old, int) else list(old)
    held = {d % n for d in olds if n}
    for d in range(n):
        if {d} != held:
            new: Any = d if isinstance(old, int) else type(old)([d])
            said = f"{node.name} over axis {d} of {n} in place of {_told(olds, n)}"
            yield node.edit(1.0, why, said, with_scalar(path, new))
    if node.name in _MANY and len(held) < n:
        said = f"{node.name} over all axes in place of {_told(olds, n)}"
        yield node.edit(1.1, why, said, with_scalar(path, tuple(range(n))))
    if len(olds) > 1 or n > 2:
        for a in range(n):
            for b in range(a + 1, n):
                if {a, b} != held and node.name in _MANY:
                    said = f"{node.name} over axes {a} and {b} in place of {_told(olds, n)}"
                    yield node.edit(1.2, why, said, with_scalar(path, (a, b)))


def _told(axes: list[int], n: int) -> str:
    return " and ".join(str(a % n if n else a) for a in axes)
