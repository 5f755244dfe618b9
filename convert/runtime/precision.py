"""The state of both frameworks in which values are compared: no TF32, no fused short cuts, and
float64 that really is float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from zoo.containers.errors import MissingExtra


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Both frameworks without TF32, bfloat16 or autocast, and everything as it was afterwards:
    precision, random state, default dtype. MissingExtra where one of them is not installed."""
    try:
        import torch
    except ImportError:
        raise MissingExtra("running the models", "torch") from None
    try:
        import jax
    except ImportError:
        raise MissingExtra("running the models", "flax") from None
    dtype = torch.get_default_dtype()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch_as_written())
            stack.enter_context(torch.random.fork_rng(devices))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for kind in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
                stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(jax.default_matmul_precision("highest"))
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextlib.contextmanager
def precision_of(name: str) -> Iterator[None]:
    """float32 as people run it; float64 with what makes it really float64: the default dtype of
    torch, and JAX's 64 bits."""
    import torch

    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(getattr(torch, name))
        with jax_precision(name):
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def jax_precision(name: str) -> Iterator[None]:
    """JAX with 64 bits where they are asked for, and its most precise matrix products."""
    import jax

    with jax.enable_x64(name == "float64"), jax.default_matmul_precision("highest"):
        yield


@contextlib.contextmanager
def torch_as_written() -> Iterator[None]:
    """Without torch's fused encoder layers, which bypass their submodules, without TF32, and with
    a hard sigmoid whose gradient is float64's in float64."""
    import torch

    fused = torch.backends.mha.get_fastpath_enabled()
    matmul = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        with _exact_sigmoids():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def _exact_sigmoids() -> Any:
    """torch's backward pass of hardsigmoid takes 1/6 in float32, whatever it is given."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Exact(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = getattr(function, "__name__", "")
            if name.rstrip("_") == "hardsigmoid" and args and args[0].dtype == torch.float64:
                made = torch.nn.functional.relu6(args[0] + 3) / 6
                inplace = name.endswith("_") or (kwargs or {}).get("inplace", False)
                return args[0].copy_(made) if inplace else made
            return function(*args, **(kwargs or {}))

    return Exact()


def wide_attributes(layer: Any) -> dict[str, Any]:
    """What a Flax layer says it computes in and holds, where that is 32 or 64 bits."""
    return {n: d for n, d in dtype_attributes(layer).items() if d in (np.float32, np.float64)}


def dtype_attributes(layer: Any) -> dict[str, np.dtype]:
    """What a Flax layer says it computes in and holds, where it says so."""
    found = {}
    for name in ("dtype", "param_dtype"):
        value = vars(layer).get(name)
        with contextlib.suppress(TypeError):
            if value is not None:
                found[name] = np.dtype(value)
    return found
