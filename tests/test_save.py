"""Live modules: saved by one line as a conversion writes, and loaded into anybody's definition."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest
import torch
from click.testing import CliRunner
from flax import linen, nnx
from support import bits, canonical
from torch import nn

import convert
import zoo
from convert.cli.main import cli
from convert.engine import execute
from convert.training_state import storage
from zoo.checkpoint.label import read_label
from zoo.containers import open_checkpoint
from zoo.containers.errors import CorruptInput, NotEquivalent, UsageError, ZooError
from zoo.loading import build
from zoo.models.bert import MODEL

CONFIG = MODEL.tiny["encoder"]
X = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)


def twin(framework: str) -> Any:
    return build(MODEL, CONFIG, framework, canonical(MODEL, CONFIG))


def held(path: Path) -> dict[str, Any]:
    with open_checkpoint(path) as reader:
        return {n: bits(reader.read(n)) for n in reader.tensors}


# --- Of the zoo ---


@pytest.mark.parametrize("framework", ["torch", "flax"])
@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "m.msgpack", "m.flax", "shards"])
def test_a_twin_in_any_container(framework: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    options = {"shards": {"to": "safetensors", "max_shard_size": 9000}}
    made = convert.save(twin(framework), path, **options.get(name, {}))  # type: ignore[arg-type]
    assert (made.model, made.verified["level"]) == ("bert", "bits")
    assert made.source_container == "module"
    (identity,) = zoo.identify(path)
    assert (identity.config, identity.unknown) == (CONFIG, frozenset())
    assert identity.tree == ("nnx" if name in ("m.msgpack", "m.flax") else "torch")
    loaded = zoo.load(path, framework="torch")
    for key, value in canonical(MODEL, CONFIG).items():
        assert torch.equal(loaded.state_dict()[key], torch.from_numpy(value)), key
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_both_frameworks_save_one_and_the_same_file(tmp_path: Path) -> None:
    for framework in ("torch", "flax"):
        convert.save(twin(framework), tmp_path / f"{framework}.safetensors")
    ours, theirs = (held(tmp_path / f"{f}.safetensors") for f in ("torch", "flax"))
    assert theirs.items() <= ours.items()
    assert not (ours.keys() - theirs.keys())


def test_a_config_of_one_s_own(tmp_path: Path) -> None:
    convert.save(
        twin("torch"), tmp_path / "m.pt", config={**vars(CONFIG), "num_attention_heads": 1}
    )
    assert zoo.identify(tmp_path / "m.pt")[0].config.num_attention_heads == 1
    with pytest.raises(UsageError, match="no field"):
        convert.save(twin("torch"), tmp_path / "n.pt", config={"nothing": 1})


def test_a_twin_that_has_grown_is_refused_with_all_that_is_wrong(tmp_path: Path) -> None:
    model = twin("torch")
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ZooError, match="2 differ") as e:
        convert.save(model, tmp_path / "m.pt")
    assert "surplus: extra.weight" in e.value.details
    assert "layout=" in e.value.advice
    whole = nn.Module()  # the same layers, of no class of the zoo's
    for name, child in model.named_children():
        whole.add_module(name, child)
    made = convert.save(model, tmp_path / "m.pt", layout=convert.layout_of(whole))
    assert made.model == ""
    assert held(tmp_path / "m.pt")["extra.weight"] == bits(model.extra.weight.detach().numpy())


# --- Anybody's ---


class Net(nn.Module):
    def __init__(self, wide: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(3, 8)
        self.body = nn.Sequential(nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))
        if wide:
            self.register_buffer("mask", torch.arange(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.up(x))


class FlaxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, seen: bool = False) -> None:
        self.up = nnx.Linear(3, 8, rngs=rngs)
        norm = nnx.LayerNorm(8, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.body = nnx.Sequential(norm, jnp.tanh, nnx.Linear(8, 2, rngs=rngs))
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        if seen:
            self.cache = nnx.Cache(jnp.zeros(3))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.body(self.drop(self.up(x)))


def torch_steps(net: nn.Module, optimizer: torch.optim.Optimizer, n: int) -> list[float]:
    losses = []
    for _ in range(n):
        optimizer.zero_grad()
        loss = net(torch.from_numpy(X).to(net.up.weight)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def flax_steps(net: Any, optimizer: nnx.Optimizer, n: int) -> list[float]:
    @nnx.jit
    def step(net: Any, optimizer: nnx.Optimizer) -> jax.Array:
        x = jnp.asarray(X, net.up.kernel.dtype)
        loss, grads = nnx.value_and_grad(lambda m: jnp.square(m(x)).mean())(net)
        optimizer.update(net, grads)
        return loss

    return [float(step(net, optimizer)) for _ in range(n)]


def test_training_goes_on_in_flax_and_back_again(tmp_path: Path) -> None:
    """In float64, where anything but torch's own moments and steps would show."""
    torch.manual_seed(0)
    net = Net().double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    torch_steps(net, optimizer, 3)
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(state, tmp_path / "last.pt")
    convert.convert(tmp_path / "last.pt", layout=convert.layout_of(Net()))
    expected = torch_steps(net, optimizer, 6)
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore", zoo.LoadNotice)
        flax = convert.load(tmp_path / "last.flax", "flax", FlaxNet)
        assert flax.drop.deterministic
        tx = nnx.Optimizer(flax, convert.optim.adamw(1e-2, weight_decay=0.1), wrt=nnx.Param)
        convert.load_optimizer(tmp_path / "last.flax", tx, flax)
        losses = flax_steps(flax, tx, 3)
        tuned = tmp_path / "tuned.safetensors"
        made = convert.save(flax, tuned, tmp_path / "last.flax", optimizer=tx, step=6)
        assert made.training["counters"] == {"step": 6}
        back = convert.load(tuned, "torch", Net)
        again = torch.optim.AdamW(back.parameters(), lr=1e-2, weight_decay=0.1)
        convert.load_optimizer(tuned, again, back)
        losses += torch_steps(back, again, 3)
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    assert len(set(losses)) == 6


