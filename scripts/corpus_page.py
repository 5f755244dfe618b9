"""docs/ported.md: what became of the models of scripts/port_corpus.py, from docs/ported.json."""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "ported.json"
LINT = DOCS / "ports_lint.json"
Row = dict[str, Any]
Rows = dict[str, Row]  # by the name of the model

_HEAD = """# Models made live in JAX

Written by `scripts/port_corpus.py`: models of torchvision, one of each of timm's families, and base
models of transformers with small configurations, made live by `convert.to_flax` and judged apart
from its own proof (`scripts/port_judge.py`): in float64 within 1e-10 of torch's outputs, at the
traced sizes and at up to two others. "right, in float32": the model computes in float32 whatever it
is given, and is within 8 times its own rounding noise. "not made": the small configuration, or the
inputs that the script made for it, do not run in torch. "fault": the script or the converter ended
in an error that is no answer.{unseen}
"""

_UNSEEN = """ Not every model has been run yet: those of transformers were taken in an order that
a seed drew."""

_TRAINING_HEAD = """
## Trained

Some of those that are right, drawn by a seed: {count}, {counts}. In float64 and in train mode, with
every dropout at 0 (`scripts/port_trained.py`): the gradients of a loss, and what five steps of SGD
with momentum leave in parameters and running statistics, within 1e-10 of the scale of all of them,
or 8 times what torch does when its weights move by a rounding. The rate is the largest of three at
which a rounding stays one. "right, in float32": explained by a rounding of float32, in which the
model computes whatever it is given. Then, where there is dropout, that it drops by its key alone.

| model | outcome | worst | rate | parameters | statistics | dropout | seconds | why |
|---|---|---:|---:|---:|---:|---|---:|---|
"""

_SOURCE_HEAD = """
## Written as source

Of those that are right, {count} were written as Flax source by `convert.port` and held against
torch by its own proof, in float32 and in float64, at the traced sizes and at others: {counts}.
Statements of the port for each statement of the source that an operation comes from: {median:.2f}
in the median, {worst:.2f} at the 90th percentile. {looked} of them were looked through for classes
of one torch class that are equal up to constants: {twins} have such. In {renamed} of these a tensor
lies in a module of another name than torch's.

{lint}
| model | outcome | of the noise | sizes | lines | statements | seconds | why |
|---|---|---:|---:|---:|---:|---:|---|
"""


_LINTED = """{files} of the files, most of them drawn by a seed, were written once more and held
against our linters (`scripts/lint_ports.py`): {ruff} are clean under ruff with our settings{rules},
{mypy} under mypy, strict but for what calls of modules give, as for our own models{kinds}; {twins}
have classes that are equal up to constants.
"""


def held() -> dict[str, Rows]:
    """What runs so far have found: job -> model -> row."""
    return dict(json.loads(RESULTS.read_text()))


def keep(job: str, name: str, row: Row) -> None:
    """Add a row. Another run may write at the same time."""
    with RESULTS.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = json.load(file)
        done.setdefault(job, {})[name] = row
        text = json.dumps(done, indent=1, sort_keys=True) + "\n"
        file.seek(0)
        file.write(text)
        file.truncate()


def write(every: int, older: int) -> None:
    """Write the page. `every`: how many models there are; `older`: how many rows of the judge rest
    on an earlier state of the converter."""
    done = held()
    rows = done.get("judge", {})
    head = _HEAD.format(unseen=_UNSEEN if len(rows) < every else "")
    text = head + _counts(rows)
    if older:
        text += f"\n{older} of these were judged with an earlier state of the converter.\n"
    text += _judged(rows) + _trained(done.get("train", {})) + _written(done.get("source", {}))
    (DOCS / "ported.md").write_text(text)


def _counts(rows: Rows) -> str:
    """A line a package: how many of each outcome."""
    packages: dict[str, Counter[str]] = {}
    for name, row in rows.items():
        packages.setdefault(name.partition("/")[0], Counter())[row["outcome"]] += 1
    kinds = sorted({k for counts in packages.values() for k in counts})
    lines = [_line("package", "run", *kinds), f"|---|---:|{'---:|' * len(kinds)}"]
    for package, counts in sorted(packages.items()):
        lines.append(_line(package, counts.total(), *(counts[k] for k in kinds)))
    return "\n" + "\n".join(lines) + "\n"


def _judged(rows: Rows) -> str:
    lines = [
        _line("model", "outcome", "worst", "sizes", "seconds", "what, and why"),
        "|---|---|---:|---:|---:|---|",
    ]
    for name, row in sorted(rows.items()):
        told = " ".join(filter(None, (row.get("shrunk"), row.get("why"))))
        cells = (row.get("sizes", ""), row["seconds"], told[:300])
        lines.append(_line(name, row["outcome"], _worst(row), *cells))
    return "\n" + "\n".join(lines) + "\n"


def _trained(rows: Rows) -> str:
    if not rows:
        return ""
    lines = [
        _line(
            name,
            row["outcome"],
            _worst(row),
            *(row.get(k, "") for k in ("trained", "statistics", "dropout", "seconds")),
            row.get("why", "")[:200],
        )
        for name, row in sorted(rows.items())
    ]
    head = _TRAINING_HEAD.format(count=len(rows), counts=_told(rows))
    return head + "\n".join(lines) + "\n"


def _written(rows: Rows) -> str:
    if not rows:
        return ""
    ratios = sorted(row["ratio"] for row in rows.values() if "ratio" in row) or [0.0]
    lines = [
        _line(
            name,
            row["outcome"],
            f"{row['worst']:.2g}" if "worst" in row else "",
            *(row.get(k, "") for k in ("sizes", "lines", "ratio", "seconds")),
            row.get("why", "")[:200],
        )
        for name, row in sorted(rows.items())
    ]
    head = _SOURCE_HEAD.format(
        count=len(rows),
        counts=_told(rows),
        median=ratios[len(ratios) // 2],
        worst=ratios[len(ratios) * 9 // 10],
        looked=sum("twins" in row for row in rows.values()),
        twins=sum(bool(row.get("twins")) for row in rows.values()),
        renamed=sum(bool(row.get("renamed")) for row in rows.values()),
        lint=_lint(),
    )
    return head + "\n".join(lines) + "\n"


def _lint() -> str:
    """What scripts/lint_ports.py measured."""
    if not LINT.exists():
        return ""
    made = json.loads(LINT.read_text())
    ruff, mypy = made["ruff"], made["mypy"]
    return _LINTED.format(
        files=made["files"],
        ruff=ruff["clean"],
        mypy=mypy["clean"],
        twins=len(made["twins"]),
        rules=_rules(ruff["rules"]),
        kinds=_rules(mypy["rules"]),
    )


def _rules(counts: dict[str, int]) -> str:
    told = ", ".join(f"`{rule}` in {n}" for rule, n in counts.items())
    return f" (others: {told})" if told else ""


def _told(rows: Rows) -> str:
    counts = Counter(row["outcome"] for row in rows.values())
    return ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common())


def _worst(row: Row) -> str:
    return f"{row['worst']:.1e}" if "worst" in row else ""


def _line(*cells: object) -> str:
    return f"| {' | '.join(str(c).replace('|', chr(92) + '|') for c in cells)} |"
