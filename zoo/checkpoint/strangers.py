"""Models that are not of the zoo and whose checkpoints look as if they were: what is stated of a
checkpoint, and what its names tell, is held against what it was found to be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from zoo.checkpoint.label import Label
from zoo.checkpoint.request import Request
from zoo.containers.errors import UsageError
from zoo.layout import Shape
from zoo.model import Model, Others

_ADVICE = "`zooconvert models` lists what it has; --model takes it for one of them nevertheless"


class Weighed(NamedTuple):
    """What is to be said of a reading, and whose the names are where it does not stand."""

    told: tuple[str, ...] = ()
    theirs: str = ""


def refuse_stated(label: Label, request: Request) -> None:
    """UsageError where a config.json states another model and the user says nothing."""
    if label.foreign and request.silent:
        raise UsageError(
            f"{label.source} says that this is {label.foreign!r}, which the zoo does not have",
            _ADVICE,
        )


def refuse_named(models: Iterable[Model], shapes: Mapping[str, Shape]) -> None:
    """UsageError where a family knows these names as another model's."""
    for model in models:
        if model.others and (told := model.others(shapes).told):
            raise refusal(told)


def weigh(
    model: Model | None, shapes: Mapping[str, Shape], label: Label, request: Request
) -> Weighed:
    """Whether a reading that fits stands, and what the user should know of it."""
    others = model.others(shapes) if model and model.others else Others()
    if others.told and label.model is None and request.silent:
        return Weighed(theirs=others.told)
    name = model.name if model else "what the layout says"
    if label.foreign:
        told = f"{label.source} says that this is {label.foreign!r}: taken for {name} as you say"
    elif others.told and not request.silent:
        told = f"the names are {others.told}: taken for {name} as you say"
    elif others.alike and label.model is None and request.silent:
        told = (
            f"taken for {name}, which nothing states: tensors of {others.alike} are called the "
            "same, and mean something else; a config.json or --model settles it"
        )
    else:
        return Weighed()
    return Weighed((told,))


def refusal(theirs: str) -> UsageError:
    """The error for names that are another model's."""
    return UsageError(f"the names are {theirs}, which the zoo does not have", _ADVICE)
