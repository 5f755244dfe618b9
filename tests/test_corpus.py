"""Models that nobody here wrote, live in JAX, by the script that judges all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "port_corpus.py"

# Drawn by a seed from the smallest that docs/ported.md had; timm's are the five smallest of the few
# that had been run. A process for every five.
DRAWN = (
    "torchvision/ densenet161 densenet169 resnet18 squeezenet1_1 vit_l_32",
    "timm/ beit byobnet convit convnext sknet",
    "transformers/ bert bert-generation electra gemma gpt2",
    "transformers/ gpt_neox llava_onevision molmo2 nystromformer olmoe",
)


@pytest.mark.parametrize("drawn", DRAWN, ids=lambda d: d.split()[1])
def test_they_are_the_same_at_sizes_that_were_not_traced(drawn: str) -> None:
    package, *models = drawn.split()
    names = [package + model for model in models]
    command = [sys.executable, str(SCRIPT), "--scratch", "--workers", "1", *names]
    env = os.environ | {
        "JAX_ENABLE_X64": "1",
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # they are compiled, and run once
    }
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert not run.returncode, run.stderr[-2000:]
    for name in names:
        assert f"{name}: right" in run.stdout, run.stdout
