"""WaveNet in Flax NNX: the twin of model_torch.py, class by class.

B sequences of T samples, Q classes of a sample, R residual channels, D channels of the filter and
of the gate, S skip channels; G channels of a global condition and L of a local one.
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
        return jnp.tanh(filter) * jax.nn.sigmoid(gate)


class WaveNetLayer(nnx.Module):
    """A dilated convolution and its gate, with residual and skip connections (figure 4).

    The last layer has no `residual`: nothing would come after it.
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
        self, x: Array, skips: Array, global_condition: Array | None, local: Array | None
    ) -> tuple[Array, Array]:
        """x (B, T, R) for the next layer, and `skips` (B, T, S) with this layer's added to it.

        Conditions are (B, G) and (B, T, L).
        """
        f, g = self.filter(x), self.gate(x)
        return self.connect(x, skips, f, g, global_condition, local)

    def step(
        self,
        x: Array,
        skips: Array,
        ring: Array,
        t: Array,
        global_condition: Array | None,
        local: Array | None,
    ) -> tuple[Array, Array, Array]:
        """The same for step t alone, x (B, 1, R); and the ring with that step in it."""
        window, ring = self.filter.window(ring, x, t)
        f, g = self.filter.step(window), self.gate.step(window)
        return *self.connect(x, skips, f, g, global_condition, local), ring

    def connect(
        self,
        x: Array,
        skips: Array,
        f: Array,
        g: Array,
        global_condition: Array | None,
        local: Array | None,
    ) -> tuple[Array, Array]:
        """What follows the dilated convolutions. No step looks at another one here."""
        if global_condition is not None:  # section 2.5
            f = f + self.filter_global(global_condition)[:, None]
            g = g + self.gate_global(global_condition)[:, None]
        if local is not None:
            f = f + self.filter_local(local)
            g = g + self.gate_local(local)
        z = self.unit(f, g)
        if self.residual is not None:
            x = x + self.residual(z)
        return x, skips + self.skip(z)


class WaveNet(nnx.Module):
    """Logits of the next sample's class, from all samples up to the present one."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.config = c
        last = c.layers - 1
        self.input = CausalConv1d(c.classes, c.residual_channels, c.kernel_size, **kw)
        self.layers = nnx.List(
            [WaveNetLayer(c, dilation, i == last, **kw) for i, dilation in enumerate(c.dilations)]
        )
        self.output1 = CausalConv1d(c.skip_channels, c.skip_channels, 1, **kw)
        self.output2 = CausalConv1d(c.skip_channels, c.classes, 1, **kw)

    def __call__(
        self,
        samples: Array,
        global_condition: Array | None = None,
        local_condition: Array | None = None,
    ) -> Array:
        """samples (B, T), integers in [0, Q) -> logits (B, T, Q); at t they are of sample t + 1.

        `global_condition` (B, G); `local_condition` (B, T, L), at t what sample t + 1 depends on.
        """
        self.check(global_condition, local_condition)
        x = self.input(self.one_hot(samples))
        skips = jnp.zeros((), x.dtype)  # the first layer makes it (B, T, S)
        for layer in self.layers:
            x, skips = layer(x, skips, global_condition, local_condition)
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

        The likeliest each time, or, with `uniforms` (B, steps) in [0, 1), drawn by them from the
        softmax of logits / temperature. Every convolution keeps its past inputs in a ring, so a
        step costs the same however many came before. `local_condition` (B, P + steps - 1, L).

        One compiled scan; another P or `steps` compiles anew.
        """
        self.check(global_condition, local_condition)
        if samples.shape[1] < 1 or steps < 1:
            raise ValueError("there is nothing to start from, or nothing to make")
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
        """The state before the first sample: the past of the input and of every layer."""
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
        """Sample t (B,), local condition (B, 1, L) -> logits (B, Q) of the next; the rings."""
        window, first = self.input.window(rings[0], self.one_hot(sample[:, None]), t)
        x = self.input.step(window)
        skips = jnp.zeros((), x.dtype)  # the first layer makes it (B, T, S)
        after = [first]
        for layer, ring in zip(self.layers, rings[1:], strict=True):
            x, skips, ring = layer.step(x, skips, ring, t, global_condition, local)
            after.append(ring)
        return self.head(skips)[:, 0], after

    def head(self, skips: Array) -> Array:
        """The sum of all skip connections (B, T, S) -> logits (B, T, Q)."""
        x = self.output1(jax.nn.relu(skips))
        return self.output2(jax.nn.relu(x))

    def one_hot(self, samples: Array) -> Array:
        """(B, T) integers -> (B, T, Q)."""
        return jax.nn.one_hot(samples, self.config.classes, dtype=self.compute_dtype)

    @property
    def compute_dtype(self) -> DTypeLike:
        """What activations are in."""
        return self.input.dtype or self.input.kernel[...].dtype

    def check(self, global_condition: Array | None, local_condition: Array | None) -> None:
        """Raises ValueError unless the conditions given are those that the config asks for."""
        self.config.check(global_condition is not None, local_condition is not None)


@partial(jax.jit, static_argnums=(0, 3))
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
    # What comes after step t: a sample of the prompt (t + 1 < prompt), or one that is chosen.
    given = jnp.pad(samples[:, 1:], ((0, 0), (0, steps))).T
    drawn = None if uniforms is None else jnp.pad(uniforms.T, ((prompt - 1, 0), (0, 0)))
    local = None if local_condition is None else local_condition[:, :length].swapaxes(0, 1)

    def body(carry: tuple[Array, list[Array]], at: Any) -> tuple[Any, Array]:
        sample, rings = carry
        t, following, u, y = at
        y = None if y is None else y[:, None]
        logits, rings = model.step(sample, rings, t, global_condition, y)
        chosen = choose_token(logits, u, temperature).astype(sample.dtype)
        sample = jnp.where(t + 1 < prompt, following, chosen)
        return (sample, rings), sample

    first = samples[:, 0], model.rings(samples.shape[0])
    _, made = jax.lax.scan(body, first, (jnp.arange(length), given, drawn, local))
    return made[prompt - 1 :].T
