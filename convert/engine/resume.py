"""What of a conversion is done, kept in its workplace: `--resume` goes on from there.

A record says which conversion it is; a log gets a line for each slab once it is written, with the
digests of what was read. A killed process loses at most the slabs that its threads had in hand.
What it wrote is in the kernel's hands, and safe; what was written before the machine itself was
restarted may be lost, and is not resumed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from convert.engine.prepare import Prepared
from convert.engine.workplace import RECORD
from zoo.checkpoint.certificate import versions
from zoo.containers import json_text
from zoo.containers.errors import UsageError

LOG = "resume.log"
_LARGEST = 1 << 24  # bytes of a record
_DIGEST = re.compile(r"[0-9a-f]{64}")
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_ANEW = "run it without --resume, which begins again"


class Record:
    """The record and the log of one conversion, at work in the directory `place`."""

    def __init__(self, place: Path, identity: dict[str, Any]) -> None:
        self.done: dict[int, dict[str, Any]] = {}
        self.log = log = place / LOG
        if (place / RECORD).is_file():
            self.done = _lines(log)
        else:
            (place / RECORD).write_text(json.dumps(identity))
        self._fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.write(self._fd, b"\n")  # ends a line that was cut short

    def add(self, slab: int, told: dict[str, Any]) -> None:
        """The slab of this number is written."""
        os.write(self._fd, json.dumps({"slab": slab, **told}).encode() + b"\n")

    def close(self) -> None:
        """Release the log."""
        os.close(self._fd)


def is_resumable(prepared: Prepared) -> bool:
    """Whether an interrupted run can be gone on with: of files, into files written in place."""
    return prepared.reader.first_state is not None and prepared.target.to != "pt"


def identity(prepared: Prepared, kind: str) -> dict[str, Any]:
    """All that must be the same where a conversion goes on, by the names that users know."""
    reader, plan, target = prepared.reader, prepared.plan, prepared.target
    steps = repr((plan.steps, plan.made, sorted(plan.label.to_metadata().items())))
    told = {
        "zooconvert": versions()["zooconvert"],
        "source": [str(reader.path.absolute()), reader.first_state],
        "container": target.to,
        "tree or dialect": plan.target_tree,
        "model": plan.layout_id,
        "config": plan.fields,
        "--max-shard-size": target.max_shard_size,
        "--max-memory": prepared.max_memory,
        "--workers": prepared.workers,
        "--level": prepared.level,
        "--no-verify": not prepared.verify,
        "hash": kind,
        "plan": hashlib.sha256(steps.encode(errors="replace")).hexdigest(),
        "boot": _BOOT.read_text().strip() if _BOOT.is_file() else "",
    }
    found: dict[str, Any] = json.loads(json.dumps(told, default=str))
    return found


def check_same(place: Path, now: dict[str, Any]) -> None:
    """UsageError, with a line for each, where what was begun in `place` is another conversion."""
    try:
        begun = json_text.read(place / RECORD, _LARGEST)
        wrong = [_difference(k, begun.get(k), v) for k, v in now.items() if begun.get(k) != v]
    except (OSError, ValueError, AttributeError):
        wrong = ["its record cannot be read"]
    if wrong:
        raise UsageError("the conversion that was interrupted was another", _ANEW, wrong)


def _difference(name: str, then: Any, now: Any) -> str:
    if name == "source" and then and then[0] == now[0]:
        return f"the source {now[0]} was changed since"
    if name == "boot":
        return "the machine was restarted since: what was written may not have reached the disk"
    if name == "plan":
        return "its tensors were to be moved otherwise"
    if name == "source":
        then, now = then and then[0], now[0]
    return f"{name} was {then}, and is {now}"


def _lines(log: Path) -> dict[int, dict[str, Any]]:
    """The slabs of a log; a line that was cut short is of none. UsageError for other lines than
    `Stream` has written."""
    found = {}
    for line in log.read_text(errors="replace").splitlines() if log.is_file() else ():
        try:
            told = json_text.parse(line)
        except ValueError:
            continue
        match told:
            case {"slab": int(slab), "leaves": [*leaves], "meant": [*meant], "overflow": int()} if (
                all(isinstance(n, str) and _DIGEST.fullmatch(n) for n in (*leaves, *meant))
            ):
                found[slab] = told
            case _:
                raise unlike(log)
    return found


def unlike(log: Path) -> UsageError:
    """The error for a log that is not one of this conversion."""
    return UsageError(f"{log} does not say what was done", _ANEW)
