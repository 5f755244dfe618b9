"""`zooconvert --help` against `python -c "import click"`, run in turn; prints the ratio."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

TOOL = str(Path(sys.executable).with_name("zooconvert"))


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    pairs = [
        (seconds([TOOL, "--help"]), seconds([sys.executable, "-c", "import click"]))
        for _ in range(21)
    ][1:]
    ratio = statistics.median(a / b for a, b in pairs)
    a, b = (statistics.median(column) * 1000 for column in zip(*pairs, strict=True))
    print(
        f"zooconvert --help {a:.0f} ms, import click {b:.0f} ms: {ratio:.2f} times (median of 20)"
    )


if __name__ == "__main__":
    main()
