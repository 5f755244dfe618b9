"""`convert.match`: which tensor of anybody's model is which, or what is open."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import convert
from convert.cli.main import cli
from convert.matching.assignment import assign
from convert.matching.by_values import fingerprint, reorders
from convert.matching.evidence import OpenMatch
from convert.matching.groups import grouped
from convert.matching.vocabulary import said
from zoo.containers.errors import UsageError, ZooError
from zoo.layout import Layout
from zoo.layout.ops import Permute, Reorder, run

ROOT = Path(__file__).parents[1]
CASES = ROOT / "scripts" / "match_cases" / "open"
# Of the half that was sealed, those that taught something.
TAUGHT = ("distilbert_own", "t5_t5x", "wav2vec2_linen_scan", "whisper_maxtext")
PATHS = [
    *sorted(CASES.glob("*.py")),
    *(CASES.parent / "sealed" / f"{name}.py" for name in TAUGHT),
]
sys.path.insert(0, str(ROOT / "scripts"))
import match_cases  # noqa: E402

Arrays = dict[str, np.ndarray]
# What is open by names alone, and why: nothing in the names tells it.
OPEN_BY_NAMES = {
    "distilbert_own": "several orders",  # a square `wo`, and nothing that votes
    "convnext_equinox": "only in PyTorch",  # features.layers.1.layers.0.block.layers.2
    "gemma2_bonsai": "embed_scale",  # a scalar that torch does not have
    "gemma2_deepmind": "rotary",
    "gpt_neox_linen_scan": "rotary",
    "llama_easylm": "rotary",
    "llama_maxtext": "rotary",
    "mixtral_maxtext": "rotary",
}


def saved(folder: Path, torch: Arrays, flax: Arrays) -> tuple[Path, Path]:
    from safetensors.numpy import save_file

    files = folder / "torch.safetensors", folder / "flax.safetensors"
    for file, arrays in zip(files, (torch, flax), strict=True):
        save_file({n: np.asarray(x, order="C") for n, x in arrays.items()}, file)
    return files


def some(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore")
def test_cases(path: Path, tmp_path: Path) -> None:
    """Equal weights: right. Names alone: right, or open for a reason that is known; never wrong."""
    case = match_cases.load(path)
    torch = case.torch_side()
    flax = case.flax_side(dict(torch))
    row = match_cases.outcome(torch, flax, flax, case, tmp_path)
    if path.stem == "gemma2_bonsai":
        assert "embed_scale" in row["open"][1]
    else:
        assert row["outcome"] == "right", row
        assert row["checked"]
    row = match_cases.outcome(torch, match_cases.fresh(flax), flax, case, tmp_path)
    if path.stem in OPEN_BY_NAMES:
        assert row["outcome"] == "refused"
        assert any(OPEN_BY_NAMES[path.stem] in line for line in row["open"])
    else:
        assert row["outcome"] == "right", row
        assert not row["checked"]


@pytest.mark.parametrize("mode", ["values", "names"])
@pytest.mark.parametrize("name", ["vit_hf_flax", "gpt2_levanter"])
@pytest.mark.filterwarnings("ignore")
def test_mutations(name: str, mode: str, tmp_path: Path) -> None:
    """A tensor missing, or a layer more, is refused; values find exchanged tensors."""
    case = match_cases.load(CASES / f"{name}.py")
    torch = case.torch_side()
    flax = case.flax_side(dict(torch))
    changed = match_cases.mutations(torch, flax, case, np.random.default_rng(3))
    seen: dict[str, list[str]] = {}
    for (kind, t, f), _ in zip(changed, range(16), strict=False):
        held = f if mode == "values" else match_cases.fresh(f)
        row = match_cases.outcome(t, held, f, case, tmp_path)
        seen.setdefault(kind, []).append(row["outcome"])
        if kind == "exchanged" and mode == "names":
            assert row["outcome"] == "refused" or not row["checked"]
        else:
            assert row["outcome"] != "wrong", (kind, row)
    assert set(seen["missing"]) == set(seen["more"]) == {"refused"}
    assert "right" in seen["renamed"]
    if mode == "values":
        assert set(seen["exchanged"]) == {"right"}


# --- What settles what is open ---


def pair_of_rotary(folder: Path, fresh: bool = True) -> tuple[Path, Path]:
    """A layer of attention whose features Flax keeps in pairs."""
    torch = {
        f"layers.{i}.self_attn.{p}_proj.weight": some(8, 12, seed=10 * i + k)
        for i in range(2) for k, p in enumerate("qkv")
    }  # fmt: skip
    flax = {}
    for i in range(2):
        for p, word in zip("qkv", ("query", "key", "value"), strict=True):
            x = torch[f"layers.{i}.self_attn.{p}_proj.weight"].T.reshape(12, 2, 4)
            if p != "v":
                x = x.reshape(12, 2, 2, 2).swapaxes(2, 3).reshape(12, 2, 4)
            flax[f"blocks.{i}.attention.{word}.kernel"] = x
    return saved(folder, torch, match_cases.fresh(flax) if fresh else flax)


def test_rotary(tmp_path: Path) -> None:
    with pytest.raises(OpenMatch, match=r"--rotary same\|pairs"):
        convert.match(*pair_of_rotary(tmp_path))
    layout = convert.match(*pair_of_rotary(tmp_path), rotary="pairs")
    ops = {e.flax[0].name: e.ops for e in layout.entries}
    turn = Reorder(2, (2, 2), (1, 0))
    assert ops["blocks.0.attention.query.kernel"][-1] == turn
    assert ops["blocks.0.attention.value.kernel"][-1] != turn
    assert convert.match(*pair_of_rotary(tmp_path, fresh=False)) == layout
    assert convert.match(*pair_of_rotary(tmp_path), rotary="same") != layout
    with pytest.raises(UsageError, match="'same' or 'pairs'"):
        convert.match(*pair_of_rotary(tmp_path), rotary="halves")


def test_pairs_settle_what_names_do_not(tmp_path: Path) -> None:
    torch = {"left.weight": some(4, 4), "right.weight": some(4, 4, seed=1), "only": some(3)}
    flax = {"one.kernel": some(4, 4, seed=2), "other.kernel": some(4, 4, seed=3)}
    files = saved(tmp_path, torch, flax)
    with pytest.raises(OpenMatch) as e:
        convert.match(*files)
    assert {o.torch[0] for o in e.value.open} == {"left.weight", "right.weight", "only"}
    assert "--pair" in e.value.advice
    layout = convert.match(*files, pairs={"left.weight": "other.kernel", "only": ""})
    of = {e.torch[0].name: e for e in layout.entries}
    assert of["left.weight"].flax[0].name == "other.kernel"
    assert of["right.weight"].flax[0].name == "one.kernel"
    assert of["left.weight"].ops == (Permute((1, 0)),)  # a kernel, whatever its shape
    assert of["only"].constant is not None
    assert [x.by for x in layout.evidence if x.torch == ("left.weight",)] == ["given"]
    with pytest.raises(UsageError, match=r"no 'nowhere'.*no 'neither'"):
        convert.match(*files, pairs={"nowhere": "one.kernel", "left.weight": "neither"})


def test_a_square_matrix_of_no_known_name_is_open(tmp_path: Path) -> None:
    """`w` means nothing; rectangular ones of the name tell, where there are any."""
    torch = {"mix.weight": some(4, 4), "up.weight": some(6, 4)}
    files = saved(tmp_path, torch, {"mix.w": some(4, 4, seed=5)})
    with pytest.raises(OpenMatch, match="several orders of axes"):
        convert.match(*saved(tmp_path, {"mix.weight": some(4, 4)}, {"mix.w": some(4, 4, seed=5)}))
    for up, ops in (((6, 4), ()), ((4, 6), (Permute((1, 0)),))):
        files = saved(tmp_path, torch, {"mix.w": some(4, 4, seed=5), "up.w": some(*up, seed=6)})
        layout = convert.match(*files)
        assert {e.ops for e in layout.entries} == {ops}
        assert [e.axes for e in layout.evidence] == ["vote", "shape"]


def test_ties_and_counters(tmp_path: Path) -> None:
    table = some(9, 4)
    torch = {
        "embed.weight": table, "head.weight": table, "norm.weight": some(4),
        "norm.num_batches_tracked": np.int64(3),
    }  # fmt: skip
    flax = {"embed.embedding": table, "norm.scale": some(4), "step": np.int32(7)}
    layout = convert.match(*saved(tmp_path, torch, flax))
    of = {e.torch[0].name: e for e in layout.entries}
    assert of["head.weight"].tied_to == "embed.weight"
    assert of["norm.num_batches_tracked"].constant is not None
    assert any("only PyTorch has" in line for line in layout.notices)
    assert any("step" in line for line in layout.notices)  # what is no weight is told


def test_a_kernel_that_flax_keeps_flipped(tmp_path: Path) -> None:
    """As one framework's transposed convolution lies in the other: only values tell."""
    kernel = some(3, 5, 4, 2)
    flax = {"up.kernel": np.flip(kernel, (2, 3)).transpose(2, 3, 0, 1)}
    (entry,) = convert.match(*saved(tmp_path, {"up.weight": kernel}, flax)).entries
    assert np.array_equal(run(entry.ops, [kernel])[0], flax["up.kernel"])


