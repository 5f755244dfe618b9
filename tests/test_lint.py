"""Lint says the right things of every family, of strangers' models and of pairs, in a few lines."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from support import Arrays, canonical, every_tiny, write

import convert
from convert.cli.main import cli
from convert.linting.findings import IDS, Finding, Lint, braced, ranged
from zoo.checkpoint.label import Label
from zoo.containers.errors import CorruptInput, UsageError, ZooError
from zoo.containers.safetensors_file import SafetensorsWriter
from zoo.layout.ops import Reorder
from zoo.model import Config, Model
from zoo.models.bert import MODEL as BERT
from zoo.models.convnet import MODEL as CONVNET
from zoo.registry import families

DOCS = Path(__file__).parents[1] / "docs" / "lint.md"


def save(path: Path, model: Model, config: Config, **changed: np.ndarray) -> Path:
    label = Label(model, config).to_metadata()
    return write(SafetensorsWriter, path, canonical(model, config) | changed, **label)


def header(path: Path, shapes: dict[str, tuple[int, ...]], dtype: Any = np.float32) -> Path:
    """A stranger's checkpoint: these shapes and no label."""
    return write(SafetensorsWriter, path, {n: np.zeros(s, dtype) for n, s in shapes.items()})


def ids(found: Lint) -> set[str]:
    return {f.id for f in found.findings}


def one(found: Lint, name: str) -> Finding:
    (finding,) = [f for f in found.findings if f.id == name]
    return finding


# --- Every family ---


@every_tiny()
def test_what_a_model_has_is_what_is_said_of_it(
    model: Model, config: Config, tmp_path: Path
) -> None:
    """Each finding exactly where the layout has what it is about."""
    found = convert.lint(save(tmp_path / "m.safetensors", model, config))
    entries = model.layout_of(config).entries
    tensors = [(e.kind, t) for e in entries for t in e.torch]
    kinds = {kind for kind, _ in tensors}
    spatial = any(k.startswith("conv") and max(t.shape[2:], default=1) > 1 for k, t in tensors)
    expected = {
        "epsilon": bool(kinds & {"norm", "batchnorm"}),
        "norm-variance": bool(kinds & {"norm", "batchnorm"}),
        "batchnorm-momentum": "batchnorm" in kinds,
        "batchnorm-variance": "batchnorm" in kinds,
        "gate-order": "recurrent" in kinds,
        "two-biases": "recurrent" in kinds,
        "conv-padding": spatial,
        "fused-qkv": any("in_proj_weight" in t.name for _, t in tensors),
        "padding-idx": getattr(config, "pad_token_id", None) is not None,
        "gelu": any("gelu" in str(v) for v in dataclasses.asdict(config).values()),
    }
    for name, there in expected.items():
        assert (name in ids(found)) == there, name
    flattened = any(isinstance(op, Reorder) for e in entries for op in e.compact_ops)
    assert "flatten-order" in ids(found) or not flattened
    assert "flatten-order" not in ids(found) or spatial
    if "tie" in kinds:
        assert "tied-embeddings" in ids(found)
    squares = {
        t.shape for k, t in tensors if k == "linear" and len(set(t.shape)) == 1 < len(t.shape)
    }
    assert "square-kernel" in ids(found) or not squares
    assert not ids(found) & {"linear-order", "conv-transpose", "rope"}
    assert not found.contradicts
    assert found.model is not None
    for finding in found.findings:
        assert "unknown" not in finding.here, "all of it is stated"


@pytest.mark.parametrize("family", ["bert", "resnet", "dqn", "recurrent", "switch_transformer"])
def test_both_frameworks_names_say_the_same(family: str, tmp_path: Path) -> None:
    model = families()[family]
    config = next(iter(model.tiny.values()))
    source = save(tmp_path / "m.safetensors", model, config)
    convert.convert(source, tmp_path / "m.flax.safetensors", framework="flax")
    torch, flax = convert.lint(source), convert.lint(tmp_path / "m.flax.safetensors")
    assert torch.findings == flax.findings


