"""WaveNet in Flax NNX: the twin of model_torch.py, class by class.

van den Oord 2016, https://arxiv.org/abs/1609.03499.

    model = WaveNet(Config(), rngs=nnx.Rngs(0))
    logits = model(samples)  # (B, T) -> (B, T, 256)

B sequences of T samples, Q classes of a sample, R residual channels, D channels of the filter and
of the gate, S skip channels; G channels of a global condition and L of a local one. `**kw` is
`dtype`, `param_dtype` and `rngs`, which every layer takes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from zoo.models.wavenet.config import Config
from zoo.nn.causal_conv_flax import CausalConv1d
from zoo.nn.generation_flax import choose_token
from zoo.nn.options_flax import Options


class GatedUnit(nnx.Module):
    """tanh(filter) * sigmoid(gate) (equation 2)."""

    def __call__(self, filter: Array, gate: Array) -> Array:
        """(B, T, D) both -> (B, T, D)."""
        return jnp.tanh(filter) * jax.nn.sigmoid(gate)


class WaveNetLayer(nnx.Module):
    """A dilated convolution with a gate, and its residual and skip connections (figure 4).

    The last layer has no `residual`, as no layer follows.
    """

    def __init__(self, c: Config, dilation: int, last: bool, **kw: Unpack[Options]) -> None:
        R, D = c.residual_channels, c.gate_channels
        self.filter = CausalConv1d(R, D, c.kernel_size, dilation, **kw)
        self.gate = CausalConv1d(R, D, c.kernel_size, dilation, **kw)
        if c.global_channels:
            self.filter_global = nnx.Linear(c.global_channels, D, use_bias=False, **kw)
            self.gate_global = nnx.Linear(c.global_channels, D, use_bias=False, **kw)
        if c.local_channels:
            self.filter_local = CausalConv1d(c.local_channels, D, 1, bias=False, **kw)
            self.gate_local = CausalConv1d(c.local_channels, D, 1, bias=False, **kw)
        self.unit = GatedUnit()
        self.skip = CausalConv1d(D, c.skip_channels, 1, **kw)
        self.residual = None if last else CausalConv1d(D, R, 1, **kw)

    def __call__(
        self, x: Array, global_condition: Array | None = None, local: Array | None = None
    ) -> tuple[Array, Array]:
        """x (B, T, R) -> x (B, T, R) of the next layer, and the skip connection (B, T, S).

        `global_condition` (B, G), `local` (B, T, L).
        """
        f, g = self.filter(x), self.gate(x)
        return self.connect(x, f, g, global_condition, local)

    def step(
        self,
        x: Array,
        ring: Array,
        t: Array,
        global_condition: Array | None = None,
        local: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """As `__call__`, for step t alone: x (B, 1, R). Also returns the ring with x written."""
        window, ring = self.filter.window(ring, x, t)  # the gate sees the same past
        f, g = self.filter.step(window), self.gate.step(window)
        x, skip = self.connect(x, f, g, global_condition, local)
        return x, skip, ring

    def connect(
        self,
        x: Array,
        f: Array,
        g: Array,
        global_condition: Array | None,
        local: Array | None,
    ) -> tuple[Array, Array]:
        """What follows the dilated convolutions, of outputs f and g (B, T, D)."""
        if global_condition is not None:  # section 2.5
            f = f + self.filter_global(global_condition)[:, None]
            g = g + self.gate_global(global_condition)[:, None]
        if local is not None:
            f = f + self.filter_local(local)
            g = g + self.gate_local(local)
        z = self.unit(f, g)
        if self.residual is not None:
            x = x + self.residual(z)
        return x, self.skip(z)


class WaveNet(nnx.Module):
    """Logits of the next sample's class, from all samples up to the present one."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.config = c
        last = c.layers - 1
        self.input = CausalConv1d(c.classes, c.residual_channels, c.kernel_size, **kw)
        self.layers = nnx.List(
            WaveNetLayer(c, dilation, i == last, **kw) for i, dilation in enumerate(c.dilations)
        )
        self.output1 = CausalConv1d(c.skip_channels, c.skip_channels, 1, **kw)
        self.output2 = CausalConv1d(c.skip_channels, c.classes, 1, **kw)

    def __call__(
        self,
        samples: Array,
        global_condition: Array | None = None,
        local_condition: Array | None = None,
    ) -> Array:
        """samples (B, T), integers in [0, Q) -> logits (B, T, Q); those at t predict sample t + 1.

        `global_condition` (B, G); `local_condition` (B, T, L), at t the one of sample t + 1.
        ValueError unless the conditions given are those that the config has channels for.
        """
        self.config.check(global_condition is not None, local_condition is not None)
        x = self.input(self.one_hot(samples))
        skips = jnp.zeros((), x.dtype)  # (B, T, S) from the first layer on
        for layer in self.layers:
            x, skip = layer(x, global_condition, local_condition)
            skips = skips + skip
        return self.head(skips)

    def generate(
        self,
        samples: Array,
        steps: int,
        uniforms: Array | None = None,
        temperature: float = 1.0,
        global_condition: Array | None = None,
        local_condition: Array | None = None,
    ) -> Array:
        """The `steps` samples that follow `samples` (B, P), P at least 1: integers (B, steps).

        Each is the likeliest, or, with `uniforms` (B, steps) in [0, 1), drawn by these numbers from
        the softmax of logits / temperature. `local_condition` (B, P + steps - 1, L). Every
        convolution keeps its past inputs in a ring buffer, so that all steps cost the same.

        Compiled as one scan, anew for another P or `steps`.
        """
        self.config.check(global_condition is not None, local_condition is not None)
        if samples.shape[1] < 1:
            raise ValueError("samples are empty: there is nothing to start from")
        if steps < 1:
            raise ValueError(f"steps is {steps}: there is nothing to make")
        return _generate(
            *nnx.split(self),
            jnp.asarray(samples),
            steps,
            uniforms,
            temperature,
            global_condition,
            local_condition,
        )

    def rings(self, batch: int) -> list[Array]:
        """The ring buffers before the first sample: of the input, and of every layer."""
        convs = [self.input, *(layer.filter for layer in self.layers)]
        return [conv.ring(batch, self.compute_dtype) for conv in convs]

    def step(
        self,
        sample: Array,
        rings: list[Array],
        t: Array,
        global_condition: Array | None = None,
        local: Array | None = None,
    ) -> tuple[Array, list[Array]]:
        """Sample t (B,), `local` (B, 1, L) -> logits (B, Q) of sample t + 1, and the rings."""
        window, first = self.input.window(rings[0], self.one_hot(sample[:, None]), t)
        x = self.input.step(window)
        skips = jnp.zeros((), x.dtype)  # (B, 1, S) from the first layer on
        written = [first]
        for layer, ring in zip(self.layers, rings[1:], strict=True):
            x, skip, ring = layer.step(x, ring, t, global_condition, local)
            skips = skips + skip
            written.append(ring)
        return self.head(skips)[:, 0], written

    def head(self, skips: Array) -> Array:
        """The sum of all skip connections (B, T, S) -> logits (B, T, Q)."""
        x = self.output1(jax.nn.relu(skips))
        return self.output2(jax.nn.relu(x))

    def one_hot(self, samples: Array) -> Array:
        """(B, T) integers -> (B, T, Q)."""
        return jax.nn.one_hot(samples, self.config.classes, dtype=self.compute_dtype)

    @property
    def compute_dtype(self) -> DTypeLike:
        """The dtype of activations."""
        return self.input.dtype or self.input.kernel[...].dtype


