"""Tables of rows and of differing tensors: readable as they are, sortable where scripts run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from convert.compare.html.plots import small_histogram
from convert.compare.html.text import definitions, name, number, plain, shape, some, text, times
from convert.judge.bits import TensorDifference
from convert.judge.noise import EXACT, MARGIN
from convert.judge.rows import Row

STATISTICS = 1000  # rows of a table that carry them; in a longer one, the farthest from their noise
LOWEST = 0.01  # the bar's left end, as a multiple of the noise


@dataclass(frozen=True)
class Column:
    """A heading, and the key of the JSON by which it sorts ("" for the order of execution)."""

    title: str
    key: str
    about: str = ""
    numeric: bool = False


_ROWS = (
    Column("#", "", "the order of execution", True),
    Column("tensor", "name"),
    Column("layer", "layer", "type of the layer that made it"),
    Column("shape", "shape"),
    Column("error", "error", "largest difference in float32", True),
    Column("noise", "noise", "largest difference of float32 and float64 in PyTorch", True),
    Column("error ÷ noise", "ratio", f"above {MARGIN:g} is different", True),
    Column("float64 error", "error64", f"at most {EXACT:g} of the largest value", True),
    Column("verdict", "same"),
)
_DIFFERENCES = (
    Column("#", "", "the order in the model", True),
    Column("tensor", "name"),
    Column("difference", "why"),
    Column("diagnosis", "diagnosis"),
    Column("elements", "count", "how many differ", True),
    Column("max error", "max_error", "", True),
    Column("mean error", "mean_error", "over all elements", True),
    Column("first at", "first", "index of the first that differs"),
)


def rows_table(rows: Sequence[Row], path: str, caption: str) -> str:
    """`path` is where the JSON has these rows: "outputs", "training.0.rows"."""
    farthest = sorted(rows, key=lambda r: (r.same, -r.ratio))[:STATISTICS]
    detailed = {id(r) for r in farthest}
    high = _highest(rows)
    body = [_row(i, r, high, id(r) in detailed) for i, r in enumerate(rows)]
    limit = _along(MARGIN, high)
    more = len(rows) - len(farthest)
    note = (
        f'<p class="quiet">Statistics are shown of the {STATISTICS:,} farthest from their noise; '
        f"those of {some(more, 'other row')} are in the page’s JSON.</p>"
        if more and any(r.statistics for r in rows)
        else ""
    )
    bad = sum(r.judged and not r.same for r in rows)
    return _table(_ROWS, body, path, caption, "rows", f"--limit:{limit:.3f}", bad) + note


def differences_table(differences: Sequence[TensorDifference]) -> str:
    """The tensors that are not the same bit for bit."""
    body = [_difference(i, d) for i, d in enumerate(differences)]
    caption = "Tensors that differ"
    return _table(_DIFFERENCES, body, "differences", caption, "tensors", "", len(body))


def _row(i: int, r: Row, high: float, detailed: bool) -> str:
    kind = "u" if not r.judged else "s" if r.same else "d"
    verdict = {"u": "not judged", "s": "same", "d": "differs"}[kind]
    title = name(r.name)
    if detailed and r.statistics is not None:
        title = f"<details><summary>{title}</summary>{_statistics(r)}</details>"
    if r.note:
        title += f'<p class="note">{text(r.note)}</p>'
    far = " over" if r.error64 > EXACT * r.scale and kind == "d" else ""
    return (
        f'<tr class="{kind}"><td>{i + 1}</td><th scope="row">{title}</th><td>{text(r.layer)}</td>'
        f"<td>{shape(r.shape)}</td><td>{number(r.error)}</td><td>{number(r.noise)}</td>"
        f'<td style="--x:{_along(r.ratio, high):.3f}">{times(r.ratio)}</td>'
        f'<td class="e{far}">{number(r.error64)}</td><td>{verdict}</td></tr>'
    )


def _statistics(r: Row) -> str:
    s = r.statistics
    assert s is not None
    described = {
        "smallest": plain(s.minimum),
        "largest": plain(s.maximum),
        "mean": plain(s.mean),
        "std": plain(s.std),
        "mean error": number(s.mean_error),
        "error, of the largest value": number(r.error / r.scale) if r.scale else "",
        "float64 error, likewise": number(r.error64 / r.scale) if r.scale else "",
    }
    used = [i for i, n in enumerate(s.bins) if n]
    if not used:
        return definitions(described)
    low, high = used[0], used[-1]
    ends = ("equal" if low == 0 else number(10.0 ** (low - 20))), number(10.0 ** (high - 19))
    return (
        f"{definitions(described)}{small_histogram(s.bins[low : high + 1])}"
        f'<p class="ends"><span>{ends[0]}</span><span>errors</span><span>{ends[1]}</span></p>'
    )


def _difference(i: int, d: TensorDifference) -> str:
    first = "" if d.first is None else str(list(d.first))
    return (
        f'<tr class="d"><td>{i + 1}</td><th scope="row">{name(d.name)}</th><td>{text(d.why)}</td>'
        f"<td>{text(d.diagnosis or '')}</td><td>{f'{d.count:,}' if d.count else ''}</td>"
        f"<td>{number(d.max_error)}</td><td>{number(d.mean_error)}</td><td>{first}</td></tr>"
    )


def _table(
    columns: Sequence[Column],
    body: Sequence[str],
    path: str,
    caption: str,
    kind: str,
    style: str,
    bad: int,
) -> str:
    heads = "".join(map(_head, columns))
    style = f' style="{style}"' if style else ""
    only = (
        f'<label><input type="checkbox" class="only"> only what differs ({bad:,})</label>'
        if 0 < bad < len(body)
        else ""
    )
    return (
        f'<div class="tools" hidden><label>Filter <input type="search" class="filter" '
        f'placeholder="name or layer" autocomplete="off"></label>{only}'
        f"<output>{len(body):,} of {len(body):,}</output></div>"
        f'<table class="{kind}" data-rows="{path}"{style}>'
        f'<caption class="unseen">{text(caption)}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    )


def _head(c: Column) -> str:
    kind = ' class="n"' if c.numeric else ""
    about = f' title="{text(c.about)}"' if c.about else ""
    return f'<th scope="col" data-key="{c.key}"{kind}{about}>{text(c.title)}</th>'


def _highest(rows: Sequence[Row]) -> float:
    """The bar's right end: the decade above the farthest row, between 100 and 1e9."""
    finite = [r.ratio for r in rows if math.isfinite(r.ratio)]
    return 10.0 ** min(9, max(2, math.ceil(math.log10(max([*finite, 1.0])))))


def _along(ratio: float, high: float) -> float:
    """Where on the bar a ratio lies, from 0 to 1."""
    if not ratio > LOWEST:
        return 1.0 if math.isnan(ratio) else 0.0
    return min(1.0, math.log10(ratio / LOWEST) / math.log10(high / LOWEST))
