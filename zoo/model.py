"""The record that a model's folder hands to everything else."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import importlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np

from zoo import plugins
from zoo.containers.errors import UsageError
from zoo.layout import TREES, Entry, Layout, Renames, Side, Tree
from zoo.layout.ops import Shape
from zoo.layout.renames import Pairs

_ENTRIES = 1 << 16  # of a layout that a config asks for
Config = Any  # a frozen dataclass of the family


class Others(NamedTuple):
    """What names and shapes say of models upstream that are not of the family, but look like it."""

    told: str = ""  # whose the names are, and what tells it: "RoBERTa's (lm_head.bias)"
    alike: str = ""  # whose tensors are called and shaped just as these, though they compute else


class Dialect(NamedTuple):
    """Other names that upstream publishes models of the family under."""

    name: str  # of all families one name is of one framework: "transformers", "transformers-flax"
    tree: Tree  # the tree whose names it changes: "torch", or a Flax one
    renames: Callable[[Config], Pairs]  # templates, as `zoo.layout.Renames` takes them
    summary: str  # whose files have them
    configs: tuple[Config, ...]  # of any size: between them they have every table of names


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
    # Patterns of the names of inputs, outputs and submodules that are images: their channels are
    # axis 1 in PyTorch and the last in Flax.
    images: tuple[str, ...] = ()
    invisible: tuple[tuple[str, str], ...] = ()  # (pattern, why no output can depend on it)
    # Config fields that `infer` leaves out where names and shapes cannot tell them.
    unknown: frozenset[str] = frozenset()
    # For those of them whose default does not go with every size: a value that does.
    placeholders: Mapping[str, Any] = field(default_factory=dict)
    structure: frozenset[str] = frozenset()  # config fields that names alone decide
    spellings: tuple[tuple[str, str], ...] = ()  # (pattern, replacement) of retired tensor names
    dialects: tuple[Dialect, ...] = ()
    # Names under which upstream is known -> the tree that its files already are.
    called: Mapping[str, Tree] = field(default_factory=dict)
    base_prefix: str = ""  # what upstream puts before the tensors of a model that got a head
    hf_type: str | None = None  # `model_type` in a transformers config.json
    from_hf: Callable[[Mapping[str, Any]], Config] | None = None
    to_hf: Callable[[Config], dict[str, Any]] | None = None  # {}: transformers has no such model
    hf_classes: frozenset[str] = frozenset()  # `architectures` there, for a file without its type
    # What a header (names and shapes as the file has them) tells of other models upstream.
    others: Callable[[Mapping[str, Shape]], Others] | None = None
    # Tied tensor -> the config field that says so: False where a file holds other values there.
    untied: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Model({self.name!r})"

    def layout_of(self, config: Config) -> Layout:
        """The layout of one configuration (configs are hashable, so it is built once). UsageError
        for one of more tensors than any model has."""
        return _layout_of(self.layout, self.dialects, config)

    def asks_for_more(self, config: Config, tensors: int) -> bool:
        """Whether the layout of a configuration has more than so many tensors; it is not built."""
        return next(itertools.islice(self.layout(config), tensors, None), None) is not None

    @functools.cached_property
    def flax_names(self) -> frozenset[str]:
        """What NNX calls the tensors of the small configurations."""
        layouts = map(self.layout_of, self.tiny.values())
        return frozenset(t.name for layout in layouts for e in layout.entries for t in e.flax)

    def tree_of(self, dialect: str) -> Tree:
        """The tree that a dialect is; UsageError for one that the family does not have."""
        own = self._spellings
        if dialect not in own:
            raise UsageError(
                f"{self.name} has no dialect {dialect!r}",
                f"it has {', '.join(own)}; `zooconvert models --dialects` tells of them",
            )
        return own[dialect]

    @property
    def dialect_sides(self) -> dict[str, Side]:
        """Every name of a spelling, the trees' own included -> whose framework has it."""
        base = {d.name: d.tree for d in self.dialects}
        return {
            name: "torch" if base.get(tree, tree) == "torch" else "flax"
            for name, tree in self._spellings.items()
        }

    @property
    def _spellings(self) -> dict[str, Tree]:
        """Every name of a spelling -> the tree that it is."""
        return {d.name: d.name for d in self.dialects} | dict(self.called) | {t: t for t in TREES}

    @property
    def hf_trees(self) -> frozenset[Tree]:
        """The trees beside which a config.json of transformers may lie: those whose files it reads,
        and where those are named as ours are, Flax's of ours, which it does not take for its own.
        """
        own = {d.name for d in self.dialects if d.name.startswith("transformers")}
        return frozenset(own or TREES)

    def respell(self, name: str) -> str:
        """A tensor name in today's spelling."""
        for pattern, replacement in self.spellings:
            name = re.sub(pattern, replacement, name)
        return name

    def to_flax(self, name: str, array: np.ndarray) -> np.ndarray:
        """A PyTorch input, output or intermediate as Flax has it: images with channels last."""
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
        if not module.startswith("zoo."):
            plugins.warn_of_taps(built, f"{module}:{attribute}")
        return built  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=64)
