"""Ports held against our linters: docs/ports_lint.json.

    lint_ports.py [DIR]

The files are those that `port_corpus.py --source` or `--text` wrote, in build/ports. ruff checks
them with this project's settings, mypy with those of our models: strict, but that calls of modules
give Any.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from port_corpus import twins

ROOT = Path(__file__).parents[1]
MYPY = """[mypy]
strict = true
python_version = 3.11
disable_error_code = type-arg,no-any-return,no-untyped-call
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "ports")
    folder = parser.parse_args().folder
    files = sorted(p.name for p in folder.glob("*.py"))
    made: dict[str, Any] = {"files": len(files)}
    for name, found in (("ruff", ruff(folder)), ("mypy", mypy(folder, files))):
        made[name] = {
            "clean": len(files) - len(found),
            "rules": dict(Counter(r for rules in found.values() for r in set(rules)).most_common()),
            "others": {file: sorted(set(rules)) for file, rules in sorted(found.items())},
        }
    alike = {name: twins((folder / name).read_text()) for name in files}
    made["twins"] = {name: found for name, found in alike.items() if found}
    (ROOT / "docs" / "ports_lint.json").write_text(json.dumps(made, indent=1) + "\n")
    for name in ("ruff", "mypy"):
        print(f"{name}: {made[name]['clean']} of {len(files)} clean; {made[name]['rules']}")
    print(f"twins: {made['twins']}")


def ruff(folder: Path) -> dict[str, list[str]]:
    """The rules that files break, by file."""
    settings = ["--config", str(ROOT / "pyproject.toml"), "--config", f'src = ["{ROOT}"]']
    told = _run("ruff", "check", *settings, "--no-cache", "--output-format", "json", str(folder))
    found: dict[str, list[str]] = {}
    for one in json.loads(told):
        found.setdefault(Path(one["filename"]).name, []).append(one["code"])
    return found


def mypy(folder: Path, files: list[str]) -> dict[str, list[str]]:
    """The kinds of errors that files have, by file."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = Path(scratch) / "mypy.ini"
        settings.write_text(MYPY)
        given = ["--config-file", str(settings), "--cache-dir", scratch, "--output", "json"]
        told = _run("mypy", *given, *files, cwd=folder, env={"MYPYPATH": str(ROOT)})
    found: dict[str, list[str]] = {}
    for line in told.splitlines():
        one = json.loads(line) if line.startswith("{") else {}
        if one.get("severity") == "error":
            found.setdefault(one["file"], []).append(one["code"])
    return found


def _run(tool: str, *given: str, **more: Any) -> str:
    env = {**os.environ, **more.pop("env", {})}
    command = [str(Path(sys.executable).parent / tool), *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, **more)
    if done.returncode > 1:
        raise SystemExit(done.stderr or done.stdout)
    return done.stdout


if __name__ == "__main__":
    main()
