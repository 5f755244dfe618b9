"""What each framework does to functions works on the twins: jit, vmap, grad, export; and their
second derivatives agree."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from support import canonical, every_family
from test_models import flax_outputs, scalar, to_canonical
from torch.nn.attention import SDPBackend, sdpa_kernel
from upstream import tensors

from convert.compare.outputs import run
from convert.runtime.arrays import named_outputs
from zoo import probe
from zoo.loading import build
from zoo.model import Config, Model
from zoo.registry import families


@every_family()
def test_jit_vmap_and_grad(model: Model, config: Config) -> None:
    module = build(model, config, "flax", canonical(model, config))
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    given = {
        k: model.to_flax(k, v).astype(np.float32) if v.dtype.kind == "f" else model.to_flax(k, v)
        for k, v in model.inputs(config).items()
    }

    def call(params: Any, given: Any) -> dict[str, Any]:
        return named_outputs(nnx.merge(graph, params, rest)(**given))

    plain = jax.jit(call)(params, given)
    two = {k: np.stack([v, np.flip(v, 0)]) for k, v in given.items()}
    mapped = jax.jit(jax.vmap(call, in_axes=(None, 0)))(params, two)
    for name, x in plain.items():
        gap = np.abs(np.asarray(mapped[name][0]) - np.asarray(x)).max()
        assert gap <= 1e-5 * max(1.0, np.abs(np.asarray(x)).max()), name
    grads = jax.jit(jax.grad(lambda p: sum(x.sum() for x in call(p, given).values())))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert any(np.asarray(g).any() for g in jax.tree.leaves(grads))


@every_family()
def test_export(model: Model, config: Config) -> None:
    """torch.export traces the whole forward pass; what cannot be compiled cannot be exported.

    Without lengths: torch itself cannot export packed sequences, whose shapes depend on values.
    """
    module = build(model, config, "torch", canonical(model, config))
    given = {
        k: torch.from_numpy(v.astype(np.float32) if v.dtype.kind == "f" else v)
        for k, v in model.inputs(config).items()
        if not k.endswith("lengths")
    }
    exported = torch.export.export(module, (), given).module()
    with torch.no_grad():
        a, b = named_outputs(exported(**given)), named_outputs(module(**given))
    for name, x in b.items():
        assert (a[name] - x).abs().max() <= 1e-5 * max(1.0, x.abs().max().item()), name


@every_family()
@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_computation_in_bfloat16_over_float32_parameters(
    model: Model, config: Config, framework: str
) -> None:
    """From float32 inputs: nothing mixes dtypes that do not mix."""
    weights, given = canonical(model, config), model.inputs(config)
    exact = run(model, config, "torch", weights, given, "float32")
    module = build(model, config, framework, weights, dtype="bfloat16")
    if framework == "torch":
        assert all(p.dtype == torch.float32 for p in module.parameters())
        with torch.no_grad():
            found = named_outputs(module(**tensors(given)))
        assert torch.bfloat16 in {x.dtype for x in found.values()}
        got = {n: x.double().numpy() for n, x in found.items()}
    else:
        params = jax.tree.leaves(nnx.state(module, nnx.Param))
        assert all(p.dtype == jax.numpy.float32 for p in params)
        got = flax_outputs(model, module, given)
        assert "bfloat16" in {str(x.dtype) for x in got.values()}
    assert all(np.isfinite(x).all() for x in got.values())
    first = next(iter(got))
    gap = np.abs(got[first].astype(np.float64) - exact[first]).max() / np.abs(exact[first]).max()
    assert 2.0**-12 < gap < 2.0**-3, "bfloat16 has 8 bits: coarser than that, finer than this"


SECOND = [n for n in ("bert", "convnet", "recurrent") if n in families()]


@pytest.mark.parametrize("name", SECOND)
def test_hessian_vector_products_agree(name: str) -> None:
    model = families()[name]
    config = next(iter(model.tiny.values()))
    weights = canonical(model, config)
    module = build(model, config, "torch", weights, param_dtype="float64")
    given = {k: torch.from_numpy(v) for k, v in model.inputs(config).items()}
    names, params = zip(*module.named_parameters(), strict=True)
    direction = {
        n: probe.normal(f"v.{n}", tuple(p.shape)) for n, p in zip(names, params, strict=True)
    }
    with sdpa_kernel(SDPBackend.MATH):
        grads = torch.autograd.grad(
            scalar(model, module(**given), "torch"), params, create_graph=True
        )
        inner = sum(
            (g * torch.from_numpy(direction[n])).sum() for n, g in zip(names, grads, strict=True)
        )
        products = torch.autograd.grad(inner, params, allow_unused=True)
    expected = {
        n: np.zeros(p.shape) if h is None else h.numpy()
        for n, p, h in zip(names, params, products, strict=True)
    }
    with jax.enable_x64(True):
        twin = build(model, config, "flax", weights, param_dtype="float64")
        along = build(
            model,
            config,
            "flax",
            {n: direction.get(n, np.zeros(a.shape)) for n, a in weights.items()},
            param_dtype="float64",
        )
        graph, params_, rest = nnx.split(twin, nnx.Param, ...)
        tangent = nnx.state(along, nnx.Param)
        inputs = {k: model.to_flax(k, v) for k, v in model.inputs(config).items()}

        def loss(p: Any) -> Any:
            return scalar(model, nnx.merge(graph, p, rest)(**inputs), "flax")

        _, product = jax.jit(lambda p, t: jax.jvp(jax.grad(loss), (p,), (t,)))(params_, tangent)
        got = to_canonical(model, config, product)
    scale = max(np.abs(x).max() for x in expected.values())
    assert scale > 0.1
    for n, x in expected.items():
        assert np.abs(got[n] - x).max() <= 1e-10 * scale, n