@partial(jax.jit, static_argnames=("graph", "steps"))
def _generate(
    graph: nnx.GraphDef[WaveNet],
    state: nnx.State,
    samples: Array,
    steps: int,
    uniforms: Array | None,
    temperature: float,
    global_condition: Array | None,
    local_condition: Array | None,
) -> Array:
    model = nnx.merge(graph, state)
    prompt = samples.shape[1]
    length = prompt + steps - 1
    # Inputs of all steps, time first: step t is followed by sample t + 1 of the prompt, then by
    # samples that are chosen.
    following = jnp.pad(samples[:, 1:], ((0, 0), (0, steps))).T  # (length, B)
    if uniforms is not None:
        uniforms = jnp.pad(uniforms.T, ((prompt - 1, 0), (0, 0)))  # (length, B)
    if local_condition is not None:
        local_condition = local_condition[:, :length, None].swapaxes(0, 1)  # (length, B, 1, L)

    def body(carry: tuple[Array, list[Array]], at: Any) -> tuple[Any, Array]:
        sample, rings = carry
        t, given, u, local = at
        logits, rings = model.step(sample, rings, t, global_condition, local)
        chosen = choose_token(logits, u, temperature).astype(sample.dtype)
        sample = jnp.where(t + 1 < prompt, given, chosen)
        return (sample, rings), sample

    start = samples[:, 0], model.rings(samples.shape[0])
    inputs = jnp.arange(length), following, uniforms, local_condition
    _, made = jax.lax.scan(body, start, inputs)
    return made[prompt - 1 :].T
