"""Headers against layouts: wrappers, labels, what fits, and what is said where nothing does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import canonical, write

import zoo
from zoo.checkpoint.identification import identify_header
from zoo.checkpoint.label import Label, read_label
from zoo.checkpoint.peel import levels
from zoo.checkpoint.request import make_request
from zoo.containers import open_checkpoint
from zoo.containers.base import TensorInfo
from zoo.containers.errors import CorruptInput, UsageError, ZooError
from zoo.containers.safetensors_file import SafetensorsWriter
from zoo.layout import Constant, Entry, Layout, Tensor, batchnorm, constant, conv, linear, tie
from zoo.layout.ops import Permute
from zoo.models.bert import MODEL

CONFIG = MODEL.tiny["encoder"]


def header(**changes: tuple[int, ...] | None) -> dict[str, TensorInfo]:
    shapes = MODEL.layout_of(CONFIG).shapes("torch")
    found = {n: TensorInfo("F32", s) for n, s in shapes.items()}
    for name, shape in changes.items():
        name = name.replace("__", ".")
        if shape is None:
            del found[name]
        else:
            found[name] = TensorInfo("F32", shape)
    return found


# --- Layouts ---


def test_a_layout_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stand twice.*fc\.weight"):
        Layout([*linear("fc", 2, 3), *linear("fc", 2, 3)])
    with pytest.raises(ValueError, match="tied to"):
        Layout([*linear("fc", 2, 3), tie("out.weight", (3, 2), to="nowhere.weight")])
    with pytest.raises(ValueError, match="the ops give"):
        Layout(
            [Entry("linear", (Tensor("w", (2, 3)),), (Tensor("w", (2, 3)),), (Permute((1, 0)),))]
        )


def test_the_views_of_a_small_convnet() -> None:
    layout = Layout([*conv("conv1", 3, 8, 5, 5), *batchnorm("bn1", 8), *linear("fc", 32, 10)])
    assert layout.shapes("torch") == {
        "conv1.weight": (8, 3, 5, 5),
        "conv1.bias": (8,),
        "bn1.weight": (8,),
        "bn1.bias": (8,),
        "bn1.running_mean": (8,),
        "bn1.running_var": (8,),
        "bn1.num_batches_tracked": (),
        "fc.weight": (10, 32),
        "fc.bias": (10,),
    }
    assert layout.shapes("nnx") == {
        "conv1.kernel": (5, 5, 3, 8),
        "conv1.bias": (8,),
        "bn1.scale": (8,),
        "bn1.bias": (8,),
        "bn1.mean": (8,),
        "bn1.var": (8,),
        "fc.kernel": (32, 10),
        "fc.bias": (10,),
    }
    assert "batch_stats.bn1.mean" in layout.shapes("linen")
    assert "params.fc.kernel" in layout.shapes("linen")
    assert list(layout.shapes("linen-compact")) == [
        "params.Conv_0.kernel",
        "params.Conv_0.bias",
        "params.BatchNorm_0.scale",
        "params.BatchNorm_0.bias",
        "batch_stats.BatchNorm_0.mean",
        "batch_stats.BatchNorm_0.var",
        "params.Dense_0.kernel",
        "params.Dense_0.bias",
    ]
    assert layout.parameters == 8 * 3 * 25 + 8 + 16 + 330


# --- Wrappers ---


@pytest.mark.parametrize(
    ("names", "inner", "aside"),
    [
        (["fc.w", "fc.b"], ["fc.w", "fc.b"], 0),
        (["state_dict.fc.w"], ["fc.w"], 0),
        (["model.fc.w", "optimizer.state.0.exp_avg"], ["fc.w"], 1),
        (["state_dict.model._orig_mod.fc.w"], ["fc.w"], 0),
        (["module._orig_mod.fc.w"], ["fc.w"], 0),
        (["encoder._orig_mod.w", "head.w"], ["encoder.w", "head.w"], 0),
        (["params.fc.kernel", "opt_state.0.mu.fc.kernel", "step"], ["fc.kernel"], 2),
        (["fc.kernel.value", "drop.rngs.count.value"], ["fc.kernel"], 1),
        (["model_state_dict.module.fc.w", "optimizer_state_dict.x", "epoch"], ["fc.w"], 2),
        (["state_dict.module.fc.w", "best_acc"], ["fc.w"], 1),
        (["state_dict.model.fc.w", "state_dict.criterion.weight"], ["fc.w"], 1),
        (["model.fc.w", "model_ema.fc.w"], ["fc.w"], 1),
        (["fc.w", "actor_optimizer.state.0.x", "lr_scheduler_g.x", "ema_model.fc.w"], ["fc.w"], 3),
        (["fc.w", "schema.w", "optimal.w"], ["fc.w", "schema.w", "optimal.w"], 0),
        (
            ["state.params.fc.kernel", "state.opt_state.mu.fc.kernel", "state.step"],
            ["fc.kernel"],
            2,
        ),
    ],
)
def test_wrappers_come_off(names: list[str], inner: list[str], aside: int) -> None:
    innermost = list(levels(names))[-1]
    assert list(innermost.names) == inner
    assert len(innermost.set_aside) == aside
    assert all(source in names for source in innermost.names.values())


def test_the_outermost_level_is_offered_first() -> None:
    offered = [list(p.names) for p in levels(["model.a.w", "model.b.w"])]
    assert offered == [["model.a.w", "model.b.w"], ["a.w", "b.w"]]


# --- What does not fit ---


def test_everything_that_is_wrong_is_said_at_once() -> None:
    wrong = header(
        encoder__layer__0__attention__self__query__weight=None,
        encoder__layer__1__output__dense__bias=(31,),
        pooler__extra__weight=(4, 4),
    )
    wrong["encoder.layer.0.attention.self.qeury.weight"] = TensorInfo("F32", (32, 32))
    with pytest.raises(ZooError) as caught:
        identify_header(wrong, Label())
    assert "4 differ" in caught.value.problem
    text = "\n".join(caught.value.details)
    assert (
        "missing: encoder.layer.0.attention.self.query.weight 32x32 "
        "(nearest: encoder.layer.0.attention.self.qeury.weight)" in text
    )
    assert "surplus: pooler.extra.weight" in text
    assert "wrong shape: encoder.layer.1.output.dense.bias is 31, should be 32" in text
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    "name",
    [
        "embeddings__word_embeddings__weight",
        "embeddings__LayerNorm__weight",
        "encoder__layer__1__intermediate__dense__weight",
        "pooler__dense__weight",
    ],
)
def test_any_tensor_may_be_the_missing_one(name: str) -> None:
    with pytest.raises(ZooError) as caught:
        identify_header(header(**{name: None}), Label())
    missing = [d for d in caught.value.details if d.startswith("missing")]
    assert any(name.replace("__", ".") in d for d in missing)


def test_an_unknown_model_is_named_as_such() -> None:
    with pytest.raises(ZooError, match="no model in the zoo has these 1 tensors"):
        identify_header({"a.b": TensorInfo("F32", (1,))}, Label())
    with pytest.raises(CorruptInput, match="no tensors"):
        identify_header({}, Label())


def test_a_config_that_contradicts_the_tensors_is_an_error() -> None:
    label = Label(MODEL, dataclasses.replace(CONFIG, vocab_size=100))
    with pytest.raises(ZooError) as caught:
        identify_header(header(), label)
    assert caught.value.details == [
        "wrong shape: embeddings.word_embeddings.weight is 99x32, should be 100x32"
    ]


def test_what_names_cannot_tell_is_recorded_as_unknown() -> None:
    (found,) = identify_header(header(), Label())
    assert found.unknown == {"num_attention_heads", "hidden_act", "layer_norm_eps"}
    (found,) = identify_header(header(), Label(MODEL, CONFIG))
    assert not found.unknown


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ("minilm_l7", None, "did you mean minilm_l6"),
        ("zzz", None, "no model is called 'zzz'"),
        (None, {"hidden_size": 3}, "do not say of which model"),
        ("bert", {"hidden": 3}, "has no field hidden"),
        ("bert", {"num_attention_heads": 5}, "not divisible"),
        ("bert", "nowhere.json", "neither a file here nor a preset"),
    ],
)
def test_requests_that_nothing_answers(model: str | None, config: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_request(model, config)  # type: ignore[arg-type]


# --- Labels ---


def test_labels_survive_metadata_and_config_json(tmp_path: Path) -> None:
    label = Label(MODEL, CONFIG, frozenset({"layer_norm_eps"}), hf={"torch_dtype": "float32"})
    path = write(
        SafetensorsWriter, tmp_path / "a.safetensors", {"x": np.zeros(1)}, **label.to_metadata()
    )
    with open_checkpoint(path) as reader:
        back = read_label(reader)
    assert (back.model, back.unknown) == (MODEL, label.unknown)
    assert dataclasses.replace(back.config, layer_norm_eps=CONFIG.layer_norm_eps) == CONFIG
    bare = write(SafetensorsWriter, tmp_path / "b.safetensors", {"x": np.zeros(1)})
    (tmp_path / "config.json").write_text(label.to_config_json())
    with open_checkpoint(bare) as reader:
        again = read_label(reader)
    assert (again.config, again.unknown) == (back.config, back.unknown)
    assert set(json.loads(label.to_config_json())) == {"zoo"}, "transformers would make it up"
    data = json.loads(dataclasses.replace(label, unknown=frozenset()).to_config_json())
    assert data["torch_dtype"] == "float32", "what transformers wrote stays"
    assert data["hidden_size"] == 32


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"model_type": ["bert"]}',
        '{"zoo": {"model": "bert"}}',
        '{"zoo": {"model": "bert", "config": 3}}',
        '{"zoo": {"model": "bert", "config": {}, "carried": {"x": {"dtype": "F32", "shape": [2], '
        '"base64": "AAAA"}}}}',
    ],
)
def test_a_config_json_that_cannot_be_understood(text: str, tmp_path: Path) -> None:
    path = write(SafetensorsWriter, tmp_path / "a.safetensors", {"x": np.zeros(1)})
    (tmp_path / "config.json").write_text(text)
    with open_checkpoint(path) as reader:
        problem = read_label(reader).problem
    assert isinstance(problem, CorruptInput)
    assert "config.json" in problem.problem


def test_a_label_from_the_future_or_of_an_unknown_plugin(tmp_path: Path) -> None:
    for text, message in [
        ('{"zoo": {"model": "bert", "layout": "bert/99", "config": {}}}', "layout bert/99"),
        ('{"zoo": {"model": "nobody", "config": {}}}', "not installed"),
    ]:
        path = tmp_path / "a.safetensors"
        path.unlink(missing_ok=True)
        write(SafetensorsWriter, path, {"x": np.zeros(1)})
        (tmp_path / "config.json").write_text(text)
        with open_checkpoint(path) as reader:
            problem = read_label(reader).problem
        assert isinstance(problem, UsageError)
        assert message in problem.problem


def test_a_config_that_the_user_gives_replaces_a_bad_one(tmp_path: Path) -> None:
    path = write(SafetensorsWriter, tmp_path / "a.safetensors", canonical(MODEL, CONFIG))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CorruptInput, match="--config"):
        zoo.load(path, framework="torch")
    assert zoo.load(path, framework="torch", model="bert", config=dataclasses.asdict(CONFIG)).pooler


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"num_hidden_layers": "2"},
        {"num_hidden_layers": 2.0},
        {"vocab_size": [1]},
        {"vocab_size": -5},
        {"layer_norm_eps": float("nan")},
        {"hidden_act": "softplus"},
        {"hidden_act": ["gelu"]},
        {"classifier_dropout": "0.1"},
        {"pad_token_id": 0.5},
    ],
)
def test_values_that_no_config_can_have(change: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="impossible configuration"):
        zoo.create("minilm_l6", framework="torch", **change)
    path = write(SafetensorsWriter, tmp_path / "a.safetensors", canonical(MODEL, CONFIG))
    data = json.loads(Label(MODEL, CONFIG).to_config_json())
    for text in (data | {"zoo": None} | change, {"zoo": data["zoo"] | {"config": change}}):
        (tmp_path / "config.json").write_text(json.dumps(text))
        with pytest.raises(ZooError, match=r"config\.json|impossible"):
            zoo.load(path, framework="torch")


def test_an_absurd_name_asks_for_no_absurd_layout() -> None:
    name = "encoder.layer.2000000.attention.self.query.weight"
    with pytest.raises(ZooError):
        identify_header({name: TensorInfo("F32", (8, 8))}, Label())


def test_dtypes_may_be_given_in_any_form() -> None:
    import jax.numpy as jnp

    from zoo.containers.dtypes import dtype_code

    for dtype in (
        "bfloat16",
        "BF16",
        "torch.bfloat16",
        torch.bfloat16,
        jnp.bfloat16,
        jnp.dtype("bfloat16"),
    ):
        assert dtype_code(dtype) == "BF16"
    for dtype in ("foo", "int8", torch.int8, "float8_e8m0fnu"):
        with pytest.raises(UsageError):
            dtype_code(dtype)


# --- Loading ---


def test_loading_without_a_config_asks_for_it(tmp_path: Path) -> None:
    path = write(SafetensorsWriter, tmp_path / "a.safetensors", canonical(MODEL, CONFIG))
    with pytest.raises(UsageError, match="hidden_act, layer_norm_eps, num_attention_heads"):
        zoo.load(path, framework="torch")
    fields = dataclasses.asdict(CONFIG)
    model = zoo.load(path, framework="torch", model="bert", config=fields)
    assert model.encoder.layer[0].attention.self.heads == 4


def test_dtypes_are_kept_or_cast_on_request(tmp_path: Path) -> None:
    arrays = {n: a.astype(np.float16) for n, a in canonical(MODEL, CONFIG).items()}
    path = write(SafetensorsWriter, tmp_path / "a.safetensors", arrays)
    (tmp_path / "config.json").write_text(Label(MODEL, CONFIG).to_config_json())
    kept = zoo.load(path, framework="torch")
    assert {p.dtype for p in kept.parameters()} == {torch.float16}
    wide = zoo.load(path, framework="flax", param_dtype="float32")
    assert wide.pooler.dense.kernel.dtype == np.float32
    with pytest.raises(UsageError, match="int8"):
        zoo.load(path, framework="torch", param_dtype="int8")


def test_jax_is_not_allowed_to_cut_64_bits(tmp_path: Path) -> None:
    arrays = {n: a.astype(np.float64) for n, a in canonical(MODEL, CONFIG).items()}
    path = write(SafetensorsWriter, tmp_path / "a.safetensors", arrays)
    (tmp_path / "config.json").write_text(Label(MODEL, CONFIG).to_config_json())
    with pytest.raises(UsageError, match="cut its 64 bits"):
        zoo.load(path, framework="flax")


def test_fp8_weights_load_only_when_cast(tmp_path: Path) -> None:
    import ml_dtypes

    arrays = {n: a.astype(ml_dtypes.float8_e4m3fn) for n, a in canonical(MODEL, CONFIG).items()}
    path = write(SafetensorsWriter, tmp_path / "a.safetensors", arrays)
    (tmp_path / "config.json").write_text(Label(MODEL, CONFIG).to_config_json())
    with pytest.raises(UsageError, match="F8_E4M3"):
        zoo.load(path, framework="torch")
    model = zoo.load(path, framework="torch", param_dtype="bfloat16")
    expected = arrays["pooler.dense.weight"].astype(np.float32)
    assert (model.pooler.dense.weight.detach().float().numpy() == expected).all()


def test_a_carried_constant_needs_its_entry() -> None:
    value = Constant("arange", "I64", False)
    entry = constant("ids", (1, 3), value)
    assert entry.flax == ()
    assert Layout([entry]).shapes("torch") == {}, "today's definition does not save it"


def test_create_gives_both_frameworks_the_same_weights() -> None:
    sizes = {
        "vocab_size": 50,
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
    }
    a = zoo.create("minilm_l6", framework="torch", seed=3, **sizes)
    b = zoo.create("minilm_l6", framework="flax", seed=3, **sizes)
    kernel = np.asarray(b.pooler.dense.kernel[...])
    assert (a.pooler.dense.weight.detach().numpy() == kernel.T).all()
    std = a.embeddings.word_embeddings.weight.std().item()
    assert 0.018 < std < 0.022, "initializer_range"
    half = zoo.create("minilm_l6", framework="flax", param_dtype="bfloat16", **sizes)
    assert half.pooler.dense.kernel.dtype.name == "bfloat16"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: zoo.create("bert", framework="torch"), "is a family"),
        (lambda: zoo.create("minilm_l6", framework="keras"), "keras"),
        (lambda: zoo.create("minilm_l6.mine", framework="torch"), "names weights"),
        (lambda: zoo.create("minilm_l6", framework="torch", dtype="foo"), "foo"),
        (lambda: zoo.create("minilm_l6", framework="torch", size=3), "no field size"),
        (lambda: zoo.get("resnet1"), "no model is called"),
        (lambda: zoo.load("minilm_l6", framework="torch"), "no weights of that name"),
        (lambda: zoo.load("nowhere/at/all.pt", framework="torch"), "does not exist"),
    ],
)
def test_mistakes_are_told(call: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()  # type: ignore[operator]
