"""What a header may be: every reading of its names and shapes by a layout, and how well it fits."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from zoo.checkpoint.label import Label
from zoo.checkpoint.likely import likely
from zoo.checkpoint.peel import Peeled, levels
from zoo.checkpoint.problems import Problems
from zoo.checkpoint.request import Request
from zoo.containers.base import TensorInfo
from zoo.containers.errors import CorruptInput, UsageError
from zoo.layout import (
    COLLECTED,
    STACKED,
    TREES,
    Layout,
    Renames,
    Shape,
    Tree,
    canonical_guess,
    unstacked,
)
from zoo.layout.renames import below_collection
from zoo.model import Config, Model, override

_AUTOMATIC = re.compile(r"\.[A-Z][A-Za-z0-9]*_\d+\.")  # what @nn.compact calls its modules


@dataclass(frozen=True)
class Candidate:
    """One reading of a header: this layout, spelled as this tree, at this level; and the model and
    config that it is of, where it is one of a family."""

    layout: Layout
    tree: Tree
    peeled: Peeled
    names: Mapping[str, str]  # the tree's name -> the file's name
    problems: Problems
    fit: float  # tensors that pair, as a fraction of all on either side
    model: Model | None = None
    config: Config | None = None
    unknown: frozenset[str] = frozenset()  # config fields that nothing stated
    stated_by: str = ""  # where the config was read, "" if it was inferred
    told: tuple[str, ...] = ()  # what the user should know of how it came to be

    def title(self) -> str:
        """The family, and its presets of this size."""
        return title(self.model, self.config, self.unknown)


def title(model: Model | None, config: Config | None, unknown: frozenset[str]) -> str:
    """The family, and its presets of this size: "bert (minilm_l6)"; or "the given layout"."""
    if model is None:
        return "the given layout"
    presets = matching_presets(model, config, unknown)
    return f"{model.name} ({' or '.join(presets)})" if presets else model.name


def only_training(field: str) -> bool:
    """Whether a config field matters to fresh weights or to training alone, by its name: no tensor
    tells it, and outputs do not depend on it."""
    return "dropout" in field or field.startswith("initializer")


def matching_presets(
    model: Model | None, config: Config | None, unknown: frozenset[str]
) -> list[str]:
    """The presets that differ from `config` in nothing that is known of it."""
    if model is None:
        return []
    ignored = unknown | model.structure | {f for f in _fields(config) if only_training(f)}
    known = {f: v for f, v in _fields(config).items() if f not in ignored}
    return [
        name
        for name, preset in model.presets.items()
        if all(getattr(preset, f) == v for f, v in known.items())
    ]


def readings(
    tensors: Mapping[str, TensorInfo], label: Label, request: Request, trees: tuple[Tree, ...]
) -> Iterator[Candidate]:
    if (layout := request.layout or (label.layout if request.silent else None)) is not None:
        yield from _readings_of(layout, tensors, trees, request.prefix)
        return
    only = request.model or label.model
    stated_by = label.source if request.config is None and label.config is not None else ""
    if stated_by and only is label.model:
        _refuse_absurd(label, len(tensors))
    models = [only] if only else likely(tensors)
    if not models:
        return
    every = [
        (peeled, {n: tensors[s].shape for n, s in peeled.names.items()})
        for peeled in levels(tensors, request.prefix, found=True)
    ]
    for model in models:
        dialects = [d.name for d in model.dialects if d.tree in trees]
        for peeled, shapes in every:
            for tree in (*trees, *dialects):
                for config, unknown, spelled in _configs(model, shapes, tree, label, request):
                    layout = model.layout_of(config)
                    bare = _reading(layout, tree, peeled, spelled, shapes)
                    yield replace(
                        bare, model=model, config=config, unknown=unknown, stated_by=stated_by
                    )


def _refuse_absurd(label: Label, tensors: int) -> None:
    """CorruptInput where a file's config asks for far more tensors than the checkpoint has, before
    they are all named: a config may say 10^9 layers."""
    most = 4096 + 64 * tensors  # layers may be stacked
    if label.model is not None and label.model.asks_for_more(label.config, most):
        raise CorruptInput(
            f"{label.source} asks for a model of more than {most} tensors, and the checkpoint has "
            f"{tensors}",
            "mend or remove it, and say what it is with --model or --config",
        )


def _readings_of(
    layout: Layout,
    tensors: Mapping[str, TensorInfo],
    trees: tuple[Tree, ...],
    prefix: str | None,
) -> Iterator[Candidate]:
    """The readings of a header by one layout, of no family."""
    for peeled in levels(tensors, prefix):
        shapes = {n: tensors[s].shape for n, s in peeled.names.items()}
        for tree in trees:
            if tree in STACKED and not layout.stacks:
                continue
            spelled = {n: n for n in shapes}
            if tree == "linen-compact":
                spelled = _with_collections(spelled)
            yield _reading(layout, tree, peeled, spelled, shapes)


def _with_collections(spelled: dict[str, str]) -> dict[str, str]:
    """Names of `@nn.compact`, also where they were saved without collections."""
    if any(n.startswith(("params.", "batch_stats.")) for n in spelled):
        return spelled
    return {f"params.{n}": s for n, s in spelled.items()}


def _configs(
    model: Model, shapes: Mapping[str, Shape], tree: Tree, label: Label, request: Request
) -> Iterator[tuple[Config, frozenset[str], dict[str, str]]]:
    """Configs under which `shapes` may be a `model`, and the tree's name -> name at this level."""
    stated = request.config if request.config is not None else label.config
    unstated = label.unknown if request.config is None else frozenset()
    if stated is not None and label.model is not model and request.config is None:
        stated = None
    if tree in TREES:
        yield from _in_tree(model, shapes, tree, stated, unstated)
        return
    dialect = next(d for d in model.dialects if d.name == tree)
    for renames in map(Renames, dict.fromkeys(map(dialect.renames, dialect.configs))):
        back = renames.back
        if dialect.tree in COLLECTED:
            back = functools.partial(below_collection, renames.back)
        ours = {back(n): s for n, s in shapes.items()}
        if ours.keys() == shapes.keys() or len(ours) != len(shapes):
            continue
        for config, unknown, _ in _in_tree(model, ours, dialect.tree, stated, unstated):
            if dialect.renames(config) == renames.pairs:
                yield config, unknown, {n: n for n in shapes}


