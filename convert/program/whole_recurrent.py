"""torch's recurrent layers as one operation each: its own trace of them unrolls, which bakes their
length in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

_STATES = {"lstm": 2, "gru": 1, "rnn_tanh": 1, "rnn_relu": 1}
_KEPT: list[Any] = []  # a library lives as long as somebody holds it


def _operations() -> Any:
    """One operation for each kind, with ATen's arguments, defined once a process."""
    import torch

    if not _KEPT:
        library: Any = torch.library.Library("zooconvert_rnn", "DEF")  # type: ignore[no-untyped-call]
        _KEPT.append(library)
        for name, states in _STATES.items():
            initial = "Tensor[] hx" if states == 2 else "Tensor hx"
            given = ", ".join(["Tensor"] * (1 + states))
            library.define(
                f"{name}(Tensor input, {initial}, Tensor[] params, bool has_biases, int num_layers,"
                " float dropout, bool train, bool bidirectional, bool batch_first) -> "
                f"({given})"
            )
            torch.library.register_fake(f"zooconvert_rnn::{name}", _shapes(states), lib=library)
            library.impl(name, _eager(name), "CompositeExplicitAutograd")
    return torch.ops.zooconvert_rnn


def _eager(name: str) -> Any:
    def run(*args: Any) -> Any:
        import torch

        return getattr(torch.ops.aten, name).input(*args)

    return run


def _shapes(states: int) -> Any:
    def shapes(
        input: Any,
        hx: Any,
        params: Any,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        held = list(hx) if states == 2 else [hx]
        width = held[0].shape[-1] * (1 + bidirectional)
        output = input.new_empty((*input.shape[:-1], width))
        return (output, *(h.new_empty(h.shape) for h in held))

    return shapes


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """While it lasts, recurrent layers call these operations. Packed sequences are left alone."""
    import torch

    operations = _operations()
    originals = {name: getattr(torch._VF, name) for name in _STATES}

    def standing_in(name: str) -> Any:
        def call(*args: Any) -> Any:
            if len(args) == 9 and isinstance(args[3], bool):
                return getattr(operations, name)(*args)
            return originals[name](*args)

        return call

    with mock.patch.multiple(torch._VF, **{name: standing_in(name) for name in _STATES}):
        yield


def aten(op: str) -> str:
    """The name of ATen's operation, for one of these."""
    kind = op.removeprefix("zooconvert_rnn.").removesuffix(".default")
    return f"aten.{kind}.input" if op.startswith("zooconvert_rnn.") else op