def test_an_entry_s_evidence_tells_its_ops(tmp_path: Path) -> None:
    """Whatever paired them; and statistics are in their collection."""
    torch = {"bn.running_mean": some(6), "bn.weight": some(6, seed=1), "down.weight": some(6, 4)}
    flax = {"batch_stats.bn.mean": some(6), "params.bn.scale": some(6, seed=1),
            "params.dense.kernel": some(4, 6, seed=2)}  # fmt: skip
    pairs = {"down.weight": "dense.kernel"}
    layout = convert.match(*saved(tmp_path, torch, flax), pairs=pairs)
    of = {e.torch[0].name: e for e in layout.entries}
    assert of["bn.running_mean"].collection == "batch_stats"
    assert of["bn.weight"].collection == "params"
    (found,) = (e for e in layout.evidence if e.torch == ("down.weight",))
    assert (found.by, found.ops) == ("given", "permute(1,0)")


def test_a_projection_called_key_is_not_a_random_key(tmp_path: Path) -> None:
    torch = {f"{p}.weight": some(4, 6, seed=i) for i, p in enumerate(("query", "key", "value"))}
    flax = {f"{n.removesuffix('weight')}kernel": x.T for n, x in torch.items()}
    layout = convert.match(*saved(tmp_path, torch, flax))
    assert {e.torch[0].name for e in layout.entries} == set(torch)


