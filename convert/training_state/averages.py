"""Averaged weights (EMA, SWA) that training scripts keep beside the weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from convert.training_state.lazy import Lazy, Read, moved
from convert.training_state.ownership import Parameters
from zoo.checkpoint.peel import WRAPPERS
from zoo.checkpoint.problems import dims
from zoo.containers.base import Reader
from zoo.containers.errors import UsageError, ZooError
from zoo.layout import Layout, Tree, View
from zoo.layout.ops import inverse

_WORD = re.compile(r"(^|_)(ema|swa)(_|$)|^averaged?_", re.IGNORECASE)
_BELOW = (*WRAPPERS, "ema_model", "ema", "shadow")  # what may stand before the names inside
_NUMBERED = re.compile(r"shadow_params\.(\d{1,6})")


def find(names: Iterable[str]) -> dict[str, list[str]]:
    """Where averages lie, by the words in their names, and the tensors below each place."""
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts[:-1]) if _WORD.search(part)), None)
        if at is not None:
            found.setdefault(".".join(parts[: at + 1]), []).append(name)
    return found


def read(
    reader: Reader,
    root: str,
    names: Iterable[str],
    layout: Layout,
    tree: Tree,
    parameters: Parameters,
) -> tuple[Lazy, set[str]]:
    """The averages below `root` in canonical form, and the tensors that they are.

    An average of a part of the model is one too. Raises ZooError where none of the tensors is of
    the model, or some have the wrong shape.
    """
    inner = {name.removeprefix(f"{root}.").removesuffix(".value"): name for name in names}
    if numbered := {int(m[1]): s for n, s in inner.items() if (m := _NUMBERED.fullmatch(n))}:
        return _in_order(reader, root, numbered, parameters)
    views = layout.view(tree)
    shapes = {t.name: t.shape for view in views for t in view.tensors}
    names_of = {name: name for name in shapes}
    if tree.startswith("linen"):  # an average is mostly of one collection, and does not name it
        names_of |= {name.partition(".")[2]: name for name in shapes}
    held: dict[str, str] = {}  # the tree's name -> the file's
    for name, stored in inner.items():
        known = parameters.resolve(name) if tree == "torch" else None
        if (found := _strip(name, names_of) or known) is not None:
            held[found] = stored
    wrong = [
        f"{stored} is {dims(reader.tensors[stored].shape)}, should be {dims(shapes[name])}"
        for name, stored in held.items()
        if reader.tensors[stored].shape != shapes[name]
    ]
    if wrong or not held:
        raise _not_the_models(root, wrong)
    averages, used = Lazy(), set[str]()
    for view in views:
        if view.tensors and all(t.name in held for t in view.tensors):
            _add(averages, reader, view, held)
            used |= {held[t.name] for t in view.tensors}
    return averages, used


def _strip(name: str, names_of: Mapping[str, str]) -> str | None:
    """What the tree calls it, without what stands before the names inside."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while parts:
        if (whole := ".".join(parts)) in names_of:
            return names_of[whole]
        if parts[0] not in _BELOW:
            return None
        del parts[0]
    return None


def _add(averages: Lazy, reader: Reader, view: View, held: Mapping[str, str]) -> None:
    canonical = [t.shape for t in view.entry.torch]
    infos = [reader.tensors[held[t.name]] for t in view.tensors]
    reads: list[Read] = [
        lambda stored=held[t.name]: reader.read(stored)  # type: ignore[misc]
        for t in view.tensors
    ]
    ops = inverse(view.ops, canonical)
    for i, t in enumerate(view.entry.torch):
        averages.add(t.name, *moved(ops, infos, reads, i))


def _in_order(
    reader: Reader, root: str, numbered: Mapping[int, str], parameters: Parameters
) -> tuple[Lazy, set[str]]:
    """Averages without names, one for each parameter in the model's order."""
    averages = Lazy()
    if sorted(numbered) != list(range(len(parameters.shapes))):
        raise UsageError(
            f"{root} holds {len(numbered)} averages without names, "
            f"the model has {len(parameters.shapes)} parameters",
            "save them by name: {name: average for ... in model.named_parameters()}",
        )
    wrong = []
    for i, (name, shape) in enumerate(parameters.shapes.items()):
        stored = numbered[i]
        if (found := reader.tensors[stored].shape) != shape:
            wrong.append(f"{stored} is {dims(found)}, {name} is {dims(shape)}")
        averages.add_tensor(name, reader, stored)
    if wrong:
        raise _not_the_models(root, wrong)
    return averages, set(numbered.values())


def _not_the_models(root: str, wrong: list[str]) -> ZooError:
    return ZooError(
        f"the averages in {root} are not of this model's weights",
        "save the averaged model's state_dict()",
        wrong[:8],
    )
