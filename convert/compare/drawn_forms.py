"""The forms that an argument of a model may have, and which of them a parameter is likely to have:
by its name, and by the layers that the torch module begins with."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.compare.blind_inputs import LENGTHS, MASK
from zoo.layout.kinds import of_group, torch_kind

_ATTENDS = re.compile(r"attention|attn|transformer|encoder|decoder|recurrent|rnn|lstm|gru", re.I)
_STEPS = re.compile(r"(max_)?(seq|sequence|context|block|ctx)_?(len|length|size)?|n_ctx")
_IMAGES = re.compile(r"(image|img|input)_?(size|resolution)", re.I)
_PLACED = re.compile(r"pos|(^|\.)pe$|place", re.I)
_STATES = re.compile(r"^(h|c|hx|cx|h_?0|c_?0|hidden\w*|states?|carry)$")
_EDGES = re.compile(r"edge", re.I)
_WIDEST = 8  # forms that layers suggest
_LONGEST = 512  # steps
_FEW = 32  # positions that are all used


@dataclass(frozen=True)
class Sizes:
    """What the arguments of one call share."""

    batch: int = 3
    steps: int = 13
    image: tuple[int, ...] = (33, 37)
    samples: int = 33

    @property
    def edges(self) -> int:
        """Of a graph whose nodes are the batch."""
        return 4 * self.batch

    def lengths(self, axis: str = "steps") -> np.ndarray:
        """Of each sequence, (batch,), falling: they differ, and each is padded by one at least."""
        longest = self.samples if axis == "samples" else self.steps
        short = [longest - 1 - 2 * i for i in range(self.batch)]
        return np.array([max(1, longest // 2, n) for n in short])

    def kept(self, axis: str = "steps") -> np.ndarray:
        """(batch, steps), true where a sequence has not ended."""
        longest = self.samples if axis == "samples" else self.steps
        return np.arange(longest)[None] < self.lengths(axis)[:, None]


@dataclass(frozen=True)
class Ids:
    """The range of integers that a table takes, and the one that stands for padding."""

    count: int
    padding: int | None = None


@dataclass(frozen=True)
class Form:
    """One form: what it is called, which of `Sizes` it turns on, and how it is drawn."""

    name: str
    axes: tuple[str, ...]
    make: Callable[[np.random.Generator, Sizes, Ids], np.ndarray]


def forms(name: str, suggested: Sequence[Form]) -> list[Form]:
    """The forms that a parameter of this name may have, the likeliest first."""
    axis = "samples" if suggested and "samples" in suggested[0].axes else "steps"
    if MASK.search(name):
        padded, kept = _masks(axis)
        return [padded, *kept] if "pad" in name else [*kept, padded]
    if LENGTHS.search(name):
        return [Form("lengths", (axis,), lambda rng, s, ids: s.lengths(axis))]
    if _EDGES.search(name):
        return [_PAIRS] if "ind" in name else [_of_edges(f) for f in suggested if not f.axes]
    if _STATES.search(name) and (states := [f for f in suggested if f.name.startswith("state")]):
        return states
    likely = next((found for pattern, found in _NAMED if pattern.search(name)), ())
    others = [f for f in suggested if f not in likely and not f.name.startswith("state")]
    return [*likely, *others, *(f for f in (_LABELS, _LEVELS) if f not in likely)]


def suggested_forms(module: Any) -> list[Form]:
    """What the layers of a torch module take, in the order in which they were defined."""
    found: dict[str, Form] = {}
    sequences = any(_ATTENDS.search(type(m).__name__) for m in module.modules())
    if any(getattr(m, "batch_first", True) is False for m in module.modules()):
        sequences = True
        if any(torch_kind(m) == "embedding" for m in module.modules()):
            found[_STEPS_FIRST.name] = _STEPS_FIRST
    for part in module.modules():
        for form in _taken(part, sequences):
            found.setdefault(form.name, form)
    return list(found.values())[:_WIDEST]


def choices(module: Any) -> dict[str, list[Any]]:
    """What is tried for each of `Sizes`: first what sees most, sides that are odd and differ; what
    the module's own attributes state comes before the other fixed sizes."""
    steps, images = [], []
    for name, value in _stated(module):
        if _IMAGES.fullmatch(name):
            pair = (value, value) if isinstance(value, int) else tuple(value)
            images.append(pair[-2:])
        elif _STEPS.fullmatch(name) and isinstance(value, int) and 1 < value <= _LONGEST:
            steps.append(value)
    strides = [m.stride[0] for m in module.modules() if torch_kind(m) in of_group("conv")]
    rows = _table_rows(module)
    images += [side for n in rows for side in _grids(n, strides[0])] if strides else []
    squares = [(n, n) for n in (32, 28, 16, 64, 224, 96, 128, 84)]
    return {
        "steps": list(dict.fromkeys([*(n for n in rows if n <= _FEW), 13, 8, *steps, *rows, 5, 3])),
        "image": list(dict.fromkeys([(33, 37), *images, (32, 48), (64, 96), *squares])),
        "samples": [33, 64, *(n * k for n in rows for k in (1, 2)), 160, 400, 1000, 4000, 16000],
    }


