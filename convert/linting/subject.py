"""A checkpoint as lint sees it: its layers with kinds and shapes, and what its config states.

A model of the zoo has both from its layout. Of any other, kinds are guessed from names and shapes,
and the config is the `config.json` beside it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo import hub
from zoo.checkpoint.identification import identify_header
from zoo.checkpoint.label import Label, config_files, read_label
from zoo.checkpoint.peel import NOT_WEIGHTS, levels
from zoo.checkpoint.readings import Candidate
from zoo.checkpoint.request import Request
from zoo.containers import json_text, open_checkpoint
from zoo.containers.base import Reader, TensorInfo
from zoo.containers.errors import CorruptInput, ZooError
from zoo.layout import canonical_guess
from zoo.layout.ops import Reorder, Shape

_EMBEDDING = re.compile(
    r"(^|[._])(\w*embed\w*|emb|\w*_emb|wte|wpe|lookup|relative_attention_bias)(\.|_\d+|$)", re.I
)
_GATED = re.compile(r"^weight_(ih|hh)(_l\d+)?(_reverse)?$")
_FLAX_GATES = ("hi", "hf", "hg", "ho", "hr", "hz", "hn", "ii", "if", "ig", "io", "ir", "iz", "in")
_CONFIG_MAX = 64 << 20  # bytes of a config.json
_LONGEST = 4096  # config values whose text is longer are left out


@dataclass(frozen=True)
class Layer:
    """One module: its dotted canonical name, its kind as in `zoo.layout`, its tensors by leaf.

    Besides the layout's kinds: "attention" (fused in_proj), "conv_transpose", "gate" (one of the
    matrices of a Flax recurrent cell), "linear_in_out" (weight stored (in, out)).
    """

    name: str
    kind: str
    shapes: Mapping[str, Shape]
    tied: bool = False  # a second name of another tensor
    flattened: Shape | None = None  # (C, H, W) that this linear layer reads, where it is known

    @property
    def weight(self) -> Shape:
        """Shape of its largest tensor."""
        return max(self.shapes.values(), key=lambda s: (len(s), s), default=())


@dataclass(frozen=True)
class Subject:
    """One checkpoint."""

    path: str
    title: str | None  # of the zoo's model
    family: str | None
    framework: str  # "torch" or "flax", by its names
    tensors: Mapping[str, TensorInfo]  # by canonical name
    layers: list[Layer]
    config: Mapping[str, Any]  # what is stated
    unknown: frozenset[str]  # fields of the zoo's config that nothing states
    constants: frozenset[str]  # tensors that only PyTorch has, or second names
    foreign: str | None = None  # the `model_type` that a config.json has instead of the family's
    notices: list[str] = field(default_factory=list)

    @property
    def ours(self) -> bool:
        """Whether both definitions are the zoo's, so that its tests have compared them."""
        return self.family is not None and self.foreign is None

    def kinds(self, *kinds: str) -> list[Layer]:
        """The layers of these kinds."""
        return [layer for layer in self.layers if layer.kind in kinds and not layer.tied]

    def find(self, *keys: str) -> tuple[str, Any] | None:
        """The first of these keys that the config states, and its value."""
        return next(((k, self.config[k]) for k in keys if self.config.get(k) is not None), None)


def read(source: Any, request: Request) -> Subject:
    """The checkpoint at `source`, whatever `zoo.hub` understands. Reads its header alone."""
    path = hub.locate(source)
    with open_checkpoint(path) as reader:
        if not reader.tensors:
            raise CorruptInput(
                f"{source} holds no tensors", "give a checkpoint that holds a model's weights"
            )
        label = read_label(reader)
        notices = [*reader.notices, *label.notices]
        notices += [label.problem.problem] if label.problem else []
        stated, told = _config(reader, label)
        try:
            # Another's config beside names of ours is what there is to tell.
            ours = dataclasses.replace(label, foreign="")
            found = identify_header(reader.tensors, ours, request)[0]
        except ZooError as e:
            if request.model is not None or request.layout is not None:
                raise
            why = f"no model of the zoo: {e.problem}; layers are guessed from names and shapes"
            return _unknown(str(source), reader, stated, [*notices, *told, why])
        used = label.model is not None or request.model is not None
        notices += [*found.peeled.notices(), *found.told]
        return _known(str(source), reader, found, stated, used, notices)


