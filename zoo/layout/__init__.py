"""The vocabulary of layouts: which tensors a model has, and what each is in the other framework.

A layout is a tuple of entries. An entry states one canonical tensor (name, shape, kind) or, where
one side joins what the other keeps apart, a group of them; both directions follow from that one
statement. Layouts are data: they need no framework, and go to JSON and back.

    def layout(c):
        yield from embedding("embeddings.word_embeddings", c.vocab_size, c.hidden_size)
        yield from linear("classifier", c.hidden_size, c.num_labels)

Canonical names and shapes are those of the PyTorch state_dict. NNX names follow from the kind:
`classifier.weight` (out, in) of kind linear is `classifier.kernel` (in, out).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from zoo.layout.ops import (
    Divide,
    Op,
    Ops,
    Permute,
    Reorder,
    Shape,
    inverse,
    op_from_json,
    op_to_json,
    run_shapes,
)

Tree = Literal["torch", "nnx", "linen", "linen-compact"]
TREES: tuple[Tree, ...] = ("torch", "nnx", "linen", "linen-compact")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A name and a shape."""

    name: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Constant:
    """The value of a tensor that only PyTorch has: checked when read, made again on the way back.

    `fill` is "zeros" or "arange" (along the last axis); `in_state_dict` says whether today's
    PyTorch definition still saves it.
    """

    fill: Literal["zeros", "arange"]
    dtype: str
    in_state_dict: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """What stands on either side, and the ops that lead from `torch` to `flax`.

    `torch` and `flax` hold one tensor each, but for an op that joins or divides, and but for
    tensors that only PyTorch has (`flax` is empty, and `tied_to` or `constant` says what they are).
    """

    kind: str
    torch: tuple[Tensor, ...]
    flax: tuple[Tensor, ...] = ()
    ops: Ops = ()
    collection: str = "params"  # the Linen collection
    tied_to: str | None = None  # the canonical tensor whose values it shares
    constant: Constant | None = None
    compact_ops: Ops = ()  # what a Linen @nn.compact module does differently, after `ops`


# kind -> canonical leaf -> (NNX leaf, axes of the canonical tensor in NNX order, collection)
_Leaf = tuple[str, tuple[int, ...] | None, str]
KINDS: dict[str, dict[str, _Leaf]] = {
    "linear": {"weight": ("kernel", (1, 0), "params"), "bias": ("bias", None, "params")},
    "conv1d": {"weight": ("kernel", (2, 1, 0), "params"), "bias": ("bias", None, "params")},
    "conv2d": {"weight": ("kernel", (2, 3, 1, 0), "params"), "bias": ("bias", None, "params")},
    "embedding": {"weight": ("embedding", None, "params")},
    "norm": {"weight": ("scale", None, "params"), "bias": ("bias", None, "params")},
    "batchnorm": {
        "weight": ("scale", None, "params"),
        "bias": ("bias", None, "params"),
        "running_mean": ("mean", None, "batch_stats"),
        "running_var": ("var", None, "batch_stats"),
    },
}

# What `flax.linen` names the n-th module of a kind inside `@nn.compact`.
_COMPACT = {
    "linear": "Dense",
    "conv1d": "Conv",
    "conv2d": "Conv",
    "embedding": "Embed",
    "norm": "LayerNorm",
    "batchnorm": "BatchNorm",
}


def _entry(kind: str, module: str, leaf: str, shape: Shape) -> Entry:
    """The entry of tensor `module.leaf`, whose counterpart follows from its kind."""
    flax_leaf, axes, collection = KINDS[kind][leaf]
    ops: Ops = (Permute(axes),) if axes else ()
    prefix = f"{module}." if module else ""
    (flax_shape,) = run_shapes(ops, [shape])
    return Entry(
        kind,
        (Tensor(prefix + leaf, shape),),
        (Tensor(prefix + flax_leaf, flax_shape),),
        ops,
        collection,
    )


def linear(module: str, n_in: int, n_out: int, bias: bool = True) -> Iterator[Entry]:
    """nn.Linear: weight (out, in) <-> kernel (in, out)."""
    yield _entry("linear", module, "weight", (n_out, n_in))
    if bias:
        yield _entry("linear", module, "bias", (n_out,))


def flat_linear(
    module: str, channels: int, spatial: Shape, n_out: int, bias: bool = True
) -> Iterator[Entry]:
    """nn.Linear on a flattened (channels, *spatial), channel-first in PyTorch and in the NNX twin.

    A Linen `@nn.compact` module flattens as its images lie, channel-last.
    """
    weight, *rest = linear(module, channels * math.prod(spatial), n_out, bias)
    order = (*range(1, len(spatial) + 1), 0)
    yield replace(weight, compact_ops=(Reorder(0, (channels, *spatial), order),))
    yield from rest


