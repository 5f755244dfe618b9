"""Layouts from outside: of anybody's torch module, from a file, by the command line's options."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from flax import nnx
from support import every_tiny
from torch import nn

import convert
import zoo
from convert.cli.main import cli
from convert.runtime.torch_layout import derive_layout
from zoo.checkpoint.label import Label, read_label
from zoo.checkpoint.request import as_layout
from zoo.containers import open_checkpoint
from zoo.containers.errors import CorruptInput, UsageError, ZooError
from zoo.layout import (
    Constant,
    Entry,
    Layout,
    Tensor,
    attention,
    batchnorm,
    constant,
    conv,
    embedding,
    linear,
    norm,
    param,
    recurrent,
    tie,
)
from zoo.layout.ops import Flip, Permute
from zoo.model import Config, Model
from zoo.models.bert import MODEL as BERT

NETS = Path(nets.__file__)


class Conv1D(nn.Module):
    """GPT-2's, as transformers has it: a linear layer stored (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))


class Linear(nn.Module):
    """Somebody's own, stored (in, out), whose name says nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))


class Lora(nn.Linear):
    """torch's, with tensors of its own; one has the name that Flax gives the weight."""

    def __init__(self, taken: bool = False) -> None:
        super().__init__(3, 4)
        self.lora_a = nn.Parameter(torch.zeros(2, 3))
        if taken:
            self.kernel = nn.Parameter(torch.zeros(1))


