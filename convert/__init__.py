"""Moving checkpoints between PyTorch and Flax, and proving that nothing changed.

    convert.convert("model.safetensors")               -> Certificate
    convert.verify("model.safetensors", "model.flax")  -> Report
    convert.inspect("model.flax")                      -> Inspection
    convert.check("model.safetensors")                 -> Checked, against its certificate
    convert.clean("checkpoints/")                      what killed conversions left behind
    convert.lint("model.safetensors")                  -> Lint
    convert.match(torch_side, flax_side)               -> Layout, with the evidence for it
    convert.save(module, "tuned.safetensors")          a live module of either framework
    convert.load(path, "flax", definition)             and back, into a definition of one's own
    convert.export("model.safetensors", "model.onnx")  -> Exported, run in onnxruntime
    convert.to_flax(torch_module, inputs)              the same model, live, as an nnx.Module
    convert.to_state_dict(net)                         and its weights back in torch's tensors
    convert.layout_of(torch_module)                    -> Layout: what each tensor is in Flax
    convert.load_optimizer(path, tx, model)            an optimizer's state, into either framework
    convert.optim.nadam(2e-3)                          optax transformations by torch's rules
    convert.testing.assert_same(torch_net, flax_net, inputs)   in anybody's tests
    convert.to_jax(tensor_or_tree)                     PyTorch tensors as JAX arrays
    convert.to_torch(array_or_tree)                    and back

Importing this imports no framework. The command line calls these functions and nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert import optim, testing
    from convert.api import check, clean, convert, match, port, to_flax, verify
    from convert.compare.report import Report
    from convert.exporting.onnx_export import Exported, export
    from convert.inspection import Inspection, inspect
    from convert.linting.findings import Lint
    from convert.linting.run import lint
    from convert.live.into_definition import load
    from convert.live.saving import save
    from convert.packing import pack
    from convert.porting.to_flax import to_state_dict
    from convert.runtime.torch_layout import layout_of
    from convert.tensors import to_jax, to_torch
    from convert.training_state.into_live import load_optimizer
    from zoo.checkpoint.certificate import Certificate
    from zoo.checkpoint.intact import Checked

_WHERE = {
    "Certificate": "zoo.checkpoint.certificate",
    "Checked": "zoo.checkpoint.intact",
    "Inspection": "convert.inspection",
    "Lint": "convert.linting.findings",
    "Report": "convert.compare.report",
    "check": "convert.api",
    "clean": "convert.api",
    "Exported": "convert.exporting.onnx_export",
    "convert": "convert.api",
    "export": "convert.exporting.onnx_export",
    "inspect": "convert.inspection",
    "layout_of": "convert.runtime.torch_layout",
    "lint": "convert.linting.run",
    "load": "convert.live.into_definition",
    "match": "convert.api",
    "load_optimizer": "convert.training_state.into_live",
    "pack": "convert.packing",
    "Port": "convert.live.port_files",
    "port": "convert.api",
    "save": "convert.live.saving",
    "to_flax": "convert.api",
    "to_jax": "convert.tensors",
    "to_state_dict": "convert.porting.to_flax",
    "to_torch": "convert.tensors",
    "verify": "convert.api",
}
__all__ = [
    "Certificate",
    "Checked",
    "Exported",
    "Inspection",
    "Lint",
    "Port",
    "Report",
    "check",
    "clean",
    "convert",
    "export",
    "inspect",
    "layout_of",
    "lint",
    "load",
    "load_optimizer",
    "match",
    "optim",
    "pack",
    "port",
    "save",
    "testing",
    "to_flax",
    "to_jax",
    "to_state_dict",
    "to_torch",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in ("optim", "testing"):  # the modules themselves
        return importlib.import_module(f"convert.{name}")
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'convert' has no attribute {name!r}")
