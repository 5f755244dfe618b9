"""Other spellings of one layout: upstream's names, stacked layers; read, written, and between."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from flax import serialization
from safetensors.torch import load_file
from support import Arrays, bits, canonical, write

import convert
import zoo
from convert.api import plan
from convert.cli.main import cli
from convert.training_state.besides import read_training
from zoo import registry
from zoo.checkpoint.identification import identify_header
from zoo.checkpoint.label import Label
from zoo.containers import open_checkpoint
from zoo.containers.base import TensorInfo
from zoo.containers.errors import UsageError, ZooError
from zoo.containers.safetensors_file import SafetensorsWriter
from zoo.layout import STACKED, Layout, Renames, between, conv, linear, paired
from zoo.layout.ops import Divide, Each, Permute, describe, each, inverse, run, run_shapes
from zoo.model import Config, Dialect, Model
from zoo.models.resnet import MODEL as RESNET
from zoo.models.resnet.dialects import from_hf, to_hf
from zoo.registry import families, side_of

DATA = Path(__file__).parent / "data"
# What transformers can be told to make.
UPSTREAM = {n: c for n, c in RESNET.tiny.items() if n != "small_images"}


def spellings(layout: Layout) -> list[str]:
    """Those that not every layout has."""
    return [*layout.dialects, *(STACKED if layout.stacks else ())]


SPELLED = [
    pytest.param(m, c, id=f"{m.name}-{n}")
    for m in families().values()
    for n, c in m.tiny.items()
    if spellings(m.layout_of(c))
]


def hf_model(c: Config) -> Any:
    torch.manual_seed(0)
    data = to_hf(c)
    (name,) = data["architectures"]
    return getattr(transformers, name)(transformers.ResNetConfig(**data))


def torch_file(folder: Path, model: Model, config: Config) -> tuple[Path, Arrays]:
    arrays = canonical(model, config)
    return write(SafetensorsWriter, folder / "model.safetensors", arrays), arrays


def contents(path: Path) -> dict[str, Any]:
    with open_checkpoint(path) as reader:
        return {name: bits(reader.read(name)) for name in reader.tensors}


# --- Recognised, written and read ---


@pytest.mark.parametrize(("model", "config"), SPELLED)
def test_names_tell_the_spelling(model: Model, config: Config) -> None:
    layout = model.layout_of(config)
    for tree in spellings(layout):
        header = {n: TensorInfo("F32", s) for n, s in layout.shapes(tree).items()}
        found = [c for c in identify_header(header, Label()) if c.model is model]
        assert {c.tree for c in found} == {tree}
        assert found[0].layout.shapes("torch") == layout.shapes("torch")


@pytest.mark.parametrize(("model", "config"), SPELLED)
def test_there_and_back_by_every_spelling(model: Model, config: Config, tmp_path: Path) -> None:
    """Written from torch's names, and from one another; back without a flag, bit for bit."""
    src, arrays = torch_file(tmp_path, model, config)
    told = {"model": model.name, "config": Label(model, config)._data()["config"]}
    last = src
    for tree in spellings(model.layout_of(config)):
        side = side_of(tree)
        made = tmp_path / (f"{tree}.msgpack" if side == "flax" else f"{tree}.safetensors")
        certificate = convert.convert(last, made, dialect=tree, **told)
        assert certificate.target_tree == tree
        back = tmp_path / f"from-{tree}.safetensors"
        convert.convert(made, back, dialect="torch")
        assert contents(back).items() >= {n: bits(x) for n, x in arrays.items()}.items()
        last, told = made, {}


@pytest.mark.parametrize(("model", "config"), SPELLED)
def test_the_same_tensors_in_any_spelling(model: Model, config: Config, tmp_path: Path) -> None:
    """`verify` compares what stands in a stack with what stands alone, either way round."""
    src, arrays = torch_file(tmp_path, model, config)
    told = {"model": model.name, "config": Label(model, config)._data()["config"]}
    (name, first), *_ = arrays.items()
    wrong = arrays | {name: first + 1}
    other = write(SafetensorsWriter, tmp_path / "other.safetensors", wrong)
    for tree in spellings(model.layout_of(config)):
        suffix = "msgpack" if side_of(tree) == "flax" else "safetensors"
        made = tmp_path / f"{tree}.{suffix}"
        convert.convert(src, made, dialect=tree, **told)
        for sides in ((src, made), (made, src)):
            report = convert.verify(*sides, **told)
            assert report.verdict == "same"
            assert report.compared >= len(arrays)
        report = convert.verify(other, made, **told)
        assert {d.name for d in report.differences} == {name.removeprefix(model.base_prefix)}


