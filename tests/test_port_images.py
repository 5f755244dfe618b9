"""`convert.port` of models with images: channels last, and torch's order where it is needed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from port_image_models import (
    Classifier,
    Crnn,
    Frames,
    Shared,
    Shuffled,
    Tokens,
    Unbatched,
    UNet,
)
from port_models import Residual

import convert
from convert.live.port_files import Port
from convert.porting.image_axes import orders
from zoo.containers.errors import UsageError


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def plainly(port: Port) -> str:
    return " ".join(port.source.split())


@pytest.fixture(scope="module")
def unet() -> Port:
    torch.manual_seed(0)
    return convert.port(UNet, images(2, 3, 6, 8), image_axes="last")


@pytest.fixture(scope="module")
def classifier() -> Port:
    torch.manual_seed(0)
    return convert.port(Classifier, images(2, 3, 16, 16), image_axes="last", level="outputs")


def test_layers_are_flaxs_own_and_nothing_is_moved(unet: Port) -> None:
    assert unet.proved.verdict == "same"
    assert "transpose" not in unet.source
    assert "channels_first" not in unet.source
    assert "nnx.Conv(i, o, (3, 3), padding=1, use_bias=False" in plainly(unet)
    assert "jnp.concatenate([a, u], axis=-1)" in unet.source
    assert "size=(a.shape[1], a.shape[2])" in unet.source
    assert "((0, 0), (0, 2), (1, 0), (0, 0))" in plainly(unet)
    assert "jax.nn.softmax(self.out(u), axis=-1)" in unet.source


def test_the_header_says_which_axes_it_has(unet: Port) -> None:
    assert "x is (B, H, W, C), where torch's is (B, C, H, W)" in plainly(unet)
    assert "the output is (B, H, W, C)" in plainly(unet)
    given = np.moveaxis(images(2, 3, 6, 8), 1, -1)
    assert unet.net()(given).shape == (2, 6, 8, 2)


def test_parameters_of_channels_lie_as_they_are_used(unet: Port, classifier: Port) -> None:
    assert "self.gamma[...] *" in classifier.source
    net = classifier.net()
    assert net.blocks[0].gamma.shape == (1, 1, 4)
    (entry,) = [e for e in classifier.layout.entries if e.torch[0].name == "blocks.1.gamma"]
    assert entry.flax[0].shape == (1, 1, 4)
    assert unet.net().mean.shape == (1, 1, 1, 3)
    assert unet.net().std.shape == (1, 1, 3)
    assert "(x - self.mean[...]) / self.std[...]" in unet.source


def test_norms_of_channels_are_layers_without_permutations(classifier: Port) -> None:
    assert "self.norm = nnx.LayerNorm(d, epsilon=1e-05" in classifier.source
    assert "class LayerNorm2d" not in classifier.source
    assert "class NormAct(BatchNorm):" in classifier.source
    assert "from zoo.nn.batchnorm_flax import BatchNorm" in classifier.source


def test_a_reshape_that_needs_torchs_order_says_so(classifier: Port) -> None:
    assert classifier.proved.verdict == "same"
    assert classifier.report is not None
    assert classifier.report.verdict == "same"
    lines = [x.strip() for x in classifier.source.splitlines()]
    (at,) = [i for i, x in enumerate(lines) if "transpose" in x]
    assert lines[at - 1] == "# torch reshapes (C, H, W), in this order"
    assert lines[at] == "x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)"
    assert "y = x.mean(axis=(1, 2), keepdims=True).reshape(b, c)" in lines
    assert "b, _, _, c = x.shape" in lines
    assert any(".reshape(b, 1, 1, c)" in x for x in lines)


@pytest.mark.filterwarnings("ignore:no weights, not saved")
def test_weights_go_there_and_back_and_the_parity_test_passes(
    classifier: Port, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier.save(tmp_path / "images_flax.py", test=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    import images_flax  # type: ignore[import-not-found]
    import test_images_flax  # type: ignore[import-not-found]

    assert (
        'flax_inputs=HERE / "test_images_flax_channels_last.npz"'
        in (tmp_path / "test_images_flax.py").read_text()
    )
    test_images_flax.test_it_is_the_same_model()
    net = convert.load(tmp_path / "images_flax.safetensors", "flax", images_flax.Classifier)
    convert.save(net, tmp_path / "back.safetensors", layout=tmp_path / "images_flax.safetensors")
    back = convert.load(tmp_path / "back.safetensors", "torch", Classifier)
    held = classifier.module.state_dict()
    assert all(torch.equal(x, held[n]) for n, x in back.state_dict().items())
    layout = json.loads((tmp_path / "images_flax.layout.json").read_text())
    assert "permute" in json.dumps(layout).lower()


def test_tokens_and_images_are_reshapes_of_each_other() -> None:
    port = convert.port(Tokens, images(2, 3, 8, 12), image_axes="last", verify=False)
    assert "transpose" not in port.source
    assert "B, H, W, C = x.shape" in port.source
    assert ".reshape(B, H, W, C)" in port.source


def test_groups_of_channels_and_unknown_operations() -> None:
    port = convert.port(Shuffled, images(2, 4, 4, 6), image_axes="last")
    assert port.proved.verdict == "same"
    assert "x.reshape(b, h, w, 2, -1).transpose(0, 1, 2, 4, 3)" in port.source
    assert "# bmm takes torch's axes" in port.source
    assert "the output is" not in plainly(port)  # features stay


def test_columns_of_an_image_are_a_sequence() -> None:
    port = convert.port(Crnn, images(2, 1, 4, 10), image_axes="last", verify=False)
    assert "x.transpose(0, 2, 3, 1).reshape(b, w, -1)" in port.source
    assert "#" not in port.source  # the source moves axes there too


def test_videos_and_sound() -> None:
    inputs = {"x": images(2, 3, 3, 6, 8), "wave": images(2, 21)}
    port = convert.port(Frames, inputs, image_axes="last", verify=False)
    assert "b, t, h, w, c = x.shape" in port.source
    assert "transpose" not in port.source
    assert "x is (B, T, H, W, C), where torch's is (B, T, C, H, W)" in plainly(port)
    assert 'nnx.Conv(1, 4, (5,), strides=2, padding="VALID"' in plainly(port)


def test_first_leaves_the_axes() -> None:
    port = convert.port(Crnn, images(2, 1, 4, 10), image_axes="first", verify=False)
    assert "from zoo.nn.channels_first_flax import Conv2d" in port.source
    assert "x.transpose(0, 3, 1, 2)" in port.source
    with pytest.raises(UsageError, match="no image_axes 'middle'"):
        convert.port(Crnn, images(2, 1, 4, 10), image_axes="middle")  # type: ignore[arg-type]


def test_a_model_without_images_is_untouched() -> None:
    first, last = (
        convert.port(Residual, images(2, 4), image_axes=a, verify=False).source
        for a in ("first", "last")
    )
    assert first == last


def test_where_one_part_is_for_both_the_axes_stay_and_it_says_so() -> None:
    port = convert.port(Shared, images(2, 3, 4, 4), image_axes="last", verify=False)
    assert any("torch's axes" in told for told in port.proved.notices)
    assert "channels_first_flax" in port.source


def test_an_image_without_a_batch_keeps_torchs_axes() -> None:
    port = convert.port(Unbatched, images(2, 3, 4, 4), image_axes="last", verify=False)
    assert any("a Conv2d takes an array of 3 axes" in told for told in port.proved.notices)
    assert "channels_first_flax" in port.source


# -- the algebra --------------------------------------------------------------------------------

_SHAPES = [
    ((2, 6, 4, 5), (2, 6, 20)),
    ((2, 6, 4, 5), (2, 2, 3, 4, 5)),
    ((2, 6, 1, 1), (2, 6)),
    ((2, 6), (2, 6, 1, 1)),
    ((2, 6, 20), (2, 6, 4, 5)),
    ((2, 6, 4, 5), (12, 4, 5)),
    ((2, 6, 4, 5), (2, 6, 2, 2, 5)),
    ((2, 1, 4, 5), (2, 4, 1, 5)),
]


@pytest.mark.parametrize(("before", "after"), _SHAPES)
def test_a_reshape_of_what_lies_otherwise_is_torchs(
    before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    x = np.arange(np.prod(before)).reshape(before)
    found = 0
    for order in itertools.permutations(range(len(before))):
        for wanted in (None, orders.last(len(after)) if len(after) > 2 else None):
            made = orders.reshaped(order, before, after, wanted)
            if made is None:
                continue
            found += 1
            lying = x.transpose(order).reshape([after[a] for a in made])
            assert np.array_equal(lying, x.reshape(after).transpose(made))
    assert found > 1


def test_a_flattened_image_has_torchs_order_only() -> None:
    assert orders.reshaped((0, 2, 3, 1), (2, 6, 4, 5), (2, 120), None) is None
    assert orders.reshaped((0, 2, 3, 1), ("s0", 6, 1, 1), ("s0", 6), None) == (0, 1)
    sizes = ("s0", 8, "s1", "s2")
    assert orders.reshaped((0, 2, 3, 1), sizes, ("s0", 8, "s1*s2"), None) == (0, 2, 1)
    assert orders.reshaped((0, 2, 3, 1), sizes, ("s0", "s1*s2", 8), None) is None


def test_axes_follow_permutations_and_losses() -> None:
    rng = np.random.default_rng(0)
    shape = (2, 3, 4, 5)
    x = np.arange(120).reshape(shape)
    for _ in range(30):
        order, axes = (tuple(map(int, rng.permutation(4))) for _ in range(2))
        lying = x.transpose(order)
        assert np.array_equal(lying, x.transpose(axes).transpose(orders.permuted(order, axes)))
        back = orders.before_permuted(order, axes)
        assert orders.permuted(back, axes) == order
        gone = int(rng.integers(4))
        left = orders.without(order, [gone])
        summed = lying.sum(axis=order.index(gone))
        assert np.array_equal(summed, x.sum(axis=gone).transpose(left))


def test_what_broadcasts_in_torch_broadcasts_beside_it() -> None:
    x = np.arange(120.0).reshape(2, 3, 4, 5)
    for order in itertools.permutations(range(4)):
        for n in range(1, 5):
            y = np.arange(1.0, np.prod(x.shape[4 - n :]) + 1).reshape(x.shape[4 - n :])
            own, ones = orders.trailing(order, n)
            lying = y.transpose(own)
            for at in ones:
                lying = np.expand_dims(lying, at)
            assert np.array_equal(x.transpose(order) * lying, (x * y).transpose(order))
