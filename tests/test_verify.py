"""`convert.verify` at every level, for the zoo's checkpoints and for users' own modules."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fault_modules import encoder_pair
from flax import linen, nnx
from nets import SHAPE, TorchNet, images, linen_net, nnx_net, torch_net
from support import canonical, write
from torch import nn

import convert
from convert.cli.main import cli
from convert.compare.report import Report
from convert.compare.summary_text import report as show
from convert.compare.twins import twin
from convert.diagnose.divergence import Divergence
from convert.judge import noise as numerics
from convert.judge.bits import TensorDifference
from convert.judge.noise import MARGIN, Noise, gap, judge, statistics
from convert.judge.rows import FLOOR
from convert.runtime.precision import full_precision
from zoo import probe
from zoo.checkpoint.label import Label
from zoo.containers.errors import CorruptInput, UsageError, ZooError
from zoo.containers.safetensors_file import SafetensorsWriter
from zoo.registry import families

BERT, CONVNET = (families()[n] for n in ("bert", "convnet"))


def checkpoint(path: Path, model: Any, config: Any, **changed: Any) -> Path:
    """A safetensors checkpoint of name-seeded weights; `changed` are functions of an array."""
    arrays = canonical(model, config)
    for name, change in changed.items():
        arrays[name] = np.ascontiguousarray(change(arrays[name]), np.float32)
    return write(SafetensorsWriter, path, arrays, **Label(model, config).to_metadata())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A convnet in both frameworks."""
    folder = tmp_path_factory.mktemp("pair")
    a = checkpoint(folder / "a.safetensors", CONVNET, CONVNET.tiny["pooled"])
    convert.convert(a, folder / "b.msgpack")
    return a, folder / "b.msgpack"


def bad(report: Report) -> list[str]:
    return [row.name for row in report.rows if row.judged and not row.same]


# --- What "the same" means ---


def test_noise_decides_and_float64_too() -> None:
    x = np.linspace(-1, 1, 50)
    exact, rough = x, x + 1e-6
    assert judge("x", (rough, exact), (rough + 7.9e-6, exact)).same
    assert not judge("x", (rough, exact), (rough + 8.1e-6, exact)).same
    assert not judge("x", (rough, exact), (rough, exact + 2e-10)).same
    row = judge("x", (rough, exact), (rough, exact[:-1]))
    assert not row.same
    assert row.error64 == float("inf")
    assert judge("x", (exact, exact), (exact + 7.9 * FLOOR, exact)).same, "the floor"


def test_what_is_not_finite_on_both_sides_alike_is_no_difference() -> None:
    x = np.array([1.0, -np.inf, 2.0])
    assert gap(x, x) == 0
    assert gap(x, np.array([1.0, 5.0, 2.0])) == float("inf")
    assert judge("x", (x, x), (x, x)).same
    holed = np.array([1.0, np.nan, 2.0])
    row = judge("x", (holed, holed), (holed, holed))
    assert (row.same, row.note) == (True, "NaN on both sides in 1 of 3 elements")
    for other in (x, np.array([1.0, 0.0, 2.0]), np.array([np.nan, 1.0, 2.0])):
        assert not judge("x", (other, other), (holed, holed)).same
        row = judge("x", (holed, holed), (other, other))
        assert (row.same, row.noise) == (False, float("inf")), "torch's own"
    nothing = np.array([np.nan])
    assert not judge("x", (nothing, nothing), (nothing, nothing)).same, "nothing was compared"
    far = judge("x", (holed, holed), (holed + 1e-3, holed + 1e-3))
    assert (far.same, far.noise, far.scale) == (False, 0.0, 2.0)
    beyond = np.array([np.inf, 1.0])
    row = judge("x", (beyond, np.array([1e39, 1.0])), (np.array([1.0, 2.0]), np.array([1e39, 1.0])))
    assert not row.same, "what float32 cannot hold is no measure of its rounding"


def test_statistics_count_every_element_once() -> None:
    a = np.array([1.0, 2.0, -4.0, 0.5])
    found = statistics(a, a + np.array([0, 4e-6, 4.1, np.nan]), 4.0)
    assert found is not None
    assert sum(found.bins) == 4
    assert found.bins[0] == 1
    assert found.bins[14] == 1, "1e-6 of the scale"
    assert found.bins[19] == 2, "as large as the scale, and not a number"
    assert (found.minimum, found.maximum) == (-4.0, 2.0)


