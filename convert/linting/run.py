"""`convert.lint`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from convert.linting.ambiguous import ambiguous
from convert.linting.findings import SEVERITIES, Finding, Lint
from convert.linting.hyperparameters import parameters
from convert.linting.pairs import contradictions
from convert.linting.subject import read
from zoo.checkpoint.request import make_request

Source = str | os.PathLike[str]


def lint(
    path: Source,
    other: Source | None = None,
    *,
    model: str | None = None,
    config: Source | Mapping[str, Any] | None = None,
    layout: Any = None,
    prefix: str | None = None,
) -> Lint:
    """What to check before a port of the checkpoint `path` is trusted, the gravest first.

    With `other`, also what the two contradict each other in. Reads names, shapes and configs, no
    tensor, and imports no framework. A model that the zoo does not have is looked at by its names
    and the `config.json` beside it. `model`, `config`, `layout` and `prefix` are as in
    `convert.convert`.

    Raises ZooError for what is not a checkpoint.
    """
    request = make_request(model, config, layout, prefix)
    subject = read(path, request)
    found: list[Finding] = []
    notices = list(subject.notices)
    if other is not None:
        second = read(other, request)
        found += contradictions(subject, second)
        notices += [n for n in second.notices if n not in notices]
    found += [*parameters(subject), *ambiguous(subject)]
    return Lint(
        os.fspath(path),
        None if other is None else os.fspath(other),
        subject.title,
        len(subject.tensors),
        sorted(found, key=lambda f: SEVERITIES.index(f.severity)),
        notices,
    )
