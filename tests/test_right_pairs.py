"""Pairs that are right are the same; where they truly train otherwise, it is said in what."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from torch import nn

import convert
from convert.compare.gradients import judge_gradients
from convert.compare.report import Report
from convert.compare.sides import Run
from zoo import probe

X = probe.normal("x", (6, 4)).astype(np.float32)
ONE_STEP: dict[str, Any] = {"optimizers": ["SGD"], "steps": 1}


class Torch(nn.Module):
    """Layers by name, and what it does with them."""

    def __init__(self, forward: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        for name, p in self.named_parameters():
            p.data.copy_(torch.from_numpy(probe.weight(name, tuple(p.shape))))
        self.does = forward

    def forward(self, *args: Any) -> Any:
        return self.does(self, *args)


def arrays(net: nn.Module) -> dict[str, Any]:
    """The state as JAX arrays, by torch's names."""
    return {n: jnp.asarray(t.detach().numpy()) for n, t in net.state_dict().items()}


def dense(net: nn.Module, name: str) -> dict[str, Any]:
    """A Linear as Flax has it."""
    own = arrays(net)
    return {"kernel": own[f"{name}.weight"].T, "bias": own[f"{name}.bias"]}


def cause(report: Report) -> str | None:
    """The cause of the first divergence."""
    return report.first_divergence.cause if report.first_divergence else None


class Two(linen.Module):
    """fc, something between, and head."""

    between: Callable[[Any], Any]

    @linen.compact
    def __call__(self, x: Any) -> Any:
        x = self.between(linen.Dense(3, name="fc")(x))
        return linen.Dense(2, name="head")(x)


def two(between: Callable[[Any], Any], theirs: Callable[[Any], Any]) -> tuple[Any, Any]:
    """fc and head, with something between on either side."""
    net = Torch(
        lambda m, x: m.head(between(m.fc(x))), fc=nn.Linear(4, 3), head=nn.Linear(3, 2)
    )  # fmt: skip
    params = {"fc": dense(net, "fc"), "head": dense(net, "head")}
    return net, (Two(theirs), {"params": params})


def test_weights_that_no_gradient_reaches_decay_on_both_sides() -> None:
    """torch's optimizer would leave out what has no gradient at all; optax has only zeros."""
    pair = two(lambda x: x.detach(), jax.lax.stop_gradient)
    report = convert.verify(*pair, X, "training", optimizers=["AdamW"], steps=2)
    assert report.verdict == "same"


def test_constants_that_flax_computes_may_be_rounded_in_torch() -> None:
    mean = np.array([0.485, 0.456, 0.406, 0.1])

    def pair(shift: float) -> tuple[Any, Any]:
        net = Torch(lambda m, x: m.fc((x - m.mean) / 0.3), fc=nn.Linear(4, 3))
        net.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))

        class Flax(linen.Module):
            @linen.compact
            def __call__(self, x: Any) -> Any:
                return linen.Dense(3, name="fc")((x - jnp.asarray(mean + shift, x.dtype)) / 0.3)

        return net, (Flax(), {"params": {"fc": dense(net, "fc")}})

    assert convert.verify(*pair(0.0), X, "gradients").verdict == "same"
    assert convert.verify(*pair(1e-6), X, "gradients").verdict == "different"


def test_a_gradients_noise_is_of_several_runs() -> None:
    """One run's may be small by luck in a tensor of any size: few roundings make all of it."""
    exact = probe.normal("g", (20, 20))

    def runs(error: float) -> dict[str, Run]:
        pair = (("float32", exact * (1 + error)), ("float64", exact))
        return {p: Run({}, gradients={"fc.weight": g}) for p, g in pair}

    def rows(spread: float) -> list[Any]:
        shaken = {"fc.weight": exact * (1 + spread)}
        return judge_gradients(runs(1e-7), runs(1e-7), runs(3e-6), lambda p, i: shaken)

    assert rows(1e-6)[0].same
    assert not rows(1e-7)[0].same


