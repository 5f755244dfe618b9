"""Entries: what each tensor of a model is on either side, and short ways to write them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from zoo.containers import dtypes
from zoo.layout.kinds import kinds
from zoo.layout.ops import Divide, Ops, Permute, Reorder, Shape, run_shapes


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

    def check(self, shape: Shape) -> None:
        """ValueError where no tensor of this shape can have such values."""
        if self.fill not in ("zeros", "arange") or self.dtype not in dtypes.NUMPY:
            raise ValueError(f"there is no constant of {self.fill!r} in {self.dtype!r}")
        if self.fill == "arange" and not shape:
            raise ValueError("a scalar has no axis to count along")


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


@dataclass(frozen=True, slots=True)
class View:
    """One entry as a tree spells it: its tensors, and the ops that make them from the canonical."""

    entry: Entry
    tensors: tuple[Tensor, ...]
    ops: Ops


def of_kind(kind: str, module: str, leaf: str, shape: Shape) -> Entry:
    """The entry of tensor `module.leaf`, whose counterpart follows from its kind."""
    ops, flax, flax_shape, collection = _counterpart(kind, leaf, shape)
    prefix = f"{module}." if module else ""
    torch = Tensor(prefix + leaf, shape)
    return Entry(kind, (torch,), (Tensor(prefix + flax, flax_shape),), ops, collection)


@functools.lru_cache(maxsize=4096)
def _counterpart(kind: str, leaf: str, shape: Shape) -> tuple[Ops, str, Shape, str]:
    """Of a leaf, what layers of one size share: the ops, name and shape in Flax, the collection."""
    there = kinds()[kind].leaves[leaf]
    ops: Ops = (Permute(there.axes),) if there.axes else ()
    (flax_shape,) = run_shapes(ops, [shape])
    return ops, there.nnx, flax_shape, there.collection


def linear(module: str, n_in: int, n_out: int, bias: bool = True) -> Iterator[Entry]:
    """nn.Linear: weight (out, in) <-> kernel (in, out)."""
    yield of_kind("linear", module, "weight", (n_out, n_in))
    if bias:
        yield of_kind("linear", module, "bias", (n_out,))


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
    yield of_kind(kind, module, "weight", (n_out, n_in // groups, *kernel))
    if bias:
        yield of_kind(kind, module, "bias", (n_out,))


def embedding(module: str, rows: int, dim: int) -> Iterator[Entry]:
    """nn.Embedding: weight <-> embedding, both (rows, dim)."""
    yield of_kind("embedding", module, "weight", (rows, dim))


def norm(module: str, dim: int, bias: bool = True) -> Iterator[Entry]:
    """LayerNorm, GroupNorm, RMSNorm: weight <-> scale."""
    yield of_kind("norm", module, "weight", (dim,))
    if bias:
        yield of_kind("norm", module, "bias", (dim,))


def batchnorm(module: str, dim: int) -> Iterator[Entry]:
    """BatchNorm with running statistics; `num_batches_tracked` exists in PyTorch only."""
    for leaf in kinds()["batchnorm"].leaves:
        yield of_kind("batchnorm", module, leaf, (dim,))
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
    prefix = f"{module}." if module else ""
    projections = ("query", "key", "value")
    yield Entry(
        "linear",
        (Tensor(f"{prefix}in_proj_weight", (3 * dim, dim)),),
        tuple(Tensor(f"{prefix}{p}.kernel", (dim, dim)) for p in projections),
        (Divide(0, sizes), Permute((1, 0))),
    )
    if bias:
        yield Entry(
            "linear",
            (Tensor(f"{prefix}in_proj_bias", (3 * dim,)),),
            tuple(Tensor(f"{prefix}{p}.bias", (dim,)) for p in projections),
            (Divide(0, sizes),),
        )
    yield from linear(f"{prefix}out_proj", dim, dim, bias)


def param(name: str, *shape: int) -> Entry:
    """A bare parameter, the same on both sides."""
    return Entry("param", (Tensor(name, shape),), (Tensor(name, shape),))


def constant(name: str, shape: Shape, value: Constant) -> Entry:
    """A tensor that only PyTorch has and whose value is known: ignored, with a default."""
    return Entry("constant", (Tensor(name, shape),), constant=value)


def tie(name: str, shape: Shape, to: str) -> Entry:
    """A second name of the canonical tensor `to`; NNX has it once."""
    return Entry("tie", (Tensor(name, shape),), tied_to=to)
