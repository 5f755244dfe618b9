"""The layout of anybody's torch module, from the kinds of its layers: no Flax definition is needed.

Names are the module's own, those of a kind in the table with NNX's leaf (`fc.weight` (out, in) is
`fc.kernel` (in, out)). What the table does not know keeps its name and its axes.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from convert.runtime.torch_module import uncompiled, unwrapped
from zoo.containers.errors import UsageError
from zoo.layout import Constant, Entry, Layout, Shape, Tensor, attention, constant, of_kind, tie
from zoo.layout.kinds import BUILT_IN, kinds, torch_kind
from zoo.layout.ops import Flip, Ops, Permute, run_shapes
from zoo.loading import LoadNotice
from zoo.registry import defined_by

_COUNTER = "num_batches_tracked"
_PROJECTIONS = {"q_proj_weight": "query", "k_proj_weight": "key", "v_proj_weight": "value"}
_SHOWN = 8


def layout_of(module: Any) -> Layout:
    """The layout of a torch module of any kind: what each tensor of its `state_dict` is in Flax.

    Linear, convolution, transposed convolution, embedding, norms, BatchNorm with its statistics,
    recurrent layers and nn.MultiheadAttention become what Flax calls them, in Flax's axes; tensors
    of one storage are tied. Parameters of other layers keep names and axes, and a
    `zoo.loading.LoadNotice` names them. Only names and shapes are looked at: `module` may be on
    torch's device "meta". A model of the zoo has the layout of its family.

    Raises UsageError for what is not a torch module with all its shapes known.
    """
    layout, notices = derive_layout(module)
    for notice in notices:
        warnings.warn(notice, LoadNotice, stacklevel=2)
    return layout


def derive_layout(module: Any) -> tuple[Layout, list[str]]:
    """The same, and what to tell of it."""
    import torch

    if not isinstance(module, torch.nn.Module):
        what = f"the class {module.__name__}" if isinstance(module, type) else repr(type(module))
        raise UsageError(f"{what} is not a torch module", "give an instance: Net(), not Net")
    module = unwrapped(module)
    family = defined_by(module, "torch")
    if family is not None and isinstance(getattr(module, "config", None), family.config):
        return family.layout_of(module.config), []
    state = saved_tensors(module)
    entries = _Entries(module, {n: tuple(t.shape) for n, t in state.items()}, ties_of(state))
    layout = Layout(entries.every())
    return layout, entries.notices()


def saved_tensors(module: Any) -> dict[str, Any]:
    """The tensors of a torch module's `state_dict`, its own objects, by their names without what
    torch.compile puts into them. UsageError where one has no shape yet."""
    import torch

    held = {uncompiled(n): t for n, t in module.state_dict(keep_vars=True).items()}
    lazy = torch.nn.parameter.is_lazy
    if unknown := [n for n, t in held.items() if lazy(t)]:
        raise UsageError(
            f"{len(unknown)} parameters have no shape yet: {_some(unknown)}",
            "run the module once, which gives lazy layers their sizes",
        )
    return {n: t for n, t in held.items() if isinstance(t, torch.Tensor)}


def ties_of(state: Mapping[str, Any]) -> dict[str, str]:
    """Name -> the first name of the same tensor: of one storage, seen alike."""
    first: dict[Any, str] = {}
    ties = {}
    for name, t in state.items():
        if (owner := first.setdefault(_place(t), name)) != name:
            ties[name] = owner
    return ties


def _place(t: Any) -> Any:
    """What two tensors have in common that are one; on "meta" too, where no address tells."""
    if str(t.layout) != "torch.strided" or not t.numel():
        return id(t)
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype


class _Entries:
    """The entries of one module, and which of its tensors no kind knows."""

    def __init__(self, module: Any, shapes: Mapping[str, Shape], ties: Mapping[str, str]) -> None:
        self.shapes, self.ties = shapes, ties
        self.owners = {uncompiled(n): m for n, m in module.named_modules(remove_duplicate=False)}
        self.buffers = {uncompiled(n) for n, _ in module.named_buffers(remove_duplicate=False)}
        self.taken = set(shapes) | {p for n in shapes for p in _parents(n)}
        self.kept: list[str] = []

    def every(self) -> Iterator[Entry]:
        """One entry for each tensor, in torch's order."""
        plain = {n: s for n, s in self.shapes.items() if n not in self.ties and not _counts(n, s)}
        found = {n: self._of_table(n, s) for n, s in plain.items()}
        wanted = Counter(t.name for e in found.values() if e for t in e.flax)
        for name, shape in self.shapes.items():
            if _counts(name, shape):
                yield constant(name, shape, Constant("zeros", "I64", True))
            elif name in self.ties:
                yield tie(name, shape, self.ties[name])
            elif (e := found[name]) and all(wanted[t.name] == 1 for t in e.flax):
                yield e
            else:
                yield self._kept(name, shape)

    def notices(self) -> list[str]:
        """What a user should be told."""
        groups = {
            "parameters of layers that are not in the table keep their names and axes": [
                n for n in self.kept if n not in self.buffers
            ],
            "buffers keep their names and axes": [n for n in self.kept if n in self.buffers],
        }
        return [f"{told}: {_some(names)}" for told, names in groups.items() if names]

    def _of_table(self, name: str, shape: Shape) -> Entry | None:
        """The entry of a tensor whose layer says what it is; None where it says nothing, or where
        Flax's name is another tensor's."""
        path, _, leaf = name.rpartition(".")
        owner = self.owners.get(path)
        if owner is None:
            return None
        try:
            found = _entry(owner, path, leaf, shape)
        except ValueError:  # a layer of a known name whose tensors are others
            return None
        if found is None:
            return None
        made = {t.name for t in found.flax} - {name}
        clash = made & self.taken or {p for n in made for p in _parents(n)} & self.shapes.keys()
        return None if clash else found

    def _kept(self, name: str, shape: Shape) -> Entry:
        self.kept.append(name)
        tensor = Tensor(name, shape)
        collection = "buffers" if name in self.buffers else "params"
        return Entry("param", (tensor,), (tensor,), collection=collection)