def _in_tree(
    model: Model,
    shapes: Mapping[str, Shape],
    tree: Tree,
    stated: Config | None,
    unstated: frozenset[str],
) -> Iterator[tuple[Config, frozenset[str], dict[str, str]]]:
    """The configs where `tree` is one that every layout has, and today's spelling of each name."""
    spelled = {model.respell(n): n for n in shapes}
    if len(spelled) != len(shapes):  # both spellings of one tensor: keep them apart, one is surplus
        spelled = {n: n for n in shapes}
    if tree == "linen-compact":
        # Automatic names say nothing about sizes: only stated configs and presets can be tried.
        spelled = _with_collections(spelled)
        if stated is not None:
            yield stated, unstated, spelled
        elif any(_AUTOMATIC.search(n) for n in spelled):
            for config in model.presets.values():
                told = model.infer(model.layout_of(config).shapes("torch")) or {}
                yield config, frozenset(model.unknown - told.keys()), spelled
        return
    inner = {n: shapes[s] for n, s in spelled.items()}
    if tree in COLLECTED:
        inner = {n.partition(".")[2]: s for n, s in inner.items()}
    if tree in STACKED:
        apart = unstacked(inner, model.flax_names)
        if apart.keys() == inner.keys():  # nothing is stacked
            return
        inner = apart
    guess = inner if tree == "torch" else canonical_guess(inner)
    fields = model.infer(guess)
    if fields is not None and tree != "torch":  # which has a tied tensor once
        fields |= {told: False for name, told in model.untied.items() if name in guess}
    if stated is not None:
        for config, untold in _as_the_names_say(model, stated, fields or {}):
            yield config, unstated | untold, spelled
    elif fields is not None:
        try:
            config = model.configure(**{**model.placeholders, **fields})
            yield config, frozenset(model.unknown - fields.keys()), spelled
        except UsageError:  # sizes that no config can have: not this model
            return


def _as_the_names_say(
    model: Model, stated: Config, fields: Mapping[str, Any]
) -> Iterator[tuple[Config, frozenset[str]]]:
    """The stated config, then with one field of structure as the names tell it, then with all.

    Names may not tell everything: a token classifier that kept its pooler has those of a sequence
    classifier. What was stated goes first; where names contradict it and yet do not tell, the
    second part says which fields are then unknown.
    """
    told = {k: v for k, v in fields.items() if k in model.structure and getattr(stated, k) != v}
    guess = {k: v for k, v in model.placeholders.items() if k in model.structure - fields.keys()}
    changes: list[dict[str, Any]] = [{k: v} for k, v in told.items()]
    changes += [told] if len(told) > 1 else []
    changes += [told | guess] if fields and guess else []
    yield stated, frozenset()
    for change in changes:
        try:
            yield override(stated, change), frozenset(change.keys() & guess.keys() - told.keys())
        except UsageError:  # no such model: what was stated will be held against the tensors
            continue


def _reading(
    layout: Layout,
    tree: Tree,
    peeled: Peeled,
    spelled: Mapping[str, str],
    shapes: Mapping[str, Shape],
) -> Candidate:
    """What is at this level of the header, held against a layout of no family."""
    required: dict[str, Shape] = {}
    optional: dict[str, Shape] = {}
    for view in layout.view(tree):
        e = view.entry
        group = required if e.constant is None and e.tied_to is None else optional
        group.update({t.name: t.shape for t in view.tensors})
    problems = Problems()
    for name, want in (required | optional).items():
        if name in spelled:
            got = shapes[spelled[name]]
            if got != want:
                problems.misshaped[name] = (got, want)
        elif name in required:
            problems.missing[name] = want
    problems.surplus = [n for n in spelled if n not in required and n not in optional]
    paired = len(required) - len(problems.missing) - len(problems.misshaped)
    return Candidate(
        layout,
        tree,
        peeled,
        {n: peeled.names[s] for n, s in spelled.items()},
        problems,
        paired / max(1, len(required) + len(problems.surplus)),
    )


def _fields(config: Config) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
