"""The paired layers where the frameworks' own defaults differ; each of these once moved a robot."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from convert.judge.noise import MARGIN
from convert.judge.rows import FLOOR
from zoo import probe
from zoo.nn import attention_flax, attention_torch, layers_flax, layers_torch


def norms(dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """torch's LayerNorm, ours in Flax and Flax's default one, on inputs whose mean is 10."""
    x = (probe.normal("x", (4, 32)) + 10).astype(dtype)
    with jax.enable_x64(True):
        ours = layers_flax.LayerNorm(32, 1e-5, param_dtype=dtype, rngs=nnx.Rngs(0))
        theirs = nnx.LayerNorm(32, epsilon=1e-5, param_dtype=dtype, rngs=nnx.Rngs(0))
        a, b = np.asarray(ours(x), np.float64), np.asarray(theirs(x), np.float64)
    module = layers_torch.LayerNorm(32, 1e-5, param_dtype=getattr(torch, dtype))
    return module(torch.from_numpy(x)).detach().double().numpy(), a, b


def test_a_large_mean_costs_no_digits() -> None:
    """Flax's fast variance, its default, subtracts two large numbers."""
    exact, _, _ = norms("float64")
    rough, ours, fast = norms("float32")
    allowed = MARGIN * max(np.abs(rough - exact).max(), FLOOR * np.abs(exact).max())
    assert np.abs(ours - rough).max() <= allowed
    assert np.abs(fast - rough).max() > allowed, "the default would do, and this test says nothing"


@pytest.mark.parametrize("name", list(layers_torch.ACTIVATIONS))
def test_activations_of_one_name_are_one_function(name: str) -> None:
    x = probe.normal("x", (1000,)) * 3
    with jax.enable_x64(True):
        a = np.asarray(layers_flax.ACTIVATIONS[name](jnp.asarray(x)))
    b = layers_torch.ACTIVATIONS[name](torch.from_numpy(x)).numpy()
    assert np.abs(a - b).max() < 1e-14


def test_both_gelus_are_there_and_differ() -> None:
    x = torch.from_numpy(probe.normal("x", (1000,)))
    erf, tanh = (layers_torch.ACTIVATIONS[n](x) for n in ("gelu", "gelu_new"))
    assert 1e-4 < (erf - tanh).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_linear_and_embedding_compute_in_their_dtype(dtype: str) -> None:
    compute = getattr(torch, dtype)
    x = torch.from_numpy(probe.normal("x", (3, 8))).float()
    for module in (
        layers_torch.Linear(8, 4, dtype=compute),
        layers_torch.Linear(8, 4, bias=False, dtype=compute),
        layers_torch.LayerNorm(8, 1e-5, dtype=compute),
    ):
        assert module(x).dtype == compute
        assert next(module.parameters()).dtype == torch.float32
    embedding = layers_torch.Embedding(5, 8, dtype=compute)
    assert embedding(torch.arange(3)).dtype == compute
    assert embedding.attend(x).shape == (3, 5)
    assert layers_torch.Linear(8, 4)(x.double()).dtype == torch.float64, "promoted, as NNX does"


def test_attention_is_float64_all_the_way() -> None:
    """jax.nn.dot_product_attention takes its softmax in float32, whatever it is given."""
    q, k, v = (probe.normal(n, (2, 5, 3, 4)) for n in "qkv")
    expected = attention_torch.dot_product_attention(*map(torch.from_numpy, (q, k, v))).numpy()
    with jax.enable_x64(True):
        ours = np.asarray(attention_flax.dot_product_attention(*map(jnp.asarray, (q, k, v))))
        theirs = np.asarray(jax.nn.dot_product_attention(*map(jnp.asarray, (q, k, v))))
    assert np.abs(ours - expected).max() < 1e-14
    assert np.abs(theirs - expected).max() > 1e-10, "jax mends it: use theirs"
