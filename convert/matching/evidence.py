"""The answer of a match: a layout, and why each of its entries is believed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from zoo.containers.errors import ZooError
from zoo.layout import Entry, Layout
from zoo.layout.ops import describe

FORMAT = 1


@dataclass(frozen=True)
class Evidence:
    """Why some entries are believed.

    `torch` and `flax` are names, "#" for the numbers of layers. `by` is what paired them: "given",
    "values" (bit for bit), "names", "order" (of execution), "outputs" (exchanged until they were
    torch's), "elimination" (nothing else was left).
    `axes` is what told the order of axes: "values", "shape", "vote" (of tensors of the same name),
    "convention" (of a name), "stack", "layer" (its kind). `margin` is by how much all else scores
    lower, None where that does not apply; `rivals` are Flax's next best. `checked` says what was
    compared: "values", "outputs" or "" (nothing).
    """

    torch: tuple[str, ...]
    flax: tuple[str, ...]
    by: str
    axes: str = ""
    score: float | None = None
    margin: float | None = None
    rivals: tuple[str, ...] = ()
    entries: int = 1
    checked: str = ""
    ops: str = ""  # of the first entry: "permute(1,0)"


Found = tuple[list[Entry], Evidence]


def believed(
    made: Sequence[Entry], torch: Sequence[str], flax: Sequence[str], by: str, axes: str, **of: Any
) -> Found:
    """Entries with the evidence for them; `of` are its other fields."""
    ops = describe(made[0].ops)
    told = Evidence(tuple(torch), tuple(flax), by, axes, entries=len(made), ops=ops, **of)
    return list(made), told


def tally(evidence: Iterable[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """By what entries are believed, and how many: of the evidence in a document, most first."""
    by: Counter[str] = Counter()
    for e in evidence:
        by[e["by"]] += e["entries"]
    return by.most_common()


@dataclass(frozen=True)
class Open:
    """What is not settled: names of one side or of both, Flax's candidates, and why."""

    torch: tuple[str, ...]
    flax: tuple[str, ...]
    why: str
    rivals: tuple[str, ...] = ()
    margin: float | None = None


class OpenMatch(ZooError):
    """A match that leaves something open. `entries` are those that are settled, `found` the
    evidence for them, `open` the rest, `tried` what was tried, in order."""

    def __init__(
        self,
        problem: str,
        advice: str,
        details: Sequence[str],
        found: Sequence[Found],
        open: Sequence[Open],
        tried: Sequence[str],
    ) -> None:
        super().__init__(problem, advice, details)
        self.found = tuple(e for _, e in found)
        self.entries = tuple(entry for made, _ in found for entry in made)
        self.open = tuple(open)
        self.tried = tuple(tried)

    def document(self) -> dict[str, Any]:
        """What was found and what is open, as JSON data."""
        return {
            "format": FORMAT,
            "evidence": [asdict(e) for e in self.found],
            "open": [asdict(o) for o in self.open],
            "tried": list(self.tried),
        }


class MatchedLayout(Layout):
    """A layout like a family's; `evidence` says what each part of it stands on, `notices` what a
    user should know, `tried` what was tried in order."""

    def __init__(
        self,
        entries: Iterable[Entry],
        evidence: Sequence[Evidence],
        notices: Sequence[str] = (),
        tried: Sequence[str] = (),
    ) -> None:
        super().__init__(entries)
        self.evidence = tuple(evidence)
        self.notices = tuple(notices)
        self.tried = tuple(tried)

    @property
    def checked(self) -> bool:
        """Whether values or outputs were compared, and not names alone."""
        return all(e.checked for e in self.evidence)

    def document(self) -> dict[str, Any]:
        """The layout, with its evidence, as JSON data: what `--layout FILE` reads."""
        return {
            "format": FORMAT,
            "entries": self.to_json(),
            "evidence": [asdict(e) for e in self.evidence],
            "notices": list(self.notices),
            "tried": list(self.tried),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the document to a file."""
        import json
        from pathlib import Path

        Path(path).write_text(json.dumps(self.document(), indent=1) + "\n")
