"""Small convolutional classifiers in Linen, their geometry, and the blocks they stand on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from documents import filled, images_last, outputs, same
from flax import linen, nnx, serialization
from orbax import checkpoint as ocp
from torch import nn
from upstream.convnet import CLASSES, Pooled

import convert
import zoo
from zoo import probe
from zoo.containers.errors import UsageError
from zoo.models.convnet import MODEL
from zoo.models.convnet.layout import infer
from zoo.nn import conv_flax, conv_torch, pool_flax


def sample(preset: str, batch: int = 2) -> np.ndarray:
    c = MODEL.presets[preset]
    return probe.normal("x", (batch, c.in_channels, c.image_size, c.image_size))


@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_another_image_size_is_a_new_head(framework: str) -> None:
    model = zoo.create("mnist_cnn", framework=framework, image_size=32)
    x = np.zeros((1, 1, 32, 32), np.float32)
    given = torch.from_numpy(x) if framework == "torch" else jnp.asarray(images_last(x))
    assert model(given).shape == (1, 10)


# --- Linen, which flattens channel-last ---


class LinenCNN(linen.Module):
    """The documents' Flax class."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.relu(linen.Conv(32, (3, 3))(x))
        x = linen.relu(linen.Conv(64, (3, 3))(x))
        x = x.reshape((x.shape[0], -1))
        x = linen.relu(linen.Dense(128)(x))
        return linen.Dense(10)(x)


@pytest.mark.parametrize("outer", [True, False], ids=["params", "bare"])
@pytest.mark.parametrize("container", ["msgpack", "orbax"])
def test_a_linen_checkpoint(container: str, outer: bool, tmp_path: Path) -> None:
    x = sample("flax_cnn", 1).astype(np.float32)
    net, given = LinenCNN(), jnp.asarray(images_last(x))
    template = jax.eval_shape(net.init, jax.random.key(0), given)
    variables = jax.tree_util.tree_map_with_path(
        lambda p, t: jnp.asarray(probe.weight(str(p), t.shape[::-1]).T), template
    )
    tree = variables if outer else variables["params"]
    if container == "msgpack":
        path = tmp_path / "c.msgpack"
        path.write_bytes(serialization.to_bytes(tree))
    else:
        path = tmp_path / "c"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
    made = convert.convert(path, tmp_path / "t.pt", framework="torch")
    assert (made.model, made.source_tree) == ("convnet", "linen-compact")
    assert MODEL.configure(**made.config) == MODEL.presets["flax_cnn"]
    module = CLASSES["flax_cnn"]()
    module.load_state_dict(torch.load(tmp_path / "t.pt", weights_only=True), strict=True)
    expected = outputs(module, x)
    same(net.apply(variables, given), *expected)
    same(zoo.load(path, framework="flax")(given), *expected)


def test_what_the_linen_class_restores(tmp_path: Path) -> None:
    module = filled(CLASSES["flax_cnn"]())
    torch.save(module.state_dict(), tmp_path / "a.pt")
    convert.convert(tmp_path / "a.pt", tmp_path / "b.msgpack", tree="linen-compact")
    x = sample("flax_cnn", 1).astype(np.float32)
    net, given = LinenCNN(), jnp.asarray(images_last(x))
    template = jax.eval_shape(net.init, jax.random.key(0), given)
    restored = serialization.from_bytes(template, (tmp_path / "b.msgpack").read_bytes())
    assert jax.tree.structure(restored) == jax.tree.structure(template)
    expected = outputs(module, x)
    same(net.apply(restored, given), *expected)
    # The NNX tree has the other order: the same bytes would compute something else.
    convert.convert(tmp_path / "a.pt", tmp_path / "n.msgpack")
    nnx_tree = serialization.msgpack_restore((tmp_path / "n.msgpack").read_bytes())
    assert (nnx_tree["fc1"]["kernel"] != restored["params"]["Dense_0"]["kernel"]).any()


# --- What names and shapes tell ---


def test_other_widths_keep_the_presets_geometry() -> None:
    shapes = MODEL.layout_of(MODEL.presets["mnist_cnn_wide"]).shapes("torch")
    other = shapes | {"fc1.weight": (50, 1568), "fc1.bias": (50,), "fc2.weight": (10, 50)}
    assert infer(other) == vars(MODEL.presets["mnist_cnn_wide"]) | {"hidden": (50,)}


def test_an_unknown_geometry_converts_and_loading_asks(tmp_path: Path) -> None:
    module = filled(Pooled(nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1), 36, 7, 3))
    torch.save(module.state_dict(), tmp_path / "a.pt")
    made = convert.convert(tmp_path / "a.pt")
    assert [made.config[n] for n in ("stride", "padding", "pool")] == [None] * 3
    with pytest.raises(UsageError, match="padding, pool, stride"):
        zoo.load(tmp_path / "a.flax", framework="flax")
    told = {"in_channels": 2, "channels": (5, 4), "kernel_size": 3, "padding": 1}
    told |= {"image_size": 12, "hidden": (7,), "num_classes": 3}
    model = zoo.load(tmp_path / "a.flax", framework="flax", model="convnet", config=told)
    x = probe.normal("x", (2, 2, 12, 12)).astype(np.float32)
    same(model(jnp.asarray(images_last(x))), *outputs(module, x))
    back = convert.convert(tmp_path / "a.flax", tmp_path / "b.pt")
    assert back.config["stride"] is None


