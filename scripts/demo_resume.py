"""Begin a training in PyTorch, go on in Flax, and compare with never having moved.

Trains a small BERT on masked words in float64: 100 steps in PyTorch, 100 in Flax, and 50 in PyTorch
with 50 more in Flax from the checkpoint (weights, optimizer, step). Draws docs/resume.png. Exits
with 1 if any step's loss is further off than 1e-9 of it.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from rich.console import Console
from rich.table import Table
from training.border import AT, CASES, STEPS, lines
from training.curves import EXACT

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "resume.png"
CASE = "bert, AdamW"
COLOURS = {"all PyTorch": "#d95f02", "all Flax": "#1f77b4", "PyTorch, then Flax": "#2c9c5a"}

console = Console(highlight=False)


def main() -> int:
    started = time.perf_counter()
    console.print(f"Training {CASE}: {STEPS} steps, three times, in float64 ...")
    losses = {name: np.array(values) for name, (_, values) in lines(CASES[CASE]).items()}
    reference = losses["all PyTorch"]
    gaps = {name: np.abs(x - reference) / np.abs(reference) for name, x in losses.items()}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("step", *losses):
        table.add_column(column, justify="right")
    for step in (0, AT // 2, AT - 1, AT, AT + 1, STEPS - 1):
        table.add_row(str(step), *(f"{x[step]:.12f}" for x in losses.values()))
    console.print(table)
    good = True
    for name, gap in gaps.items():
        if name != "all PyTorch":
            within = bool(gap.max() <= EXACT)
            good &= within
            told = "[green]ok[/green]" if within else "[red]NOT AS IT SHOULD BE[/red]"
            console.print(f"{name}: at most {gap.max():.1e} of PyTorch's loss away  {told}")
    draw(losses, gaps)
    seconds = time.perf_counter() - started
    console.print(f"[dim]{seconds:.0f} s; the curves are in {PICTURE.relative_to(ROOT)}[/dim]")
    return 0 if good else 1


def draw(losses: dict[str, np.ndarray], gaps: dict[str, np.ndarray]) -> None:
    """The curves, one above the other, and how far they are apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(7.2, 5), sharex=True, layout="constrained", height_ratios=(3, 2)
    )
    for width, (name, x) in zip((6, 3.2, 1.2), losses.items(), strict=True):
        above.plot(x, linewidth=width, color=COLOURS[name], label=name)
    above.set(ylabel="loss", title="BERT, masked words, AdamW: training that changes its framework")
    above.legend()
    for name, gap in gaps.items():
        if name != "all PyTorch":
            below.semilogy(np.maximum(gap, 1e-17), color=COLOURS[name], linewidth=1.2)
    below.axhline(EXACT, color="0.3", linewidth=1)
    below.text(1, EXACT * 1.6, "limit", color="0.3", fontsize=8)
    below.set(xlabel="step", ylabel="gap / loss", ylim=(1e-17, 1e-7))
    for axes in (above, below):
        axes.axvline(AT, color="0.5", linestyle="--", linewidth=1)
        axes.grid(alpha=0.3)
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
