"""What is in a checkpoint, from its header alone."""

from __future__ import annotations

import os
import reprlib
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from convert.training_state.besides import besides
from convert.training_state.summary import summary
from zoo import hub
from zoo.checkpoint.identification import identify_header
from zoo.checkpoint.label import Label, read_label
from zoo.checkpoint.onnx_names import settle
from zoo.checkpoint.peel import Left
from zoo.checkpoint.plan import make_plan
from zoo.checkpoint.readings import Candidate
from zoo.checkpoint.request import Request, make_request
from zoo.checkpoint.stated_layout import identity
from zoo.containers import open_checkpoint
from zoo.containers.base import Reader, TensorInfo
from zoo.containers.errors import ZooError


@dataclass
class Inspection:
    """Names, shapes, dtypes and sizes, and the model they are of."""

    path: str
    container: str
    tensors: dict[str, TensorInfo]
    models: list[str]  # what fits every tensor: "bert (minilm_l6)"; empty if nothing does
    why_not: str | None  # the nearest miss, where nothing fits
    differences: list[str]  # from the nearest miss
    unknown: list[str]  # config fields that nothing in the checkpoint tells
    tree: str | None  # how the names are spelled: a tree or a dialect
    layout: str | None = None  # "entries/sha256:..." of a layout of no family
    ties: dict[str, str] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)  # `convert.training_state.summary`
    metadata: dict[str, str] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, those that share storage counted once."""
        return sum(t.nbytes for n, t in self.tensors.items() if n not in self.ties)

    @property
    def values(self) -> int:
        """Number of elements, likewise."""
        return sum(t.size for n, t in self.tensors.items() if n not in self.ties)

    def to_dict(self) -> dict[str, Any]:
        """As data for JSON."""
        return {
            "path": self.path,
            "container": self.container,
            "models": self.models,
            "why_not": self.why_not,
            "differences": self.differences,
            "unknown": self.unknown,
            "tree": self.tree,
            "layout": self.layout,
            "values": self.values,
            "bytes": self.nbytes,
            "tensors": {
                n: {"dtype": t.dtype, "shape": list(t.shape), "bytes": t.nbytes}
                for n, t in self.tensors.items()
            },
            "ties": self.ties,
            "training": self.training,
            "metadata": self.metadata,
            "extras": {k: v if _plain(v) else brief(v) for k, v in self.extras.items()},
            "notices": self.notices,
        }


def inspect(source: str | os.PathLike[str], *, layout: Any = None) -> Inspection:
    """Look into a checkpoint of any container. Reads no weight and imports no framework.

    `layout` says what the tensors are where no family has them, as in `convert.convert`.
    Raises ZooError for what is not a checkpoint; one of an unknown model is not an error.
    """
    path = hub.locate(source)
    request = make_request(None, None, layout)
    with ExitStack() as stack:
        reader = stack.enter_context(open_checkpoint(path))
        label = read_label(reader)
        training: dict[str, Any] = {}
        models, tree, why_not = [], None, None
        differences: list[str] = []
        unknown: list[str] = []
        notices = [*reader.notices, *label.notices]
        notices += [label.problem.problem] if label.problem else []
        try:
            settle(reader, label, request)
            found = identify_header(reader.tensors, label, request)
            models = list(dict.fromkeys(c.title() for c in found))
            tree = found[0].tree
            unknown = sorted(found[0].unknown)
            notices += [*found[0].peeled.notices(), *found[0].told]
            told, training = _besides(reader, found[0], stack)
            notices += told
        except ZooError as e:
            why_not, differences = e.problem, e.details
        given = request.layout or label.layout
        return Inspection(
            path=os.fspath(source),
            container=reader.container,
            tensors=dict(reader.tensors),
            models=models,
            why_not=why_not,
            differences=differences,
            unknown=unknown,
            tree=tree,
            layout=None if given is None else identity(given),
            ties=dict(reader.ties),
            training=training,
            metadata=dict(reader.metadata),
            extras=dict(reader.extras),
            notices=notices,
        )


def _besides(
    reader: Reader, candidate: Candidate, stack: ExitStack
) -> tuple[list[str], dict[str, Any]]:
    """What to tell of what the checkpoint holds besides its weights, and a summary of it."""
    layout = None if candidate.model else candidate.layout
    request = Request(candidate.model, candidate.config, layout)
    plan = make_plan(reader, Label(), None, request=request, values=False)
    before = len(plan.told)
    plan, state = besides(reader, plan, stack, damaged=True)
    left = Left(plan.left.tensors, (), plan.left.files)
    return [*plan.told[before:], *left.notices()], summary(state)


def brief(value: Any) -> str:
    """Plain data as text, shortened where it is long: a pickle may say more than it holds."""
    short = reprlib.Repr()
    short.maxlist = short.maxtuple = short.maxdict = short.maxset = 50
    short.maxstring = short.maxother = short.maxlong = 1000
    return value[:1000] if isinstance(value, str) else short.repr(value)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
