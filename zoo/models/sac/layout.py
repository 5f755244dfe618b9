"""Every tensor of SAC, under the names that stable-baselines3 gives it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from zoo.layout import Entry, linear
from zoo.layout.ops import Shape
from zoo.model import dim
from zoo.models.sac.config import Config


def layout(c: Config) -> Iterator[Entry]:
    """All entries, in the order of the state_dict."""
    yield from _mlp("actor.latent_pi", (c.obs_size, *c.pi))
    yield from linear("actor.mu", c.pi[-1], c.action_size)
    yield from linear("actor.log_std", c.pi[-1], c.action_size)
    for critic in ("critic", "critic_target")[: 1 + c.target]:
        for name in ("qf0", "qf1"):
            yield from _mlp(f"{critic}.{name}", (c.obs_size + c.action_size, *c.qf, 1))


def _mlp(name: str, sizes: tuple[int, ...]) -> Iterator[Entry]:
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        yield from linear(f"{name}.{2 * i}", n_in, n_out)


_NAMES = re.compile(
    r"(actor\.(latent_pi\.\d*[02468]|mu|log_std)|(critic|critic_target)\.qf[01]\.\d*[02468])\."
    r"(weight|bias)"
)


def infer(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """The Config fields that names and shapes tell; None where there are tensors of other names."""
    if not all(_NAMES.fullmatch(name) for name in shapes):
        return None
    tops = {name.partition(".")[0] for name in shapes}
    if not {"actor", "critic"} <= tops:
        return None
    fields = {
        "obs_size": dim(shapes, r"^actor\.latent_pi\.0\.weight$", 1),
        "action_size": dim(shapes, r"^actor\.(mu|log_std)\.(weight|bias)$", 0),
        "pi": _widths(shapes, r"actor\.latent_pi"),
        "qf": _widths(shapes, r"\.qf[01]")[:-1],
        "target": "critic_target" in tops,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _widths(shapes: Mapping[str, Shape], name: str) -> tuple[int, ...]:
    """What the layers of a Sequential give, first to last."""
    steps = {int(m[1]) for n in shapes if (m := re.search(rf"{name}\.(\d+)\.", n))}
    sizes = (dim(shapes, rf"{name}\.{i}\.(weight|bias)$", 0) for i in sorted(steps))
    return tuple(n for n in sizes if n is not None)