class Every(nn.Module):
    """One of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 6)
        self.att = nn.MultiheadAttention(6, 2)
        self.stem = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU())
        self.up = nn.ConvTranspose1d(6, 5, 3)
        self.lstm = nn.LSTM(6, 5, 2, bidirectional=True)
        self.norm = nn.GroupNorm(2, 6)
        self.c_fc = Conv1D(8, 6)
        self.lora = Lora()
        self.own = Linear()
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.emb.weight
        self.cls = nn.Parameter(torch.zeros(1, 6))
        self.register_buffer("mask", torch.ones(3, 3))
        self.register_buffer("rope", torch.ones(3), persistent=False)
        self.again = self.stem


def kept(name: str, shape: tuple[int, ...], collection: str = "params") -> Entry:
    tensors = (Tensor(name, shape),)
    return Entry("param", tensors, tensors, collection=collection)


STEM = [*conv("stem.0", 4, 6, 3, 3, groups=2), *batchnorm("stem.1", 6)]
EVERY = [
    kept("cls", (1, 6)),
    kept("mask", (3, 3), "buffers"),
    *embedding("emb", 7, 6),
    *attention("att", 6),
    *STEM,
    Entry(
        "conv_transpose",
        (Tensor("up.weight", (6, 5, 3)),),
        (Tensor("up.kernel", (3, 6, 5)),),
        (Permute((2, 0, 1)), Flip((0,))),
    ),
    Entry("conv_transpose", (Tensor("up.bias", (5,)),), (Tensor("up.bias", (5,)),)),
    *recurrent("lstm", 4, 6, 5, 2, True),
    *norm("norm", 6),
    Entry("linear", (Tensor("c_fc.weight", (6, 8)),), (Tensor("c_fc.kernel", (6, 8)),)),
    Entry("linear", (Tensor("c_fc.bias", (8,)),), (Tensor("c_fc.bias", (8,)),)),
    *linear("lora", 3, 4),
    kept("lora.lora_a", (2, 3)),
    kept("own.weight", (3, 3)),
    tie("head.weight", (7, 6), "emb.weight"),
    *(
        constant("again.1.num_batches_tracked", (), Constant("zeros", "I64", True))
        if e.constant
        else tie(f"again{t.name.removeprefix('stem')}", t.shape, t.name)
        for e in STEM
        for t in e.torch
    ),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_kind_by_the_table(device: str) -> None:
    with torch.device(device):
        module = Every()
    layout, notices = derive_layout(module)
    assert {e.torch[0].name: e for e in layout.entries} == {e.torch[0].name: e for e in EVERY}
    assert notices == [
        "parameters of layers that are not in the table keep their names and axes: "
        "cls, lora.lora_a, own.weight",
        "buffers keep their names and axes: mask",
    ]
    assert layout.shapes("torch") == {n: tuple(t.shape) for n, t in module.state_dict().items()}
    with pytest.warns(zoo.LoadNotice) as told:
        assert convert.layout_of(module) == layout
    assert [str(w.message) for w in told] == notices


@every_tiny()
def test_the_kinds_of_layers_give_what_a_family_states(model: Model, config: Config) -> None:
    """But for stacked experts, a family's choice, and attention of the zoo's own class."""
    whole = nn.Module()  # of no family
    with torch.device("meta"):
        whole.net = model.definition("torch")(config)
    derived = {e.torch[0].name: e for e in derive_layout(whole)[0].entries}
    stated = [e for e in model.layout_of(config).entries if len(e.torch) == 1 and e.flax]
    assert stated
    for e in stated:
        if not e.torch[0].name.rpartition(".")[2].startswith("in_proj_"):
            found = derived[f"net.{e.torch[0].name}"]
            assert [t.name for t in found.flax] == [f"net.{t.name}" for t in e.flax]
            assert (found.ops, found.collection) == (e.ops, e.collection)


def test_a_root_that_is_a_layer_and_projections_of_different_widths() -> None:
    assert Layout(linear("", 3, 4)) == convert.layout_of(nn.Linear(3, 4))
    assert Layout(attention("", 6)) == convert.layout_of(nn.MultiheadAttention(6, 2))
    wide = nn.MultiheadAttention(6, 2, kdim=4, vdim=5, bias=False)
    names = {t.name: t.shape for e in convert.layout_of(wide).entries for t in e.flax}
    assert names["key.kernel"] == (4, 6)
    assert names["value.kernel"] == (5, 6)


def test_a_name_that_is_taken_and_what_flax_cannot_say_stay_as_they_are() -> None:
    layout, notices = derive_layout(Lora(taken=True))
    assert layout.shapes("nnx")["weight"] == (4, 3)
    assert "weight" in notices[0]
    both = nn.MultiheadAttention(4, 2)
    both.query = nn.Linear(4, 4)
    layout, notices = derive_layout(both)
    assert {"query.weight", "in_proj_weight", "out_proj.kernel"} <= layout.shapes("nnx").keys()
    assert "in_proj_weight" in notices[0]
    grouped, notices = derive_layout(nn.ConvTranspose2d(4, 4, 3, groups=2))
    assert grouped.shapes("nnx")["weight"] == (4, 2, 3, 3)
    assert notices


def test_wrappers_come_off_and_a_model_of_the_zoo_has_its_family_s() -> None:
    class OptimizedModule(nn.Module):  # what torch.compile gives
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._orig_mod = inner

    plain = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    inside = nn.Sequential(nn.Linear(2, 3), OptimizedModule(nn.Linear(3, 4)))
    for wrapped in (OptimizedModule(plain), nn.DataParallel(plain), inside):
        assert convert.layout_of(wrapped) == convert.layout_of(plain)
    model = zoo.get("mlp_2_3_1")
    twin = zoo.create("mlp_2_3_1", framework="torch")
    assert convert.layout_of(twin) == model.model.layout_of(model.config)


def test_what_has_no_layout() -> None:
    with pytest.raises(UsageError, match="Net is not a torch module") as e:
        convert.layout_of(nets.TorchNet)
    assert "an instance" in e.value.advice
    with pytest.raises(UsageError, match="is not a torch module"):
        convert.layout_of(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls lazy layers experimental
        lazy = nn.LazyLinear(3)
    with pytest.raises(UsageError, match="2 parameters have no shape yet"):
        convert.layout_of(lazy)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.up = nn.ConvTranspose1d(6, 4, 3, stride=2)
        self.conv = nn.Conv1d(4, 4, 3, groups=2)
        self.head = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.norm(self.emb(x)).transpose(1, 2))
        return self.head(self.conv(x).transpose(1, 2))


class FlaxDecoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.emb = nnx.Embed(7, 6, rngs=rngs)
        self.norm = nnx.LayerNorm(6, epsilon=1e-5, rngs=rngs)
        self.up = nnx.ConvTranspose(6, 4, (3,), strides=(2,), padding="VALID", rngs=rngs)
        self.conv = nnx.Conv(4, 4, (3,), padding="VALID", feature_group_count=2, rngs=rngs)
        layers = nnx.Linear(4, 5, rngs=rngs), jnp.tanh, nnx.Linear(5, 3, rngs=rngs)
        self.head = nnx.Sequential(*layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.conv(self.up(self.norm(self.emb(x)))))


def test_flax_s_own_layers_compute_the_same_with_what_it_gives(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Decoder().eval(), np.array([[0, 3, 6, 2, 5]])
    torch.save(module.state_dict(), tmp_path / "net.pt")
    layout = convert.layout_of(module)
    convert.convert(tmp_path / "net.pt", tmp_path / "net.msgpack", layout=layout)
    flax = convert.load(tmp_path / "net.msgpack", "flax", FlaxDecoder)
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(flax(jnp.asarray(x)), expected, atol=1e-5)
    assert np.abs(expected).max() > 0.1


def test_a_config_of_another_model_in_the_directory_is_left_alone(saved: Path) -> None:
    label = Label(BERT, BERT.tiny["encoder"])
    saved.with_name("config.json").write_text(label.to_config_json())
    convert.convert(saved, layout=convert.layout_of(nets.TorchNet()))
    with open_checkpoint(saved.with_name("last.flax")) as reader:
        assert not read_label(reader).hf
    assert convert.verify(saved, saved.with_name("last.flax")).verdict == "same"
    with pytest.raises(ZooError, match="not those of bert"):
        convert.verify(saved, saved)


# --- A layout from a file ---


def test_a_layout_as_users_give_it(tmp_path: Path) -> None:
    layout = Layout([*linear("up", 3, 4), param("scale", 2)])
    file = tmp_path / "layout.json"
    whole = {"format": 1, "entries": layout.to_json(), "evidence": [{"of": "up"}]}
    for data in (layout.to_json(), whole):
        file.write_text(json.dumps(data))
        for given in (layout, file, str(file), data):
            assert as_layout(given) == layout
    state = {"up.weight": torch.ones(4, 3), "up.bias": torch.zeros(4), "scale": torch.ones(2)}
    torch.save(state, tmp_path / "net.pt")
    convert.convert(tmp_path / "net.pt", tmp_path / "net.flax", layout=file)
    assert as_layout(tmp_path / "net.flax") == layout
    with pytest.raises(UsageError, match="no layout came with"):
        as_layout(tmp_path / "net.pt")
    with pytest.raises(UsageError, match="there is no layout"):
        as_layout(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("3", "is not a list of entries"),
        ("{}", 'no "format" and "entries"'),
        ('{"format": "1", "entries": []}', 'no "format" and "entries"'),
        ('{"format": 1, "entries": {}}', "is not a list of entries"),
        ('[{"kind": "param", "torch": {"a": [4]}, "flax": {"a": [5]}}]', "the ops give"),
        ('[{"kind": "param", "torch": {"a": [1e9]}, "flax": {"a": [5]}}]', "is not a shape"),
    ],
)
def test_a_file_that_is_no_layout(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "layout.json").write_text(text)
    torch.save({"a": torch.ones(4)}, tmp_path / "a.pt")
    with pytest.raises(CorruptInput, match=said) as e:
        convert.convert(tmp_path / "a.pt", layout=tmp_path / "layout.json")
    assert "layout.json" in e.value.problem
    assert len(list(tmp_path.iterdir())) == 2


def test_a_later_format_is_not_guessed_at() -> None:
    with pytest.raises(UsageError, match="format 2") as e:
        as_layout({"format": 2, "entries": []})
    assert e.value.advice == "upgrade zooconvert"


# --- The options ---


@pytest.fixture
def run() -> Callable[..., Result]:
    return lambda *arguments: CliRunner().invoke(cli, list(map(str, arguments)))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A training run of somebody's own net."""
    net = nets.torch_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.from_numpy(nets.images())).square().mean().backward()
        optimizer.step()
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 2}
    torch.save(state, tmp_path / "last.pt")
    return tmp_path / "last.pt"