def test_sides_given_in_the_other_order(tmp_path: Path) -> None:
    torch = {"a.weight": some(4, 6), "b.weight": some(6, 4)}
    files = saved(tmp_path, torch, {n.replace("weight", "kernel"): x.T for n, x in torch.items()})
    assert len(convert.match(*files).entries) == 2
    with pytest.raises(UsageError, match="the first side has Flax's names"):
        convert.match(*reversed(files))


def test_gates_apart_and_one_bias_for_two(tmp_path: Path) -> None:
    """Gates are found by their values; the sum of two biases is no layout's."""
    torch = {"rnn.weight_ih_l0": some(20, 3), "rnn.weight_hh_l0": some(20, 5, seed=1),
             "rnn.bias_ih_l0": some(20, seed=2), "rnn.bias_hh_l0": some(20, seed=3)}  # fmt: skip
    flax = {f"cell.{x}{g}.kernel": torch[f"rnn.weight_{x}h_l0"][5 * i : 5 * i + 5].T
            for x in "ih" for i, g in enumerate("ifgo")}  # fmt: skip
    sums = torch["rnn.bias_ih_l0"] + torch["rnn.bias_hh_l0"]
    biases = {f"cell.h{g}.bias": sums[5 * i : 5 * i + 5] for i, g in enumerate("ifgo")}
    with pytest.raises(OpenMatch, match="are two biases of one layer") as e:
        convert.match(*saved(tmp_path, torch, flax | biases))
    assert {n for o in e.value.open for n in o.torch} == {"rnn.bias_ih_l0", "rnn.bias_hh_l0"}