def test_a_torch_module_needs_nothing_said_and_returns_bit_for_bit(tmp_path: Path) -> None:
    net = Net(wide=True)
    net.half()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    torch_steps(net, optimizer, 1)
    with pytest.warns(zoo.LoadNotice, match="buffers keep"):
        made = convert.save(
            net, tmp_path / "n.msgpack", optimizer=optimizer, data={"epoch": 1, "losses": (1, 2)}
        )
    assert made.layout.startswith("entries/")
    assert held(tmp_path / "n.msgpack")["up.kernel"][1] == (3, 8)
    back = convert.load(tmp_path / "n.msgpack", "torch", lambda: Net(wide=True))
    for name, value in net.state_dict().items():
        assert back.state_dict()[name].dtype == value.dtype
        assert torch.equal(back.state_dict()[name], value), name
    training = storage.read(tmp_path / "n.msgpack.optimizer.safetensors")
    assert training.data == {"epoch": 1, "losses": [1, 2]}
    (state,) = training.optimizers
    assert (state.rule, set(state.slots)) == ("SGD", {"momentum_buffer"})


def test_the_config_of_a_model_of_another_library_travels(tmp_path: Path) -> None:
    net = Net()
    net.config = type("C", (), {"to_json_string": lambda self: '{"model_type": "own", "d": 8}'})()
    (tmp_path / "dir").mkdir()
    convert.save(net, tmp_path / "dir", to="safetensors")
    written = json.loads((tmp_path / "dir" / "config.json").read_text())
    assert (written["model_type"], written["d"]) == ("own", 8)
    convert.convert(tmp_path / "dir", tmp_path / "dir.flax")
    with open_checkpoint(tmp_path / "dir.flax") as reader:
        assert read_label(reader).hf == {"model_type": "own", "d": 8}
    (tmp_path / "c.json").write_text('{"a": 1}')
    for config in ({"a": 1}, tmp_path / "c.json"):
        convert.save(net, tmp_path / "n.pt", config=config, force=True)
        assert json.loads((tmp_path / "n.pt.config.json").read_text())["a"] == 1
    for wrong in (3, {"a": object()}, tmp_path / "nothing.json"):
        with pytest.raises(UsageError):
            convert.save(net, tmp_path / "m.pt", config=wrong)


