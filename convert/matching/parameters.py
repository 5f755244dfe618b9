"""Which parameter of a torch module is which of a Flax module, layer by layer, with the ops."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from convert.matching.bare import match_eliminated, match_left
from convert.matching.layers import normal
from convert.matching.pair import LayerPair, Match
from convert.matching.rearranged import match_values, with_copies
from convert.runtime.applied import Applied
from convert.runtime.arrays import to_numpy
from convert.runtime.pure_module import FlaxModule, cell_path
from convert.runtime.torch_module import computed, state
from convert.runtime.torch_recurrent import is_single
from zoo.layout.kinds import kinds, torch_kind
from zoo.layout.ops import Divide, Flip, Merge, Op, Ops, Permute, Split, run, run_shapes

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Found = Iterator[Match]
# Flax's cells name a linear layer for each gate; torch stacks them in this order.
_GATES = {
    "LSTM": (("ii", "if", "ig", "io"), ("hi", "hf", "hg", "ho")),
    "GRU": (("ir", "iz", "in"), ("hr", "hz", "hn")),
    "RNN": (("i",), ("h",)),
}


def pair_tensors(module: Any, layers: list[LayerPair], side: FlaxModule) -> list[Match]:
    """The matches of a torch module's tensors, from layers that are paired already; those of a
    scanned stack layer by layer."""
    modules = dict(module.named_modules())
    values = side.unstacked()
    flax = {n: tuple(np.shape(v)) for n, v in values.items()}
    found: list[Match] = []
    taken: set[str] = set()
    uncalled = [LayerPair(n, path, "") for n, path in _uncalled(modules, layers, values)]
    for layer in [*layers, *uncalled]:
        for m in _of_layer(layer, modules[layer.torch], side, flax):
            m = _as_it_lies(m, module, side, values)
            if not taken & set(m.flax):
                found.append(m)
                taken |= set(m.flax)
    found += _bare(module, found, flax, taken)
    found += match_values(*_left(module, values, found))
    tensors = {n: to_numpy(t) for n, t in state(module).items()}
    for whole, copied in list(with_copies(found, tensors, *_left(module, values, found))):
        found = [*(m for m in found if m not in copied), whole]
    found += match_left(*_left(module, values, found), [*layers, *_owners(found)])  # beside those
    found += match_left(*_left(module, values, found), layers)
    found += _statistics(modules, values, found)
    found += match_left(*_left_buffers(module, values, found), [])
    found += match_eliminated(*_left(module, values, found), tensors, found)
    return found


def _places(found: list[Match]) -> list[tuple[str, str]]:
    """The modules, torch's and Flax's, that hold tensors which are each other's."""
    single = (m for m in found if len(m.torch) == len(m.flax) == 1)
    places = ((m.torch[0].rpartition(".")[0], m.flax[0].rpartition(".")[0]) for m in single)
    return list(dict.fromkeys(places))


def _owners(found: list[Match]) -> list[LayerPair]:
    """Where tensors lie that are each other's, as far as each place has one of the other side."""
    pairs = _places(found)
    counts = [Counter(p[side] for p in pairs) for side in (0, 1)]
    return [
        LayerPair(ours, theirs, "", "values")
        for ours, theirs in pairs
        if ours and theirs and counts[0][ours] == counts[1][theirs] == 1
    ]


def _statistics(
    modules: Mapping[str, Any], values: Mapping[str, Any], found: list[Match]
) -> list[Match]:
    """The running statistics of norms of somebody's own, which lie where their parameters do: of
    the names that are usual, else of the very values."""
    owners: dict[str, list[str]] = {}
    for ours, theirs in _places(found):
        owners.setdefault(ours, []).append(theirs)
    taken = {n for m in found for n in (*m.torch, *m.flax)}
    made = []
    for name, (owner, *others) in owners.items():
        for leaf in ("running_mean", "running_var"):
            held, full = getattr(modules[name], leaf, None), f"{name}.{leaf}" if name else leaf
            if others or held is None or full in taken:
                continue
            able = {n.rpartition(".")[2]: n for n in values
                    if n.rpartition(".")[0] == owner and n not in taken
                    and np.shape(values[n]) == tuple(held.shape)}  # fmt: skip
            alike = [k for k, n in able.items() if np.array_equal(values[n], to_numpy(held))]
            usual = [k for k in _flax_leaves(leaf) if k in able]
            if usual or len(alike) == 1:
                path = able[(usual or alike)[0]]
                made.append(Match((full,), (path,), (), "batchnorm"))
                taken.add(path)
    return made


