"""What a module does in train mode besides, outside of its layers: a port leaves that out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from inspect import BoundArguments
from pathlib import Path
from typing import Any

from convert.porting.rendering.module_file import ModuleFile
from convert.program.calls import in_mode, runs
from convert.program.export import traced_graph
from convert.program.graph import ArrayType, Graph, GraphNode
from convert.runtime.torch_calls import hooked
from zoo.containers.errors import ZooError

_NO_MATTER = ("aten.clone", "aten.sym_", "operator.", "aten.alias", "aten.detach")


def left_out(module: Any, call: BoundArguments, graph: Graph, file: ModuleFile) -> list[str]:
    """A notice of the operations that `file`, made of the graph of eval mode, does not have."""
    calls = [_calls(module, call, training, file.layers) for training in (False, True)]
    if calls[0] is not None and calls[0] == calls[1]:
        return []  # a trace of train mode takes seconds
    with in_mode(module, training=True):
        try:
            trained = traced_graph(module, call, (), graph.opened, calls=True)
        except ZooError:
            return ["its train mode cannot be traced: what it does there besides is not written"]

    def outside(of: Graph) -> Counter[tuple[str, str]]:
        inside = [(c.begin, c.end) for c in of.calls if c.path in file.layers]
        return Counter(
            (node.op, f"{Path(node.site.file).name}:{node.site.line}" if node.site else "?")
            for node in of.nodes
            if not any(a < node.made < b for a, b in inside)
            and not (node.module in file.norms and _normalises(of, node))
        )

    more = outside(trained) - outside(graph)
    more = Counter({k: n for k, n in more.items() if not k[0].startswith(_NO_MATTER)})
    told = list(dict.fromkeys(f"{op} at {place}" for op, place in more))
    if not told:
        return []
    shown = "; ".join(told[:4]) + (f"; and {len(told) - 4} more" if len(told) > 4 else "")
    return [f"eval mode is written: what train mode does besides is left out ({shown})"]


def _calls(
    module: Any, call: BoundArguments, training: bool, layers: Collection[str]
) -> list[str] | None:
    """Every function of torch that a run in this mode calls outside of these layers, with its
    plain arguments and the shapes of its tensors; None where torch does not run it."""
    import torch
    from torch.overrides import TorchFunctionMode, resolve_name
    from torch.utils import _pytree

    seen: list[str] = []
    depth = 0

    class Note(TorchFunctionMode):
        def __torch_function__(self, f: Any, t: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not depth:
                given = _pytree.tree_leaves((args, kwargs))
                told = [x.shape if isinstance(x, torch.Tensor) else _plain(x) for x in given]
                seen.append(f"{resolve_name(f) or f} {told}")
            return f(*args, **(kwargs or {}))

    def enter(name: str, part: Any, args: Any, kwargs: Any) -> Any:
        nonlocal depth
        depth += name in layers
        return args, kwargs

    def leave(name: str, part: Any, output: Any) -> Any:
        nonlocal depth
        depth -= name in layers
        return output

    try:
        with in_mode(module, training), hooked(module, enter, leave), Note():
            runs(module, call)
    except ZooError:
        return None
    return seen


def _plain(x: Any) -> str:
    return repr(x) if isinstance(x, bool | int | float | str | None) else type(x).__name__


def _normalises(of: Graph, node: GraphNode) -> bool:
    """Whether an operation of a BatchNorm's is its normalisation, or counts its batches."""
    kind = of.types.get(node.made)
    counts = isinstance(kind, ArrayType) and kind.dtype == "int64"
    return "batch_norm" in node.op or counts
