"""ResNet: its depths, fresh weights, counts of batches, and BatchNorm against torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from support import Arrays, canonical
from torch import nn

import convert
import zoo
from convert.judge.noise import EXACT, MARGIN
from convert.judge.rows import FLOOR
from zoo import probe
from zoo.containers.errors import UsageError
from zoo.loading import build
from zoo.loading.fresh import initial
from zoo.models.resnet import MODEL
from zoo.models.resnet.layout import infer
from zoo.nn import batchnorm_flax, batchnorm_torch


@pytest.mark.parametrize("preset", MODEL.presets)
def test_names_tell_the_depth(preset: str) -> None:
    config = MODEL.presets[preset]
    shapes = MODEL.layout_of(config).shapes("torch")
    assert infer(shapes) == vars(config)
    for name in ("conv1.weight", "fc.weight", "layer1.0.conv1.weight", "layer4.1.bn2.bias"):
        told = infer({n: s for n, s in shapes.items() if n != name})
        assert told is not None
        assert MODEL.configure(**told) == config
    assert infer(shapes | {"layer5.0.conv1.weight": (1, 1, 1, 1)}) is None


# --- Checkpoints ---


def published(folder: Path, batches: int = 1000) -> tuple[Path, Arrays]:
    """A checkpoint as torchvision's trainings leave it, with batches counted."""
    config = MODEL.tiny["basic"]
    state = {n: torch.from_numpy(a) for n, a in canonical(MODEL, config).items()}
    for name, shape in MODEL.layout_of(config).shapes("torch").items():
        state.setdefault(name, torch.full(shape, batches, dtype=torch.int64))
    torch.save(state, folder / "a.pth")
    return folder / "a.pth", {n: t.numpy() for n, t in state.items()}


def test_the_count_of_batches_comes_back(tmp_path: Path) -> None:
    path, state = published(tmp_path)
    convert.convert(path, tmp_path / "b")
    convert.convert(tmp_path / "b", tmp_path / "c.pt")
    back = torch.load(tmp_path / "c.pt", weights_only=True)
    assert {n: (t.dtype, t.tolist()) for n, t in back.items()} == {
        n: (t.dtype, t.tolist()) for n, t in ((n, torch.from_numpy(a)) for n, a in state.items())
    }


def test_fresh_weights_as_torchvision_draws_them() -> None:
    config = MODEL.presets["resnet18"]
    names = ["layer2.0.conv1.weight", "fc.weight", "bn1.weight", "bn1.bias", "bn1.running_var"]
    values = initial(MODEL, config, names, 0)
    conv, fc = values["layer2.0.conv1.weight"], values["fc.weight"]
    assert abs(conv.std() / np.sqrt(2 / (128 * 9)) - 1) < 0.01
    assert 0.99 < np.abs(fc).max() * np.sqrt(512) <= 1
    assert (values["bn1.weight"] == 1).all()
    assert (values["bn1.running_var"] == 1).all()
    assert (values["bn1.bias"] == 0).all()


@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_a_fresh_model(framework: str) -> None:
    model = zoo.create("resnet18", framework=framework, num_classes=3, width=8)
    x = MODEL.inputs(MODEL.tiny["basic"])["x"].astype(np.float32)
    given = torch.from_numpy(x) if framework == "torch" else jnp.asarray(np.moveaxis(x, 1, -1))
    assert model(given).shape == (2, 3)


