"""Which parameter of the model each state of an optimizer belongs to.

torch's `state_dict` numbers the parameters. Where the optimizer was made from names (torch 2.6), it
says them; else the order in which parameters are usually handed over decides, and every moment's
shape is held against its parameter's: what does not fit is refused, and so is what fits twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from zoo.checkpoint.peel import WRAPPERS
from zoo.checkpoint.plan import Plan
from zoo.checkpoint.problems import dims
from zoo.containers.errors import UsageError, ZooError
from zoo.layout import Layout
from zoo.layout.ops import Shape

ADVICE = (
    "save it with names, as torch 2.6 and later do for torch.optim.AdamW(model.named_parameters())"
)
_SHOWN = 8
# transformers 5.23, Trainer.get_decay_parameter_names: no decay for these, nor in an nn.LayerNorm.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")

Groups = list[list[str]]


@dataclass(frozen=True)
class Parameters:
    """What an optimizer may train: a model's parameters, in the order of `named_parameters()`."""

    shapes: Mapping[str, Shape]  # canonical name -> shape
    ties: Mapping[str, str]  # second names
    layer_norms: frozenset[str]  # parameters of an nn.LayerNorm
    respell: Callable[[str], str] = str
    prefix: str = ""  # what upstream puts before an encoder's names below a head

    @classmethod
    def of(cls, layout: Layout, plan: Plan | None = None, stored: Sequence[str] = ()) -> Parameters:
        """Those of a layout. `stored` are the names in the checkpoint's own state_dict, where it
        has one: it lists its tensors as its module does, and upstream's may have another order."""
        shapes = {
            t.name: t.shape
            for e in layout.entries
            if e.constant is None and e.tied_to is None and e.collection == "params"
            for t in e.torch
        }
        ties = {e.torch[0].name: e.tied_to for e in layout.entries if e.tied_to is not None}
        kinds = {t.name: e.kind for e in layout.entries for t in e.torch}
        modules = {n.rpartition(".")[0] for n, k in kinds.items() if k == "norm" and "bias" in n}
        norms = {n for n, k in kinds.items() if k == "norm" and n.rpartition(".")[0] in modules}
        if plan is None:
            return cls(shapes, ties, frozenset(norms))
        if stored:
            at = {source: i for i, source in enumerate(stored)}
            steps = sorted(plan.steps, key=lambda step: at[step.sources[0]])
            first = [n for step in steps for n in step.names if n in shapes]
            shapes = {n: shapes[n] for n in dict.fromkeys((*first, *shapes))}
        if (model := plan.model) is None:
            return cls(shapes, ties, frozenset(norms))
        respell = model.respell
        if plan.source_tree in layout.dialects:
            _, renames = layout.dialects[plan.source_tree]
            respell = renames.back
        return cls(shapes, ties, frozenset(norms), respell, model.base_prefix)

    def resolve(self, name: str) -> str | None:
        """The canonical name, without the wrappers that training puts before it; None: of none."""
        parts = [part for part in name.split(".") if part != "_orig_mod"]
        while parts:
            spelled = self.respell(".".join(parts))
            spelled = self.ties.get(spelled, spelled)
            for each in (spelled, self.prefix + spelled, spelled.removeprefix(self.prefix)):
                if each in self.shapes:
                    return each
            if parts[0] not in WRAPPERS:
                return None
            del parts[0]
        return None

    def below(self, module: str) -> list[str]:
        """Those of one module."""
        return [name for name in self.shapes if name.startswith(f"{module}.")]


@dataclass(frozen=True)
class Paired:
    """The names, group after group, and by which rule they were found ("": they were given)."""

    names: Groups
    rule: str = ""


def pair(
    parameters: Parameters,
    sizes: Sequence[int],
    given: Sequence[Sequence[str]] | None,
    moments: Sequence[Shape | None],
    optimizer: str,
    trainer: bool,
) -> Paired:
    """The names of an optimizer's parameters.

    `sizes` is how many there are in each group, `given` their names where the optimizer has them.
    `moments` has one item a parameter, group after group: the shape of its moments, None where it
    has none. `optimizer` is what it is called ("actor"), `trainer` whether transformers' Trainer
    made the groups. Raises UsageError with what was found and what to give.
    """
    if given is not None:
        return Paired(_by_names(parameters, given, moments, optimizer))
    fitting: dict[tuple[str, ...], str] = {}
    for rule, order in _rules(parameters, sizes, moments, optimizer, trainer):
        if _fits(parameters, order, moments):
            fitting.setdefault(tuple(order), rule)
            if trainer:
                break
    if not fitting:
        raise _no_order(parameters, sizes, moments)
    if len(fitting) > 1:
        raise UsageError(
            f"the optimizer's {sum(sizes)} parameters have no names, and more than one order fits "
            f"them: {'; '.join(fitting.values())}",
            ADVICE,
        )
    ((names, rule),) = fitting.items()
    return Paired(_cut(names, sizes), rule)


def _by_names(
    parameters: Parameters,
    given: Sequence[Sequence[str]],
    moments: Sequence[Shape | None],
    optimizer: str,
) -> Groups:
    groups = [[parameters.resolve(n) for n in group] for group in given]
    if optimizer and any(n is None for group in groups for n in group):  # model.actor's own names
        groups = [[parameters.resolve(f"{optimizer}.{n}") for n in group] for group in given]
    told = [n for group in given for n in group]
    found = [n for group in groups for n in group]
    problems = [f"not in the model: {n}" for n, f in zip(told, found, strict=True) if f is None]
    twice = {f for f in found if f is not None and found.count(f) > 1} if not problems else set()
    problems += [f"named twice: {n}" for n in sorted(twice)]
    problems += [
        f"moments of {told[i]} are {dims(shape)}, the parameter is {dims(parameters.shapes[name])}"
        for i, (name, shape) in enumerate(zip(found, moments, strict=True))
        if name is not None and shape is not None and shape != parameters.shapes[name]
    ]
    if problems:
        more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise ZooError(
            f"of the optimizer's {len(told)} parameters, {len(problems)} are not the model's",
            "give the optimizer of this model, or name the model that it is of",
            [*problems[:_SHOWN], *more],
        )
    return [[n for n in group if n is not None] for group in groups]


