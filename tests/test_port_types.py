"""What a port declares so that a type checker follows it, and classes that differ in lists."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from port_lists import Branches, DenseNet, Flat, Image, Maybes, NamedStages, Stages

import convert
from convert.live.port_files import Port
from convert.porting.conditions import as_they_lie, tightest
from convert.porting.rendering.narrowing import needed


def ported(made: type[torch.nn.Module], *args: bool) -> Port:
    """Of inputs (4, 6), and proved."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    port = convert.port(made(*args), x, level="outputs")
    assert port.proved.verdict == "same"
    return port


def classes(source: str, name: str) -> int:
    """How many classes have a name, with a number behind it or not."""
    return len(re.findall(rf"^class {name}\d*\(", source, re.MULTILINE))


def test_lists_of_other_lengths_are_of_one_class() -> None:
    source = ported(Stages).source
    assert classes(source, "Stage") == 1
    assert "for _ in range(depth)" in source
    assert "for _ in range(depth2)" in source
    assert "Stage(12, 18, 4, 5, rngs=rngs)" in source


def test_lists_of_other_items_are_not() -> None:
    source = ported(Stages, True).source
    assert classes(source, "Stage") == 2
    assert re.search(r"self\.blocks: nnx\.List\[Any\] = nnx\.List\(\s*\[\s*Block", source)


def test_what_is_alike_by_chance_follows_from_no_argument() -> None:
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    source = convert.port(Flat, x, level="outputs").source
    assert classes(source, "Rising") == 1
    assert "nnx.Linear(6, 6, rngs=rngs) for _ in range(depth)" in source


def test_a_sequence_of_named_parts_is_no_class() -> None:
    port = ported(NamedStages)
    assert classes(port.source, "Named") == 0
    blocks = 'f"block-{i}": Block(in_features=8, rngs=rngs) for i in range(1, 5)'
    assert blocks in port.source
    assert "self.first.stem(x)" in port.source
    names = {t.name for e in port.layout.entries for t in e.flax}
    assert {"first.stem.kernel", "second.block-3.fc.bias"} <= names


def test_a_list_that_is_given_is_taken_whole() -> None:
    source = ported(DenseNet).source
    assert classes(source, "Dense") == 1
    assert "jnp.concatenate(features, axis=1)" in source


def test_what_only_some_instances_have_is_declared() -> None:
    source = ported(Maybes).source
    assert classes(source, "Maybe") == 1
    assert re.search(r"self\.norm: Any = \(?\s*nnx\.LayerNorm", source)
    assert "self.mix: Any = nnx.Linear" in source, "its bias is used, which mypy takes for optional"


def test_a_call_that_gives_nothing_makes_no_variant() -> None:
    source = ported(Branches).source
    assert classes(source, "Maybe") == 1
    assert "return None" not in source
    assert "| None = None" not in source
    assert "-> tuple[Array, None]:" in source


def test_what_takes_sizes_gets_those_that_its_caller_has() -> None:
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(2, 3, 10, 12)).astype(np.float32)
    port = convert.port(Image, x, level="outputs")
    assert port.proved.verdict == "same"
    assert "self.grid(x.shape[0], x.shape[1], x.shape[2])" in port.source


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        (["if mask is not None:", "    x = x + mask"], set()),
        (["if mask is None:", "    return x", "x = x + mask"], set()),
        (["if self.a is None or self.flag:", "    x = 1", "else:", "    x = self.a(x)"], set()),
        (["if self.a is None or self.flag:", "    x = self.a(x)"], {"self.a"}),
        (["x = self.a(x) if self.a is not None and self.a.b else x"], set()),
        (["x = self.part(x, mask)"], set()),
        (["x = self.part(mask, x)"], {"mask"}),
        (["x = self.part(x, mask * 2)"], {"mask"}),
        (["for item in self.parts:", "    x = item(mask, x)"], {"mask"}),
        (["mask = x", "return mask + 1"], set()),
        (["for y in self.parts:", "    x = y(x)", "return y(mask)"], {"mask"}),
    ],
)
def test_what_is_needed_and_may_not_be_there(lines: list[str], names: set[str]) -> None:
    taken = dict.fromkeys(("self.part", "self.parts"), (["x", "mask"], frozenset({"mask"})))
    assert needed(lines, taken).names & {"mask", "self.a"} == names


def test_a_variable_that_goes_over_two_lists() -> None:
    lines = ["for b in self.a:", "    x = b(x)", "for b in self.c[1:]:", "    x = b(x)"]
    assert needed(lines, {}).lists == {"self.c"}


def test_conditions_are_of_the_axes_of_the_port() -> None:
    told = ["x: axis 1 is 3", "x.shape[2] >= 4 (net.py:3)", "y.shape[2] >= 2"]
    assert as_they_lie(told, {"x": (0, 2, 3, 1)}) == [
        "x: axis 3 is 3", "x.shape[1] >= 4 (net.py:3)", "y.shape[2] >= 2",
    ]  # fmt: skip


def test_conditions_that_others_imply_are_left_out() -> None:
    told = ["x.shape[2] >= 4", "mask: None", "(-1) + n.shape[1] >= 2", "x.shape[2] >= 64",
            "n.shape[1] >= 3", "x.shape[2] >= 9"]  # fmt: skip
    assert tightest(told) == ["x.shape[2] >= 64", "mask: None", "n.shape[1] >= 3"]
