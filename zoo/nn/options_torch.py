"""The keyword arguments that every torch layer and model of the zoo takes and passes on."""

from __future__ import annotations

from typing import TypedDict

import torch


class Options(TypedDict, total=False):
    """`def __init__(self, ..., **kw: Unpack[Options])`."""

    dtype: torch.dtype | None  # of the computation; None: what inputs and parameters promote to
    param_dtype: torch.dtype  # of the parameters
