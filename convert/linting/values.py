"""What the rules share: how a value is told, and how grave it is not to know it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convert.linting.ambiguous import patterns
from convert.linting.findings import Finding, Severity
from convert.linting.subject import Layer, Subject

UNKNOWN = "unknown"


def severity(s: Subject) -> Severity:
    """Of what the zoo's definitions have from the config, and its tests compare: a note."""
    return "note" if s.ours else "check"


def value(s: Subject, keys: Sequence[str]) -> tuple[str, Severity]:
    """What the config states of the first of `keys`, and how grave it is not to know."""
    found = s.find(*keys)
    if found:
        return f"{short(found[1])} ({found[0]})", severity(s)
    if untold := sorted(s.unknown & set(keys)):
        return f"{UNKNOWN} ({', '.join(untold)})", "check"
    if s.ours:
        return f"as the zoo's definition of {s.family} has it", "note"
    return UNKNOWN, "check"


def count(layers: Sequence[Layer], noun: str) -> str:
    return f"{len(layers)} {noun}{'' if len(layers) == 1 else 's'}"


def short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def finding(
    name: str, weight: Severity, here: str, why: str, check: str, layers: Sequence[Layer] = ()
) -> Finding:
    return Finding(name, weight, here, why, check, tuple(patterns(layers)), len(layers))
