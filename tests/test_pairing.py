"""Layers that are called in another order, images that lie turned, code that asks for numbers while
it is traced: right pairs are the same, and a fault beside them is told as what it is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import convert
from convert.matching.effect import distances
from convert.runtime.call import Call
from convert.runtime.flax_calls import trace_flax
from convert.runtime.torch_calls import trace_torch
from zoo import probe

C = 4


class Forks(nn.Module):
    """Two branches of one size; Flax calls them in the other order, by names that tell nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far, self.head = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.near(x)) - torch.relu(self.far(2 * x))
        return self.head(y)  # type: ignore[no-any-return]


class FlaxForks(nnx.Module):
    def __init__(self, fault: str) -> None:
        rngs = nnx.Rngs(0)
        self.one, self.two = nnx.Linear(C, C, rngs=rngs), nnx.Linear(C, C, rngs=rngs)
        self.out = nnx.Linear(C, 2, rngs=rngs)
        self.fault = fault

    def __call__(self, x: Any) -> Any:
        if self.fault == "weights":  # in torch's order, each with the other's
            a, b = self.two(x), nnx.relu(self.one(2 * x))
        else:
            b, a = nnx.relu(self.one(2 * x)), self.two(x)
        a = nnx.sigmoid(a) if self.fault == "code" else jnp.tanh(a)
        return self.out(a - b)


def filled(layer: Any, module: nn.Module) -> None:
    weight, bias = module.weight.detach().numpy(), module.bias.detach().numpy()
    layer.kernel[...] = jnp.asarray(np.moveaxis(weight, (0, 1), (-1, -2)))
    layer.bias[...] = jnp.asarray(bias)


def seeded(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.from_numpy(probe.normal(name, tuple(p.shape)) / 2))
    return module.eval()


def forks(fault: str) -> tuple[nn.Module, Any]:
    ours, theirs = seeded(Forks()), FlaxForks(fault)
    held = (ours.near, ours.far) if fault == "weights" else (ours.far, ours.near)
    filled(theirs.one, held[0])  # type: ignore[arg-type]
    filled(theirs.two, held[1])  # type: ignore[arg-type]
    filled(theirs.out, ours.head)  # type: ignore[arg-type]
    return ours, theirs


X = probe.normal("x", (5, C)).astype(np.float32)


def test_layers_called_in_another_order_are_paired_by_their_values() -> None:
    report = convert.verify(*forks(""), X, level="outputs")
    assert report.verdict == "same"
    assert not report.differences


def test_a_fault_beside_them_is_not_told_as_exchanged_weights() -> None:
    found = convert.verify(*forks("code"), X, level="outputs").first_divergence
    assert found is not None
    assert found.cause == "activation"


def test_weights_that_are_exchanged_are_told_as_such() -> None:
    found = convert.verify(*forks("weights"), X, level="outputs").first_divergence
    assert found is not None
    assert (found.cause, found.tensor) == ("swapped", "near.weight")


def test_what_flax_computes_of_torchs_is_told_without_pairs() -> None:
    ours, theirs = forks("code")
    call = Call(args=(X,))
    traces = trace_torch(ours, call), trace_flax(theirs, call)
    apart = distances(*traces)
    assert min(apart) < 1e-6
    assert max(apart) > 1e-2


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.head, self.after = nn.LayerNorm(C), nn.Linear(C, C), nn.LayerNorm(C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.head(self.before(x)))  # type: ignore[no-any-return]