def test_several_optimizers_and_states_of_optax(tmp_path: Path) -> None:
    net = FlaxNet(nnx.Rngs(0), seen=True)
    layout = convert.layout_of(Net())
    tx = optax.sgd(0.1, momentum=0.9)
    state = tx.init(nnx.state(net, nnx.Param))
    with pytest.warns(zoo.LoadNotice, match="no weights, not saved: cache"):
        made = convert.save(net, tmp_path / "a.safetensors", layout, optimizer=state, step=2)
    assert made.training["optimizers"][0]["rule"] == "SGD"
    torch_net = Net()
    both = {
        "up": torch.optim.Adam(torch_net.up.parameters()),
        "body": torch.optim.Adam(torch_net.body.parameters()),
    }
    made = convert.save(torch_net, tmp_path / "b.safetensors", optimizer=both)
    assert [o["name"] for o in made.training["optimizers"]] == ["up", "body"]
    with pytest.raises(UsageError, match="holds no state"):
        convert.save(FlaxNet(nnx.Rngs(0)), tmp_path / "c.pt", layout, optimizer=tx)
    with pytest.raises(UsageError, match="not the model's"):
        convert.save(Net(), tmp_path / "c.pt", optimizer=both["up"])
    with pytest.raises(UsageError, match="data holds what JSON does not: x"):
        convert.save(Net(), tmp_path / "c.pt", data={"x": object()})
    assert not list(tmp_path.glob("*c.pt*"))


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "n.safetensors"
    with pytest.raises(ZooError, match="FlaxNet: no model in the zoo") as e:
        convert.save(FlaxNet(nnx.Rngs(0)), path)
    assert "give layout=" in e.value.advice
    with pytest.raises(ZooError, match="not those of the given layout"):
        convert.save(FlaxNet(nnx.Rngs(0)), path, convert.layout_of(nn.Linear(2, 3)))
    with torch.device("meta"):
        meta = Net()
    for empty in (meta, nnx.eval_shape(lambda: FlaxNet(nnx.Rngs(0)))):
        with pytest.raises(UsageError, match="is only a shape"):
            convert.save(empty, path)
    for empty in (nn.ReLU(), nnx.Dropout(0.5)):
        with pytest.raises(UsageError, match="no parameters and no buffers"):
            convert.save(empty, path)
    for wrong in (Net, 3, linen.Dense(3), np.zeros(3)):
        with pytest.raises(UsageError, match="not a module that holds weights"):
            convert.save(wrong, path)
    with pytest.raises(UsageError, match="does not exist"):
        convert.save(Net(), tmp_path / "nowhere" / "n.pt")
    net = Net()
    net.register_buffer("few", torch.zeros(4, dtype=torch.uint8).view(torch.uint4))
    with pytest.raises(UsageError, match="few is uint4"):
        convert.save(net, path)
    assert not list(tmp_path.iterdir())


def test_an_existing_checkpoint_stays_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "n.safetensors"
    net = Net()
    convert.save(net, path)
    before = path.read_bytes()
    net.up.bias.data += 1
    with pytest.raises(UsageError, match="exists already"):
        convert.save(net, path)

    def broken(*_: Any) -> None:
        raise NotEquivalent("the disk lies", "buy another")

    with monkeypatch.context() as patched:
        patched.setattr(execute, "recheck", broken)
        with pytest.raises(NotEquivalent):
            convert.save(net, path, force=True)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2
    convert.save(net, path, force=True)
    assert path.read_bytes() != before


# --- Into a definition of one's own ---


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    net = Net()
    net.up.bias.data = net.up.bias.data.bfloat16()
    convert.save(net, tmp_path / "n.safetensors")
    return tmp_path / "n.safetensors"


def test_an_instance_is_filled_where_it_stands(saved: Path) -> None:
    net = Net().train()
    parameters = list(net.parameters())
    assert convert.load(saved, "torch", net) is net
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    assert (net.up.bias.dtype, net.training) == (torch.bfloat16, False)
    flax = FlaxNet(nnx.Rngs(0))
    kernel = flax.up.kernel
    assert convert.load(saved, "flax", flax) is flax
    assert flax.up.kernel is kernel
    assert (flax.up.bias.dtype, flax.drop.deterministic) == (jnp.bfloat16, True)
    np.testing.assert_array_equal(kernel[...], net.up.weight.detach().numpy().T)


def test_a_class_a_function_and_what_is_on_meta(saved: Path) -> None:
    with torch.device("meta"):
        meta = Net()
    nets_ = [convert.load(saved, "torch", d) for d in (Net, lambda: Net(), meta)]
    states = [n.state_dict() for n in nets_]
    for name, value in states[0].items():
        assert all(torch.equal(value, s[name]) for s in states), name
    with torch.device("meta"):
        meta = Net()
        meta.register_buffer("rope", torch.ones(2), persistent=False)
    with pytest.raises(UsageError, match="rope is computed by the module's own code"):
        convert.load(saved, "torch", meta)


def test_ties_and_buffers(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self, tied: bool = True) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            if tied:
                self.b.weight = self.a.weight
            self.register_buffer("mask", torch.ones(2))

    class Untied(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.a = nnx.Linear(3, 3, use_bias=False, rngs=rngs)

    net, path = Tied(), tmp_path / "t.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", zoo.LoadNotice)
        convert.save(net, path)
    with torch.device("meta"):
        meta = Tied()
    for back in (convert.load(path, "torch", Tied), convert.load(path, "torch", meta)):
        assert back.a.weight is back.b.weight
        assert torch.equal(back.b.weight, net.a.weight)
    apart = convert.load(path, "torch", lambda: Tied(tied=False))
    assert torch.equal(apart.b.weight, net.a.weight)
    with pytest.warns(zoo.LoadNotice, match="buffers that the Flax definition does not have: mask"):
        convert.load(path, "flax", Untied)


