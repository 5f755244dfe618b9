"""`convert.export`: a checkpoint as an ONNX file, which is run before it is kept."""

from __future__ import annotations

import hashlib
import inspect
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.compare.runnable import runnable
from convert.compare.sides import Side
from convert.compare.torch_side import TorchSide
from convert.compare.twins import twin
from convert.engine.commit import (
    check_paths,
    check_replaceable,
    check_space,
    commit,
    write_text,
)
from convert.engine.workplace import workplace
from convert.exporting.onnx_file import INLINE_MAX, write
from convert.exporting.onnx_proof import Held, Inputs, OtherSizes, call_of, hold, refuse
from convert.exporting.onnx_trace import OPSET, Traced, cleaned, pin, trace, weights
from convert.live.into_definition import load
from convert.runtime.inputs import as_call
from convert.runtime.torch_layout import derive_layout, saved_tensors
from convert.tensors import bits_of
from zoo import hub
from zoo.checkpoint import hashes
from zoo.checkpoint.certificate import Certificate, TensorRecord, now, rests, versions
from zoo.checkpoint.generation import fingerprint
from zoo.checkpoint.label import Label, read_label
from zoo.checkpoint.plan import Aside, Step, carry, make_plan, refuse_broken_ties
from zoo.checkpoint.progress import Progress
from zoo.checkpoint.request import make_request
from zoo.containers import dtypes, filenames, open_checkpoint
from zoo.containers.base import TensorInfo
from zoo.containers.dtypes import dtype_code
from zoo.containers.errors import NotEquivalent, UsageError
from zoo.containers.onnx_graph import OnnxReader
from zoo.layout import Layout
from zoo.loading import LoadNotice, build_from_tree, read_tree

Source = str | os.PathLike[str]


@dataclass
class Exported:
    """An ONNX file that was written: what was run of it, and what a user should know."""

    path: Path
    title: str  # of the model
    opset: int
    sizes: dict[str, tuple[str | int, ...]]  # of each input; a free size by its name
    certificate: Certificate
    held: list[Held] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def worst(self) -> Held | None:
        """The output farthest beyond its noise."""
        return max(self.held, key=lambda h: h.row.ratio, default=None)


@dataclass(frozen=True)
class _Subject:
    """What is exported: a torch module that holds the weights, and how it is labelled."""

    module: Any
    inputs: Inputs
    channels: Any  # input -> whether its axis 1 is one of channels
    label: Label
    flax: Any  # inputs -> the Flax side, or None
    notices: list[str]
    title: str


