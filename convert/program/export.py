"""A torch module and one call of it, exported: what it computes for any sizes, as a `Graph`.

torch.export traces (not strict), everything that is written in place becomes a value of its own,
and what ran under no_grad passes no gradient. Whatever stops it is one error with file and line.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from inspect import BoundArguments
from typing import Any

from convert.program import refused
from convert.program.called_modules import CalledModules
from convert.program.calls import buffers_kept
from convert.program.exported_nodes import Reading
from convert.program.graph import Graph
from convert.program.nesting import Nesting, taken_apart
from convert.program.opaque import Opaque, sealed
from convert.program.stack_lines import every_line
from convert.program.whole_recurrent import whole
from convert.runtime.arrays import is_array, leaves, replaced
from convert.runtime.quiet import quietly
from zoo.containers.errors import UsageError

TESTED = ((2, 11), (2, 13))  # versions of torch, first and last


def check_version(untested: bool) -> None:
    """UsageError for a torch whose export nobody has tried with this, unless told to go on."""
    import torch

    major, minor = (int(n) for n in torch.__version__.split(".")[:2])
    first, last = (".".join(map(str, v)) for v in TESTED)
    if not untested and not TESTED[0] <= (major, minor) <= TESTED[1]:
        raise UsageError(
            f"torch {torch.__version__} is not tested: {first} to {last} are",
            "install one of those, or go on with untested=True",
        )


def export(
    module: Any,
    call: BoundArguments,
    opaque: tuple[Opaque, ...] = (),
    axes: Callable[[int], bool] = lambda axis: True,
    calls: bool = False,
) -> Graph:
    """The graph of `module(*call.args, **call.kwargs)`, whose arrays are torch tensors.

    Sizes are dynamic where torch finds nothing that fixes them; those of other axes than `axes` are
    baked in. Calls of what `opaque` names become one operation each. With `calls`, it is noted
    which modules are called. The module's mode (train or eval) is the graph's. Raises ZooError
    where torch cannot export it.
    """
    import torch

    given = leaves(call.arguments)
    nestings: list[Nesting] = []  # not an attribute: torch.export puts those back
    # Copies: what is asked of a tensor's sizes stays on it where torch.export fails.
    called = CalledModules(module) if calls else None
    flat, tensors = _flattened(module, call, nestings, called), [t.clone() for t in given.values()]
    auto = torch.export.Dim.AUTO
    sizes = tuple({a: auto if axes(a) else None for a in range(t.ndim)} for t in tensors)
    seen: list[type] = []
    with _as_run(), whole(), sealed(flat, opaque), _custom_gradients(seen):
        try:
            exported = torch.export.export(
                flat, tuple(tensors), dynamic_shapes=(sizes,) if sizes else None, strict=False
            )
            _detach_no_grad(exported.graph_module)
            _open_no_grad(exported.graph_module)
            exported = exported.run_decompositions({})
        except Exception as e:
            raise refused.export_error(e, module) from e
    graph = Reading(exported, list(given)).graph(nestings[-1], called)
    graph.baked = _plain(call.arguments)
    for cls in dict.fromkeys(seen):
        graph.notices.append(
            f"{cls.__name__} has a backward pass of its own, which is not ported: its gradient is "
            "that of its forward pass"
        )
    return graph


# Which axes are dynamic, tried in this order: every one, the first ones, none.
_OPEN: tuple[tuple[str, Callable[[int], bool]], ...] = (
    ("", lambda axis: True),
    ("axes but the first are baked in", lambda axis: axis == 0),
    ("every axis is baked in", lambda axis: False),
)
PATIENCE = 15  # seconds of this process's time for a trace with every size open


def traced_graph(
    module: Any,
    call: BoundArguments,
    opaque: tuple[Opaque, ...],
    start: int = 0,
    calls: bool = False,
) -> Graph:
    """The graph with dynamic sizes; where torch.export cannot have them so, or not soon, with
    fewer. `start` is the `opened` of a graph of the same module; `calls` as in `export`."""
    failed: refused.NotExported | None = None
    for opened, (told, axes) in list(enumerate(_OPEN))[start:]:
        try:
            with _patience(PATIENCE if opened == 0 else 0):
                graph = export(module, call, opaque, axes, calls)
        except refused.NotExported as e:
            failed = failed or e
            continue
        graph.opened = opened
        if failed is not None:
            graph.closed = f"{told}: {'; '.join(failed.details)}"
        return graph
    assert failed is not None
    raise failed


def traces_otherwise(module: Any, call: BoundArguments) -> bool:
    """Whether what torch.export traces of a call computes something else than the module does, as
    of code that asks whether it is traced. False where it is not traced without rules."""
    import torch

    flat = _flattened(module, call, [], None)
    tensors = tuple(t.clone() for t in leaves(call.arguments).values())
    with _as_run(), torch.no_grad():
        try:
            with buffers_kept(module):
                traced = torch.export.export(flat, tensors, strict=False).module()(*tensors)
        except Exception:  # the difference that was found is told all the same
            return False
        with buffers_kept(module):
            plain = flat(*tensors)
    try:
        torch.testing.assert_close(tuple(traced), plain, equal_nan=True)
    except AssertionError:
        return True
    return False


@contextlib.contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """NotExported after so much of the process's time (0: never): sums and quotients of sizes can
    keep torch busy for hours. In other threads than the first there is no alarm."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:  # anywhere in `export`, also where nothing is made a ZooError
        told = f"sizes kept torch.export busy for {seconds} s"
        raise refused.NotExported(told, "give inputs of one size", [told])

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _flattened(
    module: Any, call: BoundArguments, nestings: list[Nesting], called: CalledModules | None
) -> Any:
    """The module as one that takes a flat list of tensors and gives one; `nestings` gets how what
    the module gave nests, `called` its calls."""
    import torch

    paths = list(leaves(call.arguments))

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module
            self.training = module.training

        def forward(self, *tensors: Any) -> Any:
            values = dict(zip(paths, tensors, strict=True))
            bound = BoundArguments(call.signature, replaced(dict(call.arguments), values))
            with contextlib.nullcontext() if called is None else called.seen():
                made = self.module(*bound.args, **bound.kwargs)
            nesting, found = taken_apart(made, "", _unknown)
            nestings.append(nesting)
            return (*found, *(called.marks if called is not None else ()))

    return Flat()


