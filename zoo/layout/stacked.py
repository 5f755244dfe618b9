"""Equal layers stacked along a leading axis, as `nnx.scan` and `flax.linen.scan` keep them; and
views of two spellings, paired where one joins what the other keeps apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from zoo.layout.entries import Entry, Tensor, View
from zoo.layout.ops import Ops, Shape, Stack, each, inverse, run_shapes


def in_stacks(views: Sequence[View]) -> list[View]:
    """The views with every list of equal layers as one: `layers.0.kernel`, `layers.1.kernel` are
    `layers.kernel` with a leading axis. A list is one whose members, two or more and numbered from
    0, have the same tensors, made by the same ops; of lists within lists it is the outermost."""
    stacks: dict[str, dict[int, list[View]]] = defaultdict(lambda: defaultdict(list))
    for view in views:
        for place, index in _numbered(view):
            stacks[place][index].append(view)
    taken = {t.name for v in views for t in v.tensors}
    equal = {place for place, members in stacks.items() if _equal(place, members, taken)}
    made: dict[tuple[str, ...], list[View]] = {}
    for view in views:
        names = tuple(t.name for t in view.tensors or view.entry.torch)
        for place, _ in _numbered(view):
            if place in equal:
                names = tuple(_without(place, n) for n in names)
                break
        made.setdefault(names, []).append(view)
    return [some[0] if len(some) == 1 else _stack(key, some) for key, some in made.items()]


def unstacked(shapes: Mapping[str, Shape], known: Iterable[str]) -> dict[str, Shape]:
    """The names and shapes that stacked layers would have apart. `known` are names of a model of
    the same family, whose layers are apart."""
    places = {_without(p, name): p for name in known for p, _ in _places(name)}
    found: dict[str, Shape] = {}
    for name, shape in shapes.items():
        if name not in places or not shape:
            found[name] = shape
            continue
        place = places[name]
        rest = name.removeprefix(place)
        found |= {f"{place}.{i}{rest}": shape[1:] for i in range(min(shape[0], 1 << 12))}
    return found


def paired(source: Sequence[View], target: Sequence[View]) -> list[tuple[View, View]]:
    """What each view of one spelling is in another, in the other's order; what one of them joins is
    joined in both. ValueError where each joins what the other keeps apart."""
    of: dict[str, View] = {t.name: v for v in source for t in v.entry.torch}
    order = {name: i for i, name in enumerate(of)}
    pairs = []
    for group in _groups(source, target):
        theirs = sorted(group, key=lambda v: order[v.entry.torch[0].name])
        names = [t.name for v in theirs for t in v.entry.torch]
        ours = list({id(of[n]): of[n] for n in names}.values())
        pair = _joined(ours), _joined(theirs)
        if pair[0].entry.torch != pair[1].entry.torch:
            raise ValueError(f"{names[0]} and others are joined in two ways that do not fit")
        pairs.append(pair)
    return pairs


def between(source: View, target: View) -> tuple[Ops, Ops]:
    """The ops from the source's tensors to the target's, and those back again."""
    if source.ops == target.ops:
        return (), ()
    canonical = [t.shape for t in source.entry.torch]
    forth = inverse(source.ops, canonical) + target.ops
    back = inverse(target.ops, canonical) + source.ops
    return forth, back


def _groups(source: Sequence[View], target: Sequence[View]) -> list[list[View]]:
    """The target's views, those together of which the source joins something."""
    wholes = {t.name: i for i, v in enumerate(source) for t in v.entry.torch}
    groups: dict[int, list[View]] = {}
    for view in target:
        groups.setdefault(wholes[view.entry.torch[0].name], []).append(view)
    return list(groups.values())


def _joined(views: Sequence[View]) -> View:
    if len(views) == 1:
        return views[0]
    entry = _entry([v.entry for v in views], [t for v in views for t in v.entry.flax])
    ops = each([(len(v.entry.torch), v.ops) for v in views])
    return View(entry, tuple(t for v in views for t in v.tensors), ops)


def _stack(names: Sequence[str], views: Sequence[View]) -> View:
    ops = (*each([(len(v.entry.torch), v.ops) for v in views]), Stack(0, len(names)))
    torch = [t.shape for v in views for t in v.entry.torch]
    tensors = [Tensor(n, s) for n, s in zip(names, run_shapes(ops, torch), strict=True)]
    return View(_entry([v.entry for v in views], tensors), tuple(tensors), ops)


def _entry(entries: Sequence[Entry], flax: Iterable[Tensor]) -> Entry:
    """Several entries as one, whose tensors are all of theirs."""
    torch = tuple(t for e in entries for t in e.torch)
    first = entries[0]
    return Entry(first.kind, torch, tuple(flax), collection=first.collection)


def _places(name: str) -> list[tuple[str, int]]:
    """The lists that a name is in, outermost first, and which member of each."""
    parts = name.split(".")
    return [
        (".".join(parts[:i]), int(part)) for i, part in enumerate(parts) if i and part.isdecimal()
    ]


def _numbered(view: View) -> list[tuple[str, int]]:
    """The lists that all tensors of a view are in."""
    if not view.tensors:
        return []
    first, *rest = ([*_places(t.name)] for t in view.tensors)
    return [place for place in first if all(place in others for others in rest)]


def _without(place: str, name: str) -> str:
    """A name without the number of its member of a list."""
    _, _, rest = name.removeprefix(f"{place}.").partition(".")
    return f"{place}.{rest}"


def _equal(place: str, members: Mapping[int, Sequence[View]], taken: Collection[str]) -> bool:
    if len(members) < 2 or sorted(members) != list(range(len(members))):
        return False
    if any(_without(place, t.name) in taken for v in members[0] for t in v.tensors):
        return False
    first, *others = (
        [
            (v.entry.kind, v.ops, tuple((_without(place, t.name), t.shape) for t in v.tensors))
            for v in views
        ]
        for _, views in sorted(members.items())
    )
    return all(other == first for other in others)
