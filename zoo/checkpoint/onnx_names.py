"""The tensors of an ONNX file as a PyTorch checkpoint has them: by its names, in its axes.

Exporters keep a weight's name where they keep the weight. Where they turn it (a Linear's, for
MatMul), split it or fold a constant into it, they rename it; then the operations that take it say
whose it is, by the module that they were exported from, and how its axes lie. A name that stands is
held against the graph too: a square matrix that lies the other way round has the right name and the
right shape.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from zoo.checkpoint.label import Label
from zoo.checkpoint.onnx_recurrent import recurrent
from zoo.checkpoint.readings import Candidate, readings
from zoo.checkpoint.request import Request
from zoo.containers.base import Reader, TensorInfo
from zoo.containers.dtypes import is_float
from zoo.containers.errors import UsageError
from zoo.containers.onnx_graph import OnnxReader, Source
from zoo.containers.onnx_graph.uses import Use
from zoo.layout import Entry, View
from zoo.layout.ops import Permute

# What exporters and optimizers call what they make themselves.
_MADE = re.compile(
    r"/.*|.*::.*|_?val_\d+|\d+|.*Fusion.*|.*_quantized|.*_output_\d+"
    r"|(.*\.)?(lifted_tensor_|_tensor_constant)\d+",
    re.DOTALL,
)
_CHANGED = re.compile(r".*Fusion.*|.*_quantized|.*_zero_point", re.DOTALL)  # other values too
_LEAVES = {
    **{"in_out": "weight", "out_in": "weight", "conv": "weight", "table": "weight"},
    **{"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"},
}
_MATRIX = ("in_out", "out_in")
_QUANTIZED = {"DequantizeLinear", "MatMulInteger", "ConvInteger", "QLinearConv", "QLinearMatMul"}
_FUSED = {"Attention", "MultiHeadAttention", "QAttention", "EmbedLayerNormalization"}


@dataclass(frozen=True, slots=True)
class _Held:
    """One name in the file's name space: what it is made of, and how a matrix lies there."""

    source: Source
    lies: str = ""  # "in_out", "out_in", or "" of what is no matrix of a linear map
    likely: bool = True  # a weight, and not perhaps a constant of the graph


def settle(reader: Reader, label: Label, request: Request) -> None:
    """Have an ONNX file's reader show the tensors that a PyTorch checkpoint would have; nothing is
    done to any other.

    What no layout asks for and the graph does not use as a weight is left out. Where no reading
    fits, the nearest is shown, for the error that lists what differs. UsageError where BatchNorm
    was folded into convolutions.
    """
    if not isinstance(reader, OnnxReader) or reader.settled:
        return
    held = _held(reader)
    likely = {n: h for n, h in held.items() if h.likely}
    best: _Fitted | None = None
    for shown in (likely, held) if len(likely) < len(held) else (likely,):
        for lies in _MATRIX:  # of torch's Linear, and of the Conv1D of transformers
            header = {n: _info(reader, _turned(h, lies)) for n, h in shown.items()}
            for c in readings(header, label, request, ("torch",)):
                found = _fitted(reader, c, held)
                if not found.wrong:
                    reader.present({n: h.source for n, h in found.shown.items()})
                    reader.settled = True
                    return
                if best is None or len(found.wrong) < len(best.wrong):
                    best = found
    if best is not None:
        _refuse_folded(reader, best)
    shown = best.shown if best and len(best.wrong) < len(best.shown) else likely
    reader.present({n: h.source for n, h in shown.items()})


def _held(reader: OnnxReader) -> dict[str, _Held]:
    """Every name that a tensor of the file may have in a PyTorch checkpoint: the one that stands,
    and those that the operations say which take it."""
    found: dict[str, _Held] = {}
    for name, uses in reader.uses.items():
        told = any(u.role in _LEAVES for u in uses)
        lies = _as_stored(uses)
        if not _MADE.fullmatch(name):
            dotted = "." in name and is_float(reader.stored[name].dtype)
            found[name] = _Held(Source(name), lies, dotted or told)
        elif not _CHANGED.fullmatch(name) and not any(u.scopes for u in uses if u.role in _LEAVES):
            # A weight that nothing names, or a constant of the graph.
            found[name] = _Held(Source(name), lies, told and _heavy(reader, name))
    for path, leaf, held in _proposed(reader):
        found.setdefault(f"{path}.{leaf}" if path else leaf, held)
    for name, source in recurrent(reader):
        found.setdefault(name, _Held(source))
    return found