def test_noise_is_measured_again_only_where_rounding_may_explain_the_difference() -> None:
    exact = {"x": np.ones(3)}
    ran: list[tuple[str, int]] = []

    def rerun(precision: str, i: int) -> dict[str, np.ndarray]:
        ran.append((precision, i))
        return {"x": exact["x"] + (1e-5 if precision == "float32" else 1e-9)}

    noise = Noise(exact, rerun, exact64=True)
    fine = judge("x", (exact["x"] + 1e-7, exact["x"]), (exact["x"], exact["x"]))
    assert noise.again(fine) is fine
    wrong = judge("x", (exact["x"], exact["x"]), (exact["x"] + 1, exact["x"] + 1))
    assert noise.again(wrong) is wrong
    assert not ran
    lucky = judge("x", (exact["x"], exact["x"]), (exact["x"] + 7e-5, exact["x"]))
    assert not lucky.same
    assert noise.again(lucky).same
    many = dataclasses.replace(lucky, shape=(8, 8))
    assert noise.again(many) is many, "64 elements are no matter of luck"
    assert Noise(exact, rerun, chaotic=True).again(many).same
    narrow = judge("x", (np.ones(64), None), (np.ones(64) + 7e-5, None))
    assert Noise({"x": np.ones(3)}, rerun).again(narrow).same, "no float64 says otherwise"
    assert not noise.again(dataclasses.replace(lucky, error=9e-5)).same
    cancels = dataclasses.replace(fine, error64=7e-9, same=False)
    assert noise.again(cancels).same
    assert not noise.again(dataclasses.replace(cancels, error64=9e-9)).same
    assert not Noise(exact, rerun).again(cancels).same, "outputs are strict in float64"
    both = dataclasses.replace(lucky, error64=7e-9)
    assert noise.again(both).same, "constants of float32 on one side: each within its own noise"
    assert not noise.again(dataclasses.replace(both, error64=9e-9)).same
    assert not noise.again(dataclasses.replace(both, error=9e-5)).same
    assert not Noise(exact, rerun).again(both).same
    steps = Noise(exact, rerun, exact64=True, chaotic=True, grown=4.0)
    assert steps.again(dataclasses.replace(lucky, error=3e-4)).same
    assert not steps.again(dataclasses.replace(lucky, error=4e-4)).same
    far = dataclasses.replace(both, error=9e-5)
    assert not steps.again(far).same, "only where float64 is exact"


def test_reruns_move_weights_by_one_unit_in_the_last_place() -> None:
    config = CONVNET.tiny["pooled"]
    side: Any = twin(CONVNET, config, "torch", canonical(CONVNET, config))
    with full_precision():
        a, b = (dict(s.prepare("float32").named_parameters()) for s in (side, side.shaken(1)))
    for name, x in a.items():
        x, y = x.detach(), b[name].detach()
        assert not torch.equal(x, y)
        near = torch.nextafter(x, torch.full_like(x, np.inf)) - x
        assert ((x - y).abs() <= near.abs() * 1.01).all()


# --- Checkpoints of the zoo ---


@pytest.mark.parametrize("model", [CONVNET, families()["sac"]], ids=lambda m: m.name)
def test_twins_are_the_same_at_every_level(model: Any, tmp_path: Path) -> None:
    config = next(iter(model.tiny.values()))
    a = checkpoint(tmp_path / "a.safetensors", model, config)
    convert.convert(a, tmp_path / "b.msgpack")
    report = convert.verify(a, tmp_path / "b.msgpack", level="training")
    assert report.verdict == "same", bad(report)
    assert report.first_divergence is None
    weights = canonical(model, config)
    floats = {f"in.{k}" for k, v in model.inputs(config).items() if v.dtype.kind == "f"}
    assert {r.name for r in report.gradients} == weights.keys() | floats
    assert [t.optimizer for t in report.training] == ["SGD", "momentum", "Adam", "AdamW"]
    for training in report.training:
        assert {r.name for r in training.rows} == {"loss"} | weights.keys()
        assert all(len(curve) == 6 for curve in training.losses.values())
        curve = training.losses["a float64"]
        assert curve[-1] < curve[0], "it learns"
    assert len({json.dumps(t.losses) for t in report.training}) == 4
    assert report.model is not None
    assert report.model.startswith(model.name)
    assert report.certificate is not None
    assert report.certificate["model"] == model.name
    assert {"torch", "jax", "flax", "zooconvert"} <= report.versions.keys()
    assert report.seconds > 0
    assert any(row.layer for row in report.outputs)
    assert all(row.statistics is not None for row in report.outputs)


def test_what_has_no_gradient_is_told_and_not_judged(tmp_path: Path) -> None:
    a = checkpoint(tmp_path / "a.safetensors", BERT, BERT.tiny["encoder"])
    report = convert.verify(a, a, level="training", optimizers=["Adam"], steps=2)
    key = "encoder.layer.0.attention.self.key.bias"
    for rows in (report.gradients, report.training[0].rows):
        (row,) = (r for r in rows if r.name == key)
        assert not row.judged
        assert "no true gradient" in row.note
        assert sum(not r.judged for r in rows) <= 2


def test_frameworks_in_any_order_and_twice_the_same(pair: tuple[Path, Path]) -> None:
    a, b = pair
    for sides in ((b, a), (b, b), (a, a)):
        assert convert.verify(*sides, level="outputs").verdict == "same"


def test_own_inputs(pair: tuple[Path, Path]) -> None:
    x = np.random.default_rng(0).standard_normal((5, 2, 12, 12))
    report = convert.verify(*pair, {"x": x}, "outputs")
    assert report.verdict == "same"
    assert report.outputs[-1].shape[0] == 5
    assert convert.verify(*pair, torch.from_numpy(x), "outputs").outputs[-1].shape[0] == 5
    with pytest.raises(UsageError, match="no input y"):
        convert.verify(*pair, {"y": x}, "outputs")
    with pytest.raises(UsageError, match="do not fit") as e:
        convert.verify(*pair, x[0], "outputs")
    assert "4 axes are wanted" in e.value.details[0]