def _layout_of(
    layout: Callable[[Config], Iterable[Entry]], dialects: tuple[Dialect, ...], config: Config
) -> Layout:
    entries = list(itertools.islice(layout(config), _ENTRIES + 1))
    if len(entries) > _ENTRIES:
        raise UsageError(
            f"the config asks for a model of more than {_ENTRIES} tensors", "check its sizes"
        )
    return Layout(entries, {d.name: (d.tree, Renames(d.renames(config))) for d in dialects})


def override(config: Config, fields: Mapping[str, Any]) -> Config:
    """`config` with other values in these fields; UsageError for what it cannot have."""
    known = [f.name for f in dataclasses.fields(config)]
    if wrong := [name for name in fields if name not in known]:
        raise UsageError(
            f"{type(config).__module__}.Config has no field {', '.join(wrong)}",
            f"it has {', '.join(known)}",
        )
    family: Any = type(config)
    types = _types(family)
    for name in known:
        value = fields.get(name, getattr(config, name))
        if name in types and not _fits(value, types[name]):
            raise UsageError(
                f"impossible configuration: {name} is {value!r}", f"it is {_told(types[name])}"
            )
    try:
        return dataclasses.replace(config, **fields)
    except (TypeError, ValueError, ArithmeticError) as e:
        raise UsageError(f"impossible configuration: {e}", "give values that fit together") from e


@functools.cache
def _types(config: Any) -> dict[str, Any]:
    """The types of a Config's fields; none where a plugin's cannot be resolved."""
    try:
        return get_type_hints(config)
    except (NameError, TypeError):
        return {}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a field of this type may hold a value. Numbers are finite, a count is not negative;
    what is not a plain type is the family's to check."""
    if get_origin(kind) is Literal:
        return any(type(value) is type(x) and value == x for x in get_args(kind))
    if get_origin(kind) in (Union, UnionType):  # there -1 may mean none
        plain = type(value) is int and int in get_args(kind)
        return plain or any(_fits(value, k) for k in get_args(kind))
    if kind is int:
        return type(value) is int and value >= 0
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if kind in (bool, str, NoneType):
        return type(value) is kind
    return True


def _told(kind: Any) -> str:
    """A type in words: "one of 'tanh', 'relu'", "of type int | None"."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    return f"of type {kind.__name__ if isinstance(kind, type) else kind}"


def with_config(module: Any, config: Config) -> Any:
    """The module, which keeps what it was made of as `config`: whoever saves it needs that."""
    if getattr(module, "config", None) is None:
        module.config = config
    return module


def dim(shapes: Mapping[str, Shape], pattern: str, axis: int) -> int | None:
    """The commonest size of `axis` among the tensors whose name `pattern` finds; None if none."""
    sizes = Counter(s[axis] for n, s in shapes.items() if len(s) > axis and re.search(pattern, n))
    return sizes.most_common(1)[0][0] if sizes else None


def count(shapes: Mapping[str, Shape], pattern: str) -> int:
    """How many different numbers `pattern`'s group finds in the names.

    Not the largest: one absurd name must not ask for an absurd layout.
    """
    return len({m[1] for n in shapes if (m := re.search(pattern, n))})
