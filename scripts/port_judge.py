"""Whether a live module is the torch module that it was made of: apart from `to_flax`'s own proof.

torch's outputs in float64 against Flax's under jit: at two other sizes than `to_flax` traced, or at
those and one other, within 1e-10 of the scale. What misses that, as it computes in float32 by
itself, is held against 8 times torch's own gap between the precisions, or what it gives when each
of its weights is moved by a rounding. Weights must come back bit for bit.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

CLOSE = 1e-10
Inputs = tuple[Any, ...] | dict[str, Any]


def judged(
    module: Any, given: Inputs, others: Sequence[Inputs], once: bool = False
) -> dict[str, Any]:
    """What becomes of a torch module in eval mode, in float32. `others` are inputs of other sizes;
    those that torch itself does not run are left out. `once`: the first of them is enough."""
    import torch

    import convert
    from zoo.containers.errors import ZooError

    single = copy.deepcopy(module)
    exact = runs(module.double(), doubled(given))
    if not exact:  # code that states float32 somewhere: what moves with a rounding is the noise
        module, single = copy.deepcopy(single), copy.deepcopy(single)
    wide = doubled if exact else same
    moved_in_torch = [single] if exact else [shaken(single, seed) for seed in range(3)]
    try:
        net = convert.to_flax(module, wide(given), verify=False)
    except ZooError as e:
        return {"outcome": "refused", "why": e.problem, "details": list(e.details)[:12]}
    gaps: list[float] = []
    sizes = 0
    enough = 1 if once else 2
    for plain in others[:enough] if len(others) >= enough else (given, *others):
        some = wide(plain)
        try:
            with torch.no_grad():
                ours = arrays(called(module, some))
                moved = [arrays(called(m, plain)) for m in moved_in_torch]
                noise = [
                    np.max([np.abs(a - b) for b in found], axis=0)
                    for a, *found in zip(ours, *moved, strict=True)
                ]
        except Exception as e:  # torch itself does not run at this size
            print(f"torch: {type(e).__name__}: {e}"[:300], file=sys.stderr)
            continue
        try:
            theirs = run(net, some)
        except ZooError as e:
            where = "at the traced sizes" if plain is given else "at other sizes"
            told = {"outcome": f"refused {where}", "why": e.problem}
            return told | {"details": list(e.details)[:12]}
        if len(ours) != len(theirs) or any(
            a.shape != b.shape for a, b in zip(ours, theirs, strict=True)
        ):
            shapes = [x.shape for x in ours], [x.shape for x in theirs]
            return {"outcome": "wrong", "why": f"shapes {shapes[1]}, torch's are {shapes[0]}"}
        for a, b, n in zip(ours, theirs, noise, strict=True):
            gap = apart(a, b)
            gaps.append(gap)
            scale = max(1e-30, float(np.abs(finite(a)).max(initial=0)))
            allowed = 8 * max(float(finite(n).max(initial=0)) / scale, 2.0**-23)
            if not gap <= max(CLOSE, allowed):
                return unlike(module, wide(given), f"{gap:.2g} of the scale")
        sizes += 1
    back = convert.to_state_dict(net)
    if any(not torch.equal(v, back[n]) for n, v in module.state_dict().items()):
        return {"outcome": "wrong", "why": "weights come back otherwise"}
    worst = max(gaps, default=0.0)
    outcome = "right" if exact and worst <= CLOSE else "right, in float32"
    return {"outcome": outcome, "worst": worst, "sizes": sizes}


def unlike(module: Any, given: Inputs, gap: str) -> dict[str, Any]:
    """The row of a live module that is not torch's: refused, where `to_flax`'s own proof says so to
    whoever does not turn it off."""
    import convert
    from zoo.containers.errors import NotEquivalent

    try:
        convert.to_flax(module, given)
    except NotEquivalent as e:
        return {"outcome": "refused", "why": f"by its proof, {gap}", "details": [e.advice]}
    return {"outcome": "wrong", "why": gap}


def other_sizes(module: Any, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Inputs of at most two other sizes that torch runs: another batch, and other images, lengths
    and numbers of frames."""
    import torch

    tensors = {n: x for n, x in given.items() if isinstance(x, torch.Tensor)}
    batch = {n: {0: x.shape[0] + 1} for n, x in tensors.items()}
    steps = ((32, 32), (16, 16), (8, 8), (7, 7), (5, 5), (64, 64))
    found = 0
    for step in steps:
        moved = {
            n: {a: x.shape[a] + step[0] for a in range(1 if x.ndim < 4 else x.ndim - 2, x.ndim)}
            for n, x in tensors.items()
        }
        made = given | {n: resized(x, batch[n] | moved[n]) for n, x in tensors.items()}
        if runs(module, made):
            yield made
            found = 1
            break
    made = given | {n: resized(x, batch[n]) for n, x in tensors.items()}
    if runs(module, made):
        yield made
    elif not found:
        print("torch runs at no other size", file=sys.stderr)


