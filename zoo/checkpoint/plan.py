"""header x layout -> Plan: what is read from where, moved how, and written under which name.

One planner for loading, conversion and verification. Nothing is read before the whole header has
been paired; what does not pair is reported all at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.checkpoint.apply import apply
from zoo.checkpoint.identification import identify_header
from zoo.checkpoint.label import Carried, Label
from zoo.checkpoint.peel import Left
from zoo.checkpoint.readings import Candidate, title
from zoo.checkpoint.request import UNSTATED, Request
from zoo.checkpoint.stated_layout import identity
from zoo.containers import dtypes
from zoo.containers.base import Reader, TensorInfo, same_bits
from zoo.containers.errors import UsageError, ZooError
from zoo.layout import TREES, Constant, Layout, Side, Tree, View, between, paired
from zoo.layout.ops import Ops
from zoo.model import Config, Model, override

_CARRIED_MAX = 1 << 20  # bytes of one tensor that may travel in a label


@dataclass(frozen=True, slots=True)
class Step:
    """One entry: the file's tensors, the target's, and the ops between them."""

    names: tuple[str, ...]  # canonical
    kind: str
    sources: tuple[str, ...]  # names in the file
    targets: tuple[str, ...]  # names in the target tree
    source_infos: tuple[TensorInfo, ...]
    target_infos: tuple[TensorInfo, ...]
    ops: Ops
    back: Ops

    @property
    def nbytes(self) -> int:
        """Bytes read."""
        return sum(i.nbytes for i in self.source_infos)


@dataclass(frozen=True, slots=True)
class Aside:
    """A constant or tied tensor that the file spells out: read and checked, not moved."""

    name: str  # canonical
    source: str  # name in the file
    info: TensorInfo
    constant: Constant | None
    tied_to: str | None  # the file's tensor that must hold the same bits


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor that the target has and the file does not: a constant, or one that was carried."""

    name: str
    info: TensorInfo
    constant: Constant | None
    carried: Carried | None

    def value(self) -> np.ndarray:
        """Its values."""
        kept = self.carried.value() if self.carried else None
        if kept is not None:
            return kept
        assert self.constant is not None
        return constant_value(self.constant, self.info)


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion or a load will do, before it does it.

    `model` and `config` are None where a layout was given, or came with the checkpoint, and no
    family has it.
    """

    layout: Layout
    model: Model | None
    config: Config | None
    unknown: frozenset[str]
    source_tree: Tree
    target_tree: Tree
    steps: tuple[Step, ...]
    aside: tuple[Aside, ...]
    made: tuple[Made, ...]
    ties: Mapping[str, str]  # second names that PyTorch has -> the target tensor they repeat
    spelled: frozenset[str]  # those of them that the source spelled out
    told: tuple[str, ...]  # what a user should know
    left: Left  # what the file holds besides
    label: Label  # for the target, but for what is only known once tensors have been read
    fresh: tuple[str, ...] = ()  # canonical tensors that the file lacks (see `transfer`)

    @property
    def family(self) -> Model:
        """The family; UsageError where there is none, and so no definition of a module."""
        if self.model is None:
            raise UsageError(
                "the checkpoint came with a layout and is of no family in the zoo: there is no "
                "definition of its model",
                "load it into your own definition: convert.load(path, framework, definition); of "
                "checkpoints only bits can be compared, of two loaded modules all",
            )
        return self.model

    @property
    def title(self) -> str:
        """The family, and its presets of this size; or "the given layout"."""
        return title(self.model, self.config, self.unknown)

    @property
    def layout_id(self) -> str:
        """What a certificate calls the layout: "bert/1", or "entries/sha256:..."."""
        return f"{self.model.name}/{self.model.version}" if self.model else identity(self.layout)

    @property
    def prefix(self) -> str:
        """What upstream puts before the tensors of a model that got a head."""
        return self.model.base_prefix if self.model else ""

    @property
    def fields(self) -> dict[str, Any]:
        """The config's fields as data, null where nothing tells them; none without a family."""
        if self.config is None:
            return {}
        return dataclasses.asdict(self.config) | dict.fromkeys(self.unknown)

    @property
    def notices(self) -> tuple[str, ...]:
        """What a user should be told."""
        return (*self.told, *self.left.notices())

    @property
    def source_side(self) -> Side:
        """Whose framework the file is of."""
        return self.layout.side(self.source_tree)

    @property
    def target_side(self) -> Side:
        """Whose framework the target is of."""
        return self.layout.side(self.target_tree)

    @property
    def readable(self) -> bool:
        """Whether transformers, where it has the model, reads tensors of the target's names."""
        return self.model is None or self.target_tree in self.model.hf_trees

    def pairs(self) -> list[tuple[View, View]]:
        """What the file holds, and what the target does, entry by entry."""
        return paired(self.layout.view(self.source_tree), self.layout.view(self.target_tree))

    def target_tensors(self) -> dict[str, TensorInfo]:
        """The header of the target, ties aside."""
        header = {
            name: info
            for step in self.steps
            for name, info in zip(step.targets, step.target_infos, strict=True)
        }
        return header | {m.name: m.info for m in self.made}


