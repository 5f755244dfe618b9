"""The card beside pretrained weights: where they come from, and how good they are.

NAME.safetensors has NAME.json beside it. Nothing depends on a card but what people are told.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.containers import json_text
from zoo.containers.errors import CorruptInput, UsageError

LARGEST = 1 << 20  # bytes of a card
_MEND = "mend it, or reinstall its package"
_LONGEST = 10_000  # characters of one of its texts


@dataclass(frozen=True)
class Score:
    """How good the weights are on data that they were not trained on.

    `low` and `high` bound the 95 % confidence interval of `value` over `n` samples (or episodes).
    """

    metric: str  # "accuracy", "mean return", "mean squared error", ...
    value: float
    low: float
    high: float
    n: int
    correct: int | None = None  # for what is counted: of `n`
    on: str = ""  # "the last 360 of scikit-learn's digits", "100 episodes of CartPole-v1"

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.4g} ({self.low:.4g} to {self.high:.4g}, n={self.n})"


@dataclass(frozen=True)
class Card:
    """What is known of one set of weights; all but the name may be missing."""

    name: str  # "mnist_cnn.digits"
    summary: str = ""
    data: str = ""  # what they were trained on
    license: str = ""
    score: Score | None = None
    seed: int | None = None
    command: str = ""  # that trained them
    sha256: str = ""  # of the weights' file
    created: str = ""  # date, UTC
    versions: Mapping[str, str] = field(default_factory=dict)  # of what took part

    def to_json(self) -> str:
        """The text of NAME.json."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_dict(cls, data: Any, what: str) -> Card:
        """The card in a JSON object; UsageError, naming `what`, lists what no card has."""
        if not isinstance(data, dict):
            raise UsageError(
                f"{what} is not a JSON object", "a card has fields such as data, license"
            )
        fields = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(data.keys() - fields):
            raise UsageError(
                f"{what}: a card has no {', '.join(unknown)}", f"it has {', '.join(sorted(fields))}"
            )
        values = dict(data)
        try:
            if values.get("score") is not None:
                values["score"] = Score(**values["score"])
            card = cls(**{"name": "", **values})
        except TypeError as e:
            raise UsageError(
                f"{what}: the score is not one: {e}",
                f"it has {', '.join(f.name for f in dataclasses.fields(Score))}",
            ) from None
        if wrong := [*_wrong(card), *(_wrong(card.score) if card.score else ())]:
            raise UsageError(
                f"{what}: {', '.join(wrong)} cannot be that", "docs/weights.md says what a card has"
            )
        return card


def _wrong(card: Card | Score) -> list[str]:
    """The fields that are not of their types, or too long to be shown."""
    kinds = {"float": int | float, "int": int, "str": str, "Score": Score, "None": type(None)}
    wrong = []
    for f in dataclasses.fields(card):
        value = getattr(card, f.name)
        if f.name == "versions":
            fits = isinstance(value, dict)
        else:
            fits = any(isinstance(value, kinds[k]) for k in str(f.type).split(" | "))
        if not fits or (isinstance(value, str) and len(value) > _LONGEST):
            wrong.append(f.name)
    return wrong


def path_beside(weights: Path) -> Path:
    """Where the card of a file of weights lies."""
    return weights.with_name(weights.name.removesuffix(".safetensors") + ".json")


def read_card(weights: Path) -> Card | None:
    """The card beside a file of weights, if there is one. CorruptInput for what is no card."""
    path = path_beside(weights)
    if not path.is_file():
        return None
    try:
        return Card.from_dict(json_text.read(path, LARGEST), str(path))
    except UsageError as e:
        raise CorruptInput(e.problem, _MEND) from None
    except ValueError as e:
        raise CorruptInput(f"{path} is not JSON: {e}", _MEND) from None
