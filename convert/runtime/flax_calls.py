"""The calls of a Flax module's submodules, NNX or Linen: recorded, watched in a trace, replaced."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.runtime.arrays import leaves, named_outputs, replaced, to_numpy
from convert.runtime.call import Call
from convert.runtime.flax_module import flax_module
from convert.runtime.interception import Around
from convert.runtime.pure_module import FlaxModule, Values, cell_path
from convert.runtime.trace import Place, Recorder, Trace, array_arguments, with_arguments


def trace_flax(module: Any, call: Call, precision: str = "float32") -> Trace:
    """Every call of every submodule of an nnx.Module or a bound flax.linen.Module, run once.

    The run is that of a copy in `precision`: state and generators of `module` stay as they are.
    """
    return record(flax_module(module, precision), call)


def record(module: FlaxModule, call: Call) -> Trace:
    """A run, recorded: compiled as a whole, or eagerly where that cannot be or does not show every
    call; from then on scanned layers of `module` are called one by one.

    What raises ends the trace with a note; the calls before stay.
    """
    module.unroll = True
    with module.precise():
        if module.recording is None or module.recording[0] is not call:
            made = None
            with contextlib.suppress(Exception):
                made = CompiledRun(module, call)
            module.recording = call, made
        if (compiled := module.recording[1]) is not None and compiled.complete:
            with contextlib.suppress(TypeError):  # values of other shapes or dtypes
                return compiled.trace(module.values)
        return _eager(module, call)


def _eager(module: FlaxModule, call: Call) -> Trace:
    recorder = Recorder()
    unseen: list[str] = []

    def around(path: str, part: Any, proceed: Any, args: Any, kwargs: Any) -> Any:
        given = array_arguments(type(part).__call__, (part, *args), kwargs)
        if traced(given):
            unseen.append(path)
            return proceed(*args, **kwargs)
        recorder.enter(path, type(part).__name__, {k: to_numpy(v) for k, v in given.items()})
        output = proceed(*args, **kwargs)
        recorder.leave({k: to_numpy(v) for k, v in leaves(output).items()})
        return output

    try:
        args, kwargs = module.arguments(call)
        recorder.trace.output, _ = module(module.values, args, kwargs, around)
    except Exception as e:
        within = recorder.current.name if recorder.current else ""
        text = str(e).partition("\n")[0]
        recorder.note(f"{within or 'the module'} raises {type(e).__name__}: {text}")
    for path in _hidden(module, recorder.trace, unseen):
        recorder.note(f"{path}: inside jit, scan or vmap there are no values to record")
    return recorder.trace


def _hidden(module: FlaxModule, trace: Trace, unseen: list[str]) -> list[str]:
    """Of the calls inside inner traces those that are not seen as a whole: layers of a stack one by
    one, a cell by what its RNN gives."""
    seen = {*module.stacks, *filter(None, (cell_path(module, p) for p in trace.names()))}
    return [
        path
        for path in dict.fromkeys(unseen)
        if not any(path == s or path.startswith(f"{s}.") for s in seen)
    ]


class CompiledRun:
    """A run as one compiled function of the module's values: its calls are those that JAX traces.
    Raises what code raises that does not take tracers. To be used in the module's precision."""

    def __init__(self, module: FlaxModule, call: Call) -> None:
        import jax

        recorder = Recorder()
        unseen: list[str] = []
        self._arrays: dict[int, Any] = {}  # those that are recorded, by identity
        self._given = module.given(call)

        def forward(values: Values, given: Values) -> list[Any]:
            here = _current_trace()

            def around(path: str, part: Any, proceed: Any, args: Any, kwargs: Any) -> Any:
                if _current_trace() != here:
                    unseen.append(path)
                    return proceed(*args, **kwargs)
                arguments = array_arguments(type(part).__call__, (part, *args), kwargs)
                recorder.enter(path, type(part).__name__, self._kept(arguments))
                output = proceed(*args, **kwargs)
                recorder.leave(self._kept(leaves(output)))
                return output

            args, kwargs = call.replaced(given)
            recorder.trace.output, _ = module(values, args, kwargs, around)
            self._outputs = self._kept(leaves(recorder.trace.output))
            return list(self._arrays.values())

        self._run = jax.jit(forward).lower(module.values, self._given).compile()
        self._recorded = recorder.trace
        # Only an eager run sees into a scan over what it has to compare with the module's values.
        self.complete = not _hidden(module, recorder.trace, unseen)
        self._as_called = not module.stacks

    def _kept(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        self._arrays |= {id(x): x for x in arrays.values()}
        return dict(arrays)

    def trace(self, values: Values) -> Trace:
        """The run with these values. TypeError where they are not like the module's own."""
        made = zip(self._arrays, self._run(values, self._given), strict=True)
        found = {key: to_numpy(x) for key, x in made}

        def filled(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
            return {k: found[id(x)] for k, x in arrays.items()}

        calls = [
            dataclasses.replace(c, inputs=filled(c.inputs), outputs=filled(c.outputs))
            for c in self._recorded.calls
        ]
        output = replaced(self._recorded.output, filled(self._outputs))
        if traced(named_outputs(output)):
            raise TypeError("an output that arrays cannot be put into")
        return Trace(calls, [], output, as_called=self._as_called)


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
