"""An exported graph held against the modules that it is of: onnxruntime's outputs beside those of
torch, and of the Flax twin where there is one, at the sizes it was traced at and at others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.compare.sides import Side
from convert.compare.torch_side import TorchSide
from convert.judge.noise import Arrays, Noise, judge
from convert.judge.rows import Row
from convert.runtime.call import Call
from convert.runtime.onnx_session import OnnxSession
from convert.runtime.precision import full_precision
from zoo.containers.errors import NotEquivalent, UsageError

Inputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Held:
    """One output of the file beside one side's: the row, whose side it is, and the sizes."""

    side: str  # "torch" or "flax"
    sizes: str  # "batch 2, x_2 64"
    row: Row


def hold(
    path: Path,
    inputs: Inputs,
    sizes: Mapping[str, tuple[str | int, ...]],
    sides: Callable[[Inputs], tuple[TorchSide, Side | None]],
) -> tuple[list[Held], list[str]]:
    """Every output at two sizes, and what a user should know. `sides` gives the modules for a
    call's arrays."""
    session = OnnxSession(path)
    found = list(_held(session, inputs, _sizes(inputs, sizes), *sides(inputs)))
    if not any(isinstance(n, str) for dims in sizes.values() for n in dims):
        return found, ["all its sizes are fixed: it was run at one"]
    for times, more in ((1, 1), (2, 0)):
        arrays = larger(inputs, sizes, times, more)
        torch, flax = sides(arrays)
        try:
            with full_precision():
                torch.run("float32", backward=False)
        except Exception:  # sizes that do not go together
            continue
        at = _sizes(arrays, sizes)
        try:
            return [*found, *_held(session, arrays, at, torch, flax)], []
        except UsageError as e:
            raise NotEquivalent(
                f"at other sizes ({at}) the graph does not run: {e.problem}",
                "export it with fixed sizes: --static",
            ) from e
    return found, ["the module runs at no other sizes that were tried: it was run at one"]


def _held(
    session: OnnxSession, arrays: Inputs, at: str, torch: TorchSide, flax: Side | None
) -> Iterator[Held]:
    narrow = {n: x.astype(np.float32) if x.dtype.kind == "f" else x for n, x in arrays.items()}
    made = {_output(n): x for n, x in session.run(narrow).items()}
    with full_precision():
        exact = {p: torch.run(p, backward=False).outputs for p in torch.precisions}
        theirs = flax.run("float32", backward=False).outputs if flax is not None else None

        @functools.cache
        def rerun(precision: str, i: int) -> Arrays:
            return torch.shaken(i).run(precision, backward=False).outputs

        noise = Noise(exact.get("float64", exact["float32"]), rerun)
        for name, rough in exact["float32"].items():
            reference = rough, exact["float64"][name] if "float64" in exact else None
            ours = made.get(name, np.zeros(0)), None
            yield Held("torch", at, noise.again(judge(name, ours, (rough, None), reference)))
            if theirs is not None:
                row = judge(name, ours, (theirs[name], None), reference)
                yield Held("flax", at, noise.again(row))


def _output(name: str) -> str:
    return name if name == "output" or name.startswith("output.") else f"output.{name}"


def larger(
    inputs: Inputs, sizes: Mapping[str, tuple[str | int, ...]], times: int, more: int
) -> dict[str, np.ndarray]:
    """The same inputs with every free size n as `times` n + `more`: what is there, and again from
    its beginning."""
    made = dict(inputs)
    for name, dims in sizes.items():
        for axis, n in enumerate(dims):
            if isinstance(n, str) and name in made:
                x = made[name]
                size = x.shape[axis]
                made[name] = np.take(x, np.arange(times * size + more) % max(1, size), axis)
    return made


def _sizes(inputs: Inputs, sizes: Mapping[str, tuple[str | int, ...]]) -> str:
    found: dict[str, int] = {}
    for name, dims in sizes.items():
        for axis, n in enumerate(dims):
            if isinstance(n, str) and name in inputs:
                found.setdefault(n, inputs[name].shape[axis])
    return ", ".join(f"{n} {size}" for n, size in found.items()) or "the fixed sizes"


def refuse(found: list[Held]) -> None:
    """NotEquivalent where any output differs, listing them."""
    wrong = [h for h in found if h.row.judged and not h.row.same]
    if wrong:
        first = wrong[0]
        raise NotEquivalent(
            f"the graph computes something else than {first.side}, first in {first.row.name}",
            "nothing was kept; please report it, with the model",
            [
                f"{h.row.name} at {h.sizes}: {h.row.error:.3g} from {h.side}, "
                f"{h.row.ratio:.3g} times the rounding noise"
                for h in wrong[:10]
            ],
        )


def call_of(inputs: Inputs) -> Call:
    """The arrays as one call by names."""
    return Call(kwargs=dict(inputs))
