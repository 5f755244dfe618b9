"""ResNet's depths, and the published ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EXPANSION = {"basic": 1, "bottleneck": 4}  # channels out of a block per channel within it


@dataclass(frozen=True)
class Config:
    """Defaults are those of ResNet-50."""

    block: Literal["basic", "bottleneck"] = "bottleneck"
    layers: tuple[int, ...] = (3, 4, 6, 3)  # blocks in each of the four stages
    # Channels of the stem, and inner ones of the first stage; each further stage has twice as many.
    width: int = 64
    num_classes: int = 1000  # 0: no head, but the features that it would stand on
    in_channels: int = 3
    # The first convolution, and whether a pool follows. For images of 32 x 32: 3, 1, False.
    stem_kernel: int = 7
    stem_stride: int = 2
    stem_pool: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))  # JSON has lists
        if not all(type(n) is int and n > 0 for n in self.layers):
            raise ValueError(f"{self.layers} are not all whole numbers above zero")
        if self.num_classes > 1 << 20:  # a config.json names each
            raise OverflowError(f"num_classes {self.num_classes} is more than {1 << 20}")
        if self.block not in EXPANSION:
            raise ValueError(f"block {self.block!r} is none of {', '.join(EXPANSION)}")
        if len(self.layers) != 4:
            raise ValueError(f"layers {self.layers}: a ResNet has four stages")
        if self.stem_kernel % 2 == 0 or not self.stem_stride or not self.in_channels:
            raise ValueError(
                f"a stem of {self.in_channels} channels, kernel {self.stem_kernel} and stride "
                f"{self.stem_stride}: the kernel is odd, and none of them 0"
            )

    @property
    def expansion(self) -> int:
        """Channels out of a block per channel within it."""
        return EXPANSION[self.block]


PRESETS = {
    "resnet18": Config("basic", (2, 2, 2, 2)),
    "resnet34": Config("basic", (3, 4, 6, 3)),
    "resnet50": Config("bottleneck", (3, 4, 6, 3)),
    "resnet101": Config("bottleneck", (3, 4, 23, 3)),
    "resnet152": Config("bottleneck", (3, 8, 36, 3)),
}

TINY = {
    "basic": Config("basic", (2, 1, 1, 1), width=8, num_classes=5),
    "bottleneck": Config("bottleneck", (1, 1, 1, 1), width=4, num_classes=3),
    "small_images": Config(
        "basic",
        (1, 1, 1, 1),
        width=4,
        num_classes=0,
        in_channels=1,
        stem_kernel=3,
        stem_stride=1,
        stem_pool=False,
    ),
}
