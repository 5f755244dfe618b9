"""Inputs drawn for two modules (`--inputs auto`) that let a comparison see much: ids of
the whole vocabulary, lengths that differ, masks that mask, sizes that are odd and differ.

What a parameter takes is told by its name and by the layers that the torch module has, and tried:
the torch module first, then the Flax one.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from convert.compare.blind_inputs import LENGTHS, MASK
from convert.compare.drawn_forms import Form, Ids, Sizes, choices, forms, suggested_forms
from convert.runtime.arrays import named_outputs, to_numpy
from convert.runtime.call import Call
from convert.runtime.fitting import EVALUATION
from convert.runtime.torch_calls import record
from convert.runtime.torch_module import replica
from convert.runtime.trace import Trace
from zoo.containers.errors import UsageError
from zoo.layout.kinds import torch_kind

_TRIES = 200  # calls of the torch module
_SIZES = 24  # of these for one choice of forms,
_FEWER = 6  # after the first few choices
_BATCH = 8  # at most, to have more ids
_OPTIONAL = re.compile(f"{MASK.pattern}|{LENGTHS.pattern}|^decoder_input_ids$", re.I)
_TOLD = 4  # refusals
Forms = Mapping[str, Form]  # by parameter


def draw_inputs(
    torch_module: Any, flax_module: Any, seed: int, accepts: Callable[[Call], Any]
) -> tuple[Call, list[str]]:
    """A call that both take, and what to tell of it. The same for the same `seed`.

    `accepts` raises UsageError where the Flax module refuses a call. UsageError, with what was
    tried, where there is none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _Search(torch_module, flax_module, seed, accepts).find()


class _Search:
    """What was tried, and what was said to it."""

    def __init__(
        self, torch_module: Any, flax_module: Any, seed: int, accepts: Callable[[Call], Any]
    ) -> None:
        self.title = type(torch_module).__name__
        self.torch = replica(torch_module, "float32")
        self.seed = seed
        self.accepts = accepts
        self.required, self.optional = _parameters(torch_module, flax_module)
        tables = [m for m in torch_module.modules() if torch_kind(m) == "embedding"]
        # Ids that any table takes, until it is seen which table takes them.
        self.smallest = Ids(min((m.num_embeddings for m in tables), default=2))
        self.refused: dict[str, str] = {}  # what torch was given -> what it said
        self.refused_flax: dict[str, str] = {}

    def find(self) -> tuple[Call, list[str]]:
        for chosen, sizes in itertools.islice(self._candidates(), _TRIES):
            call = self._draw(chosen, sizes, {})
            trace = self._torch(call)
            if trace is None:
                continue
            for made in (self._widened(chosen, sizes, call, trace), call):
                if made is not None and self._flax(made):
                    return made, self._told(made)
        raise self._nothing()

    def _candidates(self) -> Iterator[tuple[Forms, Sizes]]:
        """Forms for every parameter, the likeliest first; for each, sizes."""
        suggested, able = suggested_forms(self.torch), choices(self.torch)
        for names in self._names():
            likely = [forms(name, suggested) for name in names]
            for rank, picked in enumerate(_by_rank(likely)):
                chosen = dict(zip(names, picked, strict=True))
                axes = list(dict.fromkeys(a for f in picked for a in f.axes))
                tried = _by_rank([able[a] for a in axes])
                for values in itertools.islice(tried, _SIZES if rank < _FEWER else _FEWER):
                    yield chosen, Sizes(**dict(zip(axes, values, strict=True)))

    def _names(self) -> list[list[str]]:
        """Which parameters are given: with the optional masks and lengths, then with fewer."""
        counts = range(len(self.optional), -1, -1)
        groups = [c for n in counts for c in itertools.combinations(self.optional, n)]
        return [[*self.required, *group] for group in groups[:8]]

    def _draw(self, chosen: Forms, sizes: Sizes, ids: Mapping[str, Ids]) -> Call:
        made = {}
        for i, (name, form) in enumerate(chosen.items()):
            rng = np.random.default_rng([self.seed & 0xFFFFFFFF, i])
            made[name] = form.make(rng, sizes, ids.get(name, self.smallest))
        args = tuple(made.pop(name) for name in self.required)
        return Call(args, made)

    def _torch(self, call: Call) -> Trace | None:
        try:
            trace = record(self.torch, call, "float32")
        except Exception as e:
            self.refused.setdefault(self._describe(call), _line(e))
            return None
        outputs = [to_numpy(x) for x in named_outputs(trace.output).values() if hasattr(x, "dtype")]
        if not outputs or any(np.isnan(x).any() for x in outputs if x.dtype.kind in "fc"):
            self.refused.setdefault(self._describe(call), "gives NaN, or no arrays")
            return None
        return trace

    def _flax(self, call: Call) -> bool:
        try:
            self.accepts(call)
        except UsageError as e:
            self.refused_flax.setdefault(self._describe(call), e.problem)
            return False
        return True

    def _widened(self, chosen: Forms, sizes: Sizes, call: Call, trace: Trace) -> Call | None:
        """The same with ids of the whole range of the tables that take them, if torch takes it."""
        modules = dict(self.torch.named_modules())
        names = [*self.required, *call.kwargs]
        ids: dict[str, Ids] = {}
        for name, array in zip(names, (*call.args, *call.kwargs.values()), strict=True):
            takers = [
                modules[c.name]
                for c in trace.calls
                if torch_kind(modules[c.name]) == "embedding"
                and any(np.array_equal(x, array) for x in c.inputs.values())
            ]
            if takers:
                table = min(takers, key=lambda m: m.num_embeddings)
                ids[name] = Ids(table.num_embeddings, getattr(table, "padding_idx", None))
        if not ids:
            return None
        for batch in range(sizes.batch, _BATCH + 1):
            larger = dataclasses.replace(sizes, batch=batch)
            if all(x.count <= _room(chosen[name], larger) for name, x in ids.items()):
                sizes = larger
                break
        wider = self._draw(chosen, sizes, ids)
        return wider if self._torch(wider) is not None else None

    def _described(self, call: Call) -> list[str]:
        names = [*self.required, *call.kwargs]
        arrays = (*call.args, *call.kwargs.values())
        return [f"{n} {_about(x)}" for n, x in zip(names, arrays, strict=True)]

    def _describe(self, call: Call) -> str:
        return "; ".join(self._described(call))

    def _told(self, call: Call) -> list[str]:
        told = [f"inputs were drawn (seed {self.seed}): {self._describe(call)}"]
        if self.refused_flax:
            what, why = next(iter(self.refused_flax.items()))
            told.append(f"the Flax module refused what torch takes: {what}: {why}")
        return told

    def _nothing(self) -> UsageError:
        both = [("torch", self.refused), ("Flax", self.refused_flax)]
        details = [
            f"{side} refuses {what}: {why}"
            for side, refused in both
            for what, why in list(refused.items())[:_TOLD]
        ]
        return UsageError(
            f"no inputs could be drawn for {self.title} ({', '.join(self.required)}): "
            f"{len(self.refused) + len(self.refused_flax)} were tried",
            "give them: numpy.savez('inputs.npz', x=...) and --inputs inputs.npz (inputs=...)",
            details,
        )


