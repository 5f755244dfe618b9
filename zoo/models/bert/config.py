"""BERT's hyper-parameters, under transformers' names, and the published sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

Head = Literal[
    "none",
    "pretraining",
    "masked_lm",
    "next_sentence_prediction",
    "sequence_classification",
    "multiple_choice",
    "token_classification",
    "question_answering",
]

Activation = Literal["gelu", "gelu_new", "relu", "silu"]

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


class HeadOf(NamedTuple):
    """What stands on the encoder, under transformers' names."""

    hf: str  # transformers' class
    pooled: bool = False  # whether it stands on the pooler
    words: bool = False  # whether it gives logits of the vocabulary, by `cls.predictions`
    module: str = ""  # a linear layer,
    outputs: int | None = None  # and how many outputs it has; None: num_labels


HEADS: dict[Head, HeadOf] = {
    "none": HeadOf("BertModel"),
    "pretraining": HeadOf("BertForPreTraining", True, True, "cls.seq_relationship", 2),
    "masked_lm": HeadOf("BertForMaskedLM", words=True),
    "next_sentence_prediction": HeadOf(
        "BertForNextSentencePrediction", True, False, "cls.seq_relationship", 2
    ),
    "sequence_classification": HeadOf(
        "BertForSequenceClassification", pooled=True, module="classifier"
    ),
    "multiple_choice": HeadOf("BertForMultipleChoice", True, False, "classifier", 1),
    "token_classification": HeadOf("BertForTokenClassification", module="classifier"),
    "question_answering": HeadOf("BertForQuestionAnswering", False, False, "qa_outputs", 2),
}


@dataclass(frozen=True)
class Config:
    """Defaults are those of bert-base-uncased."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: Activation = "gelu"  # gelu is by erf, gelu_new by tanh
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    pad_token_id: int | None = 0  # its embedding gets no gradient from the input
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    head: Head = "none"
    pooler: bool = True  # a dense layer and tanh on the first token
    num_labels: int = 2
    classifier_dropout: float | None = None  # None: hidden_dropout_prob
    tie_word_embeddings: bool = True  # the decoder of words has the embeddings' matrix
    # The decoder's bias is `cls.predictions.bias`. Where its matrix is not tied, transformers 5 has
    # both, and no output depends on the latter.
    tie_decoder_bias: bool = True

    def __post_init__(self) -> None:
        if self.num_labels > 1 << 20:  # a config.json names each
            raise OverflowError(f"num_labels {self.num_labels} is more than {1 << 20}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head not in HEADS:
            raise ValueError(
                f"there is no head {self.head!r}; there are {', '.join(map(repr, HEADS))}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is none of {', '.join(ACTIVATIONS)}")
        if HEADS[self.head].pooled and not self.pooler:
            raise ValueError(f"head {self.head!r} stands on the pooler")
        if self.tie_word_embeddings and not self.tie_decoder_bias:
            raise ValueError("the decoder's bias is one of its own, and its matrix is not")


class Output(NamedTuple):
    """Of the encoder alone. B sequences of T tokens, H hidden units."""

    last_hidden_state: Any  # (B, T, H)
    pooler_output: Any  # (B, H); None without a pooler


class PreTrainingOutput(NamedTuple):
    """Of the two heads that BERT was trained with. V tokens in the vocabulary."""

    prediction_logits: Any  # (B, T, V)
    seq_relationship_logits: Any  # (B, 2)


class QuestionAnsweringOutput(NamedTuple):
    """Where in the text an answer begins and ends."""

    start_logits: Any  # (B, T)
    end_logits: Any  # (B, T)


BASE = Config()
LARGE = replace(
    BASE, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)

PRESETS = {
    "bert_base_uncased": BASE,
    "bert_base_cased": replace(BASE, vocab_size=28996),
    "bert_large_uncased": LARGE,
    "bert_large_cased": replace(LARGE, vocab_size=28996),
    "minilm_l6": replace(BASE, hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
    "bert_tiny": replace(  # of characters, with its masked-LM head
        BASE,
        vocab_size=112,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=128,
        initializer_range=0.1,
        head="masked_lm",
        pooler=False,
    ),
}

_TINY = Config(
    vocab_size=99,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=40,
)
TINY = {
    "encoder": _TINY,
    "encoder_tanh_gelu": replace(_TINY, hidden_act="gelu_new", pooler=False),
    "pretraining": replace(_TINY, head="pretraining", num_hidden_layers=1),
    "masked_lm": replace(_TINY, head="masked_lm", pooler=False, num_hidden_layers=1),
    "sequence_classification": replace(_TINY, head="sequence_classification", num_labels=3),
    "token_classification": replace(
        _TINY, head="token_classification", pooler=False, num_labels=5, num_hidden_layers=1
    ),
    "next_sentence": replace(_TINY, head="next_sentence_prediction", num_hidden_layers=1),
    "multiple_choice": replace(_TINY, head="multiple_choice", num_labels=1, num_hidden_layers=1),
    "question_answering": replace(
        _TINY, head="question_answering", pooler=False, num_hidden_layers=1
    ),
    "untied": replace(
        _TINY,
        head="masked_lm",
        pooler=False,
        num_hidden_layers=1,
        tie_word_embeddings=False,
        tie_decoder_bias=False,
    ),
}


def check_length(tokens: int, positions: int) -> None:
    """ValueError for a sequence without positions: JAX would look up NaN in silence."""
    if tokens > positions:
        raise ValueError(f"{tokens} tokens, but max_position_embeddings is {positions}")


# Fields that transformers' config.json has under the same name.
_OWN = ("head", "pooler", "num_labels", "tie_decoder_bias")
_SHARED = [name for name in asdict(BASE) if name not in _OWN]


def from_hf(data: Mapping[str, Any]) -> Config:
    """The Config that a transformers config.json states.

    Raises ValueError for what BERT in transformers can be told to be and this one is not.
    """
    if (kind := data.get("position_embedding_type", "absolute")) != "absolute":
        raise ValueError(f"position_embedding_type {kind!r}; only absolute positions are here")
    if data.get("is_decoder"):
        raise ValueError("is_decoder is set; only the encoder is here")
    heads: dict[str, Head] = {of.hf: head for head, of in HEADS.items()}
    named = [heads[a] for a in data.get("architectures") or () if a in heads]
    head = named[0] if named else "none"
    stated = data.get("num_labels") or len(data.get("id2label") or ()) or BASE.num_labels
    return Config(
        head=head,
        pooler=head == "none" or HEADS[head].pooled,
        num_labels=HEADS[head].outputs or stated,
        tie_decoder_bias=data.get("tie_word_embeddings", True),
        **{name: data[name] for name in _SHARED if name in data},
    )


def to_hf(config: Config) -> dict[str, Any]:
    """The keys of a transformers config.json; `from_hf` gives the Config back."""
    data: dict[str, Any] = {"model_type": "bert", "architectures": [HEADS[config.head].hf]}
    values = {name: getattr(config, name) for name in _SHARED}
    data |= {name: v for name, v in values.items() if v is not None or getattr(BASE, name) != v}
    if HEADS[config.head].module and HEADS[config.head].outputs is None:
        data["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
        data["label2id"] = {f"LABEL_{i}": i for i in range(config.num_labels)}
    return data