def conv(
    module: str, n_in: int, n_out: int, *kernel: int, groups: int = 1, bias: bool = True
) -> Iterator[Entry]:
    """nn.Conv1d/2d: weight (out, in/groups, *kernel) <-> kernel (*kernel, in/groups, out)."""
    kind = f"conv{len(kernel)}d"
    yield _entry(kind, module, "weight", (n_out, n_in // groups, *kernel))
    if bias:
        yield _entry(kind, module, "bias", (n_out,))


def embedding(module: str, rows: int, dim: int) -> Iterator[Entry]:
    """nn.Embedding: weight <-> embedding, both (rows, dim)."""
    yield _entry("embedding", module, "weight", (rows, dim))


def norm(module: str, dim: int, bias: bool = True) -> Iterator[Entry]:
    """LayerNorm, GroupNorm, RMSNorm: weight <-> scale."""
    yield _entry("norm", module, "weight", (dim,))
    if bias:
        yield _entry("norm", module, "bias", (dim,))


def batchnorm(module: str, dim: int) -> Iterator[Entry]:
    """BatchNorm with running statistics; `num_batches_tracked` exists in PyTorch only."""
    for leaf in KINDS["batchnorm"]:
        yield _entry("batchnorm", module, leaf, (dim,))
    yield constant(f"{module}.num_batches_tracked", (), Constant("zeros", "I64", True))


def recurrent(
    module: str,
    gates: int,
    n_in: int,
    hidden: int,
    layers: int = 1,
    bidirectional: bool = False,
) -> Iterator[Entry]:
    """nn.RNN (1 gate), nn.GRU (3), nn.LSTM (4), whose names and shapes both sides have.

    Gates stay stacked in torch's order and both biases stay, so that moments and sums are torch's.
    """
    for layer in range(layers):
        for suffix in (f"_l{layer}", f"_l{layer}_reverse")[: 1 + bidirectional]:
            width = n_in if layer == 0 else hidden * (1 + bidirectional)
            yield from recurrent_cell(module, gates, width, hidden, suffix)


def recurrent_cell(
    module: str, gates: int, n_in: int, hidden: int, suffix: str = ""
) -> Iterator[Entry]:
    """nn.RNNCell (1 gate), nn.GRUCell (3), nn.LSTMCell (4): one step, without a suffix."""
    prefix = f"{module}." if module else ""
    for leaf, shape in (
        ("weight_ih", (gates * hidden, n_in)),
        ("weight_hh", (gates * hidden, hidden)),
        ("bias_ih", (gates * hidden,)),
        ("bias_hh", (gates * hidden,)),
    ):
        tensors = (Tensor(f"{prefix}{leaf}{suffix}", shape),)
        yield Entry("recurrent", tensors, tensors)


def attention(module: str, dim: int, bias: bool = True) -> Iterator[Entry]:
    """nn.MultiheadAttention: one fused in_proj <-> three linear layers `query`, `key`, `value`."""
    sizes = (dim, dim, dim)
    projections = ("query", "key", "value")
    yield Entry(
        "linear",
        (Tensor(f"{module}.in_proj_weight", (3 * dim, dim)),),
        tuple(Tensor(f"{module}.{p}.kernel", (dim, dim)) for p in projections),
        (Divide(0, sizes), Permute((1, 0))),
    )
    if bias:
        yield Entry(
            "linear",
            (Tensor(f"{module}.in_proj_bias", (3 * dim,)),),
            tuple(Tensor(f"{module}.{p}.bias", (dim,)) for p in projections),
            (Divide(0, sizes),),
        )
    yield from linear(f"{module}.out_proj", dim, dim, bias)


def param(name: str, *shape: int) -> Entry:
    """A bare parameter, the same on both sides."""
    return Entry("param", (Tensor(name, shape),), (Tensor(name, shape),))


def constant(name: str, shape: Shape, value: Constant) -> Entry:
    """A tensor that only PyTorch has and whose value is known: ignored, with a default."""
    return Entry("constant", (Tensor(name, shape),), constant=value)


def tie(name: str, shape: Shape, to: str) -> Entry:
    """A second name of the canonical tensor `to`; NNX has it once."""
    return Entry("tie", (Tensor(name, shape),), tied_to=to)


@dataclass(frozen=True, slots=True)
class View:
    """One entry as a tree spells it: its tensors, and the ops that make them from the canonical."""

    entry: Entry
    tensors: tuple[Tensor, ...]
    ops: Ops


class Layout:
    """All entries of one model of one configuration. Raises ValueError where they contradict."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries: tuple[Entry, ...] = tuple(entries)
        names = Counter(t.name for e in self.entries for t in e.torch)
        flax_names = Counter(t.name for e in self.entries for t in e.flax)
        if twice := [n for c in (names, flax_names) for n, count in c.items() if count > 1]:
            raise ValueError(f"stand twice in the layout: {', '.join(twice)}")
        for e in self.entries:
            made = run_shapes(e.ops, [t.shape for t in e.torch]) if e.flax else []
            if made != [t.shape for t in e.flax]:
                raise ValueError(f"{e.torch[0].name}: the ops give {made}, stated are {e.flax}")
            if e.tied_to is not None and e.tied_to not in names:
                raise ValueError(f"{e.torch[0].name} is tied to {e.tied_to}, which is no tensor")

    def view(self, tree: Tree) -> list[View]:
        """Every entry as `tree` spells it. Entries without a counterpart there have no tensors."""
        if tree == "torch":
            return [View(e, e.torch, ()) for e in self.entries]
        if tree == "nnx":
            return [View(e, e.flax, e.ops) for e in self.entries]
        if tree == "linen":
            return [
                View(e, tuple(Tensor(f"{e.collection}.{t.name}", t.shape) for t in e.flax), e.ops)
                for e in self.entries
            ]
        return self._compact_view()

    def _compact_view(self) -> list[View]:
        """The automatic names of `@nn.compact`: Dense_0, Conv_1, ..., counted in layout order."""
        counts: Counter[str] = Counter()
        modules: dict[str, str] = {}
        views = []
        for e in self.entries:
            ops = e.ops + e.compact_ops
            shapes = run_shapes(ops, [t.shape for t in e.torch]) if e.flax else []
            tensors = []
            for t, shape in zip(e.flax, shapes, strict=True):
                module, _, leaf = t.name.rpartition(".")
                if e.kind in _COMPACT:
                    if module not in modules:
                        cls = _COMPACT[e.kind]
                        modules[module] = f"{cls}_{counts[cls]}"
                        counts[cls] += 1
                    module = modules[module]
                path = f"{module}.{leaf}" if module else leaf
                tensors.append(Tensor(f"{e.collection}.{path}", shape))
            views.append(View(e, tuple(tensors), ops))
        return views

    def shapes(self, tree: Tree) -> dict[str, Shape]:
        """Name -> shape of everything that a module of that side holds.

        For "torch" this is the state_dict: ties included, constants where still saved.
        """
        return {
            t.name: t.shape
            for v in self.view(tree)
            if v.entry.constant is None or v.entry.constant.in_state_dict
            for t in v.tensors
        }

    @property
    def parameters(self) -> int:
        """Number of trained values; ties count once, running statistics and constants not."""
        return sum(
            math.prod(t.shape) for e in self.entries if e.collection == "params" for t in e.flax
        )

    def to_json(self) -> list[dict[str, Any]]:
        """The layout as JSON data; `from_json` gives it back."""
        return [_entry_to_json(e) for e in self.entries]

    @classmethod
    def from_json(cls, data: Iterable[Mapping[str, Any]]) -> Layout:
        """The layout that `to_json` gave."""
        return cls(_entry_from_json(d) for d in data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.entries == other.entries

    def __hash__(self) -> int:
        return hash(self.entries)


def between(source: View, target: View) -> tuple[Ops, Ops]:
    """The ops from the source's tensors to the target's, and those back again."""
    if source.ops == target.ops:
        return (), ()
    canonical = [t.shape for t in source.entry.torch]
    forth = inverse(source.ops, canonical) + target.ops
    back = inverse(target.ops, canonical) + source.ops
    return forth, back


def canonical_guess(flax: Mapping[str, Shape]) -> dict[str, Shape]:
    """Canonical names and shapes that a tree of NNX names would have if every module were plain.

    A guess, for finding sizes before a layout is known; the pairing with the layout that is then
    built decides. Names that are nobody's leaf stay as they are.
    """
    result = {}
    for name, shape in flax.items():
        module, dot, leaf = name.rpartition(".")
        for kind in KINDS.values():
            found = [
                (torch_leaf, axes)
                for torch_leaf, (flax_leaf, axes, _) in kind.items()
                if flax_leaf == leaf and (axes is None or len(axes) == len(shape))
            ]
            if found:
                torch_leaf, axes = found[0]
                if axes:
                    ((shape),) = run_shapes(inverse((Permute(axes),), [shape]), [shape])
                result[f"{module}{dot}{torch_leaf}"] = shape
                break
        else:
            result[name] = shape
    return result


def _entry_to_json(e: Entry) -> dict[str, Any]:
    data: dict[str, Any] = {"kind": e.kind, "torch": {t.name: list(t.shape) for t in e.torch}}
    if e.flax:
        data["flax"] = {t.name: list(t.shape) for t in e.flax}
    if e.ops:
        data["ops"] = [op_to_json(op) for op in e.ops]
    if e.compact_ops:
        data["compact_ops"] = [op_to_json(op) for op in e.compact_ops]
    if e.collection != "params":
        data["collection"] = e.collection
    if e.tied_to is not None:
        data["tied_to"] = e.tied_to
    if e.constant is not None:
        c = e.constant
        data["constant"] = {"fill": c.fill, "dtype": c.dtype, "in_state_dict": c.in_state_dict}
    return data


def _entry_from_json(data: Mapping[str, Any]) -> Entry:
    def tensors(key: str) -> tuple[Tensor, ...]:
        return tuple(Tensor(n, tuple(s)) for n, s in data.get(key, {}).items())

    def ops(key: str) -> tuple[Op, ...]:
        return tuple(op_from_json(op) for op in data.get(key, ()))

    return replace(
        Entry(data["kind"], tensors("torch"), tensors("flax"), ops("ops")),
        collection=data.get("collection", "params"),
        tied_to=data.get("tied_to"),
        constant=Constant(**data["constant"]) if "constant" in data else None,
        compact_ops=ops("compact_ops"),
    )
