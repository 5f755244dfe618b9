"""What the user says of the model in a checkpoint, looked up."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo import hub, registry
from zoo.checkpoint import stated_layout
from zoo.checkpoint.label import read_config_file, read_label
from zoo.containers import open_checkpoint
from zoo.containers.errors import UsageError
from zoo.layout import Layout
from zoo.model import Config, Model, override


@dataclass(frozen=True)
class Request:
    """What the user said of the model: nothing, a family, a config of it, or the layout itself; and
    what its tensors lie below, where a file holds more than one model."""

    model: Model | None = None
    config: Config | None = None
    layout: Layout | None = None
    prefix: str | None = None

    @property
    def silent(self) -> bool:
        """Whether it leaves open what the model is."""
        return self.model is None and self.config is None and self.layout is None


UNSTATED = Request()


def make_request(
    model: str | None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None,
    layout: Any = None,
    prefix: str | None = None,
) -> Request:
    """What the user said of the model, looked up.

    `model` names a family or a preset; `config` is a config.json, a preset or the fields
    themselves; a `layout`, as `as_layout` takes it, is instead of both. `prefix` is what stands
    before the names of the model's tensors, where a file holds others too. Raises UsageError for
    names that nothing has.
    """
    if layout is not None:
        if model is not None or config is not None:
            raise UsageError(
                "a layout says what the tensors are, and so does a model or a config",
                "give the layout, or the other two",
            )
        return Request(layout=as_layout(layout), prefix=prefix)
    found = registry.get(model) if model else None
    family = found.model if found else None
    stated: Config | None = found.config if found else None
    if isinstance(config, Mapping):
        if family is None:
            raise UsageError(
                "the fields of a config do not say of which model", "name it: model=..."
            )
        stated = override(stated or family.config(), config)
    elif config is not None:
        path = Path(config)
        if path.is_file():
            label = read_config_file(path)
            if label.model is None:
                raise UsageError(
                    f"{path} does not describe a model of the zoo", "`zooconvert models` lists them"
                )
            named, stated = label.model, label.config
        else:
            try:
                preset = registry.get(os.fspath(config))
            except UsageError as e:
                raise UsageError(
                    f"the config {config} is neither a file here nor a preset", e.advice
                ) from None
            named, stated = preset.model, preset.config or stated
        if family is not None and named.name != family.name:
            raise UsageError(
                f"{config} is a config of {named.name}, not of {family.name}", "name the same twice"
            )
        family = named
    return Request(family, stated, prefix=prefix)


def as_layout(given: Any) -> Layout:
    """A layout as users give one: a Layout; JSON data as `Layout.to_json()` gives it; the path of
    a file of such data; or the path of a checkpoint that a layout came with.

    Raises CorruptInput for what is not a layout, UsageError for a path without one.
    """
    if isinstance(given, Layout):
        return given
    if not isinstance(given, str | os.PathLike):
        return stated_layout.read_data(given, "the data given as layout")
    path = Path(given).expanduser()
    if path.suffix == ".json" and path.is_file():
        return stated_layout.read_file(path)
    if path.suffix == ".json":
        raise UsageError(
            f"there is no layout {path}",
            "give a JSON file, or a checkpoint that a layout came with",
        )
    with open_checkpoint(hub.locate(given)) as reader:
        label = read_label(reader)
    if label.problem is not None:
        raise label.problem
    if label.layout is not None:
        return label.layout
    if label.model is not None:
        return label.model.layout_of(label.config)
    raise UsageError(
        f"no layout came with {given}",
        "give a layout's JSON file (FILE.json), or a checkpoint that was converted with a layout",
    )
