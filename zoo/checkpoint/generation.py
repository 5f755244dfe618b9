"""Which weights a file belongs to: what lies beside a checkpoint names it by a hash.

Commits keep together what belongs together (`zoo.containers.committed`). This is for everything
else that happens to files: weights that were saved anew where old ones stood, copies of some of
them.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from zoo.containers.committed import open_file
from zoo.containers.errors import ZooError

_PIECES, _PIECE = 64, 16384  # what is read of a large file


def fingerprint(weights: Path) -> str:
    """Of weights that are one file: SHA-256 of its size and of 64 pieces of 16 KiB, the first, the
    last, and those spread evenly between; a file of up to 1 MiB is hashed whole. It is no proof
    that nothing changed, which is the certificate's, and costs a millisecond."""
    fd = open_file(weights)
    try:
        size = os.fstat(fd).st_size
        made = hashlib.sha256(b"%d\n" % size)
        last = max(0, size - _PIECE)
        for i in range(_PIECES):
            at = i * _PIECE if size <= _PIECES * _PIECE else last * i // (_PIECES - 1)
            made.update(os.pread(fd, _PIECE, at))
        return made.hexdigest()
    finally:
        os.close(fd)


def check_weights(named: str | None, file: Path, weights: Path) -> None:
    """ZooError where `file` names other weights than those; nothing where it names none."""
    if named and not weights.is_dir() and named != fingerprint(weights):
        raise ZooError(
            f"{file} belongs to other weights than {weights}, which were written since",
            "convert their source again, or move the file away",
        )
