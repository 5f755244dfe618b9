"""What torch computes in float32 although all of it is float64."""

from __future__ import annotations

import pytest
import torch

from convert.runtime.precision import torch_as_written


@pytest.mark.parametrize("inplace", [False, True])
def test_the_gradient_of_a_hard_sigmoid_is_of_float64(inplace: bool) -> None:
    x = torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True)
    with torch_as_written(), torch.enable_grad():
        torch.nn.Hardsigmoid(inplace)(x * 1.0).sum().backward()
    assert x.grad is not None
    assert (x.grad - 1 / 6).abs().max() < 1e-15