def test_minilm(minilm: Path) -> None:
    found = convert.lint(minilm)
    assert found.model == "bert (minilm_l6)"
    assert one(found, "epsilon").here.endswith("1e-12 (layer_norm_eps)")
    assert one(found, "heads").here == "12 (num_attention_heads)"
    assert one(found, "gelu").here == "gelu (hidden_act): by erf"
    assert one(found, "vocabulary").here == "30522 rows; vocab_size 30522"
    square = one(found, "square-kernel")
    assert square.count == 25
    assert square.tensors == (
        "encoder.layer.{0-5}.attention.{self.query,self.key,self.value,output.dense} 384x384",
        "pooler.dense 384x384",
    )
    equal = one(found, "equal-neighbours").tensors
    assert "norm 384: encoder.layer.{0-5}.{attention.output,output}.LayerNorm" in equal
    assert one(found, "equal-layers").tensors == ("encoder.layer.{0-5}",)
    assert {f.id for f in found.of("check")} == {
        "square-kernel",
        "equal-neighbours",
        "equal-layers",
    }


def test_twelve_layers_are_a_handful_of_lines(tmp_path: Path) -> None:
    config = dataclasses.replace(BERT.tiny["encoder"], num_hidden_layers=12)
    found = convert.lint(save(tmp_path / "m.safetensors", BERT, config))
    assert found.tensors > 190
    assert len(found.findings) <= 12
    assert sum(len(f.tensors) for f in found.findings) <= 20
    assert any("encoder.layer.{0-11}." in t for t in one(found, "square-kernel").tensors)


def test_what_nothing_states_is_to_be_checked(tmp_path: Path) -> None:
    arrays = canonical(BERT, BERT.tiny["encoder"])
    found = convert.lint(write(SafetensorsWriter, tmp_path / "bare.safetensors", arrays))
    told = {f.id: f.here for f in found.of("check")}
    assert told["epsilon"] == "LayerNorm, GroupNorm or RMSNorm: unknown (layer_norm_eps)"
    assert told["heads"] == "unknown (num_attention_heads)"
    assert told["gelu"] == "activation unknown (hidden_act)"
    (tmp_path / "config.json").write_text(Label(BERT, BERT.tiny["encoder"]).to_config_json())
    stated = convert.lint(tmp_path / "bare.safetensors", config=tmp_path / "config.json")
    assert not {f.id for f in stated.of("check")} & {"heads", "epsilon", "gelu"}


# --- A stranger's model ---

GPT2 = {
    "transformer.wte.weight": (50304, 8),
    "transformer.wpe.weight": (16, 8),
    **{
        f"transformer.h.{i}.{name}": shape
        for i in range(11)
        for name, shape in {
            "ln_1.weight": (8,),
            "ln_1.bias": (8,),
            "attn.c_attn.weight": (8, 24),
            "attn.c_attn.bias": (24,),
            "attn.c_proj.weight": (8, 8),
            "attn.c_proj.bias": (8,),
            "ln_2.weight": (8,),
            "ln_2.bias": (8,),
        }.items()
    },
    "lm_head.weight": (50304, 8),
}