def _left(module: Any, values: Mapping[str, Any], found: list[Match]) -> tuple[Any, Any]:
    """torch's parameters, and Flax's values, that no match has, as arrays."""
    ours, theirs = (set(names) for names in _unmatched(module, values, found))
    trained = dict(module.named_parameters())
    return (
        {n: to_numpy(p) for n, p in trained.items() if n in ours},
        {n: to_numpy(v) for n, v in values.items() if n in theirs},
    )


def _left_buffers(module: Any, values: Mapping[str, Any], found: list[Match]) -> tuple[Any, Any]:
    """As `_left`, of tensors that torch saves and does not train. One number is not told by its
    value."""
    ours, theirs = (set(names) for names in _unmatched(module, values, found))
    saved = {n: to_numpy(b) for n, b in state(module).items() if n in ours}
    trained = dict(module.named_parameters())
    return (
        {n: b for n, b in saved.items() if n not in trained and b.dtype.kind == "f" and b.size > 1},
        {n: to_numpy(v) for n, v in values.items() if n in theirs},
    )


def _uncalled(
    modules: Mapping[str, Any], layers: list[LayerPair], values: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Layers of equal names that no recorded call paired: inside a scan, or not called at all."""
    flax = {normal(n.rpartition(".")[0]): n.rpartition(".")[0] for n in values}
    paired = {p.torch for p in layers}
    return [(n, flax[normal(n)]) for n in modules if n not in paired and normal(n) in flax]


def unmatched(module: Any, side: FlaxModule, matches: Any) -> tuple[list[str], list[str]]:
    """Names of torch's state (ties count once, and without what its code makes and nobody saves:
    positions, angles of a rotation) and of Flax's values that no match has."""
    ours, theirs = _unmatched(module, side.values, matches)
    made = computed(module)
    return [n for n in ours if n not in made], theirs


def _unmatched(module: Any, values: Any, matches: Any) -> tuple[list[str], list[str]]:
    ours, theirs = ({n for m in matches for n in getattr(m, s)} for s in ("torch", "flax"))
    tensors = state(module)
    alias = {id(t): n for n, t in tensors.items() if n in ours}
    skip = ("num_batches_tracked",)
    left = [
        n
        for n, t in tensors.items()
        if n not in ours and id(t) not in alias and not n.endswith(skip)
    ]
    return left, [n for n in values if n not in theirs]


def _of_layer(layer: LayerPair, module: Any, side: FlaxModule, flax: Shapes) -> list[Match]:
    kind = torch_kind(module)
    own = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
    own |= {n: tuple(b.shape) for n, b in module.named_buffers(recurse=False)}
    prefix = f"{layer.flax}." if layer.flax else ""
    if not any(n.startswith(prefix) for n in flax):
        prefix = f"{cell_path(side, layer.flax)}."
    below = {n.removeprefix(prefix): s for n, s in flax.items() if n.startswith(prefix)}
    matchers: dict[str, Callable[..., Found]] = {"attention": _attention, "recurrent": _recurrent}
    matcher: Callable[..., Found] = matchers.get(kind, _plain)
    made = matcher(module, kind, own, below, side.modules.get(layer.flax))

    def named(leaf: str) -> str:
        before, _, last = layer.torch.rpartition(".")
        if is_single(module):  # the stack has its parameters
            leaf = f"{leaf.removesuffix('_l0')}_{last}"
        else:
            before = layer.torch
        return f"{before}.{leaf}" if before else leaf

    return [
        Match(tuple(named(n) for n in m.torch), tuple(prefix + n for n in m.flax), m.ops, m.kind)
        for m in made
    ]