@pytest.mark.parametrize("preset", CLASSES)
def test_a_damaged_checkpoint_is_still_told_by_the_rest(preset: str) -> None:
    c = MODEL.presets[preset]
    shapes = MODEL.layout_of(c).shapes("torch")
    for name in shapes:
        found = infer({n: s for n, s in shapes.items() if n != name})
        assert found is not None, name
        if name != "fc1.weight":  # image_cnn and flax_cnn differ in nothing else
            assert found == vars(c)


@pytest.mark.parametrize(
    "change",
    [
        {"conv1.weight": (10, 1, 5)},
        {"conv4.weight": (1, 1, 1, 1)},
        {"fc1.weight": (10, 5)},
        {"lstm.weight": (3,)},
    ],
)
def test_other_names_and_ranks_are_other_models(change: dict[str, Any]) -> None:
    shapes = {"conv1.weight": (8, 1, 5, 5), "fc1.weight": (10, 32), "fc1.bias": (10,)}
    assert infer(shapes) is not None
    assert infer(shapes | change) is None


@pytest.mark.parametrize(
    "fields", [{"channels": ()}, {"image_size": 8}, {"stride": 0}, {"hidden": (0,)}]
)
def test_configs_that_cannot_be(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        MODEL.configure(**fields)


# --- Convolutions and pools against torch ---

CONVS: list[tuple[int, Any, Any, Any, Any, int]] = [  # axes, kernel, stride, padding, dilation, ...
    (1, 4, 2, 2, 1, 1),
    (1, 5, 1, 2, 2, 3),
    (1, 3, 1, "same", 2, 1),
    (1, 4, 1, "same", 1, 1),
    (2, 1, 2, 0, 1, 1),
    (2, 5, 2, 2, 1, 1),
    (2, 4, 2, 1, 1, 3),
    (2, 3, 1, 2, 2, 1),
    (2, (3, 5), (2, 1), (1, 2), (1, 2), 1),
    (2, 2, 1, "same", 1, 1),
    (2, 3, 1, "same", 2, 3),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_convolutions_are_torchs() -> None:
    """Kernel, stride, padding, dilation, groups and bias, in float64, for odd and even sizes."""
    with jax.enable_x64(True):
        for i, (n, k, s, p, d, g) in enumerate(CONVS):
            name = f"Conv{n}d"
            t = getattr(conv_torch, name)(
                3, 6, k, s, p, d, g, bool(i % 2), param_dtype=torch.float64
            )
            filled(t)
            kw: Any = {"param_dtype": jnp.float64, "kernel_init": nnx.initializers.zeros}
            f = getattr(conv_flax, name)(3, 6, k, s, p, d, g, bool(i % 2), rngs=nnx.Rngs(0), **kw)
            axes = (2, 1, 0) if n == 1 else (2, 3, 1, 0)
            f.kernel[...] = jnp.asarray(t.weight.detach().numpy().transpose(axes))
            if i % 2:
                f.bias[...] = jnp.asarray(t.bias.detach().numpy())
            x = probe.normal("x", (2, 3, 11, 12)[: n + 2])
            want = t(torch.from_numpy(x)).detach().numpy()
            got = np.moveaxis(np.asarray(f(jnp.asarray(np.moveaxis(x, 1, -1)))), -1, 1)
            assert got.dtype == np.float64
            assert got.shape == want.shape
            assert np.abs(got - want).max() < 1e-12, (n, k, s, p, d, g)


def test_padding_by_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="same"):
        conv_flax.Conv2d(1, 1, 3, padding="full", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="stride"):
        conv_flax.Conv2d(1, 1, 3, 2, padding="same", rngs=nnx.Rngs(0))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 7), (6, 6), (13, 5)])
@pytest.mark.parametrize("out", [1, 6, (4, 3)])
def test_the_adaptive_pool_has_torchs_windows(size: tuple[int, int], out: Any) -> None:
    x = probe.normal("x", (2, 3, *size))
    want = F.adaptive_avg_pool2d(torch.from_numpy(x), out).numpy()
    with jax.enable_x64(True):
        got = pool_flax.adaptive_avg_pool2d(jnp.asarray(images_last(x)), out)
    assert np.abs(np.asarray(got) - images_last(want)).max() < 1e-14


@pytest.mark.parametrize("kind", ["max_pool2d", "avg_pool2d"])
@pytest.mark.parametrize("given", [(2,), (3, 2), (3, 2, 1), ((3, 2), (1, 2), (1, 0))])
def test_pools_are_torchs(kind: str, given: tuple[Any, ...]) -> None:
    x = probe.normal("x", (2, 3, 9, 10)) - 5  # below zero, where a padding of zeros would show
    want = getattr(F, kind)(torch.from_numpy(x), *given).numpy()
    with jax.enable_x64(True):
        got = getattr(pool_flax, kind)(jnp.asarray(images_last(x)), *given)
    assert np.abs(np.asarray(got) - images_last(want)).max() < 1e-14


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_computation_in_16_bits_over_float32_parameters(dtype: str) -> None:
    x = sample("mnist_cnn").astype(np.float32)
    a = zoo.create("mnist_cnn", framework="torch", dtype=dtype)
    b = zoo.create("mnist_cnn", framework="flax", dtype=dtype)
    exact = zoo.create("mnist_cnn", framework="torch")(torch.from_numpy(x)).detach().numpy()
    assert a(torch.from_numpy(x)).dtype == getattr(torch, dtype)
    assert b(jnp.asarray(images_last(x))).dtype == dtype
    got = np.asarray(b(jnp.asarray(images_last(x))), np.float32)
    gap = np.abs(got - exact).max() / np.abs(exact).max()
    assert 2.0**-13 < gap < 2.0**-3