def test_an_unknown_model_with_its_config(tmp_path: Path) -> None:
    header(tmp_path / "model.safetensors", GPT2)
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "gpt2",
                "vocab_size": 50257,
                "n_head": 4,
                "layer_norm_epsilon": 1e-5,
                "activation_function": "gelu_new",
                "n_positions": 16,
                "attn_pdrop": 0.1,
                "tie_word_embeddings": True,
            }
        )
    )
    found = convert.lint(tmp_path)
    assert found.model is None
    assert any("no model of the zoo" in n for n in found.notices)
    here = {f.id: f.here for f in found.findings}
    assert here["epsilon"].endswith("1e-05 (layer_norm_epsilon)")
    assert here["gelu"] == "gelu_new (activation_function): by tanh"
    assert here["heads"] == "4 (n_head)"
    assert here["vocabulary"] == "50304 rows, a multiple of 128; vocab_size 50257"
    assert here["dropout"] == "attn_pdrop 0.1"
    assert here["positions"] == "16 rows, 16 stated (n_positions)"
    assert one(found, "linear-order").tensors == ("transformer.h.{0-10}.attn.c_attn 8x24",)
    assert one(found, "fused-qkv").count == 11
    assert one(found, "tied-embeddings").severity == "check"
    assert "transformer.h.{0-10}.attn.c_proj 8x8" in one(found, "square-kernel").tensors
    assert "norm 8: transformer.h.{0-10}.{ln_1,ln_2}" in one(found, "equal-neighbours").tensors
    assert not found.of("note") or {f.id for f in found.of("note")} == {"dropout"}


def test_names_of_one_model_and_the_config_of_another(tmp_path: Path) -> None:
    """RoBERTa has BERT's names, and counts positions otherwise."""
    arrays = canonical(BERT, BERT.tiny["encoder"])
    write(SafetensorsWriter, tmp_path / "model.safetensors", arrays)
    config = {"model_type": "roberta", "pad_token_id": 1, "num_attention_heads": 4}
    config |= {"max_position_embeddings": 38}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = convert.lint(tmp_path)
    assert one(found, "model-type").here == "names are of bert, the config is of roberta"
    assert one(found, "padding-idx").here == "1 (pad_token_id)"
    assert one(found, "heads").here == "4 (num_attention_heads)"
    assert one(found, "positions").here == "40 rows, 38 stated (max_position_embeddings)"
    for name in ("model-type", "padding-idx", "heads", "positions", "epsilon"):
        assert one(found, name).severity == "check"


def test_rows_that_are_missing_are_wrong(tmp_path: Path) -> None:
    header(tmp_path / "model.safetensors", {"embed.weight": (100, 4), "fc.weight": (4, 5)})
    (tmp_path / "config.json").write_text('{"vocab_size": 101}')
    found = convert.lint(tmp_path / "model.safetensors")
    assert one(found, "vocabulary").severity == "wrong"
    assert found.contradicts
    assert found.findings[0].id == "vocabulary", "the gravest first"


def test_unknown_layers_by_name_and_shape(tmp_path: Path) -> None:
    shapes = {
        "stem.weight": (6, 3, 3, 3),
        "bn.weight": (6,),
        "bn.running_mean": (6,),
        "bn.running_var": (6,),
        "up.weight": (6, 4, 2, 2),
        "up.bias": (4,),
        "fc.weight": (5, 100),
        "rnn.weight_ih_l0": (12, 5),
        "rnn.weight_hh_l0": (12, 4),
        "rnn.bias_ih_l0": (12,),
        "rnn.bias_hh_l0": (12,),
        "attn.in_proj_weight": (12, 4),
        "attn.out_proj.weight": (4, 4),
        "rotary_emb.inv_freq": (2,),
    }
    found = convert.lint(header(tmp_path / "m.safetensors", shapes))
    assert one(found, "conv-transpose").tensors == ("up 6x4x2x2",)
    assert one(found, "conv-padding").count == 2
    assert one(found, "gate-order").here == "GRU, stacked"
    assert one(found, "batchnorm-momentum").here == "unknown"
    assert one(found, "gelu").here == "activation unknown"
    assert one(found, "rope").here == "style unknown"
    assert one(found, "fused-qkv").tensors == ("attn 12x4",)
    assert one(found, "square-kernel").tensors == ("attn 12x4", "attn.out_proj 4x4")
    assert "flatten-order" not in ids(found), "100 is not a multiple of 6 channels"
    recurrent = "recurrent 12: rnn.{bias_hh_l0,bias_ih_l0}"
    assert recurrent in one(found, "equal-neighbours").tensors


