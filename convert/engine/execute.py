"""Streams a Plan: read, apply, write, prove, commit. One step of the plan is being written at a
time, while the next ones are read, moved and hashed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convert.engine.commit import commit, workplace, write_text
from convert.engine.prepare import Prepared
from convert.engine.proof import prove
from convert.engine.recheck import Canonical, forget, recheck
from convert.engine.targets import Target, open_writer, written_ties
from convert.training_state import storage
from convert.training_state.state import TrainingState
from convert.training_state.summary import summary
from zoo.checkpoint.ahead import prefetch
from zoo.checkpoint.apply import apply, lost
from zoo.checkpoint.certificate import (
    Certificate,
    TensorRecord,
    file_sha256,
    files_of,
    now,
    sha256,
    versions,
)
from zoo.checkpoint.label import Label
from zoo.checkpoint.plan import Aside, Plan, Step, carry, refuse_broken_ties
from zoo.checkpoint.progress import Progress
from zoo.containers import filenames
from zoo.containers.base import Reader, Writer, fsync_directory
from zoo.containers.errors import NotEquivalent
from zoo.layout.ops import describe


def run(prepared: Prepared, *, progress: Progress = lambda stage, done, total: None) -> Certificate:
    """Carry out what was prepared: the target appears whole and verified, or not at all.

    Above level "bits" the twins are run on the tensors that the recheck has just read. Raises
    ZooError.
    """
    reader, plan, target = prepared.reader, prepared.plan, prepared.target
    certificate = _blank(reader, plan, target)
    with workplace(target.path) as place:
        label = _set_aside(reader, plan, certificate)
        _write(reader, plan, target, place, label, certificate, progress)
        written = place / target.path.name
        if prepared.verify:
            ties = written_ties(target, plan)
            kept = Canonical(plan) if prepared.level != "bits" else None
            certificate.verified = recheck(
                plan, written, ties, label, certificate, progress, kept or forget
            )
            if kept is not None:
                certificate.verified |= prove(plan, kept.values, prepared.level)
        training = prepared.training
        if training.optimizers or training.ema or training.data:
            path = place / target.beside(filenames.OPTIMIZER)
            certificate.training = _write_training(path, training, prepared.verify)
        if prepared.verify:
            certificate.files = {n: file_sha256(p) for n, p in files_of(written).items()}
        certificate.versions, certificate.created = versions(), now()
        write_text(place / target.beside(filenames.CERTIFICATE), certificate.to_json())
        for directory in (place, written):
            if directory.is_dir():
                fsync_directory(directory)
        commit(place, target.path, prepared.force)
    return certificate


def _write_training(path: Path, training: TrainingState, verify: bool) -> dict[str, object]:
    """Write the optimizer.safetensors, re-read it, and say for the certificate what is in it."""
    hashes = storage.write(path, training)
    if verify and (wrong := storage.differences(path, training, hashes)):
        raise NotEquivalent(
            f"{path.name} came back different: {'; '.join(wrong[:5])}",
            "nothing was kept; the disk is at fault, please report it",
        )
    level = "bits" if verify else "none"
    return {"file": path.name, **summary(training), "verified": level, "sha256": hashes}


def _blank(reader: Reader, plan: Plan, target: Target) -> Certificate:
    return Certificate(
        source=reader.path.name,
        source_container=reader.container,
        source_tree=plan.source_tree,
        target=target.path.name,
        target_container=target.to,
        target_tree=plan.target_tree,
        model=plan.model.name if plan.model else "",
        layout=plan.layout_id,
        config=plan.fields,
        notices=list(plan.notices),
    )


def _set_aside(reader: Reader, plan: Plan, certificate: Certificate) -> Label:
    """Read and check what the target has no place for; the label that keeps it."""
    refuse_broken_ties(reader, plan)
    carried = dict(plan.label.carried)
    for aside in plan.aside:
        value = reader.read(aside.source)
        digest = sha256(value)
        if aside.tied_to is None:
            carried[aside.name] = carry(aside, value)
        certificate.tensors.append(_aside_record(aside, digest))
    return replace(plan.label, carried=carried)


def _aside_record(aside: Aside, digest: str) -> TensorRecord:
    op = "tied" if aside.tied_to is not None else "carried"
    code = aside.info.dtype
    return TensorRecord([aside.name], [aside.source], [], op, code, code, [digest], [])


def _write(
    reader: Reader,
    plan: Plan,
    target: Target,
    place: Path,
    label: Label,
    certificate: Certificate,
    progress: Progress,
) -> None:
    total = sum(s.nbytes for s in plan.steps)
    ties: dict[str, list[str]] = {}
    if target.to == "safetensors":
        for name, to in written_ties(target, plan).items():
            ties.setdefault(to, []).append(name)
    with open_writer(target, place, plan, label) as writer:
        jobs = [_moving(reader, step) for step in plan.steps]
        done = overflow = 0
        for step, moved in zip(plan.steps, prefetch(jobs), strict=True):
            for name, array in zip(step.targets, moved.arrays, strict=True):
                for each in (name, *ties.get(name, ())):
                    writer.write(each, array)
            certificate.tensors.append(_record(step, moved.source_hashes, moved.target_hashes))
            overflow += moved.overflow
            done += step.nbytes
            progress("convert", done, total)
        _make(plan, writer, certificate)
        writer.finish()
    if overflow:
        certificate.notices.append(f"the cast made {overflow} values infinite or NaN: out of range")
    for name, to in written_ties(target, plan).items():
        record = next(r for r in certificate.tensors if to in r.target)
        digest = record.target_sha256[record.target.index(to)]
        certificate.tensors.append(
            replace(
                record, names=[name], source=[], target=[name], op="tied", target_sha256=[digest]
            )
        )
    _write_label(target, place, label, plan.readable)


def _make(plan: Plan, writer: Writer, certificate: Certificate) -> None:
    for made in plan.made:
        value = made.value()
        writer.write(made.name, value)
        code = made.info.dtype
        record = TensorRecord([made.name], [], [made.name], "made", code, code, [], [sha256(value)])
        certificate.tensors.append(record)


def _write_label(target: Target, place: Path, label: Label, readable: bool) -> None:
    if target.has_config:
        write_text(place / target.beside(filenames.CONFIG), label.to_config_json(readable))
    for name, text in label.files().items():
        write_text(place / (f"{target.path.name}/{name}" if target.is_directory else name), text)


class _Moved(NamedTuple):
    """One step's result, and what the certificate says of it."""

    arrays: list[np.ndarray]
    source_hashes: list[str]
    target_hashes: list[str]
    overflow: int  # finite values that a cast made infinite or NaN


def _moving(reader: Reader, step: Step) -> Callable[[], _Moved]:
    def move() -> _Moved:
        arrays = [reader.read(name) for name in step.sources]
        hashes = [sha256(a) for a in arrays]
        made = apply(step.ops, arrays, step.target_infos[0].dtype)
        if len(arrays) == len(made) and all(a is b for a, b in zip(arrays, made, strict=True)):
            return _Moved(made, hashes, hashes, 0)
        overflow = 0
        if step.source_infos[0].dtype != step.target_infos[0].dtype:
            overflow = sum(map(lost, apply(step.ops, arrays), made))
        return _Moved(made, hashes, [sha256(a) for a in made], overflow)

    return move


def _record(step: Step, sources: list[str], targets: list[str]) -> TensorRecord:
    return TensorRecord(
        list(step.names),
        list(step.sources),
        list(step.targets),
        describe(step.ops),
        step.source_infos[0].dtype,
        step.target_infos[0].dtype,
        sources,
        targets,
    )
