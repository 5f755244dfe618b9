"""Numbers that were computed, as a port writes them."""

from __future__ import annotations

import ast
import math

import pytest

from convert.porting.rendering.number_text import Numbers


def written(value: float) -> str:
    return ast.unparse(Numbers().visit(ast.parse(repr(value))))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (8**-0.5, "8 ** (-0.5)"),
        (1 / math.sqrt(48), "1 / math.sqrt(48)"),
        (math.sqrt(32), "math.sqrt(32)"),
        (64**-0.25, "8 ** (-0.5)"),
        (math.log(16), "math.log(16)"),
        (1 / 255, "1 / 255"),
        (2 * math.pi, "2 * math.pi"),
        (math.sqrt(2 / math.pi), "math.sqrt(2 / math.pi)"),
        (-(8**-0.5), "-8 ** (-0.5)"),
    ],
)
def test_a_number_that_was_computed_is_written_as_it_was(value: float, text: str) -> None:
    assert written(value) == text
    assert eval(text, {"math": math}) == value


@pytest.mark.parametrize(
    "value",
    [
        *(0.5, 0.1, 1e-05, 1e-12, 0.044715, 1.0, 0.3535533905932739, 1e30),
        *(3.4028234663852886e38, 1.2345678901234567e200, 1.2345678901234567e-200),
    ],
)
def test_other_numbers_stay(value: float) -> None:
    assert written(value) == repr(value)
