"""What a checkpoint is taken for: what is stated wins, what names tell is told, nothing is guessed
in silence; and what is whole is not refused for its spelling or for what stands around it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support import Arrays, canonical, every_family, write
from torch import nn

import convert
import zoo
from convert.cli.main import cli
from zoo.checkpoint import likely
from zoo.checkpoint.identification import identify_header
from zoo.checkpoint.label import Label
from zoo.checkpoint.request import make_request
from zoo.containers.base import TensorInfo
from zoo.containers.errors import UsageError, ZooError
from zoo.containers.safetensors_file import SafetensorsWriter
from zoo.layout import TREES
from zoo.model import Config, Model
from zoo.models.bert import MODEL as BERT
from zoo.models.resnet import MODEL as RESNET
from zoo.models.transformer import MODEL as TRANSFORMER

CONFIG = BERT.tiny["encoder"]
TINY = {
    "hidden_size": 16,
    "embedding_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 50,
    "max_position_embeddings": 40,
}


def upstream(name: str, **fields: Any) -> dict[str, TensorInfo]:
    """The header of a tiny model of transformers' of a class."""
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, name)
    with torch.device("meta"):
        module = cls(cls.config_class(**TINY | fields))
    return {n: TensorInfo("F32", tuple(t.shape)) for n, t in module.state_dict().items()}


def header(arrays: Arrays) -> dict[str, TensorInfo]:
    return {n: TensorInfo("F32", a.shape) for n, a in arrays.items()}


def resnet(**fields: Any) -> Arrays:
    return canonical(RESNET, replace(RESNET.tiny["basic"], **fields))


def below(prefix: str, arrays: Arrays) -> Arrays:
    return {f"{prefix}.{n}": a for n, a in arrays.items()}


def saved(path: Path, arrays: Arrays, **config: Any) -> Path:
    """A checkpoint of transformers': the weights, and a config.json of these keys if any."""
    path.mkdir(exist_ok=True)
    write(SafetensorsWriter, path / "model.safetensors", arrays)
    if config:
        (path / "config.json").write_text(json.dumps(config))
    return path


def run(*arguments: Any) -> str:
    """What a command prints; raises the error that it ends with."""
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False).output


@pytest.fixture
def quiet() -> Iterator[None]:
    """For tests that load what they were told of before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", zoo.LoadNotice)
        yield


# --- What is stated ---


@pytest.mark.parametrize(
    "stated",
    [{"model_type": "roberta"}, {"model_type": "electra"}, {"architectures": ["ErnieModel"]}],
    ids=lambda d: str(next(iter(d.values()))),
)
def test_a_stated_type_that_is_not_ours_wins(stated: dict[str, Any], tmp_path: Path) -> None:
    path = saved(tmp_path / "a", canonical(BERT, CONFIG), **stated)
    named = "ErnieModel" if "architectures" in stated else stated["model_type"]
    with pytest.raises(UsageError, match=rf"says that this is '{named}', which the zoo does not"):
        convert.convert(path, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    with pytest.raises(UsageError, match=named) as e:
        zoo.load(path, framework="torch")
    assert "--model" in e.value.advice
    assert "39 tensors" in run("inspect", path), "it shows what is there all the same"


def test_an_explicit_model_wins_over_it_with_a_notice(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", canonical(BERT, CONFIG), model_type="roberta")
    made = convert.convert(path, tmp_path / "b", model="bert")
    assert any("says that this is 'roberta': taken for bert as you say" in n for n in made.notices)
    assert not (set(json.loads((tmp_path / "b/config.json").read_text())) - {"zoo"})
    convert.convert(tmp_path / "b", tmp_path / "c.safetensors")
    assert convert.verify(path, tmp_path / "c.safetensors", model="bert").verdict == "same"


def test_a_type_that_is_ours_wins_over_names() -> None:
    """RoBERTa's two rows more are no reason, where a config.json says that it is BERT."""
    odd = replace(CONFIG, max_position_embeddings=514)
    (found,) = identify_header(header(canonical(BERT, odd)), Label(BERT, odd))
    assert (found.model, found.told) == (BERT, ())


def test_classes_name_the_family_where_no_type_does(tmp_path: Path) -> None:
    assert BERT.to_hf is not None
    keys = {k: v for k, v in BERT.to_hf(CONFIG).items() if k != "model_type"}
    model = zoo.load(saved(tmp_path / "a", canonical(BERT, CONFIG), **keys), framework="torch")
    assert model.encoder.layer[0].attention.self.heads == CONFIG.num_attention_heads


