"""Tensors straight onto the devices that are to hold them: a process reads what its own need.

Which device holds what is JAX's to say (`jax.sharding`); here it is found out for every tensor,
checked before anything is read, and turned, through the ops of the plan, into regions of the file.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from zoo.checkpoint.ahead import prefetch
from zoo.checkpoint.apply import cast
from zoo.checkpoint.plan import Plan, Step
from zoo.checkpoint.problems import dims
from zoo.checkpoint.slabs import default_workers, pieces
from zoo.containers import dtypes
from zoo.containers.base import Reader
from zoo.containers.errors import UsageError
from zoo.containers.regions import Region, extent, size
from zoo.containers.strided import copy
from zoo.layout import Shape
from zoo.layout.cuts import Need, needed
from zoo.loading.memory import aligned, is_aligned

Shardings = dict[str, Sharding]
Key = tuple[tuple[int, int], ...]  # a region, to be found by
Parts = dict[Key, np.ndarray]  # of one tensor: what the devices here hold of it
Index = tuple[slice, ...]  # as JAX says it: slices that may lack start and stop
_spec: Any = PartitionSpec  # which JAX leaves untyped
_SHOWN = 20  # problems that an error spells out
_ADVICE = (
    "give a Sharding, (mesh, [(regular expression, PartitionSpec), ...]), a tree or a function"
)


def shardings(asked: Any, shapes: Mapping[str, Shape]) -> Shardings:
    """The sharding of every tensor, by what `zoo.load` takes as `sharding`.

    `shapes` has the tensors by their names, which are NNX paths joined with dots. Raises UsageError
    with everything that does not fit: rules that match nothing, tensors without one, axes that a
    mesh does not have or that do not divide.
    """
    wrong: list[str] = []
    found: Shardings = {}
    given = _Given(asked, shapes, wrong)
    for name, shape in shapes.items():
        try:
            one = given.of(name, shape)
        except ValueError as e:
            wrong.append(f"{name} {dims(shape)}: {str(e).splitlines()[0]}")
            continue
        if one is not None:
            found[name] = one
            wrong += [f"{name} {dims(shape)}: {problem}" for problem in _misfits(one, shape)]
    if wrong:
        shown = wrong[:_SHOWN] + [f"... and {n} more" for n in [len(wrong) - _SHOWN] if n > 0]
        noun = "problem" if len(wrong) == 1 else "problems"
        raise UsageError(
            f"the sharding does not fit: {len(wrong)} {noun}",
            "mend the rules or the mesh; names are paths joined with dots, the first rule that is "
            "found in a name counts, and ('.*', PartitionSpec()) at the end keeps the rest whole",
            shown,
        )
    return found


class _Given:
    """What a user said of shardings, as a function of a tensor's name and shape."""

    def __init__(self, asked: Any, shapes: Mapping[str, Shape], wrong: list[str]) -> None:
        self.mesh: Mesh | None = None
        self.of: Callable[[str, Shape], Sharding | None]
        match asked:
            case Sharding():
                self.of = lambda name, shape: asked
            case (Mesh() as mesh, said):
                self.mesh = mesh
                self._specs(said, shapes, wrong)
            case Mapping():
                self._tree(asked, shapes, wrong)
            case Mesh():
                raise UsageError("a mesh alone says not what lies where", _ADVICE)
            case (AbstractMesh(), _):
                raise UsageError("an AbstractMesh has no devices", "give a jax.sharding.Mesh")
            case _ if callable(asked):
                self.of = lambda name, shape: self._made(asked(name, shape))
            case _:
                raise UsageError(f"sharding={type(asked).__name__} is not understood", _ADVICE)

    def _specs(self, said: Any, shapes: Mapping[str, Shape], wrong: list[str]) -> None:
        """Of a mesh: one spec for all, rules, a tree of specs, or a function that gives them."""
        match said:
            case PartitionSpec() | None:
                self.of = lambda name, shape: self._made(said)
            case Mapping():
                self._tree(said, shapes, wrong)
            case [*rules]:
                self._rules(rules, shapes, wrong)
            case _ if callable(said):
                self.of = lambda name, shape: self._made(said(name, shape))
            case _:
                raise UsageError(f"{type(said).__name__} beside a mesh is not understood", _ADVICE)

    def _rules(self, rules: Sequence[Any], shapes: Mapping[str, Shape], wrong: list[str]) -> None:
        compiled: list[tuple[re.Pattern[str], Any]] = []
        for rule in rules:
            match rule:
                case (str() | re.Pattern() as pattern, PartitionSpec() | Sharding() | None as spec):
                    try:
                        compiled.append((re.compile(pattern), spec))
                    except re.error as e:
                        wrong.append(f"rule {pattern!r} is not a regular expression: {e}")
                case _:
                    raise UsageError(f"{rule!r} is not a rule", _ADVICE)
        for pattern, _ in compiled:
            if not any(pattern.search(name) for name in shapes):
                near = next(iter(shapes), "")
                wrong.append(f"rule {pattern.pattern!r} matches no tensor (one is {near})")

        def of(name: str, shape: Shape) -> Sharding | None:
            for pattern, spec in compiled:
                if pattern.search(name):
                    return self._made(spec)
            if not shape:  # a number is on every device
                return self._made(None)
            raise ValueError("no rule matches it")

        self.of = of

    def _tree(self, tree: Any, shapes: Mapping[str, Shape], wrong: list[str]) -> None:
        leaves = _leaves(tree)
        wrong += [
            f"{n} is in the tree, and not a tensor of the model" for n in leaves.keys() - shapes
        ]

        def of(name: str, shape: Shape) -> Sharding | None:
            if name not in leaves:
                raise ValueError("the tree does not have it")
            return self._made(leaves[name])

        self.of = of

    def _made(self, said: Any) -> Sharding:
        """A Sharding as it is; of a spec one on the mesh. ValueError where it cannot be."""
        if isinstance(said, Sharding):
            return said
        spec = _spec() if said is None else said
        if not isinstance(spec, PartitionSpec) or PartitionSpec.UNCONSTRAINED in tuple(spec):
            raise ValueError(f"{said!r} is neither a Sharding nor a PartitionSpec that says all")
        if self.mesh is None:
            raise ValueError(f"{spec} needs a mesh: give (mesh, ...)")
        if unknown := [a for a in _axes(spec) if a not in self.mesh.shape]:
            there = ", ".join(self.mesh.shape) or "none"
            raise ValueError(f"{spec}: the mesh has no axis {unknown[0]!r}; it has {there}")
        used = list(_axes(spec))
        if twice := [a for a in self.mesh.shape if used.count(a) > 1]:
            raise ValueError(f"{spec} has the mesh's axis {twice[0]!r} twice")
        return NamedSharding(self.mesh, spec)


