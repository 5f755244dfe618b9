"""Runs of a torch module with every call of every submodule seen, and replaced where asked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from convert.runtime.arrays import dtype_in, is_inexact, leaves, replaced, to_numpy
from convert.runtime.call import Call
from convert.runtime.precision import torch_as_written
from convert.runtime.torch_module import narrow_watch, replica
from convert.runtime.trace import (
    Place,
    Recorded,
    Recorder,
    Trace,
    array_arguments,
    with_arguments,
)

# (name, module, args, kwargs) -> args, kwargs; (name, module, output) -> output
Enter = Callable[
    [str, Any, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]
]
Leave = Callable[[str, Any, Any], Any]


def trace_torch(module: Any, call: Call, precision: str = "float32", seed: int = 0) -> Trace:
    """Every call of every submodule of a torch.nn.Module, run once in `precision`.

    The run is that of a copy: mode, hooks, buffers and generators of `module` stay as they are.
    """
    return record(replica(module, precision), call, precision, seed)


def record(
    module: Any,
    call: Call,
    precision: str,
    seed: int = 0,
    change: Callable[[str, dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None,
) -> Trace:
    """As `trace_torch`, of the module itself. `change` gets a submodule's name and what it gives,
    and says what it gives on instead."""
    recorder = Recorder()
    before: list[Any] = []  # of the calls that go on: the state of torch's generators

    def enter(name: str, part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = array_arguments(part.forward, args, kwargs)
        entry = recorder.enter(name, type(part).__name__, _numpy(given))
        entry.arguments = copied(args), copied(kwargs)
        before.append(_generators())
        return args, kwargs

    def leave(name: str, part: Any, output: Any) -> Any:
        made = leaves(output)
        entry = recorder.leave(_numpy(made))
        if _generators() != before.pop():
            recorder.trace.drawing.append(name)
        if change is None:
            return output
        entry.outputs = change(name, entry.outputs)
        return replaced(output, like(made, entry.outputs))

    recorder.trace.output = run(module, call, precision, enter, leave, seed)
    return recorder.trace


def record_narrow(module: Any, call: Call) -> tuple[Trace, dict[tuple[str, int], str]]:
    """As `record` in float64, and of each call that computes in fewer than 64 bits by which
    operation: its own or one of a submodule's."""
    recorder = Recorder()
    stack: list[Recorded] = []
    narrow: dict[tuple[str, int], str] = {}

    def tell(operation: str) -> None:
        for entry in stack:
            narrow.setdefault(entry.key, operation)

    def enter(name: str, part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = array_arguments(part.forward, args, kwargs)
        entry = recorder.enter(name, type(part).__name__, _numpy(given))
        entry.arguments = copied(args), copied(kwargs)
        stack.append(entry)
        return args, kwargs

    def leave(name: str, part: Any, output: Any) -> Any:
        stack.pop()
        recorder.leave(_numpy(leaves(output)))
        return output

    with narrow_watch(tell):
        recorder.trace.output = run(module, call, "float64", enter, leave)
    return recorder.trace, narrow


def record_forced(
    module: Any,
    call: Call,
    precision: str,
    trace: Trace,
    names: Collection[str],
    seed: int = 0,
) -> Trace:
    """A run in which each call of `names` gets the inputs that `trace` recorded, and gives its
    outputs on.

    So each recorded value is one step away from `trace`, and the difference is that step's noise.
    """
    recorder = Recorder()
    known = trace.by_key()

    def enter(name: str, part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = array_arguments(part.forward, args, kwargs)
        entry = recorder.enter(name, type(part).__name__, _numpy(given))
        values = like(given, known[entry.key].inputs) if name in names else {}
        return with_arguments(part.forward, args, kwargs, values)

    def leave(name: str, part: Any, output: Any) -> Any:
        made = leaves(output)
        entry = recorder.leave(_numpy(made))
        values = like(made, known[entry.key].outputs) if name in names else {}
        return replaced(output, values)

    recorder.trace.output = run(module, call, precision, enter, leave, seed)
    return recorder.trace


def run(module: Any, call: Call, precision: str, enter: Enter, leave: Leave, seed: int = 0) -> Any:
    """The output of the call, with `enter` and `leave` around every submodule's."""
    import torch

    args, kwargs = arguments(call, precision)
    with (
        torch_as_written(),
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        hooked(module, enter, leave),
    ):
        torch.manual_seed(seed)
        return module(*args, **kwargs)


def _generators() -> list[bytes]:
    """The state of torch's generators."""
    import torch

    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states += torch.cuda.get_rng_state_all()
    return [state.numpy().tobytes() for state in states]


@contextlib.contextmanager
def hooked(module: Any, enter: Enter, leave: Leave) -> Iterator[None]:
    """Hooks on every submodule, removed afterwards."""
    handles = []

    def hook(name: str, part: Any) -> None:
        def before(m: Any, args: Any, kwargs: Any) -> Any:
            return enter(name, m, args, kwargs)

        def after(m: Any, args: Any, output: Any) -> Any:
            return leave(name, m, output)

        handles.append(part.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(part.register_forward_hook(after))

    try:
        for name, part in module.named_modules():
            hook(name, part)
        yield
    finally:
        for handle in handles:
            handle.remove()


def arguments(call: Call, precision: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments as tensors, floating-point ones in `precision`."""
    return call.replaced({k: _tensor(x, precision) for k, x in call.arrays().items()})


def _tensor(x: Any, precision: str) -> Any:
    import torch

    made = x.detach().clone() if isinstance(x, torch.Tensor) else torch.from_numpy(to_numpy(x))
    return made.to(getattr(torch, dtype_in(made, precision))) if is_inexact(made) else made


def _numpy(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {k: to_numpy(v) for k, v in values.items()}


def like(given: Mapping[str, Any], wanted: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The recorded values as tensors of the dtype and device of those given."""
    import torch

    return {
        k: torch.from_numpy(np.array(wanted[k])).to(v.device, v.dtype)
        for k, v in given.items()
        if k in wanted and tuple(v.shape) == wanted[k].shape
    }


def copied(tree: Any, precision: str | None = None) -> Any:
    """The tree with copies of its tensors, floating-point ones in `precision` if given."""
    import torch

    def clone(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        x = x.detach().clone()
        if precision is None or not is_inexact(x):
            return x
        return x.to(getattr(torch, dtype_in(x, precision)))

    return replaced(tree, {k: clone(v) for k, v in leaves(tree).items()})


def again(module: Any, call: Recorded, precision: str = "float64") -> dict[str, np.ndarray]:
    """What a submodule gives for a recorded call's inputs."""
    import torch

    args, kwargs = (copied(part, precision) for part in call.arguments)
    with torch_as_written(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        return _numpy(leaves(module(*args, **kwargs)))


@contextlib.contextmanager
def watched(module: Any, found: dict[Place, np.ndarray]) -> Iterator[None]:
    """Puts every array that a submodule gives into `found`, in the order of execution."""
    counts: dict[str, int] = {}
    stack: list[int] = []

    def enter(name: str, part: Any, args: Any, kwargs: Any) -> Any:
        stack.append(counts.get(name, 0))
        counts[name] = stack[-1] + 1
        return args, kwargs

    def leave(name: str, part: Any, output: Any) -> Any:
        index = stack.pop()
        if name:
            for key, x in leaves(output).items():
                found[name, index, key] = to_numpy(x)
        return output

    with hooked(module, enter, leave):
        yield
