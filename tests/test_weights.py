"""The pretrained weights: every card's score is found again in both frameworks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import training_support  # noqa: F401 - makes `training` importable
from click.testing import CliRunner

# isort: split

from training import published

import zoo
from convert.cli.main import cli
from zoo import hub
from zoo.card import Card, read_card
from zoo.containers.errors import UsageError
from zoo.registry import get

MODELS = Path(zoo.__file__).parent / "models"
FILES = {path.stem: path for path in sorted(MODELS.glob("*/weights/*.safetensors"))}


def card(name: str) -> Card:
    found = read_card(FILES[name])
    assert found is not None, f"{name} has no card"
    assert found.score is not None
    return found


def test_what_is_published_is_there_and_nothing_else() -> None:
    assert sorted(FILES) == sorted(published.NAMES)
    assert all(published.where(name) == path for name, path in FILES.items())
    assert {hub.pretrained()[name] for name in FILES} == set(FILES.values())
    beside = {p for folder in MODELS.glob("*/weights") for p in folder.iterdir()}
    assert beside == {
        p.with_name(f"{p.stem}{s}") for p in FILES.values() for s in (".json", p.suffix)
    }


def test_there_are_enough_and_they_are_small() -> None:
    assert len(FILES) >= 8
    assert len({get(name).model.name for name in FILES}) >= 6
    assert sum(path.stat().st_size for path in FILES.values()) <= 4e6


@pytest.mark.parametrize("name", published.NAMES)
def test_the_card_is_of_these_weights(name: str) -> None:
    c = card(name)
    assert c.sha256 == hashlib.sha256(FILES[name].read_bytes()).hexdigest()
    assert c.name == name
    assert c.command == published.command(name)
    assert f"--seed {c.seed}" in c.command
    assert all((c.summary, c.data, c.license, c.created, c.versions))
    assert c.score is not None
    assert c.score.low <= c.score.value <= c.score.high
    assert c.score.n >= 50


@pytest.mark.parametrize("framework", ["torch", "flax"])
@pytest.mark.parametrize("name", published.NAMES)
def test_the_score_is_found_again(name: str, framework: str) -> None:
    stated, found = card(name).score, published.score(name, framework)
    assert stated is not None
    assert (found.metric, found.n) == (stated.metric, stated.n)
    assert found.count == stated.correct
    if stated.correct is not None:
        assert found.value == stated.correct / stated.n == stated.value
    else:
        assert stated.low <= found.value <= stated.high


def test_the_score_is_of_the_weights(tmp_path: Path) -> None:
    """Other weights of the same model score otherwise: the test above can fail."""
    weights = zoo.load("mnist_cnn.digits", framework="torch")
    with torch.no_grad():
        weights.fc2.weight.mul_(-1)
    torch.save(weights.state_dict(), tmp_path / "other.pt")
    other = published.score("mnist_cnn.digits", "torch", tmp_path / "other.pt")
    stated = card("mnist_cnn.digits").score
    assert stated is not None
    assert other.value < stated.low


@pytest.mark.parametrize("name", published.NAMES)
def test_they_are_their_preset(name: str) -> None:
    (identity,) = zoo.identify(FILES[name])
    found = get(name)
    assert not identity.unknown
    assert identity.model is found.model
    training_only = {"router_jitter_noise"}
    stated, preset = (
        {k: v for k, v in vars(config).items() if k not in training_only}
        for config in (identity.config, found.config)
    )
    assert stated == preset


def test_they_are_listed_with_their_scores() -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(cli, ["models", "--weights", *arguments])

    told = run()
    assert told.exit_code == 0, told.output
    for name in published.NAMES:
        score = card(name).score
        assert score is not None
        line = next(line for line in told.output.splitlines() if line.startswith(f"{name} "))
        assert f"{score.value:.4g}" in line
    rows = json.loads(run("mlp", "--json").output)
    assert {row["name"] for row in rows} == {n for n in published.NAMES if "mlp" in n}
    assert rows[0]["score"]["low"] < rows[0]["score"]["high"]
    with pytest.raises(UsageError, match="no weights match 'nothing'"):
        raise run("nothing").exception
