"""Upstream's own classes, or the documents' or the paper's, written out again: a module for each
family, which states them as `UPSTREAM` and is found by its name. What must hold for all of them is
in test_upstream.py and test_documents.py; a new family adds its module here, and no test."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from support import Arrays, canonical
from torch import nn

from zoo.model import Config, Model

Tensors = dict[str, torch.Tensor]


def plainly(module: nn.Module, given: Tensors) -> Any:
    """The inputs by position, as the documents' classes take them."""
    return module(*given.values())


@dataclass(frozen=True)
class Document:
    """A class whose checkpoint must be recognised as `config` by its names and shapes alone."""

    config: Config
    make: Callable[[], nn.Module]
    inputs: Arrays | None = None  # where the family's own sample inputs do not fit


@dataclass(frozen=True)
class Upstream:
    """How upstream's class is made and called."""

    # The class of any configuration, of any weights; None where every document is another class.
    make: Callable[[Config], nn.Module] | None = None
    # Its outputs: a tensor, or a mapping with the names of the twins' fields.
    call: Callable[[nn.Module, Tensors], Any] = plainly
    documents: Mapping[str, Document] = field(default_factory=dict)
    # What upstream must run in to be exact in float64, where it is not by itself.
    exactly: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    precisions: tuple[str, ...] = ("float32", "float64")
    rough: tuple[str, ...] = ()  # patterns of outputs that stay in float32 even so
    forgets: Callable[[Config], tuple[str, ...]] = lambda config: ()  # outputs that it leaves out


def upstreams() -> dict[str, Upstream]:
    """Family -> what its module states."""
    return {
        found.name: importlib.import_module(f"upstream.{found.name}").UPSTREAM
        for found in pkgutil.iter_modules(__path__)
    }


def load(module: nn.Module, model: Model, config: Config, weights: Arrays | None = None) -> Any:
    """`module` in eval mode with these weights, name-seeded ones by default, ties filled in."""
    values = canonical(model, config) if weights is None else dict(weights)
    entries = model.layout_of(config).entries
    for entry in entries:
        if entry.tied_to is not None:
            values[entry.torch[0].name] = values[entry.tied_to]
    given = {n: torch.from_numpy(a) for n, a in values.items()}
    missing, surplus = module.load_state_dict(given, strict=False)
    assert set(missing) <= {e.torch[0].name for e in entries if e.constant is not None}
    assert not surplus
    return module.eval()


def tensors(given: Arrays, precision: str = "float32") -> Tensors:
    """Inputs for PyTorch, floating ones in `precision`."""
    return {
        n: torch.from_numpy(a.astype(precision) if a.dtype.kind == "f" else a)
        for n, a in given.items()
    }


@contextlib.contextmanager
def default_dtype(name: str) -> Iterator[None]:
    """torch's default dtype, which decides what `torch.zeros` in a forward gives."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)