def _rules(
    parameters: Parameters,
    sizes: Sequence[int],
    moments: Sequence[Shape | None],
    optimizer: str,
    trainer: bool,
) -> Iterator[tuple[str, list[str]]]:
    """The orders in which training scripts hand over parameters, with what each is called."""
    every = list(parameters.shapes)
    if trainer:
        rule = "transformers' Trainer: those with weight decay, then biases and norms"
        names = _split(every, lambda n: not _without_decay(parameters, n))
        yield rule, names
        if sum(sizes) < len(every) and (only := _only_way(parameters, names, moments)):
            yield f"{rule}; of {len(every)} the only {sum(sizes)} whose shapes fit", only
    scope, order = every, "the order of the model"
    if own := parameters.below(optimizer) if optimizer else []:
        scope, order = own, f"the order of the model's {optimizer}"
    elif len(every) != sum(sizes):
        live = [n for n in every if "target" not in n.partition(".")[0]]
        if len(live) == sum(sizes):
            scope, order = live, "the order of the model, without its target network"
    yield order, scope
    if len(sizes) == 2:
        for what, first in _GROUPINGS.items():
            names = _split(scope, lambda n, first=first: first(parameters, n))  # type: ignore[misc]
            if sum(first(parameters, n) for n in scope) == sizes[0]:
                yield f"{what}, each in {order}", names
    if sum(sizes) < len(scope):
        yield from _parts(parameters, scope, order, moments)


def _parts(
    parameters: Parameters, scope: Sequence[str], order: str, moments: Sequence[Shape | None]
) -> Iterator[tuple[str, list[str]]]:
    """Orders for fewer parameters than there are: a whole module's; else, some having been left out
    (frozen), the only ones whose shapes fit."""
    modules = dict.fromkeys(m for name in scope for m in _modules(name))
    whole = {m: names for m in modules if len(names := parameters.below(m)) == len(moments)}
    fitting = {m: names for m, names in whole.items() if _fits(parameters, names, moments)}
    for module, names in fitting.items():
        yield f"{order}, of {module}", names
    if not fitting and (only := _only_way(parameters, scope, moments)):
        yield f"{order}; of {len(scope)} parameters the only {len(moments)} whose shapes fit", only


def _modules(name: str) -> list[str]:
    """The modules that a parameter lies in, outermost first."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _without_decay(parameters: Parameters, name: str) -> bool:
    return name in parameters.layer_norms or bool(_NO_DECAY.search(name.lower()))


# How scripts divide parameters into two groups: which come first.
_GROUPINGS: dict[str, Callable[[Parameters, str], bool]] = {
    "first those with weight decay, then biases and norms": (lambda p, n: not _without_decay(p, n)),
    "first biases and norms, then those with weight decay": _without_decay,
    "first matrices, then vectors": lambda p, n: len(p.shapes[n]) >= 2,
    "first vectors, then matrices": lambda p, n: len(p.shapes[n]) < 2,
}


def _split(names: Iterable[str], first: Callable[[str], bool]) -> list[str]:
    """In two parts, the order kept in each."""
    return sorted(names, key=lambda n: not first(n))


def _fits(parameters: Parameters, names: Sequence[str], moments: Sequence[Shape | None]) -> bool:
    return len(names) == len(moments) and all(
        shape in (None, parameters.shapes[name]) for name, shape in zip(names, moments, strict=True)
    )


def _only_way(
    parameters: Parameters, scope: Sequence[str], moments: Sequence[Shape | None]
) -> list[str] | None:
    """The parameters that `moments` are of, some having been left out (frozen); None where their
    shapes fit in no way, or in more than one."""
    ways = [1] + [0] * len(moments)  # of fitting the first i moments, so far
    for name in scope:
        for i in range(len(moments), 0, -1):
            if moments[i - 1] in (None, parameters.shapes[name]):
                ways[i] = min(2, ways[i] + ways[i - 1])
    if ways[-1] != 1:
        return None
    names: list[str] = []
    for name in scope:
        if len(names) < len(moments) and moments[len(names)] in (None, parameters.shapes[name]):
            names.append(name)
    return names


def _cut(names: Sequence[str], sizes: Sequence[int]) -> Groups:
    groups, start = [], 0
    for size in sizes:
        groups.append(list(names[start : start + size]))
        start += size
    return groups


def _no_order(
    parameters: Parameters, sizes: Sequence[int], moments: Sequence[Shape | None]
) -> UsageError:
    found = ", ".join("none" if s is None else dims(s) for s in moments[:_SHOWN])
    there = ", ".join(dims(s) for s in list(parameters.shapes.values())[:_SHOWN])
    groups = f" in groups of {', '.join(map(str, sizes))}" if len(sizes) > 1 else ""
    return UsageError(
        f"the optimizer has {sum(sizes)} parameters{groups} and does not name them; no order that "
        f"is known pairs them with the {len(parameters.shapes)} of the model",
        ADVICE,
        [
            f"shapes of its moments: {found}{', ...' if len(moments) > _SHOWN else ''}",
            f"of the parameters: {there}{', ...' if len(parameters.shapes) > _SHOWN else ''}",
        ],
    )