# --- What names tell ---


@pytest.mark.parametrize(
    ("name", "fields", "whose"),
    [
        ("RobertaForMaskedLM", {}, r"RoBERTa's \(.*lm_head\.dense|RoBERTa's \(roberta"),
        ("RobertaForSequenceClassification", {}, r"RoBERTa's \(roberta"),
        ("XLMRobertaForTokenClassification", {}, r"RoBERTa's \(roberta"),
        ("CamembertForMaskedLM", {}, "RoBERTa's"),
        ("RobertaModel", {"max_position_embeddings": 514}, "RoBERTa's .*514 rows"),
        ("Data2VecTextForMaskedLM", {}, "Data2Vec's"),
        ("ElectraForPreTraining", {}, "ELECTRA's"),
        ("ElectraModel", {"embedding_size": 8}, "ELECTRA's .embeddings_project"),
        ("ErnieModel", {"use_task_id": True}, "ERNIE's .*task_type"),
        ("ErnieForMaskedLM", {}, "ERNIE's"),
        ("YosoForMaskedLM", {}, "those of yoso"),
    ],
)
def test_names_of_another_model_are_told(name: str, fields: dict[str, Any], whose: str) -> None:
    with pytest.raises(UsageError, match=f"the names are {whose}"):
        identify_header(upstream(name, **fields), Label())


@pytest.mark.parametrize("name", ["RobertaModel", "ElectraModel", "ErnieModel", "BertModel"])
def test_where_names_cannot_tell_the_notice_says_what_was_assumed(name: str) -> None:
    found = identify_header(upstream(name), Label())[0]
    assert found.model is BERT
    assert found.told[0].startswith("taken for bert, which nothing states: tensors of RoBERTa, ")
    assert identify_header(upstream(name), Label(), make_request("bert", None))[0].told == ()


def test_an_explicit_model_wins_over_names_with_a_notice() -> None:
    names = upstream("RobertaModel", max_position_embeddings=514)
    (found,) = identify_header(names, Label(), make_request("bert", None))
    assert "taken for bert as you say" in found.told[0]


# --- What is not known is not written ---


def test_no_keys_of_transformers_where_outputs_depend_on_what_is_unknown(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", canonical(BERT, CONFIG))
    told = run("torch2flax", path, tmp_path / "b")
    assert "config.json is not one of transformers', which would guess hidden_act, layer" in told
    text = (tmp_path / "b/config.json").read_text()
    assert "null" not in text
    data = json.loads(text)
    assert set(data) == {"zoo"}
    assert data["zoo"]["unknown"] == ["hidden_act", "layer_norm_eps", "num_attention_heads"]
    assert not set(data["zoo"]["unknown"]) & set(data["zoo"]["config"])
    with pytest.raises(UsageError, match="hidden_act"):
        zoo.load(tmp_path / "b", framework="torch")
    model = zoo.load(tmp_path / "b", "torch", model="bert", config=vars(CONFIG))
    assert model.embeddings.LayerNorm.eps == CONFIG.layer_norm_eps


def test_what_is_known_is_written_without_null_for_transformers_too(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = saved(tmp_path / "a", canonical(BERT, CONFIG))
    convert.convert(path, tmp_path / "b", model="bert", config=vars(CONFIG))
    convert.convert(tmp_path / "b", tmp_path / "c")
    assert "null" not in (tmp_path / "c/config.json").read_text()
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "c")
    assert type(theirs).__name__ == "BertModel"
    assert theirs.config.layer_norm_eps == CONFIG.layer_norm_eps


def test_labels_of_earlier_versions_are_read() -> None:
    from zoo.checkpoint.label import _from_zoo

    fields = vars(CONFIG) | {"layer_norm_eps": None}
    label = _from_zoo({"model": "bert", "config": fields}, "config.json", Path("."))
    assert label.unknown == {"layer_norm_eps"}


# --- Heads ---


@pytest.mark.parametrize(
    ("name", "fields", "head"),
    [
        ("BertForMultipleChoice", {}, "multiple_choice"),
        ("BertForQuestionAnswering", {}, "question_answering"),
        ("BertForNextSentencePrediction", {}, "next_sentence_prediction"),
        ("BertForSequenceClassification", {"num_labels": 1}, "sequence_classification"),
        ("BertForTokenClassification", {"num_labels": 1}, "token_classification"),
    ],
)
def test_every_head_is_what_its_class_says(
    name: str, fields: dict[str, Any], head: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    theirs = cls(transformers.BertConfig(**TINY | fields)).eval()
    theirs.save_pretrained(tmp_path / "a")
    made = convert.convert(tmp_path / "a", tmp_path / "b")
    assert made.config["head"] == head
    convert.convert(tmp_path / "b", tmp_path / "c")
    with warnings.catch_warnings(action="error"):
        ours = zoo.load(tmp_path / "c", framework="torch")
    ids = torch.arange(12).reshape((1, 2, 6) if head == "multiple_choice" else (2, 6))
    want, got = theirs(ids), ours(ids)
    pairs = (
        [(want.start_logits, got.start_logits), (want.end_logits, got.end_logits)]
        if head == "question_answering"
        else [(want.logits, got)]
    )
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("BertForMultipleChoice", None),  # or a regression of sequences, or of tokens
        ("BertForQuestionAnswering", "question_answering"),
        ("BertForNextSentencePrediction", "next_sentence_prediction"),
        ("BertForPreTraining", "pretraining"),
        ("BertForTokenClassification", "token_classification"),
    ],
)
def test_names_alone_tell_a_head_or_say_that_they_cannot(name: str, told: str | None) -> None:
    (found,) = identify_header(upstream(name), Label())
    assert ("head" in found.unknown) == (told is None)
    assert told in (None, found.config.head)


