"""Tensors where a wrong rule would fit just as well, because shapes cannot tell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from convert.linting.findings import Finding, braced, ranged
from convert.linting.subject import Layer, Subject
from zoo.checkpoint.problems import dims
from zoo.layout.kinds import of_group
from zoo.layout.ops import Shape

_VERIFY = "run `zooconvert verify A B --level outputs`: only outputs can show it"
DENSE = ("linear", "attention", "linear_in_out", "gate")  # the last two are lint's own
CONV = of_group("conv", "conv_transpose")


def ambiguous(s: Subject) -> Iterator[Finding]:
    """Square kernels, equal neighbours, equal layers: each in a line, however many there are."""
    yield from square_kernels(s)
    yield from equal_neighbours(s)
    yield from equal_layers(s)


def square_kernels(s: Subject) -> Iterator[Finding]:
    dense = [x for x in s.kinds(*DENSE) if _square(x)]
    convs = [x for x in s.kinds(*CONV) if len(x.weight) > 2 and x.weight[0] == x.weight[1]]
    for layers, what, axes in (
        (dense, "linear weight", "PyTorch stores (out, in), Flax (in, out)"),
        (convs, "convolution", "PyTorch stores (out, in, *kernel), Flax (*kernel, in, out)"),
    ):
        if layers:
            many = f"{what}s with as many" if len(layers) > 1 else f"{what} with as many"
            yield Finding(
                "square-kernel",
                "check",
                f"{len(layers)} {many} inputs as outputs",
                f"{axes}: one that was not transposed has the right shape and wrong values",
                _VERIFY,
                tuple(patterns(layers)),
                len(layers),
            )


def _square(layer: Layer) -> bool:
    """Also three square matrices in one, as nn.MultiheadAttention has them."""
    parts = 3 if layer.kind == "attention" else 1
    return len(layer.weight) == 2 and layer.weight[0] == parts * layer.weight[1]


def equal_neighbours(s: Subject) -> Iterator[Finding]:
    """Within one layer of a stack, or among what is in no stack."""
    places: defaultdict[tuple[str, int | None], list[Layer]] = defaultdict(list)
    for layer in _weighty(s):
        parent, index, _ = _placed(layer.name)
        places[parent if index is not None else "", index].append(layer)
    groups: list[Layer] = []
    lines: defaultdict[tuple[str, str, tuple[str, ...]], list[int | None]] = defaultdict(list)
    for (parent, index), members in places.items():
        by_shape: defaultdict[tuple[str, Shape], list[Layer]] = defaultdict(list)
        for layer in members:
            by_shape[layer.kind, layer.weight].append(layer)
        for (kind, shape), equal in by_shape.items():
            if len(equal) > 1:
                groups += equal
                names = tuple(_placed(e.name)[2] if index is not None else e.name for e in equal)
                lines[parent, f"{kind} {dims(shape)}", names].append(index)
    if groups:
        yield Finding(
            "equal-neighbours",
            "check",
            f"{len(groups)} layers and tensors in {_sets(len(lines))} of one kind and shape",
            "swapped within a set (query and key, the two norms of a layer, two experts) they "
            "still fit, and the outputs are wrong",
            _VERIFY,
            tuple(
                f"{what}: {_join(parent, indices, braced(names))}"
                for (parent, what, names), indices in lines.items()
            ),
            len(groups),
        )


def equal_layers(s: Subject) -> Iterator[Finding]:
    """Whole layers of a stack, wherever the stacks are."""
    blocks: defaultdict[tuple[str, int], list[tuple[str, str, Shape]]] = defaultdict(list)
    for layer in _weighty(s):
        parent, index, rest = _placed(layer.name)
        if index is not None:
            blocks[parent, index].append((rest, layer.kind, layer.weight))
    alike: defaultdict[tuple[tuple[str, str, Shape], ...], list[tuple[str, int]]]
    alike = defaultdict(list)
    for place, content in blocks.items():
        alike[tuple(sorted(content))].append(place)
    sets = [places for places in alike.values() if len(places) > 1]
    if sets:
        count = sum(map(len, sets))
        yield Finding(
            "equal-layers",
            "check",
            f"{count} layers in {_sets(len(sets))} of equal shapes",
            "counted from another number, in another order (as text, 10 comes before 2), or from "
            "another stack, they still fit",
            _VERIFY,
            tuple(line for places in sets for line in _ranges(places)),
            count,
        )


def patterns(layers: Iterable[Layer]) -> list[str]:
    """The names of layers, those of equal place and shape in one pattern."""
    by_index: defaultdict[tuple[str, int | None, Shape], list[str]] = defaultdict(list)
    for layer in layers:
        parent, index, rest = _placed(layer.name)
        key = (parent if index is not None else "", index, layer.weight)
        by_index[key].append(rest if index is not None else layer.name)
    lines: defaultdict[tuple[str, Shape, tuple[str, ...]], list[int | None]] = defaultdict(list)
    for (parent, index, shape), names in by_index.items():
        lines[parent, shape, tuple(names)].append(index)
    return [
        f"{_join(parent, indices, braced(names))} {dims(shape)}"
        for (parent, shape, names), indices in lines.items()
    ]


def _sets(count: int) -> str:
    return f"{count} set" if count == 1 else f"{count} sets"


def _ranges(places: Iterable[tuple[str, int]]) -> Iterator[str]:
    """Stacks of equal indices in one pattern: critic.{qf0,qf1}.{0,2}."""
    indices: defaultdict[str, list[int]] = defaultdict(list)
    for parent, index in places:
        indices[parent].append(index)
    parents: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)
    for parent, found in indices.items():
        parents[tuple(found)].append(parent)
    for numbers, names in parents.items():
        yield _join(braced(names), numbers, "")


def _weighty(s: Subject) -> list[Layer]:
    """Layers that hold something and are not a second name of another; of recurrent ones, whose
    matrices are alike, each tensor by itself."""
    found: list[Layer] = []
    for layer in s.layers:
        if layer.kind == "recurrent":
            prefix = f"{layer.name}." if layer.name else ""
            found += [Layer(prefix + n, layer.kind, {n: x}) for n, x in layer.shapes.items()]
        elif not layer.tied and layer.weight:
            found.append(layer)
    return found


def _placed(name: str) -> tuple[str, int | None, str]:
    """(stack, index in it, rest): ("encoder.layer", 3, "output.dense"). The outermost stack."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        stem, _, digits = part.rpartition("_")
        if part.isdecimal() and part.isascii():
            return ".".join(parts[:i]), int(part), ".".join(parts[i + 1 :])
        if stem and digits.isdecimal() and digits.isascii() and i + 1 < len(parts):
            return ".".join([*parts[:i], f"{stem}_"]), int(digits), ".".join(parts[i + 1 :])
    return name, None, ""


def _join(parent: str, indices: Sequence[int | None], rest: str) -> str:
    numbers = [i for i in indices if i is not None]
    stack = parent
    if numbers:
        dot = "" if parent.endswith("_") or not parent else "."
        stack = f"{parent}{dot}{ranged(numbers)}"
    return ".".join(filter(None, (stack, rest)))
