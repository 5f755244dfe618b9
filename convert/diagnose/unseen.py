"""Where two modules part if Flax shows no layers: the first of torch's values that Flax does not
compute, in whatever order or shape, although it has all that the value is made of."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from typing import Any

import numpy as np

from convert.matching.alignment import MASKED
from convert.matching.pair import Pair
from convert.runtime.arrays import leaves, to_numpy
from convert.runtime.flax_module import flax_module
from convert.runtime.jax_values import GIVEN, Computed, computed_by
from convert.runtime.precision import torch_as_written
from convert.runtime.torch_calls import arguments, hooked
from convert.runtime.torch_module import replica

_CLOSE = 1e-6  # of the largest value: both run in float64
_FEW = 4  # elements: fewer may be the same by chance
PART = 4  # times as many numbers hold a value as a part of them

Place = tuple[str, tuple[str, str] | None]  # layer, and the layers between which its code differs


@dataclass
class _Call:
    """A call of a torch module with the tensors that it takes and gives."""

    name: str
    order: int
    parent: _Call | None
    inputs: list[Any]
    outputs: list[Any] = field(default_factory=list)
    end: int = -1


def first_unseen(pair: Pair, inside: str) -> Place | None:
    """The place, in the calls of the module `inside`; None where every value is seen, or none."""
    calls, made = _calls(pair)
    seen = seen_in(computed_by(flax_module(pair.flax, "float64"), pair.flax_call))
    ended = sorted(calls, key=lambda c: c.end)
    ancestors = _ancestors([t for t in made if seen.has(t)], made)
    right = {c.order for c in ended if any(seen.has(t) or t.grad_fn in ancestors
                                           for t in c.outputs)}  # fmt: skip
    within = [c for c in ended if not inside or c.name.startswith(f"{inside}.") or c.name == inside]
    if not any(c.order in right for c in within):
        return None
    wrong = next((c for c in within if c.order not in right and _made(c.outputs)), None)
    if wrong is None:
        return None
    lacking = _lacking(wrong, seen, ancestors)
    if not lacking:
        children = [c for c in ended if c.parent is wrong]
        return wrong.name, (children[-1].name, "the output") if children else None
    while wrong.parent and {id(t) for t in lacking} & {id(t) for t in wrong.parent.inputs}:
        wrong = wrong.parent
    around = wrong.parent.name if wrong.parent else ""
    before = [c for c in ended if c.end < wrong.order and c.order in right]
    beside = [c for c in before if c.parent is wrong.parent] or before[-1:]
    return around, (beside[-1].name if beside else "the input", wrong.name)


def seen_in(computed: Iterable[Computed]) -> SeenValues:
    """What a Flax module computes."""
    return SeenValues([c.value for c in computed if c.primitive != GIVEN])


def flax_part(
    pair: Pair, computed: Sequence[Computed], taken: Sequence[Any], size: int
) -> Computed | None:
    """Where Flax takes one of these values of torch's, and makes of it what torch does not compute;
    where there are none, what it makes of nothing and torch does not, of this size. None where it
    nowhere does."""
    _, made = _calls(pair)
    ours = SeenValues([to_numpy(t.detach()) for t in made])
    wanted = SeenValues([to_numpy(t) for t in taken])
    good: set[int] = set()
    for number in range(len(computed) - 1, -1, -1):
        x = computed[number].value
        if number in good or not is_telling(x) or ours.holds(x):
            good |= {number, *computed[number].refs}
    for number, one in enumerate(computed):
        if number in good or one.place is None or not good.issuperset(one.refs):
            continue
        if any(wanted.holds(computed[k].value) for k in one.refs) or (
            not (taken or one.refs) and one.value.size == size
        ):
            return one
    return None


def _calls(pair: Pair) -> tuple[list[_Call], list[Any]]:
    """One run of torch in float64, with what its values are made of: the calls of modules, and
    every value that an operation gives."""
    import torch
    from torch.overrides import TorchFunctionMode

    module = replica(pair.torch, "float64")
    for p in module.parameters():
        p.requires_grad_(p.is_floating_point())
    calls: list[_Call] = []
    stack: list[_Call] = []
    count = 0

    def enter(name: str, part: Any, args: Any, kwargs: Any) -> Any:
        nonlocal count
        count += 1
        given = [x for x in leaves((args, kwargs)).values() if isinstance(x, torch.Tensor)]
        stack.append(_Call(name, count, stack[-1] if stack else None, given))
        calls.append(stack[-1])
        return args, kwargs

    def leave(name: str, part: Any, output: Any) -> Any:
        nonlocal count
        count += 1
        done = stack.pop()
        done.outputs = [x for x in leaves(output).values() if isinstance(x, torch.Tensor)]
        done.end = count
        return output

    made: list[Any] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = f(*args, **(kwargs or {}))
            made.extend(x for x in leaves(output).values() if isinstance(x, torch.Tensor))
            return output

    args, kwargs = arguments(pair.call, "float64")
    with torch_as_written(), torch.enable_grad(), hooked(module, enter, leave), Watch():
        module(*args, **kwargs)
    return calls, _made(made)


def _made(tensors: Iterable[Any]) -> list[Any]:
    """Those that are computed from parameters, and large enough to be told."""
    return [t for t in tensors if t.grad_fn is not None and t.numel() >= _FEW]


def _lacking(call: _Call, seen: SeenValues, ancestors: set[Any]) -> list[Any]:
    """Inputs that Flax has not computed, or not in an order that is one of its axes."""
    given = _made(call.inputs)
    lacking = [t for t in given if not seen.has(t) and t.grad_fn not in ancestors]
    return lacking or [t for t in given if not seen.as_it_lies(t)]


def _ancestors(tensors: Iterable[Any], every: Iterable[Any]) -> set[Any]:
    """All that these tensors are made of, as nodes of torch's graph; what they are made of by one
    of its parts only where all its parts lead to them. `every` are the tensors of the run."""
    open_ = [t.grad_fn for t in every if t.grad_fn is not None]
    users: dict[Any, list[Any]] = {node: [] for node in open_}
    while open_:
        node = open_.pop()
        for n, _ in node.next_functions:
            if n is not None:
                if n not in users:
                    users[n] = []
                    open_.append(n)
                users[n].append(node)
    found = {t.grad_fn for t in tensors if t.grad_fn is not None}
    for node in TopologicalSorter(users).static_order():  # each after all that take it
        whole = [u for u in users[node] if not u.name().startswith(_PARTIAL)]
        parts = [u for u in users[node] if u.name().startswith(_PARTIAL)]
        if any(u in found for u in whole) or (parts and all(u in found for u in parts)):
            found.add(node)
    return found


_PARTIAL = ("Select", "Slice", "Split", "Unbind", "Narrow", "IndexSelect", "IndexBackward")


class SeenValues:
    """Flax's values, found again whatever their order and shape."""

    def __init__(self, values: list[np.ndarray]) -> None:
        self._by_size: dict[int, list[np.ndarray]] = {}
        for x in map(_cut, values):
            self._by_size.setdefault(x.size, []).append(x.ravel())
        self._ordered: dict[int, list[np.ndarray]] = {}
        self._known: dict[int, bool] = {}
        self._kept: list[Any] = []  # so that no identity is used twice

    def has(self, tensor: Any) -> bool:
        """Whether Flax computes this value, alone or as a part of one (a packed sequence)."""
        if id(tensor) not in self._known:
            self._kept.append(tensor)
            self._known[id(tensor)] = self.holds(to_numpy(tensor))
        return self._known[id(tensor)]

    def as_it_lies(self, tensor: Any) -> bool:
        """Whether Flax has the same with its axes in some order, or holds it as a part."""
        x = _cut(to_numpy(tensor))
        held = self._by_size.get(x.size, ())
        turned = (x.transpose(axes).ravel() for axes in itertools.permutations(range(x.ndim)))
        return not held or any(np.abs(t - y).max() <= _near(x) for t in turned for y in held)

    def holds(self, x: np.ndarray) -> bool:
        """As `has`, of an array."""
        if not is_telling(x):
            return False
        x = _cut(x)
        ordered, near = np.sort(x, None), _near(x)
        if any(np.abs(ordered - y).max() <= near for y in self._sorted(x.size)):
            return True
        larger = (n for n in self._by_size if x.size < n <= PART * x.size)
        return any(is_within(ordered, y, near) for n in larger for y in self._sorted(n))

    def _sorted(self, size: int) -> list[np.ndarray]:
        if size not in self._ordered:
            self._ordered[size] = [np.sort(x) for x in self._by_size.get(size, ())]
        return self._ordered[size]


def is_telling(x: np.ndarray) -> bool:
    """Whether an array is such that its absence says anything."""
    return x.dtype.kind == "f" and x.size >= _FEW and bool(np.ptp(x) > 0)


def _cut(x: np.ndarray) -> np.ndarray:
    """The values with those of masked logits, whatever their size, at one."""
    return np.maximum(x, MASKED) if x.dtype.kind == "f" and (x < MASKED).any() else x


def _near(x: np.ndarray) -> float:
    """How far apart equal values may be: of the largest, what is masked left out."""
    return _CLOSE * float(np.abs(x).max(initial=0.0, where=x > MASKED))


def is_within(x: np.ndarray, y: np.ndarray, near: float) -> bool:
    """Whether every value of `x` is one of `y`; both in order."""
    at = np.searchsorted(y, x).clip(1, y.size - 1)
    return bool((np.minimum(np.abs(y[at] - x), np.abs(y[at - 1] - x)) <= near).all())