def _room(form: Form, sizes: Sizes) -> int:
    """How many ids an argument holds."""
    return int(sizes.kept().sum()) if "steps" in form.axes else sizes.batch


def _parameters(torch_module: Any, flax_module: Any) -> tuple[list[str], list[str]]:
    """torch's parameters that must be given, and the masks and lengths that may be, of both."""
    ours = _signature(torch_module.forward)
    theirs = _signature(flax_module.__call__)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in theirs.values())
    plain = {n: p for n, p in ours.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    plain = {n: p for n, p in plain.items() if n not in EVALUATION}
    required = [n for n, p in plain.items() if p.default is p.empty]
    if not required:  # transformers' models: everything has a default
        main = getattr(torch_module, "main_input_name", None)
        required = [main if main in plain else next(iter(plain), "input")]
    optional = [
        n
        for n in plain
        if n not in required and _OPTIONAL.search(n) and (n in theirs or open_ended)
    ]
    return required, optional


def _signature(forward: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(forward).parameters
    except (TypeError, ValueError):
        return {}


def _by_rank(lists: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Every choice of one from each, those that take the first ones first."""
    ranks = itertools.product(*(range(len(each)) for each in lists))
    ordered = sorted(itertools.islice(ranks, 4096), key=sum)
    return [tuple(each[i] for each, i in zip(lists, at, strict=True)) for at in ordered]


def _about(x: np.ndarray) -> str:
    what = f"{x.dtype} {x.shape}"
    if x.dtype.kind == "b":
        return f"{what}, {int(x.sum())} of {x.size} true"
    if x.dtype.kind == "f":
        return f"{what}, {x.min():.2g} to {x.max():.2g}"
    return f"{what}, {x.min()} to {x.max()}"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