@pytest.mark.parametrize(("inputs", "read"), [(54, "6x3x3"), (60, "6x10"), (6, None), (55, None)])
def test_flattened_images(inputs: int, read: str | None, tmp_path: Path) -> None:
    shapes = {"c.weight": (6, 3, 3, 3), "a.weight": (12, inputs), "b.weight": (2, 12)}
    found = convert.lint(header(tmp_path / "m.safetensors", shapes))
    if read is None:
        assert "flatten-order" not in ids(found)
    else:
        assert one(found, "flatten-order").here == f"inputs (C, H, W): {inputs} = {read}"
        assert one(found, "flatten-order").tensors == (f"a 12x{inputs}",), "b reads what a gives"


def test_unknown_flax_names_in_linen_collections(tmp_path: Path) -> None:
    shapes = {
        "params.Conv_0.kernel": (3, 3, 2, 6),
        "params.LayerNorm_0.scale": (6,),
        "params.LayerNorm_0.bias": (6,),
        "params.Dense_0.kernel": (54, 7),
        "params.LSTM_0.hi.kernel": (4, 4),
        "params.LSTM_0.hf.kernel": (4, 4),
        "batch_stats.BatchNorm_0.mean": (6,),
        "batch_stats.BatchNorm_0.var": (6,),
    }
    found = convert.lint(header(tmp_path / "m.safetensors", shapes))
    assert one(found, "conv-padding").tensors == ("Conv_0 6x2x3x3",)
    assert one(found, "flatten-order").tensors == ("Dense_0 7x54",)
    assert one(found, "gate-order").here == "one matrix a gate (Flax's cells)"
    assert {"batchnorm-variance", "norm-variance"} <= ids(found)


def test_rope_and_grouped_queries_from_the_config(tmp_path: Path) -> None:
    names = {f"model.layers.0.self_attn.{p}_proj.weight": (4, 8) for p in "kv"}
    header(
        tmp_path / "model.safetensors", {"model.layers.0.self_attn.q_proj.weight": (8, 8)} | names
    )
    config = {"rope_theta": 10000.0, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}))
    found = convert.lint(tmp_path)
    assert one(found, "rope").here == "style unknown, rope_theta 10000"
    assert (
        one(found, "heads").here
        == "4 (num_attention_heads), 2 for keys and values (num_key_value_heads)"
    )


def test_a_config_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    header(tmp_path / "model.safetensors", {"a.weight": (3, 3)})
    for text, problem in (("{", "cannot be read"), ("[]", "no object")):
        (tmp_path / "config.json").write_text(text)
        found = convert.lint(tmp_path / "model.safetensors")
        assert any(problem in n or "cannot be understood" in n for n in found.notices)
        assert "square-kernel" in ids(found)


def test_optimizer_states_are_no_layers(tmp_path: Path) -> None:
    shapes = {"state_dict.a.weight": (3, 3), "optimizer.state.0.exp_avg": (3, 3)}
    found = convert.lint(header(tmp_path / "m.safetensors", shapes))
    assert found.tensors == 1
    assert one(found, "square-kernel").tensors == ("a 3x3",)


# --- Pairs ---


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return save(tmp_path / "a.safetensors", BERT, BERT.tiny["encoder"])


def pair(found: Lint) -> dict[str, Finding]:
    return {f.id: f for f in found.findings if f.id.startswith("pair-")}


def test_a_pair_that_agrees(bert: Path, tmp_path: Path) -> None:
    convert.convert(bert, tmp_path / "b.msgpack")
    assert pair(convert.lint(bert, tmp_path / "b.msgpack")) == {}
    assert pair(convert.lint(bert, bert)) == {}


def test_constants_that_flax_does_not_store_are_no_contradiction(tmp_path: Path) -> None:
    model = families()["resnet"]
    config = next(iter(model.tiny.values()))
    tracked = {
        e.torch[0].name: np.zeros((), np.int64)
        for e in model.layout_of(config).entries
        if e.constant is not None
    }
    a = save(tmp_path / "a.safetensors", model, config, **tracked)
    b = save(tmp_path / "b.safetensors", model, config)
    found = pair(convert.lint(a, b))
    assert {k: f.severity for k, f in found.items()} == {"pair-tensors": "note"}
    assert found["pair-tensors"].count == len(tracked)


