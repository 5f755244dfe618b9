"""A checkpoint for another config of its family: a new head, everything else kept."""

from __future__ import annotations

import dataclasses

from zoo.checkpoint.plan import Plan, Step
from zoo.model import Config


def transfer(plan: Plan, config: Config) -> Plan:
    """The plan for another config of the family: what fits is kept, the rest starts afresh.

    Tensors of the same canonical name (with or without the prefix that a head brings) and shape
    are read as before. `fresh` of the result names those that the file cannot give; a notice says
    what is new and what goes unused.
    """
    model = plan.family
    layout = model.layout_of(config)
    by_name = {step.names: step for step in plan.steps}
    steps: list[Step] = []
    fresh: list[str] = []
    for view in layout.view(plan.target_tree):
        if view.entry.tied_to is not None:
            continue
        names = tuple(t.name for t in view.entry.torch)
        found = next(
            (by_name[alias] for alias in _aliases(names, model.base_prefix) if alias in by_name),
            None,
        )
        if found and [i.shape for i in found.target_infos] == [t.shape for t in view.tensors]:
            targets = tuple(t.name for t in view.tensors)
            steps.append(dataclasses.replace(found, names=names, targets=targets))
        elif view.entry.constant is None:
            fresh += names
    read = {s for step in steps for s in step.sources}
    unused = [s for step in plan.steps for s in step.sources if s not in read]
    told = [f"new, not from the checkpoint: {', '.join(fresh)}"] if fresh else []
    told += [f"in the checkpoint, not used: {', '.join(unused)}"] if unused else []
    return dataclasses.replace(
        plan,
        layout=layout,
        config=config,
        steps=tuple(steps),
        fresh=tuple(fresh),
        told=(*plan.told, *told),
        label=dataclasses.replace(plan.label, config=config),
    )


def _aliases(names: tuple[str, ...], prefix: str) -> list[tuple[str, ...]]:
    return [
        names,
        tuple(n.removeprefix(prefix) for n in names),
        tuple(prefix + n for n in names),
    ]
