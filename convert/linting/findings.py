"""What lint found. docs/lint.md explains every id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FORMAT = 1  # of the JSON
Severity = Literal["wrong", "check", "note"]
# A contradiction; what somebody must look at; what is worth knowing and already seen to.
SEVERITIES: tuple[Severity, ...] = ("wrong", "check", "note")

# id -> what it is about. Of one checkpoint, then of a pair.
IDS = {
    "model-type": "a config of another model",
    "epsilon": "epsilon of a norm",
    "norm-variance": "how a norm computes its variance",
    "batchnorm-momentum": "momentum of the running statistics",
    "batchnorm-variance": "the running variance",
    "gelu": "which GELU",
    "conv-padding": "padding of convolutions",
    "conv-transpose": "transposed convolutions",
    "flatten-order": "the order in which images are flattened",
    "linear-order": "linear weights stored (in, out)",
    "heads": "number and order of attention heads",
    "fused-qkv": "query, key and value in one matrix",
    "rope": "style of rotary positions",
    "positions": "learned positions",
    "vocabulary": "rows of the embedding",
    "tied-embeddings": "embedding and output projection",
    "padding-idx": "the padding token's embedding",
    "gate-order": "order of recurrent gates",
    "two-biases": "biases of recurrent layers",
    "dropout": "dropout",
    "square-kernel": "kernels that fit transposed too",
    "equal-neighbours": "tensors of one layer that fit in one another's place",
    "equal-layers": "layers that fit in one another's place",
    "pair-model": "two models",
    "pair-config": "two configs",
    "pair-dtype": "two dtypes",
    "pair-shape": "two shapes",
    "pair-vocabulary": "two numbers of embedding rows",
    "pair-tensors": "tensors that only one has",
    "pair-names": "names that do not correspond",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know or to check."""

    id: str
    severity: Severity
    here: str  # what it is in this checkpoint: a value and where it was read, or "unknown"
    why: str  # how it is read differently, or what would fit just as well
    check: str  # what to do
    tensors: tuple[str, ...] = ()  # names, many in one pattern: "layer.{0-11}.{query,key}"
    count: int = 0  # of the modules or tensors that it is about

    def __post_init__(self) -> None:
        assert self.id in IDS, self.id


@dataclass
class Lint:
    """Everything found in a checkpoint, or in a pair."""

    path: str
    other: str | None = None
    model: str | None = None  # title of the zoo's model, if it is one
    tensors: int = 0
    findings: list[Finding] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def of(self, severity: Severity) -> list[Finding]:
        """The findings of one severity."""
        return [f for f in self.findings if f.severity == severity]

    @property
    def contradicts(self) -> bool:
        """Whether something is wrong: the command line then exits with 3."""
        return bool(self.of("wrong"))

    def to_dict(self) -> dict[str, Any]:
        """As data for JSON."""
        counts = {s: len(self.of(s)) for s in SEVERITIES}
        return {"format": FORMAT, "counts": counts, **asdict(self)}


def ranged(numbers: Sequence[int]) -> str:
    """{0-11}, {1-3,7}, or the one number."""
    found = sorted(set(numbers))
    runs: list[list[int]] = []
    for n in found:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    parts = [f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs]
    return parts[0] if found == found[:1] else f"{{{','.join(parts)}}}"


def braced(names: Sequence[str]) -> str:
    """Dotted names as one pattern: attention.{self.query,self.key,output.dense}."""
    split = [n.split(".") for n in dict.fromkeys(names)]
    if len(split) == 1:
        return names[0]
    shortest = min(map(len, split))
    head = 0
    while head < shortest - 1 and len({s[head] for s in split}) == 1:
        head += 1
    tail = 0
    while tail < shortest - head - 1 and len({s[-1 - tail] for s in split}) == 1:
        tail += 1
    middles = [".".join(s[head : len(s) - tail]) for s in split]
    inner = ranged([int(m) for m in middles]) if all(m.isdigit() for m in middles) else None
    inner = inner or f"{{{','.join(middles)}}}"
    return ".".join([*split[0][:head], inner, *(split[0][len(split[0]) - tail :] if tail else [])])