@pytest.mark.parametrize("level", ["bits", "outputs"])
def test_other_weights_are_found_and_named(
    pair: tuple[Path, Path], tmp_path: Path, level: Any
) -> None:
    c = checkpoint(
        tmp_path / "c.safetensors",
        CONVNET,
        CONVNET.tiny["pooled"],
        **{"conv2.weight": lambda x: x.swapaxes(2, 3)},
    )
    report = convert.verify(c, pair[1], level=level)
    assert report.verdict == "different"
    assert [d.name for d in report.differences] == ["conv2.weight"]
    assert report.differences[0].diagnosis
    assert report.first_divergence is not None
    assert report.first_divergence.layer == "conv2"
    data = json.loads(report.to_json())
    assert data["first_divergence"]["layer"] == "conv2"


def test_settings_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = families()["linear"]
    a = checkpoint(tmp_path / "a.safetensors", model, model.tiny["wide"])
    convert.convert(a, tmp_path / "b.msgpack")
    pair = a, tmp_path / "b.msgpack"

    def settings() -> Any:
        return (
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.allow_tf32,
            torch.backends.mha.get_fastpath_enabled(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            jax.config.jax_enable_x64,
            jax.config.jax_default_matmul_precision,
            torch.random.get_rng_state().tolist(),
        )

    torch.set_float32_matmul_precision("medium")
    seen: list[Any] = []
    run = numerics.gap

    def watched(a: Any, b: Any) -> float:
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return run(a, b)

    monkeypatch.setattr(numerics, "gap", watched)
    try:
        with torch.no_grad():
            before = settings()
            report = convert.verify(*pair, level="gradients")
            assert settings() == before
            assert report.gradients, "also where gradients were off"
            monkeypatch.setattr(numerics, "gap", lambda a, b: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                convert.verify(*pair, level="gradients")
            assert settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {("highest", False)}


def test_conversion_at_every_level(tmp_path: Path) -> None:
    model = families()["linear"]
    a = checkpoint(tmp_path / "a.safetensors", model, model.tiny["wide"])
    command = ["torch2flax", str(a), str(tmp_path / "b.msgpack"), "--level", "training"]
    ran = CliRunner().invoke(cli, command)
    assert ran.exit_code == 0, ran.output
    assert "3 gradients, within" in ran.stdout
    assert "5 steps of AdamW, within" in ran.stdout
    verified = json.loads((tmp_path / "b.msgpack.certificate.json").read_text())["verified"]
    assert verified["level"] == "training"
    assert verified["training"] == dict.fromkeys(["SGD", "momentum", "Adam", "AdamW"], 5)
    with pytest.raises(UsageError, match="level 'gradients' compares with the source"):
        convert.convert(a, tmp_path / "c.msgpack", level="gradients", verify=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"level": "vibes"}, "no level 'vibes'"),
        ({"inputs": "outputs"}, "write level='outputs'"),
        ({"optimizers": ["Adagrad"]}, "no optimizer 'Adagrad'"),
        ({"steps": 0}, "0 steps train nothing"),
        ({"layers": {"a": "b"}}, "are for modules"),
    ],
)
def test_what_cannot_be_asked_for(
    pair: tuple[Path, Path], arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        convert.verify(*pair, **arguments)


# --- Users' own modules ---


@pytest.mark.parametrize("make", [nnx_net, linen_net], ids=["nnx", "linen"])
def test_users_modules_are_the_same(make: Callable[[], Any]) -> None:
    report = convert.verify(torch_net(), make(), images(), "gradients")
    assert report.verdict == "same", bad(report)
    assert report.compared == 10
    assert [r.name for r in report.outputs] == ["conv", "bn", "norm", "fc", "output"] or [
        r.name for r in report.outputs
    ] == ["conv", "bn", "norm", "drop", "fc", "output"]
    named = {n for n, _ in torch_net().named_parameters()}
    assert {r.name for r in report.gradients} == named | {"in.x"}
    assert any("channels last" in n for n in report.notices)
    assert report.outputs[0].layer == "Conv2d"


@pytest.mark.parametrize("make", [nnx_net, linen_net], ids=["nnx", "linen"])
def test_a_wrong_epsilon_is_named(make: Callable[..., Any]) -> None:
    report = convert.verify(torch_net(), make(eps=1e-3), images())
    assert report.level == "outputs"
    assert report.verdict == "different"
    assert report.first_divergence is not None
    assert report.first_divergence.layer == "norm"
    assert report.first_divergence.cause == "epsilon"


def test_a_stack_of_transformer_layers_and_its_linen_twin() -> None:
    for epsilon, verdict in ((1e-5, "same"), (1e-6, "different")):
        pair = encoder_pair(epsilon)
        report = convert.verify(pair.torch, pair.flax, pair.call.args)
        assert report.verdict == verdict, bad(report)
    assert report.first_divergence is not None
    assert report.first_divergence.layer == "layers.1.norm2"
    assert report.first_divergence.cause == "epsilon"


def test_training_sees_what_no_output_does() -> None:
    """Flax's own BatchNorm: the running variance is the biased one."""
    right = convert.verify(
        torch_net(), nnx_net(), images(), "training", optimizers=["SGD"], steps=2
    )
    assert right.verdict == "same", bad(right)
    flax = nnx_net(torch_norm=False)
    report = convert.verify(torch_net(), flax, images(), "training", optimizers=["SGD"], steps=2)
    assert report.verdict == "different"
    assert set(bad(report)) == {"bn.running_var"}, "no output and no gradient"
    assert report.gradients
    assert report.first_divergence is not None
    assert report.first_divergence.layer == "bn"
    assert report.first_divergence.direction == "training"
    (conv,) = (r for r in report.training[0].rows if r.name == "conv.bias")
    assert not conv.judged, "a bias before BatchNorm"


class Detached(nnx.Module):
    """The right outputs, and no gradient through the norm."""

    def __init__(self) -> None:
        self.net = nnx_net()

    def __call__(self, x: Any) -> Any:
        net = self.net
        x = jax.nn.relu(net.bn(net.conv(x))).mean((1, 2))
        return net.fc(jax.lax.stop_gradient(net.norm(x)))


def test_gradients_see_what_no_output_does() -> None:
    given = torch_net(), Detached(), images()
    assert convert.verify(*given).verdict == "same"
    report = convert.verify(*given, "gradients")
    assert report.verdict == "different"
    assert {"norm.weight", "conv.weight", "in.x"} <= set(bad(report))
    assert "fc.weight" not in bad(report)
    assert report.first_divergence is not None
    assert report.first_divergence.direction == "backward"


def test_modules_are_left_as_they_were() -> None:
    ours, theirs = torch_net(), nnx_net()
    ours.train()
    ours.conv.register_forward_hook(lambda *a: None)
    before = {n: t.clone() for n, t in ours.state_dict().items()}
    state = [np.asarray(x) for x in jax.tree.leaves(nnx.state(theirs, nnx.Not(nnx.RngKey)))]
    convert.verify(ours, theirs, images(), "training", optimizers=["SGD"], steps=1)
    assert ours.training
    assert ours.drop.training
    assert len(ours.conv._forward_hooks) == 1
    assert all(p.grad is None and p.dtype == torch.float32 for p in ours.parameters())
    assert all(torch.equal(before[n], t) for n, t in ours.state_dict().items())
    after = jax.tree.leaves(nnx.state(theirs, nnx.Not(nnx.RngKey)))
    assert all((x == np.asarray(y)).all() for x, y in zip(state, after, strict=True))
    assert not theirs.drop.deterministic
    assert not theirs.bn.use_running_average
    assert type(theirs).__call__.__qualname__ == "NnxNet.__call__"


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table(ids) * scale
        return {"sum": x.sum(1), "all": x}


class EmbedsFlax(nnx.Module):
    def __init__(self, ours: Embeds, narrow: bool = False) -> None:
        self.table = nnx.Embed(7, 4, rngs=nnx.Rngs(0))
        self.table.embedding[...] = jnp.asarray(ours.table.weight.detach().numpy())
        self.narrow = narrow

    def __call__(self, ids: Any, scale: Any) -> Any:
        x = self.table(ids) * scale
        x = x.astype(jnp.float32).astype(x.dtype) if self.narrow else x
        return x.sum(1), x


def test_float64_is_float64_and_names_of_outputs_may_differ() -> None:
    """nnx.Embed fixes its dtype when it is made."""
    ours = Embeds()
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    given = {"scale": np.float32([[[2.0]], [[3.0]]]), "ids": ids}
    report = convert.verify(ours, EmbedsFlax(ours), given, "gradients")
    assert report.verdict == "same", bad(report)
    assert not any("float32 only" in r.note for r in report.rows)
    assert any("paired in order" in n for n in report.notices)
    assert {r.name for r in report.gradients} == {"table.weight", "in.scale"}


def test_a_module_that_is_narrow_inside_is_judged_in_float32_only() -> None:
    ours = Embeds()
    given = (np.array([[1, 2, 3]]), np.float32([[[1 / 3]]]))
    report = convert.verify(ours, EmbedsFlax(ours, narrow=True), given)
    assert report.verdict == "same"
    (spot,) = (s for s in report.blind_spots if s.kind == "float32 only")
    assert spot.names == ("Flax",)
    assert "convert_element_type in float32" in spot.sentence
    assert all(r.note == "in float32 only" for r in report.outputs)

    class Narrow(Embeds):
        def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> Any:
            found = super().forward(ids, scale)
            return {k: v.float().to(v.dtype) for k, v in found.items()}

    narrow = Narrow()
    report = convert.verify(narrow, EmbedsFlax(narrow), given)
    assert report.verdict == "same"
    told = [s.sentence for s in report.blind_spots if s.kind == "float32 only"]
    assert any(n.startswith("the torch module computes") for n in told)


def test_bits_of_users_modules() -> None:
    flax = nnx_net()
    flax.fc.kernel[...] = flax.fc.kernel[...].at[1, 2].add(1)
    report = convert.verify(torch_net(), flax, images(), "bits")
    assert [(d.name, d.count, d.first) for d in report.differences] == [("fc.weight", 1, (2, 1))]
    assert not report.outputs
    assert report.first_divergence is not None
    assert report.first_divergence.layer == "fc"


def test_the_other_order_and_a_linen_module_with_variables_apart() -> None:
    module, variables = linen_net()
    report = convert.verify(module, torch_net(), images(), variables=variables)
    assert report.verdict == "same"
    assert (report.a, report.b) == ("TorchNet", "LinenNet")
    assert convert.verify(torch_net(), module.bind(variables), images()).verdict == "same"


def test_a_compute_dtype_is_a_difference() -> None:
    report = convert.verify(torch_net(), linen_net(dtype=jnp.bfloat16), images())
    assert report.verdict == "different"
    assert report.first_divergence is not None
    assert report.first_divergence.layer == "conv"


class Two(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x, x


class One(nnx.Module):
    def __init__(self, size: int = 0) -> None:
        self.size = size

    def __call__(self, x: Any) -> Any:
        return x[:, : self.size] if self.size else x


class Raises(nnx.Module):
    def __call__(self, x: Any) -> Any:
        raise RuntimeError("no\nluck")


class RaisesTorch(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        raise RuntimeError("no luck")


X = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("a", "b", "inputs", "said"),
    [
        (torch_net, nnx_net, None, "need inputs"),
        (torch_net, torch_net, X, "both are torch modules"),
        (nnx_net, nnx_net, X, "both are Flax modules"),
        (torch_net, lambda: 5, X, "a int is neither a module"),
        (torch_net, lambda: One, X, "the class One is neither"),
        (torch_net, lambda: "model.safetensors", X, "a str is neither"),
        (torch_net, lambda: linen_net()[0], X, "without variables"),
        (torch_net, lambda: (linen_net()[0], {"conv": {}}), X, "no collection 'params'"),
        (torch_net, lambda: (linen_net()[0], 3), X, "are a int"),
        (Two, One, (X, X), "do not fit the torch module"),
        (Two, One, {"x": object()}, "input x is a object"),
        (Two, One, X, "gives 2 outputs, the Flax one 1"),
        (nn.Identity, lambda: One(2), X, r"shape \(2, 3\) in torch and \(2, 2\)"),
        (nn.Identity, One, X[:0], "no output that could be compared"),
        (RaisesTorch, Raises, X, "the torch module fails: RuntimeError: no luck"),
        (nn.Identity, Raises, X, "the Flax module fails: RuntimeError: no luck"),
        (RaisesTorch, One, X, "the torch module fails: RuntimeError: no luck"),
    ],
)
def test_what_cannot_be_compared(
    a: Callable[[], Any], b: Callable[[], Any], inputs: Any, said: str
) -> None:
    with pytest.raises(UsageError, match=said) as e:
        convert.verify(a(), b(), inputs)
    assert e.value.advice
    assert "\n" not in e.value.problem


def test_pairs_and_layouts_that_do_not_fit() -> None:
    given = torch_net(), nnx_net(), images()
    with pytest.raises(ZooError, match="nothing"):
        convert.verify(*given, layers={"nothing": "conv"})
    with pytest.raises(CorruptInput, match="is not a layout"):
        convert.verify(*given, layout=[{"torch": 3}])
    plain = {"kind": "linear", "torch": {"fc.weight": [5, 4]}, "flax": {"fc.kernel": [5, 4]}}
    with pytest.raises(UsageError, match=r"fc\.weight: "):
        convert.verify(*given, layout=[plain])
    turned = plain | {"flax": {"fc.kernel": [4, 5]}, "ops": [{"op": "permute", "axes": [1, 0]}]}
    report = convert.verify(*given, layout=[turned])
    assert (report.verdict, report.compared) == ("same", 1)
    with pytest.raises(UsageError, match="for checkpoints"):
        convert.verify(*given, model="bert")
    with pytest.raises(UsageError, match="no parameter to train"):
        convert.verify(nn.Identity(), One(), X, "training")
    with pytest.raises(UsageError, match="by a gradient"):
        convert.verify(nn.Identity(), One(), np.arange(3), "gradients")


class TwoOutputs(nn.Module):
    """Outputs by name, of two shapes, and one that is not an array."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return {"z": self.fc(x), "a": x.sum(1, keepdim=True), "task": "test"}


class TwoOutputsNnx(nnx.Module):
    def __init__(self, of: nn.Linear, factor: float) -> None:
        self.fc: Any = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        self.fc.kernel[...] = jnp.asarray(of.weight.detach().numpy().T)
        self.fc.bias[...] = jnp.asarray(of.bias.detach().numpy())
        self.factor = factor

    def __call__(self, x: Any) -> Any:
        return {"a": factor_sum(x, self.factor), "z": self.fc(x), "task": "test"}


def factor_sum(x: Any, factor: float) -> Any:
    return factor * x.sum(1)


def test_outputs_by_name_in_another_order() -> None:
    ours = TwoOutputs()
    report = convert.verify(ours, TwoOutputsNnx(ours.fc, 1.0), X, "gradients")
    assert report.verdict == "same", bad(report)
    assert {"output.z", "output.a"} <= {r.name for r in report.outputs}
    report = convert.verify(ours, TwoOutputsNnx(ours.fc, 2.0), X)
    assert [n for n in bad(report) if n.startswith("output")] == ["output.a"]


class Reader(nn.Module):
    """Torch's LSTM has two biases; what reads it is named like a layer of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> Any:
        y, (h, _) = self.lstm(x)
        return y, h[0]


class RNN(Reader):
    pass


class ReaderNnx(nnx.Module):
    """One bias, which is the sum in float32; the cell has generators of its own."""

    def __init__(self, lstm: Any, bias: Any) -> None:
        self.cell: Any = nnx.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0))
        self.rnn = nnx.RNN(self.cell, return_carry=True)
        self.cell.dense_i.kernel[...] = jnp.asarray(lstm.weight_ih_l0.detach().numpy().T)
        self.cell.dense_h.kernel[...] = jnp.asarray(lstm.weight_hh_l0.detach().numpy().T)
        self.cell.dense_h.bias[...] = jnp.asarray(bias.detach().numpy())

    def __call__(self, x: Any) -> Any:
        (_, h), y = self.rnn(x)
        return y, h