def _table_rows(module: Any) -> list[int]:
    """How many rows tables have that are the module's own, (N, D) or (1, N, D): of positions."""
    held = [t for n, t in module.state_dict().items() if _PLACED.search(n) and t.ndim in (2, 3)]
    found = [t.shape[-2] for t in held if t.ndim == 2 or t.shape[0] == 1]
    return [n for n in dict.fromkeys(found) if 1 < n <= 4 * _LONGEST]


def _grids(count: int, stride: int) -> Iterator[tuple[int, int]]:
    """Sizes of images that have `count` patches, or up to two fewer beside other tokens."""
    for patches in (count, count - 1, count - 2):
        sides = [(h, patches // h) for h in range(2, int(patches**0.5) + 1) if patches % h == 0]
        if sides:
            h, w = sides[-1]
            yield from dict.fromkeys([(h * stride, w * stride), (w * stride, h * stride)])


def _stated(module: Any) -> Iterator[tuple[str, Any]]:
    """Sizes among the attributes of the module's parts and of their configs."""
    for part in module.modules():
        configs = (v for k, v in vars(part).items() if re.search("config|cfg|args", k))
        for holder in (part, *configs):
            held = holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})
            for name, value in held.items():
                plain = isinstance(value, int) and not isinstance(value, bool)
                pair = isinstance(value, tuple | list) and len(value) >= 2
                if plain or (pair and all(isinstance(n, int) for n in value)):
                    yield str(name), value


def _taken(part: Any, sequences: bool) -> list[Form]:
    """The forms that a layer takes."""
    kind = torch_kind(part)
    if kind == "embedding":
        return [_TOKENS]
    if kind in of_group("conv"):
        return _convolved(part.in_channels, len(part.kernel_size))
    if kind == "recurrent":
        batched, stepped = _series(part.input_size), _series(part.input_size, first="steps")
        states = [_state(part)] if hasattr(part, "num_layers") else []
        batch_first = getattr(part, "batch_first", True)
        return [*([batched, stepped] if batch_first else [stepped, batched]), *states]
    if kind == "attention":
        return [_series(part.embed_dim)]
    width = getattr(part, "in_features", None) if kind == "linear" else None
    if width is None and kind == "norm" and getattr(part, "normalized_shape", None):
        width = part.normalized_shape[-1]
    if width is None:
        return []
    return [_series(width), _features(width)] if sequences else [_features(width), _series(width)]


def _convolved(channels: int, axes: int) -> list[Form]:
    if axes == 1:
        name, able = f"signals of {channels} channels", ("samples",)
        raw = [_floats("signals", able, lambda s: (s.samples,))] if channels == 1 else []
        return [_floats(name, able, lambda s: (channels, s.samples)), *raw]
    depth = (9,) if axes == 3 else ()
    name = f"{'volumes' if depth else 'images'} of {channels} channels"
    return [_floats(name, ("image",), lambda s: (channels, *depth, *s.image))]


def _series(width: int, first: str = "batch") -> Form:
    if first == "batch":
        return _floats(f"sequences of {width}", ("steps",), lambda s: (s.steps, width))

    def stepped(rng: np.random.Generator, s: Sizes, ids: Ids) -> np.ndarray:
        return rng.standard_normal((s.steps, s.batch, width)).astype(np.float32)

    return Form(f"sequences of {width}, steps first", ("steps",), stepped)


def _state(part: Any) -> Form:
    layers = part.num_layers * (2 if part.bidirectional else 1)

    def make(rng: np.random.Generator, s: Sizes, ids: Ids) -> np.ndarray:
        return rng.standard_normal((layers, s.batch, part.hidden_size)).astype(np.float32)

    return Form(f"state of {part.hidden_size}", (), make)


def _of_edges(form: Form) -> Form:
    """The same for each edge of a graph."""

    def make(rng: np.random.Generator, s: Sizes, ids: Ids) -> np.ndarray:
        return form.make(rng, dataclasses.replace(s, batch=s.edges), ids)

    return Form(f"{form.name} for each edge", (), make)


