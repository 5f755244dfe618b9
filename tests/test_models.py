"""What must hold for every model of the registry; a new one adds no line here."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
import torch
from documents import all_same, every_output
from flax import nnx
from support import Arrays, canonical, every_config, every_tiny
from upstream import tensors

import zoo
from convert.compare.outputs import compare_outputs, run
from convert.judge.noise import MARGIN
from convert.judge.rows import FLOOR
from convert.runtime.arrays import named_outputs
from zoo import probe
from zoo.checkpoint.apply import apply
from zoo.checkpoint.identification import identify_header
from zoo.checkpoint.label import Label
from zoo.checkpoint.readings import only_training
from zoo.containers.base import TensorInfo
from zoo.layout import Layout, View, between
from zoo.loading import build
from zoo.loading.fresh import initial
from zoo.model import Config, Model
from zoo.registry import families, get, names


@every_config()
def test_layout_is_the_torch_state_dict(model: Model, config: Config) -> None:
    with torch.device("meta"):
        module = model.definition("torch")(config)
    found = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    assert found == model.layout_of(config).shapes("torch")
    assert list(found) == list(model.layout_of(config).shapes("torch")), "order"


@every_config()
def test_layout_is_the_nnx_state(model: Model, config: Config) -> None:
    module = nnx.eval_shape(lambda: model.definition("flax")(config, rngs=nnx.Rngs(0)))
    state = nnx.to_flat_state(nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat)))
    found = {".".join(map(str, path)): tuple(v.shape) for path, v in state}
    assert found == model.layout_of(config).shapes("nnx")


@every_config()
def test_parameters_are_counted_as_torch_counts_them(model: Model, config: Config) -> None:
    with torch.device("meta"):
        module = model.definition("torch")(config)
    assert model.layout_of(config).parameters == sum(p.numel() for p in module.parameters())


@every_config()
def test_layout_survives_json(model: Model, config: Config) -> None:
    layout = model.layout_of(config)
    assert Layout.from_json(layout.to_json()) == layout


@every_config()
@pytest.mark.parametrize("tree", ["torch", "nnx", "linen"])
def test_names_and_shapes_identify_it(model: Model, config: Config, tree: Any) -> None:
    shapes = model.layout_of(config).shapes(tree)
    header = {name: TensorInfo("F32", shape) for name, shape in shapes.items()}
    found = [c for c in identify_header(header, Label()) if c.model is model]
    told = {k for k in vars(config) if k not in model.unknown and not only_training(k)}
    assert any(all(getattr(c.config, k) == getattr(config, k) for k in told) for c in found)


@every_tiny()
def test_config_survives_transformers_json(model: Model, config: Config) -> None:
    if model.to_hf is None:
        assert model.from_hf is None
        return
    data = model.to_hf(config)
    if not data:  # transformers has no such model
        return
    back = model.from_hf(data)
    told = {
        name: getattr(config, name) for name in model.structure
    }  # the tensors' names tell these
    assert dataclasses.replace(back, **told) == config


@pytest.mark.slow
@every_tiny()
def test_twins_agree_layer_by_layer(model: Model, config: Config) -> None:
    weights = canonical(model, config)
    rows = compare_outputs(model, config, ("torch", weights), ("flax", weights))
    with torch.device("meta"):
        parts = list(model.definition("torch")(config).children())
    assert not parts or any(not r.name.startswith("output") for r in rows), "no intermediates"
    wrong = [
        f"{r.name} {r.shape}: {r.error:.1e}, noise {r.noise:.1e}, float64 {r.error64:.1e}"
        + (" (shapes differ: is it an image that Model.images lacks?)" if r.error == np.inf else "")
        for r in rows
        if not r.same
    ]
    assert not wrong
    assert all(r.scale > 0.01 for r in rows), "an output too small to show a fault"


@every_tiny()
def test_fresh_weights_follow_from_seed_and_name_alone(model: Model, config: Config) -> None:
    names = list(canonical(model, config))
    a = initial(model, config, names, 0)
    b = initial(model, config, list(reversed(names)), 0)
    assert all((a[n] == b[n]).all() for n in names), "a tensor depends on which others are drawn"
    other = initial(model, config, names, 1)
    assert any((a[n] != other[n]).any() for n in names)


LARGE = 10_000_000  # parameters: presets beyond are not made


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [n for n in names() if get(n).model.layout_of(get(n).config).parameters <= LARGE],
)
def test_presets_start_alike_in_both_frameworks(name: str) -> None:
    model, config = get(name).model, get(name).config
    a, b = (zoo.create(name, framework=f, seed=3) for f in ("torch", "flax"))
    held = to_canonical(model, config, nnx.state(b, nnx.Any(nnx.Param, nnx.BatchStat)))
    state = {n: t.numpy() for n, t in a.state_dict().items()}
    assert held.keys() == canonical(model, config).keys()
    assert all((state[n] == x).all() for n, x in held.items())
    assert all(x.std() > 0 for x in held.values() if x.ndim > 1 and x.size > 1)
    given = model.inputs(config)
    rough, exact = every_output(a, given, by_name)
    all_same(flax_outputs(model, b, given), rough, exact)


def by_name(module: Any, given: Any) -> Any:
    return module(**given)


def flax_outputs(model: Model, module: Any, given: Arrays) -> Arrays:
    """What an NNX module gives for float32 inputs, by name, axes as in PyTorch."""
    cast = {
        n: jax.numpy.asarray(model.to_flax(n, x.astype(np.float32) if x.dtype.kind == "f" else x))
        for n, x in given.items()
    }
    found = named_outputs(nnx.jit(lambda module, given: module(**given))(module, cast))
    return {n: model.from_flax(n, np.asarray(x)) for n, x in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", "flax"])
@pytest.mark.parametrize("model", [pytest.param(m, id=m.name) for m in families().values()])
def test_dropout_acts_in_training_only(model: Model, framework: str) -> None:
    config = next(iter(model.tiny.values()))
    rates = {f: 0.5 for f in vars(config) if "drop" in f and isinstance(vars(config)[f], float)}
    if not rates:
        return
    config = dataclasses.replace(config, **rates)
    module = build(model, config, framework, canonical(model, config))
    given = model.inputs(config)

    def call() -> Arrays:
        if framework == "flax":
            return flax_outputs(model, module, given)
        return {n: x.detach().numpy() for n, x in named_outputs(module(**tensors(given))).items()}

    still = call(), call()
    module.train()
    moving = call(), call()
    name = next(iter(still[0]))
    assert (still[0][name] == still[1][name]).all()
    assert (moving[0][name] != moving[1][name]).any()


@dataclass(frozen=True)
class Trained:
    """Loss and gradients (of floating inputs too, as `in.NAME`), then the parameters after a few
    steps, under canonical names."""

    loss: float
    gradients: Arrays
    after: Arrays


STEPS, RATE = 3, 1e-3


def scalar(model: Model, output: Any, framework: str) -> Any:
    """A loss that depends on every element of every output, and on each differently."""
    total: Any = 0.0
    for name, x in named_outputs(output).items():
        shape = tuple(x.shape)
        if framework == "flax":
            weights = probe.normal(name, model.from_flax(name, np.empty(shape)).shape)
            total = total + (jax.numpy.sin(x) * model.to_flax(name, weights)).sum()
        else:
            total = total + (torch.sin(x) * torch.from_numpy(probe.normal(name, shape))).sum()
    return total


def train_torch(model: Model, config: Config, weights: Arrays) -> Trained:
    module = build(model, config, "torch", weights, param_dtype="float64")
    given = {k: torch.from_numpy(v) for k, v in model.inputs(config).items()}
    floats = {k: v.requires_grad_() for k, v in given.items() if v.is_floating_point()}
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=0.01)
    first: tuple[float, Arrays] | None = None
    for _ in range(STEPS):
        output = module(**given)
        loss = scalar(model, output, "torch")
        optimizer.zero_grad()
        loss.backward()
        if first is None:
            grads = {
                n: (torch.zeros_like(p) if p.grad is None else p.grad).numpy().copy()
                for n, p in module.named_parameters()
            }
            assert all(v.grad is not None for v in floats.values())
            first = (loss.item(), grads | {f"in.{k}": v.grad.numpy() for k, v in floats.items()})
            floats = {k: v.requires_grad_(False) for k, v in floats.items()}
        optimizer.step()
    after = {n: p.detach().numpy() for n, p in module.named_parameters()}
    assert first is not None
    return Trained(first[0], first[1], after)


def train_flax(model: Model, config: Config, weights: Arrays) -> Trained:
    import optax

    with jax.enable_x64(True):
        module = build(model, config, "flax", weights, param_dtype="float64")
        graph, params, rest = nnx.split(module, nnx.Param, ...)
        given = {k: model.to_flax(k, v) for k, v in model.inputs(config).items()}
        tx = optax.adamw(RATE, weight_decay=0.01)

        @jax.jit
        def step(params: Any, state: Any) -> Any:
            def loss_of(params: Any, floats: Any) -> Any:
                output = nnx.merge(graph, params, rest)(**(given | floats))
                return scalar(model, output, "flax")

            floats = {k: v for k, v in given.items() if v.dtype.kind == "f"}
            loss, (grads, of_inputs) = jax.value_and_grad(loss_of, (0, 1))(params, floats)
            updates, state = tx.update(grads, state, params)
            return loss, (grads, of_inputs), optax.apply_updates(params, updates), state

        state = tx.init(params)
        first = None
        for _ in range(STEPS):
            loss, grads, params, state = step(params, state)
            first = first or (float(loss), grads)
        grads, of_inputs = first[1]
        inputs = {f"in.{k}": model.from_flax(k, np.asarray(g)) for k, g in of_inputs.items()}
        gradients = to_canonical(model, config, grads) | inputs
        return Trained(first[0], gradients, to_canonical(model, config, params))


def to_canonical(model: Model, config: Config, state: Any) -> Arrays:
    flat = {".".join(map(str, p)): np.asarray(v.get_value()) for p, v in nnx.to_flat_state(state)}
    layout = model.layout_of(config)
    found: Arrays = {}
    for source, target in zip(layout.view("nnx"), layout.view("torch"), strict=True):
        if source.tensors and all(t.name in flat for t in source.tensors):
            ops, _ = between(source, target)
            made = apply(ops, [flat[t.name] for t in source.tensors])
            found |= {t.name: a for t, a in zip(target.tensors, made, strict=True)}
    return found


@pytest.mark.slow
@every_tiny()
def test_twins_have_the_same_gradients_and_train_alike(model: Model, config: Config) -> None:
    weights = canonical(model, config)
    a, b = train_torch(model, config, weights), train_flax(model, config, weights)
    assert abs(a.loss - b.loss) <= 1e-10 * abs(a.loss)
    assert a.gradients.keys() == b.gradients.keys()
    # Against the largest gradient: some have none of their own (PITFALLS 32).
    scale = max(np.abs(g).max() for g in a.gradients.values())
    for name, gradient in a.gradients.items():
        assert np.abs(gradient - b.gradients[name]).max() <= 1e-10 * scale, name
        if name in a.after and np.abs(gradient).max() > 1e-6 * scale:
            gap = np.abs(a.after[name] - b.after[name]).max()
            assert gap <= 1e-8 * np.abs(a.after[name]).max(), name
            assert np.abs(a.after[name] - weights[name]).max() > 0.1 * RATE, f"{name} stood still"


# --- Faults planted in the layout ---


@dataclass(frozen=True)
class Fault:
    title: str
    values: Arrays  # what the Flax twin then holds
    touched: tuple[str, ...]  # canonical tensors in which it differs from what is right


def right(layout: Layout, weights: Arrays) -> Arrays:
    return mapped([v for v in layout.view("nnx") if v.tensors], weights)


def mapped(views: list[View], weights: Arrays) -> Arrays:
    found: Arrays = {}
    for v in views:
        made = apply(v.ops, [weights[t.name] for t in v.entry.torch])
        found |= {t.name: a for t, a in zip(v.tensors, made, strict=True)}
    return found


def faults(model: Model, config: Config) -> Iterator[Fault]:
    """Every square kernel untransposed, every pair of equal shapes swapped, every tensor zeroed."""
    weights = canonical(model, config)
    layout = model.layout_of(config)
    good = right(layout, weights)
    for v in layout.view("nnx"):
        names = tuple(t.name for t in v.entry.torch)
        if v.ops and [t.shape for t in v.entry.torch] == [t.shape for t in v.tensors]:
            raw = {t.name: weights[n] for t, n in zip(v.tensors, names, strict=True)}
            yield Fault(f"no op: {names}", good | raw, names)
    plain = [v for v in layout.view("nnx") if len(v.tensors) == len(v.entry.torch) == 1]
    by_shape: dict[Any, list[View]] = {}
    for v in plain:
        by_shape.setdefault(v.tensors[0].shape, []).append(v)
    for group in by_shape.values():
        for a, b in itertools.pairwise(group):
            x, y = a.tensors[0].name, b.tensors[0].name
            swapped = good | {x: good[y], y: good[x]}
            touched = a.entry.torch[0].name, b.entry.torch[0].name
            yield Fault(f"swapped: {touched}", swapped, touched)
    yield from grouped_faults(layout, weights, good)
    for v in plain:
        name = v.tensors[0].name
        yield Fault(
            f"zeroed: {name}", good | {name: np.zeros_like(good[name])}, (v.entry.torch[0].name,)
        )


def grouped_faults(layout: Layout, weights: Arrays, good: Arrays) -> Iterator[Fault]:
    """Where one entry joins or divides: neighbours of equal shape swapped, on either side."""
    for v in layout.view("nnx"):
        if len(v.tensors) == len(v.entry.torch) == 1:
            continue
        names = tuple(t.name for t in v.entry.torch)
        for a, b in itertools.combinations(v.tensors, 2):
            if a.shape == b.shape:
                swapped = good | {a.name: good[b.name], b.name: good[a.name]}
                yield Fault(f"swapped in {names}: {a.name}, {b.name}", swapped, (a.name, b.name))
        for x, y in itertools.combinations(v.entry.torch, 2):
            if x.shape == y.shape:
                other = weights | {x.name: weights[y.name], y.name: weights[x.name]}
                touched = (x.name, y.name)
                yield Fault(
                    f"swapped before joining: {touched}", good | mapped([v], other), touched
                )


def flax_runner(model: Model, config: Config) -> Callable[[Arrays], list[np.ndarray]]:
    """Outputs of the Flax twin for any weights of its tree; compiled once."""
    module = build(model, config, "flax", canonical(model, config))
    graph, state = nnx.split(module)
    paths = {".".join(map(str, p)): p for p, _ in nnx.to_flat_state(state)}
    given = model.inputs(config)
    given = {
        k: model.to_flax(k, v).astype(np.float32 if v.dtype.kind == "f" else np.int32)
        for k, v in given.items()
    }

    @jax.jit
    def call(values: Arrays) -> Any:
        flat = dict(nnx.to_flat_state(state))
        for name, value in values.items():
            flat[paths[name]] = flat[paths[name]].replace(value)
        return nnx.merge(graph, nnx.from_flat_state(flat))(**given)

    return lambda values: [
        model.from_flax(name, np.asarray(x)) for name, x in named_outputs(call(values)).items()
    ]


@every_tiny()
def test_every_planted_fault_is_caught(model: Model, config: Config) -> None:
    weights = canonical(model, config)
    inputs = model.inputs(config)
    exact = run(model, config, "torch", weights, inputs, "float64")
    rough = run(model, config, "torch", weights, inputs, "float32")
    names = [n for n in exact if n == "output" or n.startswith("output.")]
    assert names
    call = flax_runner(model, config)

    def differs(values: Arrays) -> bool:
        return not all(  # NaN differs: a variance swapped for a mean has no root
            np.abs(got - rough[n]).max()
            <= MARGIN * max(np.abs(rough[n] - exact[n]).max(), FLOOR * np.abs(exact[n]).max())
            for n, got in zip(names, call(values), strict=True)
        )

    assert not differs(right(model.layout_of(config), weights)), "a fault is seen where none is"
    planted = list(faults(model, config))
    assert planted
    unseen = [f for f in planted if not differs(f.values)]
    unexplained = [
        fault.title
        for fault in unseen
        if not all(any(re.search(p, n) for p, _ in model.invisible) for n in fault.touched)
    ]
    assert not unexplained, (
        "no output shows these. If one should, the layout or a twin is wrong; if mathematics "
        "forbids it, state it: Model.invisible=((pattern of the names, why),)"
    )
    # What no output can see, the comparison of bits does.
    good = right(model.layout_of(config), weights)
    for fault in unseen:
        assert any(fault.values[n].tobytes() != good[n].tobytes() for n in good), fault.title


def test_the_planted_faults_need_these_weights() -> None:
    """Under constant weights most of the same faults are invisible: the test above could fail."""
    model = families()["bert"]
    config = model.tiny["encoder"]
    call = flax_runner(model, config)
    flat = {
        n: np.full_like(a, 0.1)
        for n, a in right(model.layout_of(config), canonical(model, config)).items()
    }
    reference = call(flat)
    unseen = 0
    for fault in faults(model, config):
        if fault.title.startswith("swapped"):
            unseen += all((x == y).all() for x, y in zip(call(flat), reference, strict=True))
    assert unseen > 5
