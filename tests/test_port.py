"""`convert.port`: a torch module as source, and what a reader of it wants to see."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from port_models import (
    Activated,
    Decoder,
    Drawn,
    Draws,
    Gru,
    Lstm,
    Masked,
    NewZeros,
    OneIsOther,
    OnlyInTraining,
    OwnLinear,
    Residual,
    Stages,
    Temporal,
    Throws,
    Translator,
)

import convert
from convert.live.port_files import Port
from convert.testing import assert_same
from zoo.containers.errors import UsageError, ZooError


@pytest.fixture(scope="module")
def decoder() -> Port:
    return convert.port(Decoder, np.arange(24).reshape(2, 12) % 50)


@pytest.fixture(scope="module")
def stages() -> Port:
    torch.manual_seed(0)
    return convert.port(Stages, np.ones((2, 3, 8, 8), np.float32))


def classes(port: Port) -> dict[str, str]:
    """The source of each class, by name."""
    tree = ast.parse(port.source)
    return {x.name: ast.unparse(x) for x in tree.body if isinstance(x, ast.ClassDef)}


def test_the_source_is_proved_at_sizes_that_were_not_traced(decoder: Port) -> None:
    assert decoder.proved.verdict == "same"
    assert len(decoder.proved.rows) >= 2
    assert "same, outputs beside torch's at" in " ".join(decoder.source.split())


def test_a_block_is_written_once_with_its_loop_and_the_source_names(decoder: Port) -> None:
    found = classes(decoder)
    assert set(found) == {"Constant", "Block", "Decoder"}
    assert "for block in self.h:" in found["Decoder"]
    assert "q, k, v = jnp.split(self.c_attn(y), 3, axis=2)" in found["Block"]
    assert "B, T, C = y.shape" in found["Block"]
    assert "k.reshape(B, T, self.n_head, -1)" in found["Block"]
    assert "self.bias[..., :T, :T] == 0" in found["Block"]


def test_arguments_of_constructors_are_torchs(decoder: Port, stages: Port) -> None:
    block, basic = classes(decoder)["Block"], classes(stages)["Basic"]
    assert "def __init__(self, d: int, h: int, *, rngs: nnx.Rngs)" in block
    assert "self.n_head = h" in block
    assert "self.c_attn = nnx.Linear(d, 3 * d, rngs=rngs)" in block
    assert "def __init__(self, inplanes: int, planes: int, stride: int=1" in basic
    assert "nnx.Conv(inplanes, planes, (3, 3), strides=stride, padding=1" in basic


def test_a_tied_head_has_no_weights_of_its_own(decoder: Port) -> None:
    model = classes(decoder)["Decoder"]
    assert "self.head" not in model
    assert "x @ self.emb.embedding[...].T" in model


def test_an_optional_part_is_a_condition_and_not_a_second_class(stages: Port) -> None:
    found = classes(stages)
    assert set(found) == {"Basic", "Stages"}
    assert "if self.downsample is not None:" in found["Basic"]
    assert "identity = self.downsample(x)" in found["Basic"]
    assert "identity = x" in found["Basic"]
    assert "downsample=True" in found["Stages"]


def test_it_is_a_module_that_trains_and_has_torchs_weights(stages: Port) -> None:
    from flax import nnx

    net = stages.net()
    kernel = np.asarray(net.conv1.kernel[...])
    held = stages.module.conv1.weight.detach().numpy()
    assert np.array_equal(kernel, held.transpose(2, 3, 1, 0))
    before = np.asarray(net.bn1.mean[...])
    net.train()
    net(np.ones((2, 8, 8, 3), np.float32))
    assert not np.array_equal(before, np.asarray(net.bn1.mean[...]))
    assert nnx.state(net, nnx.BatchStat)


def test_files_are_written_and_an_edited_one_is_left_alone(decoder: Port, tmp_path: Path) -> None:
    path = tmp_path / "net_flax.py"
    written = {p.name for p in decoder.save(path, test=True)}
    assert written == {
        "net_flax.py", "net_flax.layout.json", "net_flax.safetensors",
        "test_net_flax.py", "test_net_flax.npz",
    }  # fmt: skip
    assert decoder.save(path, weights=False)[0] == path
    path.write_text("# mine\n" + path.read_text())
    assert decoder.save(path, weights=False)[0].name == "net_flax.py.new"
    assert path.read_text().startswith("# mine")


def test_the_saved_file_and_its_weights_are_a_model(
    decoder: Port, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder.save(tmp_path / "own_flax.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    import own_flax  # type: ignore[import-not-found]

    net = convert.load(tmp_path / "own_flax.safetensors", "flax", own_flax.Decoder)
    assert_same(decoder.module, net, np.arange(20).reshape(2, 10) % 50)


def test_the_command_writes_it_and_says_what_was_proved(tmp_path: Path) -> None:
    here = Path(__file__).parent
    np.savez(tmp_path / "x.npz", x=np.ones((2, 4), np.float32))
    command = [
        sys.executable, "-m", "convert", "port", str(here / "port_models.py") + ":Residual",
        "--inputs", "x.npz", "-o", "net.py",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300
    )
    assert "class Residual" in done.stdout
    assert "verified: level outputs: same" in done.stdout
    source = (tmp_path / "net.py").read_text()
    assert "From port_models.Residual." in source
    assert str(tmp_path) not in source
    assert str(here) not in source
    assert (tmp_path / "net.report.html").stat().st_size > 1000


@pytest.mark.parametrize("name", ["net", "my-net.py", "nowhere/net.py"])
def test_a_name_that_cannot_be_imported_is_refused_before_work(name: str, tmp_path: Path) -> None:
    from convert.live.port_files import check_name

    with pytest.raises(UsageError):
        check_name(tmp_path / name)


def test_what_train_mode_does_besides_is_told() -> None:
    port = convert.port(OnlyInTraining(), np.ones((2, 4), np.float32))
    (told,) = [n for n in port.proved.notices if "train mode" in n]
    assert "randn_like.default at port_models.py:" in told
    assert "what train mode does besides is left out" in " ".join(port.source.split())
    assert str(Path(__file__).parent) not in port.source


def test_a_layer_of_ones_own_hides_nothing_of_train_mode() -> None:
    port = convert.port(OwnLinear, np.ones((2, 4), np.float32))
    assert any("train mode" in told for told in port.proved.notices)
    assert "nnx.Linear" in port.source


def test_a_table_that_no_expression_gives_lies_beside_the_source(tmp_path: Path) -> None:
    port = convert.port(Drawn, np.ones((2, 4), np.float32))
    assert port.proved.verdict == "same"
    written = {p.name for p in port.save(tmp_path / "own.py", weights=False)}
    assert "own.npz" in written


def test_a_size_that_the_source_is_not_for_is_baked_in() -> None:
    port = convert.port(OneIsOther(), np.ones((2, 4), np.float32))
    assert any(">= 2" in told for told in port.proved.baked)


@pytest.mark.parametrize("model", [Gru, Lstm, NewZeros, Temporal], ids=lambda m: m.__name__)
def test_it_is_written_and_right(model: type) -> None:
    port = convert.port(model, np.random.default_rng(0).normal(size=(2, 5, 4)).astype("float32"))
    assert port.proved.verdict == "same"


def test_a_part_under_two_names_is_one() -> None:
    port = convert.port(Temporal, np.ones((2, 5, 4), np.float32), verify=False)
    source = " ".join(port.source.split())
    assert "Sequential(self.conv, jax.nn.relu, self.drop, self.conv)" in source
    assert "nnx.List([self.twice, Residual(rngs=rngs), self.twice])" in source


def test_a_recurrent_layer_stays_one() -> None:
    port = convert.port(Lstm, np.ones((2, 5, 4), np.float32), verify=False)
    assert "x, (h, _) = self.lstm(x)" in port.source


def test_what_cannot_be_source_is_refused() -> None:
    with pytest.raises(ZooError):
        convert.port(Masked, np.ones((2, 4), np.float32))


def test_what_draws_is_compared_with_the_same_draws() -> None:
    torch.manual_seed(0)
    port = convert.port(Draws, np.random.default_rng(0).normal(size=(2, 4)).astype("float32"))
    assert port.proved.verdict == "same"
    assert not any("random" in told for told in port.proved.notices)
    assert "jax.random.normal(self.rngs(), " in port.source
    assert "logvar = self.logvar(x)" in port.source
    net, x = port.net(), np.ones((2, 4), np.float32)
    assert not np.array_equal(net(x)[0], net(x)[0])
    assert np.array_equal(net(x)[1], net(x)[1])


def test_what_draws_otherwise_is_written_and_said_not_to_be_compared() -> None:
    port = convert.port(Throws, np.ones((2, 4), np.float32))
    assert any("not compared" in told for told in port.proved.notices)
    port.net()(np.ones((2, 4), np.float32))


def test_calls_that_differ_by_a_word_are_told_it() -> None:
    port = convert.port(Activated, np.ones((2, 4), np.float32))
    assert port.proved.verdict == "same"
    found = classes(port)["Spoken"]
    assert "def __call__(self, x: Array, kind: str) -> Array:" in found
    assert "if kind == 'squared':" in found
    assert "self.first(x, 'plain')" in classes(port)["Activated"]


def test_an_argument_may_be_left_out_and_an_embedding_be_shared() -> None:
    torch.manual_seed(0)
    ids = np.arange(1, 15).reshape(2, 7) % 20
    port = convert.port(Translator, (ids, ids[:, :5]))
    assert port.proved.verdict == "same"
    found = classes(port)
    attending = found["Attending"]
    assert "context: Array | None=None, mask: Array | None=None" in attending
    assert "if mask is not None:" in attending
    assert "if context is None:" in attending or "if context is not None:" in attending
    assert port.source.count("nnx.Embed(") == 1


def test_what_is_no_torch_module_is_refused() -> None:
    with pytest.raises(UsageError, match="int is no torch module"):
        convert.port(3, np.ones((2, 4), np.float32))


def test_no_proof_is_said(tmp_path: Path) -> None:
    made = convert.port(Residual(), np.ones((2, 4), np.float32), verify=False)
    assert made.proved.verdict == "not proved"
    assert "not proved" in made.source
