"""A torch module as we run it: a copy in a precision, its state, what it computes in."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from convert.runtime.arrays import dtype_in, is_inexact
from convert.runtime.call import Call
from convert.runtime.torch_recurrent import is_single
from zoo.containers.errors import UsageError


def replica(module: Any, precision: str) -> Any:
    """A copy of the module whose floating-point tensors are of `precision`."""
    import torch

    dtype = getattr(torch, precision)
    try:
        made = copy.deepcopy(module)
    except Exception as e:
        raise UsageError(
            f"the torch module cannot be copied: {type(e).__name__}: {e}",
            "give one that copy.deepcopy takes; the module itself is never changed",
        ) from e
    # Module.to would drop the imaginary part of what is complex, with a warning only.
    made._apply(lambda t: t.to(getattr(torch, dtype_in(t, precision))) if is_inexact(t) else t)
    for part in made.modules():  # the zoo's layers say what they compute in
        if vars(part).get("dtype") in (torch.float32, torch.float64):
            part.dtype = dtype
    return made


def unwrapped(module: Any) -> Any:
    """The user's own module, of one that torch.compile or a parallel wrapper holds."""
    while (inner := _WRAPPERS.get(type(module).__name__)) and hasattr(module, inner):
        module = getattr(module, inner)
    return module


_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
}


def uncompiled(name: str) -> str:
    """A tensor's or module's name without the `_orig_mod` that torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def shake(module: Any, seed: int, rough: Collection[str] = ()) -> None:
    """Move every value of the module's state by at most one unit in the last place, each seed
    otherwise; those of `rough` by units of float32."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in [*module.named_parameters(), *module.named_buffers()]:
            x = t.detach()
            if name in rough and is_inexact(t):
                x = x.to(getattr(torch, dtype_in(t, "float32")))
            t.copy_(shaken(x, generator))


def move(tensors: Iterable[Any], generator: Any) -> None:
    """Move every value by at most one unit in the last place."""
    import torch

    with torch.no_grad():
        for t in tensors:
            t.copy_(shaken(t.detach(), generator))


def beside(x: Any, generator: Any) -> Any:
    """`shaken`, and by gradients still x."""
    import torch

    moved = shaken(x.detach(), generator) - x.detach()
    return x + torch.where(torch.isfinite(moved), moved, 0)


def shaken(x: Any, generator: Any) -> Any:
    """Every element up, down, or left where it is, by one unit in the last place; 0 and what is
    not finite are left."""
    import torch

    if x.is_complex():
        return torch.view_as_complex(shaken(torch.view_as_real(x), generator))
    if not x.is_floating_point():
        return x
    way = torch.randint(-1, 2, x.shape, generator=generator).to(x.device)
    away = torch.nextafter(x, torch.where(way > 0, torch.inf, -torch.inf).to(x))
    return torch.where((way == 0) | (x == 0) | ~torch.isfinite(x), x, away)


def state(module: Any) -> dict[str, Any]:
    """Parameters and buffers, ties and what is not saved included; without the second names that
    single layers of a recurrent stack have."""
    every = dict(module.named_parameters(remove_duplicate=False))
    every |= dict(module.named_buffers(remove_duplicate=False))
    single = [n for n, part in module.named_modules() if is_single(part)]
    return {n: t for n, t in every.items() if n.rpartition(".")[0] not in single}


def computed(module: Any) -> set[str]:
    """Buffers that are not in the state_dict: the module's own code makes them."""
    return {
        f"{path}.{n}" if path else n
        for path, part in module.named_modules()
        for n in part._non_persistent_buffers_set
    }


def norms(module: Any) -> Iterator[Any]:
    """Layers that keep running statistics, and modules that call them otherwise in training: in
    training mode the others would only drop."""
    for part in module.modules():
        if getattr(part, "running_mean", None) is not None:
            yield part
        elif any(getattr(p, "running_mean", None) is not None for p in part.children()):
            drops = any("Drop" in type(p).__name__ for p in part.modules())
            if not drops and _asks_for_training(type(part).forward):
                yield part


def train_norms(module: Any) -> list[Any]:
    """Put into train mode the norms, and nothing else, that `module.train()` puts into it: some
    modules keep theirs frozen. `module` is a copy; gives those norms."""
    modes = [(part, part.training) for part in module.modules()]
    module.train()
    every = list(norms(module))
    trained = [part for part in every if part.training]
    for part, mode in modes:
        part.training = mode
    for part in trained:
        part.train()
    for part in every:
        if not any(part is other for other in trained):
            part.eval()
    return trained


def _asks_for_training(forward: Any) -> bool:
    """Whether a function's code asks for the mode, other than to drop."""
    try:
        text = inspect.getsource(forward)
    except (OSError, TypeError):
        return False
    return "self.training" in text and "drop" not in text


def narrow_operation(module: Any, call: Call) -> str | None:
    """An operation that computes in fewer than 64 bits though `module` is in float64, if there is
    one. Runs the module once, on the call as it is."""
    import torch

    found: list[str] = []
    with torch.no_grad(), narrow_watch(found.append):
        module(*call.args, **call.kwargs)
    return found[0] if found else None


def narrow_watch(tell: Callable[[str], None]) -> Any:
    """A context in which every operation of torch that gives fewer than 64 bits is told."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            made = func(*args, **(kwargs or {}))
            for x in made if isinstance(made, tuple | list) else (made,):
                if not isinstance(x, torch.Tensor) or not is_inexact(x):
                    continue
                if x.dtype not in (torch.float64, torch.complex128):
                    name = str(func).removeprefix("aten.").partition(".")[0]
                    tell(f"{name} in {str(x.dtype).removeprefix('torch.')}")
            return made

    return Watch()  # type: ignore[no-untyped-call]