def export(
    src: Source,
    dst: Source,
    *,
    model: str | None = None,
    config: Source | Mapping[str, Any] | None = None,
    prefix: str | None = None,
    torch: Any = None,
    inputs: Any = None,
    dtype: str | None = None,
    opset: int = OPSET,
    dynamic: bool = True,
    external_data: bool = False,
    force: bool = False,
    verify: bool = True,
    progress: Progress = lambda stage, done, total: None,
) -> Exported:
    """Write the model in the checkpoint `src` as the ONNX file `dst`: its graph and its weights.

    `src`, `model`, `config` and `prefix` are as in `convert.convert`. A model that is not the
    zoo's is given by `torch`, its torch module (or a class or function that makes one), into which
    `src` is loaded, and `inputs`, one call of it as `verify` takes them. torch's exporter makes
    the graph, of opset `opset`; sizes are free where the model allows that, and `dynamic`. `dtype`
    casts floating-point tensors of a model of the zoo. Tensors lie in a file beside with
    `external_data`, and where they have more than 1.8 GB. The file says which model it is, so that
    it comes back without a flag.

    With `verify` it is checked by onnx, its weights are read again and compared bit by bit, and
    onnxruntime runs it at two sizes beside torch and beside the Flax twin; every output is judged
    by the rounding noise. `dst` appears whole, or not at all.

    Raises ZooError: UsageError for what torch cannot export, NotEquivalent where outputs differ.
    """
    target = Path(dst)
    if target.suffix != filenames.ONNX:
        raise UsageError(f"{target} is not called *.onnx", f"give {target.stem}{filenames.ONNX}")
    path = hub.locate(src)
    check_paths(target, path)
    check_replaceable(target, force)
    request = make_request(model, config, None, prefix)
    if torch is not None:
        if model is not None or config is not None:
            raise UsageError(
                "torch= is the module, and model and config say what it is", "give one of the two"
            )
        if dtype is not None:
            raise UsageError(
                "dtype casts models of the zoo, and torch= is a module of one's own",
                "make it of that dtype: a function that gives Net().half()",
            )
        subject = _of_user(path, torch, inputs)
    else:
        subject = _of_zoo(path, request, inputs, dtype)
    size = sum(t.numel() * t.element_size() for t in saved_tensors(subject.module).values())
    check_space(target.parent, 2 * size + (1 << 24))
    apart = external_data or size > INLINE_MAX
    progress("export", 0, size)
    subject, traced = _traced(subject, dynamic, opset)
    progress("export", size, size)
    cleaned(traced.model)
    traced.notices += _add_unused(subject, traced)
    while True:
        try:
            return _written(subject, traced, target, path, opset, apart, force, verify)
        except OtherSizes as e:  # there are fewer at every turn
            pin(traced, e.sizes)
            traced.notices.append(f"fixed: {', '.join(e.sizes)}: {e.problem}")


def _traced(subject: _Subject, dynamic: bool, opset: int) -> tuple[_Subject, Traced]:
    """The graph; where torch cannot make it with lengths of sequences, which pack them by their
    values, without: then no sequence of a batch ends before the others."""
    try:
        call = call_of(subject.inputs)
        return subject, trace(
            subject.module, call, channels=subject.channels, dynamic=dynamic, opset=opset
        )
    except UsageError:
        parameters = inspect.signature(subject.module.forward).parameters
        lengths = [
            n
            for n, x in subject.inputs.items()
            if x.ndim == 1 and x.dtype.kind in "iu" and parameters[n].default is None
        ]
        if not lengths:
            raise
    given = {n: x for n, x in subject.inputs.items() if n not in lengths}
    told = f"without {', '.join(lengths)}: what is packed by its values has no graph"
    subject = replace(subject, inputs=given, notices=[*subject.notices, told])
    return subject, trace(
        subject.module, call_of(given), channels=subject.channels, dynamic=dynamic, opset=opset
    )


def _of_zoo(path: Path, request: Any, inputs: Any, dtype: str | None) -> _Subject:
    """A checkpoint of one of the zoo's families, in its torch twin."""
    with open_checkpoint(path) as reader:
        label = read_label(reader)
        code = None if dtype is None else dtype_code(dtype)
        plan = make_plan(reader, label, "torch", request=request, dtype=code)
        runnable(plan)
        refuse_broken_ties(reader, plan)
        values = dict(read_tree(plan, reader))
    family, config = plan.family, plan.config
    module = build_from_tree(family, config, "torch", values.items())
    canonical = {n: values[n] for s in plan.steps for n in s.targets}
    sample = family.inputs(config)
    given = sample if inputs is None else dict(as_call(inputs).kwargs) or sample
    if all(x.shape[:1] == (1,) for x in given.values()):  # a size of 1 is never free in a trace
        given = {n: np.concatenate([x, x]) for n, x in given.items()}

    def flax(arrays: Inputs) -> Side:
        return twin(family, config, "flax", canonical, inputs=arrays)

    def channels(name: str) -> bool:
        return family.to_flax(name, np.zeros((1, 2, 1))).shape != (1, 2, 1)

    made = _carrying(plan.label, values)
    return _Subject(module, given, channels, made, flax, list(plan.notices), plan.title)


