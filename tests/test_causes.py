"""The list of causes: every sentence can be said, and what the code says is on the list."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import Any

import pytest

from convert.diagnose.causes import CAUSES, found

ROOT = Path(__file__).parents[1]
VARIANTS = [(word, variant) for word, cause in CAUSES.items() for variant in cause.variants]


def fields(word: str, variant: str) -> dict[str, Any]:
    """A value for each field of a sentence and its advice: a number where it has a format."""
    parts = [part for text in CAUSES[word].variants[variant] for part in Formatter().parse(text)]
    named = [(name, spec) for _, name, spec, _ in parts if name is not None]
    formatted = {name for name, spec in named if spec}
    return {name: 1 if name in formatted else "x" for name, _ in named}


@pytest.mark.parametrize(("word", "variant"), VARIANTS)
def test_every_sentence_of_a_cause_can_be_said(word: str, variant: str) -> None:
    values = fields(word, variant)
    assert all(name.isidentifier() for name in values)
    reason = found(word, variant, tensor="a.weight", **values)
    assert reason.cause == word
    assert reason.tensor == "a.weight"
    assert reason.diagnosis
    assert reason.advice
    for text in (reason.diagnosis, reason.advice, CAUSES[word].meaning):
        assert "{" not in text
        assert text == text.strip()
        assert not text.endswith(".") or text.endswith("...")
    for name in values:
        with pytest.raises(KeyError):
            found(word, variant, **{n: v for n, v in values.items() if n != name})


def test_what_is_not_on_the_list_is_refused() -> None:
    for wrong in (("nonsense",), ("epsilon", "nonsense")):
        with pytest.raises(KeyError):
            found(*wrong, torch=1.0, flax=1.0)


def said_in_code() -> Iterator[tuple[str, str, set[str], str]]:
    """Cause, variant, fields and place of every call of `found`."""
    for path in sorted((ROOT / "convert").rglob("*.py")):
        text = path.read_text()
        if "from convert.diagnose.causes import" not in text or path.name == "causes.py":
            continue
        for node in ast.walk(ast.parse(text)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            if node.func.id == "found":
                place = f"{path.name}:{node.lineno}"
                words = [literals(arg, place) for arg in node.args] + [[""]]
                names = {k.arg or "**" for k in node.keywords} - {"tensor"}
                for variant in words[1]:
                    yield words[0][0], variant, names, place


def literals(node: ast.expr, place: str) -> list[str]:
    """The strings that an argument may be: what is computed could not be looked up here."""
    if isinstance(node, ast.IfExp):
        return literals(node.body, place) + literals(node.orelse, place)
    assert isinstance(node, ast.Constant), f"{place}: name the cause and its variant in full"
    return [str(node.value)]


def test_every_explanation_is_on_the_list() -> None:
    wrong = [
        f"{place}: {word}, {variant!r}, {sorted(names)}"
        for word, variant, names, place in said_in_code()
        if (word, variant) not in VARIANTS or names != set(fields(word, variant))
    ]
    assert not wrong


def test_everything_on_the_list_is_said_somewhere() -> None:
    used = {(word, variant) for word, variant, _, _ in said_in_code()}
    assert {v for v in VARIANTS if v not in used} == set()
