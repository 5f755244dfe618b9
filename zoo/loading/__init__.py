"""A ready module from a name or a checkpoint, in either framework."""

from __future__ import annotations

import functools
import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from zoo import hub, registry
from zoo.checkpoint.ahead import prefetch
from zoo.checkpoint.apply import apply, cast
from zoo.checkpoint.intact import check
from zoo.checkpoint.label import read_label
from zoo.checkpoint.plan import Plan, Step, make_plan, refuse_broken_ties
from zoo.checkpoint.reading import Buffers
from zoo.checkpoint.request import make_request
from zoo.checkpoint.slabs import default_workers, is_cast
from zoo.checkpoint.transfer import transfer
from zoo.containers import dtypes, open_checkpoint
from zoo.containers.base import Reader
from zoo.containers.dtypes import dtype_code
from zoo.containers.errors import MissingExtra, UsageError
from zoo.containers.regions import whole
from zoo.containers.strided import copy
from zoo.layout import Tree
from zoo.layout.ops import run
from zoo.loading.fresh import initial
from zoo.loading.memory import Empty, aligned
from zoo.model import Config, Model, override

FRAMEWORKS = ("torch", "flax")


class LoadNotice(UserWarning):
    """Something about a checkpoint that whoever loads it should know."""


def create(
    name: str,
    framework: str,
    seed: int = 0,
    dtype: Any = None,
    param_dtype: Any = "float32",
    **overrides: Any,
) -> Any:
    """A fresh model of preset `name`, in eval mode; one seed gives both frameworks one model.

    `dtype` is that of the computation (None: that of the parameters), `param_dtype` that of the
    parameters, both by NumPy's names ("bfloat16"); `overrides` change fields of the config.
    """
    found = registry.get(name)
    if found.weights is not None:
        raise UsageError(
            f"{name!r} names weights, and `create` makes fresh ones",
            f"load it, or create {name.partition('.')[0]!r}",
        )
    if found.config is None:
        raise UsageError(
            f"{name!r} is a family", f"name one of its presets: {', '.join(found.model.presets)}"
        )
    config = override(found.config, overrides)
    layout = found.model.layout_of(config)
    wanted = [
        t.name for e in layout.entries if e.constant is None and e.tied_to is None for t in e.torch
    ]
    values = initial(found.model, config, wanted, seed)
    return build(found.model, config, framework, values, dtype, param_dtype, seed)


def load(
    source: str | os.PathLike[str],
    framework: str,
    model: str | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    dtype: Any = None,
    param_dtype: Any = None,
    seed: int = 0,
    prefix: str | None = None,
    check_hashes: bool = False,
    sharding: Any = None,
    **overrides: Any,
) -> Any:
    """The model in a checkpoint of any container and either framework, in eval mode.

    `source` is whatever `zoo.hub` understands. `model` names a family or preset, `config` a
    config.json, a preset or the fields themselves, where the checkpoint does not say what it is;
    `prefix` what stands before the names of the model, where the file holds more than one.
    `param_dtype` None keeps the stored dtypes. `overrides` change fields of the config: what then
    no longer fits starts afresh from `seed`, and a LoadNotice names it. `check_hashes` holds it
    against its certificate first (see `zoo.checkpoint.intact.check`).

    `sharding`, in Flax, says which devices hold what, and a process then reads only what its own
    hold. It is a jax.sharding.Sharding for every tensor; or `(mesh, rules)`, where rules are pairs
    of a regular expression, looked for in the tensor's NNX path joined with dots, and a
    PartitionSpec, and the first that is found counts; or a tree of Shardings, as
    `nnx.get_named_sharding(state, mesh)` gives it; or a function of name and shape. In place of
    rules, `(mesh, ...)` takes one PartitionSpec, a tree of them or a function too. Axes are those
    of the Flax tensor.

    Raises ZooError (see `zoo.containers.errors`) with everything that does not fit, in one message.
    """
    _framework(framework)
    if sharding is not None and framework != "flax":
        raise UsageError("sharding is JAX's", 'give it with framework="flax"')
    request = make_request(model, config, prefix=prefix)
    path = hub.locate(source)
    if check_hashes:
        check(path).refuse_damage()
    with open_checkpoint(path, prefer=framework) as reader:
        code = None if param_dtype is None else dtype_code(param_dtype)
        tree: Tree = "torch" if framework == "torch" else "nnx"
        plan = make_plan(reader, read_label(reader), tree, request=request, dtype=code)
        family = plan.family
        _check_known(plan, overrides)
        plan = transfer(plan, override(plan.config, overrides)) if overrides else plan
        for notice in (*plan.told, *plan.left.unused()):
            warnings.warn(notice, LoadNotice, stacklevel=2)
        fresh = _fresh(plan, seed, code)
        if sharding is not None:
            values: Iterable[tuple[str, Any]] = _sharded(plan, reader, sharding, fresh)
        else:
            refuse_broken_ties(reader, plan)
            values = itertools.chain(read_tree(plan, reader, memory_of(framework)), fresh)
        return build_from_tree(family, plan.config, framework, values, dtype, seed)


def build(
    model: Model,
    config: Config,
    framework: str,
    canonical: Mapping[str, np.ndarray],
    dtype: Any = None,
    param_dtype: Any = None,
    seed: int = 0,
) -> Any:
    """A module from canonical tensors (those that are neither tied nor constant)."""
    _framework(framework)
    code = None if param_dtype is None else dtype_code(param_dtype)
    values: dict[str, np.ndarray] = {}
    for view in model.layout_of(config).view("torch" if framework == "torch" else "nnx"):
        e = view.entry
        if e.constant is None and e.tied_to is None:
            given = [canonical[t.name] for t in e.torch]
            made = apply(view.ops, given, code)
            for t, array in zip(view.tensors, made, strict=True):
                shared = any(np.may_share_memory(array, g) for g in given)
                values[t.name] = array.copy() if shared else array  # the caller's stays so
    return build_from_tree(model, config, framework, values.items(), dtype, seed)


