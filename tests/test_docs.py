"""The documents: generated ones are fresh, the README's commands print what it says, code runs."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo.models
from convert.cli.main import cli
from zoo.registry import families

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_documents_are_fresh() -> None:
    for path, text in script("docs").pages().items():
        assert path.read_text() == text, f"{path.name} is stale: run scripts/docs.py"


def test_every_command_and_option_is_documented() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    for name, command in cli.commands.items():
        assert f"## `zooconvert {name}`" in page
        for parameter in command.params:
            assert all(option in page for option in parameter.opts if option.startswith("--"))


def test_every_link_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.fixture(scope="module")
def folder(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the README's tour begins."""
    place = tmp_path_factory.mktemp("tour")
    for name in ("model.safetensors", "config.json"):
        shutil.copy(minilm / name, place)
    tensors = load_file(place / "model.safetensors")
    del tensors["encoder.layer.2.output.dense.bias"]
    tensors["extra.weight"] = torch.zeros(2)
    tensors["pooler.dense.weight"] = torch.zeros(384, 383)
    save_file(tensors, place / "broken.safetensors")
    tensors = load_file(place / "model.safetensors")
    query = "encoder.layer.2.attention.self.query.weight"
    tensors[query] = tensors[query].T.contiguous()
    save_file(tensors, place / "untransposed.safetensors")
    (place / "nets.py").write_text(next(b for b in python() if b.startswith("# nets.py")))
    subprocess.run([sys.executable, "-c", TRAINED], cwd=place, check=True)
    return place


TRAINED = """
import torch
from nets import Net
net = Net()
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
for _ in range(3):
    optimizer.zero_grad()
    net(torch.randn(4, 3, 8, 8)).square().mean().backward()
    optimizer.step()
data = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
torch.save(data, "last.pt")
"""


def python() -> list[str]:
    """The README's blocks of Python."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def tour() -> list[tuple[str, list[str]]]:
    """(command, what the README says it prints) in the README's order."""
    steps: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                steps.append((line[2:], []))
            else:
                steps[-1][1].append(line)
    return steps


@pytest.mark.slow
def test_the_tour_prints_what_the_readme_says(folder: Path) -> None:
    assert len(tour()) > 4
    tool = Path(sys.executable).parent
    env = os.environ | {"PATH": f"{tool}:{os.environ['PATH']}"}
    for command, expected in tour():
        run = subprocess.run(command.split(), cwd=folder, capture_output=True, text=True, env=env)
        printed = (run.stdout + run.stderr).splitlines()
        if expected[-1] == "...":
            expected.pop()
            printed = printed[: len(expected)]
        assert printed == expected, command


@pytest.mark.slow
def test_the_readme_s_python_runs(folder: Path) -> None:
    blocks = python()
    assert len(blocks) == 9
    code = "\n".join(blocks)
    for source, *options in (["model.safetensors"], ["last.pt", "--torch", "nets.py:Net"]):
        if not (folder / Path(source).with_suffix(".flax")).exists():
            subprocess.run(
                [Path(sys.executable).with_name("zooconvert"), "torch2flax", source, *options],
                cwd=folder,
                check=True,
                capture_output=True,
            )
    run = subprocess.run(
        [sys.executable, "-W", "ignore::zoo.LoadNotice", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_a_new_model_s_skeleton_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_model = script("new_model")
    monkeypatch.setattr(new_model, "MODELS", tmp_path)
    assert new_model.main(["my_net"]) == 0
    assert new_model.main(["my_net"]) == 2, "it exists already"
    assert new_model.main(["not a name"]) == 2
    monkeypatch.setattr(zoo.models, "__path__", [*zoo.models.__path__, str(tmp_path)])
    families.cache_clear()
    try:
        model = zoo.create("my_net_small", framework="torch")
        twin = zoo.create("my_net_small", framework="flax")
        layout = families()["my_net"].layout_of(families()["my_net"].presets["my_net_small"])
        assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == layout.shapes("torch")
        assert twin.my_net_head.kernel.shape == layout.shapes("nnx")["my_net_head.kernel"]
    finally:
        families.cache_clear()


def test_nothing_of_this_machine_is_committed() -> None:
    """No registry hosts, no absolute paths of a workplace."""
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("no git here")
    unwanted = re.compile(r"/(?:work|opt|root)/\w|pypi\.\w+\.\w+|\.pyenv")
    for name in filter(None, run.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", "") and path.is_file():
            if path.name == "test_docs.py":
                continue
            found = unwanted.search(path.read_text())
            assert not found, f"{name}: {found.group() if found else ''}"
