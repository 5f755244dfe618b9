"""What the names of tensors say: words, and what codebases mean by them.

`model.layers.0.self_attn.q_proj.weight` and `decoder.layers.self_attention.query.kernel` share no
word but "layers"; what they say is the same: the main tensor of the query of an attention in a
layer. The table below is the vocabulary of published codebases; what it lacks still counts as a
word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache

# What the last part of a name says of a tensor within its layer.
_ROLES = {
    "weight": "main", "kernel": "main", "w": "main", "embedding": "main", "scale": "main",
    "gamma": "main", "g": "main", "weights": "main", "table": "main",
    "bias": "bias", "b": "bias", "beta": "bias", "offset": "bias",
    "mean": "mean", "running_mean": "mean", "moving_mean": "mean",
    "var": "var", "running_var": "var", "moving_variance": "var", "variance": "var",
}  # fmt: skip

# Phrases, longest first where one holds another, and what they mean. A meaning "class:value"
# excludes the other values of its class.
_PHRASES = {
    # one projection
    "q": "proj:q", "query": "proj:q", "wq": "proj:q", "queries": "proj:q", "qry": "proj:q",
    "to q": "proj:q", "k": "proj:k", "key": "proj:k", "wk": "proj:k", "keys": "proj:k",
    "to k": "proj:k", "v": "proj:v", "value": "proj:v", "wv": "proj:v", "values": "proj:v",
    "to v": "proj:v", "val": "proj:v",
    "o": "proj:o", "wo": "proj:o", "attn vec": "proj:o", "to out": "proj:o", "out": "proj:o",
    "o proj": "proj:o", "out proj": "proj:o", "attn out": "attn proj:o", "out lin": "proj:o",
    "q lin": "proj:q", "k lin": "proj:k", "v lin": "proj:v",
    "output": "proj:o", "output proj": "proj:o", "attention output": "attn proj:o",
    "qkv": "proj:qkv", "c attn": "proj:qkv", "in proj": "proj:qkv", "query key value": "proj:qkv",
    "wqkv": "proj:qkv", "to qkv": "proj:qkv", "attn qkv": "attn proj:qkv",
    "fused proj": "proj:qkv", "fused qkv": "proj:qkv",
    "kv": "proj:kv", "wkv": "proj:kv", "to kv": "proj:kv", "key value": "proj:kv",
    "gate up": "proj:gateup", "gating": "proj:gateup", "wi fused": "proj:gateup",
    "gate and up": "proj:gateup",
    "gate": "proj:gate", "w gate": "proj:gate", "ffn gate": "mlp proj:gate", "wg": "proj:gate",
    "up": "proj:up", "fc": "proj:up", "c fc": "proj:up", "intermediate": "mlp proj:up",
    "wi": "proj:up", "w in": "proj:up", "fc in": "mlp proj:up", "dense h to 4h": "mlp proj:up",
    "fc up": "mlp proj:up", "w up": "proj:up", "ff up": "mlp proj:up", "mlp up": "mlp proj:up",
    "down": "proj:down", "w down": "proj:down", "fc out": "mlp proj:down", "w out": "proj:o",
    "fc down": "mlp proj:down", "dense 4h to h": "mlp proj:down", "ff down": "mlp proj:down",
    "mlp down": "mlp proj:down", "c proj": "proj:o", "fc1": "mlp proj:up", "fc2": "mlp proj:down",
    "lin1": "mlp proj:up", "lin2": "mlp proj:down", "linear1": "mlp proj:up",
    "linear2": "mlp proj:down", "pwconv1": "mlp proj:up", "pwconv2": "mlp proj:down",
    "wi0": "mlp proj:gate", "wi1": "mlp proj:up", "w1": "mlp proj:gate", "w2": "mlp proj:down",
    "w3": "mlp proj:up", "pw up": "mlp proj:up", "pw down": "mlp proj:down",
    "router": "router", "gate logits": "router",
    # what it is a part of
    "attn": "attn", "attention": "attn", "self attn": "attn self", "self attention": "attn self",
    "mha": "attn", "sa": "attn self", "multi head dot product attention": "attn",
    "multi head attention": "attn", "selfattn": "attn self", "selfattention": "attn self",
    "enc dec attention": "attn cross", "encoder decoder attention": "attn cross",
    "encoder attn": "attn cross", "cross attn": "attn cross", "cross attention": "attn cross",
    "crossattention": "attn cross", "cross": "cross", "xattn": "attn cross", "ca": "attn cross",
    "mlp": "mlp", "ffn": "mlp", "ff": "mlp", "ffw": "mlp", "feed forward": "mlp",
    "feedforward": "mlp", "dense relu dense": "mlp", "mlp block": "mlp", "moe": "moe",
    "moe block": "moe", "experts": "moe", "block sparse moe": "moe", "sparse moe": "moe",
    "encoder": "side:encoder", "enc": "side:encoder", "decoder": "side:decoder",
    "dec": "side:decoder", "text": "tower:text", "txt": "tower:text", "vision": "tower:vision",
    "visual": "tower:vision", "img": "tower:vision", "image": "tower:vision",
    # norms
    "norm": "norm", "ln": "norm", "layer norm": "norm", "layernorm": "norm", "rms norm": "norm",
    "rmsnorm": "norm", "batch norm": "norm", "bn": "norm", "group norm": "norm", "gn": "norm",
    "batchnorm": "norm", "nrm": "norm", "layrnorm": "norm",
    "q norm": "norm proj:q", "k norm": "norm proj:k", "query norm": "norm proj:q",
    "key norm": "norm proj:k",
    "pre": "place:pre", "input": "place:pre", "before": "place:pre", "in": "place:pre",
    "post": "place:post", "after": "place:post", "final": "final", "last": "final", "f": "final",
    # tables and tokens
    "embed": "embed", "emb": "embed", "embedding": "embed", "embeddings": "embed",
    "embedder": "embed", "embeds": "embed",
    "word": "embed table:token", "token": "embed table:token", "tok": "embed table:token",
    "wte": "embed table:token", "shared": "embed table:token", "tokens": "embed table:token",
    "vocab": "embed table:token", "input embedding": "embed table:token",
    "embed tokens": "embed table:token", "token embedding": "embed table:token",
    "token embedder": "embed table:token", "embed in": "embed table:token",
    "wpe": "embed table:position", "pos": "embed table:position",
    "position": "embed table:position", "positions": "embed table:position",
    "positional": "embed table:position", "pos embedding": "embed table:position",
    "posembed": "embed table:position",
    "token type": "embed table:type", "segment": "embed table:type", "type": "embed table:type",
    "patch": "patch", "patches": "patch", "patch embed": "patch", "patch embedding": "patch",
    "patch embeddings": "patch", "patch embedder": "patch", "stem": "patch",
    "cls": "table:cls", "cls token": "table:cls", "class embedding": "table:cls",
    "class token": "table:cls", "mask token": "table:mask", "class emb": "table:cls",
    # ends
    "lm head": "head", "head": "head", "logits": "head", "unembed": "head", "embed out": "head",
    "logits dense": "head", "classifier": "head", "score": "head", "out head": "head",
    "output head": "head", "cls head": "head", "pooler": "pooler", "pooled": "pooler",
    "pre classifier": "pooler", "map head": "pooler",
    "transform": "transform", "downsample": "downsample", "downsampling": "downsample",
    "down sample": "downsample", "shortcut": "downsample",
    "projection": "projection", "layer scale": "layerscale", "layerscale": "layerscale",
    "ls": "layerscale", "gamma": "layerscale",
    "relative attention": "relative", "rel": "relative", "relpos": "relative",
    "relative": "relative", "dwconv": "depthwise", "depthwise": "depthwise",
    "depthwise conv": "depthwise", "dw": "depthwise", "conv dw": "depthwise",
    "logit": "logit", "temperature": "logit", "gn embed": "norm",
}  # fmt: skip
# Words that every codebase has somewhere, and that tell nothing.
_IDLE = frozenset(
    [
        "model",
        "params",
        "layers",
        "layer",
        "block",
        "blocks",
        "h",
        "transformer",
        "module",
        "stacked",
        "proj",
        "dense",
        "einsum",
        "linear",
        "batch",
        "stats",
        "stages",
        "stage",
        "lin",
        "the",
        "base",
        "bert",
        "roberta",
        "gpt",
        "value_",
        "array",
        "nn",
        "param",
        "states",
        "state",
        "unit",
        "stack",
        "scanned",
        "scan",
        "body",
        "encoderblock",
        "encodernorm",
        "root",
        "backbone",
        "general",
        "features",
        "dot",
        "product",
        "multi",
    ]
)


@dataclass(frozen=True)
class Said:
    """What a name says: the tensor's role in its layer, meanings, and words without a meaning."""

    role: str
    meanings: frozenset[str]
    words: frozenset[str]
    leaf: str  # as it is spelled, without numbers
    numbers: tuple[int, ...] = field(default=())  # that say which, not where: norm1, Dense_0


