"""Makes `scripts/training` importable for the tests."""

from __future__ import annotations

import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.append(str(SCRIPTS))  # last: a test module may have a script's name