def _carrying(label: Label, held: Mapping[str, np.ndarray]) -> Label:
    """The label, with what no graph has a use for: counters of batches, numbers of positions."""
    layout = label.layout if label.model is None else label.model.layout_of(label.config)
    assert layout is not None
    carried = dict(label.carried)
    for e in layout.entries:
        name = e.torch[0].name
        if e.constant is not None and name in held:
            info = TensorInfo(dtypes.code_of(held[name].dtype), held[name].shape)
            carried[name] = carry(Aside(name, name, info, e.constant, None), held[name])
    return replace(label, carried=carried)


def _of_user(path: Path, definition: Any, inputs: Any) -> _Subject:
    """A checkpoint in its user's own torch module."""
    if inputs is None:
        raise UsageError(
            "a module of one's own is traced of one call", "give it: inputs=..., --inputs FILE"
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LoadNotice)
        module = load(path, "torch", definition)
    layout, told = derive_layout(module)
    told += [str(w.message) for w in caught if str(w.message) not in told]
    state = {n: bits_of(t) for n, t in saved_tensors(module).items()}
    call = as_call(inputs)
    names = call.names(module.forward)
    arrays = call.arrays()
    if set(names) != set(arrays) or any("." in n for n in names.values()):
        raise UsageError(
            "the inputs hold arrays within others", "give a module whose forward takes arrays alone"
        )
    given = {names[path]: x for path, x in arrays.items()}
    title, label = type(module).__name__, _carrying(Label(layout=layout), state)
    return _Subject(module, given, lambda n: False, label, None, told, title)


def _written(
    subject: _Subject,
    traced: Traced,
    target: Path,
    source: Path,
    opset: int,
    apart: bool,
    force: bool,
    verify: bool,
) -> Exported:
    """The file, checked and run in a hidden place beside its own, then put there."""
    traced.model.metadata_props.update(subject.label.to_metadata())
    traced.model.producer_name = "zooconvert"
    certificate = _certificate(subject, source, target)
    told = [*subject.notices, *traced.notices]
    made = Exported(target, subject.title, opset, traced.sizes, certificate, [], told)
    wanted = _canonical(subject)
    with workplace(target) as place:
        digests = _digests(wanted) if apart or verify else {}
        data = _data_name(target, digests) if apart else None
        path = place / target.name
        write(traced.model, path, data)
        certificate.weights = fingerprint(path)
        for name, text in subject.label.files().items():
            write_text(place / name, text)
        _check_onnx(path)
        if verify:
            certificate.hash = hashes.best()
            certificate.tensors += _same_weights(path, wanted, digests)
            made.held, told = hold(
                path, subject.inputs, traced.sizes, lambda arrays: _sides(subject, arrays)
            )
            made.notices += told
            refuse(made.held)
            certificate.verified = _verified(made, len(wanted))
            certificate.files = _rests(path, list(wanted))
        certificate.notices = list(made.notices)
        certificate.versions, certificate.created = versions(), now()
        write_text(place / f"{target.name}.{filenames.CERTIFICATE}", certificate.to_json())
        commit(place, target, force)
    return made


