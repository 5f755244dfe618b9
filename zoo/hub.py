"""Where weights come from: what a user may write for a checkpoint, and the path that it means.

    path/to/file-or-directory         as it stands
    preset.tag                        weights in a model's folder, or in an installed package that
                                      declares an entry point `preset.tag` of group
                                      `zooconvert.weights`, whose value is "module:path/in/it"
    pkg:module/path/in/it             a file or directory of any installed package
    hf://org/repo[@revision]          a repository on the Hugging Face hub, through its cache

Nothing is imported from the packages that carry weights. NAME.json beside NAME.safetensors is its
card (`zoo.card`): data, licence, score.
"""

from __future__ import annotations

import importlib.util
import os
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path

from zoo import registry
from zoo.containers import filenames
from zoo.containers.committed import find
from zoo.containers.errors import MissingExtra, UsageError, ZooError

_SUFFIXES = (*filenames.CHECKPOINT_SUFFIXES, ".flax", ".json")


def locate(source: str | os.PathLike[str]) -> Path:
    """The local path of a checkpoint. Raises UsageError for what is nowhere, with what to try."""
    text = os.fspath(source)
    if text.startswith("hf://"):
        return _from_hub(text)
    if text.startswith("pkg:"):
        return _in_package(text.removeprefix("pkg:"), text)
    path = Path(text).expanduser()
    if find(path).exists():
        return path
    return _pretrained(text)


def beside(source: str | os.PathLike[str]) -> Path:
    """Where a result lies by default: at the source, but for what is a package's or the hub's, in
    whose directories nobody should write: then here, under the last part of its name."""
    text = os.fspath(source)
    if Path(text).expanduser().exists():
        return Path(text).expanduser()
    return Path(text.partition("@")[0].rstrip("/").rpartition("/")[2])


def pretrained() -> dict[str, Path]:
    """Every `preset.tag` that is installed here, and where its weights are."""
    found: dict[str, Path] = {}
    for model in registry.families().values():
        folder = importlib.util.find_spec(f"zoo.models.{model.name}")
        for root in (folder.submodule_search_locations or ()) if folder else ():
            for file in sorted(Path(root, "weights").glob("*.safetensors")):
                found[file.stem] = file
    for point in entry_points(group="zooconvert.weights"):
        found[point.name] = _in_package(point.value.replace(":", "/", 1), point.value)
    return found


def _pretrained(name: str) -> Path:
    everything = pretrained()
    if name in everything:
        return everything[name]
    if os.sep in name or name.endswith(_SUFFIXES):
        raise UsageError(f"{name} does not exist", "give the path of a file or a directory")
    try:
        found = registry.get(name)
    except UsageError as e:
        here = get_close_matches(name, os.listdir(), 1, 0.8)
        advice = f"did you mean {here[0]}?" if here else f"for the names of models: {e.advice}"
        raise UsageError(f"{name} is neither a file here nor a model of the zoo", advice) from None
    tags = [n for n in everything if n.partition(".")[0] in found.model.presets]
    raise UsageError(
        f"{name!r} is a model, and no weights of that name are installed",
        f"installed are {', '.join(tags)}"
        if tags
        else "give a checkpoint; zoo.create(...) makes fresh weights",
    )


def _in_package(inner: str, source: str) -> Path:
    package, _, rest = inner.partition("/")
    package, *folders = package.split(".")  # what is within a package is found by importing that
    rest = "/".join([*folders, rest])
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise UsageError(f"{source}: no package {package!r} is installed", f"pip install {package}")
    roots = spec.submodule_search_locations or [str(Path(spec.origin or "").parent)]
    for root in roots:
        base = Path(root).resolve()
        path = base / rest
        if path.exists() and path.resolve().is_relative_to(base):
            return path
    raise UsageError(
        f"{source}: the package {package!r} holds no {rest!r}", f"look below {roots[0]}"
    )


def _from_hub(source: str) -> Path:
    repo, _, revision = source.removeprefix("hf://").partition("@")
    if repo.count("/") != 1:
        raise UsageError(f"{source!r} names no repository", "write hf://organisation/repository")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError:
        raise MissingExtra(f"reading {source}", "hub") from None
    try:
        return Path(
            snapshot_download(
                repo, revision=revision or None, allow_patterns=list(filenames.HUB_PATTERNS)
            )
        )
    except HFValidationError as e:
        raise UsageError(f"{source!r} names no repository: {e}", "write hf://org/repo") from None
    except LocalEntryNotFoundError:
        raise ZooError(
            f"{source} is not in the local cache, and the hub cannot be reached",
            "check the network, or HF_HUB_OFFLINE if it is set",
        ) from None
    except (HfHubHTTPError, OSError) as e:
        reason = str(e).strip().splitlines()[0]
        raise ZooError(
            f"{source} cannot be fetched: {reason}", "check the name and your access"
        ) from None
