"""Which models there are: the folders of `zoo.models` and the `zooconvert.models` entry points."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any, NamedTuple

import zoo.models
from zoo import plugins
from zoo.containers.errors import UsageError
from zoo.layout import Side
from zoo.model import Config, Model


class Found(NamedTuple):
    """What a name stands for. `config` is None for a family, `weights` for a bare preset."""

    model: Model
    config: Config | None
    weights: str | None


@functools.cache
def families() -> dict[str, Model]:
    """Family name -> Model. Raises UsageError where two claim one family or preset name."""
    found = [
        importlib.import_module(f"zoo.models.{module.name}").MODEL
        for module in pkgutil.iter_modules(zoo.models.__path__)
        if module.ispkg
    ]
    for point, model in plugins.load("zooconvert.models"):
        if isinstance(model, Model):
            found.append(model)
        else:
            plugins.refuse(point, f"gives {model!r}, which is not a zoo.Model: not used")
    owner: dict[str, str] = {}
    for model in found:
        for name in {model.name, *model.presets}:
            if name in owner:
                raise UsageError(
                    f"the model name {name!r} is claimed by {owner[name]} and by {model.name}",
                    "uninstall one of the packages that provide them",
                )
            owner[name] = model.name
    _check_dialects(found)
    return {model.name: model for model in sorted(found, key=lambda m: m.name)}


def _check_dialects(found: Iterable[Model]) -> None:
    """UsageError where one name is a dialect of torch's in one family, and of Flax's in another."""
    sides: dict[str, tuple[Side, str]] = {}
    for model in found:
        for name, side in model.dialect_sides.items():
            other, owner = sides.setdefault(name, (side, model.name))
            if other != side:
                raise UsageError(
                    f"the dialect {name!r} is {side}'s in {model.name}, and {other}'s in {owner}",
                    "uninstall one of the packages that provide them",
                )


def side_of(dialect: str) -> Side:
    """The framework that a dialect is of, in whatever family; UsageError for one that none has."""
    known = {n: side for m in families().values() for n, side in m.dialect_sides.items()}
    if dialect in known:
        return known[dialect]
    from difflib import get_close_matches

    near = get_close_matches(dialect, known, 3, 0.5)
    raise UsageError(
        f"no family has a dialect {dialect!r}",
        (f"did you mean {' or '.join(near)}? " if near else "")
        + "`zooconvert models --dialects` lists them",
    )


def names(pattern: str = "*") -> list[str]:
    """The presets whose name matches a shell pattern, sorted."""
    every = (preset for model in families().values() for preset in model.presets)
    return sorted(fnmatch.filter(every, pattern))


def get(name: str) -> Found:
    """What `name` stands for: a preset, a family, or `preset.tag`, pretrained weights.

    Raises UsageError for a name that nothing has, with the nearest that exist.
    """
    base, _, tag = name.partition(".")
    for model in families().values():
        if base in model.presets:
            return Found(model, model.presets[base], tag or None)
        if base == model.name and not tag:
            return Found(model, None, None)
    from difflib import get_close_matches

    known = [*names(), *families()]
    near = get_close_matches(base, known, 3, 0.5)
    raise UsageError(
        f"no model is called {name!r}",
        f"did you mean {' or '.join(near)}?" if near else "`zooconvert models` lists them",
    )


def defined_by(module: Any, framework: str) -> Model | None:
    """The family whose definition in `framework` a live module was made from; None if it is of
    none."""
    home = type(module).__module__
    every = families().values()
    return next((m for m in every if getattr(m, framework).partition(":")[0] == home), None)