def build_from_tree(
    model: Model,
    config: Config,
    framework: str,
    values: Iterable[tuple[str, Any]],
    dtype: Any = None,
    seed: int = 0,
) -> Any:
    """A module in eval mode from the tensors of its framework's tree, NumPy's or JAX's, which it
    takes over one by one: no more than one is held twice. UsageError for dtypes in which no layer
    computes."""
    entries = model.layout_of(config).entries
    weights = {t.name for e in entries if e.constant is None for t in (*e.torch, *e.flax)}

    def checked() -> Iterator[tuple[str, Any]]:
        for name, array in values:
            code = dtypes.code_of(array.dtype)
            if name in weights and (code.startswith("F8") or not dtypes.is_float(code)):
                raise UsageError(
                    f"{name} is stored as {code}, in which no layer computes",
                    "give param_dtype, such as 'bfloat16'; it casts floating-point weights",
                )
            yield name, array

    compute = None if dtype is None else dtypes.NAME[dtype_code(dtype)]
    try:
        if framework == "torch":
            from zoo.loading import into_torch as loading_torch

            return loading_torch.build(model, config, checked(), compute)
        from zoo.loading import into_flax as loading_flax

        return loading_flax.build(model, config, checked(), compute, seed)
    except ModuleNotFoundError as e:
        if e.name and e.name.partition(".")[0] in ("torch", "jax", "jaxlib", "flax"):
            raise MissingExtra(f"loading into {framework}", framework) from None
        raise


def _sharded(
    plan: Plan, reader: Reader, asked: Any, fresh: Iterable[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, Any]]:
    """The target's tensors on their devices. All that does not fit is an error before any is."""
    try:
        from zoo.loading import into_flax, into_shards
    except ModuleNotFoundError:
        raise MissingExtra("loading into flax", "flax") from None
    infos = plan.target_tensors()
    shapes = {name: info.shape for name, info in infos.items()}
    for view in plan.layout.view(plan.target_tree) if plan.fresh else ():
        if view.entry.torch[0].name in plan.fresh:
            shapes |= {t.name: t.shape for t in view.tensors}
    found = into_shards.shardings(asked, shapes)
    for name, info in infos.items():
        into_flax.check_width(name, dtypes.NUMPY[info.dtype])
    refuse_broken_ties(reader, plan)
    return itertools.chain(
        into_shards.read_shards(plan, reader, found), into_shards.spread(fresh, found)
    )


def memory_of(framework: str) -> Empty:
    """What gives the memory in which a framework keeps its tensors. MissingExtra without it."""
    if framework == "flax":
        return aligned
    try:
        from zoo.loading.into_torch import empty
    except ModuleNotFoundError:
        raise MissingExtra("loading into torch", "torch") from None
    return empty


def read_tree(
    plan: Plan, reader: Reader, empty: Empty | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """The target's tensors, read by several threads ahead of whoever takes them, in memory that
    `empty` gives (None: NumPy's, aligned as JAX wants it)."""
    own = Buffers()
    jobs = [functools.partial(_read, reader, own, step, empty or aligned) for step in plan.steps]
    for step, arrays in zip(plan.steps, prefetch(jobs, default_workers()), strict=True):
        yield from zip(step.targets, arrays, strict=True)
    for made in plan.made:
        yield made.name, made.value()


def _read(reader: Reader, own: Buffers, step: Step, empty: Empty) -> list[np.ndarray]:
    """A step's tensors, as they are to be."""
    made = [empty(info.shape, dtypes.NUMPY[info.dtype]) for info in step.target_infos]
    if not step.ops and not is_cast(step):
        return [reader.read(n, None, out) for n, out in zip(step.sources, made, strict=True)]
    infos = zip(step.sources, step.source_infos, strict=True)
    read = own.read(reader, [(n, (i, whole(t.shape))) for i, (n, t) in enumerate(infos)])
    found = run(step.ops, [array for _, array in read])
    for array, out in zip(found, made, strict=True):
        copy(cast(array, dtypes.code_of(out.dtype)), out)
    return made


def _fresh(plan: Plan, seed: int, code: str | None) -> Iterator[tuple[str, np.ndarray]]:
    """What the checkpoint lacks, in the dtype that was asked for or that it mostly has."""
    if not plan.fresh:
        return
    stored = [i.dtype for s in plan.steps for i in s.target_infos if dtypes.is_float(i.dtype)]
    values = initial(plan.family, plan.config, plan.fresh, seed)
    for view in plan.layout.view(plan.target_tree):
        names = [t.name for t in view.entry.torch]
        if names[0] in values:
            made = apply(view.ops, [values[n] for n in names], code or (stored or ["F32"])[0])
            yield from zip((t.name for t in view.tensors), made, strict=True)


def _check_known(plan: Plan, overrides: Mapping[str, Any]) -> None:
    if unknown := sorted(plan.unknown - overrides.keys()):
        raise UsageError(
            f"the tensors do not tell {', '.join(unknown)}, and nothing beside them does",
            f"give {unknown[0]}=..., a preset with model=..., or a config.json with config=...",
        )


def _framework(name: str) -> None:
    if name not in FRAMEWORKS:
        raise UsageError(f"there is no framework {name!r}", "it is 'torch' or 'flax'")
