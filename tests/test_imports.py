"""What is light stays light: frameworks are imported by what needs them and by nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "jax", "jaxlib", "flax", "optax", "orbax", "tensorstore", "onnx", "transformers")

RUN = """
import sys
sys.argv = ["zooconvert", *sys.argv[1:]]
from convert.cli.main import main
try:
    main()
except SystemExit as e:
    assert not e.code, e.code
print("HEAVY", sorted(m for m in {heavy} if m in sys.modules))
print("LIGHT", sorted(m for m in ("numpy", "rich", "ml_dtypes") if m in sys.modules))
""".replace("{heavy}", repr(HEAVY))


def imported(code: str, *arguments: str) -> dict[str, str]:
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    lines = [line.partition(" ") for line in run.stdout.splitlines()]
    return {key: value for key, _, value in lines if key in ("HEAVY", "LIGHT")}


@pytest.mark.parametrize("arguments", [["--help"], ["torch2flax", "--help"], ["--version"]])
def test_help_imports_next_to_nothing(arguments: list[str]) -> None:
    assert imported(RUN, *arguments) == {"HEAVY": "[]", "LIGHT": "[]"}


def test_inspect_models_and_a_conversion_to_msgpack_import_no_framework(
    minilm: Path, tmp_path: Path
) -> None:
    source = str(minilm / "model.safetensors")
    for arguments in [
        ["inspect", source],
        ["models"],
        ["torch2flax", source, str(tmp_path / "m.msgpack")],
        ["flax2torch", str(tmp_path / "m.msgpack"), str(tmp_path / "m.safetensors")],
        ["verify", source, str(tmp_path / "m.safetensors")],
    ]:
        assert imported(RUN, *arguments)["HEAVY"] == "[]", arguments


def test_this_test_can_fail() -> None:
    assert imported("import torch\n" + RUN, "--help")["HEAVY"] == "['torch']"


def imports_of(path: Path) -> set[str]:
    """Top-level imports of a module: those inside functions do not count, nor those for typing."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def below(imports: set[str], *packages: str) -> set[str]:
    return {i for i in imports if any(i == p or i.startswith(p + ".") for p in packages)}


def test_imports_point_down() -> None:
    for path in modules("zoo"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not below(set(names), "convert"), f"{path} imports convert"
            if "containers" in path.parts:
                house = below(set(names), "zoo") - below(set(names), "zoo.containers")
                assert not house, f"{path} imports {house}"


def test_frameworks_are_imported_at_the_top_only_where_they_belong() -> None:
    for path in [*modules("zoo"), *modules("convert")]:
        heavy = below(imports_of(path), *HEAVY)
        framework = path.stem.rpartition("_")[2]
        if (framework == "torch" and path.stem in ("model_torch", "into_torch")) or (
            "nn" in path.parts and framework == "torch"
        ):
            assert not below(heavy, "jax", "flax"), f"{path} imports both"
        elif (
            path.stem in ("model_flax", "into_flax", "into_shards")
            or "porting" in path.parts
            or ("nn" in path.parts and framework == "flax")
        ):
            assert not below(heavy, "torch"), f"{path} imports both"
        else:
            assert not heavy, f"{path} imports {heavy} when it is imported"


def test_twins_have_the_same_classes_in_the_same_order() -> None:
    for folder in sorted((ROOT / "zoo" / "models").iterdir()):
        if not (folder / "model_torch.py").is_file():
            continue
        a, b = (
            {
                node.name: [f.name for f in node.body if isinstance(f, ast.FunctionDef)]
                for node in ast.parse((folder / f"model_{f}.py").read_text()).body
                if isinstance(node, ast.ClassDef)
            }
            for f in ("torch", "flax")
        )
        assert list(a) == list(b), folder.name


def test_every_model_folder_has_the_same_files() -> None:
    wanted = {
        "__init__.py",
        "config.py",
        "layout.py",
        "model_torch.py",
        "model_flax.py",
        "README.md",
    }
    for folder in sorted((ROOT / "zoo" / "models").iterdir()):
        if folder.is_dir() and folder.name != "__pycache__":
            assert wanted <= {p.name for p in folder.iterdir()}, folder.name