# --- Ties ---


def untied(config: Config, bias: bool) -> Arrays:
    words = {"cls.predictions.decoder.weight": ("bert.embeddings.word_embeddings.weight", 1)}
    if bias:
        words["cls.predictions.decoder.bias"] = ("cls.predictions.bias", 1)
    arrays = canonical(BERT, config)
    return arrays | {n: arrays[of] + shift for n, (of, shift) in words.items()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stated", [None, True, False], ids=["silent", "tied", "untied"])
def test_a_masked_lm_of_untied_weights_is_whole(
    bias: bool, stated: bool | None, tmp_path: Path
) -> None:
    arrays = untied(BERT.tiny["masked_lm"], bias)
    assert BERT.to_hf is not None
    keys = BERT.to_hf(BERT.tiny["masked_lm"])
    keys = keys if stated is None else keys | {"tie_word_embeddings": stated}
    path = saved(tmp_path / "a", arrays, **keys)
    made = convert.convert(path, tmp_path / "b")
    assert made.config["tie_word_embeddings"] is False
    if stated is not False:
        assert any("not tied, as the file has other values there: cls." in n for n in made.notices)
    convert.convert(tmp_path / "b", tmp_path / "c")
    from safetensors.numpy import load_file

    back = load_file(tmp_path / "c/model.safetensors")
    assert all((back[n] == a).all() for n, a in arrays.items())
    ours = zoo.load(tmp_path / "c", framework="torch")
    ids = torch.arange(6)[None]
    hidden = ours.cls.predictions.transform(ours.bert(ids)[0])
    used = "cls.predictions.decoder.bias" if bias else "cls.predictions.bias"
    weight, b = (torch.from_numpy(arrays[n]) for n in ("cls.predictions.decoder.weight", used))
    assert torch.allclose(ours(ids), nn.functional.linear(hidden, weight, b), atol=1e-5)


def test_what_is_spelled_out_and_equal_is_tied(tmp_path: Path) -> None:
    config = BERT.tiny["masked_lm"]
    arrays = canonical(BERT, config)
    arrays["cls.predictions.decoder.weight"] = arrays["bert.embeddings.word_embeddings.weight"]
    made = convert.convert(saved(tmp_path / "a", arrays), tmp_path / "b", model="bert")
    assert made.config["tie_word_embeddings"] is True
    assert not any("not tied" in n for n in made.notices)


def test_an_untied_flax_tree_tells_it_by_its_names() -> None:
    shapes = BERT.layout_of(BERT.tiny["untied"]).shapes("nnx")
    found = identify_header({n: TensorInfo("F32", s) for n, s in shapes.items()}, Label())
    assert found[0].config.tie_word_embeddings is False
    assert "tie_word_embeddings" not in found[0].unknown


# --- ResNets and Transformers ---


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    "fields",
    [
        {"in_channels": 1},
        {"stem_kernel": 3, "stem_stride": 1, "stem_pool": False},
        {"num_classes": 0},
        {"stem_kernel": 5, "in_channels": 4, "num_classes": 0},
    ],
    ids=str,
)
def test_resnets_of_other_stems_and_without_a_head(fields: dict[str, Any], tmp_path: Path) -> None:
    path = saved(tmp_path / "a", resnet(**fields))
    made = convert.convert(path, tmp_path / "b.msgpack")
    assert made.config["in_channels"] == fields.get("in_channels", 3)
    assert made.config["num_classes"] == fields.get("num_classes", 5)
    (found,) = zoo.identify(path)
    asked = {k: fields.get(k, getattr(RESNET.tiny["basic"], k)) for k in found.unknown}
    assert bool(asked) == ("stem_kernel" in fields), "7 x 7 is torchvision's, of others who knows"
    model = zoo.load(tmp_path / "b.msgpack", "torch", **asked)
    images = torch.zeros(1, fields.get("in_channels", 3), 64, 64)
    assert model(images).shape == (1, fields.get("num_classes", 5) or 64)