def _unknown(path: str, x: Any) -> Any:
    where = f"{path} of the result" if path else "the result"
    raise UsageError(
        f"{where} is a {type(x).__name__}, whose tensors cannot be seen",
        "give a module that returns tensors, tuples, dicts or dataclasses of them",
    )


def _plain(tree: Any, path: str = "") -> dict[str, Any]:
    """What of arguments is no array: path -> value."""
    nesting, found = taken_apart(dict(tree), path, lambda _, x: x)
    return {p: x for p, x in zip(nesting.leaves(), found, strict=True) if not is_array(x)}


def _detach_no_grad(root: Any) -> None:
    """Stop the gradient of whatever leaves a region under no_grad: the regions themselves do not
    survive the decomposition."""
    import torch

    for part in root.modules():
        if not isinstance(part, torch.fx.GraphModule):
            continue
        for node in list(part.graph.nodes):
            if "wrap_with_set_grad_enabled" not in str(node.target) or node.args[0]:
                continue
            for taken in list(node.users):
                value = taken.meta.get("val")
                if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
                    continue
                with part.graph.inserting_after(taken):
                    stop = part.graph.call_function(torch.ops.aten.detach.default, (taken,))
                stop.meta = dict(taken.meta)
                taken.replace_all_uses_with(stop, delete_user_cb=lambda u, stop=stop: u is not stop)
        part.recompile()


def _open_no_grad(root: Any) -> None:
    """Put what ran under no_grad in the place of its region: the decomposition would lose the lines
    of code in there."""
    import operator

    import torch

    parts = [m for m in root.modules() if isinstance(m, torch.fx.GraphModule)]
    for part in reversed(parts):  # the innermost first
        for node in list(part.graph.nodes):
            if "wrap_with_set_grad_enabled" not in str(node.target):
                continue
            _, held, *args = node.args
            inside: Any = part.get_submodule(held.target)
            plain = all(n.op != "get_attr" for n in inside.graph.nodes)
            if not plain or any(u.target is not operator.getitem for u in node.users):
                continue
            starts = [n for n in inside.graph.nodes if n.op == "placeholder"]
            with part.graph.inserting_before(node):
                given = dict(zip(starts, args, strict=True))
                made: Any = part.graph.graph_copy(inside.graph, given)
            for taken in list(node.users):
                taken.replace_all_uses_with(made[taken.args[1]])
                part.graph.erase_node(taken)
            part.graph.erase_node(node)
        part.recompile()


@contextlib.contextmanager
def _as_run() -> Iterator[None]:
    """As a module is run, with gradients; and without torch's remarks on how it traces."""
    import torch

    with quietly(), torch.inference_mode(False), torch.enable_grad(), every_line():
        yield


@contextlib.contextmanager
def _custom_gradients(seen: list[type]) -> Iterator[None]:
    """Notes which autograd.Functions are applied."""
    import torch

    function: Any = torch.autograd.Function
    own = function.__dict__.get("apply")
    original: Callable[..., Any] = function.apply.__func__

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        seen.append(cls)
        return original(cls, *args, **kwargs)

    function.apply = classmethod(apply)
    try:
        yield
    finally:
        if own is None:
            del function.apply
        else:
            function.apply = own