@pytest.mark.parametrize("apart", [0.0, 0.1])
def test_an_outputs_own_rounding_is_noise_of_what_follows(apart: float) -> None:
    """A large output is up to four units in its last place off in Flax, and by luck less in torch:
    the loss makes that part of every gradient, and of each step."""
    net = Torch(lambda m, x: m.fc(x).sum() + 4e4, fc=nn.Linear(4, 8))

    class Flax(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            made = linen.Dense(8, name="fc")(x).sum() + 4e4 + apart
            return made if made.dtype == jnp.float64 else jax.lax.reduce_precision(made, 8, 20)

    flax = Flax(), {"params": {"fc": dense(net, "fc")}}
    report = convert.verify(net, flax, X, "training", **ONE_STEP | {"steps": 3})
    assert report.verdict == ("different" if apart else "same")


@pytest.mark.parametrize("smaller", [0.0, 1e-3])
def test_a_derivative_at_a_bound_is_named(smaller: float) -> None:
    """torch's clamp has a derivative of one at its bound, JAX's maximum one half."""
    net = Torch(lambda m, x: m.fc(x.clamp(min=1.0)), fc=nn.Linear(4, 3))

    class Flax(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.Dense(3, name="fc")(jnp.maximum(x, 1.0))

    x = np.array(X) * 3
    x[:, 1] = 1.0 - smaller
    report = convert.verify(net, (Flax(), {"params": {"fc": dense(net, "fc")}}), x, "gradients")
    assert report.verdict == ("different" if smaller == 0 else "same")
    assert cause(report) == ("kink" if smaller == 0 else None)


def test_a_root_at_zero_is_named() -> None:
    def ours(m: Any, x: Any) -> Any:
        return m.fc(x / (x.std(0, unbiased=False) + 0.1))

    net = Torch(ours, fc=nn.Linear(4, 3))

    class Flax(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.Dense(3, name="fc")(x / (jnp.std(x, 0) + 0.1))

    x = np.array(X)
    x[:, 2] = 0.5
    report = convert.verify(net, (Flax(), {"params": {"fc": dense(net, "fc")}}), x, "gradients")
    found = report.first_divergence
    assert found is not None
    assert found.cause == "kink"
    assert "not a number in Flax in 6 of 24" in found.diagnosis


def test_a_gradient_is_placed_where_the_layers_are_cut_alike() -> None:
    """Flax divides inside its encoder, torch before it: their inputs' gradients differ rightly."""

    class Encoder(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.Dense(3, name="fc")(x / 255.0)

    class Flax(linen.Module):
        @linen.compact
        def __call__(self, x: Any, flag: Any) -> Any:
            x = Encoder(name="encoder")(x)
            keep = jax.lax.stop_gradient(1 - flag[:, None])
            return linen.Dense(2, name="head")(x * keep)

    def ours(m: Any, x: Any, flag: Any) -> Any:
        return m.head(m.encoder(x / 255.0) * (1 - flag[:, None]))

    encoder = nn.Sequential()
    encoder.add_module("fc", nn.Linear(4, 3))
    net = Torch(ours, encoder=encoder, head=nn.Linear(3, 2))
    params = {"encoder": {"fc": dense(net, "encoder.fc")}, "head": dense(net, "head")}
    flag = np.array([0, 1, 0, 0.5, 1, 0], np.float32)
    report = convert.verify(net, (Flax(), {"params": params}), (X * 255, flag), "gradients")
    assert [r.name for r in report.gradients if r.judged and not r.same] == ["in.1"]
    assert report.first_divergence is not None
    assert report.first_divergence.cause == "stop_gradient"
    assert "`1 - flag[:, None]`" in report.first_divergence.diagnosis


def test_biases_that_torch_trains_apart_are_named() -> None:
    net = Torch(lambda m, x: m.rnn(x)[0], rnn=nn.LSTM(4, 3, batch_first=True))
    own = arrays(net)

    class Flax(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.RNN(linen.OptimizedLSTMCell(3, name="cell"), name="rnn")(x)

    cell: dict[str, Any] = {}
    bias = own["rnn.bias_ih_l0"] + own["rnn.bias_hh_l0"]
    for k, gate in enumerate("ifgo"):
        rows = slice(3 * k, 3 * k + 3)
        cell[f"i{gate}"] = {"kernel": own["rnn.weight_ih_l0"][rows].T}
        cell[f"h{gate}"] = {"kernel": own["rnn.weight_hh_l0"][rows].T, "bias": bias[rows]}
    x = probe.normal("steps", (2, 5, 4)).astype(np.float32)
    flax = Flax(), {"params": {"cell": cell}}
    report = convert.verify(net, flax, x, "training", **ONE_STEP | {"steps": 2})
    assert report.verdict == "different"
    found = report.first_divergence
    assert found is not None
    assert (found.cause, found.layer) == ("bias_sum", "rnn")
    for name, p in net.named_parameters():
        p.requires_grad_("bias_hh" not in name)  # the proof
    assert convert.verify(net, flax, x, "training", **ONE_STEP | {"steps": 2}).verdict == "same"


def test_what_training_changes_is_told_before_what_rounds() -> None:
    """Flax's fast variance loses digits in float32; its running variance is another in any."""
    net = Torch(lambda m, x: m.fc(m.bn(x)), bn=nn.BatchNorm1d(4), fc=nn.Linear(4, 3))

    class Flax(nnx.Module):
        def __init__(self) -> None:
            self.bn = nnx.BatchNorm(4, momentum=0.9, epsilon=1e-5, rngs=nnx.Rngs(0))
            self.fc = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            return self.fc(self.bn(x))

    theirs = Flax()
    theirs.fc.kernel[...], theirs.fc.bias[...] = dense(net, "fc").values()
    theirs.bn.scale[...] = arrays(net)["bn.weight"]
    theirs.bn.bias[...] = arrays(net)["bn.bias"]
    x = probe.normal("batch", (32, 4)).astype(np.float32)
    x[:, 1] += 40
    report = convert.verify(net, theirs, x, "training", **ONE_STEP)
    assert cause(report) == "unbiased_variance"
    assert report.first_divergence is not None
    assert report.first_divergence.direction == "training"


def test_linens_fast_variance_is_named() -> None:
    """It is told by running the layer again, on centred inputs."""
    net = Torch(lambda m, x: m.norm(x), norm=nn.LayerNorm(4, eps=1e-5))

    class Flax(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.LayerNorm(epsilon=1e-5, name="norm")(x)

    own = arrays(net)
    params = {"norm": {"scale": own["norm.weight"], "bias": own["norm.bias"]}}
    report = convert.verify(net, (Flax(), {"params": params}), X + 200, "outputs")
    assert cause(report) == "fast_variance"


def test_one_value_of_three_axes_is_one_value() -> None:
    """A weight norm of one channel: its scale is (1, 1, 1) here, (1,) there, as its bias is."""
    net = Torch(lambda m, x: m.g[0, 0] * x.sum(1, keepdim=True) + m.b)
    net.g, net.b = nn.Parameter(torch.tensor([[[1.5]]])), nn.Parameter(torch.tensor([0.25]))

    def theirs(params: Any, x: Any) -> Any:
        return params["g"] * x.sum(1, keepdims=True) + params["bias"]

    flax = theirs, {"bias": jnp.array([0.25]), "g": jnp.array([1.5])}
    report = convert.verify(net, flax, X, "bits")
    assert report.compared == 2
    assert report.verdict == "same"


@pytest.mark.parametrize("level", ["bits", "training"])
def test_an_image_may_be_flattened_in_another_order(level: str) -> None:
    """The kernel's rows then lie otherwise too: no fault; where the image does not, it is one."""
    net = Torch(
        lambda m, x: m.fc(m.conv(x).flatten(1)), conv=nn.Conv2d(2, 3, 1), fc=nn.Linear(12, 5)
    )
    own = arrays(net)

    class Flax(linen.Module):
        turned: bool

        @linen.compact
        def __call__(self, x: Any) -> Any:
            x = linen.Conv(3, (1, 1), name="conv")(x)
            x = x.transpose(0, 3, 1, 2) if self.turned else x
            return linen.Dense(5, name="fc")(x.reshape(len(x), -1))

    rows = own["fc.weight"].reshape(5, 3, 2, 2).transpose(0, 2, 3, 1).reshape(5, 12).T
    conv = {"kernel": own["conv.weight"].transpose(2, 3, 1, 0), "bias": own["conv.bias"]}
    params = {"conv": conv, "fc": {"kernel": rows, "bias": own["fc.bias"]}}
    x = probe.normal("image", (3, 2, 2, 2)).astype(np.float32)
    given: dict[str, Any] = {"flax_inputs": x.transpose(0, 2, 3, 1)}
    given |= ONE_STEP if level == "training" else {}
    flax = Flax(turned=False), {"params": params}
    assert convert.verify(net, flax, x, level, **given).verdict == "same"
    wrong = Flax(turned=True), {"params": params}
    assert convert.verify(net, wrong, x, level, **given).verdict == "different"


def test_sums_of_many_numbers_may_round_more() -> None:
    """XLA adds an image of such a size number by number, torch pairwise: float64 agrees, and so it
    is the same. What else loses digits in float32 alone is not."""

    def norm(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.pad(m.conv(x), (0, 8, 0, 8)) + m.shift
        mean, mid = h.mean((1, 2, 3), keepdim=True), h.var((1, 2, 3), correction=0, keepdim=True)
        return (h - mean) / torch.sqrt(mid)

    def theirs(params: Any, x: Any, shift: float = 0, fast: bool = False) -> Any:
        h = jnp.einsum("bhwc,cd->bhwd", x, params["conv"]["kernel"]) + params["conv"]["bias"]
        h = jnp.pad(h, ((0, 0), (0, 8), (0, 8), (0, 0))) + shift
        mean, squares = (m.mean((1, 2, 3), keepdims=True) for m in (h, h**2))
        return (h - mean) / jnp.sqrt(
            squares - mean**2 if fast else ((h - mean) ** 2).mean((1, 2, 3), keepdims=True)
        )

    net = Torch(norm, conv=nn.Conv2d(3, 7, 1))
    net.shift = 0  # type: ignore[assignment]
    own = arrays(net)
    kernel = own["conv.weight"][:, :, 0, 0].T
    params = {"conv": {"kernel": kernel, "bias": own["conv.bias"] + 20}}
    net.conv.bias.data += 20
    x = probe.normal("image", (2, 3, 5, 4)).astype(np.float32)
    given = np.moveaxis(x, 1, -1)
    report = convert.verify(net, (theirs, params), x, "gradients", flax_inputs=given)
    assert report.verdict == "same"
    assert any("but for float32 sums" in row.note for row in report.rows)
    net.shift = 300  # type: ignore[assignment]
    fast = partial(theirs, shift=300, fast=True)
    assert (
        convert.verify(net, (fast, params), x, "outputs", flax_inputs=given).verdict == "different"
    )


def test_a_fused_projection_may_have_its_features_in_another_order() -> None:
    """Query, key and value of each head in turn in torch, all queries first in Flax; not where
    the values alone lie so."""

    def attention(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = m.qkv(x).view(*x.shape[:2], 2, 3, 4).unbind(3)
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return m.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))

    class Flax(linen.Module):
        parts_first: bool

        @linen.compact
        def __call__(self, x: Any) -> Any:
            qkv = linen.DenseGeneral((3, 2, 4) if self.parts_first else (2, 3, 4), name="qkv")(x)
            q, k, v = jnp.moveaxis(qkv, 2 if self.parts_first else 3, 0)
            weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
            return linen.Dense(6, name="out")(
                jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], -1)
            )

    net = Torch(attention, qkv=nn.Linear(6, 24), out=nn.Linear(8, 6))
    own = arrays(net)
    turned = {
        "kernel": own["qkv.weight"].reshape(2, 3, 4, 6).transpose(3, 1, 0, 2),
        "bias": own["qkv.bias"].reshape(2, 3, 4).swapaxes(0, 1),
    }
    x = probe.normal("tokens", (2, 5, 6)).astype(np.float32)
    for level in ("bits", "gradients"):
        params = {"qkv": turned, "out": dense(net, "out")}
        report = convert.verify(net, (Flax(parts_first=True), {"params": params}), x, level)
        assert report.verdict == "same"
        wrong = {k: v.reshape(*v.shape[:-3], 2, 3, 4) for k, v in turned.items()}
        params = {"qkv": wrong, "out": dense(net, "out")}
        report = convert.verify(net, (Flax(parts_first=False), {"params": params}), x, level)
        assert report.verdict == "different"


def test_a_norm_of_ones_own_is_told_that_it_trains() -> None:
    """Linen's statistics in a module of somebody's own, switched by an argument of its call."""

    class Norm(linen.Module):
        @linen.compact
        def __call__(self, x: Any, train: bool = False) -> Any:
            mean = self.variable("batch_stats", "mean", jnp.zeros, (4,))
            var = self.variable("batch_stats", "var", jnp.ones, (4,))
            m, v = mean.value, var.value
            if train:
                m, v = x.mean(0), x.var(0)
                mean.value += 0.1 * (m - mean.value)
                var.value += 0.1 * (v * len(x) / (len(x) - 1) - var.value)
            x = (x - m) / jnp.sqrt(v + 1e-5)
            scale = self.param("scale", linen.initializers.ones, (4,))
            return x * scale + self.param("bias", linen.initializers.zeros, (4,))

    class Flax(linen.Module):
        @linen.compact
        def __call__(self, x: Any, train: bool = False) -> Any:
            return linen.Dense(3, name="fc")(Norm(name="norm")(x, train))

    net = Torch(lambda m, x: m.fc(m.norm(x)), norm=nn.BatchNorm1d(4), fc=nn.Linear(4, 3))
    net.eval()
    own = arrays(net)
    variables = {
        "params": {
            "norm": {"scale": own["norm.weight"], "bias": own["norm.bias"]},
            "fc": dense(net, "fc"),
        },
        "batch_stats": {"norm": {"mean": own["norm.running_mean"], "var": own["norm.running_var"]}},
    }
    report = convert.verify(net, (Flax(), variables), X, "training", **ONE_STEP)
    assert report.verdict == "same"


def test_frames_may_be_joined_with_the_steps_first() -> None:
    """Torch folds (time, batch) into one axis for a layer that Flax calls on (batch, time)."""

    def frames(m: Any, x: torch.Tensor) -> torch.Tensor:
        folded = m.conv(x.transpose(0, 1).flatten(0, 1))
        return m.fc(folded.view(5, 2, 4, 3, 3).transpose(0, 1).mean((3, 4)))

    class Flax(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            x = linen.Conv(4, (3, 3), padding="SAME", name="conv")(x)
            return linen.Dense(3, name="fc")(jax.nn.relu(x.mean((2, 3))))

    net = Torch(frames, conv=nn.Conv2d(2, 4, 3, padding=1), fc=nn.Linear(4, 3))
    own = arrays(net)
    conv = {"kernel": own["conv.weight"].transpose(2, 3, 1, 0), "bias": own["conv.bias"]}
    x = probe.normal("clip", (2, 5, 2, 3, 3)).astype(np.float32)
    flax = Flax(), {"params": {"conv": conv, "fc": dense(net, "fc")}}
    report = convert.verify(net, flax, x, "outputs", flax_inputs=np.moveaxis(x, 2, -1))
    assert cause(report) == "activation", "and it is placed behind the convolution"


def test_a_maximum_that_xla_compiles_into_something_else_is_named() -> None:
    """The right code: its gradient is torch's, but not under jit, where XLA on the CPU computes
    what the maximum is compared with a second time."""
    net = Torch(
        lambda m, x: m.norm(m.fc(x)).relu().amax(1), fc=nn.Linear(8, 6), norm=nn.LayerNorm(6)
    )

    def theirs(params: Any, x: Any, picked: bool = False) -> Any:
        y = x @ params["fc"]["kernel"] + params["fc"]["bias"]
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt((y**2).mean(-1, keepdims=True) + 1e-5)
        y = jax.nn.relu(y * params["norm"]["scale"] + params["norm"]["bias"])
        if picked:
            return jnp.take_along_axis(y, y.argmax(1, keepdims=True), 1)[:, 0]
        return y.max(1)

    own = arrays(net)
    norm = {"scale": own["norm.weight"], "bias": own["norm.bias"]}
    params = {"fc": dense(net, "fc"), "norm": norm}
    x = probe.normal("neighbours", (12, 4, 8)).astype(np.float32)
    report = convert.verify(net, (theirs, params), x, "gradients")
    assert cause(report) == "compiled"
    report = convert.verify(net, (partial(theirs, picked=True), params), x, "gradients")
    assert report.verdict == "same", "as is advised"


def test_a_report_prints_as_on_the_command_line() -> None:
    net = Torch(lambda m, x: m.fc(x), fc=nn.Linear(4, 3))
    flax = (lambda params, x: x @ params["kernel"] + params["bias"]), dense(net, "fc")
    told = str(convert.verify(net, flax, X, "outputs"))
    assert told.startswith("same: ")
    assert "Row(" not in told