def _digests(tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    kind = hashes.best()
    return {n: hashes.of(kind, x) for n, x in tensors.items()}


def _data_name(target: Path, digests: Mapping[str, str]) -> str:
    """What the file with the tensors is called: another name for other tensors."""
    told = "".join(n + digest for n, digest in digests.items())
    return filenames.onnx_data(target.name, hashlib.sha256(told.encode()).hexdigest())


def _canonical(subject: _Subject) -> dict[str, np.ndarray]:
    """The module's weights by their names, what is tied once."""
    state = saved_tensors(subject.module)
    layout = _layout(subject)
    plain = [e.torch[0].name for e in layout.entries if e.constant is None and e.tied_to is None]
    names = [t.name for e in layout.entries if e.torch[0].name in set(plain) for t in e.torch]
    return {n: bits_of(state[n]) for n in names if n in state}


def _layout(subject: _Subject) -> Layout:
    label = subject.label
    if label.model is not None:
        return label.model.layout_of(label.config)
    assert label.layout is not None
    return label.layout


def _add_unused(subject: _Subject, traced: Traced) -> list[str]:
    """Keep the weights that no output depends on: the exporter leaves them out of the graph."""
    import onnx_ir

    graph = traced.model.graph
    held = weights(traced.model)
    for e in _layout(subject).entries:  # what is tied, by its first name
        name, first = e.torch[0].name, e.tied_to
        if first is not None and name in held and first not in held:
            value = graph.initializers.pop(name)
            value.name = first
            graph.register_initializer(value)
    lost = {n: x for n, x in _canonical(subject).items() if n not in held}
    for name, array in lost.items():
        value = onnx_ir.Value(
            name=name,
            shape=onnx_ir.Shape(array.shape),
            type=onnx_ir.TensorType(onnx_ir.DataType.from_numpy(array.dtype)),
            const_value=onnx_ir.Tensor(array, name=name),
        )
        graph.register_initializer(value)
    some = ", ".join(list(lost)[:3])
    return [f"no output depends on {some}: kept beside the graph"] if lost else []


def _check_onnx(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=False)
    except (onnx.checker.ValidationError, ValueError) as e:
        raise NotEquivalent(
            f"onnx does not accept what was written: {' '.join(str(e).split())[:300]}",
            "nothing was kept; try another --opset, and please report it",
        ) from None


def _same_weights(
    path: Path, wanted: Mapping[str, np.ndarray], meant: Mapping[str, str]
) -> list[TensorRecord]:
    """Read the file as anybody would who converts it back, and hold it against these hashes;
    NotEquivalent where a bit differs."""
    kind = hashes.best()
    with open_checkpoint(path) as reader:
        plan = make_plan(reader, read_label(reader), "torch")
        found = {t: hashes.of(kind, reader.read(n)) for s in plan.steps for n, t in _pairs(s)}
    if wrong := [n for n in meant if found.get(n) != meant[n]]:
        raise NotEquivalent(
            f"{len(wrong)} weights do not come back from the file: {', '.join(wrong[:5])}",
            "nothing was kept; please report it",
        )
    codes = {n: dtypes.code_of(x.dtype) for n, x in wanted.items()}
    return [
        TensorRecord([n], [n], [n], "copy", codes[n], codes[n], [digest], [digest])
        for n, digest in meant.items()
    ]


def _rests(path: Path, names: list[str]) -> dict[str, str]:
    """The hashes of what of the files is no weight."""
    with OnnxReader(path) as reader:
        reader.present_stored(names)
        return rests(path, hashes.best(), [reader])


def _pairs(step: Step) -> list[tuple[str, str]]:
    return list(zip(step.sources, step.targets, strict=True))


def _sides(subject: _Subject, arrays: Inputs) -> tuple[TorchSide, Side | None]:
    flax = subject.flax(arrays) if subject.flax is not None else None
    return TorchSide(subject.module, call_of(arrays)), flax


def _certificate(subject: _Subject, source: Path, target: Path) -> Certificate:
    label = subject.label
    return Certificate(
        source=source.name,
        source_container="",
        source_tree="",
        target=target.name,
        target_container="onnx",
        target_tree="torch",
        model=label.model.name if label.model else "",
        layout=f"{label.model.name}/{label.model.version}" if label.model else "entries",
        config={},
    )


def _verified(made: Exported, tensors: int) -> dict[str, Any]:
    worst = made.worst
    assert worst is not None
    return {
        "level": "outputs",
        "tensors": tensors,
        "outputs": len(made.held),
        "sizes": list(dict.fromkeys(h.sizes for h in made.held)),
        "sides": list(dict.fromkeys(h.side for h in made.held)),
        "worst": {
            "name": worst.row.name,
            "side": worst.side,
            "error": worst.row.error,
            "noise": worst.row.noise,
            "ratio": worst.row.ratio,
        },
    }