def _axes(spec: PartitionSpec) -> Iterator[str]:
    for entry in spec:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, tuple):
            yield from entry


def _leaves(tree: Any) -> dict[str, Any]:
    """The leaves of nested mappings, or of an nnx.State of Variables, by dotted names."""
    kinds = (Sharding, PartitionSpec, type(None))
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, kinds))
    found = {}
    for path, leaf in flat:
        keys = [getattr(k, "key", getattr(k, "idx", None)) for k in path]
        found[".".join(str(k) for k in keys if k is not None)] = leaf
    return found


def _misfits(sharding: Sharding, shape: Shape) -> list[str]:
    """Why a tensor of this shape cannot be held so."""
    if not isinstance(sharding, NamedSharding):
        try:
            sharding.shard_shape(shape)
        except ValueError as e:
            return [str(e).splitlines()[0]]
        return []
    spec, mesh = sharding.spec, sharding.mesh
    if len(spec) > len(shape):
        return [f"{spec} has {len(spec)} axes, the tensor {len(shape)}"]
    wrong = []
    for axis, (entry, n) in enumerate(zip(spec, shape, strict=False)):
        names = list(_axes(_spec(entry)))
        parts = int(np.prod([mesh.shape[a] for a in names]))
        if n % parts:
            wrong.append(f"axis {axis} of {n} does not divide by {parts} ({', '.join(names)})")
    return wrong