def _as_it_lies(match: Match, module: Any, side: FlaxModule, values: Mapping[str, Any]) -> Match:
    """The match without its ops where nothing but the values tells that it needs none: a square
    matrix of a function's parameters, or one that is called as torch's is. With one where they tell
    that a matrix of somebody's own layer lies the other way."""
    if len(match.torch) > 1 or len(match.flax) > 1:
        return match
    ours, theirs = state(module)[match.torch[0]], values[match.flax[0]]
    if not match.ops:
        own = match.kind == "param" and ours.ndim == 2 and tuple(ours.shape) == np.shape(theirs)
        turned = own and np.array_equal(to_numpy(ours).T, theirs)
        straight = own and np.array_equal(to_numpy(ours), theirs)
        return (
            dataclasses.replace(match, ops=(Permute((1, 0)),)) if turned and not straight else match
        )
    named = match.torch[0].rpartition(".")[2] == match.flax[0].rpartition(".")[2]
    unruled = named or isinstance(side.modules.get(""), Applied)
    if not unruled or tuple(ours.shape) != np.shape(theirs):
        return match
    x, y = to_numpy(ours), to_numpy(theirs)
    turned = run(match.ops, [x])[0]
    nearer = np.abs(x - y).mean() < np.abs(turned - y).mean()
    return dataclasses.replace(match, ops=()) if nearer else match


def _plain(module: Any, kind: str, own: Shapes, below: Shapes, flax: Any) -> Found:
    for leaf, shape in own.items():
        for other in _flax_leaves(leaf):
            if other not in below:
                continue
            ops = _weight_ops(module, kind, shape, below[other], flax) if leaf == "weight" else (
                _split_bias(shape, below[other]))  # fmt: skip
            if ops is not None and run_shapes(ops, [shape]) == [below[other]]:
                yield Match((leaf,), (other,), ops, _word(kind))
                break


def _split_bias(shape: Shape, target: Shape) -> Ops:
    """A bias with several axes of features, as DenseGeneral has it."""
    if len(shape) == 1 and len(target) > 1 and shape[0] == int(np.prod(target)):
        return (Split(0, _axes(len(target)), target),)
    return ()


def _flax_leaves(leaf: str) -> list[str]:
    """What Flax may call a tensor that torch calls `leaf`, by the table of kinds; last the same."""
    rows = (kind.leaves[leaf].nnx for kind in kinds().values() if leaf in kind.leaves)
    return list(dict.fromkeys((*rows, leaf)))


def _word(kind: str) -> str:
    return "param" if kind == "other" else kind


def _weight_ops(module: Any, kind: str, shape: Any, target: Any, flax: Any) -> Ops | None:
    """From torch's weight to Flax's kernel of this shape; None if it is none of it."""
    n = len(shape)
    if kind == "linear":
        flat: tuple[Op, ...] = () if type(module).__name__ == "Conv1D" else (Permute((1, 0)),)
        rows, columns = run_shapes(flat, [shape])[0]
        return _features(flat, rows, columns, target)
    pointwise = int(np.prod(shape[2:])) == 1 and len(target) == 2
    if kind.startswith("conv") and kind != "conv_transpose" and pointwise:
        flat = (Merge(1, ("channels", *_axes(n - 2)), shape[1:]), Permute((1, 0)))
        return flat
    if kind.startswith("conv") and kind != "conv_transpose":
        return (Permute((*range(2, n), 1, 0)),)
    if kind == "conv_transpose":
        if getattr(flax, "transpose_kernel", False):
            return (Permute((*range(2, n), 1, 0)),)
        return (Permute((*range(2, n), 0, 1)), Flip(tuple(range(n - 2))))
    return ()


def _features(flat: Ops, rows: int, columns: int, target: tuple[int, ...]) -> Ops | None:
    """(in, out) into a kernel with several axes of features, as DenseGeneral has them."""
    ops = flat
    for k in range(1, len(target)):
        if int(np.prod(target[:k])) == rows and int(np.prod(target[k:])) == columns:
            if len(target) - k > 1:
                ops = (*ops, Split(1, _axes(len(target) - k), target[k:]))
            if k > 1:
                ops = (*ops, Split(0, _axes(k), target[:k]))
            return ops
    return None


def _axes(n: int) -> tuple[str, ...]:
    return ("heads", "head_dim") if n == 2 else tuple(f"axis{i}" for i in range(n))