def _heavy(reader: OnnxReader, name: str) -> bool:
    """Whether what an exporter named is a weight by its size, and no constant of the code."""
    return reader.stored[name].size > 1 and not name.startswith("/")


def _as_stored(uses: list[Use]) -> str:
    """How a matrix lies in the file, of how the first linear map takes it; "" of what is none."""
    first = next((u for u in uses if u.role in _MATRIX), None)
    if first is None or first.turned in (None, (0, 1)):
        return first.role if first else ""
    return "out_in" if first.role == "in_out" else "in_out"


def _proposed(reader: OnnxReader) -> Iterator[tuple[str, str, _Held]]:
    """The paths of modules, and the leaf that an operation's argument is, of every weight."""
    for name, uses in reader.uses.items():
        if _CHANGED.fullmatch(name) or not reader.stored[name].shape:
            continue
        for use in uses:
            if use.role in _LEAVES:
                likely = _heavy(reader, name)
                for i, path in enumerate(use.scopes):  # the first is what it most often means
                    held = _Held(Source(name), _as_stored([use]), likely and not i)
                    yield path, _LEAVES[use.role], held


def _turned(h: _Held, lies: str) -> Source:
    """The matrix so that it lies this way; anything else as it is."""
    turns = lies and h.lies and h.lies != lies
    return replace(h.source, axes=(1, 0)) if turns else h.source


def _info(reader: OnnxReader, source: Source) -> TensorInfo:
    info = reader.stored[source.stored]
    return TensorInfo(info.dtype, source.shape(info.shape))


@dataclass(frozen=True, slots=True)
class _Fitted:
    """What one reading takes of the file, by the file's names, each matrix as its entry has it;
    and the names of what then does not fit."""

    candidate: Candidate
    shown: dict[str, _Held]
    missing: list[str]
    wrong: list[str]


def _fitted(reader: OnnxReader, c: Candidate, held: Mapping[str, _Held]) -> _Fitted:
    prefix = "".join(f"{w}." for w in c.peeled.wrappers)
    called = {v.entry.torch[0].name: v for v in c.layout.view(c.tree) if v.tensors}

    def name_of(view: View) -> str:
        return c.names.get(view.tensors[0].name, prefix + view.tensors[0].name)

    made: dict[str, _Held] = {}
    lost: dict[str, View] = {}
    for view in called.values():
        e, name = view.entry, name_of(view)
        if name in held:
            of = called[e.tied_to].entry if e.tied_to in called else e
            made[name] = replace(held[name], source=_turned(held[name], _wanted(of)))
        elif e.constant is None and e.tied_to is None:
            lost[name] = view
    for view in called.values():  # the file may have a tied tensor under its second name alone
        if view.entry.tied_to in called and name_of(view) in made:
            first = name_of(called[view.entry.tied_to])
            if lost.pop(first, None):
                made[first] = made[name_of(view)]
    for find in (_by_path, _by_elimination):
        for name, h in find(reader, lost, made).items():
            del lost[name]
            made[name] = h
    shapes = {name_of(v): v.tensors[0].shape for v in called.values()}
    misshaped = [n for n, h in made.items() if _info(reader, h.source).shape != shapes[n]]
    taken = {h.source.stored for h in made.values()}
    rest = {n: h for n, h in held.items() if h.likely and h.source.stored not in taken}
    surplus = [n for n in rest if n not in c.peeled.set_aside]
    missing = [v.tensors[0].name for v in lost.values()]
    return _Fitted(c, made | rest, missing, [*missing, *misshaped, *surplus])


def _by_path(
    reader: OnnxReader, lost: Mapping[str, View], made: Mapping[str, _Held]
) -> dict[str, _Held]:
    """Tensors that no operation's argument names (`in_proj_weight`): what is used in the module
    that they are of, where one shape leaves no choice."""
    taken = {h.source.stored for h in made.values()}
    pool: dict[str, dict[str, _Held]] = {}
    for path, _, h in _proposed(reader):
        if h.source.stored not in taken:
            pool.setdefault(path, {})[h.source.stored] = h
    near = {n: list(pool.get(n.rpartition(".")[0], {}).values()) for n in lost}
    return _only(reader, lost, near)


