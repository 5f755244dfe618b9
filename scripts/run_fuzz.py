"""Fuzzes one of our readers, guided by coverage where atheris is at hand, else by plain mutations.

atheris is no dependency: install it into an environment of its own of the same Python, and name
that: `scripts/fuzz pt --runs 1000000 --atheris DIR`. What covers something new is kept in
tests/data/fuzz/READER.zip with --keep; what breaks a reader is left in a file that is named.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import pkgutil
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from reliability import section, write_section  # noqa: E402

SMALL = 4096  # bytes of an input that is kept


def plain(reader: str, runs: int, seed: int) -> int:
    """Seeded mutations, without coverage; the number of runs."""
    import fuzzing

    seeds, rng = fuzzing.corpus(reader), random.Random(seed)
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        for _ in range(runs):
            fuzzing.run(reader, fuzzing.mutated(rng.choice(seeds), rng, seeds), Path(folder))
    return runs


def guided(reader: str, runs: int, inputs: Path) -> None:
    """In this process, which atheris ends."""
    import atheris

    with atheris.instrument_imports(include=["zoo.containers", "zoo.checkpoint"]):
        import fuzzing

        import zoo.containers

        for module in pkgutil.walk_packages(zoo.containers.__path__, "zoo.containers."):
            importlib.import_module(module.name)

    folder = Path(tempfile.mkdtemp(dir=memory()))

    def one(data: bytes) -> None:
        fuzzing.run(reader, data, folder)

    told = [f"-runs={runs}", "-timeout=60", "-rss_limit_mb=2048", "-max_len=4096"]
    told += [f"-artifact_prefix={tempfile.gettempdir()}/fuzz-{reader}-", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *told, str(inputs)], one)
    atheris.Fuzz()


def memory() -> str | None:
    """Where files cost no disk."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


def seeds(reader: str) -> list[bytes]:
    """Where nothing is kept yet: the small ones of the hostile files."""
    import fuzzing
    import hostile

    if (fuzzing.CORPUS / f"{reader}.zip").is_file():
        return fuzzing.corpus(reader)
    found = []
    for make in hostile.every()[reader].values():
        with tempfile.TemporaryDirectory() as folder:
            path = make(Path(folder))
            if reader == "orbax":
                headers = list(path.glob("a/*z*arr*"))
                parts = [path / "_METADATA", *headers]
                data = b"\n--\n".join(p.read_bytes() for p in parts if p.stat().st_size < SMALL)
            elif reader == "label":
                data = label(path)
            elif reader in ("config", "certificate", "journal"):
                name = {"config": "**/config.json", "journal": ".*/journal.json"}
                files = list(Path(folder).glob(name.get(reader, "*.certificate.json")))
                data = b"".join(f.read_bytes() for f in files if f.stat().st_size < SMALL)
            else:
                data = path.read_bytes() if path.stat().st_size < SMALL else b""
            if 0 < len(data) < SMALL:
                found.append(data)
    return found


def label(path: Path) -> bytes:
    """The metadata of a safetensors file, as `fuzzing` takes it."""
    import json

    raw = path.read_bytes()
    if len(raw) > SMALL:
        return b""
    told = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    for key, value in told.items():
        with contextlib.suppress(ValueError):
            told[key] = json.loads(value)
    return json.dumps(told).encode()


def keep(reader: str, found: list[bytes], most: int) -> None:
    """The smallest of what covers something, in the archive."""
    import fuzzing

    fuzzing.CORPUS.mkdir(exist_ok=True)
    chosen = sorted({x for x in found if len(x) < SMALL}, key=lambda x: (len(x), x))[:most]
    with zipfile.ZipFile(fuzzing.CORPUS / f"{reader}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i, data in enumerate(chosen):
            archive.writestr(zipfile.ZipInfo(f"{i:04d}"), data, zipfile.ZIP_DEFLATED)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", help="safetensors, pt, ...: a key of fuzzing.TARGETS")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", help="an environment that has it")
    parser.add_argument("--keep", type=int, default=0, help="as many inputs as the corpus may have")
    parser.add_argument("--write", action="store_true", help="into docs/reliability.md")
    parser.add_argument("--inputs", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inputs:
        guided(options.reader, options.runs, Path(options.inputs))
    began = time.monotonic()
    if options.atheris is None:
        runs = plain(options.reader, options.runs, options.seed)
        print(f"{options.reader}: {runs} runs in {time.monotonic() - began:.0f} s, plain mutations")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        for i, data in enumerate(seeds(options.reader)):
            Path(folder, f"seed-{i:04d}").write_bytes(data)
        packages = next(Path(options.atheris, "lib").glob("python3*/site-packages"))
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", ""), str(packages)])
        told = [sys.executable, __file__, options.reader, f"--runs={options.runs}"]
        done = subprocess.run(
            [*told, f"--inputs={folder}"], env={**os.environ, "PYTHONPATH": path}, check=False
        )
        if options.keep:
            keep(options.reader, [p.read_bytes() for p in Path(folder).iterdir()], options.keep)
    seconds = time.monotonic() - began
    print(f"{options.reader}: {seconds:.0f} s, exit code {done.returncode}")
    if options.write:
        result = "none" if done.returncode == 0 else f"exit code {done.returncode}"
        record(options.reader, options.runs, seconds, result)
    return done.returncode


def record(reader: str, runs: int, seconds: float, result: str) -> None:
    """A row in docs/reliability.md: with what it said before, unless something was wrong."""
    rows = {line.split("|")[1].strip(): line for line in section(TITLE).splitlines() if "|" in line}
    kept = {n: line for n, line in rows.items() if n not in ("reader", "---")}
    before = [cell.strip() for cell in kept.get(reader, "").split("|")]
    if result == "none" and before[4:5] == ["none"]:
        runs += int(before[2].replace(",", ""))
        seconds += float(before[3].removesuffix(" s"))
    kept[reader] = f"| {reader} | {runs:,} | {seconds:.0f} s | {result} |"
    write_section(TITLE, _PAGE + "\n".join(kept.values()))


TITLE = "Fuzzing"
_PAGE = """\
Written by `scripts/fuzz READER --runs N --atheris DIR --write`: executions guided by coverage
(atheris), of all runs since something was last wrong; each begins with what was kept. Wrong is any
exception but ours, more than 60 s, or 2 GB. What covered something new and is small is kept in
`tests/data/fuzz`, and replayed and mutated by `tests/test_fuzz.py`.

| reader | executions | time | wrong |
|---|---:|---:|---|
"""


if __name__ == "__main__":
    sys.exit(main())
