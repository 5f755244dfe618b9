"""Plants every fault of tests/faults.py, looks for it, and writes docs/faults.json and .md.

`--text` plants nothing: it writes docs/faults.md again, from docs/faults.json and the causes.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "faults.json"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

HEAD = """# Planted faults

What `zooconvert verify` says of {count} models in each of which one thing is wrong, planted by
`tests/faults.py`, found by `convert.diagnose.first_divergence` and written here by
`scripts/faults.py`. {layers} of {count} are found in the right layer, {causes} of {count} have the
right diagnosis; they are of {families} families.

The layer is the dotted name of the torch module. Where the code between two layers is at fault, it
is torch's own layer between them that Flax has no counterpart of, else the module around them, else
the layer that gets the wrong input. [The causes](#causes) are listed below.

| fault | in | layer reported | diagnosis given | |
|---|---|---|---|---|
"""

LIST = """
## Causes

Every word that `cause` may be (of a divergence in `zooconvert verify --json`, see
[report.md](report.md)), what it means, and each way in which it is said, with what to try. Words in
braces are filled in. The list is `convert/diagnose/causes.py`.
"""


def main() -> None:
    """Run them all; takes a few minutes."""
    if "--text" not in sys.argv[1:]:
        TABLE.write_text(json.dumps(_run(), indent=1) + "\n")
    (ROOT / "docs" / "faults.md").write_text(document(json.loads(TABLE.read_text())))


def _run() -> list[dict[str, Any]]:
    from faults import FAULTS

    from convert.diagnose import first_divergence

    table: list[dict[str, Any]] = []
    for fault in FAULTS:
        found = first_divergence(fault.plant(), fault.mode)  # type: ignore[arg-type]
        table.append(
            {
                "title": fault.title,
                "family": fault.family,
                "mode": fault.mode,
                "expected_layers": fault.layers,
                "expected_causes": fault.causes,
                "layer": found and found.layer,
                "cause": found and found.cause,
                "diagnosis": found and found.diagnosis,
                "advice": found and found.advice,
                "layer_right": found is not None and found.layer in fault.layers,
                "cause_right": found is not None and found.cause in fault.causes,
            }
        )
        print(f"{len(table)}/{len(FAULTS)} {fault.family}: {fault.title}", file=sys.stderr)
    return table


def document(table: list[dict[str, Any]]) -> str:
    """docs/faults.md."""
    from convert.diagnose.causes import CAUSES

    head = HEAD.format(
        count=len(table),
        layers=sum(f["layer_right"] for f in table),
        causes=sum(f["cause_right"] for f in table),
        families=len(Counter(f["family"] for f in table)),
    )
    return (
        head
        + "".join(_line(f) for f in table)
        + LIST
        + "".join(_cause(word, cause) for word, cause in CAUSES.items())
    )


def _cause(word: str, cause: Any) -> str:
    said = [
        f"- {_fields(what)}\n  Try: {_fields(advice)}\n" for what, advice in cause.variants.values()
    ]
    return f"\n### {word}\n\n{cause.meaning[0].upper()}{cause.meaning[1:]}.\n\n{''.join(said)}"


def _fields(template: str) -> str:
    """A template with its fields, without their formats."""
    return re.sub(r"{(\w+)[^}]*}", r"{\1}", template).replace("*", "\\*")


def _line(f: dict[str, Any]) -> str:
    marks = [
        word
        for word, right in (("layer", f["layer_right"]), ("cause", f["cause_right"]))
        if not right
    ]
    wrong = f"wrong {' and '.join(marks)}" if marks else "right"
    where = f["family"] if f["mode"] == "forward" else f"{f['family']}, {f['mode']}"
    what = f"{f['cause']}: {f['diagnosis']}" if f["cause"] else "nothing found"
    what = what.replace("|", "\\|")
    return f"| {f['title']} | {where} | `{f['layer']}` | {what} | {wrong} |\n"


if __name__ == "__main__":
    main()