def _counts(name: str, shape: Shape) -> bool:
    return name.rpartition(".")[2] == _COUNTER and shape == ()


def _entry(owner: Any, path: str, leaf: str, shape: Shape) -> Entry | None:
    """What a layer's kind says of one of its tensors; None if nothing."""
    kind = _kind(owner)
    prefix = f"{path}." if path else ""
    if kind == "recurrent":
        same = (Tensor(prefix + leaf, shape),)
        return Entry(kind, same, same)
    if kind == "attention":
        return _projection(prefix, leaf, shape)
    if kind == "conv_transpose" and leaf == "weight" and owner.groups > 1:
        return None  # Flax's has no groups
    if kind == "conv_transpose" and leaf == "weight":
        n = len(shape)
        ops: Ops = (Permute((*range(2, n), 0, 1)), Flip(tuple(range(n - 2))))
        return _renamed(kind, prefix, leaf, "kernel", shape, ops)
    if kind == "conv_transpose" and leaf == "bias":
        return _renamed(kind, prefix, leaf, leaf, shape)
    if type(owner).__name__ == "Conv1D" and kind == "linear" and leaf == "weight":
        return _renamed(kind, prefix, leaf, "kernel", shape)  # transformers' is stored (in, out)
    row = kinds().get(kind)
    return of_kind(kind, path, leaf, shape) if row and leaf in row.leaves else None


def _kind(owner: Any) -> str:
    """The kind of a layer whose tensors lie as torch's own do.

    Somebody's own class of such a name may keep a matrix the other way round: it is "other" where
    the table would move its axes.
    """
    kind = torch_kind(owner)
    row = kinds().get(kind)
    moves = row is not None and any(there.axes for there in row.leaves.values())
    if row not in BUILT_IN or not (moves or kind in ("attention", "conv_transpose")):
        return kind
    assert row is not None
    bases = type(owner).__mro__
    torchs = any(row.is_torch(b) and b.__module__.startswith("torch.") for b in bases)
    published = type(owner).__name__ == "Conv1D" and hasattr(owner, "nf")
    return kind if torchs or published else "other"


def _projection(prefix: str, leaf: str, shape: Shape) -> Entry | None:
    """nn.MultiheadAttention: a fused in_proj, or three of different widths."""
    if leaf in ("in_proj_weight", "in_proj_bias"):
        every = attention(prefix.removesuffix("."), shape[0] // 3)
        return next((e for e in every if e.torch[0].name == prefix + leaf), None)
    if leaf in _PROJECTIONS:
        return _renamed(
            "linear", prefix, leaf, f"{_PROJECTIONS[leaf]}.kernel", shape, (Permute((1, 0)),)
        )
    return None


def _renamed(kind: str, prefix: str, leaf: str, flax: str, shape: Shape, ops: Ops = ()) -> Entry:
    (made,) = run_shapes(ops, [shape])
    return Entry(kind, (Tensor(prefix + leaf, shape),), (Tensor(prefix + flax, made),), ops)


def _parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:i]) for i in range(1, len(parts)))


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    more = f", ... and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(itertools.islice(shown, _SHOWN)) + more
