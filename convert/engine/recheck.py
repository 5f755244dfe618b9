"""The finished but not yet committed checkpoint, read again and held against what was meant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from zoo.checkpoint.ahead import prefetch
from zoo.checkpoint.apply import apply
from zoo.checkpoint.certificate import Certificate, TensorRecord, sha256
from zoo.checkpoint.label import Label, read_label
from zoo.checkpoint.plan import Plan, Step
from zoo.checkpoint.progress import Progress
from zoo.containers import open_checkpoint
from zoo.containers.base import Reader
from zoo.containers.errors import NotEquivalent
from zoo.layout.ops import inverse

Keep = Callable[[Step, list[np.ndarray]], None]  # is given each step's tensors as they were read


def recheck(
    plan: Plan,
    written: Path,
    ties: Mapping[str, str],
    label: Label,
    certificate: Certificate,
    progress: Progress,
    keep: Keep,
) -> dict[str, object]:
    """Re-read what was written and compare it bit for bit, there and mapped back. Gives what was
    verified, for the certificate; NotEquivalent with what differs.

    A cast cannot be mapped back: there only the written bits are compared with those meant.
    """
    records = {tuple(r.target): r for r in certificate.tensors if r.target}
    total = sum(s.nbytes for s in plan.steps)
    wrong: list[str] = []
    done = 0
    with ExitStack() as stack:
        reader = stack.enter_context(open_checkpoint(written, "flax"))
        found = set(reader.tensors)
        expected = set(plan.target_tensors()) | set(ties)
        if found != expected:
            names = ", ".join(sorted(expected ^ found)[:3])
            raise NotEquivalent(
                f"the result does not hold the tensors that were meant: {names}",
                "nothing was kept; please report it",
            )
        meant = plan.target_tensors()
        meant |= {name: meant[to] for name, to in ties.items()}
        if wrong := [f"{n} as {reader.tensors[n]}" for n in meant if reader.tensors[n] != meant[n]]:
            raise NotEquivalent(
                f"the result holds tensors that are not as they were meant: {'; '.join(wrong[:3])}",
                "nothing was kept; please report it",
            )
        wrong += [f"{n} is not {to}" for n, to in ties.items() if not _same(reader, n, to)]
        if not _same_label(read_label(reader), label):
            wrong.append("the label was not written as made")
        jobs = [_reading_back(reader, step, records[step.targets]) for step in plan.steps]
        for step, (problem, arrays) in zip(plan.steps, prefetch(jobs), strict=True):
            if problem:
                wrong.append(problem)
            else:
                keep(step, arrays)
            done += step.nbytes
            progress("verify", done, total)
        for made in plan.made:
            if [sha256(reader.read(made.name))] != records[(made.name,)].target_sha256:
                wrong.append(f"{made.name} was not written as made")
    if wrong:
        raise NotEquivalent(
            f"{len(wrong)} tensors came back different: {'; '.join(wrong[:5])}",
            "nothing was kept; the disk or the container's library is at fault, please report it",
        )
    return {"level": "bits", "tensors": len(plan.steps) + len(plan.made), "bytes": total}


def forget(step: Step, arrays: list[np.ndarray]) -> None:
    """Keeps nothing: for `recheck` alone."""


class Canonical:
    """Gathers canonical tensors from the steps of a recheck, so that nothing is read twice."""

    def __init__(self, plan: Plan) -> None:
        self.values: dict[str, np.ndarray] = {}
        self._undo = {
            tuple(t.name for t in view.entry.torch): inverse(
                view.ops, [t.shape for t in view.entry.torch]
            )
            for _, view in plan.pairs()
            if view.tensors
        }

    def __call__(self, step: Step, arrays: list[np.ndarray]) -> None:
        made = apply(self._undo[step.names], arrays)
        self.values |= dict(zip(step.names, made, strict=True))


def _same_label(read: Label, meant: Label) -> bool:
    told = [(label.model, label.config, label.layout, label.carried) for label in (read, meant)]
    return told[0] == told[1] and read.problem is None


def _same(reader: Reader, a: str, b: str) -> bool:
    return reader.ties.get(a) == b or sha256(reader.read(a)) == sha256(reader.read(b))


def _reading_back(
    reader: Reader, step: Step, record: TensorRecord
) -> Callable[[], tuple[str | None, list[np.ndarray]]]:
    def check() -> tuple[str | None, list[np.ndarray]]:
        arrays = [reader.read(name) for name in step.targets]
        if [sha256(a) for a in arrays] != record.target_sha256:
            return f"{', '.join(step.targets)} was not written as made", arrays
        if record.dtype == record.target_dtype and step.ops:
            back = apply(step.back, arrays)
            if [sha256(a) for a in back] != record.source_sha256:
                return f"{', '.join(step.sources)} does not map back", arrays
        return None, arrays

    return check