class FlaxNorms(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.one, self.two = (nnx.LayerNorm(C, epsilon=1e-5, rngs=rngs) for _ in range(2))
        self.out = nnx.Linear(C, C, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.two(self.out(self.one(x)))


def test_norms_that_are_exchanged_are_told_as_such() -> None:
    ours, theirs = seeded(Norms()), FlaxNorms()
    filled(theirs.out, ours.head)  # type: ignore[arg-type]
    for layer, module in ((theirs.one, ours.after), (theirs.two, ours.before)):
        layer.scale[...] = jnp.asarray(module.weight.detach().numpy())  # type: ignore[union-attr, operator]
        layer.bias[...] = jnp.asarray(module.bias.detach().numpy())  # type: ignore[union-attr, operator]
    found = convert.verify(ours, theirs, X, level="outputs").first_divergence
    assert found is not None
    assert (found.layer, found.cause) == ("before", "swapped")


# --- An image that lies turned ---


class Bands(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, C, 3, padding=1), nn.Linear(C, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


class FlaxBands(nnx.Module):
    """Takes frames before bands, where torch has bands before frames."""

    def __init__(self, fault: str) -> None:
        self.conv = nnx.Conv(2, C, (3, 3), rngs=nnx.Rngs(0))
        self.head = nnx.Linear(C, 2, rngs=nnx.Rngs(0))
        self.fault = fault

    def __call__(self, x: Any) -> Any:
        x = jnp.transpose(x, (0, 3, 2, 1))
        x = jnp.abs(x) if self.fault == "code" else x
        return self.head(nnx.relu(self.conv(x)).mean((1, 2)))


@pytest.mark.parametrize("fault", ["", "code"])
def test_a_kernel_lies_as_its_image_does(fault: str) -> None:
    ours, theirs = seeded(Bands()), FlaxBands(fault)
    kernel = ours.conv.weight.detach().numpy()  # type: ignore[union-attr, operator]
    theirs.conv.kernel[...] = jnp.asarray(kernel.transpose(3, 2, 1, 0))
    theirs.conv.bias[...] = jnp.asarray(ours.conv.bias.detach().numpy())  # type: ignore[union-attr, operator]
    filled(theirs.head, ours.head)  # type: ignore[arg-type]
    image = probe.normal("image", (2, 2, 5, 7)).astype(np.float32)
    report = convert.verify(ours, theirs, image, level="outputs")
    assert not report.differences
    assert report.verdict == ("different" if fault else "same")
    if fault:
        assert report.first_divergence is not None
        assert report.first_divergence.cause != "transposed"


# --- Code that asks for numbers ---


class Asking(nnx.Module):
    """Makes its mask by NumPy of what JAX has computed: not to be traced as it is."""

    def __init__(self) -> None:
        self.head = nnx.Linear(C, 2, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        ids = np.asarray(jnp.arange(C)[::-1])
        return self.head(x * jnp.asarray(ids > 0, x.dtype))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(C, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x * (torch.arange(C).flip(0) > 0))  # type: ignore[no-any-return]


def test_code_that_asks_for_numbers_while_it_is_traced_is_taken() -> None:
    ours, theirs = seeded(Masked()), Asking()
    filled(theirs.head, ours.head)  # type: ignore[arg-type]
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.eval_shape(theirs, X)
    report = convert.verify(ours, theirs, X, level="gradients")
    assert report.verdict == "same"
    theirs.head.bias[...] += 1.0
    assert convert.verify(ours, theirs, X, level="outputs").verdict == "different"


class Levels(nn.Module):
    """Levels of a pyramid, smoothed from the coarsest to the finest; Flax goes the other way."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        levels = [x, x[..., ::2, ::2], x[..., ::4, ::4]]
        return [self.blocks[i](levels[i]) for i in (2, 1, 0)][::-1]


class FlaxLevels(nnx.Module):
    def __init__(self) -> None:
        self.smooth = nnx.List(
            [nnx.Conv(3, 3, (3, 3), padding=1, rngs=nnx.Rngs(0)) for _ in range(3)]
        )

    def __call__(self, x: Any) -> Any:
        levels = [x, x[:, ::2, ::2], x[:, ::4, ::4]]
        return [conv(level) for conv, level in zip(self.smooth, levels, strict=True)]


@pytest.mark.parametrize("reverse", [False, True])
def test_shapes_tell_layers_that_are_called_in_another_order(reverse: bool) -> None:
    ours, theirs = seeded(Levels()), FlaxLevels()
    held = list(ours.blocks)  # type: ignore[arg-type]
    for layer, module in zip(theirs.smooth, held[::-1] if reverse else held, strict=True):
        layer.kernel[...] = jnp.asarray(np.moveaxis(module.weight.detach().numpy(), (0, 1), (3, 2)))
        layer.bias[...] = jnp.asarray(module.bias.detach().numpy())
    x = probe.normal("image", (2, 3, 16, 8)).astype(np.float32)
    report = convert.verify(ours, theirs, x, flax_inputs=x.transpose(0, 2, 3, 1), level="outputs")
    found = report.first_divergence
    assert (found and found.cause) == ("swapped" if reverse else None)


def test_single_numbers_go_with_the_weights_beside_them() -> None:
    """Biases of one element, whose names say nothing: their weights lie beside them."""

    class Spans(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p1, self.p2 = torch.nn.Linear(6, 1), torch.nn.Linear(6, 1)

        def forward(self, x: Any) -> Any:
            return self.p1(x), self.p2(x)

    def spans(params: Any, x: Any) -> Any:
        return tuple(x @ params[n]["w"] + params[n]["b"] for n in ("start", "end"))

    torch.manual_seed(0)
    net = Spans().eval()
    params = {
        name: {
            "w": jnp.asarray(layer.weight.detach().numpy().T),
            "b": jnp.asarray(layer.bias.detach().numpy()),
        }
        for name, layer in (("start", net.p1), ("end", net.p2))
    }
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    assert convert.verify(net, (spans, params), x, level="gradients").verdict == "same"
