"""What two checkpoints that should be one model contradict each other in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from convert.linting.ambiguous import patterns
from convert.linting.findings import Finding, Severity
from convert.linting.subject import Layer, Subject
from zoo.checkpoint.problems import dims
from zoo.registry import families

# Keys of a config that say nothing of what is computed.
_IDLE = frozenset(
    [
        *("_name_or_path", "name_or_path", "transformers_version", "architectures", "torch_dtype"),
        *("dtype", "use_cache", "gradient_checkpointing", "_commit_hash", "zoo", "auto_map"),
        *("id2label", "label2id", "task_specific_params", "finetuning_task", "output_attentions"),
        *("output_hidden_states", "return_dict", "problem_type", "tokenizer_class"),
        *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation"),
    ]
)
_TRAINING = ("dropout", "drop_path", "pdrop", "initializer", "init_", "jitter", "_coef", "zoneout")
_VERIFY = "run `zooconvert verify A B --level outputs`"


def contradictions(a: Subject, b: Subject) -> Iterator[Finding]:
    """Every finding about the two together."""
    if a.family != b.family and a.family and b.family:
        yield Finding(
            "pair-model",
            "wrong",
            f"{a.title} and {b.title}",
            "they are of two families",
            "compare two of one model",
        )
        return
    yield from _configs(a, b)
    yield from _tensors(a, b)


def _configs(a: Subject, b: Subject) -> Iterator[Finding]:
    keys = [k for k in a.config if k in b.config and k not in _IDLE]
    if a.family:  # both sides' own fields: other keys of a config.json say nothing beyond them
        fields = set(families()[a.family].config.__dataclass_fields__)
        keys = [k for k in keys if k in fields]
    apart = {
        k: (a.config[k], b.config[k]) for k in keys if _plain(a.config[k]) != _plain(b.config[k])
    }
    for key, (x, y) in apart.items():
        idle = any(word in key for word in _TRAINING)
        yield Finding(
            "pair-config",
            "note" if idle else "wrong",
            f"{key}: {x!r} and {y!r}",
            "it acts in training only" if idle else "the two then compute something else",
            "see which is right, and state it in both configs",
        )


def _tensors(a: Subject, b: Subject) -> Iterator[Finding]:
    left, right = _bare(a), _bare(b)
    both = [n for n in left if n in right]
    if len(both) < min(len(left), len(right)) / 2:
        yield Finding(
            "pair-names",
            "check",
            f"{len(both)} of {len(left)} and {len(right)} names are on both sides",
            "what belongs together cannot be told by names alone",
            "give `zooconvert verify` the pair with a layout, or name the model with --model",
        )
        return
    dtypes: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    shapes: dict[str, str] = {}
    padded: dict[str, str] = {}
    for name in both:
        x, y = a.tensors[left[name]], b.tensors[right[name]]
        if x.dtype != y.dtype:
            dtypes[x.dtype, y.dtype].append(name)
        if x.shape != y.shape:
            rows = x.shape[1:] == y.shape[1:] and _vocabulary(a, left[name])
            (padded if rows else shapes)[name] = f"{dims(x.shape)} and {dims(y.shape)}"
    yield from _dtypes(dtypes)
    yield from _shapes(padded, shapes)
    for side, names, other in ((a, left, right), (b, right, left)):
        yield from _alone(side, [n for n in names if n not in other], names)


def _dtypes(found: dict[tuple[str, str], list[str]]) -> Iterator[Finding]:
    for (x, y), names in found.items():
        yield Finding(
            "pair-dtype",
            "check",
            f"{len(names)} tensors: {x} and {y}",
            "a cast loses bits: `verify` calls them different",
            "compare with the checkpoint that was cast, or cast both (--dtype)",
            tuple(_named(names)),
            len(names),
        )


def _shapes(padded: dict[str, str], shapes: dict[str, str]) -> Iterator[Finding]:
    for name, what in padded.items():
        yield Finding(
            "pair-vocabulary",
            "check",
            f"{name}: {what}",
            "one side's vocabulary is padded; the rows that both have may be the same",
            "cut the padded rows, then compare",
            (name,),
            1,
        )
    by_what: defaultdict[str, list[str]] = defaultdict(list)
    for name, what in shapes.items():
        by_what[what].append(name)
    for what, names in by_what.items():
        yield Finding(
            "pair-shape",
            "wrong",
            f"{len(names)} of {what}",
            "the same name holds another tensor: another size, or one that was not transposed",
            "see which side has the model's size (`zooconvert inspect`)",
            tuple(_named(names)),
            len(names),
        )


def _alone(side: Subject, names: Sequence[str], original: dict[str, str]) -> Iterator[Finding]:
    constant = [n for n in names if original[n] in side.constants]
    groups: list[tuple[list[str], Severity, str]] = [
        (
            [n for n in names if n not in constant],
            "wrong",
            "the other computes without them, or was saved incompletely",
        ),
        (constant, "note", "constants and second names of tensors, which Flax does not store"),
    ]
    for found, weight, why in groups:
        if found:
            yield Finding(
                "pair-tensors",
                weight,
                f"{len(found)} only in {side.path}",
                why,
                "see whether a head or a layer was left out"
                if weight == "wrong"
                else "nothing to do",
                tuple(_named(found)),
                len(found),
            )


def _bare(s: Subject) -> dict[str, str]:
    """Names without the prefix that a head brings, so that an encoder is compared with the same
    encoder under a head -> canonical names."""
    prefix = families()[s.family].base_prefix if s.family else ""
    return {n.removeprefix(prefix): n for n in s.tensors}


def _vocabulary(s: Subject, name: str) -> bool:
    """Whether a tensor has a row for each token."""
    module = name.rpartition(".")[0]
    layer = next((x for x in s.layers if x.name == module), None)
    return layer is not None and (layer.kind == "embedding" or "head" in module)


def _named(names: Sequence[str]) -> list[str]:
    found = [Layer(n, "tensor", {}) for n in names]
    return [p.removesuffix(" scalar") for p in patterns(found)]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