@pytest.mark.parametrize("name", UPSTREAM)
def test_resnet_as_transformers_has_it(name: str, tmp_path: Path) -> None:
    """Names, order and config are transformers' own; it loads what is written."""
    c = UPSTREAM[name]
    model = hf_model(c).eval()
    state = {n: tuple(x.shape) for n, x in model.state_dict().items()}
    assert list(RESNET.layout_of(c).shapes("transformers").items()) == list(state.items())
    assert from_hf(model.config.to_dict()) == from_hf(to_hf(c)) == c
    model.save_pretrained(tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "net.flax")
    convert.convert(tmp_path / "net.flax", tmp_path / "back")  # its own names, without a flag
    again = type(model).from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(again[n], v) for n, v in model.state_dict().items())
    x = torch.randn(1, c.in_channels, 64, 64)
    ours = zoo.load(tmp_path / "hf", "torch")
    torch.testing.assert_close(ours(x), model(x).logits)


def test_torch_to_torch(tmp_path: Path) -> None:
    """torchvision's names from transformers', and theirs again; the config.json is told apart."""
    c = UPSTREAM["basic"]
    model = hf_model(c)
    model.save_pretrained(tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "tv", dialect="torchvision")
    state = load_file(tmp_path / "tv" / "model.safetensors")
    stem = model.state_dict()["resnet.embedder.embedder.convolution.weight"]
    assert torch.equal(state["conv1.weight"], stem)
    assert set(json.loads((tmp_path / "tv" / "config.json").read_text())) == {"zoo"}
    convert.convert(tmp_path / "tv", tmp_path / "again", dialect="transformers")
    data = json.loads((tmp_path / "again" / "config.json").read_text())
    assert data["id2label"] == {str(i): f"LABEL_{i}" for i in range(c.num_classes)}
    assert data["transformers_version"], "what it wrote is kept"
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["basic", "bottleneck", "model"])
def test_resnet_as_the_flax_of_transformers_4_has_it(name: str) -> None:
    """Names and shapes of files that transformers 4.46 wrote."""
    theirs = json.loads((DATA / "flax_resnet.json").read_text())[name]
    c = from_hf(
        theirs["config"] | {"architectures": ["ResNetModel"]}
        if name == "model"
        else theirs["config"]
    )
    shapes = {n: list(s) for n, s in RESNET.layout_of(c).shapes("transformers-flax").items()}
    assert dict(sorted(shapes.items())) == theirs["tensors"]


def test_a_bottleneck_without_a_head_is_recognised() -> None:
    c = dataclasses.replace(UPSTREAM["bottleneck"], num_classes=0)
    for tree in ("transformers", "transformers-flax"):
        shapes = RESNET.layout_of(c).shapes(tree)
        (found,) = identify_header({n: TensorInfo("F32", s) for n, s in shapes.items()}, Label())
        assert (found.tree, found.config) == (tree, c)


def test_a_stem_that_transformers_does_not_have(tmp_path: Path) -> None:
    config = RESNET.tiny["small_images"]
    src, _ = torch_file(tmp_path, RESNET, config)
    fields = {"model": "resnet", "config": Label(RESNET, config)._data()["config"]}
    told = plan(src, tmp_path / "hf", dialect="transformers", **fields).notices
    assert any("transformers has no such model" in line for line in told)
    convert.convert(src, tmp_path / "hf", dialect="transformers", **fields)
    assert set(json.loads((tmp_path / "hf" / "config.json").read_text())) == {"zoo"}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; here it is 'relu'"),
        ({"downsample_in_bottleneck": True}, "downsample_in_bottleneck is True"),
        ({"hidden_sizes": [4, 8, 8, 8]}, r"hidden_sizes \[4, 8, 8, 8\]"),
    ],
)
def test_a_resnet_that_is_not_ours(changed: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        from_hf(to_hf(UPSTREAM["basic"]) | changed)


@pytest.mark.parametrize("named", [False, True])
def test_an_optimizer_comes_along(named: bool, tmp_path: Path) -> None:
    """transformers defines a block's shortcut before its layers, torchvision after them."""
    model = hf_model(UPSTREAM["basic"])
    parameters = model.named_parameters() if named else model.parameters()
    optimizer = torch.optim.AdamW(parameters, 1e-3)
    model(torch.randn(2, 3, 64, 64)).logits.square().sum().backward()
    optimizer.step()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "last.pt")
    shortcut = model.resnet.encoder.stages[1].layers[0].shortcut.convolution.weight
    (state,) = read_training(tmp_path / "last.pt").optimizers
    moment = state.slots["exp_avg"]["layer2.0.downsample.0.weight"]
    assert np.array_equal(moment, optimizer.state[shortcut]["exp_avg"].numpy())