def test_the_document_is_the_layout(tmp_path: Path) -> None:
    layout = convert.match(*pair_of_rotary(tmp_path, fresh=False))
    layout.save(tmp_path / "layout.json")
    data = json.loads((tmp_path / "layout.json").read_text())
    assert Layout.from_json(data["entries"]) == layout
    assert data["evidence"][0]["checked"] == "values"
    assert sum(e["entries"] for e in data["evidence"]) == len(layout.entries)


def test_a_model_that_was_tuned_on_one_side(tmp_path: Path) -> None:
    """What stayed equal does not make what was trained another tensor."""
    torch = {f"h.{i}.{p}.weight": some(5, 7 + k, seed=i) for i in range(2)
             for k, p in enumerate(("up", "gate", "value"))}  # fmt: skip
    flax = {n.replace("weight", "kernel"): x.T for n, x in torch.items()}
    tuned = {n: x if "gate" in n else x + 1 for n, x in flax.items()}
    layout = convert.match(*saved(tmp_path, torch, tuned))
    assert not layout.checked
    assert layout == convert.match(*saved(tmp_path, torch, flax))


# --- Modules ---


def nets() -> tuple[Any, Any, Any]:
    """A torch net, a Flax one of the same sort with other names and weights, and inputs."""
    import torch
    from flax import nnx

    class Torch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
            self.bn = torch.nn.BatchNorm2d(4)
            self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x: Any) -> Any:
            x = torch.relu(self.bn(self.conv(x))).mean((2, 3))
            return self.second(torch.tanh(self.first(x)))

    class Flax(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.kqz = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.wvy = nnx.BatchNorm(4, rngs=rngs)
            self.bbb = nnx.Linear(4, 4, rngs=rngs)
            self.aaa = nnx.Linear(4, 4, rngs=rngs)
            self.activation = nnx.tanh

        def __call__(self, x: Any) -> Any:
            x = nnx.relu(self.wvy(self.kqz(x), use_running_average=True)).mean((1, 2))
            return self.aaa(self.activation(self.bbb(x)))

    torch.manual_seed(0)
    return Torch().eval(), Flax(nnx.Rngs(0)), some(2, 3, 5, 5)


def test_modules_are_matched_by_running_them() -> None:
    """Names say nothing; the order of execution does, and the outputs confirm it."""
    ours, theirs, x = nets()
    with pytest.raises(ZooError, match="open"):
        convert.match(ours, theirs)
    layout = convert.match(ours, theirs, x)
    of = {e.torch[0].name: e.flax[0].name for e in layout.entries if e.flax}
    assert of["first.weight"] == "bbb.kernel"
    assert of["second.weight"] == "aaa.kernel"
    assert of["bn.running_var"] == "wvy.var"
    assert layout.checked
    assert {e.checked for e in layout.evidence} == {"outputs"}


def test_what_gives_other_outputs_is_refused() -> None:
    from flax import nnx

    ours, theirs, x = nets()
    theirs.activation = nnx.relu
    with pytest.raises(ZooError, match="Flax's outputs are others"):
        convert.match(ours, theirs, x)
    with pytest.raises(UsageError, match="a checkpoint cannot be run"):
        convert.match("a.safetensors", theirs, x)


# --- The parts ---


def test_layers_are_counted_and_parts_are_not() -> None:
    names = [f"h.{i}.{p}.weight" for i in range(3) for p in ("norm1", "norm2", "attn.0", "attn.2")]
    groups = {g.name: g.sizes for g in grouped(dict.fromkeys(names, (2,)))}
    assert groups == {
        "h.#.norm1.weight": (3,), "h.#.norm2.weight": (3,),
        "h.#.attn.0.weight": (3,), "h.#.attn.2.weight": (3,),
    }  # fmt: skip


def test_a_layer_that_calls_a_tensor_otherwise() -> None:
    names = [f"h.{i}.{p}.weight" for i in range(3) for p in ("q_proj", "k_proj")]
    renamed = ["h.1.qproj.weight" if n == "h.1.q_proj.weight" else n for n in names]
    groups = {g.name: len(g.members) for g in grouped(dict.fromkeys(renamed, (2,)))}
    assert groups == {"h.#.q_proj.weight": 3, "h.#.k_proj.weight": 3}


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("self_attn.q_proj.weight", "proj:q"),
        ("MultiHeadDotProductAttention_0.query.kernel", "proj:q"),
        ("attention.wq.kernel", "proj:q"),
        ("mlp.gate_up_proj.weight", "proj:gateup"),
        ("attn.qkv_proj.kernel", "proj:qkv"),
        ("wte.embedding", "table:token"),
    ],
)
def test_words(name: str, meaning: str) -> None:
    assert meaning in said(name.split(".")).meanings