def make_plan(
    reader: Reader,
    label: Label,
    target: Tree | None,
    *,
    request: Request = UNSTATED,
    sources: Iterable[Tree] = TREES,
    dtype: str | None = None,
    values: bool = True,
) -> Plan:
    """Pair every tensor of the file with the layout of the model that it is.

    `target` None means the side that it is not: NNX, or torch as its source was spelled. `sources`
    are the trees that the file may be spelled as, each with its dialects; `dtype` a dtype code for
    floating-point tensors. Where the file spells out tensors that are tied, they are read, to see
    whether they are; not without `values`. Raises ZooError listing everything that is missing,
    surplus or of the wrong shape.
    """
    if label.problem is not None and request.config is None and request.layout is None:
        raise label.problem
    if graph := reader.container == "onnx":
        from zoo.checkpoint.onnx_names import reasons, settle

        settle(reader, label, request)
    try:
        found = identify_header(reader.tensors, label, request, sources)
    except ZooError as e:
        details = [*e.details, *(reasons(reader) if graph else ())]
        raise type(e)(f"{reader.path}: {e.problem}", e.advice, details) from None
    from_torch = found[0].layout.side(found[0].tree) == "torch"
    target = target or ("nnx" if from_torch else label.dialect or "torch")
    if (model := found[0].model) is not None:
        target = model.tree_of(target)
    if values and request.config is None:
        found = [_settle_ties(c, reader, label, request) for c in found]
    plans = [_plan(c, reader, label, target, dtype) for c in found]
    first = plans[0]
    if any(p.steps != first.steps for p in plans[1:]):
        titles = sorted({c.title() for c in found})
        raise UsageError(
            f"the tensors fit {len(titles)} models that differ: {', '.join(titles)}",
            "say which with --model",
        )
    names = {p.model.name for p in plans if p.model}
    if others := sorted(names - {first.model.name if first.model else ""}):
        told = f"names and shapes are also those of {', '.join(others)}; the tensors are the same"
        return dataclasses.replace(first, told=(*first.told, told))
    return first


def _settle_ties(c: Candidate, reader: Reader, label: Label, request: Request) -> Candidate:
    """The reading once values have told whether what the file spells out is tied, where its family
    can do without."""
    called = {v.entry.torch[0].name: v.tensors[0].name for v in c.layout.view(c.tree) if v.tensors}
    spelled = {
        name: (c.names[called[name]], c.names[called[e.tied_to]])
        for e in c.layout.entries
        if e.tied_to is not None and called.get(name := e.torch[0].name) in c.names
    }
    if c.model is None or not (spelled.keys() & c.model.untied.keys()):
        return c
    untied = c.model.untied
    tied = {n: same_bits(reader, *pair) for n, pair in spelled.items() if n in untied}
    unknown = c.unknown - {untied[n] for n in tied}
    try:
        config = override(c.config, {untied[n]: same for n, same in tied.items()})
    except UsageError:  # not these alone: left for who refuses ties that do not hold
        return c
    if all(tied.values()):
        return dataclasses.replace(c, unknown=unknown)
    stated = dataclasses.replace(label, model=c.model, config=config, unknown=unknown, foreign="")
    free = identify_header(reader.tensors, stated, Request(prefix=request.prefix), (c.tree,))[0]
    own = ", ".join(spelled[n][0] for n, same in tied.items() if not same)
    told = f"not tied, as the file has other values there: {own}"
    return dataclasses.replace(free, told=(*c.told, told), unknown=unknown)


def _plan(c: Candidate, reader: Reader, label: Label, target: Tree, dtype: str | None) -> Plan:
    steps: list[Step] = []
    aside: list[Aside] = []
    made: list[Made] = []
    ties: dict[str, str] = {}
    spelled = set(label.ties)
    pairs = paired(c.layout.view(c.tree), c.layout.view(target))
    sources, targets = (
        {v.entry.torch[0].name: v.tensors[0].name for v in views if v.tensors}
        for views in zip(*pairs, strict=True)
    )
    to_torch = c.layout.side(target) == "torch"
    for source, view in pairs:
        e, name = source.entry, source.entry.torch[0].name
        held = c.names.get(sources.get(name, ""))
        if e.tied_to is not None:
            if held is not None:
                of = c.names[sources[e.tied_to]]
                aside.append(Aside(name, held, reader.tensors[held], None, of))
                spelled.add(name)
            if to_torch:
                ties[targets[name]] = targets[e.tied_to]
        elif e.constant is None or (held is not None and to_torch):
            steps.append(_step(source, view, c.names, reader.tensors, dtype))
        elif held is not None:
            aside.append(Aside(name, held, reader.tensors[held], e.constant, None))
        elif to_torch and (e.constant.in_state_dict or name in label.carried):
            kept = label.carried.get(name)
            info = kept.info if kept else TensorInfo(e.constant.dtype, e.torch[0].shape)
            made.append(Made(targets[name], info, e.constant, kept))
    notices = [*label.notices, *reader.notices, *c.peeled.notices(), *c.told]
    if c.unknown:
        notices.append(f"not in the tensors, recorded as unknown: {', '.join(sorted(c.unknown))}")
    return Plan(
        layout=c.layout,
        model=c.model,
        config=c.config,
        unknown=c.unknown,
        source_tree=c.tree,
        target_tree=target,
        steps=tuple(steps),
        aside=tuple(aside),
        made=tuple(made),
        ties=ties,
        spelled=frozenset(targets[n] for n in spelled if n in targets),
        told=tuple(notices),
        left=Left(c.peeled.set_aside, tuple(reader.extras), tuple(reader.beside)),
        label=_target_label(c, label, target, spelled),
    )


