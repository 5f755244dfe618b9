"""Models that nobody here wrote, live in JAX, by the script that judges all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "port_corpus.py"

# Drawn by a seed from the smallest of docs/ported.md, a process for every five.
DRAWN = {
    "torchvision": ["squeezenet1_1", "mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5"],
}


@pytest.mark.parametrize("package", DRAWN)
def test_they_are_the_same_at_sizes_that_were_not_traced(package: str) -> None:
    names = [f"{package}/{name}" for name in DRAWN[package]]
    command = [sys.executable, str(SCRIPT), "--scratch", "--workers", "1", *names]
    env = os.environ | {"OMP_NUM_THREADS": "1", "JAX_ENABLE_X64": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert not run.returncode, run.stderr[-2000:]
    said = dict(line.split(": ", 1) for line in run.stdout.splitlines() if ": " in line)
    assert {n: said[n].partition(" (")[0].partition(",")[0] for n in names} == dict.fromkeys(
        names, "right"
    ), run.stdout
