"""Stacked and bidirectional recurrent layers of torch, each layer and direction seen by itself:
`lstm.l0`, `lstm.l0_reverse`, `lstm.l1`, ... are called one after the other inside `lstm`."""

from __future__ import annotations

import functools
import re
from typing import Any


def unstack(module: Any) -> Any:
    """The module itself, its stacked recurrent layers (nn.LSTM, nn.GRU, nn.RNN) made such that
    their layers are called one by one. Parameters stay the same objects and keep their names."""
    from torch import nn

    for part in list(module.modules()):
        if type(part) not in (nn.LSTM, nn.GRU, nn.RNN) or part.proj_size:
            continue
        if part.num_layers > 1 or part.bidirectional:
            _take_apart(part)
    return module


def restack(module: Any) -> Any:
    """The module itself, as it was before `unstack`."""
    from torch import nn

    for part in list(module.modules()):
        pieces = [n for n, m in part._modules.items() if m is not None and is_single(m)]
        if not pieces:
            continue
        part.__class__ = next(b for b in type(part).__mro__ if b in (nn.LSTM, nn.GRU, nn.RNN))
        vars(part).pop("flatten_parameters", None)
        for name in pieces:
            del part._modules[name]
        part._flat_weights = [getattr(part, n) for n in part._flat_weights_names]
    return module


def whole(name: str) -> str:
    """The name of the layer that the user wrote, of `lstm.l0_reverse`: `lstm`."""
    return re.sub(r"(^|\.)l\d+(_reverse)?$", "", name)


def is_single(module: Any) -> bool:
    """Whether a module is one layer and direction of a stack."""
    return getattr(module, "single_of_stack", False) is True


def _take_apart(part: Any) -> None:
    kind = type(part)
    for layer in range(part.num_layers):
        for suffix in (f"_l{layer}", f"_l{layer}_reverse")[: 1 + part.bidirectional]:
            width = part.input_size if layer == 0 else part.hidden_size * (1 + part.bidirectional)
            part.add_module(suffix[1:], _single(kind, part, width, suffix.endswith("_reverse")))
    part.__class__ = _stack_class(kind)
    part.flatten_parameters = lambda: None
    part.sync()


def _single(kind: Any, part: Any, width: int, reverse: bool) -> Any:
    extra = {"nonlinearity": part.nonlinearity} if hasattr(part, "nonlinearity") else {}
    made = kind(
        width,
        part.hidden_size,
        bias=part.bias,
        batch_first=part.batch_first,
        device="meta",
        **extra,
    )
    made.single_of_stack = True
    made.train(part.training)
    if not reverse:
        return made

    forward = functools.partialmethod(_backwards, kind)
    made.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return made


def _backwards(layer: Any, kind: Any, input: Any, hx: Any = None) -> Any:
    out, state = kind.forward(layer, _reversed(input, layer.batch_first), hx)
    return _reversed(out, layer.batch_first), state


def _reversed(x: Any, batch_first: bool) -> Any:
    """Steps in the other order, each packed sequence within its own length."""
    import torch
    from torch.nn.utils import rnn

    if not isinstance(x, rnn.PackedSequence):
        return x.flip(0 if x.ndim == 2 or not batch_first else 1)
    padded, lengths = rnn.pad_packed_sequence(x)
    turned = [
        torch.cat([s[:n].flip(0), s[n:]]) for s, n in zip(padded.unbind(1), lengths, strict=True)
    ]
    made = rnn.pack_padded_sequence(torch.stack(turned, 1), lengths, enforce_sorted=False)
    return rnn.PackedSequence(made.data, x.batch_sizes, x.sorted_indices, x.unsorted_indices)


def _stack_class(kind: Any) -> Any:
    """A class of the same name and attributes whose forward calls the single layers."""
    import torch
    from torch.nn.utils.rnn import PackedSequence

    def sync(self: Any) -> None:
        for name, single in self._modules.items():
            for leaf in list(single._parameters):
                held = self._parameters[leaf.removesuffix("_l0") + f"_{name}"]
                single._parameters[leaf] = held
            single._flat_weights = [single._parameters[n] for n in single._flat_weights_names]
            single.mode = self.mode

    def forward(self: Any, input: Any, hx: Any = None) -> Any:
        self.sync()
        finals: list[Any] = []
        many = 2 if self.bidirectional else 1
        x = input
        for layer in range(self.num_layers):
            given = x
            made = []
            for way in range(many):
                single = self._modules[f"l{layer}" + ("_reverse" if way else "")]
                at = slice(layer * many + way, layer * many + way + 1)
                state = None if hx is None else (
                    tuple(h[at] for h in hx) if isinstance(hx, tuple) else hx[at])  # fmt: skip
                out, final = single(given, state)
                made.append(out)
                finals.append(final)
            if isinstance(x, PackedSequence):
                joined = torch.cat([m.data for m in made], -1)
                x = PackedSequence(joined, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
            else:
                x = torch.cat(made, -1)
            if layer + 1 < self.num_layers and self.dropout and self.training:
                drop = torch.nn.functional.dropout
                x = x._replace(data=drop(x.data, self.dropout)) if isinstance(
                    x, PackedSequence) else drop(x, self.dropout)  # fmt: skip
        if isinstance(finals[0], tuple):
            return x, tuple(torch.cat(h) for h in zip(*finals, strict=True))
        return x, torch.cat(finals)

    return type(kind.__name__, (kind,), {"forward": forward, "sync": sync})