def _target_label(c: Candidate, label: Label, target: Tree, spelled: Iterable[str]) -> Label:
    """What the target says of itself, but for what is only known once tensors have been read."""
    return dataclasses.replace(
        label,
        model=c.model,
        config=c.config,
        unknown=c.unknown,
        layout=None if c.model else c.layout,
        # The config.json of a family, beside what is said to be of none, is of something else.
        hf=label.hf if c.model or label.model is None else {},
        dialect=_remembered(c, label, target),
        carried={} if c.layout.side(target) == "torch" else label.carried,
        ties=tuple(sorted(spelled)),
        notices=(),
        foreign="",
    )


def _remembered(c: Candidate, label: Label, target: Tree) -> str:
    """What a Flax checkpoint keeps of how torch spelled it, for the way back."""
    if c.layout.side(target) == "torch":
        return ""
    return c.tree if c.layout.side(c.tree) == "torch" and c.tree != "torch" else label.dialect


def _step(
    source: View,
    view: View,
    names: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    dtype: str | None,
) -> Step:
    held = tuple(names[t.name] for t in source.tensors)
    infos = tuple(tensors[n] for n in held)
    codes = {i.dtype for i in infos}
    if dtype is not None:
        codes = {dtype if dtypes.is_float(code) else code for code in codes}
    if len(codes) > 1:
        raise ZooError(
            f"{', '.join(held)} become one tensor but have the dtypes {', '.join(sorted(codes))}",
            "give --dtype to bring them to one",
        )
    (code,) = codes
    ops, back = between(source, view)
    return Step(
        names=tuple(t.name for t in source.entry.torch),
        kind=source.entry.kind,
        sources=held,
        targets=tuple(t.name for t in view.tensors),
        source_infos=infos,
        target_infos=tuple(TensorInfo(code, t.shape) for t in view.tensors),
        ops=ops,
        back=back,
    )


def read_step(reader: Reader, step: Step) -> list[np.ndarray]:
    """The step's target tensors, read, moved and cast."""
    code = step.target_infos[0].dtype if step.target_infos else None
    return apply(step.ops, [reader.read(name) for name in step.sources], code)


def check_ties(reader: Reader, plan: Plan) -> list[str]:
    """The tied tensors that the file spells out with other bits than those they repeat."""
    return [
        a.name
        for a in plan.aside
        if a.tied_to is not None and not same_bits(reader, a.source, a.tied_to)
    ]


def refuse_broken_ties(reader: Reader, plan: Plan) -> None:
    """ZooError if what the model has once stands twice in the file, with different values."""
    if broken := check_ties(reader, plan):
        of = {a.name: a for a in plan.aside}
        raise ZooError(
            f"{broken[0]} and {of[broken[0]].tied_to} are tied, but hold different values",
            f"{plan.title} has them once: make them equal, or remove one",
        )


def constant_value(constant: Constant, info: TensorInfo) -> np.ndarray:
    """The values that the layout states for a one-sided tensor."""
    kind = dtypes.NUMPY[info.dtype]
    if constant.fill == "zeros":
        return np.zeros(info.shape, kind)
    return np.broadcast_to(np.arange(info.shape[-1]).astype(kind), info.shape).copy()


def carry(aside: Aside, value: np.ndarray) -> Carried:
    """What a label must keep so that the one-sided tensor returns bit for bit."""
    assert aside.constant is not None
    if value.tobytes() == constant_value(aside.constant, aside.info).tobytes():
        return Carried(aside.info)
    if aside.info.nbytes > _CARRIED_MAX:
        raise ZooError(
            f"{aside.source} is a constant in PyTorch, and not the one expected "
            f"({aside.constant.fill}); its {aside.info.nbytes} bytes are too many to carry along",
            "remove it from the checkpoint if nothing depends on it",
        )
    return Carried(aside.info, value.tobytes())
