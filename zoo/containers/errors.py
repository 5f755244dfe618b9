"""What can go wrong, each with the exit code that the command line returns for it.

Every error is two lines: what is wrong, and what to do about it. Where many things are wrong at
once, they are listed between the two.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

_LINE = 4000  # characters of an error's line
_DETAILS = 30_000  # characters of all its details


def printable(text: str) -> str:
    """`text` with everything that could move a cursor, hide or reorder text written as an escape.

    Names come from files, and files from anywhere.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _short(text: str) -> str:
    """A line without its middle where it is longer than anybody reads: names may be megabytes."""
    return text if len(text) <= _LINE else f"{text[: _LINE // 2]} ... {text[-_LINE // 2 :]}"


def _bounded(details: Sequence[str]) -> list[str]:
    """As many of the lines as anybody reads, safe to print, and how many more there are."""
    kept: list[str] = []
    left = _DETAILS
    for i, detail in enumerate(details):
        line = printable(_short(detail))
        left -= len(line)
        if left < 0:
            return [*kept, f"... and {len(details) - i} more"]
        kept.append(line)
    return kept


class ZooError(Exception):
    """An error with a remedy. `problem` says what is wrong, `advice` what to do, each in one line;
    `details` lists the parts of a problem that has many. All three are safe to print."""

    exit_code = 1

    def __init__(self, problem: str, advice: str, details: Sequence[str] = ()) -> None:
        super().__init__(problem, advice, details)
        self.problem = printable(_short(problem))
        self.advice = printable(_short(advice))
        self.details = _bounded(details)

    def __str__(self) -> str:
        return "\n".join([self.problem, *(f"  {d}" for d in self.details), self.advice])


class UsageError(ZooError):
    """The request itself cannot be met: an unknown model, an existing target, a bad option."""

    exit_code = 2


class NotEquivalent(ZooError):
    """Two things that should be the same are not."""

    exit_code = 3


class UnsafeInput(ZooError):
    """The input asks for what no checkpoint needs: running code, leaving its directory."""

    exit_code = 4


class CorruptInput(ZooError):
    """The input is not, or is no longer, what its format says."""

    exit_code = 5


class MissingExtra(ZooError):
    """A part of the package that was not installed."""

    exit_code = 6

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs the {extra!r} extra, which is not installed",
            f"install it: pip install 'zooconvert[{extra}]'",
        )


class NoSpace(ZooError):
    """The disk is full, or would be."""

    exit_code = 7


def from_os(e: OSError, path: str) -> ZooError:
    """What the system said of `path`, or of what is at work there, as an error of ours."""
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"the disk is full: {path}", "make room, or name a target on another disk")
    if e.errno in (errno.EMFILE, errno.ENFILE):
        return ZooError(
            f"{path}: too many files are open at once", "allow more, as with `ulimit -n 4096`"
        )
    if e.errno == errno.EIO:
        return ZooError(f"{path}: the disk reports an input/output error", "see that it works")
    return ZooError(f"{path}: {e.strerror or e}", "see that it exists and may be used")
