"""`convert.port` of nets as people have them in their projects."""

from __future__ import annotations

import re

import numpy as np
import torch
from port_projects import Decoder, Discriminator, Tagger, UNet

import convert
from convert.live.port_files import Port


def port(net: type[torch.nn.Module], *shape: int) -> Port:
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return convert.port(net, x)


def classes(made: Port) -> list[str]:
    return re.findall(r"^class (\w+)\(nnx.Module\)", made.source, re.MULTILINE)


def test_a_unet_reckons_with_sizes_as_its_source_does() -> None:
    made = port(UNet, 2, 3, 20, 24)
    assert made.proved.verdict == "same"
    assert classes(made) == ["DoubleConv", "Up", "UNet"]
    assert "diff_y = x2.shape[1] - x1.shape[1]" in made.source
    assert "(0, diff_x - diff_x // 2, 0)" in made.source
    assert "def pad(" not in made.source


def test_weights_that_a_hook_computes_are_of_the_layers_call() -> None:
    made = port(Discriminator, 2, 3, 16, 16)
    assert made.proved.verdict == "same"
    assert "self.weight_orig[...] / " in made.source
    assert "made = self.main(x)" in made.source


def test_pools_have_their_names_and_split_no_class() -> None:
    made = port(Tagger, 2, 1, 32, 16)
    assert classes(made) == ["ConvBlock", "Tagger"]
    assert "self.pool = partial(" in made.source
    assert "self.pool(jax.nn.relu(self.conv(x)))" in made.source


def test_a_function_that_gets_other_heads_is_one() -> None:
    made = port(Decoder, 2, 6, 16)
    assert made.source.count("def rotate(") == 1
    assert ".reshape(*x.shape[:3], -1)" in made.source
    assert "x = layer(x, self.cos[:T], self.sin[:T])" in made.source
