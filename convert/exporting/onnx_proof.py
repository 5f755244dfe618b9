"""An exported graph held against the modules that it is of: onnxruntime's outputs beside those of
torch, and of the Flax twin where there is one, at the sizes it was traced at and at others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.compare.onnx_side import onnx_rows
from convert.compare.sides import Side
from convert.compare.torch_side import TorchSide
from convert.judge.rows import Row
from convert.runtime.call import Call
from convert.runtime.onnx_session import OnnxSession
from convert.runtime.precision import full_precision
from zoo.containers.errors import NotEquivalent, UsageError

Inputs = Mapping[str, np.ndarray]


class OtherSizes(NotEquivalent):
    """The graph is right at the sizes that it was traced at, and not where these are others."""

    def __init__(self, problem: str, sizes: Mapping[str, int]) -> None:
        super().__init__(problem, "export it with fixed sizes: --static")
        self.sizes = dict(sizes)


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
    call's arrays. OtherSizes where the graph is right at the first alone."""
    session = OnnxSession(path)
    free = _values(inputs, sizes)
    found = _held(session, inputs, _told(free), *sides(inputs))
    if not free:
        return found, ["all its sizes are fixed: it was run at one"]
    arrays = larger(inputs, sizes, {n: size + 1 for n, size in free.items()})
    if not _runs(sides(arrays)[0]):  # sizes that go together
        arrays = larger(inputs, sizes, {n: 2 * size for n, size in free.items()})
    if not _runs(sides(arrays)[0]):
        return found, ["the module runs at no other sizes that were tried: it was run at one"]
    problem, more = _problem(session, arrays, _told(_values(arrays, sizes)), sides)
    if problem and all(h.row.same for h in found):
        baked = {n: size for n, size in free.items() if _baked(session, inputs, sizes, n, sides)}
        raise OtherSizes(problem, baked or free)
    return [*found, *more], []


def _problem(
    session: OnnxSession,
    arrays: Inputs,
    at: str,
    sides: Callable[[Inputs], tuple[TorchSide, Side | None]],
) -> tuple[str, list[Held]]:
    """What is wrong at these sizes, "" if nothing; and the rows."""
    try:
        rows = _held(session, arrays, at, *sides(arrays))
    except UsageError as e:
        why = e.problem.rpartition("] : ")[2][:200]
        return f"the graph does not run at {at}: {why}", []
    same = all(h.row.same for h in rows)
    return ("" if same else f"the graph computes something else at {at}"), rows


def _baked(
    session: OnnxSession,
    inputs: Inputs,
    sizes: Mapping[str, tuple[str | int, ...]],
    name: str,
    sides: Callable[[Inputs], tuple[TorchSide, Side | None]],
) -> bool:
    """Whether the graph is wrong where this one size is another, and the module runs."""
    arrays = larger(inputs, sizes, {name: _values(inputs, sizes)[name] + 1})
    return _runs(sides(arrays)[0]) and bool(_problem(session, arrays, name, sides)[0])


def _runs(torch: TorchSide) -> bool:
    try:
        with full_precision():
            torch.run("float32", backward=False)
    except Exception:  # whatever the module says of such sizes
        return False
    return True


def _held(
    session: OnnxSession, arrays: Inputs, at: str, torch: TorchSide, flax: Side | None
) -> list[Held]:
    return [Held(side, at, row) for side, row in onnx_rows(session, arrays, torch, flax)]


def larger(
    inputs: Inputs, sizes: Mapping[str, tuple[str | int, ...]], wanted: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """The same inputs with free sizes of these numbers: what is there, and again from its
    beginning."""
    made = dict(inputs)
    for name, dims in sizes.items():
        for axis, n in enumerate(dims):
            if n in wanted and name in made:
                size = made[name].shape[axis]
                made[name] = np.take(made[name], np.arange(wanted[str(n)]) % max(1, size), axis)
    return made


def _values(inputs: Inputs, sizes: Mapping[str, tuple[str | int, ...]]) -> dict[str, int]:
    """The free sizes of these inputs, by their names."""
    found: dict[str, int] = {}
    for name, dims in sizes.items():
        for axis, n in enumerate(dims):
            if isinstance(n, str) and n.isidentifier() and name in inputs:
                found.setdefault(n, inputs[name].shape[axis])
    return found


def _told(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {size}" for n, size in sizes.items()) or "the fixed sizes"


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