def _by_elimination(
    reader: OnnxReader, lost: Mapping[str, View], made: Mapping[str, _Held]
) -> dict[str, _Held]:
    """Matrices and kernels of a shape that one tensor alone lacks, and one in the file alone has
    that nothing names. Vectors are too much alike, and come from anywhere."""
    taken = {h.source.stored for h in made.values()}
    free = []
    for name, uses in reader.uses.items():
        role = next((u.role for u in uses if u.role in (*_MATRIX, "conv")), None)
        if role and name not in taken and not _CHANGED.fullmatch(name):
            free.append(_Held(Source(name), _as_stored(uses)))
    return _only(reader, lost, dict.fromkeys(lost, free))


def _only(
    reader: OnnxReader, lost: Mapping[str, View], near: Mapping[str, list[_Held]]
) -> dict[str, _Held]:
    """Those for which one fits by its shape, and which it alone fits."""
    fits: dict[str, list[_Held]] = {}
    for name, view in lost.items():
        turned = [replace(h, source=_turned(h, _wanted(view.entry))) for h in near[name]]
        shape = view.tensors[0].shape
        fits[name] = [h for h in turned if _info(reader, h.source).shape == shape]
    uses = Counter(h.source.stored for every in fits.values() for h in every)
    return {n: h[0] for n, h in fits.items() if len(h) == 1 and uses[h[0].source.stored] == 1}


def _wanted(entry: Entry) -> str:
    """How the matrix of a linear map lies in its canonical tensor, as the entry says; "" where it
    does not."""
    if any(op == Permute((1, 0)) for op in entry.ops):
        return "out_in"
    if entry.kind == "embedding":  # tied to what makes logits: its rows are the outputs
        return "out_in"
    return "in_out" if entry.kind == "linear" and not entry.ops else ""


def reasons(reader: Reader) -> list[str]:
    """Why weights may not be in an ONNX file as they were, as far as its operations tell; nothing
    of any other file, nor of one whose tensors fit."""
    if not isinstance(reader, OnnxReader) or reader.settled:
        return []
    ops = {u.node.op for uses in reader.uses.values() for u in uses}
    domains = {u.node.domain for uses in reader.uses.values() for u in uses}
    told = []
    if found := sorted(ops & _QUANTIZED):
        told.append(f"its weights are quantized ({found[0]}): they are not the model's any more")
    if found := sorted(ops & _FUSED):
        told.append(f"its {found[0]} holds the weights of several layers as one")
    if "com.microsoft.nchwc" in domains:
        told.append("onnxruntime has put its convolutions in the order of one processor (nchwc)")
    if any(re.fullmatch(".*Fusion.*", n) for n in reader.uses):
        told.append("an optimizer has computed new weights from those that stood (Fusion)")
    return told or [
        "what an exporter folds into constants or cuts in parts is not in the file as it was: "
        "export with optimize=False (older exporter: do_constant_folding=False)"
    ]


def _refuse_folded(reader: OnnxReader, best: _Fitted) -> None:
    """UsageError where what is missing are norms that convolutions have taken over."""
    views = best.candidate.layout.view(best.candidate.tree)
    norms = {t.name for v in views if v.entry.kind == "batchnorm" for t in v.tensors}
    lost = [n for n in best.missing if n in norms]
    convs = any(u.role == "conv" for uses in reader.uses.values() for u in uses)
    if len(lost) > 1 and convs and len(lost) == len(best.missing):
        every = sorted({n.rpartition(".")[0] for n in lost})
        more = f" and {len(every) - 2} more" if len(every) > 2 else ""
        raise UsageError(
            f"{reader.path}: BatchNorm was folded into the convolutions before it "
            f"({', '.join(every[:2])}{more}): what both were is lost",
            "export it again without: optimize=False of torch.onnx.export, or training="
            "TrainingMode.PRESERVE of the older exporter; or give the --layout of a model whose "
            "convolutions have biases and no norms",
        )
