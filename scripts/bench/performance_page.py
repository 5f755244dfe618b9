"""docs/performance.md and its plot, from the docs/performance.json of scripts/bench/engine.py."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
_HEAD = """\
# Performance

Written by `scripts/bench/performance_page.py` from what `scripts/bench/engine.py` measured. Each
job is a process of its own, run in turn with what it is held against, and only their ratio in one
round counts: for a conversion `cp` and `sync` of the same bytes, start-up of ours included; for the
others what the line says. Peaks are above an idle interpreter; for what is measured inside a
process, above what it held before. At least {rounds} rounds{where}.

Free memory is touched before every command, the copy too, but for rows that are marked cold and
the tables below. A virtual machine gives it back to its host after some seconds, and who writes to
it next waits up to ten times as long: so writing Orbax, in many files, seemed to take 4 to 8 times
as long as a copy. And what a job wrote is emptied, not removed, until all is done: ext4 tries
inodes that were deleted in the last minutes one by one, which whoever makes files next would pay.

![The ratios, with what is asked for](performance.png)

| job | lowest | median | highest | asked for | peak, MB | asked for | measured |
|---|---:|---:|---:|---:|---:|---:|---|
"""


def main() -> None:
    told = json.loads((DOCS / "performance.json").read_text())
    jobs: dict[str, dict[str, Any]] = told["jobs"]
    rows = []
    for label, job in jobs.items():
        ratios, asked, memory = job["ratios"], job["target"], job["memory"]
        cells = [ratios[0], statistics.median(ratios), ratios[-1]]
        shown = " | ".join(f"{c:.2f}" for c in cells)
        limits = [f"{v:g}" if v is not None else "" for v in (asked, memory)]
        last = f"{limits[1]} | {job['measured']}{'' if job.get('warm') else ', cold'}"
        rows.append(f"| {label} | {shown} | {limits[0]} | {job['peak']:.0f} | {last} |")
    where = f", {told['machine']}" if told.get("machine") else ""
    rounds = min(len(job["ratios"]) for job in jobs.values())
    text = _HEAD.format(rounds=rounds, where=where) + "\n".join(rows) + "\n"
    if "parts" in told:
        text += by_part(told["parts"])
    if "growth" in told:
        text += grown(told["growth"])
        plot_growth(told["growth"]["points"])
    (DOCS / "performance.md").write_text(text)
    plot(jobs)


def by_part(told: dict[str, dict[str, float]]) -> str:
    """The section on what limits: a row for each job, a column for each part."""
    first = next(iter(told.values()))
    names = [n for n in first if n not in ("seconds", "waiting")]
    rows = [
        f"| {job} | {parts['seconds']:.2f} | {' | '.join(f'{parts[n]:.2f}' for n in names)} |\n"
        for job, parts in told.items()
    ]
    return (
        _PARTS
        + f"| job | wall | {' | '.join(names)} |\n|---|{'---:|' * (len(names) + 1)}\n"
        + ("".join(rows))
    )


_PARTS = """
## What limits

By `scripts/bench/parts.py`: seconds of the clock, then threads' seconds by what they did, medians
of the rounds; threads that wait are left out. The first three jobs keep two cores busy for four
fifths of the time, with NumPy's strided loops and the kernel; a copy at 2 GB/s leaves no room for
Python's start, for one transposition there and one back, and for two hashes. A single tensor of
1 GB is read in pieces of 2,752 bytes, 390,000 calls of the system, since what is held at a time is
fixed: unverified that is what it takes, and to verify it is read so once more. A call takes 3.5
microseconds beside another thread; 1.4 if it kept Python's lock, but then Ctrl-C waits for the
disk. Mapping the file would spare the calls, and end the process where another one cuts it short.

"""


def grown(told: dict[str, Any]) -> str:
    """The section on size: a row for each job, a column for each size."""
    points = told["points"]
    sizes = sorted({p["gb"] for p in points})
    lines = []
    for job in dict.fromkeys(p["job"] for p in points):
        mine = {p["gb"]: p for p in points if p["job"] == job}
        each = [mine[s]["seconds"] / s for s in sizes]
        seconds = " | ".join(f"{mine[s]['seconds']:.1f}" for s in sizes)
        peak = max(p["peak"] for p in mine.values())
        lines.append(f"| {job} | {seconds} | {min(each):.2f} to {max(each):.2f} | {peak:.0f} |")
    head = " | ".join(f"{s:.1f} GB" for s in sizes)
    where = f", {told['machine']}" if told.get("machine") else ""
    return (
        _GROWTH.format(rounds=told["rounds"], where=where)
        + f"| job, seconds | {head} | seconds a GB | peak, MB |\n"
        + f"|---|{'---:|' * (len(sizes) + 2)}\n"
        + "\n".join(lines)
        + "\n"
    )


_GROWTH = """
## Size

By `scripts/bench/engine.py --growth`: decoder-shaped checkpoints in bfloat16, in shards of 1 GB,
medians of {rounds} rounds{where}.

![Seconds and size](growth.png)

"""


def plot_growth(points: list[dict[str, Any]]) -> None:
    """Seconds against GB, a line for each job."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for job in dict.fromkeys(p["job"] for p in points):
        mine = sorted((p["gb"], p["seconds"]) for p in points if p["job"] == job)
        axes.plot(*zip(*mine, strict=True), "o-", label=job)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GB")
    axes.set_ylabel("seconds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(DOCS / "growth.png", dpi=110, bbox_inches="tight")


def plot(jobs: dict[str, dict[str, Any]]) -> None:
    """A bar from the lowest ratio to the highest for every job, and what is asked for."""
    import matplotlib.pyplot as plt

    labels = list(jobs)[::-1]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.28 * len(labels)))
    for y, label in enumerate(labels):
        ratios, asked = jobs[label]["ratios"], jobs[label]["target"]
        axes.plot([ratios[0], ratios[-1]], [y, y], color="tab:blue", linewidth=4)
        axes.plot(statistics.median(ratios), y, "o", color="black", markersize=4)
        if asked is not None:
            axes.plot(asked, y, "|", color="tab:red", markersize=12)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_xlim(left=0)
    axes.set_xlabel("times what it is held against (red: at most)")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(DOCS / "performance.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
