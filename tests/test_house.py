"""The plan of the house (docs/architecture.md): floors, no import upwards, no circle."""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

import convert
import zoo

ROOT = Path(__file__).parents[1]

# From the top down; a room may import its own and those after it. Longest prefix decides.
FLOORS = (
    ("convert.__main__",),
    ("convert.cli",),
    ("convert",),  # __init__: the public names
    ("convert.testing",),
    ("convert.api",),
    ("convert.exporting",),
    ("convert.packing", "convert.linting", "convert.inspection", "convert.live"),
    ("convert.porting",),
    ("convert.engine",),
    ("convert.compare",),
    ("convert.diagnose",),
    ("convert.matching",),
    ("convert.training_state", "convert.optim"),
    ("convert.program",),
    ("convert.runtime",),
    ("convert.judge", "convert.tensors"),
    ("zoo",),
    ("zoo.loading",),
    ("zoo.checkpoint",),
    ("zoo.hub",),
    ("zoo.card",),
    ("zoo.registry",),
    ("zoo.models",),
    ("zoo.model",),
    ("zoo.probe",),
    ("zoo.layout",),
    ("zoo.nn",),
    ("zoo.containers",),
    ("zoo.plugins",),
)


def imports(path: Path, module: str, known: Iterable[str]) -> set[str]:
    """The modules of the house that a file imports anywhere, for typing too."""
    names = set(known)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            wanted = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            wanted = inside & names
            if wanted != inside:
                wanted = wanted | {node.module}
        else:
            continue
        found |= wanted & names
    return found - {module}


@functools.cache  # a comprehension below asks for it once a module
def house() -> dict[str, set[str]]:
    """Module -> what it imports of the house."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in ("zoo", "convert")
        for path in sorted((ROOT / package).rglob("*.py"))
    }
    return {module: imports(path, module, paths) for module, path in paths.items()}


def floor(module: str) -> int:
    """The number of the module's floor, 0 at the top."""
    _, found = max(
        (len(room), i)
        for i, rooms in enumerate(FLOORS)
        for room in rooms
        if module == room or module.startswith(f"{room}.")
    )
    return found


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another, each sorted (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_no_import_points_up() -> None:
    upward = [
        f"{module} (floor {floor(module)}) imports {other} (floor {floor(other)})"
        for module, others in house().items()
        for other in sorted(others)
        if floor(other) < floor(module)
    ]
    assert not upward


def test_rooms_of_one_floor_do_not_import_each_other_both_ways() -> None:
    room = {
        m: next(r for r in FLOORS[floor(m)] if m == r or m.startswith(f"{r}.")) for m in house()
    }
    rooms: dict[str, set[str]] = {}
    for module, others in house().items():
        rooms.setdefault(room[module], set()).update(room[o] for o in others)
    found = circles({r: others - {r} for r, others in rooms.items()})
    assert not found


def test_no_circle() -> None:
    found = circles(house())
    assert not found


def test_a_circle_would_be_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]
    assert floor("convert.engine.execute") < floor("zoo.checkpoint.plan")


def test_no_package_has_the_name_of_a_public_function() -> None:
    packages = {m for m in house() if any(o.startswith(f"{m}.") for o in house())}
    public = {f"convert.{n}" for n in convert.__all__} | {f"zoo.{n}" for n in zoo.__all__}
    both = packages & public
    assert not both


@pytest.mark.parametrize("package", ["zoo", "convert"])
def test_every_module_and_class_has_a_name_of_its_own(package: str) -> None:
    """But for the twins, which are one thing written twice, and what is private."""
    files = [
        p
        for p in (ROOT / package).rglob("*.py")
        if not {"models", "nn"} & set(p.parts) and p.stem not in ("__init__", "__main__")
    ]
    modules = Counter(p.stem for p in files)
    classes = Counter(
        node.name
        for p in files
        for node in ast.parse(p.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    twice = [name for name, count in (modules + classes).items() if count > 1]
    assert not twice
