"""How far a comparison goes, and how the levels above `bits` are run. Imports nothing heavy: the
command line reads its choices here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LEVELS = ("bits", "outputs", "gradients", "training")
Level = Literal["bits", "outputs", "gradients", "training"]
OPTIMIZERS = ("SGD", "momentum", "Adam", "AdamW")
STEPS = 5
EXPLAIN = 20.0


@dataclass(frozen=True)
class Settings:
    """What the user chose; UsageError for what there is not."""

    optimizers: tuple[str, ...] = OPTIMIZERS
    steps: int = STEPS
    seed: int = 0  # of the loss's weights
    explain: float = EXPLAIN  # seconds that a search for a cause may take

    def __post_init__(self) -> None:
        from zoo.containers.errors import UsageError

        if wrong := [o for o in self.optimizers if o not in OPTIMIZERS]:
            raise UsageError(
                f"there is no optimizer {wrong[0]!r}", f"known are {', '.join(OPTIMIZERS)}"
            )
        if not self.explain >= 0:
            raise UsageError(
                f"{self.explain} seconds explain nothing", "give 0 or more; 0 searches for no cause"
            )
        if self.steps < 1:
            raise UsageError(f"{self.steps} steps train nothing", "give 1 or more")


def check_level(level: str) -> None:
    """UsageError for a level that there is not."""
    from zoo.containers.errors import UsageError

    if level not in LEVELS:
        raise UsageError(f"there is no level {level!r}", f"known are {', '.join(LEVELS)}")