@pytest.mark.usefixtures("quiet")
def test_a_bare_transformer_is_torch_s_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "nhead": 2, "dim_feedforward": 24, "batch_first": True}
    theirs = nn.Transformer(num_encoder_layers=1, num_decoder_layers=2, **sizes).eval()
    torch.save(theirs.state_dict(), tmp_path / "a.pt")
    made = convert.convert(tmp_path / "a.pt", tmp_path / "b.msgpack")
    assert (made.model, made.config["src_vocab_size"]) == ("transformer", 0)
    known = {"nhead": 2, "activation": "relu", "layer_norm_eps": 1e-5, "norm_first": False}
    ours = zoo.load(tmp_path / "b.msgpack", "torch", **known)
    src, tgt = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    pad = torch.zeros(2, 5, dtype=torch.bool)
    pad[1, 3:] = True
    for given in ({}, {"tgt_mask": mask, "memory_key_padding_mask": pad}):
        assert torch.allclose(theirs(src, tgt, **given), ours(src, tgt, **given), atol=1e-5)


# --- Prefixes ---

BACKBONE: list[tuple[str, Callable[[], Arrays]]] = [
    ("backbone", resnet),
    ("encoder", resnet),
    ("model.online.net", resnet),
    ("0.auto_model", lambda: canonical(BERT, CONFIG)),
    ("state_dict.module.anything", lambda: canonical(BERT, BERT.tiny["masked_lm"])),
    ("transformer", lambda: canonical(TRANSFORMER, TRANSFORMER.tiny["bare"])),
]


@pytest.mark.parametrize(("prefix", "make"), BACKBONE, ids=[p for p, _ in BACKBONE])
def test_prefixes_are_found(prefix: str, make: Callable[[], Arrays], tmp_path: Path) -> None:
    path = saved(tmp_path / "a", below(prefix, make()))
    made = convert.convert(path, tmp_path / "b")
    assert f"taken off the names: {' '.join(f'{p}.' for p in prefix.split('.'))}" in made.notices
    assert len(made.tensors) >= len(make())


def test_a_layer_s_own_name_is_no_prefix() -> None:
    """An embedding alone in a file must not become a linear layer."""
    with pytest.raises(ZooError, match="no model in the zoo"):
        identify_header({"words.weight": TensorInfo("F32", (50, 16))}, Label())


def test_prefixes_in_the_collections_of_linen() -> None:
    shapes = RESNET.layout_of(RESNET.tiny["basic"]).shapes("linen")
    names = {n.replace(".", ".backbone.", 1): TensorInfo("F32", s) for n, s in shapes.items()}
    (found,) = identify_header(names, Label())
    assert (found.tree, found.peeled.wrappers) == ("linen", ("backbone",))
    twice = names | {n.replace(".backbone.", ".teacher."): i for n, i in names.items()}
    with pytest.raises(UsageError, match="2 models"):
        identify_header(twice, Label())
    found = identify_header(twice, Label(), make_request(None, None, prefix="teacher"))[0]
    assert (found.tree, len(found.peeled.set_aside)) == ("linen", len(names))


def pair(root: str = "") -> Arrays:
    teacher = {n: a + 1 for n, a in resnet().items()}
    return below(f"{root}student", resnet()) | below(f"{root}teacher", teacher)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("root", ["", "state_dict."])