# --- Stacked layers ---


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 10), torch.nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(*(Block() for _ in range(3)))
        self.head = torch.nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x))


class LinenBlock(nn.Module):
    def setup(self) -> None:
        self.up, self.down = nn.Dense(10), nn.Dense(6)

    def __call__(self, x: Any, _: None) -> Any:
        return x + self.down(nn.tanh(self.up(x))), None


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        scan = nn.scan(LinenBlock, {"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = scan(name="layers")(x, None)
        return nn.Dense(2, name="head")(x)


def test_a_scanned_linen_module_takes_it(tmp_path: Path) -> None:
    """Anybody's model: the layout is that of the torch module, and comes back with the label."""
    torch.manual_seed(1)
    net, x = Net(), torch.randn(4, 6)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    layout = convert.layout_of(net)
    convert.convert(tmp_path / "net.pt", tmp_path / "net.msgpack", tree="linen-scan", layout=layout)
    tree = serialization.msgpack_restore((tmp_path / "net.msgpack").read_bytes())
    assert tree["params"]["layers"]["up"]["kernel"].shape == (3, 6, 10)
    y = jax.jit(LinenNet().apply)(tree, x.numpy())
    np.testing.assert_allclose(y, net(x).detach().numpy(), atol=1e-6)
    convert.convert(tmp_path / "net.msgpack", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt")
    assert all(torch.equal(back[n], v) for n, v in net.state_dict().items())


def test_what_is_stacked() -> None:
    """Lists of equal layers, numbered from 0; of others each keeps its number."""

    def names(*entries: Any) -> list[str]:
        layout = Layout([e for some in entries for e in some])
        return [t.name for v in layout.view("nnx-scan") for t in v.tensors if "bias" not in t.name]

    equal = [*linear("a.0", 2, 3)], [*linear("a.1", 2, 3)]
    assert names(*equal) == ["a.kernel"]
    assert names(*equal, linear("a.2", 3, 3)) == ["a.0.kernel", "a.1.kernel", "a.2.kernel"]
    assert names(linear("a.1", 2, 3), linear("a.2", 2, 3)) == ["a.1.kernel", "a.2.kernel"]
    assert names(linear("a.0", 2, 3)) == ["a.0.kernel"]
    assert names(*equal, linear("a", 2, 3)) == ["a.0.kernel", "a.1.kernel", "a.kernel"]
    inner = [linear(f"a.{i}.b.{k}", 2, 3 + i) for i in range(2) for k in range(2)]
    assert names(*inner) == ["a.0.b.kernel", "a.1.b.kernel"], "the outer ones differ"
    outer = [linear(f"a.{i}.b.{k}", 2, 3) for i in range(2) for k in range(2)]
    assert names(*outer) == ["a.b.0.kernel", "a.b.1.kernel"]


# --- The parts ---


def test_renames() -> None:
    renames = Renames((("layer{s+1}.{i}.conv{k+1}", "s.{s}.{i}.layer_{k}.conv"), ("fc", "head.1")))
    for ours, theirs in {
        "layer1.0.conv1.weight": "s.0.0.layer_0.conv.weight",
        "layer12.3.conv10": "s.11.3.layer_9.conv",
        "fc.bias": "head.1.bias",
        "fcn.bias": "fcn.bias",
        "layer0.0.conv1.weight": "layer0.0.conv1.weight",  # they count from 1
    }.items():
        assert renames.forth(ours) == theirs
        assert renames.back(theirs) == ours
    with pytest.raises(ValueError, match="have other numbers"):
        Renames((("layer{s}", "stages.{s}.{i}"),))


def test_other_ops_for_each() -> None:
    divided = (Divide(0, (2, 2)),)
    ops = each([(1, divided), (1, divided)])
    assert each([(1, (Permute((1, 0)),))] * 2) == (Permute((1, 0)),), "said once"
    arrays = [np.arange(12.0).reshape(4, 3), np.arange(12.0, 24.0).reshape(4, 3)]
    shapes = [x.shape for x in arrays]
    made = run(ops, arrays)
    assert [x.shape for x in made] == run_shapes(ops, shapes) == [(2, 3)] * 4
    back = run(inverse(ops, shapes), made)
    assert all(np.array_equal(a, b) for a, b in zip(back, arrays, strict=True))
    assert describe(ops) == "each(divide(0,2x2))"
    with pytest.raises(ValueError, match="1 arrays for"):
        Each(((2, ()),)).shapes([(1,)])


def test_pairs_of_two_spellings() -> None:
    layout = Layout([*linear("a.0", 2, 3), *linear("a.1", 2, 3), *conv("stem", 1, 2, 3, 3)])
    for source, target in (("linen-scan", "torch"), ("torch", "linen-scan"), ("nnx", "linen-scan")):
        for a, b in paired(layout.view(source), layout.view(target)):
            forth, back = between(a, b)
            assert run_shapes(forth, [t.shape for t in a.tensors]) == [t.shape for t in b.tensors]
            assert run_shapes(back, [t.shape for t in b.tensors]) == [t.shape for t in a.tensors]


# --- What is refused ---


def test_refused(tmp_path: Path) -> None:
    src, _ = torch_file(tmp_path, RESNET, RESNET.tiny["bottleneck"])
    for how, why in (
        ({"dialect": "torchvison"}, "no family has a dialect 'torchvison'"),
        ({"dialect": "transformers", "framework": "flax"}, "is one of torch's"),
        ({"dialect": "torchvision"}, "its names are those of torch already"),
        ({"dialect": "linen", "tree": "linen"}, "both name the result's tensors"),
        ({"tree": "nnx-scan"}, "no equal layers in a row that nnx-scan could stack"),
        ({"tree": "nnx-scans"}, "there is no tree 'nnx-scans'"),
    ):
        with pytest.raises(UsageError, match=why):
            convert.convert(src, tmp_path / "made", **how)
    mlp = families()["mlp"]
    (tmp_path / "mlp").mkdir()
    file, _ = torch_file(tmp_path / "mlp", mlp, next(iter(mlp.tiny.values())))
    with pytest.raises(ZooError, match="mlp has no dialect 'torchvision'"):
        convert.convert(file, tmp_path / "made", dialect="torchvision")
    assert not (tmp_path / "made").exists()


def test_two_families_cannot_mean_two_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Dialect("torchvision", "nnx", lambda c: (("conv1", "stem"),), "nobody's", ())
    other = dataclasses.replace(RESNET, name="other", called={}, dialects=(wrong,))
    with pytest.raises(UsageError, match="the dialect 'torchvision' is flax's in other"):
        registry._check_dialects([RESNET, other])


# --- The commands ---


def test_commands(tmp_path: Path) -> None:
    src, arrays = torch_file(tmp_path, RESNET, UPSTREAM["basic"])

    def run(*args: Any) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            done = CliRunner().invoke(cli, list(map(str, args)), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    out = run("respell", src, tmp_path / "hf.safetensors", "--dialect", "transformers")
    assert "safetensors, transformers names" in out
    out = run(
        "torch2flax",
        tmp_path / "hf.safetensors",
        tmp_path / "f.msgpack",
        "--dialect",
        "transformers-flax",
    )
    assert "msgpack, transformers-flax names" in out
    assert "transformers-flax names" in run("inspect", tmp_path / "f.msgpack")
    run("flax2torch", tmp_path / "f.msgpack", tmp_path / "tv.pt", "--dialect", "timm")
    returned = contents(tmp_path / "tv.pt")
    assert returned.items() >= {n: bits(x) for n, x in arrays.items()}.items()
    rows = json.loads(run("models", "resnet18", "--dialects", "--json"))
    assert {r["dialect"]: r["also"] for r in rows}["torch"] == ["torchvision", "timm"]
    assert "FlaxResNet of transformers 4" in run("models", "resnet18", "--dialects")
