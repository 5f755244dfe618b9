"""Optimizers in Flax checkpoints: an optax state under whatever name, as a tree of dotted names."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from convert.training_state.files_torch import title
from convert.training_state.lazy import Lazy
from convert.training_state.rules import rules
from convert.training_state.state import OptimizerState
from zoo.containers.base import Reader, TensorInfo
from zoo.containers.dtypes import code_of
from zoo.containers.errors import UsageError
from zoo.layout import Layout

_WORD = re.compile(r"(^|_)(opt|optim|optimizer)s?(_states?)?s?(_|$)", re.IGNORECASE)
_INNER = ("opt_state", "opt_states", "state")  # optax's own `inner_opt_state` is a part of a state
_SLOTS = re.compile(r"(^|\.)(mu|nu|trace|sum_of_squares|e_g|e_x|count)(\.|$)")


def find(names: Iterable[str], alone: bool = False) -> dict[str, list[str]]:
    """Where optax states lie, and the names below each place: `opt_state`, `optimizer.opt_state`.

    A place above another one is not a state itself; what lies beside the inner one is data. `alone`
    says that there are no weights, so that the whole may be a state.
    """
    found: dict[str, list[str]] = {}
    every = list(names)
    for name in every:
        parts = name.split(".")
        start = next((i for i, part in enumerate(parts) if _WORD.search(part)), None)
        if start is None:
            continue
        end = start + 1
        while end < len(parts) and parts[end] in _INNER:
            end += 1
        found.setdefault(".".join(parts[:end]), []).append(name)
    deepest = {
        root: below
        for root, below in found.items()
        if not any(other.startswith(f"{root}.") for other in found)
    }
    if alone and not deepest and any(_SLOTS.search(name) for name in every):
        return {"": every}  # the state alone
    return deepest


def read(
    reader: Reader,
    root: str,
    names: Iterable[str],
    layout: Layout,
    learning_rate: float | None = None,
) -> list[OptimizerState]:
    """The optimizers in the optax state below `root`; ZooError where it is not understood.

    Moments stay in the file until they are looked at.
    """
    from convert.training_state.canonical_names import part
    from convert.training_state.optax_state import from_flat

    flat = Lazy()
    for stored in names:
        name = (stored.removeprefix(f"{root}.") if root else stored).removesuffix(".value")
        if stored in reader.tensors:
            flat.add_tensor(name, reader, stored)
        elif isinstance(reader.extras[stored], bool | int | float):
            number = np.asarray(reader.extras[stored])
            flat.add(name, TensorInfo(code_of(number.dtype), ()), number.copy)
    own = title(root)
    below = own and any(t.name.startswith(f"{own}.") for e in layout.entries for t in e.flax)
    states = from_flat(flat, layout, learning_rate=learning_rate)
    if below and not any(state.slots for state in states):  # of model.actor by itself
        states = from_flat(flat, part(layout, own), learning_rate=learning_rate)
    unread = [name for name, info in flat.infos.items() if info.shape]
    if unread and not any(state.slots for state in states):
        raise UsageError(
            f"{root or reader.path} holds an optimizer that is not known: it keeps "
            + ", ".join(unread[:3])
            + (f" and {len(unread) - 3} more" if len(unread) > 3 else ""),
            f"known are {', '.join(rules())}",
        )
    for state in states:
        if state.rule == "Adam":
            state.notices.append("optax does not say whose it is: read as Adam's, which is AdamW's")
    return states
