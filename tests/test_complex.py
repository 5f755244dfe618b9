"""Complex parameters, buffers, inputs and outputs are compared as complex numbers."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import convert
from zoo import probe

B, T, N, D = 2, 5, 2, 8  # batch, steps, heads, size of a head
E = N * D


def table() -> np.ndarray:
    """Rotations (T, D / 2), as Llama's reference has them in `freqs_cis`."""
    angles = np.outer(np.arange(T), 10000.0 ** (-np.arange(0, D, 2) / D))
    return np.exp(1j * angles).astype(np.complex64)


class Rotated(nn.Module):
    """Llama's reference: pairs of neighbours are complex numbers, turned by a complex buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(E, E, bias=False)
        self.o = nn.Linear(E, E, bias=False)
        self.register_buffer("freqs_cis", torch.from_numpy(table()), persistent=False)

    def forward(self, x: Any) -> Any:
        q = self.q(x).view(*x.shape[:2], N, D // 2, 2)
        turned = torch.view_as_complex(q) * self.freqs_cis[:, None]
        return self.o(torch.view_as_real(turned).reshape(x.shape))


class FlaxRotated(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, rotate: bool = True) -> None:
        self.q = nnx.Linear(E, E, use_bias=False, rngs=rngs)
        self.o = nnx.Linear(E, E, use_bias=False, rngs=rngs)
        self.rotate = rotate

    def __call__(self, x: Any) -> Any:
        q = self.q(x).reshape(*x.shape[:2], N, D // 2, 2)
        if self.rotate:
            # Made where it is used, so that float64 has it in float64.
            angles = np.outer(np.arange(T), 10000.0 ** (-np.arange(0, D, 2) / D))
            cos, sin = (jnp.asarray(f(angles).astype(np.float32), x.dtype)[:, None]
                        for f in (np.cos, np.sin))  # fmt: skip
            a, b = q[..., 0], q[..., 1]
            q = jnp.stack([a * cos - b * sin, a * sin + b * cos], -1)
        return self.o(q.reshape(x.shape))


def rotated(rotate: bool = True) -> tuple[nn.Module, nnx.Module]:
    ours, theirs = Rotated(), FlaxRotated(nnx.Rngs(0), rotate)
    for name in ("q", "o"):
        weight = probe.weight(f"{name}.weight", (E, E))
        getattr(ours, name).weight.data = torch.from_numpy(weight)
        getattr(theirs, name).kernel[...] = jnp.asarray(weight.T)
    return ours, theirs


X = probe.normal("x", (B, T, E)).astype(np.float32)


@pytest.mark.parametrize("level", ["outputs", "gradients", "training"])
def test_a_complex_buffer_keeps_its_imaginary_part(level: Any) -> None:
    ours, theirs = rotated()
    report = convert.verify(ours, theirs, X, level)
    assert report.verdict == "same", report.first_divergence


def test_a_port_without_the_rotation_is_different() -> None:
    ours, theirs = rotated(rotate=False)
    assert convert.verify(ours, theirs, X, "outputs").verdict == "different"


class Spectral(nn.Module):
    """A complex weight on the spectrum, as in Fourier neural operators; complex outputs too."""

    def __init__(self) -> None:
        super().__init__()
        real, imag = (probe.weight(f"weight.{part}", (E // 2 + 1,)) for part in ("re", "im"))
        self.weight = nn.Parameter(torch.from_numpy((real + 1j * imag).astype(np.complex64)))

    def forward(self, x: Any) -> Any:
        z = torch.fft.rfft(x) * self.weight
        return {"spectrum": z, "x": torch.fft.irfft(z)}


class FlaxSpectral(nnx.Module):
    def __init__(self, conjugate: bool = False) -> None:
        self.weight = nnx.Param(jnp.asarray(Spectral().weight.detach().numpy()))
        self.conjugate = conjugate

    def __call__(self, x: Any) -> Any:
        weight = self.weight[...]
        z = jnp.fft.rfft(x) * (weight.conj() if self.conjugate else weight)
        return {"spectrum": z, "x": jnp.fft.irfft(z)}


@pytest.mark.parametrize("level", ["bits", "outputs", "gradients", "training"])
def test_complex_parameters_and_outputs(level: Any) -> None:
    report = convert.verify(Spectral(), FlaxSpectral(), X, level)
    assert report.verdict == "same", [r for r in report.rows if not r.same]
    if level != "bits":
        assert "output.spectrum" in {r.name for r in report.outputs}
    if level in ("gradients", "training"):
        assert "weight" in {r.name for r in report.gradients}


def test_the_conjugate_is_another_number() -> None:
    report = convert.verify(Spectral(), FlaxSpectral(conjugate=True), X, "outputs")
    assert report.verdict == "different"
    assert report.to_json()


def test_complex_inputs_have_gradients() -> None:
    class Torch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, z: Any) -> Any:
            return (z * z).imag * self.scale

    class Flax(nnx.Module):
        def __init__(self) -> None:
            self.scale = nnx.Param(jnp.asarray(2.0))

        def __call__(self, z: Any) -> Any:
            return (z * z).imag * self.scale[...]

    z = (X + 1j * X[::-1]).astype(np.complex64)
    report = convert.verify(Torch(), Flax(), z, "gradients")
    assert report.verdict == "same", [r for r in report.rows if not r.same]
    assert "in.z" in {r.name for r in report.gradients}
