"""Readers on bytes of all kinds: what a fuzzer kept, and a second of plain mutations of it each."""

from __future__ import annotations

import random
import time
from pathlib import Path

import fuzzing
import pytest

SECONDS = 0.4


@pytest.mark.parametrize("reader", fuzzing.TARGETS)
def test_only_errors_of_ours(reader: str, tmp_path: Path) -> None:
    kept, rng = fuzzing.corpus(reader), random.Random(reader)
    assert len(kept) > 10
    until = time.process_time() + SECONDS
    taken = sum(fuzzing.run(reader, data, tmp_path) for data in kept[:100])
    assert taken < len(kept), "some are refused"
    while time.process_time() < until:
        fuzzing.run(reader, fuzzing.mutated(rng.choice(kept), rng, kept), tmp_path)
