"""AlexNet in Flax NNX: the twin of model_torch.py, layer by layer.

B images, H x W pixels in each, C channels, which come last.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import nnx
from jax import Array
from jax.nn import relu

from zoo.models.alexnet.config import Config
from zoo.nn.conv_flax import Conv2d
from zoo.nn.pool_flax import adaptive_avg_pool2d, flatten, max_pool2d
from zoo.nn.taps import Taps

max_pool = partial(max_pool2d, kernel_size=3, stride=2)


class AlexNet(nnx.Module):
    """`dtype` is that of the computation, `param_dtype` of the weights; `rngs` is required, as
    everywhere in NNX."""

    def __init__(self, c: Config, **kw: Any) -> None:
        C = c.channels
        self.features = nnx.List[Callable[[Array], Array]](
            [
                Conv2d(3, C[0], 11, stride=4, padding=2, **kw),
                relu,
                max_pool,
                Conv2d(C[0], C[1], 5, padding=2, **kw),
                relu,
                max_pool,
                Conv2d(C[1], C[2], 3, padding=1, **kw),
                relu,
                Conv2d(C[2], C[3], 3, padding=1, **kw),
                relu,
                Conv2d(C[3], C[4], 3, padding=1, **kw),
                relu,
                max_pool,
            ]
        )
        self.classifier = nnx.List[Callable[[Array], Array]](
            [
                nnx.Dropout(c.dropout, rngs=kw["rngs"]),
                nnx.Linear(C[4] * 6 * 6, c.hidden_size, **kw),
                relu,
                nnx.Dropout(c.dropout, rngs=kw["rngs"]),
                nnx.Linear(c.hidden_size, c.hidden_size, **kw),
                relu,
                nnx.Linear(c.hidden_size, c.num_classes, **kw),
            ]
        )

    def __call__(self, x: Array, taps: bool = False) -> Any:
        """(B, H, W, 3) of 63 pixels or more -> logits (B, num_classes).

        `taps=True` adds {module path: what it gives}.
        """
        tap = Taps(taps)
        for i, layer in enumerate(self.features):
            x = tap(f"features.{i}", layer(x))
        x = flatten(tap("avgpool", adaptive_avg_pool2d(x, (6, 6))))
        for i, layer in enumerate(self.classifier):
            x = tap(f"classifier.{i}", layer(x))
        return tap.result(x)
