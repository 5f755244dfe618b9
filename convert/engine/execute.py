"""Carries out what was prepared: write, read back, prove, commit."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.engine.commit import commit, write_text
from convert.engine.prepare import Prepared
from convert.engine.proof import prove
from convert.engine.recheck import Canonical, recheck
from convert.engine.resume import Record, check_same, identity, is_resumable
from convert.engine.stream import Stream, Streamed
from convert.engine.targets import Target, open_writer, written_ties
from convert.engine.workplace import workplace
from convert.training_state import storage
from convert.training_state.state import TrainingState
from convert.training_state.summary import summary
from zoo.checkpoint import hashes
from zoo.checkpoint.certificate import Certificate, TensorRecord, now, rests, versions
from zoo.checkpoint.generation import fingerprint
from zoo.checkpoint.label import Label
from zoo.checkpoint.plan import Plan, carry, refuse_broken_ties
from zoo.checkpoint.progress import Progress
from zoo.containers import filenames, open_checkpoint
from zoo.containers.base import Reader, Writer, fsync
from zoo.containers.errors import CorruptInput, NotEquivalent, UsageError
from zoo.containers.safetensors_file import SafetensorsReader
from zoo.layout.ops import describe


def run(
    prepared: Prepared,
    *,
    resume: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Certificate:
    """Carry out what was prepared: the target appears whole and verified, or not at all.

    Above level "bits" the twins are run on the tensors that the recheck has just read. `resume`
    goes on where one that was interrupted stopped, if there is one. Raises ZooError.
    """
    reader, plan, target = prepared.reader, prepared.plan, prepared.target
    certificate = _blank(reader, plan, target, prepared.verify)
    same = identity(prepared, certificate.hash) if is_resumable(prepared) else None
    if resume and same is None:
        raise UsageError(
            f"the conversion to {target.path} cannot be resumed: torch writes a .pt file in one "
            "go, and what comes from memory may be another by now",
            "run it without --resume",
        )
    accept = (lambda begun: check_same(begun, same)) if resume and same else None
    with workplace(target.path, accept) as place:
        written = place / target.path.name
        label = _set_aside(reader, plan, certificate)
        stream = Stream(prepared, certificate.hash)
        with (
            _recorded(place, same) as record,
            open_writer(target, place, plan, label, resumed=resume) as writer,
        ):
            moved = stream.write(writer, progress, record)
            made = _make(plan, writer, certificate.hash)
            writer.complete()
            certificate.weights = "" if target.is_directory else fingerprint(written)
            _write_label(target, place, label, plan.readable, certificate.weights)
            with _syncing(writer):
                if prepared.verify:
                    kept = Canonical(plan) if prepared.level != "bits" else None
                    ties = written_ties(target, plan)
                    certificate.verified = recheck(
                        stream, moved, written, ties, label, made, progress, kept
                    )
                    if kept is not None:
                        certificate.verified |= prove(plan, kept.values, prepared.level)
        _refuse_change(reader)
        _record(certificate, stream, moved, made, written_ties(target, plan))
        training = prepared.training
        if training.optimizers or training.ema or training.data:
            path = place / target.beside(filenames.OPTIMIZER)
            certificate.training = _write_training(
                path, training, certificate.hash, certificate.weights
            )
        if prepared.verify:
            certificate.files = _files(written, place / target.beside(filenames.OPTIMIZER), stream)
        certificate.versions, certificate.created = versions(), now()
        write_text(place / target.beside(filenames.CERTIFICATE), certificate.to_json())
        for directory in (place, written):
            if directory.is_dir():
                fsync(directory)
        commit(place, target.path, prepared.force)
    return certificate


@contextmanager
def _recorded(place: Path, same: dict[str, Any] | None) -> Iterator[Record | None]:
    """What says how far it is, where that is of use."""
    if same is None:
        yield None
        return
    record = Record(place, same)
    try:
        yield record
    finally:
        record.close()


@contextmanager
def _syncing(writer: Writer) -> Iterator[None]:
    """Flushes to the disk what is read back meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="sync") as pool:
        synced = pool.submit(writer.sync)
        yield
        synced.result()