def _known(
    source: str,
    reader: Reader,
    c: Candidate,
    stated: Mapping[str, Any],
    used: bool,
    notices: list[str],
) -> Subject:
    """`used` says whether the config is the family's own; else what it states stands above the
    family's defaults."""
    tensors: dict[str, TensorInfo] = {}
    constants: set[str] = set()
    grouped: dict[tuple[str, str], dict[str, Shape]] = {}
    tied: set[str] = set()
    flattened: dict[str, Shape] = {}
    for view in c.layout.view(c.tree):
        e = view.entry
        present = [c.names[t.name] for t in view.tensors if t.name in c.names]
        for t in e.torch:
            module, _, leaf = t.name.rpartition(".")
            if present:
                tensors[t.name] = TensorInfo(reader.tensors[present[0]].dtype, t.shape)
            if e.constant is not None or e.tied_to is not None:
                constants.add(t.name)
            if e.tied_to is not None:
                tied.add(module)
            if e.constant is None:
                kind = "attention" if leaf.startswith("in_proj_") else e.kind
                kind = "embedding" if kind == "tie" else kind
                grouped.setdefault((module, kind), {})[leaf] = t.shape
            for op in e.compact_ops:
                if isinstance(op, Reorder) and leaf == "weight":
                    flattened[module] = op.sizes
    layers = [
        Layer(module, kind, shapes, module in tied, flattened.get(module))
        for (module, kind), shapes in grouped.items()
    ]
    fields: dict[str, Any] = {}
    if c.config is not None:
        fields = {f.name: getattr(c.config, f.name) for f in dataclasses.fields(c.config)}
    known = {k: v for k, v in fields.items() if k not in c.unknown}
    stated_type = stated.get("model_type")
    return Subject(
        source,
        c.title(),
        c.model.name if c.model else None,
        c.layout.side(c.tree),
        tensors,
        layers,
        {**stated, **known} if used else {**known, **stated},
        c.unknown - (set() if used else stated.keys()),
        frozenset(constants),
        None if c.model is None or stated_type in (None, c.model.hf_type) else str(stated_type),
        notices,
    )


def _unknown(source: str, reader: Reader, stated: Mapping[str, Any], notices: list[str]) -> Subject:
    """Whatever else: the innermost level that sets nothing but an optimizer's state aside."""
    inner = [
        p
        for p in levels(reader.tensors)
        if all(NOT_WEIGHTS & set(n.split(".")) for n in p.set_aside)
    ][-1]
    infos = {n: reader.tensors[file] for n, file in inner.names.items()}
    flax = any(n.rpartition(".")[2] in ("kernel", "scale", "embedding") for n in infos)
    if flax:
        collections = ("params.", "batch_stats.")
        if all(n.startswith(collections) for n in infos):
            infos = {n.partition(".")[2]: i for n, i in infos.items()}
        guessed = canonical_guess({n: i.shape for n, i in infos.items()})
        pairs = zip(guessed.items(), infos.values(), strict=True)
        infos = {n: TensorInfo(i.dtype, shape) for (n, shape), i in pairs}
    modules: dict[str, dict[str, Shape]] = {}
    for name, info in infos.items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = info.shape
    ties = {n.rpartition(".")[0] for n, file in inner.names.items() if file in reader.ties}
    layers = [Layer(m, _kind(m, shapes), shapes, m in ties) for m, shapes in modules.items()]
    return Subject(
        source,
        None,
        None,
        "flax" if flax else "torch",
        infos,
        layers,
        stated,
        frozenset(),
        frozenset(),
        None,
        notices,
    )


def _kind(module: str, shapes: Mapping[str, Shape]) -> str:
    """What a module seems to be."""
    weight, bias = shapes.get("weight"), shapes.get("bias")
    if "running_mean" in shapes:
        return "batchnorm"
    if any(_GATED.match(leaf) for leaf in shapes):
        return "recurrent"
    if any(leaf.startswith("in_proj_") for leaf in shapes):
        return "attention"
    if weight is None:
        return "param"
    if module.rpartition(".")[2] in _FLAX_GATES and len(weight) == 2:
        return "gate"
    if len(weight) == 1:
        return "norm"
    swapped = bias is not None and bias != weight[:1] and bias == weight[1:2]
    if len(weight) == 2:
        if _EMBEDDING.search(module) and bias is None:
            return "embedding"
        return "linear_in_out" if swapped else "linear"
    named = re.search(r"deconv|conv_?trans|trans\w*_?conv|upconv", module, re.I)
    return "conv_transpose" if swapped or named else f"conv{len(weight) - 2}d"


def _config(reader: Reader, label: Label) -> tuple[dict[str, Any], list[str]]:
    """What lies beside the checkpoint or in it, the zoo's own fields first; and what to tell."""
    found: dict[str, Any] = dict(label.hf)
    for place in config_files(reader.path):
        if found or not place.is_file():
            continue
        data, told = _json(place)
        if told:
            return {}, [told]
        found = data
    # Composite models keep the language model's fields one level down.
    inner = found.get("text_config")
    nested = dict(inner) if isinstance(inner, Mapping) else {}
    flat = {**nested, **found}
    return {k: v for k, v in flat.items() if len(repr(v)) < _LONGEST}, []


def _json(place: Path) -> tuple[dict[str, Any], str]:
    try:
        data = json_text.read(place, _CONFIG_MAX)
    except (OSError, ValueError) as e:
        return {}, f"{place.name} beside it cannot be read: {e}"
    return (
        (data, "") if isinstance(data, dict) else ({}, f"{place.name} beside it is not an object")
    )
