"""`convert.port` of what drops in train mode by functions, and by modules of nobody's."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from port_dropping import Dropping
from torch import nn

import convert
from convert.live.port_files import Port


@pytest.fixture(scope="module")
def dropping() -> Port:
    torch.manual_seed(0)
    return convert.port(Dropping(), np.ones((2, 5, 8), np.float32))


def test_functions_that_drop_are_layers_under_the_names_of_their_rates(dropping: Port) -> None:
    source = dropping.source
    assert "left out" not in source
    assert "self.attn_pdrop = nnx.Dropout(rate, rngs=rngs)" in source
    assert "self.attn_pdrop(jax.nn.softmax(" in "".join(source.split())
    assert "self.resid_drop = nnx.Dropout(0.3, rngs=rngs)" in source  # the layer that it has
    assert source.count("nnx.Dropout(") == 4
    assert "self.dropout = nnx.Dropout(0.25, rngs=rngs)" in source


def test_a_module_that_drops_whole_samples_is_a_dropout_in_every_instance(dropping: Port) -> None:
    assert dropping.source.count("class _Residual") == 1
    assert "nnx.Dropout(rate, broadcast_dims=(1, 2), rngs=rngs)" in dropping.source


def test_train_mode_drops_as_torch_does(dropping: Port) -> None:
    net = dropping.net()
    net.train()
    path = net.second.drop_path
    dropped = np.asarray(path(jnp.ones((400, 3, 2))))
    assert set(np.unique(dropped)) == {0.0, 2.0}
    assert (dropped == dropped[:, :1, :1]).all()
    assert 100 < (dropped[:, 0, 0] == 0).sum() < 300
    x = jnp.ones((2, 5, 8))
    assert not np.array_equal(net(x), net(x))
    net.eval()
    assert np.array_equal(net(x), net(x))


def test_the_module_is_left_as_it_was() -> None:
    module = Dropping()
    before = [type(m) for m in module.modules()]
    convert.port(module, np.ones((2, 5, 8), np.float32), verify=False)
    assert [type(m) for m in module.modules()] == before
    assert torch.nn.functional.dropout.__module__ == "torch.nn.functional"
    assert not isinstance(module.first.drop_path, nn.Dropout)


def test_the_layer_is_found_by_nnx(dropping: Port) -> None:
    layers = [m for _, m in nnx.iter_modules(dropping.net()) if isinstance(m, nnx.Dropout)]
    assert sorted(m.rate for m in layers) == [0.0, 0.1, 0.2, 0.25, 0.3, 0.3, 0.5]