def read_shards(plan: Plan, reader: Reader, found: Shardings) -> Iterator[tuple[str, jax.Array]]:
    """The target's tensors that have a sharding, each on the devices that hold it; what is not
    this process's to hold is not read. Several threads read ahead of whoever takes them."""
    steps = [step for step in plan.steps if found.keys() & set(step.targets)]
    jobs = [functools.partial(_read, reader, step, found) for step in steps]
    for step, tensors in zip(steps, prefetch(jobs, default_workers()), strict=True):
        for name, info, parts in zip(step.targets, step.target_infos, tensors, strict=True):
            if name in found:
                yield name, _array(info.shape, dtypes.NUMPY[info.dtype], found[name], parts)


def spread(
    values: Iterable[tuple[str, np.ndarray]], found: Shardings
) -> Iterator[tuple[str, jax.Array]]:
    """Arrays that every process has, each on the devices that hold it."""
    for name, value in values:
        regions = _regions(found[name], value.shape)
        parts = {_key(r): np.array(value[r], order="C") for r in regions}
        yield name, _array(value.shape, value.dtype, found[name], parts)


def on_every_device(value: Any, like: Sharding) -> jax.Array:
    """A small array, or a key of JAX's, on all devices of a sharding."""
    if isinstance(like, NamedSharding):
        like = NamedSharding(like.mesh, _spec())
    if jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
        held = on_every_device(jax.random.key_data(value), like)
        key: jax.Array = jax.random.wrap_key_data(held, impl=jax.random.key_impl(value))
        return key
    ((_, array),) = spread([("", np.asarray(value))], {"": like})
    return array


def _array(shape: Shape, dtype: np.dtype, sharding: Sharding, parts: Parts) -> jax.Array:
    return jax.make_array_from_callback(
        shape, sharding, lambda index: parts[_key(_region(index, shape))], dtype=dtype
    )


def _regions(sharding: Sharding, shape: Shape) -> list[Region]:
    """What the devices of this process hold of a tensor, each region once."""
    held = sharding.addressable_devices_indices_map(shape).values()
    return _once(_region(index, shape) for index in held)


def _once(regions: Iterable[Region]) -> list[Region]:
    return list({_key(r): r for r in regions}.values())


def _key(region: Region) -> Key:
    return tuple((s.start, s.stop) for s in region)


def _region(index: Index | None, shape: Shape) -> Region:
    index = index or ()
    full = (*index, *(slice(None),) * (len(shape) - len(index)))
    return tuple(slice(*s.indices(n)[:2]) for s, n in zip(full, shape, strict=True))


def _read(reader: Reader, step: Step, found: Shardings) -> list[Parts]:
    """What this process holds of each of a step's tensors."""
    infos = step.target_infos
    wanted = [
        (t, region)
        for t, (name, info) in enumerate(zip(step.targets, infos, strict=True))
        if name in found
        for region in _regions(found[name], info.shape)
    ]
    shapes = [i.shape for i in step.source_infos]
    held = [
        ((i, box), _fresh(reader, step, i, box))
        for i, box in _boxes([n for t, r in wanted for n in needed(step.ops, shapes, t, r)])
    ]
    made: list[Parts] = [{} for _ in infos]
    for t, region in wanted:
        part = pieces(step.ops, step.source_infos, held, (t, region))
        part = cast(part, infos[t].dtype)
        if not is_aligned(part):
            out = aligned(extent(region), part.dtype)
            copy(part, out)
            part = out
        made[t][_key(region)] = part
    return made


def _fresh(reader: Reader, step: Step, i: int, box: Region) -> np.ndarray:
    info = step.source_infos[i]
    return reader.read(step.sources[i], box, aligned(extent(box), dtypes.NUMPY[info.dtype]))


def _boxes(needs: Iterable[Need]) -> list[Need]:
    """What to read: each box once; of boxes that fill the one around them, or share elements, that
    one, which is read in fewer stretches."""
    boxes: dict[int, list[Region]] = {}
    for i, box in needs:
        boxes.setdefault(i, []).append(box)
    found: list[Need] = []
    for i, some in boxes.items():
        some = _once(some)
        axes = list(zip(*some, strict=True))
        around = tuple(slice(min(s.start for s in a), max(s.stop for s in a)) for a in axes)
        less = sum(map(size, some)) < size(around)
        found += [(i, box) for box in some] if less else [(i, around)]
    return found