def test_a_checkpoint_that_nothing_is_known_of(tmp_path: Path) -> None:
    torch.save({"model": Net().state_dict()}, tmp_path / "n.pt")
    with pytest.warns(zoo.LoadNotice, match="taken off"):
        convert.load(tmp_path / "n.pt", "torch", Net)
    with pytest.warns(zoo.LoadNotice, match="taken off"):
        net = convert.load(tmp_path / "n.pt", "flax", FlaxNet, layout=convert.layout_of(Net()))
    assert net.up.kernel.shape == (3, 8)


def test_match_is_asked_where_nothing_says_what_the_tensors_are(
    tmp_path: Path,
) -> None:
    """What it answers has the module's own names, nnx.Sequential's `layers` among them."""
    net, path = Net(), tmp_path / "n.pt"
    torch.save(net.state_dict(), path)
    with pytest.warns(zoo.LoadNotice, match="not checked"):
        flax = convert.load(path, "flax", FlaxNet)
    weight = net.body[2].weight.detach().numpy()
    np.testing.assert_array_equal(flax.body.layers[2].kernel[...], weight.T)
    tx = nnx.Optimizer(flax, optax.adam(1e-3), wrt=nnx.Param)
    flax_steps(flax, tx, 1)
    convert.save(flax, tmp_path / "t.msgpack", layout=convert.match(net, flax), optimizer=tx)
    assert "body.layers.0.scale" in held(tmp_path / "t.msgpack")
    convert.load_optimizer(
        tmp_path / "t.msgpack", nnx.Optimizer(flax, optax.adam(1), wrt=nnx.Param), flax
    )
    back = convert.load(tmp_path / "t.msgpack", "torch", Net)
    assert not torch.equal(back.body[2].weight, net.body[2].weight)
    own = tmp_path / "own.py"
    own.write_text("from test_save import FlaxNet, Net\n")
    for options in (
        ("--flax", f"{own}:FlaxNet"),
        ("--torch", f"{own}:Net", "--flax", f"{own}:FlaxNet"),
    ):
        there = tmp_path / f"{len(options)}.flax"
        assert (
            CliRunner().invoke(cli, ["torch2flax", str(path), str(there), *options]).exit_code == 0
        )


def test_names_of_a_family_s_that_do_not_fit_are_left_to_match(tmp_path: Path) -> None:
    """The tensors of a linear layer are those of a model of the zoo."""

    class Line(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.line = nnx.Linear(3, 3, rngs=rngs)

    net = zoo.create("linear_3x3", framework="torch")
    torch.save(net.state_dict(), tmp_path / "l.pt")
    with pytest.warns(zoo.LoadNotice, match="not checked"):
        line = convert.load(tmp_path / "l.pt", "flax", Line)
    np.testing.assert_array_equal(line.line.kernel[...], net.weight.detach().numpy().T)


def test_lazy_layers_have_their_sizes_from_inputs(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls lazy layers experimental
        lazy = nn.LazyLinear(4)
    given = nn.Linear(3, 4)
    convert.save(given, tmp_path / "l.pt")
    with pytest.raises(UsageError, match="no shape yet"):
        convert.load(tmp_path / "l.pt", "torch", lazy)
    assert torch.equal(convert.load(tmp_path / "l.pt", "torch", lazy, X).weight, given.weight)


def test_what_cannot_be_loaded(saved: Path, tmp_path: Path) -> None:
    class Other(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.up = nnx.Linear(3, 7, rngs=rngs)
            self.bodi = nnx.LayerNorm(8, rngs=rngs)

    with pytest.raises(UsageError, match="is not of Other: 8 tensors differ") as e:
        convert.load(saved, "flax", Other)
    assert "wrong shape: up.kernel is 3x8, should be 3x7" in e.value.details
    assert "missing: bodi.bias 8" in " ".join(e.value.details)
    with pytest.raises(ZooError) as e:
        convert.load(saved, "torch", nets.TorchNet)
    assert "surplus: up.weight" in e.value.details
    with pytest.raises(UsageError, match="is a torch definition: it is traced of one call"):
        convert.load(saved, "flax", Net)
    with pytest.raises(UsageError, match="no framework 'jax'"):
        convert.load(saved, "jax", FlaxNet)
    with pytest.raises(UsageError, match="needs wide"):
        convert.load(saved, "torch", lambda wide: Net())
    with pytest.raises(UsageError, match="of no family in the zoo") as e:
        zoo.load(saved, framework="torch")
    assert "convert.load(path, framework, definition)" in e.value.advice
    wide = tmp_path / "wide.pt"
    convert.save(Net().double(), wide)
    flax = FlaxNet(nnx.Rngs(0))
    before = flax.up.kernel[...]
    with pytest.raises(UsageError, match="JAX would cut its 64 bits"):
        convert.load(wide, "flax", flax)
    assert flax.up.kernel[...] is before
    saved.write_bytes(saved.read_bytes()[:-10])
    with pytest.raises(CorruptInput):
        convert.load(saved, "torch", Net)
