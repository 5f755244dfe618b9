"""The calls of a Flax module's submodules, NNX or Linen: recorded, watched in a trace, replaced."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.runtime.arrays import leaves, to_numpy
from convert.runtime.call import Call
from convert.runtime.flax_module import FlaxModule, cell_path, flax_module
from convert.runtime.interception import Around
from convert.runtime.trace import Place, Recorder, Trace, array_arguments, with_arguments


def trace_flax(module: Any, call: Call, precision: str = "float32") -> Trace:
    """Every call of every submodule of an nnx.Module or a bound flax.linen.Module, run eagerly.

    The run is that of a copy in `precision`: state and generators of `module` stay as they are.
    """
    return record(flax_module(module, precision), call)


def record(module: FlaxModule, call: Call) -> Trace:
    """An eager run, recorded; from then on scanned layers of `module` are called one by one.

    What raises ends the trace with a note; the calls before stay.
    """
    recorder = Recorder()
    unseen: list[str] = []
    module.unroll = True

    def around(path: str, part: Any, proceed: Any, args: Any, kwargs: Any) -> Any:
        given = array_arguments(type(part).__call__, (part, *args), kwargs)
        if traced(given):
            unseen.append(path)
            return proceed(*args, **kwargs)
        recorder.enter(path, type(part).__name__, {k: to_numpy(v) for k, v in given.items()})
        output = proceed(*args, **kwargs)
        recorder.leave({k: to_numpy(v) for k, v in leaves(output).items()})
        return output

    with module.precise():
        try:
            args, kwargs = module.arguments(call)
            recorder.trace.output, _ = module(module.values, args, kwargs, around)
        except Exception as e:
            within = recorder.current.name if recorder.current else ""
            text = str(e).partition("\n")[0]
            recorder.note(f"{within or 'the module'} raises {type(e).__name__}: {text}")
    # What is seen as a whole: layers of a stack one by one, a cell by what its RNN gives.
    seen = {*module.stacks, *filter(None, (cell_path(module, p) for p in recorder.trace.names()))}
    for path in dict.fromkeys(unseen):
        if not any(path == s or path.startswith(f"{s}.") for s in seen):
            recorder.note(f"{path}: inside jit, scan or vmap there are no values to record")
    return recorder.trace


def record_again(module: Any, call: Call) -> Trace:
    """A run in float32 as `trace_flax` makes it, that draws other random numbers: of generators
    that the module holds, and of keys that it makes itself (which then are of another kind)."""
    import jax

    side = flax_module(module, "float32")
    side.reseed()
    with jax.default_prng_impl("rbg"):
        return record(side, call)


def watch(
    found: dict[Place, Any], alone: Mapping[tuple[str, int], Mapping[str, Any]] | None = None
) -> Around:
    """Puts every array that a submodule gives into `found`, in the order of execution. With `alone`
    only the calls that it names, by path and index, which get its arrays in place of their own.

    To be made, and given to a FlaxModule, inside the function that JAX traces, which then returns
    `found`. What an inner trace computes (the body of a scan, a nested jit) could not leave it and
    is passed over.
    """
    here = _current_trace()
    counts: dict[str, int] = {}

    def around(path: str, part: Any, proceed: Any, args: Any, kwargs: Any) -> Any:
        if not path or _current_trace() != here:
            return proceed(*args, **kwargs)
        index = counts.get(path, 0)
        counts[path] = index + 1
        if alone is not None:
            if (values := alone.get((path, index))) is None:
                return proceed(*args, **kwargs)
            (_, *args), kwargs = with_arguments(type(part).__call__, (part, *args), kwargs, values)
        output = proceed(*args, **kwargs)
        for key, x in leaves(output).items():
            found[path, index, key] = x
        return output

    return around


def _current_trace() -> Any:
    import jax.extend

    return jax.extend.core.get_opaque_trace_state(convention="nnx")  # type: ignore[no-untyped-call]


def traced(values: Mapping[str, Any]) -> bool:
    """Whether any of these arrays is a tracer of JAX."""
    import jax

    return any(isinstance(v, jax.core.Tracer) for v in values.values())


def attributes(module: Any) -> dict[str, Any]:
    """The plain settings of a Flax module: epsilon, momentum, padding, ..."""
    if dataclasses.is_dataclass(module):
        found = {f.name: getattr(module, f.name, None) for f in dataclasses.fields(module)}
        return {k: v for k, v in found.items() if k not in ("parent", "name")}
    return {k: v for k, v in vars(module).items() if not k.startswith("_")}