def _refuse_change(reader: Reader) -> None:
    """CorruptInput where the source is not what it was when it was opened."""
    if reader.first_state is not None and reader.state() != reader.first_state:
        raise CorruptInput(
            f"{reader.path} was changed while it was read",
            "wait until it is written, and convert it again",
        )


def _files(written: Path, optimizer: Path, stream: Stream) -> dict[str, str]:
    """The hashes of the files, their tensors aside."""
    with open_checkpoint(written, "flax") as reader:
        if not optimizer.is_file():
            return rests(written, stream.kind, [reader])
        with SafetensorsReader(optimizer) as moments:
            return rests(written, stream.kind, [reader, moments])


def _write_training(
    path: Path, training: TrainingState, kind: str, weights: str
) -> dict[str, object]:
    """Write the optimizer.safetensors, re-read it, and say for the certificate what is in it."""
    path.unlink(missing_ok=True)  # of the run that is resumed
    written = storage.write(path, training, kind, weights)
    if kind and (wrong := storage.differences(path, training, written, kind)):
        raise NotEquivalent(
            f"{path.name} came back different: {'; '.join(wrong[:5])}",
            "nothing was kept; the disk is at fault, please report it",
        )
    level = "bits" if kind else "none"
    return {"file": path.name, **summary(training), "verified": level, "hashes": written}


def _blank(reader: Reader, plan: Plan, target: Target, verify: bool) -> Certificate:
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
        hash=hashes.best() if verify else "",
    )


def _set_aside(reader: Reader, plan: Plan, certificate: Certificate) -> Label:
    """Read and check what the target has no place for; the label that keeps it."""
    refuse_broken_ties(reader, plan)
    carried = dict(plan.label.carried)
    for aside in plan.aside:
        found, code = [], aside.info.dtype
        if aside.tied_to is None:
            value = reader.read(aside.source)
            carried[aside.name] = carry(aside, value)
            found = [hashes.of(certificate.hash, value)] if certificate.hash else []
        op = "tied" if aside.tied_to is not None else "carried"
        certificate.tensors.append(
            TensorRecord([aside.name], [aside.source], [], op, code, code, found, [])
        )
    return replace(plan.label, carried=carried)


def _make(plan: Plan, writer: Writer, kind: str) -> dict[str, str]:
    """Write what the source does not have; the hash of each."""
    made = {}
    for one in plan.made:
        value = one.value()
        writer.write(one.name, value)
        made[one.name] = hashes.of(kind, value) if kind else ""
    return made


def _record(
    certificate: Certificate,
    stream: Stream,
    moved: Streamed,
    made: dict[str, str],
    ties: dict[str, str],
) -> None:
    """Note of every tensor what became of it."""
    of_target: dict[str, TensorRecord] = {}
    for step in stream.plan.steps:
        record = TensorRecord(
            list(step.names),
            list(step.sources),
            list(step.targets),
            describe(step.ops),
            step.source_infos[0].dtype,
            step.target_infos[0].dtype,
            moved.hashes(step.sources, "source"),
            moved.hashes(step.targets, "target"),
        )
        certificate.tensors.append(record)
        of_target |= dict.fromkeys(step.targets, record)
    for one in stream.plan.made:
        code, found = one.info.dtype, [made[one.name]] if stream.kind else []
        record = TensorRecord([one.name], [], [one.name], "made", code, code, [], found)
        certificate.tensors.append(record)
    for name, to in ties.items():
        record, found = of_target[to], moved.hashes([to], "target")
        code, sources = record.target_dtype, record.source_hashes
        certificate.tensors.append(
            TensorRecord([name], [], [name], "tied", code, code, sources, found)
        )
    if moved.overflow:
        certificate.notices.append(
            f"the cast made {moved.overflow} values infinite or NaN: out of range"
        )


def _write_label(target: Target, place: Path, label: Label, readable: bool, weights: str) -> None:
    if target.has_config:
        text = label.to_config_json(readable, weights)
        write_text(place / target.beside(filenames.CONFIG), text)
    for name, text in label.files().items():
        write_text(place / (f"{target.path.name}/{name}" if target.is_directory else name), text)