def test_margins() -> None:
    """What forbidding a pair costs: here the exchange with the one other."""
    scores = {(0, 0): 5.0, (0, 1): 1.0, (1, 0): 2.0, (1, 1): 3.0, (2, 2): 4.0}
    assert assign(scores) == {(0, 0): 5.0, (1, 1): 3.0, (2, 2): 4.0}
    assert assign({(0, 0): 1.0, (0, 1): 1.0, (1, 0): 1.0, (1, 1): 1.0})[0, 0] == 0.0


def test_fingerprints_stay_under_every_op_and_add_up() -> None:
    x, y = some(4, 6), some(4, 6, seed=1)
    assert fingerprint(x.T.reshape(2, 12)) == fingerprint(x) != fingerprint(y)
    assert fingerprint(np.stack([x, y])) == fingerprint(x) + fingerprint(y)
    assert fingerprint(np.ones(3, np.float32)).plain


def test_reorders() -> None:
    x = some(3, 24)
    op = Reorder(1, (2, 3, 4), (2, 1, 0))
    assert next(reorders(x, run([op], [x])[0])) == op
    assert not list(reorders(x, some(3, 24, seed=1)))


# --- The command ---


def test_command(tmp_path: Path) -> None:
    files = [str(f) for f in pair_of_rotary(tmp_path, fresh=False)]
    out, page = tmp_path / "layout.json", tmp_path / "page.html"
    done = CliRunner().invoke(
        cli, ["match", *files, "-o", str(out), "--report", str(page)], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "6 tensors paired: 6 by values" in done.output
    assert json.loads(out.read_text())["format"] == 1
    assert "reorder(2,2x2,1x0)" in page.read_text()


def test_command_says_what_is_open(tmp_path: Path) -> None:
    files = [str(f) for f in pair_of_rotary(tmp_path)]
    page = tmp_path / "page.html"
    done = CliRunner().invoke(cli, ["match", *files, "--json", "--report", str(page)])
    assert isinstance(done.exception, OpenMatch)
    data = json.loads(done.stdout)
    assert {o["torch"][0] for o in data["open"]} == {
        "layers.#.self_attn.q_proj.weight", "layers.#.self_attn.k_proj.weight",
    }  # fmt: skip
    assert "rotary features" in page.read_text()
