"""Hostile files of every class: a typed error, soon, in little memory, nothing outside touched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hostile

ROOT = Path(__file__).parents[1]
WANTED = {"safetensors": 60, "pt": 60, "msgpack": 40, "orbax": 40, "onnx": 40}


def test_there_are_enough() -> None:
    found = {kind: len(cases) for kind, cases in hostile.every().items()}
    assert all(n >= WANTED.get(kind, 20) for kind, n in found.items()), found


def test_commands_on_some_of_them() -> None:
    """Each in a process of its own: `scripts/hostile` runs every command on all of them."""
    told = [sys.executable, str(ROOT / "scripts/run_hostile.py"), "--few", "--every=9"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(told, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