def test_configs_that_contradict(bert: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(
        BERT.tiny["encoder"], layer_norm_eps=1e-5, hidden_act="gelu_new", hidden_dropout_prob=0.3
    )
    found = convert.lint(bert, save(tmp_path / "b.safetensors", BERT, other))
    told = {f.here: f.severity for f in found.findings if f.id == "pair-config"}
    assert told == {
        "layer_norm_eps: 1e-12 and 1e-05": "wrong",
        "hidden_act: 'gelu' and 'gelu_new'": "wrong",
        "hidden_dropout_prob: 0.1 and 0.3": "note",
    }
    assert found.contradicts


def test_what_one_side_does_not_state_is_no_contradiction(bert: Path, tmp_path: Path) -> None:
    arrays = canonical(BERT, BERT.tiny["encoder"])
    bare = write(SafetensorsWriter, tmp_path / "b.safetensors", arrays)
    assert pair(convert.lint(bert, bare)) == {}


def test_dtypes(bert: Path, tmp_path: Path) -> None:
    convert.convert(bert, tmp_path / "b.msgpack", dtype="bfloat16")
    found = pair(convert.lint(bert, tmp_path / "b.msgpack"))
    assert found["pair-dtype"].here == "39 tensors: F32 and BF16"
    assert found["pair-dtype"].severity == "check"
    assert not any(f.severity == "wrong" for f in found.values())


def test_vocabularies(bert: Path, tmp_path: Path) -> None:
    padded = dataclasses.replace(BERT.tiny["encoder"], vocab_size=104)
    found = pair(convert.lint(bert, save(tmp_path / "b.safetensors", BERT, padded)))
    assert found["pair-vocabulary"].here.endswith("word_embeddings.weight: 99x32 and 104x32")
    assert found["pair-vocabulary"].severity == "check"
    assert "pair-shape" not in found


def test_shapes(bert: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(BERT.tiny["encoder"], intermediate_size=40)
    found = convert.lint(bert, save(tmp_path / "b.safetensors", BERT, other))
    shapes = {f.here: f.tensors for f in found.findings if f.id == "pair-shape"}
    assert shapes["2 of 48x32 and 40x32"] == ("encoder.layer.{0-1}.intermediate.dense.weight",)


def test_tensors_that_one_side_lacks(bert: Path, tmp_path: Path) -> None:
    shorter = dataclasses.replace(BERT.tiny["encoder"], num_hidden_layers=1)
    found = convert.lint(bert, save(tmp_path / "b.safetensors", BERT, shorter))
    alone = [f for f in found.findings if f.id == "pair-tensors"]
    assert [f.severity for f in alone] == ["wrong"]
    assert alone[0].here == f"16 only in {bert}"


def test_a_head_is_more_but_its_encoder_is_the_same(bert: Path, tmp_path: Path) -> None:
    head = BERT.tiny["sequence_classification"]
    found = pair(convert.lint(bert, save(tmp_path / "b.safetensors", BERT, head)))
    assert found["pair-tensors"].count == 2
    assert all("classifier" in t for t in found["pair-tensors"].tensors)


def test_two_families(bert: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "b.safetensors", CONVNET, CONVNET.tiny["pooled"])
    assert list(pair(convert.lint(bert, other))) == ["pair-model"]


def test_strangers_of_two_frameworks(tmp_path: Path) -> None:
    torch = header(tmp_path / "a.safetensors", {"enc.fc.weight": (4, 3), "enc.ln.weight": (4,)})
    flax = header(tmp_path / "b.safetensors", {"enc.fc.kernel": (3, 4), "enc.ln.scale": (4,)})
    untransposed = header(
        tmp_path / "c.safetensors", {"enc.fc.kernel": (4, 3), "enc.ln.scale": (4,)}
    )
    other = header(
        tmp_path / "d.safetensors", {"Dense_0.kernel": (3, 4), "LayerNorm_0.scale": (4,)}
    )
    assert pair(convert.lint(torch, flax)) == {}
    assert pair(convert.lint(torch, untransposed))["pair-shape"].tensors == ("enc.fc.weight",)
    assert list(pair(convert.lint(torch, other))) == ["pair-names"]
    assert not convert.lint(torch, other).contradicts


# --- Patterns ---


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a"], "a"),
        (["a.x.w", "a.y.w"], "a.{x,y}.w"),
        (["a.x", "a.x.y"], "a.{x,x.y}"),
        (["a.0.w", "a.1.w", "a.3.w"], "a.{0-1,3}.w"),
        (["q", "k"], "{q,k}"),
    ],
)
def test_patterns(names: list[str], expected: str) -> None:
    assert braced(names) == expected