def test_a_checkpoint_of_anybody_s_net_there_and_back(
    saved: Path, run: Callable[..., Result]
) -> None:
    there, back = saved.with_name("last.flax"), saved.with_name("back.pt")
    with pytest.raises(ZooError, match="no model in the zoo"):
        convert.convert(saved)
    made = run("torch2flax", saved, there, "--torch", f"{NETS}:TorchNet")
    assert made.exit_code == 0, made.output
    assert "runs its code" in made.stderr
    with open_checkpoint(there, "flax") as reader:
        assert reader.tensors["conv.kernel"].shape == (3, 3, 3, 4)
    assert run("flax2torch", there, back).exit_code == 0
    assert run("verify", saved, there).exit_code == 0
    before, after = (torch.load(p, weights_only=True) for p in (saved, back))
    for name, value in before["model"].items():
        assert torch.equal(value, after[name]), name
    states = []
    for source in (saved, back):
        net = nets.TorchNet()
        fresh = torch.optim.AdamW(net.parameters(), lr=1e-3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", zoo.LoadNotice)
            convert.load_optimizer(source, fresh, net)
        states.append(fresh.state_dict()["state"])
    assert states[0].keys() == before["optimizer"]["state"].keys()
    for key, state in before["optimizer"]["state"].items():
        for each in states:
            assert all(torch.equal(state[slot], each[key][slot]) for slot in state)


def test_inspect_lint_and_verify_take_them_too(saved: Path, run: Callable[..., Result]) -> None:
    target = f"{NETS}:TorchNet"
    file = saved.with_name("layout.json")
    file.write_text(json.dumps(convert.layout_of(nets.TorchNet()).to_json()))
    for options in (("--torch", target), ("--layout", file)):
        told = run("inspect", saved, *options)
        assert "last.pt: the given layout" in told.output
        assert "last.pt: the given layout, 11 tensors" in run("lint", saved, *options).output
        assert run("verify", saved, saved, *options).exit_code == 0
    assert run("verify", saved, saved).exit_code == 1
    x = saved.with_name("x.npy")
    np.save(x, nets.images())
    pair = f"{NETS}:torch_net", f"{NETS}:nnx_net"
    assert run("verify", *pair, "--inputs", x, "--layout", file, "--level", "bits").exit_code == 0


def test_options_that_contradict(saved: Path, run: Callable[..., Result], tmp_path: Path) -> None:
    def refused(*arguments: Any) -> tuple[str, str]:
        error = run(*arguments).exception
        assert isinstance(error, UsageError)
        return error.problem, error.advice

    target = f"{NETS}:TorchNet"
    there = "torch2flax", saved
    assert "would say too" in refused(*there, "--torch", target, "--layout", "layout.json")[0]
    assert "give the layout, or the other two" in refused(
        *there, "--torch", target, "--model", "bert"
    )
    both = f"{NETS}:torch_net", f"{NETS}:nnx_net", "--inputs", "auto", "--torch", target
    assert "are for checkpoints" in refused("verify", *both)[0]
    own = tmp_path / "own.py"
    own.write_text("import torch\nclass Net(torch.nn.Linear): pass\ndef other(): return 3\n")
    problem, advice = refused(*there, "--torch", f"{own}:Net")
    assert "needs in_features, out_features" in problem
    assert advice.endswith("def net(): return Net(in_features=..., out_features=...)")
    assert "int" in refused(*there, "--torch", f"{own}:other")[0]
    assert not saved.with_name("last.flax").exists()


def test_a_factory_takes_no_memory_where_it_can_do_without(
    tmp_path: Path, run: Callable[..., Result]
) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "import torch\n"
        "def made():\n"
        "    net = torch.nn.Linear(2, 3)\n"
        "    print('device', net.weight.device.type)\n"
        "    return net\n"
        "def reads():\n"
        "    net = made()\n"
        "    assert net.weight.sum().item() == net.weight.sum().item()\n"
        "    return net\n"
    )
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "a.pt")
    told = run("torch2flax", tmp_path / "a.pt", "--torch", f"{own}:made")
    assert "device meta" in told.stderr
    assert "device" not in told.stdout
    told = run("torch2flax", tmp_path / "a.pt", "--force", "--torch", f"{own}:reads")
    assert told.exit_code == 0
    assert "device cpu" in told.stderr
