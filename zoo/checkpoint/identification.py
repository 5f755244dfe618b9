"""Which model a header is of, and of which configuration: from names and shapes alone."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from zoo import hub
from zoo.checkpoint import strangers
from zoo.checkpoint.label import Label, read_label
from zoo.checkpoint.onnx_names import settle
from zoo.checkpoint.parts import nothing_below, parts, several
from zoo.checkpoint.peel import any_below, levels
from zoo.checkpoint.readings import Candidate, matching_presets, readings
from zoo.checkpoint.request import UNSTATED, Request
from zoo.containers import open_checkpoint
from zoo.containers.base import TensorInfo
from zoo.containers.errors import CorruptInput, UsageError, ZooError
from zoo.layout import TREES, Tree
from zoo.model import Config, Model
from zoo.registry import families


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
        label = read_label(reader)
        settle(reader, label, UNSTATED)
        found = identify_header(reader.tensors, label)
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
    found = list(readings(tensors, label, request, wanted))
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
    if any(not c.problems for c in readings(tensors, label, request, others_trees)):
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
        for c in readings(tensors, label, inner, trees):
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
