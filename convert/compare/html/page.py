"""The sections of the page, the verdict first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from convert.compare.html.plots import depth, histogram, losses
from convert.compare.html.tables import differences_table, rows_table
from convert.compare.html.text import code, definitions, name, number, size, some, text, times
from convert.compare.report import Report, Training
from convert.diagnose.divergence import Divergence
from convert.judge.noise import EXACT, MARGIN
from convert.judge.rows import Row


def summary(report: Report) -> str:
    """The one line below the verdict: why it is so."""
    return _why_same(report) if report.verdict == "same" else _why_different(report)


def _why_different(report: Report) -> str:
    parts = []
    if report.differences:
        total = f" of {report.compared:,}" if report.compared > len(report.differences) else ""
        parts.append(f"{len(report.differences):,}{total} tensors differ in their bits")
    bad = [
        (sum(r.judged and not r.same for r in rows), len(rows), w) for rows, w in _groups(report)
    ]
    beyond = [f"{n:,} of {some(total, what)}" for n, total, what in bad[:2] if n]
    optimizers = [t.optimizer for t, (n, *_) in zip(report.training, bad[2:], strict=True) if n]
    beyond += [f"training with {text(_and(optimizers))}"] if optimizers else []
    if beyond:
        parts.append(f"beyond the rounding noise: {_and(beyond)}")
    told = ""
    first = next((r for r in report.rows if r.judged and not r.same), None)
    if report.first_divergence is None and first is not None:
        told = (
            f" The first is {code(first.name)}, {times(first.ratio)} times the noise; "
            f"the limit is {MARGIN:g}."
        )
    elif report.first_divergence is None:
        told = f" The first is {code(report.differences[0].name)}."
    sentence = "; ".join(parts)
    return sentence[0].upper() + sentence[1:] + "." + told


def _groups(report: Report) -> list[tuple[Sequence[Row], str]]:
    """The rows of each level, and what one of them is called."""
    runs = [(t.rows, "value") for t in report.training]
    return [(report.outputs, "output"), (report.gradients, "gradient"), *runs]


def _and(items: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1])))


def _why_same(report: Report) -> str:
    parts = []
    if report.compared:
        parts.append(f"all {some(report.compared, 'tensor')} are equal bit for bit")
    judged = [r for r in report.rows if r.judged]
    if judged:
        worst = max(judged, key=lambda r: r.ratio)
        what = [some(len(rows), noun) for rows, noun in _groups(report)[:2] if rows]
        if report.training:
            what.append(f"training with {text(_and([t.optimizer for t in report.training]))}")
        parts.append(
            f"{_and(what)} stay within {MARGIN:g} times the rounding noise (farthest: "
            f"{times(worst.ratio)}, {code(worst.name)})"
        )
    sentence = "; ".join(parts) or "nothing was compared"
    return sentence[0].upper() + sentence[1:] + "."


def divergence(found: Divergence | None) -> str:
    """Where the two part, what it looks like, how big it is, and what to try."""
    if found is None:
        return ""
    where = {
        "forward": "in the forward pass",
        "backward": "in the backward pass",
        "training": "in training",
    }[found.direction]
    between = ""
    if found.between:
        between = f"between {code(found.between[0])} and {code(found.between[1])}"
    size_of = (
        f"{number(found.error)}, where rounding explains {number(found.noise)}: "
        f"<strong>{times(found.ratio)} times the noise</strong> (the limit is {MARGIN:g})"
        if found.error
        else ""
    )
    terms = {
        "How big": size_of,
        "Parameter": code(found.tensor) if found.tensor else "",
        "On the Flax side": code(found.flax_layer) if found.flax_layer else "",
        "Where": between,
        "Cause": text(found.cause),
        "Try": f"<strong>{text(found.advice)}</strong>" if found.advice else "",
    }
    return (
        f'<section id="divergence" class="divergence"><h2>First divergence, {where}</h2>'
        f'<p class="layer">{code(found.layer)}</p>'
        f"<p>{text(found.diagnosis)}</p>"
        f"{definitions(terms)}</section>"
    )


def levels(report: Report) -> str:
    """What was compared, a line a level."""
    lines = []
    if report.compared or report.differences:
        compared = f"{some(report.compared, 'tensor')}, {size(report.nbytes)}"
        lines.append(_level("bits", len(report.differences), "", compared))
    titles = ["outputs", "gradients", *(f"training, {t.optimizer}" for t in report.training)]
    for title, (rows, _) in zip(titles, _groups(report), strict=True):
        if rows:
            judged = [r for r in rows if r.judged]
            compared = some(len(rows), "value")
            if len(judged) < len(rows):
                compared += f", {len(rows) - len(judged):,} not judged"
            worst = max((r.ratio for r in judged), default=0.0)
            bad = sum(not r.same for r in judged)
            lines.append(_level(title, bad, f"{times(worst)} × noise", compared))
    heads = "".join(
        f'<th scope="col">{h}</th>' for h in ("level", "compared", "farthest", "verdict")
    )
    return (
        f'<section id="levels"><h2 class="unseen">Levels</h2><table class="levels">'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></section>"
    )


def _level(title: str, bad: int, worst: str, compared: str) -> str:
    kind, word = ("d", f"{bad:,} differ{'s' if bad == 1 else ''}") if bad else ("s", "same")
    return (
        f'<tr class="{kind}"><th scope="row">{text(title)}</th><td>{compared}</td>'
        f"<td>{worst}</td><td>{word}</td></tr>"
    )


def outputs(report: Report) -> str:
    """The plots of the outputs and their table."""
    if not report.outputs:
        return ""
    table = rows_table(report.outputs, "outputs", "Outputs and intermediates")
    plots = f"{depth(report.outputs, 'outputs')}{histogram(report.outputs)}"
    plots = f'<div class="pair wide">{plots}</div>'
    return f'<section id="outputs"><h2>Outputs and intermediates</h2>{plots}{table}</section>'


def gradients(report: Report) -> str:
    """Likewise of the gradients, which are in the order of the parameters."""
    if not report.gradients:
        return ""
    table = rows_table(report.gradients, "gradients", "Gradients")
    plot = depth(report.gradients, "gradients")
    return f'<section id="gradients"><h2>Gradients</h2>{plot}{table}</section>'


def training(report: Report) -> str:
    """For each optimizer the losses, and what the steps left."""
    if not report.training:
        return ""
    parts = [_run(i, t) for i, t in enumerate(report.training)]
    return f'<section id="training"><h2>Training</h2>{"".join(parts)}</section>'


def _run(i: int, t: Training) -> str:
    judged = [r for r in t.rows if r.judged]
    bad = sum(not r.same for r in judged)
    table = rows_table(t.rows, f"training.{i}.rows", f"After training with {t.optimizer}")
    told = f"{bad:,} of {len(judged):,} differ" if bad else f"all {len(judged):,} same"
    told += f", {len(t.rows) - len(judged):,} not judged" if len(judged) < len(t.rows) else ""
    return (
        f'{losses(t)}<details class="fold"{" open" if bad else ""}><summary>Loss, parameters and '
        f"statistics after {some(t.steps, 'step')} of {text(t.optimizer)}: {told}</summary>"
        f"{table}</details>"
    )


def differences(report: Report) -> str:
    """The tensors whose bits differ."""
    if not report.differences:
        return ""
    table = differences_table(report.differences)
    return f'<section id="tensors"><h2>Tensors that differ</h2>{table}</section>'


def certificate(report: Report) -> str:
    """Of the conversion that made one of the two."""
    data = report.certificate
    if not data:
        return ""
    plain = {k: v for k, v in data.items() if k not in ("tensors", "versions", "notices", "config")}
    terms = {k.replace("_", " "): _value(v) for k, v in plain.items()}
    tensors = [t for t in data.get("tensors") or [] if isinstance(t, Mapping)]
    lines = "".join(
        f'<tr><th scope="row">{_names(t, "names")}</th><td>{text(t.get("op", ""))}</td>'
        f"<td>{text(t.get('dtype', ''))}</td><td>{_names(t, 'source_sha256')}</td>"
        f"<td>{_names(t, 'target_sha256')}</td></tr>"
        for t in tensors
    )
    titles = ("tensor", "op", "dtype", "SHA-256 of the source", "SHA-256 of the target")
    heads = "".join(f'<th scope="col">{h}</th>' for h in titles)
    table = (
        f'<details class="fold"><summary>Hashes of {some(len(tensors), "tensor")}</summary>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="Hashes"><table class="hashes">'
        f"<thead><tr>{heads}</tr></thead>"
        f"<tbody>{lines}</tbody></table></div></details>"
        if lines
        else ""
    )
    notices = _list(data.get("notices") or [])
    return (
        f'<section id="certificate"><h2>Certificate of the conversion</h2>'
        f"{definitions(terms)}{notices}{table}</section>"
    )


def run(report: Report) -> str:
    """What was run, on what, with which versions; how it was judged."""
    command = f"<pre><code>{text(report.command)}</code></pre>" if report.command else ""
    terms = {
        "A": code(report.a),
        "B": code(report.b),
        "Model": text(report.model or ""),
        "Level": text(report.level),
        "Made": text(report.created),
        "Took": f"{report.seconds:.1f} s" if report.seconds else "",
    }
    config = {k: _value(v) for k, v in report.config.items()}
    versions = {k: text(v) for k, v in report.versions.items()}
    return (
        f'<section id="run"><h2>What was run</h2>{command}{definitions(terms)}'
        + (f"<h3>Configuration</h3>{definitions(config)}" if config else "")
        + (f"<h3>Versions</h3>{definitions(versions)}" if versions else "")
        + f"<h3>How it is judged</h3>{_METHOD}</section>"
    )


_METHOD = (
    "<p>Both sides run in float32 and in float64. The <em>noise</em> is the largest difference "
    "between float32 and float64 of the PyTorch side; the <em>scale</em> is the tensor’s largest "
    f"value. Two values are the same where error ≤ {MARGIN:g} · max(noise, 2⁻²³ · scale) in "
    f"float32, and error ≤ {EXACT:g} · scale in float64. No tolerance was chosen by hand.</p>"
)


def notices(report: Report) -> str:
    """What whoever reads the verdict should know."""
    return f'<section id="notices"><h2>Notices</h2>{_list(report.notices)}</section>' * bool(
        report.notices
    )


def data(report: Report) -> str:
    """The report as JSON that no parser of HTML can end early."""
    return (
        json.dumps(report.to_dict(), allow_nan=False, separators=(",", ":"))
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
    )


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return definitions({str(k): _value(v) for k, v in value.items()})
    if isinstance(value, float):
        return text(f"{value:.3g}")
    if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        return "<br>".join(text(v) for v in value)
    return name("none" if value is None else str(value))


def _names(tensor: Mapping[str, Any], key: str) -> str:
    return "<br>".join(name(str(n)) for n in tensor.get(key) or [])


def _list(items: Sequence[Any]) -> str:
    return f"<ul>{''.join(f'<li>{text(i)}</li>' for i in items)}</ul>" if items else ""
