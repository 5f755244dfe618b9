"""Parity as a line of a test.

def test_my_port_is_right():
    convert.testing.assert_same(torch_net, flax_net, inputs, level="gradients")
"""

from __future__ import annotations

from typing import Any

from convert.api import verify
from convert.compare.settings import Level
from zoo.containers.errors import printable

_NOTICES = 4  # that a failure shows


def assert_same(
    torch_net: Any, flax_net: Any, inputs: Any = None, level: Level = "outputs", **options: Any
) -> None:
    """Pass silently where `convert.verify` calls the two the same; they may be given in any order.

    `options` are those of `convert.verify`; two checkpoints may be given for the two modules.
    AssertionError otherwise, whose message says where the two part first, why, and what to try.
    UsageError where they cannot be compared.
    """
    __tracebackhide__ = True  # pytest then shows the test's own line
    report = verify(torch_net, flax_net, inputs, level, **options)
    if report.verdict != "same":
        from convert.compare.summary_text import text

        notes = [f"  note: {printable(n)}" for n in report.notices[:_NOTICES]]
        raise AssertionError("\n".join([text(report), *notes]))
