"""Hyper-parameters of attention and of embeddings that are known to be read differently."""

from __future__ import annotations

import re
from collections.abc import Iterator

from convert.linting.ambiguous import DENSE
from convert.linting.findings import Finding, Severity
from convert.linting.subject import Subject
from convert.linting.values import UNKNOWN, count, finding, severity, short, value

_HEADS = (
    *("num_attention_heads", "num_heads", "nhead", "n_head", "n_heads", "encoder_attention_heads"),
    *("attention_heads", "decoder_attention_heads"),
)
_ROPE = (
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "rotary_dim",
    "rotary_pct",
    "rotary_emb_base",
)
_ROPE_STYLE = ("rope_interleaved", "rotary_interleaved", "rope_interleave", "rope_style")
_FUSED = re.compile(r"(^|[._])(c_attn|qkv(_proj)?|query_key_value|Wqkv|in_proj|attn_qkv)$", re.I)
_QUERY = re.compile(r"(^|[._])(q|query|q_proj|q_lin|to_q|wq|query_proj)$", re.I)
_POSITIONS = re.compile(r"position|(^|[._])(wpe|pos_emb\w*|pos_embedding)($|[._])", re.I)
_HEAD = re.compile(
    r"(^|\.)(lm_head|output_projection|generator|embed_out|output_layer"
    r"|cls\.predictions\.decoder|decoder\.output)$"
)


def attention(s: Subject) -> Iterator[Finding]:
    queries = [x for x in s.kinds(*DENSE) if _QUERY.search(x.name)]
    fused = s.kinds("attention") + [x for x in s.kinds(*DENSE) if _FUSED.search(x.name)]
    if queries or fused:
        here, weight = value(s, _HEADS)
        kv = s.find("num_key_value_heads", "n_kv_heads", "num_kv_heads")
        here += f", {kv[1]} for keys and values ({kv[0]})" if kv else ""
        yield finding(
            *("heads", weight, here),
            "shapes do not tell the number of heads, nor whether a head's features lie together "
            "(heads, head_dim), as in PyTorch, or apart; Flax's attention has kernels of (in, "
            "heads, head_dim)",
            "state the number, split features as (heads, head_dim), and scale by head_dim",
            [*queries, *fused],
        )
    if fused:
        yield finding(
            *("fused-qkv", severity(s), count(fused, "layer")),
            "one matrix may hold query, key and value one after the other (nn.MultiheadAttention, "
            "GPT-2) or head by head (GPT-NeoX, BLOOM)",
            "look at how the definition splits it, and split it so",
            fused,
        )


def rope(s: Subject) -> Iterator[Finding]:
    tensors = [x for x in s.layers if re.search(r"rotary|rope|inv_freq", x.name, re.I)]
    named = s.find(*_ROPE)
    if tensors or named:
        style = s.find(*_ROPE_STYLE)
        here = f"style {style[1]} ({style[0]})" if style else f"style {UNKNOWN}"
        here += f", {named[0]} {short(named[1])}" if named else ""
        yield finding(
            *("rope", "check", here),
            "pairs are neighbours (interleaved: GPT-J, Meta's LLaMA) or halves of a head "
            "(half-split: GPT-NeoX, transformers' LLaMA); between the two the rows of q and k are "
            "permuted",
            "see which the definition has, and whether a conversion permuted q and k on the way",
            tensors,
        )


def positions(s: Subject) -> Iterator[Finding]:
    layers = [
        x
        for x in s.layers
        if x.kind in ("embedding", "param") and _POSITIONS.search(x.name) and len(x.weight) > 1
    ]
    if not layers:
        return
    stated = s.find("max_position_embeddings", "n_positions", "max_position")
    rows = layers[0].weight[-2]
    here = f"{rows} rows, {stated[1]} stated ({stated[0]})" if stated else f"{rows} rows"
    offset = isinstance(stated[1], int) and rows != stated[1] if stated else not s.ours
    weight: Severity = "check" if offset else severity(s)
    yield finding(
        *("positions", weight, here),
        "some begin to count at an offset: RoBERTa at padding_idx + 1, OPT and BART at 2; and JAX "
        "looks a position that is too large up without an error",
        "feed both sides the same position ids, and see where they start",
        layers,
    )


def vocabulary(s: Subject) -> Iterator[Finding]:
    stated = s.find("vocab_size", "src_vocab_size", "n_vocab", "vocabulary_size")
    layers = [
        x
        for x in s.kinds("embedding")
        if len(x.weight) == 2
        and not _POSITIONS.search(x.name)
        and not re.search(r"type|segment|relative", x.name, re.I)
    ]
    if not layers:
        return
    rows = layers[0].weight[0]
    multiple = next((n for n in (128, 64, 8) if rows % n == 0), None)
    here = f"{rows} rows" + (f", a multiple of {multiple}" if multiple else "")
    weight: Severity = severity(s)
    if stated and isinstance(stated[1], int):
        here += f"; {stated[0]} {stated[1]}"
        weight = "wrong" if rows < stated[1] else "check" if rows > stated[1] else "note"
    yield finding(
        *("vocabulary", weight, here),
        "implementations pad the vocabulary to a multiple of 8, 64 or 128; padded rows are never "
        "looked up, yet their logits take part in a softmax. Fewer rows than tokens: PyTorch "
        "fails, JAX looks up NaN or the last row",
        "see how many tokens the tokenizer has; cut or mask the padded logits on both sides",
        layers,
    )


def tied(s: Subject) -> Iterator[Finding]:
    heads = [x for x in s.layers if _HEAD.search(x.name) and x.kind in ("linear", "embedding")]
    shapes = {x.weight for x in s.layers if x.kind == "embedding" and not x.tied}
    equal = [x for x in heads if x.weight in shapes]
    second = [x for x in s.layers if x.tied]
    stated = s.find("tie_word_embeddings", "tie_embeddings")
    # A model of the zoo without a head has nothing to tie; elsewhere a file may leave the head out.
    said = stated is not None and stated[1] is True and not s.ours
    if not (equal or second or said):
        return
    apart = [x for x in equal if not x.tied]
    here = f"{stated[1]} ({stated[0]})" if stated else "not stated"
    here += f"; {len(second)} tied" if second else ""
    here += f"; {len(apart)} of the embedding's shape stored apart" if apart else ""
    contradiction = bool(apart) and (stated is None or stated[1] is True)
    yield finding(
        *("tied-embeddings", "check" if contradiction else "note", here),
        "a tied projection is one parameter with one gradient; stored twice, two that part as soon "
        "as it trains. PyTorch ties by storage, Flax by using embedding.attend",
        "see that both names hold the same values, and tie them in both definitions or in neither",
        [*second, *apart],
    )


def padding_idx(s: Subject) -> Iterator[Finding]:
    found = s.find("pad_token_id", "padding_idx", "pad_idx")
    layers = [x for x in s.kinds("embedding") if not _POSITIONS.search(x.name)]
    if found and layers:
        yield finding(
            *("padding-idx", severity(s), f"{found[1]} ({found[0]})"),
            "nn.Embedding(padding_idx=) keeps that row out of the gradient; Flax's Embed has no "
            "such thing, and its row learns",
            "if it trains on, stop that row's gradient in Flax",
        )


TOKENS = (attention, rope, positions, vocabulary, tied, padding_idx)
