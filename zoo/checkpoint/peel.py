"""Wrappers around the tensors of a model: training scripts, DDP, compile and Lightning add them.

Only names are looked at. Each level that could hold the model is offered, outermost first;
`zoo.checkpoint.identification` takes the first at which a model fits.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "params", "state")
# Parts of a training checkpoint that hold tensors, none of them a weight.
NOT_WEIGHTS = frozenset(
    [
        *("optimizer", "optimizer_state_dict", "optimizer_states", "opt_state", "optim"),
        *("scheduler", "lr_scheduler", "lr_schedulers", "lr_scheduler_state_dict", "scaler"),
        *("rng", "rngs", "rng_state", "rng_states", "cuda_rng_state", "torch_rng_state", "key"),
        *("callbacks", "loops", "step", "epoch", "global_step", "ema"),
    ]
)
# The same in longer names: `actor_optimizer`, `lr_scheduler_g`, `model_ema`.
_NO_WEIGHT = re.compile(r"optimizer|(^|_)(optim|opt_state|scheduler|ema|swa)(_|$)", re.IGNORECASE)


def is_weight(head: str) -> bool:
    """Whether weights may lie below a first part of a name."""
    return head not in NOT_WEIGHTS and not _NO_WEIGHT.search(head)


@dataclass(frozen=True)
class Left:
    """What a checkpoint holds besides the weights."""

    tensors: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()  # plain data: numbers, strings
    files: tuple[str, ...] = ()  # other files of the same checkpoint

    def without(self, used: Collection[str]) -> Left:
        """The rest, once these have been taken care of."""
        tensors, extras, files = (
            tuple(n for n in names if n not in used)
            for names in (self.tensors, self.extras, self.files)
        )
        return Left(tensors, extras, files)

    def unused(self) -> list[str]:
        """What whoever loads the model should be told of it: not that a training left its state."""
        names = tuple(n for n in self.tensors if is_weight(_head(n)))
        return Left(names, (), self.files).notices()

    def notices(self) -> list[str]:
        """What a user should be told of it, where nothing is done with it."""
        told = []
        if self.tensors:
            parts = sorted({_head(n) for n in self.tensors})
            told.append(
                f"NOT converted: {len(self.tensors)} of the tensors, below "
                + ", ".join(parts[:5])
                + (", ..." if len(parts) > 5 else "")
            )
        if self.files:
            told.append(f"not read: {', '.join(self.files)}")
        if self.extras:
            names = ", ".join(sorted({_head(n) for n in self.extras}))
            told.append(f"no tensors, not converted: {names}")
        return told


@dataclass(frozen=True)
class Peeled:
    """One level: what a tensor is called there -> what the file calls it."""

    names: dict[str, str]
    wrappers: tuple[str, ...] = ()  # what was taken off, outermost first
    set_aside: tuple[str, ...] = ()  # tensors of the file that are not weights

    def notices(self) -> list[str]:
        """What a user should be told of the names."""
        if not self.wrappers:
            return []
        return [f"taken off the names: {' '.join(f'{w}.' for w in self.wrappers)}"]


def levels(names: Iterable[str], base_prefix: str = "") -> Iterator[Peeled]:
    """Each level at which the model may lie, outermost first; `base_prefix` is one more wrapper."""
    untouched = Peeled({n: n for n in names})
    yield untouched
    yield from _inside(untouched, base_prefix.removesuffix("."), untouched)


def _inside(level: Peeled, base: str, seen: Peeled) -> Iterator[Peeled]:
    """The levels within one, once what is not a weight has been set aside."""
    for step in (_without_rng, _without_value, _without_compile):
        level = step(level)
    if level.names and level != seen:
        yield level
    whole = {_head(n) for n in level.names} == {base}  # with a head beside it, it is not a wrapper
    for wrapper in (*WRAPPERS, *([base] if whole else [])):
        inner = {n.partition(".")[2]: s for n, s in level.names.items() if _head(n) == wrapper}
        if inner and "" not in inner:
            rest = tuple(s for n, s in level.names.items() if _head(n) != wrapper)
            below = Peeled(inner, (*level.wrappers, wrapper), level.set_aside + rest)
            yield below
            yield from _inside(below, base, below)


def _without_rng(p: Peeled) -> Peeled:
    """Optimizer states, generators and counters set aside, wherever they stand."""
    keep = {n: s for n, s in p.names.items() if is_weight(_head(n)) and not _rng_parts(n)}
    aside = tuple(s for n, s in p.names.items() if n not in keep)
    return Peeled(keep, p.wrappers, p.set_aside + aside)


def _without_value(p: Peeled) -> Peeled:
    """NNX variables saved whole: every leaf is called `value`."""
    if p.names and all(n.endswith(".value") for n in p.names):
        names = {n.removesuffix(".value"): s for n, s in p.names.items()}
        return Peeled(names, p.wrappers, p.set_aside)
    return p


def _without_compile(p: Peeled) -> Peeled:
    """torch.compile puts `_orig_mod` before the names of whatever module it wraps, at any depth."""
    parts = {n: [part for part in n.split(".") if part != "_orig_mod"] for n in p.names}
    names = {".".join(parts[n]): s for n, s in p.names.items()}
    if len(names) != len(p.names) or names == p.names:
        return p
    return Peeled(names, (*p.wrappers, "_orig_mod"), p.set_aside)


def _head(name: str) -> str:
    return name.partition(".")[0]


def _rng_parts(name: str) -> set[str]:
    return {part for part in name.split(".") if part in ("rngs", "rng")}
