"""A torch module and one call of it as an ONNX graph, by torch's own exporter.

The graph is left as it was traced (`optimize=False`): the exporter's optimizer turns weights, folds
norms into convolutions and tables into constants, and whoever reads the file finds them no more.
onnxruntime does all that itself when it loads a file.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from convert.runtime.arrays import is_array, named_outputs
from convert.runtime.call import Call
from convert.runtime.quiet import quietly
from zoo.containers.errors import MissingExtra, UsageError, ZooError, printable

OPSET = 20
_SCOPES = "pkg.torch.onnx.name_scopes"
_WORD = re.compile(r"\x1b\[[0-9;]*m")

# Which axes are free, tried in this order where torch fails.
_OPEN: tuple[tuple[str, Callable[[int], bool]], ...] = (
    ("", lambda axis: True),
    ("all sizes but the first of each input are fixed", lambda axis: axis == 0),
    ("all sizes are fixed", lambda axis: False),
)


@dataclass
class Traced:
    """An onnx_ir.Model; the sizes of each input, free ones by their names; and
    what a user should know."""

    model: Any
    sizes: dict[str, tuple[str | int, ...]]
    notices: list[str] = field(default_factory=list)


def trace(
    module: Any, call: Call, *, channels: Callable[[str], bool], dynamic: bool, opset: int
) -> Traced:
    """The graph of `module`, in eval mode, for this call of arrays. `channels` says of which inputs
    axis 1 is one of channels, which no model has free; without
    `dynamic` no size is. Raises UsageError where torch cannot."""
    try:
        import onnx_ir  # noqa: F401
        import onnxscript  # noqa: F401
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError as e:
        which = "torch" if e.name == "torch" else "onnx"
        raise MissingExtra("exporting to ONNX", which) from None
    given = _by_name(module, call)
    with torch.no_grad():
        made = module(**given)
    outputs = [n.removeprefix("output.") for n in named_outputs(made)]
    outputs = [f"output.{n}" if n in given else n for n in outputs]
    failed: list[str] = []
    auto = torch.export.Dim.AUTO
    for told, free in _OPEN if dynamic else _OPEN[-1:]:
        shapes = {
            n: {
                a: auto if free(a) and not (a == 1 and channels(n)) else None for a in range(x.ndim)
            }
            if is_array(x)
            else None
            for n, x in given.items()
        }
        try:
            # torch's fast attention gives other strides than what stands for it in a graph, where a
            # view of them is then none.
            with quietly(), _no_progress(), sdpa_kernel(SDPBackend.MATH):
                program = torch.onnx.export(
                    module,
                    (),
                    kwargs=given,
                    dynamo=True,
                    optimize=False,
                    verbose=False,
                    dynamic_shapes=shapes,
                    opset_version=opset,
                    output_names=outputs,
                )
        except Exception as e:
            failed.append(_why(e))
            continue
        assert program is not None
        notices = [f"{told}: {failed[0]}"] if failed else []
        sizes = _named_sizes(module, given, program.model)
        return Traced(program.model, sizes, notices)
    raise UsageError(
        f"torch cannot export {type(module).__name__} to ONNX: {failed[-1]}",
        "change the code that it names, or export another model",
        failed[:-1],
    )


def _no_progress() -> contextlib.AbstractContextManager[Any]:
    """Without the steps that the exporter prints."""
    return contextlib.redirect_stdout(io.StringIO())


def _by_name(module: Any, call: Call) -> dict[str, Any]:
    """The call's arguments by the names of forward's parameters, arrays as tensors."""
    import numpy as np
    import torch

    tensors = {
        path: torch.from_numpy(np.array(x)) for path, x in call.cast("float32").arrays().items()
    }
    args, kwargs = call.replaced(tensors)
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as e:
        raise UsageError(
            f"the inputs are not those of {type(module).__name__}: {e}", "give one call of it"
        ) from None
    kinds = {p.kind for p in bound.signature.parameters.values() if p.name in bound.arguments}
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        raise UsageError(
            f"{type(module).__name__}.forward takes any number of arguments (*args)",
            "wrap it in a module whose forward names them",
        )
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        found |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return found


def _named_sizes(
    module: Any, given: Mapping[str, Any], model: Any
) -> dict[str, tuple[str | int, ...]]:
    """Free sizes called after what they are of, everywhere in the graph: "batch", "x_2"; those that
    torch calls free, and that the module fixes, as the numbers that they are."""
    first = {str(v.shape[0].value) for v in model.graph.inputs if v.shape and _free(v.shape[0])}
    made = {str(v.shape[0].value) for v in model.graph.outputs if v.shape and _free(v.shape[0])}
    called: dict[str, str | int] = {}
    for value in model.graph.inputs:
        for axis, n in enumerate(value.shape or ()):
            if _free(n) and str(n.value) not in called:
                batch = not axis and len(first) == 1 and made <= first
                called[str(n.value)] = "batch" if batch else f"{value.name}_{axis}"
    _rename(model, called | _fixed(module, given, model))
    return _input_sizes(model)


def pin(traced: Traced, sizes: Mapping[str, int]) -> None:
    """Fix free sizes, by their names, to these numbers."""
    _rename(traced.model, sizes)
    traced.sizes = _input_sizes(traced.model)


def _free(n: Any) -> bool:
    return not isinstance(n, int) and n.value is not None


def _rename(model: Any, called: Mapping[str, str | int]) -> None:
    pattern = re.compile("|".join(rf"\b{re.escape(n)}\b" for n in called) or "(?!)")
    values = [*model.graph.inputs, *model.graph.outputs]
    for value in dict.fromkeys([*values, *(v for n in model.graph.all_nodes() for v in n.outputs)]):
        for axis, n in enumerate(value.shape or ()):
            if _free(n):
                text = pattern.sub(lambda m: str(called[m[0]]), str(n.value))
                value.shape[axis] = int(text) if text.isdigit() else text


def _input_sizes(model: Any) -> dict[str, tuple[str | int, ...]]:
    return {
        value.name: tuple(n if isinstance(n, int) else str(n.value) for n in value.shape or ())
        for value in model.graph.inputs
    }


def _fixed(module: Any, given: Mapping[str, Any], model: Any) -> dict[str, int]:
    """The sizes that the module does not take larger, by the symbols that torch has for them: one
    that meets a weight stays free in its graphs."""
    import torch

    places: dict[str, list[tuple[str, int]]] = {}
    for value in model.graph.inputs:
        for axis, n in enumerate(value.shape or ()):
            if not isinstance(n, int):
                places.setdefault(str(n.value), []).append((value.name, axis))
    fixed = {}
    for symbol, where in places.items():
        size = int(given[where[0][0]].shape[where[0][1]])
        for wanted in (size + 1, 2 * size):
            tried = dict(given)
            for name, axis in where:
                again = torch.arange(wanted) % max(1, size)
                tried[name] = tried[name].index_select(axis, again)
            try:
                with torch.no_grad():
                    module(**tried)
            except Exception:  # whatever the module says of a size that it does not take
                fixed[symbol] = size
    return fixed


def cleaned(model: Any) -> None:
    """Without what the exporter notes of where it ran: paths of this machine, for every node. The
    module that a node is of stays."""
    for node in model.graph.all_nodes():
        kept = node.metadata_props.get(_SCOPES)
        node.metadata_props.clear()
        if kept is not None:
            node.metadata_props[_SCOPES] = kept
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def weights(model: Any) -> Mapping[str, Any]:
    """The initializers, by their names in the module's state_dict."""
    return model.graph.initializers  # type: ignore[no-any-return]


def _why(e: BaseException) -> str:
    """What torch says, without its advice to users of torch: the innermost cause."""
    while e.__cause__ is not None:
        e = e.__cause__
    if isinstance(e, ZooError):
        return e.problem
    lines = [line.strip() for line in _WORD.sub("", str(e)).splitlines()]
    told = next((line for line in lines if line), type(e).__name__)
    return printable(f"{type(e).__name__}: {told}"[:300])
