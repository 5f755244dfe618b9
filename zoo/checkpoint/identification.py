"""Which model a header is of, and of which configuration: from names and shapes alone."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from zoo import hub
from zoo.checkpoint import strangers
from zoo.checkpoint.label import Label, read_label
from zoo.checkpoint.parts import nothing_below, parts, several
from zoo.checkpoint.peel import Peeled, any_below, levels
from zoo.checkpoint.request import UNSTATED, Request
from zoo.containers import open_checkpoint
from zoo.containers.base import TensorInfo
from zoo.containers.errors import CorruptInput, UsageError, ZooError
from zoo.layout import TREES, Layout, Shape, Tree, canonical_guess
from zoo.model import Config, Model, override
from zoo.registry import families

FLAX_TREES: tuple[Tree, ...] = ("nnx", "linen", "linen-compact")
_AUTOMATIC = re.compile(r"\.[A-Z][A-Za-z0-9]*_\d+\.")  # what @nn.compact calls its modules
_SHOWN = 10  # problems of one kind that an error spells out


@dataclass
class Problems:
    """How a header differs from a layout."""

    missing: dict[str, Shape] = field(default_factory=dict)
    surplus: list[str] = field(default_factory=list)
    misshaped: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)  # found, expected

    def __len__(self) -> int:
        return len(self.missing) + len(self.surplus) + len(self.misshaped)

    def lines(self) -> list[str]:
        """One line a problem, with the nearest name where a name may be misspelt.

        Of each kind the first are spelled out, and the rest counted.
        """
        missing = [
            f"missing: {n} {dims(s)}{_near(n, self.surplus)}"
            for n, s in itertools.islice(self.missing.items(), _SHOWN)
        ]
        surplus = [f"surplus: {n}" for n in self.surplus[:_SHOWN]]
        misshaped = [
            f"wrong shape: {n} is {dims(got)}, should be {dims(want)}"
            for n, (got, want) in itertools.islice(self.misshaped.items(), _SHOWN)
        ]
        counts = len(self.missing), len(self.surplus), len(self.misshaped)
        lines: list[str] = []
        for kind, n in zip((missing, surplus, misshaped), counts, strict=True):
            lines += kind
            if n > len(kind):
                lines.append(f"{kind[0].partition(':')[0]}: ... and {n - len(kind)} more")
        return lines


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


@dataclass(frozen=True)
class Identity:
    """What a checkpoint is. Fields of `config` in `unknown` are defaults that nothing stated.

    `model` and `config` are None where it came with a layout of its own instead of a family.
    """

    model: Model | None
    config: Config | None
    unknown: frozenset[str]
    presets: list[str]  # those of the same size
    tree: Tree


def identify(source: str | os.PathLike[str]) -> list[Identity]:
    """What the checkpoint at `source` is: one Identity for each model that fits every tensor.

    Reads names and shapes only. Raises ZooError, listing all differences, if none fits.
    """
    with open_checkpoint(hub.locate(source)) as reader:
        found = identify_header(reader.tensors, read_label(reader))
    return [
        Identity(
            c.model, c.config, c.unknown, matching_presets(c.model, c.config, c.unknown), c.tree
        )
        for c in found
    ]


def identify_header(
    tensors: Mapping[str, TensorInfo],
    label: Label,
    request: Request = UNSTATED,
    trees: Iterable[Tree] = TREES,
) -> list[Candidate]:
    """Every reading that fits without a problem; ZooError listing all problems if there is none.

    What a label states goes before what names suggest, and what the user says before both: a model
    that is said to be another's, or whose names are another's, is not taken for one of the zoo's.
    """
    strangers.refuse_stated(label, request)
    if request.prefix is not None and not any_below(tensors, request.prefix):
        raise nothing_below(request.prefix, tensors)
    wanted = tuple(trees)
    found = list(_readings(tensors, label, request, wanted))
    if fitting := [c for c in found if not c.problems]:
        weighed = [_weighed(c, tensors, label, request) for c in fitting]
        pairs = zip(fitting, weighed, strict=True)
        if not (perfect := [replace(c, told=w.told) for c, w in pairs if not w.theirs]):
            raise strangers.refusal(weighed[0].theirs)
        depth = min(len(c.peeled.wrappers) for c in perfect)
        perfect = [c for c in perfect if len(c.peeled.wrappers) == depth]
        _refuse_several(tensors, perfect[0], label, request, wanted)
        return perfect
    others_trees = tuple(t for t in TREES if t not in wanted)
    if any(not c.problems for c in _readings(tensors, label, request, others_trees)):
        side, other = (
            ("PyTorch", "torch2flax") if "torch" in others_trees else ("Flax", "flax2torch")
        )
        raise UsageError(
            f"it is a {side} checkpoint already: its names are {side}'s",
            f"convert it the other way (zooconvert {other}), or copy it",
        )
    best = max(found, key=lambda c: c.fit, default=None)
    stated = request.model or request.layout or label.model or label.layout
    offered = _parts(tensors, tensors, label, request, wanted)
    if offered and (best is None or best.fit < 0.5):
        raise several(offered)
    if not stated:
        inner = next(levels(tensors, request.prefix)).names.values()
        strangers.refuse_named(families().values(), {n: tensors[n].shape for n in inner})
    if best is None or (best.fit < 0.5 and stated is None):
        raise _unknown_model(tensors)
    raise mismatch(best, offered)


def _weighed(
    c: Candidate, tensors: Mapping[str, TensorInfo], label: Label, request: Request
) -> strangers.Weighed:
    """What the names that a reading is of, as the file has them, say of other models."""
    shapes = {n: tensors[n].shape for n in c.peeled.names.values()}
    return strangers.weigh(c.model, shapes, label, request)


def _parts(
    tensors: Mapping[str, TensorInfo],
    names: Collection[str],
    label: Label,
    request: Request,
    trees: tuple[Tree, ...],
) -> dict[str, str]:
    """The models that lie below a prefix each; none where the user named one."""
    if request.prefix is not None or request.layout is not None or label.layout is not None:
        return {}

    def what(prefix: str) -> str | None:
        inner = replace(request, prefix=prefix)
        for c in _readings(tensors, label, inner, trees):
            if not c.problems and not _weighed(c, tensors, label, inner).theirs:
                return c.title()
        return None

    return parts(names, len(tensors), what)


def _refuse_several(
    tensors: Mapping[str, TensorInfo],
    taken: Candidate,
    label: Label,
    request: Request,
    trees: tuple[Tree, ...],
) -> None:
    """UsageError where what a reading sets aside is a model too."""
    if beside := _parts(tensors, taken.peeled.set_aside, label, request, trees):
        raise several({".".join(taken.peeled.wrappers): taken.title()} | beside)


def mismatch(candidate: Candidate, offered: Mapping[str, str] | None = None) -> ZooError:
    """The error that lists everything in which the header differs from its nearest model; and the
    parts of it that are whole."""
    count = len(candidate.problems)
    family = candidate.model.name if candidate.model else None
    whole = [p for p, what in (offered or {}).items() if what.partition(" ")[0] == family]
    return ZooError(
        f"the tensors are not those of {candidate.title()}: {count} "
        f"{'differs' if count == 1 else 'differ'}"
        + (f" (sizes from {candidate.stated_by})" if candidate.stated_by else ""),
        "give the layout that the checkpoint was made with; else it is incomplete"
        if candidate.model is None
        else "if it is another model or size, name it with --model or --config; "
        + (
            f"what lies below {whole[0]} is whole: take it alone with --prefix {whole[0]}"
            if whole
            else "else the checkpoint is incomplete"
        ),
        candidate.problems.lines(),
    )


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


def _readings(
    tensors: Mapping[str, TensorInfo], label: Label, request: Request, trees: tuple[Tree, ...]
) -> Iterator[Candidate]:
    if (layout := request.layout or (label.layout if request.silent else None)) is not None:
        yield from _readings_of(layout, tensors, trees, request.prefix)
        return
    only = request.model or label.model
    stated_by = label.source if request.config is None and label.config is not None else ""
    every = [
        (peeled, {n: tensors[s].shape for n, s in peeled.names.items()})
        for peeled in levels(tensors, request.prefix, found=True)
    ]
    for model in [only] if only else families().values():
        for peeled, shapes in every:
            for tree in trees:
                for config, unknown, spelled in _configs(model, shapes, tree, label, request):
                    layout = model.layout_of(config)
                    bare = _reading(layout, tree, peeled, spelled, shapes)
                    yield replace(
                        bare, model=model, config=config, unknown=unknown, stated_by=stated_by
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
    """Configs under which `shapes` may be a `model`, and today's spelling -> name at this level."""
    stated = request.config if request.config is not None else label.config
    unstated = label.unknown if request.config is None else frozenset()
    if stated is not None and label.model is not model and request.config is None:
        stated = None
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
    if tree == "linen":
        inner = {n.partition(".")[2]: s for n, s in inner.items()}
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


def _unknown_model(tensors: Mapping[str, TensorInfo]) -> ZooError:
    if not tensors:
        return CorruptInput(
            "the checkpoint holds no tensors", "give a checkpoint that holds a model's weights"
        )
    some = ", ".join(list(tensors)[:3])
    return ZooError(
        f"no model in the zoo has these {len(tensors)} tensors ({some}, ...)",
        "of a model of your own, give its torch module: --torch MODULE:NAME, or in Python "
        "layout=convert.layout_of(module); docs/your-own-model.md has all ways",
    )


def _near(name: str, surplus: list[str]) -> str:
    near = get_close_matches(name, surplus, 1, 0.8)
    return f" (nearest: {near[0]})" if near else ""


def dims(shape: Shape) -> str:
    """A shape for people: 30522x384."""
    return "x".join(map(str, shape)) if shape else "scalar"


def _fields(config: Config) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
