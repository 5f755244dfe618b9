"""A torch module, live in JAX: `convert.to_flax`, and the way back."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn

import convert
from convert.porting.live import LiveModule
from convert.program.graph import GraphNode
from zoo.containers.errors import NotEquivalent, UsageError, ZooError
from zoo.loading import LoadNotice


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module: nn.Module) -> nn.Module:
    """The module in eval mode with values everywhere that are nobody's default."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for t in [*module.parameters(), *module.buffers()]:
            if t.is_floating_point():
                t.copy_(torch.rand(t.shape, generator=generator) - 0.4)
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.running_var.add_(1)
                part.num_batches_tracked.fill_(7)
    return module.eval()


class Table(nn.Module):
    """Computed under no_grad from a buffer that is not saved, as rotary tables are."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("steps", torch.arange(4.0), persistent=False)

    @torch.no_grad()
    def forward(self, n: int) -> torch.Tensor:
        return torch.outer(torch.arange(n, dtype=self.steps.dtype), self.steps * self.scale).cos()


@dataclasses.dataclass
class Result:
    values: torch.Tensor
    total: torch.Tensor
    missing: torch.Tensor | None = None


class Mixed(nn.Module):
    """In-place views, ties, a list, a module that is called twice, flags, constants, no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.blocks[1].weight = self.blocks[0].weight
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.alias = self.net
        self.norm = nn.BatchNorm1d(4)
        self.table = Table()
        self.gain = nn.Parameter(torch.ones(4))
        self.constant = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def forward(self, x: Any, double: bool = False, mask: Any = None) -> Result:
        y = self.blocks[0](x)
        y.view(-1).add_(1)
        if double:
            y = y * 2
        y = self.net(y) + self.alias(self.blocks[1](y).detach())
        y = y + self.table(x.shape[1])[None] * self.constant
        if mask is not None:
            y = torch.where(mask[..., None], y, torch.zeros_like(y))
        y = self.norm(y.transpose(1, 2)).transpose(1, 2) * self.gain
        return Result(y, y.sum())


@pytest.fixture(scope="module")
def mixed() -> tuple[nn.Module, LiveModule]:
    module = filled(Mixed())
    inputs = {"x": draw(1, 5, 4), "double": True}
    return module, convert.to_flax(module, inputs, verify="gradients")


def test_it_is_the_same_at_sizes_that_were_not_traced(mixed: Any) -> None:
    module, net = mixed
    assert net.report.verdict == "same"
    assert len(net.report.rows) >= 3
    assert any(name.name.startswith("gradient of") for name in next(iter(net.report.rows.values())))
    for shape in ((3, 9, 4), (1, 1, 4), (2, 6, 4)):
        x = draw(*shape, seed=3)
        ours, theirs = net(x.numpy(), double=True), module(x, double=True)
        assert type(ours).__name__ == "Result"
        assert ours._fields == ("values", "total")
        np.testing.assert_allclose(ours.values, theirs.values.detach(), rtol=0, atol=2e-5)