def _features(width: int) -> Form:
    return _floats(f"features of {width}", (), lambda s: (width,))


def _floats(name: str, axes: tuple[str, ...], shape: Callable[[Sizes], tuple[int, ...]]) -> Form:
    """Normal numbers with these axes after the batch's."""

    def make(rng: np.random.Generator, s: Sizes, ids: Ids) -> np.ndarray:
        return rng.standard_normal((s.batch, *shape(s))).astype(np.float32)

    return Form(name, axes, make)


def _tokens(rng: np.random.Generator, s: Sizes, ids: Ids) -> np.ndarray:
    """Every id where there is room, the first and the last in any case; padded where a table has a
    number for that."""
    useful = np.array([i for i in range(ids.count) if i != ids.padding])
    room = s.batch * s.steps
    # The first, the last, then the others in any order, over again where there is more room.
    order = [*dict.fromkeys([useful[0], useful[-1], *rng.permutation(useful)])]
    flat = np.resize(order, room)
    drawn = np.empty((s.batch, s.steps), np.int64)
    kept = s.kept()
    drawn[kept], drawn[~kept] = np.split(flat, [int(kept.sum())])
    if ids.padding is not None:
        drawn[~kept] = ids.padding
    return drawn


def _spread(rng: np.random.Generator, s: Sizes, ids: Ids) -> np.ndarray:
    return np.resize(rng.permutation(ids.count), s.batch)


def _masks(axis: str) -> tuple[Form, list[Form]]:
    """One that is true for padding, and those that are true for what is kept."""
    whole: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "mask": lambda kept: kept.astype(np.int64),
        "boolean mask": lambda kept: kept,
        "floating mask": lambda kept: kept.astype(np.float32),
        "mask (B, 1, 1, T)": lambda kept: kept[:, None, None],
        "mask (B, 1, T)": lambda kept: kept[:, None],
        "mask (T, T)": lambda kept: np.tri(kept.shape[1], dtype=bool),
    }

    def form(name: str, of: Callable[[np.ndarray], np.ndarray]) -> Form:
        return Form(name, (axis,), lambda rng, s, ids: of(s.kept(axis)))

    return form("padding mask", np.logical_not), [form(name, of) for name, of in whole.items()]


def _adjacent(rng: np.random.Generator, n: int) -> np.ndarray:
    upper = np.triu(rng.random((n, n)) < 0.4, 1)
    return (upper | upper.T | np.eye(n, dtype=bool)).astype(np.float32)


_STEP = ("steps",)
_TOKENS = Form("token ids", _STEP, _tokens)
_LABELS = Form("labels", (), _spread)
_LEVELS = Form("levels", (), lambda rng, s, ids: rng.random(s.batch).astype(np.float32))
_COUNTS = Form("timesteps", (), lambda rng, s, ids: rng.integers(0, 1000, s.batch))
_COLUMN = Form("levels (B, 1)", (), lambda rng, s, ids: rng.random((s.batch, 1)).astype(np.float32))
_PLACES = Form("positions", _STEP, lambda rng, s, ids: np.tile(np.arange(s.steps), (s.batch, 1)))
_STEPS_FIRST = Form("token ids, steps first", _STEP, lambda rng, s, ids: _tokens(rng, s, ids).T)
_PAIRS = Form("edges", (), lambda rng, s, ids: rng.integers(0, s.batch, (2, s.edges)))
_GRAPH = (
    Form(
        "adjacency (B, N, N)",
        _STEP,
        lambda rng, s, ids: np.stack([_adjacent(rng, s.steps) for _ in range(s.batch)]),
    ),
    Form("adjacency (N, N)", (), lambda rng, s, ids: _adjacent(rng, s.batch)),
)

_NAMED: tuple[tuple[re.Pattern[str], tuple[Form, ...]], ...] = (
    (re.compile(r"pos(ition)?s?(_ids)?$", re.I), (_PLACES,)),
    (re.compile(r"(^|_)(ids?|idx|tokens?|text|words?|chars?|prompt)$", re.I), (_TOKENS, _LABELS)),
    (re.compile(r"^(src|tgt|source|target)$", re.I), (_TOKENS,)),
    (
        re.compile(r"^(t|time|timesteps?|sigma|noise_level\w*)$", re.I),
        (_COUNTS, _LEVELS, _COLUMN),
    ),
    (re.compile(r"^(labels?|class\w*|y)$", re.I), (_LABELS,)),
    (re.compile(r"^adj", re.I), _GRAPH),
)