def test_ranges() -> None:
    assert [ranged(n) for n in ([4], [0, 1, 2], [5, 1, 2])] == ["4", "{0-2}", "{1-2,5}"]


# --- The command ---


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["lint", *map(str, arguments)])


def test_the_command(bert: Path, tmp_path: Path) -> None:
    ran = run(bert)
    assert ran.exit_code == 0
    assert ran.output.startswith(f"{bert}: bert, 39 tensors\n  0 wrong, 3 to check, 8 noted\n")
    assert "verify A B --level outputs" in ran.output
    assert "use_fast_variance" not in ran.output
    assert "use_fast_variance" in run(bert, "--all").output
    assert len(ran.output.splitlines()) < 40
    assert run(bert, "-q").output == ""
    other = dataclasses.replace(BERT.tiny["encoder"], layer_norm_eps=1e-5)
    ran = run(bert, save(tmp_path / "b.safetensors", BERT, other))
    assert ran.exit_code == 3
    assert "wrong  pair-config         layer_norm_eps: 1e-12 and 1e-05" in ran.output


def test_json(bert: Path) -> None:
    data = json.loads(run(bert, "--json").output)
    assert data == json.loads(json.dumps(convert.lint(bert).to_dict()))
    assert data["counts"] == {"wrong": 0, "check": 3, "note": 8}
    assert {f["id"] for f in data["findings"]} <= set(IDS)


def test_names_from_files_are_escaped(tmp_path: Path) -> None:
    path = header(tmp_path / "m.safetensors", {"a\x1b[31m\u202e.weight": (3, 3)})
    ran = run(path)
    assert r"a\x1b[31m\u202e 3x3" in ran.output
    assert "\x1b" not in ran.output


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ZooError):
        convert.lint(tmp_path / "missing.safetensors")
    with pytest.raises(CorruptInput, match="holds no tensors"):
        convert.lint(header(tmp_path / "empty.safetensors", {}))
    with pytest.raises(UsageError):
        convert.lint(tmp_path / "empty.safetensors", model="nope")
    stranger = header(tmp_path / "m.safetensors", {"a.weight": (3, 3)})
    with pytest.raises(ZooError, match="not those of bert"):
        convert.lint(stranger, model="bert_base_cased")


def test_no_framework_is_imported(bert: Path) -> None:
    code = (
        "import sys; from convert.cli.main import cli\n"
        f"cli(['lint', {str(bert)!r}, {str(bert)!r}], standalone_mode=False)\n"
        "assert not {'torch', 'jax', 'flax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_finding_is_explained() -> None:
    headings = re.findall(r"^### `([\w-]+)`$", DOCS.read_text(), re.MULTILINE)
    assert headings == list(IDS)


def test_arrays_are_not_read(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.containers.safetensors_file import SafetensorsReader

    def read(self: object, name: str) -> Arrays:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(SafetensorsReader, "read", read)
    assert convert.lint(bert, bert).findings