def test_it_is_an_ordinary_module(mixed: Any) -> None:
    _, net = mixed
    names = {".".join(map(str, p)) for p, _ in nnx.to_flat_state(nnx.state(net, nnx.Param))}
    assert {"blocks.0.kernel", "blocks.1.bias", "net.0.kernel", "net.2.bias", "gain"} <= names
    assert "blocks.1.kernel" not in names  # tied
    assert net.net[0].kernel.shape == (4, 8)
    statistics = nnx.to_flat_state(nnx.state(net, nnx.BatchStat))
    assert {p[-1] for p, _ in statistics} == {"mean", "var"}
    x = draw(2, 5, 4).numpy()
    plain = net(x, double=True).values
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x, double=True).values)(net, x), plain, 1e-5)
    graphdef, state = nnx.split(net)
    np.testing.assert_array_equal(nnx.merge(graphdef, state)(x, double=True).values, plain)
    several = jax.vmap(lambda x: net(x, double=True).values)(jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(several[0], plain, 1e-4, 1e-5)
    mesh = jax.make_mesh((1,), ("data",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    np.testing.assert_allclose(net(jax.device_put(x, spread), double=True).values, plain, 1e-5)


def test_no_grad_and_detach_stop_the_gradient(mixed: Any) -> None:
    module, net = mixed
    x = draw(2, 5, 4)
    module.zero_grad()
    module(x, double=True).values.square().sum().backward()
    ours = nnx.grad(lambda m: (m(x.numpy(), double=True).values ** 2).sum())(net)
    assert module.table.scale.grad is None
    assert not np.any(ours["table"]["scale"])
    theirs = module.blocks[0].weight.grad
    np.testing.assert_allclose(ours["blocks"][0]["kernel"], theirs.T, 2e-4, 1e-4)


def test_it_comes_back_bit_for_bit(mixed: Any, tmp_path: Path) -> None:
    module, net = mixed
    state, ours = module.state_dict(), convert.to_state_dict(net)
    assert list(ours) == list(state)
    for name, t in state.items():
        assert ours[name].dtype == t.dtype, name
        assert torch.equal(ours[name], t), name
    assert ours["blocks.1.weight"] is ours["blocks.0.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("net.safetensors", "net.flax"):
            convert.save(net, tmp_path / name)
            back = convert.load(tmp_path / name, "torch", Mixed)
            for key, t in state.items():
                assert torch.equal(back.state_dict()[key], t), key
    restored = ocp.PyTreeCheckpointer().restore(tmp_path / "net.flax")
    assert restored["gain"].shape == (4,)


def test_what_was_baked_in_is_told_and_refused(mixed: Any) -> None:
    _, net = mixed
    assert "double: True" in net.report.baked
    assert "x: axis 2 is 4" in net.report.baked
    x = draw(2, 5, 4).numpy()
    with pytest.raises(UsageError) as e:
        net(x)
    assert "double is left out, and True was baked in" in str(e.value)
    with pytest.raises(UsageError) as e:
        net(x, mask=x > 0)
    assert "mask was no array when it was traced" in str(e.value)
    with pytest.raises(UsageError, match=r"axis 2 of x is 3, and was traced as 4"):
        net(x[..., :3], double=True)
    with pytest.raises(UsageError, match="x holds integers"):
        net(x.astype(int), double=True)


class Branch(nn.Module):
    """Another result for long sequences, and for a single row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 1:
            return x - 1
        return x * 2 if x.shape[1] > 3 else x + 1


def test_sizes_that_the_graph_is_not_for_are_traced_anew_and_proved() -> None:
    module = Branch()
    net = convert.to_flax(module, draw(2, 5), others=[draw(5, 6)])
    assert any("x.shape[1] > 3 (" in b and "test_to_flax.py" in b for b in net.report.baked)
    before = len(net.report.rows)
    jitted = nnx.jit(lambda m, x: m(x))
    for shape, value in (((3, 4), 2), ((3, 3), 2), ((2, 2), 2), ((1, 5), 0), ((1, 2), 0)):
        np.testing.assert_array_equal(jitted(net, np.ones(shape, np.float32)), value)
        np.testing.assert_array_equal(net(draw(*shape).numpy()), module(draw(*shape)))
    assert len(net._program.others) == 2
    assert len(net.report.rows) >= before + 2
    assert all(row.same for rows in net.report.rows.values() for row in rows)


class Training(nn.Module):
    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(rate)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.conv(x)))).mean((2, 3)))


def test_it_trains_as_torch_does() -> None:
    module = filled(Training())
    net = convert.to_flax(module, draw(2, 2, 6, 6))
    x, y = draw(4, 2, 6, 6), torch.tensor([0, 1, 2, 1])
    module.train()
    net.train()
    theirs = torch.optim.SGD(module.parameters(), 0.1)
    ours = nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(net: Any, ours: Any) -> Any:
        def loss(net: Any) -> Any:
            logits = net(x.numpy())
            return optax.softmax_cross_entropy_with_integer_labels(logits, y.numpy()).mean()

        value, gradients = nnx.value_and_grad(loss)(net)
        ours.update(net, gradients)
        return value

    for _ in range(5):
        theirs.zero_grad()
        loss = F.cross_entropy(module(x), y)
        loss.backward()
        theirs.step()
        np.testing.assert_allclose(step(net, ours), loss.item(), 1e-4)
    state = convert.to_state_dict(net)
    for name, t in module.state_dict().items():
        np.testing.assert_allclose(state[name], t, 2e-3, 1e-4, err_msg=name)
    assert state["norm.num_batches_tracked"].item() == 12
    module.eval()
    net.eval()
    np.testing.assert_allclose(net(x.numpy()), module(x).detach(), 1e-3, 1e-4)


def test_dropout_draws_from_rngs_and_only_in_train_mode() -> None:
    net = convert.to_flax(filled(Training(0.5)), draw(2, 2, 6, 6))
    x = draw(2, 2, 6, 6).numpy()
    np.testing.assert_array_equal(net(x), net(x))
    net.train()
    assert not np.array_equal(net(x), net(x))
    a, b = (net(x, rngs=nnx.Rngs(3)) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    net.eval()
    holder = nnx.Dict(inner=net)  # modes reach it from above, as they reach any module
    holder.set_attributes(deterministic=False)
    assert not net.deterministic


def test_image_axes_last() -> None:
    module = filled(Training())
    net = convert.to_flax(module.conv, draw(2, 2, 6, 5), image_axes="last")
    x = draw(3, 2, 6, 7)
    ours = net(x.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(ours, module.conv(x).permute(0, 2, 3, 1).detach(), 1e-4, 1e-5)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor) -> Any:
        y, (h, _) = self.rnn(x)
        return {"y": y, "states": [h]}


def test_a_recurrent_layer_keeps_its_length_open() -> None:
    module = filled(Recurrent())
    net = convert.to_flax(module, draw(2, 5, 3))
    x = draw(3, 8, 3)
    ours, theirs = net(x.numpy()), module(x)
    np.testing.assert_allclose(ours["y"], theirs["y"].detach(), 1e-4, 1e-5)
    np.testing.assert_allclose(ours["states"][0], theirs["states"][0].detach(), 1e-4, 1e-5)


def test_a_loss_function_of_torch_code() -> None:
    model = filled(Training())

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    x, y = draw(4, 2, 6, 6), torch.tensor([0, 1, 2, 1])
    net = convert.to_flax(loss, (x, y))
    loss(x, y).backward()
    gradients = nnx.grad(lambda m: m(x.numpy(), y.numpy()))(net)
    theirs = model.head.weight.grad
    np.testing.assert_allclose(gradients["model"]["head"]["kernel"], theirs.T, 1e-4, 1e-6)


class Unknown(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return torch.ops.zootest.one(x), torch.ops.zootest.two(x, 3), x.flip(0)


def _step_of(model: nn.Module, optimizer: Any) -> Any:
    def step(x: torch.Tensor, y: torch.Tensor) -> Any:
        model.train()
        optimizer.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        return loss.item(), logits.argmax(-1)

    return step


@pytest.mark.parametrize("started", [False, True])
def test_a_training_step_of_torch_code(started: bool) -> None:
    model = filled(Training()).eval()
    model.drop.p = 0.0
    named = dict(model.named_parameters())
    decayed = [p for n, p in named.items() if n.endswith("weight")]
    groups = [{"params": decayed, "weight_decay": 0.1}]
    others = [p for n, p in named.items() if not n.endswith("weight")]
    for p in others:
        p.requires_grad_(not started)
    if not started:
        groups.append({"params": others})
    optimizer: Any = torch.optim.SGD(groups, lr=1e-2, momentum=0.9)
    if started:  # Adam makes a step of the rounding that is a bias's gradient before BatchNorm
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
    step = _step_of(model, optimizer)
    x, y = draw(4, 2, 6, 6), torch.tensor([0, 1, 2, 1])
    if started:
        step(x, y)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    live = convert.to_flax(step, (x, y))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert any("training steps" in n for n in live.report.rows)

    run = nnx.jit(lambda live, x, y: live(x, y))
    for _ in range(4):
        loss, best = run(live, x.numpy(), y.numpy())
        theirs, torchs = step(x, y)
    assert abs(float(loss) - theirs) < 1e-4
    assert best.tolist() == torchs.tolist()
    ours = convert.to_state_dict(live.net)
    for name, t in model.state_dict().items():
        np.testing.assert_allclose(ours[f"model.{name}"], t, 1e-3, 1e-5)
    if started:  # what the optimizer does not train stays
        assert torch.equal(ours["model.head.bias"], before["head.bias"])


def test_every_optimizer_of_torch_that_is_known_steps_as_torchs() -> None:
    from convert.porting.torch_optimizer import transformation

    options: dict[str, list[dict[str, Any]]] = {
        "SGD": [{"momentum": 0.9, "nesterov": True}, {"maximize": True, "weight_decay": 0.1}],
        "Adam": [{"amsgrad": True}, {"weight_decay": 0.1, "betas": (0.8, 0.9)}],
        "AdamW": [{}],
        "Adagrad": [{"lr_decay": 0.1, "initial_accumulator_value": 0.2}],
        "RMSprop": [{"momentum": 0.9, "centered": True}],
        "NAdam": [{"decoupled_weight_decay": True, "weight_decay": 0.1}],
        "RAdam": [{"weight_decay": 0.1}],
        "Adadelta": [{"rho": 0.8, "weight_decay": 0.1, "maximize": True}],
    }
    start = draw(5).double()
    for name, every in options.items():
        for one in every:
            p = nn.Parameter(start.clone())
            optimizer = getattr(torch.optim, name)([p], lr=0.05, **one)
            with jax.enable_x64(True):
                tx = transformation(optimizer, {"p": 0})
                params = {"p": jnp.asarray(start.numpy())}
                state = tx.init(params)
                for _ in range(7):
                    optimizer.zero_grad()
                    p.sin().sum().backward()
                    optimizer.step()
                    updates, state = tx.update({"p": jnp.cos(params["p"])}, state, params)
                    params = optax.apply_updates(params, updates)
            np.testing.assert_allclose(params["p"], p.detach(), 1e-6, 1e-9, err_msg=name)


def test_an_optimizer_that_is_not_known_is_refused() -> None:
    model = nn.Linear(2, 2)

    class Mine(torch.optim.SGD):
        pass

    optimizer = Mine(model.parameters(), 0.1)

    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).sum()
        loss.backward()
        optimizer.step()
        return loss

    with pytest.raises(UsageError, match=r"no transformation for .*Mine"):
        convert.to_flax(step, draw(2, 2))


def test_a_scheduler_in_a_step_is_refused_and_not_stepped() -> None:
    step = nn.Linear(2, 2)  # a part may have any name
    optimizer = torch.optim.SGD(step.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def train(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = step(x).sum()
        loss.backward()
        optimizer.step()
        return loss

    def scheduled(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = step(x).sum()
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss

    with pytest.raises(UsageError, match="uses a scheduler"):
        convert.to_flax(scheduled, draw(2, 2))
    assert scheduler.last_epoch == 0
    live = convert.to_flax(train, draw(2, 2))
    assert set(convert.to_state_dict(live)) == {"step.weight", "step.bias"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda o, loss: (loss.backward(), o.step()), "adds up gradients of several steps"),
        (lambda o, loss: (o.zero_grad(), o.step(), loss.backward()), "step, backward in this"),
        (lambda o, loss: (o.zero_grad(), loss.backward(loss), o.step()), "backward.. arguments"),
        (lambda o, loss: (o.zero_grad(), loss.backward()), "does backward in this order"),
    ],
)
def test_other_steps_are_refused(change: Any, match: str) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = model(x).sum()
        change(optimizer, loss)
        return loss

    with pytest.raises(UsageError, match=match):
        convert.to_flax(step, draw(2, 2))


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class StraightThrough(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Rounded.apply(x * self.weight)


def test_a_backward_pass_of_its_own_is_told_and_seen_in_gradients() -> None:
    with pytest.warns(LoadNotice, match="Rounded has a backward pass of its own"):
        convert.to_flax(StraightThrough(), draw(2, 3))
    with (
        pytest.warns(LoadNotice, match="Rounded"),
        pytest.raises(NotEquivalent, match="outputs and gradients"),
    ):
        convert.to_flax(StraightThrough(), draw(2, 3), verify="gradients")


class AsksWhetherItIsTraced(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(1) if torch.compiler.is_exporting() else x.sum(1, keepdim=True) + 0 * x


def test_another_computation_under_the_trace_is_refused_and_named() -> None:
    with pytest.raises(NotEquivalent, match="asks whether it is traced"):
        convert.to_flax(AsksWhetherItIsTraced(), draw(2, 3))


class Counts(nn.Module):
    """It writes into its buffers in eval mode too; one of them is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(2))
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total += x.mean(0)
        self.calls.add_(1)
        return x * self.total + self.calls


def test_buffers_that_are_written_are_state_and_the_torch_module_is_not_changed() -> None:
    module = Counts()
    net = convert.to_flax(module, draw(3, 2))
    assert module.calls == 0
    x = draw(3, 2, seed=2)
    for _ in range(3):
        np.testing.assert_allclose(net(x.numpy()), module(x), 1e-6)
    assert net.calls[...] == 3
    assert torch.allclose(convert.to_state_dict(net)["total"], module.total)


class Masked(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x[x > 0]


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x + torch.randn_like(x)


def test_an_argument_that_is_written_to_stays_as_it_is() -> None:
    class Adds(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x += 1
            return x * 2

    x = draw(2, 3)
    with pytest.warns(LoadNotice, match="writes into its argument x"):
        net = convert.to_flax(Adds(), x, verify="gradients")
    assert torch.equal(x, draw(2, 3))
    given = jnp.asarray(x.numpy())
    np.testing.assert_allclose(net(given), (x + 1) * 2, 1e-6)
    assert np.array_equal(given, x)


def test_what_is_random_in_eval_mode_is_told() -> None:
    net = convert.to_flax(Noisy(), draw(3))
    assert net.report.verdict == "not proved"
    assert any("draws random numbers in eval mode" in n for n in net.report.notices)
    x = np.zeros(3, np.float32)
    with pytest.raises(UsageError, match="draws random numbers, and has none to draw from"):
        net(x)
    assert np.any(net(x, rngs=nnx.Rngs(0)))


def test_unknown_operations_are_listed_with_lines() -> None:
    torch.library.custom_op(
        "zootest::one", lambda x: x.clone(), mutates_args=(), schema="(Tensor x) -> Tensor"
    ).register_fake(torch.empty_like)
    torch.library.custom_op(
        "zootest::two", lambda x, n: x * n, mutates_args=(), schema="(Tensor x, int n=2) -> Tensor"
    ).register_fake(lambda x, n: torch.empty_like(x))
    with pytest.raises(ZooError) as e:
        convert.to_flax(Unknown(), draw(3))
    assert e.value.problem == "2 operations have no rule in JAX"
    for name, line in zip(("one", "two"), e.value.details, strict=True):
        assert line.startswith(f"zootest.{name}.default: ")
        assert "test_to_flax.py" in line
        assert "return torch.ops.zootest.one(x)" in line
    assert "def one(x): ..." in e.value.advice
    rules = {"zootest.one.default": lambda x: x, "zootest.two.default": lambda x, n=2: x * n}
    assert convert.to_flax(Unknown(), draw(3), rules=rules).report.verdict == "same"
    with pytest.raises(ZooError) as e:
        convert.to_flax(Masked(), draw(3))
    assert "aten.index.Tensor is not ported for these arguments" in e.value.problem
    assert "x[x > 0]" in e.value.details[0]


class Decides(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_values_that_decide_are_an_error_with_file_and_line() -> None:
    with pytest.raises(ZooError) as e:
        convert.to_flax(Decides(), draw(3))
    assert "depends on the values of a tensor" in e.value.problem
    assert "test_to_flax.py" in e.value.details[0]
    assert "x.sum() > 0" in e.value.details[0]
    with pytest.raises(UsageError, match="does not run on these inputs"):
        convert.to_flax(nn.Linear(3, 4), draw(2, 5))
    with pytest.raises(UsageError, match="missing a required argument"):
        convert.to_flax(nn.Linear(3, 4), {})


class Odd(nn.Module):
    """A layer with a rule: what it does cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.power = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight) ** self.power


def odd_function(x: torch.Tensor, by: float) -> torch.Tensor:
    return torch.sin(x) * by


class Ruled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd = Odd()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return odd_function(self.odd(x), by=3.0) + torch.tanh(x)


def test_rules_of_the_user_at_three_levels() -> None:
    module = filled(Ruled())
    seen: list[str] = []

    def told(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
        def rule(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return f(*args, **kwargs)

        return rule

    rules = {
        Odd: told("class", lambda layer, x: (x * layer.weight) ** layer.power),
        odd_function: told("function", lambda x, by: jnp.sin(x) * by),
        "aten.tanh.default": told("operation", jnp.tanh),
    }
    net = convert.to_flax(module, draw(2, 3), rules=rules)
    assert set(seen) == {"class", "function", "operation"}
    x = draw(4, 3)
    np.testing.assert_allclose(net(x.numpy()), module(x).detach(), 1e-4, 1e-5)
    nodes: list[GraphNode] = net._program.evaluation(False).graph.nodes
    assert [n.op for n in nodes if n.op.startswith("zooconvert")] == ["zooconvert.call.default"] * 2
    assert not np.allclose(nnx.grad(lambda m: m(x.numpy()).sum())(net)["odd"]["weight"], 0)
    with pytest.raises(NotEquivalent, match="other values than torch"):
        convert.to_flax(module, draw(2, 3), rules={"aten.tanh.default": jnp.sin})
    wrong = convert.to_flax(module, draw(2, 3), rules={"aten.tanh.default": jnp.sin}, verify=False)
    assert wrong.report.verdict == "not proved"


def test_weights_and_definitions(tmp_path: Path) -> None:
    module = filled(Training())
    convert.save(module, tmp_path / "w.safetensors")
    x = draw(2, 2, 6, 6)
    wanted = module(x).detach()
    for net in (
        convert.to_flax(Training, x, tmp_path / "w.safetensors"),
        convert.to_flax(Training(), x, module.state_dict(), verify=False),
        convert.load(tmp_path / "w.safetensors", "flax", Training, x),
    ):
        np.testing.assert_allclose(net(x.numpy()), wanted, 1e-4, 1e-5)
    with pytest.raises(UsageError) as e:
        convert.to_flax(Training(), x, {"head.bias": torch.zeros(5), "more": torch.zeros(1)})
    assert "head.bias is (5,), and (3,) in the module" in e.value.details
    assert "more is not a tensor of the module" in e.value.details
    with pytest.raises(UsageError, match="is a torch definition"):
        convert.load(tmp_path / "w.safetensors", "flax", Training)


class Kinds(nn.Module):
    """Integers, booleans and complex numbers, in dicts and lists."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)

    def forward(self, batch: dict[str, Any], scales: list[Any]) -> Any:
        x = self.words(batch["ids"]) * scales[0]
        x = torch.where(batch["mask"][..., None], x, x * scales[1])
        return x, batch["z"] * 2, batch["ids"] + 1, x.shape[1], None


def test_integers_booleans_complex_numbers_and_nesting() -> None:
    module = filled(Kinds())
    ids = torch.arange(10).reshape(2, 5) % 7
    batch = {"ids": ids, "mask": ids > 2, "z": torch.complex(draw(3), draw(3, seed=2))}
    net = convert.to_flax(module, (batch, [2.0, 3]))
    ours = net({k: v.numpy() for k, v in batch.items()}, [2.0, 3])
    theirs = module(batch, [2.0, 3])
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        np.testing.assert_allclose(a, b.detach(), 1e-6)
    assert int(ours[3]) == 5
    assert ours[4] is None
    with pytest.raises(UsageError, match=r"scales.1 is 4, and 3 was baked in"):
        net({k: v.numpy() for k, v in batch.items()}, [2.0, 4])


class Divided(nn.Module):
    """Integers that become torch's default dtype, which is another in the proof's float64."""

    def forward(self, x: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(x.shape[1])
        ramp = torch.linspace(0.1, 0.7, 5)
        return x + steps / 7 + (steps + 0.3).sin() + torch.exp(steps).log1p() + ramp[0]


def test_integers_that_are_divided() -> None:
    x = draw(3, 6)
    net = convert.to_flax(Divided(), (x, draw(2)))
    np.testing.assert_allclose(net(x.numpy(), np.zeros(2)), Divided()(x, x), 1e-5)


def test_other_examples_must_run_too() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.arange(5.0)

    convert.to_flax(Fixed(), draw(2, 5), others=[draw(3, 5)])
    with pytest.raises(UsageError, match="axis 1 of x is 6, and was traced as 5"):
        convert.to_flax(lambda x: x + torch.arange(5.0), draw(2, 5), others=[draw(2, 6)])


def test_float64_and_bfloat16() -> None:
    with jax.enable_x64(True):
        module = filled(Training().double())
        x = draw(2, 2, 6, 6).double()
        net = convert.to_flax(module, x)
        np.testing.assert_allclose(net(x.numpy()), module(x).detach(), 1e-12, 1e-12)
    with pytest.raises(UsageError, match="JAX would cut to 32 bits"):
        convert.to_flax(module, x)
    half = convert.to_flax(filled(nn.Linear(3, 4)).bfloat16(), draw(2, 3).bfloat16())
    assert half.kernel.dtype == jnp.bfloat16
    assert convert.to_state_dict(half)["weight"].dtype == torch.bfloat16


def test_untested_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "3.0.0")
    with pytest.raises(UsageError, match=r"torch 3.0.0 is not tested: 2.11 to 2.13 are"):
        convert.to_flax(nn.Linear(2, 2), draw(2, 2))
    assert convert.to_flax(nn.Linear(2, 2), draw(2, 2), untested=True).report.verdict == "same"


class Centres(nn.Module):
    """Sizes that are rounded as floats: what holds for them is asked in torch's own functions."""

    def forward(self, x: Any) -> Any:
        centres = torch.arange(0.5, x.shape[1] // 4, device=x.device)
        return x.sum(1) + centres.sum()


def test_conditions_on_rounded_sizes_are_understood() -> None:
    net = convert.to_flax(Centres(), torch.randn(2, 16))
    x = torch.randn(3, 24)
    np.testing.assert_allclose(net(x.numpy()), Centres()(x).numpy(), rtol=1e-5)
