"""Loss curves as a picture, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from zoo.containers.errors import UsageError

COLOURS = ("#1f77b4", "#d95f02", "#2c9c5a", "#7b4fa3")


def curves(
    path: Path,
    lines: Mapping[str, tuple[int, Sequence[float]]],
    title: str,
    switch: int | None = None,
) -> None:
    """Draw `lines`, name -> (first step, losses), into an image file of any format.

    `switch` marks a step with an upright line. Later lines are drawn thinner, so that equal ones
    are all seen. UsageError without matplotlib.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UsageError("--plot needs matplotlib", "pip install matplotlib") from None
    figure, axes = pyplot.subplots(figsize=(7.2, 4), layout="constrained")
    everything = np.concatenate([np.asarray(losses, float) for _, losses in lines.values()])
    for i, (name, (first, losses)) in enumerate(lines.items()):
        width = max(5.0 - 1.8 * i, 1.2) if len(lines) > 1 else 1.2
        steps = np.arange(first, first + len(losses))
        axes.plot(steps, losses, label=name, linewidth=width, color=COLOURS[i % len(COLOURS)])
    if switch is not None:
        axes.axvline(switch, color="0.5", linestyle="--", linewidth=1)
    if everything.size and everything.min() > 0:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