def resized(x: Any, sizes: dict[int, int]) -> Any:
    """The tensor with other sizes: its rows are repeated, or cut."""
    import torch

    for axis, size in sizes.items():
        x = x.index_select(axis, torch.arange(size) % x.shape[axis])
    return x


def runs(module: Any, inputs: Inputs) -> bool:
    """Whether torch runs it."""
    import torch

    try:
        with torch.no_grad():
            called(module, inputs)
    except Exception:  # whatever a model raises that these sizes do not suit
        return False
    return True


def same(inputs: Inputs) -> Inputs:
    """The inputs as they are."""
    return inputs


def shaken(module: Any, seed: int, by: float = 2.0**-23) -> Any:
    """The module with each of its numbers moved by a rounding, of float32 unless told otherwise, up
    or down."""
    import torch

    other, generator = copy.deepcopy(module), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in (*other.parameters(), *other.buffers()):
            if x.is_floating_point():
                signs = torch.randint(0, 2, x.shape, generator=generator).mul_(2).sub_(1)
                x.mul_(1 + signs.to(x.dtype) * by)
    return other


def each(inputs: Inputs, change: Callable[[Any], Any]) -> Inputs:
    """The inputs with every tensor changed."""

    def one(x: Any) -> Any:
        return change(x) if hasattr(x, "is_floating_point") else x

    if isinstance(inputs, dict):
        return {name: one(x) for name, x in inputs.items()}
    return tuple(map(one, inputs))


def doubled(inputs: Inputs) -> Inputs:
    """The inputs in float64."""
    return each(inputs, lambda x: x.double() if x.is_floating_point() else x)


def called(module: Any, inputs: Inputs) -> Any:
    """The module of the inputs, of which it gets copies: some write into them."""
    own = each(inputs, lambda x: x.clone())
    return module(**own) if isinstance(own, dict) else module(*own)


def arrays(tree: Any) -> list[np.ndarray]:
    """Every number that torch gives, as float64: tensors, and sizes among them."""
    import torch

    def one(x: Any) -> np.ndarray:
        if not isinstance(x, torch.Tensor):
            return np.asarray(x)
        return x.detach().to_dense().numpy() if x.is_sparse else x.detach().numpy()

    flat, _ = torch.utils._pytree.tree_flatten(tree)
    return [_wide(one(x)) for x in flat if isinstance(x, torch.Tensor | int | float)]


def run(net: Any, inputs: Inputs) -> list[np.ndarray]:
    """Every number that Flax gives under jit, as float64."""
    import jax
    from flax import nnx

    def given(x: Any) -> Any:
        return x.numpy() if hasattr(x, "numpy") else x

    names = list(inputs) if isinstance(inputs, dict) else list(range(len(inputs)))
    values = [given(inputs[n]) for n in names]  # type: ignore[index]
    moving = [i for i, x in enumerate(values) if isinstance(x, np.ndarray)]

    def apply(net: Any, held: list[Any]) -> Any:
        every = list(values)
        for i, x in zip(moving, held, strict=True):
            every[i] = x
        if isinstance(inputs, dict):
            return net(**dict(zip(names, every, strict=True)))
        return net(*every)

    made = nnx.jit(apply)(net, [values[i] for i in moving])
    return [_wide(np.asarray(x)) for x in jax.tree.leaves(made) if hasattr(x, "dtype")]


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """How far two arrays are apart, of the scale of the first; inf where one is not finite and the
    other is, or they are other infinities."""
    odd = ~(np.isfinite(a) & np.isfinite(b))
    if not np.array_equal(a[odd], b[odd], equal_nan=True):
        return float("inf")
    scale = max(1e-30, float(np.abs(finite(a)).max(initial=0)))
    return float(np.abs(finite(a) - finite(b)).max(initial=0)) / scale


def finite(x: np.ndarray) -> np.ndarray:
    """The array with 0 for what is not finite."""
    return np.where(np.isfinite(x), x, 0)


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)
