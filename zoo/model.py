"""The record that a model's folder hands to everything else."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from zoo import plugins
from zoo.containers.errors import UsageError
from zoo.layout import Entry, Layout
from zoo.layout.ops import Shape

Config = Any  # a frozen dataclass of the family


@dataclass(frozen=True, repr=False)
class Model:
    """One family: its configurations, its layout, and where its two definitions are.

    `layout(config)` and `inputs(config)` need no framework. `torch` and `flax` are
    "package.module:callable"; called with a config (Flax also with `rngs=`) they give a module.
    """

    name: str
    version: int  # of the layout; goes up when a canonical name or shape changes
    summary: str
    config: type[Config]
    presets: Mapping[str, Config]
    tiny: Mapping[str, Config]  # small configurations that between them use every line
    layout: Callable[[Config], Iterable[Entry]]
    infer: Callable[[Mapping[str, Shape]], dict[str, Any] | None]
    inputs: Callable[[Config], dict[str, np.ndarray]]
    torch: str
    flax: str
    # Fresh values of a canonical tensor; None: as torch's own layers start (`zoo.loading.fresh`).
    init: Callable[[Config, str, Shape, np.random.Generator], np.ndarray] | None = None
    # Patterns of inputs, outputs and intermediates with channels: axis 1 in PyTorch, the last in
    # Flax.
    images: tuple[str, ...] = ()
    invisible: tuple[tuple[str, str], ...] = ()  # (pattern, why no output can depend on it)
    # Config fields that `infer` leaves out where names and shapes cannot tell them.
    unknown: frozenset[str] = frozenset()
    # For those of them whose default does not go with every size: a value that does.
    placeholders: Mapping[str, Any] = field(default_factory=dict)
    structure: frozenset[str] = frozenset()  # config fields that names alone decide
    spellings: tuple[tuple[str, str], ...] = ()  # (pattern, replacement) of retired tensor names
    base_prefix: str = ""  # what upstream puts before the tensors of a model that got a head
    hf_type: str | None = None  # `model_type` in a transformers config.json
    from_hf: Callable[[Mapping[str, Any]], Config] | None = None
    to_hf: Callable[[Config], dict[str, Any]] | None = None

    def __repr__(self) -> str:
        return f"Model({self.name!r})"

    def layout_of(self, config: Config) -> Layout:
        """The layout of one configuration (configs are hashable, so it is built once)."""
        return _layout_of(self.layout, config)

    def respell(self, name: str) -> str:
        """A tensor name in today's spelling."""
        for pattern, replacement in self.spellings:
            name = re.sub(pattern, replacement, name)
        return name

    def to_flax(self, name: str, array: np.ndarray) -> np.ndarray:
        """A PyTorch input, output or intermediate as Flax has it: channels last if it has any."""
        return np.moveaxis(array, 1, -1) if self._has_channels(name) else array

    def from_flax(self, name: str, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_flax`."""
        return np.moveaxis(array, -1, 1) if self._has_channels(name) else array

    def _has_channels(self, name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in self.images)

    def configure(self, **fields: Any) -> Config:
        """A config of these fields; UsageError names what the family does not have."""
        return override(self.config(), fields)

    def definition(self, framework: str) -> Callable[..., Any]:
        """The class or function that builds the module; imports the framework.

        Raises UsageError for a twin that was written for an earlier zoo, with the edit it needs;
        warns of one that still takes `taps`.
        """
        module, _, attribute = getattr(self, framework).partition(":")
        try:
            built = getattr(importlib.import_module(module), attribute)
        except ImportError as e:
            if edit := plugins.edit(e):
                raise UsageError(f"{module} {edit}", "edit it, or uninstall it") from None
            raise
        plugins.warn_of_taps(built, f"{module}:{attribute}")
        return built  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=64)
def _layout_of(layout: Callable[[Config], Iterable[Entry]], config: Config) -> Layout:
    return Layout(layout(config))


def override(config: Config, fields: Mapping[str, Any]) -> Config:
    """`config` with other values in these fields; UsageError for what it cannot have."""
    known = {f.name: str(f.type) for f in dataclasses.fields(config)}
    if wrong := [name for name in fields if name not in known]:
        raise UsageError(
            f"{type(config).__module__}.Config has no field {', '.join(wrong)}",
            f"it has {', '.join(known)}",
        )
    values = {name: getattr(config, name) for name in known} | dict(fields)
    for name, annotation in known.items():
        if not _CHECKS.get(annotation, lambda _: True)(values[name]):
            raise UsageError(
                f"impossible configuration: {name} is {values[name]!r}",
                f"it is of type {annotation}",
            )
    try:
        return dataclasses.replace(config, **fields)
    except (TypeError, ValueError, ArithmeticError) as e:
        raise UsageError(f"impossible configuration: {e}", "give values that fit together") from e


# What a field of a Config may hold, by its annotation; others are the family's to check.
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "int": lambda v: type(v) is int and v >= 0,
    "int | None": lambda v: v is None or type(v) is int,
    "float": lambda v: type(v) in (int, float) and math.isfinite(v),
    "bool": lambda v: type(v) is bool,
    "str": lambda v: type(v) is str,
}


def dim(shapes: Mapping[str, Shape], pattern: str, axis: int) -> int | None:
    """The commonest size of `axis` among the tensors whose name `pattern` finds; None if none."""
    sizes = Counter(s[axis] for n, s in shapes.items() if len(s) > axis and re.search(pattern, n))
    return sizes.most_common(1)[0][0] if sizes else None


def count(shapes: Mapping[str, Shape], pattern: str) -> int:
    """How many different numbers `pattern`'s group finds in the names.

    Not the largest: one absurd name must not ask for an absurd layout.
    """
    return len({m[1] for n in shapes if (m := re.search(pattern, n))})