@pytest.mark.parametrize(
    "fields", [{"layers": (2, 2, 2)}, {"layers": (2, 2, 2, 0)}, {"block": "wide"}, {"width": "x"}]
)
def test_configs_that_cannot_be(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        MODEL.configure(**fields)


# --- BatchNorm in training ---


def gap(a: Any, b: torch.Tensor) -> float:
    want = b.detach().double().numpy()
    return float(np.abs(np.asarray(a, np.float64) - want).max() / np.abs(want).max())


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("momentum", [0.1, 0.3])
def test_batchnorm_trains_as_torchs(ranks: int, momentum: float) -> None:
    """Three steps in training, then one in evaluation, against torch.nn itself, in float64.

    The batch is small, where a biased variance would show.
    """
    name = "BatchNorm2d" if ranks == 4 else "BatchNorm1d"
    upstream = getattr(nn, name)(3, 1e-3, momentum, dtype=torch.float64)
    mine = getattr(batchnorm_torch, name)(3, 1e-3, momentum, param_dtype=torch.float64)
    state = {n: probe.weight(n, (3,)) for n in ("weight", "bias", "running_mean", "running_var")}
    for module in (upstream, mine):
        module.load_state_dict({n: torch.from_numpy(a) for n, a in state.items()}, strict=False)
    with jax.enable_x64(True):
        twin = getattr(batchnorm_flax, name)(
            3, 1e-3, momentum, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
        for leaf, source in (("scale", "weight"), ("mean", "running_mean"), ("var", "running_var")):
            getattr(twin, leaf)[...] = jnp.asarray(state[source], jnp.float64)
        twin.bias[...] = jnp.asarray(state["bias"], jnp.float64)
        for step in range(4):
            if step == 3:
                upstream.eval(), mine.eval(), twin.eval()
            x = probe.normal(f"x{step}", (4, 3, 2, 1)[:ranks]) + 10
            given = torch.from_numpy(x)
            got = twin(jnp.asarray(np.moveaxis(x, 1, -1)))
            want = upstream(given)
            assert gap(np.moveaxis(np.asarray(got), -1, 1), want) < EXACT
            assert gap(mine(given).detach(), want) < EXACT
            for leaf, buffer in (("mean", "running_mean"), ("var", "running_var")):
                assert gap(getattr(twin, leaf)[...], getattr(upstream, buffer)) < EXACT
                assert gap(getattr(mine, buffer), getattr(upstream, buffer)) < EXACT
        assert twin.mean.dtype == jnp.float64
    assert mine.num_batches_tracked == upstream.num_batches_tracked == 3


def test_flaxs_own_batchnorm_would_not() -> None:
    """What the test above is for: the stock layer keeps another variance."""
    x = jnp.asarray(probe.normal("x", (8, 1)), jnp.float32)
    upstream = nn.BatchNorm1d(1)
    upstream(torch.from_numpy(np.array(x)))
    stock = nnx.BatchNorm(1, momentum=0.9, rngs=nnx.Rngs(0))
    stock(x)
    mine = batchnorm_flax.BatchNorm1d(1, rngs=nnx.Rngs(0))
    mine(x)
    assert gap(stock.var[...], upstream.running_var) > 1e-3
    assert gap(mine.var[...], upstream.running_var) < 1e-6


def test_the_variance_keeps_its_digits() -> None:
    """Around a mean of 10, where E[x^2] - E[x]^2, as Flax computes it by default, loses some."""
    x = probe.normal("x", (64, 4)) + 10
    upstream = nn.BatchNorm1d(4)
    rough = upstream(torch.from_numpy(x).float()).detach().numpy()
    exact = upstream.double()(torch.from_numpy(x)).detach().numpy()
    allowed = MARGIN * max(np.abs(rough - exact).max(), FLOOR * np.abs(exact).max())

    def error(layer: nnx.BatchNorm) -> float:
        return float(np.abs(np.asarray(layer(jnp.asarray(x, jnp.float32))) - rough).max())

    assert error(batchnorm_flax.BatchNorm1d(4, rngs=nnx.Rngs(0))) <= allowed
    assert error(nnx.BatchNorm(4, rngs=nnx.Rngs(0))) > allowed


@pytest.mark.slow
def test_the_twins_train_alike_in_training_mode() -> None:
    """Running statistics, outputs and parameters after three steps of SGD, in float64."""
    config = MODEL.configure(block="basic", layers=(1, 1, 1, 1), width=4, num_classes=3)
    weights = canonical(MODEL, config)
    xs = [probe.normal(f"x{i}", (3, 3, 64, 64)) for i in range(3)]
    a = build(MODEL, config, "torch", weights, param_dtype="float64").train()
    optimizer = torch.optim.SGD(a.parameters(), lr=0.01)
    outputs = []
    for x in xs:
        out = a(torch.from_numpy(x))
        outputs.append(out.detach().numpy())
        optimizer.zero_grad()
        out.sin().sum().backward()
        optimizer.step()
    with jax.enable_x64(True):
        b = build(MODEL, config, "flax", weights, param_dtype="float64")
        b.train()

        @nnx.jit
        def step(model: Any, x: Any) -> Any:
            def loss_of(model: Any) -> Any:
                out = model(x)
                return jnp.sin(out).sum(), out

            grads, out = nnx.grad(loss_of, has_aux=True)(model)
            params = nnx.state(model, nnx.Param)
            nnx.update(model, jax.tree.map(lambda p, g: p - 0.01 * g, params, grads))
            return out

        for x, want in zip(xs, outputs, strict=True):
            out = step(b, jnp.asarray(np.moveaxis(x, 1, -1)))
            assert np.abs(np.asarray(out) - want).max() <= EXACT * np.abs(want).max()
        pairs = [
            (b.bn1, a.bn1),
            (b.layer2[0].bn2, a.layer2[0].bn2),
            (b.layer4[0].downsample[1], a.layer4[0].downsample[1]),
        ]
        for twin, mine in pairs:
            assert gap(twin.mean[...], mine.running_mean) < EXACT
            assert gap(twin.var[...], mine.running_var) < EXACT
            assert gap(twin.scale[...], mine.weight) < EXACT
    assert a.bn1.num_batches_tracked == 3


@pytest.mark.parametrize("training", [False, True])
def test_batchnorm_in_16_bits_keeps_statistics_in_32(training: bool) -> None:
    x = (probe.normal("x", (16, 4)) + 3).astype(np.float32)
    a = batchnorm_torch.BatchNorm1d(4, dtype=torch.bfloat16).train(training)
    b = batchnorm_flax.BatchNorm1d(4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    b.train() if training else b.eval()
    exact = nn.BatchNorm1d(4).train(training)
    got_a, got_b, want = a(torch.from_numpy(x)), b(jnp.asarray(x)), exact(torch.from_numpy(x))
    assert got_a.dtype == torch.bfloat16
    assert got_b.dtype == jnp.bfloat16
    assert gap(got_a.detach().float(), want) < 2.0**-7
    assert gap(got_b, want) < 2.0**-7
    assert gap(a.running_var, exact.running_var) < 1e-6
    assert gap(b.var[...], exact.running_var) < 1e-6
    half = batchnorm_torch.BatchNorm1d(4, param_dtype=torch.bfloat16).train(training)
    twin = batchnorm_flax.BatchNorm1d(4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    twin.train() if training else twin.eval()
    half(torch.from_numpy(x)), twin(jnp.asarray(x))
    assert half.running_var.dtype == torch.bfloat16
    assert twin.var.dtype == jnp.bfloat16
    assert gap(twin.var[...].astype(jnp.float32), half.running_var) < 2.0**-7


def test_one_value_a_channel_has_no_variance() -> None:
    with pytest.raises(ValueError, match="more than 1 value"):
        batchnorm_torch.BatchNorm1d(4)(torch.ones(1, 4))
    with pytest.raises(ValueError, match="no variance"):
        batchnorm_flax.BatchNorm1d(4, rngs=nnx.Rngs(0))(jnp.ones((1, 4)))
