"""torch layers that compute in one dtype and keep their parameters in another, as NNX's can.

`dtype` is what inputs and parameters are cast to before the computation; None promotes them to
their common dtype. `param_dtype` is the dtype of the parameters themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def promote(dtype: torch.dtype | None, *tensors: Tensor) -> list[Tensor]:
    """All tensors cast to `dtype`; None: to the dtype that they promote to together."""
    if dtype is None:
        dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
    return [t.to(dtype) for t in tensors]


class Linear(nn.Linear):
    """nn.Linear with `dtype` and `param_dtype`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: torch.dtype | None = None,
        param_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(in_features, out_features, bias, dtype=param_dtype)
        self.dtype = dtype

    def forward(self, input: Tensor) -> Tensor:
        if self.bias is None:
            return F.linear(*promote(self.dtype, input, self.weight))
        return F.linear(*promote(self.dtype, input, self.weight, self.bias))


class Embedding(nn.Embedding):
    """nn.Embedding with `dtype` and `param_dtype`; row `padding_idx` gets no gradient."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        param_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, dtype=param_dtype)
        self.dtype = dtype

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(self.dtype or self.weight.dtype)

    def attend(self, query: Tensor) -> Tensor:
        """query (..., dim) against every row: (..., rows), as nnx.Embed.attend."""
        return F.linear(*promote(self.dtype, query, self.weight))


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm with `dtype` and `param_dtype`; `eps` has no default."""

    def __init__(
        self,
        dim: int | tuple[int, ...],
        eps: float,
        *,
        dtype: torch.dtype | None = None,
        param_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(dim if isinstance(dim, int) else list(dim), eps, dtype=param_dtype)
        self.dtype = dtype

    def forward(self, input: Tensor) -> Tensor:
        x, weight, bias = promote(self.dtype, input, self.weight, self.bias)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