def words(part: str) -> list[str]:
    """The words of one part of a name, in lower case; numbers are words."""
    found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", part)
    return [w.lower() for w in found]


@cache
def meanings(part: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]]:
    """(meanings, words that have none, numbers) of one part of a name."""
    left = words(part)
    found: list[str] = []
    rest: list[str] = []
    numbers: list[int] = []
    while left:
        for n in range(min(6, len(left)), 0, -1):
            meaning = _PHRASES.get(" ".join(left[:n])) or _PHRASES.get("".join(left[:n]))
            if meaning and (n > 1 or not left[0].isdigit()):
                found += meaning.split()
                left = left[n:]
                break
        else:
            word = left.pop(0)
            if word.isdigit():
                numbers.append(int(word))
            elif word not in _IDLE:
                rest.append(word)
    return tuple(found), tuple(rest), tuple(numbers)


def role(leaf: str) -> tuple[str, str]:
    """(role, what the leaf says besides): of `in_proj_bias`, "bias" and "in_proj"."""
    if leaf in _ROLES:
        return _ROLES[leaf], ""
    if re.fullmatch("b(q|k|v|o|qkv|kv|i|1|2|3|up|down|gate)", leaf):  # beside wq, w1, ...
        return "bias", "w" + leaf[1:]
    stem, _, last = leaf.rpartition("_")
    if stem and last in ("weight", "kernel", "bias", "scale", "embedding", "gamma", "beta"):
        return _ROLES[last], stem
    return "main", leaf


def said(parts: Iterable[str]) -> Said:
    """What a name says whose parts, without the numbers that say where, are these."""
    *owners, leaf = parts
    what, more = role(leaf)
    found: list[str] = []
    rest: list[str] = []
    numbers: list[int] = []
    for part in (*owners, more):
        a, b, c = meanings(part)
        # The nearer part wins where two of one class stand in a name.
        classes = {m.partition(":")[0] for m in a if ":" in m}
        found = [m for m in found if m.partition(":")[0] not in classes]
        found += a
        rest += b
        numbers = list(c) or numbers
    return Said(what, frozenset(found), frozenset(rest), leaf, tuple(numbers))
