"""Wrappers around the tensors of a model: training scripts, DDP, compile and Lightning add them.

Only names are looked at. Each level that could hold the model is offered, outermost first;
`zoo.checkpoint.identification` takes the first at which a model fits.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "params", "state")
_DEEPEST = 8  # wrappers around a model
COLLECTIONS = frozenset({"params", "batch_stats"})  # of Linen
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
            parts = sorted({_part(n) for n in self.tensors})
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


def levels(
    names: Iterable[str], prefix: str | None = None, found: bool = False
) -> Iterator[Peeled]:
    """Each level at which the model may lie, outermost first.

    `prefix` is where to begin: what is not below it is set aside. With `found`, whatever stands
    before all names may come off too, not only what wrappers are known to be called.
    """
    start = Peeled({n: n for n in names})
    if prefix is not None:
        start = below(start, prefix)
    yield start
    yield from _inside(start, found, start)


def innermost(names: Iterable[str]) -> Peeled:
    """The level at which all weights lie, once every wrapper that holds them all is taken off. What
    a module itself may be called (`model`, `net`) is one only of a training checkpoint."""
    level = Peeled({n: n for n in names})
    while True:
        for step in _STEPS:
            level = step(level)
        heads = {_head(n) for n in level.names}
        head = heads.pop() if len(heads) == 1 else ""
        own = head in ("model", "net") and not level.set_aside
        if head not in WRAPPERS or own or head in level.names:
            return level
        level = below(level, head)


def below(level: Peeled, prefix: str) -> Peeled:
    """What lies below a prefix; the collections of a Linen tree stand before it."""
    prefix = prefix.removesuffix(".")
    inner: dict[str, str] = {}
    for name, source in level.names.items():
        head, _, rest = name.partition(".")
        if name.startswith(f"{prefix}."):
            inner[name.removeprefix(f"{prefix}.")] = source
        elif head in COLLECTIONS and rest.startswith(f"{prefix}."):
            inner[f"{head}.{rest.removeprefix(f'{prefix}.')}"] = source
    used = set(inner.values())
    rest_of_it = tuple(s for s in level.names.values() if s not in used)
    return Peeled(inner, (*level.wrappers, prefix), level.set_aside + rest_of_it)


def any_below(names: Iterable[str], prefix: str) -> bool:
    """Whether anything lies below a prefix."""
    return bool(below(Peeled({n: n for n in names}), prefix).names)


def _inside(level: Peeled, found: bool, seen: Peeled) -> Iterator[Peeled]:
    """The levels within one, once what is not a weight has been set aside."""
    for step in _STEPS:
        level = step(level)
    if level.names and level != seen:
        yield level
    if len(level.wrappers) >= _DEEPEST:  # a name may have any number of parts
        return
    common = _common(level.names) if found else ()
    for wrapper in dict.fromkeys((*WRAPPERS, *common)):
        if wrapper in common:
            inner = below(level, wrapper)
        else:
            names = {n.partition(".")[2]: s for n, s in level.names.items() if _head(n) == wrapper}
            rest = tuple(s for n, s in level.names.items() if _head(n) != wrapper)
            inner = Peeled(names, (*level.wrappers, wrapper), level.set_aside + rest)
        if inner.names and "" not in inner.names:
            yield inner
            yield from _inside(inner, found, inner)


def _common(names: Collection[str]) -> tuple[str, ...]:
    """What stands before all names, where it is not the module itself."""
    heads = {_head(n) for n in names}
    if heads <= COLLECTIONS:
        names = [n.partition(".")[2] for n in names]
        heads = {_head(n) for n in names}
    return tuple(heads) if len(heads) == 1 and any(n.count(".") > 1 for n in names) else ()


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


_STEPS = (_without_rng, _without_value, _without_compile)


def _head(name: str) -> str:
    return name.partition(".")[0]


def _part(name: str) -> str:
    """What a tensor is below, wrappers aside: what was taken may have been below the same one."""
    head, _, rest = name.partition(".")
    return f"{head}.{_head(rest)}" if head in WRAPPERS and "." in rest else head


def _rng_parts(name: str) -> set[str]:
    return {part for part in name.split(".") if part in ("rngs", "rng")}
