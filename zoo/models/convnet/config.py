"""Sizes of a small convolutional classifier."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Defaults are those of cifar_net.

    Every convolution has the same kernel, stride and padding, and a ReLU and perhaps a pool of
    2x2 after it. Images are square.
    """

    in_channels: int = 3
    image_size: int = 32
    channels: tuple[int, ...] = (6, 16)  # of each convolution
    kernel_size: int = 5
    stride: int = 1
    padding: int = 0
    pool: bool = True
    hidden: tuple[int, ...] = (120, 84)  # units of each linear layer but the last
    num_classes: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON has lists
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if not all(type(n) is int and n > 0 for n in self.channels + self.hidden):
            raise ValueError(f"{self.channels + self.hidden} are not all whole numbers above zero")
        if not self.channels:
            raise ValueError("at least one convolution is needed")
        if self.side < 1:
            raise ValueError(f"nothing is left of an image of {self.image_size}")

    @property
    def side(self) -> int:
        """Height and width of what reaches the first linear layer."""
        size = self.image_size
        for _ in self.channels:
            size = (size + 2 * self.padding - self.kernel_size) // self.stride + 1
            size = size // 2 if self.pool else size
        return size


PRESETS = {
    "mnist_cnn": Config(1, 28, (10, 20), 5, hidden=(10,)),
    "mnist_cnn_wide": Config(1, 28, (32,), 3, stride=2, padding=1, hidden=(128,)),
    "image_cnn": Config(3, 32, (32, 64), 3, padding=1, hidden=(128,)),
    "cifar_net": Config(),
    "jax_cnn": Config(1, 28, (32, 64), 3, padding=1, hidden=(128,)),
    "flax_cnn": Config(3, 32, (32, 64), 3, padding=1, pool=False, hidden=(128,)),
}

TINY = {
    "pooled": Config(2, 12, (4, 6), 3, padding=1, hidden=(12,), num_classes=5),
    "strided": Config(1, 11, (5,), 5, stride=2, padding=2, pool=False, hidden=(), num_classes=4),
    "deep": Config(3, 14, (4, 4), 3, hidden=(8, 8), num_classes=3),
}