def test_two_biases_added_up_in_float32_are_the_same() -> None:
    torch.manual_seed(0)
    x = np.random.default_rng(0).standard_normal((2, 5, 3))
    ours: Any = RNN()
    ih, hh = (nn.init.normal_(b) for b in (ours.lstm.bias_ih_l0, ours.lstm.bias_hh_l0))
    report = convert.verify(ours, ReaderNnx(ours.lstm, ih + hh), x, "gradients")
    assert report.verdict == "same", bad(report)
    assert any("combined in float32" in notice for notice in report.notices)
    assert max(row.error64 for row in report.outputs) > 1e-10, "else nothing was allowed for"
    report = convert.verify(ours, ReaderNnx(ours.lstm, ih + hh + 1e-5), x)
    assert report.verdict == "different"
    assert report.first_divergence is not None
    report = convert.verify(ours, ReaderNnx(ours.lstm, hh), x)
    assert report.first_divergence is not None
    assert "raises" not in report.first_divergence.diagnosis


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> Any:
        return self.drop(x)


class DroppingNnx(nnx.Module):
    def __init__(self) -> None:
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.drop(x, deterministic=False)


class DroppingLinen(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        return linen.Dropout(0.5, name="drop")(x, deterministic=False)


@pytest.mark.parametrize("make", [DroppingNnx, lambda: (DroppingLinen(), {})], ids=["nnx", "linen"])
def test_dropout_left_on_is_named(make: Callable[[], Any]) -> None:
    report = convert.verify(Dropping(), make(), np.ones((8, 8), np.float32))
    assert report.first_divergence is not None
    assert (report.first_divergence.layer, report.first_divergence.cause) == ("drop", "dropout")


def test_what_torch_itself_makes_nan_is_said() -> None:
    report = convert.verify(nn.Identity(), One(), np.full((2, 3), np.nan, np.float32))
    assert report.verdict == "different"
    assert report.first_divergence is not None
    assert "torch's own output" in report.first_divergence.diagnosis


# --- The command line ---

NETS = """
import sys
sys.path.insert(0, {tests!r})
from nets import torch_net, nnx_net, linen_net, TorchNet
print("user code prints")

def wrong():
    return nnx_net(eps=1e-3)

def needs(path):
    return path

def broken():
    raise KeyError("weights")

module = torch_net()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "user_nets.py").write_text(NETS.format(tests=str(Path(__file__).parent)))
    (tmp_path / "user_broken.py").write_text("import nowhere_at_all")
    np.savez(tmp_path / "x.npz", x=images())
    np.save(tmp_path / "x.npy", images())
    (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:100])
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in [n for n in sys.modules if "user_nets" in n or "user_broken" in n]:
        del sys.modules[name]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["verify", *arguments])


def test_users_modules_on_the_command_line(folder: Path) -> None:
    ran = run("user_nets:torch_net", "user_nets:linen_net", "--inputs", "x.npz")
    assert ran.exit_code == 0, ran.output
    assert ran.stdout.startswith("same: user_nets:torch_net and user_nets:linen_net")
    assert ran.stderr.count("note: importing user_nets runs its code") == 1
    assert "user code prints" not in ran.stdout
    ran = run("user_nets.py:nnx_net", "user_nets.py:module", "--inputs", "x.npy", "--json")
    assert ran.exit_code == 0, ran.output
    data = json.loads(ran.stdout)
    assert (data["a"], data["b"]) == ("user_nets.py:module", "user_nets.py:nnx_net")
    assert data["verdict"] == "same"


def test_a_failure_is_one_screen_and_exit_code_3(folder: Path) -> None:
    ran = run(
        *("user_nets:module", "user_nets:wrong", "--inputs", "x.npz", "--report", "found.json")
    )
    assert ran.exit_code == 3
    assert len(ran.stdout.splitlines()) <= 24
    for part in ("different:", "norm", "epsilon", "times the rounding noise", "try:"):
        assert part in ran.stdout
    data = json.loads((folder / "found.json").read_text())
    assert data["verdict"] == "different"
    assert data["first_divergence"]["layer"] == "norm"
    assert [row["name"] for row in data["outputs"]][-1] == "output"
    assert data["command"].startswith("zooconvert")
    assert [p.name for p in folder.iterdir() if "found" in p.name] == ["found.json"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["user_nets:torch_net", "user_nets:nnx_net"], "need inputs"),
        (["user_nets:torch_net", "model.safetensors", "--inputs", "x.npz"], "is a module and"),
        (["user_nets:nothing", "user_nets:nnx_net", "--inputs", "x.npz"], "has no nothing"),
        (
            ["user_nets:torch_nut", "user_nets:nnx_net", "--inputs", "x.npz"],
            "did you mean torch_net",
        ),
        (["user_nots:a", "user_nets:nnx_net", "--inputs", "x.npz"], "no module user_nots"),
        (["user_broken:a", "user_nets:nnx_net", "--inputs", "x.npz"], "imports nowhere_at_all"),
        (["nots.py:a", "user_nets:nnx_net", "--inputs", "x.npz"], "no file nots.py"),
        (["user_nets:needs", "user_nets:nnx_net", "--inputs", "x.npz"], "needs path"),
        (["user_nets:broken", "user_nets:nnx_net", "--inputs", "x.npz"], "KeyError: 'weights'"),
        (["user_nets:NETS", "user_nets:nnx_net", "--inputs", "no.npz"], "no file no.npz"),
        (["user_nets:sys", "user_nets:nnx_net", "--inputs", "x.npz"], "a module is neither"),
        (["user_nets:module", "user_nets:nnx_net", "--inputs", "user_nets.py"], "no plain arrays"),
        (
            ["user_nets:module", "user_nets:nnx_net", "--inputs", "x.npz", "--pair", "a"],
            "is not a pair",
        ),
        (["user_nets:module", "user_nets", "--inputs", "x.npz"], "a module is user_nets:NAME"),
        (["user_nets:module", "user_nets:nnx_net", "--inputs", "cut.npz"], "no plain arrays"),
        (["a.pt", "b.pt", "--pair", "a=b"], "are for modules"),
        (["a.pt", "b.pt", "--report", "x.txt"], "no suffix"),
        (["a.pt", "b.pt", "--report", "no/x.html"], "no does not exist"),
    ],
)
def test_command_line_errors(folder: Path, arguments: list[str], said: str) -> None:
    ran = run(*arguments)
    assert isinstance(ran.exception, UsageError), ran.output
    assert said in str(ran.exception)


def test_debug_shows_the_user_s_own_traceback(folder: Path) -> None:
    tool = str(Path(sys.executable).with_name("zooconvert"))
    (folder / "user_broken.py").write_text("def net():\n    raise KeyError('weights')\n")
    command = [tool, "verify", "user_broken:net", "user_broken:net", "--inputs", "x.npz"]
    plain = subprocess.run(command, capture_output=True, text=True)
    assert plain.returncode == 2
    assert "Traceback" not in plain.stderr
    assert len(plain.stderr.splitlines()) == 3, "a note, what is wrong, what to do"
    shown = subprocess.run([*command, "--debug"], capture_output=True, text=True)
    assert "user_broken.py" in shown.stderr
    assert "Traceback" in shown.stderr


def test_reports_are_refused_before_work_begins(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "dir.html").mkdir()
    for name, said in (("dir.html", "is a directory"), ("x", "no suffix")):
        ran = run(*map(str, pair), "--report", str(tmp_path / name))
        assert isinstance(ran.exception, UsageError)
        assert said in str(ran.exception)


def test_the_summary_names_the_layer_first(capsys: pytest.CaptureFixture[str]) -> None:
    found = Divergence("up", "gelu", "gelu", "mend it", between=("up", "down"), flax_layer="rise")
    wrong = TensorDifference("up.weight", "1 of 4 elements", 1, 0.5, 0.1, (0, 0))
    report = Report("a", "b", "bits", differences=[wrong], first_divergence=found)
    show(report)
    printed = capsys.readouterr().out
    assert "first to differ: up (rise in Flax), between up and down" in printed
    assert "1 difference\n" in printed


def test_a_page_is_written(pair: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    page.write_text("old")
    ran = run(*map(str, pair), "--level", "outputs", "--report", str(page))
    assert ran.exit_code == 0, ran.output
    text = page.read_text()
    assert "<html" in text
    assert "conv1" in text
    assert f"report: {page}" in ran.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html"]


def test_constants_are_those_of_the_rule() -> None:
    assert (MARGIN, FLOOR, numerics.EXACT) == (8.0, 2.0**-23, 1e-10)
    assert TorchNet().fc.in_features == 4
    assert images().shape == SHAPE
    assert issubclass(linen.Dense, linen.Module)


class Transposing(nnx.Module):
    """A linear layer whose output has two equal axes swapped."""

    def __init__(self, weight: np.ndarray, axes: tuple[int, ...]) -> None:
        self.fc = nnx.Linear(*weight.T.shape, use_bias=False, rngs=nnx.Rngs(0))
        self.fc.kernel[...] = jnp.asarray(weight.T)
        self.axes = axes

    def __call__(self, x: Any) -> Any:
        return self.fc(x).transpose(self.axes)


@pytest.mark.parametrize(
    ("shape", "axes", "cause"),
    [
        ((2, 6, 6), (0, 2, 1), "transposed"),
        ((2, 2, 6, 6), (1, 0, 2, 3), "transposed"),
        ((3, 4, 4, 4), (0, 3, 1, 2), "unknown"),
    ],
)
def test_equal_axes_that_are_swapped_are_different(shape: Any, axes: Any, cause: str) -> None:
    """The shapes are equal, so nothing is fitted, and the fault cannot hide."""
    weight = probe.weight("fc.weight", (shape[-1], shape[-1]))

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(shape[-1], shape[-1], bias=False)
            self.fc.weight.data = torch.from_numpy(weight)

        def forward(self, x: Any) -> Any:
            return self.fc(x)

    x = probe.normal("x", shape).astype(np.float32)
    right = Transposing(weight, tuple(range(len(shape))))
    assert convert.verify(Net(), right, x, "outputs").verdict == "same"
    report = convert.verify(Net(), Transposing(weight, axes), x, "training")
    assert report.verdict == "different"
    assert report.first_divergence is not None
    assert report.first_divergence.cause == cause


def test_images_whose_axes_are_all_equal_may_lie_as_the_inputs_do() -> None:
    """Channels last in and out, four of each: what the inputs say of the axes holds for outputs."""
    ours = torch.nn.Conv2d(4, 4, 3, padding=1, bias=False)
    weight = probe.weight("weight", (4, 4, 3, 3))
    ours.weight.data = torch.from_numpy(weight)
    theirs = nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
    theirs.kernel[...] = jnp.asarray(weight.transpose(2, 3, 1, 0))
    x = probe.normal("x", (2, 4, 4, 4)).astype(np.float32)
    report = convert.verify(ours, theirs, x, "gradients", flax_inputs=x.transpose(0, 2, 3, 1))
    assert report.verdict == "same"


def test_modules_of_64_bits_are_compared_by_their_own_bits() -> None:
    """JAX would cut NumPy's 64 bits to 32, and then other numbers would be the same."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.Dense(3, use_bias=False, param_dtype=np.float64, name="fc")(x)

    class Torch(torch.nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(4, 3, bias=False)
            self.fc.weight = torch.nn.Parameter(torch.from_numpy(weight).to(dtype))

        def forward(self, x: Any) -> Any:
            return self.fc(x)

    weight = probe.normal("fc.weight", (3, 4))
    x = probe.normal("x", (2, 4)).astype(np.float32)

    def verdict(dtype: torch.dtype, values: np.ndarray) -> str:
        theirs = (Net(), {"params": {"fc": {"kernel": values.T}}})
        return convert.verify(Torch(dtype), theirs, x, "bits").verdict

    assert verdict(torch.float64, weight) == "same"
    assert verdict(torch.float32, weight) == "different"
    assert verdict(torch.float64, weight + 1e-9) == "different"


def test_what_was_sown_is_no_tensor_of_the_model() -> None:
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            y = linen.Dense(3, use_bias=False, name="fc")(x)
            self.sow("losses", "balance", y.sum())
            return y

    ours = torch.nn.Linear(4, 3, bias=False)
    kernel = ours.weight.detach().numpy().T
    variables = {"params": {"fc": {"kernel": kernel}}, "losses": {"balance": (jnp.ones(()),)}}
    net = torch.nn.Sequential()
    net.add_module("fc", ours)
    x = probe.normal("x", (2, 4)).astype(np.float32)
    assert convert.verify(net, (Net(), variables), x, "training").verdict == "same"


def test_batchnorm_trains_even_where_the_call_says_otherwise() -> None:
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.bn = nnx.BatchNorm(
                3, momentum=0.9, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0)
            )

        def __call__(self, x: Any) -> Any:
            return self.bn(x, use_running_average=True)

    net = torch.nn.Sequential()
    net.add_module("bn", torch.nn.BatchNorm1d(3))
    x = probe.normal("x", (64, 3)).astype(np.float32)
    report = convert.verify(net, Net(), x, "training")
    (loss,) = (r for r in report.training[0].rows if r.name == "loss")
    assert abs(report.training[0].losses["b float64"][0]) > 0
    assert loss.same, "the first step's loss is that of the batch's statistics on both sides"


def test_outputs_that_fit_two_ways_are_said_to() -> None:
    class Torch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(4, 4, bias=False)

        def forward(self, x: Any) -> Any:
            return self.fc(x)

    ours = Torch()
    weight = ours.fc.weight.detach().numpy()
    notice = "inputs of other sizes would tell"
    for batch, verdict, told in ((2, "different", True), (3, "same", False)):
        x = probe.normal("x", (2, batch, 4)).astype(np.float32)
        report = convert.verify(ours, Transposing(weight, (1, 0, 2)), x, "outputs")
        assert report.verdict == verdict
        found = [s.sentence for s in report.blind_spots if s.kind == "ambiguous axes"]
        assert any(notice in n for n in found) == told
