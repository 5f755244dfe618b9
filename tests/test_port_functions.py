"""`convert.port`: functions that the source calls are functions of the port."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from port_calling import (
    Both,
    Chain,
    Largest,
    Normed,
    Odd,
    Rotary,
    Sizes,
    Tables,
    Twice,
    Wide,
    Windows,
)

import convert
from convert.live.port_files import Port


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def rotary() -> Port:
    torch.manual_seed(0)
    inputs = {"x": drawn(2, 5, 32), "cos": drawn(5, 8), "sin": drawn(5, 8)}
    return convert.port(Rotary, inputs, level="outputs")


def test_they_are_written_once_under_their_names_and_arguments(rotary: Port) -> None:
    assert rotary.proved.verdict == "same"
    names = re.findall(r"^def (\w+)\((.*)\)", rotary.source, re.MULTILINE)
    assert names == [
        ("rotate_half", "x: Array"),
        ("apply_rotary", "q: Array, k: Array, cos: Array, sin: Array"),
        ("repeat_kv", "x: Array, n_rep: int"),
        ("scaled", "x: Array, by: float"),
    ]


def test_they_are_called_as_in_the_source(rotary: Port) -> None:
    assert "q, k = apply_rotary(q, k, cos, sin)" in rotary.source
    assert "k = repeat_kv(k, self.n_rep)" in rotary.source
    assert "q_embed = q * cos + rotate_half(q) * sin" in rotary.source
    assert "return scaled(x, 30.0)" in rotary.source


def test_sizes_that_are_equal_by_chance_have_the_names_of_their_places(rotary: Port) -> None:
    assert "x = jnp.broadcast_to(x[:, :, None], (batch, heads, n_rep, length, dim))" in " ".join(
        rotary.source.split()
    )


def test_what_needs_more_than_its_arguments_stands_where_it_was_called() -> None:
    torch.manual_seed(0)
    made = convert.port(Odd, drawn(2, 4, 6), level="outputs")
    assert made.proved.verdict == "same"
    assert not re.findall(r"^def ", made.source, re.MULTILINE)
    assert "self.fc(x) * 2 + 1" in made.source


def test_sizes_that_differ_between_calls_are_of_the_arguments() -> None:
    torch.manual_seed(0)
    made = convert.port(Both, {"a": drawn(2, 3, 4), "b": drawn(2, 5, 4)}, level="outputs")
    assert made.proved.verdict == "same"
    assert made.source.count("class Sides(") == 1


def test_a_sequence_inside_a_part_of_another_sequence_is_a_class_of_its_own() -> None:
    torch.manual_seed(0)
    made = convert.port(Wide, drawn(2, 4), level="outputs")
    assert made.proved.verdict == "same"


def test_what_only_a_later_call_reads_is_an_attribute_too() -> None:
    torch.manual_seed(0)
    made = convert.port(Twice, {"x": drawn(2, 4), "mask": drawn(2, 4)}, level="outputs")
    assert made.proved.verdict == "same"
    assert "self.scale" in made.source


def test_a_weight_that_is_computed_has_parts_with_numbers_and_with_names() -> None:
    torch.manual_seed(0)
    made = convert.port(Normed, drawn(2, 8, 5), level="gradients")
    assert made.proved.verdict == "same"
    assert "self.part_0 = _WeightNorm()" in made.source


@pytest.mark.parametrize("last", [True, False])
def test_a_part_that_some_have_not_is_left_out_there(last: bool) -> None:
    torch.manual_seed(0)
    made = convert.port(Chain(last), drawn(2, 4), level="outputs")
    assert made.proved.verdict == "same"
    assert made.source.count("class Ended(") == 1


def test_none_is_a_value_of_an_attribute() -> None:
    torch.manual_seed(0)
    made = convert.port(Windows, {"x": drawn(2, 5, 6), "shift": drawn(6)}, level="outputs")
    assert made.proved.verdict == "same"
    assert "self.window = window" in made.source


@pytest.mark.parametrize("kind", ["amax", "dim"])
def test_the_compiled_gradient_of_a_maximum_is_torchs(kind: str) -> None:
    """XLA on the CPU compiles that of `jnp.max` into something else behind a norm."""
    torch.manual_seed(0)
    made = convert.port(Largest(kind), drawn(12, 4, 8), level="gradients")
    assert made.proved.verdict == "same"


def test_instances_that_differ_in_numbers_are_one_class() -> None:
    torch.manual_seed(0)
    made = convert.port(Sizes, drawn(2, 5, 24), level="outputs")
    assert made.proved.verdict == "same"
    assert len(re.findall(r"^class Sized", made.source, re.MULTILINE)) == 1


def test_instances_that_differ_in_tables_are_one_class() -> None:
    torch.manual_seed(0)
    made = convert.port(Tables, drawn(2, 5, 24), level="outputs")
    assert made.proved.verdict == "same"
    assert len(re.findall(r"^class Tabled", made.source, re.MULTILINE)) == 1
    assert "table: np.ndarray" in made.source
