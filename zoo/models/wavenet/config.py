"""WaveNet's hyper-parameters. The paper leaves the numbers of channels open: see the README."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Defaults are the preset `wavenet`: three stacks of dilations 1, 2, 4, ..., 512."""

    classes: int = 256  # values of a quantised sample
    layers: int = 30
    dilation_cycle: int = 10  # layers after which the dilation starts at 1 again
    kernel_size: int = 2
    residual_channels: int = 64
    gate_channels: int = 64  # of the filter, and of the gate
    skip_channels: int = 256
    global_channels: int = 0  # of what the whole utterance is conditioned on; 0: nothing
    local_channels: int = 0  # of what every sample is conditioned on; 0: nothing

    def __post_init__(self) -> None:
        if self.kernel_size < 2:
            raise ValueError(f"kernel_size {self.kernel_size}: that sees no past")
        if self.layers < 1 or self.dilation_cycle < 1:
            raise ValueError("layers and dilation_cycle are at least 1")

    @property
    def dilations(self) -> tuple[int, ...]:
        """The dilation of each layer."""
        return tuple(2 ** (i % self.dilation_cycle) for i in range(self.layers))

    @property
    def receptive_field(self) -> int:
        """How many samples, the latest one included, a prediction can depend on."""
        return 1 + (self.kernel_size - 1) * (1 + sum(self.dilations))

    def check(self, global_condition: bool, local_condition: bool) -> None:
        """Raises ValueError unless the conditions that are there are those that are needed."""
        for name, there, channels in (
            ("global_condition", global_condition, self.global_channels),
            ("local_condition", local_condition, self.local_channels),
        ):
            if there != (channels > 0):
                raise ValueError(f"{name} is {'not ' if there else ''}needed by this model")


PRESETS = {
    "wavenet": Config(),
    "wavenet_small": Config(
        layers=12, dilation_cycle=6, residual_channels=24, gate_channels=24, skip_channels=48
    ),
}

# Channels all differ, so that no two tensors can stand in for one another by their shape alone.
TINY = {
    "plain": Config(
        classes=16,
        layers=4,
        dilation_cycle=2,
        residual_channels=6,
        gate_channels=5,
        skip_channels=7,
    ),
    "conditioned": Config(
        classes=12,
        layers=3,
        dilation_cycle=3,
        kernel_size=3,
        residual_channels=5,
        gate_channels=5,
        skip_channels=6,
        global_channels=3,
        local_channels=4,
    ),
}
