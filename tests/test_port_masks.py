"""Masks of index arithmetic, as a port has them; and attention that needs no axes swapped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import convert
from tests.port_masks import (
    Added,
    Crossed,
    Dropping,
    Filled,
    Heads,
    Masked,
    Rule,
    Short,
    blocks,
    causal,
    earlier,
    everything,
    wide,
    widest,
    window,
)

_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(2, 6, 12)).astype("f")
SMALL = _RNG.normal(size=(2, 6, 8)).astype("f")


def source(module: torch.nn.Module, *inputs: np.ndarray) -> str:
    """The port's, which is proved at other sizes before it is given."""
    torch.manual_seed(0)
    return convert.port(module, inputs).source.partition('"""\n\nfrom')[2]  # without its head


@pytest.mark.parametrize(
    ("rule", "there", "gone"),
    [
        (causal, "is_causal=True", ("arange", "mask:", "mask =", "tri(")),
        (everything, "dot_product_attention(", ("arange", "mask:", "mask =", "is_causal")),
    ],
)
def test_attention_takes_a_known_mask_as_what_it_is(
    rule: Rule, there: str, gone: tuple[str, ...]
) -> None:
    text = source(Masked(rule), X)
    assert there in text
    assert not any(word in text for word in gone)


@pytest.mark.parametrize("rule", [window, wide, widest, blocks, earlier])
def test_another_mask_stays_as_it_was_made(rule: Rule) -> None:
    text = source(Masked(rule), X)
    assert "def mask_of(" in text
    assert "is_causal" not in text


def test_a_mask_that_is_added() -> None:
    assert "jnp.tri(" in source(Added(causal), SMALL)
    assert "mask =" not in source(Added(everything), SMALL)
    assert "arange" in source(Added(window), SMALL)


def test_scores_that_are_filled() -> None:
    assert "jnp.tri(" in source(Filled(causal), SMALL)
    assert "where" not in source(Filled(everything), SMALL)
    assert "arange" in source(Filled(window), SMALL)


def test_weights_that_are_dropped() -> None:
    assert "jnp.tri(" in source(Dropping(causal), SMALL)
    text = source(Dropping(everything), SMALL)
    assert "nnx.Dropout(0.1" in text
    assert "where" not in text
    assert "arange" in source(Dropping(window), SMALL)


def test_causal_is_of_as_many_keys_as_queries() -> None:
    text = source(Crossed(), SMALL, _RNG.normal(size=(2, 5, 8)).astype("f"))
    assert "is_causal" not in text


def test_a_short_mask_stays() -> None:
    text = source(Short(), SMALL)
    assert "jnp.tril(jnp.ones(" in text
    assert "is_causal" not in text


def test_axes_are_not_swapped_there_and_back() -> None:
    text = source(Heads(), SMALL)
    assert "jax.nn.dot_product_attention(queries, keys, values)" in text
    assert "swapaxes" not in text
    assert "out = out" not in text