def _attention(module: Any, kind: str, own: Shapes, below: Shapes, flax: Any) -> Found:
    """nn.MultiheadAttention: fused or separate projections <-> query, key, value, out."""
    E = module.embed_dim if hasattr(module, "embed_dim") else own["in_proj_weight"][1]
    three = ("query", "key", "value")
    targets = tuple(f"{p}.kernel" for p in three)
    if "in_proj_weight" in own and all(t in below for t in targets):
        rest = _features((), E, E, below["query.kernel"])
        if rest is not None:
            ops: Ops = (Divide(0, (E, E, E)), Permute((1, 0)), *rest)
            yield Match(("in_proj_weight",), targets, ops, "linear")
    for p, leaf in zip(three, ("q_proj_weight", "k_proj_weight", "v_proj_weight"), strict=True):
        if own.get(leaf) and f"{p}.kernel" in below:
            rows, columns = own[leaf][1], own[leaf][0]
            rest = _features((Permute((1, 0)),), rows, columns, below[f"{p}.kernel"])
            if rest is not None:
                yield Match((leaf,), (f"{p}.kernel",), rest, "linear")
    biases = tuple(f"{p}.bias" for p in three)
    if "in_proj_bias" in own and all(b in below for b in biases):
        shape = below["query.bias"]
        split = (Split(0, _axes(len(shape)), shape),) if len(shape) > 1 else ()
        yield Match(("in_proj_bias",), biases, (Divide(0, (E, E, E)), *split), "linear")
    for name in ("out", "out_proj"):
        if (kernel := below.get(f"{name}.kernel")) is not None:
            rest = _features((Permute((1, 0)),), E, E, kernel)
            if rest is not None:
                yield Match(("out_proj.weight",), (f"{name}.kernel",), rest, "linear")
            if f"{name}.bias" in below:
                yield Match(("out_proj.bias",), (f"{name}.bias",), (), "linear")


def _recurrent(module: Any, kind: str, own: Shapes, below: Shapes, flax: Any) -> Found:
    """One layer and direction of nn.LSTM, nn.GRU or nn.RNN <-> a cell, its gates apart or fused."""
    same = [n for n in own if below.get(n) == own[n]]
    if same:
        yield from (Match((n,), (n,), (), "recurrent") for n in same)
        return
    word = next((k for k in _GATES if k in type(module).__name__.upper()), "RNN")
    suffixes = {n.removeprefix("weight_ih") for n in own if n.startswith("weight_ih")}
    if len(suffixes) != 1:
        return
    (suffix,) = suffixes
    sides = zip(("weight_ih", "weight_hh"), _GATES[word], ("dense_i", "dense_h"), strict=True)
    for leaf, gates, fused in sides:
        rows, columns = own[leaf + suffix]
        each = (rows // len(gates),) * len(gates)
        targets = tuple(_ending(below, f"{g}.kernel", f"{g}_.kernel") for g in gates)
        whole = _ending(below, f"{fused}.kernel")
        if all(targets):
            divide: Ops = (Divide(0, each),) if len(gates) > 1 else ()
            ops: Ops = (*divide, Permute((1, 0)))
            yield Match((leaf + suffix,), tuple(map(str, targets)), ops, "recurrent")
        elif whole and below[whole] == (columns, rows):
            yield Match((leaf + suffix,), (whole,), (Permute((1, 0)),), "recurrent")


def _ending(below: Shapes, *ends: str) -> str | None:
    return next((n for n in below for e in ends if n == e or n.endswith(f".{e}")), None)


def _bare(module: Any, found: list[Match], flax: Shapes, taken: set[str]) -> list[Match]:
    """What no layer's call covers, by name and shape: parameters of layers never called, and
    bare ones (`cls_token`)."""
    tensors = state(module)
    done = {id(tensors[n]) for m in found for n in m.torch if n in tensors}
    free = {normal(n): n for n in flax if n not in taken}
    made = []
    for name, value in tensors.items():
        if id(value) in done:
            continue
        stem, _, leaf = name.rpartition(".")
        for other in (leaf, *_flax_leaves(leaf)):
            target = free.get(normal(f"{stem}.{other}" if stem else other))
            if target is None or flax[target] != tuple(value.shape):
                continue
            if len(value.shape) == 2 and other == "kernel":
                continue  # a matrix that may want transposing: nothing says which
            made.append(Match((name,), (target,), (), "param"))
            done.add(id(value))
            del free[normal(target)]
            break
    return made