def test_two_models_in_one_file_are_both_offered(root: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a", pair(root))
    with pytest.raises(UsageError, match="holds 2 models") as e:
        convert.convert(path, tmp_path / "b")
    assert e.value.details == [f"below {root}{n}: resnet" for n in ("student", "teacher")]
    assert f"--prefix {root}student" in e.value.advice
    told = run("torch2flax", path, tmp_path / "b", "--prefix", f"{root}teacher.")
    assert f"NOT converted: 72 of the tensors, below {root}student" in told
    loaded = zoo.load(tmp_path / "b", "torch")
    assert (loaded.fc.weight.detach().numpy() == resnet()["fc.weight"] + 1).all()
    student = zoo.load(path, "torch", prefix=f"{root}student")
    assert (student.fc.weight.detach().numpy() == resnet()["fc.weight"]).all()
    for name, verdict in (("teacher", "same"), ("student", "different")):
        assert convert.verify(path, tmp_path / "b", prefix=f"{root}{name}").verdict == verdict


def test_what_is_another_s_beside_ours_is_not_offered() -> None:
    ours, theirs = canonical(BERT, CONFIG), upstream("RobertaForMaskedLM")
    names = header(below("student", ours)) | {f"teacher.{n}": t for n, t in theirs.items()}
    found = identify_header(names, Label(), make_request(None, None, prefix="student"))[0]
    assert found.model is BERT
    with pytest.raises(UsageError, match="the names are RoBERTa's"):
        identify_header(names, Label(), make_request(None, None, prefix="teacher"))
    with pytest.raises(UsageError, match="only the tensors below student are a model"):
        identify_header(names, Label())


def test_they_are_offered_where_a_family_was_named_too() -> None:
    asked = make_request("resnet", None)
    with pytest.raises(UsageError, match="holds 2 models"):
        identify_header(header(pair()), Label(), asked)
    three = pair() | {"queue": np.zeros(3, np.float32)}
    with pytest.raises(UsageError, match="holds 2 models"):
        identify_header(header(three), Label())


def test_a_known_wrapper_does_not_hide_a_second_model(tmp_path: Path) -> None:
    arrays = below("model", resnet()) | below("teacher", resnet())
    with pytest.raises(UsageError, match="holds 2 models"):
        identify_header(header(arrays), Label())
    small = below("model", resnet()) | {"criterion.weight": np.zeros(3, np.float32)}
    assert identify_header(header(small), Label())[0].peeled.wrappers == ("model",)


def test_a_model_below_a_head_of_the_user_s_own_is_offered() -> None:
    own = {"projector.0.weight": np.zeros((8, 64), np.float32)}
    with pytest.raises(UsageError, match="only the tensors below backbone are a model") as e:
        identify_header(header(below("backbone", resnet(num_classes=0)) | own), Label())
    assert e.value.advice == "take them alone with --prefix backbone"
    mine = canonical(BERT, BERT.tiny["token_classification"]) | own
    with pytest.raises(ZooError, match="1 differs") as e2:
        identify_header(header(mine), Label())
    assert "surplus: projector.0.weight" in e2.value.details


def test_a_prefix_that_nothing_has(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", pair())
    with pytest.raises(UsageError, match="no tensor lies below 'tutor'") as e:
        run("torch2flax", path, tmp_path / "b", "--prefix", "tutor")
    assert e.value.advice == "the names begin with student, teacher"


def test_absurd_prefixes_cost_nothing() -> None:
    names = {f"{'a.' * 5000}{i}.weight": TensorInfo("F32", (1,)) for i in range(2)}
    with pytest.raises(ZooError):
        identify_header(names, Label())


@every_family()
def test_a_large_header_is_tried_on_the_families_that_it_may_be_of(
    model: Model, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the spelling, a family is not left out; and one whose names end otherwise is."""
    monkeypatch.setattr(likely, "LARGE", 0)
    layout = model.layout_of(config)
    for tree in (*TREES, *(d.name for d in model.dialects)):
        names = [t.name for view in layout.view(tree) for t in view.tensors]
        below = [f"state.model.{n}" for n in names if all("." in n for n in names)]
        for said in (names, [f"{n}.value" for n in names], below or names):  # no handful of tensors
            assert model in likely.likely(said), tree
    foreign = [f"model.layers.{i}.mlp.experts.{i}.up_proj.weight" for i in range(200)]
    assert model not in likely.likely(foreign)
