"""Which parameter of a live module is which canonical one.

A torch module's canonical names are its own. An NNX module needs a layout: a twin of the zoo has
one, found by its config, or by its names and shapes; any other module comes with its own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convert.training_state.lazy import Lazy, Read, info_of, moved
from zoo.checkpoint.apply import apply
from zoo.checkpoint.identification import identify_header
from zoo.checkpoint.label import Label
from zoo.checkpoint.problems import dims
from zoo.checkpoint.request import Request
from zoo.containers.base import TensorInfo
from zoo.containers.dtypes import NUMPY
from zoo.containers.errors import UsageError, ZooError
from zoo.layout import Entry, Layout, Tensor, Tree, View
from zoo.layout.ops import inverse
from zoo.registry import defined_by

_WRAPPED = re.compile(r"^(?:(?:module|_orig_mod)\.)+")
_SHOWN = 8

Arrays = Mapping[str, np.ndarray]


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = f", ... and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def bare(name: str) -> str:
    """A parameter's name without what DistributedDataParallel and torch.compile put before it."""
    return _WRAPPED.sub("", name)


def torch_names(model: Any, wanted: Sequence[str] = ()) -> dict[int, str]:
    """id of each parameter object of a torch module -> its canonical name.

    That is its name in `named_parameters()` without what DistributedDataParallel and torch.compile
    put before it; of the names of a tied parameter the one in `wanted`, else the first.
    """
    known = set(wanted)
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        name = bare(name)
        if id(parameter) not in names or (name in known and names[id(parameter)] not in known):
            names[id(parameter)] = name
    return names


def layout_of(
    module: Any, shapes: Mapping[str, tuple[int, ...]], framework: str = "flax"
) -> Layout:
    """The layout of a module whose state has these names and shapes.

    Raises UsageError where it is not a model of the zoo, or where two of them differ in a tensor.
    """
    family = defined_by(module, framework)
    config = getattr(module, "config", None)
    if family is not None and isinstance(config, family.config):
        return family.layout_of(config)
    header = {name: TensorInfo("F32", shape) for name, shape in shapes.items()}
    try:
        tree: Tree = "nnx" if framework == "flax" else "torch"
        found = identify_header(header, Label(), Request(family), (tree,))
        if found[0].peeled.wrappers:  # a layout's names are to be the module's own
            below = ".".join(found[0].peeled.wrappers)
            raise ZooError(f"only what lies below {below} is one", "give its layout")
    except ZooError as e:
        raise UsageError(
            f"{type(module).__name__} is not a model of the zoo: {e.problem}",
            "give layout=..., a zoo.layout.Layout that pairs its tensors with canonical ones; "
            "of a part of a model, `convert.training_state.canonical_names.part(layout, 'actor')`",
            e.details,
        ) from None
    layouts = list(dict.fromkeys(c.layout for c in found))
    parameters = [[e for e in layout.entries if e.collection == "params"] for layout in layouts]
    if any(entries != parameters[0] for entries in parameters[1:]):
        raise UsageError(
            f"{type(module).__name__} may be of {', '.join(sorted({c.title() for c in found}))}",
            "give layout=..., the layout_of(config) of the one that it is",
        )
    return layouts[0]


def part(layout: Layout, prefix: str) -> Layout:
    """The layout of the submodule `prefix`: canonical names as they were, Flax names within it."""
    start = f"{prefix}."
    entries = []
    for e in layout.entries:
        if e.flax and all(t.name.startswith(start) for t in e.flax):
            inner = tuple(Tensor(t.name.removeprefix(start), t.shape) for t in e.flax)
            entries.append(Entry(e.kind, e.torch, inner, e.ops, e.collection))
    if not entries:
        raise UsageError(
            f"nothing in the layout lies below {prefix!r}", "name a submodule by its dotted path"
        )
    return Layout(entries)


def views(layout: Layout, tree: Tree = "nnx") -> list[View]:
    """The trained tensors of a tree, ties once."""
    return [v for v in layout.view(tree) if v.tensors and v.entry.collection == "params"]


def flax_shapes(layout: Layout, tree: Tree = "nnx") -> dict[str, tuple[int, ...]]:
    """Name -> shape of the trained tensors of a tree."""
    return {t.name: t.shape for v in views(layout, tree) for t in v.tensors}


def canonical_of(layout: Layout, tree: Tree = "nnx") -> dict[str, tuple[str, ...]]:
    """A tree's name -> the canonical names that its values come from."""
    names: dict[str, tuple[str, ...]] = {}
    for v in views(layout, tree):
        names |= {t.name: tuple(c.name for c in v.entry.torch) for t in v.tensors}
    return names


def to_flax(values: Arrays, layout: Layout) -> dict[str, np.ndarray]:
    """Canonical arrays through their weights' ops into NNX names; zeros for the missing part of a
    tensor that is only partly there. UsageError for names and shapes that the layout lacks."""
    _check({n: info_of(values, n).shape for n in values}, layout)
    made: dict[str, np.ndarray] = {}
    for v in views(layout):
        there = [t.name for t in v.entry.torch if t.name in values]
        if there:
            dtype = NUMPY[info_of(values, there[0]).dtype]
            arrays = [
                np.asarray(values[t.name]) if t.name in values else np.zeros(t.shape, dtype)
                for t in v.entry.torch
            ]
            made |= zip((t.name for t in v.tensors), apply(v.ops, arrays), strict=True)
    return made


def to_canonical(values: Lazy, layout: Layout, tree: Tree) -> Lazy:
    """The arrays of a tree's names back through the ops, each when it is looked at. Of an entry,
    all are given or none. UsageError for other shapes than the weights'."""
    made = Lazy()
    for v in views(layout, tree):
        there = [t.name for t in v.tensors if t.name in values]
        if there and len(there) < len(v.tensors):
            gone = [t.name for t in v.tensors if t.name not in values]
            raise UsageError(
                f"the state has {some(there)} without {some(gone)}, which are one tensor in torch",
                "train them by one optimizer, or freeze both",
            )
        if not there:
            continue
        infos = [values.infos[t.name] for t in v.tensors]
        if wrong := [
            f"{t.name} is {dims(i.shape)}, should be {dims(t.shape)}"
            for t, i in zip(v.tensors, infos, strict=True)
            if i.shape != t.shape
        ]:
            raise UsageError(
                "moments have other shapes than their weights", "name the right model", wrong
            )
        back = inverse(v.ops, [t.shape for t in v.entry.torch])
        reads: list[Read] = [functools.partial(values.__getitem__, t.name) for t in v.tensors]
        for i, t in enumerate(v.entry.torch):
            made.add(t.name, *moved(back, infos, reads, i))
    return made


def _check(shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> None:
    known = {t.name: t.shape for v in views(layout) for t in v.entry.torch}
    wrong = [f"not in the model: {n}" for n in shapes if n not in known]
    wrong += [
        f"moments of {n} are {dims(s)}, the parameter is {dims(known[n])}"
        for n, s in shapes.items()
        if n in known and s != known[n]
    ]
    if wrong:
        raise UsageError(
            f"the state is not of this model: {len(wrong)} parameters differ",
            "give the model that the checkpoint is of",
            wrong[:_SHOWN],
        )
