"""AlexNet's sizes, and the published ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Defaults are torchvision's."""

    channels: tuple[int, ...] = (64, 192, 384, 256, 256)  # of the five convolutions
    hidden_size: int = 4096
    num_classes: int = 1000
    dropout: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON has lists
        if not all(type(n) is int and n > 0 for n in self.channels):
            raise ValueError(f"{self.channels} are not all whole numbers above zero")
        if len(self.channels) != 5:
            raise ValueError(f"channels {self.channels}: AlexNet has five convolutions")


PRESETS = {"alexnet": Config()}

TINY = {"tiny": Config(channels=(8, 12, 16, 12, 8), hidden_size=16, num_classes=5)}
